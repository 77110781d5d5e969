"""
What recursion is worth: `python -m bench.recursion`, experiments that take minutes on one CPU core.

    python -m bench.recursion learn --task=sudoku4-10 --contender=A:dense --contender="B:trm,n_latent=1,n_recursion=1,n_sup=4"
                                                         exact answers to unseen puzzles by training FLOPs, everyone given as many
    python -m bench.recursion draw out/recursion/learn.jsonl     what that has written, as a picture
    python -m bench.recursion bounds                     sizes of vectors and gradients through n_sup x T x n passes: a picture
    python -m bench.recursion halting CKPT               accuracy against the average number of supervision steps, from one checkpoint
    python -m bench.recursion core                       time per step of a KDA core and of one of attention alone, by sequence length

Puzzles are drawn fresh for every batch, or from a --pool as small as the published experiments have; those of the test are others.
A contender is a name, a model, settings of its Config, and, if it is not to be trained like the others, learning_rate, optimizer and
carry_turns (as in train.py; see LOG.md for what it decides). n_ff makes up for what they differ in parameters. Figures worth keeping go
into LOG.md with their command. Before this: model_trm.py, bench/kda.py.
"""

import argparse
import ast
import contextlib
import json
import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from bench.models import schedule
from model_trm import ranked
from smol import arc, checkpoint, loader, programs, puzzles
from smol import tokenizer as tok
from smol.files import save_picture
from smol.muon import muon_and_adamw

SMALL = dict(n_layer=4, n_head=4, n_embd=64, n_ff=172, block_size=1024)  # the demo's Route B
RECIPE = ("learning_rate", "optimizer", "carry_turns")  # settings of a contender that are of its training
EMA = 0.99

# -----------------------------------------------------------------------------
# tasks: name -> a function of a random generator that makes one arc.Task


def plain_transform(rng, ways):
    """A small grid turned or mirrored in one of so many ways, up to eight: which, two demonstrations tell."""
    turn, pairs = int(rng.integers(ways)), []
    for _ in range(3):
        grid = rng.integers(0, 10, (3, 3)).astype(np.uint8)
        pairs.append((grid, arc.augment(arc.Augment(turn, tuple(range(10))), grid)))
    return arc.Task("turn", "arc", pairs[:2], pairs[2:])


def draw(task, rng, train=True):
    """
    One task of the kind: 'sudoku4-8' is a 4x4 sudoku with 8 blanks (4x4 answers of test and training differ), 'sudoku9-20' a 9x9,
    'maze-7' of 7x7; 'turn' and 'transforms' have a rule that demonstrations tell: 'turn-2' has quarter turns or nothing, 'turn-4' all
    turns, 'transforms' are those of the suite. With three numbers, 'sudoku9-10-30', training has 10 to 30, the test 30.
    ValueError for another kind.
    """
    kind, *numbers = task.split("-")
    known = len(numbers) > 0 if kind in ("sudoku4", "sudoku9", "maze") else kind in ("turn", "transforms")
    if (
        not known
        or not all(n.isdigit() for n in numbers)
        or (kind == "turn" and not all(1 <= int(n) <= 8 for n in numbers))
    ):
        raise ValueError(
            f"--task={task}: there are sudoku4-BLANKS, sudoku9-BLANKS, maze-SIDE, turn, turn-WAYS (up to 8) and transforms"
        )
    numbers = [int(n) for n in numbers]
    n = numbers and (int(rng.integers(numbers[0], numbers[-1] + 1)) if train else numbers[-1])
    if kind == "maze":
        return puzzles.maze(rng, n, n)
    if kind in ("turn", "transforms"):
        return plain_transform(rng, n or 8) if kind == "turn" else programs.transform(rng)
    return puzzles.sudoku(rng, int(kind[-1]), n, "train" if train else "test")


def unseen(task, n, seed=31337):
    """-> n different tasks for the test, others with another seed, and the hashes that training must avoid."""
    rng, tasks, hashes = np.random.default_rng(seed), [], set()
    while len(tasks) < n:
        made = draw(task, rng, train=False)
        if puzzles.task_hash(made) not in hashes:
            hashes.add(puzzles.task_hash(made))
            tasks.append(made)
    return tasks, hashes


