"""
What stands around the steps of train.py's loop.

Checks of the settings, the loader, the learning rate, optimizers, averaged weights, validation, the log, and
the evaluation that runs in a process beside the training. `config` is everywhere the dict of the script's
settings. Before this: runtime.py, checkpoint.py. Read next: train.py.
"""

import contextlib
import ctypes
import importlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from smol import arc, checkpoint, engine, runtime, suites
from smol import tokenizer as tok
from smol.files import lock, write_whole
from smol.loader import Loader
from smol.muon import muon_and_adamw, split_parameters
from smol.snapshots import first_line, repo_name

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout
MAX_SKIPPED = 20  # so many steps in a row without a finite loss and gradient end the run

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
    "id": None,  # what a tracker knows the run by
}


def check_settings(config):
    """What can be wrong with settings of train.py and distill.py beyond their ranges. ValueError."""
    if config["min_lr"] > config["learning_rate"]:
        raise ValueError(f"min_lr={config['min_lr']} must be at most learning_rate={config['learning_rate']}")
    if config["mixture"] and not any(config["mixture"].values()):
        raise ValueError(f"mixture must give a share above 0 to some source, got {config['mixture']}")
    if config["overwrite"] and config["init_from"] == "resume":
        raise ValueError("--overwrite=True begins anew and --init_from=resume goes on: give one of them")
    if config.get("keep_every", 0) % (interval := config["eval_interval"]):
        raise ValueError(f"keep_every={config['keep_every']} must be a multiple of eval_interval={interval}")
    batches_per_step(config)
    if config["push_to"]:
        repo_name(config["push_to"])
    if config["eval_suites"]:
        suites.names(config["eval_suites"])
    if runtime.master:
        runtime.pick_device(config["eval_device"])


def batches_per_step(config):
    """Of an optimizer step, over all processes. ValueError where these cannot share them evenly."""
    batches, tokens, n = config["gradient_accumulation_steps"], config.get("batch_tokens"), runtime.world_size
    if tokens:
        per_batch = config["batch_size"] * config["block_size"]
        batches = tokens // per_batch
        if tokens % (per_batch * n):
            product = f"batch_size * block_size * processes = {per_batch * n}"
            raise ValueError(f"batch_tokens={tokens} is not a multiple of {product}")
    elif batches % n:
        raise ValueError(f"gradient_accumulation_steps={batches} cannot be shared evenly by {n} processes")
    return batches


def make_loader(config, net, seen):
    """-> (batches of a stage, what a checkpoint says of its data). seen: sources learned from before."""
    loader = Loader(
        config["data_dir"],
        config["data"],
        tag=config["data_tag"],
        weights=config["mixture"],
        seed=config["seed"],
        batch_size=config["batch_size"],
        block_size=config["block_size"] or net.config.block_size,
        batches_per_step=batches_per_step(config),
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
        "sources": sorted({*loader.names, *seen}),
    }
    return loader, pinned


# -----------------------------------------------------------------------------
# the parts of a step


def learning_rate_at(it, config):
    """The rate of step `it`: up in a straight line, and down to min_lr unless the plateau has no end."""
    warmup, decay, end = config["warmup_iters"], config["decay_iters"], config["max_iters"]
    up = min(1.0, (it + 1) / max(1, warmup))
    if config["schedule"] == "cosine":
        share = max(0, it - warmup) / max(1, end - warmup)
        down = 0.5 + 0.5 * math.cos(math.pi * min(1.0, share))
    else:
        decay = min(decay, max(1, end - warmup))  # of a run shorter than that, still from the top
        down = min(1.0, (end - it) / decay) if decay else 1.0
    return config["min_lr"] + (config["learning_rate"] - config["min_lr"]) * min(up, down)


def make_optimizers(net, name, weight_decay, learning_rate, betas):
    """name: 'muon' or 'adamw' -> list of optimizers, to be stepped one after the other."""
    if name == "muon":
        return muon_and_adamw(net, weight_decay, learning_rate, betas)
    groups = split_parameters(net, weight_decay)
    return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


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


