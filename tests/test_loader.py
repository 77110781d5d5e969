"""loader.py: the same seed gives the same batches, however many processes share them, interrupted or not."""

import itertools
import json

import numpy as np
import pytest
import torch

from smol import arc, puzzles, snapshots, suites
from smol import loader as loader_file
from smol import tokenizer as tok
from smol.loader import BUCKETS, IGNORE, Ahead, Loader, puzzle_row

FORMATS = pytest.mark.parametrize("puzzle_format", ("autoregressive", "canvas"))


def write_stage(data, sources, weights=None):
    """sources: list of (name, kind, split, augment, list of documents)."""
    entries = []
    for name, kind, split, augment, documents in sources:
        about = {"source": name, "group": "web", "kind": kind, "augment": augment}
        entries.append(snapshots.write_shard(data, about, split, documents))
    names = sorted({e["source"] for e in entries if e["split"] == "train"})
    weights = weights or {name: 1 / len(names) for name in names}
    mixture = {"stage": "demo", "seed": 1, "tokenizer": tok.fingerprint(), "weights": weights, "groups": {}}
    snapshots.write_stage(data, "demo", entries, mixture, {})
    return data


def text_documents(n, first=0):
    """Documents whose tokens count up, so that every token says where it comes from."""
    ids = np.arange(first, first + n * 13).reshape(n, 13)
    ids[:, -1] = tok.EOT
    return list(ids)


def puzzle_documents(n, seed=0, low=1, high=4, most=4, kind="arc"):
    """The output is the input with its colours moved by one: a symmetry has to treat both alike."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(n):
        shapes = rng.integers(low, high + 1, (int(rng.integers(1, most + 1)), 2))
        grids = [rng.integers(0, 10, shape).astype(np.uint8) for shape in shapes]
        documents.append(arc.encode(kind, [(g, (g + 1) % 10) for g in grids]))
    return documents


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two text sources, one of them in two shards, and two of puzzles."""
    small = {"low": 4, "high": 4, "most": 1, "kind": "sudoku"}
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
            ("sudoku", "puzzle", "train", "dihedral", puzzle_documents(20, seed=2, **small)),
            ("sudoku", "puzzle", "val", "dihedral", puzzle_documents(9, seed=3, **small)),
        ],
    )


def make(data, **settings):
    shape = {"batch_size": 2, "block_size": 96, "batches_per_step": 4, "puzzle_format": "autoregressive"}
    return Loader(data, **{"stage": "demo", "seed": 1, **shape, **settings})


def shown(batches):
    return [(b.source, b.mode, b.key, b.idx.tolist(), b.targets.tolist()) for b in batches]


def run(loader, steps):
    return [shown(loader.next_step()) for _ in range(steps)]


# ---- determinism


@FORMATS
def test_the_same_seed_gives_the_same_batches(data, puzzle_format):
    how = {"puzzle_format": puzzle_format, "batches_per_step": 3}
    a, b, c = (run(make(data, seed=s, **how), 12) for s in (1, 1, 2))
    assert a == b and a != c
    a_sources, c_sources = ([[batch[0] for batch in step] for step in x] for x in (a, c))
    assert a_sources != c_sources and a_sources == [make(data, **how).sources_of_step(i) for i in range(12)]
    torch.manual_seed(5)  # global random state plays no part
    np.random.seed(5)
    assert run(make(data, **how), 12) == a


@pytest.mark.parametrize("world_size", (2, 4))
def test_processes_share_the_batches_of_one(data, world_size):
    alone = run(make(data), 25)
    parts = [run(make(data, rank=rank, world_size=world_size), 25) for rank in range(world_size)]
    for step, batches in enumerate(alone):
        assert sorted((b for part in parts for b in part[step]), key=lambda b: b[2][0]) == batches
        for rank, part in enumerate(parts):
            assert [b[2][0] for b in part[step]] == list(range(rank, 4, world_size))


@FORMATS
@pytest.mark.parametrize("stop", (0, 23))
def test_going_on_where_it_stopped(data, stop, puzzle_format):
    first = make(data, puzzle_format=puzzle_format)
    run(first, stop)
    state = first.state_dict()
    kept = json.dumps(state)
    want = run(first, 12)
    assert json.dumps(state) == kept  # a state that was taken stays what it was
    second = make(data, puzzle_format=puzzle_format)
    run(second, 3)  # wherever it was
    second.load_state_dict(json.loads(kept))
    assert run(second, 12) == want
    assert second.state_dict() == first.state_dict()


