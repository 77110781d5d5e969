"""
Running what a model wrote: Python functions and grid programs, in a process of their own that can do little and is soon over.

    result = sandbox.run_tests("def add(a, b):\n    return a + b\n", [("add(1, 2)", 3)])
    result = sandbox.run_programs([(text, [grid, grid])])[0]        text as programs.py reads it
    result.ok, result.value, result.reason

What the process is held by, each on its own:

  - It starts in an empty temporary folder without your environment and installed packages, with no open file but three pipes, and as the
    leader of a process group that is killed as a whole when it is over.
  - Limits of the kernel on CPU seconds, memory, open files (none more), written files (of no size), processes; here, on output and on time.
  - On Linux on x86-64 a filter of system calls (seccomp) that lets through what computing needs and nothing else: no file, no socket, no
    process, no signal to another one. The kernel holds to it whatever the code does to the interpreter, as root too.
  - An audit hook that refuses files, sockets, processes and ctypes, so that an attempt fails with a clear error; it also covers systems
    without the filter, but it is only Python, and who knows the interpreter's insides well gets around it.
  - Python functions see few builtins and import only the modules in MODULES. That keeps honest code honest; it is no barrier by itself.
  - Expected results never enter the process, so code cannot pass a test by looking at it or by printing that it passed.

Grid programs are not executed at all: programs.parse reads them and only functions of that language run, with parameters it lists.

What this does not protect against: faults of the kernel, or of the interpreter where there is no filter (macOS, other processors: there,
code that is out to harm you can read your files). Code sees the machine's clock and its own process. It was made for what small models
write by accident, and withstands the usual attempts (see tests/test_sandbox.py); for code of people who mean harm, use a virtual machine.

Read next: language.py and eval_arc.py, which run candidates through this.
"""

import ast
import builtins
import ctypes
import importlib
import json
import os
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass

SECONDS = 2  # of CPU for a function with its tests, or for one program on its grids
MEMORY_MB = 256  # more than the interpreter itself takes
OUTPUT_BYTES = 65536  # of results that a function may give
TEXT_CHARACTERS = 20_000  # a longer program is not looked at
PROGRAMS = 200  # in one process; it starts in a quarter of a second
MODULES = (
    "math",
    "re",
    "collections",
    "itertools",
    "functools",
    "string",
    "heapq",
    "bisect",
    "operator",
    "statistics",
    "fractions",
    "decimal",
    "random",
    "typing",
    "dataclasses",
    "enum",
    "copy",
    "abc",
    "textwrap",
)  # what functions may import
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONSAFEPATH": "1",
    "OPENBLAS_NUM_THREADS": "1",
}  # sets have the same order every time
READY = b'{"value": "ready"}\n'  # what the process says when it is confined, before it looks at anything
FORBIDDEN = (
    "open",
    "input",
    "breakpoint",
    "exit",
    "quit",
    "help",
    "eval",
    "exec",
    "compile",
    "copyright",
    "credits",
    "license",
)


@dataclass(frozen=True)
class Result:
    ok: bool
    value: object = None  # when ok: see the function that gives it
    reason: str = ""  # when not ok: what went wrong, in one line


# -----------------------------------------------------------------------------
# here, outside


def call(code, calls, seconds=SECONDS, memory_mb=MEMORY_MB):
    """
    Run `code`, then every expression in `calls` (list of str) with what it defined. -> Result whose value is the list of their values,
    which must be plain: numbers, texts, None, and lists, tuples, dicts and sets of them.
    """
    lines, problem = _start(
        "functions", {"code": code, "calls": calls, "seconds": seconds, "memory_mb": memory_mb}, seconds
    )
    values = []
    for line in lines:
        if "error" in line:
            return Result(False, reason=line["error"])
        try:
            values.append(ast.literal_eval(line["value"]))
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, KeyError):
            return Result(False, reason="the result is no plain value")
    if problem or len(values) != len(calls):
        return Result(False, reason=problem or "it ended before it was done")
    return Result(True, values)


def run_tests(code, tests, seconds=SECONDS, memory_mb=MEMORY_MB):
    """
    tests: list of (expression, the value it must have). A test passes if value and type are right, so that True is not 1 and a list no
    tuple. -> Result that is ok if all pass, and whose reason names the first that does not.
    """
    result = call(code, [expression for expression, _ in tests], seconds, memory_mb)
    if not result.ok:
        return result
    for (expression, wanted), got in zip(tests, result.value):
        if not _same(got, wanted):
            return Result(False, reason=f"{expression} is {_short(repr(got))}, not {_short(repr(wanted))}")
    return Result(True)


