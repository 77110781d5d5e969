"""loader.py: the same seed gives the same batches, however many processes share them and wherever they are interrupted."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

from smol import arc
from smol import loader as loader_file
from smol import tokenizer as tok
from smol.loader import BUCKETS, IGNORE, Ahead, Loader, pad_rows, puzzle_row

torch.set_num_threads(1)


# ---- a tiny stage, written from the documented layout alone


def write_stage(data, sources, weights=None, stage="demo"):
    """sources: list of (name, kind, split, augment, list of documents) -> a stage in `data`, weighted evenly unless told."""
    entries = []
    for number, (name, kind, split, augment, documents) in enumerate(sources):
        path = data / "processed" / name / f"{split}-{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = np.concatenate(documents).astype("<u2").tobytes()
        offsets = np.cumsum([0] + [len(d) for d in documents]).astype("<i8").tobytes()
        path.write_bytes(tokens)
        path.with_suffix(".idx").write_bytes(offsets)
        entries.append(
            {
                "path": str(path.relative_to(data)),
                "sha256": hashlib.sha256(tokens).hexdigest(),
                "idx_sha256": hashlib.sha256(offsets).hexdigest(),
                "tokens": len(tokens) // 2,
                "documents": len(documents),
                "bytes": len(tokens),
                "source": name,
                "group": "web" if kind == "text" else "synth",
                "kind": kind,
                "split": split,
                "augment": augment,
                "tokenizer": tok.fingerprint(),
            }
        )
    names = sorted({e["source"] for e in entries if e["split"] == "train"})
    weights = weights or {name: 1 / len(names) for name in names}
    mixture = {
        "stage": stage,
        "seed": 1,
        "tokenizer": tok.fingerprint(),
        "weights": weights,
        "groups": {"web": 1.0},
    }
    folder = data / "stages" / stage
    folder.mkdir(parents=True)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (folder / "mixture.json").write_text(json.dumps(mixture))
    return data


def text_documents(n, first=0, length=13):
    """Documents whose tokens count up, so that every token says where it comes from."""
    ids = np.arange(first, first + n * length).reshape(n, length)
    ids[:, -1] = tok.EOT
    return list(ids)


def pairs_of(rng, n, low, high):
    """The output is the input with its rows mirrored: true in every symmetry up to a flip, false if input and output are mixed up."""
    grids = [rng.integers(0, 10, rng.integers(low, high + 1, 2)).astype(np.uint8) for _ in range(n)]
    return [(g, (g + 1) % 10) for g in grids]


def puzzle_documents(n, seed=0, low=1, high=4, most=4, kind="arc"):
    rng = np.random.default_rng(seed)
    return [arc.encode(kind, pairs_of(rng, int(rng.integers(1, most + 1)), low, high)) for _ in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two text sources, one of them in two shards, and two of puzzles."""
    return write_stage(
        tmp_path_factory.mktemp("data"),
        [
            ("prose", "text", "train", "none", text_documents(40)),
            ("prose", "text", "train", "none", text_documents(30, first=600)),
            ("prose", "text", "val", "none", text_documents(20, first=2000)),
            ("code", "text", "train", "none", text_documents(25, first=3000)),
            ("grids", "puzzle", "train", "arc", puzzle_documents(60)),
            ("grids", "puzzle", "train", "arc", puzzle_documents(7, seed=5)),
            ("grids", "puzzle", "val", "arc", puzzle_documents(30, seed=1)),
            (
                "sudoku",
                "puzzle",
                "train",
                "dihedral",
                puzzle_documents(20, seed=2, low=4, high=4, most=1, kind="sudoku"),
            ),
            (
                "sudoku",
                "puzzle",
                "val",
                "dihedral",
                puzzle_documents(9, seed=3, low=4, high=4, most=1, kind="sudoku"),
            ),
        ],
    )


def make(data, **settings):
    defaults = dict(
        stage="demo", seed=1, batch_size=2, block_size=96, batches_per_step=4, puzzle_format="autoregressive"
    )
    return Loader(data, **{**defaults, **settings})


def shown(batches):
    return [(b.source, b.mode, b.key, b.idx.tolist(), b.targets.tolist()) for b in batches]


