"""
One checkpoint file: writing it so that a crash never costs the last good one, reading it without trusting it.

A checkpoint is a dict of tensors and plain values, so torch.load(weights_only=True) reads it and nothing in it can run:

    format       CHECKPOINT_FORMAT
    model        'dense' or 'trm', and model_config, the fields of that file's Config
    weights      state dict; ema, the averaged weights that evaluation uses, or None
    tokenizer    fingerprint of the tokenizer it was trained with
    train        what train.py needs to go on: iter, optimizer, scaler, loader, carries, ... and the figures it reports

Written by train.py. Read next: sample.py and eval_arc.py, which start with `load_model`.
"""

import contextlib
import glob
import importlib
import os
import pickle
import shutil
import zipfile
from dataclasses import fields

import torch

from smol import tokenizer as tok

# Route A is the same in all formats. In 1, Route B's test input lay beside the canvas; up to 2, its KDA read a puzzle as one line; up to
# 3, no tiles.
CHECKPOINT_FORMAT = 5
WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}  # they rename what they wrap
MODEL_FILES = {"dense": "model_dense", "trm": "model_trm"}


def make_model(name, settings):
    """
    The model of file MODEL_FILES[name], with those of `settings` (a dict; None means the default) that its Config has.
    Raises ValueError for another name, or settings it cannot be built with.
    """
    if name not in MODEL_FILES:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODEL_FILES))}, got {name!r}")
    module = importlib.import_module(MODEL_FILES[name])
    known = {f.name for f in fields(module.Config)}
    return module.Model(module.Config(**{k: v for k, v in settings.items() if k in known and v is not None}))


