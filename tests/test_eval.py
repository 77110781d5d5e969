"""The evaluation as a command: what it writes, that runs can be killed, split and repeated, and what it refuses."""

import json
import os
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from tiny import grid, make, save

import eval_arc
import model_dense
import model_trm
from smol import arc, engine, puzzles, scores, solve, suites
from smol import report as report_page
from smol.solve import Candidate, Given

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)  # as the other processes have that answers are compared with, to the last bit
FIGURES = {
    "total",
    "solved",
    "interval",
    "score",
    "outputs_total",
    "outputs_solved",
    "outputs_interval",
    "attempts",
    "pass_1",
    "pass_2",
    "oracle",
    "candidates",
    "unknown",
    "too_long",
    "too_long_ids",
    "by_size",
    "cells_right",
    "cells_right_by_copying",
    "seconds",
    "available",
    "against",
    "protocol",
    "settings",
    "n_sup",
}
TESTED = {
    "input",
    "expected",
    "attempts",
    "right",
    "solved",
    "oracle",
    "votes",
    "scores",
    "candidates",
    "programs",
}
RECORD = {"key", "model", "suite", "id", "kind", "solved", "too_long", "seconds", "demonstrations", "test"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    train = {
        "iter": 7,
        "seconds": 12.5,
        "tokens_per_second": 1000.0,
        "val_loss": 9.25,
        "val_losses": {"text": 9.25, "maze": float("nan")},
    }
    return save(folder / "a" / "ckpt.pt", "dense", train), save(
        folder / "b" / "ckpt.pt", "trm", {"iter": 8, "val_loss": float("nan")}
    )


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval_arc.py", *map(str, args)])
    eval_arc.main()


def command(*args, **kw):
    return subprocess.Popen(
        [sys.executable, "eval_arc.py", *map(str, args), "--device=cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def answers(folder):
    """{(model, suite, id): record} without what differs from run to run."""
    lines = (folder / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    for r in records:
        del r["seconds"]
    return {(r["model"], r["suite"], r["id"]): r for r in records}


# asking


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_too_long_is_what_does_not_fit_into_block_size(name):
    """The row a model needs is counted here from the document format alone: markers, cells, row ends, and room for the answer."""
    tasks = puzzles.heldout("maze", 2) + puzzles.heldout("sudoku4", 3)
    # 7x7: 3 + 56 + 56 tokens, 4x4: 3 + 20 + 20; for Route B, whose question lies on the canvas, 2 + 56 and 2 + 20
    sudoku, maze = {"dense": (43, 115), "trm": (22, 58)}[name]
    for block_size, fits in ((sudoku - 1, 0), (sudoku, 3), (maze - 1, 3), (maze, 5)):
        model = make(name, block_size)
        figures = scores.figures(
            eval_arc.evaluate(tasks, lambda part: solve.solve(model, part, solve.Settings())), 1
        )
        assert figures["total"] - figures["too_long"] == fits
        assert (figures["cells_right"] is None) == (fits == 0)


def test_every_task_is_asked_once_with_others_of_its_length():
    tasks, asked = suites.load("arc1")[:50] + tuple(puzzles.heldout("sudoku4", 70)), []

    def answer(part):
        asked.append([t.id for t in part])
        return [[Given([]) for _ in t.test] for t in part]

    done = []
    eval_arc.evaluate(tasks, answer, 1, 4, progress=done.append)
    assert sorted(i for part in asked for i in part) == sorted(t.id for t in tasks)
    assert sum(done) == 120 and max(map(len, asked)) == eval_arc.ROWS_AT_ONCE // 4
    lengths = {t.id: eval_arc.length(t) for t in tasks}
    assert [lengths[i] for part in asked for i in part] == sorted(lengths.values(), reverse=True)


def test_without_answers_leaves_the_tasks_alone():
    tasks = puzzles.heldout("sudoku4", 2)
    hidden = eval_arc.without_answers(tasks)
    assert all(puzzles.check(t) for t in tasks)
    assert [h.test[0][0].tolist() for h in hidden] == [t.test[0][0].tolist() for t in tasks]


# names, picture


def test_names_tell_checkpoints_apart():
    assert eval_arc.name_models(["x/ckpt.pt", "y/ckpt.pt"], ["route_a", "route_b"]) == ["route_a", "route_b"]
    assert eval_arc.name_models(["x/a.pt", "y/a.pt", "z/a.pt"], ["route_a", "route_a", "route_b"]) == [
        "x",
        "y",
        "route_b",
    ]
    assert eval_arc.name_models(["x/a.pt", "x/b.pt"], ["route_b", "route_b"]) == ["x/a.pt", "x/b.pt"]
    assert eval_arc.name_models(["route_b/1.pt", "x/2.pt", "y/3.pt"], ["route_a", "route_a", "route_b"]) == [
        "route_b/1.pt",
        "x",
        "y/3.pt",
    ]


def records_of(tasks, right, given=None):
    """Records of a model that solves the tasks in `right` and answers the others with their input; given: {id: Given or None}."""
    out = []
    for t in tasks:
        answer = [Given([Candidate(y if t.id in right else x, 1)]) for x, y in t.test]
        out.append({**scores.judge(t, (given or {}).get(t.id, answer), 1), "suite": "sudoku4"})
    return out


def by_task(*per_model):
    """What choose() takes, of models that were all asked the same tasks."""
    return [dict(enumerate(records)) for records in zip(*per_model)]


def test_the_picture_shows_right_and_wrong_answers_of_each_model():
    tasks = puzzles.heldout("sudoku4", 20)
    right = [{"sudoku4-0013"}, {"sudoku4-0017", "sudoku4-0018"}]
    records = [records_of(tasks, ids) for ids in right]
    chosen = [tasks[i].id for i in eval_arc.choose(by_task(*records))]
    assert len(chosen) == len(set(chosen)) == eval_arc.SHOWN
    assert all(0 < len(ids & set(chosen)) < len(chosen) for ids in right)


def test_the_picture_prefers_what_fits_and_is_legible():
    large = arc.Task("large", "arc", [], [(np.zeros((20, 20), np.uint8), grid("1"))])
    small = [
        arc.Task(name, "arc", [], [(grid("12"), grid("1"))])
        for name in ("small", "long for one", "long for both")
    ]
    tasks = [large, *small]
    one = records_of(tasks, [], {"long for both": [None]})
    other = records_of(tasks, [], {"long for both": [None], "long for one": [None]})
    assert [tasks[i].id for i in eval_arc.choose(by_task(one, other), n=2)] == ["small", "large"]
    assert [tasks[i].id for i in eval_arc.choose(by_task(one), n=2)] == ["small", "long for one"]
    assert "long for both" not in [tasks[i].id for i in eval_arc.choose(by_task(one), n=9)]


def test_steps_shown():
    assert eval_arc.steps_shown(1) == [1] and eval_arc.steps_shown(6) == [1, 2, 3, 4, 5, 6]
    assert eval_arc.steps_shown(16) == [1, 2, 4, 8, 16] and eval_arc.steps_shown(11) == [1, 2, 4, 8, 11]


def test_a_row_shows_every_step_and_ends_with_the_answer_that_was_scored():
    model, tasks = make("trm"), puzzles.heldout("sudoku4", 4)
    for views in (1, 8):
        settings = solve.Settings(augment=views)
        for record in eval_arc.evaluate(tasks, lambda part: solve.solve(model, part, settings)):
            title, panels = eval_arc.picture_row(["B"], [{**record, "suite": "sudoku4"}])
            assert title == record["id"]
            assert [p[0].split(",")[0] for p in panels][:5] == [
                "puzzle",
                "expected",
                "B step 1",
                "B step 2",
                "B step 3",
            ]
            assert scores.rows_of(panels[-1][1]) == record["test"][0]["attempts"][0]
            assert all(scores.rows_of(p[2]) == record["test"][0]["expected"] for p in panels[2:])


# the command


def test_both_routes_through_the_command_line(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solve, "ANSWER_TOKENS", 20)  # an untrained model uses them all
    call(
        monkeypatch,
        *checkpoints,
        "--suites=sudoku4,transforms,logic,arc1",
        "--limit=2",
        f"--out_dir={tmp_path}",
        "--json=report.json",
    )
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert list(report) == ["route_a", "route_b"]
    for name, path, model in zip(report, checkpoints, (model_dense, model_trm)):
        r = report[name]
        assert r["params"] == model.Model(model.Config(**r["model_config"])).num_params()
        assert r["checkpoint"] == path and len(r["sha256"]) == 64
        assert list(r["suites"]) == ["sudoku4", "transforms", "logic", "arc1"]
        for suite, n in (("sudoku4", 100), ("transforms", 50), ("logic", 50), ("arc1", 400)):
            s = r["suites"][suite]
            assert set(s) == FIGURES and (s["total"], s["available"]) == (2, n)
            assert (
                s["attempts"] == (2 if suite == "arc1" else 1) and s["solved"] + s["too_long"] <= s["total"]
            )
        assert (
            r["suites"]["arc1"]["too_long"]
            == len(r["suites"]["arc1"]["too_long_ids"])
            > 0
            == r["suites"]["sudoku4"]["too_long"]
        )
        assert (
            r["protocol"] == "inductive"
            and r["settings"]["augment"] == 1
            and r["gpu_hours"] is None
            and r["seconds"] > 0
        )
    a, b = report["route_a"], report["route_b"]
    assert (a["train_seconds"], a["tokens_per_second"], a["val_loss"], a["iter"]) == (12.5, 1000.0, 9.25, 7)
    assert a["val_losses"] == {"text": 9.25, "maze": None}
    assert (b["train_seconds"], b["tokens_per_second"], b["val_loss"], b["iter"], b["n_sup"]) == (
        None,
        None,
        None,
        8,
        3,
    )
    assert a["sha256"] != b["sha256"] and a["n_sup"] is None
    assert list(a["suites"]["arc1"]["against"]) == ["route_b"]
    assert min(matplotlib.image.imread(tmp_path / "grids.png").shape[:2]) > 100
    assert "first 2 tasks" in out and "400 in arc1" in out and "9.250" in out

    records = answers(tmp_path)
    assert len(records) == 16
    for (model, suite, i), r in records.items():
        assert set(r) == RECORD - {"seconds"}
        for t in r["test"]:
            assert set(t) - {"steps"} == TESTED
            assert ("steps" in t) == (model == "route_b" and suite != "logic" and not r["too_long"])
            assert len(t["attempts"]) == len(t["right"]) == len(t["votes"]) == len(t["scores"])
        tasks = {t.id: t for t in suites.load(suite)}
        assert [scores.grid_of(t["expected"]) if suite != "logic" else t["expected"] for t in r["test"]][
            0
        ].__class__ in (np.ndarray, str)
        assert [t["input"] for t in r["test"]] == [scores.rows_of(x) for x, _ in tasks[i].test]
        assert [t["expected"] for t in r["test"]] == [scores.rows_of(y) for _, y in tasks[i].test]
        assert r["demonstrations"] == [[scores.rows_of(x), scores.rows_of(y)] for x, y in tasks[i].train]
    for name in report:
        for suite, s in report[name]["suites"].items():
            part = [r for (m, p, _), r in records.items() if (m, p) == (name, suite)]
            assert s["solved"] == sum(r["solved"] for r in part)
    assert sorted(json.loads((tmp_path / "submission_route_a_arc1.json").read_text())) == sorted(
        t.id for t in suites.load("arc1")[:2]
    )


def test_one_checkpoint_is_reported_beside_it(checkpoints, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run" / "ckpt.pt"
    path.parent.mkdir()
    path.write_bytes(open(checkpoints[1], "rb").read())
    call(monkeypatch, path, "--suites=sudoku4", "--limit=2", "--n_sup=2")
    report = json.loads((path.parent / "eval.json").read_text())
    assert list(report) == ["route_b"] and report["route_b"]["n_sup"] == 2
    assert {"answers.jsonl", "ckpt.pt", "eval.json", "grids.png"} <= set(os.listdir(path.parent))
    assert not [name for name in os.listdir(path.parent) if "partial" in name or "tmp" in name]
    assert "-" in capsys.readouterr().out


def test_nothing_to_show_is_said(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "ckpt.pt", "dense", {}, block_size=20)
    call(monkeypatch, path, "--suites=sudoku9", "--limit=3")
    assert "every task was too long" in capsys.readouterr().out
    suite = json.loads((tmp_path / "eval.json").read_text())["route_a"]["suites"]["sudoku9"]
    assert (suite["total"], suite["solved"], suite["too_long"], suite["cells_right"]) == (3, 0, 3, None)
    assert not (tmp_path / "grids.png").exists()


def test_a_killed_run_goes_on_and_gives_what_it_would_have_given(checkpoints, tmp_path, monkeypatch, capsys):
    """Killed with SIGKILL while it measures `language`, and of the tasks' answers, two and a half have reached the disk."""
    args = [checkpoints[1], "--suites=sudoku4,language", "--limit=3", "--augment=32", "--device=cpu"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = command(*args, f"--out_dir={killed}")
    partial, measured = killed / "answers.partial0.jsonl", killed / "measured.jsonl"
    while not (measured.exists() and measured.read_text().endswith("\n")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (killed / "eval.json").exists()
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:2]) + lines[2][:50])
    first, (found, *_) = (
        json.loads(lines[0]),
        [json.loads(line) for line in measured.read_text().splitlines()],
    )
    with open(measured, "a") as f:
        f.write('{"key": "cut off in the mid')
    call(monkeypatch, *args, f"--out_dir={killed}")
    said = capsys.readouterr().out
    assert "2 of 3 have been answered before" in said and "parts of it have been measured before" in said
    assert not partial.exists()
    again = [json.loads(line) for line in (killed / "answers.jsonl").read_text().splitlines()]
    assert first in again  # with the seconds it took then: it was not asked again
    call(monkeypatch, *args, f"--out_dir={whole}")
    assert answers(killed) == answers(whole)
    a, b = (
        json.loads((folder / "eval.json").read_text())["route_b"]["suites"]["language"]
        for folder in (killed, whole)
    )
    assert a.pop("seconds") >= found["found"]["seconds"] and b.pop("seconds") > 0 and a == b
    assert a["questions"] == found["found"]["figures"]
    lines = [
        json.loads(line) for line in measured.read_text().splitlines()
    ]  # what this evaluation has found, and nothing older
    assert {line["part"] for line in lines} > {"questions"} and len({line["key"] for line in lines}) == 1
    call(monkeypatch, checkpoints[1], "--suites=language", "--limit=1", f"--out_dir={killed}")
    keys = {json.loads(line)["key"] for line in measured.read_text().splitlines()}
    assert len(keys - {lines[0]["key"]}) == len(keys) == 1
    assert answers(killed) == answers(whole)


def test_other_settings_another_checkpoint_or_another_task_are_asked_anew(
    checkpoints, tmp_path, monkeypatch, capsys
):
    def asked_before(*args):
        call(monkeypatch, *args, f"--out_dir={tmp_path}", "--device=cpu")
        return "answered before" in capsys.readouterr().out

    args = (checkpoints[0], "--suites=sudoku4", "--limit=2")
    assert not asked_before(*args) and asked_before(*args) and asked_before(*args[:2], "--limit=3")
    assert not asked_before(*args, "--seed=2") and not asked_before(checkpoints[1], *args[1:])
    task = {"train": [], "test": [{"input": [[1]], "output": [[2]]}]}
    for expected, before in (([[2]], False), ([[2]], True), ([[3]], False)):
        task["test"][0]["output"] = expected
        (tmp_path / "own.json").write_text(json.dumps({"own": task}))
        assert asked_before(checkpoints[0], f"--tasks={tmp_path / 'own.json'}") == before


def test_a_second_evaluation_leaves_the_results_of_the_first(checkpoints, tmp_path, monkeypatch, capsys):
    """Another suite, another model, the same suite asked otherwise, and a checkpoint that was trained on."""
    run, out = tmp_path / "run", tmp_path / "out"
    other = save(tmp_path / "other" / "ckpt.pt", "trm", {"iter": 9}, block_size=255)
    save(run / "ckpt.pt", "trm", {"iter": 8})
    pair = {"input": [[1, 0], [0, 2]], "output": [[0, 1], [2, 0]]}
    (tmp_path / "own.json").write_text(json.dumps({"train": [pair, pair], "test": [pair]}))

    def evaluate(*args):
        call(monkeypatch, *args, f"--out_dir={out}", "--device=cpu")
        report = json.loads((out / "eval.json").read_text(), parse_constant=pytest.fail)
        of = {
            (model, suite): len([k for k in answers(out) if k[:2] == (model, suite)])
            for model, suite, _ in answers(out)
        }
        parts = ((name, suite, s) for name, r in report.items() for suite, s in r["suites"].items())
        assert of == {(name, suite): s["total"] for name, suite, s in parts}
        assert matplotlib.image.imread(out / "grids.png").shape[0] > 100
        shown = report_page.gather(str(out))
        assert [m["name"] for m in shown["models"]] == list(report)
        assert sum(len(t["answers"]) for t in shown["tasks"]) == sum(of.values())
        return report, of

    first, _ = evaluate(run / "ckpt.pt", "--suites=sudoku4", "--limit=3", "--n_sup=2")
    killed = {"model": "route_b", "suite": "maze", "key": "of a run that was killed"}
    (out / "answers.partial1.jsonl").write_text(json.dumps(killed) + "\n")
    report, of = evaluate(run / "ckpt.pt", f"--tasks={tmp_path / 'own.json'}")
    assert of == {("route_b", "sudoku4"): 3, ("route_b", "tasks"): 1}
    assert report["route_b"]["suites"]["sudoku4"] == first["route_b"]["suites"]["sudoku4"]
    parts = report["route_b"]["suites"]
    assert {suite: s["n_sup"] for suite, s in parts.items()} == {"sudoku4": 2, "tasks": 3}
    seconds = sum(s["seconds"] for s in parts.values())
    assert report["route_b"]["seconds"] == pytest.approx(seconds, abs=2e-3)
    prize = (out / "submission_route_b_tasks.json").read_text()
    assert prize == (out / "submission.json").read_text() and list(json.loads(prize)) == ["own"]
    said = capsys.readouterr().out
    assert "asked another time, with --n_sup=2" in said and "first 3 tasks" in said

    # A Route B by another path and content, beside a Route A
    report, of = evaluate(other, checkpoints[0], "--suites=sudoku4", "--limit=2")
    others = {("other", "sudoku4"): 2, ("route_a", "sudoku4"): 2}
    assert of == {("route_b", "sudoku4"): 3, ("route_b", "tasks"): 1, **others}
    assert {name: set(r["suites"]["sudoku4"]["against"]) for name, r in report.items()} == {
        name: set(report) - {name} for name in report
    }
    assert (out / "submission.json").read_text() == prize

    report, of = evaluate(run / "ckpt.pt", "--suites=sudoku4", "--limit=1", "--augment=2")  # the same
    assert (of["route_b", "sudoku4"], of["route_b", "tasks"], of["other", "sudoku4"]) == (1, 1, 2)
    assert report["route_b"]["suites"]["sudoku4"]["settings"]["augment"] == 2
    capsys.readouterr()
    save(run / "ckpt.pt", "trm", {"iter": 20})
    report, of = evaluate(run / "ckpt.pt", "--suites=maze", "--limit=1")
    assert of == {("route_b", "maze"): 1, **others} and report["route_b"]["iter"] == 20
    assert "has been trained on since" in capsys.readouterr().out
    assert not [name for name in os.listdir(out) if "partial" in name]  # maze has been asked now


def test_what_was_killed_is_kept_while_others_are_asked(checkpoints, tmp_path, monkeypatch):
    line = {"model": "route_b", "suite": "maze", "key": "of a run that was killed"}
    for n in (0, 1):
        (tmp_path / f"answers.partial{n}.jsonl").write_text(json.dumps({**line, "id": n}) + "\n")
    call(monkeypatch, checkpoints[1], "--suites=sudoku4", "--limit=1", f"--out_dir={tmp_path}")
    left = [json.loads(text) for text in (tmp_path / "answers.partial0.jsonl").read_text().splitlines()]
    assert sorted(left, key=lambda x: x["id"]) == [{**line, "id": n} for n in (0, 1)]
    assert not (tmp_path / "answers.partial1.jsonl").exists()


def test_figures_that_cannot_be_added_to_are_not_overwritten(checkpoints, tmp_path, monkeypatch):
    for content in ("cut off {", '{"route_b": {"suites": {"sudoku4": {"solved": 1}}}}', '{"model": "trm"}'):
        (tmp_path / "eval.json").write_text(content)
        with pytest.raises(SystemExit, match="eval.json is") as stopped:
            call(monkeypatch, checkpoints[1], "--suites=sudoku4", "--limit=1", f"--out_dir={tmp_path}")
        assert "\n" not in stopped.value.code and (tmp_path / "eval.json").read_text() == content


def test_the_table_begins_with_the_official_score(checkpoints, tmp_path, monkeypatch, capsys):
    """Of two test inputs, one is right: half a point, and no task solved. Puzzles have no such score."""
    test = [(grid("12"), grid("12")), (grid("11"), grid("33"))]
    tasks = [arc.Task("t", "arc", [(grid("1"), grid("2"))], test)]

    def echo(model, part, settings):
        return [[Given([Candidate(x, 1)]) for x, _ in t.test] for t in part]

    monkeypatch.setattr(solve, "solve", echo)
    monkeypatch.setattr(arc, "read_tasks", lambda path: tasks)
    args = "--tasks=mine", "--suites=sudoku4", "--limit=1", f"--out_dir={tmp_path}"
    call(monkeypatch, checkpoints[1], *args)
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line.split()[1:2] == ["route_b"]}
    head = next(line for line in said.splitlines() if "pass@2" in line)
    assert head.split()[:2] == ["score", "pass@2"]
    assert rows["tasks"][: head.index("solved") + 6].split()[2:] == ["50.0%", "0", "0/1"]
    assert not rows["sudoku4"][len("sudoku4  route_b") : head.index("pass@2") + 6].strip()
    assert "score 50.0%, 0 of 1 solved" in said


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_a_model_of_nan_answers_nothing_and_its_evaluation_ends(name, tmp_path, monkeypatch, capsys):
    """In every suite and with everything that is tried on an answer; and what is written is JSON."""
    path = save(tmp_path / "ckpt.pt", name, {"iter": 1}, block_size=600)
    broken = torch.load(path)
    broken["weights"] = {k: v * float("nan") for k, v in broken["weights"].items()}
    torch.save(broken, path)
    monkeypatch.setattr(solve, "ANSWER_TOKENS", 20)
    # Route A's own way out of numbers that are not finite: no grid for that row
    nothing = lambda logits, read_on, limits, *_, **__: [None] * len(limits)  # noqa: E731
    monkeypatch.setattr(engine, "write_grids", nothing)

    def refuse(*args, **named):
        raise ValueError("logits that are not finite")

    monkeypatch.setattr(engine, "sample", refuse)
    args = ["--limit=2", "--augment=2", "--ttt_steps=1", f"--out_dir={tmp_path}", "--device=cpu"]
    call(monkeypatch, path, "--suites=sudoku4,transforms,logic,language", *args)
    out = capsys.readouterr().out
    text = (tmp_path / "eval.json").read_text()
    (report,) = json.loads(text, parse_constant=pytest.fail).values()
    for suite in ("sudoku4", "transforms", "logic"):
        s = report["suites"][suite]
        assert (s["total"], s["solved"], s["candidates"]) == (2, 0, 0), suite
    for test in (t for r in answers(tmp_path).values() for t in r["test"]):
        assert not test["attempts"] and not any(grid for grid, _ in test.get("steps", []))
    for line in (tmp_path / "measured.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert "0 of 2 solved" in out
    call(monkeypatch, path, "--suites=sudoku4", "--limit=1", *args[-2:])  # what is there can be added to


def test_two_processes_give_what_one_gives(checkpoints, tmp_path, monkeypatch):
    args = [*checkpoints, "--suites=sudoku4", "--limit=3", "--augment=16", "--samples=2", "--device=cpu"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29577"]
    done = subprocess.run(
        [sys.executable, *launcher, "eval_arc.py", *args, f"--out_dir={tmp_path / '2'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("route_a sudoku4: ") == 1  # one of them speaks
    call(monkeypatch, *args, f"--out_dir={tmp_path / '1'}")
    one, two = answers(tmp_path / "1"), answers(tmp_path / "2")
    assert one == two and len(one) == 6
    assert not [name for name in os.listdir(tmp_path / "2") if "partial" in name]


def test_your_own_tasks(checkpoints, tmp_path, monkeypatch, capsys):
    pair = {"input": [[1, 0], [0, 2]], "output": [[0, 1], [2, 0]]}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "known.json").write_text(json.dumps({"train": [pair, pair], "test": [pair]}))
    (folder / "open.json").write_text(
        json.dumps({"train": [pair, pair], "test": [{"input": pair["input"]}] * 2})
    )
    call(monkeypatch, checkpoints[1], f"--tasks={folder}", f"--out_dir={tmp_path}")
    s = json.loads((tmp_path / "eval.json").read_text())["route_b"]["suites"]
    assert list(s) == ["tasks"] and (s["tasks"]["total"], s["tasks"]["unknown"], s["tasks"]["attempts"]) == (
        1,
        1,
        2,
    )
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert {k: len(v) for k, v in submission.items()} == {"known": 1, "open": 2}
    assert answers(tmp_path)["route_b", "tasks", "open"]["solved"] is None


@pytest.mark.parametrize(
    "sources, steps, protocol",
    [
        (["arc", "maze"], 0, "inductive"),
        (["arc", "maze"], 3, "ttt"),
        (["arc", "arc_eval_demos"], 0, "transductive"),
        (None, 0, "inductive"),
        (["arc_eval_demos"], 3, "transductive + ttt"),
    ],
)
def test_the_report_says_what_was_known_of_the_tasks(sources, steps, protocol):
    ckpt = {
        "model": "dense",
        "model_config": {},
        "train": {"data": {"stage": "s", "tag": "t", "sources": sources}},
    }
    report = eval_arc.report_on(
        __file__, make("dense"), ckpt, solve.Settings(ttt_steps=steps), "cpu", "float32"
    )
    assert report["protocol"] == protocol and report["data"] == {
        "stage": "s",
        "tag": "t",
        "snapshot": None,
        "sources": sources,
    }


@pytest.mark.parametrize(
    "args, words",
    [
        (["{bad}"], "not a checkpoint"),
        (["{good}", "{bad}"], "not a checkpoint"),
        (["{torch}"], "bare state dict"),
        (["{newer}"], "update smol-llm"),
        (["{nano}"], "nanoGPT"),
        (["{folder}/missing.pt"], "does not exist"),
        (["{good}", "--suites=sudoku4,sudku4"], "did you mean 'sudoku4'"),
        (["{good}", "--suites="], "names no suite"),
        (["{good}", "--suites=maze_hard"], "test.csv"),
        (["{good}", "--tasks={folder}/nowhere"], "there is no"),
        (["{good}", "--tasks={bad}"], "not JSON"),
        (["{good}", "--limit=0"], "1 or more"),
        (["{good}", "--augment=many"], "1 or more"),
        (["{good}", "--n_sup=4"], "Route B"),
        (["{good}", "--halt=90"], "between 0 and 1"),
        (["{good}", "--temperature=-1"], "0 or more"),
        (["{good}", "--ttt_lr=nan"], "above 0"),
        (["{good}", "--json=../eval.json"], "without a folder"),
        (["{good}", "--device=abacus"], "--device=cpu"),
        (["{good}", "--dtype=int8"], "float32"),
        (["{good}", "{good}"], "given twice"),
        (["{good}", "--out_dir={bad}"], "notes.txt"),
        ([], "CKPT"),
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(args, words, checkpoints, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("text, no checkpoint\n" * 20)
    torch.save({"a": torch.zeros(2)}, tmp_path / "torch.pt")
    torch.save({**torch.load(checkpoints[0]), "format": 99}, tmp_path / "newer.pt")
    torch.save({"model": {"a": torch.zeros(2)}, "model_args": {}, "iter_num": 1}, tmp_path / "nano.pt")
    for name in ("eval.json", "grids.png"):
        (tmp_path / name).write_text("from before")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    names = {
        "bad": tmp_path / "notes.txt",
        "good": checkpoints[0],
        "folder": tmp_path,
        **{name: tmp_path / f"{name}.pt" for name in ("torch", "newer", "nano")},
    }
    args = [a.format(**names) for a in args]
    if not any(a.startswith("--out_dir") for a in args) and args:
        args.append(f"--out_dir={tmp_path}")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *args)
    message = stopped.value.code
    assert message.startswith("error: ") and "\n" not in message and words in message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_several_checkpoints_need_a_place_for_the_results(checkpoints, monkeypatch):
    with pytest.raises(SystemExit, match="--out_dir"):
        call(monkeypatch, *checkpoints)
