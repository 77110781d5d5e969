"""
log.jsonl: one JSON object a line, each with the step it is of, and the picture of the losses in it.

train.py writes it; anything that reads JSON can read it. Read next: loop.py, which calls this.
"""

import contextlib
import json
import os

from smol.files import save_picture, write_whole


def append(entry, path):
    """
    Add a line, after a new line where a crash has cut off the last one. Returns what went wrong (a disk that is full), or None: a lost line
    is no reason to lose a run.
    """
    try:
        with open(path, "ab+") as f:  # writes go to the end, wherever one has read
            if f.tell():
                f.seek(-1, os.SEEK_END)
                f.write(b"" if f.read(1) == b"\n" else b"\n")
            f.write(json.dumps(entry).encode() + b"\n")
    except OSError as e:
        return f"could not write to {path}: {e.strerror}"
    return None


def read(path):
    """List of dict. Lines that were cut off by a crash or a full disk are left out; so is everything, if there is no such file."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def cut_back(path, last_step):
    """
    Move what came after a step, which will be logged again, from log.jsonl to the end of log.cut.jsonl: the
    run that goes on may end before the one that wrote it did. Leaves no file where there would be nothing in
    it. Raises OSError.
    """
    entries = read(path)
    kept = [entry for entry in entries if entry["iter"] <= last_step]
    if len(kept) < len(entries):
        with open(".cut".join(os.path.splitext(path)), "a", encoding="utf-8") as f:
            f.writelines(json.dumps(entry) + "\n" for entry in entries if entry["iter"] > last_step)
    if not kept:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return
    write_whole("".join(json.dumps(entry) + "\n" for entry in kept).encode(), path)


def draw_losses(out_dir):
    """out_dir/loss.png: the training loss, faint as it is and smoothed, and the validation loss of each source. Raises OSError."""
    from matplotlib.figure import Figure

    entries = read(os.path.join(out_dir, "log.jsonl"))
    steps = [(e["iter"], e["loss"]) for e in entries if e.get("loss") is not None]
    smooth, mean = [], None
    for _, loss in steps:
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        smooth.append(mean)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([i for i, _ in steps], [loss for _, loss in steps], color="0.8", lw=0.8)
    axes.plot([i for i, _ in steps], smooth, color="0.2", lw=1.5, label="training, smoothed")
    for source in sorted({name for e in entries for name in e.get("val_losses", {})}):
        points = [(e["iter"], e["val_losses"][source]) for e in entries if source in e.get("val_losses", {})]
        axes.plot(*zip(*points), marker="o", ms=3, lw=1, label=f"validation, {source}")
    axes.set(xlabel="step", ylabel="loss in nats", title=out_dir)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_picture(figure, os.path.join(out_dir, "loss.png"))
