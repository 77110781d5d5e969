"""
Milliseconds and bytes of cache for one more token, by length of the context.

    python -m bench.decode        the 100M Route A beside full attention in every layer, in turns

Before this: smol/engine.py.
"""

import json
import statistics
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import configurator
from bench.train import clock, this_device
from model_dense import Config, Model
from smol import engine
from smol.files import write_whole

contexts = (1024, 4096, 16384, 32768)
batches = (1, 8)  # rows decoded together; the later ones at the last context but one
steps = 7  # the median counts
model = {}  # settings of the model, such as {'n_layer': 4}; empty: the 100M one
json_file = ""  # write the rows here as well

RANGES = {"[1, inf)": "steps"}
LAYOUT = "{:>8,} {:>5} {:10} {:>11.1f} {:>11.1f} {:>25.2f}"


def filled_cache(net, context, rows, room):
    """A KVCache of `context` tokens that were never read: a step costs what there is, not what it says."""
    idx = torch.full((rows, context), 17, device=net.wte.weight.device)
    layers = [tuple(t.zero_() for t in layer) for layer in net.empty_cache(rows, context + room)]
    return engine.KVCache(layers, idx, None)


@torch.no_grad()
def measure(c, device):
    """Rows {context, batch, name, ms, cache_mb, ratio}; ratio: of the ms of full attention to these."""
    torch.manual_seed(0)
    settings = {"Route A": c.model, "attention": {**c.model, "layer_pattern": "a"}}
    nets = {name: Model(Config(**some)).to(device).eval() for name, some in settings.items()}
    for batch in c.batches:
        for context in c.contexts if batch == c.batches[0] else c.contexts[-2:][:1]:
            n = 2 + c.steps  # the first two warm up
            caches = {name: filled_cache(net, context, batch, n) for name, net in nets.items()}
            times, token = {name: [] for name in nets}, torch.full((batch,), 17, device=device)
            for _ in range(n):
                for name, net in nets.items():
                    start = clock(device)
                    x = engine.decode_step(net, token, caches[name])
                    engine.sample(F.linear(x, net.wte.weight), 0)
                    times[name].append(1000 * (clock(device) - start))
            ms = {name: statistics.median(of[2:]) for name, of in times.items()}
            for name, cache in caches.items():
                cache_mb = sum(t.nbytes for layer in cache.layers for t in layer) / 1e6
                figures = {"ms": ms[name], "cache_mb": cache_mb, "ratio": ms["attention"] / ms[name]}
                yield {"context": context, "batch": batch, "name": name, **figures}


def main(argv):
    config, _ = configurator.read(globals(), argv)
    c, rows, device = SimpleNamespace(**config), [], this_device()
    print(" context  rows              ms a step MB of cache times as fast as attention")
    try:
        for row in measure(c, device):
            rows.append(row)
            print(LAYOUT.format(*row.values()))
    except ValueError as e:  # of the model's settings
        sys.exit(f"error: {e}")
    if c.json_file:
        write_whole(json.dumps(rows, indent=2).encode(), c.json_file)


if __name__ == "__main__":
    main(sys.argv[1:])
