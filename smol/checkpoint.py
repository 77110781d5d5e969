"""
Checkpoints: written so that a crash never costs the last good one, read without trusting them, published on
the hub.

A checkpoint is a dict of tensors and plain values, which torch.load(weights_only=True) reads:

    format       CHECKPOINT_FORMAT
    model        'dense' or 'trm'
    model_config the fields of that file's Config
    weights      state dict
    ema          the averaged weights that evaluation uses, or None
    tokenizer    fingerprint of the tokenizer it was trained with
    config       the settings of the run
    train        what the run needs to go on: iter, optimizers, scaler, loader, carries, and its figures

A repository on the hub holds one run, as the hub's own tools expect it: model.safetensors has the weights
that evaluation uses, config.json the model's Config, for Model.from_pretrained("USER/NAME"), README.md is the
model card; with push_full there is ckpt.pt, from which the run goes on. Each published step is one commit,
whose files are all of that step. Tokens are the hub client's business (`hf auth login`, or HF_TOKEN).

A checkpoint is named by its file, a folder that holds one, or USER/NAME or USER/NAME@REVISION on the hub.

Read next: train.py, which writes them; eval_arc.py, which starts with `load_model`.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import zipfile
from concurrent import futures
from dataclasses import fields
from pathlib import Path

import safetensors.torch
import torch

from model_dense import one_line
from smol import runtime
from smol import tokenizer as tok
from smol.snapshots import NAME, plainly, repo_name, sha256_file

CHECKPOINT_FORMAT = 8
MODEL_FILES = {"dense": "model_dense", "trm": "model_trm"}
WEIGHTS = "model.safetensors"  # the hub's name for it


def make_model(name, settings):
    """
    The model of MODEL_FILES[name] with those of `settings` (a dict; None means the default) that its Config
    has. ValueError for another name, or for settings that it cannot be built with.
    """
    if name not in MODEL_FILES:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODEL_FILES))}, got {name!r}")
    module = importlib.import_module(MODEL_FILES[name])
    known = {f.name for f in fields(module.Config)}
    return module.Model(module.Config(**{k: v for k, v in settings.items() if k in known and v is not None}))


# -----------------------------------------------------------------------------
# one file


def save(checkpoint, path, before=None):
    """
    Write beside, flush to disk, rename: whatever happens on the way, `path` is a whole checkpoint. before: a
    name under which the one that `path` holds now is kept. OSError, and nothing left behind, on a full disk.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = f"{path}.tmp"
    try:
        with open(beside, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if before and os.path.exists(path):
            second_name(path, before)
        os.replace(beside, path)
    except RuntimeError as e:  # how torch.save reports that a write failed
        cause = e.__context__
        raise (cause if isinstance(cause, OSError) else OSError(f"writing {beside} failed: {e}")) from None
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def previous(path):
    """out/ckpt.pt -> out/ckpt_prev.pt, the checkpoint that was there before the last save."""
    return "_prev".join(os.path.splitext(path))


def second_name(path, other):
    """The file `path` under the name `other` as well: a link, or a copy where a file has but one name."""
    beside = f"{other}.tmp"
    Path(beside).unlink(missing_ok=True)
    try:
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)
        os.replace(beside, other)
    finally:
        Path(beside).unlink(missing_ok=True)  # also of two names of one file, which replace() leaves alone


def local_file(name):
    """A checkpoint's name, see above -> the path of its file, which is downloaded. ValueError in one line."""
    name = str(name)
    if os.path.isdir(name):
        published = os.path.join(name, WEIGHTS)
        return published if os.path.isfile(published) else os.path.join(name, "ckpt.pt")
    of_hub = re.fullmatch(rf"{NAME}/{NAME}(@.+)?", name) and not name.endswith((".pt", ".safetensors"))
    if of_hub and not os.path.isfile(name):
        return str(download(name, WEIGHTS, "config.json", "log.jsonl", "evals.jsonl") / WEIGHTS)
    return name


