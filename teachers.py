"""
Teachers of distill.py: what they make of an answer to a grid puzzle, place by place, in one form whichever model they are.

A *frame* is a float32 tensor (rows, columns, 11) over the places of an answer: log-probabilities of the ten colours, and of "the answer
is over here", at row r and column c. NaN where the teacher has no opinion. Both routes can be read that way, and so they meet:

  left to right (Route A, a text model)     the (h, w) cells of a given answer, the end of each row in column w, the end of the answer at
                                            (h, 0); each place given the answer before it
  canvas (Route B)                          all cells of the canvas, the eleventh outcome is <|void|>; the answer given does not matter
  votes (either route)                      shares of the answers to several views of the task; the answer given does not matter

A teacher is any object with: about (a dict that says what it is), sources (names of those
it has learned from), conditional (whether a frame depends on the answer it is asked
about), frames(tasks, answers) -> list of frames, None where a task is too long for it, and write(tasks) -> list of its own grids, None
likewise. A task is an arc.Task of one test pair, whose output no teacher
reads.

Next to read: text_teacher.py and records.py, two more kinds of teacher, and distill.py. Sources: on-policy distillation, arXiv 2306.13649;
test-time training on a task's demonstrations, arXiv 2411.07279.
"""

import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

import arc
import checkpoint
import tokenizer as tok
from loader import bucket_length, pad_rows, puzzle_row
from model_dense import batches_by_length
from model_trm import ANSWER_IDS

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
    """outcomes (N,) of all blank cells of rows idx (B, L), in their order -> the grid on each canvas, None where all of it is void."""
    ids, grids = idx.clone(), []
    ids[idx == tok.BLANK] = torch.tensor(ANSWER_IDS)[outcomes]
    for row, blank in zip(ids, idx):
        start, (h, w) = canvas_of(blank)
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
        answer = arc.read_canvas(targets[start:], ((n - start) // (width + 1), width))
        ids = np.concatenate([idx[:start], arc.encode_grid(answer), [tok.EOT]])
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
    Quick check: the share of tasks at which the likeliest outcome is right everywhere. For a model that writes left to right that is
    when it would write the right answer greedily. Tasks that are too long for it are not solved.
    """
    right = 0
    for task, frame in zip(tasks, teacher.frames(tasks, [task.test[0][1] for task in tasks])):
        if frame is not None:
            known = ~frame.isnan().any(-1)
            right += bool((frame.argmax(-1) == outcomes_of(task.test[0][1], *known.shape))[known].all())
    return right / max(1, len(tasks))


def prompt(task):
    return torch.from_numpy(arc.encode_prompt(task.kind, task.train, task.test[0][0]).astype(np.int64))


# -----------------------------------------------------------------------------
# views of a task


def views(kind, side, n, rng):
    """
    n symmetries that turn a task of this kind into another that is right, the first of them none at all; fewer where there are no more.
    side: rows of a sudoku. rng: np.random.Generator.
    """
    found = {arc.IDENTITY: None}
    for _ in range(20 * n):
        if len(found) == n:
            break
        if kind == "sudoku":  # 0 is a blank; the numbers may change places
            renamed = (0, *(1 + rng.permutation(side)).tolist(), *range(side + 1, 10))
            found[arc.Augment(int(rng.integers(8)), renamed)] = None
        else:
            found[arc.random_augment(rng, {"arc": "arc", "maze": "dihedral"}.get(kind, "none"))] = None
    return list(found)


def view_of(task, symmetry, rng):
    """The task through a symmetry, its demonstrations in another order (the first view, IDENTITY, keeps theirs)."""
    order = range(len(task.train)) if symmetry == arc.IDENTITY else rng.permutation(len(task.train))
    pairs = [*(task.train[i] for i in order), *task.test]
    pairs = [(arc.augment(symmetry, x), arc.augment(symmetry, y)) for x, y in pairs]
    return arc.Task(task.id, task.kind, pairs[:-1], pairs[-1:])


def votes(write, tasks, n):
    """write: tasks -> grids. -> for each task, the answers to its n views, turned back: a list of grids, empty where none fits."""
    asked, whose, symmetries = [], [], []
    for i, task in enumerate(tasks):
        rng = np.random.default_rng(np.frombuffer(hashlib.sha256(prompt(task).numpy().tobytes()).digest(), dtype=np.uint32))
        for symmetry in views(task.kind, len(task.test[0][0]), n, rng):
            asked.append(view_of(task, symmetry, rng))
            whose.append(i)
            symmetries.append(symmetry)
    given = [[] for _ in tasks]
    for i, symmetry, grid in zip(whose, symmetries, write(asked)):
        if grid is not None:
            given[i].append(arc.invert(symmetry, grid))
    return given


def frame_of_votes(grids, shape):
    """Shares of votes as a frame of (rows + 1, columns + 1): what each answer says at each place, outside it that it is over."""
    rows, columns = np.max([shape, *(g.shape for g in grids)], axis=0) + 1
    shares = torch.zeros(rows, columns, OUTCOMES)
    for grid in grids:
        shares += F.one_hot(outcomes_of(grid, rows, columns), OUTCOMES)
    return ((1 - VOTE_FLOOR) * shares / len(grids) + VOTE_FLOOR / OUTCOMES).log()


def most_voted(grids):
    """The answer given most often, of equals the one given first; None of none."""
    count = {}
    for grid in grids:
        count.setdefault((grid.shape, grid.tobytes()), []).append(grid)
    return max(count.values(), key=len)[0] if count else None


# -----------------------------------------------------------------------------
# a model of ours


class Ours:
    """
    A model of either route as a teacher. n_sup: Route B's supervision steps (None: its own). n_views > 1: votes over that many views.
    ttt_steps > 0: before a task, that many steps on its demonstrations at ttt_learning_rate, after it the weights are what they were.
    """

    def __init__(self, model, about, sources=(), n_sup=None, n_views=1, ttt_steps=0, ttt_learning_rate=1e-4):
        self.model, self.sources, self.n_sup, self.n_views = model, sources, n_sup, n_views
        self.ttt_steps, self.ttt_learning_rate = ttt_steps, ttt_learning_rate
        self.canvas = model.puzzle_format == "canvas"
        self.conditional = not self.canvas and n_views == 1
        self.about = {**about, "n_sup": (n_sup or model.config.n_sup) if self.canvas else None, "views": n_views, "ttt_steps": ttt_steps}

    def frames(self, tasks, answers):
        if self.ttt_steps and len(tasks) > 1:
            return [self.frames([task], [answer])[0] for task, answer in zip(tasks, answers)]
        training = self.model.training
        self.model.eval()
        with adapted(self, tasks), torch.no_grad():
            if self.n_views > 1:
                given = votes(self.write_plainly, tasks, self.n_views)
                frames = [frame_of_votes(g, arc.canvas_shape(t.train, t.test[0][0])) if g else None for g, t in zip(given, tasks)]
            elif self.canvas:
                frames = self.canvas_frames(tasks)
            else:
                frames = self.answer_frames(tasks, answers)
        self.model.train(training)
        return frames

    def canvas_frames(self, tasks):
        frames = [None] * len(tasks)
        for where, idx in self.model.canvases(tasks):
            for _, y, _ in self.model.think(idx, self.n_sup):
                pass
            log_p = F.linear(y, self.model.wte.weight[ANSWER_IDS]).float().log_softmax(-1).cpu()
            for row, (i, _, (h, w), start) in zip(log_p, where):
                frames[i] = row[start : start + h * (w + 1)].view(h, w + 1, OUTCOMES)[:, :w]
        return frames

    def answer_frames(self, tasks, answers):
        frames = [None] * len(tasks)
        rows = [(i, document(t, a), a.shape) for i, (t, a) in enumerate(zip(tasks, answers)) if a is not None]
        rows = [row for row in rows if len(row[1]) - 1 <= self.model.config.block_size]
        for part in batches_by_length(rows, lambda row: len(row[1])):
            log_p = self.model.place_logits([ids for _, ids, _ in part], [shape for *_, shape in part]).log_softmax(-1).cpu()
            for (i, _, (h, w)), places in zip(part, log_p.split([h * (w + 1) + 1 for *_, (h, w) in part])):
                frames[i] = frame_of_answer(places, h, w)
        return frames

    def write(self, tasks):
        if self.ttt_steps and len(tasks) > 1:
            return [self.write([task])[0] for task in tasks]
        training = self.model.training
        self.model.eval()
        with adapted(self, tasks), torch.no_grad():
            grids = [most_voted(g) for g in votes(self.write_plainly, tasks, self.n_views)]
        self.model.train(training)
        return grids

    def write_plainly(self, tasks):
        """One answer each, without votes."""
        given = self.model.answer(tasks, **({"n_sup": self.n_sup} if self.canvas else {}))
        return [candidates[0][0] if candidates else None for (candidates,) in given]


class adapted:
    """
    Inside, the teacher's model has learned from the demonstrations of the one task it is asked about: each in turn is the question and
    the others its demonstrations, through random symmetries. Tasks of fewer than two demonstrations teach nothing.
    """

    def __init__(self, teacher, tasks):
        self.teacher, self.task = teacher, tasks[0] if teacher.ttt_steps and len(tasks) == 1 and len(tasks[0].train) > 1 else None

    def __enter__(self):
        if self.task is None:
            return
        model, task = self.teacher.model, self.task
        self.before = {k: v.clone() for k, v in model.state_dict().items()}
        rng = np.random.default_rng(np.frombuffer(hashlib.sha256(prompt(task).numpy().tobytes()).digest(), dtype=np.uint32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.teacher.ttt_learning_rate, weight_decay=0.0)
        demonstrations, device = arc.encode(task.kind, task.train), model.wte.weight.device
        model.requires_grad_(True).train()
        with torch.enable_grad():
            for _ in range(self.teacher.ttt_steps):
                row = puzzle_row(demonstrations, model.puzzle_format, {"arc": "arc", "maze": "dihedral"}.get(task.kind, "none"), rng)
                if len(row[0]) > model.config.block_size:
                    continue
                idx, targets = pad_rows([row], min(bucket_length(len(row[0])), model.config.block_size))
                model(idx.to(device), targets.to(device), mode="puzzle")[1].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        model.eval()

    def __exit__(self, *_):
        if self.task is not None:
            self.teacher.model.load_state_dict(self.before)


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
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()
    about = {"kind": "checkpoint", "path": str(path), "sha256": digest, "model": saved["model"], "iter": saved["train"].get("iter"),
             "tokenizer": saved["tokenizer"]}  # fmt: skip
    return Ours(model, about, saved["train"].get("data", {}).get("sources", []), **options)


# -----------------------------------------------------------------------------


def load(path, device, dtype="float32", vocabulary="same", **options):
    """
    The teacher at path: a checkpoint of ours, a folder that `distill.py record` wrote, or a folder (or hub name, "hf:NAME") of Hugging
    Face's. options: as for Ours. FileNotFoundError or ValueError, in one line, if it is missing, damaged, or of another family.
    """
    import records  # these two import this file
    import text_teacher

    given = [k for k, v in options.items() if v not in (None, 0, 1) and k != "ttt_learning_rate"]
    if os.path.isfile(os.path.join(path, records.RECORD)):
        foreign, teacher = "recorded", lambda: records.Recorded(path)
    elif path.startswith("hf:") or os.path.isfile(os.path.join(path, "config.json")) and not os.path.isfile(os.path.join(path, "ckpt.pt")):
        foreign, teacher = "a Hugging Face model", lambda: text_teacher.HuggingFace(path.removeprefix("hf:"), device, dtype, vocabulary)
    elif os.path.isdir(path):
        raise ValueError(f"teacher {path} is a folder with neither a config.json of Hugging Face's nor a {records.RECORD} of distill.py "
                         "record: for a checkpoint of ours, give the path of its ckpt.pt")  # fmt: skip
    else:
        return load_ours(path, device, dtype, **options)
    if given:
        raise ValueError(f"{', '.join(f'teacher_{k}' for k in given)}: for checkpoints of ours alone, and teacher {path} is {foreign}")
    return teacher()
