# Route A, stage 3: toward ARC, at rows of 4096 tokens, which hold 90 in 100 of ARC-AGI-1's evaluation tasks
# (median 1,403 tokens). The only stage whose rate goes down: half of it on a lower plateau, half of it
# falling in a straight line to zero. Smaller steps, of 131,072 tokens, and 2,400 of them: 0.31 billion
# tokens.
base = "route_a_stage2.py"
out_dir = "out/route_a_stage3"
init_from = "out/route_a_stage2/ckpt.pt"
init_optimizer = False  # another batch, rate and mixture
data = "stage3"  # web 30, code 20, math 10, synth 20, arc 20
block_size = 4096
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 2400
learning_rate = 3e-4
decay_iters = 1200
eval_interval = 200
eval_suites = "sudoku4,maze,transforms,arc1"
# On one CPU thread, beside the training: 3 to 15 s a task, so about 5 minutes; 200 steps are 8. On a GPU it
# would write its answers token by token in the training's way.
eval_limit = 10
