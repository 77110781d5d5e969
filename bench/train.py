"""
What training costs on this machine: `python -m bench.train`, `sweep` and `plan`.

    python -m bench.train                               the real training step of both routes beside a plain GPT of the same size
    python -m bench.train sweep config/route_a_stage1.py      the fastest batch size, dtype, compile and recompute on this machine
    python -m bench.train plan config/route_a_stage1.py       tokens, hours and memory of that run

Every measurement is a process of its own (`python -m bench.train step '{...}'`): its peak memory is its own,
and when it runs out of it, only it ends. On a CPU with one thread (OMP_NUM_THREADS=1) seconds are those that the
process has had, so that other jobs beside it count less.
Before this: train.py, bench/kda.py.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm

import configurator
import model_dense
from smol import checkpoint, engine, runtime
from smol import tokenizer as tok
from smol.loader import BUCKETS
from smol.muon import muon_and_adamw

TRAIN_LENGTHS = (1024, 4096, 8192)
SMALL = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 256,
    "n_ff": 688,
}  # on a CPU: 16M parameters, and a table before lunch


def one_step(spec):
    """
    Time the training step that spec describes, on random text: forward, backward, clipping, optimizer, on `batches` batches of (rows, T).
    spec: model ('dense', 'trm', 'nanogpt'), settings (of its Config), path (of nanoGPT's model.py), rows, T, batches, dtype, compile,
    recompute, optimizer, steps, device. Returns {tokens_per_second, ms, memory_gb, mfu, params}.
    """
    device, rows, T = spec["device"], spec["rows"], spec["T"]
    torch.manual_seed(0)
    if (
        device == "cpu"
    ):  # no more than there is: a computer that swaps measures nothing, and one that is out of memory kills
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm") as f:
            taken = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(0.9 * pages), resource.RLIM_INFINITY))
    if spec["model"] == "nanogpt":
        found = importlib.util.spec_from_file_location("nanogpt", spec["path"])
        nanogpt = importlib.util.module_from_spec(found)
        sys.modules["nanogpt"] = nanogpt
        found.loader.exec_module(nanogpt)
        shape = {k: v for k, v in spec["settings"].items() if k in ("n_layer", "n_head", "n_embd")}
        net = nanogpt.GPT(
            nanogpt.GPTConfig(block_size=T, vocab_size=tok.VOCAB_SIZE, dropout=0.0, bias=False, **shape)
        )
        matrices = [p for p in net.parameters() if p.ndim == 2]
        flops = (
            6 * sum(p.numel() for p in matrices if p is not net.transformer.wpe.weight)
            + 6 * shape["n_layer"] * shape["n_embd"] * T
        )
    else:
        net = checkpoint.make_model(
            spec["model"], {**spec["settings"], "block_size": T, "recompute": spec.get("recompute")}
        )
        flops = net.flops_per_token(T, training=True)
    net.to(device).train()
    now = time.perf_counter
    if device == "cpu":
        runtime.keep_freed_memory()  # as train.py does
        now = time.process_time if torch.get_num_threads() == 1 else now
    if spec["model"] != "nanogpt" and spec.get("optimizer") == "muon":
        optimizers = muon_and_adamw(net, 0.1, 1e-4, (0.9, 0.95))
    elif spec["model"] != "nanogpt":
        optimizers = [net.configure_optimizer(0.1, 1e-4, (0.9, 0.95))]
    else:
        optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)]
    if spec.get("compile"):
        for block in net.blocks if spec["model"] != "nanogpt" else net.transformer.h:
            block.compile()
    half = spec["dtype"] != "float32"
    scaler = torch.amp.GradScaler(device, enabled=spec["dtype"] == "float16")
    idx, targets = torch.randint(0, tok.N_GPT2, (2, rows, T), device=device).unbind(0)

    def step():
        for _ in range(spec.get("batches", 1)):
            with (
                torch.autocast(device, dtype=getattr(torch, spec["dtype"]))
                if half
                else contextlib.nullcontext()
            ):
                loss = net(idx, targets)[1]
            scaler.scale(loss).backward()
        for o in optimizers:
            scaler.unscale_(o)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for o in optimizers:
            scaler.step(o)
            o.zero_grad(set_to_none=True)
        scaler.update()

    times = []
    for _ in range(spec["steps"] + 1):  # the first one warms up
        if device == "cuda":
            torch.cuda.synchronize()
        start = now()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(now() - start)
    seconds = statistics.median(times[1:])
    rate, peak = rows * T * spec.get("batches", 1) / seconds, runtime.peak_flops(runtime.device_name(device))
    return {
        "tokens_per_second": rate,
        "ms": 1000 * seconds,
        "memory_gb": runtime.peak_memory(device) / 1e9,
        "mfu": rate * flops / peak if peak else None,
        "params": sum(p.numel() for p in net.parameters()),
    }


def apart(spec):
    """one_step in a process of its own; None if its memory does not suffice. ValueError, with its last line, if it fails otherwise."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.train", "step", json.dumps(spec)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    if (
        run.returncode == OUT_OF_MEMORY or run.returncode == -9
    ):  # -9: by the system, before Python could say so
        return None
    raise ValueError((run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"])[-1])


OUT_OF_MEMORY = 77
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout


def step_main(text):
    try:
        print(json.dumps(one_step(json.loads(text))))
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError) or runtime.out_of_memory(e):
            sys.exit(OUT_OF_MEMORY)
        raise


def same_size_gpt(settings):
    """The settings of a plain GPT (full attention only) with as many parameters as Route A of these settings, by its n_ff."""
    wanted = checkpoint.make_model("dense", settings).num_params()
    plain = {**vars(checkpoint.make_model("dense", settings).config), "layer_pattern": "a"}
    missing = wanted - checkpoint.make_model("dense", plain).num_params()
    plain["n_ff"] += 8 * round(missing / (8 * 3 * plain["n_embd"] * plain["n_layer"]))
    return plain


def bench_train(args):
    """Rows of {what, T, rows, tokens_per_second, ms, memory_gb, mfu, params, ratio}; ratio: tokens per second over the plain GPT's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = SMALL if args.size == "small" or (args.size == "auto" and device == "cpu") else {}
    contestants = [
        ("plain GPT", {"model": "dense", "settings": same_size_gpt(settings)}),
        ("Route A", {"model": "dense", "settings": settings}),
        ("Route B", {"model": "trm", "settings": settings}),
    ]
    if args.nanogpt:
        shape = vars(checkpoint.make_model("dense", settings).config)
        contestants.append(("nanoGPT", {"model": "nanogpt", "path": args.nanogpt, "settings": shape}))
    common = {
        "device": device,
        "dtype": runtime.pick_dtype("auto", device),
        "steps": args.steps,
        "compile": args.compile,
    }
    rows = []
    for T in args.lengths:
        found = {}  # every contestant twice, in turns and back again: a machine that slows down does so for all. The better one counts
        for what, spec in tqdm(contestants + contestants[::-1], desc=f"T = {T}", leave=False):
            figures = apart({**common, **spec, "T": T, "rows": max(1, args.tokens // T)})
            if figures and figures["ms"] < found.get(what, {"ms": float("inf")})["ms"]:
                found[what] = figures
        for what, _ in contestants:
            rows.append(
                {
                    "what": what,
                    "T": T,
                    "rows": max(1, args.tokens // T),
                    **found.get(what, {"failed": "out of memory"}),
                }
            )
            if what in found and "plain GPT" in found:
                rows[-1]["ratio"] = found[what]["tokens_per_second"] / found["plain GPT"]["tokens_per_second"]
    machine = {
        "device": runtime.device_name(device),
        "torch": torch.__version__,
        "dtype": common["dtype"],
        "compile": args.compile,
        "threads": torch.get_num_threads() if device == "cpu" else None,
    }
    if args.json:
        print(json.dumps({**machine, "rows": rows}, indent=2))
        return
    print(
        ", ".join(f"{k} {v}" for k, v in machine.items())
        + "; a step is forward, backward, clipping and AdamW on one batch of text"
    )
    print(
        f"{'':10s} {'T':>6s} {'rows':>5s} {'params':>8s} {'ms':>9s} {'tokens/s':>10s} {'ratio':>6s} {'GB':>6s} {'MFU':>6s}"
    )
    for r in rows:
        if "failed" in r:
            print(f"{r['what']:10s} {r['T']:6d} {r['rows']:5d}   {r['failed']}")
            continue
        ratio, mfu = (f"{r['ratio']:6.2f}" if "ratio" in r else ""), (f"{r['mfu']:6.1%}" if r["mfu"] else "-")
        print(
            f"{r['what']:10s} {r['T']:6d} {r['rows']:5d} {r['params'] / 1e6:7.1f}M {r['ms']:9.1f} {r['tokens_per_second']:10,.0f} "
            f"{ratio:>6s} {r['memory_gb']:6.2f} {mfu:>6s}"
        )


def training_config(config_path, overrides=()):
    """
    What train.py, or distill.py if it is a config of that, would run with a config file, a namespace. Without its checkpoint, the student
    of a distillation is assumed to be the default model, of Route B if its path says so. ValueError for a mistake in it.
    """
    if not os.path.basename(config_path).startswith("distill"):
        return SimpleNamespace(
            **configurator.resolve(
                configurator.defaults_of(os.path.join(ROOT, "train.py")), [config_path, *overrides]
            )
        )
    c = configurator.resolve(
        configurator.defaults_of(os.path.join(ROOT, "distill.py")), [config_path, *overrides]
    )
    for name, path in (("model", c["init_from"]), ("teacher_model", c["teacher"])):
        if os.path.isfile(path):
            saved = checkpoint.load(path)
            c |= {name: saved["model"], f"{name}_config": saved["model_config"]}
        else:
            c |= {name: "trm" if "route_b" in path else "dense", f"{name}_config": {}}
            print(f"{path or 'no path'} is not there: a {c[name]!r} of the default size is assumed")
    c = {**c["model_config"], **{k: v for k, v in c.items() if v is not None}}
    return SimpleNamespace(**{"recompute": False, "block_size": 1024, **c})


def sweep(args):
    """Try batch sizes, recomputation, torch.compile and number formats with a config's model on this machine; print what is fastest."""
    c = training_config(args.config, args.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = "bfloat16" if device == "cpu" or torch.cuda.get_device_capability() >= (8, 0) else "float16"
    total = c.batch_size * c.gradient_accumulation_steps  # rows of a step: the global batch stays what it is
    base = {
        "model": c.model,
        "settings": vars(c),
        "T": c.block_size,
        "device": device,
        "optimizer": c.optimizer,
        "steps": args.steps,
    }
    tried = []
    print(
        f"{c.model}, block_size {c.block_size}, global batch {total * c.block_size:,} tokens, on {runtime.device_name(device)}"
    )
    print(
        f"{'dtype':9s} {'compile':7s} {'recompute':9s} {'batch_size':>10s} {'tokens/s':>10s} {'GB':>6s} {'MFU':>6s}"
    )
    for dtype in (half, "float32"):
        for compiled in (False, True) if device == "cuda" or args.compile else (False,):
            for recompute in (False, True):
                rows, best = 1, 0.0
                while rows <= min(total, args.most_rows):
                    spec = {**base, "dtype": dtype, "compile": compiled, "recompute": recompute, "rows": rows}
                    head = f"{dtype:9s} {compiled!s:7s} {recompute!s:9s} {rows:10d}"
                    try:
                        figures = apart(
                            {
                                **spec,
                                "settings": {k: v for k, v in spec["settings"].items() if k != "recompute"},
                            }
                        )
                    except ValueError as e:
                        print(f"{head}   fails: {str(e):.90}", flush=True)
                        break
                    if figures is None:
                        print(f"{head}   out of memory", flush=True)
                        break
                    mfu = f"{figures['mfu']:6.1%}" if figures["mfu"] else "-"
                    print(
                        f"{head} {figures['tokens_per_second']:10,.0f} {figures['memory_gb']:6.2f} {mfu:>6s}",
                        flush=True,
                    )
                    tried.append((figures["tokens_per_second"], spec))
                    if figures["tokens_per_second"] < 1.02 * best:
                        break  # twice the rows gain nothing any more
                    best = figures["tokens_per_second"]
                    rows *= 2
    if not tried:
        raise ValueError("nothing fits: take a shorter block_size or a smaller model")
    rate, spec = max(tried, key=lambda t: t[0])
    print(
        f"\nfastest, {rate:,.0f} tokens/s on one device; the same global batch:\n--batch_size={spec['rows']} "
        f"--gradient_accumulation_steps={max(1, round(total / spec['rows']))} --dtype={spec['dtype']} --compile={spec['compile']} "
        f"--recompute={spec['recompute']}"
    )


def saved_bytes(net, idx, targets, mode, dtype):
    """Bytes that one training forward keeps for its backward, parameters apart: what activations cost, counted on any machine."""
    seen = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in seen:
            kept[t.untyped_storage().data_ptr()] = (
                t  # the tensor, so that its address is not given to another
            )
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype=dtype):
        net(idx, targets, mode=mode)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def plan(args):
    """Hours and memory of a config's run: from a log of this machine's (--log), or from a card's published peak and an assumed share."""
    c = training_config(args.config, args.overrides)
    net = checkpoint.make_model(c.model, vars(c)).train()
    taught = hasattr(c, "teacher")  # a config of distill.py
    if args.card not in runtime.CARDS:
        raise ValueError(f"--card={args.card} is not in the table: {', '.join(runtime.CARDS)}")
    peak, memory, _ = runtime.CARDS[args.card]
    per_step = c.batch_size * c.gradient_accumulation_steps * c.block_size
    tokens = per_step * c.max_iters
    text, puzzle = (net.flops_per_token(c.block_size, mode, training=True) for mode in ("text", "puzzle"))
    flops = tokens * ((1 - args.puzzles) * text + args.puzzles * puzzle)
    params = net.num_params()
    print(
        f"{args.config}: {params / 1e6:.1f}M parameters, {c.max_iters:,} steps of {per_step:,} tokens = {tokens / 1e9:.2f}B tokens, "
        f"{tokens / params:.1f} per parameter"
    )
    print(
        f"  FLOPs per token in training: {text / 1e9:.2f}G text, {puzzle / 1e9:.2f}G puzzles; {args.puzzles:.0%} of the tokens are "
        f"puzzles: {flops / 1e18:.2f}e18 in all"
    )
    if args.log:
        entries = [e for e in runtime.read_log(args.log) if "tokens_per_second" in e]
        if not entries:
            raise ValueError(f"{args.log} has no line with tokens_per_second")
        rate = statistics.median(e["tokens_per_second"] for e in entries)
        print(f"  hours: {tokens / rate / 3600:.1f} at the {rate:,.0f} tokens/s measured in {args.log}")
    else:
        again = 4 / 3 if c.recompute else 1  # the forward is done twice
        rate = tokens / (again * flops / (args.cards * peak * 1e12 * args.mfu))
        print(
            f"  hours: {tokens / rate / 3600:.1f} at {rate:,.0f} tokens/s on {args.cards} x {args.card}, if they do {args.mfu:.0%} of "
            f"their published {peak} TFLOPS (assumed: after a first run, give its --log=OUT_DIR/log.jsonl)"
        )
    if taught:
        print("  of learning alone: what sampling and scoring add is in the log.jsonl of a first run")
    T = min(c.block_size, 1024)
    idx = torch.randint(0, tok.N_GPT2, (1, T), generator=torch.Generator().manual_seed(0))
    per_token = (
        saved_bytes(net, idx, idx, "text", torch.bfloat16) / T
    )  # as many bytes as float16, which few CPUs can
    if c.model == "trm":  # a puzzle keeps more passes through the core than text
        per_token *= max(1, net.passes("puzzle")[1] / net.passes("text")[1])
    if (
        c.recompute
    ):  # beside the inputs of all blocks, one block as a whole, at the moment it is gone through again
        net.config.recompute = False
        passes = net.passes("text")[1] if c.model == "trm" else 1
        per_token += saved_bytes(net, idx, idx, "text", torch.bfloat16) / T / (net.config.n_layer * passes)
    guide = 0
    if taught:
        teacher = checkpoint.make_model(c.teacher_model, c.teacher_model_config)
        halved = sum(p.numel() for p in teacher.blocks.parameters())
        guide = 2 * halved + 4 * (teacher.num_params() - halved)
        # It scores without keeping anything: one pass's largest tensors, of 8 * n_embd numbers a token, for a batch at a time
        guide += 2 * 8 * teacher.config.n_embd * max(engine.BATCH_TOKENS, c.batch_size * c.block_size)
        if c.model == "dense":  # the caches of its own answers, in float32, before learning begins
            guide += model_dense.cache_bytes(net.config, c.block_size) * c.batch_size
    fixed = params * (
        16 + 4 * bool(c.ema) + 4 * (args.cards > 1)
    )  # weights, gradients, two of AdamW's; average; the copy DDP sends
    activations = per_token * c.batch_size * c.block_size
    carried = 0
    if (
        c.model == "trm"
    ):  # y and z of the puzzles that are being thought about, in float16: for every batch and length, if all occur
        kept = sum(length <= c.block_size for length in BUCKETS) * c.gradient_accumulation_steps // args.cards
        carried = 2 * 2 * net.config.n_embd * c.batch_size * c.block_size * kept
    print(
        f"  memory per card: {fixed / 1e9:.1f} GB for weights, gradients, optimizer"
        + (", average" if c.ema else "")
        + (
            f"; {guide / 1e9:.1f} GB for the teacher in half precision, its scoring, and the student's caches"
            if taught
            else ""
        )
        + f"; {activations / 1e9:.1f} GB for activations ({per_token / 1e3:.0f} kB a token, counted on this machine with the PyTorch "
        f"form of KDA{', recomputed' if c.recompute else ''}); of {memory} GB"
    )
    if carried:
        print(
            f"  memory of the host: at most {carried * args.cards / 1e9:.1f} GB for puzzles that are being thought about"
        )
    if fixed + guide + activations > 0.9 * memory * 1e9:
        print(
            "  that does not fit: lower batch_size (and raise gradient_accumulation_steps), or recompute=True"
        )


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(f"error: {message}; see python -m bench.train --help")
    commands = parser.add_subparsers(dest="what", required=True)
    p = commands.add_parser("train", help="the real step of both routes beside a plain GPT of the same size")
    p.add_argument("--json", action="store_true")
    p.add_argument(
        "--size",
        choices=("auto", "full", "small"),
        default="auto",
        help="full: 100M; small: 16M; auto: full on a GPU",
    )
    p.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=list(TRAIN_LENGTHS))
    p.add_argument("--tokens", type=int, default=8192, help="per batch (default 8192)")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--nanogpt", metavar="PATH", help="nanoGPT's model.py, to be timed as well")
    p.set_defaults(run=bench_train)
    p = commands.add_parser(
        "sweep", help="the fastest batch size, dtype, compile and recompute for a config on this machine"
    )
    p.add_argument("config")
    p.add_argument("overrides", nargs="*", help="key=value, as for train.py without the dashes")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--most_rows", type=int, default=64, help="the largest batch_size to try")
    p.add_argument("--compile", action="store_true", help="on a CPU as well, where it takes minutes")
    p.set_defaults(run=sweep)
    p = commands.add_parser("plan", help="tokens, hours and memory of a config's run")
    p.add_argument("config")
    p.add_argument("overrides", nargs="*", help="key=value, as for train.py without the dashes")
    p.add_argument("--card", default="T4")
    p.add_argument("--cards", type=int, default=2)
    p.add_argument("--mfu", type=float, default=0.25)
    p.add_argument(
        "--puzzles", type=float, default=0.2, help="share of puzzles in the tokens (default 0.2, stage 1's)"
    )
    p.add_argument("--log", help="log.jsonl of a run, for the speed")
    p.set_defaults(run=plan)
    args = parser.parse_args(argv)
    if hasattr(args, "overrides"):
        args.overrides = [f"--{o}" for o in args.overrides]
    try:
        args.run(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step_main(sys.argv[2])
    else:
        named = sys.argv[1:2] and sys.argv[1] in ("train", "sweep", "plan", "-h", "--help")
        main(sys.argv[1:] if named else ["train", *sys.argv[1:]])
