# Distil Route B, which thinks, into Route A, which answers left to right: its odds at every cell of the answers that Route A writes itself.
#   torchrun --nproc_per_node=2 distill.py config/distill_route_a.py
# Another teacher: --teacher=out/bigger/ckpt.pt, --teacher=hf:gpt2-xl, or the student itself with --teacher_n_views=16. What paid at small
# scale (LOG.md) is a teacher that writes left to right too, and few puzzles: it has something new to say of every answer that is tried.
# Route B and votes have one answer, so on-policy they are heard up to the student's first mistake, and are worth what their answers are.
# `python -m bench.train plan config/distill_route_a.py` has the memory.
out_dir = "out/distill_route_a"
init_from = "out/route_a_stage3/ckpt.pt"
teacher = "out/route_b_stage3/ckpt.pt"
data = "stage3"
data_tag = "v0.1"
block_size = 2048
batch_size = 2
gradient_accumulation_steps = 16
max_iters = 1000
learning_rate = 1e-4
warmup_iters = 50
decay_iters = 500
eval_interval = 50
max_hours = 11.5  # of Kaggle's 12; the same command goes on in the next session
