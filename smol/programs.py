"""
Grid programs: a language of functions from a grid to a grid, families of tasks written in it, and traces of the programs at work.

The functions take any grid of 3x3 or more (np.uint8, values 0..9, 0 is the background). A program is a list of steps, each a function
of the language with its parameters, and reads as Python:

    def solve(grid):
        grid = crop(grid)
        grid = replace(grid, a=3, b=5)
        return grid

A family is a sequence of slots, each of which one of several functions may fill; its level is the number of steps. task() draws a family,
a program and inputs, so that every step does something and no single function of the language explains the demonstrations in another
way; transform() draws a task of one of the functions in TRANSFORMS. trace() writes a task as text: demonstrations, test input, program,
often also the grid after every step, answer. run() reads a program from its text and executes it, and what it finds is compared with the
task, for every task that is handed out.

Read next: puzzles.py, the suites that are evaluated on; sources.py, which gives these a share of a stage.
"""

import ast
import difflib
import functools
import itertools
import re

import numpy as np

from smol import arc
from smol import tokenizer as tok
from smol.arc import Task

# -----------------------------------------------------------------------------
# transforms


def flip(grid, axis):
    """Upside down (axis 0) or left to right (1)."""
    return np.flip(grid, axis)


def rotate(grid, k):
    """k quarter turns counter-clockwise."""
    return np.rot90(grid, k)


