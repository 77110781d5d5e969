# Route A on the demo stage: small enough for one CPU core and minutes.
out_dir = "out/demo/route_a"
model = "dense"
n_layer = 4
n_head = 4
n_embd = 128
n_ff = 344
block_size = 512
batch_size = 1
gradient_accumulation_steps = 4  # batches of 512 tokens: a step has four, mostly of different sources
mixture = {
    "stdlib": 0.05,
    "langref": 0.05,
    "docstrings": 0.05,
    "arithmetic": 0.05,
    "sudoku4": 0.2,
    "maze": 0.2,
    "turned": 0.15,
    "transforms": 0.05,
    "rearc": 0.2,
}
learning_rate = 2e-3
max_iters = 900
warmup_iters = 20
decay_iters = 360
eval_interval = 900
eval_batches = 8
