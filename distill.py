"""
On-policy distillation: a student answers puzzles, a teacher says at every place of these answers what it would have written there.

    python distill.py config/distill_demo.py                                 after `make demo`: its Route B teaches its Route A
    torchrun --nproc_per_node=2 distill.py config/distill_route_b.py         two processes share the same global batch
    python distill.py config/distill_route_a.py --teacher=hf:gpt2            any of the teachers in teachers.py
    python distill.py config/distill_demo.py                                 once more: goes on from ckpt.pt

A step is as train.py's, on the same batches from the loader. A batch of text is learned as there. On a batch of puzzles
    sampling   the student writes answers (Route A, with caches) or has them on its canvas (Route B, at each supervision step); for a share
               of 1 - on_policy of the batches they are the data's, or the teacher's. No gradient goes through this
    scoring    the teacher gives its distribution at each place of these answers; one that does not read them (Route B, votes) is heard
               by Route A up to the first place where it would have written something else
    learning   the divergence between the two, mean over the places of an answer, then over answers; only the answer counts

Writes ckpt.pt (which train.py, eval_arc.py and sample.py read), log.jsonl, loss.png, config.json. Random draws follow from the seed,
the step and the batch alone, so a resumed run is the same run. Before this: train.py, teachers.py, divergences.py.
"""

import contextlib
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
from model_dense import row_shares
from model_trm import ANSWER_ROWS
from smol import arc, engine, loop, puzzles, runtime, sources, teachers
from smol import checkpoint as ckpt
from smol import tokenizer as tok
from smol.divergences import divergence
from smol.loader import Ahead, Loader, Puzzles, draw_rng, puzzle_row, read_stage
from smol.runtime import all_agree, difference, local_rank, master, rank, world_size
from smol.tokenizer import IGNORE

# -----------------------------------------------------------------------------
# ---- where it goes and what it says
out_dir = "out/distill"
init_from = ""  # the student: path of a checkpoint, whose averaged weights are taken; given again, that run
# goes on from out_dir/ckpt.pt. 'resume' goes on whatever its student was
overwrite = False  # distil anew into an out_dir that already holds a checkpoint
eval_interval = 100  # steps between validations, each of which also saves a checkpoint
eval_batches = 8  # validation batches per source, at most
eval_suites = ""  # as in train.py: suites of eval_arc.py, run in a process of their own after each checkpoint; '' for none
eval_limit = 20
eval_device = "cpu"
eval_minutes = 10.0
log_interval = 10  # steps between lines in log.jsonl
max_hours = 0.0  # stop and save after this many hours; 0 for never
push_to = ""  # as in train.py: USER/NAME on the hub, where each checkpoint is published
push_full = False
tracker = ""  # 'trackio' or 'wandb' get the same figures as log.jsonl, if installed
check_tasks = (
    32  # held-out puzzles that the teacher solves beforehand, and the student at each validation; 0 for none
)
# ---- teacher
teacher = ""  # path of a checkpoint, of a Hugging Face model, or hf:NAME
teacher_n_sup: int | None = None  # Route B: supervision steps (None: its own)
teacher_n_views = 1  # votes over this many views of each puzzle
teacher_ttt_steps = 0  # test-time training: steps on each task's demonstrations before it answers
teacher_ttt_learning_rate = 1e-3
teacher_dtype = "auto"  # of its matrices; auto: dtype
teacher_vocabulary = (
    "same"  # of a Hugging Face model: 'same' as GPT-2's, or 'cells', another one where the cell map is exact
)
# ---- what is learned
objective = "forward_kl"  # 'forward_kl', 'reverse_kl', 'jsd', or 'answers': cross-entropy on the answers, whatever the teacher's odds.
# reverse_kl and jsd are all but blind where teacher and student are certain of different things; at temperature 2, reverse_kl sees it
beta = 0.5  # of jsd: 0 leans to forward, 1 to reverse
temperature = 1.0  # softens both distributions
on_policy = 1.0  # lambda: share of the batches whose answers are the student's own
off_policy = "dataset"  # whose answers the others have: 'dataset' or 'teacher'
sample_temperature = 1.0  # at which the student writes its answers
# ---- prompts
data_dir = "data"
data = "demo"  # name of a prepared stage
data_tag: str | None = None
mixture = {}  # {source: share of the steps}; empty: the stage's own. Text keeps the language
eval_demonstrations = 0.0  # share of steps on ARC's evaluation tasks' demonstrations, never their test pairs; any report must say so
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
max_skipped = (
    20  # steps in a row whose loss or gradient is not finite: each is skipped, this many end the run
)
schedule = "wsd"  # as in train.py
warmup_iters = 20
decay_iters = 200
min_lr = 0.0
# ---- system
device = "auto"
dtype = "auto"
compile = False  # torch.compile the blocks. Route A also writes its answers through them, token by token: there it may not pay
sync_check_interval = 100  # steps between comparisons of all processes' weights; 0 for none
seed = 1337
# -----------------------------------------------------------------------------
# What they may be, as in train.py
RANGES = {
    "[1, inf)": "eval_interval eval_batches eval_limit log_interval batch_size block_size max_iters max_skipped "
    "gradient_accumulation_steps teacher_n_sup teacher_n_views",
    "[0, inf)": "check_tasks teacher_ttt_steps teacher_ttt_learning_rate sample_temperature "
    "mixture learning_rate weight_decay warmup_iters decay_iters min_lr sync_check_interval",
    "(0, inf)": "temperature",
    "[0, inf]": "max_hours grad_clip eval_minutes",
    "[0, 1)": "beta1 beta2 ema",
    "[0, 1]": "beta on_policy eval_demonstrations",
    "[0, 1e18)": "seed",
    ("forward_kl", "reverse_kl", "jsd", "answers"): "objective",
    ("dataset", "teacher"): "off_policy",
    ("same", "cells"): "teacher_vocabulary",
    ("muon", "adamw"): "optimizer",
    ("wsd", "cosine"): "schedule",
    ("", "trackio", "wandb"): "tracker",
    ("auto", "float32", "bfloat16", "float16"): "dtype teacher_dtype",
}
defaults = configurator.settings(globals())
config = configurator.configure(globals(), sys.argv[1:])
LANGUAGE_LIMIT = 0.05  # nats by which the validation loss on text may worsen before there is a warning

