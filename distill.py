"""
Distillation on grid puzzles: a Route A student learns on its own answers, a Route B student offline.

    python distill.py config/distill_demo.py                         after `make demo`: its B teaches its A
    torchrun --nproc_per_node=2 distill.py config/distill_route_b.py    two processes share a global batch
    python distill.py config/distill_route_a.py --teacher=hf:gpt2    any teacher of smol/teachers.py
    python distill.py config/distill_demo.py                         once more: goes on from ckpt.pt

A step is one of train.py's, on the same batches of the loader, and text is learned as there. On puzzles:

    Route A student   It writes an answer, without gradient, and the teacher gives its distribution at every
                      position of that answer. The loss is the student's divergence from it (generalised
                      knowledge distillation, arXiv 2306.13649). In a share of 1 - on_policy of the batches
                      the answers are the data's. A teacher that does not read the answer (Route B, votes)
                      counts up to the first position where it would have written something else.
    Route B student   It learns the teacher's distribution at every cell of its canvas. A teacher that reads
                      an answer reads the data's. The student's own answers play no part: this is offline
                      distillation with soft targets, and on_policy changes nothing.

The loss is the mean over the positions of an answer, then over the answers of the whole step, however they
are shared among batches and processes. Writes what train.py writes. Random draws follow from the seed, the
step and the batch, so a resumed run is the same run. Before this: train.py, smol/teachers.py.
"""

import contextlib
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from model_dense import row_shares
from model_trm import ANSWER_ROWS
from smol import arc, engine, loop, runtime, teachers
from smol import checkpoint as ckpt
from smol.loader import Ahead, Loader, draw_rng

# -----------------------------------------------------------------------------
# ---- where it goes and what it logs
out_dir = "out/distill"
init_from = (
    ""  # the student's checkpoint; given again, its run goes on from out_dir/ckpt.pt, as with 'resume'
)
overwrite = False  # begin anew in an out_dir that already holds a checkpoint
eval_interval = 100  # steps between validations, each of which also saves a checkpoint
eval_batches = 8  # validation batches per source, at most
eval_suites = ""  # suites of eval_arc.py for a process beside this one, after each checkpoint; '' for none
eval_limit = 20  # tasks of each of these suites
eval_device = "cpu"
eval_minutes = 10.0  # how long a finished run waits for the last of these
check_tasks = 32  # held-out puzzles that the teacher solves at the start and the student at each validation
log_interval = 10  # steps between lines in log.jsonl
max_hours = 0.0  # stop and save after this many hours; 0 for never
push_to = ""  # USER/NAME on the hub, where each checkpoint is published
push_full = False  # with all that resuming needs
tracker = ""  # 'trackio' or 'wandb' get the same figures as log.jsonl, if installed
# ---- teacher
teacher = ""  # path of a checkpoint or of a Hugging Face model, or hf:NAME
teacher_n_sup: int | None = None  # Route B: supervision steps; None: its own
teacher_n_views = 1  # it votes over so many views of each puzzle
# ---- loss
objective = (
    "forward_kl"  # sees what the student is wrongly sure of; 'reverse_kl' and 'jsd' hardly do (LOG.md)
)
beta = 0.5  # of jsd: near 0 it is like forward_kl, near 1 like reverse_kl
temperature = 1.0  # softens both distributions
on_policy = 1.0  # Route A: share of the batches whose answers are the student's own
sample_temperature = 1.0  # at which it writes them
# ---- data
data_dir = "data"
data = "demo"  # name of a prepared stage
data_tag: str | None = None  # its frozen version
mixture = {}  # {source: share of the steps}; empty: the stage's own. Text keeps the language
batch_size = 8  # rows of text per batch; puzzles come in batches of as many tokens
block_size: int | None = None  # longest row, and prompt; None: the student's
gradient_accumulation_steps = 8  # batches per optimizer step, over all processes
recompute: bool | None = None  # as in train.py; None: as the student was trained
# ---- optimizer
optimizer = "muon"
learning_rate = 1e-4
max_iters = 1000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0 for none
ema = 0.0  # decay of the averaged weights that evaluation uses; 0 for none
max_skipped = 20  # so many steps in a row without a finite loss and gradient end the run; each is skipped
schedule = "wsd"
warmup_iters = 20
decay_iters = 200
min_lr = 0.0
# ---- system
device = "auto"
dtype = "auto"
sync_check_interval = 100  # steps between comparisons of all processes' weights; 0 for none
seed = 1337
# -----------------------------------------------------------------------------
RANGES = {
    "[1, inf)": "eval_interval eval_batches eval_limit log_interval batch_size block_size max_iters "
    "max_skipped gradient_accumulation_steps teacher_n_sup teacher_n_views",
    "[0, inf)": "check_tasks sample_temperature mixture learning_rate weight_decay warmup_iters decay_iters "
    "min_lr sync_check_interval",
    "(0, inf)": "temperature",
    "[0, inf]": "max_hours grad_clip eval_minutes",
    "[0, 1)": "beta1 beta2 ema",
    "(0, 1)": "beta",
    "[0, 1]": "on_policy",
    "[0, 1e18)": "seed",
    ("forward_kl", "reverse_kl", "jsd"): "objective",
    ("muon", "adamw"): "optimizer",
    ("wsd", "cosine"): "schedule",
    ("", "trackio", "wandb"): "tracker",
    ("auto", "float32", "bfloat16", "float16"): "dtype",
}

