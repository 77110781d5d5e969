"""
Procedural tasks with verified answers: sudoku, mazes, grid programs in the style of ARC, arithmetic word problems.

    python puzzles.py sudoku4 --n=3        print three held-out puzzles, their answers, and whether they verify
    python puzzles.py --help

Every generator takes a np.random.Generator and nothing else decides what comes out. Every answer has a checker written
another way round than the generator: sudoku by looking at rows, columns and boxes, not by solving; mazes by counting
shortest paths layer by layer, not by following parents; arithmetic by parsing the finished text. A transform is checked by
reading its program back from the task's id and running it on every input.

What is never trained on: the grids in SUDOKU4_HELD_OUT, and the puzzles that heldout() lists (compare with task_hash()).

Next: arc.py (how a task becomes tokens), prepare.py (how these puzzles become shards), eval_arc.py (how they are scored).
"""
import argparse
import ast
import difflib
import functools
import hashlib
import itertools
import math
import operator
import re
import sys
from collections import Counter
from fractions import Fraction

import numpy as np

import arc
from arc import Task

SUITES = ("sudoku4", "sudoku9", "maze", "transforms")
HELD_OUT_N = {"sudoku4": 100, "sudoku9": 50, "maze": 50, "transforms": 50}
HELD_OUT_SEED = {"sudoku4": 4004, "sudoku9": 9009, "maze": 7007, "transforms": 1234}    # changing one changes what was measured
MAX_BLANKS = {4: 12, 9: 54}     # 4 givens are the fewest for 4x4; 9x9 goes to 64, but digging past 54 takes long

# ---------------------------------------------------------------------------------------------------------------------
# Sudoku: 0 is a blank

def _sudoku_size(grid):
    grid = np.asarray(grid)
    if grid.shape not in ((4, 4), (9, 9)):
        raise ValueError(f"a sudoku is 4x4 or 9x9, this one has shape {grid.shape}")
    if grid.min() < 0 or grid.max() > len(grid):
        raise ValueError(f"a {len(grid)}x{len(grid)} sudoku holds 0 (blank) to {len(grid)}, this one holds {grid.min()} to {grid.max()}")
    return len(grid), math.isqrt(len(grid))


def solve_sudoku(grid, limit=2, rng=None):
    """
    Solutions of a (4, 4) or (9, 9) grid, at most `limit` of them, as np.uint8 grids; [] when there are none.
    limit=2 is what it takes to know whether a solution is the only one. With an rng, digits are tried in random order.
    Backtracking on bitmasks (bit v-1 stands for digit v), most constrained cell first. ValueError if it is no sudoku.
    """
    size, box = _sudoku_size(grid)
    values = np.asarray(grid).tolist()
    rows, cols, boxes = ([(1 << size) - 1] * size for _ in range(3))     # digits that are still free
    blanks = []
    for r in range(size):
        for c in range(size):
            b = r // box * box + c // box
            if not values[r][c]:
                blanks.append((r, c, b))
                continue
            bit = 1 << values[r][c] - 1
            if not rows[r] & cols[c] & boxes[b] & bit:
                return []
            rows[r] ^= bit
            cols[c] ^= bit
            boxes[b] ^= bit
    solutions = []

    def search():
        if not blanks:
            solutions.append(np.array(values, np.uint8))
            return
        fewest = size + 1
        for i, (r, c, b) in enumerate(blanks):
            free = rows[r] & cols[c] & boxes[b]
            if free.bit_count() < fewest:
                best, candidates, fewest = i, free, free.bit_count()
                if fewest <= 1:
                    break
        r, c, b = blanks[best]
        blanks[best] = blanks[-1]
        blanks.pop()
        digits = [v for v in range(1, size + 1) if candidates >> v - 1 & 1]
        if rng is not None:
            rng.shuffle(digits)
        for v in digits:
            bit = 1 << v - 1
            values[r][c] = v
            rows[r] ^= bit
            cols[c] ^= bit
            boxes[b] ^= bit
            search()
            rows[r] ^= bit
            cols[c] ^= bit
            boxes[b] ^= bit
            if len(solutions) >= limit:
                break
        values[r][c] = 0
        blanks.append((r, c, b))

    search()
    return solutions


@functools.cache
def all_sudoku4():
    """The 288 filled 4x4 grids, np.uint8 (288, 4, 4), in lexicographic order, read-only (it is shared by all callers)."""
    grids = np.array(sorted(solve_sudoku(np.zeros((4, 4), np.uint8), limit=1000), key=lambda g: g.tobytes()))
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


