"""curate.py: its measures are those that the papers describe, near-duplicates and quotations are found, and nothing else is."""

import importlib
import inspect
import pydoc_data.topics
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from smol import arc, curate, puzzles, sources, suites, units

PROSE = [curate.normalise(text) for _, text in sorted(pydoc_data.topics.topics.items())]


def words_of(text):
    """Runs of letters, digits and marks, whatever the script."""
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower()).split()


VOCABULARY = [w for text in PROSE for w in re.findall("[A-Za-z]+", text)]


def english(n, seed):
    """n sentences that nobody wrote, each a run of words of the language reference: English enough, and as good as never the same."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(VOCABULARY) - 20, size=n)
    sentences = [" ".join(VOCABULARY[i : i + int(rng.integers(9, 16))]) for i in starts]
    return "".join(f"The {sentence} {rng.integers(10**6)} of that.\n" for sentence in sentences)


# ---- normalisation


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\r\nb\rc  \n", "a\nb\nc\n"),
        ("\ufeffa\u00a0b\u200b\u2003c", "ab c\n".replace("ab", "a b")),
        ("cafe\u0301", "caf\u00e9\n"),
        ("a\x07b\x1bc\td", "abc\td\n"),
        ("a\n\n\n\n\nb\n\n\n", "a\n\nb\n"),
        ("one\u2028two\x0cthree", "one\ntwo\nthree\n"),
        ("\n \n", ""),
        ("", ""),
        ("a\0b", None),
        ("a\ufffdb", None),
    ],
)
def test_normalise(text, clean):
    assert curate.normalise(text) == clean
    assert clean is None or curate.normalise(clean) == clean


def test_normalise_changes_nothing_the_second_time():
    """Also where what it removes stood between a letter and its accents, or between two accents that have an order."""
    rng = random.Random(1)
    marks = "\u0301\u0327\u0338\u0344\u0345\u05b4\u05bc\u0f71\u0f72\u3099\u1161\u11a8\u212a"
    alphabet = [chr(c) for c in curate.TABLE if c] + list("\r\n\t " + marks)
    alphabet += list("ab.e\u00e9\u304b\u1100\uac00\u05d9\u0915") * 3
    for _ in range(5000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))
        for layout in (False, True):
            clean = curate.normalise(text, layout)
            assert curate.normalise(clean, layout) == clean, ascii(text)
    assert curate.normalise("cafe\u200b\u0301") == "caf\u00e9\n"


def test_normalise_keeps_the_layout_of_code():
    code = "def f():\n\treturn 1\n\n\n\n\ndef g():\n    return 2\n"
    assert curate.normalise(code, keep_layout=True) == code


# ---- words and n-grams


def test_words_are_runs_of_letters_and_digits_in_any_case():
    texts = ["The CAT, the cat; don't!", "", "...", "Naïve 42nd\nstreet", "the cat"]
    texts += ["“The cat” – the cat’s—…", "中文，中文。x² हिन्दी 😀a"]
    words = curate.read_words(texts)
    for i, text in enumerate(texts):
        mine = [
            bytes(words.buffer[a:b]).decode().lower()
            for a, b, d in zip(words.start, words.end, words.document)
            if d == i
        ]
        assert mine == words_of(text)
    by_word = {}
    for a, b, h in zip(words.start, words.end, words.hash):
        by_word.setdefault(bytes(words.buffer[a:b]).decode().lower(), set()).add(int(h))
    assert all(len(hashes) == 1 for hashes in by_word.values())
    assert len(set.union(*by_word.values())) == len(by_word)


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_ngrams_are_equal_where_the_words_are(n):
    texts = PROSE[:12] + ["short one"]
    hashes, at = curate.ngrams(curate.read_words(texts), n)
    expected = [tuple(w[i : i + n]) for w in map(words_of, texts) for i in range(len(w) - n + 1)]
    assert len(hashes) == len(at) == len(expected)
    assert len(set(hashes.tolist())) == len(set(expected)) == len(set(zip(hashes.tolist(), expected)))


# ---- the rules, beside plain Python


def by_hand(text):
    """The measures of one document, slowly, from their descriptions."""
    words, lines, size = words_of(text), [line for line in text.split("\n") if line], len(text)
    out = {"words": len(words), "mean_word_length": sum(map(len, words)) / len(words)}
    out["symbols_per_word"] = max(text.count("#"), len(re.findall(r"\.{3,}|…", text))) / len(words)
    out["bullet_lines"] = np.mean([line.lstrip()[:1] in ("-", "*", "•") for line in lines])
    out["ellipsis_lines"] = np.mean([line.endswith(("...", "…")) for line in lines])
    out["punctuated_lines"] = np.mean([line[-1] in ".?!\"'”…" for line in lines])
    out["short_lines"] = np.mean([len(line) < 30 for line in lines])
    out["alphabetic_words"] = np.mean([any(c.isalpha() for c in w) for w in text.split()])
    out["stop_words"] = len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(words))
    again = [line in lines[:i] for i, line in enumerate(lines)]
    out["duplicate_lines"] = np.mean(again)
    in_again = sum(len(line) for line, a in zip(lines, again) if a)
    out["duplicate_line_characters"] = in_again / sum(map(len, lines))
    out["longest_line"], out["mean_line"] = max(map(len, lines)), np.mean([len(line) for line in lines])
    out["alphanumeric"] = sum(map(len, words)) / size
    for n in (2, 3, 4):
        counts = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        most = max(counts.values())
        longest = max(len(gram) for gram, count in counts.items() if count == most)
        out[f"top_{n}gram"] = most * longest / size if most > 1 else 0
    for n in range(5, 11):
        seen, covered = set(), set()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            if gram in seen:
                covered |= set(range(i, i + n))
            seen.add(gram)
        out[f"duplicate_{n}gram"] = sum(len(words[i]) for i in covered) / sum(map(len, words))
    return out


def test_measures_are_those_of_plain_python():
    texts = PROSE[:25] + [english(6, 1) * 2, "- a\n- b\n- the end...\n# ## ### .... ...\nx y z\nx y z\n"]
    texts += ["“A” quoted\n‘b’\n  • c…\n‣ d\n* e\n• f”\ng æ\nß。\n中文 ×÷ 😀 … x²\n"]
    texts += ["a—b — “c”, the cafés’ naïve\n" * 2 + "été\n"]
    measured = {}
    for profile in ("prose", "code"):
        measured |= curate.measure(curate.read_words(texts), texts, profile)
    for i, text in enumerate(texts):
        expected = by_hand(text)
        for name, value in expected.items():
            found = measured[name][i]
            if re.match(r"duplicate_([6-9]|10)gram", name) and found == 0 < value:
                assert (
                    value <= expected["duplicate_5gram"] <= 0.2
                )  # not looked for, where it could not matter
            else:
                assert found == pytest.approx(value, abs=1e-9), (i, name)


FRENCH = (
    "Le vieux pont de la ville est fermé depuis que la rivière a monté, et personne ne sait quand il sera ouvert de nouveau. "
    * 2
)
CODE = "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n\nprint(f(1), A())\n# and a comment so that there are enough words here\n"


@pytest.mark.parametrize(
    ("text", "profile", "rule"),
    [
        (english(12, 3), "prose", None),
        ("Too short to be of use.\n", "prose", "gopher_few_or_many_words"),
        ("".join("- " + line + "\n" for line in english(20, 3).split("\n")), "prose", "gopher_bullet_lines"),
        (
            "\n".join(line[:60] + "..." for line in english(20, 4).split("\n")),
            "prose",
            "gopher_ellipsis_lines",
        ),
        (english(12, 8).replace(" of ", " #of #"), "prose", "gopher_symbols_per_word"),
        (
            " ".join(str(i) for i in range(1000, 1400)) + " the of and to",
            "prose",
            "gopher_words_without_letters",
        ),
        (
            "\n".join(f"Quick brown foxes number {i} jump over lazy dogs." for i in "abcdefghijklmnop"),
            "prose",
            "gopher_stop_words",
        ),
        (english(4, 5) * 4, "prose", "gopher_duplicate_lines"),
        (english(9, 6) + "Lorem ipsum is what the printer set.\n", "prose", "c4_lorem_ipsum"),
        (english(9, 6).replace(".", ""), "prose", "fineweb_lines_without_punctuation"),
        (english(12, 9) + " ".join(english(12, 9).split()[:60]), "prose", "gopher_duplicate_5gram"),
        (
            FRENCH[: len(FRENCH) // 2]
            + "La tour qui the domine to la vallée, construite par des moines venus du nord, sert de refuge aux "
            "voyageurs. Chaque matin un berger y monte avec ses chiens pour voir si la neige est tombée pendant la nuit.",
            "prose",
            "language",
        ),
        (
            english(3, 7) + "".join(chr(97 + i % 26) * (i % 9 + 250) + "\n" for i in range(60)),
            "prose",
            "gopher_mean_word_length",
        ),
        (CODE, "code", None),
        (CODE + "x = '" + "a b " * 400 + "'\n", "code", "codeparrot_long_line"),
        ("# This file is automatically generated, do not edit\n" + CODE, "code", "codeparrot_generated"),
        (CODE + "#" * 900 + "\n" + "-" * 900, "code", "codeparrot_mean_line"),
        (
            "((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((\n" * 9 + CODE[:100],
            "code",
            "codeparrot_alphanumeric",
        ),
        ("hm\n", "none", None),
    ],
)
def test_a_document_is_dropped_by_the_rule_it_breaks(text, profile, rule):
    others = [english(12, 40 + i) if profile != "code" else CODE for i in range(3)]
    texts = [
        *others,
        curate.normalise(text, profile == "code"),
        *others,
    ]  # neighbours in the batch change nothing
    verdicts = curate.judge(curate.read_words(texts), texts, profile)
    assert verdicts == [None, None, None, rule, None, None, None]


# ---- the rules, beside datatrove's (pip install datatrove regex for those tests that need it)

TEXT = """The ferry leaves the harbour at nine and comes back with the evening tide.
Nobody had told the new captain that the old bridge was closed to carts.
A baker on the corner sells bread to those who have walked since dawn.
Two sisters keep bees behind the mill, and their honey is known upriver.
When it rains the children count frogs under the steps of the town hall.
Most of the wood that they burn in winter drifts ashore during autumn.
The clockmaker says it will be a long time before his apprentice is ready.
Every market day brings a fiddler with one string fewer than last week.
Some letters arrive so late that their answers are already on the way.
From the hill you see three valleys, a railway and the smoke of a kiln.
Last summer a stork nested on the chimney and would not leave for weeks.
Old maps show an island here, though no sailor has ever set foot on it."""
LINES = TEXT.split("\n")
WORDS = TEXT.split()
SYMBOLS = ("***", "--", "\u2014", "\u2022", "==", "{}", "\u00a7", "1234", "3.14", "(1)", "\u00d7")


def mixed(text, tokens, every):
    """One of the tokens after every so many words of each line."""
    count, out = 0, []
    for line in text.split("\n"):
        row = []
        for word in line.split():
            row.append(word)
            count += 1
            if count % every == 0:
                row.append(tokens[count // every % len(tokens)])
        out.append(" ".join(row))
    return "\n".join(out)


def starting(marks, text=TEXT):
    return "\n".join(marks[i % len(marks)] + line for i, line in enumerate(text.split("\n")))


def ending(marks, text=TEXT):
    return "\n".join(line.rstrip(".") + marks[i % len(marks)] for i, line in enumerate(text.split("\n")))


def in_lines(words, n=12):
    return "\n".join(" ".join(words[i : i + n]) + "." for i in range(0, len(words), n))


CASES = {
    "plain": TEXT,
    "short": "\n".join(LINES[:3]),
    "symbols, 1 in 7": mixed(TEXT, SYMBOLS, 6),
    "symbols, 1 in 6": mixed(TEXT, SYMBOLS, 5),
    "symbols, 1 in 5": mixed(TEXT, SYMBOLS, 4),
    "symbols, 1 in 4": mixed(TEXT, SYMBOLS, 3),
    "symbols, 85%": mixed(TEXT, ["{} == \u00a7 -- ++ **"], 1),
    "numbers, 1 in 3": mixed(TEXT, ["1815", "3.5", "42"], 2),
    "emoji": mixed(TEXT, ["\U0001f600", "\U0001f389\U0001f389"], 2),
    "hashes": mixed(TEXT, ["#"], 8),
    "hashes and ellipses, few of each": mixed(TEXT, ["#", "..."], 6),
    "runs of dots": mixed(TEXT, ["......"], 13),
    "ellipses": mixed(TEXT, ["\u2026"], 8),
    "curly quotes": starting(["\u201c", "\u2018"], ending([".\u201d", "\u2019"])),
    "bullets": starting(["\u2022 "]),
    "hyphens": starting(["- ", "  - "]),
    "asterisks": starting(["* "]),
    "arrows and dashes": starting(["\u2192 ", "\u2013 ", "\u2014", "\u25b6 "]),
    "bullets, 11 of 12": starting(["- "] * 11 + [""]),
    "bullets, 10 of 12": starting(["- "] * 10 + ["", ""]),
    "ellipsis lines, 1 in 3": ending(["...", ".", "."]),
    "ellipsis lines, 1 in 4": ending(["\u2026", ".", "?", "!"]),
    "no punctuation": ending([""]),
    "accents at line ends": ending([" caf\u00e6", " caf\u00dd"]),
    "closing quotes at line ends": ending(["\u201d"]),
    "ideographic full stops": ending(["\u3002"]),
    "lines of 29": "\n".join(line[:28] + "." for line in LINES),
    "lines of 30": "\n".join(line[:29] + "." for line in LINES),
    "lines of 29, in accents": "\n".join(line[:28].replace("e", "\u00e9") + "." for line in LINES),
    "short words": in_lines([w[:2] for w in WORDS]),
    "long words": in_lines(["".join(WORDS[i : i + 3]) for i in range(0, len(WORDS) - 2)]),
    "Cyrillic": in_lines([6 * chr(0x430 + i % 32) for i in range(96)]),
    "no stop words": "\n".join(f"Quick foxes in group {a} jump over lazy dogs." for a in "abcdefghijkl"),
    "capital stop words": in_lines([w.upper() for w in WORDS]),
    "duplicate lines, 1 in 3": "\n".join(LINES + LINES[:6]),
    "duplicate lines, 1 in 4": "\n".join(LINES + LINES[:4]),
    "a duplicate line": "\n".join(LINES + LINES[:1]),
    "a top 2-gram": mixed(TEXT, ["extraordinary circumstances"], 6),
    "a top 3-gram": mixed(TEXT, ["under extraordinary circumstances"], 9),
    "a top 4-gram": mixed(TEXT, ["under most extraordinary circumstances"], 12),
    "a repeated span": in_lines(WORDS + WORDS[5:25]),
    "short repeated spans": in_lines(
        sum([WORDS[i:][:12] + WORDS[i + 3 :][:6] for i in range(0, 99, 12)], [])
    ),
    "lorem ipsum": TEXT + "\nLorem ipsum is what the printer set.",
    "lorem, ipsum": TEXT + "\nLorem, ipsum, and so on and on.",
    "lorem ipsum in a headline": TEXT + "\nLorem ipsum",
}


# By which rules datatrove 0.10.1 drops each case, with our words: literal, to be checked without it, too.
TOPS = [f"gopher_top_{n}gram" for n in (2, 3, 4)]
SPANS = [f"gopher_duplicate_{n}gram" for n in range(5, 11)]
DATATROVE = dict.fromkeys(CASES, []) | {
    "short": ["gopher_few_or_many_words"],
    "symbols, 1 in 4": ["gopher_words_without_letters"],
    "symbols, 85%": ["gopher_words_without_letters", "fineweb_lines_without_punctuation"],
    "numbers, 1 in 3": ["gopher_words_without_letters"],
    "emoji": ["gopher_words_without_letters"],
    "hashes": ["gopher_symbols_per_word"],
    "runs of dots": ["gopher_symbols_per_word"],
    "ellipses": ["gopher_symbols_per_word"],
    "bullets": ["gopher_bullet_lines"],
    "hyphens": ["gopher_bullet_lines"],
    "bullets, 11 of 12": ["gopher_bullet_lines"],
    "ellipsis lines, 1 in 3": ["gopher_ellipsis_lines"],
    "no punctuation": ["fineweb_lines_without_punctuation"],
    "accents at line ends": ["fineweb_lines_without_punctuation"],
    "ideographic full stops": ["fineweb_lines_without_punctuation"],
    "lines of 29": ["fineweb_short_lines"],
    "lines of 29, in accents": ["fineweb_short_lines"],
    "short words": ["gopher_mean_word_length"],
    "long words": ["gopher_mean_word_length"],
    "Cyrillic": ["gopher_stop_words", *SPANS],
    "no stop words": ["gopher_stop_words", *TOPS, *SPANS[:4]],
    "duplicate lines, 1 in 3": ["gopher_duplicate_lines", *SPANS, "fineweb_duplicate_line_characters"],
    "duplicate lines, 1 in 4": [*SPANS, "fineweb_duplicate_line_characters"],
    "a top 2-gram": ["gopher_top_2gram"],
    "a top 3-gram": TOPS[:2],
    "a top 4-gram": TOPS[1:],
    "short repeated spans": SPANS[:2],
    "lorem ipsum": ["c4_lorem_ipsum"],
}

# Where the verdicts differ, on purpose. {rule: (whose alone may drop a document, why)}
# (in a text of few words datatrove also counts an n-gram that is there once)
TIES = "of equally frequent n-grams the longest counts here, the first there"
SHARES = (
    "a share of the words' characters here, of all with blanks and symbols there; "
    "here every repeated word counts, there only whole n-grams one after the other"
)
DIFFERENCES = {
    "gopher_symbols_per_word": ("theirs", "a run of dots is one ellipsis here, every three dots are there"),
    "gopher_bullet_lines": ("ours", "an asterisk is a bullet here"),
    **{rule: ("ours", TIES) for rule in TOPS},
    **{rule: ("ours", SHARES) for rule in SPANS},
    "c4_lorem_ipsum": ("ours", "anywhere and however punctuated here, in lines that C4 keeps there"),
}
OURS_ALONE = {
    ("asterisks", "gopher_bullet_lines"),
    ("a top 4-gram", "gopher_top_2gram"),
    ("a repeated span", "gopher_duplicate_10gram"),
    ("lorem, ipsum", "c4_lorem_ipsum"),
    ("lorem ipsum in a headline", "c4_lorem_ipsum"),
}
THEIRS_ALONE = {("runs of dots", "gopher_symbols_per_word")}


PROSE_RULES = [(rule, what, limits["prose"]) for rule, what, limits in curate.RULES if "prose" in limits]


def our_verdicts(texts):
    """-> {rule: (len(texts),) bool, is it dropped?} for the rules about prose but that about language."""
    found = curate.measure(curate.read_words(texts), texts, "prose")
    return {
        rule: (found[what] < low) | (found[what] > high)
        for rule, what, (low, high) in PROSE_RULES
        if rule != "language"
    }


def datatrove_verdicts(texts):
    """
    The same from datatrove, each rule by a filter that has no other. Settings are those of curate.RULES; its own
    differ: words are spaCy's, with punctuation among them, so that the rule about words without letters
    drops plain prose, too (here: our words, and for that rule what stands between blanks); lines may end in a
    mark of any script (here: C4's marks, the closing quotation mark, the ellipsis); short lines have up to 30
    characters (here, as in FineWeb's paper: fewer than 30); a hundredth of the characters may be in duplicate
    lines (here, as there: a tenth). Not in curate.RULES: the rules about paragraphs, newlines per word, and
    C4's others.
    """
    filters = pytest.importorskip("datatrove.pipeline.filters")
    data, tokenizers = map(importlib.import_module, ("datatrove.data", "datatrove.utils.word_tokenizers"))

    class Words(tokenizers.WordTokenizer):
        word_tokenize = sent_tokenize = span_tokenize = None

        def __init__(self, words):
            self.word_tokenize = words

    blanks, none = Words(str.split), {"language": Words(words_of)}
    marks = tuple(".?!\"'\u201d\u2026")
    all_off = dict.fromkeys(inspect.signature(filters.GopherQualityFilter).parameters)
    quality = filters.GopherQualityFilter, all_off | none
    repetition = (
        filters.GopherRepetitionFilter,
        {
            "dup_line_frac": None,
            "dup_para_frac": None,
            "dup_line_char_frac": None,
            "dup_para_char_frac": None,
            "top_n_grams": (),
            "dup_n_grams": (),
            **none,
        },
    )
    lines = (
        filters.FineWebQualityFilter,
        {"line_punct_thr": -1, "short_line_thr": 2, "char_duplicates_ratio": 2, "new_line_ratio": 9, **none},
    )

    def make(rule, kind, **settings):
        """settings: functions of the rule's two limits, or what they are set to."""
        (limits,) = (limits for name, _, limits in PROSE_RULES if name == rule)
        settings = {name: value(*limits) if callable(value) else value for name, value in settings.items()}
        return kind[0](**kind[1] | settings)

    def low(low, high):
        return low

    def high(low, high):
        return high

    made = {
        rule: make(rule, *kind, **settings)
        for rule, (*kind, settings) in {
            "gopher_few_or_many_words": (quality, {"min_doc_words": low, "max_doc_words": high}),
            "gopher_mean_word_length": (quality, {"min_avg_word_length": low, "max_avg_word_length": high}),
            "gopher_symbols_per_word": (quality, {"max_symbol_word_ratio": high}),
            "gopher_bullet_lines": (quality, {"max_bullet_lines_ratio": high}),
            "gopher_ellipsis_lines": (quality, {"max_ellipsis_lines_ratio": high}),
            "gopher_words_without_letters": (quality, {"max_non_alpha_words_ratio": low, "language": blanks}),
            "gopher_stop_words": (quality, {"min_stop_words": low}),
            "gopher_duplicate_lines": (repetition, {"dup_line_frac": high}),
            "fineweb_lines_without_punctuation": (lines, {"line_punct_thr": low, "stop_chars": marks}),
            "fineweb_short_lines": (lines, {"short_line_thr": high, "short_line_length": 29}),
            "fineweb_duplicate_line_characters": (lines, {"char_duplicates_ratio": high}),
            **{
                r: (repetition, {"top_n_grams": lambda _, to, n=n: ((n, to),)}) for n, r in enumerate(TOPS, 2)
            },
            **{
                r: (repetition, {"dup_n_grams": lambda _, to, n=n: ((n, to),)})
                for n, r in enumerate(SPANS, 5)
            },
        }.items()
    }
    made["c4_lorem_ipsum"] = filters.C4QualityFilter(min_num_sentences=-1, filter_curly_bracket=False)
    return {
        rule: np.array([kept.filter(data.Document(text, "")) is not True for text in texts])
        for rule, kept in made.items()
    }


@pytest.fixture
def no_language(monkeypatch):
    monkeypatch.setattr(curate, "english", lambda text: 1.0)


def test_verdicts_are_datatroves_but_for_what_differs_on_purpose(no_language):
    theirs = {(case, rule) for case in CASES for rule in DATATROVE[case]}
    ours = our_verdicts(list(CASES.values()))
    ours = {(case, rule) for rule, dropped in ours.items() for case, drops in zip(CASES, dropped) if drops}
    assert ours - theirs == OURS_ALONE and theirs - ours == THEIRS_ALONE
    assert {rule for _, rule in OURS_ALONE | THEIRS_ALONE} <= set(DIFFERENCES)
    assert {rule for _, rule in ours} == {rule for rule, *_ in PROSE_RULES} - {"language"}  # each drops one


def test_datatrove_says_so():
    theirs = datatrove_verdicts(list(CASES.values()))
    for case, *drops in zip(CASES, *theirs.values()):
        assert {rule for rule, dropped in zip(theirs, drops) if dropped} == set(DATATROVE[case]), case


def test_every_rule_agrees_with_datatroves_on_many_documents(no_language):
    rng, texts = random.Random(6), []
    topics = [text[:2000] for text in PROSE if len(text) > 1000]
    for i in range(300):
        text = english(rng.randrange(12, 24), i) if i % 3 else topics[i % len(topics)]
        lines = [line for line in text.split("\n") if line]
        text = "\n".join(lines + rng.choices(lines, k=rng.choice([0, 0, 1, 3, len(lines)])))
        for change in rng.sample(
            [
                lambda text: mixed(
                    text, rng.sample((*SYMBOLS, "...", "#", "......"), 3), rng.randrange(1, 9)
                ),
                lambda text: starting(rng.choices(["- ", "\u2022 ", "* ", "\u201c", ""], k=3), text),
                lambda text: ending(
                    rng.choices(["...", "\u2026", "", "\u201d", "\u00e6", ".", "!"], k=3), text
                ),
                lambda text: "\n".join(line[: rng.randrange(25, 32)] for line in text.split("\n")),
                lambda text: text.replace("e", "\u00e9"),
                lambda text: mixed(text, ["most unusual circumstances", "lorem ipsum"], rng.randrange(4, 40)),
                lambda text: in_lines([word[: rng.choice([1, 2, 20])] for word in text.split()]),
                lambda text: re.sub(
                    r"\b(the|be|to|of|and|that|have|with)\b", "so", text, flags=re.IGNORECASE
                ),
            ],
            rng.randrange(3),
        ):
            text = change(text)
        texts.append(curate.normalise(text).strip("\n"))
    ours, theirs = our_verdicts(texts), datatrove_verdicts(texts)
    for rule in theirs:
        alone, _ = DIFFERENCES.get(rule, ("nobody", ""))
        assert alone == "ours" or not (ours[rule] & ~theirs[rule]).any(), rule
        assert alone == "theirs" or not (theirs[rule] & ~ours[rule]).any(), rule
    assert sum((ours[rule] & theirs[rule]).any() for rule in theirs) >= 16  # few have nothing to say


def test_language():
    german = "Der alte Lehrer wartete am Fenster, weil der Winter in diesem Jahr so frueh gekommen war, dass niemand mehr reiste."
    assert (
        curate.english(english(3, 1)) > 0.65 and curate.english(FRENCH) == 0 and curate.english(german) == 0
    )


def test_every_rule_has_a_measure_and_every_profile_rules():
    for profile in ("prose", "math", "code", "dialogue"):
        texts = [english(12, 1)]
        measured = curate.measure(curate.read_words(texts), texts, profile)
        assert set(measured) == {what for _, what, limits in curate.RULES if profile in limits}


# ---- near-duplicates


def changed(text, share, seed):
    """The text with a share of its words replaced."""
    rng = np.random.default_rng(seed)
    return " ".join(f"w{rng.integers(10**9)}" if rng.random() < share else w for w in text.split(" "))


def share_bands(texts):
    keys = curate.signatures(curate.read_words(texts))
    half = len(texts) // 2
    return (keys[:, :half] == keys[:, half:]).any(0).mean()


def test_near_duplicates_share_a_band_and_others_do_not():
    originals = [english(25, i) for i in range(150)]
    assert share_bands(originals + [changed(t, 0.01, i) for i, t in enumerate(originals)]) > 0.95
    assert share_bands(originals + originals[::-1]) < 0.05
    assert (
        share_bands(originals + [t.upper().replace(",", " -") for t in originals]) == 1
    )  # neither case nor punctuation counts


def test_overlap_is_the_share_of_common_shingles():
    a, b = english(20, 1), changed(english(20, 1), 0.05, 2)

    def shingles(text):
        w = words_of(text)
        return {tuple(w[i : i + 5]) for i in range(len(w) - 4)}

    expected = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
    assert 0.5 < expected < 0.95
    assert curate.overlap(curate.shingle_set(a), curate.shingle_set(b)) == pytest.approx(expected)
    # too short for a shingle: alike only if equal
    assert curate.overlap(curate.shingle_set("tiny one"), curate.shingle_set("tiny one")) == 1
    assert curate.overlap(curate.shingle_set("tiny one"), curate.shingle_set("tiny two")) == 0


def test_signatures_do_not_depend_on_the_batch():
    texts = [english(5, i) for i in range(6)] + ["", "two words"]
    together = curate.signatures(curate.read_words(texts))
    alone = np.concatenate([curate.signatures(curate.read_words([t])) for t in texts], 1)
    assert together.shape == (curate.BANDS, 8) and np.array_equal(together, alone)


# ---- decontamination


@pytest.fixture(scope="module")
def evaluations():
    exam = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    return curate.TextEvaluations(
        {**curate.text_tables({"exam": [exam]}), **curate.arc_tables(arc.load("arc1_eval")[:60])}
    )


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        (
            "Before.\nNATALIA sold clips to 48 of her friends in April -- and then she sold something else.",
            "exam",
        ),
        (
            "He said: natalia sold clips to 48 of her friends in april, and then she went home.",
            "exam",
        ),  # 13 words
        (
            "He said: natalia sold clips to 48 of her friends in april, and afterwards went home.",
            None,
        ),  # 11 words
        ("“Natalia sold ‘clips’ to 48 of her friends—in April… and then she” went home.", "exam"),
        (
            "Clips were sold by Natalia to friends of hers in April, 48 of them, and half as many in May she sold then.",
            None,
        ),
        ("", None),
    ],
)
def test_text_that_quotes_an_evaluation_is_found(evaluations, text, quoted):
    found = evaluations.quoted(curate.read_words(["nothing to see", text, "nor here"]))
    assert found == ({1: quoted} if quoted else {})


