# Toward ARC in hours on one CPU thread: RE-ARC's tasks, and ARC's own tasks as the question.
#   pip install --no-deps reasoning-gym==0.1.25 && python prepare.py arc_cpu --limit_mb=64
#   OMP_NUM_THREADS=1 python train.py config/arc_cpu.py --max_hours=1     again, until its last step
#   python eval_arc.py out/arc_cpu/ckpt.pt --suites=rearc,arc1_train,arc1 --augment=4
# 19 million tokens, each document through a new symmetry at every draw: two hours where bfloat16 is fast.
# More hours, more steps: --max_iters=12000 --decay_iters=4000. What came of it is in LOG.md, "RE-ARC alone".
out_dir = "out/arc_cpu"
data = "arc_cpu"
model = "dense"
n_layer = 8
n_head = 6
n_embd = 192
n_ff = 512
block_size = 1024
batch_size = 4  # 4,096 tokens a step
gradient_accumulation_steps = 1
learning_rate = 3e-3
max_iters = 4700
warmup_iters = 50
decay_iters = 1600
eval_interval = 250
eval_batches = 32  # 128 held-out tasks
keep_every = 1000
