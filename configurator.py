"""
Settings of a script: plain globals, overridden by Python files and by --key=value.

A script (train.py is the example to look at) keeps its settings as module globals, each with a comment, under one banner.
Lines such as `# ---- optimizer` group them for --help. Then it says

    defaults = configurator.settings(globals())
    config = configurator.configure(globals(), sys.argv[1:])
    print(configurator.show(config, defaults))

and can be run as

    python train.py config/route_b_demo.py config/my_changes.py --max_iters=200 --learning_rate=1e-3
    python train.py --help

Bare arguments are config files: Python files of plain assignments, applied in the order given; the command line is applied after
them, wherever it stands. A config file that starts from another one says `base = 'route_b_demo.py'` (a path relative to itself) and
then only what it changes. Config files are executed, so run only those you trust; names that start with an underscore are theirs.

A script may also have a table RANGES of what its settings may be, for --help and for `check_ranges`.

A setting is a lowercase global that holds an int, float, bool, str, None, or a tuple or dict of these. It keeps the type of its default;
a default of None takes any of these types, unless an annotation (`seed: int | None = None`) says which.
Read next: train.py, which has the most settings.
"""

import argparse
import ast
import difflib
import io
import json
import os
import re
import runpy
import sys
import textwrap
import tokenize
import traceback
import types
from pathlib import Path

from smol.files import write_whole
from smol.settings import read  # noqa: F401 (replaces what is below)

PLAIN = (int, float, bool, str, type(None))
TYPE_NAMES = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "tuple": tuple,
    "dict": dict,
    "None": type(None),
}


class ConfigError(ValueError):
    """A mistake in a config file or on the command line; the message is one line for the person who made it."""


