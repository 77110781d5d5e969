"""
What train.py and distill.py share of a training loop, beside the steps themselves.

Checks of the settings, the loader, the learning rate, optimizers, averaged weights, validation, the log, and
the evaluation that runs in a process beside the training. `config` is everywhere the dict of the script's
settings. Before this: runtime.py, checkpoint.py. Read next: train.py.
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys

import torch
from tqdm import tqdm

from smol import checkpoint, runtime, suites
from smol.files import write_whole
from smol.loader import Loader
from smol.muon import muon_and_adamw
from smol.snapshots import repo_name

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout

# where a run is: what a checkpoint has beside the weights, and the path of those that it began with
NEW_RUN = {
    "iter": 0,
    "seconds": 0.0,
    "tokens": 0,
    "val_losses": {},
    "val_loss": None,
    "skipped": 0,  # steps whose loss or gradient was not finite, in all and in a row
    "skipped_in_a_row": 0,
    "began_with": None,
}


def check_settings(config):
    """What can be wrong with settings that train.py and distill.py share, beyond their ranges. ValueError."""
    if config["min_lr"] > config["learning_rate"]:
        raise ValueError(f"min_lr={config['min_lr']} must be at most learning_rate={config['learning_rate']}")
    if config["mixture"] and not any(config["mixture"].values()):
        raise ValueError(f"mixture must give a share above 0 to some source, got {config['mixture']}")
    batches = config["gradient_accumulation_steps"]
    if batches % runtime.world_size:
        raise ValueError(
            f"gradient_accumulation_steps={batches} cannot be shared evenly by {runtime.world_size} processes"
        )
    if config["push_to"]:
        repo_name(config["push_to"])
    asked = suites.names(config["eval_suites"]) if config["eval_suites"] else []
    needed = [config["tracker"]] if config["tracker"] else []
    needed += ["lm_eval"] if any(suite.startswith("lm_eval:") for suite in asked) else []
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install {package.replace('_', '-')}")
    runtime.pick_device(config["eval_device"])


def make_loader(config, net, seen):
    """
    -> (the batches of a stage, what a checkpoint says of its data). seen: names of the sources that the
    weights have learned from before.
    """
    loader = Loader(
        config["data_dir"],
        config["data"],
        tag=config["data_tag"],
        weights=config["mixture"],
        seed=config["seed"],
        batch_size=config["batch_size"],
        block_size=config["block_size"] or net.config.block_size,
        batches_per_step=config["gradient_accumulation_steps"],
        puzzle_format=net.puzzle_format,
        rank=runtime.rank,
        world_size=runtime.world_size,
        verify=runtime.local_rank == 0,
    )
    pinned = {
        "stage": config["data"],
        "tag": config["data_tag"],
        "snapshot": loader.snapshot,
        "shards": loader.fingerprint,
        "shares": loader.rounded_shares(),
        "sources": sorted({*loader.names, *seen}),
    }
    return loader, pinned


# -----------------------------------------------------------------------------
# the parts of a step


def learning_rate_at(it, config):
    """
    The rate of step `it`. Both schedules warm up linearly and end at min_lr, unless the plateau has no end.
    """
    warmup, decay, end = config["warmup_iters"], config["decay_iters"], config["max_iters"]
    up = min(1.0, (it + 1) / max(1, warmup))
    if config["schedule"] == "cosine":
        share = max(0, it - warmup) / max(1, end - warmup)
        down = 0.5 + 0.5 * math.cos(math.pi * min(1.0, share))
    else:
        down = min(1.0, (end - it) / decay) if decay else 1.0
    return config["min_lr"] + (config["learning_rate"] - config["min_lr"]) * min(up, down)


def make_optimizers(net, name, weight_decay, learning_rate, betas):
    """name: 'muon' or 'adamw' -> list of optimizers, to be stepped one after the other."""
    if name == "muon":
        return muon_and_adamw(net, weight_decay, learning_rate, betas)
    return [net.configure_optimizer(weight_decay, learning_rate, betas)]


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def mixed_precision(device, precision):
    """-> (autocast, gradient scaler): the first does nothing in float32, the second except in float16."""
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=precision == "float16")
    if precision == "float32":
        return contextlib.nullcontext(), scaler
    return torch.autocast(kind, dtype=getattr(torch, precision)), scaler


def clip_gradients(net, optimizers, scaler, grad_clip):
    """Take the scale of the loss out, and clip. Returns the norm before clipping."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf).item()


def optimizer_step(optimizers, scaler, finite):
    """One step; not finite: none, but the scaler learns of it."""
    for optimizer in optimizers:
        if finite:
            scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def worth_saving(loss, finite, scaler):
    """A step that float16 skips to find its scale is no reason not to save; any other skipped step is."""
    return finite or (scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1)


