# Route B, stage 3: as Route A's.
base = "route_b_stage2.py"
out_dir = "out/route_b_stage3"
init_from = "out/route_b_stage2/ckpt.pt"
init_optimizer = False
data = "stage3"
block_size = 4096
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 2400
learning_rate = 2e-4
decay_iters = 1200
eval_interval = 200
eval_suites = "sudoku4,maze,transforms,arc1"
# A task goes 336 times through the core: one of ARC's takes 17 minutes on one CPU thread and seconds on a T4,
# which has 12 of its 16 GB left for it. So on the GPU: a few minutes every 200 steps, which are 45.
eval_device = "auto"
eval_limit = 10
