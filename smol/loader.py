"""
Manifests -> batches. The same seed gives the same batches, on one process or many, interrupted or not.

How it is kept simple enough to be exact: a source is an endless sequence of *draws*, and draw number n always gives the same row
(which document, which augmentation, which pair is the test: all follow from the seed, the source and n). So the loader's whole
memory is a few counters, and resuming needs nothing but them.

  text      shards are one long string of tokens, cut into windows of block_size + 1; each epoch visits them in a new order
  puzzles   a document is decoded, seen through a random symmetry, with a random pair as its test, and written in the model's
            format; rows of similar length wait in buckets, and a full bucket is a batch

Every batch has about batch_size * block_size tokens, however long its rows: short puzzles come in larger batches.

Every process goes through the same draws and keeps the batches that are its own, so the batches of a step do not depend on how
many processes share them. A thread makes the next steps ready while the current one computes (`Ahead`).

Before this: prepare.py. Read next: train.py.
"""

import contextlib
import hashlib
import os
import queue
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from smol import arc, puzzles
from smol import tokenizer as tok
from smol.snapshots import read_manifest, sha256_file
from smol.tokenizer import IGNORE

# Rows are padded to the next of these lengths: at most a quarter is padding, and the shapes stay few.
BUCKETS = (
    16,
    24,
    32,
    44,
    48,
    64,
    80,
    96,
    116,
    128,
    160,
    192,
    256,
    320,
    384,
    512,
    640,
    768,
    1024,
    1280,
    1536,
    2048,
    2560,
    3072,
    4096,
    5120,
    6144,
    8192,
    10240,
)


@dataclass
class Batch:
    mode: str  # "text" or "puzzle"
    idx: torch.Tensor  # (B, L) long
    targets: torch.Tensor  # (B, L) long, IGNORE where there is no loss
    source: str
    key: tuple  # (number of the batch within its step, L): what a carry belongs to
    tokens: int  # in idx, padding left out