def load(name):
    """
    -> the checkpoint dict. FileNotFoundError or ValueError for a missing file, a file that is damaged or no
    checkpoint, and for what `fault_of` finds. It names the checkpoint before, if there is one.
    """
    path = local_file(name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist: name a ckpt.pt, or USER/NAME on the hub")
    try:
        if path.endswith(".safetensors"):
            checkpoint = read_published(path)
        else:
            with zipfile.ZipFile(path) as f:  # torch.load reads tensors without looking at their checksums
                if f.testzip() is not None:
                    raise ValueError("checksum")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        wrong = fault_of(checkpoint)
    except Exception as e:  # noqa: BLE001 (bytes that are no checkpoint fail in any way they like)
        wrong = f"is not a checkpoint, or it is damaged ({type(e).__name__})"
    if wrong:
        older = previous(path)
        hint = f"; to go on from the one before it: mv {older} {path}" if os.path.exists(older) else ""
        raise ValueError(f"{path} {wrong}{hint}")
    return checkpoint


def fault_of(checkpoint):
    """What is wrong with what a file held, as the end of a sentence, or None."""
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        return "is not a checkpoint that train.py wrote"
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        return f"has checkpoint format {checkpoint['format']!r}, and this version reads {CHECKPOINT_FORMAT}"
    if checkpoint["tokenizer"] != tok.fingerprint():
        return "was trained with another tokenizer: its token ids mean something else here"
    if name := not_finite(checkpoint["weights"]) or not_finite(checkpoint["ema"]):
        return f"has weights that are not finite ({name})"
    return None


def read_published(path):
    """The same of model.safetensors and config.json, from `push` or from a model's save_pretrained."""
    about = json.loads(Path(path).with_name("config.json").read_bytes())
    return {
        "format": CHECKPOINT_FORMAT,
        "model": about.get("model") or ("trm" if "n_latent" in about else "dense"),
        "model_config": about,
        "weights": safetensors.torch.load_file(path),
        "ema": None,
        "tokenizer": about.get("tokenizer", tok.fingerprint()),
        "train": about.get("train", {}),
    }


def not_finite(weights):
    """The name of the first of {name: tensor} that holds a value that is not finite, or None."""
    if not weights:
        return None
    finite = torch.stack([w.isfinite().all() for w in weights.values()]).tolist()
    return None if all(finite) else list(weights)[finite.index(False)]


def load_weights(model, weights, path):
    """Copy a state dict in. ValueError in one line where it is another model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit this model: {one_line(e)}") from None


def load_model(path, device="cpu"):
    """-> (model in evaluation mode, with the averaged weights if any, checkpoint). Raises as `load`."""
    checkpoint = load(path)
    model = make_model(checkpoint["model"], checkpoint["model_config"])
    load_weights(model, checkpoint["ema"] or checkpoint["weights"], path)
    return model.to(device).eval(), checkpoint


# -----------------------------------------------------------------------------
# a run: where it begins, what it saves, how it goes on


def path_of(config):
    """Of the checkpoint of a run with these settings."""
    return os.path.join(config["out_dir"], "ckpt.pt")


def begin(config, anew):
    """As `starting_point`, in all processes, after an empty out_dir got what push_to holds."""
    init_from, push_to, path = config["init_from"], config["push_to"], path_of(config)
    with runtime.errors_agree():
        if push_to and runtime.local_rank == 0 and not os.path.exists(path):
            if init_from == "resume":
                pull(push_to, config["out_dir"])
            elif init_from == "auto" and not anew and is_published(push_to):
                raise ValueError(f"{push_to} holds a run: --init_from=resume goes on, =scratch begins anew")
    with runtime.errors_agree():
        return starting_point(init_from, path, anew)


def starting_point(init_from, path, anew):
    """
    Where a run whose checkpoint is `path` begins -> (checkpoint, its path, whether the run goes on from it);
    (None, None, False) from scratch. It goes on with 'resume', with 'auto', and with the checkpoint that it
    has begun with: the same command, again. ValueError where `path` is another run's. anew: replace it.
    """
    held = os.path.exists(path) and not anew
    if init_from == "resume" or (held and init_from != "scratch"):
        checkpoint = load(path)
        if init_from in ("resume", "auto", checkpoint["train"].get("began_with")):
            return checkpoint, path, True
    if held:
        raise ValueError(f"{path} exists: --init_from=resume goes on, --overwrite=True begins anew")
    if init_from in ("auto", "scratch"):
        return None, None, False
    return load(init_from), init_from, False


def check_is_stage_0(config):
    """ValueError where out_dir holds a checkpoint of anything else: stage 0 replaces what is there."""
    path = path_of(config)
    if os.path.exists(path) and not load(path).get("config", {}).get("sanity"):
        raise ValueError(f"{path} is of no stage 0: use another --out_dir, or --overwrite=True")


def check_same_data(before, now):
    """ValueError where the loader's position of a checkpoint means nothing in the data that are there."""

    def shown(data):
        teacher = f", teacher {data['teacher']}" if "teacher" in data else ""
        return f"{data['stage']}:{data['tag']} (shards {data['shards'][:12]}{teacher})"

    if any(before.get(k) != now.get(k) for k in ("shards", "tag", "snapshot", "teacher")):
        raise ValueError(
            f"this run has learned from {shown(before)}, and now there is {shown(now)}: name the same data, "
            "or begin another run with its weights (--init_from=PATH, another --out_dir)"
        )


def load_optimizers(optimizers, name, train):
    """What they have averaged, not their settings: those are the config's. ValueError for another `name`."""
    if "optimizers" not in train:
        raise ValueError("published weights come without their optimizer: add --init_optimizer=False")
    if train.get("optimizer_name") != name:
        raise ValueError(f"the checkpoint is of optimizer {train.get('optimizer_name')!r}, not {name!r}")
    for optimizer, state in zip(optimizers, train["optimizers"]):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})


