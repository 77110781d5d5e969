"""The suites: what is in them, what they are called, and tasks that people bring along."""

import ast
import importlib
import json
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare
from smol import arc, loader, puzzles, snapshots, sources, suites

PAIR = {"input": [[1, 2], [3, 4]], "output": [[4]]}


def test_suites_are_the_whole_sets():
    assert {s: len(suites.load(s)) for s in suites.SUITES if suites.found(s)} == {
        "arc1": 400,
        "arc2": 120,
        **puzzles.HELD_OUT_N,
        "sudoku9_medium": 50,
        "sudoku9_hard": 50,
        "logic": 50,
    }
    for name in suites.SUITES:
        if suites.found(name):
            tasks = suites.load(name)
            assert len({t.id for t in tasks}) == len(tasks)


def test_harder_sudokus_have_more_blanks_and_one_solution():
    for name, blanks in suites.HARDER.items():
        for task in suites.load(name)[:5]:
            puzzle, answer = task.test[0]
            assert (puzzle == 0).sum() == blanks and puzzles.check(task)
            (only,) = puzzles.solve_sudoku(puzzle)[0]
            assert np.array_equal(only, answer)


def test_logic_puzzles_have_the_answer_that_their_checkers_find():
    for task in suites.load("logic")[:20]:
        ((question, answer),) = task.test
        check = puzzles.check_seating if "chairs" in question else puzzles.check_knights
        assert check(f"{question}\nSolution: -\nAnswer: {answer}")
        assert not check(f"{question}\nSolution: -\nAnswer: {' '.join(reversed(answer.split()))}")


def test_groups_are_what_they_consist_of_and_nothing_comes_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "RAW", str(tmp_path))
    assert suites.names("sudoku,maze,sudoku4") == [
        "sudoku4",
        "sudoku9",
        "sudoku9_medium",
        "sudoku9_hard",
        "maze",
    ]
    assert suites.names("arc1,lm_eval:sciq,arc_easy,logic,language") == [
        "arc1",
        "lm_eval:sciq,arc_easy",
        "logic",
        "language",
    ]
    with pytest.raises(ValueError, match="maze_hard/test.csv"):
        suites.names("maze_hard")
    for text, closest in (("arc_1", "arc1"), ("sudoku_9", "sudoku9"), ("langage", "language")):
        with pytest.raises(ValueError, match=f"did you mean '{closest}'"):
            suites.names(text)
    for several_or_none in ("sudoku", "language"):
        with pytest.raises(ValueError, match="not one suite of tasks"):
            suites.load(several_or_none)


def test_a_file_of_others_puzzles_is_a_suite_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "RAW", str(tmp_path))
    puzzle, answer = puzzles.heldout("sudoku9", 1)[0].test[0]
    question = "".join(str(c or ".") for c in puzzle.reshape(-1))
    folder = tmp_path / "sudoku_extreme"
    folder.mkdir()
    rows = ["source,question,answer,rating"] + [f"x,{question},{''.join(map(str, answer.reshape(-1)))},3"] * 2
    (folder / "test.csv").write_text("\n".join(rows))
    suites.load.cache_clear()
    assert suites.names("sudoku")[-1] == "sudoku_extreme"
    tasks = suites.load("sudoku_extreme")
    assert [t.id for t in tasks] == ["sudoku_extreme-0000", "sudoku_extreme-0001"] and all(
        puzzles.check(t) for t in tasks
    )
    suites.load.cache_clear()
    (folder / "test.csv").write_text("\n".join([*rows, "x,too short,1,3"]))
    with pytest.raises(ValueError, match="row 3: no puzzle of sudoku_extreme"):
        suites.load("sudoku_extreme")
    suites.load.cache_clear()


# tasks that people bring along


def test_a_folder_and_a_file_of_tasks_are_read_alike(tmp_path):
    tasks = {f"t{i}": {"train": [PAIR] * 2, "test": [PAIR, {"input": [[i]]}]} for i in range(3)}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, task in tasks.items():
        mark = "utf-8-sig" if name == "t1" else "utf-8"  # a byte order mark is no mistake
        (folder / f"{name}.json").write_text(json.dumps(task), encoding=mark)
    (tmp_path / "all.json").write_text(json.dumps(tasks))
    for path in (folder, tmp_path / "all.json"):
        read = arc.read_tasks(str(path))
        assert [t.id for t in read] == ["t0", "t1", "t2"] and all(t.kind == "arc" for t in read)
        assert (
            read[1].train[0][0].tolist() == PAIR["input"]
            and read[2].test[1][0].tolist() == [[2]]
            and read[2].test[1][1] is None
        )
    (alone,) = arc.read_tasks(str(folder / "t1.json"))
    assert (alone.id, alone.test[1][0].tolist()) == ("t1", [[1]])


