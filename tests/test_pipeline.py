"""
pipeline.py and sources.py: a stage from local files has the declared shares, holds no duplicate and no quotation, is the same to the byte
however it was made, and every mistake and every damage is one line.
"""

import csv
import dataclasses
import errno
import gzip
import hashlib
import inspect
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_curate import english

import prepare
from smol import arc, curate, pipeline, puzzles, snapshots, sources, tokenizer, units

ROOT = Path(__file__).parent.parent
EXAM = "A farmer counts 417 crates of plums before noon and sells two thirds of them to the baker who lives across the river"
SMALL = ["--limit_mb=1.2", "--unit_mb=0.06", "--stage_val_every=15", "--num_proc=1"]


def code(i):
    draw = random.Random(i)
    names = [
        f"{draw.choice(('get', 'set', 'find'))}_{draw.choice(('row', 'file', 'page'))}_{draw.randrange(999)}"
        for _ in range(6)
    ]
    return "import os\n\n\n" + "\n\n".join(
        f"def {name}(x, y={draw.randrange(10**6)}):\n    # {english(1, (i, j))[:50]!r}\n    return x * y + {draw.randrange(10**6)}\n"
        for j, name in enumerate(names)
    )


def write_sources(folder):
    """Every format, and in it what must go: exact and near-duplicates, within and across sources, quotations, other languages, rubbish."""
    prose = [english(20, i) for i in range(480)]
    near = prose[5].replace(" of ", " off ", 1)
    (folder / "fineweb_edu").mkdir(parents=True)
    texts = [*prose[:50], prose[3], "x", english(10, 999) + EXAM.upper() + ".\n", *prose[50:300]]
    rows = [{"text": t, "id": str(i)} for i, t in enumerate(texts)]
    for i in range(2):
        pq.write_table(
            pa.Table.from_pylist(rows[i::2]), folder / f"fineweb_edu/{i}.parquet", row_group_size=40
        )
    (folder / "wikipedia").mkdir()
    wiki = [
        "Le vieux pont de la ville est ferme depuis que la riviere a monte la nuit derniere. " * 9,
        near,
        prose[7],
        *prose[300:400],
    ]
    with pa.output_stream(folder / "wikipedia/w.jsonl.zst", compression="zstd") as f:
        f.write("".join(json.dumps({"title": "t", "text": t}) + "\n" for t in wiki).encode())
    (folder / "openwebtext2").mkdir()
    (folder / "openwebtext2/o.txt").write_text("<|endoftext|>\n".join(prose[400:440]))
    (folder / "codeparrot").mkdir()
    secret = next(
        o for t in arc.load("arc1_eval") for _, o in t.test if min(o.shape) > 8 and len(np.unique(o[:3])) > 4
    )
    task = "TASK = " + str(np.rot90(secret).tolist()).replace("], ", "],\n") + "\n"
    programs = [*map(code, range(20)), code(4), code(9) + task, *map(code, range(20, 260))]
    with gzip.open(folder / "codeparrot/c.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps({"content": t, "license": "mit"}) + "\n" for t in programs))
    (folder / "open_web_math").mkdir()
    with open(folder / "open_web_math/m.csv", "w", newline="") as f:
        out = csv.DictWriter(f, ["url", "text"])
        out.writeheader()
        out.writerows({"url": "u", "text": english(18, 5000 + i) + "\nSo $x^2 = 4$.\n"} for i in range(40))
    school = [
        {
            "question": f"Ann has {i} plums and buys {i + 3} more at the market. How many has she now?",
            "answer": f"Now it is {i} + {i + 3} = <<{i}+{i + 3}={2 * i + 3}>>{2 * i + 3}.\n#### {2 * i + 3}",
        }
        for i in range(30)
    ]
    for name, rows in (("gsm8k", school), ("gsm8k_test", [{"question": EXAM + ".", "answer": "#### 278"}])):
        (folder / name).mkdir()
        (folder / name / "g.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "sudoku_extreme").mkdir()
    rows, draw = ["source,question,answer,rating"], np.random.default_rng(1)
    for _ in range(40):
        question, answer = puzzles.sudoku(draw, 9, 30).test[0]
        rows.append(
            "x,{},{},7".format("".join(str(v or ".") for v in question.flat), "".join(map(str, answer.flat)))
        )
    rows[4] = rows[4][:-4] + str(9 - int(rows[4][-4])) + rows[4][-3:]  # an answer that is wrong
    (folder / "sudoku_extreme/s.csv").write_text("\n".join(rows) + "\n")
    turned = ["".join(np.rot90(np.array(list(text)).reshape(9, 9)).flat) for text in rows[7].split(",")[1:3]]
    (folder / "sudoku_extreme_test").mkdir()  # one of these is a test puzzle, turned
    (folder / "sudoku_extreme_test/t.csv").write_text(
        "\n".join([rows[0], ",".join(["x", *turned, "7"])]) + "\n"
    )
    (folder / "maze_hard").mkdir()
    question, answer = puzzles.maze(draw, 30, 30).test[0]
    (folder / "maze_hard/m.csv").write_text(
        "source,question,answer,rating\nx,{},{},1\n".format(
            *("".join(" #SGo"[v] for v in grid.flat) for grid in (question, answer))
        )
    )


def build(data, source_dir, *options):
    prepare.main(["stage1", f"--data_dir={data}", f"--source_dir={source_dir}", *SMALL, *options])


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def built(source_dir, tmp_path_factory):
    data = tmp_path_factory.mktemp("built")
    build(data, source_dir)
    return data


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built, tmp_path / "data")
    return tmp_path / "data"


def documents(data, source=None, split=None, stage="stage1"):
    """(source, split, tokens), read with nothing but the layout that data/README.md describes."""
    for line in (data / "stages" / stage / "manifest.jsonl").read_text().splitlines():
        e = json.loads(line)
        if source in (None, e["source"]) and split in (None, e["split"]):
            tokens, ends = (
                np.fromfile(data / e["path"], "<u2"),
                np.fromfile((data / e["path"]).with_suffix(".idx"), "<i8"),
            )
            for a, b in itertools.pairwise(ends):
                yield e["source"], e["split"], tokens[a:b]


def shards(data):
    found = sorted([*(data / "processed").rglob("*.*"), *(data / "stages").rglob("*.*")])
    return {
        p.relative_to(data).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in found
        if p.suffix != ".tmp"
    }


def filters(data):
    return {
        name: {rule: found["count"] for rule, found in report["dropped"].items()}
        for name, report in json.loads((data / "metadata/stage1/filters.json").read_text()).items()
    }


# ---- what is in it


def test_shares_are_as_declared_and_everything_decodes(built):
    entries, mixture = prepare.read_manifest(built, "stage1")
    tokens = {}
    for e in entries:
        if e["split"] == "train":
            tokens[e["group"]] = tokens.get(e["group"], 0) + e["tokens"]
    total = sum(tokens.values())
    for group, share in sources.STAGES["stage1"][1].items():
        # a source ends with a whole document, and here one of maze_hard is 0.005 of the stage
        assert tokens[group] / total == pytest.approx(share, abs=0.01)
        assert mixture["groups"][group] == pytest.approx(tokens[group] / total, abs=1e-8)
    assert sum(mixture["weights"].values()) == pytest.approx(1)
    encoder, kinds = tokenizer.load(), {e["source"]: e["kind"] for e in entries}
    for source, _, ids in documents(built):
        assert ids[-1] == tokenizer.EOT and not (ids[:-1] == tokenizer.EOT).any()
        if kinds[source] == "puzzle":
            kind, pairs = arc.decode(ids)
            assert np.array_equal(arc.encode(kind, pairs), ids)
        elif source not in ("traces",):
            assert ids.max() <= tokenizer.EOT
            assert encoder.decode(ids[:-1].tolist()).strip()


def test_what_must_go_is_gone_and_counted(built):
    dropped = filters(built)
    assert dropped["fineweb_edu"]["exact_duplicate"] == 1 and dropped["fineweb_edu"]["quotes_gsm8k_test"] == 1
    assert dropped["fineweb_edu"]["gopher_few_or_many_words"] == 1
    assert (
        dropped["wikipedia"]["near_duplicate"] == 1 and dropped["wikipedia"]["exact_duplicate"] == 1
    )  # across sources
    assert sum(dropped["wikipedia"].values()) == 3  # and the French one
    assert dropped["codeparrot"]["exact_duplicate"] == 1
    assert dropped["codeparrot"]["quotes_arc_cells"] + dropped["codeparrot"].get("quotes_arc_rows", 0) == 1
    assert dropped["sudoku_extreme"] == {"wrong_answer": 1, "is_in_sudoku_extreme_test": 1}
    encoder = tokenizer.load()
    texts = [
        encoder.decode(ids.tolist())
        for source, _, ids in documents(built)
        if source in ("fineweb_edu", "wikipedia", "openwebtext2")
    ]
    assert len(texts) > 100 and not [t for t in texts if "417" in t and "crates" in t.lower()]
    sets = [curate.shingle_set(t) for t in texts]
    assert max(curate.overlap(a, b) for a, b in itertools.combinations(sets[:150], 2)) < curate.NEAR_DUPLICATE


def test_examples_of_what_was_dropped_can_be_read(built):
    page = (built / "metadata/stage1/dropped.md").read_text()
    assert "## wikipedia" in page and "### near_duplicate: 1" in page and "Le vieux pont" in page
    report = json.loads((built / "metadata/stage1/filters.json").read_text())
    assert all(d["count"] and len(d["examples"]) <= 3 for r in report.values() for d in r["dropped"].values())
    provenance = json.loads((built / "metadata/stage1/provenance.json").read_text())
    assert (
        provenance["sources"]["wikipedia"]["licence"].startswith("CC-BY-SA")
        and provenance["inputs"]["evaluations"]["gsm8k_test"] == 1
    )
    (digest,) = provenance["sources"]["wikipedia"]["files"].values()
    assert len(digest) == 64 and provenance["inputs"]["evaluations"]["sudoku_extreme_test"] == 1


def test_documents_are_what_the_rows_say(built):
    encoder = tokenizer.load()
    (first, *_) = (encoder.decode(ids[:-1].tolist()) for _, _, ids in documents(built, "gsm8k"))
    assert first.startswith("Question: Ann has ") and "<<" not in first and "\nAnswer: " in first
    (maze,) = (arc.decode(ids) for _, _, ids in documents(built, "maze_hard"))
    assert maze[0] == "maze" and puzzles.check_maze(*maze[1][0])
    for _, _, ids in documents(built, "sudoku_extreme"):
        assert puzzles.check_sudoku(*arc.decode(ids)[1][0])
    words = {
        "Roads": puzzles.check_shortest_path,
        "chairs": puzzles.check_seating,
        "Knights": puzzles.check_knights,
    }
    for source in ("graphs", "logic"):
        for _, _, ids in itertools.islice(documents(built, source), 10):
            text = encoder.decode(ids[:-1].tolist())
            assert any(check(text) for word, check in words.items() if word in text)


def test_no_evaluation_output_in_puzzles_or_traces(built):
    outputs = [o for name in ("arc1_eval", "arc2_eval") for t in arc.load(name) for _, o in t.test]
    outputs = {arc.canonical_hash(o) for o in outputs if o.size > 9 and len(np.unique(o)) > 1}
    seen = 0
    for source, _, ids in documents(built):
        if source not in ("programs", "traces", "arc", "maze"):
            continue
        marks = [*np.flatnonzero((ids == tokenizer.INPUT) | (ids == tokenizer.OUTPUT)), len(ids)]
        for a, b in itertools.pairwise(marks):
            grid = [
                int(i)
                for i in itertools.takewhile(lambda i: tokenizer.CELL0 <= i <= tokenizer.ROW, ids[a + 1 : b])
            ]
            width = grid.index(tokenizer.ROW) + 1
            cells = np.array(grid[: len(grid) // width * width]).reshape(-1, width)[:, :-1] - tokenizer.CELL0
            seen += 1
            assert arc.canonical_hash(cells.astype(np.uint8)) not in outputs
    assert seen > 500


def test_images_of_an_arc_task_are_on_one_side_of_the_split(source_dir, tmp_path):
    """Enough of the stage is ARC that every task comes several times."""
    build(tmp_path, source_dir, "--sources=arc", "--limit_mb=40", "--unit_mb=8")

    def trait(ids):  # what neither symmetry nor colours nor the order of pairs change
        return tuple(
            sorted(
                tuple(sorted(np.unique(g, return_counts=True)[1]))
                for pair in arc.decode(ids)[1]
                for g in pair
            )
        )

    sides, n = {"train": set(), "val": set()}, 0
    for _, split, ids in documents(tmp_path, "arc"):
        sides[split].add(trait(ids))
        n += 1
    assert n > 2 * len(sources._arc_tasks()) and len(sides["val"]) > 10 and not sides["train"] & sides["val"]


# ---- the same bytes, however it was made


def test_processes_and_kills_change_no_byte(built, source_dir, tmp_path):
    options = [f"--data_dir={tmp_path}", f"--source_dir={source_dir}", *SMALL]
    draw, kills = random.Random(1), 0
    for attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "prepare.py"), "stage1", *options],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": str(attempt)},
        )
        there = len(list(tmp_path.glob("work/*/*/*.json")))
        wanted = there + draw.randrange(1, 30)
        while process.poll() is None and kills < 3:
            if (
                len(list(tmp_path.glob("work/*/*/*.json"))) >= wanted
                or kills == 2
                and list(tmp_path.glob("processed/*/*.bin"))
            ):
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                break
            time.sleep(0.005)
        if kills == 3 or process.poll() is not None and process.returncode != -signal.SIGKILL:
            break
        assert not (tmp_path / "stages/stage1/manifest.jsonl").exists()
    process.wait()
    build(tmp_path, source_dir, "--num_proc=2")
    assert kills >= 3 and shards(tmp_path) == shards(built)


