"""
From a model to its attempts: a task seen from many sides, many answers, and a vote.

A *view* is the task turned or mirrored, in other colours, with its demonstrations in another order. What the model answers to a view is
turned back, and counts as a vote for that grid. Route A can also draw several answers to each view; Route B gives one, that of its surest
supervision step, and those of the others as further candidates without a vote. What is left to say which of two candidates with as many
votes comes first is a score: for Route A the log-probability of the candidate's cells under other views as well, for Route B the halting
probability. Two attempts count in ARC: where Route A has one answer alone to such a task, a second one is made
of it.

Programs are another way to an answer: the model writes functions of the language of programs.py, and those that turn every
demonstration's input into its output are run on the test input. They have passed a test, so what they give comes first.

Nothing in here reads a test output: tasks come without (`without_answers`).

Read next: ttt.py (a model that is tuned to one task), eval_arc.py (the command).
"""

import math
import re
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from model_trm import ranked
from smol import arc, engine, ttt
from smol import tokenizer as tok
from smol.loader import draw_rng

RESCORED = 4  # candidates of Route A, those with most votes, that are looked at from other views
RESCORING_VIEWS = 8  # how many views at most
PROGRAM_TOKENS = 160  # longest program written; one of four steps takes about 60
ANSWER_TOKENS = 400  # longest solution of a puzzle in words


@dataclass(frozen=True)
class Settings:
    """How a model is asked. Together with the model, this decides every answer."""

    augment: int = 1  # views of each task; the first is the task as it is
    samples: int = 1  # answers to each view (Route A, and puzzles in words); the first takes the likeliest token at every place
    temperature: float = 0.8  # of the others, and of programs
    programs: int = 0  # programs written for each ARC task
    n_sup: int | None = None  # Route B: supervision steps, None: as it was trained
    halt: float | None = (
        None  # Route B: a puzzle whose halting probability has passed this is thought about no more; None: none is
    )
    ttt_steps: int = 0  # test-time training, see ttt.py
    ttt_rank: int = 8
    ttt_lr: float = 1e-3
    seed: int = 1337


@dataclass
class Candidate:
    grid: object  # np.uint8 (h, w), or text
    votes: int = 0
    score: float = 0.0
    program: str | None = None


@dataclass
class Given:
    """What there is for one test input."""

    candidates: list  # of Candidate, all different, best first
    steps: list = field(
        default_factory=list
    )  # Route B, of the task as it is: (grid or None, halting probability) after every step


# -----------------------------------------------------------------------------
# views


@dataclass(frozen=True)
class View:
    symmetry: arc.Augment
    order: tuple  # which demonstration comes first, second, ...


def views(task, n, seed):
    """
    -> list of at most n different View, the first of them the task as it is; a longer list begins with the shorter. What may be changed is
    what does not change the task: digits of a sudoku can be permuted, but 0 is a blank; in a maze every colour means something.
    """
    rng, found = draw_rng(seed, "views", task.id), [View(arc.IDENTITY, tuple(range(len(task.train))))]
    for _ in range(20 * n):
        if len(found) >= n:
            break
        colours = np.arange(10)
        if task.kind == "arc":
            colours = rng.permutation(10)
        elif task.kind == "sudoku":
            side = len(task.test[0][0])
            colours[1 : side + 1] = 1 + rng.permutation(side)
        symmetry = arc.Augment(int(rng.integers(8)), tuple(colours.tolist()))
        view = View(symmetry, tuple(rng.permutation(len(task.train)).tolist()))
        if view not in found:
            found.append(view)
    return found


def look(view, task):
    """The task, seen so."""
    pairs = [task.train[i] for i in view.order]
    turned = (
        [(arc.augment(view.symmetry, x), arc.augment(view.symmetry, y)) for x, y in part]
        for part in (pairs, task.test)
    )
    return arc.Task(task.id, task.kind, *turned)


