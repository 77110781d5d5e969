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
import sys
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import configurator
from model_dense import row_shares
from model_trm import ANSWER_ROWS
from smol import arc, checkpoint, engine, loop, runtime, teachers
from smol.loader import Ahead, draw_rng

# -----------------------------------------------------------------------------
# ---- where it goes and what it logs
out_dir = "out/distill"
init_from = ""  # the student's checkpoint; given again, or 'resume': go on from out_dir/ckpt.pt
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
objective = "forward_kl"  # 'reverse_kl' and 'jsd' hardly see what the student is wrongly sure of (LOG.md)
beta = 0.5  # of jsd: near 0 it is like forward_kl, near 1 like reverse_kl
temperature = 1.0  # softens both distributions
on_policy = 1.0  # Route A: share of the batches whose answers are the student's own
sample_temperature = 1.0  # at which it writes them
# ---- data
data_dir = "data"
data = "demo"  # name of a prepared stage
data_tag: str | None = None  # its frozen version
mixture = {}  # {source: share of the batches}; empty: the stage's own. Text keeps the language
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
            torch.clear_autocast_cache()  # of weights that were cast without gradient
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
    here = net.wte.weight.device
    idx, targets = batch.idx.to(here), batch.targets.to(here)
    new = torch.ones(len(idx), dtype=torch.bool, device=here) if carry is None else carry["halted"]
    tasks = teachers.tasks_of(idx[new], targets[new], net.puzzle_format)
    with timed("scoring", stats):  # once a puzzle; then the carry keeps it
        frames = guide.frames(tasks, [task.test[0][1] for task in tasks])
    log_p = torch.full((*idx.shape, teachers.OUTCOMES), torch.nan, device=here)
    log_p[new] = teachers.on_canvases(frames, idx[new])
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
        here = self.net.wte.weight.device
        if batch.mode == "text":
            return self.net(batch.idx.to(here), batch.targets.to(here), mode="text")[1], None
        if self.net.puzzle_format == "canvas":
            return on_canvas(self.net, guide, batch, carry, stats)
        return left_to_right(self.net, guide, batch, step, stats), None


@contextlib.contextmanager
def timed(what, stats):
    """Adds the seconds inside; they end with results on the CPU, so a GPU has been waited for."""
    started = time.perf_counter()
    yield
    stats[what] += time.perf_counter() - started


def forward_backward(parallel, guide, batches, step, carries, scaler, autocast, here, names):
    """
    The gradient of a step: of each source the mean over all of its rows, however they are batched, and of
    these the mean, weighted by their numbers of batches. names: of the loader's sources. Returns figures of
    this process, to be summed over processes, and the new carries.
    """
    rows = [sum(len(batch.idx) for batch in batches if batch.source == name) for name in names]
    counts = [sum(batch.source == name for batch in batches) for name in names]
    n_batches, *both = runtime.sums([len(batches), *rows, *counts], here)
    weights = {k: n / r / n_batches for k, r, n in zip(names, both, both[len(names) :]) if n}  # of a row
    stats = dict.fromkeys(("loss", "tokens", "own", "right", "sampling", "scoring"), 0.0)
    new_carries = {}
    for batch in batches:
        alone = batch is batches[-1] or runtime.world_size == 1  # gradients are averaged in the last backward
        with contextlib.nullcontext() if alone else parallel.no_sync():
            with autocast:
                carry = loop.to_device(carries.get(batch.key), here)
                loss, carry = parallel(guide, batch, step, carry, stats)
            loss = loss * len(batch.idx) * weights[batch.source]
            scaler.scale(loss * runtime.world_size).backward()
        if carry is not None:
            new_carries[batch.key] = loop.to_device(carry, "cpu")
        stats["loss"] += loss.item()
        stats["tokens"] += batch.tokens
    return stats, new_carries


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


