"""The evaluation: what it counts, that the models cannot see what they are asked for, what it writes, and what it refuses."""
import json
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

import arc
import checkpoint
import eval_arc
import model_dense
import model_trm
import puzzles
import tokenizer as tok

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIGURES = {"total", "solved", "too_long", "outputs_total", "outputs_solved", "attempts", "cells_right", "cells_right_by_copying", "seconds"}


def make(name, block_size=256):
    """A tiny model whose answers depend on everything it reads."""
    torch.manual_seed(1)
    settings = {"n_layer": 2, "layer_pattern": "ka", "n_head": 2, "n_embd": 16, "n_ff": 24, "block_size": block_size}
    recursion = {"n_latent": 1, "n_recursion": 1, "n_sup": 3} if name == "trm" else {}
    model = checkpoint.make_model(name, {**settings, **recursion})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


def save(path, name, train, block_size=256):
    model = make(name, block_size)
    checkpoint.save({"format": checkpoint.CHECKPOINT_FORMAT, "model": name, "model_config": dict(vars(model.config)),
                     "weights": model.state_dict(), "ema": None, "tokenizer": tok.fingerprint(), "train": train}, str(path))
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    train = {"iter": 7, "seconds": 12.5, "tokens_per_second": 1000.0, "val_loss": 9.25, "val_losses": {"text": 9.25, "maze": float("nan")}}
    return save(folder / "a" / "ckpt.pt", "dense", train), save(folder / "b" / "ckpt.pt", "trm", {"iter": 8, "val_loss": float("nan")})


def grid(text):
    return np.array([[int(c) for c in row] for row in text.split("/")], np.uint8)


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval_arc.py", *map(str, args)])
    eval_arc.main()


# counting

TASKS = [
    arc.Task("one", "arc", [(grid("1"), grid("2"))], [(grid("12/34"), grid("12/35"))]),
    arc.Task("two", "arc", [(grid("1"), grid("2"))], [(grid("111"), grid("222")), (grid("44"), grid("55"))]),
]
RIGHT = {task.id: [y for _, y in task.test] for task in TASKS}


def oracle(tasks):
    return [[[(y, 0.0)] for y in RIGHT[task.id]] for task in tasks]


def test_an_oracle_solves_everything():
    figures, answers = eval_arc.evaluate(TASKS, oracle)
    assert set(figures) == FIGURES
    counts = [figures[k] for k in ("solved", "total", "outputs_solved", "outputs_total", "too_long")]
    assert counts == [2, 2, 3, 3, 0]
    assert figures["cells_right"] == 1.0
    assert figures["cells_right_by_copying"] == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert all(np.array_equal(candidates[0], y) for i in RIGHT for candidates, y in zip(answers[i], RIGHT[i]))


def test_one_wrong_cell_or_one_wrong_size_is_wrong():
    figures, _ = eval_arc.evaluate(TASKS, lambda tasks: [[[((y + 1) % 10, 0.0)] for y in RIGHT[t.id]] for t in tasks])
    assert (figures["solved"], figures["outputs_solved"], figures["cells_right"]) == (0, 0, 0.0)
    given = {"one": [grid("12/34")], "two": [grid("2222"), grid("55")]}
    figures, _ = eval_arc.evaluate(TASKS, lambda tasks: [[[(g, 0.0)] for g in given[t.id]] for t in tasks])
    assert (figures["solved"], figures["outputs_solved"]) == (0, 1)
    assert figures["cells_right"] == pytest.approx((3 / 4 + 0 + 1) / 3, abs=1e-6)


def test_a_second_attempt_counts_where_two_are_allowed():
    def late(tasks):
        return [[[(grid("0"), 1.0), (y, 0.5)] for y in RIGHT[t.id]] for t in tasks]

    assert eval_arc.evaluate(TASKS, late, attempts=1)[0]["solved"] == 0
    figures, _ = eval_arc.evaluate(TASKS, late, attempts=2)
    assert (figures["solved"], figures["attempts"], figures["cells_right"]) == (2, 2, 0.0)


def test_no_answer_is_wrong_but_not_too_long():
    figures, _ = eval_arc.evaluate(TASKS, lambda tasks: [[[] for _ in t.test] for t in tasks])
    assert (figures["solved"], figures["too_long"], figures["cells_right"]) == (0, 0, 0.0)


def test_a_task_is_too_long_if_one_of_its_inputs_is():
    figures, _ = eval_arc.evaluate(TASKS, lambda tasks: [[None if t.id == "two" and j == 1 else [(y, 0.0)]
                                                          for j, y in enumerate(RIGHT[t.id])] for t in tasks])
    assert (figures["solved"], figures["too_long"], figures["outputs_solved"], figures["cells_right"]) == (1, 1, 2, 1.0)


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_too_long_is_what_does_not_fit_into_block_size(name):
    """The row a model needs is counted here from the document format alone: markers, cells, row ends, and room for the answer."""
    tasks = puzzles.heldout("maze", 2) + puzzles.heldout("sudoku4", 3)   # 7x7: 3 + 56 + 56 tokens; 4x4: 3 + 20 + 20
    for block_size, fits in ((42, 0), (43, 3), (114, 3), (115, 5)):
        figures, _ = eval_arc.evaluate(tasks, make(name, block_size).answer)
        assert figures["total"] - figures["too_long"] == fits
        assert (figures["cells_right"] is None) == (fits == 0)


