"""
Checkpoints to the hub and back. `train.py --push_to=USER/NAME` starts the first of these by itself, after every checkpoint.

    python -m smol.publish push out/route_a_stage1 --repo=USER/NAME               the weights, and the run's log, curve and settings
    python -m smol.publish push out/route_a_stage1 --repo=USER/NAME --full=True   the whole checkpoint, with which a run goes on elsewhere
    python -m smol.publish pull USER/NAME --out_dir=out/route_a_stage1            the newest; USER/NAME:REVISION for another
    python -m smol.publish --help                                                 the settings

A repository holds one run: ckpt.pt, config.json, log.jsonl, loss.png, a card. Every push is one commit ("step 2000"), in which these
belong together, so a push that breaks off leaves what was there, and run again it sends only what is missing (compared by hash). Earlier
steps stay in the repository's history. A checkpoint of weights alone is a checkpoint like any other to sample.py, eval_arc.py and
--init_from=PATH; only --init_from=resume needs a full one.

Pulling believes nothing: the file must have the hash that the hub announced, and be a checkpoint that opens without running code from it,
before it takes its place. Tokens are the hub client's business (`hf auth login`, or HF_TOKEN); nothing here reads or shows them.

Read next: snapshots.py, which does the same for data; checkpoint.py, what is in the file.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import configurator
from smol.snapshots import files_of, git_hash, plainly, repo_name, sha256_file

repo = ""  # USER/NAME on the hub
full = False  # push the whole checkpoint: optimizer, carries, place in the data, three times the weights; what --init_from=resume needs
private = True  # make the repository private if it is new
checkpoint = ""  # push this file instead of DIR/ckpt.pt
out_dir = ""  # pull: where to
overwrite = False  # pull: replace another ckpt.pt there

PATIENCE = 900.0  # seconds that train.py waits at its end for a push: a session on Kaggle has that left after max_hours=11.5
BESIDES = ("config.json", "log.jsonl", "loss.png")
FIGURES = (
    "iter",
    "seconds",
    "tokens",
    "val_loss",
    "val_losses",
    "tokens_per_second",
    "data",
)  # of "train", what is not for going on


def card(repo, at):
    """The model card: which model, on what it was trained, how well it does, how to use it."""
    train, settings = at["train"], at["config"]
    data = train["data"]
    losses = "".join(f"| {name} | {loss:.3f} |\n" for name, loss in (train["val_losses"] or {}).items())
    size = sum(w.numel() for w in at["weights"].values())
    kept = (
        "the whole checkpoint: `--init_from=resume` goes on from it"
        if "optimizers" in train
        else "the weights alone"
    )
    header = {"license": "mit", "tags": ["smol-llm", "arc-agi", "pytorch"], "pipeline_tag": "text-generation"}
    return (
        "---\n"
        + "\n".join(f"{k}: {json.dumps(v)}" for k, v in header.items())
        + f"""
---
# {repo.split("/")[1]}

A smol-llm of Route {"B, a Tiny Recursive Model" if at["model"] == "trm" else "A, a decoder with Kimi Delta Attention"}, after step
{train["iter"]:,} of {settings["max_iters"]:,}: {size / 1e6:.1f}M parameters, {train["tokens"] / 1e9:.3f}B tokens
of `{data["stage"]}`, {f"tag `{data['tag']}`, snapshot `{data['snapshot'][:12]}`" if data["tag"] else "not frozen"}. `ckpt.pt` is {kept}.

    python -m smol.publish pull {repo} --out_dir=out/pulled
    python sample.py out/pulled/ckpt.pt --prompt="def main():"
    python eval_arc.py out/pulled/ckpt.pt

| source | validation loss, nats |
|---|---|
{losses}
`config.json` has every setting of the run, `log.jsonl` every figure.
"""
    )


def same(file, path):
    """Whether a file on the hub has the bytes of the one at `path`."""
    if file is None or file.size != os.path.getsize(path):
        return False
    return file.lfs.sha256 == sha256_file(path) if file.lfs else file.blob_id == git_hash(path)


def create(repo, private):
    """Log in and make the repository, if it is not there. ValueError in one line if that cannot be."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    repo_name(repo)
    with plainly(f"cannot log in to the hub to push to {repo}"):
        api.whoami()
    with plainly(f"cannot create {repo}"):
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
    return api


def push(folder, repo, full, private, path=""):
    """A run's checkpoint and what lies beside it, in one commit. ValueError or OSError in one line if that cannot be."""
    from huggingface_hub import CommitOperationAdd

    from smol import checkpoint as ckpt  # and PyTorch with it: a second or two that `create` can do without

    path = path or os.path.join(folder, "ckpt.pt")
    at = ckpt.load(path)
    step = at["train"]["iter"]
    work = os.path.join(folder, ".push")
    shutil.rmtree(work, ignore_errors=True)  # of a push that was killed
    os.makedirs(work)
    try:
        if not full:
            at["train"] = {k: v for k, v in at["train"].items() if k in FIGURES}
            path = os.path.join(work, "ckpt.pt")
            ckpt.save(at, path)
        with open(os.path.join(work, "README.md"), "w", encoding="utf-8") as f:
            f.write(card(repo_name(repo), at))
        at = None  # sending takes minutes, beside a training that needs the memory
        api = create(repo, private)
        ours = {"ckpt.pt": path, "README.md": os.path.join(work, "README.md")}
        ours |= {
            name: os.path.join(folder, name) for name in BESIDES if os.path.isfile(os.path.join(folder, name))
        }
        with plainly(f"cannot read {repo}"):
            there = files_of(api, repo, None, "model")
        operations = [
            CommitOperationAdd(path_in_repo=n, path_or_fileobj=p)
            for n, p in ours.items()
            if not same(there.get(n), p)
        ]
        if not operations:
            print(f"step {step} is at {repo} already")
            return
        with plainly(f"pushing step {step} to {repo}"):
            commit = api.create_commit(repo, operations, commit_message=f"step {step}", repo_type="model").oid
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"step {step} is at {repo}, {'all of it' if full else 'weights alone'}, commit {commit[:12]}")