class Puzzles:
    """
    Batches of about `tokens` tokens of puzzles in a model's format, by bucket of length: always fresh ones, or with `pool` always of the
    first `pool` ones, in random order. None of those in `avoid`, hashes.
    """

    def __init__(self, task, puzzle_format, tokens, seed, avoid, pool=None):
        self.task, self.puzzle_format, self.tokens = task, puzzle_format, tokens
        self.rng, self.avoid, self.waiting = np.random.default_rng(seed), avoid, {}
        self.pool = [self.draw() for _ in range(pool)] if pool else None

    def draw(self):
        while puzzles.task_hash(task := draw(self.task, self.rng)) in self.avoid:
            pass
        return task

    def next_batch(self):
        while True:
            task = self.pool[self.rng.integers(len(self.pool))] if self.pool else self.draw()
            row = loader.puzzle_row(
                arc.encode(task.kind, [*task.train, *task.test]), self.puzzle_format, "none"
            )
            length = loader.bucket_length(len(row[0]))
            rows = self.waiting.setdefault(length, [])
            rows.append(row)
            if len(rows) >= max(1, self.tokens // length):
                return loader.pad_rows(self.waiting.pop(length), length)


# -----------------------------------------------------------------------------
# learn


def literal(text):
    """'2e-3' -> 0.002, '8' -> 8, 'True' -> True, anything else as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_contender(text, params, seed):
    """
    'name:model,setting=value,...' -> name, Model with about `params` parameters (None: as its n_ff says), and how to train it: those of the
    settings that are in RECIPE. ValueError for a mistake.
    """
    name, _, rest = text.partition(":")
    model, *parts = rest.split(",")
    if model not in ("dense", "trm"):
        raise ValueError(f"--contender={text}: it is NAME:dense or NAME:trm, then ,setting=value")
    settings, recipe = dict(SMALL), {}
    for part in parts:
        key, _, value = part.partition("=")
        (recipe if key in RECIPE else settings)[key] = literal(value)

    def build(**other):
        torch.manual_seed(seed)
        return checkpoint.make_model(model, {**settings, **other})

    if params is None:
        return name, build(), recipe
    with torch.device("meta"):
        few, more = (build(n_ff=n).num_params() for n in (8, 16))
    return name, build(n_ff=max(8, round(8 + 8 * (params - few) / (more - few)))), recipe


def loss_of(net, idx, targets, carry):
    """
    -> loss, carry. Route A's is taken over the reserved ids alone, as Route B's is over those of a canvas and as both answer: the other
    50,257 would cost it ten times what its blocks cost at this width.
    """
    if net.puzzle_format == "canvas":
        return net(idx, targets, mode="puzzle", carry=carry)[1:]
    keep = targets != loader.IGNORE
    weight = net.wte.weight[tok.EOT : tok.END + 1]
    return torch.nn.functional.cross_entropy(net.hidden(idx)[keep] @ weight.T, targets[keep] - tok.EOT), None


def hidden(tasks):
    """The tasks without their answers."""
    return [
        arc.Task(t.id, t.kind, t.train, [(x, np.zeros((1, 1), np.uint8)) for x, _ in t.test]) for t in tasks
    ]


def solved(net, tasks):
    """How many of the tasks the model answers exactly, first answers only."""
    return sum(
        bool(a[0]) and np.array_equal(a[0][0][0], t.test[0][1])
        for a, t in zip(net.answer(hidden(tasks)), tasks)
    )


def right_by_steps(net, tasks, n_sup):
    """
    -> bool (tasks, n_sup), is Route B's first answer right if it takes 1, 2, ... supervision steps, and (tasks, n_sup), the halting
    probability after each. One trace tells all: thinking on changes no thought.
    """
    traces = [a[0] for a in net.answer(hidden(tasks), n_sup=n_sup, trace=True)]
    answers = [[ranked(trace[: n + 1]) for n in range(n_sup)] for trace in traces]
    right = [
        [bool(a) and np.array_equal(a[0][0], t.test[0][1]) for a in steps] for t, steps in zip(tasks, answers)
    ]
    return np.array(right), np.array([[p for _, p in trace] for trace in traces])


def train(
    net, batches, tasks, flops, learning_rate, optimizer="adamw", carry_turns=1, points=8, progress=None
):
    """
    Train on `batches` until `flops` have been spent. carry_turns: a puzzle of Route B takes a supervision step every so many steps, so that
    a batch of eight rows does not show the same ones on end. -> (curve, average weights): curve has {flops, seconds (of the processor),
    steps, puzzles (seen), loss, gradient (largest norm before clipping since the last point), solved} at evenly spaced points.
    """
    if optimizer == "muon":
        optimizers = muon_and_adamw(net, 0.1, learning_rate, (0.9, 0.95))
    else:
        optimizers = [net.configure_optimizer(0.1, learning_rate, (0.9, 0.95))]
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    spent, seconds, steps, seen, carries, curve, recent, largest = 0.0, 0.0, 0, 0, {}, [], [], 0.0
    while spent < flops:
        idx, targets = batches.next_batch()
        start = time.process_time()
        net.train()
        for group in (group for o in optimizers for group in o.param_groups):
            group["lr"] = learning_rate * schedule(spent / flops)
        key = steps % carry_turns, idx.shape[1]
        loss, carry = loss_of(net, idx, targets, carries.get(key))
        loss.backward()
        largest = max(largest, torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        if carry is not None:
            carries[key] = carry
        steps += 1
        seen += len(idx) if carry is None else int(carry["halted"].sum())
        with torch.no_grad():
            for k, v in net.state_dict().items():
                average[k].lerp_(v, 1 - min(EMA, (1 + steps) / (10 + steps)))
        seconds += time.process_time() - start
        recent.append(loss.item())
        spent += idx.numel() * net.flops_per_token(idx.shape[1], "puzzle", training=True)
        if progress is not None:
            progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            progress.update(min(spent, flops) / 1e9 - progress.n)
        if spent >= flops * (len(curve) + 1) / points or spent >= flops:
            own = {k: v.detach().clone() for k, v in net.state_dict().items()}
            net.eval().load_state_dict(average)
            curve.append(
                {
                    "flops": spent,
                    "seconds": round(seconds, 1),
                    "steps": steps,
                    "puzzles": seen,
                    "solved": solved(net, tasks),
                    "loss": round(float(np.mean(recent)), 4),
                    "gradient": round(largest, 2),
                }
            )
            net.load_state_dict(own)
            recent, largest = [], 0.0
            print(json.dumps(curve[-1]), file=sys.stderr, flush=True)
    return curve, average


def learn(args):
    """Train every contender on a task with equal FLOPs; one JSON object per contender goes into --out, a picture beside it."""
    tasks, avoid = unseen(args.task, args.n, args.test_seed)
    params, rows = None, []
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    for text in args.contender:
        name, net, recipe = make_contender(text, params, args.seed)
        recipe = {"learning_rate": args.learning_rate, "optimizer": args.optimizer, **recipe}
        params = params or net.num_params()
        batches = Puzzles(args.task, net.puzzle_format, args.tokens, args.seed, avoid, args.pool)
        with tqdm(total=round(args.gflops), unit="GFLOP", desc=name, leave=False, disable=None) as progress:
            curve, average = train(
                net, batches, tasks, args.gflops * 1e9, **recipe, points=args.points, progress=progress
            )
        row = {
            "name": name,
            "contender": text,
            "task": args.task,
            "pool": args.pool,
            "seed": args.seed,
            "n": args.n,
            "test_seed": args.test_seed,
            "params": net.num_params(),
            **recipe,
            "curve": curve,
        }
        net.eval().load_state_dict(average)
        if net.puzzle_format == "canvas" and net.config.n_sup > 1:
            right, _ = right_by_steps(net, tasks, 32)
            row["solved_by_n_sup"] = {n: int(right[:, n - 1].sum()) for n in (1, 2, 4, 8, 16, 32)}
        rows.append(row)
        with open(args.out, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(
            f"{name}: {row['params']:,} parameters, {curve[-1]['steps']} steps, {curve[-1]['puzzles']:,} puzzles, "
            f"{curve[-1]['seconds']:.0f} s, solved {' '.join(str(p['solved']) for p in curve)} of {args.n}"
            + (f", by supervision steps {row['solved_by_n_sup']}" if "solved_by_n_sup" in row else ""),
            flush=True,
        )
        if args.save:
            checkpoint.save(
                {
                    "format": checkpoint.CHECKPOINT_FORMAT,
                    "model": text.partition(":")[2].split(",")[0],
                    "model_config": dict(vars(net.config)),
                    "weights": average,
                    "ema": None,
                    "tokenizer": tok.fingerprint(),
                    "config": None,
                    "train": {},
                },
                f"{args.save}{len(rows)}.pt",
            )


def draw_learning(paths, png):
    """Share solved against training FLOPs, one line per contender and seed, a colour per contender, one panel per task."""
    rows = [json.loads(line) for path in paths for line in open(path)]
    for row in rows:
        row["task"] += f", {row['pool']} puzzles" if row.get("pool") else ""
    tasks, names, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "name", "seed"))
    with saved_figure(png, 1, len(tasks)) as axes:
        for axis, task in zip(axes, tasks):
            for row in (r for r in rows if r["task"] == task):
                x, y = (
                    [p["flops"] / 1e12 for p in row["curve"]],
                    [100 * p["solved"] / row["n"] for p in row["curve"]],
                )
                axis.plot(
                    [0, *x],
                    [0, *y],
                    marker=".",
                    color=f"C{names.index(row['name'])}",
                    label=f"{row['name']}, seed {row['seed']}",
                    linestyle=("-", "--", ":", "-.")[seeds.index(row["seed"]) % 4],
                )
            axis.set(title=task, xlabel="training TFLOP", ylabel="solved exactly, %", ylim=(-2, 102))
            axis.legend()


@contextlib.contextmanager
def saved_figure(path, rows, columns):
    """Inside: a list of axes. Afterwards they are a png at `path`, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4 * rows))
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    yield axes
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_picture(figure, path)
    print(f"picture: {path}")


