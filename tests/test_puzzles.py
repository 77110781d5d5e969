"""Puzzles: what is generated is right by references written here, and wrong answers are refused."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
from tiny import grid

from smol import arc, programs, puzzles
from smol.puzzles import check_maze, check_sudoku, maze, solve_sudoku, sudoku


def images(g):
    return [np.rot90(h, k) for h in (g, g.T) for k in range(4)]


# ----------------------------------------------------------------------------- sudoku


def test_sudoku4_splits_share_no_grid_in_any_orientation():
    train, test = puzzles.sudoku4_grids("train"), puzzles.sudoku4_grids("test")
    assert len(train) == 232 and len(test) == 56
    seen = {image.tobytes() for g in train for image in images(g)}
    assert not seen & {g.tobytes() for g in test}
    # which grids are held out is part of what was measured, and must never change
    assert hashlib.sha256(test.tobytes()).hexdigest()[:16] == "f44a5f203d9dc375"


def solved_otherwise(puzzle, limit=2):
    """At most `limit` solutions, by another solver: digits that a cell's lines and box lack."""
    if puzzle.all():
        return [puzzle.tolist()]
    size, box = len(puzzle), int(len(puzzle) ** 0.5)

    def digits(r, c):
        y, x = r // box * box, c // box * box
        return set(range(1, size + 1)) - {*puzzle[r], *puzzle[:, c], *puzzle[y : y + box, x : x + box].flat}

    r, c = min(np.argwhere(puzzle == 0).tolist(), key=lambda cell: len(digits(*cell)))
    found = []
    for v in digits(r, c):
        filled = puzzle.copy()
        filled[r, c] = v
        found += solved_otherwise(filled, limit - len(found))
        if len(found) >= limit:
            break
    return found


@pytest.mark.parametrize(
    "size, blanks, split",
    [(4, 1, "test"), (4, 6, "train"), (4, 12, "test"), (9, 30, "train"), (9, 54, "test")],
)
def test_sudokus_have_one_solution_by_another_solver(size, blanks, split):
    task = sudoku(np.random.default_rng([size, blanks]), size, blanks, split)
    ((puzzle, answer),) = task.test
    assert task.kind == "sudoku" and task.train == [] and puzzle.dtype == answer.dtype == np.uint8
    assert (puzzle == 0).sum() == blanks and solved_otherwise(puzzle) == [answer.tolist()]
    assert check_sudoku(puzzle, answer)
    assert size == 9 or answer.tolist() in puzzles.sudoku4_grids(split).tolist()


def test_solver_finds_every_solution_of_partial_grids():
    everything = solved_otherwise(np.zeros((4, 4), np.uint8), 1000)
    assert puzzles.all_sudoku4().tolist() == sorted(everything) and len(everything) == 288
    rng = np.random.default_rng(3)
    for _ in range(20):
        puzzle = puzzles.all_sudoku4()[rng.integers(288)] * (rng.random((4, 4)) < 0.3)
        expected = sorted(solved_otherwise(puzzle, 1000))
        assert sorted(s.tolist() for s in solve_sudoku(puzzle, limit=1000)) == expected
        assert len(solve_sudoku(puzzle)) == min(2, len(expected))
    assert solve_sudoku(np.pad([[0, 1], [1, 1]], (0, 2))) == []  # givens that contradict each other


@pytest.mark.parametrize("size, blanks", [(4, 6), (9, 30)])
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
    assert not check_sudoku(puzzle, answer[:-1])


def test_impossible_puzzles_are_refused():
    rng = np.random.default_rng(0)
    for make, *wrong in (sudoku, 6, 5), (sudoku, 4, 13), (sudoku, 9, 0), (maze, 2, 7), (maze, 7, 31):
        with pytest.raises(ValueError):
            make(rng, *wrong)


# ----------------------------------------------------------------------------- mazes


def simple_paths(puzzle):
    """Every way from start to goal that enters no cell twice, shortest first, by plain recursion."""
    start, goal = (tuple(np.argwhere(puzzle == v)[0].tolist()) for v in (2, 3))
    free = set(map(tuple, np.argwhere(puzzle != 1).tolist()))
    found = []

    def walk(path):
        r, c = path[-1]
        if path[-1] == goal:
            found.append(path)
            return
        for cell in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if cell in free and cell not in path:
                walk([*path, cell])

    walk([start])
    return sorted(found, key=len)