def gather_carries(carries, device):
    """{(number, source, length): carry} of each process -> {'number/source/length': carry} on rank 0."""
    mine, everyones = sorted(carries), {}
    most = max(runtime.sums([len(mine) * (r == runtime.rank) for r in range(runtime.world_size)], device))
    for i in range(int(most)):  # one by one: all carries of all processes at once can be gigabytes
        part = {"/".join(map(str, mine[i])): carries[mine[i]]} if i < len(mine) else {}
        for some in runtime.gather(part):
            everyones.update(some)
    return everyones


def restore(start, run, config, scaler):
    """Counters (into `run`) and scale of a run that goes on -> (own carries, which settings changed)."""
    state, was = start["train"], start["config"]
    run.update({k: state[k] for k in run})
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    changed = [f"{k}={v!r} (was {was.get(k)!r})" for k, v in config.items() if was.get(k) != v]
    shape = ("batch_size", "block_size", "gradient_accumulation_steps", "batch_tokens", "carry_turns")
    carries = {}
    if all(was.get(k) == config.get(k) for k in shape):
        for key, carry in state["carries"].items():
            number, source, length = key.split("/")
            if int(number) % runtime.world_size == runtime.rank:  # of a batch that is now its own
                carries[int(number), source, int(length)] = carry
    return carries, changed


def save_run(train, config, net, model, average, optimizers, scaler, carries, device):
    """
    Write the checkpoint of a run, keep the one before, and draw loss.png. train: the counters of the run, its
    data and the position of its loader. All processes call this. Returns whether it is on disk.
    """
    saved, path, step = True, path_of(config), train["iter"]
    carries = gather_carries(carries, device)
    if runtime.master:
        whole = {
            "format": CHECKPOINT_FORMAT,
            "model": model,
            "model_config": dict(vars(net.config)),
            "weights": net.state_dict(),
            "ema": average,
            "tokenizer": tok.fingerprint(),
            "config": config,
            "train": {
                **train,
                "optimizer_name": config["optimizer"],
                "optimizers": [o.state_dict() for o in optimizers],
                "scaler": scaler.state_dict(),
                "carries": carries,
            },
        }
        try:
            save(whole, path, previous(path))
        except OSError as e:
            saved = False
            why = e.strerror or e
            runtime.print0(f"the checkpoint of step {step} could not be saved ({why}); training goes on")
        keep_every = config.get("keep_every")
        if saved and keep_every and step % keep_every == 0:
            kept = os.path.join(config["out_dir"], f"ckpt_{step}.pt")
            try:
                second_name(path, kept)
            except OSError as e:
                runtime.print0(f"{kept} could not be written ({e.strerror or e}); {path} was")
        with contextlib.suppress(OSError, ValueError):
            runtime.draw_losses(config["out_dir"])
    return runtime.sums([saved], device)[0] == runtime.world_size


