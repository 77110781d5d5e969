"""
Transforms: functions from a grid (np.uint8, values 0..9, 0 is the background) to a grid, inputs that suit each, and tasks of one
transform in the style of ARC. They accept any grid of 3x3 or more.

A task is checked by reading its program back from the task's id and running it on every input.

Read next: programs.py, a larger language of such functions, and programs of several steps; puzzles.py, the suite that is evaluated on.
"""

import itertools
import re

import numpy as np

from smol.arc import Task


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
