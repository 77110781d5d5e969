# Route B on the demo stage: the same data, mostly puzzles, and a core that is gone through twice per step.
base = "route_a_demo.py"
out_dir = "out/demo/route_b"
model = "trm"
n_embd = 64
n_ff = 172
batch_size = 2
gradient_accumulation_steps = 1  # a step of one batch has one source: their order is even
n_latent = 1
n_recursion = 1
n_sup = 4
carry_turns = 8  # eight small batches take turns: a puzzle is not seen four steps on end
halt_exploration = 0.3
ema = 0.99
mixture = {
    "stdlib": 0.025,
    "langref": 0.025,
    "docstrings": 0.025,
    "arithmetic": 0.025,
    "sudoku4": 0.15,
    "maze": 0.2,
    "turned": 0.5,
    "rearc": 0.05,
}
dtype = "float32"  # at width 64 half precision makes a CPU slower
optimizer = "adamw"  # what its learning rate was found with
learning_rate = 2e-3
max_iters = 2200
warmup_iters = 20
decay_iters = 700
eval_interval = 2200
