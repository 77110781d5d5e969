"""bench/: rows are what they say, on tiny shapes in this process; how fast that is never fails a test."""

import itertools
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import compare, decode, gpu, plan
from bench import kda as bench_kda
from bench import train as bench_train
from smol import checkpoint, puzzles

CONFIG = """
model = "dense"
n_layer, n_head, n_embd, n_ff = 4, 2, 16, 24
block_size, batch_size, gradient_accumulation_steps, max_iters = 32, 2, 6, 100
optimizer = "adamw"
"""
TINY = {"n_layer": 4, "n_head": 2, "n_embd": 16, "n_ff": 24}
NANOGPT = """
import torch, torch.nn as nn, torch.nn.functional as F
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList([nn.Linear(config.n_embd, config.n_embd)])})
    def forward(self, idx, targets=None):
        x = self.transformer.wte(idx)
        logits = self.transformer.h[0](x) @ self.transformer.wte.weight.T
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def nanogpt(tmp_path):
    """A stand-in with the names that nanoGPT's model.py has."""
    (tmp_path / "model.py").write_text(NANOGPT)
    return str(tmp_path)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "small.py").write_text(CONFIG)
    return str(tmp_path / "small.py")


@pytest.fixture
def small_kda(monkeypatch):
    """bench/kda.py takes no time."""
    monkeypatch.setattr(bench_kda, "SHAPES", bench_kda.TINY_SHAPES)
    monkeypatch.setattr(bench_kda, "medians_ms", one_ms_two_ms)


def one_ms_two_ms(runs, device):
    """Runs each once; the first took 1 ms, the second 2."""
    for run in runs.values():
        run()
    return {name: 1.0 + n for n, name in enumerate(runs)}


def test_kda_stands_beside_attention_with_all_kinds_of_gates(small_kda, tmp_path):
    bench_kda.main([f"--json_file={tmp_path / 'kda.json'}"])
    rows = json.load(open(tmp_path / "kda.json"))["rows"]
    assert [r["what"] for r in rows] == ["operator"] * 4 + ["layer", "decoding step"]
    for row in rows[:5]:
        assert [r["ratio"] for r in row["rivals"].values()][0] == 0.5  # ours over theirs


def test_a_gpu_day_goes_through_and_a_part_that_fails_leaves_the_others(small_kda, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "apart", bench_train.one_step)

    def fails(c, device):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "part_decode", fails)
    gpu.main(["kda", "speed", "train", "decode", "eval", "--quick=True", f"--out_dir={tmp_path}"])
    parts = json.load(open(tmp_path / "gpu.json"))["parts"]
    assert parts.pop("decode")["failed"] == "RuntimeError: no such kernel"
    tables = (tmp_path / "gpu.md").read_text()
    assert "## decode, 0 s\n\nRuntimeError: no such kernel\n" in tables
    for part in parts.values():
        header = "| " + " | ".join(k for k in part["rows"][0] if k != "rivals")
        assert header in tables
    assert "| beside scaled_dot_product_attention |" in tables and "| 0.5 |" in tables
    assert all(part["rows"] for part in parts.values()), parts
    for row in parts["kda"]["rows"]:
        limit = 1e-4 if row["dtype"] == "float32" else 2e-2
        assert max(row["output"], row["state"], row["gradients"]) < limit, row


def test_the_plain_gpt_is_as_large_as_route_a():
    for settings in (bench_train.SMALL, {}):
        with torch.device("meta"):
            plain = checkpoint.make_model("dense", bench_train.same_size_gpt(settings))
            route_a = checkpoint.make_model("dense", settings)
        assert plain.config.layer_pattern == "a"
        assert plain.num_params() == pytest.approx(route_a.num_params(), rel=0.003)