# -----------------------------------------------------------------------------
# the loss


def divergence(student, teacher):
    """
    student, teacher (..., V): logits, P the teacher's distribution and Q the student's -> (...) in nats

        forward_kl   KL(P, Q) = sum P log(P / Q)
        reverse_kl   KL(Q, P)
        jsd          beta KL(P, M) + (1 - beta) KL(Q, M), with M = beta P + (1 - beta) Q
    """
    p, q = (x.float().div(temperature).log_softmax(-1) for x in (teacher, student))

    def kl(a, b):
        return torch.where(a > -torch.inf, a.exp() * (a - b), 0.0).sum(-1)

    if objective == "forward_kl":
        return kl(p, q)
    if objective == "reverse_kl":
        return kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def mean_divergence(student, teacher, rows, n_rows):
    """
    student, teacher (N, 11), NaN where the teacher has no opinion; rows (N,): the answer of each position.
    The mean over the positions of an answer, where those without an opinion are 0, then over n_rows answers.
    """
    known = ~teacher.isnan().any(-1)
    return (divergence(student[known], teacher[known]) * row_shares(rows, n_rows)[known]).sum()


def left_to_right(net, guide, batch, step, stats):
    """The loss of a Route A student on a batch of puzzles, the mean over its rows."""
    tasks = teachers.tasks_of(batch.idx, batch.targets, net.puzzle_format)
    answers = [task.test[0][1] for task in tasks]
    number = batch.key[0]
    if draw_rng(seed, f"policy {step}", number).random() < on_policy:
        with timed("sampling", stats):
            own = write_answers(net, tasks, draw_rng(seed, f"answers {step}", number))
        if any(answer is None for answer in own):  # logits that are not finite
            return math.nan * sum(p.sum() for p in net.parameters())
        stats["own"] += len(own)
        stats["right"] += sum(x.shape == y.shape and bool((x == y).all()) for x, y in zip(own, answers))
        answers = own
    with timed("scoring", stats):
        frames = guide.frames(tasks, answers)
    documents = [teachers.document(task, answer) for task, answer in zip(tasks, answers)]
    student = engine.cell_logits(net, documents, [answer.shape for answer in answers])  # (N, 11)
    parts, rows = [], []
    for row, (frame, answer) in enumerate(zip(frames, answers)):
        log_p = teachers.at_tokens(frame, answer)
        parts.append(log_p if guide.reads_answers else teachers.until_first_difference(log_p, answer))
        rows += [row] * len(log_p)
    rows = torch.tensor(rows, device=student.device)
    return mean_divergence(student, torch.cat(parts).to(student.device), rows, len(tasks))


@torch.no_grad()
def write_answers(net, tasks, rng):
    """An answer to each task, drawn under the grammar of grids; None where logits are not finite."""
    prompts = [teachers.prompt(task) for task in tasks]
    limits = [arc.canvas_shape(task.train, task.test[0][0]) for task in tasks]
    drawn = engine.decode_grids(net, prompts, limits, 1, sample_temperature, [rng] * len(tasks))
    return [answer and answer[0] for answer in drawn]


