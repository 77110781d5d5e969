# The recipe of arc_cpu.py at 78M parameters, on RE-ARC up to its full difficulty, BARC and programs of ours:
#   pip install --no-deps reasoning-gym==0.1.25 && python prepare.py arc --source_dir=...
#   python train.py config/arc_speedrun.py --batch_size=16                          an H100
#   torchrun --nproc_per_node=2 train.py config/arc_speedrun.py --batch_size=1      two T4s
#   python train.py config/arc_speedrun.py                                          a 3060, overnight
# 0.6 billion tokens. `python -m bench.plan config/arc_speedrun.py --puzzles=1 --card=H100 --cards=1` says how
# long that takes. Not trained yet: its learning rate lies between those of arc_cpu.py and of stage 1.
# Without a GPU, a look whether all is in order:
#   python train.py config/arc_speedrun.py --sanity=True --out_dir=out/stage0 --max_iters=20 \
#     --eval_interval=20 --log_interval=5 --warmup_iters=10 --decay_iters=10 --batch_size=1 \
#     --batch_tokens=4096 --n_layer=4 ...
base = "arc_cpu.py"
out_dir = "out/arc_speedrun"
data = "arc"
n_layer = 12
n_head = 9
n_embd = 576
n_ff = 1536
block_size = 4096
batch_size = 2
batch_tokens = 131_072  # a step, whatever the batch size
learning_rate = 1e-3
max_iters = 4600
warmup_iters = 100
decay_iters = 1500
eval_interval = 230
keep_every = 0
max_hours = 8.7  # of Kaggle's nine; the next session: --init_from=resume
