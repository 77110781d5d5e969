"""
README.md's commands: those that take seconds are run in order, with small settings, in a copy of the repository;
of the others the arguments are parsed, and the files that they name must be there.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks import copy_of_the_repository
from test_train import STAGE

import configurator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "--n_layer=4",
    "--n_head=2",
    "--n_embd=16",
    "--n_ff=24",
    "--block_size=256",
    "--batch_size=2",
    "--max_iters=2",
    "--eval_interval=2",
    "--eval_batches=1",
    "--log_interval=1",
    "--warmup_iters=1",
    "--mixture={'stdlib': 1, 'sudoku4': 1}",
]
# pattern -> what is added, so that the command takes a second or two (a later value of a setting wins)
RUN = {
    r"^python prepare\.py demo$": STAGE,
    r"^python prepare\.py (status|verify demo|clean)": [],
    r"^python train\.py config/route_a_demo\.py$": TINY,
    r"^python train\.py config/route_b_demo\.py --max_iters": [*TINY, "--out_dir=out/demo/route_b"],
    r"^python train\.py --help": [],
    r"^python sample\.py .*--prompt": ["--max_new_tokens=3"],
    r"^python sample\.py .*--task=sudoku4": [],
    r"^python eval_arc\.py .*--suites=sudoku4,maze": ["--limit=1"],
    r"^python distill\.py config/distill_demo\.py": [
        "--max_iters=1",
        "--eval_interval=1",
        "--eval_batches=1",
        "--check_tasks=1",
    ],
}


def commands():
    """The lines of all ```sh blocks without their comments; `a && b` is two."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split(" && ")]
    return [part for part in parts if part]


class Parsed(Exception):
    """Raised in place of doing what the arguments say."""


@pytest.mark.parametrize("command", [c for c in commands() if re.match("python|torchrun", c)])
def test_the_arguments_are_ones_that_the_script_takes(command, monkeypatch):
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        words = ["python", parsed.training_script, *parsed.training_script_args]
    as_module = words[1] == "-m"
    name, argv = (words[2], words[3:]) if as_module else (words[1].removesuffix(".py"), words[2:])
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert path.is_file()
    for word in argv:
        assert not word.startswith("config/") or (ROOT / word).is_file(), f"{word} is not there"
    if "--help" in argv:
        return
    if name in ("train", "distill"):
        configurator.resolve(
            configurator.defaults_of(path), argv
        )  # raises for a setting that it does not have
    elif name in ("prepare", "smol.publish"):
        own = vars(importlib.import_module(name))
        configurator.resolve(own, [word for word in argv if word.startswith("--")])
    else:
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(self, *args, **kwargs):
            parse(self, *args, **kwargs)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", [str(path), *argv])
        with pytest.raises(Parsed):
            runpy.run_module(name, run_name="__main__") if as_module else runpy.run_path(
                str(path), run_name="__main__"
            )


def test_what_the_text_names_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands():
        if command.startswith("make "):
            assert command.split()[1] in targets, command
        for requirements in re.findall(r"-r (\S+)", command):
            assert (ROOT / requirements).is_file(), command
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"the README links to {link}, which is not there"


# One process runs them all, one after another, each as the main program: PyTorch is imported once.
RUNNER = """
import json, os, runpy, sys
sys.path.insert(0, os.getcwd())
for words in json.load(open(sys.argv[1])):
    sys.argv = words[1:]
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as e:
        if e.code not in (None, 0):
            print(e.code, file=sys.stderr)
            sys.exit(f"FAILED: {' '.join(words)}")
"""


def test_the_commands_run(tmp_path):
    copy, todo = copy_of_the_repository(tmp_path), []
    for pattern, more in RUN.items():
        assert any(re.search(pattern, command) for command in commands()), f"{pattern} matches nothing"
    for command in commands():
        todo += [
            [*shlex.split(command), *more] for pattern, more in RUN.items() if re.search(pattern, command)
        ]
    (copy / "todo.json").write_text(json.dumps(todo))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, "todo.json"],
        cwd=copy,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for made in ("route_a/ckpt.pt", "route_b/loss.png", "eval.json", "grids.png", "report.html"):
        assert (copy / "out/demo" / made).is_file(), made
    report = json.loads((copy / "out/demo/eval.json").read_text())
    assert set(report) == {"route_a", "route_b"} and report["route_b"]["suites"]["sudoku4"]["total"] == 1
