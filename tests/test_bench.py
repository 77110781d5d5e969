"""bench/kda.py measures what it says it measures; how fast that is never fails a test."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kda as bench_kda
from bench import train as bench_train
from smol import checkpoint

ROOT = Path(__file__).parent.parent
CONFIG = """
model = "dense"
n_layer, n_head, n_embd, n_ff = 4, 2, 16, 24
block_size, batch_size, gradient_accumulation_steps, max_iters = 32, 2, 6, 100
optimizer = "adamw"
"""


def test_kda_rows_have_a_rival_and_a_ratio(monkeypatch, capsys):
    monkeypatch.setattr(bench_kda, "CPU_SHAPES", [(1, 32, 2, 8)])
    monkeypatch.setattr(bench_kda, "LAYER_SHAPES", [(2, 16, 24, 2)])
    monkeypatch.setattr(bench_kda, "DECODING_SHAPES", [(2, 2, 8)])
    monkeypatch.setattr("sys.argv", ["kda", "--json"])
    bench_kda.main()
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__ and report["matmul_gflops"] > 0
    assert [r["what"] for r in report["rows"]] == ["operator", "layer", "decoding step"]
    for row in report["rows"][:2]:
        assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["rivals"]
        for rival in row["rivals"].values():
            assert rival["ratio"] == row["both_ms"] / rival["both_ms"]
    monkeypatch.setattr("sys.argv", ["kda"])
    bench_kda.main()
    assert "scaled_dot_product_attention" in capsys.readouterr().out


def test_peak_memory_sees_what_was_freed_again():
    def run():
        return (torch.ones(25_000_000) * 2).sum()  # 100 MB twice

    assert 150 < bench_kda.peak_mb(run, "cpu") < 300
    assert bench_kda.peak_mb(lambda: None, "cpu") < 20


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "bench.train", *words], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


def test_the_plain_gpt_is_as_large_as_route_a():
    for settings in (bench_train.SMALL, {}):
        plain = checkpoint.make_model("dense", bench_train.same_size_gpt(settings))
        assert plain.config.layer_pattern == "a"
        assert plain.num_params() == pytest.approx(
            checkpoint.make_model("dense", settings).num_params(), rel=0.003
        )


def test_a_training_step_is_timed_in_a_process_of_its_own():
    spec = {
        "model": "trm",
        "settings": {"n_layer": 4, "n_head": 2, "n_embd": 16, "n_ff": 24},
        "rows": 2,
        "T": 16,
        "steps": 1,
        "dtype": "float32",
        "device": "cpu",
        "optimizer": "muon",
        "recompute": True,
        "batches": 2,
    }
    figures = bench_train.apart(spec)
    assert figures["tokens_per_second"] == pytest.approx(2 * 2 * 16 / (figures["ms"] / 1000))
    assert figures["params"] > 800_000 and figures["memory_gb"] > 0.1
    assert (
        bench_train.apart({**spec, "model": "dense", "T": 10_000_000, "rows": 1000}) is None
    )  # more memory than there is
    with pytest.raises(ValueError, match="n_head=3"):
        bench_train.apart({**spec, "settings": {**spec["settings"], "n_head": 3}})


def test_train_puts_both_routes_beside_a_plain_gpt():
    done = run("train", "--json", "--size=small", "--lengths=16", "--tokens=16", "--steps=1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [r["what"] for r in report["rows"]] == ["plain GPT", "Route A", "Route B"] and report["rows"][0][
        "ratio"
    ] == 1
    assert all(
        r["ratio"] == r["tokens_per_second"] / report["rows"][0]["tokens_per_second"] for r in report["rows"]
    )


def test_sweep_ends_with_arguments_that_keep_the_global_batch(tmp_path):
    (tmp_path / "small.py").write_text(CONFIG)
    done = run("sweep", str(tmp_path / "small.py"), "--steps=1", "--most_rows=1")
    assert done.returncode == 0, done.stderr
    rows, steps = map(
        int,
        re.search(
            r"^--batch_size=(\d+) --gradient_accumulation_steps=(\d+) --dtype=", done.stdout, re.M
        ).groups(),
    )
    assert rows * steps == 12


def test_plan_counts_tokens_hours_and_memory(tmp_path):
    (tmp_path / "small.py").write_text(CONFIG)
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps({"iter": i, "tokens_per_second": x}) + "\n" for i, x in enumerate((1, 10, 30)))
    )
    done = run("plan", str(tmp_path / "small.py"), "max_iters=1000", f"--log={tmp_path / 'log.jsonl'}")
    assert done.returncode == 0, done.stderr
    tokens = 1000 * 2 * 6 * 32
    assert f"1,000 steps of 384 tokens = {tokens / 1e9:.2f}B" in done.stdout
    assert f"hours: {tokens / 10 / 3600:.1f} at the 10 tokens/s measured" in done.stdout
    assert "kB a token" in done.stdout and "of 16 GB" in done.stdout
    for words, part in (
        (["plan", "config/none.py"], "config/none.py"),
        (["plan", str(tmp_path / "small.py"), "--card=T1000"], "T1000"),
        (["sweep", str(tmp_path / "small.py"), "batch=2"], "'batch'"),
    ):
        done = run(*words)
        assert done.returncode == 1 and part in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