def is_plain(value):
    """True for an int, float, bool, str, None, or a tuple or dict of these (nested as deep as you like)."""
    if isinstance(value, tuple):
        return all(is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(type(k) in PLAIN and is_plain(v) for k, v in value.items())
    return type(value) in PLAIN


def settings(script_globals):
    """The settings among a script's globals, as a dict in the order in which the script defines them."""
    declared = read_source(script_globals)
    # Without source (a notebook cell, a plain dict) every suitable name counts; with it, imported values such as math.pi do not.
    names = declared if declared is not None else script_globals
    return {
        name: script_globals[name]
        for name in names
        if name in script_globals
        and not name.startswith("_")
        and not name.isupper()
        and is_plain(script_globals[name])
    }


def defaults_of(script):
    """The settings of a script that is not running, as the globals that `resolve` takes: their values must be literals."""
    script_globals = {"__file__": str(script)}
    for node in ast.parse(Path(script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "configurator" in {
            getattr(n, "id", None) for n in ast.walk(node)
        }:
            break
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            script_globals[target.id] = ast.literal_eval(node.value)
    return script_globals


def configure(script_globals, argv):
    """
    Apply config files and --key=value to a script's globals. Returns the effective config, a plain dict in definition order.
    Prints help and exits 0 for --help or -h; prints one line to stderr and exits 1 for a mistake of the user's.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(script_globals))
        sys.exit(0)
    try:
        config = resolve(script_globals, argv)
    except ConfigError as e:
        sys.exit(f"error: {e}")
    script_globals.update(config)
    return config


def resolve(script_globals, argv):
    """What `configure` does, without side effects: returns the effective config, raises ConfigError."""
    config = settings(script_globals)
    check_equals(script_globals, argv)
    allowed = types_of_settings(script_globals)
    overrides = []
    for arg in argv:
        if arg.startswith("-"):
            overrides.append(arg)
            continue
        for name, value, where in read_config_file(arg):
            check_known(name, config, where)
            config[name] = coerce(name, value, allowed[name], where)
    for arg in overrides:
        key, equals, text = arg.partition("=")
        name = key.removeprefix("--")
        if not (key.startswith("--") and equals):
            raise ConfigError(f"cannot read {arg!r}: write --key=value (--help lists the settings)")
        check_known(name, config, "on the command line")
        config[name] = coerce(name, parse_text(text, allowed[name]), allowed[name], "on the command line")
    return config


def check_equals(script_globals, argv):
    """ConfigError for a --key without =value; a bare word behind it is the value that was meant, no config file."""
    allowed = types_of_settings(script_globals)
    for arg, behind in zip(argv, [*argv[1:], ""]):
        name = arg.removeprefix("--")
        if not arg.startswith("--") or "=" in arg or arg == "--help":
            continue
        check_known(name, allowed, "on the command line")
        switch = allowed[name] == {bool}
        meant = behind and not behind.startswith("-") and not behind.endswith(".py")
        if not meant or (switch and behind.lower() not in ("true", "false")):
            behind = "True" if switch else "VALUE"
        raise ConfigError(f"--{name} needs a value: write --{name}={behind}")


def check_known(name, config, where):
    if name not in config:
        closest = difflib.get_close_matches(name, config, n=1, cutoff=0.0)
        hint = f"the closest is {closest[0]!r}" if closest else "the script has no settings"
        raise ConfigError(f"unknown setting {name!r} {where}: {hint} (--help lists them all)")


# ---------------------------------------------------------------------------------------------------------------------------------
# types


def allowed_types(default, annotation=None):
    """The set of types a setting takes: what its annotation says, else the type of its default, else (None) every plain type."""
    if annotation:
        named = {TYPE_NAMES.get(part.split("[")[0].strip()) for part in annotation.split("|")}
        if None not in named:  # an annotation that is not about plain types decides nothing
            return named
    return set(TYPE_NAMES.values()) if default is None else {type(default)}


def types_of_settings(script_globals):
    """{name of a setting: the set of types that it takes}."""
    declared = read_source(script_globals) or {}
    return {
        name: allowed_types(value, declared.get(name, {}).get("annotation"))
        for name, value in settings(script_globals).items()
    }


def parse_text(text, allowed):
    """A command line value: a Python literal where it is one (and the setting is not a string), else the text as it stands."""
    if bool in allowed and text in ("true", "false"):
        return text == "true"
    if float in allowed and text in ("inf", "-inf"):  # no literal exists for these
        return float(text)
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    # --layer_pattern=5 and --out_dir=2024 mean text when text is all that the setting takes
    if allowed <= {str, type(None)} and not isinstance(value, tuple(allowed)):
        return text
    return value


def coerce(name, value, allowed, where):
    """Return `value` as one of the `allowed` types without losing anything, or raise ConfigError naming both types."""
    if isinstance(value, list) and tuple in allowed:
        value = tuple(value)
    if type(value) in allowed and is_plain(value):
        return value
    if type(value) is int and float in allowed:
        return float(value)
    if (
        type(value) is float and int in allowed and value.is_integer()
    ):  # 5e3 is a float to Python and 5000 to people
        return int(value)
    wanted = " or ".join(t for t, c in TYPE_NAMES.items() if c in allowed)
    raise ConfigError(f"{name} must be {wanted}, got {type(value).__name__} {value!r:.80} {where}")


# ---------------------------------------------------------------------------------------------------------------------------------
# ranges


def check_ranges(config, ranges):
    """
    ranges: {"[0, 1)": "names of settings, separated by spaces"}, with bounds as in mathematics, or in place of
    the interval a tuple of the values that there are. Each value of a dict has to be in it; None always is.
    Raises ConfigError, in one line, for the first setting that is not in its range; NaN is in none.
    """
    for allowed, names in ranges.items():
        for name in names.split():
            value = config[name]
            if isinstance(allowed, tuple):
                if value not in allowed:
                    choices = ", ".join(map(repr, allowed))
                    raise ConfigError(f"{name} must be one of {choices}, got {value!r}")
            elif isinstance(value, dict):
                for k, v in value.items():
                    if type(k) is not str or type(v) not in (int, float) or not in_interval(v, allowed):
                        raise ConfigError(
                            f"{name} must give each name a number in {allowed}, got {k!r}: {v!r}"
                        )
            elif value is not None and not in_interval(value, allowed):
                raise ConfigError(f"{name} must be in {allowed}, got {value!r}")


def in_interval(number, interval):
    """interval: such as "[0, 1)", which includes 0 and not 1."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


# ---------------------------------------------------------------------------------------------------------------------------------
# config files


def read_config_file(path, chain=()):
    """
    Execute a config file, after the one it builds on. Returns a list of (name, value, where), to be applied in order;
    `where` reads like "in config/x.py, line 3". Raises ConfigError.
    """
    path = os.path.normpath(path)
    if os.path.realpath(path) in map(os.path.realpath, chain):
        raise ConfigError(f"config files build on each other in a circle: {' -> '.join([*chain, path])}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        tree = ast.parse(text, filename=path)
    except FileNotFoundError:
        wanted_by = f" (the base of {chain[-1]})" if chain else ""
        raise ConfigError(f"config file {path}{wanted_by} does not exist{closest_file(path)}") from None
    except SyntaxError as e:
        raise ConfigError(f"{path}, line {e.lineno or 1}: {e.msg}") from None
    except (OSError, ValueError) as e:  # a folder, an unreadable file, bytes that are not text
        raise ConfigError(f"{path} is not a readable Python config file: {e.args[-1]}") from None

    lines = {
        node.id: node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    applied = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == [
            "base"
        ]:
            if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                raise ConfigError(
                    f"{path}, line {node.lineno}: base must be a plain string, the path of the config file to build on"
                )
            applied += read_config_file(os.path.join(os.path.dirname(path), node.value.value), (*chain, path))

    try:
        namespace = runpy.run_path(path, run_name="config")
    except Exception as e:  # noqa: BLE001 (a config file is a program, and may fail in any way a program can)
        frames = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        raise ConfigError(f"{path}, line {frames[-1] if frames else '?'}: {type(e).__name__}: {e}") from None

    for name, value in namespace.items():
        helper = (
            name.startswith("_")
            or name.isupper()
            or isinstance(value, (types.ModuleType, type))
            or callable(value)
        )
        if not helper and name != "base":
            where = f"in {path}, line {lines[name]}" if name in lines else f"in {path}"
            applied.append((name, value, where))
    return applied


def closest_file(path):
    folder = Path(path).parent
    if not folder.is_dir():
        return f", nor does the folder {folder}"
    files = {p.name: str(p) for p in sorted(folder.glob("*.py"))}
    if folder == Path("."):  # most config files live in config/, and its name is easily left out
        files |= {p.name: str(p) for p in sorted(Path("config").glob("*.py"))}
    closest = difflib.get_close_matches(Path(path).name, files, n=1, cutoff=0.0)
    return (
        f"; the closest there is {files[closest[0]]}"
        if closest
        else f"; there are no config files in {folder}"
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# help


def read_source(script_globals):
    """
    What a script's source says about the names it assigns at top level, down to where it calls the configurator:
    name -> {"heading", "comment", "annotation"}, in order of definition. None when there is no source to read.
    """
    try:
        text = Path(script_globals["__file__"]).read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (KeyError, TypeError, OSError, ValueError, SyntaxError):
        return None
    comments = {}  # line -> (column, text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (token.start[1], token.string.lstrip("#").strip())
    code_lines = {n for node in tree.body for n in range(node.lineno, node.end_lineno + 1)}
    headings = {}  # line -> text; a line of dashes and nothing else ends no group, it is only a ruler
    for line, (column, comment) in comments.items():
        match = re.fullmatch(r"-{2,}\s*(.*?)[\s-]*", comment)
        if match and column == 0:
            headings[line] = match.group(1)

    declared = {}
    for node in tree.body:
        # the settings end where the script reads them: what it assigns after that (and its config itself) is its own business
        if isinstance(node, (ast.Assign, ast.Expr, ast.If)) and "configurator" in {
            getattr(n, "id", None) for n in ast.walk(node)
        }:
            break
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        names = [
            n.id
            for target in targets
            for n in ast.walk(target)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        ]
        if not names:
            continue
        found = [comments[n][1] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
        if found:  # goes on below, as long as the lines are indented comments
            n = node.end_lineno + 1
            while n in comments and n not in code_lines and comments[n][0] > 0:
                found.append(comments[n][1])
                n += 1
        else:
            n = node.lineno - 1
            while n in comments and n not in code_lines and comments[n][0] == 0 and n not in headings:
                found.insert(0, comments[n][1])
                n -= 1
        heading = [text for line, text in sorted(headings.items()) if line < node.lineno and text]
        for name in names:
            declared.setdefault(
                name,
                {
                    "heading": heading[-1] if heading else "",
                    "comment": " ".join(found),
                    "annotation": ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else None,
                },
            )
    return declared


def help_text(script_globals):
    """The script's docstring, then every setting with its default and its comment, under the headings of its source."""
    declared = read_source(script_globals) or {}
    script = os.path.basename(script_globals.get("__file__") or "script.py")
    values = settings(script_globals)
    shown = {name: f"--{name}={value!r}" for name, value in values.items()}
    width = min(40, max(map(len, shown.values()), default=0))
    out = [
        (script_globals.get("__doc__") or "").strip(),
        "",
        f"settings: python {script} [config.py ...] --key=value ...",
    ]
    heading = ""
    ranges = script_globals.get("RANGES", {}).items()
    interval = {name: allowed for allowed, names in ranges if type(allowed) is str for name in names.split()}
    for name, text in shown.items():
        about = declared.get(name, {})
        if about.get("heading", "") != heading:
            heading = about["heading"]
            out += ["", heading]
        about = filter(None, [about.get("comment"), interval.get(name) and f"in {interval[name]}"])
        comment = textwrap.wrap("; ".join(about), 130 - width) or [""]
        if len(text) > width and comment[0]:
            comment.insert(0, "")  # a long value has its line to itself
        out += [f"  {text if i == 0 else '':{width}}  {line}".rstrip() for i, line in enumerate(comment)]
    return "\n".join(out).strip()


# ---------------------------------------------------------------------------------------------------------------------------------
# showing and saving


def show(config, defaults, width=120):
    """The effective config as a compact block of text; what differs from the defaults carries a star and its default."""
    lines, line = [], ""
    for name, value in config.items():
        if value != defaults[name]:
            item = f"*{name}={value!r} (default {defaults[name]!r})"
        else:
            item = f"{name}={value!r}"
        if line and len(line) + len(item) + 2 > width:
            lines.append(line)
            line = ""
        line += ("  " if line else "") + item
    return "\n".join([*lines, line])


def save(config, path):
    """Write the config as JSON: a reader (or a crash) sees the old file or the new one, never half of one."""
    write_whole((json.dumps(config, indent=2) + "\n").encode(), path)


# ---------------------------------------------------------------------------------------------------------------------------------
# for scripts whose settings are few, with argparse


def positive(text):
    """For argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def help_only(doc):
    """For a script that takes no arguments: --help prints `doc`, its docstring, and anything else is a mistake, in one line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}; see python {parser.prog} --help")
    parser.parse_args()
