"""
How fast text is prepared, beside nanoGPT's way to do it, on the same text with as many processes.

    python -m bench.prepare                 MB/s of all of prepare.py, and the hours for a stage of 30 GB
    python -m bench.prepare --num_proc=4    on four processes
    python -m bench.prepare --help          the settings

The text is on any machine: Python's standard library as code, shuffled sentences of its docstrings as prose.
"""

import random
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import configurator
import prepare
from smol import sources, tokenizer

megabytes = 24.0  # of text
num_proc = 2

RANGES = {"(0, inf)": "megabytes", "[1, inf)": "num_proc"}
STAGE_GB, STAGE_CORES = 30, 4  # what the hours are projected for


def write_text(folder, size):
    """Parquet files of prose and code, 3 to 1 while there is so much code, of about `size` bytes in all."""
    draw, sentences, code = random.Random(1), set(), []
    for row in sources.stdlib():
        text = sources.module(row)
        if sum(map(len, code)) < size / 4:
            code.append(text)
        for words in re.findall('"""(.*?)"""', text, re.DOTALL):
            found = (re.sub(r"\s+", " ", s.strip()) for s in re.split(r"(?<=[.!?])\s+", words))
            sentences |= {s for s in found if 40 < len(s) < 300 and s.endswith(".")}
    sentences, prose, written = sorted(sentences), [], sum(map(len, code))
    while written < size:
        paragraphs = [" ".join(draw.choices(sentences, k=5)) for _ in range(draw.randint(2, 9))]
        prose.append("\n\n".join(paragraphs))
        written += len(prose[-1])
    for name, column, texts in (("fineweb_edu", "text", prose), ("codeparrot", "content", code)):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            table = pa.table({column: texts[i::8]})
            pq.write_table(table, folder / name / f"{i}.parquet", row_group_size=500)


def nanogpt_way(folder, out, processes):
    """What nanoGPT's prepare.py does: datasets.map over documents with tiktoken, then a memmap."""
    encoder = tokenizer.load()
    parts = []
    for name, column in (("fineweb_edu", "text"), ("codeparrot", "content")):
        files = sorted(str(path) for path in (folder / name).iterdir())
        part = datasets.Dataset.from_parquet(files, cache_dir=str(out))
        parts.append(part.rename_column(column, "text") if column != "text" else part)

    def tokenize(example):
        ids = [*encoder.encode_ordinary(example["text"]), encoder.eot_token]
        return {"ids": ids, "len": len(ids)}

    data = datasets.concatenate_datasets(parts)
    done = data.map(tokenize, remove_columns=["text"], num_proc=processes, load_from_cache_file=False)
    tokens = np.memmap(out / "train.bin", np.uint16, "w+", shape=(int(np.sum(done["len"])),))
    at = 0
    for batch in done.with_format("numpy").iter(batch_size=1024):
        ids = np.concatenate(batch["ids"])
        tokens[at : at + len(ids)] = ids
        at += len(ids)
    tokens.flush()


def main(argv):
    config, _ = configurator.read(globals(), argv)
    c = SimpleNamespace(**config)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "text"), Path(folder, "out")
        write_text(text, c.megabytes * 1e6)
        start = time.perf_counter()
        nanogpt_way(text, out, c.num_proc)
        theirs = time.perf_counter() - start
        options = [f"--data_dir={folder}/data", f"--source_dir={text}", f"--num_proc={c.num_proc}"]
        start = time.perf_counter()  # more is asked for than there is: everything is read
        prepare.main(
            ["stage1", *options, "--sources=fineweb_edu,codeparrot", f"--limit_mb={10 * c.megabytes}"]
        )
        ours = time.perf_counter() - start
    print(f"\n{c.megabytes:.1f} MB of text, {c.num_proc} processes")
    for name, seconds in (("nanoGPT's way: datasets.map, tiktoken, memmap", theirs), ("prepare.py", ours)):
        speed = c.megabytes / seconds
        print(f"{name:48}{speed:7.2f} MB/s {speed / c.num_proc:7.2f} MB/s a core {theirs / seconds:6.2f}")
    hours = STAGE_GB * 1e3 / (c.megabytes / ours / c.num_proc * STAGE_CORES) / 3600
    print(f"{STAGE_GB} GB on {STAGE_CORES} such cores: {hours:.1f} hours, if the network keeps up")


if __name__ == "__main__":
    main(sys.argv[1:])
