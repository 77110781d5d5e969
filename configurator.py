"""
Settings of a script: plain globals, overridden by config files and by --key=value.

    python train.py config/route_b_demo.py config/my_changes.py --max_iters=200 --learning_rate=1e-3
    python train.py --help

A script keeps its settings as lowercase globals, each with a comment, and calls

    config, words = configurator.read(globals(), sys.argv[1:])

Config files are Python files of assignments, applied in the order given; the command line is applied after
them. A config file that starts from another one says `base = "route_b_demo.py"`, a path relative to itself,
and then only what it changes. Config files are executed, so run only those you trust.

A setting is an int, float, bool, str, None, or a tuple or dict of these. It keeps the type of its default, or
takes the types of its annotation (`seed: int | None = None`). A table RANGES says which values are allowed:

    RANGES = {"[0, 1)": "beta1 beta2", "(0, inf)": "learning_rate", ("wsd", "cosine"): "schedule"}

Read next: train.py, which has the most settings.
"""

import ast
import difflib
import inspect
import os
import re
import runpy
import sys
import traceback
import typing
from pathlib import Path

PLAIN = (int, float, bool, str, type(None), tuple, dict)


def read(script_globals, argv, usage=""):
    """
    Returns (config, words): a dict of all settings, and the bare arguments that are no config files.
    usage: what these words are, such as "CKPT [CKPT ...]"; a script without it takes none. --help prints the
    script's docstring and its settings, and exits. A mistake is one line on stderr and exit code 1.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(script_globals, usage))
        sys.exit(0)
    try:
        return resolve(script_globals, argv, usage)
    except ValueError as e:
        sys.exit(f"error: {e}")


def resolve(script_globals, argv, usage=""):
    """What `read` returns. A mistake raises ValueError, in one line for the person who made it."""
    config = settings(script_globals)
    types = types_of(script_globals, config)
    words, overrides = [], []
    for argument in argv:
        if argument.startswith("-"):
            if argument.removeprefix("--") in types:
                raise ValueError(f"{argument} needs a value: write {argument}=VALUE")
            overrides.append(argument)
        elif argument.endswith(".py"):
            for name, value, file in read_config_file(argument):
                config[name] = convert(name, value, types, f"in {file}")
        elif not usage:
            raise ValueError(f"cannot read {argument!r}: settings are --key=value, config files NAME.py")
        else:
            words.append(argument)
    for argument in overrides:
        name, _, text = argument.removeprefix("--").partition("=")
        config[name] = convert(name, parse(text, types.get(name, ())), types, "on the command line")
    check_ranges(config, script_globals.get("RANGES", {}))
    return config, words


def settings(script_globals):
    """The settings of a script with their present values, in the order of the source."""
    return {
        name: value
        for name, value in script_globals.items()
        if name == name.lower() and not name.startswith("_") and type(value) in PLAIN
    }


def types_of(script_globals, config):
    """{name of a setting: tuple of the types that it takes}."""
    annotations = inspect.get_annotations(sys.modules[script_globals["__name__"]])
    types = {name: annotations.get(name, type(value)) for name, value in config.items()}
    return {name: typing.get_args(kind) or (kind,) for name, kind in types.items()}


def parse(text, types):
    """
    A value from the command line: a Python literal where it is one and fits, else the text. Quotes around a
    text are taken off.
    """
    if bool in types and text in ("true", "false"):
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text
    return value if str not in types or isinstance(value, types) else text


def convert(name, value, types, where):
    """The value as one of the types of the setting. ValueError for an unknown name or another type."""
    if name not in types:
        near = closest(name, types)
        raise ValueError(f"unknown setting {name!r} {where}: the closest is {near!r} (--help lists them all)")
    if isinstance(value, list) and tuple in types[name]:
        value = tuple(value)
    if type(value) is int and float in types[name] and int not in types[name]:
        value = float(str(value))  # inf where it is too large
    if type(value) is float and int in types[name] and float not in types[name] and value.is_integer():
        value = int(value)  # 5e3
    if type(value) not in types[name]:
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types[name])
        raise ValueError(f"{name} must be {wanted}, got {type(value).__name__} {value!r:.80} {where}")
    return value


def closest(name, known):
    """The most similar of the names that are known."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def unknown(what, name, known):
    """-> one line about a name that is none of those that are known."""
    return f"unknown {what} {name!r}: the closest is {closest(name, known)!r}; there are {', '.join(known)}"


def check_ranges(config, ranges):
    """
    ranges: {"[0, 1)": "names of settings"}, with bounds as in mathematics, or {(values, ...): "names"}.
    Every value of a dict has to be in the range; None always is, NaN never. Raises ValueError.
    """
    for allowed, names in ranges.items():
        for name in names.split():
            if name not in config:  # distill.py has most of train.py's settings, and its table
                continue
            values = config[name].values() if isinstance(config[name], dict) else [config[name]]
            for value in values:
                if value is not None and not in_range(value, allowed):
                    one_of = f"one of {', '.join(map(repr, allowed))}"
                    wanted = f"in {allowed}" if isinstance(allowed, str) else one_of
                    raise ValueError(f"{name} must be {wanted}, got {config[name]!r}")


def in_range(value, allowed):
    if isinstance(allowed, tuple):
        return value in allowed
    if type(value) not in (int, float):
        return False
    low, high = map(float, allowed[1:-1].split(","))
    above = low <= value if allowed[0] == "[" else low < value
    return above and (value <= high if allowed[-1] == "]" else value < high)


def read_config_file(path):
    """[(name, value, file)] of a config file, those of the file it builds on first. Raises ValueError."""
    if not os.path.exists(path):
        there = {p.name: p for folder in (Path(path).parent, Path("config")) for p in folder.glob("*.py")}
        hint = f": the closest is {there[closest(Path(path).name, there)]}" if there else ""
        raise ValueError(f"config file {path} does not exist{hint}")
    try:
        namespace = runpy.run_path(path, run_name="config")
    except SyntaxError as e:
        raise ValueError(f"{path}, line {e.lineno}: {e.msg}") from None
    except Exception as e:  # noqa: BLE001 (a config file is a program and fails in any way)
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        raise ValueError(f"{path}, line {lines[-1] if lines else '?'}: {type(e).__name__}: {e}") from None
    found = []
    if base := namespace.pop("base", None):
        found = read_config_file(os.path.join(os.path.dirname(path), base))
    for name, value in namespace.items():  # modules, functions, Capitals and _names are the file's helpers
        if name == name.lower() and name[0] != "_" and not (inspect.ismodule(value) or callable(value)):
            found.append((name, value, path))
    return found


def help_text(script_globals, usage=""):
    """The script's docstring, how it is called, and its settings as they stand in its source."""
    path = script_globals["__file__"]
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    names = "|".join(settings(script_globals))
    defined = [i for i, line in enumerate(lines) if re.match(rf"({names})\b\s*[:=]", line)]
    first, last = defined[0], defined[-1]
    while lines[first - 1].startswith("#"):
        first -= 1
    while last + 1 < len(lines) and lines[last + 1].strip():
        last += 1
    module = getattr(script_globals.get("__spec__"), "name", "")
    script = f"-m {module}" if "." in module else os.path.basename(path)
    call = " ".join(["python", script, *usage.split(), "[config.py ...] --key=value ..."])
    return "\n".join([script_globals["__doc__"].strip(), "", call, "", *lines[first : last + 1]])


def show(config, defaults):
    """What differs from the defaults, as a block of text."""
    changed = [f"{name}={value!r}" for name, value in config.items() if value != defaults[name]]
    return "settings: " + (", ".join(changed) or "all defaults")
