"""Tiny models, tasks, texts and checkpoints for the tests."""

import functools
import hashlib

import numpy as np
import pytest
import torch

import model_dense
import model_trm
from smol import arc, checkpoint, engine
from smol import tokenizer as tok
from smol.loader import pad_rows, puzzle_row

SHAPE = dict(block_size=256, n_layer=4, n_head=2, n_embd=24, n_ff=32)
RECURSION = dict(n_latent=2, n_recursion=2, n_sup=3)


def shake(model, seed, size):
    """
    Move every weight, since many are zero or one at first. What branches add is kept small: an untrained core
    that is gone through twenty times turns a rounding error into another answer.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += size * torch.randn(p.shape, generator=rng)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p *= 0.3
    return model.eval()


def dense(seed=0, size=0.1, **settings):
    torch.manual_seed(seed)
    return shake(model_dense.Model(model_dense.Config(**{**SHAPE, **settings})), seed, size)


def trm(seed=0, **settings):
    torch.manual_seed(seed)
    return shake(model_trm.Model(model_trm.Config(**{**SHAPE, **RECURSION, **settings})), seed, 0.1)


BUILD = {"dense": dense, "trm": trm}


def text(B, T, seed=0):
    return torch.randint(0, tok.N_GPT2 - 1, (B, T), generator=torch.Generator().manual_seed(seed))


def documents(lengths, seed=0):
    """One row of documents, each begun by an EOT, and a list of where they begin and the last ends."""
    parts = [torch.cat([torch.tensor([tok.EOT]), text(1, n, seed + i)[0]]) for i, n in enumerate(lengths)]
    return torch.cat(parts)[None], np.cumsum([0] + [n + 1 for n in lengths]).tolist()


def make_task(seed, demos=2, tests=1, side=3):
    """A task whose output is the input mirrored; the sides of its grids differ."""
    rng = np.random.default_rng(seed)

    def pair():
        x = rng.integers(0, 10, rng.integers(1, side + 1, 2)).astype(np.uint8)
        return x, x[:, ::-1].copy()

    return arc.Task(f"t{seed}", "arc", [pair() for _ in range(demos)], [pair() for _ in range(tests)])


TASKS = [make_task(0), make_task(1, 1, tests=2), make_task(2, 3), make_task(3, 1, side=5), make_task(0)]


def puzzle_batch(puzzle_format, seeds, length=None):
    """(idx, targets) of one task a row."""
    tasks = [make_task(seed) for seed in seeds]
    rows = [puzzle_row(arc.encode("arc", [*t.train, *t.test]), puzzle_format, "none") for t in tasks]
    return pad_rows(rows, length or max(len(x) for x, _ in rows))


@pytest.fixture
def stand_ins(monkeypatch):
    """Objects in place of a model may bring a `continue_texts` of their own."""
    real = engine.continue_texts

    def call(model, *args):
        return getattr(model, "continue_texts", functools.partial(real, model))(*args)

    monkeypatch.setattr(engine, "continue_texts", call)


def make(name, block_size=256):
    """A model of route `name` whose answers depend on everything it reads."""
    torch.manual_seed(1)
    shape = dict(n_layer=2, layer_pattern="ka", n_head=2, n_embd=16, n_ff=24, block_size=block_size)
    recursion = dict(n_latent=1, n_recursion=1, n_sup=3) if name == "trm" else {}
    model = checkpoint.make_model(name, {**shape, **recursion})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


def content(name, model, **changes):
    """What a checkpoint of a model holds."""
    return {
        "format": checkpoint.CHECKPOINT_FORMAT,
        "model": name,
        "model_config": dict(vars(model.config)),
        "weights": model.state_dict(),
        "ema": None,
        "tokenizer": tok.fingerprint(),
        **changes,
    }


def save(path, name, train, block_size=256):
    """A checkpoint of `make`."""
    checkpoint.save(content(name, make(name, block_size), train=train), str(path))
    return str(path)


def grid(rows):
    """'12/34' -> np.uint8 (2, 2)."""
    return np.array([[int(c) for c in row] for row in rows.split("/")], np.uint8)


def digest(tasks):
    """Of their ids and all that is in them, grids or texts."""
    found = hashlib.sha256()
    for task in tasks:
        found.update(task.id.encode())
        for part in (part for pair in task.train + task.test for part in pair):
            found.update(part.encode() if isinstance(part, str) else bytes(part.shape) + part.tobytes())
    return found.hexdigest()[:16]