def test_mazes_have_one_shortest_path_by_exhaustion():
    rng = np.random.default_rng(11)
    loops = 0
    for height, width in 20 * [(5, 6), (4, 7), (3, 3)]:
        task = maze(rng, height, width)
        puzzle, answer = task.test[0]
        assert task.kind == "maze" and puzzle.shape == (height, width) and check_maze(puzzle, answer)
        paths = simple_paths(puzzle)
        assert len(paths) == 1 or len(paths[0]) < len(paths[1])
        assert 2 * (len(paths[0]) - 1) >= height + width
        for cell in paths[0][1:-1]:
            puzzle[cell] = 4
        assert answer.tolist() == puzzle.tolist()
        loops += len(paths) > 1
    assert 4 < loops < 56  # trees and mazes with a choice, both


@pytest.mark.parametrize(
    "puzzle, answer, right, right_beside_others",
    [
        ("2000/1110/3000", "2444/1114/3444", True, True),
        ("2000/0110/0003", "2444/0114/0003", False, True),  # two shortest ways
        ("2000/0110/3000", "2444/0114/3444", False, False),  # the long way round
        ("2010/0010/0013", "2010/0010/0013", False, False),  # no way
        ("20003/00000", "24443/00000", True, True),
        ("20003/00000", "24403/00400", False, False),  # a cell beside the way
        ("20003/00000", "24443/00400", False, False),  # one cell too many
        ("20003/11111", "24443/11101", False, False),  # another maze
        ("20003/00000", "24443", False, False),
        ("20003/00000", "24043/04000", False, False),  # a cell for each step, but they do not hang together
        ("23", "23", True, True),
        ("22003", "24443", False, False),
        ("200/000/003", "244/004/003", False, True),
        ("200/000/003", "200/440/003", False, False),  # an end that leads nowhere
    ],
)
def test_check_maze_by_hand(puzzle, answer, right, right_beside_others):
    assert check_maze(grid(puzzle), grid(answer)) is right
    assert check_maze(grid(puzzle), grid(answer), only=False) is right_beside_others


# ----------------------------------------------------------------------------- puzzles in words


def parts_of(text):
    return re.fullmatch(r"Question: (.+)\nSolution: (.+)\nAnswer: (.+)", text).groups()


def right_arithmetic(text):
    """
    Every equation holds, the last one has the answer, and each number of the question and each result before
    the last goes into exactly one equation, and no other number does.
    """
    question, solution, answer = parts_of(text)
    waiting, result = Counter(re.findall(r"\d+", question)), None  # numbers that have to go into an equation
    for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\b", solution):
        a, b, c = int(left), int(right), int(result)
        if not {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b > 0 and a == b * c}[sign]:
            return False
        waiting.subtract([left, right])
        if min(waiting.values()) < 0:
            return False
        waiting[result] += 1
    return result == answer and waiting.total() == 1


def right_path(text):
    """It is the only shortest of all simple paths."""
    question, _, answer = parts_of(text)
    start, goal = re.search(r"from (\w) to (\w)\?", question).groups()
    length = {}
    for a, b, d in re.findall(r"(\w)-(\w) (\d+)", question):
        length[a, b] = length[b, a] = int(d)
    found, stack = [], [(start, 0)]
    while stack:
        path, total = stack.pop()
        if path[-1] == goal:
            found.append((total, "-".join(path)))
            continue
        stack += [(path + b, total + d) for (a, b), d in length.items() if a == path[-1] and b not in path]
    return [f"{path}, length {total}" for total, path in found if total == min(found)[0]] == [answer]


def in_words(way):
    """Of an order, or of everyone's kind."""
    if set(way.values()) <= {True, False}:
        return ", ".join(f"{person} {puzzles.KIND[way[person]]}" for person in sorted(way))
    return " ".join(sorted(way, key=way.get))


def right_logic(text):
    """All that was said holds in one way, which is the answer."""
    question, _, answer = parts_of(text)
    patterns = {sentence: sentence.format(*[r"(\w+)"] * 3) for sentence in puzzles.MEANS}
    said = [(s, found.groups()) for s, p in patterns.items() for found in re.finditer(p, question)]
    people = [name for name in puzzles.NAMES if re.search(rf"\b{name}\b", question)]
    ways = (puzzles.kinds if "says" in question else puzzles.seats)(people)
    return [in_words(way) for way in puzzles.possible(ways, said)] == [answer]


