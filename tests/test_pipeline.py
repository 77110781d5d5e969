"""A stage from local files: its shares, what is kept out, the same bytes however made, one-line mistakes."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_curate import english

import prepare
from smol import arc, curate, pipeline, puzzles, rearc, snapshots, sources, suites, tokenizer, units
from smol.files import lock

ROOT = Path(__file__).parent.parent
EXAM = "A farmer counts 417 crates of plums before noon and sells two thirds of them to the baker at sea"
SMALL = ["--limit_mb=0.6", "--val_every=15", "--num_proc=1"]


def code(i):
    """A module of six functions that nobody wrote before."""
    draw, parts = random.Random(i), ["import os\n"]
    for j in range(6):
        name = f"{draw.choice(('get', 'set', 'find'))}_{draw.choice(('row', 'page'))}_{draw.randrange(999)}"
        comment, number = f"    # {english(1, (i, j))[:50]!r}", draw.randrange(10**6)
        parts.append(f"def {name}(x, y={number}):\n{comment}\n    return x * y")
    return "\n\n\n".join(parts) + "\n"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as f:
        f.write(lines)


def cells(grid, characters):
    return "".join(characters[v] for v in grid.flat)


def write_sources(folder):
    """Every format, and in it what must go: duplicates, quotations, wrong answers."""
    prose = [english(20, i) for i in range(260)]
    near = prose[5].replace(" of ", " off ", 1)
    texts = [*prose[:50], prose[3], "x", english(10, 999) + EXAM.upper() + ".\n", *prose[50:150]]
    (folder / "fineweb_edu").mkdir(parents=True)
    for i in range(2):
        rows = [{"text": text, "id": "x"} for text in texts[i::2]]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"fineweb_edu/{i}.parquet", row_group_size=40)
    french = "Le vieux pont de la ville est ferme depuis que la riviere a monte la nuit derniere. " * 9
    wiki = [french, near, prose[7], *prose[150:200]]
    write_rows(folder / "wikipedia/w.jsonl.gz", [{"title": "t", "text": text} for text in wiki])
    write_rows(folder / "wikipedia/w.txt", wiki)  # is not read
    write_rows(folder / "openwebtext2/o.jsonl", [{"text": text} for text in prose[200:260]])
    outputs = [o for task in arc.load("arc1_eval") for _, o in task.test]
    secret = next(o for o in outputs if min(o.shape) > 8 and len(np.unique(o[:3])) > 4)
    task = "TASK = " + str(np.rot90(secret).tolist()).replace("], ", "],\n") + "\n"
    programs = [*map(code, range(20)), code(4), code(9) + task, *map(code, range(20, 140))]
    write_rows(folder / "codeparrot/c.jsonl.gz", [{"content": text} for text in programs])
    maths = [english(18, 5000 + i).replace("\n", " ") for i in range(60)]
    write_rows(folder / "open_web_math/m.csv", ["url,text", *(f"u,{text}" for text in maths)])
    answers = [f"Now <<{i}+1={i + 1}>> it is.\n#### {i}" for i in range(30)]
    school = [{"question": english(1, (i, 1)), "answer": answer} for i, answer in enumerate(answers)]
    write_rows(folder / "gsm8k/g.jsonl", school)
    questions = [{"question": EXAM + ".", "answer": "#### 278"}, {"question": None, "answer": None}]
    write_rows(folder / "gsm8k_test/g.jsonl", questions)
    draw, head = np.random.default_rng(1), "source,question,answer,rating"
    grids = [puzzles.sudoku(draw, 9, 30).test[0] for _ in range(20)]
    rows = [[cells(question, ".123456789"), cells(answer, ".123456789")] for question, answer in grids]
    rows[3][1] = rows[3][1][:-1] + str(9 - int(rows[3][1][-1]))  # a wrong answer
    lines = [f"x,{question},{answer},7" for question, answer in rows]
    write_rows(folder / "sudoku_extreme/s.csv", [head, *lines])
    turned = [cells(np.rot90(grid), ".123456789") for grid in grids[6]]
    write_rows(folder / "sudoku_extreme_test/t.csv", [head, f"x,{turned[0]},{turned[1]},7"])
    maze = [cells(grid, " #SGo") for grid in puzzles.maze(draw, 30, 30).test[0]]
    write_rows(folder / "maze_hard/m.csv", [head, f"x,{maze[0]},{maze[1]},1"])


def build(data, source_dir, *options, stage="stage1"):
    prepare.main([stage, f"--data_dir={data}", f"--source_dir={source_dir}", *SMALL, *options])


@pytest.fixture(scope="module", autouse=True)
def without_rearc():
    """The same stages whether its generators are installed or not, and seconds sooner: see test_rearc.py."""
    tables = curate.arc_tables(arc.evaluation_tasks())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rearc, "installed", lambda: None)
        patch.setattr(curate, "arc_tables", lambda tasks: tables)  # a second for each data folder
        yield


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


def documents(data, source=None, split=None, stage="stage1"):
    """(source, split, tokens), read with nothing but the layout that data/README.md describes."""
    for line in (data / "stages" / stage / "manifest.jsonl").read_text().splitlines():
        e = json.loads(line)
        if source in (None, e["source"]) and split in (None, e["split"]):
            tokens = np.fromfile(data / e["path"], "<u2")
            ends = np.fromfile((data / e["path"]).with_suffix(".idx"), "<i8")
            for a, b in itertools.pairwise(ends):
                yield e["source"], e["split"], tokens[a:b]


def hashes(data, *folders):
    """{path: SHA-256} of the files that make up stages and shards, or of those in other folders."""
    paths = [p for folder in folders or ("processed", "stages") for p in sorted((data / folder).rglob("*"))]
    files = [p for p in paths if p.is_file() and p.suffix != ".tmp"]
    return {p.relative_to(data).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def dropped(data, source):
    report = json.loads((data / "metadata/stage1/filters.json").read_text())[source]["dropped"]
    return {rule: found["count"] for rule, found in report.items()}


# ---- what is in it


def test_shares_are_as_declared_and_everything_decodes(built, capsys):
    entries, mixture = snapshots.read_manifest(built, "stage1")
    assert mixture["groups"] == sources.STAGES["stage1"][1]
    assert sum(mixture["weights"].values()) == pytest.approx(1)
    for name, share in mixture["weights"].items():
        tokens = sum(e["tokens"] for e in entries if e["source"] == name and e["split"] == "train")
        if name not in ("maze_hard", "gsm8k"):
            assert 0 <= tokens - share * 150_000 < 6_000  # at most one document more
    kinds = {e["source"]: e["kind"] for e in entries}
    assert {e["augment"] for e in entries if e["source"] == "sudoku_extreme"} == {"sudoku"}
    assert {e["augment"] for e in entries if e["split"] == "val"} == {"none"}
    for source, _, ids in documents(built):
        assert ids[-1] == tokenizer.EOT and not (ids[:-1] == tokenizer.EOT).any()
        if kinds[source] == "puzzle":
            assert np.array_equal(arc.encode(*arc.decode(ids)), ids)
        elif source != "traces":
            assert ids.max() <= tokenizer.EOT
    prepare.main(["status", f"--data_dir={built}"])
    out = capsys.readouterr().out
    assert "near_duplicate 1" in out and all(f"\n{group:7}" in out for group in snapshots.GROUPS)


def test_what_must_go_is_gone_and_counted(built):
    rules = "exact_duplicate", "quotes_gsm8k_test", "gopher_few_or_many_words"
    assert dropped(built, "fineweb_edu") == dict.fromkeys(rules, 1)
    wiki = dropped(built, "wikipedia")  # of which two repeat what fineweb_edu has, and one is French
    assert wiki.pop("near_duplicate") == wiki.pop("exact_duplicate") == 1 and sum(wiki.values()) == 1
    python = dropped(built, "codeparrot")
    assert python.pop("exact_duplicate") == 1
    assert python and set(python) <= {"quotes_arc_cells", "quotes_arc_rows"}
    assert dropped(built, "sudoku_extreme") == {"wrong_answer": 1, "is_in_sudoku_extreme_test": 1}
    assert "Le vieux pont" in (built / "metadata/stage1/filters.json").read_text()  # an example
    notes = "\n".join(json.loads((built / "metadata/stage1/provenance.json").read_text())["notes"])
    assert "wikipedia: files that are no data or for evaluation, left out: 1" in notes
    texts = [tokenizer.load().decode(ids.tolist()) for _, _, ids in documents(built, "fineweb_edu")]
    assert len(texts) > 50 and not [text for text in texts if "417" in text and "crates" in text.lower()]


def test_images_of_an_arc_task_are_on_one_side_of_the_split(tmp_path, monkeypatch):
    small = [t for t in arc.load("arc1_train") if t.train[0][0].size < 40]
    few = [arc.Task(t.id, "arc", t.train, t.test[:1]) for t in small]
    source = dataclasses.replace(sources.SOURCES["arc"], document=sources.augmented(lambda: few[:40]))
    monkeypatch.setitem(sources.SOURCES, "arc", source)
    options = ["--sources=arc", "--limit_mb=0.4", "--val_every=4", "--num_proc=1"]
    prepare.main(["stage1", f"--data_dir={tmp_path}", *options])

    def trait(ids):  # what neither symmetry nor colours nor the order of pairs change
        grids = [grid for pair in arc.decode(ids)[1] for grid in pair]
        return tuple(sorted(tuple(sorted(np.unique(g, return_counts=True)[1])) for g in grids))

    sides, n = {"train": set(), "val": set()}, 0
    for _, split, ids in documents(tmp_path, "arc"):
        sides[split].add(trait(ids))
        n += 1
    assert n > 80 and len(sides["val"]) > 3 and not sides["train"] & sides["val"]


def test_tasks_from_elsewhere_are_kept_but_those_of_the_evaluation_sets(tmp_path):
    def official(pairs):
        return [{"input": x.tolist(), "output": y.tolist()} for x, y in pairs]

    task = arc.load("arc1_eval")[7]
    symmetry = arc.random_augment(np.random.default_rng(3), "arc")
    demos = [tuple(arc.augment(symmetry, grid) for grid in pair) for pair in task.train]
    draw = np.random.default_rng(4)
    own = [[(x, x[::-1]) for x in draw.integers(0, 10, (4, 5, 6))] for _ in range(40)]
    for i, pairs in enumerate(own):
        write_rows(tmp_path / f"arc_gen/{i:08x}.json", [json.dumps(official(pairs))])
    write_rows(tmp_path / f"arc_gen/{task.id}.json", [json.dumps(official(own[0]))])  # its id
    write_rows(tmp_path / "arc_gen/99.json", [json.dumps(official([*own[1], demos[0]]))])  # a demonstration
    answer = (own[2][0][0], np.rot90(task.test[0][1]))  # a test output
    write_rows(tmp_path / "arc_gen/98.json", [json.dumps(official([*own[2], answer]))])
    write_rows(tmp_path / "arc_gen/97.json", ['{"train": 3}'])
    data = tmp_path / "data"
    build(data, tmp_path, "--sources=arc_gen,arc_json")
    kept = list(documents(data, "arc_gen"))
    assert len(kept) == 40 and {split for _, split, _ in kept} == {"train", "val"}
    counts = dropped(data, "arc_gen")
    assert counts == {"evaluation_task": 2, "evaluation_output": 1, "not_a_row": 1}
    provenance = json.loads((data / "metadata/stage1/provenance.json").read_text())
    assert provenance["sources"]["arc_gen"]["licence"] == "Apache-2.0"
    assert any("arc_json: no folder" in note for note in provenance["notes"])


def test_the_validation_split_is_stable_when_a_source_grows(built, source_dir, tmp_path):
    shutil.copytree(source_dir, tmp_path / "in")
    write_rows(tmp_path / "in/fineweb_edu/9.jsonl", [{"text": english(20, 7000 + i)} for i in range(60)])
    build(tmp_path / "data", tmp_path / "in", "--limit_mb=0.8", "--sources=fineweb_edu,codeparrot")
    for name in ("fineweb_edu", "codeparrot"):
        old = {ids.tobytes(): split for _, split, ids in documents(built, name)}
        new = {ids.tobytes(): split for _, split, ids in documents(tmp_path / "data", name)}
        both = old.keys() & new.keys()
        assert both and "val" in old.values() and all(old[ids] == new[ids] for ids in both)


# ---- the same bytes, however it was made


PART = "--sources=fineweb_edu,wikipedia,codeparrot,arithmetic,maze_hard"


@pytest.fixture(scope="module")
def part(source_dir, tmp_path_factory):
    """Some of the sources, built by one process."""
    data = tmp_path_factory.mktemp("part")
    build(data, source_dir, PART)
    return data


def test_processes_and_kills_change_no_byte(part, source_dir, tmp_path):
    options = ["stage1", f"--data_dir={tmp_path}", f"--source_dir={source_dir}", *SMALL, PART, "--num_proc=2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command, env = [sys.executable, str(ROOT / "prepare.py"), *options], {**os.environ, "PYTHONHASHSEED": "2"}
    process = subprocess.Popen(command, env=env, **quiet)
    while len(list(tmp_path.glob("work/*/*/*.npz"))) < 20 and process.poll() is None:  # amid the lanes
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the build was over before it could be killed"
    assert not (tmp_path / "stages").exists()
    build(tmp_path, source_dir, PART)
    everything = "processed", "stages", "metadata"  # what was dropped too: rows that were read twice are
    assert hashes(tmp_path, *everything) == hashes(part, *everything)


def test_ray_gives_the_same_bytes(part, source_dir, tmp_path):
    pytest.importorskip("ray", reason="an optional extra")
    build(tmp_path, source_dir, PART, "--engine=ray", "--num_proc=2")
    assert hashes(tmp_path) == hashes(part)


def test_damaged_units_and_evaluations_are_made_again(part, source_dir, tmp_path):
    data = shutil.copytree(part, tmp_path / "data")
    largest = sorted(data.glob("work/fineweb_edu/*/*.npz"), key=lambda path: path.stat().st_size)[-4:]
    paths = [*largest, *data.glob("work/evaluations-*.npz")]
    before = [path.read_bytes() for path in paths]
    for i, (path, content) in enumerate(zip(paths, before)):  # one is cut off, the others have another byte
        at = len(content) * (i + 1) // (len(paths) + 1)
        if i == len(paths) - 1:  # for zipfile it has a password
            at = content.index(b"PK\1\2") + 8
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] if i else content[:at])
    units.read_evaluations.cache_clear()
    build(data, source_dir, PART, "--force=True")
    assert [path.read_bytes() for path in paths] == before and hashes(data) == hashes(part)


def test_what_changed_is_made_anew_and_nothing_else(part, source_dir, tmp_path, monkeypatch, capsys):
    def made():
        return {p for p in data.glob("work/*/*") if p.is_dir()}

    data = shutil.copytree(part, tmp_path / "data")
    before, units_before = hashes(data), made()
    build(data, source_dir, PART)
    assert "already there" in capsys.readouterr().out and hashes(data) == before
    megabytes, groups, weights = sources.STAGES["stage1"]
    groups = {**groups, "code": 0.18, "math": 0.12}
    monkeypatch.setitem(sources.STAGES, "stage1", (megabytes, groups, weights))
    build(data, source_dir, PART)
    assert "building" in capsys.readouterr().out and made() == units_before
    _, mixture = snapshots.read_manifest(data, "stage1")
    assert mixture["groups"]["code"] == pytest.approx(0.18 / 0.9)
    monkeypatch.setattr(pipeline, "code", lambda: "an edited rule")
    build(data, source_dir, PART)
    assert "building" in capsys.readouterr().out and len(made()) == 2 * len(units_before)


def test_another_seed_generates_other_puzzles(tmp_path):
    for seed in (1, 2):
        build(tmp_path / str(seed), tmp_path, "--sources=arithmetic", f"--seed={seed}")
    one, two = ({path.name for path in tmp_path.glob(f"{n}/processed/*/*.bin")} for n in (1, 2))
    assert one and not one & two


def test_demonstrations_of_evaluation_tasks_are_there_if_asked_for(tmp_path, capsys):
    words = ["stage1", "--sources=arc", "--dry_run=True", f"--data_dir={tmp_path}"]
    for more in [], ["--eval_demos=True"]:
        prepare.main([*words, *more])
        assert ("arc_eval_demos" in capsys.readouterr().out) == bool(more)


# ---- frozen stages, cleaning


def test_clean_deletes_what_no_stage_lists_and_a_frozen_stage_stays(part, source_dir, tmp_path):
    """Neither what a stage or a tag lists, nor what is being pulled."""
    copy = shutil.copytree(part, tmp_path / "data")
    prepare.main(["freeze", "stage1", "--tag=v1", f"--data_dir={copy}"])
    frozen = snapshots.read_manifest(copy, "stage1", "v1")
    build(copy, source_dir, "--sources=arithmetic,open_web_math")
    assert snapshots.read_manifest(copy, "stage1")[0] != frozen[0]
    assert snapshots.read_manifest(copy, "stage1", "v1") == frozen
    with pytest.raises(SystemExit, match="taken by another state"):
        prepare.main(["freeze", "stage1", "--tag=v1", f"--data_dir={copy}"])
    for _ in range(2):  # the same state again: nothing to do
        prepare.main(["freeze", "stage1", "--tag=v2", f"--data_dir={copy}"])
    write_rows(copy / "work/pull/ada--x--v1/manifest.jsonl", ['{"path": "processed/x/train-1.bin"}'])
    for name in ("train-0.bin", "train-0.idx", "train-1.bin"):
        write_rows(copy / "processed/x" / name, [name])
    before = hashes(copy, "processed", "work", "stages")
    prepare.main(["clean", "--dry_run=True", f"--data_dir={copy}"])
    assert hashes(copy, "processed", "work", "stages") == before
    with lock(copy, "prepare.py"), pytest.raises(SystemExit, match="another prepare.py is at work"):
        prepare.main(["clean", f"--data_dir={copy}"])
    prepare.main(["clean", f"--data_dir={copy}"])
    gone = before.keys() - hashes(copy, "processed", "work", "stages").keys()
    assert gone == {"processed/x/train-0.bin", "processed/x/train-0.idx"}
    for name in ("stage1", "stage1:v1"):
        prepare.main(["verify", name, f"--data_dir={copy}"])


# ---- mistakes and damage


def prose_rows(n):
    return [{"text": english(20, 9000 + i)} for i in range(n)]


def only_prose(tmp_path, rows, *options):
    write_rows(tmp_path / "in/fineweb_edu/a.jsonl", rows)
    options = ("--sources=fineweb_edu", "--val_every=3", "--limit_mb=0.1", *options)
    build(tmp_path / "data", tmp_path / "in", *options)


def test_odd_rows_are_dropped_and_counted_and_too_many_stop_the_build(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(units, "MAX_CHARS", 20_000)
    tokenise, too_much = units.tokenise, {"text": prose_rows(21)[20]["text"] + "Too much of it."}

    def tokenise_or_give_up(pieces):  # as tiktoken does after a million blanks
        if "Too much of it." in pieces[0]:
            raise ValueError("Max stack size exceeded for backtracking")
        return tokenise(pieces)

    monkeypatch.setattr(units, "tokenise", tokenise_or_give_up)
    odd = [{"text": None}, {"text": None}]
    write_rows(tmp_path / "in/gsm8k_test/a.jsonl", 9 * [{"question": None}])
    only_prose(tmp_path, [*prose_rows(9), *odd, {"text": "word " * 4001}, too_much, *prose_rows(20)[9:]])
    assert "rows of gsm8k_test that are no documents are not kept out: no_column 9" in capsys.readouterr().out
    report = dropped(tmp_path / "data", "fineweb_edu")
    assert report == {"not_text": 2, "too_long": 1, "not_tokenised": 1}
    assert "[a.jsonl:10] a row of" in (tmp_path / "data/metadata/stage1/filters.json").read_text()
    texts = {tokenizer.load().decode(ids[:-1].tolist()) for _, _, ids in documents(tmp_path / "data")}
    assert texts == {curate.normalise(row["text"]) for row in prose_rows(20)}
    before = hashes(tmp_path / "data")
    says = r"^error: 10 of the first 40 rows .* may be: not_text 10, as \[a.jsonl:21\]"
    with pytest.raises(SystemExit, match=says):
        only_prose(tmp_path, [*prose_rows(20), *5 * odd, *prose_rows(30)[20:]])
    write_rows(tmp_path / "in/gsm8k_test/a.jsonl", 10 * [{"question": None}])
    with pytest.raises(SystemExit, match="^error: 10 of the first 10 rows of gsm8k_test .*: no_column 10"):
        only_prose(tmp_path, prose_rows(20))
    assert hashes(tmp_path / "data") == before


def test_a_source_that_is_short_is_named_and_one_far_short_stops_the_build(tmp_path, capsys):
    only_prose(tmp_path, prose_rows(20), "--force=True")
    assert "note: fineweb_edu has" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: fineweb_edu has .* of 2,500,000 .* lower --limit_mb"):
        only_prose(tmp_path, prose_rows(20), "--limit_mb=10")
    with pytest.raises(SystemExit, match="has 0 of .* 0 documents, dropped: gopher_few_or_many_words 2"):
        only_prose(tmp_path, [{"text": "x"}, {"text": "y"}])
    for name in ("fineweb_edu", "open_web_math"):
        write_rows(tmp_path / f"copies/{name}/a.jsonl", prose_rows(9))
    both = "--sources=fineweb_edu,open_web_math", "--limit_mb=0.01"
    with pytest.raises(SystemExit, match="open_web_math has 0 of .*duplicate 9"):
        build(tmp_path / "data", tmp_path / "copies", *both)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name, content, says in (
        ("9.txt", "a", "fineweb_edu has no file of .parquet"),
        ("9.jsonl", '{"body": "a"}\n', "dropped: no_column 1"),
        ("9.json", '[{"text": "a"}, {"te', "cannot read 9.json after row "),
        ("9.parquet", "PAR1 no", "cannot read 9.parquet"),
        ("9.jsonl.gz", "no gzip", "cannot read 9.jsonl.gz"),
    ):
        write_rows(tmp_path / name / "fineweb_edu/README.md", [])
        (tmp_path / name / "fineweb_edu" / name).write_text(content)
        with pytest.raises(SystemExit, match=says) as e:
            build(tmp_path / "data", tmp_path / name, "--sources=fineweb_edu")
        assert "\n" not in str(e.value.code) and not list(tmp_path.glob("data/stages/*/manifest.jsonl"))


@pytest.mark.parametrize(
    "words, says",
    [
        (["stage1", "--sources=finewebedu"], "'finewebedu' is not a source of stage1"),
        (["stage1", "--source_dir=/nonexistent"], "is not a folder"),
        (["sudoku_extreme", "--eval_demos=True"], "sudoku_extreme has no ARC tasks"),
        (["stage1", "--source_dir={empty}"], "no source of web, code is left"),
        (["verfy", "demo"], "unknown command 'verfy': the closest is 'verify'"),
        (["verify"], "verify needs one argument"),
        (["verify", "demo"], "stage 'demo' is not prepared .* run: python prepare.py demo"),
        (["verify", "stge1"], "unknown stage 'stge1': the closest is 'stage1'; there are arc, "),
        (["verify", "../demo"], "not the name of a stage"),
        (["freeze", "demo"], "name a tag"),
        (["freeze", "demo", "--repo=ada/x"], "freeze has no --repo"),
        (["demo", "--source_dir={empty}"], "demo has no --source_dir"),
        (["show", "graph"], "unknown source 'graph': the closest is 'graphs'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, says):
    (tmp_path / "empty").mkdir()
    words = [word.format(empty=tmp_path / "empty") for word in words]
    with pytest.raises(SystemExit, match=says) as e:
        prepare.main([*words, f"--data_dir={tmp_path / 'data'}"])
    assert str(e.value.code).startswith("error: ") and "\n" not in str(e.value.code)


def test_a_full_disk_is_one_line_and_leaves_no_stage(source_dir, tmp_path, monkeypatch):
    def full(data, path, write_whole=snapshots.write_whole):
        if str(path).endswith(".idx"):
            raise OSError(28, "No space left on device")
        write_whole(data, path)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: .*No space left"):
        patch.setattr(snapshots, "write_whole", full)
        build(tmp_path, source_dir, "--sources=arithmetic")
    assert not list(tmp_path.glob("stages/*"))
    build(tmp_path, source_dir, "--sources=arithmetic")
    prepare.main(["verify", "stage1", f"--data_dir={tmp_path}"])


def test_a_dry_run_does_nothing(source_dir, tmp_path, capsys):
    build(tmp_path / "data", source_dir, "--dry_run=True", "--limit_mb=100")
    out = capsys.readouterr().out
    assert "7,500,000   2 files" in out and not (tmp_path / "data").exists()


# ---- tokens


@pytest.mark.parametrize("one, why", [("held_out", "held_out"), ("new", "duplicate")])
def test_a_generator_without_end_of_which_too_little_is_kept_stops_the_build(tmp_path, monkeypatch, one, why):
    held_out = suites.load("sudoku4")[0]
    task = held_out if one == "held_out" else puzzles.sudoku(np.random.default_rng(0), 4, 6)
    source = dataclasses.replace(sources.SOURCES["sudoku4"], document=lambda *row: task)
    monkeypatch.setitem(sources.SOURCES, "sudoku4", source)
    with pytest.raises(SystemExit, match=f"^error: sudoku4 has .* dropped: {why} .* lower --limit_mb"):
        build(tmp_path, tmp_path, "--sources=sudoku4", "--limit_mb=0.1")


def test_text_that_spells_a_reserved_token_is_text():
    ids = units.tokenise(sources.turns(("user", "<|end|>")))
    assert (ids == tokenizer.END).sum() == 1 and ids[0] == tokenizer.USER and ids[-1] == tokenizer.EOT


def test_a_question_that_is_evaluated_on_is_not_kept():
    ((question, answer),) = suites.load("logic")[0].test
    texts = [f"{question}\nSolution: so.\nAnswer: {answer}", f"{question} Really?\nSolution: so."]
    documents, dropped = [("", None, [], [text]) for text in texts], units.Dropped()
    kept, _, _ = units.judge_texts(sources.SOURCES["logic"], documents, dropped, ({}, {}))
    assert len(kept) == 1 and dropped.rules["held_out"]["count"] == 1


def test_bench_prepare_has_its_rival_and_projects_the_hours(capsys):
    from bench import prepare as bench_prepare

    bench_prepare.main(["--megabytes=0.6", "--num_proc=1"])
    out = capsys.readouterr().out
    assert "nanoGPT's way" in out and "hours" in out