# -----------------------------------------------------------------------------
# bounds


def follow(net, idx, targets, n_sup, dtype=torch.float32, scale=1.0):
    """
    n_sup supervision steps of training on one batch, nobody halting and no optimizer step; in half precision under autocast, with the
    loss times `scale`, as a GradScaler would have it. -> for each: {size (root mean square of what
    comes out of each pass through the core), largest (of its numbers), passed_back (length of the gradient at each pass that has one, first
    pass first), gradient (length of the whole gradient)}.
    """
    sizes, largest, back = [], [], []

    def look(block, inputs, output):
        y = output[0]
        sizes.append(y.detach().float().square().mean().sqrt().item())
        largest.append(y.detach().abs().max().item())
        if y.requires_grad:
            y.register_hook(lambda g: back.append(g.float().norm().item() / scale))

    handle = net.blocks[-1].register_forward_hook(look)
    net.train()
    before = net.config.n_sup, net.config.halt_exploration
    net.config.n_sup, net.config.halt_exploration = n_sup + 1, 0.0
    carry, steps = None, []
    for _ in range(n_sup):
        for seen in (sizes, largest, back):
            seen.clear()
        if carry is not None:
            carry["halted"] = torch.zeros_like(carry["halted"])
        with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
            _, loss, carry = net(idx, targets, mode="puzzle", carry=carry)
        (scale * loss).backward()
        total = torch.stack([p.grad.float().norm() for p in net.parameters()]).norm().item() / scale
        net.zero_grad(set_to_none=True)
        steps.append(
            {"size": sizes.copy(), "largest": largest.copy(), "passed_back": back[::-1], "gradient": total}
        )
    handle.remove()
    net.config.n_sup, net.config.halt_exploration = before
    return steps


