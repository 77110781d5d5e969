"""prepare.py: the demo stage is reproducible, survives being killed, notices damage, and holds nothing it must not hold."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
from smol import arc, demo, puzzles, tokenizer

ROOT = Path(__file__).parent.parent
SMALL = [
    "--limit_mb=0.05",
    "--n_arithmetic=80",
    "--n_sudoku4=300",
    "--n_sudoku9=4",
    "--n_maze=60",
    "--n_transforms=40",
    "--val_every=9",
]


def build(data, *options):
    prepare.main(["demo", f"--data_dir={data}", *SMALL, *options])


def files(data):
    return {str(p.relative_to(data)): p for p in sorted(data.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    data = tmp_path_factory.mktemp("built")
    build(data)
    return data


@pytest.fixture
def copy(built, tmp_path):
    """The built stage, to be damaged."""
    shutil.copytree(built, tmp_path / "data")
    return tmp_path / "data"


def documents(data, split, source=None):
    """(source, tokens) of every document, read with nothing but the layout that data/README.md describes."""
    for line in (data / "stages/demo/manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["split"] == split and source in (None, entry["source"]):
            tokens = np.fromfile(data / entry["path"], "<u2")
            ends = np.fromfile((data / entry["path"]).with_suffix(".idx"), "<i8")
            for a, b in itertools.pairwise(ends):
                yield entry["source"], tokens[a:b]


# ---- what is in it


def test_every_source_trains_and_the_documents_decode(built):
    entries, mixture = prepare.read_manifest(built, "demo")
    assert {e["source"] for e in entries if e["split"] == "train"} == set(demo.SOURCES)
    assert {e["group"] for e in entries} == set(mixture["groups"]) and abs(
        sum(mixture["groups"].values()) - 1
    ) < 1e-6
    encoder, kinds = tokenizer.load(), {e["source"]: e["kind"] for e in entries}
    for split in ("train", "val"):
        for source, tokens in documents(built, split):
            assert tokens[-1] == tokenizer.EOT and not (tokens[:-1] == tokenizer.EOT).any()
            if kinds[source] == "puzzle":
                kind, pairs = arc.decode(tokens)
                assert np.array_equal(arc.encode(kind, pairs), tokens)
            else:
                assert tokens.max() <= tokenizer.EOT  # no reserved id in text
                assert encoder.decode(tokens[:-1].tolist()).endswith("\n")
    # the text is the text that was gathered
    raw = [json.loads(line)["text"] for line in (built / "raw/demo/langref.jsonl").read_text().splitlines()]
    kept = {
        encoder.decode(t[:-1].tolist())
        for split in ("train", "val")
        for _, t in documents(built, split, "langref")
    }
    assert kept and kept <= set(raw)


def test_training_and_validation_share_no_document(built):
    train = {tokens.tobytes() for _, tokens in documents(built, "train")}
    assert not [source for source, tokens in documents(built, "val") if tokens.tobytes() in train]
    assert len(train) == sum(1 for _ in documents(built, "train")), "a document occurs twice"


def test_augmentation_is_for_training_only(built):
    entries, _ = prepare.read_manifest(built, "demo")
    train = {e["source"]: e["augment"] for e in entries if e["split"] == "train"}
    assert (
        train["sudoku4"] == "none"
        and train["maze"] == "dihedral"
        and train["arc"] == train["transforms"] == "arc"
    )
    assert {e["augment"] for e in entries if e["split"] == "val"} == {"none"}


def same_up_to_symmetry_and_colour(a, b):
    """Is there a symmetry of the square and a renaming of colours that makes a into b? By pairing up colours, not by canonical forms."""
    for k in range(4):
        for turned in (np.rot90(a, k), np.fliplr(np.rot90(a, k))):
            if turned.shape == b.shape:
                renamings = len(np.unique(turned.astype(int) * 10 + b))
                if renamings == len(np.unique(a)) == len(np.unique(b)):
                    return True
    return False


def evaluation_outputs():
    """The evaluation outputs by what neither symmetry nor colour changes, so that few need to be compared."""
    outputs = {}
    for name in ("arc1_eval", "arc2_eval"):
        for task in arc.load(name):
            for _, output in task.test:
                outputs.setdefault(fingerprint(output), []).append(output)
    return outputs


def fingerprint(grid):
    return tuple(sorted(grid.shape)), tuple(sorted(np.unique(grid, return_counts=True)[1].tolist()))


def is_evaluation_output(grid, outputs):
    """Grids of at most 9 cells or of one colour equal one by chance."""
    if grid.size <= 9 or len(np.unique(grid)) == 1:
        return False
    return any(same_up_to_symmetry_and_colour(grid, output) for output in outputs.get(fingerprint(grid), []))


def test_no_evaluation_output_is_in_any_shard_under_any_symmetry(built):
    outputs = evaluation_outputs()
    assert (
        sum(map(len, outputs.values())) == 419 + 167
    )  # test pairs of ARC-AGI-1 evaluation and of ARC-AGI-2 public evaluation

    # the check itself finds what it is to find: an output in disguise, and training tasks that are dropped for it
    rng = np.random.default_rng(0)
    for output in [group[0] for group in outputs.values()][::10]:
        disguised = rng.permutation(10)[np.rot90(output.T, int(rng.integers(4)))]
        trivial = output.size <= 9 or len(np.unique(output)) == 1
        assert is_evaluation_output(disguised.astype(np.uint8), outputs) != trivial
    tainted = {
        t.id
        for t in arc.load("arc1_train")
        if any(is_evaluation_output(g, outputs) for pair in t.train + t.test for g in pair)
    }
    assert tainted

    seen = 0
    for split in ("train", "val"):
        for source, tokens in documents(built, split):
            if tokens[0] >= tokenizer.N_GPT2:
                for grid in (g for pair in arc.decode(tokens)[1] for g in pair):
                    seen += 1
                    assert not is_evaluation_output(grid, outputs), (source, grid)
    assert seen > 3000


def test_no_evaluation_task_is_trained_on(built):
    def inputs(name):
        return {
            pair[0].tobytes() + bytes(pair[0].shape)
            for task in arc.load(name)
            for pair in task.test
            if pair[0].size > 30
        }

    questions = inputs("arc1_eval") | inputs("arc2_eval")
    trained = [arc.decode(tokens)[1][-1][0] for _, tokens in documents(built, "train", "arc")]
    assert not [g for g in trained if g.tobytes() + bytes(g.shape) in questions]
    assert questions & inputs("arc2_train"), (
        "the check would find the ARC-AGI-1 evaluation tasks in ARC-AGI-2's training set"
    )


def test_no_held_out_puzzle_is_trained_on(built):
    held_grids = {puzzles.all_sudoku4()[i].tobytes() for i in puzzles.SUDOKU4_HELD_OUT}
    answers = [arc.decode(tokens)[1][0][1] for _, tokens in documents(built, "train", "sudoku4")]
    assert len(answers) > 50 and not [a for a in answers if a.tobytes() in held_grids]
    for suite in puzzles.SUITES:
        held = {arc.encode(t.kind, t.train + t.test).tobytes() for t in puzzles.heldout(suite)}
        assert not [1 for _, tokens in documents(built, "train", suite) if tokens.tobytes() in held]
        assert {tokens.tobytes() for _, tokens in documents(built, "val", suite)} <= held


def test_metadata_counts_what_was_dropped(built):
    filters = json.loads((built / "metadata/demo/filters.json").read_text())
    shared = {t.id for t in arc.load("arc2_train")} & {t.id for t in arc.load("arc1_eval")}
    assert filters["arc"]["dropped"]["evaluation_task"]["count"] == len(shared) == 376
    assert set(filters["arc"]["dropped"]["evaluation_task"]["examples"]) <= shared
    provenance = json.loads((built / "metadata/demo/provenance.json").read_text())
    assert provenance["inputs"]["versions"]["python"] == sys.version.split()[0]
    assert provenance["sources"]["arc"]["licence"] == "Apache-2.0"


def test_arc_tasks_are_laid_out_officially(built):
    for name in arc.SETS:
        written = json.loads((built / f"arc/{name}.json").read_text())
        tasks = arc.load(name)
        assert sorted(written) == [t.id for t in tasks]
        assert written[tasks[0].id]["test"][0]["output"] == tasks[0].test[0][1].tolist()


# ---- building again


def test_a_killed_build_leaves_no_stage_and_is_completed_to_the_same_bytes(built, tmp_path):
    for moment in ("raw/demo/stdlib.jsonl", "processed/maze"):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "prepare.py"), "demo", f"--data_dir={tmp_path}", *SMALL],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": "7"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (tmp_path / moment).exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the build was over before it could be killed"
        with pytest.raises(FileNotFoundError, match="is not prepared"):
            prepare.read_manifest(tmp_path, "demo")
    (tmp_path / "processed/maze/train-000000000000.bin.tmp").write_bytes(
        b"half a sha"
    )  # as a kill in the middle of a write leaves it
    build(tmp_path)
    prepare.read_manifest(tmp_path, "demo")
    ours, theirs = files(tmp_path), files(built)
    assert [f for f in ours if not f.endswith(".tmp")] == list(theirs)
    for name in theirs:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name


def test_building_again_does_nothing(built, capsys):
    before = {name: p.stat().st_mtime_ns for name, p in files(built).items()}
    build(built)
    assert "already there" in capsys.readouterr().out
    assert {name: p.stat().st_mtime_ns for name, p in files(built).items()} == before


def test_another_seed_builds_anew_and_force_repairs(copy, capsys):
    old = files(copy)
    manifest = (copy / "stages/demo/manifest.jsonl").read_bytes()
    build(copy, "--seed=2")
    assert "seed changed" in capsys.readouterr().out
    entries, mixture = prepare.read_manifest(copy, "demo")
    assert mixture["seed"] == 2 and (copy / "stages/demo/manifest.jsonl").read_bytes() != manifest
    listed = {e["path"] for e in entries}
    assert {
        name for name in files(copy) if name.endswith(".bin")
    } == listed  # what no stage lists any more is gone
    assert [name for name in old if name.endswith(".bin") and name not in listed]

    damaged = copy / min(listed)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-2] + b"\0\0")
    build(copy, "--seed=2", "--force")
    assert "--force" in capsys.readouterr().out and damaged.read_bytes() == whole


def test_a_second_build_at_the_same_time_is_refused(built):
    with prepare.only_one(built), pytest.raises(SystemExit, match="another prepare.py is at work"):
        build(built)


# ---- damage


def rewrite_manifest(data, change):
    """Edit the entries of the manifest, and make the mixture agree, as someone would who wants it to be believed."""
    path = data / "stages/demo/manifest.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change(entries)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    mixture = json.loads((data / "stages/demo/mixture.json").read_text())
    mixture["manifest_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (data / "stages/demo/mixture.json").write_text(json.dumps(mixture))


def shard(data):
    return next(iter(sorted((data / "processed/maze").glob("train-*.bin"))))


def truncate(data):
    os.truncate(shard(data), 100)


def edit(data):
    tokens = np.fromfile(shard(data), "<u2")
    tokens[5] ^= 1
    tokens.tofile(shard(data))


def lose(data):
    shard(data).unlink()


def edit_idx(data):
    path = shard(data).with_suffix(".idx")
    offsets = np.fromfile(path, "<i8")
    offsets[1] += 1
    offsets.tofile(path)


def lose_idx(data):
    shard(data).with_suffix(".idx").unlink()


def unsorted_idx(data):
    edit_idx(data)
    path = shard(data).with_suffix(".idx")
    offsets = np.fromfile(path, "<i8")
    offsets[2] = offsets[1]
    offsets.tofile(path)

    def change(entries):
        for e in entries:
            if e["path"].endswith(shard(data).name):
                e["idx_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    rewrite_manifest(data, change)


def swap_split(data):
    path = data / "stages/demo/manifest.jsonl"
    path.write_text(path.read_text().replace('"split": "val"', '"split": "train"', 1))


def escape(data):
    (data.parent / "outside").mkdir()
    shutil.copy(shard(data), data.parent / "outside/x.bin")
    shutil.copy(shard(data).with_suffix(".idx"), data.parent / "outside/x.idx")

    def change(entries):
        entries[0]["path"] = "processed/../../outside/x.bin"

    rewrite_manifest(data, change)


def escape_absolute(data):
    rewrite_manifest(data, lambda entries: entries[0].update(path=str(shard(data))))


def other_tokenizer(data):
    rewrite_manifest(data, lambda entries: entries[0].update(tokenizer="0" * 64))


def beyond_the_vocabulary(data):
    path = shard(data)
    tokens = np.fromfile(path, "<u2")
    tokens[5] = tokenizer.END + 1
    tokens.tofile(path)

    def change(entries):
        for e in entries:
            if e["path"].endswith(path.name):
                e["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    rewrite_manifest(data, change)


def not_json(data):
    (data / "stages/demo/manifest.jsonl").write_text("hello\n")


def lose_mixture(data):
    (data / "stages/demo/mixture.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named", "problem"),
    [
        (truncate, "maze/train-", "has 100 bytes where the manifest says"),
        (edit, "maze/train-", "SHA-256"),
        (lose, "maze/train-", "is missing"),
        (edit_idx, ".idx", "SHA-256"),
        (lose_idx, ".idx", "is missing"),
        (unsorted_idx, ".idx", "does not rise"),
        (beyond_the_vocabulary, "maze/train-", "has token ids beyond 50280"),
        (swap_split, "manifest.jsonl", "was changed after it was written"),
        (escape, "manifest.jsonl", "outside/x.bin"),
        (escape_absolute, "manifest.jsonl", "not processed/SOURCE/NAME.bin"),
        (other_tokenizer, "manifest.jsonl", "another tokenizer"),
        (not_json, "manifest.jsonl", "not a JSON object"),
        (lose_mixture, "mixture.json", "is missing or damaged"),
    ],
)
def test_damage_is_named_and_says_what_to_do(built, tmp_path, damage, named, problem):
    data = tmp_path / "data"
    for folder in ("stages", "processed"):
        shutil.copytree(built / folder, data / folder)
    prepare.read_manifest(data, "demo")
    damage(data)
    with pytest.raises(SystemExit) as e:
        prepare.main(["verify", "demo", f"--data_dir={data}"])
    message = str(e.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert named in message and problem in message and "prepare.py demo --force=True" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "demo"], "stage 'demo' is not prepared in .*; run: python prepare.py demo"),
        (["verify", "stage7"], "there is no stage 'stage7'"),
        (["verify", "../demo"], "not the name of a stage"),
        (["verify"], "say which stage"),
        (["verfy", "demo"], "unknown command 'verfy': the closest is 'verify'"),
        ([], "say what to do"),
        (["demo", "--n_mazes=5"], "the closest is 'n_maze'"),
        (["demo", "--weights={'sudoku': 1}"], "unknown source 'sudoku'.*'sudoku"),
        (["demo", "--n_maze=0"], "--n_maze must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message) as e:
        prepare.main([*words, f"--data_dir={tmp_path / 'data'}"])
    assert str(e.value.code).startswith("error: ") and "\n" not in str(e.value.code)
    assert not (tmp_path / "data").exists() or not files(tmp_path / "data")


def test_status_shows_every_source(built, tmp_path, capsys):
    prepare.main(["status", f"--data_dir={built}"])
    out = capsys.readouterr().out
    assert all(source in out for source in demo.SOURCES) and "evaluation_task 376" in out
    prepare.main(["status", f"--data_dir={tmp_path}"])
    assert "prepare.py demo" in capsys.readouterr().out
