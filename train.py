"""
The one training loop: both routes, every stage, one process or many.

    python train.py config/route_a_demo.py                                   one process, CPU or GPU
    torchrun --nproc_per_node=2 train.py config/route_b_demo.py              two processes share the same global batch
    python train.py config/route_a_demo.py --max_iters=50 --out_dir=out/try  any setting below, overridden
    python train.py config/route_a_demo.py                                   once more: goes on from ckpt.pt
    python train.py config/route_a_demo.py --overwrite=True                  begin again, whatever is there
    python train.py config/route_a_stage0.py                                 is everything in order? a table of PASS and FAIL
    python train.py config/route_a_stage1.py --push_to=USER/NAME             each checkpoint also goes to the hub (publish.py)

A step is: batches from the loader, forward and backward on each, one optimizer step. gradient_accumulation_steps counts the batches
of a step over all processes, so the same config sees the same data in the same order and takes the same steps on 1, 2 or 4
processes. Nothing in a step draws random numbers that are not derived from the data's own, so a resumed run is the same run.

Writes into out_dir: ckpt.pt, ckpt_prev.pt (the one before it), log.jsonl (one JSON object per logged step;
what a run that goes on from an earlier step cuts off goes to log.cut.jsonl), loss.png (drawn from it),
config.json, evals.jsonl, and eval_step.log, what the last evaluation said. While steps are skipped because
their loss or gradient is not finite, nothing is saved: what is on disk is better. Ctrl-C or SIGTERM finishes
the step, saves and exits; a second one exits at once. Read next: eval_arc.py, which judges what this makes.
"""

import contextlib
import math
import os
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from smol import checkpoint as ckpt
from smol import loop, runtime
from smol import sanity as sanity_checks
from smol import tokenizer as tok
from smol.loader import Ahead, Loader
from smol.runtime import all_agree, difference, local_rank, master, rank, world_size

# -----------------------------------------------------------------------------
# The defaults train the 100M Route A on the demo stage. Config files change what they need to.

