"""Tiny models whose answers depend on everything they read, and checkpoints of them, for the tests of the evaluation."""

import numpy as np
import torch

from smol import checkpoint
from smol import tokenizer as tok


def make(name, block_size=256):
    torch.manual_seed(1)
    settings = {
        "n_layer": 2,
        "layer_pattern": "ka",
        "n_head": 2,
        "n_embd": 16,
        "n_ff": 24,
        "block_size": block_size,
    }
    recursion = {"n_latent": 1, "n_recursion": 1, "n_sup": 3} if name == "trm" else {}
    model = checkpoint.make_model(name, {**settings, **recursion})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


def save(path, name, train, block_size=256):
    model = make(name, block_size)
    checkpoint.save(
        {
            "format": checkpoint.CHECKPOINT_FORMAT,
            "model": name,
            "model_config": dict(vars(model.config)),
            "weights": model.state_dict(),
            "ema": None,
            "tokenizer": tok.fingerprint(),
            "train": train,
        },
        str(path),
    )
    return str(path)


def grid(text):
    return np.array([[int(c) for c in row] for row in text.split("/")], np.uint8)