def run(loader, steps):
    return [shown(loader.next_step()) for _ in range(steps)]


# ---- determinism


@pytest.mark.parametrize("puzzle_format", ("autoregressive", "canvas"))
def test_the_same_seed_gives_the_same_batches(data, puzzle_format):
    a, b, c = (run(make(data, seed=s, puzzle_format=puzzle_format), 12) for s in (1, 1, 2))
    assert a == b and a != c
    assert [x[0][0] for x in a] != [x[0][0] for x in c]  # even the order of sources differs
    # global random state plays no part
    torch.manual_seed(5)
    np.random.seed(5)
    assert run(make(data, puzzle_format=puzzle_format), 12) == a


@pytest.mark.parametrize("world_size", (2, 4))
def test_processes_share_the_batches_of_one(data, world_size):
    alone = run(make(data), 25)
    parts = [run(make(data, rank=rank, world_size=world_size), 25) for rank in range(world_size)]
    for step, batches in enumerate(alone):
        shared = [b for part in parts for b in part[step]]
        assert sorted(shared, key=lambda b: b[2][0]) == batches
        assert [b[2][0] for b in batches] == [0, 1, 2, 3]
        for rank, part in enumerate(parts):
            assert [b[2][0] for b in part[step]] == list(range(rank, 4, world_size))


