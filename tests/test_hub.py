"""A frozen stage to the hub and back, and rows from it: real clients against a local hub (local_hub.py)."""

import gzip
import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scripts
from huggingface_hub import constants
from local_hub import TOKEN, Fault, LocalHub
from test_curate import english

import prepare
from smol import puzzles, snapshots, tokenizer


def small_stage(data, salt=0):
    """A stage of a few shards, made with nothing but snapshots.py, and frozen."""
    rng, entries = np.random.default_rng(salt), []
    for name, group, kind in (("maze", "synth", "puzzle"), ("arithmetic", "math", "text")):
        about = {"source": name, "group": group, "kind": kind, "augment": "none"}
        for split, n in (("train", 40), ("val", 5)):
            documents = [np.array([*rng.integers(0, 50000, 30), tokenizer.EOT], np.uint16) for _ in range(n)]
            entries.append(snapshots.write_shard(data, about, split, documents))
    shares = {"weights": {"maze": 0.25, "arithmetic": 0.75}, "groups": {"synth": 0.25, "math": 0.75}}
    mixture = {"stage": "stage1", "seed": 1, "tokenizer": tokenizer.fingerprint(), **shares}
    about = {"maze": {"licence": "generated here", "seed": 3}}
    about["arithmetic"] = {"licence": "CC-BY-4.0", "repo": "them/sums", "revision": "abc" * 10}
    snapshots.write_stage(data, "stage1", entries, mixture, {"provenance": {"sources": about}, "filters": {}})
    snapshots.freeze(data, "stage1", "v0.1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client of this process talks to, and those with its `settings`."""
    server = LocalHub()
    server.settings = server.env(tmp_path / "home")
    for name, value in server.settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.close()


@pytest.fixture
def data(tmp_path):
    small_stage(tmp_path / "data")
    return tmp_path / "data"


def push(data, name="stage1:v0.1"):
    prepare.main(["push", name, "--repo=ada/stage1", f"--data_dir={data}"])


def pull(folder, name="ada/stage1:v0.1"):
    prepare.main(["pull", name, f"--data_dir={folder}"])


def same(a, b):
    assert snapshots.read_manifest(a, "stage1", "v0.1") == snapshots.read_manifest(b, "stage1", "v0.1")
    for name in snapshots.FROZEN_FILES:
        path = Path("stages/stage1/v0.1") / name
        assert (a / path).read_bytes() == (b / path).read_bytes()


def test_a_stage_goes_to_the_hub_and_comes_back(hub, data, tmp_path, capsys):
    push(data)
    there = hub.files("ada/stage1", "v0.1")
    shards = {p.relative_to(data).as_posix() for p in data.glob("processed/*/*")}
    assert set(there) == {*shards, *snapshots.FROZEN_FILES, "README.md", ".gitattributes"}
    assert hub.repos["ada/stage1"].private
    card = there["README.md"].decode()
    assert card.startswith("---\nlicense:")
    assert "| maze | 25.0% | 1,240 | smol-llm, seed 3 | generated here |" in card
    assert "| arithmetic | 75.0% | 1,240 | them/sums, commit abcabcabcabc | CC-BY-4.0 |" in card
    before = len(hub.log)
    push(data)
    assert not [x for x in hub.log[before:] if x[0] == "PUT" or "/commit/" in x[1]], "it was sent again"

    pull(tmp_path / "far")
    same(data, tmp_path / "far")
    assert not list((tmp_path / "far/work").rglob("*.bin"))
    before = len(hub.log)
    pull(tmp_path / "far")
    assert not [path for _, path in hub.log[before:] if "/lfs/" in path], "shards were fetched again"
    assert TOKEN not in capsys.readouterr().out


def again(command, *words):
    """Run a command until it succeeds; each failure must say to run it again."""
    for _ in range(5):
        try:
            return command(*words)
        except SystemExit as e:
            assert re.fullmatch("error: .*run it again.*", e.code)
    raise AssertionError("it never succeeded")


def test_trouble_on_the_way_is_got_over(hub, data, tmp_path):
    hub.faults = [Fault("PUT", "/lfs/", 500), Fault("POST", "/preupload/", 503), Fault("GET", "/refs", 429)]
    again(push, data)
    hub.faults += [Fault("GET", "/lfs/", "cut", 3), Fault("GET", "/lfs/", 500)]
    again(pull, tmp_path / "far")
    same(data, tmp_path / "far")
    assert not any(fault.times for fault in hub.faults), "not everything that should go wrong did"


def test_killed_in_the_middle_and_run_again(hub, data, tmp_path):
    far = tmp_path / "far"
    sending = ("push", "stage1:v0.1", "--repo=ada/stage1", f"--data_dir={data}")
    getting = ("pull", "ada/stage1:v0.1", f"--data_dir={far}")
    there = {sending: lambda: hub.blobs, getting: lambda: list(far.glob("work/pull/*/processed/*"))}
    for words, begun in there.items():
        run = scripts.Run("prepare.py", words, env=hub.settings)
        while not begun() and run.alive():
            time.sleep(0.002)
        run.kill()
        assert words[0] == "pull" or not hub.repos.get("ada/stage1") or not hub.repos["ada/stage1"].tags
        assert not (far / "stages").exists()
        prepare.main(list(words))
    same(data, far)


def believable(files, change):
    """The files with another first line of the manifest, and hashes to fit it: a lie that is consistent."""
    first, *rest = files["manifest.jsonl"].decode().splitlines()
    manifest = "\n".join([json.dumps({**json.loads(first), **change}), *rest]).encode() + b"\n"
    mixture = {**json.loads(files["mixture.json"]), "manifest_sha256": snapshots.sha256(manifest)}
    mixture = json.dumps(mixture).encode()
    pins = {"manifest_sha256": snapshots.sha256(manifest), "mixture_sha256": snapshots.sha256(mixture)}
    snapshot = json.dumps({**json.loads(files["snapshot.json"]), **pins}).encode()
    return {"manifest.jsonl": manifest, "mixture.json": mixture, "snapshot.json": snapshot}


def damaged(files, change):
    path = next(p for p in sorted(files) if p.endswith(".bin"))
    return {path: change(files[path])}


@pytest.mark.parametrize(
    "lie, says",
    [
        (lambda f: damaged(f, lambda b: bytes([b[0] ^ 1]) + b[1:]), "its SHA-256 is not"),
        (lambda f: damaged(f, lambda b: b[:-2]), "bytes where the manifest says"),
        (lambda f: damaged(f, lambda b: None), "is missing"),
        (lambda f: {"snapshot.json": None}, "snapshot.json is missing"),
        (lambda f: {"manifest.jsonl": f["manifest.jsonl"].replace(b"val", b"train")}, "was changed after"),
        (lambda f: believable(f, {"path": "processed/../../x/x.bin"}), "not processed/SOURCE/NAME.bin"),
        (lambda f: believable(f, {"path": "processed/maze/train-0.bin"}), "does not carry its hash"),
        (lambda f: {"snapshot.json": b'{"stage": "../../x"}'}, "is not the name of a stage"),
    ],
)
def test_a_repository_that_lies_is_not_believed(hub, data, tmp_path, lie, says):
    files = {p.relative_to(data).as_posix(): p.read_bytes() for p in data.glob("processed/*/*")}
    files |= {n: (data / "stages/stage1/v0.1" / n).read_bytes() for n in snapshots.FROZEN_FILES}
    files |= {"setup.py": b"boo", **lie(files)}
    commit = hub.put("ada/stage1", {p: content for p, content in files.items() if content is not None})
    hub.repos["ada/stage1"].tags["v0.1"] = commit
    with pytest.raises(SystemExit, match=says):
        pull(tmp_path / "far")
    assert not list(tmp_path.glob("far/stages/*/*")) and not list(tmp_path.rglob("setup.py"))
    assert not list(tmp_path.glob("far/processed/*/*"))


def test_tags_do_not_move(hub, data, tmp_path):
    push(data)
    pull(tmp_path / "far")
    small_stage(tmp_path / "other", salt=1)  # another state under the same tag
    with pytest.raises(SystemExit, match="has a tag 'v0.1' of another state"):
        push(tmp_path / "other")
    with pytest.raises(SystemExit, match="is another state than"):
        pull(tmp_path / "other")
    # a later state goes under its own tag, and the first one stays as it was
    snapshots.freeze(tmp_path / "other", "stage1", "v0.2")
    push(tmp_path / "other", "stage1:v0.2")
    pull(tmp_path / "far", "ada/stage1:v0.2")
    entries, _ = snapshots.read_manifest(tmp_path / "far", "stage1", "v0.2")
    there = {path for path in hub.files("ada/stage1", "v0.2") if path.endswith(".bin")}
    assert there == {entry["path"] for entry in entries}  # what is of v0.1 alone is there alone
    pull(tmp_path / "again")
    same(data, tmp_path / "far")
    same(data, tmp_path / "again")


@pytest.mark.parametrize(
    "words, says",
    [
        (["pull", "ada/stage1"], "say which tag"),
        (["pull", "stage1:v0.1"], "write USER/NAME"),
        (["pull", "ada/nothing:v0.1"], "no such repository"),
        (["pull", "ada/empty:v0.1"], "no such revision or tag"),
        (["push", "stage1", "--repo=ada/x"], "only a frozen stage is pushed"),
        (["push", "stage1:v0.1"], "write USER/NAME"),
        (["push", "stage1:v9", "--repo=ada/x"], "the tag 'v9' of stage 'stage1' is not prepared"),
    ],
)
def test_mistakes_are_one_line(hub, data, words, says):
    hub.put("ada/empty", {"README.md": b"x"})
    with pytest.raises(SystemExit, match=says) as e:
        prepare.main([*words, f"--data_dir={data}"])
    assert str(e.value.code).startswith("error: ") and "\n" not in str(e.value.code)


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_without_a_login_nothing_is_pushed(hub, data, token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match="hf auth login"):
        push(data)
    assert not hub.repos


# ---- streaming


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=15)
    return buffer.getvalue()


