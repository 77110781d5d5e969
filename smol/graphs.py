"""
Puzzles in words: graphs (shortest way) and logic (who sits where, knights and knaves), each with one answer.

A puzzle is text: "Question: ...", "Solution: ..." step by step, and a last line "Answer: ...". Every kind has a
checker that reads nothing but the finished text and finds the answer another way than the generator: shortest ways
by trying all simple paths where the generator settles nodes one by one; seatings and knights by trying every
possibility where the generator plants a solution and adds clues. A checker also refuses a question with two answers.

Read next: programs.py (puzzles on grids), sources.py (where both get their share of a stage).
"""

import itertools
import re

from smol.word_problems import NAMES

# ---------------------------------------------------------------------------------------------------------------------------------
# graphs; nodes are letters


def shortest(rng):
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


def check_shortest(text):
    question, answer = _read(text)
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


# ---------------------------------------------------------------------------------------------------------------------------------
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
    question, answer = _read(text)
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
    question, answer = _read(text)
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


# ---------------------------------------------------------------------------------------------------------------------------------


LOGIC = {"seating": (seating, check_seating), "knights": (knights, check_knights)}


def _read(text):
    """-> (question, answer) of a finished text; ValueError if it does not have the three parts."""
    found = re.fullmatch(r"Question: (.+)\nSolution: .*\nAnswer: (.+?)\n?", text)
    if not found:
        raise ValueError("not a puzzle: it needs the lines Question, Solution and Answer")
    return found[1], found[2]


def logic_puzzle(rng):
    """-> (text, answer) of a random kind of LOGIC."""
    return list(LOGIC.values())[rng.integers(len(LOGIC))][0](rng)