def without_answers(tasks):
    """The tasks, with a 1x1 grid of colour 0 in place of every test output: a model cannot read what it was not given."""
    hidden = np.zeros((1, 1), np.uint8)
    return [
        arc.Task(
            task.id,
            task.kind,
            task.train,
            [(x, hidden if isinstance(x, np.ndarray) else "") for x, _ in task.test],
        )
        for task in tasks
    ]


# -----------------------------------------------------------------------------
# votes


def vote(found):
    """
    found: (answer, votes, score, program or None), in any order -> list of Candidate, all different: first what a program gives that
    has passed all demonstrations, then by votes, then by score, which is the mean of those that came with a vote (without any: of all).
    """
    groups = {}
    for answer, votes, score, program in found:
        key = (answer.shape, answer.tobytes()) if isinstance(answer, np.ndarray) else answer
        groups.setdefault(key, []).append((answer, votes, score, program))
    out = []
    for same in groups.values():
        votes, program = sum(v for _, v, _, _ in same), next((p for *_, p in same if p), None)
        scores = [s for _, v, s, p in same if p is None and (v or not votes)] or [0.0]
        out.append(Candidate(same[0][0], votes, float(np.mean(scores)), program))
    return sorted(out, key=lambda c: (c.program is None, -c.votes, -c.score))


def rescore(model, tasks, seen, found):
    """
    Route A: the score of each task's leading candidates becomes the mean log-probability of their cells over several views, and they are
    sorted anew. tasks; for each task its views; for each task and test input a list of Candidate or None. Changes the lists.
    """
    asked = []  # (candidate, view of the task with the candidate's test input alone, the candidate seen so)
    for task, some_views, given in zip(tasks, seen, found):
        for (x, y), candidates in zip(task.test, given):
            for c in (candidates or [])[:RESCORED] if len(candidates or []) > 1 else []:
                alone = arc.Task(task.id, task.kind, task.train, [(x, y)])
                asked += [
                    (c, look(view, alone), arc.augment(view.symmetry, c.grid))
                    for view in some_views[:RESCORING_VIEWS]
                ]
    values = {}
    for (c, _, _), (log_p,) in zip(
        asked, model.answer_logits([t for _, t, _ in asked], [[g] for _, _, g in asked])
    ):
        if log_p is not None and np.isfinite(log_p).all():
            values.setdefault(id(c), []).append(float(log_p.mean()))
    for given in found:
        for candidates in given:
            if candidates and len(candidates) > 1:
                for c in candidates:
                    c.score = float(np.mean(values[id(c)])) if id(c) in values else c.score
                head = sorted(candidates[:RESCORED], key=lambda c: (c.program is None, -c.votes, -c.score))
                candidates[:RESCORED] = head


def add_seconds(model, tasks, found):
    """
    Route A, ARC tasks: where there is one candidate alone, a second one after it, without a vote, as two
    attempts count: the same grid with the next likeliest colour in the cell where the model came closest to
    it. tasks; for each task and test input a list of Candidate or None. Changes the lists.
    """
    alone = []
    for task, given in zip(tasks, found):
        for (x, _), candidates in zip(task.test, given):
            if task.kind == "arc" and len(candidates or []) == 1:
                document = arc.encode(task.kind, [*task.train, (x, candidates[0].grid)])
                alone.append((torch.from_numpy(document.astype(np.int64)), candidates))
    for part in engine.batches_by_length(alone, lambda row: len(row[0])):
        shapes = [candidates[0].grid.shape for _, candidates in part]
        logits = engine.cell_logits(model, [document for document, _ in part], shapes)
        logits = logits.split([h * (w + 1) + 1 for h, w in shapes])
        for (_, candidates), places, (h, w) in zip(part, logits, shapes):
            first = candidates[0]
            grid = torch.from_numpy(first.grid.astype(np.int64))[..., None]
            log_p = places[:-1].view(h, w + 1, -1)[:, :w, :10].float().cpu().log_softmax(-1)
            lost = log_p.gather(2, grid) - log_p.scatter(2, grid, -torch.inf)  # (h, w, 10); infinite: its own
            cell, colour = divmod(int(lost.argmin()), 10)
            if log_p.isfinite().all():
                second = first.grid.copy()
                second.flat[cell] = colour
                candidates.append(Candidate(second, 0, first.score - float(lost.min()) / (h * w)))