SUDOKU4_HELD_OUT = _hold_out_sudoku4()      # indices into all_sudoku4()


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
    grids = sudoku4_grids(split)        # also for 9x9: a misspelt split is refused there too
    everything = all_sudoku4().reshape(288, 16)
    while True:     # some grids cannot spare this many cells in this order; another draw can
        if size == 4:
            answer = grids[rng.integers(len(grids))]
            agrees = everything == answer.reshape(16)      # uniqueness is a look at all 288 grids: (288, 16)
        else:
            answer = solve_sudoku(np.zeros((9, 9), np.uint8), limit=1, rng=rng)[0]
        puzzle = answer.copy()
        left = blanks
        for cell in rng.permutation(size * size).tolist():
            kept, puzzle.flat[cell] = puzzle.flat[cell], 0
            unique = agrees[:, puzzle.reshape(-1) > 0].all(1).sum() == 1 if size == 4 else len(solve_sudoku(puzzle)) == 1
            if not unique:
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


# ---------------------------------------------------------------------------------------------------------------------
# Mazes: 0 free, 1 wall, 2 start, 3 goal; in the answer 4 on the way

def _carve(rng, height, width):
    """Walls (height, width) of a maze: a random tree over every other cell, and in half of the mazes some walls knocked out."""
    walls = np.ones((height, width), bool)
    # with an even side one border is solid wall; which one is chance
    top, left = (0 if side % 2 else int(rng.integers(2)) for side in (height, width))
    rows, cols = (height + 1) // 2, (width + 1) // 2
    r, c = int(rng.integers(rows)), int(rng.integers(cols))
    seen = [[False] * cols for _ in range(rows)]
    seen[r][c] = True
    walls[top + 2 * r, left + 2 * c] = False
    stack = [(r, c)]
    chance = iter(rng.random(2 * rows * cols).tolist())     # one number per step forward or back, drawn at once for speed
    while stack:
        r, c = stack[-1]
        ways = [(y, x) for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if 0 <= y < rows and 0 <= x < cols and not seen[y][x]]
        if not ways:
            stack.pop()
            continue
        y, x = ways[int(next(chance) * len(ways))]
        seen[y][x] = True
        walls[top + 2 * y, left + 2 * x] = walls[top + r + y, left + c + x] = False     # the cell, and the wall on the way to it
        stack.append((y, x))
    if rng.random() < 0.5:
        walls &= rng.random((height, width)) > rng.uniform(0.05, 0.4)
    return walls


def _breadth_first(free, start, width):
    """Over flat cells (free: list of bool with a wall all around, `width` per row): distance, parent, and cells with two ways to them."""
    distance, parent, several, queue = {start: 0}, {start: None}, set(), [start]
    for cell in queue:
        for near in (cell - width, cell + width, cell - 1, cell + 1):
            if not free[near]:
                continue
            if near not in distance:
                distance[near], parent[near] = distance[cell] + 1, cell
                if cell in several:
                    several.add(near)
                queue.append(near)
            elif distance[near] == distance[cell] + 1:
                several.add(near)
    return distance, parent, several


def maze(rng, height, width):
    """
    Task(kind='maze', train=[], test=[(maze, answer)]), grids np.uint8 (height, width), sides 3..30. Half are trees, half have loops;
    in all of them the shortest way from start (2) to goal (3) is unique and has at least (height + width) / 2 steps.
    The answer is the same grid with the cells between start and goal as 4. ValueError for other sides.
    """
    if not (3 <= height <= 30 and 3 <= width <= 30):
        raise ValueError(f"a maze of {height}x{width} is not offered: sides go from 3 to 30")
    while True:
        walls = _carve(rng, height, width)
        free = (~np.pad(walls, 1, constant_values=True)).reshape(-1).tolist()
        cells = [i for i, is_free in enumerate(free) if is_free]
        start = cells[rng.integers(len(cells))]
        distance, parent, several = _breadth_first(free, start, width + 2)
        goals = [cell for cell, steps in distance.items() if 2 * steps >= height + width and cell not in several]
        if not goals:
            continue
        goal = goals[rng.integers(len(goals))]
        puzzle = np.pad(walls, 1).astype(np.uint8)
        puzzle.flat[start], puzzle.flat[goal] = 2, 3
        answer = puzzle.copy()
        cell = parent[goal]
        while cell != start:
            answer.flat[cell] = 4
            cell = parent[cell]
        return Task(id=f"maze{height}x{width}", kind="maze", train=[], test=[(puzzle[1:-1, 1:-1].copy(), answer[1:-1, 1:-1].copy())])


