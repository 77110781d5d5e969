"""
Everything that only a GPU can tell, in ten minutes and in order of worth.

    python -m bench.gpu                     all parts
    python -m bench.gpu kda train           these
    python -m bench.gpu --quick=True        tiny shapes: does the command go through here?

After each part the figures so far are in out_dir, gpu.json and as tables in gpu.md, so a run that is killed
leaves what it has. A part that fails says so and the next one begins. The parts: kda (right on this card?),
speed (beside attention and flash-linear-attention), train (the step of both routes; the largest batch),
decode, eval (tasks per second) and learn (two minutes of training, and the same steps on the CPU). Before
this: bench/kda.py, bench/train.py, bench/decode.py.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

import configurator
import kda
from bench import decode as bench_decode
from bench import kda as bench_kda
from bench import train as bench_train
from smol import arc, checkpoint, runtime, solve
from smol.files import write_whole
from smol.snapshots import first_line

quick = False  # tiny shapes, for a test of this command
seconds = 120.0  # of the training run
data_dir = "data"  # with the demo stage, for the training run
out_dir = "out/gpu"

PARTS = ("kda", "speed", "train", "decode", "eval", "learn")
RANGES = {"(0, inf)": "seconds"}
ROOT = Path(__file__).parent.parent
TINY = {"n_layer": 4, "n_head": 2, "n_embd": 32, "n_ff": 48}
# name: gates of a random tensor (B, T, H, K), as training, puzzles or a hostile caller could bring them
GATES = {
    "mild": lambda x: -x.exp() / 20,
    "strong": lambda x: -16 * torch.nn.functional.softplus(x),
    "mixed": lambda x: torch.where(x > 0, -50.0, -1e-3),
    "resets": lambda x: torch.where(x[:, :, :1, :1] > 1.3, -torch.inf, -x.exp() / 20),
    "none": torch.zeros_like,
}


def part_kda(c, device):
    """Largest error of outputs and gradients against the recurrence in float64, over the largest value."""
    rows, T = [], 70 if c.quick else 200
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, gate in GATES.items():
            generator = torch.Generator().manual_seed(0)
            q, k, v, x = torch.randn(4, 2, T, 3, 32, generator=generator).unbind(0)
            beta = torch.rand(2, T, 3, generator=generator)
            state = torch.randn(2, 3, 32, 32, generator=generator)
            q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
            inputs = [t.to(dtype) for t in (q, k, v)] + [gate(x), beta.to(dtype), state]
            exact = outputs_and_gradients([t.double() for t in inputs], "recurrent")
            found = outputs_and_gradients([t.to(device) for t in inputs], "auto")
            far = [((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact)]
            row = {"dtype": str(dtype)[6:], "gates": name, "output": far[0], "state": far[1]}
            backend = kda.choose_backend(torch.device(device), dtype)[0]
            rows.append({**row, "gradients": torch.tensor(far[2:]).max().item(), "backend": backend})
    return rows


def outputs_and_gradients(inputs, backend):
    """[output, final state, gradients of q, k, v, g, beta and the initial state]."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    *most, state = leaves
    o, final = kda.kda(*most, initial_state=state, output_final_state=True, backend=backend)
    (o.double().sum() + final.double().square().sum()).backward()
    return [o.detach(), final.detach(), *(t.grad for t in leaves)]


def part_speed(c, device):
    """Milliseconds of KDA forward and backward beside its rivals."""
    shapes = bench_kda.TINY_SHAPES if c.quick else bench_kda.SHAPES
    return list(bench_kda.measure(device, getattr(torch, runtime.pick_dtype("auto", device)), shapes))


def part_train(c, device):
    """The training step of both routes beside the plain GPT, and with the largest batch that fits."""
    settings = TINY if c.quick else {}
    contenders = bench_train.both_routes(settings)
    halves = ["float32"] if device == "cpu" else ["bfloat16", "float16"]
    size = {"T": 64, "rows": 2} if c.quick else {"T": 1024, "rows": 8}
    how = {**size, "device": device, "optimizer": "muon", "steps": 3, "compile": False}
    rows = []

    def measured(what, spec):
        found = bench_train.apart(spec)
        shown = {k: spec[k] for k in ("T", "rows", "dtype", "compile")}
        rows.append({"what": what, **shown, **(found or {"failed": "memory"})})
        return found

    for dtype in halves:
        for compiled in (False, True) if device == "cuda" else (False,):
            for what, contender in contenders.items():
                measured(what, {**how, **contender, "dtype": dtype, "compile": compiled})
    for what, contender in contenders.items():
        spec = {**how, **contender, "dtype": halves[0], "steps": 1}
        while spec["rows"] <= (4 if c.quick else 1024) and measured(f"{what}, twice the rows", spec):
            spec = {**spec, "rows": 2 * spec["rows"]}
    return rows


