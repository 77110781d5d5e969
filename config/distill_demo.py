# After `make demo`, on a CPU: its Route B, which solves more sudokus, teaches its Route A.
out_dir = "out/demo/distill"
init_from = "out/demo/route_a/ckpt.pt"
teacher = "out/demo/route_b/ckpt.pt"
mixture = {"sudoku4": 0.9, "stdlib": 0.1}
batch_size = 2
gradient_accumulation_steps = 2
optimizer = "adamw"
learning_rate = 1e-3
max_iters = 100
decay_iters = 50
eval_interval = 50
eval_batches = 4
eval_suites = "sudoku4"
