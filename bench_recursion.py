"""
What recursion is worth: `bench.py recursion`, experiments that take minutes on one CPU core.

    python bench.py recursion learn --task=sudoku9 --contender="Route A:dense" --contender="Route B:trm,n_latent=2,n_recursion=1,n_sup=8"
                                                         exact answers to unseen puzzles by training FLOPs, everyone given as many
    python bench.py recursion bounds                     lengths of vectors and gradients through n_sup x T x n passes: a picture
    python bench.py recursion halting CKPT               accuracy against the average number of supervision steps, from one checkpoint
    python bench.py recursion core                       time per step of a KDA core and of one of attention alone, by sequence length

Puzzles are drawn fresh for every batch, so nothing is seen twice; the held-out ones are those of puzzles.heldout, or, for a harder or
easier --task than its suites have, the first ones of another seed. A contender is a name, a model and settings of its Config; n_ff
makes up for what they differ in parameters. Figures worth keeping go into LOG.md with their command.
"""

import argparse
import json
import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import arc
import checkpoint
import loader
import puzzles
import tokenizer as tok
from bench_models import schedule

SMALL = dict(n_layer=4, n_head=2, n_embd=64, n_ff=172, block_size=1024)  # the demo's model
POINTS = 8  # of a curve
EMA = 0.99

# -----------------------------------------------------------------------------
# tasks: name -> a function of a random generator that makes one arc.Task


def plain_transform(rng):
    """A small grid turned or mirrored in one of eight ways: which, two demonstrations tell."""
    turn, pairs = int(rng.integers(8)), []
    for _ in range(3):
        grid = rng.integers(0, 10, (3, 3)).astype(np.uint8)
        pairs.append((grid, arc.augment(arc.Augment(turn, tuple(range(10))), grid)))
    return arc.Task("turn", "arc", pairs[:2], pairs[2:])


def draw(task, rng, train=True):
    """
    One task of the kind: 'sudoku4-8' is a 4x4 sudoku with 8 blanks (4x4 answers of test and training differ), 'sudoku9-20' a 9x9,
    'maze-7' of 7x7, 'turn' and 'transforms' grid transforms. With three numbers, 'sudoku9-10-30', training has 10 to 30, the test 30.
    ValueError for another kind.
    """
    kind, *numbers = task.split("-")
    if not all(n.isdigit() for n in numbers) or kind not in ("sudoku4", "sudoku9", "maze", "turn", "transforms"):
        raise ValueError(f"--task={task}: there are sudoku4-BLANKS, sudoku9-BLANKS, maze-SIDE, turn and transforms")
    numbers = [int(n) for n in numbers]
    n = numbers and (int(rng.integers(numbers[0], numbers[-1] + 1)) if train else numbers[-1])
    if kind == "maze":
        return puzzles.maze(rng, n, n)
    if kind in ("turn", "transforms"):
        return plain_transform(rng) if kind == "turn" else puzzles.transform(rng)
    return puzzles.sudoku(rng, int(kind[-1]), n, "train" if train else "test")