def to_device(carry, device):
    """A carry (dict of tensors, or None) on another device: between steps all wait in the host's memory."""
    return carry and {k: v.to(device) for k, v in carry.items()}


# -----------------------------------------------------------------------------
# averaged weights, validation


def start_average(net, start):
    """The averaged weights at first: the checkpoint's, if it has any, else the weights."""
    saved = start and start["ema"] or net.state_dict()
    return {k: saved[k].to(v.device, copy=True) for k, v in net.state_dict().items()}


@torch.no_grad()
def update_average(average, net, ema, iteration):
    """Move the average a little towards the weights, early on closely: there is little to average."""
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
def validate(run, net, average, loader, autocast, device, config, log=None):
    """
    run["val_losses"] = {source: mean loss}, run["val_loss"] = mean over the sources of text, or None. Writes
    an entry to `log`, with val_bpb = {source: bits per byte}. Ends the run where a loss is not finite.
    """
    net.eval()
    names, bytes_of = [name for _, name, _ in loader.val], torch.from_numpy(tok.byte_lengths())
    sums = np.zeros((len(names), 3))  # of losses, of rows, of bytes of text
    with averaged_weights(net, average), autocast:
        for mode in ("text", "puzzle"):
            for name, _, idx, targets in loader.val_batches(mode, config["eval_batches"]):
                loss = net(idx.to(device), targets.to(device), mode=mode)[1]
                n_bytes = bytes_of[targets].sum().item() if mode == "text" else 0
                sums[names.index(name)] += loss.item() * len(idx), len(idx), n_bytes
    net.train()
    sums = np.reshape(runtime.sums(sums.flatten().tolist(), device), sums.shape).tolist()
    losses = {name: loss / rows for name, (loss, rows, _) in zip(names, sums) if rows}
    nats = {name: loss * loader.block_size / n for name, (loss, _, n) in zip(names, sums) if n}  # a byte
    bpb = {name: x / math.log(2) for name, x in nats.items()}
    run["val_losses"] = losses
    run["val_loss"] = sum(losses[name] for name in bpb) / len(bpb) if bpb else None
    if not all(map(math.isfinite, losses.values())):
        diverged(f"the validation loss of step {run['iter']} is not finite ({losses})", config)
    shown = (f"{k} {v:.3f}" + (f" ({bpb[k]:.3f} bits a byte)" if k in bpb else "") for k, v in losses.items())
    if log and losses:
        log.write({"iter": run["iter"], "val_loss": run["val_loss"], "val_losses": losses, "val_bpb": bpb})
    runtime.print0(f"step {run['iter']}: validation {', '.join(shown) or 'of nothing'}")


def show_samples(n, net, average, loader):
    """
    Print how the model goes on from a held-out text, and its answer to a held-out puzzle, of the n-th source
    of each kind in turn. Draws from a generator of its own, so the run is the same without it.
    """
    net.eval()
    # decoding has a new shape at every token: nothing to compile. A ValueError is of weights that are not
    # finite, of which the next save will tell
    eager, without = torch.compiler.set_stance("force_eager"), contextlib.suppress(ValueError)
    with averaged_weights(net, average), eager, without:
        for kind in ("text", "puzzle"):
            sources = [(name, shards) for k, name, shards in loader.val if k == kind]
            if not sources:
                continue
            turn, i = divmod(n, len(sources))
            name, shards = sources[i]
            document = shards.document(turn % shards.n_documents)
            if kind == "text":
                prompt = torch.tensor([[tok.EOT, *document[:24].tolist()]], device=net.wte.weight.device)
                generator = torch.Generator(prompt.device).manual_seed(n)
                drawn = engine.generate(net, prompt, 48, temperature=0.8, top_k=200, generator=generator)
                begun = tok.load().decode(document[:24])
                more = tok.load().decode([ids.item() for ids in drawn])
                runtime.print0(f"{name}: {begun} | {more}")
                continue
            task_kind, (*demos, (question, expected)) = arc.decode(document)
            ((given,),) = net.answer([arc.Task("", task_kind, demos, [(question, expected)])])
            panels = [(name, question, None), ("expected", expected, None)]
            runtime.print0(arc.ansi_row([*panels, ("answer", given[0][0] if given else None, expected)]))
    net.train()


