# Route B on the demo stage: the same data, mostly puzzles, and a core that is gone through three times per step.
base = "route_a_demo.py"
out_dir = "out/demo/route_b"
model = "trm"
n_latent = 2
n_recursion = 1
n_sup = 4
ema = 0.99
mixture = {
    "stdlib": 0.03, "langref": 0.03, "docstrings": 0.03, "arithmetic": 0.03,
    "sudoku4": 0.5, "maze": 0.2, "transforms": 0.1, "arc": 0.08,
}  # fmt: skip
learning_rate = 3e-3
max_iters = 550
decay_iters = 250
eval_interval = 550
