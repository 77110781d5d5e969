# Route B on the demo stage: the same data, mostly puzzles, and a core that is gone through twice per step.
base = "route_a_demo.py"
out_dir = "out/demo/route_b"
model = "trm"
n_head = 4  # twelve in its KDA layers: some for each of the eight ways to read grids
n_latent = 1
n_recursion = 1
n_sup = 4
halt_exploration = 0.3
ema = 0.99
mixture = {
    "stdlib": 0.03,
    "langref": 0.03,
    "docstrings": 0.03,
    "arithmetic": 0.03,
    "sudoku4": 0.6,
    "maze": 0.14,
    "transforms": 0.08,
    "arc": 0.06,
}
learning_rate = 2e-3
max_iters = 600
decay_iters = 250
eval_interval = 600