@FORMATS
def test_going_on_with_other_sizes(data, puzzle_format):
    """No puzzle that waited for its batch is lost, and no batch is larger than its key allows."""
    first = make(data, batch_size=8, block_size=64, weights={"grids": 1}, puzzle_format=puzzle_format)
    run(first, 7)
    state = first.state_dict()
    for sizes in ({"batch_size": 1, "block_size": 64}, {"batch_size": 4, "block_size": 128}):
        second = make(data, **sizes, weights={"grids": 1}, puzzle_format=puzzle_format)
        second.load_state_dict(json.loads(json.dumps(state)))
        (source,) = second.sources.values()
        waiting = [n for held in source.waiting.values() for n, _ in held]
        assert sorted(waiting) == sorted(sum(state["sources"]["grids"]["waiting"].values(), []))
        for _, _, key, idx, _ in itertools.chain(*run(second, 20)):
            assert len(idx) == sizes["batch_size"] * sizes["block_size"] // key[2]


def test_ahead_gives_the_same_batches_and_knows_where_they_end(data):
    alone = make(data, puzzle_format="canvas")
    ahead = Ahead(make(data, puzzle_format="canvas"))
    for _ in range(9):
        assert shown(ahead.next_step()) == shown(alone.next_step())
        assert ahead.state == alone.state_dict()  # and not where the thread has got to
    want = run(alone, 4)
    ahead.close()
    again = make(data, puzzle_format="canvas")
    again.load_state_dict(json.loads(json.dumps(ahead.state)))
    assert run(again, 4) == want


def test_ahead_passes_errors_on(data, monkeypatch):
    monkeypatch.setattr(loader_file, "MOST_SKIPPED", 50)
    ahead = Ahead(make(data, block_size=1, weights={"grids": 1}))
    for _ in range(2):
        with pytest.raises(ValueError, match="50 draws of 'grids'.*block_size=1"):
            ahead.next_step()
    ahead.close()


def test_the_fingerprint_is_of_the_shards_that_are_read(data, tmp_path):
    assert make(data).fingerprint == make(data, seed=9, batch_size=3).fingerprint
    assert make(data).fingerprint != make(data, weights={"prose": 1}).fingerprint
    other = write_stage(tmp_path, [("prose", "text", "train", "none", text_documents(41))])
    assert make(other).fingerprint != make(data, weights={"prose": 1}).fingerprint


# ---- text


@pytest.mark.parametrize("block_size", (7, 96))
def test_every_token_is_seen_once_in_an_epoch(data, block_size):
    loader = make(data, weights={"prose": 1}, batch_size=1, batches_per_step=1, block_size=block_size)
    tokens = np.concatenate(text_documents(40) + text_documents(30, first=600))
    windows = (len(tokens) - 1) // block_size
    starts = range(0, windows * block_size, block_size)
    expected = sorted((tokens[i : i + block_size].tolist(), int(tokens[i + block_size])) for i in starts)
    orders = []
    for _ in range(2):
        batches = [loader.next_step()[0] for _ in range(windows)]
        assert all(b.mode == "text" and torch.equal(b.idx[:, 1:], b.targets[:, :-1]) for b in batches)
        orders.append([(b.idx[0].tolist(), b.targets[0, -1].item()) for b in batches])
        assert sorted(orders[-1]) == expected
    assert orders[0] != orders[1]


def test_epochs_may_end_inside_a_batch(data):
    settings = {"weights": {"code": 1}, "block_size": 20}
    small = make(data, batch_size=1, batches_per_step=1, **settings)
    large = make(data, batch_size=7, batches_per_step=3, **settings)
    rows = [b.idx[0] for _ in range(63) for b in small.next_step()]
    assert torch.equal(torch.stack(rows), torch.cat([b.idx for _ in range(3) for b in large.next_step()]))


# ---- puzzle rows


def test_an_autoregressive_row_is_the_shifted_document():
    for document in puzzle_documents(40):
        pairs = arc.decode(document)[1]
        idx, targets = puzzle_row(document, "autoregressive", "none")
        assert idx.dtype == targets.dtype == np.int64 and np.array_equal(idx, document[:-1])
        answer = [*arc.encode_grid(pairs[-1][1]), tok.EOT]  # the only targets, and they come last
        assert np.array_equal(targets, [IGNORE] * (len(idx) - len(answer)) + answer)
        assert idx[-len(answer)] == tok.OUTPUT