def test_arc_outputs_in_text_are_found_however_they_are_written(evaluations):
    grid = next(
        o
        for t in arc.load("arc1_eval")[:60]
        for _, o in t.test
        if min(o.shape) > 6 and len(np.unique(o[:3])) > 3
    )
    turned = np.rot90(grid.T, 3)
    ways = [
        str(turned.tolist()),
        "\n".join("".join(map(str, row)) for row in turned),
        "\n".join(" ".join(map(str, row)) for row in turned),
        f'{{"output": {turned.tolist()}}}'.replace(" ", ""),
        "\n".join("|" + "|".join(map(str, row)) + "|" for row in turned.tolist()),
    ]
    texts = [f"import json\ntask = {way}\nprint(task)\n" for way in ways]
    assert set(evaluations.quoted(curate.read_words(texts))) == set(range(len(ways)))
    rng = np.random.default_rng(0)
    others = [str(rng.integers(0, 10, size=grid.shape).tolist()) for _ in range(50)] + [
        str(np.zeros((9, 9), int).tolist())
    ]
    assert evaluations.quoted(curate.read_words(others)) == {}


@pytest.fixture(scope="module")
def outputs():
    return curate.EvaluationOutputs({name: arc.load(name) for name in curate.EVALUATION_SETS})


def plain(grid):
    return grid.size <= 9 or len(np.unique(grid)) == 1


