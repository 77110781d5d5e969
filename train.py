"""
The one training loop: both routes, every stage, one process or many.

    python train.py config/route_a_demo.py                                   one process, CPU or GPU
    torchrun --nproc_per_node=2 train.py config/route_b_demo.py              two processes share the same global batch
    python train.py config/route_a_demo.py --max_iters=50 --out_dir=out/try  any setting below, overridden
    python train.py config/route_a_demo.py --init_from=resume                go on from out_dir/ckpt.pt

A step is: batches from the loader, forward and backward on each, one optimizer step. gradient_accumulation_steps counts the batches
of a step over all processes, so the same config sees the same data in the same order and takes the same steps on 1, 2 or 4
processes. Nothing in a step draws random numbers that are not derived from the data's own, so a resumed run is the same run.

Writes out_dir/ckpt.pt, out_dir/log.jsonl (one JSON object per logged step) and out_dir/config.json.
Ctrl-C or SIGTERM finishes the step, saves and exits. Next to read: eval_arc.py, which judges what this makes.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint as ckpt
import configurator
import tokenizer as tok
from loader import Loader

# -----------------------------------------------------------------------------
# The defaults train the 100M Route A on the demo stage. Config files change what they need to.

# ---- where it goes and what it says
out_dir = "out"
init_from = "scratch"  # 'scratch', 'resume' (from out_dir/ckpt.pt), or the path of a checkpoint to take the weights from
overwrite = False  # train from scratch into an out_dir that already holds a checkpoint
eval_interval = 500  # steps between validations, each of which also saves a checkpoint
eval_batches = 8  # validation batches per source, at most
log_interval = 10  # steps between lines in log.jsonl
# ---- data
data_dir = "data"
data = "demo"  # name of a prepared stage
mixture = {}  # {source: share of the steps}; empty: the stage's own
batch_size = 8  # rows of text per batch; puzzles come in batches of as many tokens
block_size = 1024  # longest row
gradient_accumulation_steps = 8  # batches per optimizer step, over all processes
# ---- model (None: the default of the model file's Config)
model = "dense"  # 'dense' is Route A, 'trm' is Route B
n_layer: int | None = None
n_head: int | None = None
n_embd: int | None = None
n_ff: int | None = None
layer_pattern: str | None = None  # tiled over the depth: k is KDA, a is full attention
n_latent: int | None = None  # Route B: latent updates per recursion, in puzzles
n_recursion: int | None = None  # Route B: recursions per supervision step
n_sup: int | None = None  # Route B: supervision steps per puzzle, at most
text_n_latent: int | None = None  # Route B: the same three for text
text_n_recursion: int | None = None
text_n_sup: int | None = None
right_to_left: bool | None = None  # Route B: in puzzles, the second of every three KDA layers reads from the end
halt_exploration: float | None = None  # Route B: share of puzzles made to go on whatever the halting head says
# ---- optimizer
learning_rate = 6e-4
max_iters = 10000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0 for none
ema = 0.0  # decay of the averaged weights that evaluation uses; 0 for none
# ---- schedule: warm up, stay, go down in a straight line
warmup_iters = 100
decay_iters = 2000  # the last this many steps
min_lr = 0.0
# ---- system
device = "auto"  # 'cpu', 'cuda', or auto: cuda where there is one
dtype = "auto"  # 'float32', 'bfloat16', 'float16'; auto: float32 on CPU, bfloat16 from capability 8.0 on, float16 before
compile = False  # torch.compile
seed = 1337
# -----------------------------------------------------------------------------
defaults = configurator.settings(globals())
config = configurator.configure(globals(), sys.argv[1:])


def stop(message):
    """A user's mistake: one line, from one process, exit code 1."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


# ---- who and where we are
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "cpu"
if device.startswith("cuda") and not torch.cuda.is_available():
    stop("device='cuda', but PyTorch sees no GPU: use --device=cpu")
if device == "cuda":
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)
device_type = device.split(":")[0]
if dtype == "auto":
    dtype = "float32" if device_type == "cpu" else "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
