"""
From a model to its attempts: a task in many views, many answers, and a vote.

A *view* is the task turned or mirrored, with other colours and its demonstrations in another order. The
model's answer to a view is turned back and counts as a vote for that grid. Route A can also draw several
answers to each view. Each rollout of Route B gives one, that of its most confident supervision step; those
of the other steps are candidates without a vote. Candidates with equal votes are ordered by their halting
probability. Route A scores every candidate in every view, and its first attempt is the one with the best
score (`rescore`).

Programs are another way: the model writes functions of the language of programs.py, and those that turn every
demonstration's input into its output are run on the test input. They have passed a test, so they come first.

Test-time training tunes a copy of the model to a task's own demonstrations, each in turn as the question,
before it answers, and then drops the copy (Akyürek et al., arXiv 2411.07279).

Nothing in here reads a test output: tasks come without (`without_answers`). Read next: eval_arc.py (what
counts as right, and the command).
"""

import contextlib
import copy
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from smol import arc, engine, programs
from smol import tokenizer as tok
from smol.engine import NOISE, chosen_rollout, ranked
from smol.loader import bucket_length, draw_rng, pad_rows, puzzle_row

TEMPERATURE = 0.8  # of all samples but the first, which is greedy
PROGRAM_TOKENS = 160  # longest program; one of four steps takes about 60
ANSWER_TOKENS = 200  # longest solution of a puzzle in words; they take 165 at most


@dataclass(frozen=True)
class Settings:
    """How a model is asked. Together with the model, this decides every answer."""

    augment: int = 1  # views of each task; the first is the task as it is
    samples: int = 1  # answers per view (Route A, and puzzles in words); the first is greedy
    programs: int = 0  # programs written for each ARC task
    n_sup: int | None = None  # Route B: supervision steps; None: as it was trained
    halt: float | None = None  # Route B: a puzzle stops once its halting probability is above this
    n_rollouts: int = 1  # Route B: answers to a view, all but the first with noise, that vote
    noise: float = NOISE  # on z, which has size 1
    ttt_steps: int = 0  # steps of test-time training
    ttt_lr: float = 1e-3
    seed: int = 1337


def for_route_b(settings):
    """What Route B's answer takes of the settings."""
    return {k: getattr(settings, k) for k in ("n_sup", "halt", "n_rollouts", "noise", "seed")}


def asks_for_route_b(settings):
    """Whether something is set that only Route B has."""
    names = ("n_sup", "halt", "n_rollouts", "noise")
    return any(getattr(settings, k) != getattr(Settings, k) for k in names)


@dataclass
class Candidate:
    grid: object  # np.uint8 (h, w), or text
    votes: int = 1
    score: float = 0.0
    program: str | None = None


@dataclass
class Given:
    """What a model gives for one test input."""

    candidates: list  # of Candidate, all different, best first
    # Route B: (grid or None, probability) of each step of a rollout of the first view that gave its answer
    steps: list = field(default_factory=list)


# -----------------------------------------------------------------------------
# views


@dataclass(frozen=True)
class View:
    symmetry: arc.Augment
    order: tuple  # which demonstration comes first, second, ...


def views(task, n, seed):
    """
    At most n different views, the first of them the task as it is; a longer list begins with the shorter.
    Colours are permuted as far as the rules allow: 0 is a blank in a sudoku, and in a maze every colour has
    a meaning.
    """
    rng = draw_rng(seed, "views", task.id)
    found = [View(arc.IDENTITY, tuple(range(len(task.train))))]
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


def apply_view(view, task):
    def seen(pairs):
        return [tuple(arc.augment(view.symmetry, grid) for grid in pair) for pair in pairs]

    return arc.Task(task.id, task.kind, seen([task.train[i] for i in view.order]), seen(task.test))


def without_answers(tasks):
    """The tasks with a 1x1 grid of colour 0, or an empty text, in place of every test output."""
    blank = np.zeros((1, 1), np.uint8)

    def hidden(task):
        return [(x, "" if isinstance(x, str) else blank) for x, _ in task.test]

    return [replace(task, test=hidden(task)) for task in tasks]


# -----------------------------------------------------------------------------
# votes and scores


def rank(candidate):
    """Sort key: programs that passed all demonstrations first, then by votes, then by score."""
    return candidate.program is None, -candidate.votes, -candidate.score


def vote(answers):
    """
    answers: Candidates of all views, in any order -> different ones, best first. The score is the mean of
    those answers that came with a vote; without any, of all.
    """
    groups = defaultdict(list)
    for a in answers:
        groups[engine.same_grid(a.grid)].append(a)
    candidates = []
    for same in groups.values():
        votes = sum(a.votes for a in same)
        scores = [a.score for a in same if not a.program and (a.votes or not votes)] or [0.0]
        program = next((a.program for a in same if a.program), None)
        candidates.append(Candidate(same[0].grid, votes, float(np.mean(scores)), program))
    return sorted(candidates, key=rank)


