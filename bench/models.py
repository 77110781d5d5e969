"""
The models as wholes, measured beside others: how fast they decode, how fast they learn. Part of bench/kda.py, which has the command line.

    python -m bench.models decode                                   milliseconds per token and bytes of cache by context
    python -m bench.models learn --nanogpt=PATH                     Route A's small sibling beside nanoGPT's GPT (PATH: a checkout of it)
    python -m bench.models learn --variant=layer_pattern=a --variant=n_layer=4,n_embd=192       beside Route A with other settings

Learning is measured in turns: all contenders are in one process and train a few steps each, over and over, each on its own clock, so
that whatever else the machine is busy with slows all of them alike. On one CPU thread the clock counts the processor's time.
Before this: bench/kda.py.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model_dense import Config, Model, cache_bytes
from smol import engine
from smol import tokenizer as tok
from smol.files import save_picture
from smol.loader import Loader
from smol.muon import muon_and_adamw


def clock(device):
    """Seconds for measuring differences. The processor's own where one thread does all the work: others cannot disturb it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def load_nanogpt(path):
    """Imports model.py of a checkout of nanoGPT. FileNotFoundError in one line if it is not there."""
    file = os.path.join(path, "model.py")
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"--nanogpt={path}: there is no model.py; give the folder of a checkout of github.com/karpathy/nanoGPT"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks for itself there
    spec.loader.exec_module(module)
    return module


def quietly(make, *args):
    """make(*args), with what it prints sent to stderr: nanoGPT tells how large it is, and stdout may be JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        return make(*args)


# -----------------------------------------------------------------------------
# learn

SMALL = dict(
    n_layer=8, n_head=2, n_embd=64, block_size=1024
)  # the small sibling on a CPU; n_ff follows from the number of parameters
SMALL_CUDA = dict(n_layer=12, n_head=6, n_embd=384, block_size=1024)
TEXT = {
    "stdlib": 1,
    "langref": 1,
    "docstrings": 1,
    "arithmetic": 1,
}  # sources of the demo stage, in equal parts
BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 0.1, 1.0
WARMUP, DECAY = 0.05, 0.4  # shares of the budget in which the learning rate goes up, and down to zero
POINTS = 12  # of the curve


@dataclass
class Contender:
    name: str
    net: torch.nn.Module
    optimizers: list
    learning_rate: float
    loader: Loader
    seconds: float = 0.0
    tokens: int = 0
    curve: list = field(default_factory=list)  # (seconds, tokens, validation loss)


def sibling(settings, params):
    """Route A with `settings`, and n_ff such that it has about `params` parameters."""
    if "n_ff" in settings:
        return Model(Config(**settings))
    with torch.device("meta"):
        without, one = (Model(Config(**settings, n_ff=n)).num_params() for n in (8, 16))
    n_ff = max(8, round((params - without) / (one - without)) * 8 + 8)
    return Model(Config(**settings, n_ff=n_ff))


def read_variant(text):
    """'layer_pattern=a,n_layer=4' -> dict of Config's settings, besides optimizer. ValueError naming what is no setting."""
    kinds = {"layer_pattern": str, "optimizer": str, "rope_base": float, "norm_eps": float}
    settings = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name != "optimizer" and name not in Config.__dataclass_fields__:
            raise ValueError(
                f"--variant={text}: {name!r} is no setting of Route A; there are {', '.join(Config.__dataclass_fields__)}"
            )
        try:
            literal = {"True": True, "False": False}.get(value)
            settings[name] = literal if literal is not None else kinds.get(name, int)(value)
        except ValueError:
            raise ValueError(f"--variant={text}: {value!r} is not a value for {name}") from None
    return settings


def schedule(progress):
    """Share of the learning rate at a share of the budget: up, level, down to zero."""
    return max(0.0, min(1.0, (progress + 1e-3) / WARMUP, (1 - progress) / DECAY))