KINDS = {
    "arithmetic": (puzzles.arithmetic, right_arithmetic),
    "shortest path": (puzzles.shortest_path, right_path),
    "seating": (puzzles.seating, right_logic),
    "knights": (puzzles.knights, right_logic),
}


@pytest.mark.parametrize("kind", KINDS)
def test_puzzles_in_words_have_one_answer(kind):
    make, right = KINDS[kind]
    rng = np.random.default_rng(11)
    for _ in range(30):
        assert right(text := make(rng)), text


def test_every_template_of_arithmetic_verifies():
    rng, texts, wordings = np.random.default_rng(2), set(), set()
    for _ in range(500):
        text = puzzles.arithmetic(rng)
        assert int(parts_of(text)[2]) > 1 and not re.search(r"[{}\[\]]", text), text
        assert right_arithmetic(text), text
        texts.add(text)
        for word in (*puzzles.NAMES, *puzzles.THINGS):
            text = re.sub(rf"\b{word}\b", "_", text)
        wordings.add(re.sub(r"\d+", "0", text))
    assert len(wordings) == len(puzzles.TEMPLATES) and len(texts) > 450


BY_HAND = {  # what each sentence means: the only answer
    "Ada sits directly to the right of Ben. Ada does not sit next to Chen.": "Chen Ben Ada",
    "Ada sits directly to the right of Chen. Ben sits at the left end.": "Ben Chen Ada",
    "Ben sits somewhere to the left of Ada. Ada does not sit next to Ben.": "Ben Chen Ada",
    "There is exactly one person between Ada and Ben. Ben does not sit at the left end.": "Ada Chen Ben",
    "Ben sits next to Chen. Ada sits at the left end. Chen does not sit next to Ada.": "Ada Ben Chen",
    'Ada says: "Ben is a knave." Ben says: "Ada and Ben are of the same kind."': "knight, knave",
    'Ada says: "Ada and Ben are both knights." Ben says: "Ada is a knave."': "knave, knight",
    'Ada says: "Ada and Ben are of different kinds." Ben says: "Ada is a knight."': "knave, knave",
    'Ada says: "Ben is a knave." Ben says: "At least one of Ada and Ben is a knight."': "knave, knight",
}


@pytest.mark.parametrize("question", BY_HAND)
def test_sentences_mean_what_they_say(question):
    answer = BY_HAND[question]
    if "says" in question:
        answer = "Ada {}, Ben {}".format(*answer.split(", "))
    else:
        question += " How do Ada, Ben and Chen sit?"
    assert right_logic(f"Question: {question}\nSolution: so\nAnswer: {answer}")


def test_an_argument_about_knights_is_whole():
    """One assumption ends in a contradiction, the other in everyone's kind, as in the answer."""
    rng = np.random.default_rng(13)
    for _ in range(30):
        text = puzzles.knights(rng)
        _, solution, answer = parts_of(text)
        refuted, found = solution.split(" Suppose ")
        assert refuted.endswith("could not have spoken so.") and found.endswith(" That fits."), text
        said = sorted(f"{who} {what}" for who, what in re.findall(r"(\w+) is a (knight|knave)\.", found))
        assert ", ".join(said) == answer, text


# ----------------------------------------------------------------------------- seeds


def test_a_seed_gives_what_it_has_always_given():
    """In any process, on any machine: documents are numbers of draws. Grids: test_suites.py."""
    rng, found = np.random.default_rng(99), hashlib.sha256()

    def plain(value):
        if isinstance(value, arc.Task):
            return plain(value.train + value.test)
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return np.asarray(value).tolist()

    for _ in range(4):
        for make in (*(make for make, _ in KINDS.values()), programs.trace):
            found.update(repr(plain(make(rng))).encode())
    assert found.hexdigest()[:16] == "332ff8d190462e22"


def test_one_turn_explains_all_pairs_of_a_task():
    rng, seen = np.random.default_rng(1), set()
    for _ in range(60):
        task = puzzles.turned(rng, 3)
        right = [k for k in range(3) if all((arc.turn(k, x) == y).all() for x, y in task.train + task.test)]
        seen.update(right)
        assert len(task.train) == 2 and len(right) == 1
    assert seen == {0, 1, 2}
