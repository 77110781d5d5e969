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

A teacher is an object with `about` (a dict that identifies it), `sources` (names of those it has learned
from), `cannot` (why it cannot teach "text" or "puzzle", if so), `context` (the longest text it reads),
`reads_answers` (whether its frames depend on the answer) and frames(tasks, answers) -> list of frames, None
where a task is too long. A task is an arc.Task of one test pair, whose output no teacher reads. Read next:
distill.py.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model_dense import document_starts
from smol import arc, checkpoint, engine
from smol import tokenizer as tok
from smol.engine import ANSWER_IDS
from smol.snapshots import first_line, read_json, sha256_file

OUTCOMES = 11  # ten colours and OVER
OVER = 10

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


def resize(frame, rows, columns):
    """A frame cut or padded with NaN to (rows, columns, 11)."""
    more = columns - frame.shape[1], rows - frame.shape[0]
    return F.pad(frame, (0, 0, 0, more[0], 0, more[1]), value=torch.nan)


def to_frame(log_p, h, w):
    """log_p (h * (w + 1) + 1, 11), at the tokens of an (h, w) answer -> frame (h + 1, w + 1, 11)."""
    return F.pad(log_p, (0, 0, 0, w), value=torch.nan).view(h + 1, w + 1, OUTCOMES)


def at_tokens(frame, answer):
    """A frame, or None, at the h * (w + 1) + 1 tokens of an answer and its end: (N, 11)."""
    h, w = answer.shape
    whole = resize(torch.empty(0, 0, OUTCOMES) if frame is None else frame, h + 1, w + 1)
    return whole.flatten(0, 1)[: h * (w + 1) + 1]


def on_canvases(frames, idx):
    """Frames, or None, of rows idx (B, L) -> (B, L, 11), at the tokens of canvases, NaN elsewhere."""
    out = torch.full((*idx.shape, OUTCOMES), torch.nan)
    for row, frame, ids in zip(out, frames, idx.cpu().numpy()):
        if frame is not None:
            start, (h, w) = canvas_of(ids)
            row[start : start + h * (w + 1)] = resize(frame, h, w + 1).flatten(0, 1)
    return out.to(idx.device)


def until_first_difference(log_p, answer):
    """log_p (N, 11) of a teacher that has not read the answer, NaN after the first token it has otherwise."""
    outcomes = torch.from_numpy(np.pad(answer.astype(np.int64), (0, 1), constant_values=OVER))
    outcomes = outcomes.flatten()[: len(log_p)]  # the colour at each token, or OVER
    differs = (log_p.argmax(-1) != outcomes) & ~log_p.isnan().any(-1)
    after = differs.cumsum(0) - differs.long() > 0
    return log_p.masked_fill(after[:, None], torch.nan)


def frames_of_answers(documents, answers, context, log_probs, tokens=None):
    """
    The frames of answers, each the end of a document (ids), from a model that reads left to right; None where
    the document is longer than context. log_probs(documents, their shapes) -> for each (N, 11).
    """
    frames = [None] * len(documents)
    rows = [(i, ids, answer.shape) for i, (ids, answer) in enumerate(zip(documents, answers))]
    rows = [row for row in rows if len(row[1]) <= context]
    for batch in engine.batches_by_length(rows, lambda row: len(row[1]), tokens):
        where, some, shapes = zip(*batch)
        for i, log_p, shape in zip(where, log_probs(some, shapes), shapes):
            frames[i] = to_frame(log_p, *shape)
    return frames


# -----------------------------------------------------------------------------
# a model of ours


class Ours:
    """A model of either route."""

    n_ids, cannot = tok.END + 1, {}

    def __init__(self, model, about=None, sources=()):
        self.model, self.about, self.sources = model, about, sources
        self.reads_answers = model.puzzle_format == "autoregressive"
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
        if self.reads_answers:
            documents = [document(task, answer) for task, answer in zip(tasks, answers)]
            room = self.context + 1  # the end is not read
            return frames_of_answers(documents, answers, room, self.log_probs)
        frames = [None] * len(tasks)
        for where, idx in engine.canvases(self.model, tasks):
            for _, y, _ in self.model.answer_steps(idx):  # the last one's
                pass
            log_p = F.linear(y, self.model.wte.weight[ANSWER_IDS]).float().log_softmax(-1).cpu()
            for row, (i, _, (h, w), start) in zip(log_p, where):
                frames[i] = row[start : start + h * (w + 1)].view(h, w + 1, OUTCOMES)[:, :w]
        return frames

    def log_probs(self, documents, shapes):
        log_p = engine.cell_logits(self.model, documents, shapes).log_softmax(-1).cpu()
        return log_p.split([h * (w + 1) + 1 for h, w in shapes])


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
}
BEFORE_A_CELL = (" ", "")  # " 7" is one token of GPT-2's; Qwen's has every digit alone, without the space
NEW_LINE = 198  # GPT-2's id


