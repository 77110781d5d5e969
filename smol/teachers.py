"""
Teachers of distill.py: what they make of an answer to a grid puzzle, place by place, in one form whichever model they are.

A *frame* is a float32 tensor (rows, columns, 11) over the places of an answer: log-probabilities of the ten colours, and of "the answer
is over here", at row r and column c. NaN where the teacher has no opinion. Both routes can be read that way, and so they meet:

  left to right (Route A, a text model)     the (h, w) cells of a given answer, the end of each row in column w, the end of the answer at
                                            (h, 0); each place given the answer before it
  canvas (Route B)                          all cells of the canvas, the eleventh outcome is <|void|>; the answer given does not matter
  votes (either route)                      shares of the answers to several views of the task; the answer given does not matter

A teacher is any object with: about (a dict that says what it is), sources (names of those it has learned from), conditional (whether a
frame depends on the answer it is asked about), frames(tasks, answers) -> list of frames, None where a task is too long for it, and
write(tasks) -> list of its own grids, None likewise. A task is an arc.Task of one test pair, whose output no teacher reads.

Read next: text_teacher.py, another kind of teacher, and distill.py. Sources: on-policy distillation, arXiv 2306.13649;
test-time training on a task's demonstrations, arXiv 2411.07279.
"""

import dataclasses
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

from model_trm import ANSWER_IDS
from smol import arc, checkpoint, engine, solve, ttt
from smol import tokenizer as tok
from smol.snapshots import sha256_file

OUTCOMES = 11  # ten colours, and "over"
OVER = 10
VOTE_FLOOR = 0.01  # share of votes that is spread over all outcomes: a colour nobody voted for is unlikely, not impossible


def fit(frame, rows, columns):
    """A frame cut, or filled up with NaN, to (rows, columns, 11)."""
    out = torch.full((rows, columns, OUTCOMES), torch.nan)
    r, c = min(rows, frame.shape[0]), min(columns, frame.shape[1])
    out[:r, :c] = frame[:r, :c]
    return out


def frame_of_answer(places, h, w):
    """places (h * (w + 1) + 1, 11), in the order in which an answer is written -> frame (h + 1, w + 1, 11)."""
    frame = torch.full((h + 1, w + 1, OUTCOMES), torch.nan)
    frame[:h] = places[:-1].view(h, w + 1, OUTCOMES)
    frame[h, 0] = places[-1]
    return frame


def places_of_answer(frame, h, w):
    """The inverse: (h * (w + 1) + 1, 11) of any frame, NaN where it says nothing."""
    frame = fit(frame, h + 1, w + 1)
    return torch.cat([frame[:h].reshape(-1, OUTCOMES), frame[h, :1]])


def until_they_part(places, outcomes):
    """
    places (P, 11), of a teacher to whom the answer does not matter; outcomes (P,), what the answer says -> the same, NaN after the first
    place at which the teacher would have said something else: from there on it speaks of another answer, and whoever goes on from this
    one would learn to disregard what it has written.
    """
    parts = (places.argmax(-1) != outcomes) & ~places.isnan().any(-1)
    return torch.where((parts.cumsum(0) - parts.long() > 0)[:, None], torch.nan, places)