def on_canvas(net, guide, batch, carry, stats):
    """The loss of a Route B student after one supervision step, mean over its rows, and its new carry."""
    idx, targets = batch.idx.to(net.wte.weight.device), batch.targets.to(net.wte.weight.device)
    new = torch.ones(len(idx), dtype=torch.bool) if carry is None else carry["halted"].cpu()
    tasks = teachers.tasks_of(batch.idx[new], batch.targets[new], net.puzzle_format)
    with timed("scoring", stats):  # once a puzzle; then the carry keeps it
        frames = guide.frames(tasks, [task.test[0][1] for task in tasks])
    log_p = torch.full((*idx.shape, teachers.OUTCOMES), torch.nan, device=idx.device)
    log_p[new.to(idx.device)] = teachers.on_canvases(frames, idx[new.to(idx.device)])
    words = net.puzzle_words()
    y, carry = net.carried_step({"idx": idx, "targets": targets, "teacher": log_p}, carry, words)
    cells = arc.canvas_cells(carry["idx"], arc.positions(carry["idx"]))
    rows, n_rows = cells.nonzero()[:, 0], len(idx)
    student, teacher_log_p = F.linear(y[cells], words[ANSWER_ROWS]).float(), carry["teacher"][cells]
    # the halting head learns whether the answer is the teacher's, as in train.py whether it is right
    known = ~teacher_log_p.isnan().any(-1)
    differs = (student.argmax(-1) != teacher_log_p.argmax(-1)) & known
    agrees = (rows[known].bincount(minlength=n_rows) > 0) & (rows[differs].bincount(minlength=n_rows) == 0)
    q = net.halt_logit(y)
    loss = mean_divergence(student, teacher_log_p, rows, n_rows)
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q, agrees.float())
    return loss, {**carry, "halted": net.halts(q, carry)}


class Loss(torch.nn.Module):
    """The loss of a batch and the new carry, as a module for DistributedDataParallel."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, guide, batch, step, carry, stats):
        where = self.net.wte.weight.device
        if batch.mode == "text":
            return self.net(batch.idx.to(where), batch.targets.to(where), mode="text")[1], None
        if self.net.puzzle_format == "canvas":
            return on_canvas(self.net, guide, batch, carry, stats)
        return left_to_right(self.net, guide, batch, step, stats), None


@contextlib.contextmanager
def timed(what, stats):
    """Adds the seconds inside; they end with results on the CPU, so a GPU has been waited for."""
    started = time.perf_counter()
    yield
    stats[what] += time.perf_counter() - started


def held_out_tasks(loader, n):
    """n of the stage's held-out puzzles, as many of each source as there are."""
    sources = [
        [arc.decode(shards.document(i)) for i in range(min(shards.n_documents, n))]
        for kind, name, shards in loader.val
        if kind == "puzzle" and name in loader.names
    ]
    mixed = [source[i] for i in range(n) for source in sources if i < len(source)]
    return [arc.Task("", kind, pairs[:-1], pairs[-1:]) for kind, pairs in mixed[:n]]


# -----------------------------------------------------------------------------
# the run


def say(text):
    """A line for people, from one process, that does not tear the progress bar."""
    if runtime.master:
        tqdm.write(text)


@contextlib.contextmanager
def mistakes_in_one_line():
    """What goes wrong inside, in any process, is told by one and ends all."""
    problem = None
    try:
        yield
    except (OSError, ValueError) as e:
        problem = str(e)
    problem = runtime.all_agree(problem)
    if problem is not None:
        runtime.stop(problem)