def bounds(args):
    """Follow a model, freshly made or of a checkpoint, through all passes; and a fresh one whose branches start at full size."""
    tasks = puzzles.heldout(args.suite, args.rows)
    rows = [loader.puzzle_row(arc.encode(t.kind, [*t.train, *t.test]), "canvas", "none") for t in tasks]
    idx, targets = loader.pad_rows(rows, loader.bucket_length(max(len(x) for x, _ in rows)))
    net = (
        checkpoint.load_model(args.checkpoint)[0]
        if args.checkpoint
        else make_contender(f"B:trm,{args.settings}", None, 1)[1]
    )
    kind = {"dtype": getattr(torch, args.dtype), "scale": args.scale}
    found = {"as it is": follow(net, idx, targets, args.n_sup, **kind)}
    if not args.checkpoint:
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    p *= (net.config.n_layer / 2) ** 0.5
        found["branches at full size"] = follow(net, idx, targets, args.n_sup, **kind)
    print(
        f"{net.num_params() / 1e6:.1f}M parameters, {net.config.n_layer} layers, {len(idx)} rows of {idx.shape[1]}, {args.dtype}, "
        f"{args.n_sup} supervision steps of {net.passes('puzzle')[0]} passes, {net.passes('puzzle')[1]} with gradient"
    )
    for what, steps in found.items():
        sizes, largest = ([x for s in steps for x in s[k]] for k in ("size", "largest"))
        growth = [s["passed_back"][0] / s["passed_back"][-1] for s in steps]
        print(
            f"{what}: vectors have size {min(sizes):.2f} to {max(sizes):.2f}, no number is beyond {max(largest):.1f}; the gradient is "
            f"{min(s['gradient'] for s in steps):.3g} to {max(s['gradient'] for s in steps):.3g}, at the first pass with gradient "
            f"{min(growth):.2g} to {max(growth):.2g} times what it is at the last"
        )
    with saved_figure(args.png, 1, 2) as (left, right):
        for what, steps in found.items():
            left.plot([x for s in steps for x in s["size"]], lw=1, label=f"{what}: size")
            left.plot([x for s in steps for x in s["largest"]], lw=1, label=f"{what}: largest number")
            n = len(steps[0]["passed_back"])
            for i, s in enumerate(steps):
                shade = {"color": f"C{list(found).index(what)}", "alpha": 0.3 + 0.7 * i / len(steps)}
                right.plot(
                    range(1, n + 1), s["passed_back"], **shade, label=what if i == len(steps) - 1 else None
                )
        left.set(xlabel="pass through the core", yscale="log", title="what comes out of a pass")
        right.set(
            xlabel="pass with gradient, first to last",
            yscale="log",
            title="gradient at its output, a line per supervision step",
        )
        left.legend()
        right.legend()