@pytest.mark.parametrize("stop", (0, 1, 2, 5, 11, 23))
@pytest.mark.parametrize("puzzle_format", ("autoregressive", "canvas"))
def test_going_on_where_it_stopped(data, stop, puzzle_format):
    first = make(data, puzzle_format=puzzle_format)
    run(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    kept = json.dumps(state)
    want = run(first, 12)
    assert json.dumps(state) == kept  # a state that was taken stays what it was
    second = make(data, puzzle_format=puzzle_format)
    run(second, 3)  # wherever it was
    second.load_state_dict(state)
    assert run(second, 12) == want
    assert second.state_dict() == first.state_dict()
    # with another number of processes as well
    halves = [make(data, puzzle_format=puzzle_format, rank=r, world_size=2) for r in (0, 1)]
    for half in halves:
        half.load_state_dict(state)
    for step in want:
        assert sorted((b for half in halves for b in shown(half.next_step())), key=lambda b: b[2][0]) == step


def test_a_state_of_other_sources_is_refused(data):
    state = make(data).state_dict()
    with pytest.raises(ValueError, match="mixture") as e:
        make(data, weights={"prose": 1}).load_state_dict(state)
    assert "\n" not in str(e.value)


def test_fingerprint_is_of_the_shards_read(data, tmp_path):
    assert make(data).fingerprint == make(data, seed=9, batch_size=3).fingerprint
    assert make(data).fingerprint != make(data, weights={"prose": 1}).fingerprint
    other = write_stage(tmp_path, [("prose", "text", "train", "none", text_documents(41))])
    assert make(other).fingerprint != make(data, weights={"prose": 1}).fingerprint


# ---- text


@pytest.mark.parametrize("block_size", (7, 16, 96))
def test_every_token_is_seen_once_in_an_epoch(data, block_size):
    loader = make(data, weights={"prose": 1}, batch_size=1, batches_per_step=1, block_size=block_size)
    tokens = np.concatenate(text_documents(40) + text_documents(30, first=600))
    windows = (len(tokens) - 1) // block_size
    orders = []
    for _ in range(3):
        batches = [loader.next_step()[0] for _ in range(windows)]
        rows = {}
        for b in batches:
            assert (
                b.mode == "text"
                and b.idx.shape == b.targets.shape == (1, block_size)
                and b.idx.dtype == torch.long
            )
            assert torch.equal(b.idx[:, 1:], b.targets[:, :-1])
            rows[tuple(b.idx[0].tolist())] = b.targets[0, -1].item()
        orders.append([tuple(b.idx[0].tolist()) for b in batches])
        for i in range(windows):  # each window, each once, followed by its next token
            window = tuple(tokens[i * block_size : (i + 1) * block_size].tolist())
            assert rows[window] == tokens[(i + 1) * block_size]
        assert len(rows) == windows
    if windows > 9:
        assert orders[0] != orders[1] and orders[1] != orders[2]


def test_epochs_may_end_inside_a_batch(data):
    small = make(data, weights={"code": 1}, batch_size=1, batches_per_step=1, block_size=20)
    large = make(data, weights={"code": 1}, batch_size=7, batches_per_step=3, block_size=20)
    rows = [b.idx[0] for _ in range(63) for b in small.next_step()]
    assert torch.equal(torch.stack(rows), torch.cat([b.idx for _ in range(3) for b in large.next_step()]))


def test_too_little_text_for_one_row(data):
    with pytest.raises(ValueError, match="code.*325 tokens.*block_size=512") as e:
        make(data, weights={"code": 1}, block_size=512)
    assert "\n" not in str(e.value)


# ---- puzzle rows


def symmetries(got, pairs):
    """All (turn, colours, order) that make pairs[order[i]] into got[i], colours as a dict of those that occur."""
    for turn, order in itertools.product(range(8), itertools.permutations(range(len(pairs)))):
        colours, fits = {}, True
        for pair, i in zip(got, order):
            for g, g0 in zip(pair, pairs[i]):
                turned = np.rot90(g0.T if turn >= 4 else g0, turn % 4)
                fits = fits and turned.shape == g.shape
                fits = fits and all(
                    colours.setdefault(int(a), int(b)) == b for a, b in zip(turned.flat, g.flat)
                )
        if fits and len(set(colours.values())) == len(colours):
            yield turn, colours, order


def test_an_autoregressive_row_is_the_shifted_document():
    for document in puzzle_documents(40):
        kind, pairs = arc.decode(document)
        idx, targets = puzzle_row(document, "autoregressive", "none")
        assert idx.dtype == targets.dtype == np.int64 and len(idx) == len(targets) == len(document) - 1
        assert np.array_equal(idx, document[:-1])
        answer = arc.encode_grid(pairs[-1][1])
        loss = targets != IGNORE
        assert loss.sum() == len(answer) + 1  # the answer and the end, and they come last
        assert np.array_equal(targets[loss], [*answer, tok.EOT]) and loss[-len(answer) - 1 :].all()
        assert idx[len(idx) - len(answer) - 1] == tok.OUTPUT


def test_a_canvas_row_shows_nothing_of_the_answer():
    for document in puzzle_documents(40) + puzzle_documents(5, kind="maze", most=1):
        kind, pairs = arc.decode(document)
        *demos, (test_input, answer) = pairs
        idx, targets = puzzle_row(document, "canvas", "none")
        H, W = np.maximum(arc.canvas_shape(demos, test_input), answer.shape)
        seen = np.concatenate(
            [
                [arc.KINDS[kind]],
                *([m, *arc.encode_grid(g)] for p in demos for m, g in zip((tok.INPUT, tok.OUTPUT), p)),
            ]
        )
        prompt = [*seen, tok.OUTPUT]
        assert np.array_equal(idx[: len(prompt)], prompt)
        shown = idx[len(prompt) :].reshape(H, W + 1)
        for r in range(H):
            for c in range(W):
                given = r < test_input.shape[0] and c < test_input.shape[1]
                assert shown[r, c] == (tok.CELL0 + int(test_input[r, c]) if given else tok.BLANK)
        assert (shown[:, W] == tok.ROW).all() and (targets[: len(prompt)] == IGNORE).all()
        canvas = targets[len(prompt) :].reshape(H, W + 1)
        assert (canvas[:, W] == IGNORE).all()
        h, w = answer.shape
        for r in range(H):
            for c in range(W):
                assert canvas[r, c] == (tok.CELL0 + int(answer[r, c]) if r < h and c < w else tok.VOID)
        assert np.array_equal(arc.read_canvas(targets[len(prompt) :], (H, W)), answer)


def test_an_answer_larger_than_the_canvas_is_learned_from_all_the_same():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 10, (2, 2)).astype(np.uint8), rng.integers(0, 10, (5, 1)).astype(np.uint8)
    idx, targets = puzzle_row(arc.encode("arc", [(x, x), (x, y)]), "canvas", "none")
    assert np.array_equal(arc.read_canvas(targets[-5 * 3 :], (5, 2)), y) and len(idx) == len(targets)


