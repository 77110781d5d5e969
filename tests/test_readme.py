"""
Every command that README.md shows. Those that need neither a GPU, a network nor minutes are run, with small settings, in a copy of the
repository, in the order in which the README has them; of all of them the arguments are parsed by the script that would take them, and
the files that they name must be there.
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
TINY = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--n_ff=24", "--block_size=256", "--batch_size=2", "--max_iters=2", "--eval_interval=2",
        "--eval_batches=1", "--log_interval=1", "--warmup_iters=1", "--mixture={'stdlib': 1, 'sudoku4': 1}"]  # fmt: skip

# What is run: pattern -> what is added, so that it takes a second or two (a later value of a setting wins)
RUN = {
    r"prepare\.py demo$": STAGE,
    r"train\.py config/route_[ab]_demo\.py$": TINY,
    r"train\.py config/route_b_demo\.py --max_iters=3000 --out_dir=out/longer$": TINY,
    r"^python train\.py config/route_b_demo\.py .*--init_from=resume": [*TINY, "--max_iters=3"],
    r"train\.py --help": [],
    r"sample\.py .*--prompt": ["--max_new_tokens=3"],
    r"sample\.py .*--task=sudoku4": [],
    r"sample\.py .*--task=00576224": [],
    r"eval_arc\.py .*(--json|sudoku4,maze$)": ["--limit=1"],
    r"distill\.py config/distill_demo\.py": ["--max_iters=1", "--eval_interval=1", "--eval_batches=1", "--check_tasks=1"],
    r"prepare\.py (status|verify demo)": [],
}
# What is not, and why. Its arguments are parsed all the same.
NOT_RUN = {
    r"^(uv|pip|python3 -m venv|\.venv/bin/pip|jupyter|\. |export |make )": "environments: tests run inside one",
    r"ipykernel install": "writes a kernel into the home folder",
    r"^python kda\.py": "run by notebooks/00_env_smoke.ipynb, which test_notebooks.py runs",
    r"model_(dense|trm)\.py": "builds 100M parameters; test_model_dense.py and test_models.py do",
    r"^torchrun": "two processes and 100M parameters: test_train.py has two processes, notebooks/kaggle_t4x2.ipynb this sequence in small",
    r"prepare\.py (stage1|push|pull|freeze|show|verify stage1)": "a corpus, the hub: test_pipeline.py, test_hub.py",
    r"publish\.py": "the hub: test_publish.py, against a local one",
    r"eval_arc\.py .*(--augment|--tasks)": "test_eval.py, test_candidates.py: minutes, and my_tasks is yours",
    r"--suites=(language|lm_eval)": "hundreds of items, lm-eval: test_language.py, test_harness.py",
    r"^python distill\.py .*distill_route_a": "100M parameters and a teacher: test_distill.py",
    r"sudoku_extreme": "hours, and the hub: test_sudoku_extreme.py",
    r"bench(_distill)?\.py": "minutes of measuring: test_bench.py, test_bench_models.py",
}


def commands():
    """The lines of all ```sh blocks, without comments, with continued lines joined, `a; b` as two."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split("; ") if part.strip()]


def matching(patterns, command):
    return [p for p in patterns if re.search(p, command)]


def test_every_command_is_either_run_or_has_a_reason():
    found = commands()
    assert len(found) > 50
    for command in found:
        matched = matching(RUN, command) + matching(NOT_RUN, command)
        assert len(matched) == 1, (command, matched)
    for pattern in [*RUN, *NOT_RUN]:
        assert any(re.search(pattern, command) for command in found), f"{pattern} matches nothing in the README any more"


class Parsed(Exception):
    """Raised in place of doing what the arguments say."""


def check_arguments(words, monkeypatch):
    """Have the script parse its arguments, and go no further."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args([w.replace("--node_rank=N", "--node_rank=0") for w in words[1:]])
        words = ["python", parsed.training_script, *parsed.training_script_args]
    script, argv = ROOT / words[1], words[2:]
    for word in argv:
        if word.endswith((".py", ".txt")) and "=" not in word:
            assert (ROOT / word).is_file(), f"{word} is not there"
    if "--help" in argv:
        return
    if script.name in ("train.py", "distill.py", "prepare.py", "publish.py"):
        own = configurator.defaults_of(script) if script.name in ("train.py", "distill.py") else vars(importlib.import_module(script.stem))
        configurator.resolve(own, [w for w in argv if w.startswith(("--", "config/"))])  # raises for a setting that it does not have
        return

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    if "ArgumentParser" not in script.read_text():
        assert argv == [] or "sys.argv" in script.read_text(), f"{script.name} takes no arguments"
        return
    assert "custom_op" not in script.read_text(), f"{script.name} registers operations: a second copy frees the first's"
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("command", [c for c in commands() if re.match(r"(python|torchrun) (?!-)", c)])
def test_the_arguments_are_ones_that_the_script_takes(command, monkeypatch):
    check_arguments(shlex.split(command), monkeypatch)


def test_what_the_commands_and_the_text_name_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands():
        if command.startswith("make "):
            assert command.split()[1] in targets, command
        for requirements in re.findall(r"-r (\S+)", command):
            assert (ROOT / requirements).is_file(), command
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"the README links to {link}, which is not there"
    table = README[README.index("## The files") :]
    for name in re.findall(r"`([\w/]+\.(?:py|md))`", table[: table.index("\nRead ")]):
        assert (ROOT / name).is_file(), f"the README describes {name}, which is not there"
    described = table[: table.index("\nRead ")]
    for path in ROOT.glob("*.py"):
        family = f"`{path.stem.split('_')[0]}_*.py`"
        assert f"`{path.name}`" in described or family in described, f"the README does not say what {path.name} is"


# One process runs them all, one after another, each as the main program: PyTorch is imported once. kda.py goes first: run again as
# the main program it would register its operation once more, which frees the first one under whoever imported it.
RUNNER = """
import gc, json, os, runpy, sys
sys.path.insert(0, os.getcwd())
for words in json.load(open(sys.argv[1])):
    print("$", *words, flush=True)
    sys.argv = words[1:]
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as e:
        if e.code not in (None, 0):
            print(e.code, file=sys.stderr)
            sys.exit(f"FAILED: {' '.join(words)}")
    gc.collect()  # a run's lock on its folder goes with its globals, as it would with its process
"""


def test_the_commands_run(tmp_path):
    copy = copy_of_the_repository(tmp_path)
    todo = []
    for command in commands():
        for pattern in matching(RUN, command):
            words = [*shlex.split(command), *RUN[pattern]]
            if words not in todo:  # some commands are shown twice
                todo.append(words)
    todo.sort(key=lambda words: words[1] != "kda.py")
    (copy / "todo.json").write_text(json.dumps(todo))
    done = subprocess.run([sys.executable, "-c", RUNNER, "todo.json"], cwd=copy, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for made in ("out/demo/route_a/ckpt.pt", "out/demo/route_b/loss.png", "out/demo/report.json", "out/demo/grids.png"):
        assert (copy / made).is_file(), made
    report = json.loads((copy / "out/demo/report.json").read_text())
    assert set(report) == {"route_a", "route_b"} and report["route_b"]["suites"]["sudoku4"]["total"] == 1
