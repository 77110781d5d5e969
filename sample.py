"""
One checkpoint at work: text from a prompt, or a task solved before your eyes.

    python sample.py out/demo/route_a/ckpt.pt --prompt="Question: Ada has 3"      text, as it is drawn
    python sample.py out/demo/route_b/ckpt.pt --task=sudoku4-0007      a held-out puzzle
    python sample.py out/demo/route_b/ckpt.pt --task=00576224          a task of ARC-AGI-1 or ARC-AGI-2
    python sample.py out/demo/route_b/ckpt.pt --task=sudoku4-0007 --gif=out/steps.gif      as a moving picture

A task is printed as coloured grids: its demonstrations, then for each test input what is expected beside what
the model answers, with wrong cells marked ><. Route B's answer is shown after every supervision step, with
the probability that its halting head gives it.

Read next: eval_arc.py, which does this for whole suites and counts.
"""

import codecs
import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import configurator
from smol import arc, checkpoint, engine, files, runtime, solve, suites
from smol import tokenizer as tok
from smol.engine import ANSWER_IDS, NOISE, chosen_rollout, ranked

prompt = ""  # text to go on from; empty: a new document
task = ""  # an ARC task, such as 00576224, or a held-out puzzle, such as sudoku4-0007
gif = ""  # Route B on a task: write a moving picture of its first test output as it forms
max_new_tokens = 200
temperature = 0.8  # 0 always takes the likeliest token
top_k: int | None = 200  # draw from the k likeliest tokens
top_p: float | None = None  # draw from the fewest likeliest tokens that have a probability of p together
num_samples = 1  # texts
n_sup: int | None = None  # Route B on a task: supervision steps; None: as it was trained
halt: float | None = None  # Route B on a task: stop when the halting head gives the answer more than this
n_rollouts = 1  # Route B on a task: answers, all but the first with noise, that vote
noise = NOISE  # of the others, on z, which has size 1
seed = 1337
device = "auto"  # cpu, cuda, cuda:1; auto: the GPU where there is one

RANGES = {
    "[1, inf)": "max_new_tokens top_k num_samples n_sup n_rollouts",
    "[0, inf)": "temperature noise seed",
    "(0, 1]": "top_p",
    "[0, 1]": "halt",
}

# -----------------------------------------------------------------------------
# text


def text_of(ids):
    """
    ids, one at a time -> pieces of text, as soon as they are whole characters: a character may take several
    tokens. Bytes that never become a character are left out. Ends at <|endoftext|>.
    """
    encoding, decoder = tok.load(), codecs.getincrementaldecoder("utf-8")("ignore")
    for token in ids:
        if token == tok.EOT:
            return
        if piece := decoder.decode(encoding.decode_single_token_bytes(token)):
            yield piece


def stream_text(model, c):
    """Print the prompt and what the model makes of it, num_samples times."""
    where = model.wte.weight.device
    idx = torch.tensor([[tok.EOT, *tok.load().encode_ordinary(c.prompt)]], device=where)
    generator = torch.Generator(where).manual_seed(c.seed)
    options = c.temperature, c.top_k, c.top_p
    for i in range(c.num_samples):
        print("-" * 20 + "\n" if i else "", c.prompt, sep="", end="", flush=True)
        drawn = engine.generate(model, idx, c.max_new_tokens, *options, generator=generator)
        for piece in text_of(ids.item() for ids in drawn):
            print(piece, end="", flush=True)
        print()


# -----------------------------------------------------------------------------
# tasks


def find_task(task_id):
    """A held-out puzzle by its suite and number ('maze-0007'), else an ARC task by its id. ValueError."""
    suite, dash, number = task_id.partition("-")
    if not dash:
        return arc.find(task_id)
    if suite not in suites.ON_GRIDS:
        raise ValueError(f"no suite of grids is called {suite!r}: there are {', '.join(suites.ON_GRIDS)}")
    number, tasks = number.partition(":")[0], suites.load(suite)  # a transform's id goes on with its program
    if not (number.isdecimal() and int(number) < len(tasks)):
        raise ValueError(f"{task_id!r} is none of {tasks[0].id} to {tasks[-1].id}")
    return tasks[int(number)]