def test_a_canvas_row_shows_nothing_of_the_answer():
    for document in puzzle_documents(40) + puzzle_documents(5, kind="maze", most=1):
        kind, pairs = arc.decode(document)
        *demos, (test_input, answer) = pairs
        idx, targets = puzzle_row(document, "canvas", "none")
        H, W = np.maximum(arc.canvas_shape(demos, test_input), answer.shape)
        assert np.array_equal(idx, arc.encode_prompt(kind, demos, test_input, canvas=(H, W)))
        n = H * (W + 1)
        assert (targets[:-n] == IGNORE).all() and (idx[-n - 1], len(idx)) == (tok.OUTPUT, len(targets))
        canvas = np.full((H, W + 1), tok.VOID)
        canvas[: answer.shape[0], : answer.shape[1]] = tok.CELL0 + answer.astype(int)
        canvas[:, W] = IGNORE
        assert np.array_equal(targets[-n:].reshape(H, W + 1), canvas)


def test_an_answer_larger_than_the_canvas_is_learned_from_all_the_same():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 10, (2, 2)).astype(np.uint8), rng.integers(0, 10, (5, 1)).astype(np.uint8)
    idx, targets = puzzle_row(arc.encode("arc", [(x, x), (x, y)]), "canvas", "none")
    assert np.array_equal(arc.read_canvas(targets[-5 * 3 :], (5, 2)), y) and len(idx) == len(targets)


def symmetries(got, pairs):
    """All (turn, colours, order) that make pairs[order[i]] into got[i], colours as {old: new}."""
    for turn, order in itertools.product(range(8), itertools.permutations(range(len(pairs)))):
        colours, fits = {}, True
        originals = [grid for i in order for grid in pairs[i]]
        for grid, original in zip([grid for pair in got for grid in pair], originals):
            turned = np.rot90(original.T if turn >= 4 else original, turn % 4)
            cells = zip(turned.flat, grid.flat)
            fits = fits and turned.shape == grid.shape
            fits = fits and all(colours.setdefault(int(a), int(b)) == b for a, b in cells)
        if fits and len(set(colours.values())) == len(colours):
            yield turn, colours, order


@pytest.mark.parametrize("augment", ("none", "dihedral", "arc"))
def test_an_augmented_row_is_a_symmetry_of_its_document(augment):
    tests, turns, recoloured = set(), set(), False
    for n, document in enumerate(puzzle_documents(30, low=2, high=4, most=3)):
        pairs = arc.decode(document)[1]
        idx, targets = puzzle_row(document, "autoregressive", augment, np.random.default_rng(n))
        got = arc.decode(np.append(idx, tok.EOT))[1]
        answers = [[*arc.encode_grid(y), tok.EOT] for _, y in got[min(1, len(got) - 1) :]]
        assert np.array_equal(targets[targets != IGNORE], np.concatenate(answers))
        same = targets == np.append(idx[1:], tok.EOT)  # the next token, but at the end of a demonstration
        assert np.array_equal(same | (targets == tok.EOT), targets != IGNORE)
        assert (idx[1:][(targets == tok.EOT)[:-1]] == tok.INPUT).all()
        # of several explanations, the one without new colours
        found = min(symmetries(got, pairs), key=lambda found: sum(a != b for a, b in found[1].items()))
        turns.add(found[0])
        recoloured |= any(a != b for a, b in found[1].items())
        if len(pairs) == 3:
            tests.add(found[2][-1])
    assert tests == {0, 1, 2}  # every pair is the test once
    assert turns == {0} if augment == "none" else len(turns) >= 5
    assert recoloured == (augment == "arc")


def test_sudokus_are_shuffled_question_and_answer_alike():
    document, seen, counts = arc.encode("sudoku", suites.load("sudoku9")[0].test), set(), set()
    for n in range(5):
        ids, targets = puzzle_row(document, "autoregressive", "sudoku", np.random.default_rng(n))
        ((question, answer),) = arc.decode(np.append(ids, targets[-1]))[1]
        assert puzzles.check_sudoku(question, answer)
        seen.add((question > 0).tobytes())
        counts.add(tuple(np.bincount(question.flat)))
    assert len(seen) == len(counts) == 5  # other places and other digits


# ---- batches of puzzles


