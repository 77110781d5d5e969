"""
hub.py, and sources.py's streaming: the real huggingface_hub and datasets clients against a small hub on this machine (local_hub.py),
undisturbed, interrupted, refused, and lied to.
"""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_hub import TOKEN, Fault, LocalHub
from test_curate import english
from test_pipeline import code

import prepare
from smol import puzzles, snapshots, tokenizer

ROOT = Path(__file__).parent.parent
PARTS = "sudoku4 maze arithmetic".split()


def small_stage(data, salt=0):
    """A stage of a few shards, made with nothing but snapshots.py."""
    rng = np.random.default_rng(salt)
    entries = []
    for name, group, kind in zip(PARTS, ("synth", "synth", "math"), ("puzzle", "puzzle", "text")):
        about = {"source": name, "group": group, "kind": kind, "augment": "none"}
        for split, n in (("train", 40), ("val", 5)):
            documents = [np.array([*rng.integers(0, 50000, 30), tokenizer.EOT], np.uint16) for _ in range(n)]
            entries.append(snapshots.write_shard(data, about, split, documents))
    mixture = {
        "stage": "stage1",
        "seed": 1,
        "tokenizer": tokenizer.fingerprint(),
        "weights": {n: 1 / 3 for n in PARTS},
        "groups": {"synth": 2 / 3, "math": 1 / 3},
    }
    about = {n: {"licence": "generated here", "train": {"tokens": 1240}} for n in PARTS}
    snapshots.write_stage(data, "stage1", entries, mixture, {"provenance": {"sources": about}, "filters": {}})
    snapshots.freeze(data, "stage1", "v0.1")


@pytest.fixture
def hub(tmp_path):
    server = LocalHub()
    server.home = tmp_path / "home"
    yield server
    server.close()


@pytest.fixture
def data(tmp_path):
    small_stage(tmp_path / "data")
    return tmp_path / "data"


def command(hub, *words, token=TOKEN, **more):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "prepare.py"), *map(str, words)],
        env={**hub.env(hub.home, token), **more},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub, *words, **more):
    """-> (exit code, what it printed, the last line of what it complained about)"""
    process = command(hub, *words, **more)
    out, err = process.communicate(timeout=900)
    assert TOKEN not in out + err and "Traceback" not in err, err
    return process.returncode, out, err.strip().split("\n")[-1]


def push(hub, data, *more, **env):
    return run(hub, "push", "stage1:v0.1", "--repo=ada/stage1", f"--data_dir={data}", *more, **env)


def pull(hub, folder, name="ada/stage1:v0.1"):
    return run(hub, "pull", name, f"--data_dir={folder}")


def same(a, b):
    entries, mixture = prepare.read_manifest(a, "stage1", tag="v0.1")
    assert (entries, mixture) == prepare.read_manifest(b, "stage1", tag="v0.1")
    for name in snapshots.FROZEN_FILES:
        assert (a / "stages/stage1/v0.1" / name).read_bytes() == (
            b / "stages/stage1/v0.1" / name
        ).read_bytes()


def test_a_stage_goes_to_the_hub_and_comes_back(hub, data, tmp_path):
    code_, out, _ = push(hub, data)
    assert code_ == 0 and "prepare.py pull ada/stage1:v0.1" in out
    entries, _ = prepare.read_manifest(data, "stage1", tag="v0.1")
    there = hub.files("ada/stage1", "v0.1")
    assert hub.repos["ada/stage1"].private
    expected = {p for e in entries for p in (e["path"], e["path"][:-4] + ".idx")} | {
        *snapshots.FROZEN_FILES,
        "README.md",
        ".gitattributes",
    }
    assert set(there) == expected
    card = there["README.md"].decode()
    assert (
        card.startswith("---\nlicense:")
        and "| sudoku4 | 33.3% | 1,240 |" in card
        and "prepare.py pull ada/stage1:v0.1\n" in card
    )
    before = len(hub.log)
    assert push(hub, data)[0] == 0 and not [
        x for x in hub.log[before:] if x[0] == "PUT" or "commit" in x[1]
    ], "something was sent again"

    code_, out, _ = pull(hub, tmp_path / "far")
    assert code_ == 0 and "--data=stage1 --data_tag=v0.1" in out
    same(data, tmp_path / "far")
    assert run(hub, "verify", "stage1:v0.1", f"--data_dir={tmp_path / 'far'}")[0] == 0
    assert not list((tmp_path / "far/work").rglob("*.bin"))
    before = len(hub.log)
    assert pull(hub, tmp_path / "far")[0] == 0 and not [p for _, p in hub.log[before:] if "/lfs/" in p], (
        "the second pull fetched shards"
    )