# ---- where it goes and what it says
out_dir = "out"
init_from = "auto"  # go on from out_dir/ckpt.pt if it is there ('resume': it must be), else 'scratch'; or the
# path of a checkpoint to take the weights from, and, given again, to go on with that run
init_optimizer = False  # with the path of a checkpoint: take its optimizer's state as well
overwrite = False  # begin anew in an out_dir that already holds a checkpoint
eval_interval = 500  # steps between validations, each of which also saves a checkpoint
eval_batches = 8  # validation batches per source, at most
eval_suites = ""  # suites of eval_arc.py, such as 'sudoku4,arc1', run in a process of their own after each checkpoint; '' for none
eval_limit = 20  # tasks of each of these suites
eval_device = "cpu"  # where that process runs: not in the training's way; 'auto': on a GPU where there is one
eval_minutes = 10.0  # how long a finished run, with all saved and published, waits for the last of these
log_interval = 10  # steps between lines in log.jsonl
max_hours = 0.0  # stop and save after this many hours, whatever max_iters says (a session's limit, less what saving takes); 0 for never
push_to = ""  # USER/NAME on the hub: each checkpoint is published there, by a process beside the training (publish.py)
push_full = (
    False  # publish all that --init_from=resume needs, three times as much, instead of the weights alone
)
tracker = ""  # 'trackio' or 'wandb' get the same figures as log.jsonl, if installed
# ---- data
data_dir = "data"
data = "demo"  # name of a prepared stage
data_tag: str | None = None  # its frozen version, such as 'v0.1'; None: the stage as it is now
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
n_grad: int | None = None  # Route B: recursions with gradient, the last ones
n_sup: int | None = None  # Route B: supervision steps per puzzle, at most
carry_turns = 1  # Route B: a puzzle takes a supervision step every so many steps; 1 shows small batches the same rows on end (LOG.md)
halt_exploration: float | None = (
    None  # Route B: share of puzzles made to go on whatever the halting head says
)
recompute: bool | None = (
    None  # go through each block again in the backward: a third more work, a fraction of the memory
)
# ---- optimizer
optimizer = "muon"  # for the blocks' matrices, and AdamW for the rest (muon.py); 'adamw' for all
learning_rate = 6e-4
max_iters = 10000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0 for none
ema = 0.0  # decay of the averaged weights that evaluation uses; 0 for none
max_skipped = (
    20  # steps in a row whose loss or gradient is not finite: each is skipped, this many end the run
)
# ---- schedule
schedule = "wsd"  # 'wsd': warm up, stay, go down in a straight line over the last decay_iters steps; 'cosine': warm up, half a cosine
warmup_iters = 100
decay_iters = 2000  # 0 stays up to the end: for a stage that another one follows
min_lr = 0.0
# ---- system
device = "auto"  # 'cpu', 'cuda', or auto: cuda where there is one
dtype = "auto"  # 'float32', 'bfloat16', 'float16'; auto: float32 on CPU, bfloat16 from capability 8.0 on, float16 before
compile: bool | str = (
    "auto"  # torch.compile the blocks; auto: on a GPU. Where it fails, training goes on without
)
sync_check_interval = 100  # steps between comparisons of all processes' weights; 0 for none
seed = 1337
# ---- stage 0
sanity = False  # before the steps, learn one batch by heart; after them, a table of PASS and FAIL
sanity_steps = 100  # steps to learn that batch in
sanity_tokens = 2048  # tokens of that batch
sanity_run_tokens = (
    0.0  # tokens of the run that this prepares: the table says how many hours it would take here
)
# -----------------------------------------------------------------------------
# What they may be, checked before anything is loaded. Not here: names, paths, and what is True or False.
RANGES = {
    "[1, inf)": "eval_interval eval_batches eval_limit log_interval batch_size block_size max_iters max_skipped "
    "gradient_accumulation_steps n_layer n_head n_embd n_ff n_latent n_recursion n_grad "
    "n_sup carry_turns sanity_steps "
    "sanity_tokens",
    "[0, inf)": "mixture learning_rate weight_decay warmup_iters decay_iters min_lr sync_check_interval "
    "sanity_run_tokens",
    "[0, inf]": "max_hours grad_clip eval_minutes",
    "[0, 1)": "beta1 beta2 ema",
    "[0, 1]": "halt_exploration",
    "[0, 1e18)": "seed",
    ("dense", "trm"): "model",
    ("muon", "adamw"): "optimizer",
    ("wsd", "cosine"): "schedule",
    ("", "trackio", "wandb"): "tracker",
    ("auto", "float32", "bfloat16", "float16"): "dtype",
    ("auto", True, False): "compile",
}
defaults = configurator.settings(globals())
config = configurator.configure(globals(), sys.argv[1:])

# ---- who and where we are
began = time.monotonic()
checks = []  # of stage 0
ckpt_path, log_path, evals_path = (
    os.path.join(out_dir, name) for name in ("ckpt.pt", "log.jsonl", "evals.jsonl")
)


def stop(message, everyone=True):
    """The run cannot go on: one line, and exit code 1. everyone: all processes get here, and one of them says it."""
    if sanity and (master or not everyone):
        sanity_checks.show([*checks, ("went through", False, str(message))], out_dir)
    runtime.stop(message, everyone)


def stop_if(problem):
    """problem: a message or None, of this process. If there is one in any process, all stop."""
    problem = all_agree(problem)
    if problem is not None:
        stop(problem)


def say(text):
    """A line for people, from one process, that does not tear the progress bar."""
    if master:
        tqdm.write(text)


try:
    loop.check_settings(config, RANGES)
    device = runtime.pick_device(device)
    device = f"cuda:{local_rank}" if device == "cuda" else device
    dtype = runtime.pick_dtype(dtype, device)
    tracked = loop.tracker_module(tracker if master else "")