def check_maze(maze, answer):
    """
    True if the maze has exactly one shortest way from its start to its goal and `answer` marks it and nothing else. Counts shortest
    ways with whole-grid layers: the number of ways into a cell of layer d is the sum over its neighbours in layer d - 1.
    """
    maze, answer = np.asarray(maze), np.asarray(answer)
    if maze.ndim != 2 or maze.shape != answer.shape or (maze == 2).sum() != 1 or (maze == 3).sum() != 1 or maze.max() > 3:
        return False
    marked = answer == 4
    if (answer[~marked] != maze[~marked]).any() or (maze[marked] != 0).any():
        return False
    ways, unseen, steps = (maze == 2).astype(object), (maze != 1) & (maze != 2), 0      # Python integers: ways can outgrow 64 bits
    goal = maze == 3
    while unseen[goal][0]:
        around = np.pad(ways, 1)
        ways = (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]) * unseen
        layer = ways > 0
        if not layer.any():
            return False        # no way at all
        unseen &= ~layer
        steps += 1
        if not goal[layer].any() and (layer & marked).sum() != 1:
            return False        # the marked way has one cell in every layer
    if ways[goal][0] != 1 or marked.sum() != steps - 1:
        return False
    on_path = np.pad(marked | (maze == 2) | goal, 1).astype(int)
    neighbours = on_path[:-2, 1:-1] + on_path[2:, 1:-1] + on_path[1:-1, :-2] + on_path[1:-1, 2:]
    # one cell a layer, and the cells hang together in a line: a shortest way, hence the only one
    return bool((neighbours[marked] == 2).all() and neighbours[maze == 2][0] == 1 and neighbours[goal][0] == 1)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms: functions from a grid (np.uint8, values 0..9, 0 is the background) to a grid. They accept any grid of 3x3 or more.

def flip(grid, axis):
    return np.flip(grid, axis)


def rotate(grid, k):
    return np.rot90(grid, k)


def transpose(grid, anti):
    return np.rot90(grid, 2).T if anti else grid.T


def swap(grid, a, b):
    """Colours a and b change places."""
    colours = np.arange(10, dtype=np.uint8)
    colours[a], colours[b] = b, a
    return colours[grid]


def replace(grid, a, b):
    """Colour a becomes colour b."""
    return np.where(grid == a, np.uint8(b), grid)


def next_colour(grid, k):
    """1..9 taken as a circle, every colour moves k places on; the background stays."""
    return np.where(grid > 0, (grid + (k - 1)) % 9 + 1, 0).astype(np.uint8)


def roll(grid, dy, dx):
    """Everything moves, and what leaves on one side comes back on the other."""
    return np.roll(grid, (dy, dx), (0, 1))


def shift(grid, dy, dx):
    """Everything moves, and what leaves is lost."""
    out = np.zeros_like(grid)
    h, w = grid.shape
    out[max(dy, 0):h + min(dy, 0), max(dx, 0):w + min(dx, 0)] = grid[max(-dy, 0):h + min(-dy, 0), max(-dx, 0):w + min(-dx, 0)]
    return out


def crop(grid):
    """The smallest rectangle that holds every coloured cell."""
    rows, cols = np.nonzero(grid)
    return grid[rows.min():rows.max() + 1, cols.min():cols.max() + 1] if len(rows) else grid


def crop_colour(grid, a):
    """The smallest rectangle that holds every cell of colour a, with all that is in it."""
    rows, cols = np.nonzero(grid == a)
    return grid[rows.min():rows.max() + 1, cols.min():cols.max() + 1] if len(rows) else grid


def scale(grid, k):
    return grid.repeat(k, 0).repeat(k, 1)


def tile(grid, ny, nx):
    return np.tile(grid, (ny, nx))


def mirror(grid, side):
    """The grid and its mirror image, which is put on this side: 0 below, 1 right, 2 above, 3 left."""
    image = np.flip(grid, side % 2)
    return np.concatenate((grid, image) if side < 2 else (image, grid), side % 2)


def kaleidoscope(grid):
    """Mirrored to the right, then downwards: four times the grid."""
    return mirror(mirror(grid, 1), 0)


def gravity(grid, side):
    """Coloured cells fall to this side: 0 bottom, 1 right, 2 top, 3 left."""
    lines = grid.T if side % 2 == 0 else grid
    out = np.zeros_like(lines)
    for line, fallen in zip(lines, out, strict=True):
        cells = line[line > 0]
        if len(cells):
            fallen[slice(0, len(cells)) if side >= 2 else slice(-len(cells), None)] = cells
    return out.T if side % 2 == 0 else out


def border(grid, a):
    """The outermost cells are painted over with colour a."""
    out = grid.copy()
    out[[0, -1]] = a
    out[:, [0, -1]] = a
    return out


def frame(grid, a):
    """A ring of colour a is put around the grid."""
    return np.pad(grid, 1, constant_values=a)


def outline(grid, a):
    """Background cells that touch a coloured cell, corners too, become colour a."""
    full = np.pad(grid > 0, 1)
    tall = full[:-2] | full[1:-1] | full[2:]
    touched = tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]
    return np.where(touched & (grid == 0), np.uint8(a), grid)


def parts(mask):
    """The 4-connected parts of a boolean grid, in reading order of their first cell, each a list of (row, column)."""
    h, w = mask.shape
    left = {(r, c) for r, c in zip(*np.nonzero(mask), strict=True)}
    parts = []
    for r in range(h):
        for c in range(w):
            if (r, c) not in left:
                continue
            left.remove((r, c))
            part = [(r, c)]
            for y, x in part:
                for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if near in left:
                        left.remove(near)
                        part.append(near)
            parts.append(part)
    return parts


