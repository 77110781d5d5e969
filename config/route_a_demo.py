# Route A on the demo stage: small enough for one CPU core and minutes.
out_dir = "out/demo/route_a"
n_layer = 4
n_head = 3
n_embd = 96
n_ff = 256
block_size = 512
batch_size = 1
gradient_accumulation_steps = 1  # many small steps: it reads demonstrations soonest then (LOG.md)
mixture = {
    "stdlib": 0.025,
    "langref": 0.025,
    "docstrings": 0.025,
    "arithmetic": 0.025,
    "sudoku4": 0.22,
    "maze": 0.18,
    "turned": 0.47,
    "rearc": 0.03,
}
learning_rate = 3e-3
max_iters = 2200
warmup_iters = 40
decay_iters = 880
eval_interval = 550