def train_a_turn(c, budget, device, autocast, steps=2):
    """A few optimizer steps of one contender, on its own clock."""
    c.net.train()
    start = clock(device)
    for _ in range(steps):
        lr = c.learning_rate * schedule(c.seconds / budget)
        for batch in c.loader.next_step():
            idx, targets = batch.idx.to(device), batch.targets.to(device)
            with autocast:
                loss = c.net(idx, targets)[1]
            loss.backward()
            c.tokens += idx.numel()
        torch.nn.utils.clip_grad_norm_(c.net.parameters(), GRAD_CLIP)
        for optimizer in c.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = clock(device)
        c.seconds, start = c.seconds + now - start, now


@torch.no_grad()
def validation_loss(net, loader, rows, device, autocast):
    """Mean over sources of the mean loss on at most `rows` batches of each."""
    net.eval()
    losses = {}
    for source, _, idx, targets in loader.val_batches("text", rows):
        with autocast:
            losses.setdefault(source, []).append(
                (net(idx.to(device), targets.to(device))[1].item(), len(idx))
            )
    return statistics.fmean(
        sum(loss * n for loss, n in rows) / sum(n for _, n in rows) for rows in losses.values()
    )


def train_together(contenders, budget, device, autocast, val_batches, points=POINTS):
    """Train all for `budget` seconds each, in turns, filling in their curves."""
    progress = tqdm(total=round(budget * len(contenders)), unit="s", leave=False)
    while waiting := [c for c in contenders if c.seconds < budget]:
        for c in waiting:
            train_a_turn(c, budget, device, autocast)
            if c.seconds >= budget * (len(c.curve) + 1) / points or c.seconds >= budget:
                c.curve.append(
                    (c.seconds, c.tokens, validation_loss(c.net, c.loader, val_batches, device, autocast))
                )
        progress.n = round(sum(min(c.seconds, budget) for c in contenders))
        progress.refresh()
    progress.close()


def reaches(curve, loss, axis):
    """Where on an axis of the curve (0: seconds, 1: tokens) it first gets down to `loss`, between points in a straight line; or None."""
    before = None
    for point in curve:
        if point[2] <= loss:
            if before is None or before[2] == point[2]:
                return point[axis]
            return before[axis] + (point[axis] - before[axis]) * (before[2] - loss) / (before[2] - point[2])
        before = point
    return None


