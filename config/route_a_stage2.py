# Route A, stage 2: more reasoning, instructions, longer rows. Goes on from stage 1's weights and stays on its
# plateau. 0.6 billion tokens, a quarter of stage 1: what it adds are skills and formats, which show within a
# few hundred million tokens.
base = "route_a_stage1.py"
out_dir = "out/route_a_stage2"
init_from = "out/route_a_stage1/ckpt.pt"
init_optimizer = True  # the same rate on similar data: its averages are still good
data = "stage2"  # web 40, code 20, math 10, synth 15, arc 15
block_size = 2048
batch_size = 2
max_iters = 2300
warmup_iters = 100
