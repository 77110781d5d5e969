# A thousand hard 9x9 sudokus, each seen through a new symmetry every time: the published setting of
# recursive models.
#   python prepare.py sudoku_extreme && python train.py config/sudoku_extreme.py
#   python eval_arc.py out/sudoku_extreme/ckpt.pt --suites=sudoku_extreme  (data/README.md: its test.csv)
# n, T, N_sup, averaging, learning rate and weight decay as in arXiv 2510.04871 (768 puzzles a step); the core
# is ours, 9M parameters and four layers, where it has two: MLPs along lines, with which 9x9 sudokus are
# learned far faster than with KDA (LOG.md, 3). Not yet trained to its end: that wants a GPU.
out_dir = "out/sudoku_extreme"
model = "trm"
n_layer = 4
n_head = 8
n_embd = 512
n_ff = 1360
layer_pattern = "mmma"
n_latent = 6
n_recursion = 3
n_sup = 16
ema = 0.999
data = "sudoku_extreme"
block_size = 96  # a puzzle on its canvas is 92 tokens
batch_size = 96  # puzzles
gradient_accumulation_steps = 8
optimizer = "adamw"
learning_rate = 1e-4
weight_decay = 1.0
warmup_iters = 2000
max_iters = 40000
decay_iters = 8000
eval_interval = 2000
eval_batches = 2
