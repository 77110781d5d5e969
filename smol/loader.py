"""
Manifests -> batches. The same seed gives the same batches, on one process or many, interrupted or not.

A source is an endless sequence of *draws*, and draw number n always gives the same row: which document, which
augmentation, which pair is the test all follow from the seed, the source and n. So a few counters are the
loader's whole state.

  text      shards are one long string of tokens, cut into windows, in a new order every epoch
  puzzles   a document is decoded, seen through a random symmetry, its pairs in a random order and as many as
            fit, and written in the model's format; rows of similar length wait in buckets, and a full bucket
            is a batch

Every batch has about batch_size * block_size tokens: short puzzles come in larger batches. The batches of a
step are of several sources, each of one. Every process goes through the same draws and keeps the batches that
are its own, so the batches of a step do not depend on how many processes share them.

Before this: prepare.py. Read next: train.py.
"""

import hashlib
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from smol import arc, puzzles
from smol import tokenizer as tok
from smol.snapshots import read_manifest, sha256_file
from smol.tokenizer import IGNORE

# Rows are padded to the next of these lengths: from 18 tokens on at most a quarter is padding.
BUCKETS = (
    *(16, 24, 32, 44, 48, 64, 80, 96, 116, 128, 160, 192, 256, 320, 384, 512, 640, 768),
    *(1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 10240),
)
MOST_SKIPPED = 10_000  # draws in a row that are longer than block_size
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, fill [0, 1) as evenly as any


@dataclass
class Batch:
    mode: str  # "text" or "puzzle"
    idx: torch.Tensor  # (B, L) long
    targets: torch.Tensor  # (B, L) long, IGNORE where there is no loss
    source: str
    key: tuple  # (number of the batch within its step, source, L): what a carry belongs to

    @property
    def tokens(self):
        """In idx, padding left out."""
        return int((self.idx != tok.PAD).sum())


