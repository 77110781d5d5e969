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

Next to read: distill.py. Sources: on-policy distillation, arXiv 2306.13649; test-time training on
a task's demonstrations, arXiv 2411.07279.
"""

import hashlib
import json
import os

import numpy as np
import torch
import torch.nn.functional as F

import arc
import checkpoint
import tokenizer as tok
from loader import bucket_length, pad_rows, puzzle_row
from model_dense import batches_by_length, write_grids
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
# a text model of Hugging Face's

# How a grid puzzle reads as text. One piece per reserved token; a cell is the one token " 0".." 9" of GPT-2, the end of a row its "\n",
# the end of an answer its <|endoftext|>.
PIECES = {tok.ARC: "Puzzle\n", tok.SUDOKU: "Sudoku\n", tok.MAZE: "Maze\n", tok.LOGIC: "Logic\n", tok.PROGRAM: "Program\n",
          tok.INPUT: "Input:\n", tok.OUTPUT: "Output:\n", tok.ROW: "\n", **{tok.CELL0 + c: f" {c}" for c in range(10)}}  # fmt: skip


def render(ids):
    """A document or prompt, ids (T,) of ours, as plain text; the EOT of a whole document is left out. ValueError for what has no text."""
    ids = [i for i in map(int, ids) if i != tok.EOT]
    unknown = [i for i in ids if i not in PIECES]
    if unknown:
        raise ValueError(f"token {unknown[0]} is no part of a puzzle that can be written as text")
    return "".join(PIECES[i] for i in ids)


class HuggingFace:
    """
    A causal language model in a folder or on the hub, through `transformers`. With GPT-2's vocabulary (compared token by token) it is
    used as it is. One of another vocabulary is refused, unless vocabulary="cells" and the cell map is exact for it: each piece of PIECES
    is the same tokens alone as inside a text, and each cell and row end one token; then only these tokens are ever compared.
    """

    conditional, sources = True, ()

    def __init__(self, name, device, dtype="float32", vocabulary="same"):
        try:
            import transformers
        except ImportError:
            raise ValueError(f"teacher {name} needs a package that is not installed: pip install transformers") from None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            encoder = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        except Exception as e:  # noqa: BLE001 (a broken folder fails in any way it likes)
            why = (str(e).strip().splitlines() or [""])[0]
            raise ValueError(f"teacher {name} cannot be loaded by transformers ({type(e).__name__}): {why:.200}") from None
        differs = vocabulary_differs(encoder)
        if differs and vocabulary != "cells":
            raise ValueError(f"teacher {name} has another vocabulary than GPT-2's: {differs}. If the cell map is exact for it, "
                             "--teacher_vocabulary=cells uses it for grids alone")  # fmt: skip
        self.ids = {token: encoder.encode(piece, add_special_tokens=False) for token, piece in PIECES.items()}
        self.end = tok.EOT if not differs else encoder.eos_token_id
        self.check_map(encoder, name)
        vocabulary_size = self.model.get_output_embeddings().weight.shape[0]
        if max(self.end, *(i for ids in self.ids.values() for i in ids)) >= vocabulary_size:
            raise ValueError(f"teacher {name} has {vocabulary_size:,} outputs, too few for its tokenizer: they do not belong together")
        self.model.to(device).eval().requires_grad_(False)
        self.outcomes = torch.tensor([*(self.ids[tok.CELL0 + c][0] for c in range(10)), self.ids[tok.ROW][0], self.end], device=device)
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        self.about = {"kind": "huggingface", "path": str(name), "model": self.model.config.model_type,
                      "parameters": self.model.num_parameters(),
                      "tokenizer": tok.fingerprint() if not differs else f"another one: {differs}"}  # fmt: skip

    def check_map(self, encoder, name):
        """ValueError unless the map is exact: a text of pieces is the tokens of its pieces, and a cell, and a row's end, is one of them."""
        many = [PIECES[t] for t in (*range(tok.CELL0, tok.CELL0 + 10), tok.ROW) if len(self.ids[t]) != 1]
        if many or self.end is None:
            raise ValueError(f"the cell map is not exact for teacher {name}: "
                             + (f"{many[0]!r} is not one token" if many else "it has no token for the end of a text"))  # fmt: skip
        grids = [np.arange(10, dtype=np.uint8).reshape(2, 5), np.zeros((3, 1), np.uint8), np.full((1, 3), 9, np.uint8)]
        for kind in arc.KINDS:
            ids = arc.encode(kind, [(x, y) for x in grids for y in grids])[:-1]
            if encoder.encode(render(ids), add_special_tokens=False) != self.tokens(ids):
                raise ValueError(f"the cell map is not exact for teacher {name}: its tokenizer joins pieces of a grid")

    def tokens(self, ids):
        """ids of ours, without EOT -> list of the teacher's."""
        return [i for token in map(int, ids) for i in self.ids[token]]

    @torch.no_grad()
    def log_probs(self, tasks, answers):
        """For each (P, 12), at the P tokens of its answer: log-probabilities, of the whole vocabulary, of cells, row end, end; or None."""
        out, rows = [None] * len(tasks), []
        for i, (task, answer) in enumerate(zip(tasks, answers)):
            if answer is not None:
                ids = self.tokens(document(task, answer)[:-1])
                if len(ids) <= self.context:
                    rows.append((i, torch.tensor(ids), answer.shape[0] * (answer.shape[1] + 1) + 1))
        for part in batches_by_length(rows, lambda row: len(row[1])):
            idx = torch.nn.utils.rnn.pad_sequence([ids for _, ids, _ in part], batch_first=True).to(self.outcomes.device)
            seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for _, ids, _ in part], batch_first=True).to(idx.device)
            logits = self.model(idx, attention_mask=seen).logits
            for row, (i, ids, n) in zip(logits, part):
                out[i] = row[len(ids) - n : len(ids)].float().log_softmax(-1)[:, self.outcomes].cpu()
        return out

    def frames(self, tasks, answers):
        frames = [None] * len(tasks)
        for i, (answer, log_p) in enumerate(zip(answers, self.log_probs(tasks, answers))):
            if log_p is not None:
                h, w = answer.shape
                first = torch.arange(len(log_p)) % (w + 1) == 0
                over = torch.where(first, log_p[:, 11], log_p[:, 10])[:, None]
                frames[i] = frame_of_answer(torch.cat([log_p[:, :10], over], 1).log_softmax(-1), h, w)
        return frames

    @torch.no_grad()
    def write(self, tasks):
        """Greedily, under the grammar of grids, with the model's own caches."""
        grids, rows = [None] * len(tasks), []
        for i, task in enumerate(tasks):
            ids, limit = self.tokens(prompt(task)), arc.canvas_shape(task.train, task.test[0][0])
            if len(ids) + limit[0] * (limit[1] + 1) <= self.context:
                rows.append((i, ids, limit))
        for part in batches_by_length(rows, lambda row: len(row[1]) + row[2][0] * (row[2][1] + 1)):
            longest = max(len(ids) for _, ids, _ in part)
            idx = torch.tensor([[0] * (longest - len(ids)) + ids for _, ids, _ in part], device=self.outcomes.device)
            seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids, _ in part], device=idx.device)
            state = {"past": None, "seen": seen}

            def read(new):
                at = (state["seen"].cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
                out = self.model(new, attention_mask=state["seen"], position_ids=at, past_key_values=state["past"], use_cache=True)
                state["past"] = out.past_key_values
                return out.logits[:, -1][:, self.outcomes]

            def read_on(drawn):
                state["seen"] = torch.cat([state["seen"], torch.ones_like(state["seen"][:, :1])], 1)
                return read(self.outcomes[drawn.to(self.outcomes.device)][:, None])

            for (i, *_), (grid, _) in zip(part, write_grids(read(idx), read_on, [limit for *_, limit in part])):
                grids[i] = grid
        return grids


def vocabulary_differs(encoder):
    """What differs between a Hugging Face tokenizer's first 50,257 tokens and GPT-2's, in words; None where nothing does."""
    enc = tok.load()
    theirs = {i: token for token, i in encoder.get_vocab().items()}
    letters = bytes_as_letters()
    wrong = []
    for i in range(tok.N_GPT2):
        ours = "<|endoftext|>" if i == tok.EOT else "".join(letters[b] for b in enc.decode_single_token_bytes(i))
        if theirs.get(i) != ours:
            wrong.append((i, ours, theirs.get(i)))
    if not wrong:
        text = "A probe: 3 + 41 = 44,\n\n  isn't it?\n 0 1 2\n"  # the same tokens, but are texts cut into them in the same way?
        same = encoder.encode(text, add_special_tokens=False) == enc.encode_ordinary(text)
        return None if same else "its tokens are the same, but it cuts text into them differently"
    i, ours, other = wrong[0]
    return f"{len(wrong):,} of {tok.N_GPT2:,} tokens differ, the first is {i}: {other!r} there, {ours!r} here (of {len(theirs):,} there)"


def bytes_as_letters():
    """The letters that GPT-2's vocabulary files write bytes with: printable ones as they are, the others counted up from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


# -----------------------------------------------------------------------------
# recorded outputs

RECORD = "teacher.json"


class Recorded:
    """
    What a teacher said, read from a folder that `distill.py record` wrote, after comparing every file with its hash. It answers only
    prompts that are in it; `documents` are those, each with the teacher's answer.
    """

    def __init__(self, folder):
        try:
            with open(os.path.join(folder, RECORD), encoding="utf-8") as f:
                record = json.load(f)
            self.about, self.conditional = {**record["teacher"], "recorded": str(folder)}, record["conditional"]
            self.sources, shards = record["data"]["sources"], record["shards"]
            if record["tokenizer"] != tok.fingerprint():
                raise ValueError(f"{folder} was recorded with another tokenizer ({record['tokenizer'][:12]}...) than this one "
                                 f"({tok.fingerprint()[:12]}...): its token ids mean something else")  # fmt: skip
            self.documents, self.where, self.data = [], {}, []
            for shard in shards:
                parts = {}
                for part, digest in shard["sha256"].items():
                    path = os.path.join(folder, f"{shard['name']}.{part}.npy")
                    with open(path, "rb") as f:
                        if hashlib.sha256(f.read()).hexdigest() != digest:
                            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {RECORD}; record again")
                    parts[part] = np.load(path, mmap_mode="r", allow_pickle=False)
                ends = np.cumsum([0, *parts["length"].tolist()])
                sizes = np.cumsum([0, *parts["shape"].astype(np.int64).prod(1).tolist()])
                for i, (rows, columns) in enumerate(parts["shape"].tolist()):
                    ids = parts["ids"][ends[i] : ends[i + 1]]
                    self.where[key_of(ids)] = len(self.documents)
                    self.documents.append(ids)
                    self.data.append((parts["log_p"], int(sizes[i]), rows, columns))
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise ValueError(f"{os.path.join(folder, RECORD)} is not what distill.py record writes ({type(e).__name__}: {e})") from None

    def find(self, task):
        return self.where.get(key_of(arc.encode(task.kind, [*task.train, (task.test[0][0], np.zeros((1, 1), np.uint8))])))

    def frames(self, tasks, answers):
        frames = []
        for task in tasks:
            i = self.find(task)
            if i is None:
                frames.append(None)
                continue
            log_p, start, rows, columns = self.data[i]
            frames.append(torch.from_numpy(log_p[start : start + rows * columns].astype(np.float32)).view(rows, columns, OUTCOMES))
        return frames

    def write(self, tasks):
        found = [self.find(task) for task in tasks]
        return [None if i is None else arc.decode(self.documents[i])[1][-1][1] for i in found]


def key_of(ids):
    """The prompt of a document, hashed: up to the last OUTPUT."""
    ids = np.asarray(ids, dtype=np.uint16)
    return hashlib.sha256(ids[: np.flatnonzero(ids == tok.OUTPUT)[-1] + 1].tobytes()).hexdigest()


def record_shard(folder, name, tasks, teacher):
    """Have a teacher answer tasks and write what it says beside its hashes. -> the shard's entry for RECORD; None if no task fits."""
    grids = teacher.write(tasks)
    rows = [(document(task, grid), frame) for task, grid, frame in zip(tasks, grids, teacher.frames(tasks, grids))
            if grid is not None and frame is not None]  # fmt: skip
    if not rows:
        return None
    parts = {
        "ids": np.concatenate([ids.numpy() for ids, _ in rows]).astype("<u2"),
        "length": np.array([len(ids) for ids, _ in rows], "<i4"),
        "shape": np.array([frame.shape[:2] for _, frame in rows], "<i2"),
        "log_p": torch.cat([frame.reshape(-1, OUTCOMES) for _, frame in rows]).clamp(min=-60).numpy().astype("<f2"),
    }
    digests = {}
    for part, array in parts.items():
        path = os.path.join(folder, f"{name}.{part}.npy")
        with open(path + ".tmp", "wb") as f:
            np.save(f, array, allow_pickle=False)
            f.flush()
            os.fsync(f.fileno())
        with open(path + ".tmp", "rb") as f:
            digests[part] = hashlib.sha256(f.read()).hexdigest()
        os.replace(path + ".tmp", path)
    return {"name": name, "documents": len(rows), "tokens": int(parts["length"].sum()), "sha256": digests}


# -----------------------------------------------------------------------------


def load(path, device, dtype="float32", vocabulary="same", **options):
    """
    The teacher at path: a checkpoint of ours, a folder that `distill.py record` wrote, or a folder (or hub name, "hf:NAME") of Hugging
    Face's. options: as for Ours. FileNotFoundError or ValueError, in one line, if it is missing, damaged, or of another family.
    """
    given = [k for k, v in options.items() if v not in (None, 0, 1) and k != "ttt_learning_rate"]
    if os.path.isfile(os.path.join(path, RECORD)):
        foreign, teacher = "recorded", lambda: Recorded(path)
    elif path.startswith("hf:") or os.path.isfile(os.path.join(path, "config.json")) and not os.path.isfile(os.path.join(path, "ckpt.pt")):
        foreign, teacher = "a Hugging Face model", lambda: HuggingFace(path.removeprefix("hf:"), device, dtype, vocabulary)
    elif os.path.isdir(path):
        raise ValueError(f"teacher {path} is a folder with neither a config.json of Hugging Face's nor a {RECORD} of distill.py record: "
                         "for a checkpoint of ours, give the path of its ckpt.pt")  # fmt: skip
    else:
        return load_ours(path, device, dtype, **options)
    if given:
        raise ValueError(f"{', '.join(f'teacher_{k}' for k in given)}: for checkpoints of ours alone, and teacher {path} is {foreign}")
    return teacher()
