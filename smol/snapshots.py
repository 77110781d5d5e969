"""
What training reads: shards, stages that list them, and stages that are frozen under a tag. Written here, checked here.

A *shard* is documents back to back; its name carries its hash, so a rebuilt source makes new files beside the old ones and nothing
that a stage lists is ever overwritten. A *stage* is a list of shards (manifest.jsonl) and their shares (mixture.json). A *frozen* stage is
a copy of those two under a tag, with snapshot.json, which says what they were made of and pins both by their SHA-256:

    data/stages/stage1/manifest.jsonl, mixture.json                     what `prepare.py stage1` built last
    data/stages/stage1/v0.1/manifest.jsonl, mixture.json, snapshot.json what `prepare.py freeze stage1 --tag=v0.1` made of it, for good

Shards of a frozen stage stay where they are: as long as any manifest lists a shard, no build deletes it.

data/README.md has every field. Read next: hub.py, which sends a frozen stage elsewhere; loader.py, which makes batches of one.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smol import tokenizer
from smol.files import write_whole

GROUPS = ("web", "code", "math", "synth", "arc")
BUILDABLE = ("demo", "stage1", "stage2", "stage3")  # what `prepare.py STAGE` can build anew
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a stage, a tag, a source, a shard: never a path
SHARD = rf"processed/{NAME}/{NAME}\.bin"
FROZEN_FILES = ("manifest.jsonl", "mixture.json", "snapshot.json")
KEYS = {
    "path": str,
    "sha256": str,
    "idx_sha256": str,
    "tokens": int,
    "documents": int,
    "bytes": int,
    "source": str,
    "group": str,
    "kind": str,
    "split": str,
    "augment": str,
    "tokenizer": str,
}
VALUES = {
    "group": GROUPS,
    "kind": ("text", "puzzle"),
    "split": ("train", "val"),
    "augment": ("none", "dihedral", "arc", "sudoku"),
}


# ---------------------------------------------------------------------------------------------------------------------------------
# files


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def sha256_file(path):
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else sha256(f.read())
        )


def write(path, data):
    """Write bytes or text so that whoever looks sees the old file or the whole new one. Leaves an identical file alone."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    write_whole(data, path)