# -----------------------------------------------------------------------------
# halting


def halting(args):
    """
    One checkpoint on the held-out puzzles: exact answers after 1, 2, 4, ... supervision steps for all, beside letting a row stop as
    soon as its halting probability passes a threshold. Whoever has left, a row thinks the same thoughts.
    """
    net, _ = checkpoint.load_model(args.checkpoint)
    if net.puzzle_format != "canvas":
        raise ValueError(f"{args.checkpoint} is of Route A, which takes no supervision steps")
    tasks = (
        puzzles.heldout(args.suite, args.n) if args.suite in puzzles.SUITES else unseen(args.suite, args.n)[0]
    )
    right, p = right_by_steps(net, tasks, args.n_sup)
    fixed = [(n, 100 * right[:, n - 1].mean()) for n in range(1, args.n_sup + 1)]
    early = []
    print(f"{len(tasks)} puzzles of {args.suite}\nsteps for all   solved")
    for n, share in fixed:
        if n & (n - 1) == 0:
            print(f"{n:13d} {share:7.1f}%")
    print("halting above   steps on average   solved")
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999):
        passed = p > threshold
        last = np.where(passed.any(1), passed.argmax(1), args.n_sup - 1)
        early.append((last.mean() + 1, 100 * right[np.arange(len(tasks)), last].mean()))
        print(f"{threshold:13g} {early[-1][0]:18.2f} {early[-1][1]:7.1f}%")
    with saved_figure(args.png, 1, 1) as (axis,):
        axis.plot(*zip(*fixed), marker=".", label="as many steps for all")
        axis.plot(*zip(*early), marker="o", ls="--", label="until it believes its answer")
        axis.set(
            xlabel="supervision steps, on average", ylabel="solved exactly, %", xscale="log", title=args.suite
        )
        axis.legend()


# -----------------------------------------------------------------------------
# core


