"""Route B beyond what both routes share (test_models.py): documents in a row, decoding, costs, gradients, halting early."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model_dense import documents, prompts_of_all_kinds
from test_models import TASKS, TEXT_RECURSION, puzzle_batch, same, text, trm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kda
import model_trm
from bench import recursion as bench_recursion
from bench import train as bench_train
from smol import arc, checkpoint
from smol import tokenizer as tok

ROOT = Path(__file__).parent.parent


def reader(**settings):
    """A model that goes through its core several times, in text as well."""
    return trm(**{**TEXT_RECURSION, **settings})


# ---- text


@torch.no_grad()
def test_a_document_among_others_is_as_if_alone():
    model = reader()
    idx, bounds = documents([40, 1, 0, 2, 30, 5])
    logits = model(idx)[0][0]
    for a, b in zip(bounds, bounds[1:]):
        torch.testing.assert_close(logits[a:b], model(idx[:, a:b])[0][0], rtol=1e-3, atol=1e-3)
    joined = reader(separate_documents=False)
    assert (joined(idx)[0][0, bounds[1] :] - joined(idx[:, bounds[1] :])[0][0]).abs().max() > 1e-2


@torch.no_grad()
def test_changing_one_document_moves_no_other_and_nothing_before_it():
    """Also the layers that read a canvas from the end must not do so here, where full attention has a mask as well."""
    model = reader().double()
    idx, bounds = documents([12, 3, 20])
    before = model(idx)[0]
    for a, b in zip(bounds, bounds[1:]):
        other = idx.clone()
        other[0, a + 2 : b] = text(1, b - a - 2, seed=77)
        moved = (model(other)[0] - before).abs().amax(-1)[0]
        assert (moved[a + 2 : b] > 1e-3).all()
        moved[a + 2 : b] = 0
        assert moved.max() < 1e-9


@pytest.mark.parametrize("separate", (True, False))
@torch.no_grad()
def test_reading_on_is_the_full_forward_at_every_position(separate):
    """Prompts of seven lengths at once; what follows holds ends of documents, text, grids and blank cells."""
    model = reader(seed=1, separate_documents=separate)
    prompts = prompts_of_all_kinds()
    soup = [tok.EOT, tok.INPUT, tok.OUTPUT, tok.ROW, tok.CELL0, tok.CELL0 + 3, tok.BLANK, tok.ARC, 17]
    after = torch.from_numpy(np.random.default_rng(0).choice(soup, (len(prompts), 24)))
    x, past = model.read(prompts)
    got = F.linear(
        torch.stack([x, *(model.read_on(after[:, t], past) for t in range(24))], 1), model.wte.weight
    )
    for b, prompt in enumerate(prompts):
        want = model(torch.cat([prompt, after[b]])[None])[0][0, len(prompt) - 1 :]
        torch.testing.assert_close(got[b], want, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_rows_of_a_batch_of_prompts_are_continued_as_if_alone_and_stop_by_themselves():
    model = reader(seed=2)
    prompts = prompts_of_all_kinds()
    together = torch.stack(list(model.generate(prompts, 8, temperature=0, stop=())), 1)
    for row, prompt in zip(together, prompts):
        alone = torch.stack(list(model.generate([prompt], 8, temperature=0, stop=())), 1)[0]
        assert torch.equal(row, alone)
    stop = together[0, 2].item()
    for row, free in zip(
        torch.stack(list(model.generate(prompts, 8, temperature=0, stop=(stop,))), 1).tolist(),
        together.tolist(),
    ):
        end = free.index(stop) + 1 if stop in free else len(row)
        assert row[:end] == free[: len(row)][:end] and set(row[end:]) <= {tok.PAD}


# ---- what it costs


@pytest.mark.parametrize("pattern, tolerance", (("a", 0.01), ("kkka", 0.1)))
def test_flops_are_those_that_pytorch_counts(pattern, tolerance, monkeypatch):
    """
    Operators are opened up, so that their products are counted as well: the chunks of KDA, which then have no gradient, and attention,
    which then does not skip its causal half.
    """
    monkeypatch.setattr(kda, "kda_op", lambda *a: kda.chunk_op(*a[:-1]))
    kind = dict(
        n_embd=96,
        n_ff=256,
        layer_pattern=pattern,
        n_latent=2,
        n_recursion=3,
        text_n_latent=2,
        text_n_recursion=2,
    )
    for extra in ({}, dict(n_grad=2, text_n_grad=2, text_n_sup=2), dict(n_kv_head=1)):
        model = trm(**kind, **extra).train()
        for mode, idx in (
            ("text", text(2, 64)),
            ("puzzle", torch.randint(tok.CELL0, tok.CELL0 + 10, (2, 64))),
        ):
            for training in (False, True) if pattern == "a" else (False,):
                with (
                    FlopCounterMode(display=False) as counted,
                    torch.set_grad_enabled(training),
                    sdpa_kernel(SDPBackend.MATH),
                ):
                    if training:
                        model(idx, idx, mode=mode)[1].backward()
                    else:
                        model(
                            idx, None if mode == "text" else idx, mode=mode
                        )  # a puzzle takes one supervision step, as in training
                want = model.flops_per_token(64 if mode == "puzzle" else 2 * 64, mode, training) * idx.numel()
                assert abs(counted.get_total_flops() / want - 1) < tolerance, (mode, training, extra)


def test_description_prints_what_a_token_costs(capsys):
    model = trm(n_latent=3, n_recursion=2, n_sup=5, text_n_latent=2)
    model_trm.describe_recursion(model, 256)
    text_line, puzzle_line = (
        [float(f.replace(",", "")) for f in line.split()[1:]]
        for line in capsys.readouterr().out.splitlines()[-2:]
    )
    assert text_line[:6] == [2, 1, 1, 1, 3, 3] and puzzle_line[:6] == [3, 2, 1, 5, 8, 4]
    per_token = model.flops_per_token(256, "puzzle") / 1e6
    assert abs(puzzle_line[6] - per_token) <= 0.5 and abs(puzzle_line[8] - 5 * per_token) <= 0.5


# ---- bounds


def fresh(**settings):
    torch.manual_seed(0)
    shape = dict(block_size=256, n_layer=8, n_head=2, n_embd=32, n_ff=88)
    return model_trm.Model(
        model_trm.Config(**{**shape, **settings})
    )  # the published n, T and n_sup are the defaults


def test_vectors_and_gradients_stay_bounded_through_all_passes():
    """16 supervision steps of 21 passes through 8 layers, and it starts as it goes on: a gradient is handed back about as it came."""
    steps = bench_recursion.follow(fresh(), *puzzle_batch("canvas", [1]), n_sup=16)
    assert len(steps) == 16
    for step in steps:
        assert len(step["size"]) == 21 and len(step["passed_back"]) == 7
        assert (
            all(0.9 < size < 1.1 for size in step["size"]) and max(step["largest"]) < 5.7
        )  # sqrt(n_embd): all in one channel
        assert 0.01 < step["gradient"] < 100
        assert 0.02 < step["passed_back"][0] / step["passed_back"][-1] < 50


def test_gradients_stay_bounded_while_it_learns():
    model = fresh(n_recursion=1).train()
    optimizer = model.configure_optimizer(0.1, 2e-3, (0.9, 0.95))
    batch, carry, norms = puzzle_batch("canvas", range(2)), None, []
    for _ in range(12):
        _, loss, carry = model(*batch, mode="puzzle", carry=carry)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) < 100


def test_float16_has_room_for_its_loss_scale():
    """As GradScaler would find it within a few steps from its 65,536 on."""
    (step,) = bench_recursion.follow(
        fresh(n_recursion=1), *puzzle_batch("canvas", [1]), n_sup=1, dtype=torch.float16, scale=4096.0
    )
    assert 0.01 < step["gradient"] < 100 and all(np.isfinite(step["passed_back"]))


def test_carries_wait_in_half_precision_where_that_is_multiplied_in():
    model, batch = trm().train(), puzzle_batch("canvas", range(3))
    _, _, carry = model(*batch, mode="puzzle")
    assert carry["y"].dtype == carry["z"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        _, _, carry = model(*batch, mode="puzzle")
        _, loss, again = model(*batch, mode="puzzle", carry=carry)
    assert carry["y"].dtype == again["z"].dtype == torch.float16 and loss.isfinite()


# ---- halting early


class Counted:
    """How many rows go through the core."""

    def __init__(self, model):
        self.rows = 0
        model.blocks[0].register_forward_hook(
            lambda block, inputs, output: setattr(self, "rows", self.rows + len(inputs[0]))
        )


@torch.no_grad()
def test_rows_that_halt_leave_the_batch_and_the_others_do_not_notice():
    model = trm(3, n_sup=6)
    model.q_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    whole = [trace for per_task in model.answer(TASKS, trace=True) for trace in per_task]
    probabilities = np.array([[p for _, p in trace] for trace in whole])
    threshold = float(np.median(probabilities.max(1)))  # half of the rows get there
    counted = Counted(model)
    early = [trace for per_task in model.answer(TASKS, trace=True, halt=threshold) for trace in per_task]
    taken = []
    for a, b in zip(whole, early):
        n = next((i + 1 for i, (_, p) in enumerate(a) if p > threshold), 6)
        assert len(b) == n
        assert all(same(g, h) and abs(p - q) < 1e-4 for (g, p), (h, q) in zip(a, b))
        taken.append(n)
    assert 1 <= min(taken) < max(taken) == 6
    assert counted.rows == sum(taken) * model.passes("puzzle")[0]  # they cost nothing any more
    candidates = [c for per_task in model.answer(TASKS, halt=threshold) for c in per_task]
    for trace, ranked in zip(early, candidates):
        surest, p = max(((g, p) for g, p in trace if g is not None), key=lambda answer: answer[1])
        assert np.array_equal(ranked[0][0], surest) and abs(ranked[0][1] - p) < 1e-4


def test_all_rows_may_halt_at_once():
    model = trm(n_sup=5)
    with torch.no_grad():
        model.q_head.bias.fill_(100.0)
    assert all(
        len(trace) == 1 for per_task in model.answer(TASKS, trace=True, halt=0.5) for trace in per_task
    )
    assert all(len(trace) == 5 for per_task in model.answer(TASKS, trace=True) for trace in per_task)


# ---- the experiments


def test_experiments_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "n_layer=2,layer_pattern=ka,n_embd=32,n_head=2,n_ff=48"
    bench_recursion.main(
        [
            "learn",
            "--task=sudoku4-2-4",
            f"--contender=A:dense,{small}",
            f"--contender=B:trm,{small},n_latent=1,n_recursion=1,n_sup=2,carry_turns=2",
            "--gflops=0.5",
            "--tokens=256",
            "--n=3",
            "--save=saved",
        ]
    )
    out = capsys.readouterr().out
    assert "B: " in out and "A: " in out
    bench_recursion.main(["draw", "out/recursion/learn.jsonl"])
    bench_recursion.main(["halting", "saved2.pt", "--suite=sudoku4-4", "--n=5", "--n_sup=4"])
    bench_recursion.main(["bounds", "saved2.pt", "--n_sup=2"])
    bench_recursion.main(["core", "--lengths=32", "--tokens=64", "--steps=1", f"--settings={small}"])
    for picture in ("learn", "halting", "bounds"):
        assert (tmp_path / f"out/recursion/{picture}.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="Route A"):
        bench_recursion.main(["halting", "saved1.pt"])
    with pytest.raises(SystemExit, match="chess"):
        bench_recursion.main(["learn", "--task=chess", "--contender=A:dense"])


def test_contenders_have_as_many_parameters():
    wanted = bench_recursion.make_contender("B:trm", None, 1)[1].num_params()
    sizes = [
        wanted,
        *(
            bench_recursion.make_contender(who, wanted, 1)[1].num_params()
            for who in ("A:dense", "x:trm,layer_pattern=aaaa", "y:dense,n_head=2")
        ),
    ]
    assert max(sizes) / min(sizes) < 1.001


def test_test_puzzles_are_never_trained_on():
    """Of 3x3 mazes there are few: some of those drawn are the test's."""
    tasks, avoid = bench_recursion.unseen("maze-3", 12)
    tests = {arc.encode("maze", t.test)[:-1].tobytes() for t in tasks}

    def drawn(avoid):
        batches = bench_recursion.Puzzles("maze-3", "autoregressive", 512, 0, avoid)
        return {
            row[row != tok.PAD].numpy().astype(np.uint16).tobytes()
            for _ in range(10)
            for row in batches.next_batch()[0]
        }

    assert len(tests) == 12 and tests & drawn(set()) and not tests & drawn(avoid)
    others = {
        arc.encode("maze", t.test)[:-1].tobytes() for t in bench_recursion.unseen("maze-3", 12, seed=7)[0]
    }
    assert len(others) == 12 and others != tests


