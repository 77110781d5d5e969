"""bench.py measures what it says it measures; how fast that is never fails a test."""

import json

import torch

import bench


def test_kda_rows_have_a_rival_and_a_ratio(monkeypatch, capsys):
    monkeypatch.setattr(bench, "OPERATOR_SHAPES", [(1, 32, 2, 8)])
    monkeypatch.setattr(bench, "LAYER_SHAPES", [(2, 16, 24, 2)])
    monkeypatch.setattr("sys.argv", ["bench.py", "kda", "--json"])
    bench.main()
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__ and [r["what"] for r in report["rows"]] == ["operator", "layer"]
    for row in report["rows"]:
        assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["rival"]
        assert row["ratio"] == row["both_ms"] / row["rival_both_ms"]
