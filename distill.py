"""
Distillation: a student learns the distributions of a teacher, on what it writes itself where it can.

    python distill.py config/distill_demo.py                         after `make demo`: its B teaches its A
    torchrun --nproc_per_node=2 distill.py config/distill_route_a.py    two processes share a global batch
    python distill.py config/distill_text.py --teacher=hf:gpt2-medium   text, from a model with GPT-2's words
    python distill.py config/distill_demo.py                         once more: goes on from ckpt.pt

The loop is train.py's, on the same batches. In a share `on_policy` of them the student's own writing takes
the place of the data's (generalised knowledge distillation, arXiv 2306.13649):

    student   learns    teacher              on-policy?
    either    text      either route, hf:    yes: it continues prompts from the data, up to the end of a text
                                             (text="teacher"; with "data" text is learned as in train.py)
    Route A   puzzles   reads the answer     yes: it writes an answer under the grammar of grids, and the
                        (Route A, hf:)       teacher gives its distribution at every position of that answer
    Route A   puzzles   does not (Route B)   in part: what the teacher says does not depend on the student's
                                             answer, so it counts up to the first difference only
    Route B   puzzles   any                  no: no cell of a canvas is sampled from those before. This is
                                             offline distillation with soft targets

Draws and losses are over the same outcomes: the ids that both models know, in puzzles those that the grammar
allows. The loss is the mean over the tokens of a row, then over the rows of a batch; among the batches of a
source, those of many rows in the data weigh more, and a source weighs as much as it has batches. Writes what
train.py writes, and what share of the time goes to `sampling` and to `scoring`: the rest is learning. Random
draws follow from the seed, the step, the batch and the row, so a resumed run is the same run. Before this:
train.py, smol/teachers.py.
"""

import contextlib
import math
import sys
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

import configurator
import train
from model_dense import LOGITS_AT_ONCE, document_starts, row_shares
from model_trm import ANSWER_ROWS
from smol import arc, engine, runtime, teachers
from smol import tokenizer as tok
from smol.loader import draw_rng, pad_rows, puzzle_row
from smol.tokenizer import IGNORE

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
log_interval = 10  # steps between lines in log.jsonl
max_hours = 0.0  # stop and save after this many hours; 0 for never
push_to = ""  # USER/NAME on the hub, where each checkpoint is published
push_full = False  # with all that resuming needs
tracker = ""  # 'trackio' or 'wandb' get the same figures as log.jsonl, if installed
# ---- teacher
teacher = ""  # path of a checkpoint or of a Hugging Face model, or hf:NAME
# ---- loss
objective = "forward_kl"  # 'reverse_kl' and 'jsd' hardly see what the student is wrongly sure of (LOG.md)
beta = 0.5  # of jsd: near 0 it is like forward_kl, near 1 like reverse_kl
temperature = 1.0  # softens both distributions
text = "data"  # what text is learned from: 'data', as in train.py, or 'teacher'
on_policy = 1.0  # share of the batches that the student writes itself
prompt_tokens = 64  # of a text, or fewer: an answer in a dialogue is written from its start
new_tokens = 64  # that the student continues it with, at most
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
    **train.RANGES,
    "[1, inf)": train.RANGES["[1, inf)"] + " prompt_tokens new_tokens",
    "(0, inf)": "temperature",
    "(0, 1)": "beta",
    "[0, 1]": "on_policy",
    ("data", "teacher"): "text",
    ("forward_kl", "reverse_kl", "jsd"): "objective",
}

ILLEGAL = -1e9  # logit of what the grammar forbids: an infinite one would make the gradient NaN

# -----------------------------------------------------------------------------
# what the student writes


