"""
The questions and functions of the suite `language`, in language.jsonl: written for this repository.

A question's four choices are natural ends of the same sentence, about equally long, and one is true. A
function is given by signature and docstring; its tests are calls with their values as Python literals;
`solution` is a body that passes them and `mistake` a plausible one that does not, which test the tests. Both
are small and easy: made to tell a model of 100M parameters that learns something from one that learns
nothing.

prepare.py keeps documents out of training that quote one of these texts over 13 words or more.
Read next: language.py, which asks.
"""

import ast
import functools
import json
import textwrap
from pathlib import Path


@functools.cache
def items():
    text = Path(__file__).with_name("language.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def questions():
    """
    List of (category, question, four choices, index of the right one). The index goes round, so that who
    always takes the same place is right in a quarter of them.
    """
    out = []
    for i, item in enumerate(item for item in items() if "question" in item):
        choices = list(item["wrong"])
        choices.insert(i % 4, item["right"])
        out.append((item["category"], item["question"], tuple(choices), i % 4))
    return out


def functions():
    """List of (name, stub, tests, solution, mistake): the stub ends with its docstring, then come bodies."""
    out = []
    for item in items():
        if "function" in item:
            stub = f'def {item["function"]}:\n    """{item["docstring"]}"""\n'
            tests = [(call, ast.literal_eval(value)) for call, value in item["tests"]]
            bodies = (textwrap.indent(item[key], "    ") + "\n" for key in ("solution", "mistake"))
            out.append((item["function"].split("(")[0], stub, tests, *bodies))
    return out


def evaluation_texts():
    """{name: [text, ...]}: what a document must not quote, each with its right answer."""
    return {
        "language_questions": [f"{question} {choices[right]}" for _, question, choices, right in questions()],
        "language_functions": [stub + solution for _, stub, _, solution, _ in functions()],
    }
