"""
A thousand hard sudokus: the setting in which recursive models were first measured, as a stage of its own.

    python -m smol.sudoku_extreme                        prepare the stage: 1,000 puzzles to train on, 400 others to test
    python train.py config/sudoku_extreme.py        train on it, every puzzle seen through a new symmetry each time
    python -m smol.sudoku_extreme out/sudoku_extreme/ckpt.pt      how many of the test puzzles a checkpoint solves, by supervision steps

The puzzles come from the hub (sapientinc/sudoku-extreme) where it can be reached. Otherwise they are made here: random filled grids,
emptied as far as a single solution allows, of which those are kept that make a solver with the two simplest rules guess wrong at least
--backtracks times. Generated ones are hard, but nobody has published figures for them: the stage says in its mixture.json which it has.

Published on the hub's: TRM 87.4% with an MLP as mixer, about 75% with attention (arXiv 2510.04871).

A sudoku stays one when digits change names, when rows change places within their band, bands, columns and stacks likewise, and when it
is transposed: 3,359,232 * 9! ways to see each. `puzzles.shuffle_sudoku` draws one; loader.py does so at every draw of a source whose augment is
"sudoku". Before this: puzzles.py (easier ones). Read next: config/sudoku_extreme.py.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smol import arc, puzzles, snapshots, tokenizer

STAGE, REPO, SEED = "sudoku_extreme", "sapientinc/sudoku-extreme", 20


def hard_sudoku(rng, backtracks):
    """
    arc.Task of a 9x9 sudoku with one solution, from which no given can be taken without there being another,
    and at which solve_sudoku counts at least `backtracks`. ValueError for a number below 0.
    """
    if backtracks < 0:
        raise ValueError(f"backtracks={backtracks} must be 0 or more")
    while True:
        first = np.zeros((9, 9), np.uint8)
        first[0] = (
            rng.permutation(9) + 1
        )  # a solver that tries low digits first finds similar grids: they are shuffled below
        first[1, :2] = rng.permutation([v for v in range(1, 10) if v not in first[0, :3]])[:2]
        filled = puzzles.solve_sudoku(first, limit=1)[0]
        if not filled:
            continue
        answer = puzzles.shuffle_sudoku(rng, filled[0])[0]
        puzzle = answer.copy()
        for cell in rng.permutation(81).tolist():
            kept, puzzle.flat[cell] = puzzle.flat[cell], 0
            if len(puzzles.solve_sudoku(puzzle)[0]) != 1:
                puzzle.flat[cell] = kept
        if puzzles.solve_sudoku(puzzle)[1] >= backtracks:
            return arc.Task("sudoku_hard", "sudoku", [], [(puzzle, answer)])


# -----------------------------------------------------------------------------
# the stage


def from_hub(split, n, rng, revision):
    """
    n puzzles of train.csv or test.csv in that commit of REPO, drawn at random, without rows that are no
    sudoku. Raises whatever the hub's client raises.
    """
    from huggingface_hub import hf_hub_download

    from smol import sources

    path = hf_hub_download(REPO, f"{split}.csv", repo_type="dataset", revision=revision)
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = [(r["question"], r["answer"]) for r in csv.DictReader(f)]
    tasks = []
    for i in rng.choice(len(rows), min(n, len(rows)), replace=False):
        try:
            tasks.append(sources.sudoku_extreme(dict(zip(("question", "answer"), rows[i]))))
        except ValueError as e:
            print(f"{split}.csv, row {i + 1} is dropped: {e}")
    return tasks


def prepare(args):
    """Write the stage `sudoku_extreme`: a training and a validation shard."""
    rng, source, why = np.random.default_rng(SEED), args.source, ""
    tasks = {}
    if source != "generated":
        try:
            from smol.pipeline import Revisions  # a second that generated puzzles can do without

            revision = Revisions(Path(args.data_dir)).of(
                REPO
            )  # the one that all of this data folder is built from
            tasks = {
                "train": from_hub("train", args.n, rng, revision),
                "val": from_hub("test", args.n_test, rng, revision),
            }
            source = "hub"
        except Exception as e:  # noqa: BLE001 (no network, no package, no permission: the hub's client raises many kinds)
            why = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]:.100}"
            if source == "hub":
                raise ValueError(
                    f"{REPO} cannot be had ({why}); --source=generated makes hard puzzles here"
                ) from None
            print(f"{REPO} cannot be had ({why}): making puzzles here")
    if not tasks:
        source, made, seen = "generated", [], set()
        with tqdm(total=args.n + args.n_test, unit="puzzle", disable=None) as progress:
            while len(made) < args.n + args.n_test:
                task = hard_sudoku(rng, args.backtracks)
                if task.test[0][0].tobytes() not in seen:
                    seen.add(task.test[0][0].tobytes())
                    made.append(task)
                    progress.update()
        tasks = {"train": made[: args.n], "val": made[args.n :]}
    wrong = [t for part in tasks.values() for t in part if not puzzles.check_sudoku(*t.test[0])]
    if wrong:
        raise ValueError(f"{len(wrong)} of the puzzles have a wrong answer: nothing was written")
    about = {"source": STAGE, "group": "synth", "kind": "puzzle", "augment": "sudoku"}
    entries = [
        snapshots.write_shard(Path(args.data_dir), about, split, [arc.encode(t.kind, t.test) for t in part])
        for split, part in tasks.items()
    ]
    mixture = {
        "stage": STAGE,
        "seed": SEED,
        "tokenizer": tokenizer.fingerprint(),
        "weights": {STAGE: 1.0},
        "groups": {"synth": 1.0},
        "origin": f"{REPO}, commit {revision}"
        if source == "hub"
        else f"generated, at least {args.backtracks} backtracks",
    }
    snapshots.write_stage(Path(args.data_dir), STAGE, entries, mixture, {})
    givens = [int((t.test[0][0] > 0).sum()) for t in tasks["train"]]
    turns = [puzzles.solve_sudoku(t.test[0][0])[1] for t in tasks["train"][:100]]
    print(
        f"{STAGE}: {len(tasks['train']):,} puzzles to train on, {len(tasks['val']):,} to test, {mixture['origin']}; {min(givens)} to "
        f"{max(givens)} givens, the median of the first 100 takes {int(np.median(turns))} backtracks"
    )


def evaluate(args):
    """Print how many test puzzles a checkpoint solves after 1, 2, 4, ... supervision steps."""
    from smol import checkpoint
    from smol.loader import Shards
    from smol.runtime import pick_device

    model, _ = checkpoint.load_model(args.checkpoint, pick_device("auto"))
    manifest, mixture = snapshots.read_manifest(args.data_dir, STAGE)
    shards = Shards(args.data_dir, [e for e in manifest if e["split"] == "val"])
    tasks = [
        arc.Task(str(i), *arc.decode(shards.document(i))[:1], [], arc.decode(shards.document(i))[1])
        for i in range(min(shards.n_documents, args.n_test))
    ]
    hidden = [arc.Task(t.id, t.kind, [], [(t.test[0][0], np.zeros((1, 1), np.uint8))]) for t in tasks]
    canvas = model.puzzle_format == "canvas"
    right = []
    for start in tqdm(range(0, len(tasks), 50), unit_scale=50, unit="puzzle", leave=False, disable=None):
        part = hidden[start : start + 50]
        answers = model.answer(part, n_sup=args.n_sup, trace=True) if canvas else model.answer(part)
        right += [
            [grid is not None and np.array_equal(grid, t.test[0][1]) for grid, _ in a[0] or [(None, 0)]]
            for t, a in zip(tasks[start:], answers)
        ]  # of Route B what each step says, as in the paper, not the surest so far
    right = np.array(right)
    print(f"{len(tasks)} test puzzles, {mixture.get('origin')}")
    for n in range(1, right.shape[1] + 1):
        if n & (n - 1) == 0 or n == right.shape[1]:
            print(
                f"after {n:2d} supervision steps   solved {right[:, n - 1].sum()} ({right[:, n - 1].mean():.1%})"
                if canvas
                else f"solved {right[:, 0].sum()} ({right[:, 0].mean():.1%})"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"error: {message}; see python -m smol.sudoku_extreme --help")
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CKPT", help="evaluate this one (default: prepare the stage)"
    )
    parser.add_argument(
        "--source", choices=("auto", "hub", "generated"), default="auto", help="auto: the hub if it is there"
    )
    parser.add_argument("--n", type=int, default=1000, help="puzzles to train on (default 1000)")
    parser.add_argument("--n_test", type=int, default=400, help="others to test on (default 400)")
    parser.add_argument(
        "--backtracks", type=int, default=5, help="a generated puzzle takes at least so many (default 5)"
    )
    parser.add_argument(
        "--n_sup", type=int, help="supervision steps when evaluating (default: as it was trained)"
    )
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    try:
        if min(args.n, args.n_test) < 1:
            raise ValueError("--n and --n_test must be at least 1")
        evaluate(args) if args.checkpoint else prepare(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
