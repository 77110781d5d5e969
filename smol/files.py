"""
Writing a file so that whoever looks, and whoever comes after a crash, sees the old one or the whole new one;
and a folder for one process at a time.

Used by everything that writes reports, pictures, settings and stages. Read next: checkpoint.py, which does
the same for what is too large to hold twice.
"""

import fcntl
import io
import os


def write_whole(data, path):
    """
    bytes -> a file, whole or not at all: beside, to disk, renamed. OSError where it cannot be, and nothing is
    left behind.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder: give the name of the file to write")
    # with the process in its name: a worker that outlived a killed build may be writing the same bytes to the
    # same place
    beside = f"{path}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(beside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):  # a full disk: leave room for whoever tries to save something
            os.remove(beside)


def lock(folder, who):
    """
    Make the folder, and hold it until the file that is returned is closed or this process ends: two of `who`
    in one would write the same files. ValueError where another is, OSError where it cannot be written to.
    """
    os.makedirs(folder, exist_ok=True)
    f = open(os.path.join(folder, f".{who}.lock"), "w")  # noqa: SIM115 (open as long as the lock is held)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another {who} is at work in {folder}/: wait for it, or use another folder"
        ) from None
    except OSError:  # a file system without locks: there a person has to take care
        pass
    return f


def save_picture(figure, path, dpi=130):
    """A matplotlib Figure -> a png. OSError as above."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(buffer.getvalue(), path)
