"""The sandbox: honest code works in it, hostile code gets nowhere, and a verdict cannot be forged."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from smol import programs, sandbox

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The way around restricted builtins that everybody knows: some class that is loaded was defined in the module `os`
GET_OS = "os = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__\n"
FILTERED = sys.platform == "linux" and os.uname().machine == "x86_64"


def f(body):
    """A function f() with this body; its value is what `body` assigns to out."""
    return (
        "def f():\n"
        + "".join(f"    {line}\n" for line in ("out = None\n" + body).splitlines())
        + "    return out\n"
    )


# honest code


def test_values_come_back_as_they_are():
    code = "import math, collections\ndef f(x):\n    print('hello')\n    return x\n"
    calls = [
        "f(1)",
        "f([1, (2.5, 'ä\\n')])",
        "f({'a': {1, 2}, 'b': None})",
        "f(math.gcd(12, 18))",
        "dict(collections.Counter('aab'))",
    ]
    calls.append("f(True)")
    result = sandbox.call(code, calls)
    assert result == sandbox.Result(
        True, [1, [1, (2.5, "ä\n")], {"a": {1, 2}, "b": None}, 6, {"a": 2, "b": 1}, True]
    )


def test_tests_pass_or_say_which_does_not():
    code = "def add(a, b):\n    return a + b\n"
    assert sandbox.run_tests(code, [("add(1, 2)", 3), ("add('a', 'b')", "ab")]).ok
    result = sandbox.run_tests(code, [("add(1, 2)", 3), ("add(2, 2)", 5)])
    assert (result.ok, result.reason) == (False, "add(2, 2) is 4, not 5")
    assert not sandbox.run_tests(code, [("add(0, True)", True)]).ok  # 1 is not True
    assert not sandbox.run_tests(code, [("add([1], [2])", (1, 2))]).ok
    assert "SyntaxError" in sandbox.run_tests("def add(a, b:\n", [("add(1, 2)", 3)]).reason
    assert "NameError" in sandbox.run_tests("", [("add(1, 2)", 3)]).reason
    assert "plain value" in sandbox.call("", ["object()"]).reason


def test_the_same_every_time():
    """Sets of texts have another order in every Python process, and random another seed: not here."""
    code = (
        "import random\ndef f():\n    return list({'one', 'two', 'three', 'four', 'five'}), random.random()\n"
    )
    assert sandbox.call(code, ["f()"]) == sandbox.call(code, ["f()"])


# hostile code

PLAIN = {
    "import os": ("import os", "cannot be imported"),
    "socket": ("import socket; out = socket.socket()", "cannot be imported"),
    "open": ("out = open('/etc/passwd').read()", "NameError"),
    "exit": ("raise SystemExit(0)", "SystemExit"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "recursion": ("def g(n): return g(n + 1)\ng(0)", "RecursionError"),
    "memory": ("out = 'x' * (1 << 33)", "memory"),
    "memory, step by step": ("x = [0] * 1000\nwhile True: x = x + x", "memory"),
    "output": ("out = 'x' * 10_000_000", "output"),
    "a number nobody can write": ("out = 1 << 1_000_000", "ValueError"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_attempts_fail_with_a_reason(name):
    body, reason = PLAIN[name]
    result = sandbox.call(f(body), ["f()"])
    assert not result.ok and reason in result.reason


def test_loops_end():
    started = time.monotonic()
    body = "while True:\n    try:\n        while True: print('x' * 1000)\n    except BaseException: pass"
    result = sandbox.call(f(body), ["f()"], seconds=1)
    assert (result.ok, result.reason) == (False, "it took more than 1 s")
    assert time.monotonic() - started < 60  # a busy machine is slow; a loop that does not end is slower


AROUND = {
    "read a file": "out = os['open']('/etc/passwd', 0)",
    "write a file": "out = os['open']('TARGET', os['O_WRONLY'] | os['O_CREAT'])",
    "list a folder": "out = os['listdir']('/')",
    "run a command": "out = os['system']('touch TARGET')",
    "fork": "out = os['fork']()",
    "fork bomb": "while True: os['fork']()",
    "kill the parent": "out = os['kill'](os['getppid'](), 9)",
    "kill the process group of the parent": "out = os['killpg'](os['getpgid'](os['getppid']()), 9)",
    "delete a file": "out = os['remove']('EXISTING')",
    "rename a file": "out = os['rename']('EXISTING', 'TARGET')",
    "another program": "out = os['execv']('/bin/sh', ['sh', '-c', 'touch TARGET'])",
    "a socket": "out = os['sys'].modules['socket'].socket()",
    "a module": "out = os['sys'].modules['builtins'].__import__('socket')",
    "higher limits": "r = os['sys'].modules['resource']\nout = r.setrlimit(r.RLIMIT_NOFILE, (100, 100))",
    "ctypes": "out = os['sys'].modules['ctypes'].CDLL(None).getppid()",
}


def test_attempts_around_the_builtins_fail_too(tmp_path):
    """All attempts in one process, one after the other: none may give anything, and the file system and this process are as before."""
    existing, target = tmp_path / "existing", tmp_path / "target"
    existing.write_text("kept")
    code = GET_OS
    for i, body in enumerate(AROUND.values()):
        body = body.replace("TARGET", str(target)).replace("EXISTING", str(existing))
        lines = "\n".join("        " + line for line in body.splitlines())
        code += f"def f{i}():\n    try:\n{lines}\n        return 'did it'\n    except Exception as e:\n        return type(e).__name__\n"
    result = sandbox.call(code, [f"f{i}()" for i in range(len(AROUND))])
    assert result.ok, result.reason
    outcomes = dict(zip(AROUND, result.value))
    assert outcomes.pop("a socket") in ("KeyError", "PermissionError")  # KeyError: not even loaded
    assert set(outcomes.values()) == {"PermissionError"}, outcomes
    assert existing.read_text() == "kept" and not target.exists()


def test_its_own_process_may_die_in_any_way():
    for body, reason in (
        ("os['_exit'](0)", "ended before"),
        ("os['abort']()", "crashed"),
        ("os['close'](1)\nwhile True: pass", ""),
    ):
        result = sandbox.call(GET_OS + f(body), ["f()"], seconds=1)
        assert not result.ok and result.reason and reason in result.reason


def test_a_verdict_cannot_be_forged():
    """Whoever writes results past the function still does not know what they should be."""
    forged = (
        GET_OS
        + "def f():\n    os['write'](1, b'{\"value\": \"True\"}\\n{\"ok\": true}\\n')\n    os['_exit'](0)\n"
    )
    assert not sandbox.run_tests(forged, [("f()", 7)]).ok
    assert not sandbox.run_tests(GET_OS + "os['write'](1, b'[' * 50000 + b'\\n')\n", [("1", 1)]).ok
    assert not sandbox.run_tests(
        "class Any:\n    def __eq__(self, other): return True\ndef f(): return Any()\n", [("f()", 7)]
    ).ok


@pytest.mark.skipif(not FILTERED, reason="the filter of system calls is for Linux on x86-64")
def test_the_kernel_refuses_without_the_help_of_python(tmp_path):
    """The filter alone, no audit hook: what the code could do if it got around the interpreter altogether."""
    script = """
