"""
Our scripts in processes of their own, without the seconds that each would take to import PyTorch: a server imports it once and forks.

    code, out, err = scripts.run("distill.py", ["config/x.py", "--max_iters=2"])

What a fork starts with is PyTorch and other people's packages alone, so the script is read and run from its first line on as by
`python script.py`; with several processes each has the variables that torchrun would give it.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "numpy",
        "tiktoken",
        "tqdm",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ]
)


def as_script(script, arguments, out, env):
    """In the new process."""
    os.chdir(ROOT)
    os.environ.update(env, OMP_NUM_THREADS="1")
    for stream, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out + end, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    import torch

    torch.set_num_threads(1)
    sys.argv, sys.path[0] = [script, *arguments], str(ROOT)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, (int, type(None))):
            print(e.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 (as Python itself would tell of it)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(script, arguments, processes=1, timeout=300):
    """-> subprocess.CompletedProcess: the worst exit code, and what was written on stdout and stderr by all, one after the other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            words = [str(a) for a in arguments]
            p = server.Process(
                target=as_script, args=(script, words, f"{folder}/{rank}", env if processes > 1 else {})
            )
            p.start()
            started.append(p)
        for p in started:
            p.join(timeout)
            if p.exitcode is None:
                for other in started:
                    other.kill()
                raise subprocess.TimeoutExpired(script, timeout)
        texts = []
        for end in (".out", ".err"):
            parts = []
            for rank in range(processes):
                with contextlib.suppress(FileNotFoundError):
                    parts.append(Path(f"{folder}/{rank}{end}").read_text())
            texts.append("".join(parts))
    return subprocess.CompletedProcess([script, *arguments], max(abs(p.exitcode) for p in started), *texts)


def stage_without_validation(data, copy, *sources):
    """A copy of the data folder whose demo stage has no shards for validation of these sources."""
    shutil.copytree(data, copy)
    stage = copy / "stages" / "demo"
    lines = (stage / "manifest.jsonl").read_text().splitlines(keepends=True)
    kept = [
        line for line in lines if (e := json.loads(line))["split"] == "train" or e["source"] not in sources
    ]
    assert len(kept) < len(lines)
    (stage / "manifest.jsonl").write_text("".join(kept))
    mixture = json.loads((stage / "mixture.json").read_text())
    del mixture["manifest_sha256"]
    (stage / "mixture.json").write_text(json.dumps(mixture))
