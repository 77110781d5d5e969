"""
A text model of Hugging Face's as a teacher of distill.py: grids written as plain text, one token of GPT-2's for one cell.

    pip install transformers
    python distill.py config/distill_route_a.py --teacher=hf:gpt2

Whether its tokens are GPT-2's is compared, not assumed: all 50,257 of them, and how it cuts a text. Before this: teachers.py.
"""

import numpy as np
import torch

from smol import arc
from smol import tokenizer as tok
from smol.engine import batches_by_length, write_grids
from smol.teachers import document, frame_of_answer, prompt

# How a grid puzzle reads as text. One piece per reserved token; a cell is the one token " 0".." 9" of GPT-2, the end of a row its "\n",
# the end of an answer its <|endoftext|>.
PIECES = {
    tok.ARC: "Puzzle\n",
    tok.SUDOKU: "Sudoku\n",
    tok.MAZE: "Maze\n",
    tok.LOGIC: "Logic\n",
    tok.PROGRAM: "Program\n",
    tok.INPUT: "Input:\n",
    tok.OUTPUT: "Output:\n",
    tok.ROW: "\n",
    **{tok.CELL0 + c: f" {c}" for c in range(10)},
}


def render(ids):
    """A document or prompt, ids (T,) of ours, as plain text; the EOT of a whole document is left out. ValueError for what has no text."""
    ids = [i for i in map(int, ids) if i != tok.EOT]
    unknown = [i for i in ids if i not in PIECES]
    if unknown:
        raise ValueError(f"token {unknown[0]} is no part of a puzzle that can be written as text")
    return "".join(PIECES[i] for i in ids)


