# Route A, stage 1: language, code, mathematics and first puzzles, on Kaggle's two T4s:
#   torchrun --nproc_per_node=2 train.py config/route_a_stage1.py
# 2.1 billion tokens are 21 per parameter, about where the compute of a model of 100M is best spent (Hoffmann
# et al., arXiv 2203.15556), and by `python -m bench.plan config/route_a_stage1.py` about one session of
# 12 hours. The rate stays up: stage 2 goes on from here.
out_dir = "out/route_a_stage1"
data = "stage1"  # its mixture is web 50, code 20, math 10, synth 10, arc 10 in a hundred
data_tag = "v0.1"
block_size = 1024
batch_size = 4  # of 1024 tokens: 6 GB of a T4's 16
gradient_accumulation_steps = 64  # 262,144 tokens a step
max_iters = 8000
learning_rate = 6e-4
warmup_iters = 300
decay_iters = 0
eval_interval = 250  # a checkpoint every 20 minutes
eval_batches = 16
max_hours = 11.5  # of Kaggle's 12; the next session: --init_from=resume, from the hub too (README.md)
