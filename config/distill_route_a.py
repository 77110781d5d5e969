# Route B teaches Route A on the answers that Route A writes, each up to the first cell that Route B has
# otherwise.
#   torchrun --nproc_per_node=2 distill.py config/distill_route_a.py
# A teacher that reads these answers says more of them, and paid at small scale (LOG.md): a larger Route A,
# --teacher=out/bigger/ckpt.pt, or a text model, --teacher=hf:NAME.
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
max_hours = 11.5  # of Kaggle's 12; the next session: --init_from=resume, from the hub too (README.md)