def core(args):
    """Seconds per training step of Route B with each layer pattern, equal parameters, by sequence length: medians, in turns."""
    print(
        f"{'':8s} {'parameters':>10s} "
        + " ".join(f"{f'{T} x {max(1, args.tokens // T)} rows':>18s}" for T in args.lengths)
    )
    params, nets = None, {}
    for pattern in args.patterns:
        nets[pattern] = make_contender(f"x:trm,layer_pattern={pattern},{args.settings}", params, 1)[1].train()
        params = params or nets[pattern].num_params()
    times = {(pattern, T): [] for pattern in nets for T in args.lengths}
    for T in args.lengths:
        rows = max(1, args.tokens // T)
        idx = torch.randint(tok.CELL0, tok.CELL0 + 10, (rows, T), generator=torch.Generator().manual_seed(0))
        idx[:, ::241] = tok.OUTPUT  # grids of 15 x 15, one after the other
        at = torch.arange(T) % 241
        idx[:, (at > 0) & (at % 16 == 0)] = tok.ROW
        targets = torch.where(idx <= tok.CELL0 + 9, idx, loader.IGNORE)
        for _ in range(args.steps + 1):
            for pattern, net in nets.items():
                start = time.process_time()
                net(idx, targets, mode="puzzle")[1].backward()
                times[pattern, T].append(time.process_time() - start)
                net.zero_grad(set_to_none=True)
    for pattern, net in nets.items():
        figures = [1000 * float(np.median(times[pattern, T][1:])) for T in args.lengths]
        print(f"{pattern:8s} {net.num_params():10,} " + " ".join(f"{ms:15,.0f} ms" for ms in figures))


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench.recursion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(f"error: {message}; see python -m bench.recursion --help")
    commands = parser.add_subparsers(dest="what", required=True)
    p = commands.add_parser("learn", help="contenders on one task, equal parameters and training FLOPs")
    p.add_argument("--task", default="sudoku4-8")
    p.add_argument("--contender", action="append", required=True, metavar="NAME:MODEL,SETTING=VALUE")
    p.add_argument(
        "--pool",
        type=int,
        metavar="N",
        help="train on the same N puzzles again and again (default: always fresh ones)",
    )
    p.add_argument("--gflops", type=float, default=4000, help="of training, for each (default 4000)")
    p.add_argument("--tokens", type=int, default=2048, help="per step")
    p.add_argument("--learning_rate", type=float, default=2e-3)
    p.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    p.add_argument("--n", type=int, default=100, help="held-out puzzles")
    p.add_argument(
        "--test_seed",
        type=int,
        default=31337,
        help="draws them: a recipe chosen on some must prove itself on others",
    )
    p.add_argument("--points", type=int, default=8, help="of the curve")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", default="out/recursion/learn.jsonl")
    p.add_argument(
        "--save", metavar="PREFIX", help="keep the averaged weights of contender 1, 2, ... as PREFIX1.pt, ..."
    )
    p.set_defaults(run=learn)
    p = commands.add_parser("draw", help="a picture of what learn has written")
    p.add_argument("jsonl", nargs="+")
    p.add_argument("--png", default="out/recursion/learn.png")
    p.set_defaults(run=lambda args: draw_learning(args.jsonl, args.png))
    p = commands.add_parser("bounds", help="sizes of vectors and gradients, pass by pass")
    p.add_argument("checkpoint", nargs="?", help="a trained model; without, a fresh one of --settings")
    p.add_argument(
        "--settings", default="n_layer=8,n_head=12,n_embd=768,n_ff=2208", help="default: the 100M model"
    )
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--scale", type=float, default=1.0, help="of the loss, as in float16 training")
    p.add_argument("--suite", default="sudoku4", choices=puzzles.SUITES)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--n_sup", type=int, default=16)
    p.add_argument("--png", default="out/recursion/bounds.png")
    p.set_defaults(run=bounds)
    p = commands.add_parser(
        "halting", help="accuracy against the average number of steps, from one checkpoint"
    )
    p.add_argument("checkpoint", metavar="CKPT")
    p.add_argument("--suite", default="sudoku4", help="a suite of puzzles.py, or a --task of learn")
    p.add_argument("--n", type=int, default=100)
    p.add_argument("--n_sup", type=int, default=16)
    p.add_argument("--png", default="out/recursion/halting.png")
    p.set_defaults(run=halting)
    p = commands.add_parser("core", help="time per step by layer pattern and length")
    p.add_argument("--patterns", type=lambda s: s.split(","), default=["kkka", "aaaa"])
    p.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[256, 2048])
    p.add_argument("--settings", default="n_embd=128,n_head=2,n_ff=344,n_latent=2,n_recursion=1")
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--steps", type=int, default=5)
    p.set_defaults(run=core)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
