"""prepare.py: the demo stage holds nothing that it must not hold; damage to any stage is named."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import test_pipeline
from test_hub import small_stage

import prepare
from smol import arc, snapshots, sources, suites, tokenizer


def documents(data, split, source=None):
    return [(name, tokens) for name, _, tokens in test_pipeline.documents(data, source, split, "demo")]


def test_the_demo_has_its_sources_and_splits(data):
    entries, mixture = snapshots.read_manifest(data, "demo")
    _, groups, weights = sources.STAGES["demo"]
    assert mixture["groups"] == groups and list(mixture["weights"]) == list(weights)
    assert {e["source"] for e in entries if e["split"] == "train"} == set(weights)
    assert {e["augment"] for e in entries if e["source"] == "maze"} == {"dihedral", "none"}
    train = [tokens.tobytes() for _, tokens in documents(data, "train")]
    val = {tokens.tobytes() for _, tokens in documents(data, "val")}
    assert len(set(train)) == len(train) and not val & set(train)


def test_a_module_and_its_docstrings_are_on_the_same_side(data):
    decode = tokenizer.load().decode
    sides = {}
    for split in ("train", "val"):
        for _, ids in documents(data, split, "docstrings"):
            sides[decode(ids.tolist()).split("\n")[0].removeprefix("# ")] = split
    names = {sources.module({"name": name})[:300].rstrip(): name for name in sides}
    both = 0
    for split in ("train", "val"):
        for _, ids in documents(data, split, "stdlib"):
            head = decode(ids.tolist())[:250]
            for text in [text for text in names if text.startswith(head)]:
                assert sides[names[text]] == split
                both += 1
    assert both


def likeness(grid):
    """What neither symmetry nor colour changes."""
    return tuple(sorted(grid.shape)), tuple(sorted(np.unique(grid, return_counts=True)[1].tolist()))


def alike(a, b):
    """Does a symmetry of the square and a renaming of colours make a into b? By pairing up colours."""
    for image in (np.rot90(side, k) for side in (a, a.T) for k in range(4)):
        if image.shape == b.shape:
            renamings = len(np.unique(image.astype(int) * 10 + b))
            if renamings == len(np.unique(a)) == len(np.unique(b)):
                return True
    return False


def test_no_evaluation_output_is_in_any_shard_under_any_symmetry(data):
    outputs = {}
    for task in (*arc.load("arc1_eval"), *arc.load("arc2_eval")):
        for _, output in task.test:
            if output.size > 9 and len(np.unique(output)) > 1:  # others equal a grid by chance
                outputs.setdefault(likeness(output), []).append(output)

    def is_one(grid):
        return any(alike(grid, output) for output in outputs.get(likeness(grid), ()))

    rng = np.random.default_rng(0)
    for output, *_ in list(outputs.values())[::20]:  # the check itself finds an output in disguise
        assert is_one(rng.permutation(10)[np.rot90(output.T, int(rng.integers(4)))].astype(np.uint8))
    seen = 0
    for split in ("train", "val"):
        for source, tokens in documents(data, split):
            if sources.SOURCES[source].kind == "puzzle":
                for grid in itertools.chain.from_iterable(arc.decode(tokens)[1]):
                    seen += 1
                    assert not is_one(grid), (source, grid)
    assert seen > 2000


def test_nothing_that_is_evaluated_on_is_trained_on(data):
    answers = {arc.decode(tokens)[1][0][1].tobytes() for _, tokens in documents(data, "train", "sudoku4")}
    assert len(answers) > 50 and not answers & {t.test[0][1].tobytes() for t in suites.load("sudoku4")}
    for source in ("sudoku4", "maze", "turned", "transforms"):
        held = {arc.task_hash(task) for task in suites.load("turn" if source == "turned" else source)}
        found = {"train": set(), "val": set()}
        for split, hashes in found.items():
            for kind, pairs in (arc.decode(tokens) for _, tokens in documents(data, split, source)):
                hashes.add(arc.task_hash(arc.Task("", kind, pairs[:-1], pairs[-1:])))
        assert found["val"] and found["val"] <= held and found["train"] and not found["train"] & held


def test_arc_tasks_are_laid_out_officially(data):
    for name, n in zip(arc.SETS, (400, 400, 1000, 120)):
        tasks = arc.read_tasks(str(data / f"arc/{name}.json"))
        assert len(tasks) == n and all(y is not None for task in tasks for _, y in task.test)


@pytest.mark.parametrize("name, shows", [("maze", "[8] maze5x5"), ("traces", "def solve")])
def test_show_prints_the_first_documents_of_a_source(tmp_path, capsys, name, shows):
    prepare.main(["show", name, f"--data_dir={tmp_path}"])
    out = capsys.readouterr().out
    assert shows in out and out.count("\n[") == 8


# ---- damage


@pytest.fixture
def stage(tmp_path):
    small_stage(tmp_path / "data")
    return tmp_path / "data"


def shard(data):
    return next(data.glob("processed/maze/train-*.bin"))


def offsets(data):
    return shard(data).with_suffix(".idx")


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def believable(data, **change):
    """Another first line of the manifest, and a mixture that agrees with it."""
    manifest, mixture = data / "stages/stage1/manifest.jsonl", data / "stages/stage1/mixture.json"
    first, *rest = manifest.read_text().splitlines()
    manifest.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]) + "\n")
    pinned = {**json.loads(mixture.read_text()), "manifest_sha256": snapshots.sha256_file(manifest)}
    mixture.write_text(json.dumps(pinned))


def other_tokens(data, i, token):
    """A shard with another token, and a manifest that agrees with it."""
    tokens = np.fromfile(shard(data), "<u2")
    tokens[i] = token
    tokens.tofile(shard(data))
    believable(data, sha256=snapshots.sha256_file(shard(data)))


MANIFEST, MIXTURE = "stages/stage1/manifest.jsonl", "stages/stage1/mixture.json"


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda data: rewrite(offsets(data), lambda b: b[:8] + b"?" + b[9:]), "idx was changed"),
        (lambda data: offsets(data).unlink(), "train-.*idx is missing"),
        (lambda data: believable(data, documents=-1), "manifest.jsonl .* there is no document"),
        (lambda data: other_tokens(data, 5, tokenizer.END + 1), "train-.* has token ids beyond 50280"),
        (lambda data: other_tokens(data, 30, 5), "idx does not say where documents end"),
        (lambda data: rewrite(data / MANIFEST, lambda b: b.replace(b"val", b"train")), "was changed after"),
        (lambda data: believable(data, path=str(shard(data))), "not processed/SOURCE/NAME.bin"),
        (lambda data: believable(data, tokenizer="0" * 64), "manifest.jsonl .* another tokenizer"),
        (lambda data: believable(data, tokens="many"), "manifest.jsonl .* tokens is 'many'"),
        (lambda data: rewrite(data / MANIFEST, lambda b: b"hello\n"), "manifest.jsonl is damaged in line 1"),
        (lambda data: (data / MIXTURE).unlink(), "mixture.json is missing"),
    ],
)
def test_damage_is_named_and_says_what_to_do(stage, damage, says):
    """That of the tokens themselves: test_hub.py."""
    prepare.main(["verify", "stage1", f"--data_dir={stage}"])
    damage(stage)
    with pytest.raises(SystemExit, match=f"^error: .*{says}.*prepare.py stage1 .*--force=True$"):
        prepare.main(["verify", "stage1", f"--data_dir={stage}"])


@pytest.mark.parametrize(
    "file, change, says",
    [
        ("manifest.jsonl", lambda b: b.replace(b"val", b"train"), "manifest.jsonl is missing or was changed"),
        ("mixture.json", lambda b: b.replace(b"0.", b"0.0", 1), "mixture.json is missing or was changed"),
        ("snapshot.json", lambda b: b.replace(b"v0.1", b"v0.2"), "snapshot.json is missing or of"),
    ],
)
def test_an_edited_frozen_stage_is_named_and_nothing_is_cleaned(stage, file, change, says, capsys):
    shutil.copytree(stage / "processed/maze", stage / "processed/unlisted")
    rewrite(stage / "stages/stage1/v0.1" / file, change)
    with pytest.raises(SystemExit, match=f"{says}.* a frozen stage never changes"):
        prepare.main(["verify", "stage1:v0.1", f"--data_dir={stage}"])
    with pytest.raises(SystemExit, match=says):
        prepare.main(["clean", f"--data_dir={stage}"])
    prepare.main(["status", f"--data_dir={stage}"])
    assert re.search(f"stage1:v0.1 is damaged: .*{says}", capsys.readouterr().out)
    assert list((stage / "processed/unlisted").iterdir())


def test_status_counts_for_itself_and_goes_on_after_what_is_damaged(stage, capsys):
    rewrite(stage / "stages/stage1/v0.1/snapshot.json", lambda b: b.replace(b'"tokens"', b'"tokenz"'))
    prepare.main(["status", f"--data_dir={stage}"])
    assert "frozen stage1:v0.1: 4 shards, 2,790 tokens" in capsys.readouterr().out
    shard(stage).unlink()
    prepare.main(["status", f"--data_dir={stage}"])
    assert re.search(r"stage1 is damaged: .*\n\nstage1:v0.1 is damaged: ", capsys.readouterr().out)
