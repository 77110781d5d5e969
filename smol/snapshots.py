"""
What training reads: shards, stages that list them, stages frozen under a tag; and those to the hub and back.

A shard is documents back to back. Its name carries its hash, so no build overwrites what another stage lists.
A stage is a list of shards (manifest.jsonl) and their shares (mixture.json). A frozen stage is a copy of both
under a tag; snapshot.json pins them by SHA-256 and says what they were made of:

    data/stages/stage1/manifest.jsonl, mixture.json                     what `prepare.py stage1` built last
    data/stages/stage1/v0.1/manifest.jsonl, mixture.json, snapshot.json what `prepare.py freeze` made of it

A repository on the hub holds one stage, and a tag there is a tag of the stage. huggingface_hub transfers and
resumes; what was pulled is believed only after every hash has been checked here.

data/README.md has every field. Read next: loader.py, which makes batches of a stage.
"""

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

import configurator
from smol import tokenizer
from smol.files import write_whole

STAGES = ("stage1", "stage2", "stage3", "demo", "arc_cpu", "arc", "sudoku_extreme")  # that prepare.py builds
GROUPS = ("web", "code", "math", "synth", "arc")
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a stage, a tag, a source, a shard: never a path
SHARD = rf"processed/{NAME}/{NAME}\.bin"
FROZEN_FILES = ("manifest.jsonl", "mixture.json", "snapshot.json")
FIELDS = {  # of a line of the manifest
    **dict.fromkeys("path sha256 idx_sha256 source group kind split augment tokenizer".split(), str),
    **dict.fromkeys("tokens documents bytes".split(), int),
}


# ---------------------------------------------------------------------------------------------------------
# files


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def key_of(*values):
    """A short hash of what JSON can hold."""
    return sha256(json.dumps(values, sort_keys=True).encode())[:16]


def write(path, data):
    """Write bytes or text so that a reader sees the old file or the whole new one. An equal file is kept."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    write_whole(data, path)


def to_json(value):
    return json.dumps(value, indent=2) + "\n"


def read_json(path):
    """-> the dict in a file, {} if it is not there. ValueError naming a file that holds none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: put back what it was, or delete it")
    return value


# ---------------------------------------------------------------------------------------------------------
# writing a stage


def write_shard(data, about, split, documents):
    """
    Write documents (uint16 arrays that end in EOT) as a shard with offsets. -> its line of the manifest.
    about: dict with source, group, kind and augment, which is what the loader may do to it in training.
    """
    tokens = np.concatenate(documents).astype("<u2").tobytes()
    offsets = np.cumsum([0, *map(len, documents)]).astype("<i8").tobytes()
    digest = sha256(tokens)
    path = f"processed/{about['source']}/{split}-{digest[:12]}.bin"
    write((data / path).with_suffix(".idx"), offsets)
    write(data / path, tokens)
    return {
        "path": path,
        "sha256": digest,
        "idx_sha256": sha256(offsets),
        "tokens": len(tokens) // 2,
        "documents": len(documents),
        "bytes": len(tokens),
        **about,
        "augment": about["augment"] if split == "train" else "none",
        "split": split,
        "tokenizer": tokenizer.fingerprint(),
    }


def write_stage(data, stage, entries, mixture, metadata):
    """
    Put a stage in place of the one of that name, whose shards stay until prepare.py clean.
    mixture: dict without "manifest_sha256"; metadata: {name: value} for data/metadata/STAGE/name.json.
    """
    folder = data / "stages" / stage
    manifest = "".join(json.dumps(entry) + "\n" for entry in entries)
    files = {data / "metadata" / stage / f"{name}.json": to_json(value) for name, value in metadata.items()}
    files[folder / "mixture.json"] = to_json({**mixture, "manifest_sha256": sha256(manifest.encode())})
    files[folder / "manifest.jsonl"] = manifest
    # From here on the old stage is gone, and the new one is there with the last of these renames.
    (folder / "manifest.jsonl").unlink(missing_ok=True)
    for path, content in files.items():
        write(path, content)