@FORMATS
def test_puzzle_batches_are_full_but_never_too_large(data, puzzle_format):
    weights = {"grids": 1, "sudoku": 1}
    loader = make(data, weights=weights, puzzle_format=puzzle_format, batch_size=4, block_size=128)
    for number, batch in (pair for _ in range(20) for pair in enumerate(loader.next_step())):
        B, L = batch.idx.shape
        assert batch.mode == "puzzle" and batch.key == (number, batch.source, L) and L in (*BUCKETS, 128)
        assert L <= 128 and B == max(1, 4 * 128 // L)  # always the same of a key: a carry fits
        lengths = (batch.idx != tok.PAD).sum(1)
        assert ((lengths > max([b for b in BUCKETS if b < L], default=0)) & (lengths <= L)).all()
        padding = torch.arange(L) >= lengths[:, None]
        assert torch.equal(batch.idx == tok.PAD, padding) and (batch.targets[padding] == IGNORE).all()
        assert (batch.targets != IGNORE).any(1).all() and batch.tokens == lengths.sum()


@FORMATS
def test_demonstrations_that_do_not_fit_are_left_out(puzzle_format):
    """The first ones, in the order that was drawn, and no more than needed; of two pairs none."""
    left_out = 0
    for n, document in enumerate(puzzle_documents(60, low=2, most=6)):
        kind, pairs = arc.decode(document)
        whole, _ = puzzle_row(document, puzzle_format, "arc", np.random.default_rng(n))
        idx, targets = puzzle_row(document, puzzle_format, "arc", np.random.default_rng(n), block_size=60)
        count, drawn = (int((ids == tok.OUTPUT).sum()) for ids in (idx, whole))
        assert len(idx) <= 60 or count == min(2, len(pairs))
        assert (targets != IGNORE).any() and idx[0] == whole[0]
        starts = np.flatnonzero(whole == tok.INPUT)
        if count < drawn:
            left_out += 1
            assert count >= 2
            if puzzle_format == "autoregressive":
                assert np.array_equal(idx[1:], whole[starts[drawn - count] :])
                assert len(idx) + starts[drawn - count] - starts[drawn - count - 1] > 60
    assert left_out > 20


def test_rows_that_are_still_longer_are_skipped(tmp_path):
    """However many among few short ones. (10,000 in a row are an error: test_ahead_passes_errors_on.)"""
    short, long = (puzzle_documents(1, low=side, high=side, most=1) for side in (1, 5))
    data = write_stage(tmp_path, [("mixed", "puzzle", "train", "none", short + 29 * long)])
    loader = make(data, block_size=16, batch_size=100, batches_per_step=1)
    assert loader.next_step()[0].idx.shape == (100, 16)


def test_draws_cover_all_documents_of_all_shards(data, monkeypatch):
    want = puzzle_documents(60) + puzzle_documents(7, seed=5)
    grids = make(data).sources["grids"]
    assert grids.shards.n_documents == 67
    assert all(np.array_equal(grids.shards.document(i), want[i]) for i in range(67))
    drawn, read = set(), grids.shards.document
    monkeypatch.setattr(grids.shards, "document", lambda i: drawn.add(i) or read(i))
    for n in range(600):
        grids.put(n)
    assert drawn == set(range(67))


# ---- the mixture


@pytest.mark.parametrize("batches", (1, 4, 16))
def test_every_step_and_every_run_of_steps_has_the_shares(data, batches):
    shares = {"prose": 0.42, "code": 0.33, "grids": 0.2, "sudoku": 0.05}
    loader = make(data, weights=shares, batches_per_step=batches)
    kinds = {name: source.mode for name, source in loader.sources.items()}
    total, places = dict.fromkeys(shares, 0), set()
    for step in range(600):
        names = loader.sources_of_step(step)
        places |= set(enumerate(names))
        for name, share in shares.items():
            count = names.count(name)
            total[name] += count
            assert abs(count - share * batches) < 1  # of a step: rounded down or up
            assert abs(total[name] - share * batches * (step + 1)) < 3  # of any number of steps
        for world_size in (2, 4):  # processes have the same work
            per_process = [names[rank::world_size] for rank in range(world_size)]
            of_puzzles = [sum(kinds[name] == "puzzle" for name in own) for own in per_process]
            assert max(of_puzzles) - min(of_puzzles) <= 1
    assert len(places) < batches + len(shares)  # a carry belongs to one: they stay few


@pytest.mark.parametrize(
    "settings, message",
    (
        (dict(weights={"prose": 1, "wiki": 1}), "wiki.*it has: code, grids, prose, sudoku"),
        (dict(weights={"code": 1}, block_size=512), "code.*325 tokens.*block_size=512"),
    ),
)
def test_a_mixture_that_cannot_be(data, settings, message):
    with pytest.raises(ValueError, match=message):
        make(data, **settings)


def test_weights_are_the_stages_own_unless_told(tmp_path):
    documents = text_documents(9)
    sources = [("a", "text", "train", "none", documents), ("b", "text", "train", "none", documents)]
    sources += [("c", "text", "val", "none", documents)]
    data = write_stage(tmp_path, sources, weights={"a": 1.0, "b": 0.0})
    assert make(data).names == ["a"] and make(data, weights={"b": 2, "c": 0}).names == ["b"]
    with pytest.raises(ValueError, match="no training shard of 'c'; it has: a, b"):
        make(data, weights={"a": 1, "c": 1})  # to train on the rest would quietly be another mixture


def test_a_damaged_shard_is_noticed_and_a_frozen_stage_read_by_its_tag(tmp_path):
    data = write_stage(tmp_path, [("prose", "text", "train", "none", text_documents(40))])
    frozen = snapshots.freeze(data, "demo", "v1")
    want = run(make(data), 5)
    digest = snapshots.sha256_file(frozen / "snapshot.json")
    assert make(data, tag="v1").snapshot == digest and make(data).snapshot is None
    write_stage(tmp_path, [("prose", "text", "train", "none", text_documents(20))])
    assert run(make(data, tag="v1"), 5) == want != run(make(data), 5)
    (path,) = (data / e["path"] for e in snapshots.read_manifest(data, "demo")[0])
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=path.name):
        make(data)