# -----------------------------------------------------------------------------
# answers


@torch.no_grad()
def solve(model, tasks, settings):
    """
    model: of either route. tasks: list of arc.Task, all grids or all in words -> for each task, for each test input, a Given, or None where
    it does not fit into the model's block_size. Test outputs are not read; eval_arc.evaluate takes them out before it calls this.
    """
    if tasks and isinstance(tasks[0].test[0][0], str):
        return in_words(model, tasks, settings)
    out, plain = [None] * len(tasks), []
    for i, task in enumerate(tasks):
        if settings.ttt_steps and len(task.train) > 1:
            tuned = ttt.tune(model, task, settings)
            out[i] = solve(tuned, [task], replace(settings, ttt_steps=0))[0]
        else:
            plain.append(i)
    for i, given in zip(plain, solve_grids(model, [tasks[i] for i in plain], settings)):
        out[i] = given
    return out


def solve_grids(model, tasks, settings):
    """`solve` for grids, without test-time training."""
    seen = [views(task, settings.augment, settings.seed) for task in tasks]
    flat = [(i, view) for i, some in enumerate(seen) for view in some]
    asked = [look(view, tasks[i]) for i, view in flat]
    canvas = model.puzzle_format == "canvas"
    if canvas:
        answers = model.answer(asked, n_sup=settings.n_sup, trace=True, halt=settings.halt)
    else:
        answers = model.answer(
            asked, samples=settings.samples, temperature=settings.temperature, seed=settings.seed
        )
    found = [[[] for _ in task.test] for task in tasks]
    steps = [[[] for _ in task.test] for task in tasks]
    fits = [[False] * len(task.test) for task in tasks]
    for (i, view), given in zip(flat, answers):
        for j, some in enumerate(given):
            if some is None:
                continue
            fits[i][j] = True
            # Where its numbers are not finite, Route A gives None, and Route B a grid that says nothing
            some = [answer for answer in some if answer is not None and math.isfinite(answer[1])]
            some = [
                (None if grid is None else arc.invert(view.symmetry, grid), score) for grid, score in some
            ]
            if canvas:
                if view is seen[i][0]:
                    steps[i][j] = some
                some = [(grid, p, n == 0) for n, (grid, p) in enumerate(ranked(some))]
            else:
                some = [(grid, log_p) for grid, log_p in some if grid is not None]
                some = [
                    (grid, log_p / (grid.shape[0] * (grid.shape[1] + 1) + 1), True) for grid, log_p in some
                ]
            found[i][j] += [(grid, int(votes), score, None) for grid, score, votes in some]
    for i, task in enumerate(tasks):
        if settings.programs and task.kind == "arc":
            for j, extra in enumerate(from_programs(model, task, settings)):
                found[i][j] += extra
                fits[i][j] = fits[i][j] or bool(extra)
    leading = [[vote(f) if ok else None for f, ok in zip(*both)] for both in zip(found, fits)]
    if not canvas and settings.augment * settings.samples > 1:
        rescore(model, tasks, seen, leading)
    if not canvas:
        add_seconds(model, tasks, leading)
    return [[Given(c, s) if c is not None else None for c, s in zip(*both)] for both in zip(leading, steps)]


# -----------------------------------------------------------------------------
# what is written in words