began = time.monotonic()
ckpt_path, log_path, evals_path = (
    os.path.join(out_dir, name) for name in ("ckpt.pt", "log.jsonl", "evals.jsonl")
)


def stop_if(problem):
    """problem: a message or None, of this process. If there is one in any process, all stop."""
    problem = all_agree(problem)
    if problem is not None:
        runtime.stop(problem)


def say(text):
    """A line for people, from one process, that does not tear the progress bar."""
    if master:
        tqdm.write(text)


def check_settings():
    """Raises ValueError, in one line, for settings that cannot be."""
    loop.check_settings(config, RANGES)
    if objective == "jsd" and beta in (0, 1):
        raise ValueError(f"jsd with beta={beta} is 0 everywhere: its limits are forward_kl and reverse_kl")
    if not init_from:
        raise ValueError("no student: name its checkpoint with --init_from=PATH")
    if not teacher and (objective != "answers" or off_policy == "teacher"):
        raise ValueError("no teacher: name one with --teacher=PATH")
    if objective == "answers" and on_policy > 0:
        raise ValueError("objective='answers' learns given answers, not the student's own: use --on_policy=0")


# ---- the prompts
EVAL_DEMOS = "arc_eval_demos"  # as prepare.py --eval_demos=True calls that source, and reports ask for


class Demonstrations(Puzzles):
    """The demonstrations of ARC's evaluation tasks, never their tests, as a source of the loader's; in no stage."""

    def __init__(self, seed, batch_tokens, block_size, puzzle_format):
        self.name, self.seed, self.augment = EVAL_DEMOS, seed, "arc"
        self.documents = [arc.encode(task.kind, task.train + task.test) for task in sources.arc_eval_demos()]
        self.batch_tokens, self.block_size, self.puzzle_format = batch_tokens, block_size, puzzle_format
        self.drawn, self.waiting, self.rows = 0, {}, {}

    def row(self, n):
        epoch, i = divmod(n, len(self.documents))
        i = draw_rng(self.seed, self.name, epoch).permutation(len(self.documents))[i]
        rng = draw_rng(self.seed, self.name, f"view {n}")
        return puzzle_row(self.documents[i], self.puzzle_format, self.augment, rng)


