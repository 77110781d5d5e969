# Route B, stage 2: as Route A's, with half of the tokens.
base = "route_b_stage1.py"
out_dir = "out/route_b_stage2"
init_from = "out/route_b_stage1/ckpt.pt"
init_optimizer = True
data = "stage2"
block_size = 2048
batch_size = 2
max_iters = 1150
warmup_iters = 100
