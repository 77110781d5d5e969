r"""
Contenders on the same data, one thread and equal seconds each: exact answers to unseen puzzles, or loss on
text.

    python -m bench.compare "B: config/route_b_demo.py --n_latent=1" "A: config/route_a_demo.py" \
        --puzzle=sudoku9-10-40 --trm=PATH                                 beside published TRM
    python -m bench.compare "A: config/route_a_demo.py --block_size=1024" --nanogpt=PATH    beside nanoGPT, on
                                                                          text, a row of 1,024 tokens a step

A contender is a name and what train.py is called with; it trains through train.py itself, with as many steps
as fit into the seconds. Learning rates are the caller's: give every contender its best. Rivals train on the
same puzzles or text in a loop of their own, with the same schedule. Let nothing else run: seconds are
wall-clock. Everything is kept in out_dir, so that a run that was killed goes on: checkpoints, compare.json,
curves in compare.png, and for Route B what steps and rollouts bring in NAME-SEED.png. Before this: train.py,
model_trm.py.
"""

import glob
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import configurator
from bench.train import load_nanogpt
from smol import arc, checkpoint, engine, loader, puzzles, runtime, snapshots, solve
from smol import tokenizer as tok
from smol.files import save_picture, write_whole

# ---- what on
# sudoku4-MIN-MAX or sudoku9-MIN-MAX (blanks), turn-MIN-MAX (symmetries), recolour-MIN-MAX (colours), each
# tested with MAX; maze-SIDE; '' for text
puzzle = ""
n_train = 10000  # different puzzles to train on
n_test = 100
text = {"stdlib": 1, "langref": 1, "docstrings": 1, "arithmetic": 1}  # sources of text, with their shares
data_dir = "data"  # where `python prepare.py demo` put that text
# ---- how long
seconds = 240.0  # of training, for each
points = 8  # checkpoints on the way that are evaluated
seeds = 1
n_sup = (4, 16)  # Route B and TRM: supervision steps when answering
n_rollouts = 8  # of as many steps as the most of these, after the last point; 1 for none
noise = (0.3, 1.0)  # sizes of theirs
# ---- rivals
trm = ""  # path of a checkout of github.com/SamsungSAILMontreal/TinyRecursiveModels; sudokus only
trm_mixer = True  # its MLP across the cells in place of attention
trm_settings = {"hidden_size": 128, "H_cycles": 1, "L_cycles": 1, "L_layers": 2, "halt_max_steps": 4}
nanogpt = ""  # path of a checkout of github.com/karpathy/nanoGPT; text only
nanogpt_settings = {"n_layer": 8, "n_head": 2, "n_embd": 64}
rival_learning_rate = 1e-3
rival_rows = 10  # of a batch
# ---- where
out_dir = "out/compare"

RANGES = {
    "[100, inf)": "n_train",  # 50 of them are for validation
    "[1, inf)": "n_test points seeds rival_rows n_rollouts",
    "(0, inf)": "seconds rival_learning_rate",
}
ROOT = Path(__file__).parent.parent
OF_RIVALS = ("trm", "nanogpt", "rival_")  # how settings begin that change nothing for a contender
BETAS, EMA = (0.9, 0.95), 0.999
N_BATCHES = 500  # of text that nanoGPT goes over again and again
N_BATCHES_TRM = 12_000  # of puzzles, likewise: more than twenty minutes take
WARMUP, DECAY = 0.05, 0.4  # shares of the run in which the learning rate goes up, and down to zero


# ----------------------------------------------------------------------------------------------------
# data


