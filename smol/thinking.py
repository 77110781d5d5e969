"""
The answer forming, step by step: a moving picture of what Route B thinks.

    python sample.py out/demo/route_b/ckpt.pt --task=sudoku4-0007 --gif=out/thinking.gif

Every frame is drawn from the probabilities of all values in all cells, so doubt can be seen: a digit is as bright as it is believed in,
a colour as pure. Between two supervision steps the picture glides from one to the other; below it are the steps taken and the
probability that the halting head gives the answer of being all right. Where the answer is known, cells still wrong at the end are framed:
wrong in what the last step says, whereas the model's answer is what its surest step says.

`thoughts` asks the model, `draw` makes one picture, `save_gif` the film. Before this: model_trm.py (`think`). Read next: sample.py.
"""

import functools
import io
import os

import numpy as np
import torch
import torch.nn.functional as F

from model_trm import ANSWER_IDS
from smol import arc
from smol.files import write_whole

WIDTH = 640  # pixels of the picture
FINE = 2  # drawn that much larger and then scaled down, so that edges are smooth
GLIDE, STEP_MS, HOLD_MS, FIRST_MS, LAST_MS = (
    5,
    55,
    300,
    900,
    2800,
)  # frames between two steps, and how long things stay
BACKGROUND, PANEL, INK, FAINT = "#0d1117", "#1a212c", "#e6edf3", "#6b7686"
TEAL, GOLD, CORAL = "#5eead4", "#fbbf24", "#fb7185"
OUTSIDE = "#131922"  # of the answer, on a canvas larger than it
GIVEN = "#293548"  # a sudoku's given cell
MAZE = ("#151b24", "#3a4658", "#34d399", "#fb7185", "#fbbf24")  # free, wall, start, goal, the way


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)


@torch.no_grad()
def thoughts(model, task, test=0, n_sup=None, halt=None):
    """
    What Route B thinks of one test input of a task: a list over supervision steps of (probabilities (H, W, 11) of the ten colours and of
    "outside the answer" in each cell of the canvas, halting probability). n_sup and halt as in `answer`.
    ValueError if the task does not fit into block_size, or the model's logits are not finite.
    """
    only = arc.Task(task.id, task.kind, task.train, [(task.test[test][0], np.zeros((1, 1), np.uint8))])
    for [(_, _, (H, W), start)], idx in model.canvases([only]):
        steps = []
        for _, y, probability in model.think(idx, n_sup, halt):
            logits = F.linear(y[0, start : start + H * (W + 1)], model.wte.weight[ANSWER_IDS]).float()
            if not (logits.isfinite().all() and probability.isfinite().all()):
                raise ValueError("the model's logits are not finite: there is nothing to draw")
            steps.append((logits.softmax(-1).view(H, W + 1, 11)[:, :W].cpu().numpy(), probability.item()))
        return steps
    raise ValueError(
        f"task {task.id} does not fit into this checkpoint's block_size={model.config.block_size}"
    )


@functools.cache
def font(size):
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(
        os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), round(size * FINE)
    )


def palette(kind):
    """Colours (11, 3) of the ten values and of what is outside the answer."""
    if kind == "sudoku":
        values = [PANEL] * 10
    elif kind == "maze":
        values = [*MAZE, *arc.PALETTE[5:]]
    else:
        values = list(arc.PALETTE)
    return np.array([rgb(c) for c in [*values, OUTSIDE]])