def unlisted_files(data):
    """
    The files of shards that no manifest lists, nor one that is being pulled. ValueError if the manifest of a
    stage is damaged: it may list any.
    """
    for snapshot in {path.parent for name in FROZEN_FILES for path in data.glob(f"stages/*/*/{name}")}:
        check_snapshot(snapshot, snapshot.parent.name, snapshot.name)
    for manifest in data.glob("stages/*/manifest.jsonl"):
        read_list(manifest.parent, manifest.parent.name)
    places = ("stages/*/manifest.jsonl", "stages/*/*/manifest.jsonl", "work/pull/*/manifest.jsonl")
    manifests = [path.read_text() for place in places for path in data.glob(place)]
    listed = set(re.findall(SHARD, "".join(manifests)))
    files = sorted([*data.glob("processed/*/*.bin"), *data.glob("processed/*/*.idx")])
    return [p for p in files if p.with_suffix(".bin").relative_to(data).as_posix() not in listed]


# ---------------------------------------------------------------------------------------------------------
# reading and checking one


def split_name(name):
    """'stage1:v0.1' -> ('stage1', 'v0.1'), 'stage1' -> ('stage1', None). ValueError for anything else."""
    stage, colon, tag = name.partition(":")
    if not re.fullmatch(NAME, stage) or (colon and not re.fullmatch(NAME, tag)):
        raise ValueError(f"{name!r} is not the name of a stage: write STAGE, or STAGE:TAG for a frozen one")
    return stage, tag or None


def read_manifest(data_dir, stage, tag=None, verify=True):
    """
    -> (list of dict, one per shard; mixture dict) of a stage, or of the one frozen under `tag`, after checks.

    verify=False checks the manifest, and that every shard is there with its size. verify=True also reads
    every shard: see check_shard. FileNotFoundError if the stage is not there or its name is unknown,
    ValueError if anything is wrong, naming the file and what to do.
    """
    data = Path(data_dir)
    split_name(stage if tag is None else f"{stage}:{tag}")  # names and not paths
    folder = data / "stages" / stage / (tag or "")
    problem, run = f"stage {stage!r} is not prepared", f"run: python prepare.py {stage} --data_dir={data}"
    repair = f"build it anew: python prepare.py {stage} --data_dir={data} --force=True"
    if tag is not None:
        problem = f"the tag {tag!r} of {problem}"
        run = f"freeze it: python prepare.py freeze {stage} --tag={tag}"
        repair = f"a frozen stage never changes: delete {folder}, and pull USER/NAME:{tag} if the hub has it"
    known = {*STAGES, *(path.name for path in data.glob("stages/*/"))}
    if stage not in known:
        raise FileNotFoundError(configurator.unknown("stage", stage, sorted(known)))
    if not (folder / "manifest.jsonl").is_file():
        raise FileNotFoundError(f"{problem} in {data}/; {run}")
    try:
        if tag is not None:
            check_snapshot(folder, stage, tag)
        entries, mixture = read_list(folder, stage)
        check_shards(data, entries, verify)
    except ValueError as e:
        raise ValueError(f"{e}; {repair}") from None
    return entries, mixture


def check_snapshot(folder, stage, tag):
    """ValueError if the folder of a frozen stage is not what was frozen."""
    snapshot = read_json(folder / "snapshot.json")
    if (snapshot.get("stage"), snapshot.get("tag")) != (stage, tag):
        raise ValueError(f"{folder / 'snapshot.json'} is missing or of another stage")
    for name, key in (("manifest.jsonl", "manifest_sha256"), ("mixture.json", "mixture_sha256")):
        if not (folder / name).is_file() or sha256_file(folder / name) != snapshot.get(key):
            raise ValueError(f"{folder / name} is missing or was changed after the stage was frozen")