def draw(kind, rng, test=False):
    """One arc.Task of a kind such as 'sudoku9-10-40'. ValueError for a kind that there is not."""
    if match := re.fullmatch(r"maze-(\d+)", kind):
        return puzzles.maze(rng, int(match[1]), int(match[1]))
    match = re.fullmatch(r"(sudoku4|sudoku9|turn|recolour)-(\d+)-(\d+)", kind)
    if match and int(match[2]) <= int(match[3]):
        name, low, high = match[1], int(match[2]), int(match[3])
        n = high if test else int(rng.integers(low, high + 1))
        if "sudoku" in name:
            return puzzles.sudoku(rng, int(name[-1]), n, "test" if test else "train")
        if name == "turn" and low >= 2 and high <= 8:
            return puzzles.turned(rng, n)
        if name == "recolour" and low >= 2 and high <= 9:
            return recoloured(rng, n)
    raise ValueError(f"--puzzle={kind}: there are sudoku4-, sudoku9-, turn-, recolour-MIN-MAX, maze-SIDE")


def recoloured(rng, n):
    """A task of 3x3 grids of n colours, each of which becomes another; two demonstrations show them all."""
    colours, becomes = rng.permutation(10)[:n], rng.permutation(10)[:n]
    grids = [rng.permutation(np.append(np.arange(n), rng.integers(0, n, 9 - n))) for _ in range(3)]
    pairs = [tuple(c[grid].reshape(3, 3).astype(np.uint8) for c in (colours, becomes)) for grid in grids]
    return arc.Task("recolour", "arc", pairs[:2], pairs[2:])


def origin(c):
    return f"{c.puzzle}, {c.n_train} puzzles and {c.n_test} tests"


def make_puzzles(c, folder):
    """Write a stage `compare` of training puzzles; returns the test tasks, none of which is among them."""
    rng, tests = np.random.default_rng(31337), {}
    for _ in range(100 * c.n_test):
        task = draw(c.puzzle, rng, test=True)
        tests[arc.task_hash(task)] = task
        if len(tests) == c.n_test:
            break
    else:
        raise ValueError(f"--puzzle={c.puzzle} has hardly more than {len(tests)} puzzles: lower --n_test")
    if not (folder / "stages/compare/manifest.jsonl").exists():
        rng, documents = np.random.default_rng(1), {}
        for _ in tqdm(range(c.n_train), desc="puzzles", leave=False):
            task = draw(c.puzzle, rng)
            document = arc.encode(task.kind, [*task.train, *task.test])
            if arc.task_hash(task) not in tests:
                documents[document.tobytes()] = document
        augments = {"sudoku9": "sudoku", "turn": "none", "recolour": "arc"}
        augment = augments.get(c.puzzle.split("-")[0], "dihedral")
        about = {"source": "compare", "group": "synth", "kind": "puzzle", "augment": augment}
        every = list(documents.values())
        parts = {"train": every[50:], "val": every[:50]}
        entries = [snapshots.write_shard(folder, about, split, some) for split, some in parts.items()]
        mixture = {"stage": "compare", "seed": 1, "tokenizer": tok.fingerprint()}
        mixture |= {"weights": {"compare": 1.0}, "groups": {"synth": 1.0}, "origin": origin(c)}
        snapshots.write_stage(folder, "compare", entries, mixture, {})
    return list(tests.values())


# ----------------------------------------------------------------------------------------------------
# contenders: through train.py