def configs(name, **paths):
    """The head of a dataset card that says which files belong to which split."""
    files = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in paths.items())
    return f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n".encode()


def publish(hub):
    """Three datasets in the layouts of the real ones."""
    pages = [[{"text": english(20, 100 * i + j), "id": "x"} for j in range(60)] for i in range(3)]
    pages = {f"sample/10BT/{i}.parquet": parquet(rows) for i, rows in enumerate(pages)}
    card = {"README.md": configs("sample-10BT", train="sample/10BT/*")}
    hub.put("HuggingFaceFW/fineweb-edu", {**card, **pages})
    for i in range(2):
        texts = [f"x = {i, j}\n" + english(9, (i, j)) for j in range(60)]
        rows = ['{"con\n', *(json.dumps({"content": text}) + "\n" for text in (3, *texts))]  # two are odd
        hub.put("codeparrot/codeparrot-clean", {f"file-{i}.json.gz": gzip.compress("".join(rows).encode())})
    files = {"main/train-0.parquet": parquet([{"question": "What is 1 + 1?", "answer": "#### 2"}])}
    files["main/test-0.parquet"] = parquet([{"question": english(3, 105), "answer": "#### 3"}])
    hub.put("openai/gsm8k", {"README.md": configs("main", train="main/train-*", test="main/test-*"), **files})
    rng, lines = np.random.default_rng(2), ["source,question,answer,rating\n"]
    for _ in range(30):
        pair = puzzles.sudoku(rng, 9, 30).test[0]
        question, answer = ("".join(map(str, grid.flat)).replace("0", ".") for grid in pair)
        lines.append(f"x,{question},{answer},7\n")
    files = {"train.csv": "".join(lines).encode(), "test.csv": (lines[0] + lines[5]).encode()}
    hub.put("sapientinc/sudoku-extreme", files)


