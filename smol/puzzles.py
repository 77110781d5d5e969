"""
Procedural tasks with verified answers, from sudoku.py, mazes.py, transforms.py and word_problems.py, and the fixed suites of them
that models are evaluated on.

Every generator takes a np.random.Generator and nothing else decides what comes out. Every answer has a checker written
another way round than the generator: sudoku by looking at rows, columns and boxes, not by solving; mazes by counting
shortest paths layer by layer, not by following parents; arithmetic by parsing the finished text. A transform is checked by
reading its program back from the task's id and running it on every input.

What is never trained on: the grids in SUDOKU4_HELD_OUT, and the puzzles that heldout() lists (compare with task_hash()).

Read next: arc.py (how a task becomes tokens), prepare.py (how these puzzles become shards), eval_arc.py (how they are scored).
"""

import difflib
import hashlib

import numpy as np

from smol.mazes import check_maze, maze
from smol.sudoku import SUDOKU4_HELD_OUT, all_sudoku4, check_sudoku, solve_sudoku, sudoku, sudoku4_grids  # noqa: F401 (so that all
from smol.transforms import TRANSFORMS, check_transform, program_of, transform  # noqa: F401                      puzzles can be had from
from smol.word_problems import NAMES, TEMPLATES, THINGS, arithmetic, check_arithmetic  # noqa: F401              this one place)

SUITES = ("sudoku4", "sudoku9", "maze", "transforms")
HELD_OUT_N = {"sudoku4": 100, "sudoku9": 50, "maze": 50, "transforms": 50}
HELD_OUT_SEED = {
    "sudoku4": 4004,
    "sudoku9": 9009,
    "maze": 7007,
    "transforms": 1234,
}  # changing one changes what was measured


def task_hash(task):
    """
    -> hex: SHA-256 of the kind and of every grid in order, not of the id; the same for all eight turned and mirrored images of a task.
    What prepare.py compares to keep held-out puzzles out of training: the loader turns and mirrors, so an image must not get in either.
    sudoku4 needs more, since other givens of the same answer would still give it away; there the answers themselves are held out.
    """
    grids = [np.asarray(grid, np.uint8) for pair in task.train + task.test for grid in pair]
    images = []
    for k in range(8):
        turned = [np.rot90(grid.T if k >= 4 else grid, k) for grid in grids]
        images.append(b"".join(bytes(grid.shape) + grid.tobytes() for grid in turned))
    return hashlib.sha256(task.kind.encode() + b"|" + min(images)).hexdigest()


def heldout(suite, n=None):
    """
    The first n tasks of a fixed list of HELD_OUT_N[suite] distinct ones (default: all). sudoku4: 6 blanks, answers from SUDOKU4_HELD_OUT
    alone; sudoku9: 30 blanks; maze: 7x7; transforms. Ids are 'maze-0007', for transforms 'transforms-0007:roll:dy=1:dx=-2'.
    ValueError for an unknown suite, and for more than there are: only these are kept out of training, one more could be in it.
    """
    if suite not in SUITES:
        close = difflib.get_close_matches(str(suite), SUITES, n=1, cutoff=0)[0]
        raise ValueError(f"unknown suite {suite!r}; did you mean {close!r}? There are {', '.join(SUITES)}")
    n = HELD_OUT_N[suite] if n is None else n
    if not 0 <= n <= HELD_OUT_N[suite]:
        raise ValueError(
            f"{n} held-out puzzles of {suite}: there are {HELD_OUT_N[suite]}, and only these are kept out of training"
        )
    rng = np.random.default_rng(HELD_OUT_SEED[suite])
    tasks, seen = [], set()
    while len(tasks) < n:
        match suite:
            case "sudoku4":
                task = sudoku(rng, 4, 6, "test")
            case "sudoku9":
                task = sudoku(rng, 9, 30, "test")
            case "maze":
                task = maze(rng, 7, 7)
            case "transforms":
                task = transform(rng)
        if task_hash(task) not in seen:
            seen.add(task_hash(task))
            number = f"{suite}-{len(tasks):04d}"
            task.id = f"{number}:{task.id}" if suite == "transforms" else number
            tasks.append(task)
    return tasks


def check(task):
    """True if the task's answer is right by the checker of its kind; for a sudoku also if it is the only answer."""
    puzzle, answer = task.test[0]
    match task.kind:
        case "sudoku":
            return check_sudoku(puzzle, answer) and len(solve_sudoku(puzzle)[0]) == 1
        case "maze":
            return check_maze(puzzle, answer)
        case "arc":
            return check_transform(task)
    raise ValueError(f"no checker for tasks of kind {task.kind!r}: there are sudoku, maze, arc")