def test_trouble_on_the_way_is_got_over(hub, data, tmp_path):
    """What the clients retry themselves, and what they leave to the next run."""
    hub.faults = [
        Fault("PUT", "/lfs/", 500, 2),
        Fault("POST", "/preupload/", 503, 1),
        Fault("GET", "/refs", 429, 1),
    ]
    code_, _, error = push(hub, data)
    if code_:
        assert error.startswith("error: ") and "run it again" in error
        code_, _, error = push(hub, data)
    assert code_ == 0, error
    hub.faults = [Fault("GET", "/lfs/", "cut", 3), Fault("GET", "/lfs/", 500, 1)]
    for _ in range(4):
        code_, _, error = pull(hub, tmp_path / "far")
        if code_ == 0:
            break
        assert error.startswith("error: ") and "run it again" in error
        assert not (tmp_path / "far/stages/stage1/v0.1").exists()
    same(data, tmp_path / "far")
    assert not any(f.times for f in hub.faults), "not everything that should go wrong did"


def test_killed_in_the_middle_and_run_again(hub, data, tmp_path):
    for words, moment in (
        (
            ("push", "stage1:v0.1", "--repo=ada/stage1", f"--data_dir={data}"),
            lambda: [x for x in hub.log if x[0] == "PUT"],
        ),
        (
            ("pull", "ada/stage1:v0.1", f"--data_dir={tmp_path / 'far'}"),
            lambda: list((tmp_path / "far").glob("processed/*/*")),
        ),
    ):
        process = command(hub, *words)
        while not moment() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        assert not hub.repos["ada/stage1"].tags or words[0] == "pull"
        assert not (tmp_path / "far/stages/stage1/v0.1").exists()
        assert run(hub, *words)[0] == 0
    same(data, tmp_path / "far")


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_login_nothing_is_pushed(hub, data, token):
    code_, _, error = push(hub, data, token=token)
    assert (
        code_ == 1 and error.startswith("error: cannot log in") and "hf auth login" in error and not hub.repos
    )


def corrupt(hub, files, path):
    return {path: bytes([files[path][0] ^ 1]) + files[path][1:]}


def first_bin(files):
    return next(p for p in sorted(files) if p.endswith(".bin"))


def escape(files):
    lines = files["manifest.jsonl"].decode().splitlines()
    entry = json.loads(lines[0])
    entry["path"] = "processed/../../outside/x.bin"
    return "\n".join([json.dumps(entry), *lines[1:]]).encode() + b"\n"


def believable(files, manifest):
    """The files with another manifest, and hashes to fit it: a lie that is consistent."""
    mixture = json.loads(files["mixture.json"])
    mixture["manifest_sha256"] = snapshots.sha256(manifest)
    mixture = json.dumps(mixture).encode()
    snapshot = json.loads(files["snapshot.json"])
    snapshot.update(manifest_sha256=snapshots.sha256(manifest), mixture_sha256=snapshots.sha256(mixture))
    return {
        "manifest.jsonl": manifest,
        "mixture.json": mixture,
        "snapshot.json": json.dumps(snapshot).encode(),
    }


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (
            lambda f: {first_bin(f): bytes([f[first_bin(f)][0] ^ 1]) + f[first_bin(f)][1:]},
            "does not have the SHA-256 that its manifest says",
        ),
        (lambda f: {first_bin(f): f[first_bin(f)][:-2]}, "bytes at ada/stage1:v0.1 where the manifest says"),
        (lambda f: {first_bin(f): None}, "is missing at ada/stage1:v0.1"),
        (lambda f: {"snapshot.json": None}, "is no frozen stage: snapshot.json is missing"),
        (lambda f: {"setup.py": b"print('boo')"}, "setup.py at ada/stage1:v0.1 does not belong to the stage"),
        (
            lambda f: {"manifest.jsonl": f["manifest.jsonl"].replace(b'"val"', b'"train"')},
            "manifest.jsonl was changed after",
        ),
        (lambda f: believable(f, escape(f)), "not processed/SOURCE/NAME.bin"),
        (
            lambda f: {
                "snapshot.json": f["snapshot.json"].replace(b'"stage": "stage1"', b'"stage": "../../x"')
            },
            "snapshot.json is damaged",
        ),
    ],
)
def test_a_repository_that_lies_is_not_believed(hub, data, tmp_path, lie, says):
    shards = {p.relative_to(data).as_posix(): p.read_bytes() for p in (data / "processed").rglob("*.*")}
    files = {**shards, **{n: (data / "stages/stage1/v0.1" / n).read_bytes() for n in snapshots.FROZEN_FILES}}
    for path, content in lie(files).items():
        files[path] = content
    commit = hub.put("ada/stage1", {p: c for p, c in files.items() if c is not None})
    hub.repos["ada/stage1"].tags["v0.1"] = commit
    code_, _, error = pull(hub, tmp_path / "far")
    assert code_ == 1 and says in error, error
    assert not (tmp_path / "far/stages/stage1/v0.1").exists() and not (tmp_path / "outside").exists()


