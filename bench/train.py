"""
The training step of both routes beside a plain GPT of the same size, or the fastest way to run a config.

    python -m bench.train                            forward, backward, clipping and optimizer on random text
    python -m bench.train --nanogpt=PATH             beside nanoGPT as well (PATH: a checkout of it)
    python -m bench.train config/route_a_stage1.py   batch size, dtype, compile and recompute for that config

Every measurement is a process of its own: its peak memory is its own, and when it runs out of it, only it
ends. On a CPU with one thread (OMP_NUM_THREADS=1) seconds are processor seconds, so that other jobs count
less. Before this: train.py. Read next: bench/plan.py.
"""

import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import torch

import configurator
import train
from smol import checkpoint, loop, runtime
from smol import tokenizer as tok
from smol.files import write_whole

# ---- beside a plain GPT
size = "auto"  # 'full': the 100M models; 'small': 16M; auto: full on a GPU
lengths = (1024, 4096, 8192)  # tokens per row
tokens = 8192  # per batch
nanogpt = ""  # path of a checkout of github.com/karpathy/nanoGPT
# ---- both
steps = 3  # timed; the median counts
json_file = ""  # write the rows here as well

RANGES = {"[1, inf)": "tokens steps", ("auto", "full", "small"): "size"}
MOST_ROWS = 64  # the largest batch_size tried
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_ff": 688}


def clock(device):
    """Seconds, for differences: of the processor where one thread does all the work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def load_nanogpt(path):
    """The module model.py of a checkout of nanoGPT. FileNotFoundError where it is not there."""
    file = os.path.join(path, "model.py")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"--nanogpt={path} is no checkout of nanoGPT: it has no model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks for itself there
    spec.loader.exec_module(module)
    return module


def make_net(spec):
    """(model, its blocks, FLOPs per token) of a spec, on the CPU."""
    T = spec["T"]
    if spec["model"] != "nanogpt":
        settings = {**spec["settings"], "block_size": T, "recompute": spec.get("recompute", False)}
        net = checkpoint.make_model(spec["model"], settings)
        return net, net.blocks, net.flops_per_token(T, training=True)
    gpt = load_nanogpt(spec["path"])
    shape = {k: spec["settings"][k] for k in ("n_layer", "n_head", "n_embd")}
    net = gpt.GPT(gpt.GPTConfig(block_size=T, vocab_size=tok.VOCAB_SIZE, dropout=0.0, bias=False, **shape))
    products = sum(p.numel() for p in net.parameters() if p.ndim == 2) - net.transformer.wpe.weight.numel()
    return net, net.transformer.h, 6 * products + 6 * shape["n_layer"] * shape["n_embd"] * T


def one_step(spec):
    """
    Time the training step that spec describes, on random text.

    spec: model ('dense', 'trm', 'nanogpt'), settings (of its Config), path (of nanoGPT), rows, T, dtype,
    compile, recompute, optimizer, steps, device. Returns {tokens_per_second, ms, memory_gb, mfu, params}.
    """
    device, rows, T = spec["device"], spec["rows"], spec["T"]
    torch.manual_seed(0)
    runtime.start(device, spec["dtype"])  # as train.py does
    net, blocks, flops = make_net(spec)
    net.to(device).train()
    if spec["model"] == "nanogpt":
        optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)]
    else:
        optimizers = loop.make_optimizers(net, spec["optimizer"], 0.1, 1e-4, (0.9, 0.95))
    if spec["compile"]:
        for block in blocks:
            block.compile()
    autocast, scaler = runtime.mixed_precision(device, spec["dtype"])
    idx, targets = torch.randint(0, tok.N_GPT2, (2, rows, T), device=device).unbind(0)
    times = []
    for _ in range(spec["steps"] + 1):  # the first one warms up
        start = clock(device)
        with autocast:
            loss = net(idx, targets)[1]
        scaler.scale(loss).backward()
        loop.clip_gradients(net, optimizers, scaler, 1.0)
        loop.optimizer_step(optimizers, scaler, True)
        times.append(clock(device) - start)
    seconds = statistics.median(times[1:])
    peak = runtime.peak_flops(runtime.device_name(device))
    return {
        "tokens_per_second": rows * T / seconds,
        "ms": 1000 * seconds,
        "memory_gb": runtime.peak_memory(device) / 1e9,
        "mfu": rows * T / seconds * flops / peak if peak else None,
        "params": sum(p.numel() for p in net.parameters()),
    }


def apart(spec):
    """one_step in a process of its own; None where memory does not suffice."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(one_step, spec).result()
        except (MemoryError, RuntimeError) as e:
            if isinstance(e, BrokenProcessPool) or runtime.out_of_memory(e):
                return None
            raise


def same_size_gpt(settings):
    """The settings of a plain GPT, full attention alone, with as many parameters as Route A of these."""
    with torch.device("meta"):
        route_a = checkpoint.make_model("dense", settings)
        plain = {**vars(route_a.config), "layer_pattern": "a"}
        missing = route_a.num_params() - checkpoint.make_model("dense", plain).num_params()
    plain["n_ff"] += 8 * round(missing / (8 * 3 * plain["n_embd"] * plain["n_layer"]))
    return plain


