"""
Tokens, hours and memory of a training run, before it is started.

    python -m bench.plan config/route_a_stage1.py                     on two T4s, at an assumed share of peak
    python -m bench.plan config/route_a_stage1.py --card="RTX 3060" --cards=1 --batch_size=4
    python -m bench.plan config/route_a_stage1.py --log=out/short/log.jsonl  from a first run's speed

All settings of train.py can be given as well. Before this: train.py, bench/train.py.
"""

import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import configurator
import train
from bench.train import read_with_train
from smol import checkpoint, loader, loop, runtime
from smol import tokenizer as tok
from smol.muon import split_parameters
from smol.snapshots import read_json

card = "T4"  # a name in runtime.CARDS
cards = 2
mfu = 0.25  # assumed share of the card's published peak
puzzles = 0.2  # share of puzzles in the tokens: 0.2 in stage 1, 0.3 in stage 2, 0.4 in stage 3
log = ""  # log.jsonl of a run on the machine, in its out_dir: its speed counts in place of card and mfu

RANGES = {"[1, inf)": "cards", "(0, 1]": "mfu", "[0, 1]": "puzzles", tuple(runtime.CARDS): "card"}


def saved_bytes(net, idx, dtype):
    """Bytes that one training forward keeps for its backward, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that its address is not given to another
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype=dtype):
        net(idx, idx)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def activation_bytes(net, c):
    """
    Bytes that a training forward keeps, counted on this machine with the PyTorch form of KDA: per token of a
    batch, and whatever the batch (the gradient of the head, weights in half precision).
    """
    T = max(2, min(c.block_size, 256) // 2 * 2)
    idx = torch.randint(0, tok.N_GPT2, (1, T), generator=torch.Generator().manual_seed(0))

    def more_per_token(kept):
        return (kept - saved_bytes(net, idx[:, : T // 2], torch.bfloat16)) / (T / 2)

    kept = saved_bytes(net, idx, torch.bfloat16)  # as many bytes as float16, which few CPUs can
    per_token = more_per_token(kept)
    fixed = kept - T * per_token
    text_passes = net.passes("text")[1] if c.model == "trm" else 1
    if c.model == "trm":  # a puzzle keeps more passes through the core than text
        per_token *= max(1, net.passes("puzzle")[1] / text_passes)
    if c.recompute:  # beside the inputs of all blocks, one block as a whole while it is gone through again
        net.config.recompute = False
        one = more_per_token(saved_bytes(net, idx, torch.bfloat16)) / (net.config.n_layer * text_passes)
        per_token += one
    return per_token, fixed


def plan(o, c, what):
    """Print the plan of a run; o: the settings above, c: those of train.py."""
    net = checkpoint.make_model(c.model, vars(c)).train()
    params = net.num_params()
    batches = loop.batches_per_step(vars(c))
    per_step = c.batch_size * batches * c.block_size
    tokens = per_step * c.max_iters
    text, puzzle = (net.flops_per_token(c.block_size, mode, training=True) for mode in ("text", "puzzle"))
    flops = tokens * ((1 - o.puzzles) * text + o.puzzles * puzzle)
    print(
        f"{what}: {params / 1e6:.1f}M parameters, {c.max_iters:,} steps of {per_step:,} tokens = "
        f"{tokens / 1e9:.2f}B tokens, {tokens / params:.1f} per parameter"
    )
    print(
        f"  training FLOPs: {text / 1e9:.2f}G per token of text, {puzzle / 1e9:.2f}G of puzzles, "
        f"{flops / 1e18:.2f}e18 with {o.puzzles:.0%} puzzles"
    )
    peak, memory = runtime.CARDS[o.card]
    if o.log:
        logged = [e for e in runtime.read_log(o.log) if "tokens_per_second" in e]
        about = read_json(Path(o.log).with_name("config.json"))
        if not logged or not about:
            raise ValueError(f"{o.log} has no line with tokens_per_second, or no config.json beside it")
        rate, source = statistics.median(e["tokens_per_second"] for e in logged), f"measured in {o.log}"
        of_a_step = about["batch_size"] * loop.batches_per_step(about) * (about["block_size"] or c.block_size)
        tokens *= logged[-1]["tokens"] / logged[-1]["iter"] / of_a_step  # a log counts no padding
    else:
        if c.recompute:  # of the passes with gradient, which are the training's beyond twice the forward's
            again = (text - net.flops_per_token(c.block_size)) / 2 - 2 * net.config.n_embd * tok.VOCAB_SIZE
            in_puzzles = (puzzle - net.flops_per_token(c.block_size, "puzzle")) / 2
            flops += tokens * ((1 - o.puzzles) * again + o.puzzles * in_puzzles)
        rate = tokens / (flops / (o.cards * peak * 1e12 * o.mfu))
        source = f"{o.mfu:.0%} of {o.cards} x {o.card}, {peak} TFLOPS each (assumed; see --log)"
    print(f"  hours: {tokens / rate / 3600:.1f} at {rate:,.0f} tokens/s, {source}")
    # weights, gradients, two moments, of which Muon has one; the average; the copy that DDP sends
    fixed = params * (16 + 4 * bool(c.ema) + 4 * (o.cards > 1))
    if c.optimizer == "muon":
        fixed -= 4 * sum(p.numel() for p in split_parameters(net, 0.0)[0]["params"])
    per_token, constant = activation_bytes(net, c)
    activations = per_token * c.batch_size * c.block_size + constant
    print(
        f"  memory per card: {fixed / 1e9:.1f} GB for weights, gradients and optimizer, "
        f"{activations / 1e9:.1f} GB for activations ({per_token / 1e3:.0f} kB a token), of {memory} GB"
    )
    if c.model == "trm":  # y and z in float16, for every batch of puzzles of a step and every length
        batches = math.ceil(o.puzzles * batches) * c.carry_turns
        lengths = sum(length <= c.block_size for length in loader.BUCKETS)
        carried = 4 * net.config.n_embd * c.batch_size * c.block_size * lengths * batches
        print(f"  memory of the host: about {carried / 1e9:.1f} GB at most for the carries of puzzles")
    if fixed + activations > 0.9 * memory * 1e9:
        print("  that does not fit: lower batch_size, raise gradient_accumulation_steps, or recompute=True")


def main(argv):
    options, config = read_with_train(globals(), argv)
    config = config or configurator.settings(vars(train))
    what = " ".join(word for word in argv if word.partition("=")[0].removeprefix("--") not in options)
    try:
        plan(SimpleNamespace(**options), SimpleNamespace(**config), what or "train.py")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
