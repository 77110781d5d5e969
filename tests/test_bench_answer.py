"""python -m bench.answer: its figures are of what they say, on a model of a few thousand parameters."""

import itertools
import json

import numpy as np
import pytest
import tiny
import torch

import eval_arc
import model_dense
from bench import answer as bench_answer
from bench import kda as bench_kda
from smol import arc, checkpoint, puzzles, runtime, solve

TINY = dict(n_layer=2, layer_pattern="ka", n_head=2, n_embd=24, n_ff=32, n_latent=2, n_recursion=2)


def test_figures(monkeypatch, capsys):
    torch.set_num_threads(1)
    monkeypatch.setattr(bench_answer, "SMALL", TINY)
    bench_answer.main(["--json", "--side=3", "--rows=2", "--n_sup=3", "--size=small"])
    found = json.loads(capsys.readouterr().out)
    b = found["route_b"]
    assert b["rows"] == 2 and b["length"] == 2 + 12
    assert b["tasks_per_second"] > 0 and abs(b["tasks_per_second"] / b["steps_per_second"] - 2 / 3) < 1e-6
    assert abs(b["predicted_ms"] - 3 * b["pass_ms"] - 3 * b["pass_both_ms"]) < 1e-6
    assert found["route_a"]["tasks_per_second"] > 0
    bench_answer.main(["--side=3", "--rows=1", "--n_sup=2", "--size=small"])
    assert "supervision steps/s" in capsys.readouterr().out


def test_projected_hours_are_flops_over_the_cards_rate(monkeypatch):
    tasks = [
        arc.Task("a", "arc", [(np.zeros((2, 2), np.uint8),) * 2], [(np.zeros((2, 3), np.uint8),) * 2] * 2),
        arc.Task("b", "arc", [(np.zeros((30, 30), np.uint8),) * 2], [(np.zeros((30, 30), np.uint8),) * 2]),
    ]
    monkeypatch.setattr(arc, "load", lambda name: tasks)
    net = checkpoint.make_model("trm", {**TINY, "block_size": 100, "n_sup": 5})
    found = bench_answer.projection(net, 16, "T4", 2, 0.25)
    length = len(arc.encode_prompt("arc", tasks[0].train, tasks[0].test[0][0], canvas=(2, 3)))
    flops = 16 * 2 * 5 * length * net.flops_per_token(length, "puzzle")
    assert (found["tests"], found["left_out"]) == (2, 1)
    assert (
        abs(found["hours"] - flops / (2 * runtime.CARDS["T4"][0] * 1e12 * 0.25) / 3600)
        < 1e-9 * found["hours"] + 1e-15
    )


def test_hours_of_writing_are_steps_times_what_starting_or_fetching_takes(monkeypatch):
    """Two tasks of three views in one batch: as many steps as the longest answer has tokens, once, however many rows there are."""
    grid = np.zeros((2, 3), np.uint8)
    tasks = [
        arc.Task(name, "arc", [(grid, grid)], [(grid, np.zeros(shape, np.uint8))])
        for name, shape in (("a", (2, 3)), ("b", (2, 1)))
    ]
    monkeypatch.setattr(arc, "load", lambda name: tasks)
    monkeypatch.setattr(bench_answer, "operations", lambda net: 500)
    net = checkpoint.make_model(
        "dense",
        {"n_layer": 2, "layer_pattern": "ka", "n_head": 2, "n_embd": 24, "n_ff": 32, "block_size": 100},
    )
    found = bench_answer.projection(net, 3, "T4", 1, 0.25)
    steps = 2 * 4 + 1
    assert abs(found["hours_writing"] * 3600 - steps * 500 * bench_answer.LAUNCH_US / 1e6) < 1e-9
    assert (
        bench_answer.projection(net, 3, "T4", 2, 0.25)["hours"]
        == found["hours"] / 2
        > found["hours_writing"] / 2
    )
    monkeypatch.setattr(bench_answer, "GB_PER_S", {"T4": 1e-6})  # now memory is what takes the time
    length = len(arc.encode_prompt("arc", tasks[0].train, grid)) + 2 * 4
    held = 2 * net.num_params() + 6 * model_dense.cache_bytes(net.config, length, 2)
    slow = bench_answer.projection(net, 3, "T4", 1, 0.25)
    assert (
        abs(slow["hours_writing"] * 3600 / (steps * held / (1e3 * bench_answer.BANDWIDTH_SHARE)) - 1) < 1e-9
    )


