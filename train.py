"""
How ELF is trained. The settings below are the published recipe: ELF-B on OpenWebText.

    python train.py config/numbers.py                                  # a CPU, minutes
    python train.py config/gpu_debug.py                                # one small GPU, minutes
    torchrun --nproc_per_node=8 train.py config/owt_elf_b.py           # one node of 8 GPUs
"""
from configurator import UserError, configure       # before torch: see there

import copy
import math
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from eval import describe_val, estimate_loss, mean_over_ranks, plot_losses, write_few
from model import ELF, SIZES, ELFConfig, TextEncoder, compute_loss, draw, encode_rows
from parts import checkpoint as on_disk
from parts.data import check_bins, check_fit, get_rows, open_bins, row_seed, rows_at
from parts.device import (DTYPES, autocast, compile_in_place, gather, note_signals, print0,
                          rank_and_world, should_stop, start)
from parts.distill import distill_loss, draw_student, load_teacher
from parts.muon import make_optimizer
from sample import GRIDS, SAMPLERS

# -------------------------------------------------------------------------------------------------
# input, output
out_dir = 'out'             # ckpt.pt, metrics.jsonl, samples and loss.png go here
init_from = 'scratch'       # 'scratch', 'resume' (out_dir's checkpoint), weights: a path or hub id;
                            # 'auto', 'auto:weights': resume if there is one, else start from these
overwrite = False           # start anew where out_dir has a checkpoint; that moves to old_1 in it
log_interval = 10           # iterations between log lines
eval_interval = 1000        # iterations between validations
eval_iters = 20             # batches of a validation, all ranks; a multiple of 5, the bins of t
save_interval = 1000        # iterations between checkpoints
keep_interval = 0           # iterations between those that stay, as ckpt_<iter>.pt, 0 = none
sample_interval = 5000      # iterations between a few sampled texts, 0 = never
wandb_log = False           # also log to Weights & Biases
wandb_project = 'elf'
# data
data_dir = 'data'
dataset = 'openwebtext'     # folder of bins under data_dir, see prepare.py
encoder = ''                # text encoder and tokenizer the bins must have been made for, '' = any
tokenizer = ''
max_length = 1024           # positions per row; shorter rows are padded
max_input_length = 0        # condition tokens kept, 0 = unconditional
pad_token = 'pad'           # pad with 'pad' (in no loss) or 'eos' (in both: it learns to end)
batch_size = 64             # rows per rank and micro-batch
gradient_accumulation_steps = 8     # micro-batches of a step, all ranks; 64 * 8 = 512 rows
# network
n_layer = 12
n_embd = 768
n_head = 12
bottleneck = 128            # latents enter the network through this width
n_time = 4                  # prefix tokens for t, for w, for the mode
n_scale = 4
n_mode = 4
# objective, denoise branch
t_mean = -1.5               # of the logit-normal for t; lower spends more time near noise
t_std = 0.8
t_eps = 0.05                # floor of 1 - t where it divides
noise_scale = 0.0           # of the noise at t=0; 0.0 = 2 * sqrt(C / 512), 2.0 for T5-small
self_cond_prob = 0.5        # share of denoise rows that see their own first guess
w_min = 0.5                 # guidance strengths trained on; 1 + w is log-uniform
w_max = 5.0
# objective, decode branch
decoder_prob = 0.2          # share of rows trained on tokens (ce), the others on latents (l2)
decoder_mean = 0.8          # of the logit-normal share of x0 at each position
decoder_std = 0.8
decoder_noise_scale = 0.0   # 0.0 = 5 * sqrt(C / 512); 1.0 for the published conditional tasks
drop_cond_prob = 0.0        # share of rows that lose their condition, for CFG; 0.1 there
# distillation (distill.py): a student that starts from weights writes in few steps
teacher = ''                # frozen, a path or hub id; '' = none
distill_steps = 0           # the student's steps of a text
distill_substeps = 0        # the teacher's steps in one of the student's
# optimization
optimizer = 'muon'          # 'muon' (Nesterov Adam for what is not a matrix) or 'adamw' (0.9, 0.95)
ns_dtype = 'float32'        # of Muon's Newton-Schulz; 'bfloat16' is faster on GPUs and less exact
learning_rate = 0.0         # peak, of all parameters; 0.0 = 0.001 * rows per step / 256
lr_schedule = 'constant'    # after the warm-up: 'constant' or 'cosine', down to 0 at max_iters
weight_decay = 0.0          # of adamw
grad_clip = 1.0             # largest gradient norm, 0.0 = off
max_iters = 95085           # optimizer steps: 5 epochs of 19,017
warmup_iters = 9508         # half an epoch
max_epochs = 0.0            # when set, these two override the iterations above
warmup_epochs = 0.0
max_minutes = 0.0           # save and stop after so long, 0 = never; so do SIGTERM and Ctrl-C
ema_decay = 0.9999          # of the averaged weights that sampling uses
ema_warmup = False          # average over fewer steps at first, min(ema_decay, (1+i)/(10+i))
# sampling defaults that the checkpoint will carry
sampler = 'sde'
steps = 32
gamma = 1.5
w = 3.0
cfg = 1.0
grid = 'logit_normal'       # 'quantile' and 'uniform' are not by chance
# system
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # 'float32' or 'bfloat16' autocast, 'auto' = bfloat16 where it is fast
compile = True              # torch.compile the network
gradient_checkpointing = False      # a third more work, far less memory; ELF-L on smaller GPUs
seed = 42                   # of initial weights, row order and all draws