def both_routes(settings):
    """{name: what of a spec says which model} of the two routes with these settings, and the plain GPT."""
    return {
        "plain GPT": {"model": "dense", "settings": same_size_gpt(settings)},
        "Route A": {"model": "dense", "settings": settings},
        "Route B": {"model": "trm", "settings": settings},
    }


def beside_a_plain_gpt(c, device):
    """Rows of what `one_step` measures; ratio: over the plain GPT's rate."""
    settings = SMALL if c.size == "small" or (c.size == "auto" and device == "cpu") else {}
    contenders = both_routes(settings)
    if c.nanogpt:
        shape = vars(checkpoint.make_model("dense", settings).config)
        contenders["nanoGPT"] = {"model": "nanogpt", "path": c.nanogpt, "settings": shape}
    how = {"device": device, "dtype": runtime.pick_dtype("auto", device, training=True), "steps": c.steps}
    how |= {"compile": device == "cuda", "optimizer": "adamw"}
    table = []
    for T in c.lengths:
        best = {}
        # every contender twice, in turns and back again: a machine that slows down does so for all
        for what in (*contenders, *reversed(contenders)):
            found = apart({**how, **contenders[what], "T": T, "rows": max(1, c.tokens // T)})
            if found and (what not in best or found["ms"] < best[what]["ms"]):
                best[what] = found
        for what, found in best.items():
            about = {"what": what, "T": T, "rows": max(1, c.tokens // T), "dtype": how["dtype"]}
            plain = best.get("plain GPT")
            ratio = plain and found["tokens_per_second"] / plain["tokens_per_second"]
            table.append({**about, **found, "ratio": ratio})
            print_row(table[-1])
    return table


def fastest(c, config, device):
    """Rows for a config's model: batch sizes, number formats, recomputation and compiled blocks."""
    total = config.batch_size * loop.batches_per_step(vars(config))
    dtypes = dict.fromkeys([runtime.pick_dtype("auto", device, training=True), "float32"])
    how = {"model": config.model, "settings": vars(config), "T": config.block_size, "device": device}
    how |= {"optimizer": config.optimizer, "steps": c.steps}
    compiled_too = (False, True) if device == "cuda" else (False,)  # on a CPU it takes minutes
    table = []
    for dtype, compiled, recompute in itertools.product(dtypes, compiled_too, (False, True)):
        rows, best = 1, 0.0
        while rows <= min(total, MOST_ROWS) and total % rows == 0:
            spec = {**how, "dtype": dtype, "compile": compiled, "recompute": recompute, "rows": rows}
            found = apart(spec)
            if found is None:  # out of memory
                break
            what = " ".join(["compiled"] * compiled + ["recomputed"] * recompute)
            table.append({"what": what, **spec, **found})
            print_row(table[-1])
            if found["tokens_per_second"] < 1.02 * best:
                break  # twice the rows gain nothing any more
            rows, best = 2 * rows, found["tokens_per_second"]
    if not table:
        raise ValueError("nothing fits: take a shorter block_size or a smaller model")
    best = max(table, key=lambda row: row["tokens_per_second"])
    batches = f"--gradient_accumulation_steps={total // best['rows']} "
    batches = "" if config.batch_tokens else batches  # which follow from that
    if config.model == "trm":
        print("timed on text: a batch of puzzles keeps more (python -m bench.plan)")
    print(
        f"fastest on one device, with the same global batch:\n--batch_size={best['rows']} {batches}"
        f"--dtype={best['dtype']} "
        f"--compile={best['compile']} --recompute={best['recompute']}"
    )
    return table


COLUMNS = "what T rows dtype params ms tokens/s ratio GB MFU".split()
LAYOUT = "{:20} {:>6} {:>5} {:9} {:>8} {:>9} {:>10} {:>6} {:>6} {:>6}"


def print_row(row):
    cells = [row["what"], row["T"], row["rows"], row["dtype"]]
    cells += [f"{row['params'] / 1e6:.1f}M", f"{row['ms']:.1f}", f"{row['tokens_per_second']:,.0f}"]
    cells += [f"{row['ratio']:.2f}" if row.get("ratio") else "", f"{row['memory_gb']:.2f}"]
    cells += [f"{row['mfu']:.1%}" if row["mfu"] else ""]
    print(LAYOUT.format(*cells), flush=True)


def read_with_train(script_globals, argv):
    """(settings of a bench, settings of train.py or None where argv has none of them)."""
    names = configurator.settings(script_globals)
    own = [w for w in argv if w == "--help" or w.partition("=")[0].removeprefix("--") in names]
    options, _ = configurator.read(script_globals, own)
    others = [word for word in argv if word not in own]
    return options, configurator.read(vars(train), others)[0] if others else None


def this_device():
    """-> 'cuda' or 'cpu', after a line that says what is measured on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    print(f"{runtime.device_name(device)}{threads}, torch {torch.__version__}")
    return device


def main(argv):
    options, config = read_with_train(globals(), argv)
    c, device = SimpleNamespace(**options), this_device()
    print(LAYOUT.format(*COLUMNS))
    try:
        table = fastest(c, SimpleNamespace(**config), device) if config else beside_a_plain_gpt(c, device)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    if c.json_file:
        write_whole(json.dumps(table, indent=2, default=str).encode(), c.json_file)


if __name__ == "__main__":
    main(sys.argv[1:])
