# Route A on the demo stage: small enough for one CPU core and minutes.
out_dir = "out/demo/route_a"
model = "dense"
n_layer = 4
n_head = 4
n_embd = 128
n_ff = 344
block_size = 512
batch_size = 1
gradient_accumulation_steps = 2  # batches of 512 tokens: a step has two sources
mixture = {
    "stdlib": 0.05,
    "langref": 0.05,
    "docstrings": 0.05,
    "arithmetic": 0.05,
    "sudoku4": 0.2,
    "maze": 0.15,
    "turned": 0.4,  # with 0.15 it never learns to read the two demonstrations (LOG.md)
    "rearc": 0.05,
}
learning_rate = 2e-3
max_iters = 1800
warmup_iters = 40
decay_iters = 720
eval_interval = 1800
eval_batches = 8
