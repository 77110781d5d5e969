"""curate.py: measures are those of the papers; near-duplicates and quotations are found, nothing else."""

import importlib
import itertools
import pydoc_data.topics
import random
import re
import unicodedata

import numpy as np
import pytest

from smol import arc, curate, puzzles, suites

PROSE = [curate.normalise(text) for _, text in sorted(pydoc_data.topics.topics.items())]
VOCABULARY = [w for text in PROSE for w in re.findall("[A-Za-z]+", text)]


def words_of(text):
    """Runs of letters, digits and marks, whatever the script."""
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower()).split()


def english(n, seed):
    """n sentences, each a run of words of the language reference: English enough, hardly ever the same."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(VOCABULARY) - 20, size=n)
    sentences = [" ".join(VOCABULARY[i : i + int(rng.integers(9, 16))]) for i in starts]
    return "".join(f"The {sentence} {rng.integers(10**6)} of that.\n" for sentence in sentences)


# ---- normalisation


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\r\nb\rc  \n", "a\nb\nc\n"),
        ("\ufeffa\u00a0b\u200b\u2003c", "a b c\n"),
        ("cafe\u200b\u0301", "caf\u00e9\n"),
        ("a\x07b\x1bc\td", "abc\td\n"),
        ("a\n\n\n\n\nb\n\n\n", "a\n\nb\n"),
        ("one\u2028two\x0cthree", "one\ntwo\nthree\n"),
        ("a\0b", None),
        ("a\ufffdb", None),
    ],
)
def test_normalise(text, clean):
    assert curate.normalise(text) == clean
    code = "def f():\n\treturn 1\n\n\n\n\ndef g():\n    return 2\n"
    assert curate.normalise(code, keep_layout=True) == code


def test_normalise_changes_nothing_the_second_time():
    """Also where what it removes stood between a letter and its accents, or between accents with an order."""
    rng = random.Random(1)
    marks = "\u0301\u0327\u0338\u0344\u0345\u05b4\u05bc\u0f71\u0f72\u3099\u1161\u11a8\u212a"
    alphabet = [chr(c) for c in curate.TABLE if c] + list("\r\n\t " + marks)
    alphabet += list("ab.e\u00e9\u304b\u1100\uac00\u05d9\u0915") * 3
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))
        for layout in (False, True):
            clean = curate.normalise(text, layout)
            assert curate.normalise(clean, layout) == clean, ascii(text)


# ---- words and n-grams


def test_words_are_runs_of_letters_and_digits_in_any_case():
    texts = ["The CAT, the cat; don't!", "", "...", "Naïve 42nd\nstreet", "the cat"]
    texts += ["“The cat” – the cat’s—…", "中文，中文。x² हिन्दी 😀a"]
    words = curate.read_words(texts)
    spelled = [bytes(words.buffer[a:b]).decode().lower() for a, b in zip(words.start, words.end)]
    for i, text in enumerate(texts):
        assert spelled[words.first[i] : words.first[i + 1]] == words_of(text)
    assert len(set(spelled)) == len(set(words.hash.tolist())) == len(set(zip(spelled, words.hash.tolist())))


@pytest.mark.parametrize("n", [1, 5, 13])
def test_ngrams_are_equal_where_the_words_are(n):
    texts = PROSE[:12] + ["short one"]
    hashes, at = curate.ngrams(curate.read_words(texts), n)
    expected = [tuple(w[i : i + n]) for w in map(words_of, texts) for i in range(len(w) - n + 1)]
    assert len(hashes) == len(at) == len(expected)
    assert len(set(hashes.tolist())) == len(set(expected)) == len(set(zip(hashes.tolist(), expected)))


# ---- the rules beside plain Python


def by_hand(text):
    """The measures of one document, slowly, from their descriptions."""
    words = words_of(text)
    out = {"words": len(words), "mean_word_length": sum(map(len, words)) / len(words)}
    out["alphabetic_words"] = np.mean([any(c.isalpha() for c in w) for w in text.split()])
    out["stop_words"] = len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(words))
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
                assert value <= expected["duplicate_5gram"] <= 0.1  # not looked for: it could not matter
            else:
                assert found == pytest.approx(value, abs=1e-9), (i, name)


# ---- the rules beside datatrove 0.10.1 (pip install datatrove regex; without it, its verdicts as recorded)

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
LINES, WORDS = TEXT.split("\n"), TEXT.split()
SPANS = [f"gopher_duplicate_{n}gram" for n in range(5, 11)]
TWICE = "fineweb_duplicate_line_characters"


def mixed(token, every):
    """A token after every so many words."""
    count = itertools.count(1)
    lines = [[f"{w} {token}" if next(count) % every == 0 else w for w in line.split()] for line in LINES]
    return "\n".join(map(" ".join, lines))


def starting(*marks):
    return "\n".join(marks[i % len(marks)] + line for i, line in enumerate(LINES))


def ending(*marks):
    return "\n".join(line.rstrip(".") + marks[i % len(marks)] for i, line in enumerate(LINES))


def cut(n):
    return "\n".join(line[:n] + "." for line in LINES)


def twice(n):
    """The first n lines again."""
    return "\n".join(LINES + LINES[:n])


def in_lines(words):
    return "\n".join(" ".join(words[i : i + 12]) + "." for i in range(0, len(words), 12))


CASES = {  # what it is: (text, rules that drop it)
    "plain": (TEXT, []),
    "short": ("\n".join(LINES[:3]), ["gopher_few_or_many_words"]),
    "short words": (in_lines([w[:2] for w in WORDS]), ["gopher_mean_word_length"]),
    "long words": (
        in_lines(["".join(WORDS[i : i + 3]) for i in range(len(WORDS) - 2)]),
        ["gopher_mean_word_length"],
    ),
    "dashes, 1 in 6": (mixed("\u2014", 5), []),
    "dashes, 1 in 4": (mixed("\u2014", 3), ["gopher_words_without_letters"]),
    "hashes": (mixed("#", 8), ["gopher_symbols_per_word"]),
    "ellipses": (mixed("\u2026", 8), ["gopher_symbols_per_word"]),
    "runs of dots": (mixed("......", 13), []),
    "bullets": (starting("\u2022 "), ["gopher_bullet_lines"]),
    "asterisks": (starting("* "), ["gopher_bullet_lines"]),
    "hyphens, 11 of 12": (starting(*["  - "] * 11, ""), ["gopher_bullet_lines"]),
    "hyphens, 10 of 12": (starting(*["- "] * 10, "", ""), []),
    "ellipsis lines, 1 in 3": (ending("...", ".", "."), ["gopher_ellipsis_lines"]),
    "ellipsis lines, 1 in 4": (ending("\u2026", ".", "?", "!"), []),
    "no punctuation": (ending(""), ["fineweb_lines_without_punctuation"]),
    "accents at line ends": (ending(" caf\u00e6"), ["fineweb_lines_without_punctuation"]),
    "closing quotes": (ending("\u201d"), []),
    "lines of 29, in accents": (cut(28).replace("e", "\u00e9"), ["fineweb_short_lines"]),
    "lines of 30": (cut(29), []),
    "no stop words": (
        "\n".join(f"Quick foxes in group {a} jump over lazy dogs." for a in "abcdefghijkl"),
        ["gopher_stop_words", *SPANS[:4]],
    ),
    "capital stop words": (in_lines([w.upper() for w in WORDS]), []),
    "duplicate lines, 1 in 3": (twice(6), ["gopher_duplicate_lines", *SPANS, TWICE]),
    "duplicate lines, 1 in 4": (twice(4), [*SPANS, TWICE]),
    "a duplicate line": (twice(1), []),
    "a repeated span": (in_lines(WORDS + WORDS[5:25]), ["gopher_duplicate_10gram"]),
    "short repeated spans": (
        in_lines(sum([WORDS[i:][:12] + WORDS[i + 3 :][:6] for i in range(0, 99, 12)], [])),
        SPANS[:2],
    ),
}
# An asterisk is no bullet there, and every three dots are an ellipsis; a repeated n-gram is a share of all
# characters there, here of those of words.
OURS_ALONE = {("asterisks", "gopher_bullet_lines"), ("a repeated span", "gopher_duplicate_10gram")}
THEIRS_ALONE = {("runs of dots", "gopher_symbols_per_word")}
PROSE_RULES = {rule: (what, limits["prose"]) for rule, what, limits in curate.RULES if "prose" in limits}


def test_every_rule_drops_what_it_is_about():
    texts = [text for text, _ in CASES.values()]
    measured = curate.measure(curate.read_words(texts), texts, "prose")
    for i, (case, (_, rules)) in enumerate(CASES.items()):
        limits = {rule: limits for rule, limits in PROSE_RULES.items() if rule != "language"}
        dropped = [r for r, (what, (low, high)) in limits.items() if not low <= measured[what][i] <= high]
        assert sorted(dropped) == sorted(rules), case
    assert set().union(*(rules for _, rules in CASES.values())) == set(PROSE_RULES) - {"language"}


OFF = {  # settings under which a filter of datatrove drops nothing
    "GopherQualityFilter": dict.fromkeys(
        "min_doc_words max_doc_words min_avg_word_length max_avg_word_length max_symbol_word_ratio "
        "max_bullet_lines_ratio max_ellipsis_lines_ratio max_non_alpha_words_ratio min_stop_words".split()
    ),
    "GopherRepetitionFilter": {
        **dict.fromkeys(("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac")),
        **{"top_n_grams": (), "dup_n_grams": ()},
    },
    "FineWebQualityFilter": {
        **{"line_punct_thr": -1, "short_line_thr": 2, "char_duplicates_ratio": 2, "new_line_ratio": 9},
        **{"stop_chars": tuple(".?!\"'\u201d\u2026"), "short_line_length": 29},
    },
}
SETTINGS = {  # rule: (filter, its settings for the lowest and the highest value)
    "gopher_few_or_many_words": ("GopherQualityFilter", "min_doc_words", "max_doc_words"),
    "gopher_mean_word_length": ("GopherQualityFilter", "min_avg_word_length", "max_avg_word_length"),
    "gopher_symbols_per_word": ("GopherQualityFilter", None, "max_symbol_word_ratio"),
    "gopher_bullet_lines": ("GopherQualityFilter", None, "max_bullet_lines_ratio"),
    "gopher_ellipsis_lines": ("GopherQualityFilter", None, "max_ellipsis_lines_ratio"),
    "gopher_words_without_letters": ("GopherQualityFilter", "max_non_alpha_words_ratio", None),
    "gopher_stop_words": ("GopherQualityFilter", "min_stop_words", None),
    "gopher_duplicate_lines": ("GopherRepetitionFilter", None, "dup_line_frac"),
    **{rule: ("GopherRepetitionFilter", None, "dup_n_grams") for rule in SPANS},
    "fineweb_lines_without_punctuation": ("FineWebQualityFilter", "line_punct_thr", None),
    "fineweb_short_lines": ("FineWebQualityFilter", None, "short_line_thr"),
    "fineweb_duplicate_line_characters": ("FineWebQualityFilter", None, "char_duplicates_ratio"),
}


def test_datatrove_gives_the_same_verdicts():
    """
    Each rule by a filter that has no other, with the limits of curate.RULES and our words. For the rule about
    letters, words are what stands between blanks.
    """
    filters = pytest.importorskip("datatrove.pipeline.filters")
    data, tokenizers = map(importlib.import_module, ("datatrove.data", "datatrove.utils.word_tokenizers"))

    class Words(tokenizers.WordTokenizer):
        word_tokenize = sent_tokenize = span_tokenize = None

        def __init__(self, words):
            self.word_tokenize = words

    assert set(SETTINGS) == set(PROSE_RULES) - {"language"}
    theirs = set()
    for rule, (kind, *names) in SETTINGS.items():
        settings = {name: value for name, value in zip(names, PROSE_RULES[rule][1]) if name}
        if rule in SPANS:
            settings = {"dup_n_grams": ((5 + SPANS.index(rule), settings["dup_n_grams"]),)}
        words = Words(str.split if rule == "gopher_words_without_letters" else words_of)
        kept = getattr(filters, kind)(**{**OFF[kind], "language": words, **settings}).filter
        theirs |= {
            (case, rule) for case, (text, _) in CASES.items() if kept(data.Document(text, "")) is not True
        }
    recorded = {(case, rule) for case, (_, rules) in CASES.items() for rule in rules}
    assert recorded - theirs == OURS_ALONE and theirs - recorded == THEIRS_ALONE


FRENCH = """La tour qui domine the vallée, construite par des moines, sert de refuge aux voyageurs.
Chaque matin un berger y monte avec ses chiens to voir si la neige est tombée pendant la nuit.
Le vieux pont de la ville est fermé depuis que la rivière a monté, et personne ne sait quand il ouvrira."""
CODE = (
    "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n\nprint(f(1), A())\n# so that it is long enough\n"
)


@pytest.mark.parametrize(
    ("text", "profile", "rule"),
    [
        (english(12, 3), "prose", None),
        (FRENCH, "prose", "language"),
        (f"{FRENCH}\n{FRENCH}", "prose", "gopher_duplicate_lines"),  # the first in the table that it fails
        ("hm\n", "dialogue", "gopher_few_or_many_words"),
        ("hm\n", "none", None),
        (CODE, "code", None),
        (CODE + "x = '" + "a b " * 400 + "'\n", "code", "codeparrot_long_line"),
        (CODE + "#" * 900 + "\n" + "-" * 900, "code", "codeparrot_mean_line"),
    ],
)
def test_a_document_is_judged_by_its_profile_and_not_by_its_neighbours(text, profile, rule):
    others = [english(12, 40 + i) if profile != "code" else CODE for i in range(3)]
    texts = [*others, text, *others]
    assert curate.judge(curate.read_words(texts), texts, profile) == [None] * 3 + [rule] + [None] * 3


# ---- near-duplicates


def changed(text, share, seed):
    """The text with a share of its words replaced."""
    rng = np.random.default_rng(seed)
    return " ".join(f"w{rng.integers(10**9)}" if rng.random() < share else w for w in text.split(" "))


def share_bands(texts, others):
    keys, other_keys = (curate.signatures(curate.read_words(ts)) for ts in (texts, others))
    return (keys == other_keys).any(0).mean()


def test_near_duplicates_share_a_band_and_others_do_not():
    texts = [english(25, i) for i in range(100)]
    assert share_bands(texts, [changed(t, 0.01, i) for i, t in enumerate(texts)]) > 0.95
    assert share_bands(texts, texts[::-1]) < 0.05
    assert share_bands(texts, [t.upper().replace(",", " -") for t in texts]) == 1  # words alone count
    short = share_bands(["tiny one"], ["tiny one"]), share_bands(["tiny one"], ["tiny two"])
    assert short[0] > short[1]  # too short for any shingle
    texts = [english(5, i) for i in range(6)] + ["", "two words"]
    alone = [curate.signatures(curate.read_words([t])) for t in texts]
    assert np.array_equal(curate.signatures(curate.read_words(texts)), np.concatenate(alone, 1))


# ---- decontamination


@pytest.fixture(scope="module")
def evaluations():
    exam = "Natalia sold clips to 48 of her fri\u00adends in April, and then she sold half as many in May."
    return {**curate.text_tables({"exam": [exam]}), **curate.arc_tables(arc.load("arc1_eval")[:60])}


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("NATALIA sold clips to 48 of her friends in April -- and then she sold something else.", True),
        ("“Natalia sold ‘clips’ to 48 of her friends—in April… and then she” went home.", True),  # 13 words
        ("Natalia sold clips to 48 of her friends in april, and afterwards went home.", False),  # 11 words
    ],
)
def test_text_that_quotes_an_evaluation_is_found(evaluations, text, quoted):
    found = curate.quoted(curate.read_words(["nothing to see", text, "nor here"]), evaluations)
    assert found == ({1: "exam"} if quoted else {})


def test_arc_outputs_in_text_are_found_however_they_are_written(evaluations):
    outputs = (o for t in arc.load("arc1_eval")[:60] for _, o in t.test)
    grid = next(o for o in outputs if min(o.shape) > 6 and len(np.unique(o[:3])) > 3)
    turned = np.rot90(grid.T, 3)
    ways = [
        str(turned.tolist()),
        "\n".join("".join(map(str, row)) for row in turned),
        "\n".join(" ".join(map(str, row)) for row in turned),
        f'{{"output": {turned.tolist()}}}'.replace(" ", ""),
        "\n".join("|" + "|".join(map(str, row)) + "|" for row in turned.tolist()),
    ]
    texts = [f"import json\ntask = {way}\nprint(task)\n" for way in ways]
    assert set(curate.quoted(curate.read_words(texts), evaluations)) == set(range(len(ways)))
    rng = np.random.default_rng(0)
    others = [str(rng.integers(0, 10, size=grid.shape).tolist()) for _ in range(50)]
    others.append(str(np.zeros((9, 9), int).tolist()))
    assert curate.quoted(curate.read_words(others), evaluations) == {}


def test_an_evaluation_output_is_recognised_in_disguise_unless_it_is_trivial():
    rng, tests = np.random.default_rng(3), []
    for task in arc.evaluation_tasks():
        tests += [(task.id, *pair) for pair in task.test]
    trivial = 0
    for name, question, output in tests:
        plain = output.size <= 9 or len(np.unique(output)) == 1
        trivial += plain
        shape = arc.random_augment(rng, "arc")
        turned = arc.augment(shape, output)
        # what equals a trivial one by chance gives nothing away, but the whole pair is the evaluation's task
        assert bool(curate.given_away([turned])) == (not plain)
        found = curate.given_away([arc.augment(shape, question), turned])
        assert found and (found == [name] or not plain)  # a few outputs are those of several tasks
        if plain and len(np.unique(output)) > 2:  # input and output have to be turned alike, in this order
            assert not curate.given_away([question, np.rot90(output)])
            assert not curate.given_away([output, question])
    assert trivial == 27
    mine = np.array([[1, 2, 3], [0, 0, 0], [0, 0, 1]], np.uint8)
    assert curate.given_away([mine, mine, np.zeros((9, 9), np.uint8), np.ones((1, 1), np.uint8)]) == []


def changed_grids(task, change):
    parts = ([tuple(map(change, pair)) for pair in pairs] for pairs in (task.train, task.test))
    return arc.Task("x", task.kind, *parts)


@pytest.mark.parametrize("suite", suites.ON_GRIDS)
def test_a_held_out_puzzle_in_disguise_is_recognised(suite):
    """Whatever source it comes from: all suites are kept out of all of them."""
    held, task = curate.held_out(False), suites.load(suite)[0]
    recoloured = changed_grids(task, lambda g: (g * (g > 0) % 9 + (g > 0)).astype(np.uint8))
    assert held.has(task, "none") and held.has(changed_grids(task, np.rot90), "none")
    assert held.has(recoloured, "arc")
    assert not held.has(recoloured, "none")  # nothing that the loader does leads from one to the other
    other = np.arange(25, dtype=np.uint8).reshape(5, 5) % 7
    as_demonstration = arc.Task("x", task.kind, recoloured.test, [(other, other)])
    assert held.has(as_demonstration, "arc") and not held.has(as_demonstration, "none")


def test_puzzles_that_are_not_held_out():
    held, draw = curate.held_out(False), np.random.default_rng(5)
    assert not held.has(puzzles.maze(draw, 9, 9), "dihedral")
    assert not held.has(puzzles.sudoku(draw, 4, 6, "train"), "none")
    assert not held.has(puzzles.sudoku(draw, 9, 30), "sudoku")
