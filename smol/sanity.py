"""
Stage 0: is everything in order for a long run? What train.py checks beyond training, when its config says `sanity = True`:

    python train.py config/route_a_stage0.py        the real model, data and batch for a few steps, then a table of PASS and FAIL

Before its first step train.py verifies the data as always, and here one batch of each kind is learned by heart; after its last step the
log, the checkpoint and the speed are looked at. A check is (what, whether it passed, how it was). Read next: train.py, which calls this.
"""

import math

import torch
from tqdm import tqdm

from smol import checkpoint as ckpt
from smol import loop, runtime


def show(checks, out_dir):
    """Print the table. Returns whether all is well."""
    well = all(passed for _, passed, _ in checks)
    print(f"\n{'PASS' if well else 'FAIL'}   stage 0 of {out_dir}")
    for what, passed, how in checks:
        print(f"  {'PASS' if passed else 'FAIL'}   {what:26s}   {how}")
    return well


def by_heart(net, batch, *, mode, steps, tokens, optimizer, learning_rate, betas, autocast, scaled, device):
    """
    Learn (source, number, idx, targets) of loader.val_batches by heart, cut to about `tokens` tokens: where model, loss and gradients fit
    together, the loss gets near zero. Returns a check. The weights are put back. scaled: float16, whose loss is scaled.

    The optimizer and its rate are the run's own: it is the run that this is about. (AdamW at 1e-3, fine for Route A, takes apart a Route B
    of width 768, where Muon at 4e-4 gets there in 15 steps: LOG.md.)
    """
    source, _, idx, targets = batch
    rows = max(1, tokens // idx.shape[1])
    length = tokens if mode == "text" else idx.shape[1]  # the answer of a puzzle is at its end
    idx, targets = idx[:rows, :length].to(device), targets[:rows, :length].to(device)
    before = {k: v.detach().clone() for k, v in net.state_dict().items()}
    optimizers = loop.make_optimizers(net, optimizer, 0.0, learning_rate, betas)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=scaled)
    progress = tqdm(
        range(steps),
        desc=f"one {mode} batch by heart",
        leave=False,
        disable=None if runtime.master else True,
    )
    for i in progress:
        for group in (group for o in optimizers for group in o.param_groups):
            group["lr"] = learning_rate * min(1, (i + 1) / 10)
        with autocast:
            loss = net(idx, targets, mode=mode)[1]
        scaler.scale(loss).backward()
        for o in optimizers:
            scaler.unscale_(o)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for o in optimizers:
            scaler.step(o)
        scaler.update()
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        progress.set_postfix_str(f"loss {loss.item():.3f}")
    net.load_state_dict(before)
    how = f"{tuple(idx.shape)} of {source}, loss {loss.item():.3f} after {steps} steps"
    return f"one {mode} batch by heart", loss.item() < 0.1, how


def afterwards(run_log, val_losses, ckpt_path, net, *, scaled, world_size, card, run_tokens):
    """
    The checks after the last step. run_log: the entries of log.jsonl, those of skipped steps left out. scaled: float16, which finds its
    loss scale by skipping steps. run_tokens: of the run that this one prepares, or 0.
    """
    if not run_log:
        return [("steps", False, "none that was logged had a finite loss and gradient")]
    last, settled = run_log[-1], run_log[1:] or run_log  # the first interval warms up
    rate = sum(e["tokens_per_second"] for e in settled) / len(settled)
    waits = sum(e["data_wait"] for e in settled) / len(settled)
    written = ckpt.load(ckpt_path)["weights"]
    checks = [
        (
            f"{last['iter']} steps",
            last["skipped"] <= (last["iter"] // 2 if scaled else 0),
            f"{last['skipped']} skipped, loss {run_log[0]['loss']:.3f} to {last['loss']:.3f}, gradient {last['grad_norm']:.2f}",
        ),
        (
            "validation",
            bool(val_losses) and all(map(math.isfinite, val_losses.values())),
            ", ".join(f"{k} {v:.2f}" for k, v in val_losses.items()) or "of nothing, as said above",
        ),
        (
            "checkpoint",
            all(torch.equal(written[k], v.cpu()) for k, v in net.state_dict().items()),
            "reads back bit for bit",
        ),
        ("processes in sync", True, f"{world_size}, the same bits" if world_size > 1 else "only one"),
        ("waiting for data", waits < 0.02, f"{waits:.2%} of the time"),
        (
            "speed",
            rate > 0,
            f"{rate:,.0f} tokens/s" + (f", MFU {last['mfu']:.1%}" if last["mfu"] else "") + f" on {card}",
        ),
        ("memory", True, f"{last['memory_gb']:.2f} GB at most, of process 0"),
    ]
    if run_tokens:
        checks.append(
            (
                "the run it prepares",
                True,
                f"{run_tokens / 1e9:g}B tokens: {run_tokens / rate / 3600:,.1f} h here",
            )
        )
    return checks