def test_a_damaged_unit_is_made_again(copy, built, source_dir):
    made = sorted(copy.glob("work/*/*/*.tokens"))
    os.truncate(next(u for u in made if u.stat().st_size > 100), 10)
    (copy / "work/wikipedia").rename(copy / "elsewhere")  # and a whole source of units may be gone
    shutil.rmtree(copy / "elsewhere")
    build(copy, source_dir, "--force")
    assert shards(copy) == shards(built)


def test_ray_gives_the_same_bytes(built, source_dir, tmp_path):
    pytest.importorskip("ray", reason="an optional extra")
    build(tmp_path, source_dir, "--engine=ray", "--num_proc=2")
    assert shards(tmp_path) == shards(built)


def test_building_again_does_nothing_and_a_setting_builds_anew(copy, source_dir, capsys):
    before = shards(copy)
    build(copy, source_dir)
    assert "already there" in capsys.readouterr().out and shards(copy) == before
    build(copy, source_dir, "--limit_mb=0.6")
    out = capsys.readouterr().out
    assert "limit_mb changed" in out
    entries, _ = prepare.read_manifest(copy, "stage1")
    assert {p for p in shards(copy) if p.endswith(".bin")} == {e["path"] for e in entries}


def test_the_validation_split_is_stable_when_a_source_grows(built, source_dir, tmp_path):
    grown = tmp_path / "sources"
    shutil.copytree(source_dir, grown)
    pq.write_table(
        pa.Table.from_pylist([{"text": english(20, 7000 + i), "id": "x"} for i in range(60)]),
        grown / "fineweb_edu/9.parquet",
    )
    build(tmp_path / "data", grown, "--limit_mb=1.5")
    for name in ("fineweb_edu", "codeparrot"):
        old = {(ids.tobytes(), split) for _, split, ids in documents(built, name)}
        new = {(ids.tobytes(), split) for _, split, ids in documents(tmp_path / "data", name)}
        moved = {(ids, "val" if split == "train" else "train") for ids, split in old} & new
        assert not moved and old & new and "val" in {split for _, split in old}


