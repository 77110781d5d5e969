"""bench.py answer: its figures are of what they say, on a model of a few thousand parameters."""

import json

import numpy as np
import torch

import arc
import bench
import bench_answer
import checkpoint
import hardware
import puzzles

TINY = dict(n_layer=2, layer_pattern="ka", n_head=2, n_embd=24, n_ff=32, n_latent=2, n_recursion=2)


def test_figures(monkeypatch, capsys):
    torch.set_num_threads(1)
    monkeypatch.setattr(bench_answer, "SMALL", TINY)
    bench_answer.main(["answer", "--json", "--side=3", "--rows=2", "--n_sup=3", "--size=small"])
    found = json.loads(capsys.readouterr().out)
    b = found["route_b"]
    assert b["rows"] == 2 and b["length"] == 2 + 2 * 12 + 1
    assert b["tasks_per_second"] > 0 and abs(b["tasks_per_second"] / b["steps_per_second"] - 2 / 3) < 1e-6
    assert abs(b["predicted_ms"] - 3 * b["pass_ms"] - 3 * b["pass_both_ms"]) < 1e-6
    assert found["route_a"]["tasks_per_second"] > 0
    bench_answer.main(["answer", "--side=3", "--rows=1", "--n_sup=2", "--size=small"])
    assert "supervision steps/s" in capsys.readouterr().out


def test_projected_hours_are_flops_over_the_cards_rate(monkeypatch):
    tasks = [arc.Task("a", "arc", [(np.zeros((2, 2), np.uint8),) * 2], [(np.zeros((2, 3), np.uint8),) * 2] * 2),
             arc.Task("b", "arc", [(np.zeros((30, 30), np.uint8),) * 2], [(np.zeros((30, 30), np.uint8),) * 2])]  # fmt: skip
    monkeypatch.setattr(arc, "load", lambda name: tasks)
    net = checkpoint.make_model("trm", {**TINY, "block_size": 100, "n_sup": 5})
    found = bench_answer.projection(net, 16, "T4", 2, 0.25)
    length = len(arc.encode_prompt("arc", tasks[0].train, tasks[0].test[0][0], canvas=(2, 3)))
    flops = 16 * 2 * 5 * length * net.flops_per_token(length, "puzzle")
    assert (found["tests"], found["left_out"]) == (2, 1)
    assert abs(found["hours"] - flops / (2 * hardware.CARDS["T4"][0] * 1e12 * 0.25) / 3600) < 1e-9 * found["hours"] + 1e-15


def test_memory_is_the_same_however_long_it_thinks():
    torch.set_num_threads(1)
    net = checkpoint.make_model("trm", {**TINY, "n_embd": 96, "n_ff": 256}).eval()
    tasks = [puzzles.maze(np.random.default_rng(0), 12, 12) for _ in range(8)]

    def mb(n):
        return bench.peak_mb(lambda: net.answer(tasks, n_sup=n), "cpu")

    mb(1)
    few, many = mb(1), mb(6)
    if few is not None:
        assert many < 1.3 * few + 8