def pull(name, out_dir, overwrite):
    """Bring USER/NAME or USER/NAME:REVISION into out_dir. ValueError or OSError in one line if that cannot be."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    from smol import checkpoint as ckpt

    repo, _, revision = name.partition(":")
    repo_name(repo)
    if not out_dir:
        raise ValueError(f"say where to: python -m smol.publish pull {name} --out_dir=out/pulled")
    disable_progress_bars()
    api = HfApi()
    with plainly(f"cannot find {name}"):
        commit = api.model_info(repo, revision=revision or None).sha
        files = files_of(api, repo, commit, "model")
    if "ckpt.pt" not in files:
        raise ValueError(f"{name} has no ckpt.pt: it is not a repository that publish.py made")
    place = Path(out_dir) / "ckpt.pt"
    if place.is_file() and not same(files["ckpt.pt"], place) and not overwrite:
        raise ValueError(
            f"{place} is there already and is another checkpoint: choose another --out_dir, or --overwrite=True"
        )
    waiting = Path(out_dir) / ".pull"  # kept when a download breaks off: run again, it goes on from there
    for path in ("ckpt.pt", *BESIDES):
        if path not in files:
            continue
        with plainly(f"downloading {path} of {name}"):
            found = Path(hf_hub_download(repo, path, repo_type="model", revision=commit, local_dir=waiting))
        if not same(files[path], found):
            found.unlink()
            raise ValueError(f"{path} of {name} does not have the hash that the hub announced: run it again")
    at = ckpt.load(waiting / "ckpt.pt")
    for path in (*BESIDES, "ckpt.pt"):  # the checkpoint last: it says that all is there
        if path in files:
            os.replace(waiting / path, Path(out_dir) / path)
    shutil.rmtree(waiting)
    on = (
        "--init_from=resume goes on from it"
        if "optimizers" in at["train"]
        else f"weights alone: --init_from={place} starts from them"
    )
    print(f"{place} is step {at['train']['iter']} of {name}, commit {commit[:12]}; {on}")


# ---------------------------------------------------------------------------------------------------------------------------------
# for train.py: a process beside the training


def environment_alone():
    """Ours, for a process that is not one of torchrun's."""
    return {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")
    }


def begin(out_dir, repo, full, ckpt_path=None):
    """
    Start a push of the checkpoint at ckpt_path (None: make the repository, so that a wrong login shows at once) in a process of its own,
    which a training need not wait for. -> (process, the name under which it reads the checkpoint). Raises OSError where it cannot have one.
    """
    what = ["push", out_dir, f"--full={full}"] if ckpt_path else ["create"]
    command = [sys.executable, "-m", "smol.publish", *what, f"--repo={repo}"]
    link = None
    if ckpt_path:
        from smol import checkpoint as ckpt

        link = os.path.join(out_dir, "ckpt.push")
        ckpt.second_name(
            ckpt_path, link
        )  # the next checkpoint replaces the first name, and takes nothing from under the reader
        command.append(f"--checkpoint={link}")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    own = environment_alone() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=own
    )
    return process, link


def outcome(begun, wait=0.0):
    """What came of it, in a line ("" when there is nothing to say), or None while it goes on: after `wait` seconds, it is ended."""
    process, link = begun
    if process.poll() is None and not wait:
        return None
    try:
        lines = process.communicate(timeout=wait or None)[0].strip().splitlines()
    except subprocess.TimeoutExpired:
        process.kill()
        lines = [f"error: it took more than {wait:.0f} seconds"] if process.wait() else []
    if link:
        with contextlib.suppress(FileNotFoundError):
            os.remove(link)
        shutil.rmtree(os.path.join(os.path.dirname(link), ".push"), ignore_errors=True)  # where it was killed
    if process.returncode == 0:
        return lines[-1] if lines else ""
    return (
        f"not published: {lines[-1].removeprefix('error: ') if lines else f'exit code {process.returncode}'}"
    )


def main(argv):
    command, argument, rest = (argv[:1] or [""])[0], "", argv[1:]
    needs = {
        "push": "what to push: python -m smol.publish push out/route_a_stage1 --repo=USER/NAME",
        "pull": "what to pull: python -m smol.publish pull USER/NAME --out_dir=DIR",
        "create": "",
    }
    if "--help" in argv or "-h" in argv:
        print(configurator.help_text(globals()))
        return
    if command not in needs:
        sys.exit(f"error: unknown command {command!r}: push, pull (--help says more)")
    try:
        configurator.check_equals(globals(), rest)
    except ValueError as e:
        sys.exit(f"error: {e}")
    if needs[command]:
        if not rest or rest[0].startswith("-"):
            sys.exit(f"error: say {needs[command]}")
        argument, rest = rest[0], rest[1:]
    stray = [word for word in rest if not word.startswith("-")]
    if stray:
        sys.exit(f"error: cannot read {stray[0]!r}: write --key=value (--help lists the settings)")
    try:
        c = SimpleNamespace(**configurator.resolve(globals(), rest))
        if command == "pull":
            pull(argument, c.out_dir, c.overwrite)
        elif not c.repo:
            raise ValueError(f"say where to: python -m smol.publish {command} {argument} --repo=USER/NAME")
        elif command == "create":
            create(c.repo, c.private)
        else:
            push(argument, c.repo, c.full, c.private, c.checkpoint)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