def test_a_frozen_stage_survives_other_builds(copy, source_dir):
    prepare.main(["freeze", "stage1", "--tag=v1", f"--data_dir={copy}"])
    frozen = {e["path"] for e in prepare.read_manifest(copy, "stage1", "v1")[0]}
    build(copy, source_dir, "--limit_mb=0.6")
    shutil.rmtree(copy / "work")
    assert frozen != {e["path"] for e in prepare.read_manifest(copy, "stage1")[0]}
    assert {e["path"] for e in prepare.read_manifest(copy, "stage1", tag="v1")[0]} == frozen
    with pytest.raises(SystemExit, match="taken by another state"):
        prepare.main(["freeze", "stage1:v1", f"--data_dir={copy}"])
    prepare.main(["freeze", "stage1", "--tag=v2", f"--data_dir={copy}"])
    prepare.main(["freeze", "stage1", "--tag=v2", f"--data_dir={copy}"])  # the same state: nothing to do
    prepare.main(["verify", "stage1:v1", f"--data_dir={copy}"])


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (
            "manifest.jsonl",
            lambda b: b.replace(b'"val"', b'"train"', 1),
            "manifest.jsonl was changed after the stage was frozen",
        ),
        (
            "mixture.json",
            lambda b: b.replace(b"0.", b"0.0", 1),
            "mixture.json was changed after the stage was frozen",
        ),
        (
            "snapshot.json",
            lambda b: b.replace(b'"tag": "v1"', b'"tag": "v2"'),
            "snapshot.json is missing, damaged or of another",
        ),
        ("snapshot.json", None, "snapshot.json is missing"),
        ("extra.txt", lambda b: b"x", "extra.txt does not belong"),
    ],
)
def test_an_edited_frozen_stage_is_named(copy, file, change, says):
    prepare.main(["freeze", "stage1", "--tag=v1", f"--data_dir={copy}"])
    path = copy / "stages/stage1/v1" / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(SystemExit) as e:
        prepare.main(["verify", "stage1:v1", f"--data_dir={copy}"])
    assert says in str(e.value.code) and "\n" not in str(e.value.code)
    with pytest.raises(ValueError, match="a frozen stage never changes"):
        prepare.read_manifest(copy, "stage1", tag="v1", verify=False)


# ---- what is made anew when something changes


