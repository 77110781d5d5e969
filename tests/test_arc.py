"""Grids: every ARC task through the codec, positions against a plain loop, symmetries undone, canvases,
pictures."""

import itertools
import re

import numpy as np
import pytest
import torch

from smol import arc
from smol.arc import SETS, Augment
from smol.tokenizer import ARC, BLANK, CELL0, EOT, INPUT, OUTPUT, PAD, PROGRAM, ROW, VOID

TASKS = {name: arc.load(name) for name in SETS}


def random_grid(rng, largest=30):
    return rng.integers(0, 10, size=rng.integers(1, largest + 1, size=2)).astype(np.uint8)


def same(a, b):
    return a.dtype == b.dtype == np.uint8 and a.shape == b.shape and np.array_equal(a, b)


# ----------------------------------------------------------------------------- tasks


def test_sets_are_complete():
    assert [sum(len(t.test) for t in TASKS[s]) for s in SETS] == [416, 419, 1076, 167]
    train, evaluation = ({t.id for t in TASKS[s]} for s in ("arc2_train", "arc2_eval"))
    ids = {t.id for t in TASKS["arc1_eval"]}
    assert len(ids & train) == 376 and len(ids & evaluation) == 6  # as load's docstring warns
    assert len(arc.find("00576224").train) == 2 and arc.find(TASKS["arc2_eval"][0].id) is not None
    with pytest.raises(ValueError, match="00576224"):
        arc.find("0057622")


def test_validate_grid():
    assert same(arc.validate_grid([[0.0, 9], [3, 4]]), np.array([[0, 9], [3, 4]], np.uint8))
    wrong_shapes = ([], [[]], [1, 2], [[1, 2], [3]], np.zeros((31, 1), int), np.zeros((1, 1, 1), int))
    wrong_cells = ([[np.nan]], [[1e300]], [[10]], [[-1]], [[0.5]], [["1"]], [[None]], [[True]])
    for bad in (*wrong_shapes, *wrong_cells, [[np.inf]]):
        with pytest.raises(ValueError), np.errstate(invalid="raise"):  # without a warning besides
            arc.validate_grid(bad)


# ----------------------------------------------------------------------------- codec


@pytest.mark.parametrize("name", SETS)
def test_every_task_round_trips(name):
    for task in TASKS[name]:
        for question in task.test:
            pairs = task.train + [question]
            ids = arc.encode(task.kind, pairs)
            assert ids.dtype == np.uint16
            assert len(ids) == 2 + sum(1 + g.shape[0] * (g.shape[1] + 1) for p in pairs for g in p)
            kind, back = arc.decode(ids)
            assert kind == task.kind and len(back) == len(pairs)
            assert all(same(a, b) for p, q in zip(pairs, back) for a, b in zip(p, q))


def test_known_encoding():
    x, y = np.array([[1, 2], [3, 4]], np.uint8), np.array([[9]], np.uint8)
    one, two, three, four = range(CELL0 + 1, CELL0 + 5)
    want = [PROGRAM, INPUT, one, two, ROW, three, four, ROW, OUTPUT, CELL0 + 9, ROW, EOT]
    assert arc.encode("program", [(x, y)]).tolist() == want
    assert arc.encode_prompt("program", [(x, y)], x).tolist() == want[:-1] + want[1:9]
    canvas = [one, two, BLANK, ROW, three, four, BLANK, ROW, BLANK, BLANK, BLANK, ROW]  # x in its corner
    assert arc.encode_prompt("program", [(x, y)], x, (3, 3)).tolist() == [*want[:-1], OUTPUT, *canvas]
    for pairs in ([], [(x, y[:0])], [(x, y + 5)]):
        with pytest.raises(ValueError):
            arc.encode("arc", pairs)


def test_any_damage_is_noticed():
    """After one token is dropped, repeated or changed: an error, or a document that encodes to just that."""
    rng = np.random.default_rng(0)
    task = arc.find("00576224")
    ids = arc.encode("arc", task.train + task.test).tolist()
    for at in range(len(ids)):
        token = int(rng.integers(50250, 50280))
        for part in ([], [ids[at]] * 2, [token]):
            damaged = ids[:at] + part + ids[at + 1 :]
            try:
                assert arc.encode(*arc.decode(damaged)).tolist() == damaged
            except ValueError as e:
                assert "malformed task" in str(e)
    for n in range(len(ids)):
        with pytest.raises(ValueError, match="malformed task"):
            arc.decode(ids[:n])


# ----------------------------------------------------------------------------- canvas