def test_progress_is_told_about_every_task():
    tasks, done = puzzles.heldout("sudoku4", 70), []
    eval_arc.evaluate(tasks, lambda part: [[[]] for _ in part], progress=done.append)
    assert sum(done) == 70 and max(done) <= eval_arc.BATCH


# what the models see

@pytest.mark.parametrize("name", ["dense", "trm"])
def test_answers_do_not_depend_on_the_test_outputs(name):
    rng, model = np.random.default_rng(3), make(name, 400)
    tasks = puzzles.heldout("sudoku4", 3) + puzzles.heldout("transforms", 6)
    noisy = [arc.Task(t.id, t.kind, t.train, [(x, rng.integers(0, 10, rng.integers(1, 31, 2)).astype(np.uint8)) for x, _ in t.test])
             for t in tasks]
    seen = []

    def spy(part):
        seen.extend(y for t in part for _, y in t.test)
        return model.answer(part)

    (_, a), (_, b) = eval_arc.evaluate(tasks, spy), eval_arc.evaluate(noisy, spy)
    assert len(seen) == 18 and all(y.shape == (1, 1) and y[0, 0] == 0 for y in seen)
    assert any(g is not None for given in a.values() for g in given)
    for task in tasks:
        for one, other in zip(a[task.id], b[task.id]):
            assert (one is None) == (other is None)
            assert one is None or [g.tolist() for g in one] == [g.tolist() for g in other]


def test_without_answers_leaves_the_tasks_alone():
    tasks = puzzles.heldout("sudoku4", 2)
    hidden = eval_arc.without_answers(tasks)
    assert all(puzzles.check(t) for t in tasks)
    assert [h.test[0][0].tolist() for h in hidden] == [t.test[0][0].tolist() for t in tasks]


def test_suites_are_the_whole_sets():
    assert {s: len(eval_arc.load_suite(s)) for s in eval_arc.SUITES} == {
        "arc1": 400, "arc2": 120, **puzzles.HELD_OUT_N}


# names, picture

def test_names_tell_checkpoints_apart():
    assert eval_arc.name_models(["x/ckpt.pt", "y/ckpt.pt"], ["route_a", "route_b"]) == ["route_a", "route_b"]
    assert eval_arc.name_models(["x/a.pt", "y/a.pt", "z/a.pt"], ["route_a", "route_a", "route_b"]) == ["x", "y", "route_b"]
    assert eval_arc.name_models(["x/a.pt", "x/b.pt"], ["route_b", "route_b"]) == ["x/a.pt", "x/b.pt"]
    assert eval_arc.name_models(["route_b/1.pt", "x/2.pt", "y/3.pt"], ["route_a", "route_a", "route_b"]) == ["route_b/1.pt", "x", "y/3.pt"]


def test_the_picture_shows_right_and_wrong_answers_of_each_model():
    tasks = puzzles.heldout("sudoku4", 20)
    right = [{"sudoku4-0013"}, {"sudoku4-0017", "sudoku4-0018"}]
    answers = [{t.id: [[t.test[0][1] if t.id in ids else t.test[0][0]]] for t in tasks} for ids in right]
    chosen = [t.id for t in eval_arc.choose(tasks, answers)]
    assert len(chosen) == len(set(chosen)) == eval_arc.SHOWN
    assert all(0 < len(ids & set(chosen)) < len(chosen) for ids in right)
    assert chosen == [t.id for t in eval_arc.choose(tasks, answers)]


def test_the_picture_prefers_what_fits_and_is_legible():
    large = arc.Task("large", "arc", [], [(np.zeros((20, 20), np.uint8), grid("1"))])
    small = [arc.Task(name, "arc", [], [(grid("12"), grid("1"))]) for name in ("small", "long for one", "long for both")]
    given = {"large": [[grid("2")]], "small": [[grid("2")]], "long for one": [[grid("2")]], "long for both": [None]}
    tasks = [large, *small]
    assert [t.id for t in eval_arc.choose(tasks, [given, given | {"long for one": [None]}], n=2)] == ["small", "large"]
    assert [t.id for t in eval_arc.choose(tasks, [given], n=2)] == ["small", "long for one"]
    assert "long for both" not in [t.id for t in eval_arc.choose(tasks, [given], n=9)]


def test_steps_shown():
    assert eval_arc.steps_shown(1) == [1] and eval_arc.steps_shown(6) == [1, 2, 3, 4, 5, 6]
    assert eval_arc.steps_shown(16) == [1, 2, 4, 8, 16] and eval_arc.steps_shown(11) == [1, 2, 4, 8, 11]