def rescore(model, asked):
    """
    Route A: the score of a candidate becomes the mean log-probability of its tokens over views of its task,
    and the two attempts are the candidate with the best score, and of the others the one with most votes: the
    two are often right about different tasks. asked: list of (task, its views, number of the test input,
    candidates, which are sorted again in place).
    """
    seen, answers = [], []
    for task, some_views, j, candidates in asked:
        question = replace(task, test=[task.test[j]])
        for view in some_views:
            seen.append(apply_view(view, question))
            answers.append([arc.augment(view.symmetry, c.grid) for c in candidates])
    # as many tokens as a view has: a grid that is turned has other rows
    each = zip(model.score_answers(seen, answers), answers)
    scores = (log_p / np.array([tokens_of(grid) for grid in grids]) for log_p, grids in each)
    for _, some_views, _, candidates in asked:
        log_p = np.stack([next(scores) for _ in some_views])  # (views, candidates), per token
        finite = log_p[np.isfinite(log_p).all(1)]
        for n, c in enumerate(candidates):
            c.score = float(finite[:, n].mean()) if len(finite) else c.score
        candidates.sort(key=lambda c: (c.program is None, -c.score))
        candidates[1:] = sorted(candidates[1:], key=rank)


def tokens_of(grid):
    """Of a grid as it is written: its cells, the end of each row, and its own end."""
    return grid.shape[0] * (grid.shape[1] + 1) + 1


# -----------------------------------------------------------------------------
# answers


@torch.no_grad()
def solve(model, tasks, settings):
    """
    model: of either route; tasks: list of arc.Task, all grids or all in words. Returns for each task, for
    each test input, a Given, or None where it does not fit into the model's block_size.
    """
    if tasks and isinstance(tasks[0].test[0][0], str):
        return solve_in_words(model, tasks, settings)
    if settings.ttt_steps:
        plain = replace(settings, ttt_steps=0)
        return [solve_grids(tune(model, task, settings), [task], plain)[0] for task in tasks]
    return solve_grids(model, tasks, settings)


def solve_grids(model, tasks, settings):
    """`solve` for grids, without test-time training."""
    canvas = model.puzzle_format == "canvas"
    asked = [(i, v) for i, task in enumerate(tasks) for v in views(task, settings.augment, settings.seed)]
    seen = [apply_view(view, tasks[i]) for i, view in asked]
    if canvas:
        answers = model.answer(seen, trace=True, **for_route_b(settings))
    else:
        answers = model.answer(seen, settings.samples, TEMPERATURE, settings.seed)

    votes = [[[] for _ in task.test] for task in tasks]
    steps = [[[] for _ in task.test] for task in tasks]
    fit = [[[] for _ in task.test] for task in tasks]  # views that are not too long
    for (i, view), given in zip(asked, answers):
        for j, some in enumerate(given):
            if some is None:
                continue
            if canvas:
                some = [(g if g is None else arc.invert(view.symmetry, g), p) for g, p in some]
                if not fit[i][j]:
                    steps[i][j] = chosen_rollout(some, settings.n_rollouts)
                votes[i][j] += [Candidate(g, n, p) for g, p, n in ranked(some, settings.n_rollouts)]
            else:  # the score is that of the tokens as they were written: turned back, there may be others
                for grid, log_p in some:
                    votes[i][j].append(Candidate(arc.invert(view.symmetry, grid), 1, log_p / tokens_of(grid)))
            fit[i][j].append(view)
    for task, given in zip(tasks, votes):
        if settings.programs and task.kind == "arc":
            for some, passed in zip(given, solve_by_programs(model, task, settings)):
                some += passed

    found = [[vote(some) for some in given] for given in votes]
    if not canvas:
        several = []  # answers of a test input to choose from
        for i, task in enumerate(tasks):
            for j, candidates in enumerate(found[i]):
                if fit[i][j] and len(candidates) > 1:
                    several.append((task, fit[i][j], j, candidates))
        rescore(model, several)
    return [
        [Given(c, shown) if c or fitting else None for c, shown, fitting in zip(*of_task)]
        for of_task in zip(found, steps, fit)
    ]


# -----------------------------------------------------------------------------
# answers that are written as text


