# Route B, stage 1, on Kaggle's two T4s: torchrun --nproc_per_node=2 train.py config/route_b_stage1.py
# A token of text goes through its core twice and a token of a puzzle 21 times (7 with gradient), on average
# three times Route A's work. So half of Route A's tokens, 1.05 billion, 10.5 per parameter: `python -m
# bench.plan config/route_b_stage1.py` has the hours.
base = "route_a_stage1.py"
out_dir = "out/route_b_stage1"
model = "trm"
max_iters = 4000
learning_rate = 4e-4
ema = 0.999
recompute = True  # without, the seven passes of a puzzle keep 4.7 MB a token, and a batch is 20 GB
