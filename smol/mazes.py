"""
Mazes with one shortest way: 0 free, 1 wall, 2 start, 3 goal; in the answer 4 on the way.

The checker counts shortest ways layer by layer over the whole grid; the generator follows parents in a breadth-first search.

Read next: puzzles.py, the suites that models are evaluated on.
"""

import numpy as np

from smol.arc import Task


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