def stream(hub, data, *more):
    options = f"--data_dir={data} --limit_mb=0.2 --val_every=20 --num_proc=1".split()
    sources = "--sources=fineweb_edu,codeparrot,sudoku_extreme"
    return scripts.Run("prepare.py", ["stage1", sources, *options, *more], env=hub.settings)


def test_streaming_survives_kills_cut_connections_and_a_moving_branch(hub, tmp_path):
    publish(hub)
    for folder, *more in ("look", "--dry_run=True"), ("one",):
        done = stream(hub, tmp_path / folder, *more).wait()
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "look").exists()
    stage = snapshots.read_manifest(tmp_path / "one", "stage1")
    about = json.loads((tmp_path / "one/metadata/stage1/provenance.json").read_text())["sources"]
    assert about["codeparrot"]["revision"] == hub.repos["codeparrot/codeparrot-clean"].branches["main"]
    filters = json.loads((tmp_path / "one/metadata/stage1/filters.json").read_text())
    assert filters["sudoku_extreme"]["dropped"]["is_in_sudoku_extreme_test"]["count"] == 1
    odd = {rule: filters["codeparrot"]["dropped"][rule]["count"] for rule in ("not_text", "not_a_row")}
    assert odd == {"not_text": 2, "not_a_row": 2}
    assert filters["fineweb_edu"]["dropped"]["quotes_gsm8k_test"]["count"] == 1

    hub.faults = [Fault("GET", "parquet|/lfs/|gz", "cut", 2), Fault("GET", "parquet|/lfs/|gz", 503)]
    run = stream(hub, tmp_path / "two")
    while len(list(tmp_path.glob("two/work/*/*/*.npz"))) < 4 and run.alive():
        time.sleep(0.005)
    run.kill()
    more = [{"text": english(20, 5000 + i), "id": "y"} for i in range(60)]
    hub.put("HuggingFaceFW/fineweb-edu", {"sample/10BT/0.parquet": parquet(more)})
    for _ in range(3):
        done = stream(hub, tmp_path / "two").wait()
        error = done.stderr.strip().split("\n")[-1]
        if done.returncode == 0:
            break
        assert error.startswith("error: cannot read") and "run the same command again" in error
    assert snapshots.read_manifest(tmp_path / "two", "stage1") == stage


def test_without_a_network_it_says_what_to_do(hub, tmp_path):
    hub.close()
    with pytest.raises(SystemExit, match="^error: cannot look up the dataset .* use --source_dir"):
        prepare.main(["stage1", f"--data_dir={tmp_path}"])
    assert not list(tmp_path.glob("stages/*"))