except ValueError as e:
    stop(e)
device_type = device.split(":")[0]
if sanity and init_from == "resume":
    stop("stage 0 is not resumed: run it from the beginning, without --init_from=resume")
if device_type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
else:
    runtime.keep_freed_memory()
    if world_size == 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
if schedule == "wsd" and decay_iters > max_iters:
    say(
        f"decay_iters={decay_iters} is longer than max_iters={max_iters}: the rate falls from the start, and never gets above "
        f"{learning_rate * max_iters / decay_iters:.1e} (learning_rate={learning_rate:g})"
    )
runtime.start_processes(device_type)

# ---- from scratch, from another's weights, or going on
held, started_from, start_path, resumed, problem = None, None, None, False, None
try:
    if master and os.path.isdir(out_dir):
        held = loop.lock(out_dir)
except (OSError, ValueError) as e:
    problem = str(e)
stop_if(problem)
try:
    started_from, start_path, resumed = loop.starting_point(init_from, out_dir, overwrite or sanity)
    if resumed and "student" in started_from["train"]:
        raise ValueError(
            f"{start_path} was written by distill.py: go on with distill.py, or begin another "
            f"run with its weights: --init_from={start_path} and another --out_dir"
        )
    if (resumed or (start_path and init_optimizer)) and "optimizers" not in started_from["train"]:
        raise ValueError(
            f"{start_path} has the weights alone, as published without --push_full=True: start "
            f"from them with --init_from={start_path} --init_optimizer=False and another "
            "--out_dir"
        )
except (OSError, ValueError) as e:
    problem = str(e)
stop_if(problem)
stop_if(loop.same_start(started_from["train"]["iter"] if resumed else None, device))
if resumed and started_from["train"]["iter"] >= max_iters:
    loop.nothing_left(started_from, start_path, max_iters, push_to, push_full, say)

# ---- data, model, optimizer
torch.manual_seed(seed)
try:
    net = ckpt.make_model(model, config)
    if started_from is not None:
        ckpt.load_weights(net, started_from["weights"], start_path)
    net.to(device)
    optimizers = loop.make_optimizers(net, optimizer, weight_decay, learning_rate, (beta1, beta2))
    loader = Loader(
        data_dir,
        data,
        tag=data_tag,
        weights=mixture,
        seed=seed,
        batch_size=batch_size,
        block_size=block_size,
        batches_per_step=gradient_accumulation_steps,
        puzzle_format=net.puzzle_format,
        rank=rank,
        world_size=world_size,
        verify=local_rank == 0,
    )
    learned = set(loader.names)  # what the weights have seen, here and before
    if started_from is not None:
        learned |= set(started_from["train"].get("data", {}).get("sources", []))
    pinned = {
        "stage": data,
        "tag": data_tag,
        "snapshot": loader.snapshot,
        "shards": loader.fingerprint,
        "manifest": loader.manifest,
        "data_dir": data_dir,
        "shares": loader.rounded_shares(),
        "sources": sorted(learned),
    }
    if resumed:
        another = loop.other_data(started_from["train"]["data"], pinned)
        loader.load_state_dict(started_from["train"]["loader"])
    if resumed or (started_from is not None and init_optimizer):
        if started_from["train"]["optimizer_name"] != optimizer:
            raise ValueError(
                f"the checkpoint has the state of optimizer {started_from['train']['optimizer_name']!r}, this run uses "
                f"{optimizer!r}: use the same, or its weights alone with --init_from=PATH"
            )
        for o, state in zip(optimizers, started_from["train"]["optimizers"]):
            ckpt.load_optimizer(o, state)
except (OSError, ValueError) as e:
    problem = str(e)
    if resumed and init_from == "auto":
        problem += "; to begin anew: --overwrite=True, or another --out_dir"
stop_if(problem)

average = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema else None
if average is not None and started_from is not None:
    for k, v in (started_from["ema"] or {}).items():
        average[k].copy_(v)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
autocast = (
    torch.autocast(device_type, dtype=getattr(torch, dtype))
    if dtype != "float32"
    else contextlib.nullcontext()
)
iteration, trained_seconds, trained_tokens, val_losses, val_loss, carries = 0, 0.0, 0, {}, None, {}
skipped, skipped_in_a_row = 0, 0
changed, began_with, saved_step = [], start_path, None  # saved_step: of this run's checkpoint in out_dir
if resumed:
    state = started_from["train"]
    saved_step, began_with = state["iter"], state.get("began_with")
    iteration, trained_seconds, trained_tokens = state["iter"], state["seconds"], state["tokens"]
    val_losses, val_loss = state["val_losses"], state["val_loss"]
    skipped, skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    where_it_went = (
        "init_from",
        "overwrite",
        "out_dir",
        "max_hours",
        "data_dir",
        "tracker",
        "push_to",
        "push_full",
    )
    changed = [another] if another else []
    changed += [
        f"{k}={v!r} (was {started_from['config'].get(k)!r})"
        for k, v in config.items()
        if started_from["config"].get(k) != v and k not in where_it_went
    ]
    if len(state["rng"]) == world_size:
        loop.restore_random_state(state["rng"], device_type)
    else:
        changed.append(
            f"{world_size} processes (were {len(state['rng'])}: the same data in the same order, losses equal but for rounding)"
        )
    if all(
        started_from["config"].get(k) == config[k]
        for k in ("batch_size", "block_size", "gradient_accumulation_steps", "carry_turns")
    ):
        carries = loop.own_carries(state["carries"])
    elif state["carries"]:
        changed.append("puzzles that were being thought about begin anew, as batches have another shape now")
started_from = None  # free its memory


# ---- the pieces of a step
def check_in_sync(loss, grad_norm):
    """All processes must hold the same bits: a broken link or a bug otherwise trains two models and averages their gradients."""
    both = torch.tensor([loss, grad_norm], dtype=torch.float64, device=device)
    problem = difference(
        {
            **dict(net.named_parameters()),
            **{f"the average of {k}": v for k, v in (average or {}).items()},
            "the loss": both[:1],
            "the gradient norm": both[1:],
        }
    )
    if problem:
        stop(
            f"processes are out of sync at step {iteration}: {problem}; go on from {ckpt_path} with --init_from=resume"
        )


def figures():
    """What a checkpoint tells of the run, beyond what resuming needs."""
    rate = trained_tokens / trained_seconds if trained_seconds else None
    return {
        "iter": iteration,
        "seconds": trained_seconds,
        "tokens": trained_tokens,
        "val_loss": val_loss,
        "val_losses": val_losses,
        "tokens_per_second": rate,
        "data": pinned,
    }


def save_checkpoint():
    """Everything that the rest of the run depends on. Returns whether it is on disk; if not, the checkpoint before still is."""
    train = {
        **figures(),
        "loader": ahead.state,
        "optimizer_name": optimizer,
        "optimizers": [o.state_dict() for o in optimizers],
        "scaler": scaler.state_dict(),
        "rng": loop.random_states(device_type),
        "carries": loop.everyones_carries(carries, device),
        "skipped": skipped,
        "skipped_in_a_row": skipped_in_a_row,
        "began_with": began_with,
    }
    keep = saved_step is not None
    return loop.save_checkpoint(ckpt_path, net, model, config, average, train, device, say, keep)


def diverged(what):
    """What is in memory is not worth saving: stop, with what there is on disk."""
    stop(
        f"{what}; {loop.to_go_on_from(ckpt_path, saved_step)}. Lower learning_rate (now {learning_rate:g}) "
        f"or grad_clip (now {grad_clip:g}), or raise warmup_iters (now {warmup_iters})"
    )