def make_loader():
    """train.py's, with every source of text read for validation at least, and the prompts that a stage does not hold."""
    manifest, own, _ = read_stage(data_dir, data, data_tag, verify=False)
    weights = dict(mixture or own["weights"])
    for e in manifest:
        if e["kind"] == "text":
            weights.setdefault(e["source"], 0)
    loader = Loader(
        data_dir,
        data,
        tag=data_tag,
        weights=weights,
        seed=seed,
        batch_size=batch_size,
        block_size=block_size,
        batches_per_step=gradient_accumulation_steps,
        puzzle_format=net.puzzle_format,
        rank=rank,
        world_size=world_size,
        verify=local_rank == 0,
    )
    shares, shape = (
        dict(zip(loader.names, loader.shares)),
        (batch_size * block_size, block_size, net.puzzle_format),
    )
    if eval_demonstrations:
        shares = {name: share * (1 - eval_demonstrations) for name, share in shares.items()}
        shares[EVAL_DEMOS] = eval_demonstrations
        loader.sources[EVAL_DEMOS] = Demonstrations(seed, *shape)
    loader.sources = {name: loader.sources[name] for name in shares}
    loader.names, loader.shares = list(shares), np.array(list(shares.values())) / sum(shares.values())
    return loader


def held_out_tasks(n):
    """n of the stage's held-out puzzles, as many of each source as there are."""
    found = [
        [arc.decode(shards.document(i)) for i in range(min(shards.n_documents, n))]
        for kind, name, shards in loader.val
        if kind == "puzzle" and name in loader.names
    ]
    mixed = [source[i] for i in range(n) for source in found if i < len(source)]
    return [arc.Task("", kind, pairs[:-1], pairs[-1:]) for kind, pairs in mixed[:n]]


# ---- who and where we are; student, teacher, data, optimizer
held, started_from, another, problem = None, None, None, None
try:
    check_settings()
    tracked = loop.tracker_module(tracker if master else "")
    device = runtime.pick_device(device)
    device = f"cuda:{local_rank}" if device == "cuda" else device
    dtype = runtime.pick_dtype(dtype, device)
except ValueError as e:
    runtime.stop(e)
device_type = device.split(":")[0]
if device_type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
elif world_size == 1 and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(os.cpu_count() or 1)
runtime.start_processes(device_type)
torch.manual_seed(seed)
try:
    if master and os.path.isdir(out_dir):
        held = loop.lock(out_dir)
except (OSError, ValueError) as e:
    problem = str(e)
stop_if(problem)
try:
    started_from, student_path, resumed = loop.starting_point(init_from, out_dir, overwrite)
    if resumed and "student" not in started_from["train"]:
        raise ValueError(
            f"{student_path} was not written by distill.py: start from its weights with "
            f"--init_from={student_path} and another --out_dir"
        )
except (OSError, ValueError) as e:
    problem = str(e)
stop_if(problem)
stop_if(loop.same_start(started_from["train"]["iter"] if resumed else None, device))
if resumed and started_from["train"]["iter"] >= max_iters:
    loop.nothing_left(started_from, student_path, max_iters, push_to, push_full, say)
try:
    model = started_from["model"]
    net = ckpt.make_model(
        model, started_from["model_config"] | ({} if recompute is None else {"recompute": recompute})
    )
    ckpt.load_weights(
        net,
        started_from["weights"] if resumed else started_from["ema"] or started_from["weights"],
        student_path,
    )
    net.to(device)
    if block_size is None:
        block_size = net.config.block_size
    guide = None
    if teacher:
        guide = teachers.load(
            teacher,
            device,
            dtype if teacher_dtype == "auto" else teacher_dtype,
            teacher_vocabulary,
            n_sup=teacher_n_sup,
            n_views=teacher_n_views,
            ttt_steps=teacher_ttt_steps,
            ttt_learning_rate=teacher_ttt_learning_rate,
        )
    loader = make_loader()
    optimizers = loop.make_optimizers(net, optimizer, weight_decay, learning_rate, (beta1, beta2))
    pinned = {
        "stage": data,
        "tag": data_tag,
        "snapshot": loader.snapshot,
        "shards": loader.fingerprint,
        "teacher": guide and guide.about,
        "manifest": loader.manifest,
        "data_dir": data_dir,
        "shares": loader.rounded_shares(),
    }
    # what the weights have seen: here, before, and through the teacher
    seen = started_from["train"].get("data", {}).get("sources", [])
    pinned["sources"] = sorted({*loader.names, *seen, *(guide.sources if guide else [])})
    if resumed:
        before = started_from["train"]["data"]
        another = loop.other_data(before, pinned)
        if before["teacher"] != pinned["teacher"]:
            teachers_were = f"{before['teacher']!s:.300}; now {pinned['teacher']!s:.300}"
            raise ValueError(f"{student_path} was distilled with another teacher: {teachers_were}")
        loader.load_state_dict(started_from["train"]["loader"])
        if started_from["train"]["optimizer_name"] != optimizer:
            raise ValueError(
                f"{ckpt_path} has the state of optimizer {started_from['train']['optimizer_name']!r}, not {optimizer!r}"
            )
        for o, state in zip(optimizers, started_from["train"]["optimizers"]):
            ckpt.load_optimizer(o, state)