def to_json(value):
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path):
    """-> the dict in a file, {} if it is not there. ValueError naming a file that has none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: put back what it was, or delete it")
    return value


# ---------------------------------------------------------------------------------------------------------------------------------
# writing a stage


def write_shard(data, about, split, documents):
    """
    Write token documents (np.uint16 arrays that end in EOT) as a shard with offsets. -> its entry in the manifest.
    about: dict with source, group, kind and augment, which is what the loader may do to it in training.
    """
    tokens = np.concatenate(documents).astype("<u2").tobytes()
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype("<i8").tobytes()
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
        "source": about["source"],
        "group": about["group"],
        "kind": about["kind"],
        "split": split,
        "augment": about["augment"] if split == "train" else "none",
        "tokenizer": tokenizer.fingerprint(),
    }


def write_stage(data, stage, entries, mixture, metadata):
    """
    Put a stage in place of the one of that name that may be there, and delete the shards that no stage lists any more.
    mixture: dict without "manifest_sha256"; metadata: {name: value} for data/metadata/STAGE/name.json.
    """
    folder = data / "stages" / stage
    try:
        replaced = read_manifest(data, stage, verify=False)[0]
    except (FileNotFoundError, ValueError):
        replaced = []
    manifest = "".join(json.dumps(entry) + "\n" for entry in entries)
    # From here on the old stage is gone, and the new one is there with the last of these renames.
    (folder / "manifest.jsonl").unlink(missing_ok=True)
    for name, value in metadata.items():
        write(data / "metadata" / stage / f"{name}.json", to_json(value))
    write(folder / "mixture.json", to_json({**mixture, "manifest_sha256": sha256(manifest.encode())}))
    write(folder / "manifest.jsonl", manifest)
    still = listed_shards(data)
    for entry in replaced:
        if entry["path"] not in still:
            (data / entry["path"]).unlink(missing_ok=True)
            (data / entry["path"]).with_suffix(".idx").unlink(missing_ok=True)


def manifests(data):
    """Every manifest there is: of stages, of frozen ones, and of those that are being pulled."""
    places = ("stages/*/manifest.jsonl", "stages/*/*/manifest.jsonl", "work/pull/*/frozen/manifest.jsonl")
    return sorted(path for place in places for path in data.glob(place))


def listed_shards(data):
    """The paths, relative to data, that any manifest lists. Reads loosely: a damaged manifest must not get its shards deleted."""
    return {
        path
        for manifest in manifests(data)
        for path in re.findall(rf'"path": "({SHARD})"', manifest.read_text(errors="replace"))
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# reading one


def split_name(name):
    """'stage1:v0.1' -> ('stage1', 'v0.1'), 'stage1' -> ('stage1', None). ValueError if it is a path or nothing."""
    stage, colon, tag = name.partition(":")
    if not re.fullmatch(NAME, stage) or (colon and not re.fullmatch(NAME, tag)):
        raise ValueError(f"{name!r} is not the name of a stage: write STAGE, or STAGE:TAG for a frozen one")
    return stage, tag or None


def read_manifest(data_dir, stage, tag=None, verify=True):
    """
    -> (list of dict, one per shard; mixture dict) of a stage, or of the stage frozen under `tag`, after checking that training can
    rely on it.

    verify=False checks the manifest, that every shard is there, and its size; verify=True also reads every
    shard: SHA-256 of tokens and offsets, offsets that rise from 0 to the number of tokens, an end-of-text
    at the end of each document, and that there is no id which the tokenizer does not have. Raises
    FileNotFoundError if the stage is not prepared, ValueError if anything is wrong, naming the file and
    what to do.
    """
    data = Path(data_dir)
    # names and not paths: they come from a command line and are joined to one
    split_name(stage if tag is None else f"{stage}:{tag}")
    where = "" if data == Path("data") else f" --data_dir={data}"
    folder = data / "stages" / stage / (tag or "")
    if not (folder / "manifest.jsonl").is_file():
        if tag is not None:
            there = sorted(p.parent.name for p in (data / "stages" / stage).glob("*/manifest.jsonl"))
            advice = f"freeze it: python prepare.py freeze {stage} --tag={tag}{where}, or pull it: prepare.py pull USER/REPO:{tag}{where}"
            raise FileNotFoundError(
                f"stage {stage!r} has no tag {tag!r} in {data}/ (tags there: {', '.join(there) or 'none'}); {advice}"
            )
        if stage in BUILDABLE:
            raise FileNotFoundError(
                f"stage {stage!r} is not prepared in {data}/; run: python prepare.py {stage}{where}"
            )
        there = sorted(p.parent.name for p in (data / "stages").glob("*/manifest.jsonl"))
        raise FileNotFoundError(
            f"there is no stage {stage!r} in {data}/; there is: {', '.join(there) or 'none'}"
        )
    if tag is None and stage in BUILDABLE:
        repair = f"; build the stage anew: python prepare.py {stage} --force=True{where}"
    elif tag is None:
        repair = "; fetch the stage again"
    else:
        repair = f"; a frozen stage never changes: pull {stage}:{tag} again, or delete {folder} and freeze anew under another tag"
    if tag is not None:
        check_snapshot(folder, stage, tag, repair)
    return check_manifest(data, folder, stage, repair, verify)


def check_snapshot(folder, stage, tag, repair):
    """-> the dict in a frozen stage's snapshot.json, after checking that the folder is what was frozen. ValueError naming the file."""
    path = folder / "snapshot.json"
    try:
        snapshot = json.loads(path.read_bytes())
        ok = snapshot["stage"] == stage and snapshot["tag"] == tag
        pinned = {"manifest.jsonl": snapshot["manifest_sha256"], "mixture.json": snapshot["mixture_sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        ok = False
    if not ok:
        raise ValueError(f"{path} is missing, damaged or of another stage{repair}")
    for name, digest in pinned.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing{repair}")
        if sha256_file(folder / name) != digest:
            raise ValueError(f"{folder / name} was changed after the stage was frozen{repair}")
    extra = sorted(
        p.name for p in folder.iterdir() if p.name not in FROZEN_FILES and not p.name.endswith(".tmp")
    )
    if extra:
        raise ValueError(f"{folder / extra[0]} does not belong to the frozen stage{repair}")
    return snapshot


def check_manifest(data, folder, stage, repair, verify, shards=True):
    """What read_manifest says of the files in one folder. shards=False: of the manifest and the mixture alone."""
    manifest_path, mixture_path = folder / "manifest.jsonl", folder / "mixture.json"

    def check(ok, path, problem):
        if not ok:
            raise ValueError(f"{path} {problem}{repair}")

    manifest = manifest_path.read_bytes()
    entries, paths = [], set()
    for number, line in enumerate(manifest.splitlines(), 1):
        at = f"(line {number})"
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        check(isinstance(entry, dict), manifest_path, f"is damaged {at}: not a JSON object")
        for key, kind in KEYS.items():
            check(
                type(entry.get(key)) is kind,
                manifest_path,
                f"is damaged {at}: {key} is missing or not {kind.__name__}",
            )
        for key, values in VALUES.items():
            check(
                entry[key] in values,
                manifest_path,
                f"is damaged {at}: {key} is {entry[key]!r}, not one of {', '.join(values)}",
            )
        # exactly this shape: no absolute path, no "..", nothing outside of data/processed
        inside = re.fullmatch(SHARD, entry["path"])
        check(
            inside,
            manifest_path,
            f"is damaged {at}: the path {entry['path']!r} is not processed/SOURCE/NAME.bin inside {data}/",
        )
        check(entry["path"] not in paths, manifest_path, f"is damaged {at}: {entry['path']} is listed twice")
        check(
            entry["tokenizer"] == tokenizer.fingerprint(),
            manifest_path,
            f"{at} was made with another tokenizer",
        )
        check(
            entry["bytes"] == 2 * entry["tokens"],
            manifest_path,
            f"is damaged {at}: bytes of {entry['path']} are not twice its tokens",
        )
        paths.add(entry["path"])
        entries.append(entry)
    check(entries, manifest_path, "is empty")

    try:
        mixture = json.loads(mixture_path.read_bytes())
        shares = mixture["weights"]
        ok = (
            mixture["stage"] == stage
            and isinstance(mixture["seed"], int)
            and isinstance(mixture["groups"], dict)
        )
        ok = ok and all(w >= 0 for w in shares.values()) and abs(sum(shares.values()) - 1) < 1e-6
        ok = ok and mixture["tokenizer"] == tokenizer.fingerprint()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ok = False
    check(ok, mixture_path, "is missing or damaged")
    trained = {entry["source"] for entry in entries if entry["split"] == "train"}
    for source, share in shares.items():
        check(
            share == 0 or source in trained,
            mixture_path,
            f"gives weight to {source!r}, of which the manifest has no training shard",
        )
    # catches what no other check can: an edited split, source, or a line taken out
    recorded = mixture.get("manifest_sha256", sha256(manifest))
    check(recorded == sha256(manifest), manifest_path, "was changed after it was written")
    if not shards:
        return entries, mixture

    for entry in (
        entries
    ):  # all the cheap checks first: a missing file should not take an hour of hashing to be noticed
        for path, size in shard_files(data, entry):
            check(path.is_file(), path, "is missing")
            found = path.stat().st_size
            check(found == size, path, f"has {found} bytes where the manifest says {size}")
    if not verify:
        return entries, mixture
    total = sum(entry["bytes"] for entry in entries)
    with tqdm(
        total=total, desc="verifying", unit="B", unit_scale=True, leave=False, disable=total < 2e8
    ) as progress:
        for entry in entries:
            (tokens_path, _), (idx_path, _) = shard_files(data, entry)
            tokens, offsets = tokens_path.read_bytes(), idx_path.read_bytes()
            check(
                sha256(tokens) == entry["sha256"],
                tokens_path,
                "was changed: its SHA-256 is not the manifest's",
            )
            check(
                sha256(offsets) == entry["idx_sha256"],
                idx_path,
                "was changed: its SHA-256 is not the manifest's",
            )
            tokens, offsets = np.frombuffer(tokens, "<u2"), np.frombuffer(offsets, "<i8")
            rising = offsets[0] == 0 and offsets[-1] == len(tokens) and bool(np.all(np.diff(offsets) > 0))
            check(rising, idx_path, f"does not rise from 0 to the {len(tokens)} tokens of its shard")
            ended = bool(np.all(tokens[offsets[1:] - 1] == tokenizer.EOT))
            check(ended, tokens_path, "has documents that do not end in an end-of-text token")
            known = tokens.max(initial=0) <= tokenizer.END
            check(known, tokens_path, f"has token ids beyond {tokenizer.END}, the tokenizer's last")
            progress.update(entry["bytes"])
    return entries, mixture


def shard_files(data, entry):
    """-> ((path of the tokens, its size), (path of the offsets, its size)) as the manifest's entry says they must be."""
    path = data / entry["path"]
    return (path, 2 * entry["tokens"]), (path.with_suffix(".idx"), 8 * (entry["documents"] + 1))


def unlisted_files(data):
    """
    The files of shards that no manifest lists: of a build that was killed, of a stage that was deleted.
    ValueError if a manifest is damaged, because what it lists cannot be known then.
    """
    advice = "; nothing is cleaned before it is mended or deleted"
    for folder in {path.parent for name in FROZEN_FILES for path in data.glob(f"stages/*/*/{name}")}:
        if not folder.name.endswith(".tmp"):
            check_snapshot(folder, folder.parent.name, folder.name, advice)
    for manifest in data.glob("stages/*/manifest.jsonl"):
        check_manifest(data, manifest.parent, manifest.parent.name, advice, verify=False, shards=False)
    listed = listed_shards(data)
    listed |= {path.removesuffix(".bin") + ".idx" for path in listed}
    found = sorted([*data.glob("processed/*/*.bin"), *data.glob("processed/*/*.idx")])
    return [p for p in found if p.relative_to(data).as_posix() not in listed]


# ---------------------------------------------------------------------------------------------------------------------------------
# freezing


def freeze(data, stage, tag):
    """Freeze the stage as it is now under a tag. -> its folder. ValueError if anything is wrong with it, or if the tag is taken."""
    split_name(f"{stage}:{tag}")
    source, folder = data / "stages" / stage, data / "stages" / stage / tag
    entries, mixture = read_manifest(data, stage)
    manifest_sha256, mixture_sha256 = (
        sha256_file(source / "manifest.jsonl"),
        sha256_file(source / "mixture.json"),
    )
    if folder.exists():
        frozen = check_snapshot(folder, stage, tag, "; freeze under another tag")
        if (frozen["manifest_sha256"], frozen["mixture_sha256"]) == (manifest_sha256, mixture_sha256):
            return folder
        raise ValueError(
            f"the tag {tag!r} of {stage!r} is taken by another state of it, frozen on {frozen['created']}: choose another tag"
        )
    metadata = {n: read_json(data / "metadata" / stage / f"{n}.json") for n in ("provenance", "filters")}
    snapshot = {
        "stage": stage,
        "tag": tag,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tokenizer": mixture["tokenizer"],
        "manifest_sha256": manifest_sha256,
        "mixture_sha256": mixture_sha256,
        "shards": len(entries),
        "tokens": sum(e["tokens"] for e in entries),
        "documents": sum(e["documents"] for e in entries),
        **metadata,
    }
    files = {name: (source / name).read_bytes() for name in FROZEN_FILES[:2]}
    install_frozen(folder, {**files, "snapshot.json": to_json(snapshot).encode()})
    return folder


def install_frozen(folder, files):
    """Write {name: bytes} as a folder that is there completely or not at all."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    for name, content in files.items():
        write(beside / name, content)
    os.rename(beside, folder)