# -----------------------------------------------------------------------------
# the hub

BESIDES = ("log.jsonl", "evals.jsonl", "loss.png")
FIGURES = ("iter", "seconds", "tokens", "val_loss", "val_losses", "data")  # of "train": not for going on
PATIENCE = 900.0  # seconds that a run waits at its end for the last push


def download(name, *files):
    """
    What the hub has of `files` in USER/NAME or USER/NAME@REVISION, in its client's cache -> their folder.
    ValueError where the first is missing or a large one is not what its hash says.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    with plainly(f"downloading {name}"):
        folder = Path(snapshot_download(repo_name(repo), revision=revision or None, allow_patterns=files))
    for file in filter(Path.is_file, map(folder.joinpath, files)):
        blob = file.resolve()  # a large one is named by its SHA-256
        if len(blob.name) == 64 and sha256_file(blob) != blob.name:
            blob.unlink()
            raise ValueError(f"{file.name} of {name} is not what its hash says: run it again")
    if not (folder / files[0]).is_file():
        hint = f": it was pushed without push_full; --init_from={name} takes its weights"
        raise ValueError(f"{name} has no {files[0]} on the hub{hint if files[0] == 'ckpt.pt' else ''}")
    return folder


def pull(name, out_dir):
    """A published run into out_dir, the checkpoint last: it says that all is there. Raises as `download`."""
    folder = download(name, "ckpt.pt", *BESIDES)
    os.makedirs(out_dir, exist_ok=True)
    for file in filter(Path.is_file, map(folder.joinpath, BESIDES)):
        shutil.copyfile(file, Path(out_dir, file.name))
    second_name((folder / "ckpt.pt").resolve(), Path(out_dir, "ckpt.pt"))
    runtime.print0(f"{out_dir} holds what {name} has")


def is_published(name):
    """Whether there is a run in this repository; a hub that does not answer is no reason not to train."""
    from huggingface_hub import file_exists

    with contextlib.suppress(Exception):
        return file_exists(repo_name(name), WEIGHTS)
    return False


def card(repo, at, evals):
    """The model card: which model, on what it was trained, how well it does, how to use it."""
    train, data = at["train"], at["train"]["data"]
    route = "B, a Tiny Recursive Model" if at["model"] == "trm" else "A, a decoder with Kimi Delta Attention"
    size = sum(w.numel() for w in at["weights"].values())
    frozen = f"tag `{data['tag']}`, snapshot `{data['snapshot'][:12]}`" if data["tag"] else "not frozen"
    rows = [f"| {name} | validation loss | {loss:.3f} nats |" for name, loss in train["val_losses"].items()]
    for evaluated in evals[-1:]:
        solved = {suite: s for suite, s in evaluated["suites"].items() if "solved" in s}
        of = f"solved after step {evaluated['iter']:,}"
        rows += [f"| {suite} | {of} | {s['solved']} of {s['total']} |" for suite, s in solved.items()]
    table = "\n".join(rows)
    return f"""---
license: mit
library_name: smol-llm
tags: [smol-llm, arc-agi, model_hub_mixin, pytorch_model_hub_mixin]
pipeline_tag: text-generation
---
# {repo.split("/")[1]}

A smol-llm of Route {route}, after step {train["iter"]:,} of {at["config"]["max_iters"]:,}: {size / 1e6:.1f}M
parameters, {train["tokens"]:,} tokens of `{data["stage"]}`, {frozen}: {", ".join(data["sources"])}.

| source or suite | figure | value |
|---|---|---|
{table}

![losses of the run](loss.png)