def bench_learn(
    device,
    nanogpt=None,
    variants=(),
    seconds=240.0,
    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    data_dir="data",
    seed=1,
):
    """
    Train Route A's small sibling, its variants (as read_variant takes them) and nanoGPT, all with about the same number of parameters,
    for `seconds` each; before that, each for a quarter of them with every one of learning_rates, to find its own best.
    Returns rows {name, params, learning_rate, swept: {rate: loss}, tokens_per_second, curve, loss, seconds_share, tokens_share}: the shares
    are those of the last row's seconds and tokens at which this row reached the last row's final loss (None: it did not).
    """
    small = SMALL if device == "cpu" else SMALL_CUDA
    batch_size, val_batches = (1, 2) if device == "cpu" else (16, 4)
    autocast = torch.autocast(
        device,
        dtype=torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float16,
        enabled=device == "cuda",
    )
    families = {"route a": {}}
    families.update((text, read_variant(text)) for text in variants)
    with torch.device("meta"):
        params = Model(Config(**{**small, "n_ff": 8 * small["n_embd"] // 3})).num_params()
    if nanogpt is not None:
        gpt = load_nanogpt(nanogpt)
        families["nanogpt"] = None
        shape = gpt.GPTConfig(vocab_size=tok.VOCAB_SIZE, dropout=0.0, bias=False, **small)
        params = sum(p.numel() for p in quietly(gpt.GPT, shape).parameters())

    def contender(name, learning_rate):
        torch.manual_seed(seed)
        if families[name] is None:
            net = quietly(gpt.GPT, shape).to(device)
            optimizers = [quietly(net.configure_optimizers, WEIGHT_DECAY, learning_rate, BETAS, device)]
        else:
            settings = {**small, **families[name]}
            how = settings.pop("optimizer", "adamw")
            net = sibling(settings, params).to(device)
            optimizers = (
                [net.configure_optimizer(WEIGHT_DECAY, learning_rate, BETAS)]
                if how == "adamw"
                else muon_and_adamw(net, WEIGHT_DECAY, learning_rate, BETAS)
            )
        loader = Loader(
            data_dir,
            "demo",
            weights=TEXT,
            seed=seed,
            batch_size=batch_size,
            block_size=small["block_size"],
            batches_per_step=1,
            puzzle_format="autoregressive",
            verify=False,
        )
        return Contender(name, net, optimizers, learning_rate, loader)

    swept = {name: {} for name in families}
    if len(learning_rates) > 1:
        for rate in (
            learning_rates
        ):  # one rate at a time: memory for all contenders, not for all contenders times all rates
            tried = [contender(name, rate) for name in families]
            train_together(tried, seconds / 4, device, autocast, val_batches, points=1)
            for c in tried:
                swept[c.name][rate] = c.curve[-1][2]
    best = {
        name: min(swept[name], key=lambda rate: swept[name][rate], default=learning_rates[0])
        for name in families
    }
    finalists = [contender(name, best[name]) for name in families]
    train_together(finalists, seconds, device, autocast, val_batches)
    rival = finalists[-1].curve[-1]
    rows = []
    for c in finalists:
        shares = [
            None if (at := reaches(c.curve, rival[2], axis)) is None else at / rival[axis] for axis in (0, 1)
        ]
        rows.append(
            {
                "name": c.name,
                "params": sum(p.numel() for p in c.net.parameters()),
                "learning_rate": c.learning_rate,
                "swept": swept[c.name],
                "tokens_per_second": c.tokens / c.seconds,
                "curve": c.curve,
                "loss": c.curve[-1][2],
                "seconds_share": shares[0],
                "tokens_share": shares[1],
            }
        )
    return rows


def print_learn(rows):
    titles = f"{'':44s} {'parameters':>10s} {'best rate':>9s} {'tokens/s':>8s} {'tokens':>9s} {'loss':>6s}"
    print(f"{titles}   reaches {rows[-1]['name']}'s loss at a share of its seconds, tokens")
    for row in rows:
        shares = ["never" if row[s] is None else f"{row[s]:.0%}" for s in ("seconds_share", "tokens_share")]
        print(
            f"{row['name']:44s} {row['params']:10,} {row['learning_rate']:9g} {row['tokens_per_second']:8.0f} {row['curve'][-1][1]:9,} "
            f"{row['loss']:6.3f}   {shares[0]:>7s} {shares[1]:>7s}"
        )
    print("\nvalidation loss by share of the seconds, and what a quarter of them gave at each learning rate")
    for row in rows:
        print(
            f"{row['name']:44s} "
            + " ".join(f"{loss:.3f}" for _, _, loss in row["curve"])
            + "   "
            + ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in row["swept"].items())
        )


def plot_learn(rows, path):
    """Validation loss against seconds and against tokens, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (which, label) in zip(axes, ((0, "seconds of training"), (1, "tokens"))):
        for row in rows:
            axis.plot(
                [p[which] for p in row["curve"]], [p[2] for p in row["curve"]], marker=".", label=row["name"]
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per token")
    axes[0].legend()
    save_picture(figure, path)


# -----------------------------------------------------------------------------
# decode

CONTEXTS = (1024, 4096, 16384, 32768)
NANOGPT_LIMIT = 4096  # tokens up to which nanoGPT, which goes through the whole context again for every token, is run on a CPU


def filled(model, context, batch, room=16):
    """A KVCache of `context` tokens that nobody read: a step costs the same whatever they say."""
    device = model.wte.weight.device
    _, cache = engine.prefill(model, torch.full((batch, 1), tok.EOT, device=device), context + room)
    for block, layer in zip(model.blocks, cache.layers):
        for t in layer if block.kind == "a" else ():
            t.normal_()
    cache.idx = torch.full((batch, context), 17, device=device)
    return cache


@torch.no_grad()
def bench_decode(device, nanogpt=None, contexts=CONTEXTS, batches=(1, 8), steps=7, **settings):
    """
    One more token after `context` tokens, in turns: the 100M Route A (with `settings`, if any), the same with full attention in every
    layer, and nanoGPT's own generate at the same depth and width. Returns rows {context, batch, name, ms (median per step, all rows
    of the batch), cache_bytes (of the batch), ratio (of the second's ms to this one's)}.
    """
    torch.manual_seed(0)
    models = {
        "route a": Model(Config(**settings)),
        "layer_pattern=a": Model(Config(**{**settings, "layer_pattern": "a"})),
    }
    models = {name: model.to(device).eval() for name, model in models.items()}
    rows = []
    for batch in batches:
        for context in contexts if batch == 1 else contexts[-2:-1]:
            caches = {name: filled(model, context, batch) for name, model in models.items()}
            token = torch.full((batch,), 17, device=device)
            times = {name: [] for name in models}
            for step in range(2 + steps):
                for name, model in models.items():
                    start = clock(device)
                    engine.sample(
                        F.linear(engine.decode_step(model, token, caches[name]), model.wte.weight), 0
                    )
                    times[name].append(1000 * (clock(device) - start))
            ms = {name: statistics.median(t[2:]) for name, t in times.items()}
            held = {
                name: batch * cache_bytes(model.config, context, model.wte.weight.element_size())
                for name, model in models.items()
            }
            del caches
            if nanogpt is not None and batch == 1 and (device != "cpu" or context <= NANOGPT_LIMIT):
                c, module = models["route a"].config, load_nanogpt(nanogpt)
                shape = dict(
                    vocab_size=tok.VOCAB_SIZE,
                    n_layer=c.n_layer,
                    n_head=c.n_head,
                    n_embd=c.n_embd,
                    dropout=0.0,
                    bias=False,
                )
                gpt = quietly(module.GPT, module.GPTConfig(block_size=context + 1, **shape)).to(device).eval()
                idx = torch.full((1, context), 17, device=device)
                start = clock(device)
                gpt.generate(idx, 1, top_k=1)
                ms["nanogpt"], held["nanogpt"] = 1000 * (clock(device) - start), 0
            for name in ms:
                rows.append(
                    {
                        "context": context,
                        "batch": batch,
                        "name": name,
                        "ms": ms[name],
                        "cache_bytes": held[name],
                        "ratio": ms["layer_pattern=a"] / ms[name],
                    }
                )
    return rows


def print_decode(rows):
    print(
        f"{'context':>8s} {'batch':>5s} {'':18s} {'ms per step':>11s} {'MB of cache':>11s} {'times as fast as layer_pattern=a':>32s}"
    )
    for row in rows:
        held = row["cache_bytes"] / 1e6
        print(
            f"{row['context']:8,} {row['batch']:5} {row['name']:18s} {row['ms']:11.1f} {held:11.1f} {row['ratio']:32.2f}"
        )


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(f"error: {message}; see python -m bench.models --help")
    parser.add_argument("what", choices=["decode", "learn"])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--nanogpt", metavar="PATH", help="a checkout of github.com/karpathy/nanoGPT to compare with"
    )
    if argv[:1] == ["learn"]:
        parser.add_argument(
            "--variant",
            metavar="SETTINGS",
            action="append",
            default=[],
            help="Route A with other settings as well, such as layer_pattern=a,optimizer=adamw; may be given again",
        )
        parser.add_argument(
            "--seconds", type=float, default=240.0, help="training time for each contender (default 240)"
        )
        parser.add_argument(
            "--learning_rates",
            metavar="LIST",
            default="1e-3,3e-3,1e-2,3e-2",
            help="tried for a quarter of the seconds each; a single one is just taken (default %(default)s)",
        )
        parser.add_argument(
            "--plot",
            metavar="PNG",
            default="out/bench_learn.png",
            help="the picture (default out/bench_learn.png)",
        )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    try:
        if args.what == "decode":
            rows = bench_decode(device, args.nanogpt)
        else:
            rates = [float(rate) for rate in args.learning_rates.split(",")]
            if args.seconds <= 0 or min(rates) <= 0:
                raise ValueError("--seconds and --learning_rates must be above 0")
            rows = bench_learn(device, args.nanogpt, args.variant, args.seconds, rates)
            plot_learn(rows, args.plot)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if args.json:
        print(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2))
        return
    print(f"{name}, torch {torch.__version__}")
    (print_decode if args.what == "decode" else print_learn)(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