def test_canvas_shape():
    g = np.zeros
    assert arc.canvas_shape([], g((4, 7))) == (4, 7)
    assert arc.canvas_shape([(g((3, 3)), g((9, 6)))], g((4, 4))) == (12, 8)
    assert arc.canvas_shape([(g((3, 3)), g((7, 1)))], g((3, 2))) == (7, 3)  # 3 * (7/3) is 7, not 8
    assert arc.canvas_shape([(g((2, 2)), g((3, 3)))], g((5, 5))) == (8, 8)  # 7.5 rounded up
    assert arc.canvas_shape([(g((1, 1)), g((30, 30)))], g((2, 3))) == (30, 30)
    for name, fit in (("arc1_eval", 413), ("arc2_eval", 165)):  # of 419 and 167
        sizes = [(y.shape, arc.canvas_shape(t.train, x)) for t in TASKS[name] for x, y in t.test]
        assert sum(h <= H and w <= W for (h, w), (H, W) in sizes) == fit


def test_canvas_known_answers():
    V, R, C = VOID, ROW, CELL0
    assert arc.canvas_target(np.array([[3]], np.uint8), (2, 2)).tolist() == [C + 3, V, -100, V, V, -100]
    assert arc.read_canvas([V, V, R, V, V, R], (2, 2)) is None
    assert same(arc.read_canvas([V, V, R, V, C + 4, R], (2, 2)), np.array([[0, 0], [0, 4]], np.uint8))
    assert same(arc.read_canvas([C + 1, BLANK, R, PAD, 17, R], (2, 2)), np.array([[1]], np.uint8))
    for shape in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match="3x3 does not fit"):
            arc.canvas_target(np.zeros((3, 3), np.uint8), shape)


# ----------------------------------------------------------------------------- positions


def positions_by_loop(ids):
    out, number, grid, row, col = [], 0, 0, 0, 0  # `grid` is 0 outside a grid
    for i in ids:
        if i in (INPUT, OUTPUT):
            number += 1
            grid, row, col = number, 0, 0
            out.append([0, 0, grid])
        elif i in (ROW, BLANK, VOID) or CELL0 <= i < CELL0 + 10:
            out.append([row, col, grid] if grid else [0, 0, 0])
            row, col = (row + 1, 0) if i == ROW else (row, col + 1)
        else:
            out.append([0, 0, 0])
            grid = 0
            if i == EOT or ARC <= i <= PROGRAM:
                number = 0
    return out


def test_positions_match_the_loop():
    rng = np.random.default_rng(2)
    rows = []
    for i in range(8):  # packed rows: documents, text, canvases, padding, cut anywhere
        parts = []
        for task in rng.choice(TASKS["arc1_train"], size=6):
            parts += [
                arc.encode("arc", task.train + task.test[:1]),
                rng.integers(0, 50256, size=rng.integers(0, 30)),
                [EOT][: i % 2],
                arc.encode_prompt("maze", [], random_grid(rng, 6), canvas=(7, 8)),
                [PAD] * int(rng.integers(0, 4)),
            ]
        start = int(rng.integers(0, 300))
        rows.append(np.concatenate(parts)[start : start + 2000].astype(np.int64))
    tokens = [5, EOT, ARC, INPUT, OUTPUT, ROW, CELL0, CELL0 + 9, BLANK, VOID, PAD]
    noise = rng.choice(tokens, size=(20, 500))  # no sense at all
    for batch in (np.stack(rows), noise, noise[:, :1], np.full((2, 9), PAD)):
        got = arc.positions(torch.from_numpy(batch))
        assert got.tolist() == [positions_by_loop(row) for row in batch.tolist()]


# ----------------------------------------------------------------------------- symmetries


def test_the_eight_symmetries_turn_as_documented():
    g = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    seen = [arc.augment(Augment(k, arc.IDENTITY.colours), g).tolist() for k in range(8)]
    assert seen[0] == g.tolist() and seen[1] == [[3, 6], [2, 5], [1, 4]] and seen[2] == [[6, 5, 4], [3, 2, 1]]
    assert seen[4] == [[1, 4], [2, 5], [3, 6]] and len({str(s) for s in seen}) == 8


def test_random_augment():
    def draw(how, seed=0, n=500):
        rng = np.random.default_rng(seed)
        return [arc.random_augment(rng, how) for _ in range(n)]

    assert set(draw("none")) == {arc.IDENTITY}
    assert {a.dihedral for a in draw("dihedral")} == {a.dihedral for a in draw("arc")} == set(range(8))
    assert {a.colours for a in draw("dihedral")} == {tuple(range(10))}
    colours = {a.colours for a in draw("arc")}
    assert len(colours) > 450 and all(sorted(c) == list(range(10)) for c in colours)
    assert {c[0] for c in colours} == set(range(10))  # the background moves too
    assert draw("arc", 5) == draw("arc", 5) != draw("arc", 6)


