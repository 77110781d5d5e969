# Toward ARC in hours on a CPU: RE-ARC's tasks, and ARC's own tasks as the question.
#   pip install --no-deps reasoning-gym==0.1.25 && python prepare.py arc_cpu --limit_mb=64
#   OMP_NUM_THREADS=2 python train.py config/arc_cpu.py --compile=True --max_hours=1  again, to its end
#   torchrun --nproc_per_node=2 eval_arc.py out/arc_cpu/ckpt.pt --suites=arc1 --augment=8 --ttt_steps=128
# 18 million tokens, each document through a new symmetry at every draw: 88 minutes where bfloat16 is fast.
# More hours, more steps: --max_iters=12000 --decay_iters=4000. What came of it: LOG.md, "RE-ARC alone" and
# "Test-time training".
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
max_iters = 5000
warmup_iters = 50
decay_iters = 1700
eval_interval = 250
eval_batches = 32  # 128 held-out tasks
keep_every = 1000