def save(checkpoint, path, before=None):
    """
    Write beside, flush to disk, rename: whatever happens on the way, `path` holds a whole checkpoint or the
    one before. before: a name under which the one that `path` holds now is kept. Raises OSError when it
    cannot be written, for example to a full disk; nothing is left behind then.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    for stale in glob.glob(f"{glob.escape(str(path))}.*.tmp"):  # of a process that was killed while it saved
        os.remove(stale)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if before and os.path.exists(path):
            keep(path, before)
        os.replace(beside, path)
        descriptor = os.open(folder, os.O_RDONLY)  # the name is on disk when the folder is
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except RuntimeError as e:  # how torch.save reports that a write failed: the cause, if it has one, is what a person can act on
        cause = e.__context__ if isinstance(e.__context__, OSError) else None
        raise OSError(
            *(cause.args if cause else (f"writing {beside} failed: {str(e).splitlines()[0]}",))
        ) from None
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def keep(path, before):
    """The file `path` becomes `before` too, and has one of the two names at every moment. Raises OSError."""
    beside = f"{path}.{os.getpid()}.before.tmp"
    try:
        os.link(path, beside)
    except OSError:  # files have one name here: until the new one comes there is `before` alone, for `newest`
        os.replace(path, before)
    else:
        os.replace(beside, before)


def previous(path):
    """out/ckpt.pt -> out/ckpt_prev.pt, the checkpoint that was there before the last save."""
    return "_prev".join(os.path.splitext(path))


def newest(path):
    """`path`, or the one before it where a save was killed between two names."""
    return previous(path) if os.path.exists(previous(path)) and not os.path.exists(path) else path


def not_finite(weights):
    """The name of the first of {name: tensor} that holds a value that is not finite, or None."""
    if not weights:
        return None
    finite = torch.stack([w.isfinite().all() for w in weights.values()]).tolist()
    return None if all(finite) else list(weights)[finite.index(False)]


def load_finite(path):
    """
    `load`, for whoever goes on from it: ValueError, in one line, also where a weight or an average is not
    finite. It names the checkpoint before where that one is sound.
    """
    try:
        checkpoint = load(path)
        wrong = not_finite(checkpoint["weights"]) or not_finite(checkpoint["ema"])
        if wrong:
            raise ValueError(f"{path} has weights that are not finite ({wrong}): no run can go on from it")
        return checkpoint
    except ValueError as e:
        problem = str(e)
    try:
        if not os.path.exists(previous(path)):
            raise ValueError
        step = load_finite(previous(path))["train"].get("iter")
    except (OSError, ValueError):
        raise ValueError(problem) from None
    advice = f"{previous(path)}, of step {step}, is sound: rename it to {path} and go on from there"
    raise ValueError(f"{problem}; {advice}")


def second_name(path, other):
    """The file `path` under the name `other` as well, whatever had it: a link, or a copy where a file has but one name. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(other)
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def load(path, map_location="cpu"):
    """
    -> the checkpoint dict. Raises FileNotFoundError or ValueError, in one line, for a missing file, a file that is no checkpoint,
    one of another format, or one trained with another tokenizer.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(f"checkpoint {path} {what}: give the path of a ckpt.pt that train.py wrote")
    with open(path, "rb"):  # not allowed to, or a broken disk: that is the system's to say
        pass
    try:
        with zipfile.ZipFile(path) as f:  # torch.load reads tensors without looking at their checksums
            if f.testzip() is not None:
                raise ValueError("checksum")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a checkpoint that train.py wrote: it holds Python objects besides tensors and plain values, which "
            "are not loaded because loading them can run code"
        ) from None
    except Exception as e:  # bytes that are no checkpoint fail in any way they like
        raise ValueError(
            f"{path} is not a checkpoint that can be read, or it is damaged ({type(e).__name__})"
        ) from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(f"{path} is {what_else(checkpoint)} not a checkpoint that train.py wrote")
    older = checkpoint["format"] in range(
        1, CHECKPOINT_FORMAT
    )  # they differ in how Route B reads puzzles, and in nothing else
    if older and checkpoint.get("model") == "dense":
        checkpoint["format"] = CHECKPOINT_FORMAT
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        newer = isinstance(checkpoint["format"], int) and checkpoint["format"] > CHECKPOINT_FORMAT
        advice = "update smol-llm to read it" if newer else "that is not a checkpoint of smol-llm"
        if older and checkpoint.get("model") == "trm":
            advice = "its Route B learned to read puzzles in another way, so train it again"
        raise ValueError(
            f"{path} has checkpoint format {checkpoint['format']!r}, and this version reads {CHECKPOINT_FORMAT}: {advice}"
        )
    missing = [
        k for k in ("model", "model_config", "weights", "ema", "tokenizer", "train") if k not in checkpoint
    ]
    if missing:
        raise ValueError(f"{path} is not a checkpoint that train.py wrote: it has no {', '.join(missing)}")
    if checkpoint["tokenizer"] != tok.fingerprint():
        raise ValueError(
            f"{path} was trained with another tokenizer ({str(checkpoint['tokenizer'])[:12]}...) than this one "
            f"({tok.fingerprint()[:12]}...): its token ids mean something else"
        )
    return checkpoint


def what_else(value):
    """What a file of PyTorch's without a format may be, in words: checkpoints that people have at hand."""
    if isinstance(value, dict) and {"model", "model_args"} <= value.keys():
        return "a checkpoint of nanoGPT, whose model is another than the two here; it is"
    if isinstance(value, dict) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
        return (
            "a bare state dict, which says neither which model nor which tokenizer its weights are for; it is"
        )
    return "a file of PyTorch's, but"


def load_weights(model, weights, path):
    """Copy a state dict in. ValueError naming the first differences if the shapes are another model's."""
    own = model.state_dict()
    for prefix, wrapper in WRAPPERS.items():
        if weights and all(k.startswith(prefix) for k in weights):
            raise ValueError(
                f"{path} does not fit this model: the names of its weights all begin with "
                f"{prefix!r}, as those of a model in {wrapper} do: save the state dict of what is inside, "
                f"model.{prefix[:-1]}"
            )
    wrong = [k for k in own if k not in weights or weights[k].shape != own[k].shape] + [
        k for k in weights if k not in own
    ]

    def shape(tensors, k):
        return tuple(tensors[k].shape) if k in tensors else "missing"

    if wrong:
        shown = ", ".join(f"{k} is {shape(weights, k)} there and {shape(own, k)} here" for k in wrong[:3])
        raise ValueError(f"{path} does not fit this model: {len(wrong)} tensors differ, the first: {shown}")
    model.load_state_dict(weights)


def load_optimizer(optimizer, state):
    """What an optimizer has averaged comes back, not its settings (weight decay, betas): those are the config's, which may have changed."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings)


def load_model(path, device="cpu"):
    """-> (model in evaluation mode with the averaged weights where there are any, checkpoint dict). Raises as `load` does."""
    checkpoint = load(path)
    model = make_model(checkpoint["model"], checkpoint["model_config"])
    load_weights(model, checkpoint["ema"] or checkpoint["weights"], path)
    return model.to(device).eval(), checkpoint