In a checkout of smol-llm:

    python eval_arc.py {repo}
    python train.py CONFIG --init_from={repo}

    from {MODEL_FILES[at["model"]]} import Model
    model = Model.from_pretrained("{repo}")
"""


def create(repo):
    """Make the repository, private, if it is not there. ValueError in one line if that cannot be."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with plainly(f"cannot push to {repo}"):
        HfApi().create_repo(repo_name(repo), private=True, exist_ok=True)


def on_this_machine(name, value):
    """Whether a setting names a file or folder here, which is nobody else's business."""
    path = str(value).removeprefix("hf:")
    is_path = name in ("init_from", "teacher") and os.path.exists(path)
    return name.endswith("_dir") or os.path.isabs(path) or is_path


def push(folder, repo, full):
    """
    Publish the run in a folder, in one commit; of what is there already, nothing is sent. full: with ckpt.pt;
    without, one that is there, of an earlier step, is taken away. Returns a line. ValueError, OSError.
    """
    from huggingface_hub import HfApi

    create(repo)
    folder, beside = Path(folder), Path(folder, "push")  # what goes to the hub
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    beside.mkdir()
    try:
        # under another name: the next save takes nothing from under the reader
        second_name(folder / "ckpt.pt", beside / "ckpt.pt")
        at = load(beside / "ckpt.pt")
        for file in filter(Path.is_file, map(folder.joinpath, BESIDES)):
            shutil.copyfile(file, beside / file.name)
        train = {k: v for k, v in at["train"].items() if k in FIGURES}
        settings = {k: v for k, v in at["config"].items() if not on_this_machine(k, v)}
        about = {"model": at["model"], "tokenizer": at["tokenizer"], "train": train, "settings": settings}
        (beside / "config.json").write_text(json.dumps({**at["model_config"], **about}, indent=2))
        (beside / "README.md").write_text(card(repo, at, runtime.read_log(folder / "evals.jsonl")))
        safetensors.torch.save_file(at["ema"] or at["weights"], beside / WEIGHTS, {"format": "pt"})
        at = None  # sending takes minutes, beside a training that needs the memory
        if not full:
            (beside / "ckpt.pt").unlink()
        message = f"step {train['iter']}"
        with plainly(f"pushing {message} to {repo}"):
            how = {"delete_patterns": "ckpt.pt", "commit_message": message}
            commit = HfApi().upload_folder(repo_id=repo, folder_path=beside, **how).oid
    finally:
        shutil.rmtree(beside)
    return f"{message} is at {repo}, {'all of it' if full else 'weights alone'}, commit {commit[:12]}"


class Publication:
    """Pushes in a thread beside the training, one at a time: steps that end meanwhile are left out."""

    def __init__(self, config):
        self.repo = config["push_to"] if runtime.master else ""
        self.how = config["out_dir"], self.repo, config["push_full"]
        self.step = None  # the last one that was sent or is being sent
        self.thread = futures.ThreadPoolExecutor(1)
        self.future = self.thread.submit(create, self.repo) if self.repo else None  # a wrong login shows now

    def collect(self, wait=0.0):
        """Tell what has come of the push, if it has ended; wait so many seconds for that."""
        if self.future is None:
            return
        if futures.wait([self.future], wait).not_done:
            if wait:
                runtime.print0(f"not published: pushing to {self.repo} takes more than {wait:.0f} seconds")
            return
        try:
            if line := self.future.result():
                runtime.print0(line)
        except Exception as e:  # noqa: BLE001 (whatever it is, training goes on)
            runtime.print0(f"not published: {e}")
            self.step = None  # so that the end of the run tries once more
        self.future = None

    def start(self, step):
        """Push ckpt.pt, which is of this step, unless another is being pushed."""
        self.collect()
        if self.repo and self.future is None:
            self.step, self.future = step, self.thread.submit(push, *self.how)

    def end(self, step):
        """The run is over: wait until the step that it ends with is published."""
        self.collect(PATIENCE)
        if self.future is None and self.step != step:
            self.start(step)
            self.collect(PATIENCE)
