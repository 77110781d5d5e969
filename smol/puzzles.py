"""
Procedural puzzles with verified answers, and the fixed suites of them that models are evaluated on: sudoku, mazes, puzzles in words
(shortest paths, who sits where, knights and knaves), arithmetic word problems.

Every generator takes a np.random.Generator and nothing else decides what comes out. Every answer has a checker written another way
round than the generator: sudoku by looking at rows, columns and boxes, not by solving; mazes by counting shortest paths layer by
layer, not by following parents; puzzles in words by reading the finished text and trying every possibility. Puzzles in words are text:
"Question: ...", "Solution: ..." step by step, and a last line "Answer: ...".

What is never trained on: the grids in SUDOKU4_HELD_OUT, and the puzzles that heldout() lists (compare with task_hash()).

Read next: programs.py (tasks made of grid functions), sources.py (how these become documents), eval_arc.py (how they are scored).
"""

import ast
import difflib
import functools
import hashlib
import itertools
import math
import operator
import re
from collections import Counter
from fractions import Fraction

import numpy as np

from smol import programs
from smol.arc import Task

# -----------------------------------------------------------------------------
# sudoku: 0 is a blank

MAX_BLANKS = {4: 12, 9: 54}  # 4 givens are the fewest for 4x4; 9x9 goes to 64, but digging past 54 takes long


def _sudoku_size(grid):
    grid = np.asarray(grid)
    if grid.shape not in ((4, 4), (9, 9)):
        raise ValueError(f"a sudoku is 4x4 or 9x9, this one has shape {grid.shape}")
    if grid.min() < 0 or grid.max() > len(grid):
        raise ValueError(
            f"a {len(grid)}x{len(grid)} sudoku holds 0 (blank) to {len(grid)}, this one holds {grid.min()} to {grid.max()}"
        )
    return len(grid), math.isqrt(len(grid))


def solve_sudoku(grid, limit=2, rng=None):
    """
    -> (solutions of a (4, 4) or (9, 9) grid, at most `limit` of them, as np.uint8 grids;
    backtracks: guesses that the rules alone refute, and cells of which they refute every guess).
    limit=2 is what it takes to know whether a solution is the only one. ValueError if it is no sudoku.

    Two rules: a cell with one digit left has it; a digit with one place left in a row, column or box stands
    there. Where neither applies, a cell with the fewest digits left is guessed, the lowest digit first. With
    an rng, digits are tried in random order, by the first rule only. Bit v-1 stands for digit v.
    """
    size, box = _sudoku_size(grid)
    values = np.asarray(grid).tolist()
    free = [(1 << size) - 1] * (3 * size)  # digits that are still to be placed in each row, column, box
    blanks = []  # of each: its row, column, box as indices of free
    for r in range(size):
        for c in range(size):
            units = r, size + c, 2 * size + r // box * box + c // box
            if not values[r][c]:
                blanks.append(units)
                continue
            bit = 1 << values[r][c] - 1
            for u in units:
                if not free[u] & bit:
                    return [], 0
                free[u] ^= bit
    solutions, backtracks = [], 0

    def choose():
        """-> (index in blanks, digits to try there as bits: none at a contradiction, one where a rule applies)"""
        fewest = size + 1
        for i, (r, c, b) in enumerate(blanks):
            left = free[r] & free[c] & free[b]
            if left.bit_count() < fewest:
                best, digits, fewest = i, left, left.bit_count()
                if fewest <= 1:
                    return best, digits
        if rng is not None:  # the second rule would change which grids are drawn
            return best, digits
        options = [free[r] & free[c] & free[b] for r, c, b in blanks]
        once, twice = [0] * len(free), [0] * len(free)  # digits with at least one place, at least two
        for left, units in zip(options, blanks):
            for u in units:
                twice[u] |= once[u] & left
                once[u] |= left
        if once != free:
            return best, 0
        for i, (r, c, b) in enumerate(blanks):
            only = options[i] & ~(twice[r] & twice[c] & twice[b])
            if only:
                return i, only & -only
        best = min(range(len(blanks)), key=lambda i: (options[i].bit_count(), blanks[i]))
        return best, options[best]

    def search():
        """Is there a contradiction by rules alone?"""
        nonlocal backtracks
        if not blanks:
            solutions.append(np.array(values, np.uint8))
            return False
        best, bits = choose()
        digits = [v for v in range(1, size + 1) if bits >> v - 1 & 1]
        if rng is not None:
            rng.shuffle(digits)
        units = r, c, b = blanks[best]
        blanks[best] = blanks[-1]
        blanks.pop()
        failed = 0
        for v in digits:
            bit = 1 << v - 1
            values[r][c - size] = v
            for u in units:
                free[u] ^= bit
            failed += search()
            for u in units:
                free[u] ^= bit
            if len(solutions) >= limit:
                break
        values[r][c - size] = 0
        blanks.append(units)
        if len(digits) > 1:
            backtracks += failed + (failed == len(digits))
        return len(digits) <= 1 and failed == len(digits)

    search()
    return solutions, backtracks


