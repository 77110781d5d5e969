"""
Generated puzzles with verified answers.

On grids: sudoku, turned grids and mazes. In words: arithmetic, shortest paths, seatings, knights and knaves;
such a puzzle is a text "Question: ...", "Solution: ..." step by step, and a last line "Answer: ...".

A generator takes a np.random.Generator, and nothing else decides what comes out. A checker works another
way: it looks at rows, columns and boxes and does not solve, or walks through a maze in layers. (Those of
puzzles in words, which read the finished text and try every possibility, are in tests/test_puzzles.py.)

Never trained on: the grids of sudoku4_grids("test"), and what suites.py asks. Read next: sources.py.
"""

import functools
import hashlib
import itertools
import math
import operator
import re
from collections import Counter

import numpy as np

from smol.arc import Task, neighbours, turn

# -----------------------------------------------------------------------------
# sudoku: 0 is a blank

MAX_BLANKS = {4: 12, 9: 54}  # 4 givens are the fewest for 4x4; 9x9 goes to 64, but digging past 54 takes long


def solve_sudoku(grid, limit=2, rng=None):
    """
    -> at most `limit` solutions of a (4, 4) or (9, 9) grid, as np.uint8 grids; 2 tell whether one is unique.

    Search fills a cell with the fewest digits left, trying the lowest digit first or, with an rng, in random
    order. Bit v-1 stands for digit v.
    """
    size, box = len(grid), math.isqrt(len(grid))
    values = np.asarray(grid).tolist()
    free = [(1 << size) - 1] * (3 * size)  # digits that are still to be placed in each row, column, box
    blanks = []  # of each: its row, column, box as indices of free
    for r, c in itertools.product(range(size), repeat=2):
        units = r, size + c, 2 * size + r // box * box + c // box
        if not values[r][c]:
            blanks.append(units)
            continue
        bit = 1 << values[r][c] - 1
        for u in units:
            if not free[u] & bit:
                return []
            free[u] ^= bit
    solutions = []

    def search():
        if not blanks:
            solutions.append(np.array(values, np.uint8))
            return
        best, bits, fewest = 0, 0, size + 1
        for i, (r, c, b) in enumerate(blanks):
            left = free[r] & free[c] & free[b]
            if left.bit_count() < fewest:
                best, bits, fewest = i, left, left.bit_count()
                if fewest <= 1:
                    break
        digits = [v for v in range(1, size + 1) if bits >> v - 1 & 1]
        if rng is not None:
            rng.shuffle(digits)
        units = blanks[best]
        blanks[best] = blanks[-1]
        blanks.pop()
        for v in digits:
            values[units[0]][units[1] - size] = v
            for u in units:
                free[u] ^= 1 << v - 1
            search()
            for u in units:
                free[u] ^= 1 << v - 1
            if len(solutions) >= limit:
                break
        blanks.append(units)

    search()
    return solutions


@functools.cache
def all_sudoku4():
    """The 288 filled 4x4 grids, np.uint8 (288, 4, 4), in lexicographic order."""
    return np.array(sorted(solve_sudoku(np.zeros((4, 4), np.uint8), limit=1000), key=np.ndarray.tobytes))


@functools.cache
def sudoku4_grids(split):
    """The filled 4x4 grids of 'train', np.uint8 (232, 4, 4), or of 'test', (56, 4, 4), held out."""
    # A training grid turned or mirrored on the fly must not become a held-out one, so whole orbits under the
    # eight symmetries of the square are held out. They have 4 or 8 grids: the most that fits into a fifth of
    # 288 is 56. A hash orders them, not a random generator, so that no version of numpy can move the border.
    images = [[turn(k, grid).tobytes() for k in range(8)] for grid in all_sudoku4()]
    orbits = [hashlib.sha256(min(of_grid)).digest() for of_grid in images]
    held, n_held = set(), 0
    for orbit, n in sorted(Counter(orbits).items()):
        if n_held + n <= 288 // 5:
            held.add(orbit)
            n_held += n
    is_held = np.array([orbit in held for orbit in orbits])
    return all_sudoku4()[is_held if split == "test" else ~is_held]


