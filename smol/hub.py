"""
A frozen stage to the hub and back: `prepare.py push STAGE:TAG --repo=USER/NAME` and `prepare.py pull USER/NAME:TAG`.

A repository on the hub holds one stage; a tag of it is a tag of the stage. At a tag there are the three files of the frozen stage, its
shards under processed/ as they lie here, a dataset card, and nothing else.

Both can be interrupted anywhere and run again. Pushing sends only files that the repository does not have yet (compared by hash), moves
to the tag last, and never moves a tag. Pulling believes nothing: paths must lie under processed/, every file must have the hash that the
manifest says, the manifest the one that the snapshot says, and a tag that has moved since it was first pulled is refused. Nothing is
installed before all of it is right. Tokens are the hub client's business (`hf auth login`, or HF_TOKEN); nothing here reads or shows them.

Read next: snapshots.py, what a frozen stage is.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from tqdm import tqdm

from smol.snapshots import (
    FROZEN_FILES,
    NAME,
    check_manifest,
    check_snapshot,
    install_frozen,
    read_json,
    read_manifest,
    sha256_file,
    shard_files,
    split_name,
    to_json,
    write,
)

COMMIT_FILES, COMMIT_BYTES = 40, 2_000_000_000  # per commit: what an interrupted push repeats at most
BESIDES = ("README.md", ".gitattributes")  # what a repository may have beyond the stage


@contextlib.contextmanager
def plainly(doing):
    """Whatever the hub's client raises, as one line that says what was being done and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise ValueError(f"{doing}: not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{doing}: there is no such revision or tag on the hub") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{doing}: there is no such repository, or this login may not see it (`hf auth login`, or HF_TOKEN)"
        ) from None
    except errors.HfHubHTTPError as e:
        code = e.response.status_code
        advice = {
            401: "log in with `hf auth login`, or set HF_TOKEN",
            403: "this login may not do that",
            429: "too many requests: run it again later",
        }.get(code, "run it again to go on")
        raise ValueError(f"{doing}: the hub answered {code}; {advice}") from None
    except Exception as e:
        # RuntimeError: an upload that failed several times. The network's own errors are those of the client's HTTP library, of which
        # different versions use different ones.
        network = type(e).__module__.split(".")[0] in ("httpx", "httpx2", "requests", "urllib3")
        if not (network or isinstance(e, (errors.LocalEntryNotFoundError, RuntimeError))):
            raise
        reason = str(e.__cause__ or e).strip().split("\n")[0][:300]
        raise ValueError(f"{doing}: {reason or type(e).__name__}; run it again to go on") from None


def git_hash(path):
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_of(api, repo, revision, repo_type="dataset"):
    """{path: what the hub says of that file}"""
    entries = api.list_repo_tree(repo, recursive=True, repo_type=repo_type, revision=revision)
    return {entry.path: entry for entry in entries if hasattr(entry, "size")}  # folders have none


def repo_name(repo):
    if not re.fullmatch(rf"{NAME}/{NAME}", repo):
        raise ValueError(f"{repo!r} is not the name of a repository: write USER/NAME")
    return repo


def card(repo, stage, tag, snapshot, mixture):
    """The dataset card: what is in it, how it is used, under which licences. No viewer: there are no rows to view, only tokens."""
    sources = snapshot.get("provenance", {}).get("sources", {})
    rows = []
    for name, share in mixture["weights"].items():
        about = sources.get(name, {})
        train = about.get("train", {})
        where = about.get("repo") or "generated, or from an installed package"
        revision = f" at `{about['revision'][:12]}`" if about.get("revision") else ""
        rows.append(
            f"| {name} | {share:.1%} | {train.get('tokens', 0):,} | {where}{revision} | {about.get('licence', '')} |"
        )
    header = {
        "license": "other",
        "license_name": "mixed",
        "pretty_name": f"smol-llm {stage}",
        "language": ["en"],
        "task_categories": ["text-generation"],
        "tags": ["smol-llm", "arc-agi", "pretokenized"],
        "viewer": False,
    }
    front = "\n".join(f"{k}: {json.dumps(v)}" for k, v in header.items())
    return f"""---
{front}
---
# smol-llm {stage}:{tag}

{snapshot["tokens"]:,} tokens in {snapshot["documents"]:,} documents, ready for training: GPT-2's byte-pair encoding with reserved
ids for grids, uint16, in shards with document offsets. Shares: {", ".join(f"{g} {s:.1%}" for g, s in mixture["groups"].items())}.

    python prepare.py pull {repo}:{tag}
    python train.py config/route_a_{stage}.py --data={stage} --data_tag={tag}

| source | share | training tokens | from | licence |
|---|---|---|---|---|
{chr(10).join(rows)}

Every document was normalised, filtered, deduplicated and kept apart from evaluation data: `snapshot.json` has the counts by rule.
`manifest.jsonl` lists every shard with its SHA-256; test outputs of ARC-AGI's evaluation sets are in none of them, under any symmetry.
The licence of a document is that of its source; "none given" means that its publisher named none.
"""