@functools.cache
def all_sudoku4():
    """The 288 filled 4x4 grids, np.uint8 (288, 4, 4), in lexicographic order, read-only (it is shared by all callers)."""
    grids, _ = solve_sudoku(np.zeros((4, 4), np.uint8), limit=1000)
    grids = np.array(sorted(grids, key=lambda g: g.tobytes()))
    grids.flags.writeable = False
    return grids


def _hold_out_sudoku4():
    # A training grid turned or mirrored on the fly must not become a held-out one, so whole orbits under the eight symmetries of
    # the square are held out. Orbits have 4 or 8 grids: the most that fits into a fifth of 288 is 56. They are ordered by a hash
    # and not by a random generator, so that no version of numpy can move the border.
    orbits = {}
    for i, grid in enumerate(all_sudoku4()):
        images = [np.rot90(g, k).tobytes() for g in (grid, grid.T) for k in range(4)]
        orbits.setdefault(min(images), []).append(i)
    held = []
    for key in sorted(orbits, key=lambda image: hashlib.sha256(image).digest()):
        if len(held) + len(orbits[key]) <= 288 // 5:
            held += orbits[key]
    return tuple(sorted(held))


SUDOKU4_HELD_OUT = _hold_out_sudoku4()  # indices into all_sudoku4()


