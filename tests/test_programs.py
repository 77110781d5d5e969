"""Grid programs: each function by hand, tasks by running their text as Python, traces."""

import numpy as np
import pytest
from tiny import grid

from smol import arc, programs
from smol import tokenizer as tok

G = "120/003/100"
DOTS = "1000/0000/0020/0000"
KNOWN = {  # (parameters, input, output)
    "flip": [({"axis": 0}, G, "100/003/120"), ({"axis": 1}, G, "021/300/001")],
    "rotate": [({"k": 1}, G, "030/200/101"), ({"k": 2}, G, "001/300/021")],
    "transpose": [({"anti": 0}, G, "101/200/030"), ({"anti": 1}, G, "030/002/101")],
    "roll": [({"dy": 1, "dx": 0}, G, "100/120/003"), ({"dy": 0, "dx": -1}, G, "201/030/001")],
    "gravity": [({"side": 1}, G, "012/003/001"), ({"side": 2}, G, "123/100/000")],
    "sort_lines": [
        ({"axis": 0, "descending": 1}, G, "120/003/100"),
        ({"axis": 1, "descending": 0}, G, "201/030/001"),
    ],
    "swap": [({"a": 1, "b": 2}, G, "210/003/200")],
    "replace": [({"a": 1, "b": 5}, G, "520/003/500")],
    "keep": [({"a": 1}, G, "100/000/100")],
    "paint": [({"a": 5}, G, "550/005/500")],
    "negative": [({"a": 5}, G, "005/550/055")],
    "commonest": [({"least": 0}, "110/200/100", "111/111/111"), ({"least": 1}, "110/220/110", "222/222/222")]
    + [({"least": least}, "33/11", "11/11") for least in (0, 1)],  # the lower of two as common
    "crop": [({}, "0000/0120/0030/0000", "12/03")],
    "squeeze": [({}, "100/000/203", "10/23")],
    "half": [({"side": 0}, "123/456/789", "789"), ({"side": 3}, "123/456", "1/4")],
    "fold": [({"axis": 0}, "120/003/405", "425/003"), ({"axis": 1}, "1203/0040", "32/04")],
    "halves": [
        ({"op": 0, "axis": 1}, "10502/11520/00500", "00/50/00"),
        ({"op": 1, "axis": 1}, "10502/11520/00500", "55/55/00"),
        ({"op": 2, "axis": 1}, "10502/11520/00500", "55/05/00"),
        ({"op": 3, "axis": 1}, "10502/11520/00500", "00/00/55"),
        ({"op": 0, "axis": 0}, "110/010/555/020/200", "050/000"),
    ],
    "scale": [({"k": 2}, "10/02", "1100/1100/0022/0022")],
    "tile": [({"ny": 1, "nx": 2}, "10/02", "1010/0202"), ({"ny": 3, "nx": 1}, "12", "12/12/12")],
    "mirror": [({"side": 1}, "12/30", "1221/3003"), ({"side": 2}, "12/30", "30/12/12/30")],
    "frame": [({"a": 5}, "12/30", "5555/5125/5305/5555")],
    "border": [({"a": 5}, G, "555/505/555")],
    "outline": [({"a": 5}, "0000/0100/0000/0000", "5550/5150/5550/0000")],
    "hollow": [({}, "0100/1111/0111/0111", "0100/1011/0101/0111")],
    "grow": [({}, DOTS, "1100/1020/0222/0020"), ({}, "102/000", "112/102")],
    "rays": [
        ({"side": 0}, "010/000/203", "010/010/213"),
        ({"side": 1}, "0100/0000/2003", "0111/0000/2223"),
        ({"side": 2}, "010/000/203", "213/203/203"),
        ({"side": 3}, "010/000/203", "110/000/233"),
    ],
    "diagonals": [({"up": 0}, "010/000/200", "010/001/200"), ({"up": 1}, "100/000/020", "100/002/020")],
    "connect": [
        ({"axis": 1}, "1001/0200/2003/0020", "1111/0200/2003/0020"),
        ({"axis": 0}, "100/000/120", "100/100/120"),
    ],
    "symmetric": [({"axis": 0}, "100/020/003", "103/020/103"), ({"axis": 1}, "100/020/003", "101/020/303")],
    "one_object": [
        ({"smallest": 0}, "1100/0020/0030/3020", "0000/0020/0030/0020"),
        ({"smallest": 1}, "1100/0020/0030/3020", "0000/0000/0000/3000"),
    ],
    "without_specks": [({}, "1100/0020/3000/3020", "1100/0000/3000/3000")],
    "recolour_largest": [({"a": 5}, "1100/0020/3000/3020", "5500/0020/5000/5020")],
    "box": [({}, "1000/2200/0000/0033", "1100/2200/0000/0033")],
    "fill_enclosed": [
        ({"a": 5}, "1110/1010/1110/0000", "1110/1510/1110/0000"),
        ({"a": 5}, "0100/1010/0100/1000", "0100/1510/0100/1000"),
        ({"a": 5}, "1110/1000/1110/0000", "1110/1000/1110/0000"),
    ],
    "count_objects": [({"a": 5}, "1100/0020/0030/3020", "555")],
    "count_bars": [({"axis": 1}, "110/122/003", "111/220/300"), ({"axis": 0}, "110/122/003", "123/120/100")],
}


