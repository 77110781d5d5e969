# Route A on the demo stage: small enough for two CPU cores and a few minutes.
out_dir = "out/demo/route_a"
overwrite = True
model = "dense"
n_layer = 4
n_head = 4
n_embd = 128
n_ff = 344
block_size = 1024
batch_size = 2
gradient_accumulation_steps = 1
mixture = {"stdlib": 0.1, "langref": 0.1, "docstrings": 0.1, "arithmetic": 0.1, "sudoku4": 0.3, "maze": 0.1, "transforms": 0.1, "arc": 0.1}
learning_rate = 2e-3
max_iters = 300
warmup_iters = 30
decay_iters = 200
eval_interval = 300