def sudoku(rng, size, blanks, split="train"):
    """
    Task(kind='sudoku', train=[], test=[(puzzle, answer)]), np.uint8 (size, size), with exactly one solution.
    The answer is one of sudoku4_grids(split), so the splits share none; of 9x9 it is any filled grid. Cells
    are blanked in random order, but for those that would allow a second solution.
    """
    if size not in MAX_BLANKS or not 1 <= blanks <= MAX_BLANKS[size]:
        raise ValueError(f"no sudoku of size {size} with {blanks} blanks: 4 takes 1 to 12, 9 takes 1 to 54")
    grids, everything = sudoku4_grids(split), all_sudoku4().reshape(288, 16)
    while True:  # some grids cannot spare this many cells in this order; another draw can
        if size == 4:
            answer = grids[rng.integers(len(grids))]
            agrees = everything == answer.reshape(16)  # uniqueness is a look at all 288 grids: (288, 16)
        else:
            answer = solve_sudoku(np.zeros((9, 9), np.uint8), limit=1, rng=rng)[0]
        puzzle = answer.copy()
        left = blanks
        for cell in rng.permutation(size * size).tolist():
            kept, puzzle.flat[cell] = puzzle.flat[cell], 0
            n = agrees[:, puzzle.reshape(-1) > 0].all(1).sum() if size == 4 else len(solve_sudoku(puzzle))
            if n != 1:
                puzzle.flat[cell] = kept
                continue
            left -= 1
            if not left:
                return Task(f"sudoku{size}", "sudoku", [], [(puzzle, answer.copy())])


def check_sudoku(puzzle, answer):
    """True if `answer` keeps the givens and has every digit once in each row, column and box."""
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
    lines = [np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)]) for _ in range(2)]
    turn = rng.integers(2)
    return [np.ascontiguousarray(digits[(grid.T if turn else grid)[np.ix_(*lines)]]) for grid in grids]


# -----------------------------------------------------------------------------
# a rule that only the demonstrations tell


def turned(rng, n):
    """
    Task(kind="arc") of two demonstrations and a test: 3x3 grids of random colours, all seen through the same
    one of the first n of eight symmetries (arc.turn): for n = 2, as they are or a quarter turn.
    """
    k = int(rng.integers(n))
    grids = [rng.integers(0, 10, (3, 3)).astype(np.uint8) for _ in range(3)]
    pairs = [(grid, np.ascontiguousarray(turn(k, grid))) for grid in grids]
    return Task("turn", "arc", pairs[:2], pairs[2:])


# -----------------------------------------------------------------------------
# mazes: 0 free, 1 wall, 2 start, 3 goal; in the answer 4 on the way


def carve(rng, height, width):
    """Walls, bool (height, width): a random tree over every other cell; in half of the mazes with holes."""
    walls = np.ones((height, width), bool)
    # with an even side one border is solid wall; which one is chance
    top, left = (0 if side % 2 else int(rng.integers(2)) for side in (height, width))
    rows, cols = (height + 1) // 2, (width + 1) // 2
    r, c = int(rng.integers(rows)), int(rng.integers(cols))
    unseen = set(itertools.product(range(rows), range(cols))) - {(r, c)}
    walls[top + 2 * r, left + 2 * c] = False
    path = [(r, c)]
    chance = iter(rng.random(2 * rows * cols).tolist())  # a number a step, drawn at once for speed
    while path:
        r, c = path[-1]
        ways = [cell for cell in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if cell in unseen]
        if not ways:
            path.pop()
            continue
        y, x = ways[int(next(chance) * len(ways))]
        unseen.remove((y, x))
        walls[top + 2 * y, left + 2 * x] = False
        walls[top + r + y, left + c + x] = False  # on the way there
        path.append((y, x))
    if rng.random() < 0.5:
        walls &= rng.random((height, width)) > rng.uniform(0.05, 0.4)
    return walls