except (OSError, ValueError) as e:
    problem = str(e)
stop_if(problem)

average = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema else None
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
autocast = (
    torch.autocast(device_type, dtype=getattr(torch, dtype))
    if dtype != "float32"
    else contextlib.nullcontext()
)
train = {
    "iter": 0,
    "seconds": 0.0,
    "cpu_seconds": 0.0,
    "tokens": 0,
    "val_losses": {},
    "val_loss": None,
    "skipped": 0,
    "skipped_in_a_row": 0,
    "student": student_path,
    "text_before": None,
    "solved": None,
}
carries, saved_step = {}, None  # saved_step: of the checkpoint of this run that is in out_dir
if resumed:
    state = started_from["train"]
    train = {k: state[k] for k in train}
    saved_step = train["iter"]
    if average is not None:
        for k, v in (started_from["ema"] or {}).items():
            average[k].copy_(v)
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    if len(state["rng"]) == world_size:
        loop.restore_random_state(state["rng"], device_type)
    if all(
        started_from["config"][k] == config[k]
        for k in ("batch_size", "block_size", "gradient_accumulation_steps")
    ):
        carries = loop.own_carries(state["carries"])
started_from = None  # free its memory


# ---- the pieces of a step
class Stopwatch:
    """Seconds by what they were spent on; a GPU is waited for, or the times would be of launching only."""

    def __init__(self):
        self.seconds = {"sampling": 0.0, "scoring": 0.0, "learning": 0.0}

    @contextlib.contextmanager
    def measure(self, what):
        started = time.perf_counter()
        yield
        if device_type == "cuda":
            torch.cuda.synchronize()
        self.seconds[what] += time.perf_counter() - started


def generator_for(number):
    """Random numbers for the answers to batch `number` of this step, the same whichever process has it."""
    return torch.Generator().manual_seed(
        int(draw_rng(seed, f"answers {train['iter']}", number).integers(2**62))
    )


def is_right(task, answer):
    """Whether an answer is verified: by the checker of its kind, else by comparison with the data's."""
    puzzle, expected = task.test[0]
    if answer is None or answer.shape != expected.shape:
        return False
    checker = {"sudoku": puzzles.check_sudoku, "maze": puzzles.check_maze}.get(task.kind)
    return np.array_equal(answer, expected) or bool(checker and checker(puzzle, answer))


def distance(student, teacher_says, rows, n_rows):
    """student, teacher_says (N, 11); rows (N,), the answer each place belongs to. Mean over the places of an answer, then over answers."""
    known = ~teacher_says.isnan().any(-1)
    if not known.any():
        return 0.0 * student.sum()
    each = divergence(student[known], teacher_says[known], objective, beta, temperature)
    return (each * row_shares(rows[known], n_rows)).sum()


def opinions(tasks, answers, stats):
    """The teacher's frames. One that says nothing has logits that are not finite: its step is skipped."""
    frames = guide.frames(tasks, answers)
    stats["mute"] += sum(frame is not None and bool(frame.isnan().all()) for frame in frames)
    return frames


def left_to_right(batch, watch, stats):
    """The loss of a Route A student on a batch of puzzles."""
    tasks = teachers.tasks_of(batch.idx, batch.targets, net.puzzle_format)
    own = draw_rng(seed, f"policy {train['iter']}", batch.key[0]).random() < on_policy
    with watch.measure("sampling"), autocast:
        if own:
            noise = [draw_rng(seed, f"answers {train['iter']}", batch.key[0])] * len(
                tasks
            )  # the same whichever process has the batch
            prompts, limits = (
                [teachers.prompt(t) for t in tasks],
                [arc.canvas_shape(t.train, t.test[0][0]) for t in tasks],
            )
            answers = [
                a and a[0] for a in engine.decode_grids(net, prompts, limits, 1, sample_temperature, noise)
            ]
        else:
            answers = given_answers(tasks)
    if own:
        stats["own"] += len(tasks)
        stats["own_right"] += sum(map(is_right, tasks, answers))
        stats["mute"] += sum(answer is None for answer in answers)  # the student's logits were not finite
    with watch.measure("scoring"), autocast:
        frames = opinions(tasks, answers, stats) if objective != "answers" else [None] * len(tasks)
    kept = [i for i in range(len(tasks)) if answers[i] is not None]
    shapes = [answers[i].shape for i in kept]
    stats["answers"], stats["unscored"] = (
        stats["answers"] + len(tasks),
        stats["unscored"] + sum(f is None for f in frames),
    )
    if not kept:
        return 0.0 * sum(p.sum() for p in net.parameters())
    with watch.measure("learning"):
        with autocast:
            student = engine.cell_logits(net, [teachers.document(tasks[i], answers[i]) for i in kept], shapes)
        rows = torch.repeat_interleave(
            torch.tensor(kept), torch.tensor([h * (w + 1) + 1 for h, w in shapes])
        ).to(device)
        said = [
            teachers.places_of_answer(teachers.outcomes_of(answers[i], h + 1, w + 1)[..., None], h, w)[
                :, 0
            ].long()
            for i, (h, w) in zip(kept, shapes)
        ]
        outcomes = torch.cat(said).to(device)
        if objective == "answers":
            return (F.cross_entropy(student, outcomes, reduction="none") * row_shares(rows, len(tasks))).sum()
        nothing = torch.full((1, 1, teachers.OUTCOMES), torch.nan)
        says = [
            teachers.places_of_answer(nothing if frames[i] is None else frames[i], *shape)
            for i, shape in zip(kept, shapes)
        ]
        if not guide.conditional:
            says = [teachers.until_they_part(*both) for both in zip(says, said)]
        return distance(student, torch.cat(says).to(device), rows, len(tasks))


