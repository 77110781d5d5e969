"""
Sudoku, 4x4 and 9x9: filled grids, puzzles with exactly one solution, a solver, a checker. 0 is a blank.

The checker looks at rows, columns and boxes and does not solve, so neither the generator nor the solver can hide a mistake from it.

What is never trained on: the 4x4 grids in SUDOKU4_HELD_OUT. Read next: puzzles.py, the suites that models are evaluated on.
"""

import functools
import hashlib
import math

import numpy as np

from smol.arc import Task

MAX_BLANKS = {4: 12, 9: 54}  # 4 givens are the fewest for 4x4; 9x9 goes to 64, but digging past 54 takes long


def _sudoku_size(grid):
    grid = np.asarray(grid)
    if grid.shape not in ((4, 4), (9, 9)):
        raise ValueError(f"a sudoku is 4x4 or 9x9, this one has shape {grid.shape}")
    if grid.min() < 0 or grid.max() > len(grid):
        raise ValueError(
            f"a {len(grid)}x{len(grid)} sudoku holds 0 (blank) to {len(grid)}, this one holds {grid.min()} to {grid.max()}"
        )
    return len(grid), math.isqrt(len(grid))


def solve_sudoku(grid, limit=2, rng=None):
    """
    -> (solutions of a (4, 4) or (9, 9) grid, at most `limit` of them, as np.uint8 grids;
    backtracks: guesses that the rules alone refute, and cells of which they refute every guess).
    limit=2 is what it takes to know whether a solution is the only one. ValueError if it is no sudoku.

    Two rules: a cell with one digit left has it; a digit with one place left in a row, column or box stands
    there. Where neither applies, a cell with the fewest digits left is guessed, the lowest digit first. With
    an rng, digits are tried in random order, by the first rule only. Bit v-1 stands for digit v.
    """
    size, box = _sudoku_size(grid)
    values = np.asarray(grid).tolist()
    free = [(1 << size) - 1] * (3 * size)  # digits that are still to be placed in each row, column, box
    blanks = []  # of each: its row, column, box as indices of free
    for r in range(size):
        for c in range(size):
            units = r, size + c, 2 * size + r // box * box + c // box
            if not values[r][c]:
                blanks.append(units)
                continue
            bit = 1 << values[r][c] - 1
            for u in units:
                if not free[u] & bit:
                    return [], 0
                free[u] ^= bit
    solutions, backtracks = [], 0

    def choose():
        """-> (index in blanks, digits to try there as bits: none at a contradiction, one where a rule applies)"""
        fewest = size + 1
        for i, (r, c, b) in enumerate(blanks):
            left = free[r] & free[c] & free[b]
            if left.bit_count() < fewest:
                best, digits, fewest = i, left, left.bit_count()
                if fewest <= 1:
                    return best, digits
        if rng is not None:  # the second rule would change which grids are drawn
            return best, digits
        options = [free[r] & free[c] & free[b] for r, c, b in blanks]
        once, twice = [0] * len(free), [0] * len(free)  # digits with at least one place, at least two
        for left, units in zip(options, blanks):
            for u in units:
                twice[u] |= once[u] & left
                once[u] |= left
        if once != free:
            return best, 0
        for i, (r, c, b) in enumerate(blanks):
            only = options[i] & ~(twice[r] & twice[c] & twice[b])
            if only:
                return i, only & -only
        best = min(range(len(blanks)), key=lambda i: (options[i].bit_count(), blanks[i]))
        return best, options[best]

    def search():
        """Is there a contradiction by rules alone?"""
        nonlocal backtracks
        if not blanks:
            solutions.append(np.array(values, np.uint8))
            return False
        best, bits = choose()
        digits = [v for v in range(1, size + 1) if bits >> v - 1 & 1]
        if rng is not None:
            rng.shuffle(digits)
        units = r, c, b = blanks[best]
        blanks[best] = blanks[-1]
        blanks.pop()
        failed = 0
        for v in digits:
            bit = 1 << v - 1
            values[r][c - size] = v
            for u in units:
                free[u] ^= bit
            failed += search()
            for u in units:
                free[u] ^= bit
            if len(solutions) >= limit:
                break
        values[r][c - size] = 0
        blanks.append(units)
        if len(digits) > 1:
            backtracks += failed + (failed == len(digits))
        return len(digits) <= 1 and failed == len(digits)

    search()
    return solutions, backtracks