def write_log(entry):
    if master:
        loop.write_log(entry, log_path, say, tracked)


# ---- ready
if compile is True or (compile == "auto" and device_type == "cuda"):
    compile = loop.compile_blocks(net, loader, autocast, scaler, device, say)
else:
    compile = False
if sanity:
    tag = f"tag {data_tag}, snapshot {loader.snapshot[:12]}" if data_tag else "not frozen, no tag"
    checks.append(("data", True, f"{data}: every shard has its SHA-256; {tag}"))
    checks.append(("tokenizer", True, f"{tok.fingerprint()[:12]}, the shards' and this one"))
    for mode in ("text", "puzzle"):
        batch = next(loader.val_batches(mode, 1), None)
        if batch is not None:
            checks.append(
                sanity_checks.by_heart(
                    net,
                    batch,
                    mode=mode,
                    steps=sanity_steps,
                    tokens=sanity_tokens,
                    optimizer=optimizer,
                    learning_rate=learning_rate,
                    betas=(beta1, beta2),
                    autocast=autocast,
                    scaled=scaler.is_enabled(),
                    device=device,
                )
            )
wrapped = net
if world_size > 1:
    wrapped = DistributedDataParallel(
        net,
        device_ids=[device] if device_type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
if master:
    try:
        os.makedirs(out_dir, exist_ok=True)
        held = held or loop.lock(out_dir)
        if not resumed and os.path.exists(ckpt.previous(ckpt_path)):
            os.remove(ckpt.previous(ckpt_path))  # of the run that this one replaces
        for path in (log_path, evals_path):  # from scratch, iteration is 0: nothing is kept
            runtime.cut_log(path, iteration if resumed else -1)
        configurator.save(config, os.path.join(out_dir, "config.json"))
    except OSError as e:
        problem = f"cannot write to {out_dir}: {e.strerror}"
    except ValueError as e:
        problem = str(e)
stop_if(problem)
card = runtime.device_name(device)
peak = runtime.peak_flops(card)
if master:
    print(configurator.show(config, defaults))
    print(
        f"{net.num_params() / 1e6:.2f}M parameters, {dtype} on {card}{', compiled' if compile else ''}, {optimizer}, {world_size} "
        f"process{'es' * (world_size > 1)}, {gradient_accumulation_steps * batch_size * block_size:,} tokens per step, "
        f"sources {', '.join(loader.names)}"
    )
    if resumed:
        start = f"going on after step {iteration} of {start_path}"
    else:
        start = f"from the weights of {start_path}" if start_path else f"from scratch, into {out_dir}"
    print(f"{start}, with {loop.place_of(pinned)}" + "".join(f"\n  changed: {c}" for c in changed))
    if tracked:
        tracked.init(
            project="smol-llm",
            name=os.path.basename(os.path.normpath(out_dir)),
            config=config,
            resume="allow",
        )

loop.say_what_is_not_validated(loader, eval_batches, say)
interrupted = loop.catch_signals()
net.train()
ahead = Ahead(loader, pin=device_type == "cuda")
progress = tqdm(
    total=max_iters,
    initial=iteration,
    disable=None if master else True,
    unit="step",
    dynamic_ncols=True,
    mininterval=1.0,
)
since_log = {"seconds": 0.0, "tokens": 0, "flops": 0.0, "waited": 0.0, "steps": 0}
run_log, saved, due, stopping = [], True, False, False
evaluation = loop.Evaluation(out_dir, eval_suites if master else "", eval_limit, eval_device, say)
publication = loop.Publication(out_dir, push_to if master else "", push_full, say)

# ---- go
while iteration < max_iters:
    started = time.perf_counter()
    lr = loop.learning_rate_at(
        iteration,
        schedule=schedule,
        learning_rate=learning_rate,
        min_lr=min_lr,
        warmup_iters=warmup_iters,
        decay_iters=decay_iters,
        max_iters=max_iters,
    )
    for group in (group for o in optimizers for group in o.param_groups):
        group["lr"] = lr
    batches = ahead.next_step()
    losses, tokens, flops, new_carries = [], 0, 0.0, {}
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1  # gradients of the processes are averaged once, after the last batch
        number, length = batch.key
        key = (
            iteration % carry_turns * gradient_accumulation_steps + number,
            length,
        )  # of the carry that this batch goes on with
        try:
            idx, targets = (
                batch.idx.to(device, non_blocking=True),
                batch.targets.to(device, non_blocking=True),
            )
            with contextlib.nullcontext() if world_size == 1 or last else wrapped.no_sync():
                with autocast:  # the forward alone: inside, the backward's own float32 products would overflow as float16 (LOG.md)
                    _, loss, carry = wrapped(
                        idx, targets, mode=batch.mode, carry=loop.moved(carries.get(key), device)
                    )
                scaler.scale(loss / len(batches)).backward()
        except RuntimeError as e:
            if not runtime.out_of_memory(e):
                raise
            recomputing = "" if net.config.recompute else "--recompute=True, "
            stop(
                f"out of memory on {card}, process {rank}, in a {batch.mode} batch of {len(batch.idx)} x "
                f"{batch.idx.shape[1]} tokens: a smaller --batch_size with more --gradient_accumulation_steps, "
                f"{recomputing}or a lower --block_size takes less",
                everyone=False,
            )
        if carry is not None:
            new_carries[key] = loop.moved(carry, "cpu")
        losses.append(loss.detach())
        tokens += batch.tokens
        flops += batch.tokens * net.flops_per_token(idx.shape[1], batch.mode, training=True)
    for o in optimizers:
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf).item()

    # Every process learns the same sums, so that all of them step or skip, stop, save and validate together.
    loss = sum(x.item() for x in losses) / len(losses) / world_size
    ending = bool(interrupted) or bool(max_hours and time.monotonic() - began > 3600 * max_hours)
    loss, tokens, flops, waited, stopping = runtime.sums(
        [loss, tokens, flops, ahead.waited / world_size, ending], device
    )
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        for o in optimizers:
            scaler.step(o)
        carries.update(new_carries)
        skipped_in_a_row = 0
    else:
        skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
    scaler.update()
    for o in optimizers:
        o.zero_grad(set_to_none=True)
    if average is not None and finite:
        loop.follow(average, net, ema, iteration)
    iteration += 1

    seconds = time.perf_counter() - started
    trained_seconds += seconds
    trained_tokens += int(tokens)
    for k, v in (
        ("seconds", seconds),
        ("tokens", int(tokens)),
        ("flops", flops),
        ("waited", waited),
        ("steps", 1),
    ):
        since_log[k] += v
    source = batches[0].source
    progress.set_postfix_str(f"{source} loss {loss:.3f}", refresh=False)
    progress.update()
    if not finite:
        write_log(
            {
                "iter": iteration,
                "loss": None,
                "source": source,
                "lr": lr,
                "skipped": skipped,
                "scale": scaler.get_scale(),
            }
        )
        say(
            f"step {iteration} skipped: loss {loss:.3g}, gradient norm {grad_norm:.3g}"
            + (f"; loss scale now {scaler.get_scale():g}" if scaler.is_enabled() else "")
        )
        if skipped_in_a_row >= max_skipped:
            diverged(
                f"{skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                f"is step {iteration}"
            )
    elif iteration % log_interval == 0 or iteration == max_iters:
        entry = {
            "iter": iteration,
            "loss": loss,
            "source": source,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": trained_tokens,
            "seconds": round(trained_seconds, 3),
            "tokens_per_second": round(since_log["tokens"] / since_log["seconds"], 1),
            "mfu": round(since_log["flops"] / since_log["seconds"] / world_size / peak, 4) if peak else None,
            "memory_gb": round(runtime.peak_memory(device) / 1e9, 3),
            "data_wait": round(since_log["waited"] / since_log["seconds"], 4),
            "eta_hours": round((max_iters - iteration) * since_log["seconds"] / since_log["steps"] / 3600, 3),
            "skipped": skipped,
        }
        write_log(entry)
        run_log.append(entry)
        say(
            f"step {iteration}: loss {loss:.3f} ({source}), lr {lr:.2e}, gradient {grad_norm:.2f}, {entry['tokens_per_second']:,.0f} "
            f"tokens/s, "
            + (f"MFU {entry['mfu']:.1%}, " if peak else "")
            + f"{entry['memory_gb']:.2f} GB, data wait "
            f"{entry['data_wait']:.1%}, {entry['eta_hours']:.2f} h to go"
        )
        since_log = dict.fromkeys(since_log, 0)
    if sync_check_interval and (iteration % sync_check_interval == 0 or iteration == max_iters):
        check_in_sync(loss, grad_norm)
    evaluation.collect()
    publication.collect()
    due = due or iteration % eval_interval == 0 or iteration == max_iters or bool(stopping)
    if due and (finite or loop.only_scaling(loss, scaler)):  # else what is on disk is better
        wrong = loop.unsound(net, average)
        if wrong:
            diverged(f"after step {iteration} there are weights that are not finite ({wrong})")
        if not stopping:
            val_losses, val_loss = loop.validate(net, average, loader, eval_batches, autocast, device)
            if not all(map(math.isfinite, val_losses.values())):
                diverged(f"the validation loss of step {iteration} is not finite ({val_losses})")
            if val_losses:
                write_log({"iter": iteration, "val_loss": val_loss, "val_losses": val_losses})
                shown = ", ".join(f"{k} {v:.3f}" for k, v in val_losses.items())
                say(f"step {iteration}: validation {shown}")
        saved, due = save_checkpoint(), False
        saved_step = iteration if saved else saved_step
        if master:
            try:
                runtime.draw_losses(out_dir)
            except OSError as e:
                say(f"could not draw loss.png: {e.strerror}")
        if saved and not stopping:
            evaluation.start(iteration)
            publication.start(iteration)
    if stopping:
        break