class Puzzles:
    """Batches of about `tokens` tokens of fresh puzzles in a model's format, by bucket of length."""

    def __init__(self, task, puzzle_format, tokens, seed, avoid):
        self.task, self.puzzle_format, self.tokens = task, puzzle_format, tokens
        self.rng, self.avoid, self.waiting = np.random.default_rng(seed), avoid, {}

    def next_batch(self):
        while True:
            task = draw(self.task, self.rng)
            if puzzles.task_hash(task) in self.avoid:
                continue
            row = loader.puzzle_row(arc.encode(task.kind, [*task.train, *task.test]), self.puzzle_format, "none")
            length = loader.bucket_length(len(row[0]))
            rows = self.waiting.setdefault(length, [])
            rows.append(row)
            if len(rows) >= max(1, self.tokens // length):
                return loader.pad_rows(self.waiting.pop(length), length)


# -----------------------------------------------------------------------------
# learn


def make_contender(text, params, seed):
    """'name:model,setting=value,...' -> name, Model with about `params` parameters (None: as its n_ff says). ValueError for a mistake."""
    name, _, rest = text.partition(":")
    model, *parts = rest.split(",")
    if model not in ("dense", "trm"):
        raise ValueError(f"--contender={text}: it is NAME:dense or NAME:trm, then ,setting=value")
    settings = dict(SMALL)
    for part in parts:
        key, _, value = part.partition("=")
        settings[key] = {"True": True, "False": False}.get(value, int(value) if value.isdigit() else value)

    def build(**other):
        torch.manual_seed(seed)
        return checkpoint.make_model(model, {**settings, **other})

    if params is None:
        return name, build()
    with torch.device("meta"):
        few, more = (build(n_ff=n).num_params() for n in (8, 16))
    return name, build(n_ff=max(8, round(8 + 8 * (params - few) / (more - few))))


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


@torch.no_grad()
def solved(net, tasks, n_sup=None):
    """How many of the tasks the model answers exactly, first answers only."""
    hidden = [arc.Task(t.id, t.kind, t.train, [(x, np.zeros((1, 1), np.uint8)) for x, _ in t.test]) for t in tasks]
    answers = net.answer(hidden) if n_sup is None else net.answer(hidden, n_sup=n_sup)
    return sum(bool(a[0]) and np.array_equal(a[0][0][0], t.test[0][1]) for a, t in zip(answers, tasks))


def train(net, batches, tasks, flops, learning_rate, points=POINTS, progress=None):
    """
    Train on `batches` until `flops` have been spent. -> (curve, average weights): curve has {flops, seconds (of the processor), steps,
    puzzles (seen), loss, gradient (largest norm before clipping since the last point), solved} at evenly spaced points.
    """
    optimizer = net.configure_optimizer(0.1, learning_rate, (0.9, 0.95))
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    spent, seconds, steps, seen, carries, curve, recent, largest = 0.0, 0.0, 0, 0, {}, [], [], 0.0
    while spent < flops:
        idx, targets = batches.next_batch()
        start = time.process_time()
        net.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(spent / flops)
        loss, carry = loss_of(net, idx, targets, carries.get(idx.shape[1]))
        loss.backward()
        largest = max(largest, torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if carry is not None:
            carries[idx.shape[1]] = carry
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
            curve.append({"flops": spent, "seconds": round(seconds, 1), "steps": steps, "puzzles": seen,
                          "loss": round(float(np.mean(recent)), 4), "gradient": round(largest, 2), "solved": solved(net, tasks)})  # fmt: skip
            net.load_state_dict(own)
            recent, largest = [], 0.0
            print(json.dumps(curve[-1]), file=sys.stderr, flush=True)
    return curve, average


def learn(args):
    """Train every contender on a task with equal FLOPs; one JSON object per contender goes into --out, a picture beside it."""
    rng = np.random.default_rng(31337)
    tasks, avoid = [], set()
    while len(tasks) < args.n:
        task = draw(args.task, rng, train=False)
        if puzzles.task_hash(task) not in avoid:
            avoid.add(puzzles.task_hash(task))
            tasks.append(task)
    params, rows = None, []
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    for text in args.contender:
        name, net = make_contender(text, params, args.seed)
        params = params or net.num_params()
        batches = Puzzles(args.task, net.puzzle_format, args.tokens, args.seed, avoid)
        with tqdm(total=round(args.gflops), unit="GFLOP", desc=name, leave=False, disable=None) as progress:
            curve, average = train(net, batches, tasks, args.gflops * 1e9, args.learning_rate, progress=progress)
        row = {"name": name, "contender": text, "task": args.task, "seed": args.seed, "params": net.num_params(), "n": args.n,
               "learning_rate": args.learning_rate, "curve": curve}  # fmt: skip
        net.eval().load_state_dict(average)
        if net.puzzle_format == "canvas" and net.config.n_sup > 1:
            row["solved_by_n_sup"] = {n: solved(net, tasks, n) for n in (1, 2, 4, 8, 16, 32)}
        rows.append(row)
        with open(args.out, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(f"{name}: {row['params']:,} parameters, {curve[-1]['steps']} steps, {curve[-1]['puzzles']:,} puzzles, "
              f"{curve[-1]['seconds']:.0f} s, solved {' '.join(str(p['solved']) for p in curve)} of {args.n}"
              + (f", by supervision steps {row['solved_by_n_sup']}" if "solved_by_n_sup" in row else ""), flush=True)  # fmt: skip
        if args.save:
            checkpoint.save({"format": checkpoint.CHECKPOINT_FORMAT, "model": text.partition(":")[2].split(",")[0],
                             "model_config": dict(vars(net.config)), "weights": average, "ema": None, "tokenizer": tok.fingerprint(),
                             "config": None, "train": {}}, f"{args.save}{len(rows)}.pt")  # fmt: skip


def main(argv):
    parser = argparse.ArgumentParser(prog="bench.py recursion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}; see python bench.py recursion --help")
    commands = parser.add_subparsers(dest="what", required=True)
    p = commands.add_parser("learn", help="contenders on one task, equal parameters and training FLOPs")
    p.add_argument("--task", default="sudoku4-8")
    p.add_argument("--contender", action="append", required=True, metavar="NAME:MODEL,SETTING=VALUE")
    p.add_argument("--gflops", type=float, default=4000, help="of training, for each (default 4000)")
    p.add_argument("--tokens", type=int, default=2048, help="per step")
    p.add_argument("--learning_rate", type=float, default=2e-3)
    p.add_argument("--n", type=int, default=100, help="held-out puzzles")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", default="out/recursion/learn.jsonl")
    p.add_argument("--save", metavar="PREFIX", help="keep the averaged weights of contender 1, 2, ... as PREFIX1.pt, ...")
    p.set_defaults(run=learn)
    args = parser.parse_args(argv[1:])  # bench.py hands on its own name for this file
    try:
        args.run(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
