"""programs.py and puzzles.py: the language does what its documentation says, every task verifies, every puzzle has one answer."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smol import arc, programs, puzzles
from smol import tokenizer as tok

ROOT = Path(__file__).parent.parent


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- the language, function by function, beside plain loops


def cells(grid):
    return {(r, c): int(v) for (r, c), v in np.ndenumerate(grid)}


def objects_of(grid):
    """Sets of coloured cells that touch by sides, by merging labels until nothing changes."""
    label = {at: i for i, (at, v) in enumerate(cells(grid).items()) if v}
    moving = True
    while moving:
        moving = False
        for (r, c), mine in list(label.items()):
            for near in ((r + 1, c), (r, c + 1), (r - 1, c), (r, c - 1)):
                if label.get(near, mine) < mine:
                    label[r, c] = mine = label[near]
                    moving = True
    return [sorted(at for at, v in label.items() if v == i) for i in sorted(set(label.values()))]


def filled(grid, value_of):
    return np.array([[value_of(r, c) for c in range(grid.shape[1])] for r in range(grid.shape[0])], np.uint8)


def near4(grid, r, c):
    h, w = grid.shape
    return [
        int(grid[y, x])
        for y, x in ((r - 1, c), (r, c - 1), (r, c + 1), (r + 1, c))
        if 0 <= y < h and 0 <= x < w
    ]


def slow_box(g):
    out = g.copy()
    for part in objects_of(g):
        (top, bottom), (left, right) = ((min(axis), max(axis)) for axis in zip(*part))
        for r, c in itertools.product(range(top, bottom + 1), range(left, right + 1)):
            if out[r, c] == 0:
                out[r, c] = g[part[0]]
    return out


def slow_cross(g):
    coloured = [(r, c) for (r, c), v in sorted(cells(g).items()) if v]

    def colour(r, c):
        if g[r, c]:
            return g[r, c]
        row = [g[y, x] for y, x in coloured if y == r]
        column = [g[y, x] for y, x in coloured if x == c]
        return (row + column + [0])[0]

    return filled(g, colour)


def slow_diagonals(g, up):
    coloured = [(r, c) for (r, c), v in sorted(cells(g).items()) if v]
    return filled(
        g,
        lambda r, c: (
            g[r, c] or ([g[y, x] for y, x in coloured if (r + c == y + x if up else r - c == y - x)] + [0])[0]
        ),
    )


def slow_odd_colour(g):
    counts = {v: (g == v).sum() for v in range(1, 10) if (g == v).any()}
    rare = min(counts, key=lambda v: (counts[v], v)) if counts else 0
    return filled(g, lambda r, c: g[r, c] if g[r, c] == rare else 0)


def slow_row_colour(g, axis):
    def colour(line):
        found = [v for v in line if v]
        return max(sorted(set(found)), key=found.count) if found else 0

    return filled(g, lambda r, c: colour((g[r] if axis == 1 else g[:, c]).tolist()))


def slow_by_size(g, a, b):
    parts = objects_of(g)
    most = max(map(len, parts), default=0)
    colour = {at: a if len(part) == most else b for part in parts for at in part}
    return filled(g, lambda r, c: colour.get((r, c), 0))


def only(g, part):
    return filled(g, lambda r, c: g[r, c] if (r, c) in part else 0)


def slow_distinct(g, axis):
    lines = [list(x) for x in (g if axis == 0 else g.T)]
    kept = np.array([line for line, _ in itertools.groupby(lines)], np.uint8)
    return kept if axis == 0 else kept.T


SLOW = {
    "keep": lambda g, a: filled(g, lambda r, c: a if g[r, c] == a else 0),
    "negative": lambda g, a: filled(g, lambda r, c: 0 if g[r, c] else a),
    "paint": lambda g, a: filled(g, lambda r, c: a if g[r, c] else 0),
    "hollow": lambda g: filled(
        g, lambda r, c: 0 if len(near4(g, r, c)) == 4 and all(near4(g, r, c)) else g[r, c]
    ),
    "grow": lambda g: filled(g, lambda r, c: g[r, c] or next((v for v in near4(g, r, c) if v), 0)),
    "smallest": lambda g: only(g, min(objects_of(g), key=len, default=[])),
    "without_specks": lambda g: only(g, {at for part in objects_of(g) if len(part) > 1 for at in part}),
    "box": slow_box,
    "by_size": slow_by_size,
    "count_objects": lambda g, a: np.full((1, max(len(objects_of(g)), 1)), a, np.uint8),
    "cross": slow_cross,
    "diagonals": slow_diagonals,
    "checker": lambda g, odd: filled(g, lambda r, c: g[r, c] if (r + c) % 2 == odd else 0),
    "stripes": lambda g, axis, k, a: filled(g, lambda r, c: a if (c if axis else r) % k == 0 else g[r, c]),
    "half": lambda g, side: {
        0: g[-(len(g) // 2) :],
        1: g[:, -(g.shape[1] // 2) :],
        2: g[: len(g) // 2],
        3: g[:, : g.shape[1] // 2],
    }[side],
    "beside": lambda g, k: np.hstack([g, (g, g[::-1], g[::-1, ::-1])[k]]),
    "fold": lambda g, axis: slow_fold(g if axis == 0 else g.T) if axis == 0 else slow_fold(g.T).T,
    "sort_cells": lambda g, axis: (
        np.array([sorted(x) for x in (g.T if axis == 0 else g)], np.uint8).T
        if axis == 0
        else np.array([sorted(x) for x in g], np.uint8)
    ),
    "row_colour": slow_row_colour,
    "distinct_lines": slow_distinct,
    "odd_colour": slow_odd_colour,
    "fall_apart": lambda g, dy: filled(
        g, lambda r, c: cells(g).get((r - dy if c % 2 == 0 else r + dy, c), 0)
    ),
    "widen": lambda g, axis: slow_widen(g) if axis == 0 else slow_widen(g.T).T,
    "margin": lambda g, k: filled(
        np.zeros((g.shape[0] + 2 * k, g.shape[1] + 2 * k)), lambda r, c: cells(g).get((r - k, c - k), 0)
    ),
}


def slow_widen(g):
    return np.array([row for row in g for _ in range(2)])


def slow_fold(g):
    h = len(g)
    return filled(g[: (h + 1) // 2], lambda r, c: g[h - 1 - r, c] or g[r, c])


@pytest.mark.parametrize("name", SLOW)
def test_functions_do_what_a_plain_loop_does(name):
    settings, apply, make_input = programs.LANGUAGE[name]
    draw = rng(len(name))
    for i in range(12):
        for params in settings[:: max(1, len(settings) // 8)]:
            grid = np.ascontiguousarray(make_input(draw, params))
            before = grid.copy()
            assert np.array_equal(apply(grid, **params), SLOW[name](grid, **params)), (
                name,
                params,
                grid.tolist(),
            )
            assert np.array_equal(grid, before), "the input was changed"


def test_every_new_function_is_checked_and_documented():
    assert set(SLOW) == set(programs.LANGUAGE) - set(programs.TRANSFORMS)
    for name, (_, apply, _) in programs.LANGUAGE.items():
        assert apply.__doc__ or name in ("flip", "rotate", "transpose", "scale", "tile")  # whose names say it


# ---- families


def test_there_are_enough_families_and_levels():
    assert len(programs.FAMILIES) >= 40
    assert {len(slots) for slots, _ in programs.FAMILIES.values()} >= {1, 2, 3}


@pytest.mark.parametrize("family", programs.FAMILIES)
def test_tasks_of_every_family_verify(family):
    draw = rng(3)
    for _ in range(2):
        task, steps = programs.make(draw, family)
        text = programs.program_text(steps)
        assert (
            len(steps) == len(programs.FAMILIES[family][0])
            and 2 <= len(task.train) <= 4
            and len(task.test) == 1
        )
        # the text is Python: executed as such, with the language's functions, it gives the same
        space = {name: apply for name, (_, apply, _) in programs.LANGUAGE.items()}
        exec(text, space)  # noqa: S102
        for x, y in task.train + task.test:
            assert np.array_equal(space["solve"](x), y) and y.any() and max(*x.shape, *y.shape) <= 30
            assert not np.array_equal(x, y)
        arc.decode(arc.encode(task.kind, task.train + task.test))
        assert programs.check(task, text)
        wrong = arc.Task("", "arc", task.train, [(task.test[0][0], np.pad(task.test[0][1], 1))])
        assert not programs.check(wrong, text)


def everything_from_one_seed():
    draw = rng(5)
    return [
        [np.asarray(p).tolist() if not isinstance(p, str) else p for p in programs.trace(draw)[1]]
        + [puzzles.shortest_path(draw), puzzles.logic_puzzle(draw)]
        for _ in range(6)
    ]


def test_same_seed_same_tasks_in_another_process():
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_programs; print(test_programs.everything_from_one_seed())"
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str(everything_from_one_seed())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def solve(grid):\n    grid = crop(grid)\n    return grid\n", None),
        ("def solve(grid):\n    grid = crp(grid)\n    return grid\n", "closest is 'crop'"),
        ("def solve(grid):\n    grid = flip(grid, axis=7)\n    return grid\n", "does not take"),
        ("def solve(grid):\n    import os\n    return grid\n", "not a program"),
        ("def solve(grid):\n    grid = crop(other)\n    return grid\n", "does not turn grid into grid"),
        ("def solve(grid):\n    return 1\n", "return grid"),
        ("nonsense(", "not a program"),
    ],
)
def test_parse(text, says):
    if says is None:
        assert programs.program_text(programs.parse(text)) == text
    else:
        with pytest.raises(ValueError, match=says):
            programs.parse(text)


def test_traces_hold_the_program_and_what_it_does():
    draw, shown = rng(1), set()
    for _ in range(30):
        task, parts, more = programs.trace(draw)
        (text,) = (p for p in parts if isinstance(p, str))
        ids = np.concatenate([[-1] if isinstance(p, str) else np.atleast_1d(p) for p in parts]).tolist()
        at = ids.index(-1)
        # what comes before the program is the task as a puzzle has it, but for the kind of document
        kind, pairs = arc.decode([*ids[:at], tok.OUTPUT, *arc.encode_grid(task.test[0][1]), tok.EOT])
        assert kind == "program" and all(
            np.array_equal(a, b) for p, q in zip(pairs, task.train + task.test) for a, b in zip(p, q)
        )
        # what comes after it are the grids of its steps, the last of which is the answer
        after = ids[at + 1 :]
        grids = [np.array(x) for x in programs.run(text, task.test[0][0])]
        grids = grids if after.count(tok.OUTPUT) == len(grids) else grids[-1:]
        assert after == [i for g in grids for i in [tok.OUTPUT, *arc.encode_grid(g).tolist()]]
        assert np.array_equal(grids[-1], task.test[0][1]) and len(more) == len(grids) - 1
        shown.add(len(grids))
    assert len(shown) > 1


# ---- graphs and logic


KINDS = {"shortest": (puzzles.shortest_path, puzzles.check_shortest_path), **puzzles.LOGIC}


@pytest.mark.parametrize("kind", KINDS)
def test_puzzles_in_words_have_one_answer(kind):
    make, check = KINDS[kind]
    draw = rng(11)
    for _ in range(40):
        text, answer = make(draw)
        assert text.endswith(f"\nAnswer: {answer}") and check(text), text


def test_an_argument_about_knights_is_whole():
    """One assumption ends in a contradiction, the other in everyone's kind, as in the answer: nothing is found without a reason."""
    draw = rng(13)
    for _ in range(40):
        text, answer = puzzles.knights(draw)
        refuted, found = text.split("Solution: ")[1].split("\nAnswer")[0].split(" Suppose ")
        assert refuted.endswith("could not have spoken so.") and found.endswith(" That fits."), text
        said = sorted(f"{who} {what}" for who, what in re.findall(r"(\w+) is a (knight|knave)\.", found))
        assert ", ".join(said) == answer, text