# -------------------------------------------------------------------------------------------------

# configure() sees to these; other numbers start at 1 if they are whole, else at 0
CHOICES = dict(optimizer=('muon', 'adamw'), lr_schedule=('constant', 'cosine'), grid=GRIDS,
               ns_dtype=('float32', 'bfloat16'), pad_token=('pad', 'eos'), sampler=SAMPLERS,
               dtype=DTYPES)
MAY_BE_0 = ('sample_interval', 'warmup_iters', 'seed')
AT_MOST_1 = ('t_eps', 'self_cond_prob', 'decoder_prob', 'drop_cond_prob', 'ema_decay')
ABOVE_0 = ('t_eps', 'w_min')
MAY_BE_NEGATIVE = ('t_mean', 'decoder_mean')
# and what each of these needs to be read at all
READ_WITH = dict(
    distill_steps='teacher', distill_substeps='teacher', cfg='max_input_length',
    drop_cond_prob='max_input_length', ns_dtype='optimizer=muon', weight_decay='optimizer=adamw',
    wandb_project='wandb_log')


def check(world):
    """UserError for settings that make no sense together."""
    if n_embd % (2 * n_head):
        raise UserError(f"n_embd={n_embd} does not split into n_head={n_head} heads of even width")
    if gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} does not "
                        f"divide over {world} ranks; give a multiple of {world}")


def get_lr(i):
    """Learning rate of iteration i, from 0: linear warm-up from 0, then constant or cosine."""
    if i < warmup_iters:
        return learning_rate * i / warmup_iters
    if lr_schedule == 'constant':
        return learning_rate
    done = (i - warmup_iters) / (max_iters - warmup_iters)
    return 0.5 * (1 + math.cos(math.pi * done)) * learning_rate