# ---------------------------------------------------------------------------------------------------------------------------------


def push(data, name, repo, private):
    """Upload the frozen stage `name` (STAGE:TAG) as a dataset, and tag it there. ValueError in one line if that cannot be."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    stage, tag = split_name(name)
    if tag is None:
        raise ValueError(
            f"only a frozen stage is pushed: python prepare.py freeze {stage} --tag=v0.1, then push {stage}:v0.1"
        )
    if not repo:
        raise ValueError(f"say where to: python prepare.py push {name} --repo=USER/NAME")
    repo_name(repo)
    entries, mixture = read_manifest(data, stage, tag)
    folder = data / "stages" / stage / tag
    snapshot = check_snapshot(folder, stage, tag, "")
    ours = {name: folder / name for name in FROZEN_FILES}
    for entry in entries:
        for path, _ in shard_files(data, entry):
            ours[path.relative_to(data).as_posix()] = path

    disable_progress_bars()  # ours says more
    api = HfApi()
    with plainly(f"cannot log in to the hub to push to {repo}"):
        api.whoami()
    with plainly(f"cannot create {repo}"):
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
    with plainly(f"cannot read {repo}"):
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo, repo_type="dataset").tags}
        there = files_of(api, repo, tags.get(tag))

    def is_there(path):
        file = there.get(path)
        if file is None or file.size != ours[path].stat().st_size:
            return False
        return (
            file.lfs.sha256 == sha256_file(ours[path]) if file.lfs else file.blob_id == git_hash(ours[path])
        )

    if tag in tags:
        different = [path for path in ours if not is_there(path)]
        if different:
            raise ValueError(
                f"{repo} has a tag {tag!r} already, with another {different[0]}: a tag never moves; push under another one"
            )
        print(f"{name} is already at {repo}, tag {tag}")
        return

    missing = [path for path in ours if path not in FROZEN_FILES and not is_there(path)]
    total = sum(ours[path].stat().st_size for path in missing)
    with tqdm(total=total, desc=f"pushing to {repo}", unit="B", unit_scale=True) as progress:
        while missing:
            batch, size = [], 0
            while (
                missing
                and len(batch) < COMMIT_FILES
                and (not batch or size + ours[missing[0]].stat().st_size <= COMMIT_BYTES)
            ):
                size += ours[missing[0]].stat().st_size
                batch.append(missing.pop(0))
            operations = [
                CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(ours[path])) for path in batch
            ]
            with plainly(f"pushing {batch[0]} to {repo}"):
                api.create_commit(repo, operations, commit_message=f"Shards of {name}", repo_type="dataset")
            progress.update(size)
    # The stage's own files come in one commit, with which what belongs to earlier tags goes; at those tags it stays.
    stale = [path for path in there if path not in ours and path not in BESIDES]
    operations = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=str(ours[n])) for n in FROZEN_FILES]
    operations.append(
        CommitOperationAdd(
            path_in_repo="README.md", path_or_fileobj=card(repo, stage, tag, snapshot, mixture).encode()
        )
    )
    operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
    with plainly(f"pushing the manifest of {name} to {repo}"):
        commit = api.create_commit(repo, operations, commit_message=f"{name}", repo_type="dataset").oid
        api.create_tag(repo, tag=tag, revision=commit, repo_type="dataset", tag_message=f"smol-llm {name}")
    print(f"{name} is at {repo}, tag {tag}, commit {commit[:12]}: python prepare.py pull {repo}:{tag}")


def pull(data, name):
    """Download USER/NAME:TAG, verify everything, and put it in place as a frozen stage. -> (stage, tag). ValueError in one line if not."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    repo, _, tag = name.partition(":")
    repo_name(repo)
    if not tag:
        raise ValueError(f"say which tag: python prepare.py pull {repo}:v0.1")
    split_name(f"stage:{tag}")
    disable_progress_bars()
    api = HfApi()
    with plainly(f"cannot find {name}"):
        tags = [ref.name for ref in api.list_repo_refs(repo, repo_type="dataset").tags]
        if tag not in tags:
            raise ValueError(f"{repo} has no tag {tag!r}; it has {', '.join(tags) or 'none'}")
        commit = api.dataset_info(repo, revision=tag).sha
        there = {path: file.size for path, file in files_of(api, repo, commit).items()}

    log = data / "metadata" / "pulled.json"
    pulled = read_json(log)
    if pulled.get(name, commit) != commit:
        raise ValueError(
            f"the tag {tag!r} of {repo} has moved: it was commit {pulled[name][:12]} and is {commit[:12]} now; a frozen stage "
            f"never changes, so ask who moved it (or remove the line from {log} to accept it)"
        )

    waiting = data / "work" / "pull" / f"{repo.replace('/', '--')}-{commit[:12]}"

    def download(path):
        with plainly(f"downloading {path} of {name}"):
            return Path(hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=waiting))

    missing = [f for f in FROZEN_FILES if f not in there]
    if missing:
        raise ValueError(f"{name} is no frozen stage: {missing[0]} is missing there")
    for file in FROZEN_FILES:
        download(file)
    content = {file: (waiting / file).read_bytes() for file in FROZEN_FILES}
    try:
        stage = json.loads(content["snapshot.json"])["stage"]
        split_name(f"{stage}:{tag}")
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name} is no frozen stage: its snapshot.json is damaged") from None
    frozen = data / "stages" / stage / tag
    blame = f"; {name} is damaged on the hub"
    check = waiting / "frozen"  # apart from the shards that will lie beside
    for file, bytes_ in content.items():
        write(check / file, bytes_)
    check_snapshot(check, stage, tag, blame)
    entries, _ = check_manifest(data, check, stage, blame, verify=False, shards=False)
    if frozen.exists() and any(
        (frozen / file).read_bytes() != content[file]
        for file in FROZEN_FILES[:2]
        if (frozen / file).is_file()
    ):
        raise ValueError(
            f"{frozen} is there already and is another stage than {name}: a tag never changes; use another --data_dir"
        )

    wanted = {}
    for entry in entries:
        (tokens, tokens_size), (idx, idx_size) = shard_files(data, entry)
        wanted[entry["path"]] = tokens, tokens_size, entry["sha256"]
        wanted[idx.relative_to(data).as_posix()] = idx, idx_size, entry["idx_sha256"]
    for path, (_, size, _) in wanted.items():
        if path not in there:
            raise ValueError(f"{path} is missing at {name}{blame}")
        if there[path] != size:
            raise ValueError(
                f"{path} has {there[path]} bytes at {name} where the manifest says {size}{blame}"
            )
    extra = sorted(set(there) - set(wanted) - set(FROZEN_FILES) - set(BESIDES))
    if extra:
        raise ValueError(f"{extra[0]} at {name} does not belong to the stage{blame}")

    with tqdm(
        total=sum(size for _, size, _ in wanted.values()), desc=f"pulling {name}", unit="B", unit_scale=True
    ) as progress:
        for path, (place, size, digest) in wanted.items():
            if not (place.is_file() and place.stat().st_size == size and sha256_file(place) == digest):
                found = waiting / path
                if not (found.is_file() and sha256_file(found) == digest):
                    found.unlink(missing_ok=True)
                    found = download(path)
                if sha256_file(found) != digest:
                    found.unlink()
                    raise ValueError(
                        f"{path} of {name} does not have the SHA-256 that its manifest says{blame}"
                    )
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(found, "rb+") as f:
                    os.fsync(f.fileno())
                os.replace(found, place)
            progress.update(size)
    if not frozen.exists():
        install_frozen(frozen, content)
    read_manifest(data, stage, tag, verify=False)
    shutil.rmtree(waiting)
    write(log, to_json({**pulled, name: commit}))
    print(f"{stage}:{tag} is in {frozen}: {len(entries)} shards; train with --data={stage} --data_tag={tag}")
    return stage, tag