def check_weights(net, average, step, config):
    """End the run where a weight or an average of any process is not finite."""
    averaged = checkpoint.not_finite(average)
    wrong = checkpoint.not_finite(net.state_dict()) or averaged and f"the average of {averaged}"
    wrong = runtime.all_agree(wrong)
    if wrong:
        diverged(f"after step {step} there are weights that are not finite ({wrong})", config)


def check_sync(net, average, loss, grad_norm, step, config):
    """
    All processes must hold the same bits: a broken link or a bug otherwise trains two models and averages
    their gradients. Ends the run, with the name of the process that differs and in what.
    """
    if runtime.world_size == 1:
        return
    averages = {f"the average of {k}": v for k, v in (average or {}).items()}
    both = torch.tensor([loss, grad_norm], dtype=torch.float64)
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
    there have after the step of `run`, or all of a new one, and writes config.json. ValueError, OSError.
    """

    def __init__(self, config, run, resumed):
        self.path, self.tracker = os.path.join(config["out_dir"], "log.jsonl"), None
        self.step = step = run["iter"] if resumed else -1  # of the last line
        run["id"] = run["id"] or secrets.token_hex(4)
        if runtime.master:
            folder = Path(config["out_dir"])
            self.lock = lock(folder, "run")
            if config["tracker"]:
                self.tracker = start_tracker(config, run["id"])
            # what a killed run leaves; other files that are half written may be those of an eval_arc.py here
            for name in ("ckpt", *checkpoint.BESIDES, "config.json"):
                for left in folder.glob(f"{name}*.tmp"):
                    left.unlink()
            for name in ("log.jsonl", "evals.jsonl"):
                runtime.cut_log(folder / name, step)
            if config["overwrite"] and not resumed:  # what is kept of the run that this one replaces
                for kept in folder.glob("ckpt_[0-9]*.pt"):
                    if kept.resolve() != Path(run["began_with"] or "").resolve():
                        kept.unlink()
            write_whole(json.dumps(config, indent=2).encode(), folder / "config.json")
        bar = {"total": config["max_iters"], "initial": max(0, step), "unit": "step", "mininterval": 1.0}
        self.progress = tqdm(**bar, disable=None if runtime.master else True)

    def write(self, entry):
        """Only rank 0 writes."""
        if not runtime.master:
            return
        self.step = entry["iter"]
        with goes_on(f"could not write to {self.path}"):
            runtime.append_log(entry, self.path)
        self.track(entry)

    def track(self, entry, picture=None):
        """The numbers of an entry, those in dicts of it too, and a picture go to the tracker."""
        if not self.tracker:
            return
        inner = {f"{k}/{name}": x for k, v in entry.items() if isinstance(v, dict) for name, x in v.items()}
        figures = {k: v for k, v in {**entry, **inner}.items() if isinstance(v, (int, float))}
        with goes_on(f"the figures of step {self.step} did not reach the tracker"):
            if picture and os.path.exists(picture):
                figures["answers"] = self.tracker.Image(picture)
            self.tracker.log(figures, step=self.step)

    def skipped(self, run, lr, loss, grad_norm, config):
        """A step whose loss or gradient was not finite; too many in a row end the run."""
        step = run["iter"]
        self.write({"iter": step, "loss": None, "lr": lr, "skipped": run["skipped"]})
        runtime.print0(f"step {step} skipped: loss {loss}, gradient norm {grad_norm:.3g}")
        if run["skipped_in_a_row"] >= MAX_SKIPPED:
            diverged(f"{MAX_SKIPPED} steps in a row, up to {step}, had no finite loss and gradient", config)

    def close(self):
        self.progress.close()
        if self.tracker:
            with goes_on("the tracker did not finish"):
                self.tracker.finish()


@contextlib.contextmanager
def goes_on(problem):
    """What is raised inside costs a line that begins with `problem`, and not the run."""
    try:
        yield
    except Exception as e:  # noqa: BLE001 (network, disk, somebody else's code)
        runtime.print0(f"{problem}: {first_line(e)}")


def start_tracker(config, run_id):
    """The tracker's module, which knows of the run from now on. ValueError for whatever it objects to."""
    # trackio knows a run by its name, wandb by an id: sessions of a run go on under the same
    name = f"{os.path.basename(config['out_dir'])}-{run_id}"
    more = {"id": run_id} if config["tracker"] == "wandb" else {}
    try:
        tracker = importlib.import_module(config["tracker"])
        tracker.init(project="smol-llm", name=name, config=config, resume="allow", **more)
    except Exception as e:  # noqa: BLE001 (no login, no network: each has exceptions of its own)
        raise ValueError(f"tracker={config['tracker']!r} cannot be used: {first_line(e)}") from None
    return tracker