if __name__ == '__main__':
    config = configure(globals())
    started = time.monotonic()
    rank, world = rank_and_world()
    check(world)
    device, bf16, about = start(device, dtype)
    master = rank == 0
    ctx = autocast(device, bf16)

    # ---- data, and what follows from it ---------------------------------------------------------
    meta = open_bins(data_dir, dataset)
    check_bins(meta, config)
    micro_steps = gradient_accumulation_steps // world
    rows_per_step = batch_size * gradient_accumulation_steps
    n_rows = meta['rows']['train']
    epoch = n_rows // rows_per_step or 1
    max_iters = max(1, int(max_epochs * epoch)) if max_epochs else max_iters
    warmup_iters = int(warmup_epochs * epoch) if warmup_epochs else warmup_iters
    learning_rate = learning_rate or 0.001 * rows_per_step / 256
    width = math.sqrt(meta['latent_dim'] / 512)
    # what a checkpoint keeps and a resume compares: the settings, what ran them, the bins
    config |= dict(max_iters=max_iters, warmup_iters=warmup_iters, learning_rate=learning_rate,
                   noise_scale=noise_scale or 2 * width,
                   decoder_noise_scale=decoder_noise_scale or 5 * width,
                   ranks=world, device=device.type, bf16=bf16, bins=on_disk.fingerprint(meta))

    # ---- where to start: the first rank decides, all must find the same -------------------------
    if master:
        init_from = on_disk.where_to_start(init_from, out_dir, overwrite)
    init_from = gather(init_from)[0]
    resumed, ckpt, notes = '', {}, []       # the path of a checkpoint, what is in it, what changed
    if init_from == 'resume':
        resumed, ckpt = on_disk.newest_checkpoint(out_dir)
        for name in ('noise_scale', 'decoder_noise_scale'):     # as it was, where none is given
            config[name] = globals()[name] or ckpt['config'][name]
        notes = on_disk.check_resume(resumed, ckpt, config)
    elif init_from != 'scratch':
        model = ELF.from_pretrained(init_from)
        check_fit(meta, model.config, init_from)
        ckpt = dict(model_args=asdict(model.config), model=model.state_dict())
    iter_num = ckpt.get('iter_num', 0)
    seen = gather((config['bins'], iter_num))
    if any(x != seen[0] for x in seen):
        raise UserError(f"the ranks see different bins or checkpoints: {meta['dir']} and {out_dir} "
                        "must be folders that they share, the bins perhaps copies of one")

    # ---- model, average, optimizer --------------------------------------------------------------
    torch.manual_seed(seed)
    settings = meta | config | dict(encoder=meta['encoder'], tokenizer=meta['tokenizer'])
    # the sizes are those of the weights, if there are any
    settings |= {name: x for name, x in ckpt.get('model_args', {}).items() if name in SIZES}
    c = ELFConfig(**{f.name: settings[f.name] for f in fields(ELFConfig) if f.name in settings})
    raw_model = ELF(c)
    if ckpt:
        raw_model.load_state_dict(ckpt['model'])
    raw_model.to(device).gradient_checkpointing = gradient_checkpointing
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    params = list(raw_model.parameters())
    if optimizer == 'muon':
        opt = make_optimizer(raw_model.named_parameters(), learning_rate, getattr(torch, ns_dtype))
    else:
        opt = torch.optim.AdamW(params, learning_rate, betas=(0.9, 0.95),
                                weight_decay=weight_decay)
    if resumed:
        ema.load_state_dict(ckpt['ema'])
        opt.load_state_dict(ckpt['optimizer'])
    model = ckpt = None         # their memory
    text_encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
    objective, draw_step, networks = compute_loss, draw, [raw_model, text_encoder]
    if teacher:
        networks.append(load_teacher(config, meta, init_from).to(device))
        objective = partial(distill_loss, networks[-1], distill_steps)
        draw_step = partial(draw_student, distill_substeps)
    compiled = compile and compile_in_place(*networks, device=device)
    net = raw_model
    if world > 1:
        # no buffers to broadcast: a rank whose rows need no first guess skips that pass alone
        net = DistributedDataParallel(raw_model, forward_sync_buffers=False,
                                      gradient_as_bucket_view=True)

    # ---- say what was decided, begin to write ---------------------------------------------------
    print0(f"device: {about}, ranks: {world}, compile {'on' if compiled else 'off'}")
    n_params = sum(p.numel() for p in params)
    print0(f"model: {c.n_layer} layers of {c.n_embd}, {n_params:,} parameters")
    print0(f"data: {meta['dir']}, {n_rows:,} rows; encoder {c.encoder}, {c.latent_dim} wide")
    print0(f"step: {rows_per_step} rows, {rows_per_step * max_length:,} tokens; {max_iters} "
           f"iterations = {max_iters * rows_per_step / n_rows:.2f} epochs, {warmup_iters} of "
           f"warm-up, peak lr {learning_rate:.2e}")
    begin = f'resumed {resumed} at iteration {iter_num}' if resumed else init_from
    print0(f"start: {begin}", *notes, sep='\n  ')
    held, log, model_args = on_disk.begin_run(out_dir, resumed, config, c)

    def next_batch(iter_num, micro_step):
        """Rows and draws, by a micro-batch's number alone: the same resumed, or on more ranks."""
        number = iter_num * gradient_accumulation_steps + micro_step * world + rank
        rows = rows_at(n_rows, seed, number * batch_size, batch_size)
        batch = get_rows(meta, 'train', rows, c)
        if device.type == 'cuda':
            batch = [a.pin_memory() for a in batch]
        generator = torch.Generator().manual_seed(row_seed(seed, number))
        return batch, draw_step(c, batch_size, max_length, generator, device)

    def validate():
        with ctx:
            val = estimate_loss(raw_model, text_encoder, meta, eval_iters, batch_size, device,
                                objective, draw_step)
        print0(f"iter {iter_num}: {describe_val(val)}", flush=True)
        log(iter=iter_num, **{'val_' + k: v for k, v in val.items()})

    def save(keep_as=''):
        if master:
            on_disk.save_checkpoint(out_dir, dict(
                config=config, model_args=model_args, model=raw_model.state_dict(),
                ema=ema.state_dict(), optimizer=opt.state_dict(), iter_num=iter_num,
                rows_seen=iter_num * rows_per_step), keep_as)

    def due(interval):
        return interval and (iter_num % interval == 0 or iter_num == max_iters)

    # ---- the loop -------------------------------------------------------------------------------
    stopped, bad_steps, step_seconds = '', 0, []
    note_signals()
    if not resumed:
        validate()
    loader = ThreadPoolExecutor(1)
    batch = loader.submit(next_batch, iter_num, 0)
    while iter_num < max_iters and not (stopped := should_stop(started, max_minutes)):
        t0 = time.perf_counter()
        lr = get_lr(iter_num)
        for group in opt.param_groups:
            group['lr'] = lr

        # forward and backward, micro-batch by micro-batch
        losses = []
        for micro_step in range(micro_steps):
            if world > 1:       # before the forward pass, or it reduces in each micro-step
                net.require_backward_grad_sync = micro_step == micro_steps - 1
            rows, draws = batch.result()
            with ctx:
                x0, ids, loss_mask, cond = encode_rows(text_encoder, rows, draws, c, device)
                loss, parts = objective(net, x0, ids, loss_mask, cond, draws)
            batch = loader.submit(next_batch, iter_num, micro_step + 1)     # meanwhile
            (loss / micro_steps).backward()
            losses.append(dict(loss=loss.detach(), **parts))

        # the update; .item() waits for the GPU: what is not finite must touch nothing
        grad_norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
        if math.isfinite(grad_norm):
            bad_steps = 0
            opt.step()
            decay = min(ema_decay, (1 + iter_num) / (10 + iter_num)) if ema_warmup else ema_decay
            with torch.no_grad():       # else the average keeps the autograd history of every step
                torch._foreach_lerp_(list(ema.parameters()), params, 1 - decay)
        else:
            bad_steps += 1
            print0(f"iter {iter_num + 1}: SKIPPED, the gradient norm is {grad_norm}; "
                   f"{bad_steps} in a row", flush=True)
            log(iter=iter_num + 1, bad_steps=bad_steps, lr=lr)
            if bad_steps == 10:
                raise UserError("10 steps in a row without a finite gradient; start from the last "
                                f"weights with --init_from={out_dir}, another --out_dir and a "
                                "lower --learning_rate")
        opt.zero_grad(set_to_none=True)
        iter_num += 1
        step_seconds.append(time.perf_counter() - t0)

        # report, validate, save, sample
        if due(log_interval):
            x = mean_over_ranks(losses)         # reads the losses, which waits for the GPU
            means = ', '.join(f"{name} {mean:.4f}" for name, mean in x.items())
            seconds = sum(step_seconds) / len(step_seconds)
            speed = rows_per_step * max_length / seconds
            left = seconds * (max_iters - iter_num) / 60
            print0(f"iter {iter_num}: {means} | grad {grad_norm:.2f} | "
                   f"lr {lr:.2e} | {seconds * 1e3:.0f} ms | {speed:,.0f} tok/s | "
                   f"{left:.0f} min left", flush=True)
            log(iter=iter_num, **x, grad_norm=grad_norm, lr=lr, ms=seconds * 1e3,
                tokens_per_s=speed)
            step_seconds.clear()
        if due(eval_interval):
            validate()
        if due(keep_interval):
            save(f'ckpt_{iter_num}.pt')
        elif due(save_interval):
            save()
        if due(sample_interval):
            with ctx:
                write_few(ema, text_encoder, meta, f'{out_dir}/samples_{iter_num}.jsonl', seed)

    # ---- the end --------------------------------------------------------------------------------
    loader.shutdown()
    if stopped:
        save()
        print0(f"stopped at iteration {iter_num} ({stopped}), saved in {out_dir}; "
               "go on with --init_from=resume")
    else:
        given = ' --input="..."' if max_input_length else ''
        print0(f"done: {out_dir}/ckpt.pt, metrics.jsonl, loss.png; "
               f"next: python sample.py --out_dir={shlex.quote(out_dir)}{given} --trace=8")
    if master:
        plot_losses(out_dir)
        held.release()
    if world > 1:
        dist.destroy_process_group()
    if hasattr(signal, stopped):
        sys.exit(128 + getattr(signal, stopped))        # as shells have it
