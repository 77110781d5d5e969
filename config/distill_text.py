# Text, on-policy: Route A after stage 2 continues the stage's text, GPT-2 medium says what it would write at
# every token. It needs `pip install transformers`; any --teacher with GPT-2's vocabulary does.
#   torchrun --nproc_per_node=2 distill.py config/distill_text.py
# At the demo's size continued pretraining was better for equal seconds, by 0.05 to 0.1 nats, and distillation
# better for equal tokens (LOG.md).
base = "distill_route_a.py"
out_dir = "out/distill_text"
init_from = "out/route_a_stage2/ckpt.pt"
teacher = "hf:gpt2-medium"
text = "teacher"
on_policy = 0.5
data = "stage2"
mixture = {"fineweb_edu": 0.8, "smol_smoltalk": 0.2}
block_size = 1024
batch_size = 4