def test_an_evaluation_output_is_recognised_in_disguise_unless_it_is_trivial(outputs):
    rng = np.random.default_rng(3)
    tasks = [task for name in curate.EVALUATION_SETS for task in arc.load(name)]
    tests = [(task.id, *pair) for task in tasks for pair in task.test]
    assert sum(plain(output) for _, _, output in tests) == 27
    for name, question, output in tests:
        shape = arc.random_augment(rng, "arc")
        turned = arc.augment(shape, output)
        # what equals a trivial one by chance gives nothing away, but the whole pair is the evaluation's task
        assert bool(outputs.matches([turned])) == (not plain(output))
        found = outputs.matches([arc.augment(shape, question), turned])
        assert found and (found == [name] or not plain(output))  # a few outputs are those of several tasks
    mine = np.array([[1, 2, 3], [0, 0, 0], [0, 0, 1]], np.uint8)
    assert outputs.matches([mine, mine, np.zeros((9, 9), np.uint8), np.ones((1, 1), np.uint8)]) == []
    question, output = next((x, y) for _, x, y in tests if plain(y) and len(np.unique(y)) > 2)
    assert outputs.matches([question, output]) and not outputs.matches([question, np.rot90(output)])
    assert not outputs.matches([output, question])


def test_tasks_lost_to_evaluation_outputs_are_few(outputs):
    """61 of these 633 had a grid that is one, 54 of them only trivial ones."""
    tasks = {task.id: task for name in ("arc1_train", "arc2_train") for task in arc.load(name)}
    grids = [[g for pair in t.train + t.test for g in pair] for i, t in tasks.items() if i not in outputs.ids]
    assert len(grids) == 633 and sum(bool(outputs.matches(g)) for g in grids) == 7


