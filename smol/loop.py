"""
What a training loop needs whatever it trains on: train.py and distill.py share it.

The learning rate's schedule, optimizers, averaged weights, validation, what a checkpoint holds, signals: each a function of what it is
given, that keeps nothing. Evaluation and publication go on in processes of their own, and these are remembered by two small classes. The
loops themselves are in the two scripts, from top to bottom. Before this: train.py. Read next: checkpoint.py, runtime.py, publish.py.
"""

import contextlib
import errno
import fcntl
import importlib
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import torch

import configurator
from smol import checkpoint as ckpt
from smol import publish, runtime, suites
from smol import tokenizer as tok
from smol.muon import muon_and_adamw
from smol.runtime import gather, master, rank, world_size

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout


def check_settings(config, ranges):
    """
    What can be wrong with the settings that train.py and distill.py share, whatever there is to load. ranges: as
    in configurator.check_ranges. Raises ValueError, in one line.
    """
    configurator.check_ranges(config, ranges)
    if config["min_lr"] > config["learning_rate"]:
        raise ValueError(f"min_lr={config['min_lr']} must be at most learning_rate={config['learning_rate']}")
    if config["mixture"] and not any(config["mixture"].values()):
        raise ValueError(f"mixture must give a share above 0 to some source, got {config['mixture']}")
    batches = config["gradient_accumulation_steps"]
    if batches % world_size:
        raise ValueError(
            f"gradient_accumulation_steps={batches} cannot be shared evenly by {world_size} processes"
        )
    checks = {"push_to": publish.repo_name, "eval_suites": check_suites, "eval_device": runtime.pick_device}
    for name, check in checks.items():
        if config[name] or name == "eval_device":
            try:
                check(config[name])
            except ValueError as e:
                raise ValueError(f"--{name}={config[name]}: {e}") from None


def check_suites(names):
    """ValueError for what eval_arc.py would refuse after the first checkpoint, as far as that shows at once."""
    asked = suites.names(names)
    if any(suite.startswith("lm_eval:") for suite in asked) and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("suites called lm_eval:... need EleutherAI's lm-eval: pip install lm-eval")


def learning_rate_at(it, *, schedule, learning_rate, min_lr, warmup_iters, decay_iters, max_iters):
    """The rate of step `it`. Both schedules warm up linearly and end at min_lr, unless the plateau has no end."""
    up = min(1.0, (it + 1) / max(1, warmup_iters))
    if schedule == "cosine":
        down = 0.5 + 0.5 * math.cos(
            math.pi * min(1.0, max(0, it - warmup_iters) / max(1, max_iters - warmup_iters))
        )
    else:
        down = min(1.0, (max_iters - it) / decay_iters) if decay_iters else 1.0
    return min_lr + (learning_rate - min_lr) * min(up, down)


def make_optimizers(net, name, weight_decay, learning_rate, betas):
    """name: 'muon' or 'adamw', as in train.py -> list of optimizers, to be stepped one after the other."""
    if name == "muon":
        return muon_and_adamw(net, weight_decay, learning_rate, betas)
    return [net.configure_optimizer(weight_decay, learning_rate, betas)]


# -----------------------------------------------------------------------------
# averaged weights


@torch.no_grad()
def follow(average, net, ema, iteration):
    """Move the average a little towards the weights. Early on it follows closely: there is little to average."""
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
    """-> ({source: mean loss}, mean over the sources of text or None), each process on its share of the batches."""
    net.eval()
    sums = {}
    with averaged_weights(net, average):
        for mode in ("text", "puzzle"):
            for name, _, idx, targets in loader.val_batches(mode, eval_batches):
                with autocast:
                    loss = net(idx.to(device), targets.to(device), mode=mode)[1]
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += loss.item() * len(idx)
                total[1] += len(idx)
    net.train()
    names = [name for _, name, _ in loader.val]
    flat = runtime.sums([x for name in names for x in sums.get(name, [0.0, 0.0])], device)
    losses = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1]}
    text = [losses[name] for kind, name, _ in loader.val if kind == "text" and name in losses]
    return losses, sum(text) / len(text) if text else None