def breadth_first(free, start, width):
    """-> {cell: distance}, {cell: parent}, {cell: number of shortest paths to it}. Cells are flat indices:
    free is a list of bool with a wall all around, `width` per row."""
    distance, parent, ways, queue = {start: 0}, {start: None}, {start: 1}, [start]
    for cell in queue:
        for near in (cell - width, cell + width, cell - 1, cell + 1):
            if free[near] and near not in distance:
                distance[near], parent[near], ways[near] = distance[cell] + 1, cell, ways[cell]
                queue.append(near)
            elif free[near] and distance[near] == distance[cell] + 1:
                ways[near] += ways[cell]
    return distance, parent, ways


def maze(rng, height, width):
    """
    Task(kind='maze', train=[], test=[(maze, answer)]), np.uint8 (height, width), sides 3..30. The shortest
    path from start to goal is unique and has at least (height + width) / 2 steps; the answer is the same grid
    with the cells between them as 4. ValueError for other sides.
    """
    if not (3 <= height <= 30 and 3 <= width <= 30):
        raise ValueError(f"a maze of {height}x{width} is not offered: sides go from 3 to 30")
    while True:
        walls = np.pad(carve(rng, height, width), 1, constant_values=True)
        cells = np.flatnonzero(~walls).tolist()
        start = cells[rng.integers(len(cells))]
        distance, parent, ways = breadth_first((~walls).reshape(-1).tolist(), start, width + 2)
        goals = [c for c, steps in distance.items() if 2 * steps >= height + width and ways[c] == 1]
        if goals:
            break
    goal = goals[rng.integers(len(goals))]
    puzzle = walls.astype(np.uint8)
    puzzle.flat[[start, goal]] = 2, 3
    answer = puzzle.copy()
    cell = parent[goal]
    while cell != start:
        answer.flat[cell] = 4
        cell = parent[cell]
    inside = slice(1, -1), slice(1, -1)
    return Task(f"maze{height}x{width}", "maze", [], [(puzzle[inside].copy(), answer[inside].copy())])


def check_maze(maze, answer, only=True):
    """
    True if `answer` marks a shortest path from start to goal and nothing else, and there is no other as
    short; with only=False there may be. Walks from the start in layers of the whole grid.
    """
    maze, answer = np.asarray(maze), np.asarray(answer)
    marked = answer == 4
    start, goal = maze == 2, maze == 3
    if maze.ndim != 2 or maze.shape != answer.shape or start.sum() != 1 or goal.sum() != 1 or maze.max() > 3:
        return False
    if not np.array_equal(np.where(marked, 0, answer), maze):
        return False

    ways, unseen = start.astype(np.uint8), (maze != 1) & ~start  # shortest paths to the cells of a layer
    along, steps = start, 0  # cells that as many steps over marked cells lead to
    while not ways[goal][0]:
        if not ways.any():
            return False
        ways = np.minimum(neighbours(ways).sum(0), 2) * unseen  # 2: more than one
        unseen &= ways == 0
        along = neighbours(along).any(0) & (marked | goal)
        steps += 1
    return bool(along[goal][0] and marked.sum() == steps - 1 and not (only and ways[goal][0] > 1))


def answer_fits(task):
    """Is the answer right? For puzzles from elsewhere; a maze may have other ways as short."""
    if task.kind == "sudoku":
        return check_sudoku(*task.test[0])
    return task.kind != "maze" or check_maze(*task.test[0], only=False)


# -----------------------------------------------------------------------------
# puzzles in words: who and what they are about

NAMES = """Ada Ben Chen Dina Emil Fatima Goran Hana Ivo Jun Kofi Lena Mateo Nia Omar Petra Ravi Sofia Tomas
Uma Viktor Wanjiru Yuki Zoe""".split()
THINGS = """apples marbles stickers pencils shells buttons cards coins beads stamps cookies tickets plums
postcards nails eggs lemons balloons""".split()


