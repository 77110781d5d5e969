"""bench/recursion.py: its experiments run, and test puzzles are never trained on."""

import numpy as np

from bench import recursion
from smol import arc
from smol import tokenizer as tok


def test_experiments_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "n_layer=2,layer_pattern=ka,n_embd=32,n_head=2,n_ff=48"
    contenders = f"A:dense,{small}", f"B:trm,{small},n_latent=1,n_recursion=1,n_sup=2,carry_turns=2"
    options = ["--gflops=0.5", "--tokens=256", "--n=3", "--save=saved"]
    recursion.main(["learn", "--task=sudoku4-2-4", *(f"--contender={c}" for c in contenders), *options])
    recursion.main(["draw", "out/recursion/learn.jsonl"])
    recursion.main(["halting", "saved2.pt", "--suite=sudoku4-4", "--n=5", "--n_sup=4"])
    recursion.main(["bounds", "saved2.pt", "--n_sup=2"])
    recursion.main(["core", "--lengths=32", "--tokens=64", "--steps=1", f"--settings={small}"])
    for picture in ("learn", "halting", "bounds"):
        assert (tmp_path / f"out/recursion/{picture}.png").stat().st_size > 5000


def test_test_puzzles_are_never_trained_on():
    """Of 3x3 mazes there are few: some of those drawn are the test's."""
    tasks, avoid = recursion.unseen("maze-3", 12)
    tests = {arc.encode("maze", t.test)[:-1].tobytes() for t in tasks}

    def drawn(avoid):
        batches = recursion.Puzzles("maze-3", "autoregressive", 512, 0, avoid)
        rows = [row for _ in range(10) for row in batches.next_batch()[0]]
        return {row[row != tok.PAD].numpy().astype(np.uint16).tobytes() for row in rows}

    assert len(tests) == 12 and tests & drawn(set()) and not tests & drawn(avoid)