import ctypes, os, socket, sys
from smol import sandbox
libc = ctypes.CDLL(None, use_errno=True)
assert sandbox.filter_system_calls()
def attempt(name, *args):
    if getattr(libc, name)(*args) != -1: print(name, 'worked')
attempt('open', b'/etc/passwd', 0), attempt('creat', sys.argv[1].encode(), 511), attempt('fork'), attempt('kill', os.getppid(), 0)
attempt('socket', 2, 1, 0), attempt('execv', b'/bin/true', None), attempt('unlink', b'/x'), attempt('setuid', 1)
attempt('prctl', 1, 9, 0, 0, 0), attempt('chdir', b'/'), attempt('ptrace', 16, os.getppid(), 0, 0), attempt('dup', 1)
print(sum(i * i for i in range(10)), len([bytearray(1 << 20) for _ in range(50)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("285 50\n", 0), done.stderr
    assert "system call filter" in sandbox.protections()


def test_a_sandbox_that_does_not_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "__file__", sandbox.__file__ + ".none")
    with pytest.raises(OSError, match="sandbox does not start: .*No such file"):
        sandbox.call("x = 1", ["x"])


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sandbox.call("x = 1", ["x"])
    sandbox.call(f("raise SystemExit(0)"), ["f()"])
    assert list(tmp_path.iterdir()) == []


# grid programs


def program(*steps):
    return programs.program_text([(name, params) for name, params in steps])


def test_programs_give_what_they_give_outside():
    rng = np.random.default_rng(1)
    jobs = []
    for family in list(programs.FAMILIES)[::6]:
        task, steps = programs.make(rng, family)
        jobs.append((programs.program_text(steps), [x for x, _ in task.train + task.test]))
    for (text, grids), result in zip(jobs, sandbox.run_programs(jobs), strict=True):
        assert result.ok and all(
            np.array_equal(a, programs.run(text, x)[-1]) and a.dtype == np.uint8
            for a, x in zip(result.value, grids)
        )


def test_one_bad_program_costs_the_others_nothing():
    grid = np.arange(9, dtype=np.uint8).reshape(3, 3)
    good = program(("transpose", {"anti": 0})), [grid]
    bad = {
        "ValueError": "import os\nos.system('true')\n",
        "no function": "def solve(grid):\n    grid = open(grid)\n    return grid\n",
        "does not take": program(("frame", {"a": 10**9})),
        "memory": program(*[("scale", {"k": 3})] * 20),
        "sides of 1 to 30": program(*[("scale", {"k": 3})] * 3),
        "20000 characters": program(*[("transpose", {"anti": 0})] * 2000),
        "": "(" * 5000,
    }
    jobs = [good, *((text, [grid]) for text in bad.values()), good]
    results = sandbox.run_programs(jobs)
    assert [r.ok for r in results] == [True] + [False] * len(bad) + [True]
    for reason, result in zip(bad, results[1:]):
        assert reason in result.reason and result.reason
    assert np.array_equal(results[-1].value[0], grid.T)
    assert np.array_equal(
        sandbox.run_programs([("def solve(grid):\n    return grid\n", [grid])])[0].value[0], grid
    )


def test_a_program_that_takes_too_long_is_stopped_alone():
    """Five hundred steps that label every object of a 30x30 grid, on many grids: well over the limit, each step within it."""
    grid = (np.indices((30, 30)).sum(0) % 2).astype(np.uint8)
    slow = program(*[("box", {})] * 400), [grid] * 50
    good = program(("transpose", {"anti": 0})), [grid]
    results = sandbox.run_programs([good, slow, good], seconds=1)
    assert [r.ok for r in results] == [True, False, True] and "more than 1 s" in results[1].reason
