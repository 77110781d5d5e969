"""Puzzles: what is generated is right by references written here, wrong answers are refused, and the same seed gives the same puzzle."""

import hashlib
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from smol import puzzles
from smol.arc import Task
from smol.programs import TRANSFORMS, check_transform, program_of, transform
from smol.puzzles import (
    SUDOKU4_HELD_OUT,
    SUITES,
    TEMPLATES,
    all_sudoku4,
    arithmetic,
    check,
    check_arithmetic,
    check_maze,
    check_sudoku,
    heldout,
    maze,
    solve_sudoku,
    sudoku,
    sudoku4_grids,
    task_hash,
)


def grid(text):
    return np.array([[int(c) for c in row] for row in text.split("/")], np.uint8)


def images(g):
    return [np.rot90(h, k) for h in (g, g.T) for k in range(4)]


def digest(tasks):
    """Of ids and exact grids (task_hash() would not see a task turned)."""
    grids = [(task.id, [[g.tolist() for g in pair] for pair in task.train + task.test]) for task in tasks]
    return hashlib.sha256(repr(grids).encode()).hexdigest()[:16]


# sudoku


def test_the_288_grids_by_enumeration():
    """All stacks of four permutations, filtered by columns and boxes: no solver involved."""
    found = []
    for rows in itertools.product(itertools.permutations(range(1, 5)), repeat=4):
        columns = zip(*rows, strict=True)
        boxes = [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
        if all(len(set(line)) == 4 for line in [*columns, *boxes]):
            found.append(rows)
    assert len(found) == 288
    assert all_sudoku4().dtype == np.uint8
    assert all_sudoku4().tolist() == [[list(row) for row in rows] for rows in found]


def test_sudoku4_splits_share_no_grid_in_any_orientation():
    train, test = sudoku4_grids("train"), sudoku4_grids("test")
    assert len(train) == 232 and len(test) == len(SUDOKU4_HELD_OUT) == 56
    seen = {image.tobytes() for g in train for image in images(g)}
    assert not seen & {g.tobytes() for g in test}
    assert {g.tobytes() for g in train} | {g.tobytes() for g in test} == {g.tobytes() for g in all_sudoku4()}
    with pytest.raises(ValueError, match="val"):
        sudoku4_grids("val")


def test_held_out_grids_are_these():
    """Which grids are held out is part of what was measured; it must never move."""
    assert hashlib.sha256(sudoku4_grids("test").tobytes()).hexdigest()[:16] == "f44a5f203d9dc375"


def test_callers_cannot_change_the_shared_grids():
    with pytest.raises(ValueError):
        all_sudoku4()[0, 0, 0] = 9
    task = sudoku(np.random.default_rng(0), 4, 6)
    task.test[0][1][:] = 0
    assert (all_sudoku4() > 0).all()


@pytest.mark.parametrize("blanks", [1, 6, 8])
def test_sudoku4_has_one_solution_by_brute_force(blanks):
    rng = np.random.default_rng(blanks)
    for split in ("train", "test"):
        puzzle, answer = sudoku(rng, 4, blanks, split).test[0]
        assert (puzzle == 0).sum() == blanks
        assert answer.tobytes() in {g.tobytes() for g in sudoku4_grids(split)}
        fillings = np.repeat(puzzle[None], 4**blanks, 0)
        fillings[:, puzzle == 0] = np.indices((4,) * blanks).reshape(blanks, -1).T + 1
        valid = np.ones(len(fillings), bool)
        for cells in (
            [(r, slice(None)) for r in range(4)]
            + [(slice(None), c) for c in range(4)]
            + [(slice(r, r + 2), slice(c, c + 2)) for r in (0, 2) for c in (0, 2)]
        ):
            valid &= (np.sort(fillings[(slice(None), *cells)].reshape(-1, 4), 1) == [1, 2, 3, 4]).all(1)
        assert fillings[valid].tolist() == [answer.tolist()]


def test_the_fewest_givens_are_reachable():
    puzzle, answer = sudoku(np.random.default_rng(1), 4, 12).test[0]
    assert (puzzle > 0).sum() == 4
    assert ((all_sudoku4() == puzzle) | (puzzle == 0)).all((1, 2)).sum() == 1 and check_sudoku(puzzle, answer)


def test_solver_finds_every_solution_of_partial_grids():
    rng = np.random.default_rng(3)
    for _ in range(30):
        puzzle = all_sudoku4()[rng.integers(288)] * (rng.random((4, 4)) < 0.3)
        expected = {g.tobytes() for g in all_sudoku4() if ((g == puzzle) | (puzzle == 0)).all()}
        found = solve_sudoku(puzzle, limit=1000)[0]
        assert len(found) == len(expected) and {g.tobytes() for g in found} == expected
        assert len(solve_sudoku(puzzle)[0]) == min(2, len(expected))


def test_solver_on_9x9():
    filled = np.array([[(3 * r + r // 3 + c) % 9 + 1 for c in range(9)] for r in range(9)], np.uint8)
    assert check_sudoku(filled, filled)
    puzzle = filled.copy()
    puzzle[0] = 0
    assert [s.tolist() for s in solve_sudoku(puzzle)[0]] == [filled.tolist()]
    # two digits that sit crosswise in two columns of one band can be swapped: a second solution
    puzzle = filled.copy()
    a, b = filled[0, 0], filled[0, 1]
    puzzle[(filled == a) | (filled == b)] = 0
    swapped = np.where(filled == a, b, np.where(filled == b, a, filled))
    found = {s.tobytes() for s in solve_sudoku(puzzle, limit=1000)[0]}
    assert {filled.tobytes(), swapped.tobytes()} <= found
    puzzle = filled.copy()
    puzzle[0, 0], puzzle[0, 1] = filled[0, 1], 0
    assert solve_sudoku(puzzle) == ([], 0)
    puzzle = filled.copy()
    puzzle[:4] = 0
    found = solve_sudoku(puzzle, limit=3)[0]
    assert len({s.tobytes() for s in found}) == 3 and all(check_sudoku(puzzle, s) for s in found)


UNITS = (
    [[(i, j) for j in range(9)] for i in range(9)]
    + [[(j, i) for j in range(9)] for i in range(9)]
    + [[(i // 3 * 3 + j // 3, i % 3 * 3 + j % 3) for j in range(9)] for i in range(9)]
)
UNITS_OF = {(r, c): [unit for unit in UNITS if (r, c) in unit] for r in range(9) for c in range(9)}


def refuted(puzzle):
    """-> (do the two rules alone show that a 9x9 grid has no solution? backtracks of a search of all of it)"""
    puzzle, digits = puzzle.copy(), set(range(1, 10))
    while True:
        left = {
            cell: digits.difference(*([puzzle[other] for other in unit] for unit in units))
            for cell, units in UNITS_OF.items()
            if not puzzle[cell]
        }
        places = [
            (v, [cell for cell in unit if v in left.get(cell, ())])
            for unit in UNITS
            for v in digits.difference(puzzle[cell] for cell in unit)
        ]
        if not all(left.values()) or not all(cells for _, cells in places):
            return True, 0
        forced = [(cell, v) for cell, values in left.items() if len(values) == 1 for v in values]
        forced += [(cells[0], v) for v, cells in places if len(cells) == 1]
        if not forced:
            break
        puzzle[forced[0][0]] = forced[0][1]
    if not left:
        return False, 0
    cell, tried = min(left, key=lambda c: (len(left[c]), c)), []
    for v in left[cell]:
        puzzle[cell] = v
        tried.append(refuted(puzzle))
    failed = sum(wrong for wrong, _ in tried)
    return False, sum(n for _, n in tried) + failed + (failed == len(tried))


def test_backtracks_are_guesses_that_the_rules_refute():
    rng, counted = np.random.default_rng(8), []
    for _ in range(6):
        puzzle = sudoku(rng, 9, 54).test[0][0]
        for cell in rng.permutation(np.flatnonzero(puzzle)).tolist():  # no given too many: a hard one
            kept, puzzle.flat[cell] = puzzle.flat[cell], 0
            if len(solve_sudoku(puzzle)[0]) > 1:
                puzzle.flat[cell] = kept
        counted.append(solve_sudoku(puzzle)[1])
        assert refuted(puzzle) == (False, counted[-1])
    assert min(counted) == 0 and max(counted) > 5


@pytest.mark.parametrize("size,blanks", [(4, 6), (9, 30)])
def test_check_sudoku_refuses_every_changed_cell(size, blanks):
    puzzle, answer = sudoku(np.random.default_rng(7), size, blanks).test[0]
    assert check_sudoku(puzzle, answer)
    for cell in range(size * size):
        for value in set(range(size + 2)) - {int(answer.flat[cell])}:
            wrong = answer.copy()
            wrong.flat[cell] = value
            assert not check_sudoku(puzzle, wrong)
    other = answer % size + 1  # a valid grid, but not with these givens
    assert check_sudoku(other, other) and not check_sudoku(puzzle, other)
    assert not check_sudoku(puzzle, answer[:-1]) and not check_sudoku(puzzle, puzzle)


def test_sudoku9_keeps_its_word():
    task = sudoku(np.random.default_rng(0), 9, 45)
    puzzle, answer = task.test[0]
    assert task.kind == "sudoku" and task.train == [] and puzzle.dtype == answer.dtype == np.uint8
    assert (puzzle == 0).sum() == 45 and check_sudoku(puzzle, answer) and len(solve_sudoku(puzzle)[0]) == 1


def exact_cover(rows, columns):
    """Every choice of rows that covers each column once: Knuth's Algorithm X. rows: {name: columns}; columns: {column: names}."""
    if not columns:
        yield []
        return
    for name in list(columns[min(columns, key=lambda c: len(columns[c]))]):
        taken = []
        for c in rows[name]:
            for other in columns[c]:
                for d in rows[other]:
                    if d != c:
                        columns[d].discard(other)
            taken.append((c, columns.pop(c)))
        for rest in exact_cover(rows, columns):
            yield [name, *rest]
        for c, names in reversed(taken):
            columns[c] = names
            for other in names:
                for d in rows[other]:
                    if d != c:
                        columns[d].add(other)


def solved_otherwise(puzzle):
    """At most two solutions of a 9x9 sudoku, by another solver: lists of (row, column, digit)."""
    rows = {
        (r, c, v): (("cell", r, c), ("row", r, v), ("column", c, v), ("box", r // 3, c // 3, v))
        for r in range(9)
        for c in range(9)
        for v in range(1, 10)
        if puzzle[r, c] in (0, v)
    }
    columns = {}
    for name, covered in rows.items():
        for c in covered:
            columns.setdefault(c, set()).add(name)
    return [sorted(found) for found in itertools.islice(exact_cover(rows, columns), 2)]


@pytest.mark.parametrize("blanks", [30, 54])
def test_sudoku9_has_one_solution_by_another_solver(blanks):
    for seed in range(3):
        puzzle, answer = sudoku(np.random.default_rng([blanks, seed]), 9, blanks).test[0]
        assert solved_otherwise(puzzle) == [[(r, c, answer[r, c]) for r in range(9) for c in range(9)]]


@pytest.mark.parametrize(
    "size,blanks,split,says",
    [
        (6, 5, "train", "4 or 9"),
        (4, 13, "train", "1 to 12"),
        (9, 0, "train", "1 to 54"),
        (9, 30, "validation", "'validation'"),
    ],
)
def test_impossible_sudokus_are_refused(size, blanks, split, says):
    with pytest.raises(ValueError, match=says):
        sudoku(np.random.default_rng(0), size, blanks, split)


@pytest.mark.parametrize("bad", [np.zeros((3, 3), int), np.full((4, 4), 5), np.zeros(16, int)])
def test_solver_refuses_what_is_no_sudoku(bad):
    with pytest.raises(ValueError, match="sudoku"):
        solve_sudoku(bad)


# mazes


def simple_paths(puzzle):
    """Every way from start to goal that enters no cell twice, by plain recursion."""
    h, w = puzzle.shape
    start, goal = (tuple(np.argwhere(puzzle == v)[0].tolist()) for v in (2, 3))
    found = []

    def walk(path):
        r, c = path[-1]
        if path[-1] == goal:
            found.append(path)
            return
        for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if 0 <= y < h and 0 <= x < w and puzzle[y, x] != 1 and (y, x) not in path:
                walk([*path, (y, x)])

    walk([start])
    return sorted(found, key=len)


def test_mazes_have_one_shortest_path_by_exhaustion():
    rng = np.random.default_rng(11)
    loops = 0
    for _ in range(60):
        puzzle, answer = maze(rng, 5, 6).test[0]
        paths = simple_paths(puzzle)
        assert len(paths) == 1 or len(paths[0]) < len(paths[1])
        assert 2 * (len(paths[0]) - 1) >= 5 + 6
        expected = puzzle.copy()
        for cell in paths[0][1:-1]:
            expected[cell] = 4
        assert answer.tolist() == expected.tolist()
        loops += len(paths) > 1
    assert 5 < loops < 55  # trees and mazes with a choice, both


@pytest.mark.parametrize("height,width", [(3, 3), (4, 9), (7, 7), (8, 8), (30, 30)])
def test_mazes_of_many_sizes(height, width):
    rng = np.random.default_rng(height * width)
    for _ in range(20):
        task = maze(rng, height, width)
        puzzle, answer = task.test[0]
        assert task.kind == "maze" and task.train == [] and puzzle.shape == answer.shape == (height, width)
        assert puzzle.dtype == answer.dtype == np.uint8 and check_maze(puzzle, answer)
        assert 2 * ((answer == 4).sum() + 1) >= height + width


def test_check_maze_refuses_every_changed_cell():
    rng = np.random.default_rng(5)
    for _ in range(5):
        puzzle, answer = maze(rng, 7, 7).test[0]
        for cell in range(49):
            for value in set(range(6)) - {int(answer.flat[cell])}:
                wrong = answer.copy()
                wrong.flat[cell] = value
                assert not check_maze(puzzle, wrong)
        assert not check_maze(puzzle, puzzle) and not check_maze(puzzle, answer[1:])


@pytest.mark.parametrize(
    "puzzle,answer,right",
    [
        ("2000/1110/3000", "2444/1114/3444", True),
        ("2000/0110/0003", "2444/0114/0003", False),  # two shortest ways
        ("2000/0110/3000", "2000/4110/3000", True),
        ("2000/0110/3000", "2444/0114/3444", False),  # the long way round
        ("2010/0010/0013", "2010/0010/0013", False),  # no way
        ("20003/00000", "24443/00000", True),
        ("20003/00000", "24403/00400", False),  # a cell beside the way
        ("20003/00000", "24443/00400", False),  # one cell too many
        ("20003/00000", "24043/04000", False),  # one cell for each step, but they do not hang together
        ("23", "23", True),
        ("22003", "24443", False),
    ],
)
def test_check_maze_by_hand(puzzle, answer, right):
    assert check_maze(grid(puzzle), grid(answer)) is right


def test_one_of_several_shortest_ways():
    room = grid("200/000/003")
    assert check_maze(room, grid("244/004/003"), only=False) and check_maze(
        room, grid("200/444/003"), only=False
    )
    assert not check_maze(room, grid("200/440/003"), only=False)  # an end that leads nowhere
    assert not check_maze(room, grid("244/004/003")) and check_maze(room, grid("200/440/043"), only=False)
    assert not check_maze(
        grid("200/000/300"), grid("244/004/344"), only=False
    )  # a way, but not a shortest one


def test_impossible_mazes_are_refused():
    for sides in ((2, 7), (7, 31)):
        with pytest.raises(ValueError, match="3 to 30"):
            maze(np.random.default_rng(0), *sides)


# transforms

G = "120/003/100"
KNOWN = {
    "flip": [({"axis": 0}, G, "100/003/120"), ({"axis": 1}, G, "021/300/001")],
    "rotate": [({"k": 1}, G, "030/200/101"), ({"k": 2}, G, "001/300/021")],
    "transpose": [({"anti": 0}, G, "101/200/030"), ({"anti": 1}, G, "030/002/101")],
    "swap": [({"a": 1, "b": 2}, G, "210/003/200")],
    "replace": [({"a": 1, "b": 5}, G, "520/003/500"), ({"a": 1, "b": 0}, G, "020/003/000")],
    "next_colour": [({"k": 1}, "120/009/800", "230/001/900"), ({"k": 8}, "120/009/800", "910/008/700")],
    "roll": [({"dy": 1, "dx": 0}, G, "100/120/003"), ({"dy": 0, "dx": -1}, G, "201/030/001")],
    "shift": [
        ({"dy": 1, "dx": 0}, G, "000/120/003"),
        ({"dy": 0, "dx": -1}, G, "200/030/000"),
        ({"dy": -1, "dx": 2}, G, "000/001/000"),
    ],
    "crop": [({}, "0000/0120/0030/0000", "12/03")],
    "crop_colour": [({"a": 1}, "0100/0210/3000", "10/21")],
    "scale": [({"k": 2}, "10/02", "1100/1100/0022/0022")],
    "tile": [({"ny": 1, "nx": 2}, "10/02", "1010/0202"), ({"ny": 3, "nx": 1}, "12", "12/12/12")],
    "mirror": [
        ({"side": 0}, "12/30", "12/30/30/12"),
        ({"side": 1}, "12/30", "1221/3003"),
        ({"side": 2}, "12/30", "30/12/12/30"),
        ({"side": 3}, "12/30", "2112/0330"),
    ],
    "kaleidoscope": [({}, "12/30", "1221/3003/3003/1221")],
    "gravity": [
        ({"side": 0}, G, "000/100/123"),
        ({"side": 1}, G, "012/003/001"),
        ({"side": 2}, G, "123/100/000"),
        ({"side": 3}, G, "120/300/100"),
    ],
    "border": [({"a": 5}, G, "555/505/555")],
    "frame": [({"a": 5}, "12/30", "5555/5125/5305/5555")],
    "outline": [({"a": 5}, "0000/0100/0000/0000", "5550/5150/5550/0000")],
    "largest": [({}, "1100/0020/0030/3020", "0000/0020/0030/0020")],
    "fill_enclosed": [
        ({"a": 5}, "1110/1010/1110/0000", "1110/1510/1110/0000"),
        ({"a": 5}, "0100/1010/0100/0000", "0100/1510/0100/0000"),
        ({"a": 5}, "1110/1000/1110/0000", "1110/1000/1110/0000"),
    ],
    "rays": [
        ({"side": 0}, "010/000/203", "010/010/213"),
        ({"side": 1}, "0100/0000/2003", "0111/0000/2223"),
        ({"side": 2}, "010/000/203", "213/203/203"),
        ({"side": 3}, "010/000/203", "110/000/233"),
    ],
    "connect": [
        ({"axis": 1}, "1001/0200/2003/0020", "1111/0200/2003/0020"),
        ({"axis": 0}, "100/000/120", "100/100/120"),
        ({"axis": 1}, "10201/00000", "10201/00000"),
    ],
    "count_bars": [({"axis": 1}, "110/122/003", "111/220/300"), ({"axis": 0}, "110/122/003", "123/120/100")],
    "halves": [
        ({"op": 0, "axis": 1, "a": 3}, "10502/11520/00500", "00/30/00"),
        ({"op": 1, "axis": 1, "a": 3}, "10502/11520/00500", "33/33/00"),
        ({"op": 2, "axis": 1, "a": 3}, "10502/11520/00500", "33/03/00"),
        ({"op": 3, "axis": 1, "a": 3}, "10502/11520/00500", "00/00/33"),
        ({"op": 0, "axis": 0, "a": 3}, "110/010/555/020/200", "030/000"),
    ],
    "sort_lines": [
        ({"axis": 0, "descending": 0}, G, "003/100/120"),
        ({"axis": 0, "descending": 1}, G, "120/003/100"),
        ({"axis": 1, "descending": 0}, G, "201/030/001"),
    ],
    "symmetric": [({"axis": 0}, "100/020/003", "103/020/103"), ({"axis": 1}, "100/020/003", "101/020/303")],
    "squeeze": [({}, "100/000/203", "10/23")],
    "commonest": [({"least": 0}, "110/200/100", "111/111/111"), ({"least": 1}, "110/200/100", "222/222/222")],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_by_hand(name):
    settings, apply, _ = TRANSFORMS[name]
    for params, before, after in KNOWN[name]:
        assert params in settings
        given = grid(before)
        out = apply(given, **params)
        assert out.dtype == np.uint8 and np.array_equal(out, grid(after)), (params, out)
        assert np.array_equal(given, grid(before)), "the input was changed"


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_accept_any_grid(name):
    settings, apply, _ = TRANSFORMS[name]
    rng = np.random.default_rng(0)
    for g in (
        np.zeros((3, 3), np.uint8),
        np.full((8, 3), 9, np.uint8),
        rng.integers(10, size=(3, 8), dtype=np.uint8),
    ):
        for params in settings:
            out = apply(g, **params)
            assert out.dtype == np.uint8 and out.ndim == 2 and out.size and out.max() <= 9


@pytest.fixture(scope="module")
def transforms():
    rng = np.random.default_rng(20)
    return [transform(rng) for _ in range(500)]


def test_every_family_appears_and_sizes_hold(transforms):
    assert len(TRANSFORMS) >= 16
    assert {program_of(task.id)[0] for task in transforms} == set(TRANSFORMS)
    for task in transforms:
        assert (
            task.kind == "arc" and 2 <= len(task.train) <= 4 and len(task.test) == 1 and check_transform(task)
        )
        for x, y in task.train + task.test:
            assert x.dtype == y.dtype == np.uint8 and x.max() <= 9 and y.max() <= 9
            assert 3 <= min(x.shape) and max(x.shape) <= 8 and 1 <= min(y.shape) and max(y.shape) <= 12
            assert x.flags.c_contiguous and y.flags.c_contiguous


def test_demonstrations_are_informative_and_leave_one_answer(transforms):
    for task in transforms:
        pairs = task.train + task.test
        assert len({(x.shape, x.tobytes()) for x, _ in pairs}) == len(pairs)
        for x, y in pairs:
            assert y.any() and not np.array_equal(x, y)
    # crop and squeeze, largest and others: these are the families that get mixed up when demonstrations are few
    for task in transforms[:15] + [task for task in transforms if task.id in ("crop", "squeeze", "largest")]:
        answers = set()
        for settings, apply, _ in TRANSFORMS.values():
            for params in settings:
                if all(np.array_equal(apply(x, **params), y) for x, y in task.train):
                    answers.add(str(apply(task.test[0][0], **params).tolist()))
        assert answers == {str(task.test[0][1].tolist())}


def test_check_transform_refuses_a_changed_cell_and_another_program(transforms):
    for task in transforms[:50]:
        wrong = task.test[0][1].copy()
        wrong.flat[0] = (wrong.flat[0] + 1) % 10
        assert not check_transform(Task(task.id, "arc", task.train, [(task.test[0][0], wrong)]))
    task = next(task for task in transforms if task.id.startswith("flip"))
    other = {"flip:axis=0": "flip:axis=1", "flip:axis=1": "flip:axis=0"}[task.id]
    for task_id in (other, "flip", "flip:axis=2", "flip:axis=x", "turn:axis=0", "", "transforms-0001"):
        assert not check_transform(Task(task_id, "arc", task.train, task.test))


def test_program_ids():
    assert (
        program_of("roll:dy=1:dx=-2")
        == program_of("transforms-0007:roll:dy=1:dx=-2")
        == ("roll", {"dy": 1, "dx": -2})
    )
    assert program_of("crop") == ("crop", {})
    for bad in ("roll:dy=1", "roll:dy=0:dx=0", "crop:a=1", "rol:dy=1:dx=1"):
        with pytest.raises(ValueError, match="names no program"):
            program_of(bad)


# arithmetic


def test_every_template_gives_texts_that_verify():
    rng = np.random.default_rng(2)
    texts, wordings = set(), set()
    for _ in range(600):
        text, answer = arithmetic(rng)
        assert type(answer) is int and answer > 1
        assert text.splitlines()[-1] == f"Answer: {answer}" and not re.search(r"[{}\[\]]", text)
        assert check_arithmetic(text)
        texts.add(text)
        for word in (*puzzles.NAMES, *puzzles.THINGS):
            text = re.sub(rf"\b{word}\b", "_", text)
        wordings.add(re.sub(r"\d+", "0", text))
    assert len(wordings) == len(TEMPLATES) >= 12 and len(texts) > 550


def test_tampered_arithmetic_is_refused():
    rng = np.random.default_rng(4)
    for _ in range(100):
        text, answer = arithmetic(rng)
        for number in re.finditer(r"\d+", text):
            changed = text[: number.start()] + str(int(number[0]) + 1000) + text[number.end() :]
            assert not check_arithmetic(changed), changed
        assert not check_arithmetic(text.replace(f"Answer: {answer}", f"Answer: {answer - 1}"))
        assert not check_arithmetic(text.rsplit("\n", 1)[0])


@pytest.mark.parametrize(
    "text,right",
    [
        ("Question: Ada has 2 nails and 3 more.\nSolution: Ada has 2 + 3 = 5 nails.\nAnswer: 5", True),
        ("Question: Ada has 2 nails and 3 more.\nSolution: Ada has 2 + 3 = 6 nails.\nAnswer: 6", False),
        (
            "Question: Ada has 2 nails and 3 more.\nSolution: Ada has 1 + 4 = 5 nails.\nAnswer: 5",
            False,
        ),  # other numbers
        (
            "Question: Ada has 2 nails, 3 more and 4 more.\nSolution: Ada has 2 + 3 = 5 nails.\nAnswer: 5",
            False,
        ),  # a number unused
        (
            "Question: Ada has 2 nails and 3 more.\nSolution: Ada has 5 nails.\nAnswer: 5",
            False,
        ),  # no equation
        ("Question: Ada has 2 nails and 0 more.\nSolution: Ada has 2 / 0 = 5 nails.\nAnswer: 5", False),
        (
            "Question: Ada has 7 nails for 2.\nSolution: Each gets 7 / 2 = 3 nails.\nAnswer: 3",
            False,
        ),  # not exact
        ("Question: Ada has 2 nails and 03 more.\nSolution: Ada has 2 + 03 = 5 nails.\nAnswer: 5", False),
        ("2 + 3 = 5", False),
        ("", False),
    ],
)
def test_check_arithmetic_by_hand(text, right):
    assert check_arithmetic(text) is right


# suites, seeds, the command


def everything_from_one_seed():
    rng = np.random.default_rng(99)
    tasks = [
        task
        for _ in range(8)
        for task in (sudoku(rng, 4, 8), sudoku(rng, 9, 30), maze(rng, 9, 8), transform(rng))
    ]
    return f"{digest(tasks)} {[arithmetic(rng) for _ in range(8)]} {SUDOKU4_HELD_OUT}"


def test_same_seed_same_puzzles_in_another_process():
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_puzzles; print(test_puzzles.everything_from_one_seed())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        cwd=os.path.dirname(os.path.dirname(puzzles.__file__)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == everything_from_one_seed()


@pytest.mark.parametrize(
    "suite,fixed",
    [
        ("sudoku4", "f6fae1b799d2150b"),
        ("sudoku9", "af4844f4aa743b5c"),
        ("maze", "ddca6f25ad46a83f"),
        ("transforms", "8155cb856bd29394"),
    ],
)
def test_suites_verify_and_never_change(suite, fixed):
    """The digest pins the tasks. If it moves, results before and after cannot be compared: a new numpy or a changed generator did it."""
    tasks = heldout(suite)
    assert suite in SUITES and len(tasks) == (100 if suite == "sudoku4" else 50)
    assert all(check(task) for task in tasks)
    assert len({task_hash(task) for task in tasks}) == len({task.id for task in tasks}) == len(tasks)
    assert all(task.id.startswith(f"{suite}-{i:04d}") for i, task in enumerate(tasks))
    assert all(max(g.shape) <= 30 for task in tasks for pair in task.train + task.test for g in pair)
    assert digest(heldout(suite, 7)) == digest(tasks[:7])
    assert digest(tasks) == fixed


def test_sudoku4_suite_uses_held_out_grids_only():
    held = {g.tobytes() for g in sudoku4_grids("test")}
    for task in heldout("sudoku4"):
        puzzle, answer = task.test[0]
        assert answer.tobytes() in held and (puzzle == 0).sum() == 6
    assert all((task.test[0][0] == 0).sum() == 30 for task in heldout("sudoku9", 3))
    assert heldout("maze", 0) == []


def test_unknown_suite_names_the_closest():
    with pytest.raises(ValueError, match="did you mean 'sudoku9'"):
        heldout("sudoku-9")
    with pytest.raises(ValueError, match="-1 held-out puzzles of maze: there are 50"):
        heldout("maze", -1)


@pytest.mark.parametrize("suite", SUITES)
def test_no_puzzle_is_called_held_out_that_may_have_been_trained_on(suite):
    with pytest.raises(ValueError, match="only these are kept out of training"):
        heldout(suite, puzzles.HELD_OUT_N[suite] + 1)


def test_task_hash_is_of_the_content():
    task = heldout("transforms", 1)[0]
    assert task_hash(Task("another id", "arc", task.train, task.test)) == task_hash(task)
    assert task_hash(Task(task.id, "program", task.train, task.test)) != task_hash(task)
    assert task_hash(Task(task.id, "arc", task.train[::-1], task.test)) != task_hash(task)
    for k in range(8):  # the loader may turn and mirror, and then it is still this puzzle
        turned = [tuple(images(g)[k] for g in pair) for pair in task.train + task.test]
        assert task_hash(Task("", "arc", turned[:-1], turned[-1:])) == task_hash(task)
    x, y = task.test[0]
    changed = y.copy()
    changed.flat[-1] = (changed.flat[-1] + 1) % 10
    assert task_hash(Task(task.id, "arc", task.train, [(x, changed)])) != task_hash(task)
    flat, tall = np.zeros((1, 4), np.uint8), np.zeros((2, 2), np.uint8)  # same cells, other shape
    assert task_hash(Task("", "arc", [], [(flat, flat)])) != task_hash(Task("", "arc", [], [(tall, tall)]))


def test_check_refuses_a_sudoku_with_two_answers():
    answer = all_sudoku4()[0]
    task = Task("", "sudoku", [], [(np.zeros((4, 4), np.uint8), answer)])
    assert check_sudoku(*task.test[0]) and not check(task)
    with pytest.raises(ValueError, match="no checker"):
        check(Task("", "logic", [], task.test))