def count_step(run, seconds, tokens, finite):
    """One more step in the counters of a run."""
    run["iter"] += 1
    run["seconds"] += seconds
    run["tokens"] += int(tokens)
    run["skipped"] += not finite
    run["skipped_in_a_row"] = 0 if finite else run["skipped_in_a_row"] + 1


def to_device(carry, device):
    """
    A carry (dict of tensors, or None) on another device. Between steps carries wait in the host's memory:
    those of all batches would not fit beside the model on a T4.
    """
    return carry and {k: v.to(device) for k, v in carry.items()}


# -----------------------------------------------------------------------------
# averaged weights, validation


def start_average(net, ema, start):
    """
    The averaged weights at the beginning: those of the checkpoint `start`, if it has any, else the weights.
    None without ema.
    """
    saved = start and start["ema"] or {}
    own = net.state_dict().items()
    return {k: saved[k].to(v.device) if saved else v.detach().clone() for k, v in own} if ema else None


@torch.no_grad()
def update_average(average, net, ema, iteration):
    """
    Move the average a little towards the weights. Early on it follows closely: there is little to average.
    """
    decay = min(ema, (1 + iteration) / (10 + iteration))
    for k, v in net.state_dict().items():
        average[k].lerp_(v, 1 - decay)


@contextlib.contextmanager
def averaged_weights(net, average):
    """Inside, the model has the averaged weights, if there are any (average: a state dict, or None)."""
    if average is None:
        yield
        return
    own = {k: v.detach().clone() for k, v in net.state_dict().items()}
    net.load_state_dict(average)
    try:
        yield
    finally:
        net.load_state_dict(own)


@torch.no_grad()
def validate(run, net, average, loader, autocast, device, config):
    """
    run["val_losses"] = {source: mean loss}, run["val_loss"] = mean over the sources of text, or None; each
    process takes its share of the batches. Ends the run where a loss is not finite.
    """
    net.eval()
    sums = {name: [0.0, 0.0] for _, name, _ in loader.val}
    with averaged_weights(net, average):
        for mode in ("text", "puzzle"):
            for name, _, idx, targets in loader.val_batches(mode, config["eval_batches"]):
                with autocast:
                    loss = net(idx.to(device), targets.to(device), mode=mode)[1]
                sums[name][0] += loss.item() * len(idx)
                sums[name][1] += len(idx)
    net.train()
    flat = runtime.sums([x for pair in sums.values() for x in pair], device)
    losses = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(sums) if flat[2 * i + 1]}
    text = [losses[name] for kind, name, _ in loader.val if kind == "text" and name in losses]
    run["val_losses"], run["val_loss"] = losses, sum(text) / len(text) if text else None
    if not all(map(math.isfinite, losses.values())):
        diverged(f"the validation loss of step {run['iter']} is not finite ({losses})", config)


def check_weights(net, average, step, config):
    """End the run where a weight or an average of any process is not finite."""
    averaged = checkpoint.not_finite(average)
    wrong = checkpoint.not_finite(net.state_dict()) or averaged and f"the average of {averaged}"
    wrong = runtime.all_agree(wrong)
    if wrong:
        diverged(f"after step {step} there are weights that are not finite ({wrong})", config)


def check_sync(net, average, loss, grad_norm, step, device, config):
    """
    All processes must hold the same bits: a broken link or a bug otherwise trains two models and averages
    their gradients. Ends the run, with the name of the process that differs and in what.
    """
    both = torch.tensor([loss, grad_norm], dtype=torch.float64, device=device)
    averages = {f"the average of {k}": v for k, v in (average or {}).items()}
    figures = {"the loss": both[:1], "the gradient norm": both[1:]}
    problem = runtime.difference({**dict(net.named_parameters()), **averages, **figures})
    if problem:
        path = checkpoint.path_of(config)
        runtime.stop(f"processes are out of sync at step {step}: {problem}; go on from {path}")


def diverged(what, config):
    """End the run. Its checkpoints stay as they are."""
    rate, clip, warmup = (config[k] for k in ("learning_rate", "grad_clip", "warmup_iters"))
    advice = f"lower learning_rate={rate:g} or grad_clip={clip:g}, or raise warmup_iters={warmup}"
    runtime.stop(f"{what}; {checkpoint.path_of(config)} is untouched: {advice}")


# -----------------------------------------------------------------------------
# out_dir


