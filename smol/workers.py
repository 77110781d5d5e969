"""
Who makes units of work (units.py): processes of this machine, or a Ray cluster. Both give run(jobs, report): do all the jobs, in any order,
and call report(record) for every unit that is there afterwards.

Read next: pipeline.py, which decides what the jobs are.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import traceback
from pathlib import Path

from smol.units import make_units


def _worker(pipe):
    """A worker process: takes jobs from a pipe until the other end is gone, as it is when the build was killed."""
    try:
        while True:
            job = pipe.recv()
            try:
                make_units(job, lambda record: pipe.send(("unit", record)))
                pipe.send(("done", None))
            except (ValueError, OSError) as e:
                pipe.send(("error", str(e)))
            except Exception:
                pipe.send(("bug", traceback.format_exc()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass


@contextlib.contextmanager
def local_workers(num_proc):
    """-> run(jobs, report): the jobs, in any order, on num_proc processes of this machine, which stay until the end of the block."""
    # spawn and not fork: a forked worker would hold the lock of the data folder beyond our death
    context = multiprocessing.get_context("spawn")
    workers, at_work = {}, set()

    def run(jobs, report):
        if num_proc == 1:
            for job in jobs:
                make_units(job, report)
            return
        waiting = list(reversed(jobs))
        while len(workers) < min(num_proc, len(jobs)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        for pipe in workers:
            if waiting:
                pipe.send(waiting.pop())
                at_work.add(pipe)
        while at_work:
            for pipe in multiprocessing.connection.wait(list(at_work)):
                try:
                    what, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise ValueError(
                        "a worker process was killed (out of memory?); run the same command again to go on, "
                        "perhaps with a smaller --num_proc"
                    ) from None
                if what == "unit":
                    report(value)
                elif what == "error":
                    raise ValueError(value)
                elif what == "bug":
                    raise RuntimeError(f"a worker process failed:\n{value}")
                elif waiting:
                    pipe.send(waiting.pop())
                else:
                    at_work.discard(pipe)

    try:
        yield run
    finally:
        for pipe, process in workers.items():
            pipe.close()  # at which an idle worker leaves
            process.join(0.2 if at_work else 10)
            process.terminate()


def _make_units_remotely(job):
    records = []
    try:
        make_units(job, records.append)
    except (ValueError, OSError) as e:
        return records, str(e)
    return records, None


@contextlib.contextmanager
def ray_workers(num_proc, address):
    """
    As local_workers, on a Ray cluster: the one at `address`, or a local one of num_proc workers. Every node needs this repository at the
    same place and the data folder on a file system they share, because units are written where they are made.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine=ray needs Ray: pip install ray") from None
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    if address:
        ray.init(address=address, runtime_env=here, log_to_driver=False)
    else:
        ray.init(num_cpus=num_proc, runtime_env=here, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(num_cpus=1)(_make_units_remotely)

    def run(jobs, report):
        pending = [remote.remote(job) for job in jobs]
        while pending:
            done, pending = ray.wait(pending)
            for records, error in ray.get(done):
                for record in records:
                    report(record)
                if error:
                    raise ValueError(error)

    try:
        yield run
    finally:
        ray.shutdown()