def given_answers(tasks):
    """Answers that are not the student's own: the data's, or the teacher's (None where a task is too long for it)."""
    return [task.test[0][1] for task in tasks] if off_policy == "dataset" else guide.write(tasks)


def on_a_canvas(batch, watch, stats, carry):
    """
    The loss of a Route B student after one supervision step, and its new carry. A puzzle stays for several steps, and what a teacher says
    stays with it, unless that depends on the answer: then the answer of each step is scored anew.
    """
    idx, targets = batch.idx.to(device), batch.targets.to(device)
    new = torch.ones(len(idx), dtype=torch.bool) if carry is None else carry["halted"].cpu()
    fresh = {"idx": idx, "targets": targets}
    tasks = teachers.tasks_of(batch.idx[new], batch.targets[new], net.puzzle_format)
    with watch.measure("scoring"), autocast:
        if objective == "answers" and off_policy == "teacher":
            answers, where = guide.write(tasks), new.nonzero()[:, 0].tolist()
            for i, task, answer in zip(where, tasks, answers):
                row = (np.zeros(0, np.int64), np.zeros(0, np.int64))
                if answer is not None:
                    row = puzzle_row(
                        arc.encode(task.kind, [*task.train, (task.test[0][0], answer)]), "canvas", "none"
                    )
                targets[i] = IGNORE
                if len(row[0]) == int(
                    (batch.idx[i] != tok.PAD).sum()
                ):  # else its canvas has another size: the rare larger ones
                    targets[i, : len(row[1])] = torch.from_numpy(row[1])
        elif objective != "answers" and not guide.conditional:
            fresh["teacher"] = torch.full((*idx.shape, teachers.OUTCOMES), torch.nan, device=device)
            frames = opinions(tasks, [task.test[0][1] for task in tasks], stats)
            fresh["teacher"][new] = teachers.on_canvas(frames, idx[new])
    with watch.measure("learning"), autocast:
        words = net.puzzle_words()
        y, carry = net.carried_step(fresh, carry, words)
        cells = arc.canvas_cells(carry["idx"], arc.positions(carry["idx"]))
        rows = cells.nonzero()[:, 0]
        student = F.linear(y[cells], words[ANSWER_ROWS]).float()
        if objective == "answers":
            loss, agreed = net.canvas_loss(y, carry["targets"], carry["targets"] != IGNORE, words)
    own = (
        objective != "answers"
        and draw_rng(seed, f"policy {train['iter']}", batch.key[0]).random() < on_policy
    )
    answers, tasks = None, None
    if objective != "answers" and guide.conditional:
        with watch.measure("sampling"):
            tasks = teachers.tasks_of(carry["idx"].cpu(), carry["targets"].cpu(), net.puzzle_format)
            if own:
                # where logits are not finite, neither is the loss, and the step is skipped: any draw will do
                logits = student.detach().cpu().nan_to_num()
                outcomes = engine.sample(logits, sample_temperature, generator=generator_for(batch.key[0]))
                answers = teachers.read_canvases(outcomes, carry["idx"].cpu())
            else:
                answers = given_answers(tasks)
    if objective != "answers":
        with watch.measure("scoring"), autocast:
            if guide.conditional:
                says = teachers.on_canvas(opinions(tasks, answers, stats), carry["idx"])
            else:
                says = carry["teacher"]
            says = says[cells]
        with watch.measure("learning"):
            loss = distance(student, says, rows, len(idx))
            known = ~says.isnan().any(-1)
            scored = torch.bincount(rows[known], minlength=len(idx)) > 0
            differs = (student.argmax(-1) != says.argmax(-1)) & known
            agreed = (torch.bincount(rows, differs.float(), minlength=len(idx)) == 0) & scored
        stats["unscored"] += int((~scored).sum())
    stats["answers"] += len(idx)
    # the answers on the canvas now, as the model would give them: whatever it learns from, it is told about these
    wanted = torch.where(
        carry["targets"][cells] == tok.VOID, teachers.OVER, carry["targets"][cells] - tok.CELL0
    )
    stats["own"] += len(idx)
    stats["own_right"] += int(
        (torch.bincount(rows, (student.argmax(-1) != wanted).float(), minlength=len(idx)) == 0).sum()
    )
    with watch.measure("learning"):
        q = net.halt_logit(
            y
        )  # learns to tell whether the teacher would say the same, as it learned whether an answer is right
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q, agreed.float())
    return loss, {**carry, "halted": net.halts(q, carry)}