def test_a_row_shows_every_step_and_ends_with_the_answer_that_was_scored():
    model, task = make("trm"), puzzles.heldout("sudoku4", 1)[0]
    _, answers = eval_arc.evaluate([task], model.answer)
    title, panels = eval_arc.picture_row("sudoku4", task, {"B": model}, [answers], None)
    assert title == "sudoku4-0000" and [p[0].split(",")[0] for p in panels] == ["puzzle", "expected", "B step 1", "B step 2", "B step 3"]
    assert np.array_equal(panels[-1][1], answers[task.id][0][0])
    assert all(np.array_equal(p[2], task.test[0][1]) for p in panels[2:])


# the command

def test_both_routes_through_the_command_line(checkpoints, tmp_path):
    done = subprocess.run([sys.executable, "eval_arc.py", *checkpoints, "--suites=sudoku4,transforms,arc1", "--limit=4",
                           f"--out_dir={tmp_path}", "--json=report.json", "--device=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert list(report) == ["route_a", "route_b"]
    for name, path, model in zip(report, checkpoints, (model_dense, model_trm)):
        r = report[name]
        assert r["params"] == model.Model(model.Config(**r["model_config"])).num_params()
        assert r["checkpoint"] == path and len(r["sha256"]) == 64
        assert list(r["suites"]) == ["sudoku4", "transforms", "arc1"]
        for suite, n in (("sudoku4", 100), ("transforms", 50), ("arc1", 400)):
            s = r["suites"][suite]
            assert set(s) == FIGURES | {"available"} and (s["total"], s["available"]) == (4, n)
            assert s["attempts"] == (2 if suite == "arc1" else 1) and s["solved"] + s["too_long"] <= s["total"]
        assert r["suites"]["arc1"]["too_long"] > 0 == r["suites"]["sudoku4"]["too_long"]
    a, b = report["route_a"], report["route_b"]
    assert (a["train_seconds"], a["tokens_per_second"], a["val_loss"], a["iter"]) == (12.5, 1000.0, 9.25, 7)
    assert a["val_losses"] == {"text": 9.25, "maze": None}
    assert (b["train_seconds"], b["tokens_per_second"], b["val_loss"], b["iter"], b["n_sup"]) == (None, None, None, 8, 3)
    assert a["sha256"] != b["sha256"] and a["n_sup"] is None
    assert min(matplotlib.image.imread(tmp_path / "grids.png").shape[:2]) > 100
    assert sorted(os.listdir(tmp_path)) == ["grids.png", "report.json"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("route_a") and "9.250" in line)
    s = a["suites"]["arc1"]
    assert row.split()[1:5] == [f"{a['params']:,}", "12", "1,000", "9.250"]
    assert row.endswith(f"{4 - s['too_long']} / {s['solved']} / {s['too_long']}")
    assert "Limited: arc1 is the first 4 of its 400 tasks." in done.stdout


def test_one_checkpoint_is_reported_beside_it(checkpoints, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run" / "ckpt.pt"
    path.parent.mkdir()
    path.write_bytes(open(checkpoints[1], "rb").read())
    call(monkeypatch, path, "--suites=sudoku4", "--limit=2", "--n_sup=2")
    report = json.loads((path.parent / "eval.json").read_text())
    assert list(report) == ["route_b"] and report["route_b"]["n_sup"] == 2
    assert sorted(os.listdir(path.parent)) == ["ckpt.pt", "eval.json", "grids.png"]
    assert "-" in capsys.readouterr().out


def test_nothing_to_show_is_said(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "ckpt.pt", "dense", {}, block_size=20)
    call(monkeypatch, path, "--suites=sudoku9", "--limit=3")
    assert "every task was too long" in capsys.readouterr().out
    suite = json.loads((tmp_path / "eval.json").read_text())["route_a"]["suites"]["sudoku9"]
    assert (suite["total"], suite["solved"], suite["too_long"], suite["cells_right"]) == (3, 0, 3, None)
    assert not (tmp_path / "grids.png").exists()


@pytest.mark.parametrize("args, words", [
    (["{bad}"], "not a checkpoint"),
    (["{good}", "{bad}"], "not a checkpoint"),
    (["{torch}"], "not a checkpoint that train.py wrote"),
    (["{folder}/missing.pt"], "does not exist"),
    (["{good}", "--suites=sudoku4,sudku4"], "did you mean 'sudoku4'"),
    (["{good}", "--suites="], "names no suite"),
    (["{good}", "--limit=0"], "1 or more"),
    (["{good}", "--n_sup=4"], "Route B"),
    (["{good}", "--json=../eval.json"], "without a folder"),
    (["{good}", "--device=abacus"], "--device=cpu"),
    (["{good}", "{good}"], "given twice"),
    (["{good}", "--out_dir={bad}"], "notes.txt"),
    ([], "CKPT"),
])
def test_bad_input_is_one_line_and_overwrites_nothing(args, words, checkpoints, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("text, no checkpoint\n" * 20)
    torch.save({"a": torch.zeros(2)}, tmp_path / "torch.pt")
    for name in ("eval.json", "grids.png"):
        (tmp_path / name).write_text("from before")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    names = {"bad": tmp_path / "notes.txt", "torch": tmp_path / "torch.pt", "good": checkpoints[0], "folder": tmp_path}
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