def say_what_is_not_validated(loader, eval_batches, say):
    """At the start of a run, rather than to leave it to figures that are missing: which sources, and why."""
    missing = loader.not_validated(eval_batches)
    if missing:
        nothing = "nothing can be validated, this run will have no validation loss: "
        say(
            (nothing if len(missing) == len(loader.val) + len(loader.without_val) else "not validated: ")
            + "; ".join(f"{name} ({why})" for name, why in missing.items())
        )


# -----------------------------------------------------------------------------
# where a run begins


def lock(out_dir):
    """
    Two runs in one folder would write the same files. -> a file to keep open: the lock goes when it is
    closed, and dies with the process. ValueError where another run has it, OSError where the folder cannot be
    written to.
    """
    f = open(os.path.join(out_dir, ".lock"), "w")  # noqa: SIM115 (whoever called keeps it)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        advice = "wait for it, or choose another --out_dir"
        raise ValueError(f"another run is at work in {out_dir}/: {advice}") from None
    except OSError:  # a file system that has no locks: there a person has to take care
        pass
    return f


def starting_point(init_from, out_dir, anew):
    """
    Where a run begins -> (checkpoint dict, its path, whether the run goes on from it); from scratch, (None,
    None, False). With init_from 'auto', or the path of the checkpoint that the run in out_dir has begun with,
    the same command goes on with that run. anew: what is in out_dir may be replaced. FileNotFoundError or
    ValueError in one line, also where out_dir holds another run's checkpoint.
    """
    path = ckpt.newest(os.path.join(out_dir, "ckpt.pt"))
    held = os.path.exists(path) and not anew
    if init_from == "resume" or (held and init_from != "scratch"):
        checkpoint = ckpt.load_finite(path)
        train = checkpoint["train"]
        began_with = train.get("student") or train.get("began_with")  # in distill.py, in train.py
        if init_from in ("resume", "auto", began_with):
            return checkpoint, path, True
    if held:
        raise ValueError(
            f"{path} exists: go on with --init_from=resume, start again with --overwrite=True, "
            "or choose another --out_dir"
        )
    if init_from in ("auto", "scratch"):
        return None, None, False
    return ckpt.load_finite(init_from), init_from, False


def same_start(step, device):
    """step: that this process goes on from, or None. A message if processes differ: a machine has none."""
    step = -1 if step is None else step
    if runtime.sums([step], device)[0] / world_size != step:
        return f"out_dir has another checkpoint for process {rank} than for others: copy it to all machines"
    return None


def nothing_left(checkpoint, path, max_iters, push_to, push_full, say):
    """The run has taken all of its steps: say so, publish what may have been left, end with exit code 0."""
    step, out_dir = checkpoint["train"]["iter"], os.path.dirname(path)
    say(
        f"{path} is of step {step}: there is nothing left to do: max_iters={max_iters}; a larger one goes "
        "on, --overwrite=True begins anew"
    )
    Publication(out_dir, push_to if master else "", push_full, say).end(step, at_once=False)
    runtime.exit_now(code=0)


def place_of(data):
    """data: what a checkpoint says of its data -> which stage, where it lies, and its hashes, in a phrase."""
    manifest = f", manifest {data['manifest'][:12]}" if "manifest" in data else ""
    where = f" in {data['data_dir']}/" if "data_dir" in data else ""
    return f"{data['stage']}:{data['tag']}{where} (shards {data['shards'][:12]}{manifest})"


def other_data(before, now):
    """
    What a checkpoint says of its data, and the same of the data that are there -> a line on what is another
    now, or None. ValueError where a run cannot go on: another frozen version, or other shards, in which the
    loader's place means nothing.
    """
    if any(before[k] != now[k] for k in ("shards", "tag", "snapshot")):
        advice = "name the same data, data_tag and data_dir, or begin another run with its weights"
        raise ValueError(
            f"this run has learned from {place_of(before)}, and now there is {place_of(now)}: "
            f"{advice} (--init_from=PATH, another --out_dir)"
        )
    changed = [k for k in ("stage", "data_dir", "manifest", "shares") if k in before and before[k] != now[k]]
    if not changed:
        return None
    shares = f", shares {now['shares']} (were {before['shares']})" if "shares" in changed else ""
    return f"data {place_of(now)} (were {place_of(before)}){shares}"