def draw_rng(seed, source, n):
    """The random numbers of one draw: they depend on these three and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{source}/{n}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


class Shards:
    """All shards of one source and split as one sequence of tokens and one of documents, memory-mapped."""

    def __init__(self, data_dir, entries):
        self.tokens = [np.memmap(os.path.join(data_dir, e["path"]), dtype="<u2", mode="r") for e in entries]
        offsets = [np.fromfile(os.path.join(data_dir, e["path"][:-4] + ".idx"), dtype="<i8") for e in entries]
        self.offsets = offsets
        self.first_token = np.cumsum([0] + [len(t) for t in self.tokens])
        self.first_document = np.cumsum([0] + [len(o) - 1 for o in offsets])
        self.n_tokens, self.n_documents = int(self.first_token[-1]), int(self.first_document[-1])

    def slice(self, start, stop):
        """Tokens start..stop of the whole sequence, across shards."""
        parts = []
        shard = int(np.searchsorted(self.first_token, start, side="right")) - 1
        while start < stop:
            first, tokens = int(self.first_token[shard]), self.tokens[shard]
            parts.append(tokens[start - first : stop - first])
            start, shard = first + len(tokens), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def document(self, i):
        shard = int(np.searchsorted(self.first_document, i, side="right")) - 1
        a, b = self.offsets[shard][i - self.first_document[shard] :][:2]
        return np.asarray(self.tokens[shard][a:b])


# -----------------------------------------------------------------------------
# rows


def puzzle_row(document, puzzle_format, augment, rng=None):
    """
    One document (uint16 ids of a task) as a row: (idx, targets), int64 of equal length, the loss on the answer alone.

    puzzle_format "autoregressive": the document shifted by one, with a target at every token of the test output and its end.
    puzzle_format "canvas": the demonstrations and the test input on a canvas, with a target at every cell of it.
    augment: "none", "dihedral" or "arc", as in arc.random_augment, or "sudoku", as in puzzles.shuffle_sudoku; tasks with
    demonstrations also change their order and which pair is the test. rng None: the document as it is.
    """
    kind, pairs = arc.decode(document)
    if rng is not None:
        if augment == "sudoku":
            pairs, augment = [tuple(puzzles.shuffle_sudoku(rng, *pair)) for pair in pairs], "none"
        symmetry = arc.random_augment(rng, augment)
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        if symmetry != arc.IDENTITY:
            pairs = [(arc.augment(symmetry, x), arc.augment(symmetry, y)) for x, y in pairs]
    *demos, (test_input, test_output) = pairs
    if puzzle_format == "autoregressive":
        ids = arc.encode(kind, pairs).astype(np.int64)
        idx, targets = ids[:-1], ids[1:].copy()
        h, w = test_output.shape
        targets[: -h * (w + 1) - 1] = IGNORE
        return idx, targets
    shape = arc.canvas_shape(demos, test_input)
    if shape[0] < test_output.shape[0] or shape[1] < test_output.shape[1]:
        # The one task in seventy whose output is larger than could be guessed is still worth learning from.
        shape = (max(shape[0], test_output.shape[0]), max(shape[1], test_output.shape[1]))
    idx = arc.encode_prompt(kind, demos, test_input, canvas=shape).astype(np.int64)
    targets = np.full(len(idx), IGNORE)
    targets[-shape[0] * (shape[1] + 1) :] = arc.canvas_target(test_output, shape)
    return idx, targets


def bucket_length(n):
    return next((b for b in BUCKETS if b >= n), n)


def pad_rows(rows, length):
    """List of (idx, targets) -> idx (B, length) padded with PAD, targets (B, length) padded with IGNORE."""
    idx = torch.full((len(rows), length), tok.PAD)
    targets = torch.full((len(rows), length), IGNORE)
    for i, (x, y) in enumerate(rows):
        idx[i, : len(x)] = torch.from_numpy(x)
        targets[i, : len(y)] = torch.from_numpy(y)
    return idx, targets


# -----------------------------------------------------------------------------
# sources


class Text:
    """Windows of packed text. Its position is one number."""

    mode = "text"

    def __init__(self, name, data_dir, entries, seed, batch_size, block_size):
        self.name, self.seed, self.batch_size, self.block_size = name, seed, batch_size, block_size
        self.shards = Shards(data_dir, entries)
        self.n_windows = (self.shards.n_tokens - 1) // block_size
        if self.n_windows < 1:
            raise ValueError(
                f"source {name!r} has {self.shards.n_tokens} tokens, fewer than one row of block_size={block_size}; "
                "lower block_size or prepare more of it"
            )
        self.drawn, self.epoch, self.order = 0, -1, None

    def window(self, i):
        ids = self.shards.slice(i * self.block_size, (i + 1) * self.block_size + 1)
        return torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:])

    def next_batch(self, build=True):
        """The next batch (idx, targets); None without the work when it is somebody else's."""
        rows = []
        for n in range(self.drawn, self.drawn + self.batch_size):
            epoch, i = divmod(n, self.n_windows)
            if epoch != self.epoch:
                self.epoch, self.order = (
                    epoch,
                    draw_rng(self.seed, self.name, epoch).permutation(self.n_windows),
                )
            if build:
                rows.append(self.window(int(self.order[i])))
        self.drawn += self.batch_size
        return tuple(torch.stack(t) for t in zip(*rows)) if build else None

    def state(self):
        return {"drawn": self.drawn}

    def restore(self, state):
        self.drawn = state["drawn"]