def test_tags_do_not_move(hub, data, tmp_path):
    assert push(hub, data)[0] == 0 and pull(hub, tmp_path / "far")[0] == 0
    # another stage under the same tag is neither pushed nor pulled
    small_stage(tmp_path / "other", salt=1)
    code_, _, error = push(hub, tmp_path / "other")
    assert code_ == 1 and "has a tag 'v0.1' already" in error
    code_, _, error = pull(hub, tmp_path / "other")
    assert code_ == 1 and "is there already and is another stage" in error
    # someone moves the tag on the hub
    hub.repos["ada/stage1"].tags["v0.1"] = hub.put("ada/stage1", {"README.md": b"moved"})
    code_, _, error = pull(hub, tmp_path / "far")
    assert code_ == 1 and "the tag 'v0.1' of ada/stage1 has moved" in error
    same(data, tmp_path / "far")
    # a later state goes under its own tag, and the first one stays as it was
    snapshots.freeze(tmp_path / "other", "stage1", "v0.2")
    assert run(hub, "push", "stage1:v0.2", "--repo=ada/stage1", f"--data_dir={tmp_path / 'other'}")[0] == 0
    assert pull(hub, tmp_path / "far", "ada/stage1:v0.2")[0] == 0
    prepare.read_manifest(tmp_path / "far", "stage1", tag="v0.2")
    same(data, tmp_path / "far")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pull", "ada/stage1"], "say which tag"),
        (["pull", "stage1:v0.1"], "write USER/NAME"),
        (["pull", "ada/nothing:v0.1"], "no such repository"),
        (["pull", "ada/empty:v0.1"], "has no tag 'v0.1'; it has none"),
        (["push", "stage1", "--repo=ada/x"], "only a frozen stage is pushed"),
        (["push", "stage1:v0.1"], "say where to"),
        (["push", "stage1:v9", "--repo=ada/x"], "has no tag 'v9'"),
        (["push", "stage1:../v9", "--repo=ada/x"], "is not the name of a stage"),
        (["freeze", "stage1"], "say under which tag"),
    ],
)
def test_mistakes_are_one_line(hub, data, words, says, monkeypatch):
    """In this process, where the client has read its settings already: what needs an answer from the hub is told where it is."""
    import huggingface_hub

    hub.put("ada/empty", {"README.md": b"x"})
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: huggingface_hub.hf_api.HfApi(endpoint=hub.url, token=TOKEN)
    )
    with pytest.raises(SystemExit) as e:
        prepare.main([*words, f"--data_dir={data}"])
    assert (
        says in str(e.value.code)
        and str(e.value.code).startswith("error: ")
        and "\n" not in str(e.value.code)
    )


# ---- streaming


def parquet(rows, group=15):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


def configs(**paths):
    """The head of a dataset card that says which files belong to which config and split."""
    lines = ["---", "configs:"]
    for name, splits in paths.items():
        lines += [f"- config_name: {name.replace('_', '-')}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", ""]).encode()


def publish(hub):
    hub.put(
        "HuggingFaceFW/fineweb-edu",
        {
            "README.md": configs(sample_10BT={"train": "sample/10BT/*"}),
            **{
                f"sample/10BT/{i:03d}.parquet": parquet(
                    [{"text": english(20, 100 * i + j), "id": "x"} for j in range(60)]
                )
                for i in range(3)
            },
        },
    )
    for i in range(2):
        lines = "".join(json.dumps({"content": code(50 * i + j), "license": "mit"}) + "\n" for j in range(50))
        hub.put("codeparrot/codeparrot-clean", {f"file-{i}.json.gz": gzip.compress(lines.encode())})
    school = [
        {
            "question": f"What is {i} and {i + 1} more than {i + 2} put together in one sum?",
            "answer": f"#### {i}",
        }
        for i in range(60)
    ]
    hub.put(
        "openai/gsm8k",
        {
            "README.md": configs(main={"train": "main/train-*", "test": "main/test-*"}),
            "main/train-0.parquet": parquet(school),
            "main/test-0.parquet": parquet(
                [
                    {
                        "question": "An exam question that is nowhere else to be found, they say.",
                        "answer": "#### 3",
                    }
                ]
            ),
        },
    )
    rng, rows = np.random.default_rng(2), ["source,question,answer,rating"]
    for _ in range(30):
        question, answer = puzzles.sudoku(rng, 9, 30).test[0]
        rows.append(
            "x,{},{},7".format("".join(str(v or ".") for v in question.flat), "".join(map(str, answer.flat)))
        )
    tested_on = "\n".join([rows[0], rows[5]]).encode() + b"\n"
    hub.put(
        "sapientinc/sudoku-extreme", {"train.csv": "\n".join(rows).encode() + b"\n", "test.csv": tested_on}
    )