def some_people(rng, n):
    return [NAMES[i] for i in rng.permutation(len(NAMES))[:n]]


def words(question, solution, answer):
    return f"Question: {question}\nSolution: {solution}\nAnswer: {answer}"


# -----------------------------------------------------------------------------
# arithmetic. In a template {a} is a number, {A} and {B} are people; [a * b] is a step, which will read "3 * 4
# = 12", and s1, s2 are the results of the steps before. Every number of the question goes into one step and
# no other number does, so the solution can be held against the question.

# largest number and question, then solution; numbers are drawn until each step is a whole number above 1
TEMPLATE_LINES = """
99 {A} has {a} {things}. {B} gives {A} {b} more. How many {things} does {A} have now?
Together that makes [a + b] {things}.
99 {A} has {a} {things} and gives {b} of them to {B}. How many {things} does {A} have left?
What is left is [a - b] {things}.
20 There are {a} boxes with {b} {things} in each. How many {things} are there in all?
The boxes hold [a * b] {things}.
144 {A} shares {a} {things} equally among {b} friends. How many {things} does each friend get?
Each friend gets [a / b] {things}.
12 {A} buys {a} bags with {b} {things} in each and loses {c} {things}. How many {things} are left?
The bags hold [a * b] {things}. After the loss there are [s1 - c] {things}.
60 {A} has {a} {things}, {B} has {b}. They share all equally among {c} children. How many does each get?
Together they have [a + b] {things}. Each child gets [s1 / c] {things}.
15 One ticket costs {a} dollars. {A} buys {b} tickets and {B} buys {c}. How much is that together?
They buy [b + c] tickets. That costs [s1 * a] dollars.
90 A train has {a} passengers. At the first stop {b} get off and {c} get on. How many are on the train then?
After {b} get off there are [a - b] passengers. Then there are [s1 + c] passengers.
12 {A} reads {a} pages a day for {b} days, {B} reads {c} for {d} days. How many do they read together?
{A} reads [a * b] pages. {B} reads [c * d] pages. Together that is [s1 + s2] pages.
14 A hall has {a} rows of {b} seats and {c} rows of {d}. {e} seats are taken. How many are free?
First [a * b] seats, then [c * d] seats. There are [s1 + s2] seats. [s3 - e] seats are free.
99 After giving {a} {things} to {B} and finding {b} others, {A} has {c}. How many did {A} have at the start?
Before finding {b} there were [c - b] {things}. Before giving {a} away there were [s1 + a] {things}.
20 {A} earns {a} dollars an hour, works {b} hours and spends {c} and then {d} dollars. What is left?
{A} earns [a * b] dollars. What was spent is [c + d] dollars. There are [s1 - s2] dollars left.
15 A floor is {a} by {b} meters. A square meter of tiles costs {c} dollars. What do the tiles cost?
The floor has [a * b] square meters. The tiles cost [s1 * c] dollars.
12 A baker makes {a} trays of {b} rolls and packs the rolls into bags of {c}. How many bags are filled?
There are [a * b] rolls. They fill [s1 / c] bags.
80 {A} is {a} years old and {B} is {b} years younger. How old will {B} be in {c} years?
{B} is [a - b] years old. In {c} years {B} will be [s1 + c].
60 A tank holds {a} liters. Each minute {b} liters flow in and {c} flow out. When is it full?
Each minute [b - c] liters stay. The tank is full after [a / s1] minutes.
""".strip().splitlines()
TEMPLATES = [(*a.split(" ", 1), b) for a, b in zip(TEMPLATE_LINES[::2], TEMPLATE_LINES[1::2])]
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: a // b if b and a % b == 0 else 0,
}