class Puzzles:
    """Puzzle documents, seen anew at every draw. Its position is one number, and the draws that wait in unfinished buckets."""

    mode = "puzzle"

    def __init__(self, name, data_dir, entries, seed, batch_tokens, block_size, puzzle_format):
        self.name, self.seed, self.batch_tokens, self.block_size, self.puzzle_format = (
            name,
            seed,
            batch_tokens,
            block_size,
            puzzle_format,
        )
        self.shards = Shards(data_dir, entries)
        self.augment = entries[0]["augment"]
        self.drawn, self.waiting, self.rows = 0, {}, {}

    def row(self, n):
        rng = draw_rng(self.seed, self.name, n)
        return puzzle_row(
            self.shards.document(int(rng.integers(self.shards.n_documents))),
            self.puzzle_format,
            self.augment,
            rng,
        )

    def next_batch(self, build=True):
        skipped = 0
        while True:
            idx, targets = row = self.row(self.drawn)
            n, self.drawn = self.drawn, self.drawn + 1
            if len(idx) > self.block_size:
                skipped += 1
                if skipped > 10000:
                    raise ValueError(
                        f"10,000 draws of {self.name!r} in a row were longer than block_size={self.block_size}: raise it"
                    )
                continue
            skipped = 0
            length = min(bucket_length(len(idx)), self.block_size)
            self.waiting.setdefault(length, []).append(n)
            self.rows[n] = row
            if len(self.waiting[length]) >= max(1, self.batch_tokens // length):
                rows = [self.rows.pop(n) for n in self.waiting.pop(length)]
                return pad_rows(rows, length) if build else None

    def state(self):
        return {
            "drawn": self.drawn,
            "waiting": {str(length): list(draws) for length, draws in self.waiting.items()},
        }

    def restore(self, state):
        self.drawn = state["drawn"]
        self.waiting = {int(length): list(draws) for length, draws in state["waiting"].items()}
        self.rows = {n: self.row(n) for draws in self.waiting.values() for n in draws}


# -----------------------------------------------------------------------------
# the loader


def read_stage(data_dir, stage, tag=None, verify=True):
    """-> (manifest entries, mixture, SHA-256 of the snapshot of a frozen stage, or None without a tag). Raises as read_manifest does."""
    manifest, mixture = read_manifest(data_dir, stage, tag=tag, verify=verify)
    if tag is None:
        return manifest, mixture, None
    with open(os.path.join(data_dir, "stages", stage, tag, "snapshot.json"), "rb") as f:
        return manifest, mixture, hashlib.sha256(f.read()).hexdigest()


class Loader:
    """
    Training batches of a stage. A step belongs to one source, drawn by `weights`, so that its batches, spread over processes,
    cost about the same.

    weights: {source: share of the steps}, any positive numbers; sources that are left out are not read. tag: a frozen version of the
    stage, None for the stage as it is now. Raises FileNotFoundError or ValueError, in one line, for a stage that is not prepared,
    damaged, or does not have what is asked for.
    """

    def __init__(
        self,
        data_dir,
        stage,
        *,
        tag=None,
        weights=None,
        seed,
        batch_size,
        block_size,
        batches_per_step,
        puzzle_format,
        rank=0,
        world_size=1,
        verify=True,
    ):
        manifest, mixture, self.snapshot = read_stage(data_dir, stage, tag, verify)
        weights = dict(weights or mixture["weights"])
        if any(w < 0 for w in weights.values()) or not sum(weights.values()) > 0:
            raise ValueError(f"the mixture needs shares of 0 or more, and not only zeros: {weights}")
        self.seed, self.rank, self.world_size, self.batches_per_step = (
            seed,
            rank,
            world_size,
            batches_per_step,
        )
        self.sources, self.val, self.without_val = {}, [], []
        self.step = 0
        for name in sorted(weights):
            entries = [e for e in manifest if e["source"] == name]
            if not entries:
                have = ", ".join(sorted({e["source"] for e in manifest}))
                raise ValueError(f"stage {stage!r} has no source {name!r}; it has: {have}")
            make = {
                "text": lambda *a: Text(*a, batch_size, block_size),
                "puzzle": lambda *a: Puzzles(*a, batch_size * block_size, block_size, puzzle_format),
            }[entries[0]["kind"]]
            train = [e for e in entries if e["split"] == "train"]
            if weights[name] > 0 and not train:
                raise ValueError(
                    f"source {name!r} of stage {stage!r} has no training shard: give it weight 0 or leave it out"
                )
            if weights[name] > 0:
                self.sources[name] = make(name, data_dir, train, seed)
            held_out = [e for e in entries if e["split"] == "val"]
            if held_out:
                self.val.append((entries[0]["kind"], name, Shards(data_dir, held_out)))
            else:
                self.without_val.append(name)
        if not self.sources:
            raise ValueError(f"no source of the mixture has a training shard in stage {stage!r}: {weights}")
        self.batch_size, self.block_size, self.puzzle_format = batch_size, block_size, puzzle_format
        used = [e["sha256"] for e in manifest if e["source"] in self.sources]
        self.manifest = sha256_file(os.path.join(data_dir, "stages", stage, tag or "", "manifest.jsonl"))
        self.fingerprint = hashlib.sha256(
            "\n".join(used).encode()
        ).hexdigest()  # of the data this loader reads
        self.names = list(self.sources)
        self.shares = np.array([weights[name] for name in self.names], dtype=np.float64)
        self.shares /= self.shares.sum()

    def rounded_shares(self):
        """{source: share of the steps}, for people and for comparison."""
        return {name: round(float(share), 4) for name, share in zip(self.names, self.shares)}

    def next_step(self):
        """The batches of the next optimizer step that belong to this process: numbers rank, rank + world_size, ..."""
        name = self.names[draw_rng(self.seed, "", self.step).choice(len(self.names), p=self.shares)]
        source = self.sources[name]
        batches = []
        for number in range(self.batches_per_step):
            mine = number % self.world_size == self.rank
            made = source.next_batch(mine)
            if mine:
                batches.append(
                    Batch(
                        source.mode, *made, name, (number, made[0].shape[1]), int((made[0] != tok.PAD).sum())
                    )
                )
        self.step += 1
        return batches

    def val_batches(self, mode, n):
        """
        Held-out rows, at most n * batch_size per source, as (source, number, idx, targets): always the same, and every process
        gets those whose number is its own.
        """
        for kind, name, shards in self.val:
            if kind != mode:
                continue
            if kind == "text":
                windows = (shards.n_tokens - 1) // self.block_size
                count = min(n, -(-windows // self.batch_size))
                picks = np.linspace(0, max(windows - 1, 0), min(windows, count * self.batch_size)).astype(int)
                rows = (
                    (ids[:-1], ids[1:])
                    for ids in (
                        shards.slice(i * self.block_size, (i + 1) * self.block_size + 1) for i in picks
                    )
                )
                lengths = {self.block_size: list(rows)}
            else:
                lengths = {}
                for i in range(min(shards.n_documents, n * self.batch_size)):
                    row = puzzle_row(shards.document(i), self.puzzle_format, "none")
                    if len(row[0]) <= self.block_size:
                        lengths.setdefault(min(bucket_length(len(row[0])), self.block_size), []).append(row)
            number = 0
            for length, rows in sorted(lengths.items()):
                per_batch = max(1, self.batch_size * self.block_size // length)
                for start in range(0, len(rows), per_batch):
                    if number % self.world_size == self.rank:
                        yield name, number, *pad_rows(rows[start : start + per_batch], length)
                    number += 1

    def not_validated(self, n):
        """{source: why} of the sources of the mixture that have no rows among val_batches(mode, n)."""
        why = dict.fromkeys(self.without_val, "it has no validation shard")
        for kind, name, shards in self.val:
            if kind == "text" and shards.n_tokens <= self.block_size:
                why[name] = (
                    f"{shards.n_tokens} tokens for validation, and a row takes {self.block_size + 1}: "
                    f"block_size={self.block_size}"
                )
            if kind == "puzzle":
                some = [shards.document(i) for i in range(min(shards.n_documents, n * self.batch_size))]
                if all(len(puzzle_row(d, self.puzzle_format, "none")[0]) > self.block_size for d in some):
                    why[name] = (
                        f"its first {len(some)} puzzles for validation exceed block_size={self.block_size}"
                    )
        return why

    def state_dict(self):
        """Plain numbers: the step, and each source's position."""
        return {"step": self.step, "sources": {name: source.state() for name, source in self.sources.items()}}

    def load_state_dict(self, state):
        """Go on where state_dict was taken. ValueError if the sources have changed since."""
        if sorted(state["sources"]) != sorted(self.sources):
            raise ValueError(
                f"the checkpoint was reading {sorted(state['sources'])}, this run reads {sorted(self.sources)}: "
                "resume with the same mixture"
            )
        self.step = state["step"]
        for name, source in self.sources.items():
            source.restore(state["sources"][name])


class Ahead:
    """
    A loader that works ahead in a thread, so that a step does not wait for its data. `next_step` gives the same batches as the loader's
    own; `state` is the loader's position after the last batches given, whatever the thread has made ready since; `waited` is how many
    seconds the last call took. An exception of the loader's is raised by the call that would have given those batches.

    A thread and not a process: most of what it does (reading, numpy) leaves Python's lock alone, and one core makes some 400,000 tokens
    of puzzles a second, 50,000,000 of text (LOG.md), of which a pair of T4s takes a few ten thousand.
    """

    def __init__(self, loader, depth=2, pin=False):
        self.loader, self.pin, self.state, self.waited = loader, pin, loader.state_dict(), 0.0
        self.ready, self.closed = queue.Queue(depth), False
        self.thread = threading.Thread(target=self.work, name="loader", daemon=True)
        self.thread.start()

    def work(self):
        while not self.closed:
            try:
                batches = self.loader.next_step()
                if self.pin:  # page-locked memory, from which a GPU copies without the CPU
                    for batch in batches:
                        batch.idx, batch.targets = batch.idx.pin_memory(), batch.targets.pin_memory()
                item = batches, self.loader.state_dict(), None
            except Exception as e:  # noqa: BLE001 (raised where somebody can handle it)
                item = None, None, e
            self.ready.put(item)
            if item[2] is not None:
                return

    def next_step(self):
        started = time.perf_counter()
        batches, state, error = self.ready.get()
        self.waited = time.perf_counter() - started
        if error is not None:
            self.ready.put((None, None, error))  # there will be nothing else, however often one asks
            raise error
        self.state = state
        return batches

    def close(self):
        """End the thread; the loader is where the thread has left it, `state` where the caller has."""
        self.closed = True
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.ready.get(timeout=0.01)
