"""
One checkpoint at work: text from a prompt, or a task solved before your eyes.

    python sample.py out/demo/route_a/ckpt.pt --prompt="Question: Ada has 3"      text, streamed as it is drawn
    python sample.py out/demo/route_b/ckpt.pt --task=sudoku4-0007                 a held-out puzzle (sudoku4, sudoku9, maze, transforms)
    python sample.py out/demo/route_b/ckpt.pt --task=00576224                     a task of ARC-AGI-1 or ARC-AGI-2
    python sample.py out/demo/route_b/ckpt.pt --task=sudoku4-0007 --gif=out/thinking.gif     the same as a moving picture

A task is printed as coloured grids: its demonstrations, then for each test input what is expected beside what the model answers, with
wrong cells marked ><. Route B's answer is shown after every supervision step, with the probability that its halting head gives the
answer of being all right; with --halt=0.9 it stops there once that is above 0.9.

Read next: eval_arc.py, which does this for whole suites and counts.
"""

import argparse
import codecs
import math
import os
import sys

import numpy as np
import torch

from configurator import positive
from model_trm import surest
from smol import arc, checkpoint, puzzles, thinking
from smol import tokenizer as tok
from smol.runtime import pick_device
from smol.solve import without_answers

# -----------------------------------------------------------------------------
# text


def text_of(ids):
    """
    ids, one at a time -> pieces of text, as soon as they are whole characters: one character may take several tokens, and half of it
    is held back. Bytes that never become a character are left out. Ends at the end of text.
    """
    enc, decoder = tok.load(), codecs.getincrementaldecoder("utf-8")("ignore")
    for token in ids:
        if token == tok.EOT:
            return
        piece = decoder.decode(enc.decode_single_token_bytes(token))
        if piece:
            yield piece