def average_gradients():
    """Every process ends up with the same mean of all processes' gradients; a weight without one, in all of them alike, has none."""
    if world_size > 1:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(flat)
        for g, mean in zip(grads, flat.div_(world_size).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))


def figures():
    """What a checkpoint tells of the run."""
    rate = train["tokens"] / train["seconds"] if train["seconds"] else None
    return {**train, "tokens_per_second": rate, "data": pinned}


def save_checkpoint():
    """Everything that the rest of the run depends on. Returns whether it is on disk; if not, the checkpoint before still is."""
    whole = {
        **figures(),
        "loader": ahead.state,
        "optimizer_name": optimizer,
        "optimizers": [o.state_dict() for o in optimizers],
        "scaler": scaler.state_dict(),
        "rng": loop.random_states(device_type),
        "carries": loop.everyones_carries(carries, device),
    }
    keep = saved_step is not None
    return loop.save_checkpoint(ckpt_path, net, model, config, average, whole, device, say, keep)


def diverged(what):
    """What is in memory is not worth saving: stop, with what there is on disk."""
    there = loop.to_go_on_from(ckpt_path, saved_step)
    runtime.stop(
        f"{what}; {there}. Lower learning_rate (now {learning_rate:g}), or see whether the teacher "
        f"{teacher} works"
    )


def write_log(entry):
    if master:
        loop.write_log(entry, log_path, say, tracked)


def validate():
    """As train.py does, and held-out puzzles, solved by the averaged weights; language is guarded."""
    train["val_losses"], train["val_loss"] = loop.validate(
        net, average, loader, eval_batches, autocast, device
    )
    if not all(map(math.isfinite, train["val_losses"].values())):
        diverged(f"the validation loss of step {train['iter']} is not finite ({train['val_losses']})")
    entry = {"iter": train["iter"], "val_loss": train["val_loss"], "val_losses": train["val_losses"]}
    if tasks:
        with loop.averaged_weights(net, average), autocast:
            entry |= {"student_solved": teachers.solved(teachers.Ours(net, {}), tasks), "of": len(tasks)}
        train["solved"] = entry["student_solved"]
    losses = ", ".join(f"{k} {v:.3f}" for k, v in train["val_losses"].items())
    found = [f"validation {losses}"] if losses else []
    found += [f"solved {train['solved']:.1%} of {len(tasks)} held-out puzzles"] if tasks else []
    if found:
        write_log(entry)
        say(f"step {train['iter']}: {'; '.join(found)}")
    if train["text_before"] is None:
        train["text_before"] = train["val_loss"]
    elif train["val_loss"] is not None and train["val_loss"] > train["text_before"] + LANGUAGE_LIMIT:
        say(
            f"warning: the loss on text is {train['val_loss']:.3f}, {train['val_loss'] - train['text_before']:.3f} nats above the "
            f"{train['text_before']:.3f} before distillation: give text a larger share of the mixture, or lower learning_rate"
        )


# ---- ready
if master:
    try:
        os.makedirs(out_dir, exist_ok=True)
        held = held or loop.lock(out_dir)
        if not resumed and os.path.exists(ckpt.previous(ckpt_path)):
            os.remove(ckpt.previous(ckpt_path))  # of the run that this one replaces
        for path in (log_path, evals_path):
            runtime.cut_log(path, train["iter"] if resumed else -1)
        configurator.save(config, os.path.join(out_dir, "config.json"))
    except OSError as e:
        problem = f"cannot write to {out_dir}: {e.strerror}"
    except ValueError as e:
        problem = str(e)
