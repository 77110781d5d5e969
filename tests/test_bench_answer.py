"""python -m bench.answer: its figures are of what they say, on models of a few thousand parameters."""

import json

import numpy as np
import pytest
import tiny

import eval_arc
from bench import answer as bench_answer
from smol import arc, checkpoint, runtime, solve, suites

TINY = {"n_layer": 2, "layer_pattern": "ka", "n_head": 2, "n_embd": 24, "n_ff": 32}


def test_both_routes_are_timed(tmp_path, capsys):
    out = tmp_path / "found.json"
    bench_answer.main(["--side=3", "--rows=2", "--n_sup=2", f"--model_settings={TINY}", f"--out={out}"])
    a, b = json.loads(out.read_text())
    assert (a["model"], b["model"]) == ("dense", "trm") and a["tasks_per_second"] > 0 and b["hours"] > 0
    assert b["ms_per_step"] == pytest.approx(1000 * 2 / b["tasks_per_second"] / 2)
    assert "tasks_per_second" in capsys.readouterr().out


def test_hours_are_flops_over_the_cards_rate(monkeypatch):
    small, large = np.zeros((2, 2), np.uint8), np.zeros((30, 30), np.uint8)
    tasks = [
        arc.Task("a", "arc", [(small, small)], [(np.zeros((2, 3), np.uint8), None)] * 2),
        arc.Task("b", "arc", [(large, large)], [(large, None)]),  # too long
    ]
    monkeypatch.setattr(arc, "load", lambda name: tasks)
    for name, steps in (("trm", 5), ("dense", 1)):
        net = checkpoint.make_model(name, {**TINY, "block_size": 100})
        canvas = (2, 3) if name == "trm" else None
        length = len(arc.encode_prompt("arc", tasks[0].train, tasks[0].test[0][0], canvas=canvas))
        flops = 16 * 2 * steps * length * net.flops_per_token(length, "puzzle")
        expected = flops / (2 * runtime.CARDS["T4"][0] * 1e12 * 0.25) / 3600
        assert bench_answer.hours(net, 16, 5, "T4", 2, 0.25) == pytest.approx(expected)


def test_fewer_steps_are_what_the_evaluation_gives(monkeypatch):
    monkeypatch.setattr(bench_answer, "HALTS", (None, 0.5))
    net, tasks = tiny.make("trm"), suites.load("sudoku4")[:4]
    rows = bench_answer.fewer_steps(net, tasks, 2, 3)
    assert [(r["n_sup"], r["halt"]) for r in rows] == [(n, h) for n in (1, 2, 3) for h in (None, 0.5)]
    for r in rows[-2:]:
        settings = solve.Settings(augment=2, n_sup=r["n_sup"], halt=r["halt"])
        records = eval_arc.evaluate(tasks, lambda part, s=settings: solve.solve(net, part, s), 2, 2)
        figures = eval_arc.figures(records, 2)
        assert (r["solved"], r["in_two_attempts"]) == (figures["pass_1"], figures["pass_2"])
        given = net.answer(tasks, n_sup=r["n_sup"], halt=r["halt"], trace=True)
        assert r["steps"] == np.mean([len(steps) for (steps,) in given])


def test_mistakes_are_one_line(tmp_path):
    dense, trm = (tiny.save(tmp_path / f"{name}.pt", name, {}) for name in ("dense", "trm"))
    for words in (["gone.pt"], [dense], [trm, "--suite=logic"]):
        with pytest.raises(SystemExit, match="^error: [^\n]+$"):
            bench_answer.main(words)