def part_decode(c, device):
    """Milliseconds per token by context."""
    small = {"contexts": (64, 128), "model": TINY, "steps": 1} if c.quick else {}
    settings = {**configurator.settings(vars(bench_decode)), **small}
    return list(bench_decode.measure(SimpleNamespace(**settings), device))


def part_eval(c, device):
    """Training tasks of ARC-AGI-1 a second, by untrained models of full size: an upper bound of the time."""
    tasks = solve.without_answers(arc.load("arc1_train"))
    most = 60 if c.quick else 700  # cells of demonstrations
    tasks = [task for task in tasks if sum(x.size + y.size for x, y in task.train) < most]
    tasks = tasks[: 2 if c.quick else 64]
    rows = []
    for name in checkpoint.MODEL_FILES:
        torch.manual_seed(0)
        model = checkpoint.make_model(name, TINY if c.quick else {}).to(device).eval()
        with runtime.mixed_precision(device, runtime.pick_dtype("auto", device))[0]:
            model.answer(tasks[:2])
            start = time.perf_counter()
            answered = sum(given[0] is not None for given in model.answer(tasks))  # the others do not fit
            passed = time.perf_counter() - start
        rows.append({"model": name, "tasks": answered, "tasks_per_second": answered / passed})
    return rows


def part_learn(c, device):
    """The demo's Route A for c.seconds here, and the same steps on the CPU: losses by step."""
    folder = Path(c.out_dir) / "learn"
    tiny = [f"--{k}={v}" for k, v in TINY.items()] + ["--block_size=256"] if c.quick else []
    rows = []
    runs = {device: [f"--max_hours={(5 if c.quick else c.seconds) / 3600}"]}
    if device != "cpu":  # its first steps at the same rates, none of which is on the way down
        runs["cpu"] = ["--max_iters=20", "--decay_iters=0"]
    for where, until in runs.items():
        own = [*tiny, f"--data_dir={c.data_dir}", f"--out_dir={folder / where}", f"--device={where}", *until]
        command = "train.py config/route_a_demo.py --overwrite=True --log_interval=5".split()
        subprocess.run([sys.executable, *command, *own], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for entry in runtime.read_log(folder / where / "log.jsonl"):
            if "loss" in entry and entry["iter"] in (5, 10, 15, 20, 50, 100, 150, 200, 250):
                figures = {k: entry.get(k) for k in ("iter", "loss", "tokens_per_second", "mfu")}
                rows.append({"device": where, **figures})
    return rows


def as_markdown(report):
    """The figures for people, a table a part. Rivals have rows of their own, below what they stand beside."""
    lines = [f"{report['card']}, torch {report['torch']}, triton {report['triton']}"]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}, {part['seconds']:.0f} s", ""]
        if "failed" in part:
            lines.append(part["failed"])
            continue
        rows = []
        for row in part["rows"]:
            rows.append({key: value for key, value in row.items() if key != "rivals"})
            rows += [{"what": f"beside {name}", **row} for name, row in row.get("rivals", {}).items()]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        for cells in (columns, ["-"] * len(columns), *([row.get(key) for key in columns] for row in rows)):
            lines.append("| " + " | ".join(map(as_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def as_cell(value):
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv):
    config, parts = configurator.read(globals(), argv, usage=f"[{' '.join(PARTS)}]")
    c, device = SimpleNamespace(**config), "cuda" if torch.cuda.is_available() else "cpu"
    for part in parts:
        if part not in PARTS:
            sys.exit(f"error: there is no part {part!r}: {', '.join(PARTS)}")
    triton = kda.triton.__version__ if kda.triton else None
    report = {"card": runtime.device_name(device), "torch": torch.__version__, "triton": triton, "parts": {}}
    os.makedirs(c.out_dir, exist_ok=True)
    for part in parts or PARTS:
        print(f"{part} ...", flush=True)
        start = time.perf_counter()
        try:
            found = {"rows": globals()[f"part_{part}"](c, device)}
        except Exception as e:  # noqa: BLE001 (the rest is worth having)
            traceback.print_exc()
            found = {"failed": f"{type(e).__name__}: {first_line(e)}"}
        report["parts"][part] = {"seconds": time.perf_counter() - start, **found}
        for row in found.get("rows", ()):
            print(json.dumps(row, default=str))
        write_whole(json.dumps(report, indent=2, default=str).encode(), f"{c.out_dir}/gpu.json")
        write_whole(as_markdown(report).encode(), f"{c.out_dir}/gpu.md")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
