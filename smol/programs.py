"""
Grid programs: a language of functions from a grid to a grid, tasks written in it, and traces of programs at
work.

A grid is np.uint8 (h, w), of colours 0..9; 0 is the background. The functions take any grid of 3x3 or more. A
program is a list of steps (name, parameters), and as text it reads as Python:

    def solve(grid):
        grid = crop(grid)
        grid = replace(grid, a=3, b=5)
        return grid

No single function of the language explains the demonstrations of a task in another way. A program that a
model wrote is read, not executed: no other function than these can be in it.

Read next: sources.py.
"""

import functools
import itertools
import re

import numpy as np

import configurator
from smol import arc
from smol import tokenizer as tok

INTERMEDIATE = 0.5  # share of the traces that show the grid after every step
MOST_CHARACTERS = 1000  # of a program; a step takes at most 10 ms, so this bounds the time as well

# -----------------------------------------------------------------------------
# functions that take more than a line; an object is a set of coloured cells that touch by their sides


def components(mask):
    """The 4-connected components of a boolean grid in reading order, each a list of (row, column)."""
    left = dict.fromkeys(map(tuple, np.argwhere(mask).tolist()))
    found = []
    while left:
        part = [next(iter(left))]
        del left[part[0]]
        for r, c in part:
            for near in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if near in left:
                    del left[near]
                    part.append(near)
        found.append(part)
    return found


def swap(grid, a, b):
    """Colours a and b change places."""
    colours = np.arange(10, dtype=np.uint8)
    colours[[a, b]] = b, a
    return colours[grid]


def crop(grid):
    """The smallest rectangle that holds every coloured cell."""
    rows, cols = np.nonzero(grid)
    return grid[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] if len(rows) else grid


def squeeze(grid):
    """Rows and columns that are all background are taken out."""
    out = grid[(grid > 0).any(1)][:, (grid > 0).any(0)]
    return out if out.size else grid


def mirror(grid, side):
    """The grid and its mirror image, which is put on this side: 0 below, 1 right, 2 above, 3 left."""
    image = np.flip(grid, side % 2)
    return np.concatenate((grid, image) if side < 2 else (image, grid), side % 2)


def half(grid, side):
    """The half at this side: 0 bottom, 1 right, 2 top, 3 left; without the middle line if there is one."""
    if side % 2:
        return half(grid.T, side - 1).T
    n = len(grid) // 2
    return grid[-n:] if side == 0 else grid[:n]


def fold(grid, axis):
    """The second half is folded over the first, its coloured cells on top."""
    if axis == 1:
        return fold(grid.T, 0).T
    over = np.flip(grid, 0)
    return np.where(over > 0, over, grid)[: (len(grid) + 1) // 2]


def halves(grid, op, axis):
    """Two halves with a line between them. A cell takes the line's colour where op of its two cells is
    coloured: 0 both, 1 at least one, 2 exactly one, 3 none."""
    if axis == 1:
        return halves(grid.T, op, 0).T
    n = (len(grid) - 1) // 2
    first, second = grid[:n] > 0, grid[-n:] > 0
    return (first & second, first | second, first ^ second, ~(first | second))[op] * grid[n, 0]


def gravity(grid, side):
    """Coloured cells fall to this side: 0 bottom, 1 right, 2 top, 3 left."""
    axis = side % 2
    order = np.argsort((grid > 0) != (side > 1), axis=axis, kind="stable")
    return np.take_along_axis(grid, order, axis)


def sort_lines(grid, axis, descending):
    """Rows (axis 0) or columns (1) ordered by how many coloured cells they have; equals keep their order."""
    counts = (grid > 0).sum(1 - axis)
    return np.take(grid, np.argsort(-counts if descending else counts, kind="stable"), axis)


def border(grid, a):
    """The outermost cells are painted over with colour a."""
    out = grid.copy()
    out[[0, -1]] = a
    out[:, [0, -1]] = a
    return out


def outline(grid, a):
    """Background cells that touch a coloured cell, corners too, become colour a."""
    full = np.pad(grid > 0, 1)
    tall = full[:-2] | full[1:-1] | full[2:]
    touched = tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]
    return np.where(touched & (grid == 0), a, grid)


