"""configurator.py: what wins over what, how config files build on each other, and what a mistake looks like to the one who made it."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import configurator

ROOT = Path(__file__).parent.parent

SCRIPT = '''"""A toy script.

It does nothing but show its settings.
"""
import json
import sys
from math import pi  # lowercase and a float, but no setting of ours

import configurator

# -----------------------------------------------------------------------------
# ---- model
model = "dense"  # 'dense' or 'trm'
n_layer, n_head = 12, 4
# what each layer mixes with,
# tiled over the depth
layer_pattern = "kkka"
dropout = 0.0
# ---- optimizer -----
learning_rate = 6e-4  # the peak,
                      # reached after the warmup
betas = (0.9, 0.95)
compile = True
max_iters = 100
mixture = {  # shares
    "sudoku4": 1.0,
}
out_dir = None  # anywhere
seed: int | None = None
LIMIT = 3
_private = 4
# -----------------------------------------------------------------------------
defaults = configurator.settings(globals())
config = configurator.configure(globals(), sys.argv[1:])
later = 5
assert all(globals()[k] == v for k, v in config.items())
print(json.dumps(config))
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    (tmp_path / "config").mkdir()

    def run(*argv, **config_files):
        for name, text in config_files.items():
            (tmp_path / "config" / f"{name}.py").write_text(text)
        env = {"PYTHONPATH": str(ROOT), "PATH": ""}
        return subprocess.run(
            [sys.executable, "toy.py", *argv],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


SETTINGS = {
    "n_layer": 12,
    "learning_rate": 6e-4,
    "compile": True,
    "name": "x",
    "betas": (0.9, 0.95),
    "mixture": {"a": 1.0},
    "anything": None,
    "fast": False,
}


def resolve(*argv):
    return configurator.resolve(dict(SETTINGS), list(argv))


def write(folder, **config_files):
    for name, text in config_files.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config"


def test_a_byte_order_mark_is_no_mistake(folder):
    (folder / "a.py").write_text("n_layer = 3\n", encoding="utf-8-sig")
    assert resolve("config/a.py")["n_layer"] == 3


def test_a_script_as_people_run_it(script):
    text = "import math\nn_layer = 3 * 2\nmax_iters = 5e3\nmodel = 'trm'\n"
    done = script("--learning_rate=1", "config/a.py", "--mixture={'maze': 0.5}", a=text)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    # definition order, and only the script's own lowercase settings
    assert list(config) == [
        "model",
        "n_layer",
        "n_head",
        "layer_pattern",
        "dropout",
        "learning_rate",
        "betas",
        "compile",
        "max_iters",
        "mixture",
        "out_dir",
        "seed",
    ]
    assert (
        config["n_layer"] == 6
        and config["model"] == "trm"
        and config["learning_rate"] == 1.0
        and config["mixture"] == {"maze": 0.5}
    )
    assert (
        config["max_iters"] == 5000
        and type(config["max_iters"]) is int
        and type(config["learning_rate"]) is float
    )


def test_a_mistake_is_one_line_on_stderr(script):
    done = script("--n_layr=3")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == "error: unknown setting 'n_layr' on the command line: the closest is 'n_layer' (--help lists them all)\n"
    )


def test_help_shows_docstring_defaults_and_comments(script):
    for flag in ("--help", "-h"):
        done = script("--n_layer=oops", flag)
        assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "A toy script."
    text = {line.split("=")[0].strip(): " ".join(line.split()) for line in lines if line.startswith("  --")}
    assert text["--model"] == "--model='dense' 'dense' or 'trm'"
    assert text["--n_head"] == "--n_head=4"
    assert (
        text["--layer_pattern"] == "--layer_pattern='kkka' what each layer mixes with, tiled over the depth"
    )
    assert text["--dropout"] == "--dropout=0.0"
    assert text["--learning_rate"] == "--learning_rate=0.0006 the peak, reached after the warmup"
    assert text["--mixture"] == "--mixture={'sudoku4': 1.0} shares"
    assert text["--out_dir"] == "--out_dir=None anywhere"
    assert not {"--pi", "--LIMIT", "--_private", "--later", "--defaults"} & set(text)
    assert (
        lines.index("model")
        < lines.index(next(x for x in lines if "--model" in x))
        < lines.index("optimizer")
    )


def test_later_files_win_and_the_command_line_wins_over_files(folder):
    write(folder, a="n_layer = 1\nname = 'a'\n", b="n_layer = 2\n")
    assert resolve("config/a.py", "config/b.py")["n_layer"] == 2
    assert resolve("config/b.py", "config/a.py")["n_layer"] == 1
    config = resolve("--n_layer=3", "config/a.py", "--n_layer=4")
    assert config["n_layer"] == 4 and config["name"] == "a" and config["learning_rate"] == 6e-4


def test_a_config_file_builds_on_another_over_several_levels(folder):
    (folder / "sub").mkdir()
    write(
        folder,
        shape="n_layer = 1\nname = 'shape'\ncompile = False\n",
        stage="name = 'stage'\nbase = 'shape.py'\n",
    )
    write(folder / "sub", mine="base = '../stage.py'\n_half = 0.5\nlearning_rate = _half / 5\n")
    config = resolve("config/sub/mine.py")
    assert (config["n_layer"], config["name"], config["compile"], config["learning_rate"]) == (
        1,
        "stage",
        False,
        0.1,
    )


def test_a_base_twice_is_fine_and_a_circle_is_not(folder):
    write(
        folder,
        shape="n_layer = 1\n",
        a="base = 'shape.py'\nname = 'a'\n",
        b="base = 'shape.py'\nname = 'b'\n",
    )
    assert resolve("config/a.py", "config/b.py")["name"] == "b"
    write(folder, c="base = 'd.py'\n", d="base = '../config/c.py'\n", e="base = 'e.py'\n")
    with pytest.raises(configurator.ConfigError, match="circle: config/c.py -> config/d.py -> config/c.py"):
        resolve("config/c.py")
    with pytest.raises(configurator.ConfigError, match="circle"):
        resolve("config/e.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--learning_rate=100", 100.0),
        ("--learning_rate=1e-3", 1e-3),
        ("--learning_rate=inf", float("inf")),
        ("--n_layer=5e3", 5000),
        ("--n_layer=-1", -1),
        ("--compile=False", False),
        ("--compile=false", False),
        ("--fast=true", True),
        ("--name=5", "5"),
        ("--name=a=b", "a=b"),
        ("--name='quoted'", "quoted"),
        ("--name=", ""),
        ("--name=None", "None"),
        ("--betas=0.8,0.9", (0.8, 0.9)),
        ("--betas=[0.8, 0.9]", (0.8, 0.9)),
        ("--mixture={'b': 0.5, 'c': 0.5}", {"b": 0.5, "c": 0.5}),
        ("--anything=3", 3),
        ("--anything=out/x", "out/x"),
        ("--anything=None", None),
    ],
)
def test_values_on_the_command_line(text, expected):
    value = resolve(text)[text[2:].split("=")[0]]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--n_layer=x", "n_layer must be int, got str 'x'"),
        ("--n_layer=1.5", "n_layer must be int, got float 1.5"),
        ("--n_layer=True", "n_layer must be int, got bool"),
        ("--compile=1", "compile must be bool, got int 1"),
        ("--compile=yes", "compile must be bool, got str"),
        ("--learning_rate=fast", "learning_rate must be float, got str"),
        ("--learning_rate=True", "learning_rate must be float, got bool"),
        ("--betas=0.9", "betas must be tuple, got float"),
        ("--mixture=sudoku4", "mixture must be dict, got str"),
        ("--n_layer=None", "n_layer must be int, got NoneType"),
        ("--compile", "--compile needs a value: write --compile=True"),
        ("--n_layer", "--n_layer needs a value"),
        ("-n=3", "write --key=value"),
        ("--name out/x", "--name needs a value: write --name=out/x"),
        ("--compile false", "write --compile=false"),
        ("--compile out/x", "write --compile=True"),
        ("--name config/x.py", "write --name=VALUE"),
        ("--name --n_layer=3", "write --name=VALUE"),
        ("--nam out/x", "unknown setting 'nam'.*'name'"),
        ("--n_layers=3", "unknown setting 'n_layers'.*'n_layer'"),
        ("--=3", "unknown setting"),
    ],
)
def test_wrong_values_name_both_types(text, message):
    with pytest.raises(configurator.ConfigError, match=message):
        resolve(*text.split(" "))


@pytest.mark.parametrize(
    "command, value",
    [
        (["prepare", "demo", "--data_dir", "d"], "--data_dir=d"),
        (["prepare", "--tag", "v1", "freeze", "demo"], "--tag=v1"),
        (["smol.publish", "push", "out/x", "--repo", "me/it"], "--repo=me/it"),
    ],
)
def test_commands_with_words_of_their_own_say_where_the_equals_sign_goes(command, value, monkeypatch):
    main = importlib.import_module(command[0]).main
    with pytest.raises(SystemExit, match=f"^error: --[a-z_]+ needs a value: write {value}$"):
        main(command[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n_layer = 1\n\nlerning_rate = 3\n",
            r"unknown setting 'lerning_rate' in config/x.py, line 3: the closest is 'learning_rate'",
        ),
        ("n_layer = 1\nname = 7\n", "name must be str, got int 7 in config/x.py, line 2"),
        ("name = 'a'\nn_layer = (\n", "config/x.py, line 2: "),
        ("name = 'a'\nn_layer = 1 / 0\n", "config/x.py, line 2: ZeroDivisionError: division by zero"),
        (
            "n_layer = n_layer * 2\n",
            "config/x.py, line 1: NameError",
        ),  # a file does not see the defaults: what it says is what it sets
        ("base = 3\n", "config/x.py, line 1: base must be a plain string"),
        (
            "base = 'y.py'\n",
            r"config/y.py \(the base of config/x.py\) does not exist; the closest there is config/x.py",
        ),
    ],
)
def test_mistakes_in_a_config_file_name_file_and_line(folder, text, message):
    write(folder, x=text)
    with pytest.raises(configurator.ConfigError, match=message):
        resolve("config/x.py")


def test_a_missing_config_file_names_the_closest(folder):
    write(folder, route_a_demo="", route_b_demo="")
    message = "config file config/route_b_dmo.py does not exist; the closest there is config/route_b_demo.py"
    with pytest.raises(configurator.ConfigError, match=message):
        resolve("config/route_b_dmo.py")
    with pytest.raises(configurator.ConfigError, match="the closest there is config/route_a_demo.py"):
        resolve("route_a_demo.py")
    with pytest.raises(configurator.ConfigError, match="nor does the folder nowhere"):
        resolve("nowhere/x.py")
    (folder / "binary.py").write_bytes(bytes(range(256)))
    for path in ("config/binary.py", "config"):
        with pytest.raises(configurator.ConfigError, match="is not a readable Python config file"):
            resolve(path)


def test_an_annotation_says_what_none_may_become(script):
    assert json.loads(script("--seed=3").stdout)["seed"] == 3
    assert "seed must be int or None, got str 'x'" in script("--seed=x").stderr


RANGES = {
    "[1, inf)": "n_layer anything",
    "(0, 1)": "low",
    "[0, 1]": "high",
    "[-2.5, inf]": "rate",
    "[0, inf)": "shares",
    ("a", "b", True): "kind",
}
FINE = {
    "n_layer": 1,
    "anything": None,
    "low": 0.5,
    "high": 0,
    "rate": -2.5,
    "shares": {"x": 0, "y": 2.5},
    "kind": "a",
    "other": -9,
}


def test_what_is_in_its_range_passes():
    configurator.check_ranges(FINE, RANGES)
    for name, value in (
        ("high", 1.0),
        ("rate", math.inf),
        ("shares", {}),
        ("kind", True),
        ("n_layer", 10**20),
    ):
        configurator.check_ranges({**FINE, name: value}, RANGES)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("n_layer", 0, "n_layer must be in [1, inf), got 0"),
        ("n_layer", math.inf, "[1, inf), got inf"),
        ("anything", 0, "anything must be in [1, inf)"),
        ("low", 0.0, "low must be in (0, 1), got 0.0"),
        ("low", 1.0, "(0, 1), got 1.0"),
        ("high", 1.0001, "high must be in [0, 1], got 1.0001"),
        ("high", -1e-9, "[0, 1], got -1e-09"),
        ("high", math.nan, "[0, 1], got nan"),
        ("rate", -3.0, "rate must be in [-2.5, inf], got -3.0"),
        ("rate", math.nan, "got nan"),
        ("shares", {"x": 1, "y": "2"}, "shares must give each name a number in [0, inf), got 'y': '2'"),
        ("shares", {"x": -1}, "got 'x': -1"),
        ("shares", {"x": math.nan}, "got 'x': nan"),
        ("shares", {"x": True}, "got 'x': True"),
        ("shares", {5: 1.0}, "got 5: 1.0"),
        ("kind", "c", "kind must be one of 'a', 'b', True, got 'c'"),
    ],
)
def test_what_is_not_is_named_with_its_value_and_its_range(name, value, message):
    with pytest.raises(configurator.ConfigError) as said:
        configurator.check_ranges({**FINE, name: value}, RANGES)
    assert message in str(said.value) and str(said.value).startswith(name) and "\n" not in str(said.value)


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_every_number_and_choice_of_a_script_has_a_range(script):
    """-1, NaN, infinity or a word that is not there is refused for each setting of the script; its defaults are not."""
    own = configurator.defaults_of(ROOT / script)
    config, types = configurator.settings(own), configurator.types_of_settings(own)
    configurator.check_ranges(config, own["RANGES"])
    listed = {name: allowed for allowed, names in own["RANGES"].items() for name in names.split()}
    free = {
        "out_dir",
        "init_from",
        "eval_suites",
        "eval_device",
        "push_to",
        "data_dir",
        "data",
        "data_tag",
        "teacher",
        "layer_pattern",
        "device",
    }  # names and paths, looked at by check_settings or by whoever reads them
    switches = {name for name, allowed in types.items() if allowed <= {bool, type(None)}}
    assert set(config) - free - switches == set(listed)
    for name, allowed in listed.items():
        wrong = [-1, math.nan, -math.inf] if isinstance(allowed, str) else ["nosuch"]
        wrong += [math.inf] if isinstance(allowed, str) and allowed.endswith(")") else []
        for value in [{"sudoku4": v} for v in wrong] if dict in types[name] else wrong:
            with pytest.raises(configurator.ConfigError, match=f"^{name} must "):
                configurator.check_ranges({**config, name: value}, own["RANGES"])


def test_help_shows_the_range(monkeypatch):
    text = configurator.help_text(
        {"n_layer": 12, "kind": "a", "RANGES": {"[1, inf)": "n_layer", ("a", "b"): "kind"}}
    )
    assert "--n_layer=12  in [1, inf)" in text and "--kind='a'\n" in text + "\n"


def test_show_marks_what_differs_and_only_that():
    text = configurator.show({**SETTINGS, "n_layer": 3}, SETTINGS)
    assert text.count("*") == 1 and "*n_layer=3 (default 12)" in text and "compile=True" in text


def test_save_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out" / "config.json"
    configurator.save(SETTINGS, path)
    assert json.loads(path.read_text())["mixture"] == {"a": 1.0}
    with pytest.raises(TypeError):
        configurator.save({"n_layer": object()}, path)
    assert json.loads(path.read_text())["n_layer"] == 12