def main(argv):
    began = time.monotonic()
    defaults = configurator.settings(globals())
    config, _ = configurator.read(globals(), argv)
    globals().update(config)
    with runtime.errors_agree():
        loop.check_settings(config)
        if init_from in ("", "auto", "scratch") or not teacher:
            raise ValueError("name a student and a teacher: --init_from=PATH --teacher=PATH")
        here, precision = runtime.start(device, dtype)
    # ---- the student, from a checkpoint or going on
    start, start_path, resumed = checkpoint.begin(config, here, overwrite, distilled=True)
    if resumed and checkpoint.nothing_left(start, config):
        return
    state, model = start["train"], start["model"]
    torch.manual_seed(seed)
    with runtime.errors_agree():
        asked = {} if recompute is None else {"recompute": recompute}
        net = checkpoint.make_model(model, start["model_config"] | asked)
        weights = start["weights"] if resumed else start["ema"] or start["weights"]
        checkpoint.load_weights(net, weights, start_path)
        net.to(here)
        optimizers = loop.make_optimizers(net, optimizer, weight_decay, learning_rate, (beta1, beta2))

        # ---- teacher and data
        guide = teachers.load(teacher, here, precision, teacher_n_sup, teacher_n_views)
        seen = [*state.get("data", {}).get("sources", []), *guide.sources]  # through the teacher too
        loader, pinned = loop.make_loader(config, net, seen)
        pinned["teacher"] = guide.about
        if resumed:
            checkpoint.check_same_data(state["data"], pinned)
            checkpoint.load_optimizers(optimizers, optimizer, state)
            loader.load_state_dict(state["loader"])
            if state["data"]["teacher"] != guide.about:
                raise ValueError(f"{start_path} was distilled from another teacher: use another --out_dir")
    average = loop.start_average(net, ema, start)
    autocast, scaler = loop.mixed_precision(here, precision)
    run, carries = {**loop.NEW_RUN, "began_with": start_path}, {}
    if resumed:
        carries, _ = checkpoint.restore(start, run, config, scaler, here)
    start = state = None  # free its memory

    # ---- ready
    parallel = Loss(net)
    if runtime.world_size > 1:
        parallel = DistributedDataParallel(parallel, gradient_as_bucket_view=True)
    with runtime.errors_agree():
        log = loop.Log(config, run, resumed)
    runtime.print0(configurator.show(config, defaults))
    verb = f"going on after step {run['iter']} of" if resumed else "from the weights of"
    processes = f"{runtime.world_size} x {runtime.device_name(here)}"
    runtime.print0(f"{verb} {start_path}, {precision} on {processes}; teacher {guide.about}")
    if net.puzzle_format == "canvas":
        runtime.print0("Route B learns offline, from soft targets: on_policy changes nothing")
    interrupted = runtime.catch_signals()
    evaluation, publication = loop.Evaluation(config, log), checkpoint.Publication(config)
    ahead = Ahead(loader, pin=here.startswith("cuda"))
    tasks = held_out_tasks(loader, check_tasks)
    since_log, saved, due, stopping = defaultdict(float), True, False, False
    net.train()

    def validate():
        """Returns the share of held-out puzzles that the student solves."""
        entry, line = loop.validate(run, net, average, loader, autocast, here, config)
        with loop.averaged_weights(net, average), autocast:
            share = teachers.solved(teachers.Ours(net), tasks)
        log.write({**entry, "student_solved": share})
        runtime.print0(f"{line}; {share:.1%} of {len(tasks)} puzzles solved")
        return share

    if not resumed:
        share = validate()
        with autocast:
            its_share = teachers.solved(guide, tasks)
        log.write({"iter": 0, "teacher_solved": its_share})
        weaker = ": it is weaker than its student" if its_share < share else ""
        runtime.print0(f"the teacher solves {its_share:.1%}{weaker}")

    # ---- go
    while run["iter"] < max_iters and not stopping:
        started = time.perf_counter()
        lr = loop.learning_rate_at(run["iter"], config)
        loop.set_learning_rate(optimizers, lr)

        # forward and backward on every batch of the step
        try:
            batches = ahead.next_step()
        except ValueError as e:  # no puzzle fits into block_size, in any process
            runtime.stop(e)
        step_state = run["iter"], carries, scaler, autocast, here
        stats, new_carries = forward_backward(parallel, guide, batches, *step_state, loader.names)
        grad_norm = loop.clip_gradients(net, optimizers, scaler, grad_clip)

        # every process learns the same sums, so that all of them step or skip, stop and save together
        out_of_time = max_hours and time.monotonic() - began > 3600 * max_hours
        sums = runtime.sums([*stats.values(), bool(interrupted or out_of_time)], here)
        stats, stopping = dict(zip(stats, sums)), sums[-1]
        loss = stats["loss"]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        loop.optimizer_step(optimizers, scaler, finite)
        if finite:
            carries.update(new_carries)
            if average:
                loop.update_average(average, net, ema, run["iter"])

        # what it was like
        seconds = time.perf_counter() - started
        loop.count_step(run, seconds, stats["tokens"], finite)
        step = run["iter"]
        for k, v in {**stats, "seconds": seconds}.items():
            since_log[k] += v
        log.progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        log.progress.update()
        if not finite:
            log.skipped(run, lr, f"{loss:.3g}", grad_norm, config)
        elif step % log_interval == 0 or step == max_iters:
            own, process_seconds = since_log["own"], since_log["seconds"] * runtime.world_size
            entry = {
                "iter": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": run["tokens"],
                "seconds": round(run["seconds"], 3),
                "tokens_per_second": round(since_log["tokens"] / since_log["seconds"], 1),
                "sampling": round(since_log["sampling"] / process_seconds, 4),
                "scoring": round(since_log["scoring"] / process_seconds, 4),
                "own_right": round(since_log["right"] / own, 4) if own else None,
                "memory_gb": round(runtime.peak_memory(here) / 1e9, 3),
                "skipped": run["skipped"],
            }
            log.write(entry)
            since_log.clear()
            runtime.print0(
                f"step {step}: loss {loss:.4f}, lr {lr:.2e}, gradient {grad_norm:.2f}, sampling "
                f"{entry['sampling']:.0%} and scoring {entry['scoring']:.0%} of the time"
            )
        if sync_check_interval and (step % sync_check_interval == 0 or step == max_iters):
            loop.check_sync(net, average, loss, grad_norm, step, here, config)

        # validate, save, evaluate, publish
        evaluation.collect()
        publication.collect()
        due = due or step % eval_interval == 0 or step == max_iters or bool(stopping)
        if due and loop.worth_saving(loss, finite, scaler):
            loop.check_weights(net, average, step, config)
            if not stopping:
                validate()
            train = {**run, "data": pinned, "loader": ahead.state}
            saved = checkpoint.save_run(train, config, net, model, average, optimizers, scaler, carries, here)
            due = False
            if saved and not stopping:
                evaluation.start(step)
                publication.start(step)

    # ---- the end
    saved = saved and not due
    loop.end(run, log, ahead, evaluation, publication, saved, stopping, interrupted, config)
    runtime.end_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
