"""Hard sudokus: they are what they are said to be, symmetries keep them, and the recipe that trains on them runs from end to end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_puzzles import solved_otherwise

from smol import arc, puzzles, snapshots, sudoku_extreme
from smol.loader import puzzle_row

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hard():
    rng = np.random.default_rng(3)
    return [sudoku_extreme.hard_sudoku(rng, backtracks) for backtracks in (0, 2, 5)]


def test_hard_sudokus_have_one_solution_and_no_given_too_many(hard):
    for task, backtracks in zip(hard, (0, 2, 5)):
        puzzle, answer = task.test[0]
        assert puzzles.check_sudoku(puzzle, answer)
        assert solved_otherwise(puzzle) == [answer.tolist()]
        assert puzzles.solve_sudoku(puzzle)[1] >= backtracks
        for cell in np.flatnonzero(puzzle)[:4]:
            fewer = puzzle.copy()
            fewer.flat[cell] = 0
            assert len(solved_otherwise(fewer)) == 2
    with pytest.raises(ValueError, match="backtracks"):
        sudoku_extreme.hard_sudoku(np.random.default_rng(0), -1)


def test_symmetries_make_other_sudokus_of_the_same_kind(hard):
    puzzle, answer = hard[0].test[0]
    rng, seen = np.random.default_rng(1), set()
    for _ in range(50):
        p, a = puzzles.shuffle_sudoku(rng, puzzle, answer)
        assert puzzles.check_sudoku(p, a) and (p > 0).sum() == (puzzle > 0).sum()
        seen.add(a.tobytes())
    assert len(seen) == 50


def test_the_loader_shuffles_question_and_answer_alike(hard):
    document, seen = arc.encode("sudoku", hard[0].test), set()
    for n in range(5):
        ids, targets = puzzle_row(document, "autoregressive", "sudoku", np.random.default_rng(n))
        _, [(p, a)] = arc.decode(np.append(ids, targets[-1]))
        assert puzzles.check_sudoku(p, a)
        seen.add(p.tobytes())
    assert len(seen) == 5
    assert np.array_equal(
        puzzle_row(document, "canvas", "none")[0], puzzle_row(document, "canvas", "sudoku")[0]
    )  # no rng: as it is


def test_rows_that_are_no_sudoku_are_left_out(hard, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    rows = [["".join(str(v or ".") for v in grid.flat) for grid in task.test[0]] for task in hard]
    rows.insert(1, [rows[0][0] + "1", rows[0][1] + "1"])
    lines = ["\ufeffquestion,answer", *map(",".join, rows)]
    (tmp_path / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **more: tmp_path / "train.csv")
    tasks = sudoku_extreme.from_hub("train", 4, np.random.default_rng(0), "abc")
    assert len(tasks) == 3 and all(puzzles.check_sudoku(*task.test[0]) for task in tasks)
    assert "train.csv, row 2 is dropped" in capsys.readouterr().out


def test_the_recipe_runs(tmp_path):
    """Prepared without the hub, trained a few steps on a small core, evaluated; and one line of error where the hub is insisted on."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(ROOT),
    }

    def run(*args):
        return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=tmp_path, env=env)

    here = "-m", "smol.sudoku_extreme"
    prepared = run(*here, "--n=4", "--n_test=2", "--backtracks=1")
    assert prepared.returncode == 0 and "making puzzles here" in prepared.stdout, prepared.stderr
    manifest, mixture = snapshots.read_manifest(tmp_path / "data", "sudoku_extreme")
    assert {e["split"]: (e["documents"], e["augment"]) for e in manifest} == {
        "train": (4, "sudoku"),
        "val": (2, "none"),
    }
    assert "generated" in mixture["origin"]
    small = [
        "--n_layer=2",
        "--layer_pattern=ka",
        "--n_head=2",
        "--n_embd=32",
        "--n_ff=48",
        "--n_latent=1",
        "--n_recursion=1",
        "--n_sup=2",
        "--batch_size=2",
        "--gradient_accumulation_steps=2",
        "--max_iters=2",
        "--eval_interval=2",
        "--device=cpu",
    ]
    trained = run(str(ROOT / "train.py"), str(ROOT / "config/sudoku_extreme.py"), *small)
    assert trained.returncode == 0, trained.stderr
    evaluated = run(*here, "out/sudoku_extreme/ckpt.pt")
    assert evaluated.returncode == 0 and "after  2 supervision steps   solved 0 (0.0%)" in evaluated.stdout, (
        evaluated.stderr
    )
    refused = run(*here, "--source=hub")
    assert refused.returncode == 1 and refused.stderr.startswith(
        "error: sapientinc/sudoku-extreme cannot be had"
    )
    assert len(refused.stderr.splitlines()) == 1