class HuggingFace:
    """
    A causal language model in a folder or on the hub, through `transformers`. With GPT-2's vocabulary (compared token by token) it is
    used as it is. One of another vocabulary is refused, unless vocabulary="cells" and the cell map is exact for it: each piece of PIECES
    is the same tokens alone as inside a text, and each cell and row end one token; then only these tokens are ever compared.
    """

    conditional, sources = True, ()

    def __init__(self, name, device, dtype="float32", vocabulary="same"):
        try:
            import transformers
        except ImportError:
            raise ValueError(
                f"teacher {name} needs a package that is not installed: pip install transformers"
            ) from None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            encoder = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        except Exception as e:  # noqa: BLE001 (a broken folder fails in any way it likes)
            why = (str(e).strip().splitlines() or [""])[0]
            raise ValueError(
                f"teacher {name} cannot be loaded by transformers ({type(e).__name__}): {why:.200}"
            ) from None
        differs = vocabulary_differs(encoder)
        if differs and vocabulary != "cells":
            raise ValueError(
                f"teacher {name} has another vocabulary than GPT-2's: {differs}. If the cell map is exact for it, "
                "--teacher_vocabulary=cells uses it for grids alone"
            )
        self.ids = {token: encoder.encode(piece, add_special_tokens=False) for token, piece in PIECES.items()}
        self.end = tok.EOT if not differs else encoder.eos_token_id
        self.check_map(encoder, name)
        vocabulary_size = self.model.get_output_embeddings().weight.shape[0]
        if max(self.end, *(i for ids in self.ids.values() for i in ids)) >= vocabulary_size:
            raise ValueError(
                f"teacher {name} has {vocabulary_size:,} outputs, too few for its tokenizer: they do not belong together"
            )
        self.model.to(device).eval().requires_grad_(False)
        self.outcomes = torch.tensor(
            [*(self.ids[tok.CELL0 + c][0] for c in range(10)), self.ids[tok.ROW][0], self.end], device=device
        )
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        self.about = {
            "kind": "huggingface",
            "path": str(name),
            "model": self.model.config.model_type,
            "parameters": self.model.num_parameters(),
            "tokenizer": tok.fingerprint() if not differs else f"another one: {differs}",
        }

    def check_map(self, encoder, name):
        """ValueError unless the map is exact: a text of pieces is the tokens of its pieces, and a cell, and a row's end, is one of them."""
        many = [PIECES[t] for t in (*range(tok.CELL0, tok.CELL0 + 10), tok.ROW) if len(self.ids[t]) != 1]
        if many or self.end is None:
            raise ValueError(
                f"the cell map is not exact for teacher {name}: "
                + (f"{many[0]!r} is not one token" if many else "it has no token for the end of a text")
            )
        grids = [
            np.arange(10, dtype=np.uint8).reshape(2, 5),
            np.zeros((3, 1), np.uint8),
            np.full((1, 3), 9, np.uint8),
        ]
        for kind in arc.KINDS:
            ids = arc.encode(kind, [(x, y) for x in grids for y in grids])[:-1]
            if encoder.encode(render(ids), add_special_tokens=False) != self.tokens(ids):
                raise ValueError(
                    f"the cell map is not exact for teacher {name}: its tokenizer joins pieces of a grid"
                )

    def tokens(self, ids):
        """ids of ours, without EOT -> list of the teacher's."""
        return [i for token in map(int, ids) for i in self.ids[token]]

    @torch.no_grad()
    def log_probs(self, tasks, answers):
        """For each (P, 12), at the P tokens of its answer: log-probabilities, of the whole vocabulary, of cells, row end, end; or None."""
        out, rows = [None] * len(tasks), []
        for i, (task, answer) in enumerate(zip(tasks, answers)):
            if answer is not None:
                ids = self.tokens(document(task, answer)[:-1])
                if len(ids) <= self.context:
                    rows.append((i, torch.tensor(ids), answer.shape[0] * (answer.shape[1] + 1) + 1))
        for part in batches_by_length(rows, lambda row: len(row[1])):
            idx = torch.nn.utils.rnn.pad_sequence([ids for _, ids, _ in part], batch_first=True).to(
                self.outcomes.device
            )
            seen = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(ids) for _, ids, _ in part], batch_first=True
            ).to(idx.device)
            logits = self.model(idx, attention_mask=seen).logits
            for row, (i, ids, n) in zip(logits, part):
                out[i] = row[len(ids) - n : len(ids)].float().log_softmax(-1)[:, self.outcomes].cpu()
        return out

    def frames(self, tasks, answers):
        frames = [None] * len(tasks)
        for i, (answer, log_p) in enumerate(zip(answers, self.log_probs(tasks, answers))):
            if log_p is not None:
                h, w = answer.shape
                first = torch.arange(len(log_p)) % (w + 1) == 0
                over = torch.where(first, log_p[:, 11], log_p[:, 10])[:, None]
                frames[i] = frame_of_answer(torch.cat([log_p[:, :10], over], 1).log_softmax(-1), h, w)
        return frames

    @torch.no_grad()
    def write(self, tasks):
        """Greedily, under the grammar of grids, with the model's own caches."""
        grids, rows = [None] * len(tasks), []
        for i, task in enumerate(tasks):
            ids, limit = self.tokens(prompt(task)), arc.canvas_shape(task.train, task.test[0][0])
            if len(ids) + limit[0] * (limit[1] + 1) <= self.context:
                rows.append((i, ids, limit))
        for part in batches_by_length(rows, lambda row: len(row[1]) + row[2][0] * (row[2][1] + 1)):
            longest = max(len(ids) for _, ids, _ in part)
            idx = torch.tensor(
                [[0] * (longest - len(ids)) + ids for _, ids, _ in part], device=self.outcomes.device
            )
            seen = torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for _, ids, _ in part], device=idx.device
            )
            state = {"past": None, "seen": seen}

            def read(new):
                at = (state["seen"].cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
                out = self.model(
                    new,
                    attention_mask=state["seen"],
                    position_ids=at,
                    past_key_values=state["past"],
                    use_cache=True,
                )
                state["past"] = out.past_key_values
                return out.logits[:, -1][:, self.outcomes]

            def read_on(drawn):
                state["seen"] = torch.cat([state["seen"], torch.ones_like(state["seen"][:, :1])], 1)
                return read(self.outcomes[drawn.to(self.outcomes.device)][:, None])

            for (i, *_), answer in zip(part, write_grids(read(idx), read_on, [limit for *_, limit in part])):
                grids[i] = answer and answer[0]
        return grids


def vocabulary_differs(encoder):
    """What differs between a Hugging Face tokenizer's first 50,257 tokens and GPT-2's, in words; None where nothing does."""
    enc = tok.load()
    theirs = {i: token for token, i in encoder.get_vocab().items()}
    letters = bytes_as_letters()
    wrong = []
    for i in range(tok.N_GPT2):
        ours = (
            "<|endoftext|>" if i == tok.EOT else "".join(letters[b] for b in enc.decode_single_token_bytes(i))
        )
        if theirs.get(i) != ours:
            wrong.append((i, ours, theirs.get(i)))
    if not wrong:
        text = "A probe: 3 + 41 = 44,\n\n  isn't it?\n 0 1 2\n"  # the same tokens, but are texts cut into them in the same way?
        same = encoder.encode(text, add_special_tokens=False) == enc.encode_ordinary(text)
        return None if same else "its tokens are the same, but it cuts text into them differently"
    i, ours, other = wrong[0]
    return f"{len(wrong):,} of {tok.N_GPT2:,} tokens differ, the first is {i}: {other!r} there, {ours!r} here (of {len(theirs):,} there)"


def bytes_as_letters():
    """The letters that GPT-2's vocabulary files write bytes with: printable ones as they are, the others counted up from 256."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