def test_an_evaluation_task_under_another_name_is_dropped_whatever_its_output(tmp_path):
    np.savez(tmp_path / "none.npz")
    job, rng = {"evaluations": str(tmp_path / "none.npz")}, np.random.default_rng(8)
    tasks = [task for task in arc.load("arc1_eval") if any(plain(output) for _, output in task.test)]
    for task in tasks:
        shape, dropped = arc.random_augment(rng, "arc"), units.Dropped()
        pairs = [tuple(arc.augment(shape, g) for g in pair) for pair in task.train + task.test]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        documents = [("x", *sources.instantiate(arc.Task("mine", "arc", pairs[:-1], pairs[-1:])))]
        kept, _, _ = units.judge_puzzles(sources.SOURCES["arc"], documents, dropped, job)
        assert kept == [] and set(dropped.rules) == {"evaluation_output"}
    assert len(tasks) > 10


def test_a_held_out_puzzle_in_disguise_is_recognised():
    """Whatever source it comes from: all suites are kept out of all of them."""
    held, draw = curate.HeldOut(), np.random.default_rng(5)
    for suite in (*suites.HARDER, *puzzles.SUITES):
        task = suites.load(suite)[0]
        turned = arc.Task(
            "x",
            task.kind,
            *([tuple(map(np.rot90, pair)) for pair in pairs] for pairs in (task.train, task.test)),
        )
        assert held.has(task, "none") and held.has(turned, "none")
    recoloured = arc.Task(
        "x",
        "arc",
        *(
            [tuple((g * (g > 0) % 9 + (g > 0)).astype(np.uint8) for g in pair) for pair in pairs]
            for pairs in (task.train, task.test)
        ),
    )
    assert held.has(recoloured, "arc") and not held.has(recoloured, "none")  # that the loader could undo
    ((question, answer),) = puzzles.heldout("sudoku4", 1)[0].test
    given_away = np.where(
        np.arange(16).reshape(4, 4) == np.flatnonzero(question == 0)[0], answer, question
    )  # one cell more
    assert held.has(arc.Task("x", "sudoku", [], [(given_away, answer)]), "none")
    assert not held.has(puzzles.maze(draw, 9, 9), "dihedral") and not held.has(
        puzzles.sudoku(draw, 4, 6, "train"), "none"
    )
    assert not held.has(puzzles.sudoku(draw, 9, 30), "none")
    ((question, answer),) = suites.load("logic")[0].test
    assert held.asks(f"{question}\nSolution: because.\nAnswer: {answer}") and not held.asks(
        f"{question} Really?\nSolution: so."
    )
