# Route B, stage 0: as Route A's.
base = "route_b_stage1.py"
out_dir = "out/route_b_stage0"
sanity = True
sanity_run_tokens = 1.05e9
max_iters = 20
warmup_iters = 10
log_interval = 5
eval_interval = 20
eval_batches = 2
sync_check_interval = 5
max_hours = 0.0
