"""configurator.py: what wins over what, how files build on each other, and what a mistake looks like."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import configurator
import train
from bench import decode

ROOT = Path(__file__).parent.parent

SCRIPT = '''"""A toy that shows its settings."""
import json
import sys

import configurator

# ---- model
model = "dense"  # 'dense' or 'trm'
# what each layer mixes with,
# tiled over the depth
layer_pattern = "kkka"
learning_rate = 6e-4
betas = (0.9, 0.95)
compile: bool | str = "auto"
max_iters = 100
mixture = {
    "sudoku4": 1.0,
}
seed: int | None = None
LIMIT = 3
_private = 4

RANGES = {"(0, inf)": "learning_rate", "[0, 1]": "mixture", ("dense", "trm"): "model"}


def no_setting(inner=5):
    number = inner
    return number


if __name__ == "__main__":
    print(json.dumps(configurator.read(globals(), sys.argv[1:], usage="[CKPT ...]")))
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(arguments) -> (config, words) of the script above, in a folder with an empty config/."""
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    Path("toy.py").write_text(SCRIPT)

    def run(*argv, usage="[CKPT ...]"):
        script = types.ModuleType("toy")
        monkeypatch.setitem(sys.modules, "toy", script)
        exec(SCRIPT, vars(script))
        return configurator.resolve(vars(script), argv, usage)

    return run


def test_a_script_as_people_run_it(toy):
    def run(*argv):
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        return subprocess.run(
            [sys.executable, "toy.py", *argv], env=environment, capture_output=True, text=True
        )

    Path("config/a.py").write_text("max_iters = 5e3\nmodel = 'trm'\n")
    run_with = run("--learning_rate=1", "config/a.py", "out/ckpt.pt", "--mixture={'maze': 0.5}")
    config, words = json.loads(run_with.stdout)
    assert set(config) == set(
        "model layer_pattern learning_rate betas compile max_iters mixture seed".split()
    )
    assert (config["model"], config["max_iters"], config["mixture"]) == ("trm", 5000, {"maze": 0.5})
    assert config["learning_rate"] == 1.0 and words == ["out/ckpt.pt"]
    wrong = run("--learning_rat=1")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: unknown setting 'learning_rat'") and wrong.stderr.count("\n") == 1
    assert "the closest is 'learning_rate'" in wrong.stderr
    shown = run("--help").stdout
    block = SCRIPT[SCRIPT.index("# ---- model") : SCRIPT.index("LIMIT")]
    assert "A toy that shows its settings." in shown and block in shown and "no_setting" not in shown


def test_the_command_line_wins_over_files_and_later_files_over_earlier_ones(toy):
    Path("config/a.py").write_text("learning_rate = 1.0\nmax_iters = 1\nseed = 1")
    Path("config/b.py").write_text("learning_rate = 2.0\nmax_iters = 2")
    config, _ = toy("--learning_rate=3", "config/a.py", "config/b.py")
    assert [config[k] for k in ("learning_rate", "max_iters", "seed")] == [3.0, 2, 1]


def test_a_base_comes_first_and_is_relative_to_the_file(toy):
    Path("config/deep").mkdir()
    Path("config/a.py").write_text("max_iters = 1\nseed = 1")
    Path("config/deep/b.py").write_text(
        "import math\nbase = '../a.py'\nseed = 2 * math.floor(1.5)\nHELPER = 3"
    )
    config, _ = toy("config/deep/b.py")
    assert (config["max_iters"], config["seed"]) == (1, 2)
    Path("config/a.py").write_text("sed = 1")  # the file is named that has the mistake
    with pytest.raises(ValueError, match=r"'sed' in config/deep/\.\./a\.py"):
        toy("config/deep/b.py")


@pytest.mark.parametrize(
    "argument, name, value",
    [
        ("--layer_pattern=12", "layer_pattern", "12"),
        ("--layer_pattern={{1}}", "layer_pattern", "{{1}}"),
        ("--compile=true", "compile", True),
        ("--compile=auto", "compile", "auto"),
        ("--max_iters=5e3", "max_iters", 5000),
        ("--betas=[1, 2]", "betas", (1, 2)),
        ("--seed=None", "seed", None),
    ],
)
def test_values_take_the_type_of_the_setting(toy, argument, name, value, recwarn):
    found = toy(argument)[0][name]
    assert found == value and type(found) is type(value) and not recwarn.list


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--max_iters=1.5", "max_iters must be int, got float 1.5"),
        ("--seed=x", "seed must be int or None"),
        ("--max_iters", "write --max_iters=VALUE"),
        ("--learning_rate=-1", r"learning_rate must be in \(0, inf\), got -1.0"),
        ("--learning_rate=nan", "learning_rate must be"),
        ("--mixture={'maze': 2}", r"mixture must be in \[0, 1\]"),
        ("--model=x", "model must be one of 'dense', 'trm'"),
        ("config/ab.py", "does not exist: the closest is config/abc.py"),
        ("config/bad.py", r"config/bad.py, line 2: ZeroDivisionError"),
        ("config/syntax.py", r"config/syntax.py, line 1: "),
        ("config/unknown.py", "unknown setting 'seeds' in config/unknown.py: the closest is 'seed'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(toy, argument, message):
    Path("config/abc.py").write_text("")
    Path("config/bad.py").write_text("a = 0\nseed = 1 / a")
    Path("config/syntax.py").write_text("seed = (")
    Path("config/unknown.py").write_text("seeds = 1")
    with pytest.raises(ValueError, match=message) as e:
        toy(argument)
    assert "\n" not in str(e.value)


def test_words_are_refused_where_the_script_takes_none(toy):
    with pytest.raises(ValueError, match="cannot read 'demo': settings are --key=value"):
        toy("demo", usage="")


def test_help_says_how_a_script_or_a_module_is_called():
    assert "\npython train.py [config.py ...] --key" in configurator.help_text(vars(train))
    assert "\npython -m bench.decode [config.py ...] --key" in configurator.help_text(vars(decode))
