"""The suites: what is in them, what they are called, and tasks that people bring along."""

import gzip
import json

import numpy as np
import pytest
from tiny import digest

from smol import arc, rearc, suites

PAIR = {"input": [[1, 2], [3, 4]], "output": [[4]]}


@pytest.mark.parametrize(
    "name, known",
    [
        ("sudoku4", "84f3321fba7b09ca"),
        ("sudoku9", "6ab955520d1cbc4c"),
        ("sudoku9_medium", "61059df8bfb826a0"),
        ("sudoku9_hard", "78e234fbcd335f71"),
        ("maze", "3f23efb71546be65"),
        ("turn", "09d5a6400ca2b8b5"),
        ("transforms", "933355794e86ea7e"),
        ("logic", "7935dd592c950f3b"),
    ],
)
def test_generated_suites_are_what_they_have_always_been(name, known):
    """Another digest means that figures of before and after cannot be compared."""
    assert digest(suites.load(name)) == known


def test_names(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "RAW", tmp_path)
    sudokus = ["sudoku4", "sudoku9", "sudoku9_medium", "sudoku9_hard"]
    assert suites.names("sudoku,maze,sudoku4") == [*sudokus, "maze"]  # groups, and each once
    asked = ["arc1", "lm_eval:sciq,arc_easy", "logic", "language"]
    assert suites.names("arc1,lm_eval:sciq,arc_easy,logic,language") == asked
    rest = [*sudokus, "maze", "turn", "transforms", "logic", "language"]
    for version, there in ((None, []), ("0.1.25", ["rearc"])):
        monkeypatch.setattr(rearc, "installed", lambda: version)
        assert suites.default() == ["arc1", "arc2", *there, *rest]
    assert (
        suites.names("arc1_train,rearc") == ["arc1_train", "rearc"] and len(suites.load("arc1_train")) == 400
    )
    with pytest.raises(ValueError, match="maze_hard/test.csv"):
        suites.names("maze_hard")
    for text, closest in (("arc_1", "arc1"), ("sudoku_9", "sudoku9"), ("lm_eval:", "lm_eval:NAME")):
        with pytest.raises(ValueError, match=closest):
            suites.names(text)


def test_a_file_of_puzzles_is_a_suite_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "RAW", tmp_path)
    puzzle, answer = suites.load("sudoku9")[0].test[0]
    question = "".join(str(c or ".") for c in puzzle.flat)
    rows = ["source,question,answer,rating"] + [f"x,{question},{''.join(map(str, answer.flat))},3"] * 2
    (tmp_path / "sudoku_extreme").mkdir()
    (tmp_path / "sudoku_extreme/test.csv").write_text("\n".join(rows))
    suites.load.cache_clear()
    assert suites.names("sudoku")[-1] == "sudoku_extreme"
    tasks = suites.load("sudoku_extreme")
    assert [task.id for task in tasks] == ["sudoku_extreme-0000", "sudoku_extreme-0001"]
    assert np.array_equal(tasks[1].test, [(puzzle, answer)])
    (tmp_path / "sudoku_extreme/test.csv").write_text("\n".join([*rows, f"x,{question},{'1' * 81},3"]))
    suites.load.cache_clear()
    with pytest.raises(ValueError, match="test.csv: .*row 3 does not fit"):
        suites.load("sudoku_extreme")
    suites.load.cache_clear()


def test_the_interval_is_where_a_share_is_as_far_from_the_observed_one_as_chance_allows():
    for k, n in ((0, 10), (3, 10), (10, 10), (37, 400)):
        low, high = suites.interval(k, n)
        assert 0 <= low <= k / n <= high <= 1 and low < high
        for p in {low, high} - {0.0, 1.0}:  # Wilson: (k/n - p)^2 = z^2 p (1 - p) / n
            assert abs(k / n - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, rel=1e-3)
    assert suites.interval(0, 0) == [0, 1]