def arithmetic(rng):
    """-> text; its answer is a whole number above 1."""
    largest, question, solution = TEMPLATES[rng.integers(len(TEMPLATES))]
    about = dict(zip("AB", some_people(rng, 2)), things=THINGS[rng.integers(len(THINGS))])
    letters = sorted(set(re.findall(r"{([a-z])}", question)))

    def step(match):
        left, right = numbers[match[1]], numbers[match[3]]
        results.append(OPERATORS[match[2]](left, right))
        numbers[f"s{len(results)}"] = results[-1]
        return f"{left} {match[2]} {right} = {results[-1]}"

    results = [0]
    while min(results) < 2:
        numbers = dict(zip(letters, rng.integers(2, int(largest) + 1, size=len(letters)).tolist()))
        results = []
        worked = re.sub(r"\[(\w+) (.) (\w+)\]", step, solution)
    return words(question.format(**about, **numbers), worked.format(**about, **numbers), results[-1])


# -----------------------------------------------------------------------------
# shortest paths on a road map; places are letters


def shortest_path(rng):
    """Roads with lengths: the shortest way between two places, unique, of several roads. -> text"""
    while True:
        places = [chr(65 + i) for i in rng.permutation(26)[: rng.integers(5, 9)]]
        pairs = [pair for pair in itertools.combinations(places, 2) if rng.random() < 0.45]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        roads = list(zip(pairs, rng.integers(1, 13, size=len(pairs)).tolist()))
        near = {place: [] for place in places}
        for (a, b), length in roads:
            near[a].append((b, length))
            near[b].append((a, length))
        # settle the nearest place, then the next (Dijkstra)
        start = places[0]
        distance, ways, before, settled = {start: 0}, {start: 1}, {}, []
        while len(settled) < len(distance):
            a = min((place for place in distance if place not in settled), key=distance.get)
            settled.append(a)
            for b, length in near[a]:
                if distance[a] + length < distance.get(b, 10**9):
                    distance[b], ways[b], before[b] = distance[a] + length, ways[a], a
                elif distance[a] + length == distance[b]:
                    ways[b] += ways[a]
        goals = [place for place in settled[1:] if ways[place] == 1 and before[place] != start]
        if goals:
            break
    way = [goals[-1]]
    while way[-1] != start:
        way.append(before[way[-1]])
    told = ", ".join(f"{a}-{b} {length}" for (a, b), length in roads)
    question = f"Roads and their lengths: {told}. What is the shortest way from {start} to {way[0]}?"
    steps = [f"{p} is {distance[p]} away, by {before[p]}." for p in settled[1 : settled.index(way[0]) + 1]]
    return words(question, " ".join(steps), f"{'-'.join(reversed(way))}, length {distance[way[0]]}")


# -----------------------------------------------------------------------------
# logic: what a sentence means, of people on chairs 1, 2, ... from left to right,
# and of people who are knights (True) or knaves (False)

MEANS = {
    "{0} sits somewhere to the left of {1}.": lambda a, b: a < b,
    "{0} sits next to {1}.": lambda a, b: abs(a - b) == 1,
    "{0} does not sit next to {1}.": lambda a, b: abs(a - b) != 1,
    "{0} sits directly to the right of {1}.": lambda a, b: a == b + 1,
    "There is exactly one person between {0} and {1}.": lambda a, b: abs(a - b) == 2,
    "{0} sits at the left end.": lambda a: a == 1,
    "{0} does not sit at the left end.": lambda a: a != 1,
    '{0} says: "{1} is a knave."': lambda speaker, a: speaker != a,
    '{0} says: "{1} is a knight."': lambda speaker, a: speaker == a,
    '{0} says: "{1} and {2} are of the same kind."': lambda speaker, a, b: speaker == (a == b),
    '{0} says: "{1} and {2} are of different kinds."': lambda speaker, a, b: speaker == (a != b),
    '{0} says: "{1} and {2} are both knights."': lambda speaker, a, b: speaker == (a and b),
    '{0} says: "At least one of {1} and {2} is a knight."': lambda speaker, a, b: speaker == (a or b),
}
CLUES = [sentence for sentence in MEANS if "says" not in sentence]
CLAIMS = [sentence for sentence in MEANS if "says" in sentence]
KIND = ("knave", "knight")