def hollow(grid):
    """A coloured cell whose four neighbours are coloured too becomes background."""
    return np.where(arc.neighbours(grid).all(0), 0, grid)


def grow(grid):
    """Background cells take the colour of a neighbour by side: the one above, else left, right, below."""
    out = grid
    for near in arc.neighbours(grid):
        out = np.where(out == 0, near, out)
    return out


def rays(grid, side):
    """Every coloured cell draws a line in its colour towards one side (0 down, 1 right, 2 up, 3 left), up to
    the next coloured cell."""
    turns = (3, 0, 1, 2)[side]  # turned so that lines run to the right
    out = np.rot90(grid, -turns).copy()
    for c in range(1, out.shape[1]):
        out[:, c] = np.where(out[:, c] == 0, out[:, c - 1], out[:, c])
    return np.rot90(out, turns)


def diagonals(grid, up):
    """Every coloured cell draws a diagonal both ways over the background, downwards to the right or (up=1)
    upwards; where two meet, the first in reading order stays."""
    out = grid.copy()
    h, w = grid.shape
    for r, c in np.argwhere(grid).tolist():
        for x in range(w):
            y = r + (c - x if up else x - c)
            if 0 <= y < h and out[y, x] == 0:
                out[y, x] = grid[r, c]
    return out


def connect(grid, axis):
    """Background cells between two neighbouring coloured cells of one colour in a column (0) or row (1) take
    that colour."""
    if axis == 0:
        return connect(grid.T, 1).T
    out = grid.copy()
    for line in out:
        for i, j in itertools.pairwise(np.flatnonzero(line).tolist()):
            if line[i] == line[j]:
                line[i:j] = line[i]
    return out


def colour_counts(grid):
    """How many cells each colour has, (10,); none for the background."""
    counts = np.bincount(grid.reshape(-1), minlength=10)
    counts[0] = 0
    return counts


def count_bars(grid, axis):
    """A bar per colour, as long as the colour has cells, as rows (1) or columns (0); longest first, then the
    lower colour."""
    counts = colour_counts(grid)
    order = [c for c in np.argsort(-counts, kind="stable") if counts[c]]
    out = np.zeros((max(len(order), 1), max(counts.max(), 1)), np.uint8)
    for bar, c in zip(out, order):
        bar[: counts[c]] = c
    return out if axis else out.T


def commonest(grid, least):
    """The grid filled with its commonest colour, or its rarest (the lower colour if two are as common)."""
    counts = colour_counts(grid)
    if not counts.any():
        return grid
    return np.full_like(grid, np.where(counts, counts, 1000).argmin() if least else counts.argmax())


def one_object(grid, smallest):
    """Only the largest object stays, or the smallest (the first in reading order if two are as large)."""
    out = np.zeros_like(grid)
    choose = min if smallest else max
    for cell in choose(components(grid > 0), key=len, default=[]):
        out[cell] = grid[cell]
    return out


def without_specks(grid):
    """Objects of a single cell disappear."""
    return np.where(arc.neighbours(grid).any(0), grid, 0)


def recolour_largest(grid, a):
    """The largest objects become colour a, the others stay as they are."""
    out = grid.copy()
    found = components(grid > 0)
    for part in found:
        if len(part) == max(map(len, found)):
            out[tuple(zip(*part))] = a
    return out


def box(grid):
    """Every object becomes the full rectangle around it, in the colour of its first cell in reading order."""
    out = grid.copy()
    for part in components(grid > 0):
        rows, cols = zip(*part)
        area = out[min(rows) : max(rows) + 1, min(cols) : max(cols) + 1]
        area[area == 0] = grid[min(part)]
    return out


def fill_enclosed(grid, a):
    """Background cells with no way to the edge over background cells (by sides) become colour a."""
    out = grid.copy()
    h, w = grid.shape
    for part in components(grid == 0):
        if all(0 < r < h - 1 and 0 < c < w - 1 for r, c in part):
            out[tuple(zip(*part))] = a
    return out


def count_objects(grid, a):
    """One row of colour a, as long as there are objects."""
    return np.full((1, max(len(components(grid > 0)), 1)), a)