stop_if(problem)
if master:
    print(configurator.show(config, defaults))
    print(
        f"student {student_path} ({model}, {net.num_params() / 1e6:.2f}M), {dtype} on {runtime.device_name(device)}, {optimizer}, {world_size} "
        f"process{'es' * (world_size > 1)}, prompts {', '.join(loader.names)}\nteacher {json.dumps(guide and guide.about)}"
    )
    start = f"going on after step {train['iter']} of" if resumed else "from the weights of"
    print(f"{start} {student_path}, with {loop.place_of(pinned)}")
    if another:
        print(f"  changed: {another}")
    if EVAL_DEMOS in pinned["sources"]:
        print(
            "the demonstrations of ARC's evaluation tasks are among what it learns from: any report of its results must say so"
        )
    if tracked:
        tracked.init(
            project="smol-llm",
            name=os.path.basename(os.path.normpath(out_dir)),
            config=config,
            resume="allow",
        )
if compile:
    compile = loop.compile_blocks(net, loader, autocast, scaler, device, say)
loop.say_what_is_not_validated(loader, eval_batches, say)
interrupted = loop.catch_signals()
evaluation = loop.Evaluation(out_dir, eval_suites if master else "", eval_limit, eval_device, say)
publication = loop.Publication(out_dir, push_to if master else "", push_full, say)
net.train()
tasks = held_out_tasks(check_tasks)
if not resumed:
    validate()
    if guide is not None and tasks:
        with autocast:
            theirs = teachers.solved(guide, tasks)
        write_log({"iter": 0, "teacher_solved": theirs, "of": len(tasks)})
        say(f"held-out puzzles solved: teacher {theirs:.1%}, student {train['solved']:.1%}, of {len(tasks)}")
        if theirs < train["solved"]:
            say(
                f"warning: the teacher ({theirs:.1%}) is weaker than the student ({train['solved']:.1%}) on {len(tasks)} held-out puzzles"
            )
ahead = Ahead(loader, pin=device_type == "cuda")
progress = tqdm(
    total=max_iters,
    initial=train["iter"],
    disable=None if master else True,
    unit="step",
    dynamic_ncols=True,
    mininterval=1.0,
)
since_log, stopping, saved, due = {}, False, True, False

