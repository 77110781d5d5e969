"""
Writing a file so that whoever looks, and whoever comes after a crash, sees the old one or the whole new one.

Used by everything that writes reports, pictures, settings and stages. Read next: checkpoint.py, which does
the same for what is too large to hold twice.
"""

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


def save_picture(figure, path, dpi=130):
    """A matplotlib Figure -> a png. OSError as above."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(buffer.getvalue(), path)
