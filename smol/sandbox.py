"""
Running what a model wrote: Python functions, in a process of their own that can do little and is soon over.

    result = sandbox.run_tests("def add(a, b):\n    return a + b\n", [("add(1, 2)", 3)])
    result.ok, result.value, result.reason

What confines the process, each on its own:

  - A temporary folder, no environment, no installed packages, no open file but its input and output; a
    process group of its own, which is killed as a whole when it is over.
  - Limits of the kernel on CPU seconds, memory, open files, size of output and number of processes.
  - On Linux on x86-64 a filter of system calls (seccomp): no file, no socket, no process, no signal to
    another one, whatever the code does to the interpreter, as root too.
  - An audit hook that refuses files, sockets, processes and ctypes with a clear error. It also covers systems
    without the filter, but who knows the interpreter's insides gets around it.
  - Expected values never enter the process, so code cannot pass a test by printing that it passed.

This does not protect against faults of the kernel or, without the filter, of the interpreter. It was made for
what small models write by accident; for code of people who mean harm, use a virtual machine.

Grid programs (programs.py) need none of this: they are read and not executed. Read next: language.py, which
runs candidates through this.
"""

import ast
import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import dataclass

SECONDS = 2  # of CPU, for a function with its tests
MEMORY = 256 << 20  # bytes beyond what the interpreter itself takes
OUTPUT = 64 << 10  # bytes of results
MODULES = (  # what functions may import
    "math re collections itertools functools string heapq bisect operator statistics fractions decimal "
    "random typing dataclasses enum copy abc textwrap"
).split()
REFUSED = (  # audit events that begin so
    "open import os. socket. subprocess. ctypes. shutil. tempfile. resource. signal. fcntl. mmap. pty. "
    "pathlib. glob. syslog. sys.addaudithook"
).split()
SYSTEM_CALLS = (  # what computing needs, by the numbers of x86-64
    "read=0 write=1 close=3 fstat=5 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 rt_sigaction=13 "
    "rt_sigprocmask=14 rt_sigreturn=15 readv=19 writev=20 sched_yield=24 mremap=25 madvise=28 nanosleep=35 "
    "getpid=39 exit=60 gettimeofday=96 getrusage=98 sigaltstack=131 futex=202 sched_getaffinity=204 "
    "restart_syscall=219 clock_gettime=228 clock_getres=229 clock_nanosleep=230 exit_group=231 getrandom=318 "
    "rseq=334"
).split()
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}  # sets have the same order every time
READY = b"confined\n"  # what the process writes before it looks at anything


@dataclass(frozen=True)
class Result:
    ok: bool
    value: object = None  # when ok
    reason: str = ""  # when not ok, in one line


# -----------------------------------------------------------------------------
# outside


def run_tests(code, tests):
    """
    tests: list of (expression, expected value). A test passes if value and type are right: True is not 1.
    Returns a Result, ok if all pass; its reason names the first that does not.
    """
    result = call(code, [expression for expression, _ in tests])
    for (expression, expected), value in zip(tests, result.value or ()):
        if not same(value, expected):
            return Result(False, reason=shorten(f"{expression} is {value!r}, not {expected!r}"))
    return result