@pytest.mark.parametrize("kind", KINDS)
def test_checkers_refuse_wrong_answers(kind):
    make, check = KINDS[kind]
    draw = rng(12)
    swapped = {"knight": "knave", "knave": "knight"}
    for _ in range(20):
        text, answer = make(draw)
        if kind == "seating":
            wrong = " ".join(answer.split()[1:] + answer.split()[:1])
        elif kind == "knights":
            wrong = re.sub("|".join(swapped), lambda found: swapped[found[0]], answer, count=1)
        else:
            wrong = re.sub(r"\d+", lambda found: str(int(found[0]) + 1), answer, count=1)
        assert wrong != answer and not check(text.removesuffix(answer) + wrong), text


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [
        (
            "shortest",
            "Roads and their lengths: A-B 2, B-C 2, A-D 2, D-C 2. What is the shortest way from A to C?",
            "A-B-C, length 4",
        ),
        (
            "seating",
            "3 people sit on a row of chairs: Ada, Ben, Chen. Ada sits next to Ben. In which order?",
            "Ada Ben Chen",
        ),
        (
            "knights",
            'Ada says: "Ben is a knight." Ben says: "Ada is a knight." Who?',
            "Ada knight, Ben knight",
        ),
    ],
)
def test_checkers_refuse_questions_with_two_answers(kind, question, answer):
    assert not KINDS[kind][1](f"Question: {question}\nSolution: so\nAnswer: {answer}")


def test_known_answers():
    text = "Question: Roads: A-B 2, B-C 2, A-C 5. What is the shortest way from A to C?\nSolution: x\nAnswer: A-B-C, length 4"
    assert puzzles.check_shortest_path(text)
    with pytest.raises(ValueError, match="not a puzzle"):
        puzzles.check_knights("hello")