def draw_rng(seed, source, n):
    """The random numbers of one draw: they depend on these three and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{source}/{n}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


class Shards:
    """All shards of one source and split as one sequence of tokens and one of documents, memory-mapped."""

    def __init__(self, data_dir, entries):
        self.tokens = [np.memmap(os.path.join(data_dir, e["path"]), dtype="<u2", mode="r") for e in entries]
        files = [os.path.join(data_dir, e["path"].removesuffix(".bin") + ".idx") for e in entries]
        self.offsets = [np.fromfile(path, dtype="<i8") for path in files]
        self.first_token = np.cumsum([0] + [len(t) for t in self.tokens])
        self.first_document = np.cumsum([0] + [len(o) - 1 for o in self.offsets])
        self.n_tokens, self.n_documents = int(self.first_token[-1]), int(self.first_document[-1])

    def slice(self, start, stop):
        """Tokens start..stop of the whole sequence, across shards, as int64."""
        parts = []
        shard = int(np.searchsorted(self.first_token, start, side="right")) - 1
        while start < stop:
            first, tokens = int(self.first_token[shard]), self.tokens[shard]
            parts.append(tokens[start - first : stop - first])
            start, shard = first + len(tokens), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def window(self, i, block_size):
        """-> (idx, targets) of window i, (block_size,) int64 each."""
        ids = self.slice(i * block_size, (i + 1) * block_size + 1)
        return ids[:-1], ids[1:]

    def document(self, i):
        shard = int(np.searchsorted(self.first_document, i, side="right")) - 1
        a, b = self.offsets[shard][i - self.first_document[shard] :][:2]
        return np.asarray(self.tokens[shard][a:b])


# -----------------------------------------------------------------------------
# rows


def puzzle_row(document, puzzle_format, augment, rng=None, block_size=None):
    """
    One document (uint16 ids of a task) as a row: (idx, targets), int64 of equal length.

    puzzle_format "autoregressive": the document shifted by one; targets are the outputs of all pairs but the
    first, which nothing explains, and after each the <|endoftext|> that ends an answer.
    puzzle_format "canvas": demonstrations, then the test input on a canvas; every cell of it is a target.
    augment: "none", "dihedral" or "arc", as in arc.random_augment, or "sudoku", as in puzzles.shuffle_sudoku.
    The order of the pairs changes too, so any may be the test. rng None, for validation: the document as it
    is, and loss on the last output alone. Demonstrations that do not fit into block_size are left out, the
    first ones, but for one: a row may still be longer.
    """
    kind, pairs = arc.decode(document)
    if rng is not None:
        if augment == "sudoku":
            pairs, augment = [tuple(puzzles.shuffle_sudoku(rng, *pair)) for pair in pairs], "none"
        symmetry = arc.random_augment(rng, augment)
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        if symmetry != arc.IDENTITY:
            pairs = [(arc.augment(symmetry, x), arc.augment(symmetry, y)) for x, y in pairs]
    left_to_right = puzzle_format == "autoregressive"
    while True:
        row = read_row(kind, pairs, last_only=rng is None) if left_to_right else canvas_row(kind, pairs)
        if not block_size or len(row[0]) <= block_size or len(pairs) <= 2:
            return row
        pairs = pairs[1:]


def read_row(kind, pairs, last_only):
    """A row for a model that reads left to right."""
    ids = arc.encode(kind, pairs).astype(np.int64)
    idx, targets = ids[:-1], np.full(len(ids) - 1, IGNORE)
    starts = np.flatnonzero(idx == tok.OUTPUT)  # there the first cell is predicted
    for start, (_, y) in list(zip(starts, pairs))[-1 if last_only or len(pairs) == 1 else 1 :]:
        n = y.shape[0] * (y.shape[1] + 1)
        targets[start : start + n + 1] = [*ids[start + 1 : start + n + 1], tok.EOT]
    return idx, targets


def canvas_row(kind, pairs):
    """A row for a model that fills in all cells of the last output at once."""
    *demos, (test_input, test_output) = pairs
    # One task in seventy has an output larger than could be guessed: it is learned from all the same.
    guessed = arc.canvas_shape(demos, test_input)
    shape = tuple(max(a, b) for a, b in zip(guessed, test_output.shape))
    idx = arc.encode_prompt(kind, demos, test_input, canvas=shape).astype(np.int64)
    targets = np.full(len(idx), IGNORE)
    targets[-shape[0] * (shape[1] + 1) :] = arc.canvas_target(test_output, shape)
    return idx, targets


def bucket_length(n):
    return next((b for b in BUCKETS if b >= n), n)


def pad_rows(rows, length):
    """List of (idx, targets) -> idx, targets (B, length), padded with PAD and IGNORE."""
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

    def __init__(self, name, shards, seed, batch_size, block_size):
        self.name, self.shards, self.seed = name, shards, seed
        self.batch_size, self.block_size = batch_size, block_size
        self.n_windows = (shards.n_tokens - 1) // block_size
        if self.n_windows < 1:
            raise ValueError(f"{name!r} has {shards.n_tokens} tokens, less than a row: lower {block_size=}")
        self.drawn, self.epoch, self.order = 0, -1, None

    def next_batch(self, build=True):
        """(idx, targets) of the next batch; without the work None, for a batch of another process."""
        draws = range(self.drawn, self.drawn + self.batch_size)
        self.drawn += self.batch_size
        if not build:
            return None
        rows = []
        for n in draws:
            epoch, i = divmod(n, self.n_windows)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = draw_rng(self.seed, self.name, epoch).permutation(self.n_windows)
            rows.append(self.shards.window(int(self.order[i]), self.block_size))
        return tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows))

    def state(self):
        return {"drawn": self.drawn}

    def restore(self, state):
        self.drawn = state["drawn"]


class Puzzles:
    """Puzzle documents, seen anew at every draw. Its position: one number, and draws that wait in buckets."""

    mode = "puzzle"

    def __init__(self, name, shards, seed, batch_size, block_size, puzzle_format, augment):
        self.name, self.shards, self.seed = name, shards, seed
        self.batch_tokens, self.block_size = batch_size * block_size, block_size
        self.puzzle_format, self.augment = puzzle_format, augment
        self.drawn, self.waiting = 0, {}  # {length: [(draw, row), ...]}

    def put(self, n):
        """Draw n into the bucket of its length -> the length; None where the row exceeds block_size."""
        rng = draw_rng(self.seed, self.name, n)
        document = self.shards.document(int(rng.integers(self.shards.n_documents)))
        row = puzzle_row(document, self.puzzle_format, self.augment, rng, self.block_size)
        if len(row[0]) > self.block_size:
            return None
        length = min(bucket_length(len(row[0])), self.block_size)
        self.waiting.setdefault(length, []).append((n, row))
        return length

    def next_batch(self, build=True):
        skipped = 0
        while skipped < MOST_SKIPPED:
            length = self.put(self.drawn)
            self.drawn += 1
            if length is None:
                skipped += 1
                continue
            skipped, waiting = 0, self.waiting[length]
            size = self.batch_tokens // length
            if len(waiting) >= size:
                rows = [row for _, row in waiting[:size]]
                del waiting[:size]
                return pad_rows(rows, length) if build else None
        raise ValueError(f"{skipped:,} draws of {self.name!r} in a row exceed block_size={self.block_size}")

    def state(self):
        waiting = {str(length): [n for n, _ in held] for length, held in self.waiting.items() if held}
        return {"drawn": self.drawn, "waiting": waiting}

    def restore(self, state):
        """Draws go into their buckets anew: batch_size and block_size may be others than they were."""
        self.drawn, self.waiting = state["drawn"], {}
        for n in sorted(n for draws in state["waiting"].values() for n in draws):
            self.put(n)


# -----------------------------------------------------------------------------
# the loader


class Loader:
    """
    Training batches of a stage, every step a mixture of its sources in proportion to `weights`: {source: any
    positive number}, None for the stage's own. tag: a frozen version of the stage. FileNotFoundError or
    ValueError for a stage that is not prepared, damaged, or lacks what is asked for.
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
        manifest, mixture = read_manifest(data_dir, stage, tag=tag, verify=verify)
        snapshot = os.path.join(data_dir, "stages", stage, tag or "", "snapshot.json")
        self.snapshot = sha256_file(snapshot) if tag else None
        self.weights = weights = dict(weights or mixture["weights"])
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.batches_per_step, self.batch_size, self.block_size = batches_per_step, batch_size, block_size
        self.puzzle_format = puzzle_format
        self.step, self.sources = 0, {}
        self.val = []  # (kind, source, Shards)
        used = []
        for name, weight in sorted(weights.items()):
            entries = [e for e in manifest if e["source"] == name]
            train = [e for e in entries if e["split"] == "train"]
            held_out = [e for e in entries if e["split"] == "val"]
            if not (train if weight else entries):
                have = ", ".join(sorted({e["source"] for e in manifest if e["split"] == "train"}))
                raise ValueError(f"stage {stage!r} has no training shard of {name!r}; it has: {have}")
            kind = entries[0]["kind"]
            if weight:
                used += [e["sha256"] for e in entries]
                shards = Shards(data_dir, train)
                if kind == "text":
                    self.sources[name] = Text(name, shards, seed, batch_size, block_size)
                else:
                    how = seed, batch_size, block_size, puzzle_format, train[0]["augment"]
                    self.sources[name] = Puzzles(name, shards, *how)
            if held_out:
                self.val.append((kind, name, Shards(data_dir, held_out)))
        self.fingerprint = hashlib.sha256("\n".join(used).encode()).hexdigest()  # of the data that is read
        self.names = sorted(self.sources, key=lambda name: (self.sources[name].mode, name))
        self.shares = np.array([weights[name] for name in self.names], dtype=np.float64)
        self.shares /= self.shares.sum()

    def sources_of_step(self, step):
        """
        The name of the source of each batch. Systematic sampling: the sources lie on [0, 1) one after the
        other, each as long as its share, and the batches are points at equal distances there, which move from
        step to step. So a source has its share of every step to within a batch; a number is mostly the same
        source's, whose carry is soon taken up again; processes have equally many puzzles, give or take one.
        """
        moved = (draw_rng(self.seed, "", 0).random() + step * GOLDEN) % 1
        points = (np.arange(self.batches_per_step) + moved) / self.batches_per_step
        return [self.names[i] for i in np.searchsorted(np.cumsum(self.shares)[:-1], points, side="right")]

    def next_step(self):
        """The batches of the next optimizer step that belong to this process: rank, rank + world_size, ..."""
        batches = []
        for number, name in enumerate(self.sources_of_step(self.step)):
            source, mine = self.sources[name], number % self.world_size == self.rank
            batch = source.next_batch(mine)
            if mine:
                idx, targets = batch
                batches.append(Batch(source.mode, idx, targets, name, (number, name, idx.shape[1])))
        self.step += 1
        return batches

    def val_rows(self, kind, shards, n):
        """-> {length: rows} of the first n * batch_size held-out rows of one source, but those too long."""
        if kind == "text":
            windows = (shards.n_tokens - 1) // self.block_size
            picks = np.linspace(0, windows - 1, min(windows, n * self.batch_size)).astype(int).tolist()
            rows = [shards.window(i, self.block_size) for i in picks]
            return {self.block_size: rows} if rows else {}
        lengths = {}
        for i in range(min(shards.n_documents, n * self.batch_size)):
            row = puzzle_row(shards.document(i), self.puzzle_format, "none", block_size=self.block_size)
            if len(row[0]) <= self.block_size:
                lengths.setdefault(min(bucket_length(len(row[0])), self.block_size), []).append(row)
        return lengths

    def val_batches(self, mode, n):
        """This process's batches of held-out rows, at most n * batch_size: (source, number, idx, targets)."""
        for kind, name, shards in self.val:
            number = 0
            for length, rows in sorted(self.val_rows(kind, shards, n).items() if kind == mode else ()):
                per_batch = self.batch_size * self.block_size // length
                for start in range(0, len(rows), per_batch):
                    if number % self.world_size == self.rank:
                        yield name, number, *pad_rows(rows[start : start + per_batch], length)
                    number += 1

    def not_validated(self, n):
        """-> the sources of the mixture that have no rows among val_batches(mode, n)."""
        found = {name for kind, name, shards in self.val if self.val_rows(kind, shards, n)}
        return sorted(self.weights.keys() - found)

    def state_dict(self):
        """Plain numbers: the step, and each source's position."""
        return {"step": self.step, "sources": {name: source.state() for name, source in self.sources.items()}}

    def load_state_dict(self, state):
        """Go on where state_dict was taken, of the same sources."""
        self.step = state["step"]
        for name, source in self.sources.items():
            source.restore(state["sources"][name])


class Ahead:
    """
    A loader that works two steps ahead in a thread: reading and numpy leave Python's lock alone. state: the
    loader's position after the last batches given; waited: seconds that the last call took.
    """

    def __init__(self, loader, pin=False):
        self.loader, self.pin, self.state, self.waited = loader, pin, loader.state_dict(), 0.0
        self.pool = ThreadPoolExecutor(1)
        self.steps = deque(self.pool.submit(self.work) for _ in range(2))

    def work(self):
        batches = self.loader.next_step()
        if self.pin:  # page-locked memory, from which a GPU copies without the CPU
            for batch in batches:
                batch.idx, batch.targets = batch.idx.pin_memory(), batch.targets.pin_memory()
        return batches, self.loader.state_dict()

    def next_step(self):
        started = time.perf_counter()
        batches, self.state = self.steps[0].result()  # one that failed stays, and raises again
        self.waited = time.perf_counter() - started
        self.steps.popleft()
        self.steps.append(self.pool.submit(self.work))
        return batches

    def close(self):
        """End the thread; the loader is where the thread has left it, `state` where the caller has."""
        self.pool.shutdown(cancel_futures=True)