class Evaluation:
    """
    eval_arc.py on the run's checkpoints, in a process beside the training; one at a time, so a checkpoint may
    go without. What it finds is appended to evals.jsonl, and goes to the tracker of `log`.
    """

    def __init__(self, config, log):
        self.config, self.log, self.process = config, log, None
        self.out_dir = Path(config["out_dir"])
        self.link, self.found = self.out_dir / "ckpt_eval.pt", self.out_dir / "eval_step"

    def start(self, step):
        """Of ckpt.pt, which is of this step, unless another is still being evaluated."""
        self.collect()
        if not self.config["eval_suites"] or not runtime.master or self.process is not None:
            return
        settings = {name: self.config[f"eval_{name}"] for name in ("suites", "limit", "device")}
        command = [sys.executable, os.path.join(ROOT, "eval_arc.py"), self.link, f"--out_dir={self.found}"]
        command += [f"--{name}={value}" for name, value in settings.items()]
        of_group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")
        alone = {k: v for k, v in os.environ.items() if k not in of_group}
        with goes_on(f"the evaluation of step {step} could not be started"):
            checkpoint.second_name(checkpoint.path_of(self.config), self.link)
            with self.found.with_suffix(".log").open("w") as f:
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
        failed, self.process = self.process.returncode, None
        with goes_on(f"the evaluation of step {self.step} is lost"):
            self.keep(failed)

    def keep(self, failed):
        """Of a process that has ended with the exit code `failed`."""
        os.remove(self.link)
        if failed:
            said = self.found.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            last = (said.strip().splitlines() or [failed])[-1]
            how = "was cut off" if failed == -signal.SIGKILL else "failed"
            runtime.print0(f"the evaluation of step {self.step} {how}: {last}")
            return
        reports = json.loads((self.found / "eval.json").read_text()).values()
        (results,) = (r["suites"] for r in reports if r["checkpoint"] == str(self.link))
        counted = {k: r for k, r in results.items() if "solved" in r}
        solved = ", ".join(f"{k} {r['solved']}/{r['total']}" for k, r in counted.items())
        runtime.print0(f"step {self.step}: solved {solved}")
        runtime.append_log({"iter": self.step, "suites": results}, self.out_dir / "evals.jsonl")
        # a tracker takes no step before its last, and the evaluation is of an earlier one
        rates = {k: r["solved"] / r["total"] for k, r in counted.items()}
        self.log.track({"solved": rates, "solved_iter": self.step}, str(self.found / "grids.png"))

    def end(self, seconds):
        """The run is over: wait so many seconds for the last evaluation."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            self.process.kill()  # does nothing to one that has ended
            self.process.wait()
        self.collect()


def end_with_parent():
    """In a new process: end when the training does, however that ends, by kill -9 too."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