def possible(ways, statements):
    """Those of the ways, {person: chair or kind}, in which all statements, (sentence, people), hold."""
    for sentence, who in statements:
        ways = [way for way in ways if MEANS[sentence](*[way[person] for person in who])]
    return ways


def seats(people):
    return [dict(zip(people, chairs)) for chairs in itertools.permutations(range(1, len(people) + 1))]


def kinds(people):
    return [dict(zip(people, way)) for way in itertools.product((True, False), repeat=len(people))]


def seating(rng):
    """People on a row of chairs, and clues that leave one order. -> text"""
    people = some_people(rng, int(rng.integers(4, 6)))
    everything = seats(people)
    truth = everything[:1]  # they sit in the order in which they were drawn
    clues = [(clue, who) for clue in CLUES for who in itertools.permutations(people, clue.count("{"))]
    clues = [clue for clue in clues if possible(truth, [clue])]
    told, steps, left = [], [], everything
    for i in rng.permutation(len(clues)).tolist():
        fewer = possible(left, [clues[i]])
        if len(fewer) < len(left):  # the argument is elimination, told by how many orders are left
            told.append(clues[i][0].format(*clues[i][1]))
            steps.append(f"{told[-1]} Leaves {len(fewer)} of {len(everything)} orders.")
            left = fewer
    question = f"{len(people)} people sit on a row of chairs: {', '.join(sorted(people))}. {' '.join(told)} "
    question += "In which order do they sit, from left to right?"
    return words(question, " ".join(steps), " ".join(people))


def suppose(first, kind, statements):
    """
    The argument from what the first speaker is supposed to be, one person's words at a time -> (its text,
    what is known at its end, {person: kind}, or None after a contradiction).
    """
    known, lines = {first: kind}, [f"Suppose {first} is a {KIND[kind]}."]
    while True:
        found = None
        for claim, who in statements:
            unknown = [p for p in who if p not in known]
            ways = possible([known | way for way in kinds(unknown)], [(claim, who)])
            if not ways:
                return " ".join([*lines, f"Then {who[0]} could not have spoken so."]), None
            sure = [p for p in unknown if len({way[p] for way in ways}) == 1]
            if sure and not found:
                found = who[0], sure[0], ways[0][sure[0]]
        if not found:
            return " ".join([*lines, "That fits."]), known
        speaker, person, knight = found
        known[person] = knight
        lines.append(f"By the words of {speaker}, {person} is a {KIND[knight]}.")


def knights(rng):
    """
    Knights tell the truth, knaves lie: who is what, uniquely. Supposing that the first speaker is what they
    are not leads to a contradiction, the other way to everyone's kind. -> text
    """
    while True:
        people, said = some_people(rng, int(rng.integers(3, 6))), []
        for i, speaker in enumerate(people):
            claim = CLAIMS[rng.integers(len(CLAIMS))]
            others = [people[j] for j in rng.permutation(len(people)) if j != i]
            said.append((claim, [speaker, *others][: claim.count("{")]))
        left = possible(kinds(people), said)
        if len(left) != 1:
            continue
        right = left[0][people[0]]
        refuted, nothing = suppose(people[0], not right, said)
        found, known = suppose(people[0], right, said)
        if nothing is None and len(known) == len(people):
            break
    question = "Knights always tell the truth, knaves always lie. "
    question += " ".join(claim.format(*who) for claim, who in said) + " Who is a knight, who is a knave?"
    answer = ", ".join(f"{person} {KIND[known[person]]}" for person in sorted(known))
    return words(question, f"{refuted} {found}", answer)


def logic_puzzle(rng):
    """-> text, either of the two."""
    return (seating, knights)[rng.integers(2)](rng)