def show_task(model, task, c):
    """Print the task and the model's answers. ValueError, before anything is printed, if it does not fit."""
    canvas = model.puzzle_format == "canvas"
    room = [arc.prompt_and_room(task.kind, task.train, x, model.puzzle_format) for x, _ in task.test]
    needed = max(map(sum, room))
    if needed > model.config.block_size:
        limit = f"this checkpoint reads at most {model.config.block_size:,} (its block_size)"
        raise ValueError(f"task {task.id} takes {needed:,} tokens with room for the answer, and {limit}")
    print(f"{task.id}   {needed:,} tokens\n")
    for i, (x, y) in enumerate(task.train, 1):
        print(arc.ansi_row([(f"demo {i}", x, None), ("output", y, None)]), flush=True)
    how = {**solve.for_route_b(c), "trace": True} if canvas else {}
    (answers,) = model.answer(solve.without_answers([task]), **how)
    for j, ((x, y), given) in enumerate(zip(task.test, answers), 1):
        panels = [(f"test {j}" if task.train else "puzzle", x, None), ("expected", y, None)]
        if canvas:
            shown = chosen_rollout(given, c.n_rollouts)
            panels += [(f"step {n}, halt {p:.2f}", grid, y) for n, (grid, p) in enumerate(shown, 1)]
            given = ranked(given, c.n_rollouts)
            last = f", the answer with the highest halting probability of {len(shown)} steps"
            if c.n_rollouts > 1 and given:
                last += f", of {given[0][2]} of {c.n_rollouts} rollouts"
        else:
            panels += [(f"answer, p {np.exp(log_p):.2g}", grid, y) for grid, log_p in given]
            last = ""
        print(arc.ansi_row(panels))
        print(f"test {j} of {len(task.test)}{last}: {arc.verdict(given[0][0] if given else None, y)}\n")


# -----------------------------------------------------------------------------
# a moving picture of Route B's supervision steps

SIDE, EDGE = 520, 40  # pixels of the canvas and around it
GLIDE = 5  # frames from one step to the next
DARK, PANEL, INK, GOOD, BAD = (13, 17, 23), (41, 53, 72), (230, 237, 243), (94, 234, 212), (251, 113, 133)


@torch.no_grad()
def canvas_steps(model, task, n_sup=None, halt=None, n_rollouts=1, noise=NOISE, seed=0):
    """
    After each supervision step of the rollout that is shown, on the first test input: the probabilities
    (H, W, 11) of ten colours and of "outside the answer" in each cell, and the halting probability.
    ValueError if logits are not finite.
    """
    one = arc.Task(task.id, task.kind, task.train, task.test[:1])
    rollouts = [[] for _ in range(n_rollouts)]
    for [(_, _, (H, W), start)], idx in engine.canvases(model, solve.without_answers([one])):
        for _, y, p in model.answer_steps(idx, n_sup, halt, n_rollouts, noise, seed):
            logits = F.linear(y[:, start : start + H * (W + 1)], model.wte.weight[ANSWER_IDS]).float()
            if not (logits.isfinite().all() and p.isfinite().all()):
                raise ValueError("the model's logits are not finite: there is nothing to draw")
            cells = logits.softmax(-1).view(n_rollouts, H, W + 1, 11)[:, :, :W].cpu().numpy()
            for steps, step in zip(rollouts, zip(cells.argmax(-1), p.tolist(), cells)):
                steps.append(step)
    return [(cells, p) for _, p, cells in chosen_rollout(sum(rollouts, []), n_rollouts)]


