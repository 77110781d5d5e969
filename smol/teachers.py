"""
Teachers of distill.py: what they say of every token of a text, and at every position of an answer.

On text, read(idx) gives vectors and logits(vectors) the logits of the ids below n_ids, which student and
teacher have in common: GPT-2's 50,257 for a text model, the reserved ones too for a model of ours.

On puzzles, a *frame* is a float32 tensor (rows, columns, 11): at row r and column c of an answer, the
log-probabilities of the ten colours and of OVER, "the answer does not reach here". NaN where the teacher has
no opinion.
Every model can be read in this form, so a student of either route learns from a teacher of either:

    left to right (Route A, a text model)   the (h, w) cells of an answer, the end of each row at column w and
                                            of the answer at (h, 0), each given the answer before it
    canvas (Route B)                        all cells of the canvas, OVER is <|void|>; the answer is not read
    votes (either route)                    shares of the answers to several views; the answer is not read

A teacher is an object with `about` (a dict that identifies it), `sources` (names of those it has learned
from), `cannot` (why it cannot teach "text" or "puzzle", if so), `context` (the longest text it reads),
`reads_answers` (whether its frames depend on the answer) and frames(tasks, answers) -> list of frames, None
where a task is too long. A task is an arc.Task of one test pair, whose output no teacher reads. Read next:
distill.py.
"""

import hashlib
import os
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from model_dense import document_starts
from model_trm import ANSWER_IDS
from smol import arc, checkpoint, engine, solve
from smol import tokenizer as tok
from smol.snapshots import sha256_file

OUTCOMES = 11  # ten colours and OVER
OVER = 10
VOTE_FLOOR = 0.01  # share of the votes that is spread over all outcomes: no colour is impossible

# -----------------------------------------------------------------------------
# tasks, answers and frames


def prompt(task):
    return torch.from_numpy(arc.encode_prompt(task.kind, task.train, task.test[0][0]).astype(np.int64))


def document(task, answer):
    """The whole document (T,) of a task with this answer."""
    return torch.from_numpy(arc.encode(task.kind, [*task.train, (task.test[0][0], answer)]).astype(np.int64))


def tasks_of(idx, targets, puzzle_format):
    """A batch of puzzle rows (B, L), (B, L) -> list of arc.Task: the inverse of loader.puzzle_row."""
    tasks = []
    for ids, wanted in zip(idx.cpu().numpy(), targets.cpu().numpy()):
        n = int((ids != tok.PAD).sum())
        if puzzle_format == "canvas":
            start, shape = canvas_of(ids)
            grids = [arc.read_canvas(canvas[start:n], shape) for canvas in (ids, wanted)]
            before, last_pair = ids[: start - 1], arc.encode("arc", [grids])[1:]
            whole = np.concatenate([before, last_pair])
        else:
            whole = np.append(ids[:n], wanted[n - 1])
        kind, pairs = arc.decode(whole)
        tasks.append(arc.Task("", kind, pairs[:-1], pairs[-1:]))
    return tasks