def test_canonical_hash_is_the_same_under_every_symmetry_and_no_other():
    rng = np.random.default_rng(4)
    for i in range(20):
        grid, other = random_grid(rng, 8), random_grid(rng, 8)
        both = arc.canonical_hash(grid, other)
        for k in range(8):
            aug = Augment(k, tuple(rng.permutation(10).tolist()))
            assert arc.canonical_hash(arc.augment(aug, grid), arc.augment(aug, other)) == both
        assert arc.canonical_hash(other, grid) != both
    a, b = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(4, dtype=np.uint8).reshape(2, 2)
    assert len({arc.canonical_hash(a, g) for g in (b, np.rot90(b), b + 1, b.T)}) == 4  # turned apart: others

    def orbit(g):  # of three colours, by brute force
        turned = [arc.augment(Augment(k, arc.IDENTITY.colours), g) for k in range(8)]
        recolourings = [np.array(p) for p in itertools.permutations(range(3))]
        return frozenset(str(p[t].tolist()) for t in turned for p in recolourings)

    cells = np.array(list(itertools.product(range(3), repeat=4)), np.uint8)
    grids = [c.reshape(shape) for c in cells for shape in ((1, 4), (2, 2), (4, 1))]
    hashes, orbits = [arc.canonical_hash(g) for g in grids], [orbit(g) for g in grids]
    assert len(set(hashes)) == len(set(orbits)) == len(set(zip(hashes, orbits)))


def test_task_hash_is_of_the_content_in_any_orientation():
    task = TASKS["arc1_train"][0]
    hashed = arc.task_hash(task)
    for k in range(8):
        turned = [tuple(arc.turn(k, g) for g in pair) for pair in task.train + task.test]
        assert arc.task_hash(arc.Task("another id", "arc", turned[:-1], turned[-1:])) == hashed
    x, y = task.test[0]
    others = [("program", task.train, task.test), ("arc", task.train[::-1], task.test)]
    others += [("arc", task.train, [(x, (y + 1) % 10)]), ("arc", task.train, [(x.reshape(1, -1), y)])]
    assert hashed not in [arc.task_hash(arc.Task(task.id, *other)) for other in others]


# ----------------------------------------------------------------------------- pictures


def test_ansi():
    rng = np.random.default_rng(5)
    grid = random_grid(rng)
    wrong = rng.random(grid.shape) < 0.5
    text = arc.ansi(grid, wrong)
    rgb = [";".join(str(int(p[i : i + 2], 16)) for i in (1, 3, 5)) for p in arc.PALETTE]
    assert re.findall(r"48;2;([\d;]+)m", text) == [rgb[colour] for colour in grid.flat]

    def shown(text):
        return re.sub(r"\x1b\[[\d;]*m", "", text).split("\n")

    assert shown(text) == ["".join("><" if cell else "  " for cell in row) for row in wrong]
    a = np.array([[1, 2], [3, 4]], np.uint8)
    assert arc.wrong_cells(a, np.array([[1, 0, 5]], np.uint8)).tolist() == [[False, True], [True, True]]
    g = np.zeros((3, 10), np.uint8)
    out = arc.ansi_row([("one", g, None), ("two", g, g), ("three", None, g), ("four", g + 1, g)], width=60)
    assert max(map(len, shown(out))) == 2 * 20 + 3 + 3 + 9 and out.count("><") == 30
    assert shown(out)[0].split() == ["one", "two", "three"] and shown(out)[4] == "four"
    assert "no answer" in shown(out)[1]


def test_picture_shows_colours_crosses_and_frames(tmp_path):
    from matplotlib.image import imread

    path = str(tmp_path / "new" / "grids.png")
    grid = np.array([[2, 2], [2, 2]], np.uint8)
    one_wrong, all_wrong = grid + [[1, 0], [0, 0]], grid + 1

    def count(colour, *panels, kind="arc"):
        arc.picture([("row", kind, panels)], path, "a $title")
        image = (imread(path)[..., :3] * 255).round().astype(int)
        return int((image == list(bytes.fromhex(colour[1:]))).all(-1).sum())

    red = arc.PALETTE[2]
    right, crossed = count(red, ("a", grid, grid)), count(red, ("a", grid, one_wrong))
    assert right > 400 and right * 0.8 < crossed < right * 0.98  # the cross covers a part of the cell
    assert count(red, ("a", grid, all_wrong)) == right  # it is the frame that says so
    assert count(red, ("a", None, None)) == 0
    assert count(red, ("a", grid, None), None, ("b", grid, None)) > 1.5 * right
    for expected, colour, other in ((grid, arc.RIGHT, arc.WRONG), (all_wrong, arc.WRONG, arc.RIGHT)):
        assert count(colour, ("a", grid, expected)) > 300 > 10 > count(other, ("a", grid, expected))
    assert count(red, ("a", np.full((4, 4), 2, np.uint8), None), kind="sudoku") == 0  # digits, in black
    assert count("#000000", ("a", np.full((4, 4), 2, np.uint8), None), kind="sudoku") > 100
    assert count(arc.MAZE_PALETTE[1], ("a", grid - 1, None), kind="maze") > 400
