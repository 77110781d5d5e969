"""
What train.py and distill.py share of a training loop, beside the steps themselves.

Checks of the settings, the learning rate's schedule, optimizers, averaged weights, validation, and the
evaluation that runs in a process beside the training. Before this: runtime.py, checkpoint.py. Read next:
train.py.
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

from smol import checkpoint, runtime, suites
from smol.files import write_whole
from smol.muon import muon_and_adamw
from smol.snapshots import repo_name

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout


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


def learning_rate_at(it, *, schedule, learning_rate, min_lr, warmup_iters, decay_iters, max_iters):
    """
    The rate of step `it`. Both schedules warm up linearly and end at min_lr, unless the plateau has no end.
    """
    up = min(1.0, (it + 1) / max(1, warmup_iters))
    if schedule == "cosine":
        share = max(0, it - warmup_iters) / max(1, max_iters - warmup_iters)
        down = 0.5 + 0.5 * math.cos(math.pi * min(1.0, share))
    else:
        down = min(1.0, (max_iters - it) / decay_iters) if decay_iters else 1.0
    return min_lr + (learning_rate - min_lr) * min(up, down)


def make_optimizers(net, name, weight_decay, learning_rate, betas):
    """name: 'muon' or 'adamw' -> list of optimizers, to be stepped one after the other."""
    if name == "muon":
        return muon_and_adamw(net, weight_decay, learning_rate, betas)
    return [net.configure_optimizer(weight_decay, learning_rate, betas)]


def to_device(carry, device):
    """
    A carry (dict of tensors, or None) on another device. Between steps carries wait in the host's memory:
    those of all batches would not fit beside the model on a T4.
    """
    return carry and {k: v.to(device) for k, v in carry.items()}


# -----------------------------------------------------------------------------
# averaged weights, validation


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
def validate(net, average, loader, eval_batches, autocast, device):
    """
    -> ({source: mean loss}, mean over the sources of text or None); each process takes its share of the
    batches.
    """
    net.eval()
    sums = {name: [0.0, 0.0] for _, name, _ in loader.val}
    with averaged_weights(net, average):
        for mode in ("text", "puzzle"):
            for name, _, idx, targets in loader.val_batches(mode, eval_batches):
                with autocast:
                    loss = net(idx.to(device), targets.to(device), mode=mode)[1]
                sums[name][0] += loss.item() * len(idx)
                sums[name][1] += len(idx)
    net.train()
    flat = runtime.sums([x for pair in sums.values() for x in pair], device)
    losses = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(sums) if flat[2 * i + 1]}
    text = [losses[name] for kind, name, _ in loader.val if kind == "text" and name in losses]
    return losses, sum(text) / len(text) if text else None


def not_finite(net, average):
    """
    Which weight or average is not finite, in the same words in all processes; None where all are finite.
    """
    averaged = checkpoint.not_finite(average)
    return runtime.all_agree(
        checkpoint.not_finite(net.state_dict()) or averaged and f"the average of {averaged}"
    )


def out_of_sync(net, average, loss, grad_norm, device):
    """
    All processes must hold the same bits: a broken link or a bug otherwise trains two models and averages
    their gradients. -> None, or which process differs in what.
    """
    both = torch.tensor([loss, grad_norm], dtype=torch.float64, device=device)
    averages = {f"the average of {k}": v for k, v in (average or {}).items()}
    figures = {"the loss": both[:1], "the gradient norm": both[1:]}
    return runtime.difference({**dict(net.named_parameters()), **averages, **figures})


# -----------------------------------------------------------------------------
# out_dir


def open_out_dir(out_dir, config, step):
    """
    Lock the folder, drop what its logs say after `step`, and write config.json. Rank 0 alone calls this.
    ValueError or OSError in one line.
    """
    runtime.lock(out_dir)
    for name in ("log.jsonl", "evals.jsonl"):
        runtime.cut_log(os.path.join(out_dir, name), step)
    write_whole(json.dumps(config, indent=2).encode(), os.path.join(out_dir, "config.json"))


def write_log(entry, path, tracked=None):
    """Append to log.jsonl; the figures also go to `tracked`, the module of a tracker, if there is one."""
    problem = runtime.append_log(entry, path)
    if problem:
        runtime.say(problem)
    if tracked:
        figures = {**entry, **{f"val_loss/{k}": v for k, v in entry.get("val_losses", {}).items()}}
        numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
        tracked.log(numbers, step=entry["iter"])


class Evaluation:
    """
    eval_arc.py on the run's checkpoints, in a process beside the training; one at a time, so a checkpoint may
    go without. What it finds is appended to evals.jsonl. suites '': nothing is done.
    """

    def __init__(self, out_dir, suites, limit, device):
        self.out_dir, self.suites, self.limit, self.device = out_dir, suites, limit, device
        self.process, self.link = None, os.path.join(out_dir, "ckpt_eval.pt")

    def start(self, step):
        """Of ckpt.pt, which is of this step, unless another is still being evaluated."""
        self.collect()
        if not self.suites or self.process is not None:
            return
        checkpoint.second_name(os.path.join(self.out_dir, "ckpt.pt"), self.link)
        command = [
            sys.executable,
            os.path.join(ROOT, "eval_arc.py"),
            self.link,
            f"--suites={self.suites}",
            f"--limit={self.limit}",
            f"--device={self.device}",
            f"--out_dir={os.path.join(self.out_dir, 'eval_step')}",
        ]
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        with open(os.path.join(self.out_dir, "eval_step.log"), "w") as f:
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
            runtime.say(f"step {self.step}: solved " + ", ".join(f"{k} {n}" for k, n in solved.items()))
            figures["checkpoint"] = os.path.join(self.out_dir, "ckpt.pt")
            write_log({"iter": self.step, **figures}, os.path.join(self.out_dir, "evals.jsonl"))
        else:
            with open(os.path.join(self.out_dir, "eval_step.log"), encoding="utf-8", errors="replace") as f:
                why = (f.read().strip().splitlines() or ["nothing was written"])[-1]
            runtime.say(f"the evaluation of step {self.step} failed: {why}")
        os.remove(self.link)
        self.process = None

    def end(self, minutes):
        """The run is over: wait this long for the last evaluation."""
        if self.process is not None:
            try:
                self.process.wait(60 * minutes)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.collect()


def end_with_parent():
    """In a new process: end when the training does, however that ends, by kill -9 too."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
