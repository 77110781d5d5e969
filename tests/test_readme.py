"""README.md's commands: the quick ones are run in order; the arguments of the others are parsed."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks import copy_of_the_repository

import configurator
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = (
    "--n_layer=4 --n_head=2 --n_embd=16 --n_ff=24 --block_size=256 --batch_size=2 --max_iters=2 "
    "--eval_interval=2 --eval_batches=1 --log_interval=1 --warmup_iters=1 --mixture={'stdlib':1,'sudoku4':1} "
    "--gradient_accumulation_steps=2"
).split()
# pattern -> what is added, so that the command takes a second or two; a later value of a setting wins
RUN = {
    r"^python prepare\.py (status|verify demo|clean)": [],
    r"^python train\.py config/route_a_demo\.py$": TINY,
    r"^python train\.py config/route_b_demo\.py --max_iters": [*TINY, "--out_dir=out/demo/route_b"],
    r"^python train\.py --help": [],
    r"^python sample\.py .*--prompt": ["--max_new_tokens=3"],
    r"^python sample\.py .*--task=sudoku4": [],
    r"^python eval_arc\.py .*--suites=sudoku4,maze": ["--limit=1"],
    r"^python distill\.py config/distill_demo\.py": [
        *("--max_iters=1", "--eval_interval=1", "--eval_batches=1", "--eval_limit=1")
    ],
}

# One process runs them all, each as the main program: PyTorch is imported once.
RUNNER = """
import json, os, runpy, sys
sys.path.insert(0, os.getcwd())
for words in json.load(open(sys.argv[1])):
    sys.argv = words[1:]
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as e:
        if e.code not in (None, 0):
            sys.exit(f"FAILED: {' '.join(words)}: {e.code}")
"""


def commands():
    """The lines of all ```sh blocks without their comments; `a && b` is two."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split(" && ")]
    return [part for part in parts if part]


@pytest.mark.parametrize("command", [c for c in commands() if re.match("python|torchrun", c)])
def test_the_arguments_are_ones_that_the_script_takes(command):
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        words = ["python", parsed.training_script, *parsed.training_script_args]
    name, *argv = words[2:] if words[1] == "-m" else [words[1].removesuffix(".py"), *words[2:]]
    script = vars(importlib.import_module(name))
    if name in ("bench.plan", "bench.train"):  # they take the settings of train.py as well
        script = {**script, **vars(train), "RANGES": {}}
    configurator.resolve(script, [word for word in argv if word != "--help"], usage="words")


def test_what_the_text_names_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands():
        if command.startswith("make "):
            assert command.split()[1] in targets, command
        for requirements in re.findall(r"-r (\S+)", command):
            assert (ROOT / requirements).is_file(), command
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"the README links to {link}, which is not there"


def test_the_commands_run(tmp_path, data):
    copy, todo = copy_of_the_repository(tmp_path, data), []
    for pattern in RUN:
        assert any(re.search(pattern, command) for command in commands()), f"{pattern} matches nothing"
    for command in commands():
        todo += [[*shlex.split(command), *more] for p, more in RUN.items() if re.search(p, command)]
    (copy / "todo.json").write_text(json.dumps(todo))
    how = {"cwd": copy, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 900}
    command = [sys.executable, "-c", RUNNER, "todo.json"]
    done = subprocess.run(command, text=True, capture_output=True, **how)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for made in ("route_a/ckpt.pt", "route_b/loss.png", "eval.json", "grids.png", "report.html"):
        assert (copy / "out/demo" / made).is_file(), made
    report = json.loads((copy / "out/demo/eval.json").read_text())
    assert set(report) == {"route_a", "route_b"} and report["route_b"]["suites"]["sudoku4"]["total"] == 1