if dtype not in ("float32", "bfloat16", "float16"):
    stop(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
if gradient_accumulation_steps % world_size:
    stop(f"gradient_accumulation_steps={gradient_accumulation_steps} batches cannot be shared evenly by {world_size} processes")
if device_type == "cpu" and world_size == 1 and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(os.cpu_count() or 1)
ckpt_path = os.path.join(out_dir, "ckpt.pt")
log_path = os.path.join(out_dir, "log.jsonl")
if init_from == "scratch" and os.path.exists(ckpt_path) and not overwrite:
    stop(f"{ckpt_path} exists: go on with --init_from=resume, start again with --overwrite=True, or choose another --out_dir")

# ---- data, model, optimizer
torch.manual_seed(seed)
try:
    resumed = ckpt.load(ckpt_path) if init_from == "resume" else None
    net = ckpt.make_model(model, config)
    if resumed is not None:
        ckpt.load_weights(net, resumed["weights"], ckpt_path)
    elif init_from != "scratch":
        ckpt.load_weights(net, ckpt.load(init_from)["weights"], init_from)
    loader = Loader(data_dir, data, weights=mixture, seed=seed, batch_size=batch_size, block_size=block_size,
                    batches_per_step=gradient_accumulation_steps, puzzle_format=net.puzzle_format, rank=rank, world_size=world_size,
                    verify=master)  # fmt: skip
    if resumed is not None:
        if resumed["train"]["data"] != loader.fingerprint:
            stop(f"stage {data!r} is not what {ckpt_path} was trained on: its shards have other hashes")
        loader.load_state_dict(resumed["train"]["loader"])
except (FileNotFoundError, ValueError) as e:
    stop(e)
net.to(device)
average = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema else None
optimizer = net.configure_optimizer(weight_decay, learning_rate, (beta1, beta2))
scaler = torch.amp.GradScaler(enabled=dtype == "float16")
iteration, trained_seconds, trained_tokens, val_losses, val_loss, carries = 0, 0.0, 0, {}, None, {}
if resumed is not None:
    state = resumed["train"]
    iteration, trained_seconds, trained_tokens = state["iter"], state["seconds"], state["tokens"]
    val_losses, val_loss = state["val_losses"], state["val_loss"]
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    for k, v in (resumed["ema"] or {}).items():
        average[k].copy_(v)
    for key, carry in state["carries"].items():  # each process takes those of the batches that are now its own
        number, length = map(int, key.split("/"))
        if number % world_size == rank:
            carries[number, length] = {k: v.to(device) for k, v in carry.items()}
    del resumed, state

if world_size > 1:
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    wrapped = DistributedDataParallel(net, device_ids=[device] if device_type == "cuda" else None, broadcast_buffers=False)
else:
    wrapped = net
step_model = torch.compile(wrapped) if compile else wrapped
autocast = torch.autocast(device_type, dtype=getattr(torch, dtype)) if dtype != "float32" else contextlib.nullcontext()


# ---- the pieces of a step
def learning_rate_at(it):
    """Warm up linearly, stay, go down linearly over the last decay_iters steps."""
    up = min(1.0, (it + 1) / max(1, warmup_iters))
    down = min(1.0, (max_iters - it) / max(1, decay_iters))
    return min_lr + (learning_rate - min_lr) * min(up, down)


def over_processes(values):
    """Sums of a list of numbers over all processes."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(values)
    return values.tolist()


@contextlib.contextmanager
def averaged_weights():
    """Inside, the model has the averaged weights, if there are any."""
    if average is None:
        yield
        return
    own = {k: v.detach().clone() for k, v in net.state_dict().items()}
    net.load_state_dict(average)
    yield
    net.load_state_dict(own)


@torch.no_grad()
def validate():
    """{source: mean loss}, each process on its share of the batches."""
    net.eval()
    sums = {}
    with averaged_weights():
        for mode in ("text", "puzzle"):
            for name, _, idx, targets in loader.val_batches(mode, eval_batches):
                with autocast:
                    loss = net(idx.to(device), targets.to(device), mode=mode)[1]
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += loss.item() * len(idx)
                total[1] += len(idx)
    net.train()
    names = [name for _, name, _ in loader.val]
    flat = over_processes([x for name in names for x in sums.get(name, [0.0, 0.0])])
    losses = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1]}
    text = [losses[name] for kind, name, _ in loader.val if kind == "text" and name in losses]
    return losses, sum(text) / len(text) if text else None


def save_checkpoint():
    mine = {f"{number}/{length}": {k: v.cpu() for k, v in carry.items()} for (number, length), carry in carries.items()}
    everyones = [mine]
    if world_size > 1:
        everyones = [None] * world_size if master else None
        dist.gather_object(mine, everyones)
    if not master:
        return
    ckpt.save({
        "format": ckpt.CHECKPOINT_FORMAT, "model": model, "model_config": dict(vars(net.config)), "weights": net.state_dict(),
        "ema": average, "tokenizer": tok.fingerprint(), "config": config,
        "train": {"iter": iteration, "seconds": trained_seconds, "tokens": trained_tokens, "val_loss": val_loss, "val_losses": val_losses,
                  "tokens_per_second": trained_tokens / trained_seconds if trained_seconds else None, "data": loader.fingerprint,
                  "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "loader": loader.state_dict(),
                  "carries": {key: carry for part in everyones for key, carry in part.items()}},
    }, ckpt_path)  # fmt: skip


def write_log(entry):
    if master:
        with open(log_path, "a") as f:
            f.write(json.dumps(entry) + "\n")


# ---- go
if master:
    os.makedirs(out_dir, exist_ok=True)
    print(configurator.show(config, defaults))
    print(f"{net.num_params() / 1e6:.2f}M parameters, {dtype} on {device}, {world_size} process{'es' * (world_size > 1)}, "
          f"{gradient_accumulation_steps * batch_size * block_size:,} tokens per step, sources {', '.join(loader.names)}")  # fmt: skip
    configurator.save(config, os.path.join(out_dir, "config.json"))
    # What was logged after the checkpoint will be logged again.
    kept = []
    if init_from == "resume" and os.path.exists(log_path):
        with open(log_path) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["iter"] <= iteration]
    with open(log_path + ".tmp", "w") as f:
        f.writelines(kept)
    os.replace(log_path + ".tmp", log_path)

interrupted = []
signal.signal(signal.SIGTERM, lambda *_: interrupted.append("SIGTERM"))
signal.signal(signal.SIGINT, lambda *_: interrupted.append("Ctrl-C") if not interrupted else sys.exit(130))
net.train()
progress = tqdm(total=max_iters, initial=iteration, disable=not master, unit="step", dynamic_ncols=True, mininterval=1.0)
since_log = {"seconds": 0.0, "tokens": 0}
while iteration < max_iters:
    started = time.perf_counter()
    lr = learning_rate_at(iteration)
    for group in optimizer.param_groups:
        group["lr"] = lr
    batches = loader.next_step()
    losses, tokens = [], 0
    for i, batch in enumerate(batches):
        idx, targets = batch.idx.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True)
        last = i == len(batches) - 1  # gradients of the processes are averaged once, after the last batch
        with contextlib.nullcontext() if world_size == 1 or last else wrapped.no_sync(), autocast:
            _, loss, carry = step_model(idx, targets, mode=batch.mode, carry=carries.get(batch.key))
            scaler.scale(loss / len(batches)).backward()
        if carry is not None:
            carries[batch.key] = carry
        losses.append(loss.detach())
        tokens += idx.numel()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if average is not None:
        decay = min(ema, (1 + iteration) / (10 + iteration))  # early on, the average follows closely: there is little to average
        with torch.no_grad():
            for k, v in net.state_dict().items():
                average[k].lerp_(v, 1 - decay)
    iteration += 1

    # Every process learns the same sums, so that all of them stop, save and validate at the same steps.
    loss, tokens, stopping = over_processes([sum(x.item() for x in losses) / len(losses) / world_size, tokens, len(interrupted)])
    seconds = time.perf_counter() - started
    trained_seconds += seconds
    trained_tokens += int(tokens)
    since_log = {"seconds": since_log["seconds"] + seconds, "tokens": since_log["tokens"] + int(tokens)}
    if not math.isfinite(loss):
        stop(f"the loss is {loss} at step {iteration}; the last checkpoint is untouched. Lower learning_rate (now {learning_rate}), "
             "or raise warmup_iters")  # fmt: skip
    progress.set_postfix_str(f"{batches[0].source} loss {loss:.3f}", refresh=False)
    progress.update()
    if iteration % log_interval == 0 or iteration == max_iters:
        write_log({"iter": iteration, "loss": loss, "source": batches[0].source, "lr": lr, "grad_norm": grad_norm.item(),
                   "tokens": trained_tokens, "seconds": round(trained_seconds, 3),
                   "tokens_per_second": round(since_log["tokens"] / since_log["seconds"], 1)})  # fmt: skip
        since_log = {"seconds": 0.0, "tokens": 0}
    if iteration % eval_interval == 0 or iteration == max_iters or stopping:
        if not stopping:
            val_losses, val_loss = validate()
            write_log({"iter": iteration, "val_loss": val_loss, "val_losses": val_losses})
            if master:
                progress.write(f"step {iteration}: validation " + ", ".join(f"{k} {v:.3f}" for k, v in val_losses.items()))
        save_checkpoint()
    if stopping:
        if master:
            progress.write(f"stopped by {interrupted[0] if interrupted else 'a signal'} after step {iteration}; "
                           f"go on with --init_from=resume (saved to {ckpt_path})")  # fmt: skip
        break
progress.close()
if world_size > 1:
    dist.destroy_process_group()
