# Route A, stage 0: is everything in order for stage 1? Ends with a table of PASS and FAIL, and exit code 1 if
# anything failed: the real model, data and batch, 20 steps. Without stage 1, on a CPU:
#   ... --data=demo --data_tag=None --block_size=256 --batch_size=1 --gradient_accumulation_steps=2
base = "route_a_stage1.py"
out_dir = "out/route_a_stage0"
sanity = True
sanity_run_tokens = 2.1e9  # stage 1's
max_iters = 20
warmup_iters = 10
log_interval = 5
eval_interval = 20
eval_batches = 2
sync_check_interval = 5
max_hours = 0.0