def test_tasks_of_arc_are_read_as_they_are_loaded(tmp_path):
    task = arc.load("arc1_eval")[3]
    pairs = [
        [{"input": x.tolist(), "output": y.tolist()} for x, y in part] for part in (task.train, task.test)
    ]
    (tmp_path / f"{task.id}.json").write_text(json.dumps(dict(zip(("train", "test"), pairs))))
    (read,) = arc.read_tasks(str(tmp_path))
    assert read.id == task.id
    assert all(
        np.array_equal(a, b)
        for p, q in zip(read.train + read.test, task.train + task.test)
        for a, b in zip(p, q)
    )


def test_cells_may_be_written_as_floats_and_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    pair = {"input": [[0.0, 1.0], [2, 9.0]], "output": [[3.0, 1.0]]}
    (tmp_path / "t.json").write_text(json.dumps({"train": [pair], "test": [pair]}), encoding="utf-8-sig")
    (read,) = arc.read_tasks(str(tmp_path / "t.json"))
    assert [grid.tolist() for grid in read.test[0]] == [[[0, 1], [2, 9]], [[3, 1]]]
    assert read.test[0][0].dtype == np.uint8


def test_challenges_are_read_with_the_solutions_beside_them(tmp_path):
    """As they lie in the competition's folder, where a task may be in several files, and known in one."""
    tasks = {f"t{i}": {"train": [PAIR], "test": [{"input": [[i]]}, {"input": [[i, i]]}]} for i in range(4)}
    outputs = {i: [[[7, int(i[1])]], [[8], [int(i[1])]]] for i in ("t0", "t1", "t3")}
    for name, content in (
        ("x-arc_evaluation_challenges", {i: tasks[i] for i in ("t0", "t1", "t2")}),
        ("x-arc_evaluation_solutions", {i: outputs[i] for i in ("t0", "t1")}),
        ("x-arc_test_challenges", {i: tasks[i] for i in ("t1", "t3")}),
        ("sample_submission", {"t1": []}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "own.json").write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))

    def read(path):
        tasks = arc.read_tasks(str(path))
        return {t.id: [None if y is None else y.tolist() for _, y in t.test] for t in tasks}

    known = {"t0": outputs["t0"], "t1": outputs["t1"], "t2": [None, None]}
    assert read(tmp_path / "x-arc_evaluation_challenges.json") == known
    assert read(tmp_path / "x-arc_test_challenges.json") == {"t1": [None, None], "t3": [None, None]}
    assert read(tmp_path) == {**known, "t3": [None, None], "own": [PAIR["output"]]}


@pytest.mark.parametrize(
    "solutions, words",
    [
        ({"a": [[[1]]]}, "task a: as many outputs .* 2"),
        ({"a": 3}, "task a: as many outputs .* 2"),
        ({"a": [[[1]], [[10]]]}, "task a: output 2"),
        ([], "holds no solutions"),
    ],
)
def test_solutions_that_do_not_fit_are_one_line(solutions, words, tmp_path):
    task = {"train": [PAIR], "test": [{"input": [[1]]}] * 2}
    (tmp_path / "challenges.json").write_text(json.dumps({"a": task}))
    (tmp_path / "solutions.json").write_text(json.dumps(solutions))
    with pytest.raises(ValueError, match=words) as error:
        arc.read_tasks(str(tmp_path))
    assert "\n" not in str(error.value) and "solutions.json" in str(error.value)