def board(pen, left, top, side, p, kind, given=None, wrong=None):
    """
    Draw p (H, W, 11) into the square of `side` pixels at (left, top). given (h, w): a sudoku's puzzle; wrong (H, W) bool: cells to frame.
    """
    H, W = p.shape[:2]
    box = int(round(H**0.5)) if kind == "sudoku" else 0
    wide = side * 0.018 if box else 0  # between the boxes of a sudoku
    cell = (side - wide * ((max(H, W) - 1) // box if box else 0)) / max(H, W)
    gap = cell * (0.05 if kind != "maze" else 0.03)
    left, top = left + (max(H, W) - W) * cell / 2, top + (max(H, W) - H) * cell / 2
    colours = p @ palette(kind)
    for r in range(H):
        for c in range(W):
            x, y = (
                left + c * cell + (c // box * wide if box else 0),
                top + r * cell + (r // box * wide if box else 0),
            )
            place = [v * FINE for v in (x + gap, y + gap, x + cell - gap, y + cell - gap)]
            is_given = given is not None and given[r, c] > 0
            fill = rgb(GIVEN) if is_given else colours[r, c]
            pen.rounded_rectangle(place, radius=cell * 0.14 * FINE, fill=tuple(fill.round().astype(int)))
            if kind == "sudoku":
                value = int(p[r, c, :10].argmax())
                sure = 1.0 if is_given else max(0.0, float(p[r, c, value]) * 1.12 - 0.12)
                ink = rgb(INK if is_given else TEAL) * sure + fill * (1 - sure)
                if value:
                    pen.text(
                        (place[0] / 2 + place[2] / 2, place[1] / 2 + place[3] / 2),
                        str(value),
                        anchor="mm",
                        font=font(cell * 0.5),
                        fill=tuple(ink.round().astype(int)),
                    )
            if wrong is not None and wrong[r, c]:
                pen.rounded_rectangle(
                    place, radius=cell * 0.14 * FINE, outline=CORAL, width=max(2, round(cell * 0.07 * FINE))
                )


def one_hot(grid, shape=None):
    """A grid as probabilities: all sure; outside it, outside the answer."""
    H, W = shape or grid.shape
    p = np.zeros((H, W, 11))
    p[..., 10] = 1
    p[: grid.shape[0], : grid.shape[1]] = np.eye(11)[grid]
    return p


def draw(task, test, p, halt, step, n_steps, verdict=None, wrong=None):
    """One frame, a PIL image. step may lie between two whole ones; verdict: (words, colour) or None."""
    from PIL import Image, ImageDraw

    question = task.test[test][0]
    strip = 118 if task.train else 0  # the demonstrations
    side, edge = WIDTH - 2 * 60, 60
    top = 92 + strip
    height = top + side + 118
    image = Image.new("RGB", (WIDTH * FINE, height * FINE), BACKGROUND)
    pen = ImageDraw.Draw(image)

    def write(x, y, words, size, colour=INK, anchor="lm"):
        pen.text((x * FINE, y * FINE), words, font=font(size), fill=colour, anchor=anchor)

    write(edge, 40, task.id.split(":")[0], 22)
    words, colour = verdict or ("thinking" + "." * (1 + int(3 * step) % 3), FAINT)
    write(WIDTH - edge, 40, words, 18, colour, "rm")
    write(edge, 68, "one small network, its own answer, again and again", 12.5, FAINT)
    if strip:
        shown = [*task.train[:3]]
        each = (WIDTH - 2 * edge) / (len(shown) + 1)
        small = min(84, each / 2 - 16)
        for i, (x, y) in enumerate([*shown, (question, None)]):
            a = edge + i * each
            board(pen, a, 96, small, one_hot(x), task.kind)
            write(a + small + 9, 96 + small / 2, "›", 18, FAINT, "mm")
            if y is not None:
                board(pen, a + small + 18, 96, small, one_hot(y), task.kind)
            else:
                write(a + small + 18 + small / 2, 96 + small / 2, "?", 30, GOLD, "mm")
    board(pen, edge, top, side, p, task.kind, question if task.kind == "sudoku" else None, wrong)

    y = top + side + 38
    write(edge, y, f"step {max(0, round(step + 0.49)) if step else 0} of {n_steps}", 15)
    write(
        WIDTH - edge,
        y,
        f"{halt:.0%} sure that all is right" if step else "",
        15,
        TEAL if halt > 0.5 else FAINT,
        "rm",
    )
    y += 30
    pen.rounded_rectangle([v * FINE for v in (edge, y - 3, WIDTH - edge, y + 3)], radius=3 * FINE, fill=PANEL)
    if halt * step > 0:
        end = edge + max(6, (WIDTH - 2 * edge) * halt * min(1, step))
        pen.rounded_rectangle([v * FINE for v in (edge, y - 3, end, y + 3)], radius=3 * FINE, fill=TEAL)
    y += 24
    for i in range(n_steps):
        x, r = edge + 6 + i * min(22, (WIDTH - 2 * edge - 12) / max(1, n_steps - 1)), 4
        reached = min(1.0, max(0.0, step - i))
        colour = rgb(PANEL) * (1 - reached) + rgb(GOLD) * reached
        pen.ellipse([v * FINE for v in (x - r, y - r, x + r, y + r)], fill=tuple(colour.round().astype(int)))
    return image.resize((WIDTH, height), Image.Resampling.LANCZOS)


def film(task, test, steps):
    """-> (frames, milliseconds each), from what `thoughts` returned."""
    question, expected = task.test[test]
    H, W = steps[0][0].shape[:2]
    before = one_hot(question, (H, W)) if task.kind != "arc" else one_hot(np.zeros((0, 0), np.uint8), (H, W))
    frames, times, last = [draw(task, test, before, 0.0, 0.0, len(steps))], [FIRST_MS], (before, 0.0)
    for k, (p, halt) in enumerate(steps):
        for i in range(1, GLIDE + 1):
            t = i / GLIDE
            t = t * t * (3 - 2 * t)  # slowly off, slowly on
            frames.append(
                draw(task, test, last[0] * (1 - t) + p * t, last[1] * (1 - t) + halt * t, k + t, len(steps))
            )
            times.append(STEP_MS)
        times[-1] = HOLD_MS
        last = p, halt
    p, halt = last
    target = (
        arc.canvas_target(expected, (H, W)).reshape(H, W + 1)[:, :W]
        if all(np.array(expected.shape) <= (H, W))
        else None
    )
    wrong = np.ones((H, W), bool) if target is None else np.array(ANSWER_IDS)[p.argmax(-1)] != target
    verdict = (
        ("solved", TEAL) if not wrong.any() else (f"{int(wrong.sum())} of {wrong.size} cells wrong", CORAL)
    )
    frames.append(draw(task, test, p, halt, float(len(steps)), len(steps), verdict, wrong))
    return frames, [*times, LAST_MS]


def save_gif(task, test, steps, path):
    """Write the film of one test input to `path`, whole or not at all; it plays for ever."""
    from PIL import Image

    frames, times = film(task, test, steps)
    # One palette for all frames, since frames that each choose their own flicker: of the last, the middle, the first, and of all shades
    # that writing has, which is too small to be given colours otherwise.
    w, h = frames[0].size
    sample = Image.new("RGB", (w, 4 * h))
    for i, frame in enumerate((frames[-1], frames[len(frames) // 2], frames[0])):
        sample.paste(frame, (0, i * h))
    for i, colour in enumerate(inks := (INK, FAINT, TEAL, GOLD, CORAL)):
        for j in range(16):
            shade = rgb(BACKGROUND) * (15 - j) / 15 + rgb(colour) * j / 15
            place = (
                j * w // 16,
                3 * h + i * h // len(inks),
                (j + 1) * w // 16,
                3 * h + (i + 1) * h // len(inks),
            )
            sample.paste(tuple(shade.round().astype(int)), place)
    shared = sample.quantize(255, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=shared, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=False
    )
    write_whole(buffer.getvalue(), path)