STREAM = [
    "stage1",
    "--sources=fineweb_edu,codeparrot,gsm8k,sudoku_extreme,sudoku9,arc",
    "--limit_mb=0.25",
    "--unit_mb=0.03",
    "--stage_val_every=20",
    "--num_proc=1",
]


def test_streaming_from_the_hub_survives_kills_and_a_moving_branch(hub, tmp_path):
    publish(hub)
    code_, _, error = run(hub, *STREAM, f"--data_dir={tmp_path / 'one'}")
    assert code_ == 0, error
    entries, mixture = prepare.read_manifest(tmp_path / "one", "stage1")
    assert {e["source"] for e in entries} == {
        "fineweb_edu",
        "codeparrot",
        "gsm8k",
        "sudoku_extreme",
        "sudoku9",
        "arc",
    }
    provenance = json.loads((tmp_path / "one/metadata/stage1/provenance.json").read_text())
    assert provenance["sources"]["gsm8k"]["revision"] == hub.repos["openai/gsm8k"].branches["main"]
    dropped = json.loads((tmp_path / "one/metadata/stage1/filters.json").read_text())["sudoku_extreme"][
        "dropped"
    ]
    assert dropped["is_in_sudoku_extreme_test"]["count"] == 1

    # cut connections and a kill on the way; then main moves, but the build goes on with the commit it began with
    hub.faults = [Fault("GET", "parquet|/lfs/|gz", "cut", 2), Fault("GET", "parquet|/lfs/|gz", 503, 1)]
    process = command(hub, *STREAM, f"--data_dir={tmp_path / 'two'}")
    while len(list((tmp_path / "two").glob("work/*/*/*.json"))) < 6 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.put(
        "openai/gsm8k",
        {"main/train-0.parquet": parquet([{"question": "Something else?", "answer": "#### 0"}])},
    )
    for _ in range(3):
        code_, _, error = run(hub, *STREAM, f"--data_dir={tmp_path / 'two'}")
        if code_ == 0:
            break
        assert "cannot read" in error and "run the same command again" in error
    assert prepare.read_manifest(tmp_path / "two", "stage1") == (entries, mixture)

    # the commit is gone from the hub: said, and nothing else is taken instead
    commits = hub.repos["HuggingFaceFW/fineweb-edu"]
    commits.commits = {"f" * 40: dict(*commits.commits.values())}
    commits.branches["main"] = "f" * 40
    shutil_free = tmp_path / "two/work"
    for path in shutil_free.glob("fineweb_edu/*/*"):
        path.unlink()
    code_, _, error = run(hub, *STREAM, f"--data_dir={tmp_path / 'two'}", "--force")
    assert code_ == 1 and "cannot read HuggingFaceFW/fineweb-edu" in error
    prepare.read_manifest(tmp_path / "two", "stage1")  # the stage that was there still is


def test_without_a_network_it_says_what_to_do(hub, tmp_path):
    hub.close()
    code_, _, error = run(hub, "stage1", f"--data_dir={tmp_path}", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert code_ == 1 and error.startswith("error: cannot look up the dataset") and "--source_dir" in error
    assert os.listdir(tmp_path) == [".lock"] or not list(tmp_path.glob("stages/*"))


def test_a_thousand_hard_sudokus_come_from_one_commit(hub, tmp_path):
    rng = np.random.default_rng(5)

    def rows(n):
        made = [puzzles.sudoku(rng, 9, 30).test[0] for _ in range(n)]
        lines = [
            ",".join(
                ["kaggle", *("".join(map(str, grid.reshape(-1))).replace("0", ".") for grid in pair), "3"]
            )
            for pair in made
        ]
        return "\n".join(["source,question,answer,rating", *lines, ""]).encode()

    hub.put("sapientinc/sudoku-extreme", {"train.csv": rows(6), "test.csv": rows(4)})
    first = hub.repos["sapientinc/sudoku-extreme"].branches["main"]
    command = [
        sys.executable,
        "-m",
        "smol.sudoku_extreme",
        "--source=hub",
        "--n=5",
        "--n_test=3",
        "--data_dir=data",
    ]
    for _ in range(2):  # and again, when main has moved
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**hub.env(hub.home, TOKEN), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        manifest, mixture = snapshots.read_manifest(tmp_path / "data", "sudoku_extreme")
        assert {e["split"]: e["documents"] for e in manifest} == {"train": 5, "val": 3}
        assert mixture["origin"] == f"sapientinc/sudoku-extreme, commit {first}"
        hub.put("sapientinc/sudoku-extreme", {"train.csv": rows(6), "test.csv": rows(4)})
