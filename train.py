"""
The one training loop: both routes, every stage, one process or many.

    python train.py config/route_a_demo.py                                   one process, CPU or GPU
    torchrun --nproc_per_node=2 train.py config/route_b_demo.py              two, sharing the global batch
    python train.py config/route_a_demo.py --max_iters=50 --out_dir=out/try  any setting below, overridden
    python train.py config/route_a_demo.py                                   once more: goes on from ckpt.pt
    python train.py config/route_a_demo.py --overwrite=True                  begins anew, whatever is there
    python train.py config/route_a_stage0.py                                 stage 0: a table of PASS and FAIL
    python train.py config/route_a_stage1.py --push_to=USER/NAME             publishes each checkpoint

A step is: batches from the loader, forward and backward on each, one optimizer step.
gradient_accumulation_steps counts the batches of a step over all processes, and batch_tokens its tokens, so
the same config sees the same data in the same order and takes the same steps on 1, 2 or 4 processes. A step
draws no random numbers but those that follow from the seed and the data, so a resumed run is the same run:
bit for bit on a CPU, and on a GPU but for the order in which its kernels add.

Writes into out_dir: ckpt.pt, ckpt_prev.pt (the one before it), log.jsonl (one JSON object per logged step),
loss.png (drawn from it), config.json, and, with eval_suites, evals.jsonl. After a step that is skipped
because its loss or gradient is not finite nothing is saved, unless it is the last, or float16 skips it to
find its scale. Ctrl-C or SIGTERM finishes the step, saves and exits; another one, two seconds later, exits
at once. Read next: eval_arc.py, which judges what this makes.
"""

import contextlib
import math
import sys
import time
from collections import Counter

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from smol import checkpoint, loop, runtime
from smol.loader import Ahead

# -----------------------------------------------------------------------------
# The defaults train the 100M Route A on the demo stage. Config files change what they need to.

# ---- where it goes and what it says
out_dir = "out"
# 'auto': go on from out_dir/ckpt.pt, or from scratch where neither out_dir nor push_to has a run. 'resume':
# from there, or from the hub (push_to) where out_dir is empty. 'scratch'. Or the path of a checkpoint to take
# the weights from, also USER/NAME on the hub; the same path again goes on with that run
init_from = "auto"
init_optimizer = False  # with the path of a checkpoint: take its optimizer's state as well
overwrite = False  # begin anew in an out_dir that holds a checkpoint
eval_interval = 500  # steps between validations, each of which also saves a checkpoint
eval_batches = 8  # validation batches per source, at most
eval_only = False  # validate the checkpoint that init_from names, and nothing else
sample_interval = 0  # steps between prints of a text and a puzzle that the model makes; 0 for never
keep_every = 0  # steps between checkpoints that stay, as ckpt_STEP.pt: n * eval_interval, or 0 for none
eval_suites = ""  # suites of eval_arc.py, such as 'sudoku4,arc1', in a process beside the training
eval_limit = 20  # tasks of each of these suites
eval_device = "cpu"  # where that process runs
log_interval = 10  # steps between lines in log.jsonl
max_hours = 0.0  # stop and save after this many hours, a session's limit; 0 for never
push_to = ""  # USER/NAME on the hub: each checkpoint is published there
# publish all that --init_from=resume needs, three times as much as the weights alone. Without, what was
# published of that before is taken away, for it would be of another step than the weights
push_full = False
tracker = ""  # 'trackio' or 'wandb' get the same figures as log.jsonl
# ---- data
data_dir = "data"
data = "demo"  # name of a prepared stage
data_tag: str | None = None  # its frozen version, such as 'v0.1'; None: the stage as it is now
mixture = {}  # {source: share of the batches}; empty: the stage's own
batch_size = 8  # rows of text per batch; puzzles come in batches of as many tokens
block_size = 1024  # longest row
gradient_accumulation_steps = 8  # batches per optimizer step, over all processes
batch_tokens = 0  # tokens per optimizer step, instead of the line above; 0: what that makes
# ---- model (None: the default of the model file's Config)
model = "dense"  # 'dense' is Route A, 'trm' is Route B
n_layer: int | None = None
n_head: int | None = None
n_embd: int | None = None
n_ff: int | None = None
layer_pattern: str | None = None  # tiled over the depth: k is KDA, a is full attention
recompute: bool | None = None  # activations again in the backward: a third more work, far less memory
n_line: int | None = None  # Route B: hidden width of the MLPs along lines, which are m in its layer_pattern
n_latent: int | None = None  # Route B: latent updates per recursion, in puzzles
n_recursion: int | None = None  # Route B: recursions per supervision step
n_grad: int | None = None  # Route B: recursions with gradient, the last ones
n_sup: int | None = None  # Route B: supervision steps per puzzle, at most
halt_exploration: float | None = None  # Route B: share of puzzles that go on whatever the halting head says
carry_turns = 1  # Route B: a puzzle takes a supervision step every so many optimizer steps (LOG.md)
# ---- optimizer
optimizer = "muon"  # for the blocks' matrices, and AdamW for the rest (muon.py); 'adamw' for all
learning_rate = 6e-4
max_iters = 10000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0 for none
ema = 0.0  # decay of the averaged weights that evaluation uses; 0 for none
# ---- schedule
schedule = "wsd"  # warm up, stay, go down in a straight line at the end; 'cosine': warm up, half a cosine
warmup_iters = 100
decay_iters = 2000  # of 'wsd'; 0 stays up to the end: for a stage that another one follows
min_lr = 0.0
# ---- system
device = "auto"  # 'cpu', 'cuda', 'mps', or auto: the GPU where there is one
# 'float32', 'bfloat16', 'float16'; auto: bfloat16 from capability 8.0 on and on CPUs that are fast in it
# (AMX; AMD's from Zen 4 on), float16 on older GPUs, float32 on other CPUs
dtype = "auto"
compile: bool | str = "auto"  # torch.compile the blocks; auto: on a GPU. False where that fails
sync_check_interval = 100  # steps between comparisons of all processes' weights; 0 for none
seed = 1337
# ---- stage 0
sanity = False  # before the steps, overfit one batch; after them, a table of PASS and FAIL
sanity_steps = 100  # steps on that batch
sanity_tokens = 2048  # tokens of that batch
sanity_run_tokens = 0.0  # of the run that this prepares: the table says how many hours it would take here