def canvas_of(ids):
    """ids (L,), a row with a canvas, padded or not -> where the canvas starts, its (rows, columns)."""
    start = int(np.flatnonzero(ids == tok.OUTPUT)[-1]) + 1
    columns = int(np.flatnonzero(ids[start:] == tok.ROW)[0])
    return start, (int((ids[start:] != tok.PAD).sum()) // (columns + 1), columns)


def outcomes_of(answer, rows, columns):
    """
    The outcome (rows, columns), long, that an answer has at each position: its colour, or OVER outside it.
    """
    outcomes = np.full((rows, columns), OVER)
    h, w = min(rows, answer.shape[0]), min(columns, answer.shape[1])
    outcomes[:h, :w] = answer[:h, :w]
    return torch.from_numpy(outcomes)


def resize(frame, rows, columns):
    """A frame cut or padded with NaN to (rows, columns, 11)."""
    out = torch.full((rows, columns, OUTCOMES), torch.nan)
    r, c = min(rows, frame.shape[0]), min(columns, frame.shape[1])
    out[:r, :c] = frame[:r, :c]
    return out


def to_frame(log_p, h, w):
    """
    log_p (h * (w + 1) + 1, 11), at the tokens of an (h, w) answer and its end -> frame (h + 1, w + 1, 11).
    """
    frame = torch.full((h + 1, w + 1, OUTCOMES), torch.nan)
    frame.view(-1, OUTCOMES)[: len(log_p)] = log_p
    return frame


def at_tokens(frame, answer):
    """A frame, or None, at the h * (w + 1) + 1 tokens of an answer and its end: (N, 11)."""
    h, w = answer.shape
    whole = resize(torch.empty(0, 0, OUTCOMES) if frame is None else frame, h + 1, w + 1)
    return whole.flatten(0, 1)[: h * (w + 1) + 1]


def on_canvases(frames, idx):
    """
    Frames, or None, of rows idx (B, L) -> (B, L, 11): each position of a canvas at its token, NaN
    elsewhere.
    """
    out = torch.full((*idx.shape, OUTCOMES), torch.nan)
    for row, frame, ids in zip(out, frames, idx.cpu().numpy()):
        if frame is not None:
            start, (h, w) = canvas_of(ids)
            row[start : start + h * (w + 1)] = resize(frame, h, w + 1).flatten(0, 1)
    return out.to(idx.device)


def until_first_difference(log_p, answer):
    """
    log_p (N, 11), at the tokens of an answer, of a teacher that has not read it. NaN after the first position
    where the teacher prefers another outcome: from there on it speaks of another answer.
    """
    h, w = answer.shape
    outcomes = outcomes_of(answer, h + 1, w + 1).flatten()[: len(log_p)]
    differs = (log_p.argmax(-1) != outcomes) & ~log_p.isnan().any(-1)
    after = differs.cumsum(0) - differs.long() > 0
    return log_p.masked_fill(after[:, None], torch.nan)


def solved(teacher, tasks):
    """
    The share of tasks where the likeliest outcome is right everywhere: for Route A, where its greedy answer
    is.
    """
    right = 0
    for task, frame in zip(tasks, teacher.frames(tasks, [task.test[0][1] for task in tasks])):
        answer = task.test[0][1]
        if frame is not None and not resize(frame, *answer.shape).isnan().any():
            known = ~frame.isnan().any(-1)
            right += bool((frame.argmax(-1) == outcomes_of(answer, *known.shape))[known].all())
    return right / max(1, len(tasks))


# -----------------------------------------------------------------------------
# a model of ours


class Ours:
    """
    A model of either route. n_sup: Route B's supervision steps (None: its own). n_views > 1: votes
    (solve.py).
    """

    n_ids, cannot = tok.END + 1, {}

    def __init__(self, model, about=None, sources=(), n_sup=None, n_views=1):
        self.model, self.sources, self.n_sup, self.n_views = model, sources, n_sup, n_views
        self.about = {**(about or {}), "n_sup": n_sup, "n_views": n_views}
        self.reads_answers = model.puzzle_format == "autoregressive" and n_views == 1
        self.context = model.config.block_size

    @torch.no_grad()
    def read(self, idx):
        """Texts idx (B, T), right-padded -> (B, T, n_embd) for `logits`."""
        return self.model.hidden(idx, document_starts(idx))

    def logits(self, x):
        """x (N, n_embd) -> (N, n_ids)"""
        return F.linear(x, self.model.wte.weight[: self.n_ids])

    @torch.no_grad()
    def frames(self, tasks, answers):
        training = self.model.training
        self.model.eval()
        if self.n_views > 1:
            frames = self.of_votes(tasks)
        else:
            frames = self.of_answers(tasks, answers) if self.reads_answers else self.of_canvases(tasks)
        self.model.train(training)
        return frames

    def of_answers(self, tasks, answers):
        frames, rows = [None] * len(tasks), []
        for i, (task, answer) in enumerate(zip(tasks, answers)):
            ids = document(task, answer)
            if len(ids) - 1 <= self.model.config.block_size:
                rows.append((i, ids, answer.shape))
        for batch in engine.batches_by_length(rows, lambda row: len(row[1])):
            shapes = [shape for *_, shape in batch]
            logits = engine.cell_logits(self.model, [ids for _, ids, _ in batch], shapes)
            log_p = logits.log_softmax(-1).cpu()
            for (i, _, (h, w)), part in zip(batch, log_p.split([h * (w + 1) + 1 for h, w in shapes])):
                frames[i] = to_frame(part, h, w)
        return frames

    def of_canvases(self, tasks):
        frames = [None] * len(tasks)
        for where, idx in self.model.canvases(tasks):
            *_, (_, y, _) = self.model.answer_steps(idx, self.n_sup)
            log_p = F.linear(y, self.model.wte.weight[ANSWER_IDS]).float().log_softmax(-1).cpu()
            for row, (i, _, (h, w), start) in zip(log_p, where):
                frames[i] = row[start : start + h * (w + 1)].view(h, w + 1, OUTCOMES)[:, :w]
        return frames

    def of_votes(self, tasks):
        # the views follow from a task's id, so the id has to follow from the task
        named = [replace(t, id=hashlib.sha256(prompt(t).numpy().tobytes()).hexdigest()) for t in tasks]
        settings = solve.Settings(augment=self.n_views, n_sup=self.n_sup)
        frames = []
        for task, (given,) in zip(tasks, solve.solve(self.model, solve.without_answers(named), settings)):
            voted = [c for c in given.candidates if c.votes] if given else []
            shape = arc.canvas_shape(task.train, task.test[0][0])
            frames.append(frame_of_votes(voted, shape) if voted else None)
        return frames


def frame_of_votes(candidates, shape):
    """Shares of the votes as a frame, a row and a column larger than all of the candidates and `shape`."""
    rows, columns = np.max([shape, *(c.grid.shape for c in candidates)], axis=0) + 1
    votes = sum(c.votes * F.one_hot(outcomes_of(c.grid, rows, columns), OUTCOMES) for c in candidates)
    return ((1 - VOTE_FLOOR) * votes / sum(c.votes for c in candidates) + VOTE_FLOOR / OUTCOMES).log()


# -----------------------------------------------------------------------------
# a text model

# A puzzle as text, a piece for each token of ours; an answer ends with the text model's own end of text.
PIECES = {
    tok.ARC: "Puzzle\n",
    tok.SUDOKU: "Sudoku\n",
    tok.MAZE: "Maze\n",
    tok.LOGIC: "Logic\n",
    tok.PROGRAM: "Program\n",
    tok.INPUT: "Input:\n",
    tok.OUTPUT: "Output:\n",
    tok.ROW: "\n",
    **{tok.CELL0 + c: f" {c}" for c in range(10)},
}

NEW_LINE = 198  # GPT-2's id


def render(ids):
    """A document of ours, without its EOT, as plain text."""
    return "".join(PIECES[int(i)] for i in ids)


class HuggingFace:
    """
    A causal language model in a folder or on the hub, through `transformers`, which reads a puzzle as text.
    It can teach text if its vocabulary is GPT-2's, and puzzles if its tokenizer maps cells exactly: a cell
    and the end of a row are one token each, and the tokens of a text are those of its pieces. ValueError if
    it can teach neither.
    """

    reads_answers, sources, n_ids = True, (), tok.N_GPT2

    def __init__(self, name, device, dtype="float32"):
        try:
            import transformers
        except ImportError:
            raise ValueError(f"teacher {name} needs a package: pip install transformers") from None
        transformers.utils.logging.set_verbosity_error()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        except Exception as e:  # noqa: BLE001 (a broken folder fails in any way)
            why = (str(e).strip().splitlines() or [""])[0]
            raise ValueError(f"teacher {name} cannot be loaded ({type(e).__name__}): {why:.200}") from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.context = getattr(model.config, "max_position_embeddings", None) or 10**9
        self.about = {"path": name, "model": model.config.model_type, "params": model.num_parameters()}
        self.ids = {token: self.encode(text) for token, text in PIECES.items()}
        single = [self.ids[token] for token in (*range(tok.CELL0, tok.CELL0 + 10), tok.ROW)]
        self.outcomes = [*(ids[0] for ids in single), self.tokenizer.eos_token_id]  # 12
        x, y = np.arange(10, dtype=np.uint8).reshape(2, 5), np.full((3, 1), 9, np.uint8)
        probes = [arc.encode(kind, [(x, y), (y, x)])[:-1] for kind in arc.KINDS]
        exact = all(self.encode(render(ids)) == self.tokens(ids) for ids in probes)
        self.cannot = {}  # what it cannot teach, and why
        if not exact or None in self.outcomes or any(len(ids) != 1 for ids in single):
            self.cannot["puzzle"] = "its tokenizer does not write every cell as one token"
        text = tok.load().decode(range(tok.EOT))  # of all words, one after the other
        ids = tok.load().encode_ordinary(text)
        if self.tokenizer.eos_token_id != tok.EOT or self.encode(text) != ids:
            self.cannot["text"] = "its vocabulary is not GPT-2's"
        else:
            idx = torch.tensor([ids[:32]], device=device)
            whole = self.model(idx).logits[0, :, : self.n_ids].float()
            if not torch.allclose(self.logits(self.read(idx)[0]).float(), whole, rtol=1e-2, atol=1e-2):
                self.cannot["text"] = "its logits are not what its head makes of its last vectors"
        if len(self.cannot) == 2:
            raise ValueError(f"teacher {name}: {self.cannot['text']}, and {self.cannot['puzzle']}")

    @torch.no_grad()
    def read(self, idx):
        """Texts idx (B, T), right-padded -> (B, T, D) for `logits`; a reserved id is read as a new line."""
        return self.model.base_model(input_ids=idx.masked_fill(idx >= self.n_ids, NEW_LINE))[0]

    def logits(self, x):
        """x (N, D) -> (N, n_ids)"""
        return self.model.get_output_embeddings()(x)[:, : self.n_ids]

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def tokens(self, ids):
        """ids of ours, without EOT -> list of the teacher's."""
        return [i for token in map(int, ids) for i in self.ids[token]]

    @torch.no_grad()
    def frames(self, tasks, answers):
        frames, rows = [None] * len(tasks), []
        for i, (task, answer) in enumerate(zip(tasks, answers)):
            ids = self.tokens(document(task, answer)[:-1])
            if len(ids) <= self.context:
                rows.append((i, torch.tensor(ids), answer.shape))
        for batch in engine.batches_by_length(rows, lambda row: len(row[1])):
            idx = torch.nn.utils.rnn.pad_sequence([ids for _, ids, _ in batch], batch_first=True)
            logits = self.model(idx.to(self.model.device)).logits
            for row, (i, ids, (h, w)) in zip(logits, batch):
                n = h * (w + 1) + 1
                row = row[len(ids) - n : len(ids), self.outcomes].float().cpu()
                ends_answer = (torch.arange(n) % (w + 1) == 0)[:, None]  # elsewhere OVER is the end of a row
                over = torch.where(ends_answer, row[:, 11:], row[:, 10:11])
                frames[i] = to_frame(torch.cat([row[:, :10], over], 1).log_softmax(-1), h, w)
        return frames


def load(path, device, dtype="float32", n_sup=None, n_views=1):
    """
    The teacher at path: a checkpoint of ours, or a folder or hub name ("hf:NAME") of Hugging Face's, whose
    weights are loaded in dtype. FileNotFoundError or ValueError, in one line.
    """
    if path.startswith("hf:") or os.path.isfile(os.path.join(path, "config.json")):
        if n_sup is not None or n_views != 1:
            raise ValueError(f"teacher {path} is a text model: it takes no teacher_n_sup or teacher_n_views")
        return HuggingFace(path.removeprefix("hf:"), device, dtype)
    model, saved = checkpoint.load_model(path, device)
    if wrong := checkpoint.not_finite(model.state_dict()):
        raise ValueError(f"teacher {path} has weights that are not finite ({wrong})")
    about = {"path": path, "sha256": sha256_file(checkpoint.local_file(path)), "model": saved["model"]}
    sources = saved["train"].get("data", {}).get("sources", [])
    return Ours(model.requires_grad_(False), about, sources, n_sup, n_views)