# ---- tasks that people bring along


def test_a_folder_and_a_file_of_tasks_are_read_alike(tmp_path):
    tasks = {f"t{i}": {"train": [PAIR] * 2, "test": [PAIR, {"input": [[i, 9.0]]}]} for i in range(3)}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, task in tasks.items():  # a byte order mark is no mistake
        (folder / f"{name}.json").write_text(json.dumps(task), encoding="utf-8-sig")
    (tmp_path / "all.json").write_text(json.dumps(tasks))
    for path in (folder, tmp_path / "all.json"):
        read = arc.read_tasks(str(path))
        assert [t.id for t in read] == ["t0", "t1", "t2"] and all(t.kind == "arc" for t in read)
        assert read[1].train[0][0].tolist() == PAIR["input"]
        assert read[2].test[1][0].tolist() == [[2, 9]] and read[2].test[1][1] is None


def test_challenges_are_read_with_the_solutions_beside_them(tmp_path):
    """As they lie in the competition's folder, where a task may be in several files, and known in one."""
    tasks = {f"t{i}": {"train": [PAIR], "test": [{"input": [[i]]}, {"input": [[i, i]]}]} for i in range(4)}
    outputs = {i: [[[7, int(i[1])]], [[8], [int(i[1])]]] for i in ("t0", "t1", "t3")}
    files = {
        "x-arc_evaluation_challenges": {i: tasks[i] for i in ("t0", "t1", "t2")},
        "x-arc_evaluation_solutions": {i: outputs[i] for i in ("t0", "t1")},
        "x-arc_test_challenges": {i: tasks[i] for i in ("t1", "t3")},
        "sample_submission": {"t1": []},
        "own": {"train": [PAIR], "test": [PAIR]},
        "t2": {"train": [PAIR], "test": [PAIR]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def read(path):
        tasks = arc.read_tasks(str(path))
        return {t.id: [None if y is None else y.tolist() for _, y in t.test] for t in tasks}

    known = {"t0": outputs["t0"], "t1": outputs["t1"], "t2": [None, None]}
    assert read(tmp_path / "x-arc_evaluation_challenges.json") == known
    assert read(tmp_path / "x-arc_test_challenges.json") == {"t1": [None, None], "t3": [None, None]}
    alone = {"own": [PAIR["output"]], "t2": [PAIR["output"]]}
    assert read(tmp_path) == {**known, "t3": [None, None], **alone}
    (tmp_path / "x-arc_evaluation_solutions.json").write_text(json.dumps({"t0": outputs["t0"][:1]}))
    with pytest.raises(ValueError, match="solutions.json, task t0: as many outputs are wanted"):
        read(tmp_path)


@pytest.mark.parametrize(
    "task, words",
    [
        ({"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": [PAIR]}, "rows differ in length"),
        ({"train": [PAIR], "test": [{"input": [[0] * 31]}]}, "pair 1 of 'test': not a grid"),
        ({"train": [{"input": [[1]]}], "test": [PAIR]}, "pair 1 of 'train': not a grid"),
        ({"train": [PAIR]}, "no list 'test'"),
    ],
)
def test_a_bad_task_is_one_line_that_says_where(task, words, tmp_path):
    (tmp_path / "good.json").write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))
    (tmp_path / "wrong.json").write_text(json.dumps(task))
    with pytest.raises(ValueError, match=words) as error:
        arc.read_tasks(str(tmp_path))
    assert "\n" not in str(error.value) and "wrong.json" in str(error.value)


def test_a_damaged_archive_is_one_line(tmp_path):
    path = tmp_path / "task.json.gz"
    whole = gzip.compress(json.dumps({"train": [PAIR] * 50, "test": [PAIR]}).encode())
    path.write_bytes(whole)
    assert arc.read_tasks(str(path))[0].id == "task"
    for at in range(10, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"task.json.gz is not JSON"):
            arc.read_tasks(str(path))
