"""
Test-time training: a copy of the model is tuned to one task before it answers that task, and then thrown away.

What it learns from is the task's own demonstrations: each in turn is the question and the others are the demonstrations, turned,
recoloured and reordered at random, exactly as puzzles are seen in training (loader.puzzle_row). The test input and its output are not
used, nor is any other task: what is asked next starts from the same model again. The idea, and leave-one-out with augmentation, are from
Akyürek et al., "The Surprising Effectiveness of Test-Time Training for Few-Shot Learning" (arXiv 2411.07279).

Low rank (the default) leaves every matrix W of the blocks as it is and learns B A of rank `ttt_rank` beside it (LoRA, arXiv 2106.09685);
ttt_rank = 0 tunes all weights. LOG.md has what either brought, and what it cost.

    python eval_arc.py CKPT --suites=arc1 --ttt_steps=32

Read next: solve.py, which calls `tune` and goes on with what it returns.
"""

import copy

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from smol import arc
from smol.loader import bucket_length, draw_rng, pad_rows, puzzle_row

ROWS = 4  # leave-one-out views of the task per step


class LowRank(nn.Module):
    """W -> W + B A. B starts at zero, so that nothing has changed before the first step."""

    def __init__(self, weight, rank, generator):
        super().__init__()
        rank = min(rank, *weight.shape)
        a = torch.randn(rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
        self.A = nn.Parameter(a.to(weight))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight):
        return weight + self.B @ self.A


def lower_rank(model, rank, generator):
    """Make the matrices of all blocks tunable in low rank, and nothing else. -> the list of the layers that have them."""
    layers = [module for block in model.blocks for module in block.modules() if type(module) is nn.Linear]
    model.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, generator))
    return layers


def rows(task, n, puzzle_format, block_size, rng):
    """At most n (idx, targets), leave-one-out views of the task's demonstrations that fit into block_size; of ten times as many draws."""
    document = arc.encode(task.kind, task.train)
    augment = {"arc": "arc", "maze": "dihedral"}.get(task.kind, "none")
    found = []
    for _ in range(10 * n):
        if len(found) == n:
            break
        row = puzzle_row(document, puzzle_format, augment, rng)
        if len(row[0]) <= block_size:
            found.append(row)
    return found


@torch.enable_grad()
def tune(model, task, settings):
    """
    model of either route, task an arc.Task with two or more demonstrations, settings a solve.Settings -> a tuned copy in evaluation
    mode, or the model itself where no view of the task fits into its block_size. In float32, whatever the model answers in.
    """
    rng = draw_rng(settings.seed, "ttt", task.id)
    seen = rows(task, settings.ttt_steps * ROWS, model.puzzle_format, model.config.block_size, rng)
    if not seen:
        return model
    tuned = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    layers = lower_rank(tuned, settings.ttt_rank, generator) if settings.ttt_rank else []
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.ttt_lr, weight_decay=0.0)
    device = model.wte.weight.device
    length = min(
        bucket_length(max(len(idx) for idx, _ in seen)), model.config.block_size
    )  # one shape: Route B's carry keeps it
    carry = None
    with torch.autocast(device.type, enabled=False):
        for step in range(settings.ttt_steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.ttt_lr * (1 - step / settings.ttt_steps)
            part = [seen[(step * ROWS + i) % len(seen)] for i in range(ROWS)]
            idx, targets = pad_rows(part, length)
            _, loss, carry = tuned(idx.to(device), targets.to(device), mode="puzzle", carry=carry)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for layer in layers:
        parametrize.remove_parametrizations(
            layer, "weight"
        )  # W + B A becomes the weight: answering costs what it did
    return tuned.eval()