# -----------------------------------------------------------------------------
# inputs: each maker takes (rng, parameters of the first step) and returns a grid on which these can show


def named(params):
    """The colours that the parameters name."""
    return [params[k] for k in ("a", "b") if params.get(k)]


def colours_of(rng, n, params):
    """n colours, or as many as there are, none of them named by the parameters."""
    return rng.permutation([c for c in range(1, 10) if c not in named(params)])[:n].tolist()


def scattered(rng, params, low=3, high=8):
    """A few colours at random on the background, those that the parameters name among them."""
    some = np.array(named(params) + colours_of(rng, int(rng.integers(1, 4)), params))
    shape = rng.integers(low, high + 1, size=2)
    coloured = rng.random(shape) < rng.uniform(0.25, 0.7)
    return np.where(coloured, some[rng.integers(len(some), size=shape)], 0)


scattered_small = functools.partial(scattered, high=4)
scattered_medium = functools.partial(scattered, high=6)
scattered_large = functools.partial(scattered, low=5)


def few_cells(rng, params):
    """Two to seven coloured cells, of two colours, on the background."""
    grid = np.zeros(rng.integers(4, 9, size=2), np.uint8)
    n = int(rng.integers(2, 8))
    grid.flat[rng.permutation(grid.size)[:n]] = rng.choice(colours_of(rng, 2, params), size=n)
    return grid


def rectangles(rng, params, low=1, high=3):
    """Up to four rectangles with a missing cell here and there, apart from each other."""
    grid = np.zeros(rng.integers(5, 9, size=2), np.uint8)
    h, w = grid.shape
    for colour in colours_of(rng, int(rng.integers(1, 5)), params):
        y, x = rng.integers(low, high + 1, size=2).tolist()
        r, c = int(rng.integers(h - y + 1)), int(rng.integers(w - x + 1))
        if not grid[max(r - 1, 0) : r + y + 1, max(c - 1, 0) : c + x + 1].any():
            grid[r : r + y, c : c + x] = np.where(rng.random((y, x)) < 0.85, colour, 0)
    return grid


def rings(rng, params):
    """Up to four rectangular rings, some of them open."""
    return hollow(rectangles(rng, params, 3, 4))


def two_halves(rng, params):
    """Two grids of the same size and one colour each, with a line of a third between them."""
    h, w = rng.integers((1, 3), (4, 7)).tolist()
    first, second, line = colours_of(rng, 3, params)
    top, bottom = (rng.random((h, w)) < 0.5) * first, (rng.random((h, w)) < 0.5) * second
    grid = np.concatenate([top, np.full((1, w), line), bottom])
    return grid if params["axis"] == 0 else grid.T


def objects(rng, params):
    """Two to six objects of one colour each, where a random walk went, apart from each other."""
    grid = np.zeros(rng.integers(5, 10, size=2), np.uint8)
    h, w = grid.shape
    for colour in named(params) + colours_of(rng, int(rng.integers(2, 6)), params):
        r, c = int(rng.integers(h)), int(rng.integers(w))
        cells = {(r, c)}
        for way in rng.integers(4, size=rng.integers(9)).tolist():
            dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[way]
            r, c = min(max(r + dy, 0), h - 1), min(max(c + dx, 0), w - 1)
            cells.add((r, c))
        if not any(grid[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].any() for r, c in cells):
            grid[tuple(zip(*cells))] = colour
    return grid


# -----------------------------------------------------------------------------
# the language as a table


def settings_of(**ranges):
    """Every combination of parameters, as a list of dicts."""
    return [dict(zip(ranges, values)) for values in itertools.product(*ranges.values())]


COLOURS, SIDES, AXES = range(1, 10), range(4), (0, 1)
A = settings_of(a=COLOURS)
A_AND_B = [p for p in settings_of(a=COLOURS, b=COLOURS) if p["a"] != p["b"]]
OFFSETS = [p for p in settings_of(dy=range(-2, 3), dx=range(-2, 3)) if p["dy"] or p["dx"]]
COUNTS = [p for p in settings_of(ny=(1, 2, 3), nx=(1, 2, 3)) if p["ny"] * p["nx"] > 1]

