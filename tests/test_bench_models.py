"""bench/models.py: rows are what they say, on models of a few thousand parameters; their speed fails no test."""

import json

import pytest
import torch

import prepare
from bench import models as bench_models
from bench.models import reaches, read_variant, schedule, sibling
from smol import engine

NANOGPT = """
import torch, torch.nn as nn, torch.nn.functional as F
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: many")
        self.config, self.wte = config, nn.Embedding(config.vocab_size, config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 99), nn.ReLU(), nn.Linear(99, config.n_embd))
    def forward(self, idx, targets=None):
        logits = self.mlp(self.wte(idx)) @ self.wte.weight.T
        return (logits, None) if targets is None else (logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        return torch.cat([idx, self(idx)[0][:, -1:].argmax(-1)], 1)
"""


@pytest.fixture
def nanogpt(tmp_path):
    """A stand-in with the names that nanoGPT's model.py has."""
    (tmp_path / "model.py").write_text(NANOGPT)
    return str(tmp_path)


def test_decode_rows(nanogpt):
    rows = bench_models.bench_decode(
        "cpu", nanogpt, contexts=(30, 300), batches=(1, 2), steps=1, n_layer=4, n_head=2, n_embd=24, n_ff=32
    )
    names = ["route a", "layer_pattern=a", "nanogpt"]
    assert [(r["context"], r["batch"], r["name"]) for r in rows] == (
        [(30, 1, n) for n in names] + [(300, 1, n) for n in names] + [(30, 2, n) for n in names[:2]]
    )
    assert all(r["ms"] > 0 for r in rows)
    held = {(r["context"], r["batch"], r["name"]): r["cache_bytes"] for r in rows}
    assert (
        held[300, 1, "layer_pattern=a"] == 4 * 2 * 300 * 24 * 4
        and held[30, 2, "route a"] == 2 * held[30, 1, "route a"]
    )
    assert held[300, 1, "route a"] - held[30, 1, "route a"] == 2 * 270 * 24 * 4


def test_a_filled_cache_holds_what_a_read_one_does():
    torch.manual_seed(0)
    model = bench_models.Model(bench_models.Config(n_layer=4, n_head=2, n_embd=24, n_ff=32))
    _, read = engine.prefill(model, torch.randint(0, 1000, (2, 40)), 17)
    filled = bench_models.filled(model, 40, 2)
    for cache in (read, filled):
        assert engine.decode_step(model, torch.tensor([1, 2]), cache).isfinite().all()
    assert read.idx.shape == filled.idx.shape
    assert [[t.shape for t in layer] for layer in read.layers] == [
        [t.shape for t in layer] for layer in filled.layers
    ]


def test_learn_trains_all_beside_each_other(nanogpt, tmp_path, monkeypatch, capsys):
    small = [
        "--val_every=3",
        "--limit_mb=1",
        "--num_proc=1",
    ]
    prepare.main(["demo", f"--data_dir={tmp_path / 'data'}", *small])
    capsys.readouterr()
    monkeypatch.setattr(bench_models, "SMALL", dict(n_layer=4, n_head=2, n_embd=16, block_size=64))
    monkeypatch.setattr(bench_models, "POINTS", 2)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "learn",
        f"--nanogpt={nanogpt}",
        "--variant=layer_pattern=a",
        "--seconds=0.4",
        "--learning_rates=1e-3,1e-2",
        "--plot=picture.png",
        "--json",
    ]
    bench_models.main(arguments)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["name"] for r in rows] == ["route a", "layer_pattern=a", "nanogpt"]
    for row in rows:
        assert abs(row["params"] / rows[-1]["params"] - 1) < 0.02
        assert set(row["swept"]) == {"0.001", "0.01"}
        assert row["learning_rate"] == float(min(row["swept"], key=row["swept"].get))
        seconds, tokens, losses = zip(*row["curve"])
        assert (
            list(seconds) == sorted(seconds)
            and seconds[-1] >= 0.4
            and list(tokens) == sorted(tokens)
            and losses[-1] == row["loss"] < 11
        )
    assert rows[-1]["seconds_share"] <= 1 and rows[-1]["tokens_share"] <= 1
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_siblings_have_the_parameters_asked_for():
    for settings in (dict(layer_pattern="a"), dict(layer_pattern="k"), dict(n_layer=3)):
        model = sibling({"n_layer": 8, "n_head": 2, "n_embd": 64, **settings}, 3_700_000)
        assert abs(model.num_params() / 3_700_000 - 1) < 0.01


def test_where_a_curve_reaches_a_loss():
    curve = [(1.0, 100, 5.0), (2.0, 200, 3.0), (3.0, 300, 3.5), (4.0, 400, 1.0)]
    assert reaches(curve, 6.0, 0) == 1.0 and reaches(curve, 4.0, 0) == 1.5 and reaches(curve, 4.0, 1) == 150
    assert reaches(curve, 3.0, 0) == 2.0 and reaches(curve, 1.0, 1) == 400 and reaches(curve, 0.5, 0) is None


def test_schedule_goes_up_and_down_to_zero():
    shares = [schedule(i / 100) for i in range(101)]
    top = shares.index(max(shares))
    assert max(shares) == 1 and shares[0] > 0 and shares[-1] == 0
    assert shares[:top] == sorted(shares[:top]) and shares[top:] == sorted(shares[top:], reverse=True)


def test_variants_are_settings():
    got = read_variant("layer_pattern=ka,n_layer=3,recompute=False,rope_base=7,optimizer=muon")
    assert got == {
        "layer_pattern": "ka",
        "n_layer": 3,
        "recompute": False,
        "rope_base": 7.0,
        "optimizer": "muon",
    }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["learn", "--variant=n_layers=3"], "'n_layers' is no setting"),
        (["learn", "--variant=n_layer=three"], "'three' is not a value"),
        (["learn", "--nanogpt=nowhere"], "nowhere: there is no model.py"),
        (["learn", "--seconds=0"], "--seconds"),
        (["learn", "--learning_rates=fast"], "fast"),
        (["walk"], "walk"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(SystemExit) as stopped:
        bench_models.main(arguments)
    assert (
        stopped.value.code.startswith("error: ")
        and words in stopped.value.code
        and "\n" not in stopped.value.code
    )