def transpose(grid, anti):
    """Rows become columns: mirrored at the diagonal from the top left, or (anti=1) from the top right."""
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
    out[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = grid[
        max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def crop(grid):
    """The smallest rectangle that holds every coloured cell."""
    rows, cols = np.nonzero(grid)
    return grid[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] if len(rows) else grid


def crop_colour(grid, a):
    """The smallest rectangle that holds every cell of colour a, with all that is in it."""
    rows, cols = np.nonzero(grid == a)
    return grid[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] if len(rows) else grid


def scale(grid, k):
    """Every cell becomes k x k cells."""
    return grid.repeat(k, 0).repeat(k, 1)


def tile(grid, ny, nx):
    """The grid ny times below itself and nx times beside itself."""
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
    turns = (3, 0, 1, 2)[side]  # turned so that lines run to the right
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
        bar[: counts[c]] = c
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
    colours = np.array(
        [*named, *colours_of(rng, int(rng.integers(2, 5)) - len(named), avoid=named)], np.uint8
    )
    shape = size_of(rng, low, high)
    return np.where(
        rng.random(shape) < rng.uniform(0.25, 0.7),
        colours[rng.integers(len(colours), size=shape)],
        np.uint8(0),
    )


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
        if not grid[max(r - 1, 0) : r + y + 1, max(c - 1, 0) : c + x + 1].any():
            grid[r : r + y, c : c + x] = np.where(rng.random((y, x)) < 0.85, colour, np.uint8(0))
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
        if not grid[r : r + y, c : c + x].any():
            grid[r : r + y, c : c + x] = colour
            grid[r + 1 : r + y - 1, c + 1 : c + x - 1] = 0
            if rng.random() < 0.25:
                grid[r, c + 1] = 0
    return grid


def counted(rng, params):
    """Two to four colours, each with another number of cells, 1..8."""
    grid = np.zeros(size_of(rng, 4, 8), np.uint8)
    n = int(rng.integers(2, 5))
    counts = rng.permutation(min(8, grid.size // n))[:n] + 1
    grid.flat[rng.permutation(grid.size)[: counts.sum()]] = colours_of(rng, n).repeat(counts)
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
    "roll": (
        [p for p in settings_of(dy=range(-2, 3), dx=range(-2, 3)) if p["dy"] or p["dx"]],
        roll,
        scattered,
    ),
    "shift": (
        [p for p in settings_of(dy=range(-2, 3), dx=range(-2, 3)) if p["dy"] or p["dx"]],
        shift,
        scattered,
    ),
    "crop": (settings_of(), crop, rectangles),
    "crop_colour": (settings_of(a=COLOURS), crop_colour, scattered),
    "scale": (settings_of(k=(2, 3)), scale, scattered_small),
    "tile": (
        [p for p in settings_of(ny=(1, 2, 3), nx=(1, 2, 3)) if p["ny"] * p["nx"] > 1],
        tile,
        scattered_small,
    ),
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
    return (
        a.shape == b.shape and a.tobytes() == b.tobytes()
    )  # several times faster than np.array_equal on grids this small


def _ambiguous(demos, test):
    """True if some program in TRANSFORMS explains every demonstration and gives another answer to the test."""
    first = demos[0]
    for settings, apply, _ in TRANSFORMS.values():
        for params in settings:
            if not same(
                apply(first[0], **params), first[1]
            ):  # most programs end here, so this line is most of the time
                continue
            if all(same(apply(x, **params), y) for x, y in demos) and not same(
                apply(test[0], **params), test[1]
            ):
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
        if any(same(x, y) or not y.any() for x, y in pairs) or len(
            {(x.shape, x.tobytes()) for x in inputs}
        ) < len(inputs):
            continue
        if not _ambiguous(pairs[:-1], pairs[-1]):
            return Task(
                id=":".join([name, *(f"{k}={v}" for k, v in params.items())]),
                kind="arc",
                train=pairs[:-1],
                test=pairs[-1:],
            )


def program_of(task_id):
    """'roll:dy=1:dx=-2', also behind a number as in 'transforms-0007:roll:dy=1:dx=-2' -> ('roll', {'dy': 1, 'dx': -2}). Else ValueError."""
    name, *settings = re.sub(r"^transforms-\d+:", "", task_id).split(":")
    fields = [re.fullmatch(r"(\w+)=(-?\d+)", setting) for setting in settings]
    params = {field[1]: int(field[2]) for field in fields if field}
    if name not in TRANSFORMS or not all(fields) or params not in TRANSFORMS[name][0]:
        raise ValueError(
            f"{task_id!r} names no program: a name in TRANSFORMS and its parameters, like 'roll:dy=1:dx=-2'"
        )
    return name, params


def check_transform(task):
    """True if the program that the task's id names turns every input of the task into its output."""
    try:
        name, params = program_of(task.id)
    except ValueError:
        return False
    return all(np.array_equal(TRANSFORMS[name][1](x, **params), y) for x, y in task.train + task.test)


# -----------------------------------------------------------------------------
# more functions


INTERMEDIATE = 0.5  # share of the traces that show the grid after every step

# the language: functions from a grid (np.uint8, 0 is the background) to a grid; an object is a set of coloured cells that touch by sides


def keep(grid, a):
    """Only colour a stays."""
    return np.where(grid == a, grid, np.uint8(0))


def negative(grid, a):
    """Background becomes colour a, and what was coloured becomes background."""
    return np.where(grid > 0, np.uint8(0), np.uint8(a))


def paint(grid, a):
    """Every coloured cell becomes colour a."""
    return np.where(grid > 0, np.uint8(a), grid)


def hollow(grid):
    """A coloured cell whose four neighbours are coloured too becomes background."""
    full = np.pad(grid > 0, 1)
    inside = full[:-2, 1:-1] & full[2:, 1:-1] & full[1:-1, :-2] & full[1:-1, 2:]
    return np.where(inside, np.uint8(0), grid)


def grow(grid):
    """Background cells take the colour of a neighbour by side: the one above, else left, right, below."""
    edge = np.pad(grid, 1)
    out = grid.copy()
    for near in (edge[:-2, 1:-1], edge[1:-1, :-2], edge[1:-1, 2:], edge[2:, 1:-1]):
        out = np.where(out == 0, near, out)
    return out


def smallest(grid):
    """Only the smallest object stays (the first in reading order if two are as small)."""
    return one_object(grid, min)


def without_specks(grid):
    """Objects of a single cell disappear."""
    out = grid.copy()
    for part in parts(grid > 0):
        if len(part) == 1:
            out[part[0]] = 0
    return out


def box(grid):
    """Every object becomes the full rectangle around it, in the colour of its first cell in reading order."""
    out = grid.copy()
    for part in parts(grid > 0):
        rows, cols = zip(*part, strict=True)
        area = out[min(rows) : max(rows) + 1, min(cols) : max(cols) + 1]
        area[area == 0] = grid[min(part)]
    return out


def by_size(grid, a, b):
    """The largest objects become colour a, all others colour b."""
    found = parts(grid > 0)
    most = max(map(len, found), default=0)
    out = np.zeros_like(grid)
    for part in found:
        for cell in part:
            out[cell] = a if len(part) == most else b
    return out


def count_objects(grid, a):
    """One row of colour a, as long as there are objects."""
    return np.full((1, max(len(parts(grid > 0)), 1)), a, np.uint8)


def cross(grid):
    """Every coloured cell draws its whole row and column over the background: first all rows, then all columns; what comes first in
    reading order stays."""
    out = grid.copy()
    cells = list(zip(*np.nonzero(grid), strict=True))
    for r, c in cells:
        out[r] = np.where(out[r] == 0, grid[r, c], out[r])
    for r, c in cells:
        out[:, c] = np.where(out[:, c] == 0, grid[r, c], out[:, c])
    return out


def diagonals(grid, up):
    """Every coloured cell draws a diagonal line both ways over the background, downwards to the right (up=0) or upwards (up=1)."""
    out = grid.copy()
    h, w = grid.shape
    for r, c in zip(*np.nonzero(grid), strict=True):
        for d in range(-max(h, w), max(h, w) + 1):
            y, x = r + (-d if up else d), c + d
            if 0 <= y < h and 0 <= x < w and out[y, x] == 0:
                out[y, x] = grid[r, c]
    return out


def checker(grid, odd):
    """Only cells whose row and column add up to an even number stay (odd=1: an odd number)."""
    return np.where(np.indices(grid.shape).sum(0) % 2 == odd, grid, np.uint8(0))


def stripes(grid, axis, k, a):
    """Every k-th row (axis 0) or column (axis 1), beginning with the first, is painted over with colour a."""
    out = grid.copy()
    (out if axis == 0 else out.T)[::k] = a
    return out


def half(grid, side):
    """The half at this side: 0 bottom, 1 right, 2 top, 3 left; without the middle line if there is one."""
    lines = grid if side % 2 == 0 else grid.T
    n = len(lines) // 2
    out = lines[-n:] if side < 2 else lines[:n]
    return out if side % 2 == 0 else out.T


def beside(grid, k):
    """The grid, and to its right the grid turned by k half turns or mirrored: 0 again, 1 upside down, 2 turned by half a turn."""
    return np.concatenate([grid, (grid, np.flip(grid, 0), np.rot90(grid, 2))[k]], 1)


def fold(grid, axis):
    """The second half is folded over the first, coloured cells on top, along the middle of the rows (axis 0) or columns (axis 1)."""
    lines = grid if axis == 0 else grid.T
    n = (len(lines) + 1) // 2
    over = lines[::-1][:n]
    out = np.where(over > 0, over, lines[:n])
    return out if axis == 0 else out.T


def sort_cells(grid, axis):
    """The cells of every column (axis 0) or row (axis 1) in the order of their colours, background first."""
    return np.sort(grid, axis)


def row_colour(grid, axis):
    """Every row (axis 1) or column (axis 0) is filled with its commonest colour (the lower one if two are as common); empty ones stay."""
    out = grid.copy()
    for line in out if axis == 1 else out.T:
        counts = np.bincount(line, minlength=10)
        counts[0] = 0
        line[:] = counts.argmax() if counts.any() else 0
    return out


def distinct_lines(grid, axis):
    """Of neighbouring rows (axis 0) or columns (axis 1) that are equal, one stays."""
    lines = grid if axis == 0 else grid.T
    out = lines[[i for i in range(len(lines)) if i == 0 or not np.array_equal(lines[i], lines[i - 1])]]
    return out if axis == 0 else out.T


def odd_colour(grid):
    """Only the colour with the fewest cells stays (the lower one if two have as few)."""
    counts = np.bincount(grid.reshape(-1), minlength=10)
    counts[0] = 0
    return keep(grid, min((c for c in range(1, 10) if counts[c]), key=lambda c: (counts[c], c), default=0))


def fall_apart(grid, dy):
    """The first, third, ... column moves down by dy, the others move up, and what leaves is lost."""
    out = np.zeros_like(grid)
    h = len(grid)
    out[dy:, ::2] = grid[: h - dy, ::2]
    out[: h - dy, 1::2] = grid[dy:, 1::2]
    return out


def widen(grid, axis):
    """Every row (axis 0) or column (axis 1) is written twice."""
    return grid.repeat(2, axis)


def margin(grid, k):
    """k lines of background are put around the grid."""
    return np.pad(grid, k)


# inputs


def objects(rng, params, low=7, high=12):
    """Two to six objects of random shape and one colour each, apart from each other, and a few single cells."""
    grid = np.zeros(size_of(rng, low, high), np.uint8)
    h, w = grid.shape
    named = [params[k] for k in ("a", "b") if params.get(k)]
    for colour in [*named, *colours_of(rng, int(rng.integers(2, 6)), avoid=named)]:
        cells = [(int(rng.integers(h)), int(rng.integers(w)))]
        for _ in range(int(rng.integers(0, 9))):
            r, c = cells[rng.integers(len(cells))]
            r, c = r + int(rng.integers(-1, 2)), c + int(rng.integers(-1, 2))
            near = {(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)}
            if 0 <= r < h and 0 <= c < w and (r, c) not in cells and near & set(cells):
                cells.append((r, c))
        reach = {(r + y, c + x) for r, c in cells for y in (-1, 0, 1) for x in (-1, 0, 1)}
        if not any(grid[r, c] for r, c in reach if 0 <= r < h and 0 <= c < w):
            for cell in cells:
                grid[cell] = colour
    return grid


def sparse(rng, params):
    """One to four coloured cells, far from crowded."""
    grid = np.zeros(size_of(rng, 5, 10), np.uint8)
    n = int(rng.integers(1, 5))
    grid.flat[rng.permutation(grid.size)[:n]] = colours_of(rng, n)
    return grid


def banded(rng, params):
    """Rows or columns that come several times."""
    grid = scattered_small(rng, params)
    return grid.repeat(rng.integers(1, 4, size=len(grid)), 0).repeat(
        rng.integers(1, 4, size=grid.shape[1]), 1
    )


# name: (every setting of the parameters, the function, what makes an input)
LANGUAGE = {
    **TRANSFORMS,
    "keep": (settings_of(a=COLOURS), keep, scattered),
    "negative": (settings_of(a=COLOURS), negative, rectangles),
    "paint": (settings_of(a=COLOURS), paint, objects),
    "hollow": (settings_of(), hollow, functools.partial(scattered, low=5)),
    "grow": (settings_of(), grow, sparse),
    "smallest": (settings_of(), smallest, objects),
    "without_specks": (settings_of(), without_specks, objects),
    "box": (settings_of(), box, objects),
    "by_size": ([p for p in settings_of(a=COLOURS, b=COLOURS) if p["a"] != p["b"]], by_size, objects),
    "count_objects": (settings_of(a=COLOURS), count_objects, objects),
    "cross": (settings_of(), cross, sparse),
    "diagonals": (settings_of(up=(0, 1)), diagonals, sparse),
    "checker": (settings_of(odd=(0, 1)), checker, scattered),
    "stripes": (settings_of(axis=(0, 1), k=(2, 3), a=COLOURS), stripes, scattered),
    "half": (settings_of(side=range(4)), half, scattered),
    "beside": (settings_of(k=range(3)), beside, scattered_medium),
    "fold": (settings_of(axis=(0, 1)), fold, scattered),
    "sort_cells": (settings_of(axis=(0, 1)), sort_cells, scattered),
    "row_colour": (settings_of(axis=(0, 1)), row_colour, scattered),
    "distinct_lines": (settings_of(axis=(0, 1)), distinct_lines, banded),
    "odd_colour": (settings_of(), odd_colour, scattered),
    "fall_apart": (settings_of(dy=(1, 2)), fall_apart, scattered),
    "widen": (settings_of(axis=(0, 1)), widen, scattered_medium),
    "margin": (settings_of(k=(1, 2)), margin, scattered),
}
TURN = ("flip", "rotate", "transpose")
MOVE = ("roll", "shift")
COLOUR = ("swap", "replace", "next_colour", "paint", "negative")
LARGER = ("scale", "tile", "mirror", "kaleidoscope", "beside", "widen")
PICK = ("largest", "smallest", "odd_colour", "without_specks")

# family: (slots, what makes an input; None: the first function's own). One function of each slot is drawn.
FAMILIES = {
    **{name: (((name,),), None) for name in LANGUAGE},
    "turn_then_move": ((TURN, MOVE), scattered),
    "turn_then_colour": ((TURN, COLOUR), scattered),
    "move_then_colour": ((MOVE, COLOUR), scattered),
    "crop_then_turn": ((("crop", "crop_colour"), TURN), rectangles),
    "crop_then_enlarge": ((("crop",), LARGER), few_cells),
    "pick_then_crop": ((PICK, ("crop",)), objects),
    "pick_then_box": ((PICK, ("box", "outline")), objects),
    "keep_then_crop": ((("keep",), ("crop",)), scattered),
    "fall_then_colour": ((("gravity",), COLOUR), scattered),
    "colour_then_frame": ((COLOUR, ("frame", "border")), scattered_medium),
    "half_then_mirror": ((("half",), ("mirror", "beside")), scattered_medium),
    "fold_then_enlarge": ((("fold",), ("scale", "widen")), scattered_medium),
    "grow_then_hollow": ((("grow",), ("negative", "border", "hollow")), sparse),
    "box_then_hollow": ((("box",), ("hollow", "by_size")), objects),
    "combine_then_turn": ((("halves",), TURN), two_halves),
    "lines_then_colour": ((("rays", "cross", "diagonals"), COLOUR), sparse),
    "sort_then_turn": ((("sort_cells", "sort_lines"), TURN), scattered),
    "pick_crop_enlarge": ((PICK, ("crop",), LARGER), objects),
    "pick_crop_turn": ((PICK, ("crop",), TURN), objects),
    "crop_turn_colour": ((("crop",), TURN, COLOUR), few_cells),
    "turn_fall_colour": ((TURN, ("gravity",), COLOUR), scattered),
    "crop_enlarge_frame": ((("crop",), LARGER, ("frame", "border")), few_cells),
    "half_colour_mirror": ((("half", "fold"), COLOUR, ("mirror", "beside")), scattered_medium),
    "box_size_crop": ((("box",), ("by_size",), ("keep",), ("crop",)), objects),
    "pick_crop_turn_colour": ((PICK, ("crop",), TURN, ("next_colour", "negative")), objects),
}


# programs


def program_text(steps):
    """list of (name, parameters) -> the program as Python-like text."""
    lines = [
        f"    grid = {name}({', '.join(['grid', *(f'{k}={v}' for k, v in params.items())])})"
        for name, params in steps
    ]
    return "\n".join(["def solve(grid):", *lines, "    return grid"]) + "\n"


def parse(text):
    """The inverse of program_text. ValueError, saying what is wrong, for anything that is not a program of this language."""
    try:
        (function,) = ast.parse(text).body
        *lines, last = function.body
        if ast.unparse(last) != "return grid" or ast.unparse(function.args) != "grid":
            raise ValueError("it must take grid and return grid")
        steps = []
        for line in lines:
            call = line.value
            name, params = call.func.id, {k.arg: ast.literal_eval(k.value) for k in call.keywords}
            if [ast.unparse(t) for t in line.targets] != ["grid"] or [ast.unparse(a) for a in call.args] != [
                "grid"
            ]:
                raise ValueError(f"line {line.lineno} does not turn grid into grid")
            if name not in LANGUAGE:
                raise ValueError(
                    f"no function {name!r}: the closest is {difflib.get_close_matches(name, LANGUAGE, 1, 0)[0]!r}"
                )
            if params not in LANGUAGE[name][0]:
                raise ValueError(f"{name} does not take {params}")
            steps.append((name, params))
        return steps
    except (SyntaxError, AttributeError, TypeError) as e:
        raise ValueError(f"not a program: {e}") from None


def run(text, grid):
    """-> list of grids: after every step of the program in `text`, the last one is its result. ValueError if it is no program."""
    out = []
    for name, params in parse(text):
        grid = np.ascontiguousarray(LANGUAGE[name][1](grid, **params)).astype(np.uint8)
        out.append(grid)
    return out


def check(task, text):
    """True if the program turns every input of the task into its output."""
    return all(same(run(text, x)[-1], y) for x, y in task.train + task.test)


@functools.cache
def _singles():
    return [(apply, params) for settings, apply, _ in LANGUAGE.values() for params in settings]


def _explained_otherwise(demos, test):
    """Does a single function explain every demonstration and give another answer to the test?"""
    x, y = demos[0]
    for apply, params in _singles():
        if not same(apply(x, **params), y):  # most functions end here
            continue
        if all(same(apply(i, **params), o) for i, o in demos) and not same(apply(test[0], **params), test[1]):
            return True
    return False


def make(rng, family=None):
    """
    -> (Task of kind 'arc' with 2..4 demonstrations and one test, list of steps) of the family, or of one drawn at random. No side is
    longer than 30, no output is blank, all inputs differ, every step changes at least one of the grids, and the program, read back from
    its text, gives every output.
    """
    family = family or list(FAMILIES)[rng.integers(len(FAMILIES))]
    slots, make_input = FAMILIES[family]
    while True:
        steps = []
        for slot in slots:
            name = slot[rng.integers(len(slot))]
            settings = LANGUAGE[name][0]
            steps.append((name, settings[rng.integers(len(settings))]))
        make_one = make_input or LANGUAGE[steps[0][0]][2]
        named = {k: v for _, params in steps[:1] for k, v in params.items()}
        text = program_text(steps)
        for _ in range(
            20
        ):  # some programs do nothing with some inputs; after a while another program is better
            inputs = [np.ascontiguousarray(make_one(rng, named)) for _ in range(int(rng.integers(3, 6)))]
            stages = [[x, *run(text, x)] for x in inputs]
            pairs = [(s[0], s[-1]) for s in stages]
            if len({(x.shape, x.tobytes()) for x in inputs}) < len(inputs) or any(
                max(g.shape) > arc.MAX_SIDE for s in stages for g in s
            ):
                continue
            if (
                any(same(x, y) or not y.any() for x, y in pairs)
                or len({(y.shape, y.tobytes()) for _, y in pairs}) == 1
            ):
                continue
            if any(all(same(s[i], s[i + 1]) for s in stages) for i in range(len(steps))):
                continue
            task = arc.Task(f"{family}:{program_key(steps)}", "arc", pairs[:-1], pairs[-1:])
            if not _explained_otherwise(pairs[:-1], pairs[-1]) and check(task, text):
                return task, steps


def program_key(steps):
    return ";".join(":".join([name, *(f"{k}={v}" for k, v in params.items())]) for name, params in steps)


def task(rng):
    """A task of a random family, for a puzzle source."""
    return make(rng)[0]


def trace(rng):
    """
    -> (Task, list of str and token ids, list of the grids that only the trace has). The list is <|program|>, demonstrations and test
    input as grids, the program as text, then the answer; in half of the traces the grid after every step instead, each behind
    <|output|>, so that the last one is the answer.
    """
    task, steps = make(rng)
    text, (test_input, answer) = program_text(steps), task.test[0]
    parts = [[tok.PROGRAM]]
    for x, y in task.train:
        parts += [[tok.INPUT], arc.encode_grid(x), [tok.OUTPUT], arc.encode_grid(y)]
    parts += [[tok.INPUT], arc.encode_grid(test_input), text]
    shown = run(text, test_input) if rng.random() < INTERMEDIATE else [answer]
    for grid in shown:
        parts += [[tok.OUTPUT], arc.encode_grid(grid)]
    return task, parts, shown[:-1]