@pytest.mark.parametrize("augment", ("none", "dihedral", "arc"))
def test_an_augmented_row_is_a_symmetry_of_its_document(augment):
    orders, tests, turns, recoloured = set(), set(), set(), False
    for n, document in enumerate(puzzle_documents(30, low=2, high=4)):
        kind, pairs = arc.decode(document)
        idx, targets = puzzle_row(document, "autoregressive", augment, np.random.default_rng(n))
        assert kind == "arc" and len(idx) == len(targets)
        got = arc.decode(np.append(idx, tok.EOT))[1]
        assert np.array_equal(targets[targets != IGNORE], [*arc.encode_grid(got[-1][1]), tok.EOT])
        found = list(symmetries(got, pairs))
        assert found, "no symmetry leads back to the document"
        # of several explanations, the one without new colours
        turn, colours, order = min(found, key=lambda f: sum(a != b for a, b in f[1].items()))
        turns.add(turn)
        recoloured |= any(a != b for a, b in colours.items())
        if len(pairs) == 3:
            orders.add(order)
            tests.add(order[-1])
    assert len(orders) >= 3 and tests == {
        0,
        1,
        2,
    }  # demonstrations change places, every pair is once the test
    if augment == "none":
        assert turns == {0} and not recoloured
    else:
        assert len(turns) >= 5
        assert recoloured == (augment == "arc")


def test_without_a_generator_the_document_is_left_as_it_is():
    document = puzzle_documents(3)[2]
    for augment in ("none", "arc"):
        assert np.array_equal(puzzle_row(document, "autoregressive", augment)[0], document[:-1])


def test_both_formats_see_the_same_puzzles(data):
    a, b = (make(data, weights={"sudoku": 1}, puzzle_format=f) for f in ("autoregressive", "canvas"))
    for n in range(10):
        (x, _), (y, _) = a.sources["sudoku"].row(n), b.sources["sudoku"].row(n)
        at, start = (np.flatnonzero(ids == tok.OUTPUT)[-1] for ids in (x, y))
        asked = y[start + 1 :][y[start + 1 :] != tok.BLANK]  # a sudoku's canvas is as large as its question
        assert np.array_equal(x[:at], [*y[:start], tok.INPUT, *asked])


# ---- batches of puzzles