def read_list(folder, stage):
    """-> (entries, mixture) of the manifest and the mixture in a folder. ValueError for what is wrong."""
    path = folder / "manifest.jsonl"
    manifest = path.read_bytes()
    entries = []
    for number, line in enumerate(manifest.splitlines(), 1):
        try:
            entries.append(check_entry(json.loads(line)))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is damaged in line {number}: {e}") from None
    if not entries or len({entry["path"] for entry in entries}) != len(entries):
        raise ValueError(f"{path} is empty, or lists a shard twice")
    mixture = read_json(folder / "mixture.json")
    shares = mixture.get("weights")
    ok = mixture.get("stage") == stage and mixture.get("tokenizer") == tokenizer.fingerprint()
    ok = ok and isinstance(shares, dict) and all(type(w) in (int, float) and w >= 0 for w in shares.values())
    ok = ok and abs(sum(shares.values()) - 1) < 1e-6
    trained = {entry["source"] for entry in entries if entry["split"] == "train"}
    if not ok or {source for source, share in shares.items() if share} - trained:
        raise ValueError(f"{folder / 'mixture.json'} is missing or of another stage")
    # catches what no other check can: an edited split, or a line taken out
    if mixture.get("manifest_sha256", sha256(manifest)) != sha256(manifest):
        raise ValueError(f"{path} was changed after it was written")
    return entries, mixture