def write(model, prompts, n, room, stop, settings):
    """
    Continue each of `prompts`, lists of ids, n times, by at most as many tokens as `room` says for each -> for each a list of n lists of
    ids, without the one of `stop` that ended them. The first takes the likeliest token at every place, the others are drawn by a generator
    that depends on the prompt and on nothing else.
    """
    device = model.wte.weight.device
    ids = [torch.as_tensor(prompt, device=device) for prompt in prompts]

    def go_on(rows, room, temperature, generator=None):
        written, done = [[] for _ in room], [False] * len(room)
        try:
            for drawn in engine.generate(model, rows, max(room), temperature, stop=(), generator=generator):
                for row, token in enumerate(drawn.tolist()):
                    done[row] = done[row] or token in stop or len(written[row]) == room[row]
                    if not done[row]:
                        written[row].append(token)
                if all(done):
                    break
        except ValueError:  # logits that are not finite: of which row?
            if len(room) == 1:
                return [[]]
            return [
                go_on(rows[i : i + 1], room[i : i + 1], temperature, generator)[0] for i in range(len(room))
            ]
        return written

    if model.puzzle_format == "canvas":  # Route B reads rows of one length
        out = [go_on(p[None], [r], 0.0) for p, r in zip(ids, room)]
    else:
        out = [[written] for written in go_on(ids, room, 0.0)]
    for p, r, written in zip(ids, room, out):
        if n > 1:
            generator = torch.Generator(device).manual_seed(
                int(draw_rng(settings.seed, "write", p.tolist()).integers(2**31))
            )
            written += go_on(p.repeat(n - 1, 1), [r] * (n - 1), settings.temperature, generator)
    return out


def in_words(model, tasks, settings):
    """`solve` for puzzles in words: the answer is what stands behind 'Answer:' in the model's solution, the one with most votes first."""
    asked = [
        (i, [tok.EOT, *tok.load().encode_ordinary(f"{question}\nSolution:")])
        for i, t in enumerate(tasks)
        for question, _ in t.test
    ]
    fit = [(i, prompt) for i, prompt in asked if len(prompt) < model.config.block_size]
    room = [min(ANSWER_TOKENS, model.config.block_size - len(prompt)) for _, prompt in fit]
    out = [[None] for _ in tasks]
    if not fit:
        return out
    for (i, _), texts in zip(
        fit, write(model, [prompt for _, prompt in fit], settings.samples, room, (tok.EOT,), settings)
    ):
        answers = [re.search(r"^Answer: *(.+?) *$", tok.load().decode(ids), re.MULTILINE) for ids in texts]
        out[i] = [Given(vote([(answer[1], 1, 0.0, None) for answer in answers if answer]))]
    return out


def from_programs(model, task, settings):
    """
    Have the model write programs and run those that pass -> for each test input, a list of (grid, votes, 0.0, program text). They run in
    a limited process (sandbox.py), and only functions of the language of programs.py do.
    """
    from smol import sandbox

    prompt = [tok.EOT, tok.PROGRAM]
    for x, y in task.train:
        prompt += [tok.INPUT, *arc.encode_grid(x).tolist(), tok.OUTPUT, *arc.encode_grid(y).tolist()]
    prompt += [tok.INPUT, *arc.encode_grid(task.test[0][0]).tolist()]
    out = [[] for _ in task.test]
    if len(prompt) + PROGRAM_TOKENS > model.config.block_size:
        return out
    (written,) = write(model, [prompt], settings.programs, [PROGRAM_TOKENS], (tok.OUTPUT, tok.EOT), settings)
    texts = sorted({tok.load().decode(ids) for ids in written if all(i < tok.EOT for i in ids)})
    inputs = [x for x, _ in task.train + task.test]
    for text, result in zip(texts, sandbox.run_programs([(text, inputs) for text in texts])):
        if not result.ok:
            continue
        made = result.value
        if all(np.array_equal(grid, y) for grid, (_, y) in zip(made, task.train)):
            for j, grid in enumerate(made[len(task.train) :]):
                out[j].append((grid, 1, 0.0, text))
    return out