@pytest.mark.parametrize("task", ("sudoku9", "maze", "turn-9", "turn-0", "turn-x", "chess-3"))
def test_a_misspelt_task(task):
    with pytest.raises(ValueError, match=f"--task={task}: there are"):
        bench_recursion.unseen(task, 1)


def test_turns_of_a_few_kinds():
    """One rule for a task's three pairs, of as many rules as the task's name says."""
    rules = {k: lambda x, k=k: np.rot90(x.T if k >= 4 else x, k % 4) for k in range(8)}
    for kind, n in (("turn-2", 2), ("turn-4", 4), ("turn", 8)):
        tasks = bench_recursion.unseen(kind, 60)[0]
        seen = [
            [
                k
                for k, rule in rules.items()
                if all(np.array_equal(y, rule(x)) for x, y in (*t.train, *t.test))
            ]
            for t in tasks
        ]
        assert sorted({k for (k,) in seen}) == list(range(n)), kind


# ---- configs


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_configs_of_all_stages_build_the_100m_model(stage):
    c = bench_train.training_config(str(ROOT / f"config/route_b_stage{stage}.py"))
    with torch.device("meta"):
        model = checkpoint.make_model(c.model, vars(c))
    assert 98e6 <= model.num_params() <= 102e6
    assert (model.recursion("puzzle"), model.config.n_sup) == (
        (6, 3, 1),
        16,
    ) and model.config.block_size == c.block_size
    assert "".join(block.kind for block in model.blocks) == "kkkakkka"