@pytest.mark.parametrize("puzzle_format", ("autoregressive", "canvas"))
def test_puzzle_batches_are_full_but_never_too_large(data, puzzle_format):
    loader = make(
        data, weights={"grids": 1, "sudoku": 1}, puzzle_format=puzzle_format, batch_size=4, block_size=128
    )
    shapes = {}
    for _ in range(20):
        for number, batch in enumerate(loader.next_step()):
            B, L = batch.idx.shape
            assert batch.mode == "puzzle" and batch.key == (number, L)
            assert (L in BUCKETS or L == 128) and L <= 128
            assert B == max(1, 4 * 128 // L)
            assert shapes.setdefault(batch.key, B) == B  # a carry of that key fits
            lengths = (batch.idx != tok.PAD).sum(1)
            shorter = max([b for b in BUCKETS if b < L], default=0)
            assert ((lengths > shorter) & (lengths <= L)).all()
            for row, targets, n in zip(batch.idx, batch.targets, lengths):
                assert (row[n:] == tok.PAD).all() and (targets[n:] == IGNORE).all()
                assert (row[:n] != tok.PAD).all() and (targets != IGNORE).any()


def test_rows_longer_than_the_block_are_skipped(tmp_path):
    short, long = (
        puzzle_documents(5, low=1, high=2, most=1),
        puzzle_documents(5, seed=1, low=9, high=9, most=2),
    )
    data = write_stage(tmp_path, [("mixed", "puzzle", "train", "none", short + long)])
    loader = make(data, block_size=24, batch_size=2)
    for _ in range(10):
        for batch in loader.next_step():
            assert batch.idx.shape[1] <= 24
    only_long = write_stage(tmp_path / "b", [("long", "puzzle", "train", "none", long[:1])])
    with pytest.raises(ValueError, match="long.*block_size=24") as e:
        make(only_long, block_size=24).next_step()
    assert "\n" not in str(e.value)


def test_few_short_rows_among_many_long_ones_are_no_error(tmp_path):
    """Ten thousand long draws have to come in a row before the source is given up."""
    short, long = (
        puzzle_documents(1, low=1, high=1, most=1),
        puzzle_documents(1, seed=1, low=5, high=5, most=1),
    )
    data = write_stage(tmp_path, [("mixed", "puzzle", "train", "none", short + 29 * long)])
    loader = make(data, block_size=16, batch_size=450, batches_per_step=1)
    assert loader.next_step()[0].idx.shape == (450, 16)


def test_draws_cover_all_documents(data):
    source = make(data, weights={"sudoku": 1}).sources["sudoku"]
    plain = [loader_file.draw_rng(1, "sudoku", n).integers(source.shards.n_documents) for n in range(400)]
    assert set(plain) == set(range(20))
    want = puzzle_documents(60) + puzzle_documents(7, seed=5)  # across both shards
    shards = make(data).sources["grids"].shards
    assert shards.n_documents == 67 and all(np.array_equal(shards.document(i), want[i]) for i in range(67))


def test_pad_rows():
    idx, targets = pad_rows([(np.array([1, 2]), np.array([3, 4])), (np.array([5]), np.array([6]))], 3)
    assert idx.tolist() == [[1, 2, tok.PAD], [5, tok.PAD, tok.PAD]] and targets.tolist() == [
        [3, 4, IGNORE],
        [6, IGNORE, IGNORE],
    ]


# ---- the mixture


def test_shares_of_the_mixture_are_kept(data):
    """A process with no batch of its own goes through the steps without building text."""
    shares = {"prose": 6, "code": 3, "sudoku": 1}
    loader = make(data, weights=shares, batch_size=1, batches_per_step=1, rank=1, world_size=2, block_size=64)
    for _ in range(2000):
        assert loader.next_step() == []
    state = loader.state_dict()["sources"]
    steps = {name: state[name]["drawn"] for name in ("prose", "code")}
    steps["sudoku"] = 2000 - sum(steps.values())
    for name, share in shares.items():
        expected = 2000 * share / 10
        assert abs(steps[name] - expected) < 4 * (expected * (1 - share / 10)) ** 0.5, steps


def test_a_step_belongs_to_one_source(data):
    loader = make(data)
    seen = set()
    for _ in range(40):
        (source,) = {b.source for b in loader.next_step()}
        seen.add(source)
    assert seen == {"prose", "code", "grids", "sudoku"}


def test_the_stage_has_a_mixture_of_its_own(tmp_path):
    data = write_stage(
        tmp_path,
        [
            ("a", "text", "train", "none", text_documents(9)),
            ("b", "text", "train", "none", text_documents(9)),
        ],
        weights={"a": 1.0, "b": 0.0},
    )
    assert list(make(data).sources) == ["a"]
    assert list(make(data, weights={"b": 2}).sources) == ["b"]


@pytest.mark.parametrize(
    "settings, message",
    (
        (dict(weights={"prose": 1, "wiki": 1}), "wiki.*it has: code, grids, prose, sudoku"),
        (dict(weights={"prose": 0, "code": 0}), "zero"),
        (dict(weights={"prose": 2, "code": -1}), "-1"),
        (dict(stage="stage9"), "stage9"),
        (dict(stage="../demo"), "not the name"),
    ),
)
def test_a_mixture_that_cannot_be(data, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        make(data, **settings)
    assert "\n" not in str(e.value)


def test_weight_for_a_source_that_is_only_held_out(tmp_path):
    """To train on what is there instead would quietly be another mixture."""
    data = write_stage(
        tmp_path,
        [("a", "text", "train", "none", text_documents(9)), ("b", "text", "val", "none", text_documents(9))],
    )
    with pytest.raises(ValueError, match="'b'"):
        make(data, weights={"a": 1, "b": 1}, block_size=16)


def test_missing_stage_and_damaged_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare.py demo"):
        make(tmp_path)
    data = write_stage(tmp_path, [("a", "text", "train", "none", text_documents(9))])
    shard = data / "processed/a/train-0.bin"
    good = shard.read_bytes()
    for bad in (good[:-2], bytes([good[0] ^ 1]) + good[1:], b""):
        shard.write_bytes(bad)
        with pytest.raises(ValueError, match="train-0.bin") as e:
            make(data, block_size=16)
        assert "\n" not in str(e.value)
    shard.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="train-0.bin"):
        make(data, block_size=16, verify=False)


# ---- validation


def val(loader, mode, n):
    return [
        (name, number, idx.tolist(), targets.tolist())
        for name, number, idx, targets in loader.val_batches(mode, n)
    ]


@pytest.mark.parametrize("mode", ("text", "puzzle"))
@pytest.mark.parametrize("puzzle_format", ("autoregressive", "canvas"))
def test_validation_is_always_the_same_and_shared_out(data, mode, puzzle_format):
    loader = make(data, puzzle_format=puzzle_format)
    alone = val(loader, mode, 3)
    assert alone and {name for name, *_ in alone} == ({"prose"} if mode == "text" else {"grids", "sudoku"})
    run(loader, 5)
    assert val(loader, mode, 3) == alone
    assert val(make(data, seed=7, puzzle_format=puzzle_format), mode, 3) == alone
    for world_size in (2, 3):
        parts = [
            val(make(data, puzzle_format=puzzle_format, rank=r, world_size=world_size), mode, 3)
            for r in range(world_size)
        ]
        assert sorted(b for part in parts for b in part) == sorted(alone)


def test_validation_text_is_held_out_text_in_order(data):
    tokens = np.concatenate(text_documents(20, first=2000))
    for n in (1, 2, 100):
        batches = val(make(data, weights={"prose": 1}, block_size=16), "text", n)
        assert len(batches) <= n
        rows = [row for _, _, idx, _ in batches for row in idx]
        ends = [row[-1] for _, _, _, targets in batches for row in targets]
        assert len({tuple(row) for row in rows}) == len(rows)
        for row, end in zip(rows, ends):
            at = int(np.flatnonzero(tokens == next(t for t in row if t != tok.EOT))[0]) - [
                t != tok.EOT for t in row
            ].index(True)
            assert tokens[at : at + 17].tolist() == [*row, end]
    assert len(rows) == (len(tokens) - 1) // 16  # asked for enough, all of it


def test_validation_puzzles_are_left_as_they_are(data):
    loader = make(data, weights={"grids": 1, "sudoku": 0}, batch_size=40, block_size=128)
    documents = {tuple(d[:-1].tolist()) for d in puzzle_documents(30, seed=1) if len(d) <= 129}
    rows = [
        tuple(t for t in row if t != tok.PAD)
        for name, _, idx, _ in val(loader, "puzzle", 1)
        if name == "grids"
        for row in idx
    ]
    assert len(rows) == len(set(rows)) and set(rows) == documents


def test_validation_reads_no_more_puzzles_than_n_batches_of_batch_size(data):
    for n in (1, 2, 3):
        for name in ("grids", "sudoku"):
            rows = [
                row
                for source, _, idx, _ in val(make(data, batch_size=4), "puzzle", n)
                for row in idx
                if source == name
            ]
            assert 0 < len(rows) <= 4 * n


@pytest.mark.parametrize("puzzle_format", ("autoregressive", "canvas"))
@pytest.mark.parametrize(
    "tokens, block_size", [(13, 12), (13, 13), (26, 14), (130, 96), (130, "a small puzzle's")]
)
def test_what_is_not_validated_is_what_validation_gives_no_rows_of(
    tmp_path, tokens, block_size, puzzle_format
):
    short, long = (puzzle_documents(3, low=side, high=side, most=1, kind="sudoku") for side in (2, 8))
    data = write_stage(
        tmp_path,
        [
            ("prose", "text", "train", "none", text_documents(40)),
            ("prose", "text", "val", "none", text_documents(tokens // 13)),
            ("code", "text", "train", "none", text_documents(40)),
            ("small", "puzzle", "train", "none", short),
            ("small", "puzzle", "val", "none", short),
            ("large", "puzzle", "train", "none", short),
            ("large", "puzzle", "val", "none", [*long, *short]),
        ],
    )
    if isinstance(block_size, str):
        block_size = max(len(puzzle_row(d, puzzle_format, "none")[0]) for d in short)
    weights = {"prose": 1, "code": 0, "small": 1, "large": 1}
    loader = make(data, block_size=block_size, batch_size=1, puzzle_format=puzzle_format, weights=weights)
    for n in (1, 3, 4):
        seen = {name for mode in ("text", "puzzle") for name, *_ in val(loader, mode, n)}
        why = loader.not_validated(n)
        assert set(why) == {"prose", "code", "small", "large"} - seen
        assert why["code"] == "it has no validation shard"
        if "prose" in why:
            assert f"{tokens} tokens" in why["prose"] and f"block_size={block_size}" in why["prose"]
        if "large" in why:
            assert f"its first {n} puzzles" in why["large"] or n == 4


# ---- working ahead


def test_ahead_gives_the_same_batches_and_knows_where_they_end(data):
    alone = make(data, puzzle_format="canvas")
    ahead = Ahead(make(data, puzzle_format="canvas"), depth=3)
    for _ in range(9):
        assert shown(ahead.next_step()) == shown(alone.next_step())
        assert ahead.state == alone.state_dict()  # and not where the thread has got to
    want = run(alone, 4)
    ahead.close()
    assert not ahead.thread.is_alive()
    again = make(data, puzzle_format="canvas")
    again.load_state_dict(json.loads(json.dumps(ahead.state)))
    assert run(again, 4) == want


def test_ahead_passes_errors_on(data):
    ahead = Ahead(make(data, block_size=1, weights={"grids": 1}))
    for _ in range(2):
        with pytest.raises(ValueError, match="raise it"):
            ahead.next_step()
    ahead.close()


def test_padding_is_not_counted(data):
    loader = make(data)
    for _ in range(8):
        for batch in loader.next_step():
            assert batch.tokens == int((batch.idx != tok.PAD).sum()) <= batch.idx.numel()


def test_windows_across_shards(data):
    """Every stretch of three shards read as one, also those that begin and end at their borders."""
    entries = [
        e
        for e in map(json.loads, open(data / "stages" / "demo" / "manifest.jsonl"))
        if e["source"] in ("prose", "code")
    ]
    shards = loader_file.Shards(data, entries)
    whole = np.concatenate([np.fromfile(data / e["path"], "<u2") for e in entries]).astype(np.int64)
    borders = sorted(
        {int(b) + d for b in shards.first_token for d in (-1, 0, 1)} & set(range(len(whole) + 1))
    )
    for start, stop in itertools.combinations(borders, 2):
        assert (shards.slice(start, stop) == whole[start:stop]).all()


# ---- frozen stages


def test_a_frozen_stage_is_read_by_its_tag(tmp_path):
    data = write_stage(tmp_path, [("prose", "text", "train", "none", text_documents(40))])
    stage = data / "stages" / "demo"
    frozen = stage / "v1"
    frozen.mkdir()
    snapshot = {"stage": "demo", "tag": "v1", "tokenizer": tok.fingerprint()}
    for name in ("manifest.jsonl", "mixture.json"):
        (frozen / name).write_bytes((stage / name).read_bytes())
        snapshot[name.split(".")[0] + "_sha256"] = hashlib.sha256((stage / name).read_bytes()).hexdigest()
    (frozen / "snapshot.json").write_text(json.dumps(snapshot))
    assert run(make(data, tag="v1"), 5) == run(make(data), 5)
    assert (
        make(data, tag="v1").snapshot == hashlib.sha256((frozen / "snapshot.json").read_bytes()).hexdigest()
    )
    assert make(data).snapshot is None
    # the working stage may go on changing; the frozen one may not
    (stage / "manifest.jsonl").write_text("")
    assert len(run(make(data, tag="v1"), 1)) == 1
    with pytest.raises(FileNotFoundError, match="'v2'"):
        make(data, tag="v2")
    for key in ("stage", "tag", "manifest_sha256", "mixture_sha256"):
        (frozen / "snapshot.json").write_text(json.dumps({**snapshot, key: "other"}))
        with pytest.raises(ValueError, match="v1/.*pull demo:v1 again"):
            make(data, tag="v1")
    (frozen / "snapshot.json").write_text("{")
    with pytest.raises(ValueError, match="snapshot.json is missing, damaged"):
        make(data, tag="v1")