class HuggingFace:
    """
    A causal language model in a folder or on the hub, through `transformers`, which reads a puzzle as text.
    It can teach text if its vocabulary is GPT-2's, and puzzles if its tokenizer maps cells exactly, with a
    space before each or without: a cell and the end of a row are one token each, and the tokens of a text are
    those of its pieces. ValueError if it can teach neither.
    """

    reads_answers, sources, n_ids = True, (), tok.N_GPT2

    def __init__(self, name, device, dtype="float32"):
        try:
            import transformers

            transformers.utils.logging.set_verbosity_error()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        except Exception as e:  # noqa: BLE001 (no such package, a broken folder)
            raise ValueError(f"teacher {name} cannot be loaded: {first_line(e)}") from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.context = getattr(model.config, "max_position_embeddings", None) or 10**9
        self.about = {"model": model.config.model_type, "params": model.num_parameters()}
        if not os.path.isdir(name):
            self.about["name"] = name  # on the hub; a folder here means nothing elsewhere
        self.begin = self.tokenizer.encode("")  # what a text begins with, such as Gemma's <bos>
        self.cannot = {}  # what it cannot teach, and why
        if self.tokenizer.eos_token_id is None or not any(map(self.maps_cells, BEFORE_A_CELL)):
            self.cannot["puzzle"] = "its tokenizer does not write every cell as one token"
        text = tok.load().decode(range(tok.EOT))  # of all words, one after the other
        ids = tok.load().encode_ordinary(text)
        if self.tokenizer.eos_token_id != tok.EOT or self.encode(text) != ids:
            self.cannot["text"] = "its vocabulary is not GPT-2's"
        if len(self.cannot) == 2:
            raise ValueError(f"teacher {name}: {self.cannot['text']}, and {self.cannot['puzzle']}")

    def maps_cells(self, before):
        """Whether the tokenizer maps cells exactly, with this before each; then `tokens` writes them so."""
        self.pieces = PIECES | {tok.CELL0 + c: f"{before}{c}" for c in range(10)}
        self.ids = {token: self.encode(text) for token, text in self.pieces.items()}
        single = [self.ids[token] for token in (*range(tok.CELL0, tok.CELL0 + 10), tok.ROW)]
        if any(len(ids) != 1 for ids in single):
            return False
        self.outcomes = [*(ids[0] for ids in single), self.tokenizer.eos_token_id]  # 12
        x, y = np.arange(10, dtype=np.uint8).reshape(2, 5), np.full((3, 1), 9, np.uint8)
        probes = [arc.encode(kind, [(x, y), (y, x)])[:-1] for kind in arc.KINDS]
        return all(self.encode(self.render(ids)) == self.tokens(ids) for ids in probes)

    @torch.no_grad()
    def read(self, idx):
        """Texts idx (B, T), right-padded -> (B, T, D) for `logits`; a reserved id is read as a new line."""
        return self.model.base_model(input_ids=idx.masked_fill(idx >= self.n_ids, NEW_LINE))[0]

    def logits(self, x):
        """x (N, D) -> (N, n_ids)"""
        return self.model.get_output_embeddings()(x)[:, : self.n_ids]

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def render(self, ids):
        """A document of ours, without its EOT, as plain text."""
        return "".join(self.pieces[int(i)] for i in ids)

    def tokens(self, ids):
        """ids of ours, without EOT -> list of the teacher's."""
        return [i for token in map(int, ids) for i in self.ids[token]]

    @torch.no_grad()
    def frames(self, tasks, answers):
        documents = [document(task, answer)[:-1] for task, answer in zip(tasks, answers)]
        documents = [torch.tensor(self.begin + self.tokens(ids)) for ids in documents]
        # its logits are of 150,000 words at every token: 600 KB in float32
        return frames_of_answers(documents, answers, self.context, self.log_probs, 2048)

    def log_probs(self, documents, shapes):
        out = []
        idx = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True).to(self.model.device)
        for logits, ids, (h, w) in zip(self.model(idx).logits, documents, shapes):
            n = h * (w + 1) + 1
            logits = logits[len(ids) - n : len(ids), self.outcomes].float().cpu()
            ends_answer = (torch.arange(n) % (w + 1) == 0)[:, None]  # elsewhere OVER is the end of a row
            over = torch.where(ends_answer, logits[:, 11:], logits[:, 10:11])
            out.append(torch.cat([logits[:, :10], over], 1).log_softmax(-1))
        return out


def load(path, device, dtype="float32"):
    """The teacher at path: a checkpoint of ours, or a folder or hub name ("hf:NAME") of Hugging Face's."""
    config = Path(path, "config.json")  # in our own folders too, without a model_type
    if path.startswith("hf:") or (config.is_file() and "model_type" in read_json(config)):
        return HuggingFace(path.removeprefix("hf:"), device, dtype)
    model, saved = checkpoint.load_model(path, device)
    about = {"model": saved["model"], "sha256": sha256_file(checkpoint.local_file(path))}
    sources = saved["train"].get("data", {}).get("sources", [])
    return Ours(model.requires_grad_(False), about, sources)