def test_the_operations_of_a_step_grow_with_layers_alone():
    two, four, wide = (
        bench_answer.operations(checkpoint.make_model("dense", {**TINY, **more, "layer_pattern": "ka"}))
        for more in ({}, {"n_layer": 4}, {"n_embd": 48})
    )
    assert two == wide and 10 < two < four < 2 * two


def test_fewer_steps_and_halting_are_read_off_as_they_would_be_asked():
    net, tasks = tiny.make("trm"), puzzles.heldout("sudoku4", 5)
    with torch.no_grad():
        net.q_head.weight *= 3
    rows = bench_answer.halting(net, tasks, 3, 3)
    assert {(r["views"], r["n_sup"]) for r in rows if r["halt"] is None} == set(
        itertools.product((1, 2, 3), (1, 2, 3))
    )
    for r in rows[::6]:
        settings, asked = solve.Settings(augment=r["views"], n_sup=r["n_sup"], halt=r["halt"]), []
        for task in tasks:
            part = [solve.look(view, task) for view in solve.views(task, r["views"], settings.seed)]
            asked += [
                len(steps) for (steps,) in net.answer(part, n_sup=r["n_sup"], halt=r["halt"], trace=True)
            ]
        records = eval_arc.evaluate(tasks, lambda part, s=settings: solve.solve(net, part, s), 2, 3)
        figures = eval_arc.figures(records, 2)
        assert (r["steps"], r["solved"], r["pass_2"], r["total"]) == (
            np.mean(asked),
            figures["pass_1"],
            figures["pass_2"],
            5,
        )
    assert len({r["steps"] for r in rows if r["n_sup"] == 3}) > 2  # some do halt


def test_a_checkpoint_is_asked_by_the_command(tmp_path, capsys, monkeypatch):
    path = tiny.save(tmp_path / "b.pt", "trm", {})
    bench_answer.main([f"--checkpoint={path}", "--limit=2", "--views=2", "--n_sup=2"])
    lines = capsys.readouterr().out.splitlines()
    assert "on 2 tasks of sudoku4" in lines[0] and lines[4].startswith("* ") and len(lines) >= 4 + 2 * 2
    for args, words in (
        ([f"--checkpoint={tmp_path}/c.pt"], "does not exist"),
        ([f"--checkpoint={path}", "--suite=sudku4"], "sudoku4"),
        ([f"--checkpoint={path}", "--suite=logic"], "in words"),
        ([f"--checkpoint={tiny.save(tmp_path / 'a.pt', 'dense', {})}"], "Route A"),
    ):
        with pytest.raises(SystemExit) as stopped:
            bench_answer.main([*args])
        assert (
            stopped.value.code.startswith("error: ")
            and words in stopped.value.code
            and "\n" not in stopped.value.code
        )


def test_memory_is_the_same_however_long_it_thinks():
    torch.set_num_threads(1)
    net = checkpoint.make_model("trm", {**TINY, "n_embd": 96, "n_ff": 256}).eval()
    tasks = [puzzles.maze(np.random.default_rng(0), 12, 12) for _ in range(8)]

    def mb(n):
        return bench_kda.peak_mb(lambda: net.answer(tasks, n_sup=n), "cpu")

    mb(1)
    few, many = mb(1), mb(6)
    if few is not None:
        assert many < 1.3 * few + 8