def one_object(grid, choose):
    """The object whose number of cells `choose`, max or min, picks, alone."""
    out = np.zeros_like(grid)
    for r, c in choose(parts(grid > 0), key=len, default=[]):
        out[r, c] = grid[r, c]
    return out


def largest(grid):
    """Only the largest object is kept (cells that touch by a side, of whatever colour; the first in reading order if two are as large)."""
    return one_object(grid, max)


def fill_enclosed(grid, a):
    """Background cells with no way to the edge over background cells (by sides) become colour a."""
    out = grid.copy()
    h, w = grid.shape
    for part in parts(grid == 0):
        if all(0 < r < h - 1 and 0 < c < w - 1 for r, c in part):
            for r, c in part:
                out[r, c] = a
    return out


def rays(grid, side):
    """Every coloured cell draws a line in its colour towards one side (0 down, 1 right, 2 up, 3 left), up to the next coloured cell."""
    turns = (3, 0, 1, 2)[side]              # turned so that lines run to the right
    out = np.rot90(grid, -turns).copy()
    for c in range(1, out.shape[1]):
        out[:, c] = np.where(out[:, c] == 0, out[:, c - 1], out[:, c])
    return np.rot90(out, turns)


def connect(grid, axis):
    """Background cells between two neighbouring coloured cells of the same colour in a column (0) or row (1) take that colour."""
    out = grid.copy() if axis else grid.T.copy()
    for line in out:
        at = np.flatnonzero(line)
        for i, j in itertools.pairwise(at.tolist()):
            if line[i] == line[j]:
                line[i:j] = line[i]
    return out if axis else out.T


def count_bars(grid, axis):
    """A bar per colour, as long as the colour has cells, longest first (then the lower colour), as rows (1) or as columns (0)."""
    counts = np.bincount(grid.reshape(-1), minlength=10)
    counts[0] = 0
    order = [c for c in sorted(range(1, 10), key=lambda c: (-counts[c], c)) if counts[c]]
    out = np.zeros((max(len(order), 1), max(counts.max(), 1)), np.uint8)
    for bar, c in zip(out, order, strict=False):
        bar[:counts[c]] = c
    return out if axis else out.T


def halves(grid, op, axis, a):
    """
    Two halves beside each other (axis 1) or above each other (axis 0) with one separating line; cell by cell the result is colour a
    where op holds: 0 both halves coloured, 1 at least one, 2 exactly one, 3 none.
    """
    lines = grid if axis == 0 else grid.T
    n = (len(lines) - 1) // 2
    first, second = lines[:n] > 0, lines[-n:] > 0
    on = (first & second, first | second, first ^ second, ~(first | second))[op]
    out = on.astype(np.uint8) * np.uint8(a)
    return out if axis == 0 else out.T


def sort_lines(grid, axis, descending):
    """Rows (axis 0) or columns (1) in the order of how many coloured cells they have; equals keep their order."""
    counts = (grid > 0).sum(1 - axis).astype(int)
    return np.take(grid, np.argsort(-counts if descending else counts, kind="stable"), axis)


def symmetric(grid, axis):
    """Background cells take the colour of their mirror image."""
    return np.where(grid > 0, grid, np.flip(grid, axis))


def squeeze(grid):
    """Rows and columns that are all background are taken out."""
    out = grid[(grid > 0).any(1)][:, (grid > 0).any(0)]
    return out if out.size else grid


def commonest(grid, least):
    """The grid filled with its commonest colour, or its rarest (background not counted; the lower colour if two are as common)."""
    colours, counts = np.unique(grid[grid > 0], return_counts=True)
    if not len(colours):
        return grid
    return np.full_like(grid, colours[counts.argmin() if least else counts.argmax()])


# Inputs. Each maker takes (rng, params) and returns a grid on which the parameters can show; transform() draws again where they do not.

def size_of(rng, low, high):
    return int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))


def colours_of(rng, n, avoid=()):
    return rng.permutation([c for c in range(1, 10) if c not in avoid])[:n].astype(np.uint8)


def scattered(rng, params, low=3, high=8):
    """Two to four colours at random on the background; colours that the parameters name are among them."""
    named = [params[k] for k in ("a", "b") if params.get(k)]
    colours = np.array([*named, *colours_of(rng, int(rng.integers(2, 5)) - len(named), avoid=named)], np.uint8)
    shape = size_of(rng, low, high)
    return np.where(rng.random(shape) < rng.uniform(0.25, 0.7), colours[rng.integers(len(colours), size=shape)], np.uint8(0))


def scattered_small(rng, params):
    return scattered(rng, params, 3, 4)


def scattered_medium(rng, params):
    return scattered(rng, params, 3, 6)