def check_entry(entry):
    """-> a line of a manifest as it is. ValueError saying what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    for key, kind in FIELDS.items():
        if type(entry.get(key)) is not kind:
            raise ValueError(f"{key} is {entry.get(key)!r}")
    # exactly this shape: no absolute path, no "..", nothing outside of data/processed
    if not re.fullmatch(SHARD, entry["path"]):
        raise ValueError(f"the path {entry['path']!r} is not processed/SOURCE/NAME.bin")
    if entry["tokenizer"] != tokenizer.fingerprint():
        raise ValueError("it was made with another tokenizer")
    if entry["bytes"] != 2 * entry["tokens"] or entry["documents"] < 1:
        raise ValueError("bytes is not twice tokens, or there is no document")
    return entry


def shard_files(data, entry):
    """-> ((path of the tokens, its size), (path of the offsets, its size)) as the manifest has them."""
    path = data / entry["path"]
    return (path, entry["bytes"]), (path.with_suffix(".idx"), 8 * (entry["documents"] + 1))


def check_shards(data, entries, verify):
    """ValueError for a shard that is missing or has another size; verify: for one that fails check_shard."""
    for entry in entries:  # first of all shards what is quick to see
        for path, size in shard_files(data, entry):
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            if path.stat().st_size != size:
                raise ValueError(f"{path} has {path.stat().st_size} bytes where the manifest says {size}")
    total = sum(entry["bytes"] for entry in entries)
    if verify:
        for entry in tqdm(entries, "verifying", unit=" shards", leave=False, disable=total < 2e8):
            check_shard(data, entry)


def check_shard(data, entry):
    """
    ValueError unless both files have their SHA-256, a document is what ends in an end-of-text, and there is
    no id that the tokenizer does not have.
    """
    (tokens_path, _), (offsets_path, _) = shard_files(data, entry)
    tokens, offsets = tokens_path.read_bytes(), offsets_path.read_bytes()
    for path, content, key in ((tokens_path, tokens, "sha256"), (offsets_path, offsets, "idx_sha256")):
        if sha256(content) != entry[key]:
            raise ValueError(f"{path} was changed: its SHA-256 is not the manifest's")
    tokens, offsets = np.frombuffer(tokens, "<u2"), np.frombuffer(offsets, "<i8")
    # so offsets follow from tokens, which alone the shard's name is a hash of
    ends = np.flatnonzero(tokens == tokenizer.EOT) + 1
    if not np.array_equal(offsets, [0, *ends]) or offsets[-1] != len(tokens):
        raise ValueError(f"{offsets_path} does not say where documents end: after each end-of-text token")
    if tokens.max() > tokenizer.END:
        raise ValueError(f"{tokens_path} has token ids beyond {tokenizer.END}, the tokenizer's last")


# ---------------------------------------------------------------------------------------------------------
# freezing


def freeze(data, stage, tag):
    """Freeze the stage as it is now. -> the folder. ValueError if it is damaged or the tag is taken."""
    split_name(f"{stage}:{tag}")
    source, folder = data / "stages" / stage, data / "stages" / stage / tag
    entries, mixture = read_manifest(data, stage)
    files = {name: (source / name).read_bytes() for name in ("manifest.jsonl", "mixture.json")}
    if folder.exists():
        check_snapshot(folder, stage, tag)
        if any((folder / name).read_bytes() != content for name, content in files.items()):
            raise ValueError(f"the tag {tag!r} of {stage!r} is taken by another state: choose another")
        return folder
    snapshot = {
        "stage": stage,
        "tag": tag,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tokenizer": mixture["tokenizer"],
        "manifest_sha256": sha256(files["manifest.jsonl"]),
        "mixture_sha256": sha256(files["mixture.json"]),
        "shards": len(entries),
        "tokens": sum(e["tokens"] for e in entries),
        "documents": sum(e["documents"] for e in entries),
        **{n: read_json(data / "metadata" / stage / f"{n}.json") for n in ("provenance", "filters")},
    }
    install_frozen(data, stage, tag, {**files, "snapshot.json": to_json(snapshot).encode()})
    return folder


def install_frozen(data, stage, tag, files):
    """Write {name: bytes} as the folder of a frozen stage, which is there completely or not at all."""
    beside = data / "work" / "frozen"
    shutil.rmtree(beside, ignore_errors=True)
    for name, content in files.items():
        write(beside / name, content)
    (data / "stages" / stage).mkdir(parents=True, exist_ok=True)
    os.rename(beside, data / "stages" / stage / tag)


# ---------------------------------------------------------------------------------------------------------
# to the hub and back


def first_line(error):
    """What an exception says, or is called if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def plainly(doing):
    """Whatever the hub's client raises, as one line: what was being done, why not, what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise ValueError(f"{doing}: not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{doing}: there is no such revision or tag on the hub") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{doing}: no such repository for this login (`hf auth login`)") from None
    except errors.HfHubHTTPError as e:
        code = e.response.status_code
        advice = "see to your login (`hf auth login`)" if code in (401, 403) else "run it again to go on"
        raise ValueError(f"{doing}: the hub answered {code}; {advice}") from None
    except Exception as e:
        # the network's own errors are those of the client's HTTP library, which differs between versions
        network = type(e).__module__.split(".")[0] in ("httpx", "httpx2", "requests", "urllib3")
        if not network and not isinstance(e, (errors.LocalEntryNotFoundError, RuntimeError)):
            raise
        raise ValueError(f"{doing}: {first_line(e.__cause__ or e)}; run it again to go on") from None


def repo_name(repo):
    if not re.fullmatch(rf"{NAME}/{NAME}", repo):
        raise ValueError(f"{repo!r} is not the name of a repository: write USER/NAME")
    return repo


def push(data, name, repo):
    """Upload the frozen stage `name` (STAGE:TAG) as a private dataset under that tag, or ValueError."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    stage, tag = split_name(name)
    if tag is None:
        raise ValueError(f"only a frozen stage is pushed: python prepare.py freeze {stage} --tag=v0.1")
    repo_name(repo)
    entries, mixture = read_manifest(data, stage, tag)
    folder = data / "stages" / stage / tag
    files = {"README.md": card(repo, read_json(folder / "snapshot.json"), entries, mixture).encode()}
    files |= {file: folder / file for file in FROZEN_FILES}
    files |= {p.relative_to(data).as_posix(): p for e in entries for p, _ in shard_files(data, e)}
    api, where = HfApi(), {"repo_id": repo, "repo_type": "dataset"}
    with plainly(f"cannot push to {repo}"):
        api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        if tag in [ref.name for ref in api.list_repo_refs(**where).tags]:
            there = Path(hf_hub_download(filename="snapshot.json", revision=tag, **where))
            if there.read_bytes() != files["snapshot.json"].read_bytes():
                raise ValueError(f"{repo} has a tag {tag!r} of another state, and a tag never moves")
            print(f"{name} is already at {repo}, tag {tag}")
            return
        # One commit, in which what belongs to earlier tags goes; at those tags it stays. Run again after an
        # interruption, it sends what the hub does not have yet.
        gone = {*api.list_repo_files(**where)} - {*files, ".gitattributes"}
        changes = [CommitOperationAdd(path, file) for path, file in files.items()]
        changes += [CommitOperationDelete(path) for path in sorted(gone)]
        commit = api.create_commit(operations=changes, commit_message=name, **where)
        api.create_tag(tag=tag, revision=commit.oid, tag_message=f"smol-llm {name}", **where)
    print(f"{name} is at {repo}, tag {tag}: python prepare.py pull {repo}:{tag}")


