# Offline: one view of a puzzle learns what a vote over 16 views says. Not learned at small scale (LOG.md).
#   torchrun --nproc_per_node=2 distill.py config/distill_route_b.py
# More supervision steps instead of more views: --teacher_n_views=1 --teacher_n_sup=64.
base = "distill_route_a.py"
out_dir = "out/distill_route_b"
init_from = "out/route_b_stage3/ckpt.pt"
teacher = "out/route_b_stage3/ckpt.pt"
teacher_n_views = 16
ema = 0.999
recompute = True  # without, a batch is 11.6 GB
batch_size = 1
gradient_accumulation_steps = 32