FOUR = "--sources=fineweb_edu,oss_instruct,codeparrot,arithmetic"
KEYED = [FOUR, "--limit_mb=0.1", "--unit_mb=0.02", "--num_proc=1"]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A stage of prose, dialogues and code from files, and of what is generated."""
    folder = tmp_path_factory.mktemp("keyed")
    rows = {
        "fineweb_edu": [{"text": english(9, i), "body": english(9, 1000 + i)} for i in range(60)],
        "oss_instruct": [
            {"instruction": english(2, 2000 + i), "response": english(5, 3000 + i)} for i in range(60)
        ],
        "codeparrot": [{"content": code(i)} for i in range(60)],
    }
    for name, records in rows.items():
        (folder / "in" / name).mkdir(parents=True)
        (folder / "in" / name / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    prepare.main(["stage2", f"--data_dir={folder / 'data'}", f"--source_dir={folder / 'in'}", *KEYED])
    return folder


def edited(patch, name, old, new):
    """As if a function of sources.py had been edited."""
    text = inspect.getsource(getattr(sources, name))
    assert old in text
    patch.setattr(sources, name, None)  # what was there comes back after the test
    exec(text.replace(old, new), vars(sources))


def entry(patch, name, **fields):
    patch.setitem(sources.SOURCES, name, dataclasses.replace(sources.SOURCES[name], **fields))


def rule_of_prose(patch):
    other = {"mean_word_length": {"prose": (3, 9)}}
    rules = tuple((rule, what, {**limits, **other.get(what, {})}) for rule, what, limits in curate.RULES)
    patch.setattr(curate, "RULES", rules)


def stage2(patch, groups=lambda g: g, weights=lambda w: w):
    megabytes, old_groups, old_weights = sources.STAGES["stage2"]
    patch.setitem(sources.STAGES, "stage2", (megabytes, groups(old_groups), weights(old_weights)))


FROM_FILES = {"fineweb_edu", "oss_instruct", "codeparrot"}


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        (lambda patch: entry(patch, "fineweb_edu", document=sources.column("body")), {"fineweb_edu"}),
        (lambda patch: entry(patch, "fineweb_edu", profile="none"), {"fineweb_edu"}),
        (lambda patch: entry(patch, "oss_instruct", document=lambda row: row["response"]), {"oss_instruct"}),
        (rule_of_prose, {"fineweb_edu"}),
        # what the document calls, and what the reader's reader calls
        (
            lambda patch: edited(patch, "turns", "ASSISTANT, text.strip()", "ASSISTANT, text"),
            {"oss_instruct"},
        ),
        (lambda patch: edited(patch, "open_text", "gzip.open(path", "gzip.open(str(path)"), FROM_FILES),
        (lambda patch: patch.setattr(sources, "TEXT_FILE_CHARS", 9), FROM_FILES),
        (lambda patch: edited(patch, "GeneratedRows", "str(index)", "f'{index}'"), {"arithmetic"}),
        (lambda patch: stage2(patch, groups=lambda old: {**old, "web": 0.2, "code": 0.4}), set()),
        (lambda patch: stage2(patch, weights=lambda old: {**old, "oss_instruct": 3}), set()),
        (lambda patch: stage2(patch, weights=lambda old: dict(reversed(old.items()))), set()),
        (lambda patch: entry(patch, "fineweb_edu", licence="CC0-1.0"), set()),
        (lambda patch: edited(patch, "column", "return", "# it says why\n    return"), None),
    ],
)
def test_what_changed_is_made_anew_and_nothing_else(keyed, tmp_path, monkeypatch, capsys, change, anew):
    """anew: whose units are made again (of none: the stage is built of those there); None: nothing to do."""
    data = tmp_path / "data"
    shutil.copytree(keyed / "data", data)
    command = ["stage2", f"--data_dir={data}", f"--source_dir={keyed / 'in'}", *KEYED]
    before = {p: p.stat().st_mtime_ns for p in data.glob("work/*/*/*.json")}
    change(monkeypatch)
    prepare.main(command)
    assert ("already there" in capsys.readouterr().out) == (anew is None)
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())
    # in other folders, that is: a larger share needs more units of the same
    folders = {p.parent for p in data.glob("work/*/*/*.json")} - {p.parent for p in before}
    assert {folder.parent.name for folder in folders} == (anew or set())
    prepare.main(command)
    assert "already there" in capsys.readouterr().out


def test_a_changed_entry_is_in_the_stage(keyed, tmp_path, monkeypatch):
    command = ["stage2", f"--data_dir={tmp_path}", f"--source_dir={keyed / 'in'}", *KEYED]
    prepare.main(command)
    before = prepare.read_manifest(tmp_path, "stage2")[1]["groups"]
    entry(monkeypatch, "fineweb_edu", document=sources.column("body"), licence="CC0-1.0")
    stage2(monkeypatch, groups=lambda old: {**old, "web": 0.2, "code": 0.4})
    prepare.main(command)
    bodies, encoder = {english(9, 1000 + i).strip() for i in range(60)}, tokenizer.load()
    found = documents(tmp_path, "fineweb_edu", stage="stage2")
    texts = {encoder.decode(ids[:-1].tolist()).strip() for _, _, ids in found}
    assert texts and texts <= bodies
    after = prepare.read_manifest(tmp_path, "stage2")[1]["groups"]
    assert before["web"] > 1.5 * before["code"] and after["code"] > 1.5 * after["web"]
    provenance = json.loads((tmp_path / "metadata/stage2/provenance.json").read_text())
    assert provenance["sources"]["fineweb_edu"]["licence"] == "CC0-1.0"


@pytest.mark.parametrize("suffix", ["tokens", "ends", "keys", "bands", "json"])
def test_a_flipped_bit_in_a_unit_is_noticed(keyed, tmp_path, capsys, suffix):
    """Wherever it is, the unit is made again, and the stage is the same to the byte."""
    data, whole, draw = tmp_path / "data", keyed / "data", random.Random(suffix)
    shutil.copytree(whole, data)
    for source in ("fineweb_edu", "codeparrot"):
        files = sorted(data.glob(f"work/{source}/*/*.{suffix}"))
        path = draw.choice([p for p in files if p.stat().st_size > 8])
        content = bytearray(path.read_bytes())
        # in the record, a digit becomes another one
        at = content.index(b'"read": ') + 8 if suffix == "json" else draw.randrange(len(content))
        content[at] ^= 1
        path.write_bytes(content)
    prepare.main(["stage2", f"--data_dir={data}", f"--source_dir={keyed / 'in'}", *KEYED, "--force"])
    out = capsys.readouterr().out
    assert all(f"note: 1 units of {source} are damaged" in out for source in ("fineweb_edu", "codeparrot"))
    assert shards(data) == shards(whole)
    for path in data.glob("work/*/*/*"):
        original = whole / path.relative_to(data)
        assert not original.exists() or path.read_bytes() == original.read_bytes()


def test_a_unit_that_is_damaged_as_soon_as_it_is_made_stops_the_build(keyed, tmp_path, monkeypatch):
    def damaging(path, content, write=units.write):
        write(path, content)
        if path.suffix == ".keys" and path.stat().st_size:
            path.write_bytes(b"x" * path.stat().st_size)

    monkeypatch.setattr(units, "write", damaging)
    with pytest.raises(SystemExit, match="damaged again.*disk or memory is faulty"):
        where = [f"--data_dir={tmp_path}", f"--source_dir={keyed / 'in'}"]
        prepare.main(["stage2", *where, "--sources=fineweb_edu", *KEYED[1:]])


def test_damaged_evaluations_are_not_relied_on(keyed, tmp_path, monkeypatch):
    """Neither what all workers read nor the test puzzles of the hub, which are looked up once."""
    shutil.copytree(keyed / "data", tmp_path / "data")

    def flip(path):
        before = path.read_bytes()
        path.write_bytes(before[:300] + bytes([before[300] ^ 1]) + before[301:])
        return before

    (path,) = (tmp_path / "data/work").glob("evaluations-*.npz")
    before = flip(path)
    where = [f"--data_dir={tmp_path / 'data'}", f"--source_dir={keyed / 'in'}"]
    prepare.main(["stage2", *where, *KEYED, "--force"])
    assert path.read_bytes() == before

    draw, made = np.random.default_rng(3), []
    grids = [puzzles.sudoku(draw, 9, 30).test[0] for _ in range(9)]
    texts = [["".join(map(str, grid.flat)).replace("0", ".") for grid in pair] for pair in grids]
    rows = [dict(zip(("question", "answer"), pair)) for pair in texts]
    monkeypatch.setattr(sources, "HubRows", lambda *where: enumerate(rows))
    monkeypatch.setattr(pipeline, "puzzle_key", lambda task: made.append(task) or units.puzzle_key(task))
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/revisions.json").write_text(json.dumps({"sapientinc/sudoku-extreme": "0" * 40}))

    def keys():
        which = "sudoku_extreme_test", "sudoku_extreme", "test.csv"
        return pipeline.evaluation_puzzles(types.SimpleNamespace(source_dir=""), tmp_path, *which)

    found = keys()
    assert len(found) == 9 and np.array_equal(keys(), found) and len(made) == 9
    flip(*(tmp_path / "work").glob("sudoku_extreme_test-*"))
    assert np.array_equal(keys(), found) and len(made) == 18
    edited(monkeypatch, "sudoku_extreme", "else int(c)", "else int(c) % 9 + 1")
    entry(monkeypatch, "sudoku_extreme", document=sources.sudoku_extreme)
    assert not np.array_equal(keys(), found) and len(made) == 27  # an edited reader, other puzzles


def contents(data):
    found = (p for p in data.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(data).as_posix(): p.read_bytes() for p in found}


def test_clean_deletes_what_nothing_uses(keyed, tmp_path, monkeypatch, capsys):
    """Not what a stage or a tag lists, nor what is being pulled; verify does not mind any of it."""
    data = tmp_path / "data"
    shutil.copytree(keyed / "data", data)
    prepare.main(["freeze", "stage2:v1", f"--data_dir={data}"])
    rule_of_prose(monkeypatch)
    stage2(monkeypatch, groups=lambda old: {**old, "web": 0.2, "code": 0.4})
    prepare.main(["stage2", f"--data_dir={data}", f"--source_dir={keyed / 'in'}", *KEYED])
    (data / "processed/maze").mkdir()
    for name in ("train-0", "val-0", "train-1"):
        (data / f"processed/maze/{name}.bin").write_bytes(b"tokens")
        (data / f"processed/maze/{name}.idx").write_bytes(b"offsets")
    (data / "processed/maze/notes.txt").write_text("whoever put them here")
    (data / "work/pull/ada--x-0/frozen").mkdir(parents=True)
    (data / "work/pull/ada--x-0/frozen/manifest.jsonl").write_text('{"path": "processed/maze/train-1.bin"}\n')
    (old,) = (p.parent for p in (keyed / "data").glob("work/fineweb_edu/*/000000-0.json"))
    unused = {f"processed/maze/{name}" for name in ("train-0.bin", "train-0.idx", "val-0.bin", "val-0.idx")}
    unused |= {p.relative_to(keyed / "data").as_posix() for p in old.iterdir()}
    for name in ("stage2", "stage2:v1"):
        prepare.main(["verify", name, f"--data_dir={data}"])

    before = contents(data)
    capsys.readouterr()
    prepare.main(["clean", "--dry_run", f"--data_dir={data}"])
    size = sum(len(before[path]) for path in unused)
    out = capsys.readouterr().out
    assert f"{size:,} bytes that nothing uses would be deleted" in out and old.name in out
    assert contents(data) == before
    with prepare.only_one(data), pytest.raises(SystemExit, match="another prepare.py is at work"):
        prepare.main(["clean", f"--data_dir={data}"])
    prepare.main(["clean", f"--data_dir={data}"])
    assert f"{size:,} bytes that nothing uses were deleted" in capsys.readouterr().out
    assert contents(data) == {path: content for path, content in before.items() if path not in unused}
    for name in ("stage2", "stage2:v1"):
        prepare.main(["verify", name, f"--data_dir={data}"])
    prepare.main(["clean", f"--data_dir={data}"])
    assert "\n0 bytes" in "\n" + capsys.readouterr().out.splitlines()[-1]


def test_clean_leaves_the_units_of_a_killed_build(keyed, tmp_path, monkeypatch):
    command = ["stage2", f"--data_dir={tmp_path}", f"--source_dir={keyed / 'in'}", *KEYED]

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_stage", killed)
        with pytest.raises(SystemExit, match="interrupted"):
            prepare.main(command)
    before = contents(tmp_path)
    kept = {path: content for path, content in before.items() if not path.startswith("processed/")}
    prepare.main(["clean", f"--data_dir={tmp_path}"])
    assert kept != before and contents(tmp_path) == kept
    prepare.main(command)
    assert shards(tmp_path) == shards(keyed / "data")


@pytest.mark.parametrize("damaged", ["manifest.jsonl", "mixture.json", "v1/mixture.json", "v1/snapshot.json"])
def test_clean_deletes_nothing_where_a_manifest_is_damaged(keyed, tmp_path, damaged):
    data = tmp_path / "data"
    shutil.copytree(keyed / "data", data)
    prepare.main(["freeze", "stage2:v1", f"--data_dir={data}"])
    path = data / "stages/stage2" / damaged
    path.write_bytes(path.read_bytes()[:-20])
    before = contents(data)
    with pytest.raises(SystemExit, match="nothing is cleaned before it is mended or deleted"):
        prepare.main(["clean", f"--data_dir={data}"])
    assert contents(data) == before


# ---- mistakes and damage


def test_a_full_disk_is_one_line_and_leaves_no_stage(source_dir, tmp_path, built):
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "sys.path[:0] = [sys.argv.pop(1)]; import prepare; prepare.main(sys.argv[1:])"
    )
    command = [
        sys.executable,
        "-c",
        limited,
        str(ROOT),
        "stage1",
        f"--data_dir={tmp_path}",
        f"--source_dir={source_dir}",
        *SMALL,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().split("\n")[-1].startswith(
        "error: [Errno 27] File too large"
    )
    assert not list(tmp_path.glob("stages/*/manifest.jsonl")) and not list(tmp_path.rglob("*.tmp"))
    build(tmp_path, source_dir)
    assert shards(tmp_path) == shards(built)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("fineweb_edu/9.jsonl", b'{"text": "a"}\n{"text": "b\n', "not_a_row 1"),
        ("fineweb_edu/9.jsonl", b'{"body": "a"}\n', "has no column 'text': it has body"),
        ("fineweb_edu/9.jsonl", b"[1, 2]\n", "not an object with columns"),
        ("fineweb_edu/9.parquet", b"PAR1 no", "9.parquet at row 1"),
        (
            "fineweb_edu/9.jsonl.gz",
            gzip.compress(b'{"text": "aaaa"}\n' * 999, mtime=0)[:40],
            "9.jsonl.gz at row",
        ),
        (
            "fineweb_edu/9.jsonl.zst",
            pa.compress(b'{"text": "aaaa"}\n' * 999, "zstd", asbytes=True)[:20],
            "9.jsonl.zst at row",
        ),
        ("fineweb_edu/9.jsonl", '{"text": "\xe9"}\n'.encode("latin-1"), "not_text 1, as [9.jsonl:1]"),
        ("fineweb_edu/9.json", b'[{"text": "a"}, {"text": "b"', "9.json at row 1"),
        ("fineweb_edu/9.pdf", b"x", "9.pdf is of no kind that can be read"),
        ("finewebedu/9.jsonl", b"x", "folder 'finewebedu', which is not the name of a source"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, says, capsys):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(SystemExit) as e:
        build(tmp_path / "data", tmp_path / "in", "--sources=fineweb_edu")
    assert says in str(e.value.code) and "\n" not in str(e.value.code)
    assert not list((tmp_path / "data").glob("stages/*/manifest.jsonl"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metadata/stage2/filters.json", b"{", ["status"]),
        ("metadata/stage2/provenance.json", b"[]", ["freeze", "stage2:v1"]),
        ("work/keys.json", b"\xff", ["clean"]),
        ("work/keys.json", b"3", ["stage2", *KEYED, "--force"]),
        ("metadata/revisions.json", b"", ["stage2", "--dry_run"]),
        ("metadata/pulled.json", b"{]", ["pull", "ada/x:v1"]),
    ],
)
def test_a_damaged_note_is_named(keyed, tmp_path, monkeypatch, file, content, words):
    import huggingface_hub

    data = tmp_path / "data"
    shutil.copytree(keyed / "data", data)
    (data / file).write_bytes(content)
    hub = types.SimpleNamespace(
        list_repo_refs=lambda *_, **__: types.SimpleNamespace(tags=[types.SimpleNamespace(name="v1")]),
        dataset_info=lambda *_, **__: types.SimpleNamespace(sha="0" * 40),
        list_repo_tree=lambda *_, **__: [],
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    options = [f"--source_dir={keyed / 'in'}"] if "--force" in words else []
    with pytest.raises(SystemExit, match=f"error: {data / file} is damaged"):
        prepare.main([*words, f"--data_dir={data}", *options])


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ([english(20, 5)], ["--stage_val_every=2"], "kept 1, all for validation"),
        (
            ["x", english(20, 5)],
            ["--stage_val_every=2"],
            "dropped by gopher_few.* 1; kept 1, all for validation",
        ),
        (["x", "y"], [], "dropped by gopher_few_or_many_words 2"),
        ([], [], "its sources are empty"),
    ],
)
def test_where_the_documents_of_an_empty_group_went(tmp_path, texts, options, says):
    (tmp_path / "in/fineweb_edu").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in/fineweb_edu/rows.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match=f"no document of web is left for training: {says}"):
        build(tmp_path / "data", tmp_path / "in", "--sources=fineweb_edu", *options)


def test_a_group_of_nothing_but_copies_says_so(tmp_path):
    for name in ("fineweb_edu", "open_web_math"):
        (tmp_path / "in" / name).mkdir(parents=True)
        texts = "<|endoftext|>\n".join(english(20, i) for i in range(9))
        (tmp_path / "in" / name / "rows.txt").write_text(texts)
    with pytest.raises(SystemExit, match="no document of math is left for training: dropped by duplicate 9"):
        build(tmp_path / "data", tmp_path / "in", "--sources=fineweb_edu,open_web_math")


def write_rows(path, rows, head=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes((head + lines).encode(errors="surrogateescape"))


def prose_rows(n, first=0):
    return [{"text": english(20, 9000 + first + i)} for i in range(n)]


def test_odd_rows_are_dropped_and_counted_with_file_and_row(tmp_path):
    """No row stops a build, and nothing but text becomes a document: no list of numbers passes for ids."""
    odd = [
        {"text": 17},
        {"text": None},
        {"text": [tokenizer.ROW, 70_000, -1]},
        {"text": {"a": "b"}},
        {"text": "half \ud83d a pair"},
        '{"text": "\udce9 in Latin 1"}',
        '{"text": "cut',
        {"body": "x"},
        '"x"',
    ]
    good = prose_rows(20)
    write_rows(tmp_path / "in/fineweb_edu/a.jsonl", [*good[:3], "", "  ", *odd, *good[3:]], head="\ufeff")
    build(tmp_path / "data", tmp_path / "in", "--sources=fineweb_edu", "--stage_val_every=3")
    assert filters(tmp_path / "data")["fineweb_edu"] == {"not_text": 6, "not_a_row": 2, "no_column": 1}
    page = (tmp_path / "data/metadata/stage1/dropped.md").read_text()
    assert "[a.jsonl:4] a row of 'fineweb_edu' is not as expected: text is int, not text" in page
    assert "[a.jsonl:11]" in page
    encoder = tokenizer.load()
    texts = {encoder.decode(ids[:-1].tolist()) for _, _, ids in documents(tmp_path / "data")}
    assert texts == {curate.normalise(row["text"]) for row in good}
    prepare.main(["verify", "stage1", f"--data_dir={tmp_path / 'data'}"])


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", lambda rows: "\n\n".join(map(json.dumps, rows)).encode("utf-8-sig")),
        ("a.json", lambda rows: json.dumps(rows, indent=1).encode("utf-8-sig")),
        (
            "a.csv",
            lambda rows: "\n\n".join(["text", *(r["text"].replace("\n", " ") for r in rows)]).encode(
                "utf-8-sig"
            ),
        ),
        ("a.txt", lambda rows: "<|endoftext|>\n".join(row["text"] for row in rows).encode("utf-8-sig")),
    ],
)
def test_reading_goes_on_where_it_was(tmp_path, name, content):
    """Blank lines, a byte order mark, an array: from any row on, the rest is the same."""
    rows = [{"text": english(2, i)} for i in range(5)]
    (tmp_path / name).write_bytes(content(rows))
    read = list(sources.read_file(tmp_path / name))
    assert [row["text"].split() for row in read] == [row["text"].split() for row in rows]
    assert all(list(sources.read_file(tmp_path / name, skip)) == read[skip:] for skip in range(7))


def test_binary_columns_are_decoded(tmp_path):
    """Bytes that are UTF-8 are text, others are dropped, also where a writer called them text unseen."""
    values = ["caf\xe9".encode(), "caf\xe9".encode("latin-1")]
    pq.write_table(pa.table({"text": pa.array(values, pa.binary())}), tmp_path / "a.parquet")
    unchecked = pa.StringArray.from_buffers(2, *pa.array(values, pa.binary()).buffers()[1:])
    pq.write_table(pa.table({"text": unchecked}), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        good, bad = sources.read_file(tmp_path / name)
        assert sources.to_document("fineweb_edu", {"files": []}, good) == "caf\xe9"
        with pytest.raises(sources.OddRow, match="not Unicode") as e:
            sources.to_document("fineweb_edu", {"files": []}, bad)
        assert e.value.rule == "not_text"


def test_too_many_odd_rows_stop_the_build_and_are_named(tmp_path):
    """Before all of them are read, in the same words on any number of processes; a few do not."""

    def odd(i):
        return {"text": i, "padding": "x" * 500}

    write_rows(tmp_path / "few/fineweb_edu/a.jsonl", [*prose_rows(20), *map(odd, range(9))])
    build(tmp_path / "data", tmp_path / "few", "--sources=fineweb_edu", "--stage_val_every=3")
    assert filters(tmp_path / "data")["fineweb_edu"] == {"not_text": 9}
    write_rows(tmp_path / "all/fineweb_edu/a.jsonl", map(odd, range(2000)))
    said = []
    for data, more in (("one", []), ("two", ["--num_proc=2"])):
        with pytest.raises(SystemExit) as e:
            build(tmp_path / data, tmp_path / "all", "--sources=fineweb_edu", *more)
        said.append(str(e.value.code))
    assert said[0] == said[1] and "\n" not in said[0]
    assert "rows of fineweb_edu are no documents, 1% may be: not_text" in said[0]
    assert "[a.jsonl:1] [a.jsonl:2] [a.jsonl:3]: " in said[0]
    assert not list(tmp_path.glob("one/stages/*/manifest.jsonl"))
    assert len(list(tmp_path.glob("one/work/fineweb_edu/*/*-0.json"))) < 4  # of 18 units


def test_odd_rows_that_a_stage_does_not_reach_do_not_stop_it(tmp_path):
    """Whatever units an earlier build has left: the share is that of the rows which the stage is made of."""
    write_rows(tmp_path / "in/fineweb_edu/a.jsonl", [*prose_rows(250), *({"text": i} for i in range(200))])
    small = ["--sources=fineweb_edu", "--limit_mb=0.1"]
    build(tmp_path / "data", tmp_path / "in", *small)
    before = shards(tmp_path / "data")
    with pytest.raises(SystemExit, match="not_text 200"):
        build(tmp_path / "data", tmp_path / "in", small[0])
    build(tmp_path / "data", tmp_path / "in", *small, "--force")
    assert shards(tmp_path / "data") == before and filters(tmp_path / "data")["fineweb_edu"] == {}


@pytest.mark.parametrize("lane_of_odd", [0, 3])
def test_the_share_of_odd_rows_is_over_all_lanes(lane_of_odd):
    """One bad file among eight is judged with the others, and judged alike whichever it is."""

    def record(lane, number, odd):
        rules = {"not_text": {"count": odd, "examples": ["[a:1] x"]}} if odd else {}
        return {"lane": lane, "number": number, "read": 1000, "odd": rules}

    from smol import pipeline

    bad = [record(lane, 0, 50 * (lane == lane_of_odd)) for lane in range(sources.LANES)]
    assert pipeline.odd_rows("x", bad, last=True) is None
    worse = [record(lane, 0, 90 * (lane == lane_of_odd)) for lane in range(sources.LANES)]
    rest = [record(lane, 1, 0) for lane in range(sources.LANES)]
    assert pipeline.odd_rows("x", worse) is None, "a round that may not be over is not judged"
    says = pipeline.odd_rows("x", worse, last=True)
    assert "90 of the first 8,000" in says
    assert says == pipeline.odd_rows("x", worse + rest) == pipeline.odd_rows("x", worse + rest[:1])
    assert pipeline.odd_rows("x", [record(0, 0, 9), record(0, 1, 0)], last=True) is None


def test_a_wrong_column_stops_at_the_first_row_of_any_file(tmp_path):
    write_rows(tmp_path / "in/fineweb_edu/a.jsonl", prose_rows(5))
    write_rows(tmp_path / "in/fineweb_edu/b.jsonl", [{"body": "x"}, {"body": "y"}])
    with pytest.raises(SystemExit, match="has no column 'text': it has body"):
        build(tmp_path / "data", tmp_path / "in", "--sources=fineweb_edu")


def test_puzzles_that_are_none_are_dropped_and_counted(source_dir, tmp_path, capsys):
    lines = (source_dir / "sudoku_extreme/s.csv").read_text().splitlines()
    question, answer = lines[1].split(",")[1:3]
    odd = [f"x,{question}1,{answer}1,7", f"x,{question[:-1]}x,{answer},7", "x,,,7", "x"]
    write_rows(tmp_path / "in/sudoku_extreme/s.csv", [*lines[:12], *odd, *lines[12:]])
    tested_on = (source_dir / "sudoku_extreme_test/t.csv").read_text().splitlines()
    write_rows(tmp_path / "in/sudoku_extreme_test/t.csv", [*tested_on, odd[0]])
    maze = (source_dir / "maze_hard/m.csv").read_text().splitlines()
    write_rows(tmp_path / "in/maze_hard/m.csv", [*maze, 'x,"","",1', "x,#?,##,1"])
    build(tmp_path / "data", tmp_path / "in", "--sources=sudoku_extreme,maze_hard", "--stage_val_every=9")
    dropped = filters(tmp_path / "data")
    assert dropped["sudoku_extreme"] == {
        "wrong_answer": 1,
        "is_in_sudoku_extreme_test": 1,
        "not_as_expected": 3,
        "not_text": 1,
    }
    assert dropped["maze_hard"]["not_as_expected"] == 2
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "rows of sudoku_extreme_test" in line]
    assert note.startswith("note: 1 rows") and "size 82" in note


def test_hidden_files_and_cards_are_not_read(tmp_path):
    folder = tmp_path / "in/fineweb_edu"
    for name in (
        "a.jsonl",
        "b/c.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".cache/hub/x/d.jsonl",
        "b/.hidden.jsonl",
        "README.md",
        "readme.txt",
        "LICENSE",
        "b/NOTES.md",
    ):
        write_rows(folder / name, prose_rows(1))
    assert sources.local_files(tmp_path / "in", "fineweb_edu") == [folder / "a.jsonl", folder / "b/c.jsonl"]
    (tmp_path / "in/.cache").mkdir()
    build(tmp_path / "data", tmp_path / "in", "--sources=fineweb_edu", "--dry_run")
    (folder / "licence_texts.jsonl").touch()  # data by its name
    assert folder / "licence_texts.jsonl" in sources.local_files(tmp_path / "in", "fineweb_edu")
    (folder / "notes.pdf").touch()
    with pytest.raises(ValueError, match="notes.pdf is of no kind"):
        sources.local_files(tmp_path / "in", "fineweb_edu")


def test_a_document_that_is_too_long_is_dropped_before_it_costs_memory(tmp_path, monkeypatch):
    good = prose_rows(12)
    long = {"text": "word " * (units.MAX_CHARS // 5 + 1)}
    write_rows(tmp_path / "in/fineweb_edu/a.jsonl", [*good[:5], long, *good[5:]])
    normalise, seen = curate.normalise, []
    monkeypatch.setattr(curate, "normalise", lambda text, *a: seen.append(len(text)) or normalise(text, *a))
    build(tmp_path / "data", tmp_path / "in", "--sources=fineweb_edu", "--stage_val_every=3")
    assert filters(tmp_path / "data")["fineweb_edu"] == {"too_long": 1} and max(seen) <= units.MAX_CHARS
    assert "[a.jsonl:6] 4,000,005 characters" in (tmp_path / "data/metadata/stage1/dropped.md").read_text()
    (limits,) = (limits for _, what, limits in curate.RULES if what == "words")
    assert units.MAX_CHARS >= 20 * max(most for _, most in limits.values())  # of whatever words: too many


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sources=finewebedu"], "--sources names 'finewebedu'"),
        (["--source_dir=/nonexistent"], "is not a folder"),
        (["--limit_mb=0"], "--limit_mb must be above 0"),
        (["--limit_mb=1e-6", "--sources=sudoku4"], "--limit_mb=1e-06 is less than a token"),
        (["--engine=spark"], "--engine must be"),
        (["--stage_val_every=1"], "--stage_val_every must be"),
        (["--num_proc=-2"], "--num_proc must be"),
        (["--source_dir={empty}"], "no source of web, code is left"),
        (["--source_dir={empty}", "--sources=fineweb_edu"], "no source is left: fineweb_edu: no folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, says):
    (tmp_path / "empty").mkdir()
    options = [o.format(empty=tmp_path / "empty") for o in options]
    with pytest.raises(SystemExit, match=says) as e:
        prepare.main(["stage1", f"--data_dir={tmp_path / 'data'}", *options])
    assert str(e.value.code).startswith("error: ") and "\n" not in str(e.value.code)


def test_a_dry_run_says_what_and_does_nothing(source_dir, tmp_path, capsys):
    build(tmp_path / "data", source_dir, "--dry_run", "--limit_mb=100")
    out = capsys.readouterr().out
    assert (
        "25,000,000 training tokens" in out
        and "fineweb_edu" in out
        and "2 files in" in out
        and not (tmp_path / "data").exists()
    )


def test_a_stage_too_large_for_its_sources_keeps_its_shares(source_dir, tmp_path, capsys):
    build(tmp_path, source_dir, "--limit_mb=8", "--unit_mb=0.2")
    assert "note: the sources have documents for" in capsys.readouterr().out
    _, mixture = prepare.read_manifest(tmp_path, "stage1", verify=False)
    assert mixture["groups"] == pytest.approx(
        sources.STAGES["stage1"][1], abs=0.02
    )  # a single ARC task is 2% of so small a stage


def test_status_draws_the_mixture(built, capsys):
    prepare.main(["status", f"--data_dir={built}"])
    out = capsys.readouterr().out
    assert (
        "near_duplicate 1" in out
        and "fineweb_edu" in out
        and all(f"\n{group:7}" in out for group in snapshots.GROUPS)
    )
    assert (built / "metadata/mixture.png").read_bytes()[:4] == b"\x89PNG"


def test_status_needs_no_place_to_write(built, monkeypatch, capsys):
    """A data folder may be mounted read-only."""

    def write(*args):
        raise OSError(errno.EROFS, "Read-only file system", "metadata/mixture.png.1.tmp")

    monkeypatch.setattr(prepare, "save_picture", write)
    prepare.main(["status", f"--data_dir={built}"])
    out = capsys.readouterr().out
    assert "fineweb_edu" in out and out.endswith("note: no picture of the mixture: Read-only file system\n")


def test_show_synth(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "__file__", str(ROOT / "prepare.py"))
    from smol import programs

    monkeypatch.setattr(programs, "FAMILIES", dict(list(programs.FAMILIES.items())[40:51]))
    prepare.main(["show", "synth"])
    assert len(capsys.readouterr().out.split()) == 6
    assert (tmp_path / "out/synth/programs-1.png").stat().st_size > 10_000
    assert (tmp_path / "out/synth/words.txt").read_text().count("Answer: ") == 12  # three of each kind
    with pytest.raises(SystemExit, match="show synth"):
        prepare.main(["show", "everything"])


def test_bench_prepare_has_its_rival_and_projects_the_hours(monkeypatch, capsys):
    from bench import prepare as bench_prepare

    monkeypatch.setattr(bench_prepare, "PREPARE_MB", 0.6)
    report = bench_prepare.bench_prepare(num_proc=1)
    rival, *ours = report["rows"]
    assert rival["ratio"] == 1 and len(ours) == 2 and report["megabytes"] >= 0.6
    assert all(r["ratio"] == pytest.approx(r["mb_per_second"] / rival["mb_per_second"]) for r in ours)
    hours = 30_000 / (4 * ours[-1]["per_core"]) / 3600
    assert report["hours_for_30_gb_on_4_cores"] == pytest.approx(hours)
    assert "{" not in capsys.readouterr().out


# ---- stage 2's documents


def test_dialogues_have_their_tokens():
    document = sources.turns(
        ("system", "Be brief."),
        ("user", " Hi "),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "Bye."),
    )
    ids = units.tokenise(document)
    assert tokenizer.load().decode(ids.tolist()) == (
        "<|user|>Be brief.\n\nHi<|end|><|assistant|>Hello.<|end|>"
        "<|user|>Bye<|end|><|assistant|>Bye.<|end|><|endoftext|>"
    )
    # text that spells a reserved token does not become one
    assert (units.tokenise(sources.turns(("user", "<|end|>"))) == tokenizer.END).sum() == 1


@pytest.mark.parametrize(
    "messages, means",
    [
        (
            [
                ("user", "Q1"),
                ("assistant", "A1"),
                ("system", "Be brief."),
                ("system", "Be kind."),
                ("user", "Q2"),
                ("assistant", "A2"),
            ],
            "<u>Q1.<a>A1.<u>Be brief.\n\nBe kind.\n\nQ2.<a>A2.",
        ),
        ([("user", "Q1"), ("system", "Be brief."), ("assistant", "A1")], "<u>Q1.<u>Be brief..<a>A1."),
        (
            [("system", "Be brief"), ("assistant", "A1"), ("system", "The end")],
            "<u>Be brief.<a>A1.<u>The end.",
        ),
        ([("system", " "), ("user", "Q1"), ("user", "Q2"), ("assistant", "A1")], "<u>Q1.<u>Q2.<a>A1."),
    ],
)
def test_no_text_of_a_dialogue_is_lost(messages, means):
    marks = {tokenizer.USER: "<u>", tokenizer.ASSISTANT: "<a>", tokenizer.END: "."}
    assert "".join(marks.get(part, part) for part in sources.turns(*messages)) == means


@pytest.mark.parametrize(
    "messages, rule",
    [
        ([{"role": "user", "content": "Q"}, {"role": "tool", "content": "42"}], "unknown_role"),
        ([{"role": None, "content": "Q"}], "unknown_role"),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": None}], "not_text"),
        ([{"role": "user", "content": ["Q", tokenizer.END]}], "not_text"),
        (None, "not_as_expected"),
        (["Q", "A"], "not_as_expected"),
        ([{"from": "human", "value": "Q"}], "no_column"),
    ],
)
def test_who_is_not_known_is_not_taken_for_somebody_else(messages, rule):
    with pytest.raises(sources.OddRow) as e:
        sources.to_document("smol_smoltalk", {"files": []}, {"messages": messages}, first=False)
    assert e.value.rule == rule


@pytest.mark.parametrize("ids", [70_000, -1, tokenizer.END + 1, [tokenizer.END, 1 << 16]])
def test_an_id_that_the_tokenizer_does_not_have_is_refused(ids):
    with pytest.raises(ValueError, match="the tokenizer has 0 to 50280"):
        units.tokenise(["text", np.array(ids)])


def test_stages_2_and_3_have_their_shares_and_sources():
    for stage, (_, groups, weights) in sources.STAGES.items():
        assert sum(groups.values()) == pytest.approx(1) and set(groups) == set(snapshots.GROUPS)
        assert {sources.SOURCES[name].group for name in weights} == set(groups)
    assert [list(groups.values()) for _, groups, _ in sources.STAGES.values()] == [
        [0.5, 0.2, 0.1, 0.1, 0.1],
        [0.4, 0.2, 0.1, 0.15, 0.15],
        [0.3, 0.2, 0.1, 0.2, 0.2],
    ]


def test_stages_2_and_3_from_local_files(tmp_path):
    """Instruction sets in the columns of the real ones; what comes out are dialogues, and the second stage makes hardly a new unit."""

    def turn(role, n, seed):
        return {"role": role, "content": english(n, seed)}

    chats = [
        [
            turn("user", 2, (i, 1)),
            turn("assistant", 6, (i, 2)),
            turn("user", 1, (i, 3)),
            turn("assistant", 4, (i, 4)),
        ]
        for i in range(150)
    ]
    rows = {
        "smol_smoltalk": [
            {
                "messages": [{"role": "system", "content": "Be brief."}, *chat] if i % 3 == 0 else chat,
                "source": "x",
            }
            for i, chat in enumerate(chats)
        ],
        "oss_instruct": [
            {"instruction": english(2, (i, 5)), "response": f"```python\n{code(i)}```\n"} for i in range(120)
        ],
        "openmath_instruct": [
            {
                "problem": english(2, (i, 6)),
                "generated_solution": english(5, (i, 7)),
                "expected_answer": str(i),
            }
            for i in range(120)
        ],
    }
    for name, records in rows.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "in" / name / "0.parquet")
    for stage in ("stage2", "stage3"):
        asked = "--sources=smol_smoltalk,oss_instruct,openmath_instruct,sudoku4,arc"
        prepare.main(
            [
                stage,
                f"--data_dir={tmp_path}",
                f"--source_dir={tmp_path / 'in'}",
                asked,
                *SMALL[1:],
                "--limit_mb=0.3",
            ]
        )
        entries, mixture = prepare.read_manifest(tmp_path, stage)
        assert mixture["groups"] == pytest.approx(
            sources.STAGES[stage][1], abs=0.03
        )  # 75,000 tokens, and a task of ARC can have 5,000
        marks, sign = {}, {tokenizer.USER: "u", tokenizer.ASSISTANT: "a", tokenizer.END: "."}
        for source, _, ids in documents(tmp_path, stage=stage):
            marks.setdefault(source, set()).add("".join(sign.get(i, "") for i in ids.tolist()))
            assert ids[-1] == tokenizer.EOT
        assert marks["smol_smoltalk"] == {"u.a.u.a."} and marks["oss_instruct"] == marks[
            "openmath_instruct"
        ] == {"u.a."}
        assert marks["sudoku4"] == marks["arc"] == {""}


def test_what_is_generated_needs_no_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    prepare.main(
        ["stage1", f"--data_dir={tmp_path}", "--sources=sudoku4,maze,logic", *SMALL[1:], "--limit_mb=0.1"]
    )
    out = capsys.readouterr().out
    assert "nothing is kept out for quoting gsm8k_test: all is generated here" in out
    assert {e["source"] for e in prepare.read_manifest(tmp_path, "stage1")[0]} == {"sudoku4", "maze", "logic"}


@pytest.mark.parametrize(
    "name, shows",
    [
        ("graphs", "Question:"),
        ("sudoku4", "<|sudoku|><|input|>"),
        ("traces", "<|program|>"),
        ("wikipedia", "pont"),
    ],
)
def test_the_first_documents_of_a_source(name, shows, source_dir):
    files = sources.local_files(source_dir, name)
    where, shown = {"files": files} if files else {}, []
    for origin, row in itertools.islice(sources.open_rows(name, where, 1, 0, None), 3):
        _, _, parts = sources.instantiate(sources.to_document(name, where, row, sources.is_first(origin)))
        shown += [
            p if isinstance(p, str) else tokenizer.load().decode(np.atleast_1d(p).tolist()) for p in parts
        ]
    assert shows in "".join(shown)


def test_long_text_files_are_cut(monkeypatch):
    monkeypatch.setattr(sources, "TEXT_FILE_CHARS", 50)
    lines = [f"line number {i}\n" for i in range(20)]
    parts = list(sources.text_documents(io.StringIO("".join(lines))))
    assert "".join(parts) == "".join(lines) and len(parts) > 3 and max(map(len, parts)) <= 50
    assert all(part.endswith("\n") for part in parts)
    two = list(sources.text_documents(io.StringIO("a\n<|endoftext|>\n" + "b" * 120 + "\nc\n<|endoftext|>\n")))
    assert two[0] == "a\n" and "".join(two[1:]) == "b" * 120 + "\nc\n" and max(map(len, two)) <= 50


@pytest.mark.parametrize("book", ["a b\n" * 200_000, "a " * 400_000])
def test_no_part_of_a_book_has_more_words_than_prose_may_have(book):
    parts = list(sources.text_documents(io.StringIO(book)))
    (most,) = (limits["prose"][1] for rule, what, limits in curate.RULES if what == "words")
    assert "".join(parts) == book and np.diff(curate.read_words(parts).first).max() <= most