RANGES = {
    "[1, inf)": "eval_interval eval_batches eval_limit log_interval batch_size block_size max_iters "
    "gradient_accumulation_steps n_layer n_head n_embd n_ff n_line n_latent n_recursion "
    "n_grad n_sup carry_turns sanity_steps sanity_tokens",
    "[0, inf)": "mixture learning_rate weight_decay warmup_iters decay_iters min_lr sync_check_interval "
    "sanity_run_tokens keep_every sample_interval batch_tokens max_hours grad_clip",
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


def main(argv):
    defaults = configurator.settings(globals())
    config, _ = configurator.read(globals(), argv)
    train(config, defaults)


def train(config, defaults, make_distillation=None):
    """
    The run with these settings; those that are not among them are the defaults above. make_distillation: the
    `Distillation` of distill.py, which makes the batches of a step and is called in the model's place.
    """
    globals().update(config)
    began = time.monotonic()
    with runtime.errors_agree():
        loop.check_settings(config)
        if sanity and not overwrite:
            checkpoint.check_is_stage_0(config)
        here, precision = runtime.start(device, dtype)
    on_gpu, world_size = here.startswith("cuda"), runtime.world_size

    # ---- from scratch, from another run's weights, or going on
    named = eval_only and init_from not in ("auto", "resume", "scratch")  # and not what out_dir holds
    start, start_path, resumed = checkpoint.begin(config, anew=overwrite or sanity or named)
    if eval_only and not start:
        runtime.stop("--eval_only=True needs a checkpoint: name one with --init_from or --out_dir")
    name, shape, begin_with = model, config, start and start["weights"]
    if make_distillation:  # the student is as its checkpoint has it
        name, shape = start["model"], start["model_config"]
        shape = shape if recompute is None else {**shape, "recompute": recompute}
        begin_with = begin_with if resumed else start["ema"] or begin_with

    # ---- model, data, optimizer
    torch.manual_seed(seed)
    with runtime.errors_agree():
        net = checkpoint.make_model(name, shape)
        if start:
            checkpoint.load_weights(net, begin_with, start_path)
        net.to(here)
        optimizers = loop.make_optimizers(net, optimizer, weight_decay, learning_rate, (beta1, beta2))
        if resumed or (start and init_optimizer):
            checkpoint.load_optimizers(optimizers, optimizer, start["train"])
        before = start["train"].get("data", {}) if start else {}
        loader, pinned = loop.make_loader(config, net, before.get("sources", []))
        distillation = None
        if make_distillation:
            distillation = make_distillation(net, loader, pinned, here, precision)
        if resumed:
            checkpoint.check_same_data(before, pinned)
            loader.load_state_dict(start["train"]["loader"])
    average = loop.start_average(net, start) if ema or eval_only else None
    autocast, scaler = runtime.mixed_precision(here, precision)
    run = {**loop.NEW_RUN, "began_with": start_path}
    carries = {}  # Route B: (number of the batch, source, length) -> answers and latents of unsolved puzzles
    changed = []
    if resumed:
        carries, changed = checkpoint.restore(start, run, config, scaler)
    if eval_only:
        run["iter"] = start["train"].get("iter", 0)
        runtime.print0(f"validating {start_path}")
        loop.validate(run, net, average, loader, autocast, here, config)
        runtime.end_processes()
        return
    start = begin_with = None  # free their memory

    # ---- ready
    if compile is True or (compile == "auto" and on_gpu and not distillation):  # decoding has ever new shapes
        # for the shapes of all blocks together, of both kinds, with gradients and without: the usual 8 are
        # soon used up, and what comes after is not compiled
        torch._dynamo.config.cache_size_limit = 64
        for block in net.blocks:
            block.compile()
    checks = []
    if sanity:
        frozen = f"tag {data_tag}, snapshot {loader.snapshot[:12]}" if data_tag else "not frozen, no tag"
        checks.append(("data", True, f"{data}: every shard has its SHA-256 and our tokenizer; {frozen}"))
        for mode in ("text", "puzzle"):
            for batch in loader.val_batches(mode, 1):
                checks.append(overfit_one_batch(net, mode, batch, here, precision))
                break
    parallel = distillation or net
    if world_size > 1:
        parallel = DistributedDataParallel(parallel, gradient_as_bucket_view=True)
    interrupted = runtime.catch_signals()
    with runtime.errors_agree():
        ahead = Ahead(loader, pin=on_gpu)
        ahead.steps[0].result()  # what is wrong with the data is said before anything is replaced
        log = loop.Log(config, run, resumed)
    card, per_step = runtime.device_name(here), loader.batches_per_step * batch_size * loader.block_size
    peak = runtime.peak_flops(card)
    runtime.print0(configurator.show(config, defaults))
    runtime.print0(
        f"{net.num_params() / 1e6:.2f}M parameters, {precision} on {world_size} x {card}, {optimizer}, "
        f"{per_step:,} tokens per step, sources {', '.join(loader.names)}"
    )
    begin = f"from the weights of {start_path}" if start_path else "from scratch"
    if resumed:
        begin = f"going on after step {run['iter']} of {start_path}"
        begin += ", its last: raise max_iters to train further" if run["iter"] >= max_iters else ""
    runtime.print0(begin + "".join(f"\n  changed: {c}" for c in changed))
    for source in loader.not_validated(eval_batches):
        runtime.print0(f"not validated: {source} has no held-out rows of at most {loader.block_size} tokens")
    evaluation, publication = loop.Evaluation(config, log), checkpoint.Publication(config)
    since_log = Counter()  # what the steps since the last line in the log sum up to
    logged, saved, due, stopping = [], True, False, False
    net.train()
    if distillation and not resumed:
        loop.validate(run, net, average, loader, autocast, here, config, log)

    # ---- go
    while run["iter"] < max_iters and (due or not stopping):  # a skipped step is not the one to end with
        started = time.perf_counter()
        lr = loop.learning_rate_at(run["iter"], config)
        loop.set_learning_rate(optimizers, lr)

        # forward and backward on every batch of the step
        try:
            batches = ahead.next_step()
        except ValueError as e:  # no puzzle fits into block_size, in any process
            runtime.stop(e)
        weights = [1.0] * len(batches)  # of their losses in the mean
        if distillation:
            with autocast:
                batches, weights = distillation.prepare(batches, run["iter"])
        sums = dict.fromkeys(loader.names, 0.0)  # of losses
        figures, new_carries = {"tokens": 0, "flops": 0.0, "data_wait": ahead.waited}, {}
        for i, (batch, weight) in enumerate(zip(batches, weights)):
            number, *rest = batch.key
            key = (run["iter"] % carry_turns * loader.batches_per_step + number, *rest)
            carry = loop.to_device(carries.get(key), here)
            last = i == len(batches) - 1  # gradients of the processes are averaged once, after the last batch
            idx = batch.idx.to(here, non_blocking=True)  # (B, L)
            targets = batch.targets.to(here, non_blocking=True)
            with contextlib.nullcontext() if last or world_size == 1 else parallel.no_sync():
                with autocast:  # not the backward: float32 products would overflow in float16 (LOG.md)
                    _, loss, carry = parallel(idx, targets, mode=batch.mode, carry=carry)
                loss = loss * weight
                scaler.scale(loss / len(batches)).backward()
            if carry is not None:
                new_carries[key] = loop.to_device(carry, "cpu")
            sums[batch.source] += loss.detach()
            figures["tokens"] += batch.tokens
            figures["flops"] += batch.tokens * net.flops_per_token(idx.shape[1], batch.mode, training=True)
        grad_norm = loop.clip_gradients(net, optimizers, scaler, grad_clip)

        # every process learns the same sums: all of them step or skip, stop, save and validate together
        out_of_time = max_hours and time.monotonic() - began > 3600 * max_hours
        figures |= distillation.seconds if distillation else {}
        own = [bool(interrupted or out_of_time), *figures.values(), *map(float, sums.values())]
        stopping, *everyones = runtime.sums(own, here)
        figures = dict(zip(figures, everyones))
        totals, counts = everyones[len(figures) :], Counter(loader.sources_of_step(run["iter"]))
        loss = sum(totals) / counts.total()
        losses = {name: x / counts[name] for name, x in zip(sums, totals) if counts[name]}
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        loop.optimizer_step(optimizers, scaler, finite)
        if finite:
            carries.update(new_carries)
            if average:
                loop.update_average(average, net, ema, run["iter"])

        # what it was like
        seconds = time.perf_counter() - started
        step = run["iter"] = run["iter"] + 1
        stopping = stopping and step < max_iters  # the last step is the end of the run, whatever else ends it
        run["seconds"] += seconds
        run["tokens"] += int(figures["tokens"])
        run["skipped"] += not finite
        run["skipped_in_a_row"] = 0 if finite else run["skipped_in_a_row"] + 1
        by_source = ", ".join(f"{k} {v:.2f}" for k, v in losses.items())
        since_log.update({**figures, "seconds": seconds, "steps": 1})
        log.progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        log.progress.update()
        if not finite:
            log.skipped(run, lr, f"{loss:.3g} ({by_source})", grad_norm, config)
        elif step % log_interval == 0 or step == max_iters:
            rate = {k: v / since_log["seconds"] for k, v in since_log.items()}  # per second
            shares = {k: rate[k] / world_size for k in ("data_wait", "sampling", "scoring") if k in rate}
            entry = {
                "iter": step,
                "loss": loss,
                "losses": losses,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": run["tokens"],
                "seconds": round(run["seconds"], 3),
                "tokens_per_second": round(rate["tokens"], 1),
                "mfu": round(rate["flops"] / world_size / peak, 4) if peak else None,
                "memory_gb": round(runtime.peak_memory(here) / 1e9, 3),
                **{k: round(v, 4) for k, v in shares.items()},
                "eta_hours": round((max_iters - step) / rate["steps"] / 3600, 3),
                "skipped": run["skipped"],
            }
            log.write(entry)
            logged.append(entry)
            since_log.clear()
            mfu = f"MFU {entry['mfu']:.1%}, " if peak else ""
            waits = ", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in shares.items())
            runtime.print0(
                f"step {step}: loss {loss:.3f} ({by_source}), lr {lr:.2e}, gradient {grad_norm:.2f}, "
                f"{entry['tokens_per_second']:,.0f} tokens/s, {mfu}{entry['memory_gb']:.2f} GB, "
                f"{waits}, {entry['eta_hours']:.2f} h to go"
            )
        if sync_check_interval and (step % sync_check_interval == 0 or step == max_iters):
            loop.check_sync(net, average, loss, grad_norm, step, config)

        if sample_interval and step % sample_interval == 0 and runtime.master:
            loop.show_samples(step // sample_interval, net, average, loader)

        # validate, save, evaluate, publish
        evaluation.collect()
        publication.collect()
        due = due or step % eval_interval == 0 or step == max_iters or bool(stopping)
        # a step that float16 skips to find its scale is no reason not to save; any other skipped step is
        settling = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1
        if due and (finite or settling or step == max_iters):
            loop.check_weights(net, average, step, config)
            if not stopping:
                loop.validate(run, net, average, loader, autocast, here, config, log)
            state = {**run, "data": pinned, "loader": ahead.state}
            saved = checkpoint.save_run(state, config, net, name, average, optimizers, scaler, carries, here)
            due = False
            if saved and not stopping:
                evaluation.start(step)
                publication.start(step)

    # ---- the end
    ahead.close()
    saved, path = saved and not due, checkpoint.path_of(config)
    if saved and not interrupted:
        runtime.release_signals()  # what may take long now, a push and an evaluation, need not be waited for
        publication.end(run["iter"])
    evaluation.end(0 if stopping or interrupted else 600)
    log.close()
    if not saved:
        runtime.stop(f"the last steps, up to {run['iter']}, were not saved; {path} is untouched")
    if stopping:
        runtime.print0(f"stopped after step {run['iter']}, saved to {path}: go on with --init_from=resume")
    if sanity and not stopping and runtime.master:
        checks += check_run(logged, run["val_losses"], path, net, scaler.is_enabled(), card, per_step)
        if not show_checks(checks):
            runtime.exit_now("stage 0 failed")
    runtime.end_processes()
    if interrupted or publication.future:  # Python itself would wait for a push that is under way
        runtime.exit_now(code=0)


# -----------------------------------------------------------------------------
# stage 0: is everything in order for a long run? A check is (what, whether it passed, how it was).


def overfit_one_batch(net, mode, batch, device, precision):
    """
    Overfit the first rows of one validation batch: where model, loss and gradients fit together the loss gets
    near zero. With the run's own optimizer and rate; the weights are put back.
    """
    source, _, idx, targets = batch
    rows = max(1, sanity_tokens // idx.shape[1])
    length = sanity_tokens if mode == "text" else idx.shape[1]  # the answer of a puzzle is at its end
    idx, targets = idx[:rows, :length].to(device), targets[:rows, :length].to(device)
    before = {k: v.detach().clone() for k, v in net.state_dict().items()}
    optimizers = loop.make_optimizers(net, optimizer, 0.0, learning_rate, (beta1, beta2))
    autocast, scaler = runtime.mixed_precision(device, precision)
    quiet = None if runtime.master else True
    for i in tqdm(range(sanity_steps), desc=f"overfit one {mode} batch", leave=False, disable=quiet):
        with autocast:
            loss = net(idx, targets, mode=mode)[1]
        scaler.scale(loss).backward()
        loop.clip_gradients(net, optimizers, scaler, 1.0)
        loop.set_learning_rate(optimizers, learning_rate * min(1, (i + 1) / 10))
        loop.optimizer_step(optimizers, scaler, True)
    net.load_state_dict(before)
    how = f"{tuple(idx.shape)} of {source}, loss {loss.item():.3f} after {sanity_steps} steps"
    return f"overfit one {mode} batch", loss.item() < 0.1, how


def check_run(logged, val_losses, ckpt_path, net, scaled, card, per_step):
    """After the last step. logged: lines of log.jsonl. scaled: float16, which may skip some steps."""
    if not logged:
        return [("steps", False, "none that was logged had a finite loss and gradient")]
    first, last, settled = logged[0], logged[-1], logged[1:] or logged  # the first interval warms up
    rate = sum(e["tokens_per_second"] for e in settled) / len(settled)
    wait = sum(e["data_wait"] for e in settled) / len(settled)
    written = checkpoint.load(ckpt_path)["weights"]
    intact = all(torch.equal(written[k], v.cpu()) for k, v in net.state_dict().items())
    validated = bool(val_losses) and all(map(math.isfinite, val_losses.values()))
    shown = ", ".join(f"{k} {v:.2f}" for k, v in val_losses.items()) or "of nothing"
    few = last["skipped"] <= (last["iter"] // 2 if scaled else 0)
    steps = f"{last['skipped']} skipped, loss {first['loss']:.3f} to {last['loss']:.3f}"
    same = "the same bits" if runtime.world_size == 1 or sync_check_interval else "not compared"
    checks = [
        (f"{last['iter']} steps", few, steps),
        ("validation", validated, shown),
        ("checkpoint", intact, "reads back bit for bit"),
        ("processes in sync", True, f"{runtime.world_size}, {same}"),
        ("waiting for data", wait < 0.02, f"{wait:.2%} of the time"),
        ("speed", rate > 0, f"{rate:,.0f} tokens/s, MFU {last['mfu'] or 0:.1%} on {card}"),
        ("memory", True, f"{last['memory_gb']:.2f} GB at most, of process 0"),
    ]
    if sanity_run_tokens:
        without_padding = last["tokens"] / last["iter"] / per_step  # as the log counts, and no plan does
        hours = sanity_run_tokens * without_padding / rate / 3600
        how = f"{sanity_run_tokens / 1e9:g}B tokens: {hours:,.1f} h here"
        checks.append(("the run it prepares", True, how))
    return checks


def show_checks(checks):
    """Print the table. Returns whether all is well."""
    well = all(passed for _, passed, _ in checks)
    print(f"\n{'PASS' if well else 'FAIL'}   stage 0 of {out_dir}")
    for what, passed, how in checks:
        print(f"  {'PASS' if passed else 'FAIL'}   {what:26s}   {how}")
    return well


if __name__ == "__main__":
    main(sys.argv[1:])