progress.close()
ahead.close()
lost = f"; {loop.to_go_on_from(ckpt_path, saved_step)}"  # where the last steps are
if not saved and not due:
    lost = loop.save_weights_alone(ckpt_path, net, model, config, average, figures()) + lost
if tracked:
    tracked.finish()
publication.end(iteration, at_once=bool(interrupted) or due or not saved)
evaluation.end(0 if stopping else eval_minutes)
if stopping:
    why = (
        f"by {interrupted[0][0]}"
        if interrupted
        else f"after {max_hours:g} hours"
        if max_hours
        else "by another process"
    )
    if due:
        stop(
            f"stopped {why} after step {iteration}; nothing was saved, as steps were being skipped whose "
            f"loss or gradient was not finite{lost}"
        )
    if not saved:
        stop(f"stopped {why} after step {iteration}, and this step could not be saved{lost}")
    say(f"stopped {why} after step {iteration}; go on with --init_from=resume (saved to {ckpt_path})")
elif due:
    diverged(f"the last steps up to {iteration} were skipped, as their loss or gradient was not finite")
elif not saved:
    stop(f"all {iteration} steps are done, but the last checkpoint could not be saved to {ckpt_path}{lost}")
elif sanity and master:
    checks += sanity_checks.afterwards(
        run_log,
        val_losses,
        ckpt_path,
        net,
        scaled=scaler.is_enabled(),
        world_size=world_size,
        card=card,
        run_tokens=sanity_run_tokens,
    )
    if not sanity_checks.show(checks, out_dir):
        runtime.exit_now("stage 0 failed")
runtime.end_processes()