# ---- validation


def val(loader, mode, n):
    return [(name, i, x.tolist(), y.tolist()) for name, i, x, y in loader.val_batches(mode, n)]


@pytest.mark.parametrize("mode", ("text", "puzzle"))
@FORMATS
def test_validation_is_always_the_same_and_shared_out(data, mode, puzzle_format):
    loader = make(data, puzzle_format=puzzle_format)
    alone = val(loader, mode, 3)
    assert {name for name, *_ in alone} == ({"prose"} if mode == "text" else {"grids", "sudoku"})
    run(loader, 5)
    assert val(loader, mode, 3) == alone
    assert val(make(data, seed=7, puzzle_format=puzzle_format), mode, 3) == alone
    halves = [make(data, puzzle_format=puzzle_format, rank=r, world_size=2) for r in (0, 1)]
    assert sorted(b for half in halves for b in val(half, mode, 3)) == sorted(alone)


def test_validation_rows_are_held_out_and_not_augmented(data):
    tokens = np.concatenate(text_documents(20, first=2000))
    windows = {tuple(tokens[i : i + 17].tolist()) for i in range(0, len(tokens) - 16, 16)}
    for n in (1, 100):
        batches = val(make(data, weights={"prose": 1}, block_size=16), "text", n)
        rows = [(*row, targets[-1]) for _, _, idx, ends in batches for row, targets in zip(idx, ends)]
        assert len(batches) <= n and len(set(rows)) == len(rows) and set(rows) <= windows
    assert set(rows) == windows  # asked for enough, all of it

    loader = make(data, weights={"grids": 1, "sudoku": 0}, batch_size=4, block_size=128)
    rows = [puzzle_row(d, "autoregressive", "none", block_size=128) for d in puzzle_documents(30, seed=1)]
    documents = [tuple(idx.tolist()) for idx, _ in rows]
    for n in (1, 3, 9):  # at most n * batch_size of each source, the first ones
        batches = [idx for name, _, idx, _ in val(loader, "puzzle", n) if name == "grids"]
        rows = [tuple(t for t in row if t != tok.PAD) for idx in batches for row in idx]
        assert sorted(rows) == sorted(d for d in documents[: 4 * n] if len(d) <= 128)


@pytest.mark.parametrize("n, found", [(1, {"prose"}), (4, {"prose", "large"})])
def test_what_is_not_validated(tmp_path, n, found):
    """What has no held-out rows, or none that fit among those that are looked at."""
    short, long = (puzzle_documents(3, low=side, high=side, most=1, kind="sudoku") for side in (1, 8))
    sources = [(name, "text", "train", "none", text_documents(40)) for name in ("prose", "code", "short")]
    sources += [("large", "puzzle", "train", "none", short)]
    sources += [("prose", "text", "val", "none", text_documents(3))]
    sources += [("short", "text", "val", "none", text_documents(1))]
    sources += [("large", "puzzle", "val", "none", [*long, *short])]
    loader = make(write_stage(tmp_path, sources), block_size=20, batch_size=1)
    assert {name for mode in ("text", "puzzle") for name, *_ in val(loader, mode, n)} == found
    assert loader.not_validated(n) == sorted({"prose", "code", "short", "large"} - found)