def test_a_training_step_is_timed_in_a_process_of_its_own(nanogpt, monkeypatch):
    spec = {"model": "trm", "settings": TINY, "rows": 2, "T": 16, "steps": 1, "optimizer": "muon"}
    spec |= {"dtype": "float32", "device": "cpu", "recompute": True, "compile": False}
    figures = bench_train.apart(spec)
    assert figures["tokens_per_second"] == pytest.approx(2 * 16 / (figures["ms"] / 1000))
    assert figures["params"] > 800_000 and figures["memory_gb"] > 0.1
    assert bench_train.one_step({**spec, "model": "nanogpt", "path": nanogpt})["tokens_per_second"] > 0
    monkeypatch.setattr(bench_train, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    assert bench_train.apart({**spec, "model": "dense", "T": 10**7, "rows": 10**6}) is None  # out of memory


def test_both_routes_stand_beside_a_plain_gpt_and_a_config_gets_its_fastest_way(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(bench_train, "apart", bench_train.one_step)
    monkeypatch.setattr(bench_train, "SMALL", TINY)
    path = str(tmp_path / "rows.json")
    bench_train.main(["--size=small", "--lengths=(16,)", "--tokens=16", "--steps=1", f"--json_file={path}"])
    rows = json.load(open(path))
    assert [r["what"] for r in rows] == ["plain GPT", "Route A", "Route B"]
    assert all(r["ratio"] == r["tokens_per_second"] / rows[0]["tokens_per_second"] for r in rows)
    monkeypatch.setattr(bench_train, "MOST_ROWS", 1)
    bench_train.main([config, "--steps=1"])
    advice, out = r"^--batch_size=(\d+) --gradient_accumulation_steps=(\d+) ", capsys.readouterr().out
    found = re.search(advice, out, re.M)
    assert int(found[1]) * int(found[2]) == 12  # the global batch stays what it is


def test_plan_counts_tokens_hours_and_memory(config, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    rates = ((1, 1), (2, 10), (3, 30))  # a fifth of its steps of 100 tokens is padding
    lines = [{"iter": i, "tokens": 80 * i, "tokens_per_second": x} for i, x in rates]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    of_log = {"batch_size": 2, "gradient_accumulation_steps": 1, "block_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(of_log))
    plan.main([config, "--max_iters=1000", f"--log={log}"])
    out, tokens = capsys.readouterr().out, 1000 * 2 * 6 * 32
    assert f"1,000 steps of 384 tokens = {tokens / 1e9:.2f}B" in out
    assert f"hours: {0.8 * tokens / 10 / 3600:.1f} at 10 tokens/s" in out
    assert "kB a token" in out and "of 16 GB" in out
    rates = []
    for recompute in (False, True):
        plan.main([config, "--model=trm", f"--recompute={recompute}", "--puzzles=1"])
        out = capsys.readouterr().out
        assert "for the carries of puzzles" in out
        rates.append(float(re.search(r"at ([\d,]+) tokens/s", out)[1].replace(",", "")))
    # 3 recursions of 7 passes, one of them with a gradient, which is twice a forward: 35 passes, and 7 again
    assert rates[0] / rates[1] == pytest.approx(42 / 35, rel=1e-3)
    with pytest.raises(SystemExit, match="error: card must be one of"):
        plan.main([config, "--card=T1000"])


@pytest.mark.parametrize("model", ["dense", "trm"])
def test_the_memory_of_a_token_is_told_from_what_every_batch_takes(model):
    settings = {"n_layer": 4, "n_head": 2, "n_embd": 32, "n_ff": 48, "n_latent": 1, "n_recursion": 1}
    c = SimpleNamespace(model=model, block_size=128, recompute=False, **settings)
    net = checkpoint.make_model(model, vars(c)).train()
    per_token, constant = plan.activation_bytes(net, c)
    kept = plan.saved_bytes(net, torch.randint(0, 50000, (1, 256)), torch.bfloat16)
    assert constant + 256 * per_token == pytest.approx(kept, rel=0.02)
    assert constant > 4 * 50304 * 32  # the gradient of the head


def test_decode_rows(tmp_path):
    path = str(tmp_path / "rows.json")
    sizes = ["--contexts=(30, 300)", "--batches=(1, 2)", "--steps=1", f"--model={TINY}"]
    decode.main([*sizes, f"--json_file={path}"])
    rows = json.load(open(path))
    names = ("Route A", "attention")
    asked = [(n, batch, name) for n, batch in ((30, 1), (300, 1), (30, 2)) for name in names]
    assert [(r["context"], r["batch"], r["name"]) for r in rows] == asked
    size = {(r["context"], r["batch"], r["name"]): r["cache_mb"] for r in rows}
    room = 30 + 2 + 1  # the context, two steps that warm up, and the one that is timed
    assert size[30, 1, "attention"] == pytest.approx(4 * 2 * room * 16 * 4 / 1e6)
    assert size[300, 1, "attention"] - size[30, 1, "attention"] == pytest.approx(4 * 2 * 270 * 16 * 4 / 1e6)
    assert size[300, 1, "Route A"] - size[30, 1, "Route A"] == pytest.approx(2 * 270 * 16 * 4 / 1e6)


SETTINGS = "--n_layer=4 --n_head=2 --n_embd=16 --n_ff=24 --block_size=96 --batch_size=1 --eval_batches=1 "
SETTINGS += "--gradient_accumulation_steps=1 --compile=False"


def test_contenders_train_through_train_py(tmp_path):
    contender = f"B [x]: {SETTINGS} --model=trm --n_latent=1 --n_recursion=1 --n_sup=2"
    sizes = ["--seconds=0.5", "--points=2", "--n_train=300", "--n_test=3", "--n_sup=(1, 2)"]
    compare.main([contender, "--puzzle=sudoku4-4-6", *sizes, f"--out_dir={tmp_path}"])
    (row,) = json.load(open(tmp_path / "compare.json"))["rows"]
    seconds = [p["seconds"] for p in row["curve"]]
    assert len(seconds) == 2 and seconds == sorted(seconds) and row["curve"][-1]["tokens"] > 0
    assert list(row["curve"][-1]["solved"]) == ["1", "2"]
    rollouts = row["curve"][-1]["rollouts"]
    assert list(rollouts) == ["0.3", "1.0"] and all(0 <= a <= b <= 3 for a, b in rollouts.values())
    assert np.shape(row["curve"][-1]["by_steps"]["1.0"]) == (8, 2)
    for picture in ("compare.png", "B_[x]-1.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    # killed, it goes on with as many steps, however fast they are now
    begun = {k: v for k, v in row.items() if k != "curve"}
    (tmp_path / "B_[x]-1.json").write_text(json.dumps(begun))
    with pytest.raises(SystemExit, match=r"B_\[x\]-1 was trained otherwise"):
        compare.main([f"{contender} --ema=0.9", "--puzzle=sudoku4-4-6", *sizes, f"--out_dir={tmp_path}"])
    before = (tmp_path / "B_[x]-1-probe/log.jsonl").stat().st_mtime_ns, row["curve"][-1]["iter"]
    compare.main([contender, "--puzzle=sudoku4-4-6", *sizes, f"--out_dir={tmp_path}"])
    (again,) = json.load(open(tmp_path / "compare.json"))["rows"]
    assert ((tmp_path / "B_[x]-1-probe/log.jsonl").stat().st_mtime_ns, again["curve"][-1]["iter"]) == before
    more = ["--rival_rows=3", "--trm_mixer=False"]  # a rival may come later
    compare.main([contender, "--puzzle=sudoku4-4-6", *sizes, *more, f"--out_dir={tmp_path}"])
    assert json.load(open(tmp_path / "compare.json"))["rows"] == [again]
    for argv, says in (
        ([*sizes[1:], "--puzzle=maze-5"], "has a comparison on sudoku4-4-6, 300 puzzles and 3 tests: name"),
        ([*sizes[1:], "--puzzle=sudoku4-4-6", "--seconds=9"], r"B_\[x\]-1 was trained otherwise"),
        ([*sizes, "--puzzle=sudoku4-4-6", "--noise=(0.5,)"], r"B_\[x\]-1 was trained otherwise"),
    ):
        with pytest.raises(SystemExit, match=says):
            compare.main([contender, *argv, f"--out_dir={tmp_path}"])


def test_recolouring_can_be_read_off_the_demonstrations():
    rng, numbers = np.random.default_rng(0), {False: set(), True: set()}
    for test in [False] * 200 + [True] * 20:
        task = compare.draw("recolour-2-4", rng, test)
        becomes = {}
        for a, b in task.train:
            becomes |= dict(zip(a.ravel().tolist(), b.ravel().tolist()))
            assert len(set(a.ravel().tolist())) == len(becomes)  # each shows every colour
        ((question, answer),) = task.test
        assert [becomes[c] for c in question.ravel().tolist()] == answer.ravel().tolist()
        assert len(set(becomes.values())) == len(becomes) and answer.shape == (3, 3)
        numbers[test].add(len(becomes))
    assert numbers == {False: {2, 3, 4}, True: {4}}


def test_the_answer_of_the_first_rollouts_and_steps_counts():
    tasks = [puzzles.sudoku(np.random.default_rng(i), 4, 4, "test") for i in range(4)]
    right, wrong = ([t.test[0][1] for t in tasks[i:] + tasks[:i]] for i in (0, 1))
    traces = [  # two rollouts of two steps, each of which has a vote
        [(right[0], 0.2), (None, 0.0), (right[0], 0.9), (wrong[0], 0.8)],
        [(right[1], 0.2), (None, 0.0), (right[1], 0.7), (wrong[1], 0.8)],
        [(wrong[2], 0.2), (None, 0.0), (wrong[2], 0.7), (wrong[2], 0.8)],
        [(wrong[3], 0.2), (right[3], 0.3), (right[3], 0.9), (wrong[3], 0.8)],
    ]

    def answer(tasks, n_sup, n_rollouts, trace, noise):
        assert all(t.test[0][1].size == 1 for t in tasks) and trace and noise == 0.5
        return [[steps] for steps in traces]

    net = SimpleNamespace(answer=answer, puzzle_format="canvas")
    taken, some = compare.solved_by(net, tasks, 2, 2, noise=0.5)
    assert taken.tolist() == [[2, 3], [3, 2]]
    assert some.tolist() == [[2, 3], [3, 3]]
    votes = [(wrong[0], 0.9), (right[0], 0.2), (right[0], 0.3)]
    assert compare.solved([votes], tasks[:1], 1, 3)[0].tolist() == [[0], [0], [1]]

    # Route A: its first answer counts, the most probable; a task that was too long has none
    drawn = [[[(right[0], -0.1), (wrong[0], -2.0)]], [[(wrong[1], -0.1), (right[1], -2.0)]], [None], [[]]]
    net = SimpleNamespace(answer=lambda tasks: drawn, puzzle_format="autoregressive")
    assert [t.tolist() for t in compare.solved_by(net, tasks)] == [[[1]], [[1]]]


LOSSES = """
import torch

class ACTLossHead(torch.nn.Module):
    def __init__(self, model, loss_type):
        super().__init__()
        self.model = model

    def initial_carry(self, batch):
        return self.model.initial_carry(batch)

    def forward(self, return_keys, carry, batch):
        carry, outputs = self.model(carry, batch)
        logits, labels = outputs["logits"].flatten(0, 1), carry.current_data["labels"].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels) * len(batch["inputs"])
        return carry, loss, {}, {}, carry.halted.all()
"""
TRM = """
import torch
from types import SimpleNamespace

class TinyRecursiveReasoningModel_ACTV1(torch.nn.Module):
    # right from its second step on; with much noise wrong, always in the same way

    def __init__(self, config):
        super().__init__()
        self.config, self.sure = config, torch.nn.Parameter(torch.ones(()))
        self.inner = SimpleNamespace(reset_carry=self.reset_carry)

    def reset_carry(self, halted, carry):
        z = torch.where(halted[:, None, None], 0.0, carry.z_L)
        return SimpleNamespace(z_H=z, z_L=z)

    def initial_carry(self, batch):
        n, cells = batch["inputs"].shape
        assert cells == self.config["seq_len"] and batch["inputs"].min() == 1 and batch["labels"].max() <= 10
        z, data = torch.full((n, cells, 1), 9.0), {k: torch.zeros_like(v) for k, v in batch.items()}
        carry = SimpleNamespace(inner_carry=SimpleNamespace(z_H=z, z_L=z), current_data=data)
        carry.steps, carry.halted = torch.zeros(n), torch.ones(n, dtype=torch.bool)
        return carry

    def forward(self, carry, batch):
        halted, data = carry.halted, dict(carry.current_data)
        for k, v in batch.items():
            data[k] = torch.where(halted.view(-1, *[1] * (v.ndim - 1)), v, data[k])
        inner = self.reset_carry(halted, carry.inner_carry)
        steps = torch.where(halted, 0, carry.steps) + 1
        size = inner.z_L.abs().sum((1, 2))
        right = (steps > 1) & (size < 100)
        cells = torch.where(right[:, None], data["labels"], data["inputs"])
        logits = self.sure * torch.nn.functional.one_hot(cells, self.config["vocab_size"])
        outputs = {"logits": logits, "q_halt_logits": steps - size}
        carry = SimpleNamespace(inner_carry=inner, steps=steps, halted=steps >= 2, current_data=data)
        return carry, outputs
"""


def test_published_trm_is_trained_and_asked_with_rollouts(tmp_path, monkeypatch):
    """A checkout with its interface, whose answers are known."""
    recursive = tmp_path / "trm/models/recursive_reasoning"
    recursive.mkdir(parents=True)
    (recursive.parent / "losses.py").write_text(LOSSES)
    (recursive / "trm.py").write_text(TRM)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr(compare, "N_BATCHES_TRM", 5)
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.01).__next__)
    monkeypatch.setattr(compare, "time", clock)  # a step takes 0.01 s
    sizes = ["--seconds=0.2", "--points=2", "--n_train=100", "--n_test=3", "--n_sup=(1, 2)", "--n_rollouts=4"]
    where = [f"--trm={tmp_path / 'trm'}", f"--out_dir={tmp_path / 'out'}", "--noise=(0.0, 100.0)"]
    compare.main([*where, *sizes, "--puzzle=sudoku4-4-6"])
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]
    (row,) = json.load(open(tmp_path / "out/compare.json"))["rows"]
    first, last = row["curve"]
    assert (row["name"], row["params"], first["solved"]) == ("TRM, mixer", 1, {"1": 0, "2": 3})
    assert last["tokens"] == 10 * 16 * last["iter"] and "rollouts" in last and first["rollouts"] == {}
    assert last["rollouts"] == {"0.0": [3, 3], "100.0": [0, 3]}  # three votes of four are wrong


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--puzzle=turn-2-8"], "nobody to compare"),
        (["--trm=there", "--puzzle=maze-5"], "--trm is for sudokus"),
        (["--trm=there", "--puzzle=sudoku4-4-6", "--n_train=100"], "--trm=there is no checkout"),
        (["A b: config/route_a_demo.py", "A_b: config/route_a_demo.py"], "different names, got A b, A_b"),
        (["A: config/route_a_demo.py", "--puzzle=maze-3"], "--puzzle=maze-3 has hardly more than"),
        (["A: config/route_a_demo.py", "--puzzle=chess"], "--puzzle=chess: there are"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_line(argv, says, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{says}"):
        compare.main([*argv, f"--out_dir={tmp_path}"])


def test_nanogpt_learns_the_text_of_the_demo(nanogpt, data, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "N_BATCHES", 5)
    sizes = ["--seconds=0.5", "--points=1", "--nanogpt_settings={'n_layer': 1, 'n_head': 2, 'n_embd': 16}"]
    where = [f"--nanogpt={nanogpt}", f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}"]
    compare.main([*where, *sizes, "--text={'docstrings': 1}"])
    (row,) = json.load(open(tmp_path / "out/compare.json"))["rows"]
    assert row["name"] == "nanoGPT" and row["curve"][-1]["val_loss"] < 20
