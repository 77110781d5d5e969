"""
Our scripts in processes of their own, without the seconds that each would take to import PyTorch: a server
imports it once and forks.

    done = scripts.run("distill.py", ["config/x.py", "--max_iters=2"])  # a subprocess.CompletedProcess

What a fork starts with is PyTorch and other people's packages alone, so the script is read and run from its
first line on as by `python script.py`; several processes have the variables that torchrun would give them.
"""

import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
server = multiprocessing.get_context("forkserver")
PRELOAD = "torch torch.distributed torch._dynamo numpy tiktoken tqdm requests matplotlib.figure"
server.set_forkserver_preload([*PRELOAD.split(), "matplotlib.backends.backend_agg"])


def as_script(script, arguments, out, env, before, limits):
    """In the new process."""
    os.chdir(ROOT)
    os.environ.update(env, OMP_NUM_THREADS="1")
    for stream, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out + end, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    for what, value in limits:
        resource.setrlimit(what, (value, value))
    sys.argv, sys.path[0] = [script, *arguments], str(ROOT)
    try:
        exec(before, {})
        if script:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, (int, type(None))):
            print(e.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 (as Python itself would tell of it)
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    """A script at work in one process or several, as torchrun starts them."""

    def __init__(self, script, arguments=(), processes=1, env=None, before="", limits=()):
        """
        before: code that runs first, to put in a fault; script '': nothing else. limits: for
        resource.setrlimit.
        """
        self.arguments, self.folder = [str(a) for a in arguments], tempfile.TemporaryDirectory()
        self.script, self.processes = script, []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        for rank in range(processes):
            own = {**(env or {}), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            own.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            args = (script, self.arguments, f"{self.folder.name}/{rank}", own, before, limits)
            self.processes.append(server.Process(target=as_script, args=args, daemon=True))
            self.processes[-1].start()

    def alive(self):
        return all(p.is_alive() for p in self.processes)

    def wait_until(self, condition):
        """Look every 10 ms; AssertionError when the run ends before that, or after a minute."""
        until = time.monotonic() + 60
        while not condition():
            assert self.alive() and time.monotonic() < until, self.text(".err")
            time.sleep(0.01)

    def kill(self):
        for p in self.processes:
            p.kill()
            p.join()

    def signal(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)

    def text(self, end):
        parts = []
        for rank in range(len(self.processes)):
            with contextlib.suppress(FileNotFoundError):
                parts.append(Path(f"{self.folder.name}/{rank}{end}").read_text())
        return "".join(parts)

    def wait(self, timeout=300):
        """-> subprocess.CompletedProcess: the worst exit code, and what all wrote, one after the other."""
        until = time.monotonic() + timeout
        for p in self.processes:
            p.join(max(0.0, until - time.monotonic()))
            if p.exitcode is None:
                self.kill()
                raise subprocess.TimeoutExpired(self.script, timeout)
        code = max(abs(p.exitcode) for p in self.processes)
        texts = self.text(".out"), self.text(".err")
        self.folder.cleanup()
        return subprocess.CompletedProcess([self.script, *self.arguments], code, *texts)


def run(script, arguments=(), processes=1, **more):
    return Run(script, arguments, processes, **more).wait()