def run_programs(jobs, seconds=SECONDS, memory_mb=MEMORY_MB):
    """
    jobs: list of (program text, [np.uint8 grid, ...]). -> list of Result: the value is the list of np.uint8 grids that the program makes of
    these, each 1..30 a side. Programs share a process, PROGRAMS at a time; one that takes it down costs the others nothing.
    """
    import numpy as np  # here, because the process inside runs this file too, where nothing is installed

    results = []
    while len(results) < len(jobs):
        part = jobs[len(results) : len(results) + PROGRAMS]
        given = [(text[: TEXT_CHARACTERS + 1], [grid.tolist() for grid in grids]) for text, grids in part]
        paths = [
            os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            *filter(os.path.isabs, sys.path),
        ]
        size = OUTPUT_BYTES + 4000 * sum(len(grids) for _, grids in part)  # a 30x30 grid is 2,760 characters
        lines, problem = _start(
            "programs",
            {"jobs": given, "seconds": seconds, "memory_mb": memory_mb, "paths": paths},
            seconds * len(part) + 30,
            size,
        )
        results += [
            Result(False, reason=line["error"])
            if "error" in line
            else Result(True, [np.array(grid, np.uint8) for grid in line["value"]])
            for line in lines[: len(part)]
        ]
        if len(lines) < len(part):
            results.append(Result(False, reason=problem or "it ended before it was done"))
    return results


def protections():
    """-> list of str: what holds the process on this system."""
    return _start("held", {"seconds": SECONDS, "memory_mb": MEMORY_MB}, SECONDS)[0][0]["value"]