# -----------------------------------------------------------------------------
# checkpoints: what the rest of a run depends on. All processes call these, and the first one writes.


def moved(carry, device):
    """
    A carry (dict of tensors, or None) on another device. Between steps carries wait in the host's memory: one for every batch of a step and
    every length of puzzle would not fit beside the model on a T4, and 25 MB each way are nothing to a batch that takes a second.
    """
    return carry and {k: v.to(device) for k, v in carry.items()}


def everyones_carries(carries, device):
    """carries: {(number, length): dict of tensors} of this process -> {'number/length': ...} of all processes, on the first."""
    mine, everyones = sorted(carries), {}
    for i in range(int(max(runtime.sums([len(mine) * (r == rank) for r in range(world_size)], device)))):
        # one by one: all carries of all processes at once can be gigabytes
        part = {f"{mine[i][0]}/{mine[i][1]}": carries[mine[i]]} if i < len(mine) else {}
        for some in gather(part):
            everyones.update(some)
    return everyones


def own_carries(everyones):
    """The inverse: each process takes those of the batches that are now its own."""
    carries = {tuple(map(int, key.split("/"))): carry for key, carry in everyones.items()}
    return {key: carry for key, carry in carries.items() if key[0] % world_size == rank}


def random_states(device_type):
    """The states of PyTorch's generators in every process, on the first."""
    return gather(
        {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device_type == "cuda" else None}
    )


def restore_random_state(states, device_type):
    """states: as `random_states` gave them, to as many processes as then."""
    torch.set_rng_state(states[rank]["cpu"])
    if device_type == "cuda" and states[rank]["cuda"] is not None:
        torch.cuda.set_rng_state(states[rank]["cuda"])


def only_scaling(loss, scaler):
    """Whether a step was skipped for its loss scale alone: so float16 finds it, and tries a larger one."""
    return scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1


def unsound(net, average):
    """Which weight or average is not finite, the same phrase in all processes; None where all are finite."""
    wrong = ckpt.not_finite(net.state_dict())
    averaged = ckpt.not_finite(average)
    return runtime.all_agree(wrong or averaged and f"the average of {averaged}")