@functools.cache
def all_sudoku4():
    """The 288 filled 4x4 grids, np.uint8 (288, 4, 4), in lexicographic order, read-only (it is shared by all callers)."""
    grids, _ = solve_sudoku(np.zeros((4, 4), np.uint8), limit=1000)
    grids = np.array(sorted(grids, key=lambda g: g.tobytes()))
    grids.flags.writeable = False
    return grids


def _hold_out_sudoku4():
    # A training grid turned or mirrored on the fly must not become a held-out one, so whole orbits under the eight symmetries of
    # the square are held out. Orbits have 4 or 8 grids: the most that fits into a fifth of 288 is 56. They are ordered by a hash
    # and not by a random generator, so that no version of numpy can move the border.
    orbits = {}
    for i, grid in enumerate(all_sudoku4()):
        images = [np.rot90(g, k).tobytes() for g in (grid, grid.T) for k in range(4)]
        orbits.setdefault(min(images), []).append(i)
    held = []
    for key in sorted(orbits, key=lambda image: hashlib.sha256(image).digest()):
        if len(held) + len(orbits[key]) <= 288 // 5:
            held += orbits[key]
    return tuple(sorted(held))


SUDOKU4_HELD_OUT = _hold_out_sudoku4()  # indices into all_sudoku4()


def sudoku4_grids(split):
    """The filled 4x4 grids of 'train' (232) or 'test' (56), np.uint8 (n, 4, 4). No symmetry of the square maps one into the other."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: it is 'train' or 'test'")
    held = np.isin(np.arange(288), SUDOKU4_HELD_OUT)
    return all_sudoku4()[held if split == "test" else ~held]


def sudoku(rng, size, blanks, split="train"):
    """
    One puzzle with exactly one solution: Task(kind='sudoku', train=[], test=[(puzzle, answer)]), grids np.uint8 (size, size).
    size 4: the answer is drawn from sudoku4_grids(split), so the two splits share no answer. size 9: the answer is a random filled
    grid by backtracking with digits in shuffled order; there are 6.7e21, so `split` only names what it is for. Cells are blanked in
    random order, skipping those that would allow a second solution. ValueError for a size, split or number of blanks that cannot be.
    """
    if size not in MAX_BLANKS:
        raise ValueError(f"sudoku size {size} is not offered: it is 4 or 9")
    if not 1 <= blanks <= MAX_BLANKS[size]:
        raise ValueError(f"{blanks} blanks in a {size}x{size} sudoku: it takes 1 to {MAX_BLANKS[size]}")
    grids = sudoku4_grids(split)  # also for 9x9: a misspelt split is refused there too
    everything = all_sudoku4().reshape(288, 16)
    while True:  # some grids cannot spare this many cells in this order; another draw can
        if size == 4:
            answer = grids[rng.integers(len(grids))]
            agrees = everything == answer.reshape(16)  # uniqueness is a look at all 288 grids: (288, 16)
        else:
            answer = solve_sudoku(np.zeros((9, 9), np.uint8), limit=1, rng=rng)[0][0]
        puzzle = answer.copy()
        left = blanks
        for cell in rng.permutation(size * size).tolist():
            kept, puzzle.flat[cell] = puzzle.flat[cell], 0
            n = agrees[:, puzzle.reshape(-1) > 0].all(1).sum() if size == 4 else len(solve_sudoku(puzzle)[0])
            if n != 1:
                puzzle.flat[cell] = kept
                continue
            left -= 1
            if not left:
                return Task(id=f"sudoku{size}", kind="sudoku", train=[], test=[(puzzle, answer.copy())])


def check_sudoku(puzzle, answer):
    """True if `answer` fills `puzzle`: same size, givens kept, each row, column and box holds every digit once. Does not solve."""
    puzzle, answer = np.asarray(puzzle), np.asarray(answer)
    if puzzle.shape != answer.shape or puzzle.shape not in ((4, 4), (9, 9)):
        return False
    size, box = len(puzzle), math.isqrt(len(puzzle))
    digits = set(range(1, size + 1))
    boxes = answer.reshape(box, box, box, box).swapaxes(1, 2).reshape(size, size)
    lines = [*answer.tolist(), *answer.T.tolist(), *boxes.tolist()]
    return all(set(line) == digits for line in lines) and bool(np.all((puzzle == 0) | (puzzle == answer)))


def shuffled(rng, *grids):
    """9x9 grids (0 is a blank), all seen through the same random symmetry of sudoku."""
    digits = np.concatenate([[0], rng.permutation(9) + 1]).astype(np.uint8)
    rows, columns = (
        np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)]) for _ in range(2)
    )
    turn = rng.integers(2)
    return [np.ascontiguousarray(digits[(grid.T if turn else grid)[rows][:, columns]]) for grid in grids]