def stream_text(model, prompt, args):
    """Print the prompt and what the model makes of it, num_samples times."""
    device = model.wte.weight.device
    # A document starts where another has ended: that is how training saw it
    idx = torch.tensor([[tok.EOT, *tok.load().encode_ordinary(prompt)]], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    for i in range(args.num_samples):
        print(("-" * 20 + "\n" if i else "") + prompt, end="", flush=True)
        drawn = model.generate(
            idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator=generator
        )
        for piece in text_of(ids.item() for ids in drawn):
            print(piece, end="", flush=True)
        print()


# -----------------------------------------------------------------------------
# tasks


def find_task(task_id):
    """A held-out puzzle by its suite and number ('maze-0007'), else an ARC task by its id. ValueError naming what comes close."""
    suite, dash, name = task_id.partition("-")
    if not dash:
        return arc.find(task_id)
    count = len(name) - len(name.lstrip("0123456789"))
    number, most = int(name[:count] or -1), puzzles.HELD_OUT_N.get(suite, 0)
    if suite in puzzles.SUITES and not 0 <= number < most:
        raise ValueError(
            f"no held-out puzzle has the id {task_id!r}: those of {suite} are {suite}-0000 to {suite}-{most - 1:04d}"
        )
    task = puzzles.heldout(suite, number + 1)[-1]
    if name[count:] and task.id != task_id:  # a transform's program may be left out, but not be another
        raise ValueError(
            f"no held-out puzzle has the id {task_id!r}: number {number} of {suite} is {task.id}"
        )
    return task


def verdict(grid, expected):
    """How an answer did, in words."""
    if grid is None:
        return "no answer"
    if grid.shape != expected.shape:
        return "wrong: {}x{}, where {}x{} is expected".format(*grid.shape, *expected.shape)
    wrong = int(arc.wrong_cells(grid, expected).sum())
    return f"wrong in {wrong} of {expected.size} cells" if wrong else "correct"


def show_task(model, task, n_sup, halt=None):
    """Print the task and the model's answers. ValueError, before anything is printed, if it does not fit into block_size."""
    canvas = model.puzzle_format == "canvas"
    needed = max(
        sum(arc.prompt_and_room(task.kind, task.train, x, model.puzzle_format)) for x, _ in task.test
    )
    if needed > model.config.block_size:
        raise ValueError(
            f"task {task.id} takes {needed:,} tokens with room for the answer, and this checkpoint reads at most "
            f"{model.config.block_size:,} (its block_size)"
        )
    print(f"{task.id}   {needed:,} tokens\n")
    for i, (x, y) in enumerate(task.train, 1):
        print(arc.ansi_row([(f"demo {i}", x, None), ("output", y, None)]), flush=True)
    hidden = without_answers([task])
    asked = model.answer(hidden, n_sup=n_sup, trace=True, halt=halt)[0] if canvas else model.answer(hidden)[0]
    for j, ((x, y), given) in enumerate(zip(task.test, asked), 1):
        panels = [(f"test {j}" if task.train else "puzzle", x, None), ("expected", y, None)]
        if canvas:
            given = [(grid if math.isfinite(halt) else None, halt) for grid, halt in given]
            panels += [
                (f"step {step}, halt {halt:.2f}", grid, y) for step, (grid, halt) in enumerate(given, 1)
            ]
        else:
            given = [answer for answer in given if answer is not None]  # None: its numbers are not finite
            panels += [(f"answer, p {np.exp(log_p):.2g}", grid, y) for grid, log_p in given[:1]]
        print(arc.ansi_row(panels))
        answers = surest(given) if canvas else given
        last = (
            f", the surest answer of {len(given)} supervision step{'s' * (len(given) > 1)}" if canvas else ""
        )
        print(f"test {j} of {len(task.test)}{last}: {verdict(answers[0][0] if answers else None, y)}\n")


# -----------------------------------------------------------------------------
# the command


def run(args):
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature={args.temperature} must be 0 (always the likeliest token) or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p={args.top_p} must be above 0 and at most 1")
    if not 0 <= args.seed < 1e18:
        raise ValueError(f"--seed={args.seed} must be in [0, 1e18)")
    task = find_task(args.task) if args.task is not None else None
    model, ckpt = checkpoint.load_model(args.checkpoint, pick_device(args.device))
    if args.n_sup and (task is None or ckpt["model"] != "trm"):
        raise ValueError(
            "--n_sup is about the supervision steps that Route B takes on a --task, and does nothing here"
        )
    if (args.gif or args.halt) and (task is None or ckpt["model"] != "trm"):
        raise ValueError(
            "--gif and --halt are about the supervision steps that Route B takes on a --task: give a checkpoint of Route B "
            "and a task"
        )
    if args.gif and os.path.isdir(args.gif):
        raise ValueError(f"--gif={args.gif} is a folder: give the name of the file to write")
    if task is None:
        stream_text(model, args.prompt or "", args)
        return
    show_task(model, task, args.n_sup, args.halt)
    if args.gif:
        thinking.save_gif(task, 0, thinking.thoughts(model, task, 0, args.n_sup, args.halt), args.gif)
        print(f"moving picture{' of test 1' if len(task.test) > 1 else ''}: {args.gif}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"error: {message}; see python sample.py --help")
    parser.add_argument("checkpoint", metavar="CKPT", help="a ckpt.pt that train.py wrote")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to go on from (default: the start of a new document)")
    what.add_argument(
        "--task",
        metavar="ID",
        help="an ARC task, such as 00576224, or a held-out puzzle, such as sudoku4-0007",
    )
    parser.add_argument(
        "--max_new_tokens", metavar="N", type=positive, default=200, help="longest text drawn (default 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="lower is safer, 0 always draws the likeliest token (default 0.8)",
    )
    parser.add_argument(
        "--top_k",
        metavar="N",
        type=positive,
        default=200,
        help="draw from the N likeliest tokens (default 200)",
    )
    parser.add_argument(
        "--top_p",
        metavar="P",
        type=float,
        help="draw from the likeliest tokens that have a probability of P together",
    )
    parser.add_argument(
        "--seed", type=int, default=1337, help="the same seed draws the same text (default 1337)"
    )
    parser.add_argument(
        "--num_samples", metavar="N", type=positive, default=1, help="how many texts (default 1)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)"
    )
    parser.add_argument(
        "--n_sup",
        metavar="N",
        type=positive,
        help="supervision steps of Route B on a task (default: as it was trained)",
    )
    parser.add_argument(
        "--halt", metavar="P", type=float, help="Route B on a task: stop once it gives its answer more than P"
    )
    parser.add_argument(
        "--gif", metavar="PATH", help="Route B on a task: write a moving picture of the answer as it forms"
    )
    args = parser.parse_args()
    sys.stdout.reconfigure(
        errors="replace"
    )  # a terminal that cannot show a character gets a question mark, not an exception
    try:
        run(args)
    except BrokenPipeError:  # whoever was reading (head, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