def same(a, b):
    """Equal, and of equal types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (dict, set)) and sorted(map(repr, a)) != sorted(map(repr, b)):
        return False  # 1 and True are the same key
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    return a == b


def shorten(text):
    return text.replace("\n", " ")[:120]


def call(code, expressions):
    """
    Run `code`, then evaluate every expression with what it defined. Returns a Result with the list of their
    values, which must be plain: numbers, texts, None, and lists, tuples, dicts and sets of them.
    """
    line, problem = start({"code": code, "expressions": expressions, "seconds": SECONDS})
    try:
        answer = json.loads(line)
        if "error" in answer:
            return Result(False, reason=shorten(str(answer["error"])))
        values = [ast.literal_eval(text) for text, _ in zip(answer["values"], expressions, strict=True)]
        repr(values)  # a ValueError where an int is too long to be shown
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, KeyError):
        return Result(False, reason=problem or "it gave no plain value")
    return Result(True, values)


def start(job):
    """
    Run inside() on `job` in a new process. Returns (the line of JSON it wrote, what went wrong or ""). CPU
    time counts, so that a busy machine changes no result; real time ends what sleeps. OSError if the process
    fails before it comes to the code: nothing is known then about what the model wrote.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        open(os.path.join(folder, "output"), "a+b") as output,  # only ever added to: READY stays in front
        tempfile.TemporaryFile() as errors,
    ):
        command = [sys.executable, "-s", "-S", "-B", os.path.abspath(__file__)]
        files = {"stdin": subprocess.PIPE, "stdout": output, "stderr": errors}
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True, **files)
        problem = ""
        try:
            process.communicate(json.dumps(job).encode(), 4 * job["seconds"] + 30)
        except subprocess.TimeoutExpired:
            problem = "it did not end"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its group, whether or not its leader has ended
            process.wait()
        output.seek(0)
        errors.seek(0)
        written, said = output.read(), errors.read().decode(errors="replace").splitlines()
    if not written.startswith(READY):
        raise OSError(f"the sandbox does not start: {said[-1] if said else 'it ended at once'}")
    if len(written) >= OUTPUT:
        problem = f"it gave more than {OUTPUT >> 10} KB of output"
    elif process.returncode and not problem:
        too_long = process.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
        problem = f"it took more than {job['seconds']} s" if too_long else "it ended before it was done"
    return written.removeprefix(READY), problem


# -----------------------------------------------------------------------------
# inside: this file run as a script, with the standard library alone


def inside():
    """First import what code may use, then confine the process, then look at what the model wrote."""
    job = json.loads(sys.stdin.buffer.read())
    for name in MODULES:
        importlib.import_module(name)
    sys.modules["random"].seed(0)
    warnings.simplefilter("ignore")  # to show one, Python would open the source
    confine(job["seconds"])
    os.write(1, READY)
    sys.stdout = sys.stderr = types.SimpleNamespace(write=len, flush=lambda: None)  # nobody reads it
    space = {"__name__": "candidate"}
    try:
        exec(compile(job["code"], "candidate", "exec"), space)
        answer = {"values": [repr(eval(expression, space)) for expression in job["expressions"]]}
    except MemoryError:
        answer = {"error": "it took too much memory"}
    except BaseException as e:  # SystemExit and KeyboardInterrupt as well
        answer = {"error": shorten(f"{type(e).__name__}: {e}".rstrip(": \n"))}
    os.write(1, json.dumps(answer).encode())  # of too much as far as the limit goes
    os._exit(0)  # at once: objects of the code may have something to do when they are deleted


def confine(seconds):
    """Give up, for good, what computing does not need."""
    taken = 0
    if sys.platform == "linux":
        with open("/proc/self/statm") as f:
            taken = int(f.read().split()[0]) * resource.getpagesize()
    seconds += round(time.process_time())  # the kernel counts from the start of the process
    limits = {"CPU": seconds, "AS": taken + MEMORY, "FSIZE": OUTPUT, "CORE": 0, "NPROC": 0, "NOFILE": 3}
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # the system lacks it
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + (name == "CPU")))
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        filter_system_calls()

    def refuse(event, args):
        if event.startswith(tuple(REFUSED)):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)


def filter_system_calls():
    """
    From now on the kernel answers every system call that is not in SYSTEM_CALLS with EPERM. The filter is a
    program of (code, if true skip, if false skip, value); see seccomp(2).
    """
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    numbers = [int(call.split("=")[1]) for call in SYSTEM_CALLS]
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, 0xC000003E),
        (give, 0, 0, kill),  # in another processor's numbering they mean other calls
        (load, 0, 0, 0),
        *((equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    about = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    prctl(38, 1, 0, 0, 0)  # no new privileges
    prctl(22, 2, ctypes.addressof(about), 0, 0)


if __name__ == "__main__":  # the process that start() makes
    inside()