def contents(net, model, config, average, train):
    """What a checkpoint holds (checkpoint.py has its format)."""
    return {
        "format": ckpt.CHECKPOINT_FORMAT,
        "model": model,
        "model_config": dict(vars(net.config)),
        "weights": net.state_dict(),
        "ema": average,
        "tokenizer": tok.fingerprint(),
        "config": config,
        "versions": {
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "train": train,
    }


def save_checkpoint(path, net, model, config, average, train, device, say, keep):
    """
    Write a checkpoint. train: what the script needs to go on; keep: whether `path` holds one of this run's,
    which is kept as well. Returns whether it is on disk; if not, that has been said, and the one before is
    untouched.
    """
    saved, before = True, ckpt.previous(path) if keep else None
    if master:
        whole = contents(net, model, config, average, train)
        try:
            try:
                ckpt.save(whole, path, before)
            except OSError as e:
                if e.errno != errno.ENOSPC or not before or not all(map(os.path.exists, (before, path))):
                    raise
                os.remove(before)  # room for two of them, not for three
                ckpt.save(whole, path, before)
        except OSError as e:
            saved = False
            kept = "the one before is untouched" if os.path.exists(path) else "there is none before it"
            say(
                f"the checkpoint of step {train['iter']} could not be saved ({e.strerror or e}); {kept}, and training goes on"
            )
    return runtime.sums([saved], device)[0] == world_size


def save_weights_alone(path, net, model, config, average, train):
    """
    After a last save that failed: what an evaluation reads, the average where there is one, a third of the
    size or less. Beside `path`, and a checkpoint to all that do not resume. -> what has come of it, to end a
    sentence with.
    """
    beside = "_weights".join(os.path.splitext(path))
    if not master:
        return ""
    whole = contents(net, model, config, None, {k: v for k, v in train.items() if k in publish.FIGURES})
    try:
        ckpt.save({**whole, "weights": average or whole["weights"]}, beside)
    except OSError as e:
        return f", and neither could its weights alone ({e.strerror or e})"
    return f"; its weights alone are in {beside}, for eval_arc.py, sample.py and --init_from={beside}"


def to_go_on_from(path, step):
    """step: of this run's checkpoint at `path`, or None. What one can go on from after a run went wrong."""
    if step is None:
        return "this run has saved no checkpoint yet"
    older = f" (the one before it is {ckpt.previous(path)})" if os.path.exists(ckpt.previous(path)) else ""
    return f"{path} is untouched, of step {step}: go on from there with --init_from=resume{older}"


# -----------------------------------------------------------------------------
# signals


def catch_signals():
    """
    From now on Ctrl-C and SIGTERM only append (name of the signal, when) to the list that this returns, for the loop to look at after
    each step; a second one exits at once.
    """
    interrupted = []

    def on_signal(number, frame):
        # torchrun passes on a signal that the terminal has already sent to everyone: that is still the first one
        if interrupted and not (
            "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - interrupted[0][1] < 2
        ):
            os._exit(128 + number)
        interrupted.append((signal.Signals(number).name, time.monotonic()))

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return interrupted


# -----------------------------------------------------------------------------
# before and beside the steps


def compile_blocks(net, loader, autocast, scaler, device, say):
    """torch.compile every block, try them on real batches, and say so and take it back if that fails in any process. -> whether it works"""
    problem = None
    try:
        for block in net.blocks:
            block.compile()  # a copy of it, deep or pickled, is not compiled, and has weights of its own
        for mode in ("text", "puzzle"):
            for _, _, idx, targets in loader.val_batches(mode, 1):
                with autocast:
                    loss = net(idx.to(device), targets.to(device), mode=mode)[1]
                scaler.scale(loss).backward()
                break
    except Exception as e:  # noqa: BLE001 (a compiler fails in any way it likes)
        problem = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]:.200}"
    net.zero_grad(set_to_none=True)
    failed = runtime.sums([problem is not None], device)[0]
    if failed:
        for block in net.blocks:
            block._compiled_call_impl = None  # what block.compile() sets; nothing public takes it back
        torch._dynamo.reset()
        say(
            f"torch.compile does not work here, going on without it ({problem or 'it failed in another process'})"
        )
    return not failed


def tracker_module(tracker):
    """The module of 'trackio' or 'wandb' ('' -> None). ValueError, in one line, where it is not installed."""
    try:
        return importlib.import_module(tracker) if tracker else None
    except ImportError:
        raise ValueError(
            f"--tracker={tracker} needs a package that is not installed: pip install {tracker}"
        ) from None


def write_log(entry, path, say, tracked=None):
    """Append to log.jsonl; the figures also go to `tracked`, the module of a tracker, if there is one."""
    problem = runtime.append_log(entry, path)
    if problem:
        say(problem)
    if tracked:
        figures = {**entry, **{f"val_loss/{k}": v for k, v in entry.get("val_losses", {}).items()}}
        tracked.log(
            {k: v for k, v in figures.items() if k != "iter" and isinstance(v, (int, float))},
            step=entry["iter"],
        )