@pytest.mark.parametrize("name", programs.LANGUAGE)
def test_functions(name):
    settings, _, _ = programs.LANGUAGE[name]
    for params, before, after in KNOWN[name]:
        given = grid(before)
        assert params in settings and programs.step(given, name, params).tolist() == grid(after).tolist()
        assert np.array_equal(given, grid(before)), "the input was changed"
    rng = np.random.default_rng(0)
    noise = rng.integers(10, size=(3, 8), dtype=np.uint8)
    for any_grid in (np.zeros((3, 3), np.uint8), np.full((8, 3), 9, np.uint8), noise):
        for params in settings:
            out = programs.step(any_grid, name, params)
            assert out.dtype == np.uint8 and out.ndim == 2 and out.size and out.max() <= 9


@pytest.mark.parametrize("name", [*programs.LANGUAGE, "any"])
def test_tasks_verify(name):
    rng = np.random.default_rng(3)
    for _ in range(2 if name != "any" else 20):
        task, steps = programs.make(rng, None if name == "any" else [name])
        pairs, text = task.train + task.test, programs.program_text(steps)
        assert [name] == [name for name, _ in steps] or name == "any" and len(steps) <= 2
        assert 2 <= len(task.train) <= 4 and len({x.tobytes() for x, _ in pairs}) == len(pairs)
        # the text is Python: executed as such, with the language's functions, it gives the same
        space = {name: function for name, (_, function, _) in programs.LANGUAGE.items()}
        exec(text, space)  # noqa: S102
        for x, y in pairs:
            assert np.array_equal(space["solve"](x), y) and y.any() and max(*x.shape, *y.shape) <= 30
            assert not np.array_equal(x, y) and x.dtype == y.dtype == np.uint8
        assert programs.check(task, text)
        wrong = arc.Task("", "arc", task.train, [(task.test[0][0], np.pad(task.test[0][1], 1))])
        assert not programs.check(wrong, text)


def test_demonstrations_leave_one_answer_to_a_single_function():
    rng = np.random.default_rng(20)
    named = [programs.make(rng, [name])[0] for name in ("crop", "squeeze")]
    for task in [*named, *(programs.transform(rng) for _ in range(8))]:
        answers = set()
        for name, (settings, _, _) in programs.LANGUAGE.items():
            for params in settings:
                if all(np.array_equal(programs.step(x, name, params), y) for x, y in task.train):
                    answers.add(str(programs.step(task.test[0][0], name, params).tolist()))
        assert answers == {str(task.test[0][1].tolist())}
    x, y = grid("100/000"), grid("200/000")  # by replace or paint; the test tells them apart
    task = arc.Task("", "arc", [(x, y)], [(grid("103/000"), grid("203/000"))])
    assert programs.explained_otherwise(task)


def test_traces_hold_the_program_and_what_it_does():
    rng, shown = np.random.default_rng(1), set()
    for _ in range(20):
        task, parts, more = programs.trace(rng)
        (text,) = (p for p in parts if isinstance(p, str))
        ids = np.concatenate([[-1] if isinstance(p, str) else p for p in parts]).tolist()
        at = ids.index(-1)
        # what comes before the program is the task as a puzzle has it, but for the kind of document
        kind, pairs = arc.decode([*ids[:at], tok.OUTPUT, *arc.encode_grid(task.test[0][1]), tok.EOT])
        given = [grid for pair in task.train + task.test for grid in pair]
        assert kind == "program" and all(map(np.array_equal, [g for pair in pairs for g in pair], given))
        # what comes after it are the grids of its steps, the last of which is the answer
        grids = programs.run(text, task.test[0][0])
        grids = grids if ids[at:].count(tok.OUTPUT) == len(grids) else grids[-1:]
        assert ids[at + 1 :] == [i for g in grids for i in [tok.OUTPUT, *arc.encode_grid(g).tolist()]]
        assert np.array_equal(grids[-1], task.test[0][1]) and len(more) == len(grids) - 1
        shown.add(len(grids))
    assert len(shown) > 1


def solve(line):
    return f"def solve(grid):\n    {line}\n    return grid\n"


@pytest.mark.parametrize(
    "text, says",
    [
        (solve("grid = crp(grid)"), "closest is 'crop'"),
        (solve("grid = flip(grid, axis=7)"), "flip does not take axis=7"),
        (solve("grid = flip(grid, axis=0, axis=1)"), "does not take"),
        (solve("grid = crop(grid)\x0c    grid = crop(grid)"), "does not turn grid into grid"),
        (solve("grid = crop(other)"), "does not turn grid into grid"),
        (programs.program_text([("scale", {"k": 3})] * 4), "sides are not 1 to 30"),
        (programs.program_text([("crop", {})] * 100), "more than 1000 characters"),
        ("(" * 900, "not a program"),
    ],
)
def test_what_is_no_program(text, says):
    with pytest.raises(ValueError, match=says):
        programs.run(text, grid("120/003/100"))