def pull(data, name):
    """Download USER/NAME:TAG, check every byte, put it in place as a frozen stage. ValueError if it fails."""
    from huggingface_hub import snapshot_download

    repo, _, tag = name.partition(":")
    repo_name(repo)
    if not re.fullmatch(NAME, tag):
        raise ValueError(f"say which tag: python prepare.py pull {repo}:v0.1")
    waiting = data / "work" / "pull" / f"{repo.replace('/', '--')}--{tag}"

    def download(files):
        with plainly(f"cannot pull {name}"):
            where = {"repo_type": "dataset", "revision": tag, "local_dir": waiting}
            snapshot_download(repo, allow_patterns=files, **where)

    try:
        download(list(FROZEN_FILES))
        stage = read_json(waiting / "snapshot.json").get("stage")
        split_name(f"{stage}:{tag}")
        check_snapshot(waiting, stage, tag)
        entries, _ = read_list(waiting, stage)
        frozen = data / "stages" / stage / tag
        files = {file: (waiting / file).read_bytes() for file in FROZEN_FILES}
        there = {file: (frozen / file).read_bytes() for file in FROZEN_FILES if (frozen / file).is_file()}
        if there not in ({}, files):
            raise ValueError(f"{frozen} is another state than {name}, and a tag never moves")
        missing = []
        for entry in entries:
            if f"-{entry['sha256'][:12]}.bin" not in entry["path"]:  # it could overwrite another stage's
                raise ValueError(f"{entry['path']} does not carry its hash")
            try:
                check_shards(data, [entry], verify=True)
            except ValueError:
                missing.append(entry)
        shards = [p.relative_to(data).as_posix() for e in missing for p, _ in shard_files(data, e)]
        if shards:
            download(shards)
        check_shards(waiting, missing, verify=True)
    except ValueError as e:
        raise ValueError(f"{e}; nothing of {name} was installed") from None
    for path in shards:
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(waiting / path, data / path)
    if not there:
        install_frozen(data, stage, tag, files)
    shutil.rmtree(waiting)
    print(f"{stage}:{tag} is in {frozen}: {len(entries)} shards; train with --data={stage} --data_tag={tag}")


def origin(about):
    """Of a source, by what provenance.json says of it: exactly which data, in a phrase."""
    if "revision" in about:
        return f"{about['repo']}, commit {about['revision'][:12]}"
    if "files" in about:
        return f"{len(about['files'])} files"
    if "python" in about:
        return f"Python {about['python']}"
    made = "smol-llm" if about.get("licence") == "generated here" else "an installed package"
    return f"{made}, seed {about.get('seed')}"


def card(repo, snapshot, entries, mixture):
    """The dataset card: what is in it, how it is used, under which licences."""
    stage, tag, sources = snapshot["stage"], snapshot["tag"], snapshot["provenance"].get("sources", {})
    rows, total, documents = "", *(sum(e[key] for e in entries) for key in ("tokens", "documents"))
    for name, share in mixture["weights"].items():
        about = sources.get(name, {})
        tokens = sum(e["tokens"] for e in entries if (e["source"], e["split"]) == (name, "train"))
        rows += f"| {name} | {share:.1%} | {tokens:,} | {origin(about)} | {about.get('licence', '')} |\n"
    return f"""---
license: other
license_name: mixed
pretty_name: smol-llm {stage}
tags: [smol-llm, arc-agi, pretokenized]
viewer: false
---
# smol-llm {stage}:{tag}

{total:,} tokens in {documents:,} documents, ready for training: GPT-2's byte-pair
encoding with reserved ids for grids, uint16, in shards with document offsets.

    python prepare.py pull {repo}:{tag}
    python train.py CONFIG --data={stage} --data_tag={tag}

| source | share | training tokens | from | licence |
|---|---|---|---|---|
{rows}
Documents were normalised, filtered and deduplicated: `snapshot.json` has the counts by rule, and the SHA-256
of the files that they are from. Test outputs of ARC-AGI's evaluation sets are in none of them, under any
symmetry (those of at most 9 cells or of one colour: not behind their input). The licence of a document is its
source's: what its terms ask for, such as naming where it is from or sharing alike, goes for this copy as
well.
"""
