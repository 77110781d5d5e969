"""The sandbox: honest code works in it, hostile code gets nowhere, and a result cannot be forged."""

import os
import subprocess
import sys

import pytest

from smol import sandbox

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILTERED = sys.platform == "linux" and os.uname().machine == "x86_64"


def f(body):
    """A function f() with this body; its value is what `body` assigns to out."""
    lines = "".join(f"    {line}\n" for line in ("out = None\n" + body).splitlines())
    return f"def f():\n{lines}    return out\n"


def test_values_come_back_as_they_are():
    code = "import math\ndef f(x):\n    print('hello')\n    return x\n"
    calls = {
        "f([1, (2.5, 'ä\\n'), True])": [1, (2.5, "ä\n"), True],
        "f({'a': {1, 2}, 'b': None})": {"a": {1, 2}, "b": None},
        "f(math.gcd(12, 18))": 6,
    }
    assert sandbox.call(code, list(calls)) == sandbox.Result(True, list(calls.values()))


def test_tests_pass_or_the_reason_names_the_first_that_fails():
    code = "def add(a, b):\n    return a + b\n"
    assert sandbox.run_tests(code, [("add(1, 2)", 3), ("add('a', 'b')", "ab")]).ok
    result = sandbox.run_tests(code, [("add(1, 2)", 3), ("add(2, 2)", 5), ("add(2, 3)", 6)])
    assert (result.ok, result.reason) == (False, "add(2, 2) is 4, not 5")
    assert not sandbox.run_tests(code, [("add(0, True)", True)]).ok  # 1 is not True
    assert not sandbox.run_tests(code, [("add([1], [2])", (1, 2))]).ok
    for value in ("{1}", "{1: 'a'}", "{'a': {(0, 1)}}"):
        for one in ("1", "True", "2"):
            expected = eval(value.replace("1", one))  # noqa: S307
            assert sandbox.run_tests("", [(value, expected)]).ok == (one == "1")
    assert "SyntaxError" in sandbox.run_tests("def add(a, b:\n", [("add(1, 2)", 3)]).reason
    assert "plain value" in sandbox.call("", ["object()"]).reason
    endless = "class A:\n    def __repr__(self):\n        return '0x' + 'f' * 5000\n"
    # Python shows no int of that length
    assert "plain value" in sandbox.run_tests(endless, [("A()", 7)]).reason
    assert "plain value" in sandbox.call("import os\nos._exit(0)", []).reason


def test_the_same_every_time():
    """Sets of texts have another order in every Python process, and random another seed: not here."""
    code = "import random\ndef f():\n    return list({'one', 'two', 'three', 'four'}), random.random()\n"
    assert sandbox.call(code, ["f()"]) == sandbox.call(code, ["f()"])


# hostile code


@pytest.mark.parametrize(
    "body, reason",
    [
        ("raise SystemExit(0)", "SystemExit"),
        ("def g(n): return g(n + 1)\ng(0)", "RecursionError"),
        ("x = [0] * 1000\nwhile True: x = x + x", "memory"),
        ("out = 'x' * 10_000_000", "64 KB"),
        ("while True:\n    try:\n        while True: print('x')\n    except BaseException: pass", "than 1 s"),
        ("import os\nos.abort()", "ended before"),
    ],
)
def test_what_goes_wrong_is_a_failure_with_a_reason(body, reason, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    result = sandbox.call(f(body), ["f()"])
    assert not result.ok and reason in result.reason


FORBIDDEN = {
    "read a file": "open('/etc/passwd').read()",
    "write a file": "os.open('TARGET', os.O_WRONLY | os.O_CREAT)",
    "delete a file": "os.remove('EXISTING')",
    "list a folder": "os.listdir('/')",
    "run a command": "os.system('touch TARGET')",
    "run another program": "os.execv('/bin/sh', ['sh', '-c', 'touch TARGET'])",
    "fork": "os.fork()",
    "kill the parent": "os.kill(os.getppid(), 9)",
    "a socket": "__import__('socket').socket()",
    "a module": "__import__('http.client')",
    "higher limits": "__import__('resource').setrlimit(7, (100, 100))",
    "ctypes": "__import__('ctypes').CDLL(None).getppid()",
    **({"what only the filter of system calls refuses": "os.getpgid(0)"} if FILTERED else {}),
}


def test_what_is_forbidden_fails(tmp_path):
    """All in one process, one after the other: none may give anything, and the file system is as before."""
    existing, target = tmp_path / "existing", tmp_path / "target"
    existing.write_text("kept")
    code = "import os\n"
    for i, expression in enumerate(FORBIDDEN.values()):
        expression = expression.replace("TARGET", str(target)).replace("EXISTING", str(existing))
        code += f"def f{i}():\n    try: return 'did it', str({expression})\n"
        code += "    except Exception as e: return type(e).__name__\n"
    result = sandbox.call(code, [f"f{i}()" for i in range(len(FORBIDDEN))])
    assert result.ok, result.reason
    outcomes = dict(zip(FORBIDDEN, result.value))
    assert set(outcomes.values()) == {"PermissionError"}, outcomes
    assert existing.read_text() == "kept" and not target.exists()


def test_a_result_cannot_be_forged():
    """Code that writes results itself still does not know what they should be; READY stays in front."""
    forge = "import os\ndef f():\n    os.lseek(1, 0, 0)\n    os.write(1, b'{}')\n    os._exit(0)\n"
    for line in ('{\\"values\\": [\\"True\\"]}', '{\\"values\\": []}', "[" * 5000, "7"):
        assert not sandbox.run_tests(forge.replace("{}", line), [("f()", 7)]).ok
    always_equal = "class Any:\n    def __eq__(self, other): return True\ndef f(): return Any()\n"
    assert not sandbox.run_tests(always_equal, [("f()", 7)]).ok


@pytest.mark.skipif(not FILTERED, reason="the filter of system calls is for Linux on x86-64")
def test_the_kernel_refuses_without_the_help_of_python(tmp_path):
    """The filter alone, no audit hook: what code could do that got around the interpreter altogether."""
    script = """
import ctypes, os, sys
from smol import sandbox
libc = ctypes.CDLL(None, use_errno=True)
sandbox.filter_system_calls()
for name, *args in (
    ("open", b"/etc/passwd", 0), ("creat", sys.argv[1].encode(), 511), ("fork",), ("kill", os.getppid(), 0),
    ("socket", 2, 1, 0), ("execv", b"/bin/true", None), ("unlink", b"/x"), ("setuid", 1), ("chdir", b"/"),
    ("prctl", 1, 9, 0, 0, 0), ("ptrace", 16, os.getppid(), 0, 0), ("dup", 1),
):
    if getattr(libc, name)(*args) != -1:
        print(name, "worked")
print(sum(i * i for i in range(10)))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("285\n", 0), done.stderr


def test_a_sandbox_that_does_not_start_is_no_wrong_answer_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sandbox.call(f("raise SystemExit(0)"), ["f()"])
    monkeypatch.setattr(sandbox, "__file__", sandbox.__file__ + ".none")
    with pytest.raises(OSError, match="sandbox does not start: .*No such file"):
        sandbox.call("x = 1", ["x"])
    assert list(tmp_path.iterdir()) == []