@torch.no_grad()
def own_batches(net, guide, batches, step):
    """
    The batches of a step, those that are on-policy with what the student writes in place of the data's, all
    together. Where logits are not finite the batches stay as they are, and their loss says so.
    """
    taught = {"text": text == "teacher", "puzzle": net.puzzle_format == "autoregressive"}
    texts, tasks = [], []  # (number of the batch, prompt or task, rng)
    rows = defaultdict(list)  # {number of the batch: rows}
    for batch in batches:
        number = batch.key[0]
        if not taught[batch.mode] or draw_rng(seed, f"policy {step}", number).random() >= on_policy:
            continue
        if batch.mode == "text":
            asked, begun = texts, prompts_of(batch.idx)
        else:
            asked, begun = tasks, teachers.tasks_of(batch.idx, batch.targets, net.puzzle_format)
        for row, it in enumerate(begun):
            asked.append((number, it, draw_rng(seed, f"answers {step}", f"{number} {row}")))
    try:
        written = []
        if texts:
            uniform = torch.from_numpy(np.stack([rng.random(new_tokens) for *_, rng in texts]))
            prompts = [prompt for _, prompt, _ in texts]
            written = engine.continue_texts(net, prompts, uniform, 1.0, guide.n_ids)
        answers = write_answers(net, tasks)
    except engine.NotFinite:
        return batches
    for (number, prompt, _), new in zip(texts, written):
        ids = torch.cat([prompt, new]).numpy()
        targets = np.where(np.arange(len(ids)) < len(prompt), IGNORE, ids)
        rows[number].append((ids[:-1], targets[1:]))
    for (number, task, _), answer in zip(tasks, answers):
        document = arc.encode(task.kind, [*task.train, (task.test[0][0], answer)])
        rows[number].append(puzzle_row(document, "autoregressive", "none"))
    own = {number: pad_rows(some, max(len(x) for x, _ in some)) for number, some in rows.items()}
    return [replace(b, **dict(zip(("idx", "targets"), own.get(b.key[0], ())))) for b in batches]


