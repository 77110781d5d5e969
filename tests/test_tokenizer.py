"""The tokenizer: known GPT-2 encodings, reserved ids that text cannot forge."""

from smol import tokenizer
from smol.tokenizer import SPECIAL


def test_known_gpt2_encodings():
    encoder = tokenizer.load()
    assert encoder.encode_ordinary("Hello world") == [15496, 995]
    assert encoder.encode_ordinary("0123456789 0") == [486, 1954, 2231, 3134, 4531, 657]


def test_reserved_ids():
    encoder = tokenizer.load()
    assert sorted(SPECIAL.values()) == list(range(50256, 50281)) and encoder.n_vocab == 50281
    assert all(SPECIAL[f"<|{name}|>"] == getattr(tokenizer, name.upper()) for name in tokenizer.NAMES[11:])
    assert SPECIAL["<|0|>"] == tokenizer.CELL0
    for name, i in SPECIAL.items():
        assert encoder.decode([i]) == name
        ids = encoder.encode_ordinary(f"before{name}after")
        assert max(ids) < tokenizer.EOT and encoder.decode(ids) == f"before{name}after"


def test_fingerprint(monkeypatch):
    """Shards name it: another one means that none of them can be read."""
    assert tokenizer.fingerprint().startswith("746123cbe6fb56203b3bd3439d7930bf")
    monkeypatch.setitem(SPECIAL, "<|row|>", tokenizer.PAD)
    assert tokenizer.fingerprint.__wrapped__() != tokenizer.fingerprint()