# name: (every setting of its parameters, the function, what makes an input)
LANGUAGE = {
    "flip": (settings_of(axis=AXES), np.flip, scattered),
    "rotate": (settings_of(k=(1, 2, 3)), np.rot90, scattered),
    "transpose": (settings_of(anti=(0, 1)), lambda g, anti: np.rot90(g, 2 * anti).T, scattered),
    "roll": (OFFSETS, lambda g, dy, dx: np.roll(g, (dy, dx), (0, 1)), scattered),
    "gravity": (settings_of(side=SIDES), gravity, scattered),
    "sort_lines": (settings_of(axis=AXES, descending=(0, 1)), sort_lines, scattered),
    "swap": ([p for p in A_AND_B if p["a"] < p["b"]], swap, scattered),
    "replace": (A_AND_B, lambda g, a, b: np.where(g == a, b, g), scattered),
    "keep": (A, lambda g, a: np.where(g == a, a, 0), scattered),
    "paint": (A, lambda g, a: np.where(g > 0, a, 0), objects),
    "negative": (A, lambda g, a: np.where(g > 0, 0, a), rectangles),
    "commonest": (settings_of(least=(0, 1)), commonest, few_cells),
    "crop": (settings_of(), crop, rectangles),
    "squeeze": (settings_of(), squeeze, few_cells),
    "half": (settings_of(side=SIDES), half, scattered),
    "fold": (settings_of(axis=AXES), fold, scattered),
    "halves": (settings_of(op=range(4), axis=AXES), halves, two_halves),
    "scale": (settings_of(k=(2, 3)), lambda g, k: g.repeat(k, 0).repeat(k, 1), scattered_small),
    "tile": (COUNTS, lambda g, ny, nx: np.tile(g, (ny, nx)), scattered_small),
    "mirror": (settings_of(side=SIDES), mirror, scattered_medium),
    "frame": (settings_of(a=range(10)), lambda g, a: np.pad(g, 1, constant_values=a), scattered),
    "border": (A, border, scattered),
    "outline": (A, outline, rectangles),
    "hollow": (settings_of(), hollow, scattered_large),
    "grow": (settings_of(), grow, few_cells),
    "rays": (settings_of(side=SIDES), rays, few_cells),
    "diagonals": (settings_of(up=(0, 1)), diagonals, few_cells),
    "connect": (settings_of(axis=AXES), connect, few_cells),
    "symmetric": (settings_of(axis=AXES), lambda g, axis: np.where(g > 0, g, np.flip(g, axis)), rectangles),
    "one_object": (settings_of(smallest=(0, 1)), one_object, objects),
    "without_specks": (settings_of(), without_specks, objects),
    "recolour_largest": (A, recolour_largest, objects),
    "box": (settings_of(), box, objects),
    "fill_enclosed": (A, fill_enclosed, rings),
    "count_objects": (A, count_objects, objects),
    "count_bars": (settings_of(axis=AXES), count_bars, few_cells),
}
EVERY_STEP = [(name, params, named(params)) for name, entry in LANGUAGE.items() for params in entry[0]]

# -----------------------------------------------------------------------------
# programs


def program_text(steps):
    """list of (name, parameters) -> the program as Python-like text."""
    calls = [", ".join(["grid", *(f"{k}={v}" for k, v in params.items())]) for _, params in steps]
    lines = [f"    grid = {name}({call})\n" for (name, _), call in zip(steps, calls)]
    return "".join(["def solve(grid):\n", *lines, "    return grid\n"])


def parse(text):
    """The inverse of program_text. ValueError, saying what is wrong, for anything that is not a program."""
    program = re.fullmatch(r"def solve\(grid\):\n((?:.+\n)+)    return grid\n?", text)
    if not program:
        raise ValueError("not a program: it must begin with def solve(grid) and end with return grid")
    steps = []
    for line in program[1].removesuffix("\n").split("\n"):
        call = re.fullmatch(r"    grid = (\w+)\(grid((?:, \w+=-?\d+)*)\)", line)
        if not call:
            raise ValueError(f"{line.strip()!r} does not turn grid into grid")
        name, given = call[1], re.findall(r"(\w+)=(-?\d+)", call[2])
        params = {k: int(v) for k, v in given}
        if name not in LANGUAGE:
            raise ValueError(configurator.unknown("function", name, LANGUAGE))
        if params not in LANGUAGE[name][0] or len(given) > len(params):
            raise ValueError(f"{name} does not take {call[2].removeprefix(', ') or 'nothing'}")
        steps.append((name, params))
    return steps


