"""
Arithmetic word problems with their solution step by step.

In a template {a} is a number, {A} and {B} are people, {things} is what it is about; in the solution [a * b] is a step, which will read
"3 * 4 = 12", and s1, s2 are the results of the steps before. Every number of the question is written in digits and used once, and no
other number is: so check_arithmetic() can hold the solution against the question. It reads the finished text and knows no template.

Read next: graphs.py, more puzzles in words.
"""

import ast
import operator
import re
from collections import Counter
from fractions import Fraction

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