def prompts_of(idx):
    """Windows of text (B, L) -> list of prompts (n,) long, one for every prompt_tokens + new_tokens."""
    n, prompts = prompt_tokens + new_tokens, []
    for piece in idx[:, : idx.shape[1] // n * n].reshape(-1, n)[:, :prompt_tokens]:
        answers = (piece == tok.ASSISTANT).nonzero()
        prompts.append(piece[: int(answers[-1]) + 1] if len(answers) else piece)
    return prompts


def write_answers(net, tasks):
    """An answer to each task, drawn under the grammar of grids. NotFinite where logits are."""
    answers = [None] * len(tasks)
    items = [(i, teachers.prompt(task), limit_of(task), rng) for i, (_, task, rng) in enumerate(tasks)]
    for part in engine.batches_by_length(items, lambda item: len(item[1]) + item[2][0] * (item[2][1] + 1)):
        where, prompts, limits, rngs = zip(*part)
        drawn = engine.decode_grids(net, prompts, limits, 1, 1.0, rngs)
        if None in drawn:
            raise engine.NotFinite("the student's logits are not finite")
        for i, (answer, _) in zip(where, drawn):
            answers[i] = answer
    return answers


def limit_of(task):
    return arc.canvas_shape(task.train, task.test[0][0])


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


class LinearDivergence(torch.autograd.Function):
    """
    sum_i share_i * divergence(weight @ x_i, the teacher's logits of seen_i). As in LinearCrossEntropy only a
    slice of all logits is held, and the gradient is found with the loss. x (N, D), weight (V, D), seen
    (N, ...), share (N,) float32, summing to about 1.
    """

    @staticmethod
    def forward(ctx, x, weight, seen, share, guide, seconds):
        N, n = len(x), max(1, LOGITS_AT_ONCE // len(weight))
        loss, d_x, d_weight = share.new_zeros(()), torch.zeros_like(x), torch.zeros_like(weight)
        weight = weight.detach().requires_grad_()
        for i in range(0, N, n):
            with timed("scoring", seconds, x.device):
                teacher = guide.logits(seen[i : i + n])
            with torch.enable_grad():
                some = x[i : i + n].detach().requires_grad_()
                each = divergence(F.linear(some, weight), teacher)
                part = (each * share[i : i + n] * N).sum()  # half precision would lose shares of 1 / N
            d_some, d_part = torch.autograd.grad(part, (some, weight))
            loss += part.detach()
            d_x[i : i + n] = d_some
            d_weight += d_part
        ctx.save_for_backward(d_x, d_weight)
        ctx.N = max(1, N)
        return loss / ctx.N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_x, d_weight = ctx.saved_tensors
        d_loss = d_loss / ctx.N
        return d_x * d_loss.to(d_x.dtype), d_weight * d_loss, None, None, None, None


def on_text(net, guide, idx, targets, seconds):
    """
    The loss on a batch of texts, the mean over its rows: of windows of the data at every token, of what the
    student has written up to the end of the text. A token that the teacher does not know counts as 0.
    """
    keep = targets != IGNORE
    with timed("scoring", seconds, idx.device):
        seen = guide.read(idx)[keep]
    share = row_shares(keep.nonzero()[:, 0], len(idx)) * (targets[keep] < guide.n_ids)
    x = net.hidden(idx, document_starts(idx))[keep]
    loss = LinearDivergence.apply(x, net.wte.weight[: guide.n_ids], seen, share, guide, seconds)
    if net.puzzle_format == "canvas":  # DDP waits for a gradient of every parameter
        loss = loss + 0.0 * sum(p.sum() for p in net.q_head.parameters())
    return loss


def left_to_right(net, guide, idx, targets, seconds):
    """The loss of a Route A student on a batch of answered puzzles, the mean over its rows."""
    tasks = teachers.tasks_of(idx, targets, net.puzzle_format)
    answers = [task.test[0][1] for task in tasks]
    with timed("scoring", seconds, idx.device):
        frames = guide.frames(tasks, answers)
    documents = [teachers.document(task, answer) for task, answer in zip(tasks, answers)]
    student = engine.cell_logits(net, documents, [answer.shape for answer in answers])  # (N, 11)
    parts, legal, rows = [], [], []
    for row, (task, frame, answer) in enumerate(zip(tasks, frames, answers)):
        log_p = teachers.at_tokens(frame, answer)
        parts.append(log_p if guide.reads_answers else teachers.until_first_difference(log_p, answer))
        legal.append(engine.legal_outcomes(answer.shape, limit_of(task)))
        rows += [row] * len(log_p)
    illegal = ~torch.cat(legal).to(student.device)
    teacher_log_p = torch.cat(parts).to(student.device).masked_fill(illegal, ILLEGAL)
    student = student.masked_fill(illegal, ILLEGAL)
    return mean_divergence(student, teacher_log_p, torch.tensor(rows, device=student.device), len(tasks))


def on_canvas(net, guide, idx, targets, carry, seconds):
    """The loss of a Route B student after one supervision step, mean over its rows, and its new carry."""
    here = idx.device
    new = torch.ones(len(idx), dtype=torch.bool, device=here) if carry is None else carry["halted"]
    tasks = teachers.tasks_of(idx[new], targets[new], net.puzzle_format)
    with timed("scoring", seconds, here):  # once a puzzle; then the carry keeps it
        frames = guide.frames(tasks, [task.test[0][1] for task in tasks])
    log_p = torch.full((*idx.shape, teachers.OUTCOMES), torch.nan, device=here)
    log_p[new] = teachers.on_canvases(frames, idx[new])
    words = net.puzzle_words()
    y, carry = net.carried_step({"idx": idx, "targets": targets, "teacher": log_p}, carry, words)
    cells = carry["targets"] != IGNORE
    student, teacher_log_p = F.linear(y[cells], words[ANSWER_ROWS]).float(), carry["teacher"][cells]
    loss = mean_divergence(student, teacher_log_p, cells.nonzero()[:, 0], len(idx))
    # the halting head learns whether a cell is the teacher's, as in train.py whether it is right
    known = ~teacher_log_p.isnan().any(-1)
    agrees = student[known].argmax(-1) == teacher_log_p[known].argmax(-1)
    loss = loss + net.halting_loss(y, cells.masked_scatter(cells, known), agrees)
    return loss, {**carry, "halted": net.halts(net.halt_logit(y, cells), carry)}


# -----------------------------------------------------------------------------
# in train.py's loop


@contextlib.contextmanager
def timed(what, seconds, device):
    """Adds the seconds inside, after waiting for a GPU."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    yield
    wait()
    seconds[what] += time.perf_counter() - started


def weights_of(batches, sources, device):
    """
    What the loss of each batch weighs in the mean over the step's: all rows of a source the same, over all
    processes, so a batch by its rows beside the mean of its source.
    """
    mine = [[len(b.idx) for b in batches if b.source == name] for name in sources]
    counts = runtime.sums([*map(len, mine), *map(sum, mine)], device)
    n_batches, n_rows = (dict(zip(sources, counts[i:])) for i in (0, len(sources)))
    return [len(b.idx) * n_batches[b.source] / n_rows[b.source] for b in batches]


class Distillation(torch.nn.Module):
    """What train.py's loop calls in place of a model. data: what a checkpoint says of its data."""

    def __init__(self, net, loader, data, device, precision):
        super().__init__()
        self.net, self.sources, self.device = net, loader.names, device
        self.guide = teachers.load(teacher, device, precision)
        self.seconds = {"sampling": 0.0, "scoring": 0.0}  # of the last step
        check_teacher(self.guide, loader)
        data["teacher"] = self.guide.about
        data["sources"] = sorted({*data["sources"], *self.guide.sources})  # through the teacher too
        runtime.print0(f"teacher {teacher}: {self.guide.about}")

    def prepare(self, batches, step):
        """-> the batches that the student learns from, and what the loss of each weighs in their mean."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        weights = weights_of(batches, self.sources, self.device)
        with timed("sampling", self.seconds, self.device):
            return own_batches(self.net, self.guide, batches, step), weights

    def forward(self, idx, targets, mode, carry):
        """-> None, the loss, the new carry, as a model's forward."""
        net, guide, seconds = self.net, self.guide, self.seconds
        if mode == "text" and text == "data":
            return net(idx, targets, mode="text")
        if mode == "text":
            return None, on_text(net, guide, idx, targets, seconds), None
        if net.puzzle_format == "canvas":
            return None, *on_canvas(net, guide, idx, targets, carry, seconds)
        return None, left_to_right(net, guide, idx, targets, seconds), None


def check_teacher(guide, loader):
    """ValueError where the teacher cannot teach what is in the data."""
    modes = {source.mode for source in loader.sources.values()} - ({"text"} if text == "data" else set())
    for mode in sorted(modes & set(guide.cannot)):
        raise ValueError(f"teacher {teacher} cannot teach {mode}: {guide.cannot[mode]}")
    if "text" in modes and loader.block_size > guide.context:
        raise ValueError(f"teacher {teacher} reads {guide.context} tokens: lower block_size")
    if "puzzle" in modes and loader.block_size > guide.context:
        runtime.print0(f"teacher {teacher} reads {guide.context} tokens: longer puzzles teach nothing")
    if "text" in modes and prompt_tokens + new_tokens > loader.block_size:
        raise ValueError("prompt_tokens and new_tokens are together more than block_size")


def main(argv):
    defaults = configurator.settings(globals())
    config, _ = configurator.read(globals(), argv)
    globals().update(config)
    if init_from in ("", "auto", "scratch") or not teacher:
        runtime.stop("name a student and a teacher: --init_from=PATH --teacher=PATH")
    train.train(config, defaults, Distillation)


if __name__ == "__main__":
    main(sys.argv[1:])