def draw(task, cells, words, wrong=None):
    """
    One frame, a PIL image. cells (H, W, 11): a colour is as pure, a sudoku's digit as bright, as it is
    probable. wrong (H, W) bool: cells to frame.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    palette = np.array([*(list(bytes.fromhex(colour[1:])) for colour in arc.PALETTE), DARK])  # (11, 3)
    font_file = os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    image = Image.new("RGB", (SIDE + 2 * EDGE, SIDE + 3 * EDGE), DARK)
    pen = ImageDraw.Draw(image)
    pen.text((EDGE, EDGE / 2), task.id.partition(":")[0], INK, ImageFont.truetype(font_file, 18), "lm")
    pen.text((EDGE, SIDE + 2 * EDGE), words, INK, ImageFont.truetype(font_file, 18), "lm")
    given, size = task.test[0][0], SIDE / max(cells.shape[:2])
    for (r, c), value in np.ndenumerate(cells[..., :10].argmax(-1)):
        x, y = EDGE + c * size, EDGE + r * size
        box = [x + 1, y + 1, x + size - 2, y + size - 2]
        if task.kind == "sudoku":
            pen.rectangle(box, PANEL if given[r, c] else DARK, outline=PANEL)
            ink = np.array(INK if given[r, c] else GOOD) * cells[r, c, value] if value else np.array(DARK)
            font = ImageFont.truetype(font_file, round(size / 2))
            pen.text((x + size / 2, y + size / 2), str(value), tuple(ink.astype(int)), font, "mm")
        else:
            pen.rectangle(box, tuple((cells[r, c] @ palette).astype(int)), outline=PANEL)
        if wrong is not None and wrong[r, c]:
            pen.rectangle(box, outline=BAD, width=3)
    return image


def save_gif(task, steps, path):
    """The film of what `canvas_steps` returned, gliding from step to step, what is wrong at last framed."""
    from PIL import Image

    question, expected = task.test[0]
    H, W = steps[0][0].shape[:2]

    def certain(grid):
        cells = np.zeros((H, W, 11))
        cells[..., 10] = 1
        cells[: grid.shape[0], : grid.shape[1]] = np.eye(11)[grid]
        return cells

    before = certain(question)
    frames, milliseconds = [draw(task, before, f"step 0 of {len(steps)}")], [900]
    for n, (cells, p) in enumerate(steps, 1):
        for t in np.arange(1, GLIDE + 1) / GLIDE:
            words = f"step {n} of {len(steps)}: halting probability {p:.2f}"
            frames.append(draw(task, before * (1 - t) + cells * t, words))
            milliseconds.append(55 if t < 1 else 300)
        before = cells
    n, (cells, _) = max(enumerate(steps, 1), key=lambda step: (step[1][1], step[0]))  # the answer
    if expected.shape[0] <= H and expected.shape[1] <= W:
        wrong = cells.argmax(-1) != certain(expected).argmax(-1)
    else:
        wrong = np.ones((H, W), dtype=bool)
    verdict = f"{wrong.sum()} of {wrong.size} cells wrong" if wrong.any() else "solved"
    frames.append(draw(task, cells, f"step {n}, the surest: {verdict}", wrong))
    sheet = np.concatenate([np.asarray(frame) for frame in frames[:: -max(1, len(frames) // 4)]])
    colours = Image.fromarray(sheet).quantize(255)  # for all frames: each with its own would flicker
    frames = [frame.quantize(palette=colours, dither=0) for frame in frames]
    buffer = io.BytesIO()
    options = dict(append_images=frames[1:], duration=[*milliseconds, 2800], loop=0)
    frames[0].save(buffer, "gif", save_all=True, **options)
    files.write_whole(buffer.getvalue(), path)


# -----------------------------------------------------------------------------


def main(argv):
    config, words = configurator.read(globals(), argv, usage="CKPT")
    c = SimpleNamespace(**config)
    if len(words) != 1:
        raise ValueError(f"name one checkpoint, a ckpt.pt that train.py wrote, not {len(words)}")
    if c.prompt and c.task:
        raise ValueError("--prompt is for text, --task for puzzles: give one of them")
    task = find_task(c.task) if c.task else None
    model, _ = checkpoint.load_model(words[0], runtime.pick_device(c.device))
    if (c.gif or solve.asks_for_route_b(c)) and not (task and model.puzzle_format == "canvas"):
        raise ValueError("--n_sup, --halt, --n_rollouts, --noise and --gif are about Route B on a --task")
    if task is None:
        stream_text(model, c)
        return
    show_task(model, task, c)
    if c.gif:
        save_gif(task, canvas_steps(model, task, **solve.for_route_b(c)), c.gif)
        print(f"moving picture: {c.gif}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without a character shows a question mark
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