def write(model, prompts, n, max_tokens, seed=0):
    """
    Continue each of `prompts`, lists of ids, n times. Returns for each prompt n texts as lists of ids, which
    end before the first that is no text. The first is greedy, the others are drawn with random numbers that
    depend on seed and prompt alone. Where logits are not finite nothing has been written.
    """
    uniform = [draw_rng(seed, "write", prompt).random((n - 1, max_tokens)) for prompt in prompts]
    uniform = torch.from_numpy(np.concatenate(uniform))
    rows = [torch.tensor(prompt) for prompt in prompts]
    again = [row for row in rows for _ in range(n - 1)]
    try:
        texts = engine.continue_texts(model, rows, torch.zeros(len(rows), max_tokens), 0, tok.END + 1)
        texts += engine.continue_texts(model, again, uniform, TEMPERATURE, tok.END + 1)
    except engine.NotFinite:
        return [[[]] * n for _ in prompts]
    texts = [list(itertools.takewhile(lambda i: i < tok.EOT, ids.tolist())) for ids in texts]
    drawn = texts[len(rows) :]
    return [[text, *drawn[i * (n - 1) : (i + 1) * (n - 1)]] for i, text in enumerate(texts[: len(rows)])]


def solve_in_words(model, tasks, settings):
    """`solve` for puzzles in words: the answer is what follows 'Answer:' in the model's solution."""
    encode = tok.load().encode_ordinary
    prompts = [[tok.EOT, *encode(f"{task.test[0][0]}\nSolution:")] for task in tasks]
    out = [[None] for _ in tasks]
    fit = [i for i, prompt in enumerate(prompts) if len(prompt) + ANSWER_TOKENS <= model.config.block_size]
    if not fit:
        return out
    written = write(model, [prompts[i] for i in fit], settings.samples, ANSWER_TOKENS, settings.seed)
    for i, texts in zip(fit, written):
        answers = [re.search(r"^Answer: *(.+?) *$", tok.load().decode(ids), re.MULTILINE) for ids in texts]
        out[i] = [Given(vote([Candidate(answer[1]) for answer in answers if answer]))]
    return out


def solve_by_programs(model, task, settings):
    """For each test input the answers of programs, written by the model, that solve all demonstrations."""
    prompt = [tok.EOT, *arc.encode_prompt("program", task.train, task.test[0][0]).tolist()[:-1]]
    out = [[] for _ in task.test]
    if not task.train or len(prompt) + PROGRAM_TOKENS > model.config.block_size:
        return out
    (written,) = write(model, [prompt], settings.programs, PROGRAM_TOKENS, settings.seed)
    for text in sorted({tok.load().decode(ids) for ids in written}):
        with contextlib.suppress(ValueError):  # it is no program, or makes a grid that is none
            if all(np.array_equal(programs.run(text, x)[-1], y) for x, y in task.train):
                grids = [programs.run(text, x)[-1] for x, _ in task.test]
                for passed, grid in zip(out, grids):
                    passed.append(Candidate(grid, program=text))
    return out


# -----------------------------------------------------------------------------
# test-time training


@torch.enable_grad()
def tune(model, task, settings):
    """
    A copy of the model, tuned to the task's demonstrations, augmented as in training and each in turn as the
    test, one row a step (Route B stays with a row until it halts, as in training). The embedding stays as it
    is: it is most of a small model, and nothing is gained by moving it (LOG.md). The model itself where the
    task has fewer than two demonstrations, or no question or no row fits into its block_size.
    """
    rng, block_size = draw_rng(settings.seed, "ttt", task.id), model.config.block_size
    room = [sum(arc.prompt_and_room(task.kind, task.train, x, model.puzzle_format)) for x, _ in task.test]
    if len(task.train) < 2 or min(room) > block_size:
        return model
    augment = {"arc": "arc", "maze": "dihedral"}.get(task.kind, "none")
    document, n = arc.encode(task.kind, task.train), settings.ttt_steps
    rows = [puzzle_row(document, model.puzzle_format, augment, rng, block_size) for _ in range(n)]
    rows = [row for row in rows if len(row[0]) <= block_size]
    if not rows:
        return model
    # one length for all steps, because Route B's carry keeps its shape
    length = min(bucket_length(max(len(idx) for idx, _ in rows)), block_size)
    tuned, device = copy.deepcopy(model).train(), model.wte.weight.device
    tuned.wte.requires_grad_(False)
    learned = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.ttt_lr, weight_decay=0.0, fused=True)
    carry = None
    # bfloat16 where the answers are written in it; float16 would want a scaled loss
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    for step, row in zip(range(settings.ttt_steps), itertools.cycle(rows)):
        optimizer.param_groups[0]["lr"] = settings.ttt_lr * (1 - step / settings.ttt_steps)
        idx, targets = pad_rows([row], length)
        with torch.autocast(device.type, enabled=half):
            _, loss, carry = tuned(idx.to(device), targets.to(device), mode="puzzle", carry=carry)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # the caller's autocast keeps the weights it has cast, and these changed
    return tuned.eval()
