"""sources.py: rows become documents or are refused, and reading goes on where it was."""

import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smol import arc, rearc, sources, tokenizer
from smol.snapshots import GROUPS, STAGES


def test_stages_have_their_shares():
    assert tuple(sources.STAGES) == STAGES
    for _, groups, weights in sources.STAGES.values():
        assert sum(groups.values()) == pytest.approx(1)
        assert {sources.SOURCES[name].group for name in weights} == set(groups)
        assert set(groups) <= set(GROUPS) and "arc_eval_demos" not in weights


# ---- rows -> documents


def test_no_text_of_a_dialogue_is_lost():
    marks = {tokenizer.USER: "<u>", tokenizer.ASSISTANT: "<a>", tokenizer.END: "."}
    document = sources.turns(("system", "S"), ("user", " Q1 "), ("assistant", "A1"), ("user", "Q2"))
    assert "".join(marks.get(part, part) for part in document) == "<u>S.<u>Q1.<a>A1.<u>Q2."


SUDOKU = "".join(str((3 * r + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))


@pytest.mark.parametrize(
    "name, row, rule",
    [
        ("fineweb_edu", '{"text": "cut o', "not_a_row"),
        ("wikipedia", {"body": "x"}, "no_column"),
        ("fineweb_edu", {"text": None}, "not_text"),
        ("fineweb_edu", {"text": "half \ud83d a pair"}, "not_as_expected"),
        ("fineweb_edu", {"text": "caf\xe9".encode("latin-1")}, "not_as_expected"),
        ("smol_smoltalk", {"messages": [{"role": "tool", "content": "42"}]}, "unknown_role"),
        ("smol_smoltalk", {"messages": [{"role": "user", "content": ["Q", tokenizer.END]}]}, "not_text"),
        ("sudoku_extreme", {"question": SUDOKU + "1", "answer": SUDOKU + "1"}, "not_as_expected"),
        ("arc_json", {"id": "\ud800", "examples": 2 * [[[[1]], [[2]]]]}, "not_as_expected"),
        ("sudoku_extreme", {"a": 1, None: [2]}, "no_column"),  # a line of a .csv with too many fields
    ],
)
def test_a_row_that_is_no_document_is_counted_under_a_rule(name, row, rule):
    with pytest.raises(sources.OddRow) as e:
        sources.to_document(name, row)
    assert e.value.rule == rule


def test_rows_that_are_documents():
    assert sources.to_document("fineweb_edu", {"text": "caf\xe9".encode()}) == "caf\xe9"
    task = sources.to_document("sudoku_extreme", {"question": "." + SUDOKU[1:], "answer": SUDOKU})
    ((question, answer),) = task.test
    assert question[0, 0] == 0 and answer[0, 0] == 1 and (question == answer).sum() == 80
    row = {"question": "1 + 1?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"}
    assert sources.to_document("gsm8k", row) == "Question: 1 + 1?\nSolution: It is 1+1=2.\nAnswer: 2"


@pytest.mark.parametrize("name", [name for name, source in sources.SOURCES.items() if not source.is_read])
def test_generated_documents_depend_on_seed_and_number_alone(name):
    if sources.SOURCES[name].reasoning_gym and not rearc.installed():
        pytest.skip(f"without {rearc.INSTALL}")

    def document(row):
        try:
            return sources.to_document(name, row)
        except sources.OddRow as e:
            return str(e)

    def first(n, lane, state=None, seed=1):
        rows = sources.open_rows(name, {}, seed, lane, state)
        documents = [document(row) for _, row in itertools.islice(rows, n)]
        parts = [sources.instantiate(document)[2] for document in documents]
        return [[p if isinstance(p, str) else np.atleast_1d(p).tolist() for p in ps] for ps in parts], rows

    both, _ = first(2, 3)
    one, rows = first(1, 3)
    assert both[:1] == one and both[1:] == first(1, 3, rows.state())[0]
    drawn = not (name in ("arc", "arc_eval_demos") or sources.SOURCES[name].rows)
    assert both != first(2, 4)[0] and (both != first(2, 3, seed=2)[0]) == drawn


def test_arc_sources_have_no_test_of_an_evaluation():
    evaluation = [task for name in ("arc1_eval", "arc2_eval") for task in arc.load(name)]
    assert not {task.id for task in evaluation} & {task.id for task in sources.arc_tasks()}
    demos = {x.tobytes() + y.tobytes() for task in evaluation for x, y in task.train}
    pairs = [pair for task in sources.arc_eval_demos() for pair in task.train + task.test]
    assert {x.tobytes() + y.tobytes() for x, y in pairs} <= demos
    draw = sources.SOURCES["arc"].document
    task = draw(np.random.default_rng(0), len(sources.arc_tasks()))  # the second time round
    original = sources.arc_tasks()[0]
    assert task.id == original.id and len(task.train) == len(original.train)
    assert sorted(map(arc.canonical_hash, (y for _, y in task.train + task.test))) == sorted(
        map(arc.canonical_hash, (y for _, y in original.train + original.test))
    )


# ---- ARC's JSON


def pairs(n, colour=1, side=3):
    """n of them, whose inputs differ."""
    return [{"input": [[i % 10] * side] * (i + 2), "output": [[colour]]} for i in range(n)]


def read_arc_json(folder, name="arc_json"):
    """{id: [number of pairs of each document]} and the rules of the rows that are none."""
    where = {"files": [str(p) for p in sources.local_files(folder, name)[0]]}
    found, rules = {}, []
    for lane in range(sources.LANES):
        for _, row in sources.open_rows(name, where, 1, lane, None):
            try:
                task = sources.to_document(name, row)
            except sources.OddRow as e:
                rules.append(e.rule)
            else:
                assert task.kind == "arc" and len(task.test) == 1
                found.setdefault(task.id, []).append(len(task.train) + 1)
    return found, rules


def test_arc_json_of_every_shape_is_read(tmp_path):
    folder = tmp_path / "arc_json/deeper"
    folder.mkdir(parents=True)
    task = {"train": pairs(2), "test": pairs(1, 2)}
    as_lists = [[p["input"], p["output"]] for p in pairs(9)]
    hidden = {"train": pairs(2), "test": [{"input": [[1]]}]}
    files = {
        "one.json.gz": task,
        "many.json": {"a": task, "b": task},
        "x_challenges.json.gz": {"known": hidden, "unknown": hidden},
        "x_solutions.json.gz": {"known": [[[7]]]},
        "sample_submission.json": {"known": [{"attempt_1": [[0]]}]},
        "made.json": pairs(15),  # ARC-GEN's: pairs without end, cut into tasks of a few
        "seven.json": pairs(7),
        "alone.json": pairs(1),
        "nothing.json": [],
        "examples.json": {"examples": as_lists},
    }
    for name, content in files.items():
        with (gzip.open if name.endswith(".gz") else open)(folder / name, "wt") as f:
            json.dump(content, f)
    lines = [{"id": "line", **task}, {"task_id": "listed", "examples": as_lists}, {"examples": as_lists[:1]}]
    lines += [{"train": pairs(2), "test": [{"input": [[11]], "output": [[1]]}]}, {"body": 1}]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found, rules = read_arc_json(tmp_path)
    assert found == {
        **{"one": [3], "a": [3], "b": [3], "known": [3], "unknown": [2]},
        **{"made": [5, 5, 5], "seven": [3, 4], "examples": [6], "line": [3], "listed": [6]},
    }
    assert sorted(rules) == ["few_pairs"] * 2 + ["not_as_expected"] * 3
    where = {"files": [str(folder / "made.json")]}
    reader = sources.open_rows("arc_json", where, 1, 0, None)
    first = list(itertools.islice(iter(reader), 2))
    rest = list(sources.open_rows("arc_json", where, 1, 0, reader.state()))
    assert first + rest == list(sources.open_rows("arc_json", where, 1, 0, None)) and len(rest) == 1


def test_a_row_of_barc_is_a_task_whatever_it_is_read_from(tmp_path):
    rows = [{"source": "x", "examples": [[[[1.0, 2.0]], [[float(i)]]] for i in range(8)]}]
    (tmp_path / "barc_heavy").mkdir()
    (tmp_path / "barc_heavy/a.jsonl").write_text(json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "barc_heavy/b.parquet")
    found, rules = read_arc_json(tmp_path, "barc_heavy")
    assert list(found.values()) == [[6, 6]] and not rules


# ---- reading


def write(folder, rows):
    """The same rows in every format, and what is not to be read."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / ".cache").mkdir(parents=True)
    (folder.parent / "elsewhere").mkdir()
    (folder / "b").symlink_to(folder.parent / "elsewhere")
    (folder / "a.jsonl").write_bytes(("\ufeff" + lines).encode())
    with gzip.open(folder / "a.jsonl.gz", "wt") as f:
        f.write(lines)
    (folder / "b/a [1].json").write_text(json.dumps(rows))  # brackets are no pattern
    (folder / "b/a.CSV").write_text("\n".join(["text", *(row["text"] for row in rows)]))
    pq.write_table(pa.Table.from_pylist(rows), folder / "b/a.parquet", row_group_size=2)
    for name in ("README.md", "LICENSE", ".cache/a.jsonl", "b/.a.jsonl", "b/a.txt"):
        (folder / name).write_text(lines)


def test_a_copy_of_a_whole_repository_has_a_test_file_that_is_not_trained_on(tmp_path):
    for copy, name, files in (
        ("1", "sudoku_extreme", ("train.csv", "test.csv", "test.csv.gz")),
        ("2", "sudoku_extreme", ("train/x.csv", "test/y.csv")),
        ("3", "gsm8k", ("main/train-0.parquet", "main/test-0.parquet")),
        ("4", "gsm8k", ("train/0.parquet", "main/test/1.parquet", "a_train.jsonl", "a_test.jsonl")),
    ):
        for folder, kept in ((name, "train"), (f"{name}_test", "test")):
            root = tmp_path / copy / folder
            for file in files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).touch()
            found, _ = sources.local_files(tmp_path / copy, folder)
            assert {p.relative_to(root).as_posix() for p in found} == {file for file in files if kept in file}


def test_local_files_are_read_in_lanes_and_go_on_where_they_were(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(5)]
    write(tmp_path / "fineweb_edu", rows)
    files, left_out = sources.local_files(tmp_path, "fineweb_edu")
    assert [p.name for p in files] == ["a.jsonl", "a.jsonl.gz", "a [1].json", "a.CSV", "a.parquet"]
    assert [p.name for p in left_out] == ["a.txt"]
    where = {"files": [str(p) for p in files]}
    for lane in range(5):
        read = list(sources.open_rows("fineweb_edu", where, 1, lane, None))
        assert [row for _, row in read] == rows
        assert [origin for origin, _ in read] == [f"{files[lane].name}:{i + 1}" for i in range(5)]
    whole = list(sources.open_rows("fineweb_edu", where, 1, 0, None, lanes=2))
    assert len(whole) == 15  # files 0, 2 and 4
    for stop in (0, 4, 5, 6, 15):
        reader = sources.open_rows("fineweb_edu", where, 1, 0, None, lanes=2)
        first = list(itertools.islice(iter(reader), stop))
        state = json.loads(json.dumps(reader.state()))
        assert first + list(sources.open_rows("fineweb_edu", where, 1, 0, state, lanes=2)) == whole


def test_a_damaged_line_costs_a_row_and_not_the_file(tmp_path):
    odd = [b'{"text": "b', b"", b"[" * 100_000, b'{"text": "\xff"}', b'["c"]', b'{"body": 1}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"text": "a"}', *odd, b'{"text": "d"}']))
    rules, texts = [], []
    for _, row in sources.open_rows("fineweb_edu", {"files": [tmp_path / "a.jsonl"]}, 1, 0, None, lanes=1):
        try:
            texts.append(sources.to_document("fineweb_edu", row))
        except sources.OddRow as e:
            rules.append(e.rule)
    assert texts == ["a", "d"] and rules == ["not_a_row"] * 4 + ["no_column"]


def test_an_odd_row_of_json_changes_no_text_of_the_others(tmp_path):
    rows = [{"text": 'He said "no".\nTwo lines'}, {"text": 3}]
    lines = "\n".join(map(json.dumps, rows))
    for name, content in ("array.json", json.dumps(rows)), ("lines [1].json", lines), ("lines.jsonl", lines):
        (tmp_path / name).write_text(content)
        read = sources.open_rows("fineweb_edu", {"files": [tmp_path / name]}, 1, 0, None, lanes=1)
        assert [row for _, row in read] == rows