def step(grid, name, params):
    return np.ascontiguousarray(LANGUAGE[name][1](grid, **params), np.uint8)


def apply(steps, grid):
    """-> list of np.uint8 (h, w), the grid after every step. ValueError for one that is no grid of ARC's."""
    grids = []
    for name, params in steps:
        grid = step(grid, name, params)
        if not 1 <= min(grid.shape) <= max(grid.shape) <= arc.MAX_SIDE:
            raise ValueError(f"{name} makes a grid whose sides are not 1 to {arc.MAX_SIDE}")
        grids.append(grid)
    return grids


def run(text, grid):
    """As apply, of a program as text. ValueError if it is none or too long as well."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a program of more than {MOST_CHARACTERS} characters")
    return apply(parse(text), grid)


def same(a, b):
    # several times faster than np.array_equal on grids this small
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def check(task, text):
    """True if the program turns every input of the task into its output."""
    return all(same(run(text, x)[-1], y) for x, y in task.train + task.test)


def explained_otherwise(task):
    """Does a single function explain every demonstration and give another answer to the test?"""
    (x, y), (test_input, answer) = task.train[0], task.test[0]
    colours = {*x.flat, *y.flat}
    for name, params, named_colours in EVERY_STEP:
        if not colours.issuperset(named_colours) or not same(step(x, name, params), y):  # most end here
            continue
        explains = all(same(step(i, name, params), o) for i, o in task.train)
        if explains and not same(step(test_input, name, params), answer):
            return True
    return False


def make(rng, names=None):
    """
    -> (Task of kind 'arc' with 2..4 demonstrations and one test, list of steps) of these functions, or of one
    or two at random. Its id is the program: 'crop;roll:dy=1:dx=-2'. Every step changes every grid, and no
    output is blank.
    """
    language = list(LANGUAGE)
    while True:
        functions = names or [language[i] for i in rng.integers(len(language), size=rng.integers(1, 3))]
        steps = [(name, LANGUAGE[name][0][rng.integers(len(LANGUAGE[name][0]))]) for name in functions]
        n, pairs = int(rng.integers(3, 6)), []
        for _ in range(40):  # a program that does nothing with most inputs gives way to another
            x = np.ascontiguousarray(LANGUAGE[functions[0]][2](rng, steps[0][1]), np.uint8)
            try:
                stages = [x, *apply(steps, x)]
            except ValueError:  # too large, or too small for the next function
                continue
            idle = any(same(a, b) for a, b in itertools.combinations(stages, 2))
            if not idle and stages[-1].any():
                pairs.append((x, stages[-1]))
            if len(pairs) == n:
                break
        if len(pairs) < n or all(same(pairs[0][1], y) for _, y in pairs):
            continue
        task_id = ";".join(":".join([name, *(f"{k}={v}" for k, v in p.items())]) for name, p in steps)
        task = arc.Task(task_id, "arc", pairs[:-1], pairs[-1:])
        if not explained_otherwise(task) and check(task, program_text(steps)):
            return task, steps


def transform(rng):
    """A task of one random function."""
    return make(rng, [list(LANGUAGE)[rng.integers(len(LANGUAGE))]])[0]


def trace(rng):
    """
    -> (Task, list of str and token ids, list of the grids that only the trace has). The list is <|program|>,
    demonstrations and test input as grids, the program as text, then the answer behind <|output|>; in half of
    the traces the grid after every step, each behind <|output|>, the last of which is the answer.
    """
    task, steps = make(rng)
    test_input, answer = task.test[0]
    seen = [grid for pair in task.train for grid in pair]
    parts = [*arc.encode_parts("program", [*seen, test_input]), program_text(steps)]
    shown = apply(steps, test_input) if rng.random() < INTERMEDIATE else [answer]
    for grid in shown:
        parts += [[tok.OUTPUT], arc.encode_grid(grid)]
    return task, parts, shown[:-1]