def canvas_of(ids):
    """ids (L,) of a row with a canvas, padded or not -> where the canvas begins, its (rows, columns)."""
    start, stop = int((ids == tok.OUTPUT).nonzero()[-1]) + 1, int((ids != tok.PAD).sum())
    columns = int((ids[start:] == tok.ROW).nonzero()[0])
    return start, ((stop - start) // (columns + 1), columns)


def on_canvas(frames, idx):
    """Frames (None: no opinion) of rows idx (B, L) -> (B, L, 11), each place of a canvas at its token; NaN elsewhere."""
    out = torch.full((*idx.shape, OUTCOMES), torch.nan)
    for row, frame, ids in zip(out, frames, idx.cpu()):
        if frame is not None:
            start, (h, w) = canvas_of(ids)
            row[start : start + h * (w + 1)] = fit(frame, h, w + 1).view(-1, OUTCOMES)
    return out.to(idx.device)


def read_canvases(outcomes, idx):
    """outcomes (N,) of all canvas cells of rows idx (B, L), in their order -> the grid on each canvas, None where all of it is void."""
    ids, grids = idx.clone(), []
    ids[arc.canvas_cells(idx, arc.positions(idx))] = torch.tensor(ANSWER_IDS)[outcomes]
    for row, before in zip(ids, idx):
        start, (h, w) = canvas_of(before)
        grids.append(arc.read_canvas(row[start : start + h * (w + 1)].numpy(), (h, w)))
    return grids


def document(task, answer):
    """The whole document (T,) long of a task with an answer."""
    return torch.from_numpy(arc.encode(task.kind, [*task.train, (task.test[0][0], answer)]).astype(np.int64))


def task_of_row(idx, targets, puzzle_format):
    """The inverse of loader.puzzle_row, padded or not: (L,), (L,) -> arc.Task of one test pair."""
    n = int((idx != tok.PAD).sum())
    idx, targets = idx[:n].numpy(), targets[:n].numpy()
    if puzzle_format == "canvas":
        start = np.flatnonzero(idx == tok.OUTPUT)[-1] + 1
        width = np.flatnonzero(idx[start:] == tok.ROW)[0]
        question, answer = (
            arc.read_canvas(ids[start:], ((n - start) // (width + 1), width)) for ids in (idx, targets)
        )
        ids = np.concatenate(
            [
                idx[: start - 1],
                [tok.INPUT],
                arc.encode_grid(question),
                [tok.OUTPUT],
                arc.encode_grid(answer),
                [tok.EOT],
            ]
        )
    else:
        ids = np.append(idx, targets[-1])
    kind, pairs = arc.decode(ids)
    return arc.Task("", kind, pairs[:-1], pairs[-1:])


def tasks_of(idx, targets, puzzle_format):
    """A batch of puzzles (B, L), (B, L) -> list of arc.Task."""
    return [task_of_row(*row, puzzle_format) for row in zip(idx, targets)]


def outcomes_of(answer, rows, columns):
    """What an answer says at each place (rows, columns): a colour, OVER outside it. Long."""
    said = np.full((rows, columns), OVER)
    h, w = min(rows, answer.shape[0]), min(columns, answer.shape[1])
    said[:h, :w] = answer[:h, :w]
    return torch.from_numpy(said)


def solved(teacher, tasks):
    """
    Quick check: the share of tasks at which the likeliest outcome is right everywhere. For a model that
    writes left to right that is when it would write the right answer greedily. Tasks that are too long for it
    are not solved, nor are those where it has no opinion of some cell, as a model has none whose logits are
    not finite.
    """
    right = 0
    for task, frame in zip(tasks, teacher.frames(tasks, [task.test[0][1] for task in tasks])):
        if frame is not None:
            known = ~frame.isnan().any(-1)
            every_cell = not fit(frame, *task.test[0][1].shape).isnan().any()
            same = frame.argmax(-1) == outcomes_of(task.test[0][1], *known.shape)
            right += every_cell and bool(same[known].all())
    return right / max(1, len(tasks))


def prompt(task):
    return torch.from_numpy(arc.encode_prompt(task.kind, task.train, task.test[0][0]).astype(np.int64))


def with_id(task):
    """The task with an id that its prompt alone decides: what views it is looked at from, and how it is adapted to, follow from the id."""
    return dataclasses.replace(task, id=hashlib.sha256(prompt(task).numpy().tobytes()).hexdigest())


# -----------------------------------------------------------------------------
# a model of ours


def frame_of_votes(candidates, shape):
    """Shares of votes as a frame of (rows + 1, columns + 1): what each answer says at each place, outside it that it is over."""
    voted = [c for c in candidates if c.votes]
    rows, columns = np.max([shape, *(c.grid.shape for c in voted)], axis=0) + 1
    shares = torch.zeros(rows, columns, OUTCOMES)
    for c in voted:
        shares += c.votes * F.one_hot(outcomes_of(c.grid, rows, columns), OUTCOMES)
    return ((1 - VOTE_FLOOR) * shares / sum(c.votes for c in voted) + VOTE_FLOOR / OUTCOMES).log()


class Ours:
    """
    A model of either route as a teacher. n_sup: Route B's supervision steps (None: its own). n_views > 1: votes over that many views
    (solve.py). ttt_steps > 0: before a task, that many steps on its demonstrations at ttt_learning_rate, by a copy (ttt.py).
    """

    def __init__(
        self,
        model,
        about,
        sources=(),
        n_sup=None,
        n_views=1,
        ttt_steps=0,
        ttt_learning_rate=solve.Settings.ttt_lr,
    ):
        self.model, self.sources = model, sources
        self.settings = solve.Settings(
            augment=n_views, n_sup=n_sup, ttt_steps=ttt_steps, ttt_lr=ttt_learning_rate
        )
        self.canvas = model.puzzle_format == "canvas"
        self.conditional = not self.canvas and n_views == 1
        self.about = {
            **about,
            "n_sup": (n_sup or model.config.n_sup) if self.canvas else None,
            "views": n_views,
            "ttt_steps": ttt_steps,
        }

    def frames(self, tasks, answers):
        if self.settings.augment > 1:
            return [
                frame_of_votes(c, arc.canvas_shape(t.train, t.test[0][0]))
                if any(x.votes for x in c)
                else None
                for c, t in zip(self.solve(tasks), tasks)
            ]
        frames, plain = [None] * len(tasks), []
        for i, task in enumerate(tasks):
            if self.settings.ttt_steps and len(task.train) > 1:
                (frames[i],) = self.frames_of(
                    ttt.tune(self.model, with_id(task), self.settings), [task], [answers[i]]
                )
            else:
                plain.append(i)
        for i, frame in zip(
            plain, self.frames_of(self.model, [tasks[i] for i in plain], [answers[i] for i in plain])
        ):
            frames[i] = frame
        return frames

    @torch.no_grad()
    def frames_of(self, model, tasks, answers):
        training, frames = model.training, [None] * len(tasks)
        model.eval()
        if self.canvas:
            for where, idx in model.canvases(tasks):
                for _, y, _ in model.answer_steps(idx, self.settings.n_sup):
                    pass
                log_p = F.linear(y, model.wte.weight[ANSWER_IDS]).float().log_softmax(-1).cpu()
                for row, (i, _, (h, w), start) in zip(log_p, where):
                    frames[i] = row[start : start + h * (w + 1)].view(h, w + 1, OUTCOMES)[:, :w]
        else:
            rows = [
                (i, document(t, a), a.shape) for i, (t, a) in enumerate(zip(tasks, answers)) if a is not None
            ]
            rows = [row for row in rows if len(row[1]) - 1 <= model.config.block_size]
            for part in engine.batches_by_length(rows, lambda row: len(row[1])):
                log_p = (
                    engine.cell_logits(model, [ids for _, ids, _ in part], [shape for *_, shape in part])
                    .log_softmax(-1)
                    .cpu()
                )
                for (i, _, (h, w)), places in zip(
                    part, log_p.split([h * (w + 1) + 1 for *_, (h, w) in part])
                ):
                    frames[i] = frame_of_answer(places, h, w)
        model.train(training)
        return frames

    def solve(self, tasks):
        """For each task its list of solve.Candidate, best first; empty where it is too long."""
        training = self.model.training
        self.model.eval()
        given = solve.solve(
            self.model, solve.without_answers([with_id(task) for task in tasks]), self.settings
        )
        self.model.train(training)
        return [g.candidates if g is not None else [] for (g,) in given]

    def write(self, tasks):
        return [c[0].grid if c else None for c in self.solve(tasks)]


def load_ours(path, device, dtype="float32", **options):
    """A checkpoint of ours as a teacher, its averaged weights. In half precision are the matrices of its blocks alone."""
    model, saved = checkpoint.load_model(path, device)
    if dtype != "float32":
        if options.get("ttt_steps"):
            raise ValueError("test-time training needs a teacher in float32: use --teacher_dtype=float32")
        for module in model.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(getattr(torch, dtype))
    model.requires_grad_(False)
    about = {
        "kind": "checkpoint",
        "path": str(path),
        "sha256": sha256_file(path),
        "model": saved["model"],
        "iter": saved["train"].get("iter"),
        "tokenizer": saved["tokenizer"],
    }
    return Ours(model, about, saved["train"].get("data", {}).get("sources", []), **options)


# -----------------------------------------------------------------------------


def load(path, device, dtype="float32", vocabulary="same", **options):
    """
    The teacher at path: a checkpoint of ours, or a folder (or hub name, "hf:NAME") of Hugging Face's. options: as
    for Ours. FileNotFoundError or ValueError, in one line, if it is missing, damaged, or of another family.
    """
    from smol import text_teacher  # which imports this file

    given = [k for k, v in options.items() if v not in (None, 0, 1) and k != "ttt_learning_rate"]
    if (
        path.startswith("hf:")
        or os.path.isfile(os.path.join(path, "config.json"))
        and not os.path.isfile(os.path.join(path, "ckpt.pt"))
    ):
        foreign, teacher = (
            "a Hugging Face model",
            lambda: text_teacher.HuggingFace(path.removeprefix("hf:"), device, dtype, vocabulary),
        )
    elif os.path.isdir(path):
        raise ValueError(
            f"teacher {path} is a folder without a config.json of Hugging Face's: for a checkpoint of ours, "
            "give the path of its ckpt.pt"
        )
    else:
        return load_ours(path, device, dtype, **options)
    if given:
        raise ValueError(
            f"{', '.join(f'teacher_{k}' for k in given)}: for checkpoints of ours alone, and teacher {path} is {foreign}"
        )
    return teacher()