def few_cells(rng, params):
    """Three to seven coloured cells, of two colours, on the background."""
    grid = np.zeros(size_of(rng, 4, 8), np.uint8)
    n = int(rng.integers(3, 8))
    grid.flat[rng.permutation(grid.size)[:n]] = colours_of(rng, 2)[rng.integers(2, size=n)]
    return grid


def pairs_of_cells(rng, params):
    """One to four pairs of cells of one colour each, most of them in the same column (axis 0) or row (axis 1), some astray."""
    grid = np.zeros(size_of(rng, 4, 8), np.uint8)
    h, w = grid.shape
    for colour in colours_of(rng, int(rng.integers(1, 5))):
        line = int(rng.integers(h))
        i, j = rng.permutation(w)[:2]
        grid[line, i] = colour
        grid[line if rng.random() < 0.8 else rng.integers(h), j] = colour
    return grid if params["axis"] else grid.T


def rectangles(rng, params):
    """Up to four rectangles with a missing cell here and there, apart from each other."""
    grid = np.zeros(size_of(rng, 5, 8), np.uint8)
    h, w = grid.shape
    for colour in colours_of(rng, int(rng.integers(1, 5)), avoid=[params.get("a")]):
        y, x = size_of(rng, 1, 3)
        r, c = int(rng.integers(h - y + 1)), int(rng.integers(w - x + 1))
        if not grid[max(r - 1, 0):r + y + 1, max(c - 1, 0):c + x + 1].any():
            grid[r:r + y, c:c + x] = np.where(rng.random((y, x)) < 0.85, colour, np.uint8(0))
    return grid


def with_one_largest(rng, params):
    """rectangles() of which one object has more cells than any other."""
    while True:
        grid = rectangles(rng, params)
        sizes = sorted(len(part) for part in parts(grid > 0))
        if len(sizes) > 1 and sizes[-1] > sizes[-2]:
            return grid


def rings(rng, params):
    """One to three rectangular rings, some of them open, and a few loose cells."""
    grid = np.zeros(size_of(rng, 5, 8), np.uint8)
    h, w = grid.shape
    for colour in colours_of(rng, int(rng.integers(1, 4)), avoid=[params["a"]]):
        y, x = size_of(rng, 3, 4)
        r, c = int(rng.integers(h - y + 1)), int(rng.integers(w - x + 1))
        if not grid[r:r + y, c:c + x].any():
            grid[r:r + y, c:c + x] = colour
            grid[r + 1:r + y - 1, c + 1:c + x - 1] = 0
            if rng.random() < 0.25:
                grid[r, c + 1] = 0
    return grid