def train_contender(c, arguments, seed, out):
    """Train for c.seconds; returns the paths of the checkpoints on the way, in order."""
    data = ["--data=demo", f"--mixture={c.text}", f"--data_dir={c.data_dir}"]
    if c.puzzle:
        data = ["--data=compare", "--mixture={'compare': 1}", f"--data_dir={Path(c.out_dir) / 'data'}"]
    how = ["--device=cpu", f"--seed={seed}", "--dtype=float32"]  # as the rivals are trained
    command = [sys.executable, "train.py", *how, *shlex.split(arguments), *data]

    def run(folder, steps, *more):
        schedule = [f"--warmup_iters={int(WARMUP * steps)}", f"--decay_iters={int(DECAY * steps)}"]
        done = subprocess.run(
            [*command, f"--out_dir={folder}", f"--max_iters={steps}", "--schedule=wsd", *schedule, *more],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            raise ValueError(f"train.py failed for {arguments!r}: see above")
        return [e for e in runtime.read_log(os.path.join(folder, "log.jsonl")) if "loss" in e]

    # once: a comparison that was killed goes on with as many steps as it had begun with
    probe = runtime.read_log(f"{out}-probe/log.jsonl") if os.path.exists(f"{out}-probe/ckpt.pt") else []
    probe = [e for e in probe if "loss" in e] or run(
        f"{out}-probe", 20, "--log_interval=5", "--eval_interval=20", "--overwrite=True"
    )
    per_step = (probe[-1]["seconds"] - probe[0]["seconds"]) / (probe[-1]["iter"] - probe[0]["iter"])
    steps = c.points * max(1, int(c.seconds / per_step / c.points))
    run(out, steps, f"--eval_interval={steps // c.points}", f"--keep_every={steps // c.points}")
    kept = glob.glob(f"{glob.escape(out)}/ckpt_[0-9]*.pt")
    return sorted(kept, key=lambda p: int(re.findall(r"\d+", p)[-1]))


def solved_by(net, tasks, n_sup=1, n_rollouts=1, **how):
    """`solved` of a contender. Route A has one step of one rollout, its most probable answer."""
    if net.puzzle_format == "canvas":
        how = {"n_sup": n_sup, "n_rollouts": n_rollouts, "trace": True, **how}
    given = net.answer(solve.without_answers(tasks), **how)
    n = n_rollouts * n_sup
    return solved([(some or [(None, 0.0)] * n)[:n] for (some,) in given], tasks, n_sup, n_rollouts)


def solved(traces, tasks, n_sup, n_rollouts):
    """
    traces: for each task its (grid, confidence) after each step of one rollout after the other -> two int
    arrays (n_rollouts, n_sup), for the first rollouts and the first steps of each: how many tasks the answer
    that is taken solves, and how many any of the answers solves.
    """
    taken, some = np.zeros((2, n_rollouts, n_sup), int)
    for steps, task in zip(traces, tasks):
        right = np.reshape([np.array_equal(grid, task.test[0][1]) for grid, _ in steps], taken.shape)
        for r, s in np.ndindex(taken.shape):
            first = [steps[k * n_sup + i] for k in range(r + 1) for i in range(s + 1)]
            answers = engine.ranked(first, r + 1)
            taken[r, s] += bool(answers) and np.array_equal(answers[0][0], task.test[0][1])
            some[r, s] += right[: r + 1, : s + 1].any()
    return taken, some


def curve_of(c, paths, tasks):
    """[{seconds, tokens, loss or solved}] of a run's checkpoints, and the parameters of its model."""
    curve = []
    for path in paths:
        net, saved = checkpoint.load_model(path)
        curve.append({k: saved["train"][k] for k in ("iter", "seconds", "tokens", "val_loss")})
        canvas = net.puzzle_format == "canvas"
        if tasks:
            taken, _ = solved_by(net, tasks, max(c.n_sup) if canvas else 1)
            steps = {str(n): int(taken[0, n - 1]) for n in c.n_sup} if canvas else {"": int(taken[0, 0])}
            curve[-1]["solved"] = steps
    if tasks and canvas and c.n_rollouts > 1:
        curve[-1] |= {"rollouts": {}, "by_steps": {}}
        for size in c.noise:
            taken, some = solved_by(net, tasks, max(c.n_sup), c.n_rollouts, noise=size)
            curve[-1]["rollouts"][size] = int(taken[-1, -1]), int(some[-1, -1])
            curve[-1]["by_steps"][size] = taken.tolist()
    return curve, net.num_params()


# ----------------------------------------------------------------------------------------------------
# rivals: a loop of their own, on batches that were made before


def moving_average(average, value, n):
    """Follows closely early on, as in train.py: there is little to average."""
    return average.lerp(value, 1 - min(EMA, (1 + n.item()) / (10 + n.item())))


def train_rival(c, net, loss_of, batches, evaluate):
    """The curve and the parameters. evaluate(averaged net, whether it is the last time): at every point."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim >= 2]},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.rival_learning_rate, betas=BETAS, weight_decay=0.1)
    average = torch.optim.swa_utils.AveragedModel(net, avg_fn=moving_average)
    spent, tokens, steps, curve = 0.0, 0, 0, []
    while spent < c.seconds:
        batch = batches[steps % len(batches)]
        start = time.perf_counter()
        share = spent / c.seconds
        for group in optimizer.param_groups:
            group["lr"] = c.rival_learning_rate * min(1.0, share / WARMUP, (1 - share) / DECAY)
        net.train()
        loss_of(net, batch).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(net)
        spent += time.perf_counter() - start
        tokens, steps = tokens + batch["inputs"].numel(), steps + 1
        if spent >= c.seconds * (len(curve) + 1) / c.points:
            last = len(curve) + 1 == c.points
            results = evaluate(average.module.eval(), last)
            curve.append({"iter": steps, "seconds": spent, "tokens": tokens, **results})
    return curve, sum(p.numel() for p in net.parameters())


def trm_batch(pairs):
    """Sudokus as published TRM reads them: a row of cells, as tokens 1 to 10, and nothing for the task."""
    grids = np.stack([[grid.ravel() for grid in pair] for pair in pairs])  # (N, 2, cells)
    inputs, labels = torch.from_numpy(grids.astype(np.int64) + 1).unbind(1)
    identifiers = torch.zeros(len(pairs), dtype=torch.long)
    return {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers}


@torch.no_grad()
def trm_traces(model, tasks, n_steps, n_rollouts=1, size=0.0, seed=0):
    """
    Published TRM at work: for each task what `solved` takes, its confidence the halting logit. All rollouts
    but the first have noise of this size on z before each step.
    """
    data = trm_batch([task.test[0] for task in tasks for _ in range(n_rollouts)])
    noisy = (torch.arange(len(tasks) * n_rollouts) % n_rollouts > 0)[:, None, None]
    state, rng = model.initial_carry(data), torch.Generator().manual_seed(seed)
    state.current_data = data
    state.inner_carry = model.inner.reset_carry(state.halted, state.inner_carry)
    rollouts = [[] for _ in noisy]
    for _ in range(n_steps):
        z, state.halted = state.inner_carry.z_L, torch.zeros_like(state.halted)
        state.inner_carry.z_L = z + size * noisy * torch.randn(z.shape, generator=rng)
        state, outputs = model(carry=state, batch=data)
        answers = (outputs["logits"].argmax(-1) - 1).numpy()
        for steps, answer, q in zip(rollouts, answers, outputs["q_halt_logits"].tolist()):
            steps.append((answer.reshape(tasks[0].test[0][1].shape), q))
    return [sum(rollouts[i : i + n_rollouts], []) for i in range(0, len(rollouts), n_rollouts)]


def rival_trm(c, seed, tasks):
    """Published TRM on sudokus."""
    sys.path.insert(0, c.trm)
    try:
        from models.losses import ACTLossHead
        from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1
    except ImportError as e:
        raise ValueError(f"--trm={c.trm} is no checkout of TRM, or lacks a package: {e}") from None

    torch.manual_seed(seed)
    rng, cells = np.random.default_rng(seed), tasks[0].test[0][0].size
    config = {"batch_size": c.rival_rows, "seq_len": cells, "num_puzzle_identifiers": 1, "vocab_size": 11}
    config |= {"puzzle_emb_ndim": 0, "puzzle_emb_len": 0, "H_layers": 0, "expansion": 4, "num_heads": 4}
    config |= {"pos_encodings": "none" if c.trm_mixer else "rope", "mlp_t": c.trm_mixer}
    config |= {"halt_exploration_prob": 0.1, "forward_dtype": "float32", **c.trm_settings}
    net = ACTLossHead(TinyRecursiveReasoningModel_ACTV1(config), "stablemax_cross_entropy")

    def seen_anew(pair):
        """Through a random symmetry, as the contenders' loader does it."""
        if cells == 81:
            return puzzles.shuffle_sudoku(rng, *pair)
        symmetry = arc.random_augment(rng, "dihedral")
        return [arc.augment(symmetry, grid) for grid in pair]

    folder, n = Path(c.out_dir) / "data", c.rival_rows
    manifest, _ = snapshots.read_manifest(folder, "compare")
    shards = loader.Shards(folder, [e for e in manifest if e["split"] == "train"])
    made = [arc.decode(shards.document(i))[1][0] for i in range(shards.n_documents)]
    batches = []
    for _ in range(N_BATCHES_TRM):
        pairs = [made[i] for i in rng.integers(len(made), size=n)]
        batches.append(trm_batch(list(map(seen_anew, pairs))))
    carry = net.initial_carry(batches[0])

    def loss_of(net, batch):
        nonlocal carry
        carry, loss, *_ = net(return_keys=[], carry=carry, batch=batch)
        return loss / n

    def evaluate(net, last):
        most = max(c.n_sup)
        taken, _ = solved(trm_traces(net.model, tasks, most), tasks, most, 1)
        results = {"solved": {str(n): int(taken[0, n - 1]) for n in c.n_sup}, "rollouts": {}}
        for size in c.noise if last and c.n_rollouts > 1 else ():
            traces = trm_traces(net.model, tasks, most, c.n_rollouts, size, seed)
            taken, some = solved(traces, tasks, most, c.n_rollouts)
            results["rollouts"][size] = int(taken[-1, -1]), int(some[-1, -1])
        return results

    return train_rival(c, net, loss_of, batches, evaluate)


def rival_nanogpt(c, seed):
    """nanoGPT's model on the batches that train.py's loader makes of the demo's text."""
    gpt = load_nanogpt(c.nanogpt)
    torch.manual_seed(seed)
    block = 1024
    shape = {"block_size": block, "vocab_size": tok.VOCAB_SIZE, "dropout": 0.0, "bias": False}
    net = gpt.GPT(gpt.GPTConfig(**shape, **c.nanogpt_settings))
    size = {"batch_size": 1, "block_size": block, "batches_per_step": 1}
    data = {"weights": c.text, "seed": seed, "puzzle_format": "autoregressive"}
    source = loader.Loader(c.data_dir, "demo", **data, **size)
    batches = [{"inputs": b.idx, "labels": b.targets} for _ in range(N_BATCHES) for b in source.next_step()]

    @torch.no_grad()
    def evaluate(net, last):
        losses = {}
        for name, _, idx, targets in source.val_batches("text", 8):
            loss = loss_of(net, {"inputs": idx, "labels": targets})
            losses.setdefault(name, []).append(loss.item())
        return {"val_loss": float(np.mean([np.mean(of) for of in losses.values()]))}

    def loss_of(net, batch):
        return net(batch["inputs"], batch["labels"])[1]

    return train_rival(c, net, loss_of, batches, evaluate)


# ----------------------------------------------------------------------------------------------------
# all of it


def show(row):
    last = row["curve"][-1]
    what = f"{row['name']}, seed {row['seed']}: {row['params'] / 1e6:.2f}M parameters"
    print(f"{what}, {last['iter']:,} steps, {last['tokens']:,} tokens in {last['seconds']:.0f} s")
    if "solved" not in last:
        print("    loss", *(f"{p['val_loss']:.3f}" for p in row["curve"]))
    for n in last.get("solved", ()):
        print("    solved", f"in {n} steps" if n else "", *(p["solved"][n] for p in row["curve"]))
    for size, (taken, some) in last.get("rollouts", {}).items():
        print(f"    rollouts with noise {size}: the answer taken is right in {taken}, some in {some}")


def draw_curves(rows, path):
    """Result against seconds of training, a line for each contender and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        values = [[*p["solved"].values()][-1] if "solved" in p else p["val_loss"] for p in row["curve"]]
        label = f"{row['name']}, seed {row['seed']}"
        axes.plot([p["seconds"] for p in row["curve"]], values, marker=".", label=label)
    result = "solved" if "solved" in rows[0]["curve"][-1] else "validation loss, nats"
    axes.set(xlabel="seconds of training, one thread", ylabel=result)
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)


def draw_steps(row, path):
    """What more steps and more rollouts of one checkpoint bring, a panel for each size of noise."""
    from matplotlib.figure import Figure

    by_steps = row["curve"][-1]["by_steps"]
    figure = Figure(figsize=(4.5 * len(by_steps), 4), layout="constrained")
    panels = figure.subplots(1, len(by_steps), sharey=True, squeeze=False)[0]
    for axes, (size, taken) in zip(panels, by_steps.items()):
        for n in [2**i for i in range(len(taken).bit_length())]:
            axes.plot(range(1, len(taken[0]) + 1), taken[n - 1], label=f"{n} rollouts")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="supervision steps when answering", title=f"noise {size}")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="solved by the answer with most votes")
    panels[0].legend()
    save_picture(figure, path)


def main(argv):
    contenders = [word for word in argv if ": " in word and not word.startswith("-")]
    config, _ = configurator.read(globals(), [word for word in argv if word not in contenders])
    c, rows = SimpleNamespace(**config), []
    torch.set_num_threads(1)
    out = Path(c.out_dir)
    compared = {k: v for k, v in config.items() if k not in ("seeds", "data_dir", "out_dir")}
    runs = {}  # name: function of the seed and a path to write to, which returns the curve and the parameters
    for text in contenders:
        name, _, arguments = text.partition(": ")
        runs[name] = lambda seed, path, how=arguments: curve_of(c, train_contender(c, how, seed, path), tasks)
    if c.trm:
        runs["TRM, mixer" if c.trm_mixer else "TRM, attention"] = lambda seed, _: rival_trm(c, seed, tasks)
    if c.nanogpt:
        runs["nanoGPT"] = lambda seed, _: rival_nanogpt(c, seed)
    try:
        names = [text.partition(": ")[0] for text in contenders]
        # as files are named; a rival of the same name has taken a contender's place
        if len({name.replace(" ", "_") for name in runs}) < len(names) + bool(c.trm) + bool(c.nanogpt):
            raise ValueError(f"contenders and rivals need different names, got {', '.join(names)}")
        if not runs:
            raise ValueError("nobody to compare: name a contender ('A: config/route_a_demo.py') or a rival")
        if c.trm and "sudoku" not in c.puzzle or c.nanogpt and c.puzzle:
            raise ValueError("--trm is for sudokus (--puzzle=sudoku9-10-40) and --nanogpt for text")
        mixture = out / "data/stages/compare/mixture.json"
        if c.puzzle and mixture.exists() and (of := snapshots.read_json(mixture)["origin"]) != origin(c):
            raise ValueError(f"{out} has a comparison on {of}: name another --out_dir")
        tasks = make_puzzles(c, out / "data") if c.puzzle else []
        for seed, name in itertools.product(range(1, c.seeds + 1), runs):
            path = str(out / f"{name.replace(' ', '_')}-{seed}")
            own = [text for text in contenders if text.startswith(f"{name}: ")]
            settings = {k: v for k, v in compared.items() if not (own and k.startswith(OF_RIVALS))}
            begun = {"name": name, "seed": seed, "how": [own, str(settings)]}
            if not os.path.exists(f"{path}.json"):  # before it trains: who is killed goes on in the same way
                write_whole(json.dumps(begun).encode(), f"{path}.json")
            row = json.loads(Path(f"{path}.json").read_text())
            if row.get("how") != begun["how"]:
                raise ValueError(f"{path} was trained otherwise: name another contender or --out_dir")
            if "curve" not in row:
                row["curve"], row["params"] = runs[name](seed, path)
                write_whole(json.dumps(row).encode(), f"{path}.json")
            rows.append(json.loads(Path(f"{path}.json").read_text()))
            show(rows[-1])
            if "by_steps" in rows[-1]["curve"][-1]:
                draw_steps(rows[-1], f"{path}.png")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    draw_curves(rows, str(out / "compare.png"))
    everything = {"settings": config, "contenders": contenders, "rows": rows}
    write_whole(json.dumps(everything).encode(), str(out / "compare.json"))


if __name__ == "__main__":
    main(sys.argv[1:])