def sudoku4_grids(split):
    """The filled 4x4 grids of 'train' (232) or 'test' (56), np.uint8 (n, 4, 4). No symmetry of the square maps one into the other."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: it is 'train' or 'test'")
    held = np.isin(np.arange(288), SUDOKU4_HELD_OUT)
    return all_sudoku4()[held if split == "test" else ~held]


def sudoku(rng, size, blanks, split="train"):
    """
    One puzzle with exactly one solution: Task(kind='sudoku', train=[], test=[(puzzle, answer)]), grids np.uint8 (size, size).
    size 4: the answer is drawn from sudoku4_grids(split), so the two splits share no answer. size 9: the answer is a random filled
    grid by backtracking with digits in shuffled order; there are 6.7e21, so `split` only names what it is for. Cells are blanked in
    random order, skipping those that would allow a second solution. ValueError for a size, split or number of blanks that cannot be.
    """
    if size not in MAX_BLANKS:
        raise ValueError(f"sudoku size {size} is not offered: it is 4 or 9")
    if not 1 <= blanks <= MAX_BLANKS[size]:
        raise ValueError(f"{blanks} blanks in a {size}x{size} sudoku: it takes 1 to {MAX_BLANKS[size]}")
    grids = sudoku4_grids(split)  # also for 9x9: a misspelt split is refused there too
    everything = all_sudoku4().reshape(288, 16)
    while True:  # some grids cannot spare this many cells in this order; another draw can
        if size == 4:
            answer = grids[rng.integers(len(grids))]
            agrees = everything == answer.reshape(16)  # uniqueness is a look at all 288 grids: (288, 16)
        else:
            answer = solve_sudoku(np.zeros((9, 9), np.uint8), limit=1, rng=rng)[0][0]
        puzzle = answer.copy()
        left = blanks
        for cell in rng.permutation(size * size).tolist():
            kept, puzzle.flat[cell] = puzzle.flat[cell], 0
            n = agrees[:, puzzle.reshape(-1) > 0].all(1).sum() if size == 4 else len(solve_sudoku(puzzle)[0])
            if n != 1:
                puzzle.flat[cell] = kept
                continue
            left -= 1
            if not left:
                return Task(id=f"sudoku{size}", kind="sudoku", train=[], test=[(puzzle, answer.copy())])


def check_sudoku(puzzle, answer):
    """True if `answer` fills `puzzle`: same size, givens kept, each row, column and box holds every digit once. Does not solve."""
    puzzle, answer = np.asarray(puzzle), np.asarray(answer)
    if puzzle.shape != answer.shape or puzzle.shape not in ((4, 4), (9, 9)):
        return False
    size, box = len(puzzle), math.isqrt(len(puzzle))
    digits = set(range(1, size + 1))
    boxes = answer.reshape(box, box, box, box).swapaxes(1, 2).reshape(size, size)
    lines = [*answer.tolist(), *answer.T.tolist(), *boxes.tolist()]
    return all(set(line) == digits for line in lines) and bool(np.all((puzzle == 0) | (puzzle == answer)))


def shuffle_sudoku(rng, *grids):
    """9x9 grids (0 is a blank), all seen through the same random symmetry of sudoku."""
    digits = np.concatenate([[0], rng.permutation(9) + 1]).astype(np.uint8)
    rows, columns = (
        np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)]) for _ in range(2)
    )
    turn = rng.integers(2)
    return [np.ascontiguousarray(digits[(grid.T if turn else grid)[rows][:, columns]]) for grid in grids]


# -----------------------------------------------------------------------------
# mazes: 0 free, 1 wall, 2 start, 3 goal; in the answer 4 on the way


def _carve(rng, height, width):
    """Walls (height, width) of a maze: a random tree over every other cell, and in half of the mazes some walls knocked out."""
    walls = np.ones((height, width), bool)
    # with an even side one border is solid wall; which one is chance
    top, left = (0 if side % 2 else int(rng.integers(2)) for side in (height, width))
    rows, cols = (height + 1) // 2, (width + 1) // 2
    r, c = int(rng.integers(rows)), int(rng.integers(cols))
    seen = [[False] * cols for _ in range(rows)]
    seen[r][c] = True
    walls[top + 2 * r, left + 2 * c] = False
    stack = [(r, c)]
    chance = iter(
        rng.random(2 * rows * cols).tolist()
    )  # one number per step forward or back, drawn at once for speed
    while stack:
        r, c = stack[-1]
        ways = [
            (y, x)
            for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
            if 0 <= y < rows and 0 <= x < cols and not seen[y][x]
        ]
        if not ways:
            stack.pop()
            continue
        y, x = ways[int(next(chance) * len(ways))]
        seen[y][x] = True
        walls[top + 2 * y, left + 2 * x] = walls[top + r + y, left + c + x] = (
            False  # the cell, and the wall on the way to it
        )
        stack.append((y, x))
    if rng.random() < 0.5:
        walls &= rng.random((height, width)) > rng.uniform(0.05, 0.4)
    return walls


def _breadth_first(free, start, width):
    """Over flat cells (free: list of bool with a wall all around, `width` per row): distance, parent, and cells with two ways to them."""
    distance, parent, several, queue = {start: 0}, {start: None}, set(), [start]
    for cell in queue:
        for near in (cell - width, cell + width, cell - 1, cell + 1):
            if not free[near]:
                continue
            if near not in distance:
                distance[near], parent[near] = distance[cell] + 1, cell
                if cell in several:
                    several.add(near)
                queue.append(near)
            elif distance[near] == distance[cell] + 1:
                several.add(near)
    return distance, parent, several


def maze(rng, height, width):
    """
    Task(kind='maze', train=[], test=[(maze, answer)]), grids np.uint8 (height, width), sides 3..30. Half are trees, half have loops;
    in all of them the shortest way from start (2) to goal (3) is unique and has at least (height + width) / 2 steps.
    The answer is the same grid with the cells between start and goal as 4. ValueError for other sides.
    """
    if not (3 <= height <= 30 and 3 <= width <= 30):
        raise ValueError(f"a maze of {height}x{width} is not offered: sides go from 3 to 30")
    while True:
        walls = _carve(rng, height, width)
        free = (~np.pad(walls, 1, constant_values=True)).reshape(-1).tolist()
        cells = [i for i, is_free in enumerate(free) if is_free]
        start = cells[rng.integers(len(cells))]
        distance, parent, several = _breadth_first(free, start, width + 2)
        goals = [
            cell for cell, steps in distance.items() if 2 * steps >= height + width and cell not in several
        ]
        if not goals:
            continue
        goal = goals[rng.integers(len(goals))]
        puzzle = np.pad(walls, 1).astype(np.uint8)
        puzzle.flat[start], puzzle.flat[goal] = 2, 3
        answer = puzzle.copy()
        cell = parent[goal]
        while cell != start:
            answer.flat[cell] = 4
            cell = parent[cell]
        return Task(
            id=f"maze{height}x{width}",
            kind="maze",
            train=[],
            test=[(puzzle[1:-1, 1:-1].copy(), answer[1:-1, 1:-1].copy())],
        )


def check_maze(maze, answer, only=True):
    """
    True if the maze has exactly one shortest way from its start to its goal and `answer` marks it and nothing else; with only=False there
    may be others as short. Counts shortest ways with whole-grid layers: the number of ways into a cell of layer d is the sum over its
    neighbours in layer d - 1.
    """
    maze, answer = np.asarray(maze), np.asarray(answer)
    if (
        maze.ndim != 2
        or maze.shape != answer.shape
        or (maze == 2).sum() != 1
        or (maze == 3).sum() != 1
        or maze.max() > 3
    ):
        return False
    marked = answer == 4
    if (answer[~marked] != maze[~marked]).any() or (maze[marked] != 0).any():
        return False
    ways, unseen, steps = (
        (maze == 2).astype(object),
        (maze != 1) & (maze != 2),
        0,
    )  # Python integers: ways can outgrow 64 bits
    goal = maze == 3
    while unseen[goal][0]:
        around = np.pad(ways, 1)
        ways = (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]) * unseen
        layer = ways > 0
        if not layer.any():
            return False  # no way at all
        unseen &= ~layer
        steps += 1
        if not goal[layer].any() and (layer & marked).sum() != 1:
            return False  # the marked way has one cell in every layer
    if (only and ways[goal][0] != 1) or marked.sum() != steps - 1:
        return False
    on_path = np.pad(marked | (maze == 2) | goal, 1).astype(int)
    neighbours = on_path[:-2, 1:-1] + on_path[2:, 1:-1] + on_path[1:-1, :-2] + on_path[1:-1, 2:]
    # one cell a layer, and the cells hang together in a line: a shortest way
    return bool(
        (neighbours[marked] == 2).all() and neighbours[maze == 2][0] == 1 and neighbours[goal][0] == 1
    )


# -----------------------------------------------------------------------------
# arithmetic


NAMES = (
    "Ada",
    "Ben",
    "Chen",
    "Dina",
    "Emil",
    "Fatima",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mateo",
    "Nia",
    "Omar",
    "Petra",
    "Ravi",
    "Sofia",
    "Tomas",
    "Uma",
    "Viktor",
    "Wanjiru",
    "Yuki",
    "Zoe",
)
THINGS = (
    "apples",
    "marbles",
    "stickers",
    "pencils",
    "shells",
    "buttons",
    "cards",
    "coins",
    "beads",
    "stamps",
    "cookies",
    "tickets",
    "plums",
    "postcards",
    "nails",
    "eggs",
    "lemons",
    "balloons",
)

# (largest number, question, solution); numbers are drawn from 2 to the largest, again if a step is not a whole number above 1
TEMPLATES = (
    (
        99,
        "{A} has {a} {things}. {B} gives {A} {b} more. How many {things} does {A} have now?",
        "Together that makes [a + b] {things}.",
    ),
    (
        99,
        "{A} has {a} {things} and gives {b} of them to {B}. How many {things} does {A} have left?",
        "What is left is [a - b] {things}.",
    ),
    (
        20,
        "There are {a} boxes with {b} {things} in each. How many {things} are there in all?",
        "The boxes hold [a * b] {things}.",
    ),
    (
        144,
        "{A} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        "Each friend gets [a / b] {things}.",
    ),
    (
        12,
        "{A} buys {a} bags with {b} {things} in each and loses {c} {things} on the way home. How many {things} are left?",
        "The bags hold [a * b] {things}. After the loss there are [s1 - c] {things}.",
    ),
    (
        12,
        "{A} puts {a} {things} on each of {b} tables. {B} brings {c} more {things}. How many {things} are there now?",
        "On the tables there are [a * b] {things}. With those of {B} there are [s1 + c] {things}.",
    ),
    (
        60,
        (
            "{A} has {a} {things} and {B} has {b}. They put them together and share them equally among {c} children. "
            "How many {things} does each child get?"
        ),
        "Together they have [a + b] {things}. Each child gets [s1 / c] {things}.",
    ),
    (
        15,
        "One ticket costs {a} dollars. {A} buys {b} tickets and {B} buys {c}. How many dollars do they pay together?",
        "They buy [b + c] tickets. That costs [s1 * a] dollars.",
    ),
    (
        90,
        "A train has {a} passengers. At the first stop {b} get off and {c} get on. How many passengers are on the train then?",
        "After {b} get off there are [a - b] passengers. Then there are [s1 + c] passengers.",
    ),
    (
        12,
        "{A} reads {a} pages a day for {b} days, and {B} reads {c} pages a day for {d} days. How many pages do they read together?",
        "{A} reads [a * b] pages. {B} reads [c * d] pages. Together that is [s1 + s2] pages.",
    ),
    (
        14,
        "A hall has {a} rows of {b} seats and {c} rows of {d} seats. {e} seats are taken. How many seats are free?",
        "The first rows have [a * b] seats. The other rows have [c * d] seats. There are [s1 + s2] seats. [s3 - e] seats are free.",
    ),
    (
        99,
        (
            "{A} had some {things}. After giving {a} to {B} and finding {b} others, {A} has {c}. "
            "How many {things} did {A} have at the start?"
        ),
        "Before finding {b} there were [c - b] {things}. Before giving {a} away there were [s1 + a] {things}.",
    ),
    (
        20,
        (
            "{A} earns {a} dollars an hour and works {b} hours. Then {A} spends {c} dollars on food and {d} dollars on a book. "
            "How many dollars are left?"
        ),
        "{A} earns [a * b] dollars. Food and book cost [c + d] dollars. There are [s1 - s2] dollars left.",
    ),
    (
        15,
        "A floor is {a} meters long and {b} meters wide. One square meter of tiles costs {c} dollars. How many dollars do the tiles cost?",
        "The floor has [a * b] square meters. The tiles cost [s1 * c] dollars.",
    ),
    (
        12,
        "A baker makes {a} trays with {b} rolls each and packs the rolls into bags of {c}. How many bags are filled?",
        "There are [a * b] rolls. They fill [s1 / c] bags.",
    ),
    (
        80,
        "{A} is {a} years old and {B} is {b} years younger. How old will {B} be in {c} years?",
        "{B} is [a - b] years old. In {c} years {B} will be [s1 + c].",
    ),
    (
        12,
        (
            "{A} collects {a} {things} on each of {b} days, and then gives {c} of them to each of {d} friends. "
            "How many {things} does {A} keep?"
        ),
        "{A} collects [a * b] {things}. The friends get [c * d] {things}. {A} keeps [s1 - s2] {things}.",
    ),
    (
        60,
        (
            "A tank holds {a} liters. Each minute {b} liters flow in and {c} liters flow out. It is empty at first. "
            "After how many minutes is it full?"
        ),
        "Each minute [b - c] liters stay. The tank is full after [a / s1] minutes.",
    ),
    (
        30,
        "{A} saves {a} dollars a week and {B} saves {b} dollars a week. How many dollars more than {B} has {A} after {c} weeks?",
        "Each week {A} saves [a - b] dollars more. After {c} weeks that is [s1 * c] dollars.",
    ),
)
_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: Fraction(a, b) if b else -1,
}  # -1: draw again


def _work_out(solution, numbers):
    """-> the solution with its steps written as equations, and the results of the steps (a Fraction where it does not divide)."""
    values, results = dict(numbers), []

    def step(match):
        left, sign, right = values[match[1]], match[2], values[match[3]]
        results.append(_OPERATORS[sign](left, right))
        values[f"s{len(results)}"] = results[-1]
        return f"{left} {sign} {right} = {results[-1]}"

    return re.sub(r"\[(\w+) ([-+*/]) (\w+)\]", step, solution), results


def arithmetic(rng):
    """-> (text, answer): a question, its solution step by step, and a last line like 'Answer: 42'. The answer is an int above 1."""
    largest_number, question, solution = TEMPLATES[rng.integers(len(TEMPLATES))]
    people = rng.permutation(len(NAMES))
    words = {"A": NAMES[people[0]], "B": NAMES[people[1]], "things": THINGS[rng.integers(len(THINGS))]}
    letters = sorted(set(re.findall(r"{([a-z])}", question)))
    while True:
        numbers = dict(
            zip(letters, rng.integers(2, largest_number + 1, size=len(letters)).tolist(), strict=True)
        )
        worked, results = _work_out(solution, numbers)
        if all(result > 1 and result == int(result) for result in results):
            answer = int(results[-1])
            return f"Question: {question}\nSolution: {worked}\nAnswer: {answer}".format(
                **words, **numbers
            ), answer


def _value(node):
    """The exact value of a parsed expression of whole numbers and + - * /; ValueError for anything else."""
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div() if right:
                return left / right
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    raise ValueError("not arithmetic")


def check_arithmetic(text):
    """
    True if every equation in the text holds, the last line states the last result, and the solution is about this question: each number
    of the question and each result before the last goes into exactly one equation, and no other number does; numbers beside the equations
    are numbers of the question. Reads the text alone and knows no template.
    """
    parts = re.fullmatch(r"Question: (.+)\nSolution: (.+)\nAnswer: (\d+)\n?", text)
    if not parts:
        return False
    question, solution, answer = parts.groups()
    equation = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)\b")
    beside = equation.sub("", solution)
    asked = re.findall(r"\d+", question)
    if "=" in beside or not set(asked).issuperset(re.findall(r"\d+", beside)):
        return False
    waiting, result = Counter(asked), None  # numbers that still have to go into an equation
    for expression, result in equation.findall(solution):
        try:
            if _value(ast.parse(expression, mode="eval").body) != int(result):
                return False
        except (ValueError, SyntaxError):
            return False
        waiting.subtract(re.findall(r"\d+", expression))
        if min(waiting.values()) < 0:
            return False
        waiting[result] += 1
    return result == answer and waiting.total() == 1


# -----------------------------------------------------------------------------
# graphs; nodes are letters


def shortest_path(rng):
    """A road map with lengths: the shortest way between two places, unique. -> (text, answer)"""
    while True:
        n = int(rng.integers(5, 9))
        names = [chr(65 + i) for i in rng.permutation(26)[:n]]
        edges = [(i, j) for i, j in itertools.combinations(range(n), 2) if rng.random() < 0.45]
        edges = [edges[i] for i in rng.permutation(len(edges))]
        length = {edge: int(x) for edge, x in zip(edges, rng.integers(1, 13, size=len(edges)))}
        near = [[(j if i == k else i, length[i, j]) for i, j in edges if k in (i, j)] for k in range(n)]
        # Settle the nearest place, then the next; several counts places with two shortest ways to them.
        distance, ways, before, settled, steps = {0: 0}, {0: 1}, {}, [], []
        while len(settled) < len(distance):
            k = min((k for k in distance if k not in settled), key=lambda k: (distance[k], k))
            settled.append(k)
            if k:
                steps.append(f"{names[k]} is {distance[k]} away, by {names[before[k]]}.")
            for j, d in near[k]:
                if distance[k] + d < distance.get(j, 10**9):
                    distance[j], ways[j], before[j] = distance[k] + d, ways[k], k
                elif distance[k] + d == distance[j] and j not in settled:
                    ways[j] += ways[k]
        goals = [k for k in settled if k and ways[k] == 1 and before[k] != 0]
        if not goals:
            continue
        goal = goals[-1]
        way = [goal]
        while way[-1]:
            way.append(before[way[-1]])
        roads = ", ".join(f"{names[i]}-{names[j]} {length[i, j]}" for i, j in edges)
        answer = f"{'-'.join(names[k] for k in reversed(way))}, length {distance[goal]}"
        steps = steps[: settled.index(goal)]
        question = (
            f"Roads and their lengths: {roads}. What is the shortest way from {names[0]} to {names[goal]}?"
        )
        return f"Question: {question}\nSolution: {' '.join(steps)}\nAnswer: {answer}", answer


def check_shortest_path(text):
    question, answer = _question_and_answer(text)
    ends = re.search(r"from (\w) to (\w)\?", question)
    length = {}
    for a, b, d in re.findall(r"(\w)-(\w) (\d+)", question):
        length[a, b] = length[b, a] = int(d)
    found, stack = [], [(ends[1], 0)]
    while stack:
        path, total = stack.pop()
        if path[-1] == ends[2]:
            found.append((total, path))
            continue
        stack += [(path + b, total + d) for (a, b), d in length.items() if a == path[-1] and b not in path]
    found.sort()
    unique = len(found) == 1 or len(found) > 1 and found[0][0] < found[1][0]
    return bool(found) and unique and answer == f"{'-'.join(found[0][1])}, length {found[0][0]}"


# logic


CLUES = {  # what a clue says of the places of its people, who sit on chairs 1..n
    "{0} sits somewhere to the left of {1}.": lambda n, a, b: a < b,
    "{0} sits next to {1}.": lambda n, a, b: abs(a - b) == 1,
    "{0} does not sit next to {1}.": lambda n, a, b: abs(a - b) != 1,
    "{0} sits directly to the right of {1}.": lambda n, a, b: a == b + 1,
    "There is exactly one person between {0} and {1}.": lambda n, a, b: abs(a - b) == 2,
    "{0} sits at one of the two ends.": lambda n, a: a in (1, n),
    "{0} sits at neither end.": lambda n, a: a not in (1, n),
}


def seating(rng):
    """People on a row of chairs, and clues that leave one order; none of the clues can be spared. -> (text, answer)"""
    n = int(rng.integers(4, 6))
    people = [NAMES[i] for i in rng.permutation(len(NAMES))[:n]]
    place = dict(zip(people, (rng.permutation(n) + 1).tolist()))
    clues = []
    for text, holds in CLUES.items():
        for who in itertools.permutations(people, text.count("{")):
            if holds(n, *(place[p] for p in who)):
                clues.append((text, who))
    orders = [dict(zip(people, order)) for order in itertools.permutations(range(1, n + 1))]

    def possible(clues):
        return [o for o in orders if all(CLUES[text](n, *(o[p] for p in who)) for text, who in clues)]

    chosen = []
    for i in rng.permutation(len(clues)).tolist():
        before = len(possible(chosen))
        if before > 1 and len(possible([*chosen, clues[i]])) < before:
            chosen.append(clues[i])
    for clue in list(chosen):
        if len(possible([c for c in chosen if c != clue])) == 1:
            chosen.remove(clue)
    steps, so_far = [], []
    for text, who in chosen:  # the argument is elimination, told by how many orders are left
        so_far.append((text, who))
        steps.append(f"{text.format(*who)} Leaves {len(possible(so_far))} of {len(orders)} orders.")
    answer = " ".join(sorted(people, key=place.get))
    question = (
        f"{n} people sit on a row of chairs: {', '.join(sorted(people))}. {' '.join(t.format(*w) for t, w in chosen)} "
        "In which order do they sit, from left to right?"
    )
    return f"Question: {question}\nSolution: {' '.join(steps)}\nAnswer: {answer}", answer


def check_seating(text):
    question, answer = _question_and_answer(text)
    people = re.search(r"chairs: ([\w, ]+)\.", question)[1].split(", ")
    name = "|".join(people)
    found = []
    for order in itertools.permutations(people):
        row = " ".join(order)
        good = True
        for left, right in re.findall(rf"({name}) sits somewhere to the left of ({name})\.", question):
            good &= row.index(left) < row.index(right)
        for a, b in re.findall(rf"({name}) sits next to ({name})\.", question):
            good &= f"{a} {b}" in row or f"{b} {a}" in row
        for a, b in re.findall(rf"({name}) does not sit next to ({name})\.", question):
            good &= f"{a} {b}" not in row and f"{b} {a}" not in row
        for a, b in re.findall(rf"({name}) sits directly to the right of ({name})\.", question):
            good &= f"{b} {a}" in row
        for a, b in re.findall(rf"exactly one person between ({name}) and ({name})\.", question):
            good &= bool(re.search(rf"\b({a} \w+ {b}|{b} \w+ {a})\b", row))
        for a in re.findall(rf"({name}) sits at one of the two ends\.", question):
            good &= a in (order[0], order[-1])
        for a in re.findall(rf"({name}) sits at neither end\.", question):
            good &= a not in (order[0], order[-1])
        if good:
            found.append(row)
    return found == [answer]


def _statement(rng, speaker, n):
    """A random claim about the others, as (kind, people); see _claim for what it says."""
    others = [i for i in rng.permutation(n).tolist() if i != speaker]
    kind = ("knave", "knight", "same", "different", "both", "either")[rng.integers(6)]
    return kind, tuple(others[: 1 if kind in ("knave", "knight") else 2])


def _claim(kind, who, knight):
    """Is the claim true, if knight[i] says who is a knight?"""
    a, b = knight[who[0]], knight[who[-1]]
    return {
        "knave": not a,
        "knight": a,
        "same": a == b,
        "different": a != b,
        "both": a and b,
        "either": a or b,
    }[kind]


SAYS = {
    "knave": "{0} is a knave",
    "knight": "{0} is a knight",
    "same": "{0} and {1} are of the same kind",
    "different": "{0} and {1} are of different kinds",
    "both": "{0} and {1} are both knights",
    "either": "at least one of {0} and {1} is a knight",
}


def _suppose(assumed, people, claims):
    """
    The argument from what the first speaker is assumed to be, one person's words at a time: (its text, how it ends: "That fits." with
    everyone known, "... could not have spoken so.", or "" where no single person's words lead further).
    """
    known, line = {0: assumed}, [f"Suppose {people[0]} is a {'knight' if assumed else 'knave'}."]
    while True:
        found = None
        for i, (kind, who) in enumerate(claims):
            free = [j for j in {i, *who} if j not in known]
            fits = []
            for values in itertools.product((True, False), repeat=len(free)):
                trial = {**known, **dict(zip(free, values))}
                if _claim(kind, who, trial) == trial[i]:
                    fits.append(values)
            if not fits:
                end = f"Then {people[i]} could not have spoken so."
                return " ".join([*line, end]), end
            sure = [(j, fits[0][x]) for x, j in enumerate(free) if len({f[x] for f in fits}) == 1]
            if sure and found is None:
                found = i, *sure[0]
        if found is None:
            end = "That fits." if len(known) == len(people) else ""
            return " ".join([*line, end]), end
        i, j, knight = found
        known[j] = knight
        line.append(f"By the words of {people[i]}, {people[j]} is a {'knight' if knight else 'knave'}.")


def knights(rng):
    """Knights tell the truth, knaves lie: who is what, uniquely, and to be found without more than one assumption. -> (text, answer)"""
    while True:
        n = int(rng.integers(3, 6))
        people = [NAMES[i] for i in rng.permutation(len(NAMES))[:n]]
        claims = [_statement(rng, i, n) for i in range(n)]
        kinds = [
            k
            for k in itertools.product((True, False), repeat=n)
            if all(_claim(*claims[i], k) == k[i] for i in range(n))
        ]
        if len(kinds) != 1:
            continue
        knight = kinds[0]
        (refuted, no), (found, yes) = (
            _suppose(not knight[0], people, claims),
            _suppose(knight[0], people, claims),
        )
        if no.endswith("could not have spoken so.") and yes == "That fits.":
            break
    answer = ", ".join(f"{p} {'knight' if k else 'knave'}" for p, k in sorted(zip(people, knight)))
    words = " ".join(
        f'{p} says: "{SAYS[kind].format(*(people[j] for j in who))}."'
        for p, (kind, who) in zip(people, claims)
    )
    question = (
        f"Knights always tell the truth, knaves always lie. {words} Who is a knight, and who is a knave?"
    )
    return f"Question: {question}\nSolution: {refuted} {found}\nAnswer: {answer}", answer


def check_knights(text):
    question, answer = _question_and_answer(text)
    said = re.findall(r'(\w+) says: "([^"]+)\."', question)
    people = sorted(p for p, _ in said)
    found = []
    for number in range(2 ** len(people)):
        honest = {p for i, p in enumerate(people) if number >> i & 1}
        good = True
        for speaker, words in said:
            who = [p for p in re.findall(r"[A-Z]\w+", words)]
            count = sum(p in honest for p in who)
            if words.endswith("is a knave"):
                truth = count == 0
            elif words.endswith("same kind"):
                truth = count != 1
            elif words.endswith("different kinds"):
                truth = count == 1
            elif words.endswith("both knights"):
                truth = count == 2
            else:  # "is a knight", alone or "at least one of"
                truth = count >= 1
            good &= truth == (speaker in honest)
        if good:
            found.append(", ".join(f"{p} {'knight' if p in honest else 'knave'}" for p in people))
    return found == [answer]


LOGIC = {"seating": (seating, check_seating), "knights": (knights, check_knights)}


def _question_and_answer(text):
    """-> (question, answer) of a finished text; ValueError if it does not have the three parts."""
    found = re.fullmatch(r"Question: (.+)\nSolution: .*\nAnswer: (.+?)\n?", text)
    if not found:
        raise ValueError("not a puzzle: it needs the lines Question, Solution and Answer")
    return found[1], found[2]


def logic_puzzle(rng):
    """-> (text, answer) of a random kind of LOGIC."""
    return list(LOGIC.values())[rng.integers(len(LOGIC))][0](rng)


# -----------------------------------------------------------------------------
# suites


SUITES = ("sudoku4", "sudoku9", "maze", "transforms")
HELD_OUT_N = {"sudoku4": 100, "sudoku9": 50, "maze": 50, "transforms": 50}
HELD_OUT_SEED = {
    "sudoku4": 4004,
    "sudoku9": 9009,
    "maze": 7007,
    "transforms": 1234,
}  # changing one changes what was measured


def task_hash(task):
    """
    -> hex: SHA-256 of the kind and of every grid in order, not of the id; the same for all eight turned and mirrored images of a task.
    What prepare.py compares to keep held-out puzzles out of training: the loader turns and mirrors, so an image must not get in either.
    sudoku4 needs more, since other givens of the same answer would still give it away; there the answers themselves are held out.
    """
    grids = [np.asarray(grid, np.uint8) for pair in task.train + task.test for grid in pair]
    images = []
    for k in range(8):
        turned = [np.rot90(grid.T if k >= 4 else grid, k) for grid in grids]
        images.append(b"".join(bytes(grid.shape) + grid.tobytes() for grid in turned))
    return hashlib.sha256(task.kind.encode() + b"|" + min(images)).hexdigest()


def heldout(suite, n=None):
    """
    The first n tasks of a fixed list of HELD_OUT_N[suite] distinct ones (default: all). sudoku4: 6 blanks, answers from SUDOKU4_HELD_OUT
    alone; sudoku9: 30 blanks; maze: 7x7; transforms. Ids are 'maze-0007', for transforms 'transforms-0007:roll:dy=1:dx=-2'.
    ValueError for an unknown suite, and for more than there are: only these are kept out of training, one more could be in it.
    """
    if suite not in SUITES:
        close = difflib.get_close_matches(str(suite), SUITES, n=1, cutoff=0)[0]
        raise ValueError(f"unknown suite {suite!r}; did you mean {close!r}? There are {', '.join(SUITES)}")
    n = HELD_OUT_N[suite] if n is None else n
    if not 0 <= n <= HELD_OUT_N[suite]:
        raise ValueError(
            f"{n} held-out puzzles of {suite}: there are {HELD_OUT_N[suite]}, and only these are kept out of training"
        )
    rng = np.random.default_rng(HELD_OUT_SEED[suite])
    tasks, seen = [], set()
    while len(tasks) < n:
        match suite:
            case "sudoku4":
                task = sudoku(rng, 4, 6, "test")
            case "sudoku9":
                task = sudoku(rng, 9, 30, "test")
            case "maze":
                task = maze(rng, 7, 7)
            case "transforms":
                task = programs.transform(rng)
        if task_hash(task) not in seen:
            seen.add(task_hash(task))
            number = f"{suite}-{len(tasks):04d}"
            task.id = f"{number}:{task.id}" if suite == "transforms" else number
            tasks.append(task)
    return tasks


def check(task):
    """True if the task's answer is right by the checker of its kind; for a sudoku also if it is the only answer."""
    puzzle, answer = task.test[0]
    match task.kind:
        case "sudoku":
            return check_sudoku(puzzle, answer) and len(solve_sudoku(puzzle)[0]) == 1
        case "maze":
            return check_maze(puzzle, answer)
        case "arc":
            return programs.check_transform(task)
    raise ValueError(f"no checker for tasks of kind {task.kind!r}: there are sudoku, maze, arc")