def counted(rng, params):
    """Two to four colours, each with another number of cells, 1..8."""
    grid = np.zeros(size_of(rng, 4, 8), np.uint8)
    n = int(rng.integers(2, 5))
    counts = rng.permutation(min(8, grid.size // n))[:n] + 1
    grid.flat[rng.permutation(grid.size)[:counts.sum()]] = colours_of(rng, n).repeat(counts)
    return grid


def two_halves(rng, params):
    """Two grids of the same size and one colour each, with a line of a third between them."""
    h, w = int(rng.integers(1, 4)), int(rng.integers(3, 7))
    first, second, line = colours_of(rng, 3, avoid=[params["a"]])
    top = (rng.random((h, w)) < 0.5) * first
    bottom = (rng.random((h, w)) < 0.5) * second
    grid = np.concatenate([top, np.full((1, w), line), bottom]).astype(np.uint8)
    return grid if params["axis"] == 0 else grid.T


def uneven_lines(rng, params):
    """Every row (axis 0) or column (axis 1) has another number of coloured cells and its own colour."""
    n = int(rng.integers(3, 6))
    w = int(rng.integers(n, 9))
    grid = np.zeros((n, w), np.uint8)
    for line, count, colour in zip(grid, rng.permutation(w)[:n] + 1, colours_of(rng, n), strict=True):
        line[rng.permutation(w)[:count]] = colour
    return grid if params["axis"] == 0 else grid.T


def settings_of(**ranges):
    """Every combination, as a list of dicts."""
    combinations = [{}]
    for name, values in ranges.items():
        combinations = [{**done, name: v} for done in combinations for v in values]
    return combinations


COLOURS = range(1, 10)

# name: (every setting of the parameters, the function, what makes an input). Settings are listed in full and not sampled, because
# transform() runs the others too, to see that the demonstrations leave only one answer.
TRANSFORMS = {
    "flip": (settings_of(axis=(0, 1)), flip, scattered),
    "rotate": (settings_of(k=(1, 2, 3)), rotate, scattered),
    "transpose": (settings_of(anti=(0, 1)), transpose, scattered),
    "swap": ([p for p in settings_of(a=COLOURS, b=COLOURS) if p["a"] < p["b"]], swap, scattered),
    "replace": ([p for p in settings_of(a=COLOURS, b=range(10)) if p["a"] != p["b"]], replace, scattered),
    "next_colour": (settings_of(k=range(1, 9)), next_colour, scattered),
    "roll": ([p for p in settings_of(dy=range(-2, 3), dx=range(-2, 3)) if p["dy"] or p["dx"]], roll, scattered),
    "shift": ([p for p in settings_of(dy=range(-2, 3), dx=range(-2, 3)) if p["dy"] or p["dx"]], shift, scattered),
    "crop": (settings_of(), crop, rectangles),
    "crop_colour": (settings_of(a=COLOURS), crop_colour, scattered),
    "scale": (settings_of(k=(2, 3)), scale, scattered_small),
    "tile": ([p for p in settings_of(ny=(1, 2, 3), nx=(1, 2, 3)) if p["ny"] * p["nx"] > 1], tile, scattered_small),
    "mirror": (settings_of(side=range(4)), mirror, scattered_medium),
    "kaleidoscope": (settings_of(), kaleidoscope, scattered_medium),
    "gravity": (settings_of(side=range(4)), gravity, scattered),
    "border": (settings_of(a=COLOURS), border, scattered),
    "frame": (settings_of(a=COLOURS), frame, scattered),
    "outline": (settings_of(a=COLOURS), outline, rectangles),
    "largest": (settings_of(), largest, with_one_largest),
    "fill_enclosed": (settings_of(a=COLOURS), fill_enclosed, rings),
    "rays": (settings_of(side=range(4)), rays, few_cells),
    "connect": (settings_of(axis=(0, 1)), connect, pairs_of_cells),
    "count_bars": (settings_of(axis=(0, 1)), count_bars, counted),
    "halves": (settings_of(op=range(4), axis=(0, 1), a=COLOURS), halves, two_halves),
    "sort_lines": (settings_of(axis=(0, 1), descending=(0, 1)), sort_lines, uneven_lines),
    "symmetric": (settings_of(axis=(0, 1)), symmetric, rectangles),
    "squeeze": (settings_of(), squeeze, few_cells),
    "commonest": (settings_of(least=(0, 1)), commonest, counted),
}


def same(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()     # several times faster than np.array_equal on grids this small


def _ambiguous(demos, test):
    """True if some program in TRANSFORMS explains every demonstration and gives another answer to the test."""
    first = demos[0]
    for settings, apply, _ in TRANSFORMS.values():
        for params in settings:
            if not same(apply(first[0], **params), first[1]):      # most programs end here, so this line is most of the time
                continue
            if all(same(apply(x, **params), y) for x, y in demos) and not same(apply(test[0], **params), test[1]):
                return True
    return False


def transform(rng):
    """
    One task of one program out of TRANSFORMS: Task(kind='arc', train=[2..4 pairs], test=[one pair]), inputs with sides 3..8, outputs up
    to 12. The id is the program: its name, then each parameter as key=integer, with colons between: 'roll:dy=1:dx=-2', 'crop'.
    In every pair the output differs from the input and is not blank, and no other program in TRANSFORMS explains the demonstrations and
    gives another answer.
    """
    name = list(TRANSFORMS)[rng.integers(len(TRANSFORMS))]
    settings, apply, make_input = TRANSFORMS[name]
    params = settings[rng.integers(len(settings))]
    while True:
        inputs = [np.ascontiguousarray(make_input(rng, params)) for _ in range(int(rng.integers(3, 6)))]
        pairs = [(x, np.ascontiguousarray(apply(x, **params))) for x in inputs]
        if any(same(x, y) or not y.any() for x, y in pairs) or len({(x.shape, x.tobytes()) for x in inputs}) < len(inputs):
            continue
        if not _ambiguous(pairs[:-1], pairs[-1]):
            return Task(id=":".join([name, *(f"{k}={v}" for k, v in params.items())]), kind="arc", train=pairs[:-1], test=pairs[-1:])


def program_of(task_id):
    """'roll:dy=1:dx=-2', also behind a number as in 'transforms-0007:roll:dy=1:dx=-2' -> ('roll', {'dy': 1, 'dx': -2}). Else ValueError."""
    name, *settings = re.sub(r"^transforms-\d+:", "", task_id).split(":")
    fields = [re.fullmatch(r"(\w+)=(-?\d+)", setting) for setting in settings]
    params = {field[1]: int(field[2]) for field in fields if field}
    if name not in TRANSFORMS or not all(fields) or params not in TRANSFORMS[name][0]:
        raise ValueError(f"{task_id!r} names no program: a name in TRANSFORMS and its parameters, like 'roll:dy=1:dx=-2'")
    return name, params


def check_transform(task):
    """True if the program that the task's id names turns every input of the task into its output."""
    try:
        name, params = program_of(task.id)
    except ValueError:
        return False
    return all(np.array_equal(TRANSFORMS[name][1](x, **params), y) for x, y in task.train + task.test)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic word problems. In a template {a} is a number, {A} and {B} are people, {things} is what it is about; in the solution
# [a * b] is a step, which will read "3 * 4 = 12", and s1, s2 are the results of the steps before. Every number of the question is
# written in digits and used once, and no other number is: so check_arithmetic() can hold the solution against the question.

NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mateo", "Nia", "Omar", "Petra",
         "Ravi", "Sofia", "Tomas", "Uma", "Viktor", "Wanjiru", "Yuki", "Zoe")
THINGS = ("apples", "marbles", "stickers", "pencils", "shells", "buttons", "cards", "coins", "beads", "stamps", "cookies", "tickets",
          "plums", "postcards", "nails", "eggs", "lemons", "balloons")

# (largest number, question, solution); numbers are drawn from 2 to the largest, again if a step is not a whole number above 1
TEMPLATES = (
    (99, "{A} has {a} {things}. {B} gives {A} {b} more. How many {things} does {A} have now?",
     "Together that makes [a + b] {things}."),
    (99, "{A} has {a} {things} and gives {b} of them to {B}. How many {things} does {A} have left?",
     "What is left is [a - b] {things}."),
    (20, "There are {a} boxes with {b} {things} in each. How many {things} are there in all?",
     "The boxes hold [a * b] {things}."),
    (144, "{A} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
     "Each friend gets [a / b] {things}."),
    (12, "{A} buys {a} bags with {b} {things} in each and loses {c} {things} on the way home. How many {things} are left?",
     "The bags hold [a * b] {things}. After the loss there are [s1 - c] {things}."),
    (12, "{A} puts {a} {things} on each of {b} tables. {B} brings {c} more {things}. How many {things} are there now?",
     "On the tables there are [a * b] {things}. With those of {B} there are [s1 + c] {things}."),
    (60, ("{A} has {a} {things} and {B} has {b}. They put them together and share them equally among {c} children. "
          "How many {things} does each child get?"),
     "Together they have [a + b] {things}. Each child gets [s1 / c] {things}."),
    (15, "One ticket costs {a} dollars. {A} buys {b} tickets and {B} buys {c}. How many dollars do they pay together?",
     "They buy [b + c] tickets. That costs [s1 * a] dollars."),
    (90, "A train has {a} passengers. At the first stop {b} get off and {c} get on. How many passengers are on the train then?",
     "After {b} get off there are [a - b] passengers. Then there are [s1 + c] passengers."),
    (12, "{A} reads {a} pages a day for {b} days, and {B} reads {c} pages a day for {d} days. How many pages do they read together?",
     "{A} reads [a * b] pages. {B} reads [c * d] pages. Together that is [s1 + s2] pages."),
    (14, "A hall has {a} rows of {b} seats and {c} rows of {d} seats. {e} seats are taken. How many seats are free?",
     "The first rows have [a * b] seats. The other rows have [c * d] seats. There are [s1 + s2] seats. [s3 - e] seats are free."),
    (99, ("{A} had some {things}. After giving {a} to {B} and finding {b} others, {A} has {c}. "
          "How many {things} did {A} have at the start?"),
     "Before finding {b} there were [c - b] {things}. Before giving {a} away there were [s1 + a] {things}."),
    (20, ("{A} earns {a} dollars an hour and works {b} hours. Then {A} spends {c} dollars on food and {d} dollars on a book. "
          "How many dollars are left?"),
     "{A} earns [a * b] dollars. Food and book cost [c + d] dollars. There are [s1 - s2] dollars left."),
    (15, "A floor is {a} meters long and {b} meters wide. One square meter of tiles costs {c} dollars. How many dollars do the tiles cost?",
     "The floor has [a * b] square meters. The tiles cost [s1 * c] dollars."),
    (12, "A baker makes {a} trays with {b} rolls each and packs the rolls into bags of {c}. How many bags are filled?",
     "There are [a * b] rolls. They fill [s1 / c] bags."),
    (80, "{A} is {a} years old and {B} is {b} years younger. How old will {B} be in {c} years?",
     "{B} is [a - b] years old. In {c} years {B} will be [s1 + c]."),
    (12, ("{A} collects {a} {things} on each of {b} days, and then gives {c} of them to each of {d} friends. "
          "How many {things} does {A} keep?"),
     "{A} collects [a * b] {things}. The friends get [c * d] {things}. {A} keeps [s1 - s2] {things}."),
    (60, ("A tank holds {a} liters. Each minute {b} liters flow in and {c} liters flow out. It is empty at first. "
          "After how many minutes is it full?"),
     "Each minute [b - c] liters stay. The tank is full after [a / s1] minutes."),
    (30, "{A} saves {a} dollars a week and {B} saves {b} dollars a week. How many dollars more than {B} has {A} after {c} weeks?",
     "Each week {A} saves [a - b] dollars more. After {c} weeks that is [s1 * c] dollars."),
)
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": lambda a, b: Fraction(a, b) if b else -1}   # -1: draw again


def _work_out(solution, numbers):
    """-> the solution with its steps written as equations, and the results of the steps (a Fraction where it does not divide)."""
    values, results = dict(numbers), []

    def step(match):
        left, sign, right = values[match[1]], match[2], values[match[3]]
        results.append(_OPERATORS[sign](left, right))
        values[f"s{len(results)}"] = results[-1]
        return f"{left} {sign} {right} = {results[-1]}"

    return re.sub(r"\[(\w+) ([-+*/]) (\w+)\]", step, solution), results


def arithmetic(rng):
    """-> (text, answer): a question, its solution step by step, and a last line like 'Answer: 42'. The answer is an int above 1."""
    largest_number, question, solution = TEMPLATES[rng.integers(len(TEMPLATES))]
    people = rng.permutation(len(NAMES))
    words = {"A": NAMES[people[0]], "B": NAMES[people[1]], "things": THINGS[rng.integers(len(THINGS))]}
    letters = sorted(set(re.findall(r"{([a-z])}", question)))
    while True:
        numbers = dict(zip(letters, rng.integers(2, largest_number + 1, size=len(letters)).tolist(), strict=True))
        worked, results = _work_out(solution, numbers)
        if all(result > 1 and result == int(result) for result in results):
            answer = int(results[-1])
            return f"Question: {question}\nSolution: {worked}\nAnswer: {answer}".format(**words, **numbers), answer


def _value(node):
    """The exact value of a parsed expression of whole numbers and + - * /; ValueError for anything else."""
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div() if right:
                return left / right
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    raise ValueError("not arithmetic")


def check_arithmetic(text):
    """
    True if every equation in the text holds, the last line states the last result, and the solution is about this question: each number
    of the question and each result before the last goes into exactly one equation, and no other number does; numbers beside the equations
    are numbers of the question. Reads the text alone and knows no template.
    """
    parts = re.fullmatch(r"Question: (.+)\nSolution: (.+)\nAnswer: (\d+)\n?", text)
    if not parts:
        return False
    question, solution, answer = parts.groups()
    equation = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)\b")
    beside = equation.sub("", solution)
    asked = re.findall(r"\d+", question)
    if "=" in beside or not set(asked).issuperset(re.findall(r"\d+", beside)):
        return False
    waiting, result = Counter(asked), None      # numbers that still have to go into an equation
    for expression, result in equation.findall(solution):
        try:
            if _value(ast.parse(expression, mode="eval").body) != int(result):
                return False
        except (ValueError, SyntaxError):
            return False
        waiting.subtract(re.findall(r"\d+", expression))
        if min(waiting.values()) < 0:
            return False
        waiting[result] += 1
    return result == answer and waiting.total() == 1


# ---------------------------------------------------------------------------------------------------------------------
# The fixed evaluation suites

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
    The first n tasks of a fixed list of distinct ones (default HELD_OUT_N[suite]), so a longer list begins with the shorter one. sudoku4:
    6 blanks, answers from SUDOKU4_HELD_OUT alone; sudoku9: 30 blanks; maze: 7x7; transforms. Ids are 'maze-0007', for transforms
    'transforms-0007:roll:dy=1:dx=-2'. ValueError for an unknown suite or a negative n.
    """
    if suite not in SUITES:
        close = difflib.get_close_matches(str(suite), SUITES, n=1, cutoff=0)[0]
        raise ValueError(f"unknown suite {suite!r}; did you mean {close!r}? There are {', '.join(SUITES)}")
    n = HELD_OUT_N[suite] if n is None else n
    if n < 0:
        raise ValueError(f"{n} puzzles cannot be made: n is 0 or more")
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
            return check_sudoku(puzzle, answer) and len(solve_sudoku(puzzle)) == 1
        case "maze":
            return check_maze(puzzle, answer)
        case "arc":
            return check_transform(task)
    raise ValueError(f"no checker for tasks of kind {task.kind!r}: there are sudoku, maze, arc")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}; see python puzzles.py --help")
    parser.add_argument("suite", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--n", type=int, default=3, help="how many (default 3)")
    args = parser.parse_args()
    try:
        tasks = heldout(args.suite, args.n)
    except ValueError as e:
        sys.exit(f"error: {e}")
    right = 0
    for task in tasks:
        good = check(task)
        right += good
        print(f"{task.id}   {'verified' if good else 'WRONG'}")
        for i, (x, y) in enumerate(task.train, 1):
            print(arc.ansi_row([(f"demo {i}", x, None), ("output", y, None)]))
        for x, y in task.test:
            print(arc.ansi_row([("test" if task.train else "puzzle", x, None), ("answer", y, None)]))
            if task.kind == "sudoku":       # in digits too: nobody reads a sudoku by colours
                for given, full in zip(x, y, strict=True):
                    print(" ".join(str(v or ".") for v in given), "   ", " ".join(map(str, full)))
        print()
    print(f"{right} of {len(tasks)} verified")
    if right < len(tasks):
        sys.exit(1)


if __name__ == "__main__":
    main()