def main(argv):
    began = time.monotonic()
    defaults = configurator.settings(globals())
    config, _ = configurator.read(globals(), argv)
    globals().update(config)

    # ---- who and where we are
    try:
        loop.check_settings(config, RANGES)
        if init_from in ("", "auto", "scratch") or not teacher:
            raise ValueError(
                "name the student's checkpoint with --init_from=PATH, the teacher's with --teacher=PATH"
            )
        tracked = loop.tracker_module(tracker if runtime.master else "")
        where = runtime.pick_device(device)
        where = f"cuda:{runtime.local_rank}" if where == "cuda" else where
        number_format = runtime.pick_dtype(dtype, where)
    except ValueError as e:
        runtime.stop(e)
    device_type = where.split(":")[0]
    if device_type == "cuda":
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")
    runtime.start_processes(device_type)
    torch.manual_seed(seed)
    scaler = torch.amp.GradScaler(device_type, enabled=number_format == "float16")
    autocast = contextlib.nullcontext()
    if number_format != "float32":
        autocast = torch.autocast(device_type, dtype=getattr(torch, number_format))

    # ---- student, teacher, data, optimizer
    ckpt_path, log_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "log.jsonl")
    with mistakes_in_one_line():
        if runtime.master:
            os.makedirs(out_dir, exist_ok=True)
            lock = loop.lock(out_dir)  # noqa: F841 (held until the process ends)
    with mistakes_in_one_line():
        start, start_path, resumed = loop.starting_point(init_from, out_dir, overwrite)
        if resumed and "student" not in start["train"]:
            raise ValueError(f"{start_path} was not written by distill.py: choose another --out_dir")
    with mistakes_in_one_line():
        if problem := loop.same_start(start["train"]["iter"] if resumed else None, where):
            raise ValueError(problem)
    if resumed and start["train"]["iter"] >= max_iters:
        loop.nothing_left(start, start_path, max_iters, push_to, push_full, say)
    with mistakes_in_one_line():
        as_asked = {} if recompute is None else {"recompute": recompute}
        net = ckpt.make_model(start["model"], start["model_config"] | as_asked)
        weights = start["weights"] if resumed else start["ema"] or start["weights"]
        ckpt.load_weights(net, weights, start_path)
        net.to(where)
        guide = teachers.load(teacher, where, number_format, teacher_n_sup, teacher_n_views)
        loader = Loader(
            data_dir,
            data,
            tag=data_tag,
            weights=mixture,
            seed=seed,
            batch_size=batch_size,
            block_size=block_size or net.config.block_size,
            batches_per_step=gradient_accumulation_steps,
            puzzle_format=net.puzzle_format,
            rank=runtime.rank,
            world_size=runtime.world_size,
            verify=runtime.local_rank == 0,
        )
        optimizers = loop.make_optimizers(net, optimizer, weight_decay, learning_rate, (beta1, beta2))
        seen = start["train"].get("data", {}).get("sources", [])
        pinned = {
            "stage": data,
            "tag": data_tag,
            "snapshot": loader.snapshot,
            "shards": loader.fingerprint,
            "manifest": loader.manifest,
            "data_dir": data_dir,
            "shares": loader.rounded_shares(),
            "sources": sorted(
                {*loader.names, *seen, *guide.sources}
            ),  # here, before, and through the teacher
            "teacher": guide.about,
        }
        train = {"iter": 0, "seconds": 0.0, "tokens": 0, "val_loss": None, "val_losses": {}, "skipped": 0}
        train |= {"skipped_in_a_row": 0, "student": start_path, "optimizer_name": optimizer}
        if resumed:
            before = start["train"]
            loop.other_data(before["data"], pinned)
            if (before["data"]["teacher"], before["optimizer_name"]) != (guide.about, optimizer):
                raise ValueError(f"{start_path} was distilled with another teacher or optimizer")
            train = {k: before[k] for k in train}
            loader.load_state_dict(before["loader"])
            for o, state in zip(optimizers, before["optimizers"]):
                ckpt.load_optimizer(o, state)
    average = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema else None
    carries, saved_step = {}, None
    if resumed:
        saved_step = train["iter"]
        if average and start["ema"]:
            average = {k: v.to(where) for k, v in start["ema"].items()}
        if scaler.is_enabled() and before["scaler"]:
            scaler.load_state_dict(before["scaler"])
        if len(before["rng"]) == runtime.world_size:
            loop.restore_random_state(before["rng"], device_type)
        shapes = "batch_size", "block_size", "gradient_accumulation_steps"
        if all(start["config"][k] == config[k] for k in shapes):
            carries = loop.own_carries(before["carries"])
    student_model = start["model"]
    del start

    # ---- what happens between steps
    def write_log(entry):
        if runtime.master:
            loop.write_log(entry, log_path, say, tracked)

    def diverged(what):
        there = loop.to_go_on_from(ckpt_path, saved_step)
        runtime.stop(f"{what} is not finite; {there}. Lower learning_rate (now {learning_rate:g})")

    def validate():
        train["val_losses"], train["val_loss"] = loop.validate(
            net, average, loader, eval_batches, autocast, where
        )
        if not all(map(math.isfinite, train["val_losses"].values())):
            diverged(f"the validation loss of step {train['iter']}")
        with loop.averaged_weights(net, average), autocast:
            share = teachers.solved(teachers.Ours(net), tasks)
        entry = {"iter": train["iter"], "val_loss": train["val_loss"], "val_losses": train["val_losses"]}
        write_log({**entry, "student_solved": share, "of": len(tasks)})
        losses = ", ".join(f"{k} {v:.3f}" for k, v in train["val_losses"].items())
        say(f"step {train['iter']}: validation {losses}; solved {share:.1%} of {len(tasks)} held-out puzzles")
        return share

    def save():
        whole = {
            **train,
            "tokens_per_second": train["tokens"] / max(train["seconds"], 1e-9),
            "data": pinned,
            "loader": ahead.state,
            "optimizers": [o.state_dict() for o in optimizers],
            "scaler": scaler.state_dict(),
            "rng": loop.random_states(device_type),
            "carries": loop.everyones_carries(carries, where),
        }
        about = net, student_model, config, average
        return loop.save_checkpoint(ckpt_path, *about, whole, where, say, keep=saved_step is not None)

    # ---- ready
    with mistakes_in_one_line():
        if runtime.master:
            for path in (log_path, os.path.join(out_dir, "evals.jsonl")):
                runtime.cut_log(path, train["iter"] if resumed else -1)
            configurator.save(config, os.path.join(out_dir, "config.json"))
    say(configurator.show(config, defaults))
    say(f"student {start_path}, {number_format} on {runtime.device_name(where)}, teacher {guide.about}")
    if resumed:
        say(f"going on after step {train['iter']} of {start_path}")
    if net.puzzle_format == "canvas":
        say("a Route B student: offline distillation with soft targets, on_policy changes nothing")
    if tracked:
        tracked.init(project="smol-llm", name=os.path.basename(os.path.normpath(out_dir)), config=config)
    loop.say_what_is_not_validated(loader, eval_batches, say)
    interrupted = loop.catch_signals()
    evaluation = loop.Evaluation(out_dir, eval_suites if runtime.master else "", eval_limit, eval_device, say)
    publication = loop.Publication(out_dir, push_to if runtime.master else "", push_full, say)
    net.train()
    loss_of = Loss(net)
    if runtime.world_size > 1:
        loss_of = DistributedDataParallel(loss_of, broadcast_buffers=False, gradient_as_bucket_view=True)
    tasks = held_out_tasks(loader, check_tasks)
    if not resumed:
        share = validate()
        with autocast:
            teachers_share = teachers.solved(guide, tasks)
        write_log({"iter": 0, "teacher_solved": teachers_share, "of": len(tasks)})
        say(f"the teacher solves {teachers_share:.1%} of {len(tasks)} held-out puzzles")
        if teachers_share < share:
            say("warning: the teacher is weaker than its student")
    ahead = Ahead(loader, pin=device_type == "cuda")
    progress = tqdm(
        total=max_iters, initial=train["iter"], disable=None if runtime.master else True, unit="step"
    )
    since_log, saved, due, stopping = {}, True, False, False

    # ---- go
    while train["iter"] < max_iters and not stopping:
        started = time.perf_counter()
        lr = loop.learning_rate_at(
            train["iter"],
            schedule=schedule,
            learning_rate=learning_rate,
            min_lr=min_lr,
            warmup_iters=warmup_iters,
            decay_iters=decay_iters,
            max_iters=max_iters,
        )
        for group in (group for o in optimizers for group in o.param_groups):
            group["lr"] = lr
        try:
            batches = ahead.next_step()
        except ValueError as e:  # no puzzle fits into block_size: the same in every process
            runtime.stop(e)
        names = "loss", "rows", "tokens", "own", "right", "sampling", "scoring"
        stats, new_carries = dict.fromkeys(names, 0.0), {}
        (n_rows,) = runtime.sums([sum(len(batch.idx) for batch in batches)], where)
        for batch in batches:
            share = len(batch.idx) / n_rows  # every row of the step counts the same, whichever batch it is in
            is_last = batch is batches[-1]
            with contextlib.nullcontext() if runtime.world_size == 1 or is_last else loss_of.no_sync():
                carry = loop.moved(carries.get(batch.key), where)
                with autocast:
                    loss, carry = loss_of(guide, batch, train["iter"], carry, stats)
                scaler.scale(loss * share * runtime.world_size).backward()
            if carry is not None:
                new_carries[batch.key] = loop.moved(carry, "cpu")
            stats["loss"] += loss.item() * share
            stats["tokens"] += batch.tokens
        for o in optimizers:
            scaler.unscale_(o)
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf).item()
        ending = bool(interrupted) or bool(max_hours and time.monotonic() - began > 3600 * max_hours)
        *sums, stopping = runtime.sums([*stats.values(), ending], where)
        stats = dict(zip(names, sums))
        loss = stats["loss"]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            for o in optimizers:
                scaler.step(o)
            carries.update(new_carries)
        scaler.update()
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        if average is not None and finite:
            loop.follow(average, net, ema, train["iter"])

        seconds = time.perf_counter() - started
        train["iter"] += 1
        train["seconds"] += seconds
        train["tokens"] += int(stats["tokens"])
        train["skipped"] += not finite
        train["skipped_in_a_row"] = 0 if finite else train["skipped_in_a_row"] + 1
        for k, v in {**stats, "seconds": seconds}.items():
            since_log[k] = since_log.get(k, 0.0) + v
        progress.set_postfix_str(f"{batches[0].source} loss {loss:.3f}", refresh=False)
        progress.update()
        last = train["iter"] == max_iters
        if not finite:
            write_log({"iter": train["iter"], "loss": None, "skipped": train["skipped"]})
            say(f"step {train['iter']} skipped: loss {loss:.3g}, gradient norm {grad_norm:.3g}")
            if train["skipped_in_a_row"] >= max_skipped:
                diverged(f"the loss or gradient of {max_skipped} steps in a row")
        elif train["iter"] % log_interval == 0 or last:
            of_time = since_log["seconds"] * runtime.world_size
            entry = {
                "iter": train["iter"],
                "loss": loss,
                "source": batches[0].source,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": train["tokens"],
                "seconds": round(train["seconds"], 3),
                "tokens_per_second": round(since_log["tokens"] / since_log["seconds"], 1),
                "sampling": round(since_log["sampling"] / of_time, 4),
                "scoring": round(since_log["scoring"] / of_time, 4),
                "own_right": round(since_log["right"] / since_log["own"], 4) if since_log["own"] else None,
                "memory_gb": round(runtime.peak_memory(where) / 1e9, 3),
                "skipped": train["skipped"],
            }
            write_log(entry)
            say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()))
            since_log = {}
        if sync_check_interval and (train["iter"] % sync_check_interval == 0 or last):
            figures = torch.tensor([loss, grad_norm], dtype=torch.float64, device=where)
            averages = {f"the average of {k}": v for k, v in (average or {}).items()}
            apart = runtime.difference(
                {**dict(net.named_parameters()), **averages, "loss and gradient": figures}
            )
            if apart:
                runtime.stop(f"processes are out of sync at step {train['iter']}: {apart}")
        evaluation.collect()
        publication.collect()
        due = due or train["iter"] % eval_interval == 0 or last or bool(stopping)
        if due and (finite or loop.only_scaling(loss, scaler)):  # else what is on disk is better
            if wrong := loop.unsound(net, average):
                diverged(f"after step {train['iter']} the weight {wrong}")
            if not stopping:
                validate()
            saved, due = save(), False
            saved_step = train["iter"] if saved else saved_step
            if runtime.master:
                runtime.draw_losses(out_dir)
            if saved and not stopping:
                evaluation.start(train["iter"])
                publication.start(train["iter"])
    progress.close()
    ahead.close()
    if tracked:
        tracked.finish()
    publication.end(train["iter"], at_once=bool(interrupted) or due or not saved)
    evaluation.end(0 if stopping else eval_minutes)
    if due or not saved:
        runtime.stop(f"step {train['iter']} is not saved; {loop.to_go_on_from(ckpt_path, saved_step)}")
    if stopping:
        say(f"stopped after step {train['iter']}; go on with --init_from=resume (saved to {ckpt_path})")
    runtime.end_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