class Log:
    """
    log.jsonl of a run, its copy at a tracker, and the progress bar. It locks out_dir, drops what the logs
    there have after `step` (-1: all) and writes config.json. ValueError or OSError in one line.
    """

    def __init__(self, config, step):
        self.path, self.tracker = os.path.join(config["out_dir"], "log.jsonl"), None
        if runtime.master:
            runtime.lock(config["out_dir"])
            for name in ("log.jsonl", "evals.jsonl"):
                runtime.cut_log(os.path.join(config["out_dir"], name), step)
            settings = json.dumps(config, indent=2).encode()
            write_whole(settings, os.path.join(config["out_dir"], "config.json"))
            if config["tracker"]:
                self.tracker = importlib.import_module(config["tracker"])
                name = os.path.basename(config["out_dir"])
                self.tracker.init(project="smol-llm", name=name, config=config, resume="allow")
        self.progress = tqdm(
            total=config["max_iters"],
            initial=max(0, step),
            disable=None if runtime.master else True,
            unit="step",
            mininterval=1.0,
        )

    def write(self, entry):
        """Only rank 0 writes."""
        if not runtime.master:
            return
        if problem := runtime.append_log(entry, self.path):
            runtime.print0(problem)
        if self.tracker:
            figures = {**entry, **{f"val_loss/{k}": v for k, v in entry.get("val_losses", {}).items()}}
            numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            self.tracker.log(numbers, step=entry["iter"])

    def skipped(self, run, source, lr, loss, grad_norm, config):
        """A step whose loss or gradient was not finite; too many in a row end the run."""
        step = run["iter"]
        self.write({"iter": step, "loss": None, "source": source, "lr": lr, "skipped": run["skipped"]})
        runtime.print0(f"step {step} skipped: loss {loss:.3g}, gradient norm {grad_norm:.3g}")
        if run["skipped_in_a_row"] >= config["max_skipped"]:
            n = config["max_skipped"]
            diverged(f"{n} steps in a row, up to {step}, had no finite loss and gradient", config)

    def close(self):
        self.progress.close()
        if self.tracker:
            self.tracker.finish()


def end(run, log, ahead, evaluation, publication, saved, stopping, interrupted, config):
    """End what works beside a run, and tell how the run ended."""
    path, step = checkpoint.path_of(config), run["iter"]
    log.close()
    ahead.close()
    if saved and not interrupted:
        publication.end(step)
    evaluation.end(0 if stopping else config["eval_minutes"])
    if not saved:
        runtime.stop(f"the last steps, up to {step}, were not saved; {path} is untouched")
    if stopping:
        runtime.print0(f"stopped after step {step}, saved to {path}: go on with --init_from=resume")


class Evaluation:
    """
    eval_arc.py on the run's checkpoints, in a process beside the training; one at a time, so a checkpoint may
    go without. What it finds is appended to evals.jsonl. eval_suites '': nothing is done.
    """

    def __init__(self, config):
        self.config, self.out_dir, self.process = config, config["out_dir"], None
        self.link = os.path.join(self.out_dir, "ckpt_eval.pt")
        self.output = os.path.join(self.out_dir, "eval_step.log")

    def start(self, step):
        """Of ckpt.pt, which is of this step, unless another is still being evaluated."""
        self.collect()
        if not self.config["eval_suites"] or not runtime.master or self.process is not None:
            return
        checkpoint.second_name(checkpoint.path_of(self.config), self.link)
        command = [
            sys.executable,
            os.path.join(ROOT, "eval_arc.py"),
            self.link,
            f"--suites={self.config['eval_suites']}",
            f"--limit={self.config['eval_limit']}",
            f"--device={self.config['eval_device']}",
            f"--out_dir={os.path.join(self.out_dir, 'eval_step')}",
        ]
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        with open(self.output, "w") as f:
            self.process = subprocess.Popen(
                command,
                stdout=f,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **alone},
                start_new_session=True,  # Ctrl-C is the training's
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
        self.step = step

    def collect(self):
        """Say and keep what it has found, if it has ended."""
        if self.process is None or self.process.poll() is None:
            return
        if self.process.returncode == 0:
            with open(os.path.join(self.out_dir, "eval_step", "eval.json")) as f:
                (figures,) = (r for r in json.load(f).values() if r["checkpoint"] == self.link)
            solved = {k: f"{r['solved']}/{r['total']}" for k, r in figures["suites"].items() if "solved" in r}
            runtime.print0(f"step {self.step}: solved " + ", ".join(f"{k} {n}" for k, n in solved.items()))
            figures["checkpoint"] = checkpoint.path_of(self.config)
            runtime.append_log({"iter": self.step, **figures}, os.path.join(self.out_dir, "evals.jsonl"))
        else:
            with open(self.output, encoding="utf-8", errors="replace") as f:
                why = (f.read().strip().splitlines() or ["nothing was written"])[-1]
            runtime.print0(f"the evaluation of step {self.step} failed: {why}")
        os.remove(self.link)
        self.process = None

    def end(self, minutes):
        """The run is over: wait this long for the last evaluation."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60 * minutes)
            self.process.kill()  # does nothing to one that has ended
            self.process.wait()
        self.collect()


def end_with_parent():
    """In a new process: end when the training does, however that ends, by kill -9 too."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
