# Route B, stage 0: as Route A's. On a CPU 16 supervision steps of 21 passes through 100M parameters take
# hours to validate; with short rows, two sources and one supervision step it takes minutes (LOG.md):
#   ... --data=demo --data_tag=None --mixture="{'stdlib': 1, 'sudoku4': 1}" --block_size=64 --batch_size=1
#       --gradient_accumulation_steps=1 --eval_batches=1 --n_sup=1 --recompute=False --sanity_steps=25
#       --sanity_tokens=48 --max_iters=4 --eval_interval=4 --log_interval=1
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
