"""
How fast text is prepared, beside nanoGPT's way to do it, on the same text with as many processes.

    python -m bench.prepare         tokenising alone, and the whole of prepare.py; hours for a stage
    python -m bench.prepare --json  the same as JSON

Before this: prepare.py, bench/kda.py.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import re
import sys
import sysconfig
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
from smol import pipeline, tokenizer, units, workers

PREPARE_MB = 24  # of text: standard library and installed packages (code), their docstrings shuffled by sentence (prose)
STAGE_GB, STAGE_CORES = 30, 4  # what the hours are projected for


def prepare_text(megabytes, folder):
    """Write parquet files of prose and code, 3 to 1, that are there on any machine. -> their size in bytes"""
    paths = sysconfig.get_paths()
    files = sorted({*Path(paths["stdlib"]).rglob("*.py"), *Path(paths["purelib"]).rglob("*.py")})
    draw, code, size, sentences = random.Random(1), [], 0, set()
    for path in draw.sample(files, len(files)):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if size < megabytes * 0.25e6:
            code.append(text)
            size += len(text.encode())
        for words in re.findall('"""(.*?)"""', text, re.DOTALL):
            found = (re.sub(r"\s+", " ", s.strip()) for s in re.split(r"(?<=[.!?])\s+", words))
            sentences |= {s for s in found if 40 < len(s) < 300 and s.endswith(".")}
        if size >= megabytes * 0.25e6 and len(sentences) > 1200 * megabytes:
            break
    sentences, prose = sorted(sentences), []
    while size < megabytes * 1e6:
        prose.append(
            "\n\n".join(
                " ".join(draw.choices(sentences, k=draw.randint(3, 8))) for _ in range(draw.randint(2, 9))
            )
        )
        size += len(prose[-1].encode())
    for name, column, texts in (("fineweb_edu", "text", prose), ("codeparrot", "content", code)):
        (folder / name).mkdir(parents=True)
        for i in range(2):  # a file for each process
            pq.write_table(
                pa.table({column: texts[i::2]}), folder / name / f"{i}.parquet", row_group_size=500
            )
    return size


def nanogpt_way(folder, out, num_proc):
    """What nanoGPT's prepare.py does: datasets.map over documents with tiktoken, then a loop that fills a memmap. -> seconds"""
    encoder = tokenizer.load()

    def tokenize(example):
        ids = encoder.encode_ordinary(example["text"])
        ids.append(encoder.eot_token)
        return {"ids": ids, "len": len(ids)}

    parts = []
    for source in sorted(folder.iterdir()):
        part = datasets.Dataset.from_parquet(
            [str(p) for p in sorted(source.glob("*.parquet"))], cache_dir=str(out)
        )
        parts.append(
            part if "text" in part.column_names else part.rename_column(part.column_names[0], "text")
        )
    data = datasets.concatenate_datasets(parts)
    start = time.perf_counter()
    done = data.map(tokenize, remove_columns=["text"], num_proc=num_proc, load_from_cache_file=False)
    tokens = np.memmap(out / "train.bin", np.uint16, "w+", shape=(int(np.sum(done["len"], dtype=np.uint64)),))
    batches, at = min(1024, len(done)), 0
    for i in range(batches):
        ids = np.concatenate(
            done.shard(num_shards=batches, index=i, contiguous=True).with_format("numpy")["ids"]
        )
        tokens[at : at + len(ids)] = ids
        at += len(ids)
    tokens.flush()
    return time.perf_counter() - start


def tokenize_files(paths, out):
    """Tokenising as units.py does it, and nothing else: parquet in, a file of tokens out."""
    with open(out, "wb") as f:
        for path in paths:
            documents = [
                units.tokenise([row.get("text") or row["content"]]) for row in pq.read_table(path).to_pylist()
            ]
            np.concatenate(documents).tofile(f)


def bench_prepare(num_proc=2):
    """Rows of {what, mb_per_second, per_core, ratio to nanoGPT's way}, and the hours that a stage would take."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        megabytes = prepare_text(PREPARE_MB, folder / "text") / 1e6
        (folder / "nano").mkdir()
        seconds = {
            "nanoGPT's way: datasets.map, tiktoken, memmap": nanogpt_way(
                folder / "text", folder / "nano", num_proc
            )
        }

        files = [
            [p for f in sorted((folder / "text").iterdir()) for p in [sorted(f.glob("*.parquet"))[i]]]
            for i in range(2)
        ]
        start = time.perf_counter()
        jobs = [
            multiprocessing.get_context("fork").Process(
                target=tokenize_files, args=(files[i], folder / f"{i}.bin")
            )
            for i in range(2)
        ]
        for batch in [jobs] if num_proc > 1 else [[job] for job in jobs]:
            for job in batch:
                job.start()
            for job in batch:
                job.join()
        seconds["tokenising alone"] = time.perf_counter() - start

        c = SimpleNamespace(**configurator.settings(vars(prepare)))
        c.data_dir, c.source_dir, c.sources = (
            str(folder / "data"),
            str(folder / "text"),
            "fineweb_edu,codeparrot",
        )
        c.limit_mb, c.num_proc = 10 * megabytes, num_proc  # more than there is: all of it is read
        data = folder / "data"
        tokens, found, notes = pipeline.plan(c, data, "stage1")
        with workers.local_workers(num_proc) as run:
            evaluations = pipeline.gather_evaluations(c, data, found, notes)
            if num_proc > 1:
                run(
                    [{"first": 0, "last": -1, "source": "", "folder": ""}] * num_proc, print
                )  # the processes start before the clock does
            start = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):  # what it has to say is not part of the report
                pipeline.build_with_workers(
                    c, data, "stage1", tokens, found, evaluations, {"inputs": {}, "notes": notes}, run
                )
            seconds["all of it: read, filter, tokenise, deduplicate, write"] = time.perf_counter() - start
    base, *_ = seconds.values()
    rows = [
        {
            "what": what,
            "mb_per_second": megabytes / s,
            "per_core": megabytes / s / num_proc,
            "ratio": base / s,
        }
        for what, s in seconds.items()
    ]
    hours = STAGE_GB * 1e3 / (rows[-1]["per_core"] * STAGE_CORES) / 3600
    return {
        "megabytes": megabytes,
        "processes": num_proc,
        "rows": rows,
        f"hours_for_{STAGE_GB}_gb_on_{STAGE_CORES}_cores": hours,
    }


def show_prepare(report):
    print(
        f"{report['megabytes']:.1f} MB of text, {report['processes']} processes; ratio: speed over nanoGPT's way"
    )
    for r in report["rows"]:
        print(
            f"{r['what']:56s} {r['mb_per_second']:7.2f} MB/s {r['per_core']:7.2f} MB/s per core {r['ratio']:6.2f}"
        )
    hours = report[f"hours_for_{STAGE_GB}_gb_on_{STAGE_CORES}_cores"]
    print(
        f"{STAGE_GB} GB of text on {STAGE_CORES} cores like these: {hours:.1f} hours, if the network keeps up"
    )


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    report = bench_prepare()
    print(json.dumps(report, indent=2)) if args.json else show_prepare(report)


if __name__ == "__main__":
    main(sys.argv[1:])