@pytest.mark.parametrize(
    "task, words",
    [
        (
            {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": [PAIR]},
            "input 1 of 'train' is not a grid: its rows differ in length",
        ),
        (
            {"train": [PAIR, {"input": [[1]], "output": [[10]]}], "test": [PAIR]},
            "output 2 of .train. is not a grid: cells must be whole",
        ),
        (
            {"train": [PAIR], "test": [{"input": [[0] * 31]}]},
            r"input 1 of 'test' is not a grid: shape \(1, 31\)",
        ),
        ({"train": [PAIR], "test": [{"input": [[-1]]}]}, "whole numbers from 0 to 9"),
        ({"train": [PAIR], "test": [{"input": [[0.5]]}]}, "whole numbers from 0 to 9"),
        ({"train": [PAIR], "test": [{"input": [["red"]]}]}, "whole numbers from 0 to 9"),
        ({"train": [PAIR], "test": [{"input": []}]}, "not a grid: shape"),
        ({"train": [PAIR], "test": [{"input": None}]}, "not a grid"),
        ({"train": [{"input": [[1]]}], "test": [PAIR]}, "pair 1 of 'train' has no 'output'"),
        ({"train": [{"input": [[1]], "output": None}], "test": [PAIR]}, "has no 'output'"),
        ({"train": [PAIR], "test": []}, "no list 'test'"),
        ({"train": [PAIR]}, "no list 'test'"),
        ({"train": PAIR, "test": [PAIR]}, "no list 'train'"),
        ([PAIR], "no list 'train'"),
        ("text", "no list 'train'"),
    ],
)
def test_a_bad_task_is_one_line_that_says_where(task, words, tmp_path):
    (tmp_path / "good.json").write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))
    (tmp_path / "wrong.json").write_text(json.dumps(task))
    for path in (tmp_path, tmp_path / "wrong.json"):
        if path == tmp_path or isinstance(task, dict):  # a file by itself may be one of many: {id: task}
            with pytest.raises(ValueError, match=words) as error:
                arc.read_tasks(str(path))
            assert "\n" not in str(error.value) and "wrong.json" in str(error.value)


def test_bad_files_of_tasks_are_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.json").write_text('{"a": {"train": [')
    (tmp_path / "list.json").write_text("[]")
    for name, words in (
        ("folder", "holds no .json file"),
        ("cut.json", "not JSON"),
        ("list.json", "no tasks"),
        ("none", "there is no"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            arc.read_tasks(str(tmp_path / name))
        assert "\n" not in str(error.value)


# the switch for training on demonstrations of the evaluation


def test_demonstrations_of_the_evaluation_are_learned_from_only_where_that_is_asked_for_and_never_its_tests(
    tmp_path,
):
    (tmp_path / "none").mkdir()
    settings = [
        "stage3",
        f"--data_dir={tmp_path / 'data'}",
        f"--source_dir={tmp_path / 'none'}",
        "--sources=arc,arc_eval_demos",
        "--limit_mb=0.4",
        "--unit_mb=0.4",
        "--stage_val_every=20",
        "--num_proc=1",
    ]
    assert not any("arc_eval_demos" in shares for _, _, shares in sources.STAGES.values())
    with pytest.raises(SystemExit, match="not a source of stage3"):
        prepare.main(settings)
    prepare.main([*settings, "--eval_demos=True"])
    entries, mixture = snapshots.read_manifest(tmp_path / "data", "stage3")
    assert mixture["weights"] == pytest.approx({"arc": 0.5, "arc_eval_demos": 0.5}, abs=0.05)
    evaluation = [t for name in ("arc1_eval", "arc2_eval") for t in arc.load(name)]
    demos = {arc.canonical_hash(g) for t in evaluation for pair in t.train for g in pair}
    shards = loader.Shards(
        tmp_path / "data", [e for e in entries if e["source"] == "arc_eval_demos" and e["split"] == "train"]
    )
    assert shards.n_documents > 20
    for i in range(shards.n_documents):
        _, pairs = arc.decode(shards.document(i))
        assert {arc.canonical_hash(g) for pair in pairs for g in pair} <= demos


# files as a reader meets them


def test_every_file_says_what_it_is_and_where_to_read_next():
    root = Path(suites.__file__).parent.parent
    for path in [*root.glob("*.py"), *root.glob("smol/[!_]*.py"), *root.glob("bench/[!_]*.py")]:
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(said.split("\n")[0]) > 20, path.name
        pointers = re.findall(r"(?:Read next|Before this): (.+?)(?:\.\s|\.?$)", " ".join(said.split()))
        assert pointers, f"{path.name} does not say where to read next"
        for name in re.findall(r"[\w/]+\.(?:py|html)", " ".join(pointers)):
            assert any((folder / name).is_file() for folder in (path.parent, root, root / "smol")), (
                f"{path.name} points to {name}"
            )


@pytest.mark.parametrize("name", ["model_dense", "model_trm", "sample"])
def test_help_is_what_the_file_says_of_itself(name, monkeypatch, capsys):
    root = os.path.dirname(os.path.dirname(os.path.abspath(suites.__file__)))
    path = os.path.join(root, f"{name}.py")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(sys, "path", [root, *sys.path])
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stopped:  # argparse's way to end
        assert stopped.code in (None, 0)
    said = capsys.readouterr()
    assert importlib.import_module(name).__doc__.strip() in said.out and not said.err
