# Route A on the demo stage: small enough for two CPU cores and two minutes.
out_dir = "out/demo/route_a"
model = "dense"
n_layer = 4
n_head = 2
n_embd = 64
n_ff = 172
block_size = 1024
batch_size = 2
gradient_accumulation_steps = 1
mixture = {
    "stdlib": 0.1,
    "langref": 0.1,
    "docstrings": 0.1,
    "arithmetic": 0.1,
    "sudoku4": 0.3,
    "maze": 0.1,
    "transforms": 0.1,
    "arc": 0.1,
}
optimizer = "adamw"  # what its learning rate was found with
learning_rate = 3e-3
max_iters = 250
warmup_iters = 20
decay_iters = 150
eval_interval = 250
eval_batches = 4
