# Route B on the demo stage: the same data, mostly puzzles, and a core that is gone through twice per step.
base = "route_a_demo.py"
out_dir = "out/demo/route_b"
model = "trm"
n_head = 4
n_embd = 64
n_ff = 172
batch_size = 2
n_latent = 1
n_recursion = 1
n_sup = 4
carry_turns = 8  # eight small batches take turns: a puzzle is not seen four steps on end
halt_exploration = 0.3
ema = 0.99
mixture = {
    "stdlib": 0.0125,
    "langref": 0.0125,
    "docstrings": 0.0125,
    "arithmetic": 0.0125,
    "sudoku4": 0.11,
    "maze": 0.26,
    "turned": 0.55,
    "rearc": 0.03,
}
dtype = "float32"  # at width 64 half precision makes a CPU slower
max_iters = 1600
warmup_iters = 20
decay_iters = 640
eval_interval = 400