# ---- go
while train["iter"] < max_iters:
    started, cpu_started = time.perf_counter(), time.process_time()
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
    except ValueError as e:  # no prompt fits into block_size: the same in every process
        runtime.stop(e)
    watch, new_carries = Stopwatch(), {}
    stats = {"loss": 0.0, "tokens": 0, "answers": 0, "unscored": 0, "mute": 0, "own": 0, "own_right": 0}
    try:
        for batch in batches:
            if batch.mode == "text":
                with watch.measure("learning"), autocast:
                    loss = net(batch.idx.to(device), batch.targets.to(device), mode="text")[1]
            elif net.puzzle_format == "canvas":
                loss, carry = on_a_canvas(batch, watch, stats, loop.moved(carries.get(batch.key), device))
                new_carries[batch.key] = loop.moved(carry, "cpu")
            else:
                loss = left_to_right(batch, watch, stats)
            with watch.measure("learning"):
                scaler.scale(loss / len(batches)).backward()
            stats["loss"] += loss.item() / len(batches) / world_size
            stats["tokens"] += batch.tokens
    except RuntimeError as e:
        if not runtime.out_of_memory(e):
            raise
        runtime.stop(
            f"out of memory in a {batch.mode} batch of {len(batch.idx)} x {batch.idx.shape[1]} tokens: lower batch_size (and "
            "raise gradient_accumulation_steps), or set --recompute=True",
            everyone=False,
        )
    with watch.measure("learning"):
        average_gradients()
        for o in optimizers:
            scaler.unscale_(o)
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf).item()
        ending = bool(interrupted) or bool(max_hours and time.monotonic() - began > 3600 * max_hours)
        *sums, stopping = runtime.sums([*stats.values(), ending], device)
        sums = dict(zip(stats, sums))
        loss = math.nan if sums["mute"] else sums["loss"]
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
    train["cpu_seconds"] += time.process_time() - cpu_started
    train["tokens"] += int(sums["tokens"])
    train["skipped"] += not finite
    train["skipped_in_a_row"] = 0 if finite else train["skipped_in_a_row"] + 1
    for k, v in {**sums, **watch.seconds, "seconds": seconds}.items():
        since_log[k] = since_log.get(k, 0) + v
    progress.set_postfix_str(f"{batches[0].source} loss {loss:.3f}", refresh=False)
    progress.update()
    if not finite:
        write_log(
            {"iter": train["iter"], "loss": None, "source": batches[0].source, "skipped": train["skipped"]}
        )
        say(f"step {train['iter']} skipped: loss {loss:.3g}, gradient norm {grad_norm:.3g}")
        if train["skipped_in_a_row"] >= max_skipped:
            what = "what teacher or student say" if sums["mute"] else "loss or gradient"
            diverged(
                f"in {train['skipped_in_a_row']} steps in a row {what} was not finite, the last is step "
                f"{train['iter']}"
            )
    elif train["iter"] % log_interval == 0 or train["iter"] == max_iters:
        spent = sum(since_log[k] for k in watch.seconds) or 1.0
        entry = {
            "iter": train["iter"],
            "loss": loss,
            "source": batches[0].source,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": train["tokens"],
            "seconds": round(train["seconds"], 3),
            "cpu_seconds": round(train["cpu_seconds"], 3),
            "tokens_per_second": round(since_log["tokens"] / since_log["seconds"], 1),
            **{k: round(since_log[k] / spent, 4) for k in watch.seconds},
            "own_right": round(since_log["own_right"] / since_log["own"], 4) if since_log["own"] else None,
            "unscored": round(since_log["unscored"] / since_log["answers"], 4)
            if since_log["answers"]
            else None,
            "memory_gb": round(runtime.peak_memory(device) / 1e9, 3),
            "skipped": train["skipped"],
        }
        write_log(entry)
        say(
            f"step {train['iter']}: loss {loss:.4f} ({batches[0].source}), lr {lr:.2e}, gradient {grad_norm:.2f}; sampling "
            f"{entry['sampling']:.0%}, scoring {entry['scoring']:.0%}, learning {entry['learning']:.0%} of the time"
            + (f", {entry['own_right']:.1%} of its own answers right" if since_log["own"] else "")
            + (
                f", {entry['unscored']:.0%} of the answers without the teacher's opinion"
                if entry["unscored"]
                else ""
            )
        )
        since_log = {}
    if sync_check_interval and (train["iter"] % sync_check_interval == 0 or train["iter"] == max_iters):
        both = torch.tensor([loss, grad_norm], dtype=torch.float64, device=device)
        problem = difference(
            {
                **dict(net.named_parameters()),
                **{f"the average of {k}": v for k, v in (average or {}).items()},
                "the loss": both[:1],
                "the gradient norm": both[1:],
            }
        )
        if problem:
            runtime.stop(
                f"processes are out of sync at step {train['iter']}: {problem}; go on from {ckpt_path} with --init_from=resume"
            )
    evaluation.collect()
    publication.collect()
    due = due or train["iter"] % eval_interval == 0 or train["iter"] == max_iters or bool(stopping)
    if due and (finite or loop.only_scaling(loss, scaler)):  # as in train.py
        if not stopping:
            validate()
        wrong = loop.unsound(net, average)
        if wrong:
            diverged(f"after step {train['iter']} there are weights that are not finite ({wrong})")
        saved, due = save_checkpoint(), False
        saved_step = train["iter"] if saved else saved_step
        if master:
            try:
                runtime.draw_losses(out_dir)
            except OSError as e:
                say(f"could not draw loss.png: {e.strerror}")
        if saved and not stopping:
            evaluation.start(train["iter"])
            publication.start(train["iter"])
    if stopping:
        break
progress.close()
ahead.close()
lost = f"; {loop.to_go_on_from(ckpt_path, saved_step)}"  # where the last steps are
if not saved and not due:
    lost = loop.save_weights_alone(ckpt_path, net, model, config, average, figures()) + lost
if tracked:
    tracked.finish()
publication.end(train["iter"], at_once=bool(interrupted) or due or not saved)
evaluation.end(0 if stopping else eval_minutes)
if due:
    diverged(f"the last steps up to {train['iter']} were skipped, as not finite, and nothing was saved")
if not saved:
    runtime.stop(f"step {train['iter']} could not be saved to {ckpt_path}{lost}")
if stopping:
    why = (
        f"by {interrupted[0][0]}"
        if interrupted
        else f"after {max_hours:g} hours"
        if max_hours
        else "by another process"
    )
    say(f"stopped {why} after step {train['iter']}; go on with --init_from=resume (saved to {ckpt_path})")
else:
    if tasks:
        say(f"held-out puzzles solved: student {train['solved']:.1%}, of {len(tasks)}")
    if train["val_loss"] is not None:
        say(f"text: validation loss {train['text_before']:.3f} before, {train['val_loss']:.3f} after")
runtime.end_processes()