def _same(a, b):
    """Equal, and of equal types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in b)
    return a == b


def _short(text):
    return text if len(text) <= 80 else text[:77] + "..."


def _start(kind, job, seconds, output_bytes=OUTPUT_BYTES):
    """
    Run inside() in a process with `job`. -> (list of the JSON lines it wrote, "" or why there are not more). The kernel counts CPU
    seconds inside; out here, real time is only there to end what sleeps, and generous, so that a busy machine changes no result. OSError
    if it fails before it comes to the job: then nothing has been found out about what the model wrote.
    """
    folder, errors = tempfile.mkdtemp(prefix="sandbox-"), tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-s", "-S", "-B", os.path.abspath(__file__), f"--inside={kind}"],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )
    try:
        output, problem = _talk(
            process, json.dumps(job).encode(), time.monotonic() + 4 * seconds + 30, output_bytes
        )
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its group, whether or not its leader has ended
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)
    with errors:
        if not output.startswith(READY):
            errors.seek(0)
            said = errors.read(100_000).decode(errors="replace").strip().split("\n")[-1]
            raise OSError(f"the sandbox does not start: {said or problem or 'it ended at once'}")
    lines = []
    for line in output[len(READY) :].split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            return lines, "it wrote what is no result"
        if not isinstance(lines[-1], dict) or not {"value", "error"} & set(lines[-1]):
            return lines[:-1], "it wrote what is no result"
    if not problem and process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        problem = f"it took more than {job['seconds']} s"
    elif not problem and process.returncode < 0:
        problem = f"it crashed ({signal.Signals(-process.returncode).name})"
    return lines, problem


def _talk(process, given, deadline, output_bytes):
    """Write `given` to the process and read until it closes its output. -> (bytes, "" or why it was cut off)."""
    output = bytearray()
    os.set_blocking(process.stdin.fileno(), False)
    while True:
        left = deadline - time.monotonic()
        readable, writable, _ = select.select(
            [process.stdout], [process.stdin] if given else [], [], max(left, 0)
        )
        if left <= 0:
            return bytes(output), "it did not end"
        if writable:
            try:
                given = given[os.write(process.stdin.fileno(), given[:65536]) :]
            except BrokenPipeError:
                given = b""
            if not given:
                process.stdin.close()
        if readable:
            block = os.read(process.stdout.fileno(), 65536)
            output += block
            if len(output) > output_bytes:
                return bytes(output[:output_bytes]), f"it gave more than {output_bytes // 1024} KB of output"
            if not block:
                return bytes(output), ""


# -----------------------------------------------------------------------------
# inside: what runs in the process, with the standard library only. Order matters: first whatever has to be imported, then confine(), and
# only then a look at what the model wrote.


# System calls that computing needs, on x86-64: read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
# rt_sigreturn readv writev sched_yield mremap madvise nanosleep getitimer setitimer getpid exit gettimeofday getrusage sigaltstack futex
# sched_getaffinity restart_syscall clock_gettime clock_getres clock_nanosleep exit_group getrandom rseq
SYSTEM_CALLS = (
    0,
    1,
    3,
    5,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    19,
    20,
    24,
    25,
    28,
    35,
    36,
    38,
    39,
    60,
    96,
    98,
    131,
    202,
    204,
    219,
    228,
    229,
    230,
    231,
    318,
    334,
)
REFUSED = (
    "open",
    "import",
    "os.",
    "socket.",
    "subprocess.",
    "ctypes.",
    "shutil.",
    "tempfile.",
    "resource.",
    "signal.",
    "fcntl.",
    "mmap.",
    "pty.",
    "pathlib.",
    "glob.",
    "syslog.",
    "sys.addaudithook",
)  # audit events that begin so


def confine(seconds, memory_mb):
    """Give up, for good, what computing does not need. -> list of the protections in force (the kernel may lack some)."""
    held = []
    try:
        with open("/proc/self/statm") as f:
            taken = int(f.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        taken = 0
    seconds += round(time.process_time())  # the kernel counts whole seconds, from the process's start
    for name, soft, hard in (
        ("CPU", seconds, seconds + 1),
        ("AS", taken + (memory_mb << 20), None),
        ("FSIZE", 0, None),
        ("CORE", 0, None),
        ("NPROC", 0, None),
        ("NOFILE", 3, None),
    ):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard or soft))
            held.append(f"limit {name}")
        except (AttributeError, ValueError, OSError):
            pass
    if sys.platform == "linux" and os.uname().machine == "x86_64" and filter_system_calls():
        held.append("system call filter")

    def refuse(event, args):
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)
    return [*held, "audit hook"]


def filter_system_calls():
    """
    Have the kernel answer every system call that is not in SYSTEM_CALLS with EPERM, from now on. -> False if it cannot.
    The filter is a program of (code, if true skip, if false skip, value) for the kernel's packet filter; see seccomp(2).
    """
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    n = len(SYSTEM_CALLS)
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, 0xC000003E),
        (give, 0, 0, kill),  # in another processor's numbering they mean other calls
        (load, 0, 0, 0),
        *((equal, n - i, 0, number) for i, number in enumerate(SYSTEM_CALLS)),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    about = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    return (
        prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.addressof(about), 0, 0) == 0
    )  # no new privileges; the filter


class Nowhere:
    """A stream for what code prints: nobody reads it."""

    def write(self, text):
        return len(text)

    def flush(self):
        pass


def say(line):
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def describe(e):
    return (
        "it took too much memory"
        if isinstance(e, MemoryError)
        else _short(f"{type(e).__name__}: {e}".rstrip(": \n").replace("\n", " "))
    )


def inside(kind):
    job = json.loads(sys.stdin.buffer.read())
    warnings.simplefilter("ignore")  # to show one, Python would open the source
    if kind == "programs":
        sys.path[:] = job["paths"]
        sys.modules["torch"] = type(sys)(
            "torch"
        )  # arc.py imports it for what nobody does here; it would be seconds and gigabytes
        from smol import programs

        programs.run(
            "def solve(grid):\n    grid = crop(grid)\n    return grid\n",
            __import__("numpy").ones((2, 2), "uint8"),
        )
        confine(job["seconds"] * len(job["jobs"]) + 5, job["memory_mb"])
        say({"value": "ready"})
        inside_programs(programs, job["jobs"], job["seconds"])
    else:
        modules = {name: importlib.import_module(name) for name in MODULES}
        modules["random"].seed(0)
        held = confine(job["seconds"], job["memory_mb"])
        say({"value": "ready"})
        if kind == "held":
            say({"value": held})
        else:
            inside_functions(modules, job["code"], job["calls"])
    os._exit(0)  # without looking back: objects of the code may have something to do when they are deleted


def inside_functions(modules, code, calls):
    def limited_import(name, *rest):
        if name.split(".")[0] not in modules:
            raise ImportError(f"{name} cannot be imported here")
        return __import__(name, *rest)

    sys.stdout = sys.stderr = Nowhere()
    allowed = {k: v for k, v in vars(builtins).items() if k not in FORBIDDEN}
    space = {"__builtins__": {**allowed, "__import__": limited_import}, "__name__": "candidate"}
    try:
        exec(compile(code, "candidate", "exec"), space)
        for expression in calls:
            value = repr(eval(compile(expression, "call", "eval"), space))
            say({"value": value})
    except BaseException as e:  # SystemExit and KeyboardInterrupt as well
        say({"error": describe(e)})


def inside_programs(programs, jobs, seconds):
    def out_of_time(*_):
        raise TimeoutError(f"it took more than {seconds} s")

    signal.signal(signal.SIGPROF, out_of_time)
    for text, grids in jobs:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            made = [inside_program(programs, text, grid) for grid in grids]
            signal.setitimer(signal.ITIMER_PROF, 0)
            line = {"value": made}
        except BaseException as e:
            signal.setitimer(signal.ITIMER_PROF, 0)
            line = {"error": describe(e)}
        say(line)


def inside_program(programs, text, grid):
    if len(text) > TEXT_CHARACTERS:
        raise ValueError(f"a program of more than {TEXT_CHARACTERS} characters")
    grid = programs.np.array(grid, "uint8")
    out = [grid, *programs.run(text, grid)][-1]
    if out.ndim != 2 or not all(1 <= side <= 30 for side in out.shape):
        raise ValueError(
            f"it makes a grid of {'x'.join(map(str, out.shape))}, where sides of 1 to 30 are wanted"
        )
    return out.tolist()


if __name__ == "__main__" and sys.argv[-1].startswith("--inside="):  # the process that _start() makes
    inside(sys.argv[-1].removeprefix("--inside="))
