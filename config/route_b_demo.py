# Route B on the demo stage.
base = "route_a_demo.py"
out_dir = "out/demo/route_b"
model = "trm"
n_head = 2
n_embd = 64
n_ff = 172
n_latent = 2
n_recursion = 2
n_sup = 4
ema = 0.99