class Evaluation:
    """
    eval_arc.py on the run's checkpoints, in a process beside it; one at a time, so a checkpoint may go without. What it finds is appended
    to evals.jsonl and said. suites "": there is none, and nothing is done.
    """

    def __init__(self, out_dir, suites, limit, device, say):
        self.out_dir, self.suites, self.limit, self.device, self.say = out_dir, suites, limit, device, say
        self.process, self.link = None, os.path.join(out_dir, "ckpt_eval.pt")
        if suites and os.path.exists(self.link):  # of a run that was killed: its evaluation has ended with it
            os.remove(self.link)

    def collect(self, ended=None):
        """What has come of it, if it has ended. ended: by whom, where it was not its own end."""
        if self.process is None or self.process.poll() is None:
            return
        self.process.stdin.close()
        if ended:
            self.say(
                f"the evaluation of step {self.step} was ended {ended}: python eval_arc.py "
                f"{os.path.join(self.out_dir, 'ckpt.pt')} --suites={self.suites} does it"
            )
        elif self.process.returncode == 0:
            with open(os.path.join(self.out_dir, "eval_step", "eval.json")) as f:
                (figures,) = (r for r in json.load(f).values() if r["checkpoint"] == self.link)
            figures["checkpoint"] = os.path.join(self.out_dir, "ckpt.pt")  # the second name is soon gone
            solved = {
                suite: f"{r['solved']}/{r['total']}"
                for suite, r in figures["suites"].items()
                if "solved" in r
            }
            self.say(f"step {self.step}: solved " + ", ".join(f"{suite} {n}" for suite, n in solved.items()))
            write_log({"iter": self.step, **figures}, os.path.join(self.out_dir, "evals.jsonl"), self.say)
        else:
            with open(os.path.join(self.out_dir, "eval_step.log"), encoding="utf-8", errors="replace") as f:
                lines = f.read().strip().splitlines()
            self.say(
                f"the evaluation of step {self.step} failed: {lines[-1] if lines else self.process.returncode}"
            )
        os.remove(self.link)
        self.process = None

    def start(self, step):
        """Of the checkpoint that is there now, of this step, unless another is still being evaluated."""
        if not self.suites or self.process is not None:
            return
        try:  # the next checkpoint replaces the first name, and takes nothing from under the reader
            ckpt.second_name(os.path.join(self.out_dir, "ckpt.pt"), self.link)
        except OSError as e:
            self.say(f"step {step} is not evaluated: {self.link}: {e.strerror}")
            return
        command = [
            sys.executable,
            os.path.join(ROOT, "eval_arc.py"),
            self.link,
            f"--suites={self.suites}",
            f"--limit={self.limit}",
            f"--device={self.device}",
            f"--out_dir={os.path.join(self.out_dir, 'eval_step')}",
            "--ends_with_stdin=True",
        ]
        env = {"OMP_NUM_THREADS": "1", **publish.environment_alone()}
        with open(
            os.path.join(self.out_dir, "eval_step.log"), "w"
        ) as f:  # a pipe would be full one day, with nobody reading it
            # However this process ends, by kill -9 too, its end of the pipe is closed: the evaluation ends
            ours = {"stdin": subprocess.PIPE, "stdout": f, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, **ours, start_new_session=True, env=env)
        self.step = step

    def end(self, minutes):
        """The run is over: wait this long for the last evaluation."""
        if self.process is None:
            return
        ended = None
        try:
            self.process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            ended = f"after {minutes:g} minutes at the end of the run" if minutes else "with the run"
        self.collect(ended)


class Publication:
    """
    Pushes of the run's checkpoints to the hub (publish.py), in a process beside it, one at a time. repo "":
    nothing is done. Unlike an evaluation, a push outlives a training that is killed: it may be what saves its
    last steps.
    """

    def __init__(self, out_dir, repo, full, say):
        self.out_dir, self.repo, self.full, self.say = out_dir, repo, full, say
        self.step = None  # the last one that a push was begun for
        self.going_on = (
            publish.begin(out_dir, repo, full) if repo else None
        )  # makes the repository: a wrong login shows now

    def collect(self, wait=0.0):
        """What has come of the push that is going on, if it has ended (wait: that many seconds for it)."""
        message = publish.outcome(self.going_on, wait) if self.going_on is not None else None
        if message is not None:
            self.going_on = None
            if message:
                self.say(message)

    def start(self, step, wait=0.0):
        self.collect(wait)
        if self.repo and self.going_on is None and self.step != step:
            try:
                self.going_on = publish.begin(
                    self.out_dir, self.repo, self.full, os.path.join(self.out_dir, "ckpt.pt")
                )
                self.step = step
            except OSError as e:
                self.say(f"step {step} is not published: {e.filename}: {e.strerror}")

    def end(self, step, at_once):
        """The run is over: push the step that it ends with, unless it was interrupted, which leaves no time for it."""
        if not self.repo:
            return
        if not at_once:
            self.start(step, wait=publish.PATIENCE)
            self.collect(wait=publish.PATIENCE)
            return
        if self.going_on is not None:
            self.going_on[0].kill()
            publish.outcome(self.going_on, wait=publish.PATIENCE)
        self.say(
            f"step {step} is not published: python -m smol.publish push {self.out_dir} --repo={self.repo} --full={self.full} does it"
        )
