"""
How ELF is trained. The settings below are the published recipe: ELF-B on OpenWebText.

    python train.py config/demo.py                                     # a CPU, minutes
    python train.py config/gpu_debug.py                                # one small GPU, minutes
    torchrun --nproc_per_node=8 train.py config/owt_elf_b.py           # one node of 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --nproc_per_node=8 train.py config/owt_elf_b.py   # two
"""
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError, configure
from model import ELF, MODELS, ELFConfig, TextEncoder, compute_loss, draw, estimate_flops, load_checkpoint
from prepare import sha256
from sample import compile_in_place, load_tokenizer, make_out_dir, pick_device, printable, read_inputs, resolve_sampling, row_seed, sample_texts, write_texts

# ---------------------------------------------------------------------------------------------------------------------
# input, output
out_dir = 'out'             # ckpt.pt, metrics.jsonl, samples and loss.png go here
init_from = 'scratch'       # 'scratch', 'resume' (out_dir's checkpoint), 'auto' (resume if there is one), or weights: a path or hub id
overwrite = False           # allow 'scratch' where out_dir has a checkpoint already
log_interval = 10           # iterations between log lines
eval_interval = 1000        # iterations between validations
eval_iters = 20             # batches of a validation, over all ranks; a multiple of 5, one for each bin of t
save_interval = 1000        # iterations between checkpoints
keep_interval = 0           # iterations between checkpoints that stay, as ckpt_<iter>.pt; a multiple of save_interval, 0 = none
sample_interval = 5000      # iterations between a few sampled texts, 0 = never
wandb_log = False           # also log to Weights & Biases
wandb_project = 'elf'
# data
data_dir = 'data'
verify_data = False         # read the bins once and compare their checksums
dataset = 'openwebtext'     # folder of bins under data_dir, see prepare.py
encoder = ''                # text encoder and tokenizer the bins must have been made for, '' = any
tokenizer = ''
max_length = 1024           # positions per row; shorter rows are filled
max_input_length = 0        # condition tokens kept, 0 = unconditional
pad_token = 'pad'           # fill with 'pad' (in no loss) or 'eos' (in both, so that the model learns to end)
batch_size = 64             # rows per rank and micro-batch
gradient_accumulation_steps = 8     # micro-batches per optimizer step over all ranks; 64 * 8 = 512 rows per step
# network: a row of MODELS; -1 = as in that row
size = 'ELF-B'
n_layer = -1
n_embd = -1
n_head = -1
bottleneck = 128            # latents enter the network through this width
n_time = 4                  # prefix tokens for t, for w, for the mode
n_scale = 4
n_mode = 4
# objective, denoise branch
t_mean = -1.5               # of the logit-normal for t; lower spends more time near noise
t_std = 0.8
t_eps = 0.05                # floor of 1 - t where it divides
noise_scale = 2.0           # belongs to 512-wide latents; 2 * sqrt(C / 512) for others, or tokens drown in noise
self_cond_prob = 0.5        # share of denoise rows that see their own first guess
w_min = 0.5                 # guidance strengths trained on; 1 + w is log-uniform
w_max = 5.0
# objective, decode branch
decoder_prob = 0.2          # share of rows trained on tokens (ce), the others on latents (l2)
decoder_mean = 0.8          # of the logit-normal share of x0 at each position
decoder_std = 0.8
decoder_noise_scale = 5.0   # 1.0 for the conditional tasks
drop_cond_prob = 0.0        # share of rows that lose their condition, for CFG; 0.1 for the conditional tasks
# optimization
optimizer = 'muon'          # 'muon' (Nesterov Adam for what is not a matrix) or 'adamw' (betas 0.9, 0.95)
ns_dtype = 'float32'        # of Muon's Newton-Schulz; 'bfloat16' is faster on GPUs and less exact
learning_rate = 0.0         # peak, of all parameters; 0.0 = 0.001 * rows per step / 256
lr_schedule = 'constant'    # after the warm-up: 'constant' or 'cosine' down to min_lr at max_iters
min_lr = 0.0
weight_decay = 0.0          # of adamw
grad_clip = 1.0             # largest gradient norm, 0.0 = off
max_iters = 95085           # optimizer steps: 5 epochs of 19,017
warmup_iters = 9508         # half an epoch
max_minutes = 0.0           # save and stop after so long, 0 = never; so do SIGTERM and Ctrl-C
max_bad_steps = 10          # in a row with a gradient that is not finite; each is skipped
max_epochs = 0.0            # when set, these two override the iterations above
warmup_epochs = 0.0
ema_decay = 0.9999          # of the averaged weights that sampling uses
ema_warmup = False          # average over fewer steps at first, min(ema_decay, (1+i)/(10+i)); for short runs
# sampling defaults that the checkpoint will carry; -1 = as in the row of MODELS
sampler = 'sde'
steps = -1
gamma = -1.0
w = 3.0
cfg = 1.0
# system
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # 'float32' or 'bfloat16' autocast, 'auto' = bfloat16 where the hardware is fast at it
compile = True              # torch.compile the network
recompute = False           # activations in the backward pass: a third more work, far less memory; for ELF-L on smaller GPUs
seed = 42                   # of initial weights, row order and all draws
# ---------------------------------------------------------------------------------------------------------------------

# ---- data: memory-mapped bins -------------------------------------------------------------------------------------
def open_bins(data_dir, dataset, verify=False):
    """meta.json of a prepared dataset -> dict, with its folder as 'dir' and tokenizer and encoder as loadable names; sizes and offsets
    are checked against it, with verify the checksums too. UserError if anything does not fit."""
    folder, old = os.path.join(data_dir, dataset), os.path.join(data_dir, f'.{dataset}.old')
    if os.path.isdir(old) and not os.path.exists(folder):
        os.replace(old, folder)     # prepare.py was killed between its two renames
    for name in ('meta.json', 'train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy'):
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"{os.path.join(folder, name)} not found; run: python prepare.py --dataset={dataset}, or the command at the top of its config file")
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        meta['dir'] = folder
        for part in ('tokenizer', 'encoder'):       # trained or seeded ones lie beside the bins
            if os.path.isdir(os.path.join(folder, meta[part])):
                meta[part] = os.path.join(folder, meta[part])
        right = meta['dtype'] in ('uint16', 'uint32') and all(0 <= meta[k] < meta['vocab_size'] for k in ('pad_id', 'eos_id')) and meta['latent_dim'] >= 1 <= meta['max_length']
        if not right or not 0 < meta['latent_std'] < math.inf or not math.isfinite(meta['latent_mean']):
            raise ValueError("dtype, ids, sizes or latents")
        for split in ('train', 'val'):
            tokens, have = meta['tokens'][split], os.path.getsize(os.path.join(folder, f'{split}.bin'))
            if have != tokens * np.dtype(meta['dtype']).itemsize:
                raise UserError(f"{folder}/{split}.bin has {have} bytes, meta.json speaks of {tokens} {meta['dtype']} tokens; prepare it again")
            index = np.load(os.path.join(folder, f'{split}.idx.npy'), mmap_mode='r')
            if index.shape != (meta['rows'][split], 2) or index.dtype != np.int64 or not len(index):
                raise UserError(f"{folder}/{split}.idx.npy holds {index.shape} {index.dtype}, meta.json speaks of {meta['rows'][split]} rows; prepare it again")
            flat = np.append(index.reshape(-1), tokens)
            if flat[0] != 0 or (flat[1:] < flat[:-1]).any():
                raise UserError(f"{folder}/{split}.idx.npy has offsets that do not rise from 0 to {tokens}; prepare it again")
            for name in (f'{split}.bin', f'{split}.idx.npy') if verify else ():
                if sha256(os.path.join(folder, name)) != meta['checksums'][name]:
                    raise UserError(f"{folder}/{name} is not what prepare.py wrote (checksum); prepare it again")
    except UserError:
        raise
    except Exception as e:      # a damaged file can raise nearly anything
        raise UserError(f"{folder} is damaged ({type(e).__name__}: {' '.join(str(e).split())[:200]}); prepare the dataset again") from None
    return meta


def get_rows(meta, split, rows, max_length, max_input_length=0, pad_token='pad'):
    """
    Rows of a split by number -> ids (B, T) int64, valid (B, T) no fill, cond (B, T) the condition, on the CPU.
    Condition then target; the condition cut to max_input_length, the row to max_length, filled up with pad or EOS.
    """
    # mapped anew each time: a map kept open would count every page ever read as resident memory
    data = np.memmap(os.path.join(meta['dir'], f'{split}.bin'), dtype=meta['dtype'], mode='r')
    index = np.load(os.path.join(meta['dir'], f'{split}.idx.npy'), mmap_mode='r')
    ids = np.full((len(rows), max_length), meta['eos_id'] if pad_token == 'eos' else meta['pad_id'], dtype=np.int64)
    lengths, cond_lengths = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for i, r in enumerate(rows):
        start, target = index[r]
        end = index[r + 1, 0] if r + 1 < len(index) else len(data)
        row = data[start:end] if start == target else np.concatenate((data[start:target][:max_input_length], data[target:end]))
        cond_lengths[i], lengths[i] = min(target - start, max_input_length), min(len(row), max_length)
        ids[i, :lengths[i]] = row[:max_length]
    if ids.max() >= meta['vocab_size']:
        raise UserError(f"{meta['dir']}/{split}.bin has token id {ids.max()}, the vocabulary ends at {meta['vocab_size'] - 1}; prepare it again")
    position = np.arange(max_length)
    return (torch.from_numpy(a) for a in (ids, position < lengths[:, None], position < cond_lengths[:, None]))


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def rows_at(n, seed, first, count):
    """Numbers first ... first+count-1 of an endless stream of shuffled epochs of n rows: where a run stands is one number."""
    return np.array([epoch_order(n, seed, i // n)[i % n] for i in range(first, first + count)])

# ---- optimizer ------------------------------------------------------------------------------------------------------
def orthogonalize(x, dtype):
    """
    Newton-Schulz, x <- (3.4445 I - 4.7750 A + 2.0315 A^2) x with A = x x^T, five times: matrices (k, m, n) -> roughly the
    nearest ones with singular values 1. [optax.contrib.muon] The factors commute with A, so that a few turns can run on
    square matrices of the short side alone before the long one is touched again: less work, the same precision.
    """
    x, (m, n), scale = x.to(dtype), x.shape[-2:], None
    # five in a row would lose the small singular values; nearly square ones have nothing to gain
    for turns in (1,) * 5 if max(m, n) < 1.5 * min(m, n) else (3, 2):
        A, first = x @ x.mT if m < n else x.mT @ x, scale is None
        if first:       # brings x to norm 1, whose square is this trace
            scale = 1 / (torch.einsum('kii->k', A.float()).sqrt() + 1e-8)[:, None, None]
            A = A * scale.square().to(dtype)
        for i in range(turns):
            p = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)          # this turn's factor is 3.4445 I + p
            q = torch.baddbmm(q, p, q, beta=3.4445) if i else p + 3.4445 * torch.eye(min(m, n), dtype=dtype, device=x.device)
            if i < turns - 1:
                A = torch.baddbmm(A, p, A, beta=3.4445)
                A = torch.baddbmm(A, p, A, beta=3.4445)
        q = q * scale.to(dtype) if first else q
        x = q @ x if m < n else x @ q
    return x


class Muon(torch.optim.Optimizer):
    """
    Muon on matrices, Nesterov Adam on the rest, as optax.contrib.muon has them; ranks share the orthogonalisation.
    torch.optim.Muon is not exact enough: no bias correction, bfloat16 only.
    """
    def __init__(self, params, lr, ns_dtype):
        self.ns_dtype = ns_dtype
        groups = [dict(name='muon', params=[p for p in params if p.ndim == 2]), dict(name='adam', params=[p for p in params if p.ndim != 2])]
        super().__init__([g for g in groups if g['params']], dict(lr=lr, step=0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group['step'] += 1
            params, lr, k = group['params'], group['lr'], group['step']
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            for p in params:
                if p not in self.state:
                    self.state[p] = {name: torch.zeros_like(p) for name in (('average',) if group['name'] == 'muon' else ('average', 'square'))}
            beta, average = 0.95 if group['name'] == 'muon' else 0.9, [self.state[p]['average'] for p in params]
            torch._foreach_lerp_(average, grads, 1 - beta)
            # the average gradient, one Nesterov step ahead, bias-corrected
            ahead = lambda i: torch.add(average[i] * (beta / (1 - beta ** (k + 1))), grads[i], alpha=(1 - beta) / (1 - beta ** k))
            if group['name'] == 'muon':
                for p, u in zip(params, self.orthogonal(params, ahead)):
                    p.add_(u, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
                continue
            square = [self.state[p]['square'] for p in params]
            torch._foreach_mul_(square, 0.999)
            torch._foreach_addcmul_(square, grads, grads, value=0.001)
            scale = torch._foreach_div(square, 1 - 0.999 ** k)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, 1e-8)
            torch._foreach_addcdiv_(params, [ahead(i) for i in range(len(params))], scale, value=-lr)

    def orthogonal(self, params, update):
        """update(i) of all matrices, orthogonalised: dealt to the ranks by their work, equal shapes as one batch, one gather -> list."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        load, shares = [0] * world, [[] for _ in range(world)]
        work = lambda i: min(params[i].shape) * params[i].numel()
        for i in sorted(range(len(params)), key=work, reverse=True):
            owner = load.index(min(load))
            shares[owner].append(i)
            load[owner] += work(i)
        shapes, done = {}, [None] * len(params)
        for i in shares[rank]:
            shapes.setdefault(params[i].shape, []).append(i)
        for shape, batch in shapes.items():
            x = params[batch[0]].new_empty(len(batch), *shape, dtype=self.ns_dtype)
            for j, i in enumerate(batch):
                x[j] = update(i)
            for i, u in zip(batch, orthogonalize(x, self.ns_dtype)):
                done[i] = u
        if world > 1:
            sizes = [[params[i].numel() for i in share] for share in shares]
            length = max(map(sum, sizes))
            mine = torch.cat([done[i].flatten() for i in shares[rank]] + [params[0].new_empty(length - sum(sizes[rank]), dtype=self.ns_dtype)])
            parts = mine.new_empty(world * length)
            dist.all_gather_into_tensor(parts, mine)
            for share, size, part in zip(shares, sizes, parts.chunk(world)):
                for i, u in zip(share, part[:sum(size)].split(size)):
                    done[i] = u.view_as(params[i])
        return done


def make_optimizer(named_parameters, lr, ns_dtype=torch.float32):
    """Muon on the 2-D tensors, which are (out, in), Nesterov Adam on the others; one learning rate."""
    return Muon([p for _, p in named_parameters if p.requires_grad], lr, ns_dtype)


def lr_at(i, config):
    """Learning rate of iteration i, counted from 0: linear warm-up from 0, then constant or cosine."""
    if i < config['warmup_iters']:
        return config['learning_rate'] * i / config['warmup_iters']
    if config['lr_schedule'] == 'constant':
        return config['learning_rate']
    done = (i - config['warmup_iters']) / max(1, config['max_iters'] - config['warmup_iters'])
    return config['min_lr'] + 0.5 * (1 + math.cos(math.pi * min(1, done))) * (config['learning_rate'] - config['min_lr'])

# ---- validation -----------------------------------------------------------------------------------------------------
T_BINS = 5      # of equal probability under the training distribution of t

def t_edges(c):
    """Edges of the bins of t -> list of T_BINS + 1 numbers from 0 to 1."""
    return torch.sigmoid(c.t_mean + c.t_std * torch.special.ndtri(torch.linspace(0, 1, T_BINS + 1, dtype=torch.float64))).tolist()


@torch.no_grad()
def estimate_loss(net, encoder, meta, eval_iters, batch_size, device, rank=0, world=1):
    """
    Validation loss on fixed rows with fixed draws -> {'loss', 'l2', 'ce', 'l2_bins'}, numbers, the same on every rank
    and for every number of ranks. Batch k has its t in bin k % T_BINS, so that the bins come for free and l2, their
    mean, is the training loss with less variance.
    """
    c = net.config
    batches = math.ceil(eval_iters / T_BINS) * T_BINS
    sums = torch.zeros(T_BINS + 1, 2, dtype=torch.float64)       # sum and count of l2 by bin, then of ce
    for k in range(rank, batches, world):
        rows = np.arange(k * batch_size, (k + 1) * batch_size) % meta['rows']['val']
        generator = torch.Generator().manual_seed(k)
        d = draw(c, batch_size, c.max_length, generator, device)
        quantile = (k % T_BINS + torch.rand(batch_size, generator=generator, dtype=torch.float64)) / T_BINS
        d.t = torch.sigmoid(c.t_mean + c.t_std * torch.special.ndtri(quantile)).float().to(device)
        _, parts = compute_loss(net, *encode(encoder, get_rows(meta, 'val', rows, c.max_length, c.max_input_length, c.pad_token), c.pad_token, d, device), d)
        for at, name in ((k % T_BINS, 'l2'), (T_BINS, 'ce')):
            if name in parts:
                sums[at] += torch.tensor([parts[name].item(), 1])
    if world > 1:
        sums = sums.to(device if device.type == 'cuda' else 'cpu')
        dist.all_reduce(sums)
    means = (sums[:, 0] / sums[:, 1]).tolist()
    bins = [m for m in means[:T_BINS] if not math.isnan(m)]
    l2, ce = sum(bins) / len(bins) if bins else math.nan, means[T_BINS]
    loss = sum(share * x for share, x in ((1 - c.decoder_prob, l2), (c.decoder_prob, ce)) if share)
    return dict(loss=loss, l2=l2, ce=ce, l2_bins=means[:T_BINS])


def encode(encoder, batch, pad_token, draws, device):
    """A batch of get_rows -> x0, tokens, loss_mask, cond_mask on the device, for compute_loss."""
    ids, valid, cond = (a.to(device, non_blocking=True) for a in batch)
    x0 = encoder(ids, valid, cond, draws.drop_cond)
    return x0, ids, ~cond if pad_token == 'eos' else valid & ~cond, cond

# ---- checkpoints ----------------------------------------------------------------------------------------------------
def save_checkpoint(out_dir, ckpt, keep_as=''):
    """Write out_dir/ckpt.pt whole or not at all; the one before stays as ckpt_prev.pt, this one also under the name keep_as."""
    path = os.path.join(out_dir, 'ckpt.pt')
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:        # a full disk is a RuntimeError inside torch.save
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')
        raise UserError(f"could not write {path}: {str(e).splitlines()[0]}; what was there before is intact") from None
    if os.path.exists(path):
        os.replace(path, os.path.join(out_dir, 'ckpt_prev.pt'))
    os.replace(path + '.tmp', path)
    if keep_as:
        kept = os.path.join(out_dir, keep_as)
        shutil.copyfile(path, kept + '.tmp')
        os.replace(kept + '.tmp', kept)


def lock(out_dir):
    """One run at a time writes an out_dir -> the open lock file; the system releases it however the process ends. UserError if it is taken."""
    make_out_dir(out_dir)
    f = open(os.path.join(out_dir, 'lock'), 'a')
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        print("no file locks on this system: take care that only one run writes this out_dir")
    except OSError:
        raise UserError(f"another run is writing {out_dir}; stop it or choose another --out_dir") from None
    return f

# what a resumed run may change: at most the order of sums, never the mathematics; max_iters on purpose
FREE = ('out_dir', 'init_from', 'overwrite', 'log_interval', 'eval_interval', 'eval_iters', 'save_interval', 'keep_interval', 'sample_interval',
        'wandb_log', 'wandb_project', 'data_dir', 'verify_data', 'max_iters', 'max_minutes', 'max_bad_steps', 'max_epochs', 'sampler', 'steps',
        'gamma', 'w', 'cfg', 'device', 'compile', 'recompute')


def load_resume(out_dir, config):
    """The newest readable checkpoint of out_dir, if it was trained with these settings. UserError otherwise."""
    for name in ('ckpt.pt', 'ckpt_prev.pt'):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        try:
            ckpt = load_checkpoint(path)
        except UserError as e:
            print(f"SKIPPED: {e}")
            continue
        if not all(k in ckpt for k in ('model', 'ema', 'optimizer', 'config', 'model_args', 'iter_num')):
            raise UserError(f"{path} has weights only, no state to resume from; start from them with --init_from={path}")
        differs = [f"{k} was {v!r}, now {config[k]!r}" for k, v in ckpt['config'].items() if k in config and k not in FREE and config[k] != v]
        if differs:
            raise UserError(f"{path} was trained with other settings: {'; '.join(differs)}; drop the override or choose another --out_dir")
        return path, ckpt
    raise UserError(f"nothing to resume in {out_dir}: no readable ckpt.pt; start with --init_from=scratch")


def plot_losses(out_dir):
    """metrics.jsonl -> loss.png."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        lines = [json.loads(line) for line in f]
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for axis, part, name in zip(axes, ('l2', 'ce'), ('denoise: l2 of the velocity', 'decode: cross-entropy, nats per token')):
        for key, style in ((part, dict(alpha=0.6, linewidth=1, label='train')), ('val_' + part, dict(marker='o', markersize=3, label='validation'))):
            points = [(x['iter'], x[key]) for x in lines if x.get(key) is not None]
            if points:
                axis.plot(*zip(*points), **style)
        axis.set(title=name, xlabel='iteration', yscale='log')
        if axis.has_data():
            axis.legend()
        axis.grid(alpha=0.3)
    fig.savefig(os.path.join(out_dir, 'loss.png'), dpi=120)
    plt.close(fig)

# what a number may be, where not every number will do
RANGES = {name: (1, 10**9) for name in ('batch_size', 'gradient_accumulation_steps', 'max_length', 'max_iters', 'max_bad_steps',
                                        'log_interval', 'eval_interval', 'eval_iters', 'save_interval')} \
    | {name: (0, 10**12) for name in ('keep_interval', 'sample_interval', 'max_input_length', 'warmup_iters', 'max_minutes', 'max_epochs', 'warmup_epochs', 'seed')} \
    | {name: (0, 1) for name in ('t_eps', 'self_cond_prob', 'decoder_prob', 'drop_cond_prob', 'ema_decay')} \
    | {name: (0, 1e6) for name in ('t_std', 'noise_scale', 'w_min', 'w_max', 'decoder_std', 'decoder_noise_scale', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip')} \
    | {name: (-1e6, 1e6) for name in ('t_mean', 'decoder_mean', 'gamma', 'w', 'cfg')} \
    | dict(n_layer=(-1, 10**4), n_embd=(-1, 10**6), n_head=(-1, 10**4), bottleneck=(1, 10**6), n_time=(1, 1000), n_scale=(1, 1000), n_mode=(1, 1000), steps=(-1, 10**6))

# dense bfloat16 peak of a GPU in FLOP/s, for the fraction of it that a run reaches
PEAK = {'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, '4090': 165e12, '3090': 71e12}


if __name__ == '__main__':
    from tqdm import tqdm
    config, started = configure(globals()), time.time()

    # ---- ranks, device, precision -----------------------------------------------------------------------------------
    rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    master = rank == 0
    say = print if master else lambda *a, **k: None
    if world > 1 and device in ('auto', 'cuda') and torch.cuda.is_available():
        device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)
    device, ctx, decided = pick_device(device, dtype)

    # ---- checks and derived settings ------------------------------------------------------------------------------------
    for name, allowed in dict(size=MODELS, optimizer=('muon', 'adamw'), lr_schedule=('constant', 'cosine'), pad_token=('pad', 'eos'),
                              ns_dtype=('float32', 'bfloat16'), sampler=('ode', 'sde')).items():
        if config[name] not in allowed:
            raise UserError(f"{name}={config[name]!r} is not one of {', '.join(map(repr, allowed))}")
    for name, (low, high) in RANGES.items():
        if not low <= config[name] <= high:     # nan is in no range
            raise UserError(f"{name}={config[name]}: must lie between {low} and {high}")
    if gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} micro-batches do not divide over {world} ranks; give a multiple of {world}")
    if keep_interval % save_interval:
        raise UserError(f"keep_interval={keep_interval} must be a multiple of save_interval={save_interval}")
    meta = open_bins(data_dir, dataset, verify_data)
    for part in ('encoder', 'tokenizer'):
        if config[part] not in ('', meta[part]):
            raise UserError(f"{meta['dir']} was made with {part} {meta[part]}, this run asks for {config[part]}; prepare it again or drop --{part}")
    if bool(meta.get('conditional')) != bool(max_input_length):
        raise UserError(f"{meta['dir']} has {'conditions' if meta.get('conditional') else 'no conditions'}, max_input_length is {max_input_length}; "
                        + ('give the number of condition tokens to keep' if meta.get('conditional') else 'set it to 0'))
    if meta['max_length'] > max_length and not max_input_length:
        raise UserError(f"{meta['dir']} has rows of {meta['max_length']} tokens, max_length is {max_length}; raise it or prepare shorter rows")
    if max_input_length >= max_length:
        raise UserError(f"max_input_length={max_input_length} leaves no room for a target in rows of max_length={max_length}; lower it")
    micro_steps = gradient_accumulation_steps // world
    layout = dict(ranks=world, device=device.type, dtype='bfloat16' if 'bfloat16 autocast' in decided else 'float32', compile=compile)
    rows_per_step = batch_size * gradient_accumulation_steps
    epoch = meta['rows']['train'] // rows_per_step or 1
    max_iters = max(1, int(max_epochs * epoch)) if max_epochs else max_iters
    warmup_iters = int(warmup_epochs * epoch) if warmup_epochs else warmup_iters
    learning_rate = learning_rate or 0.001 * rows_per_step / 256
    config |= dict(max_iters=max_iters, warmup_iters=warmup_iters, learning_rate=learning_rate)
    text = {k: meta[k] for k in ('vocab_size', 'latent_dim', 'encoder', 'tokenizer', 'latent_mean', 'latent_std')}
    preset = asdict(MODELS[size])
    if 0 in (n_layer, n_embd, n_head, steps) or w_max < w_min:
        raise UserError(f"n_layer={n_layer}, n_embd={n_embd}, n_head={n_head}, steps={steps} start at 1 (-1 = as in {size}); w_min={w_min} must not exceed w_max={w_max}")
    from_preset = {k for k in ('n_layer', 'n_embd', 'n_head', 'steps', 'gamma', 'w', 'cfg') if config[k] == -1}
    model_args = preset | {k: config[k] for k in preset if k in config and k not in from_preset} | text
    # torchrun --max-restarts starts again with the same command line
    there = [name for name in ('ckpt.pt', 'ckpt_prev.pt') if os.path.exists(os.path.join(out_dir, name))]
    if init_from == 'auto' or there and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)):
        init_from = 'resume' if there else 'scratch'
    if init_from == 'resume':
        resumed_from, ckpt = load_resume(out_dir, config)
    elif init_from == 'scratch' and not overwrite and there:
        raise UserError(f"{out_dir}/ckpt.pt is there already; go on with --init_from=resume, choose another --out_dir, or --overwrite=true")

    ddp = 'RANK' in os.environ
    if ddp:
        # torchrun keeps its store over restarts on a node: without a prefix of their own, new ranks would find the addresses of dead ones
        store, _, _ = next(dist.rendezvous('env://'))
        if os.environ.get('LOCAL_WORLD_SIZE') == str(world):
            store = dist.PrefixStore('attempt ' + os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', store=store, rank=rank, world_size=world)
        host_group = dist.new_group(backend='gloo')     # for decisions that must not wait for the GPU

    # ---- model: from scratch, resumed, or from published weights ------------------------------------------------------
    text_encoder = TextEncoder(meta['encoder'], meta['latent_mean'], meta['latent_std']).to(device)
    if text_encoder.latent_dim != meta['latent_dim']:
        raise UserError(f"encoder {meta['encoder']} is {text_encoder.latent_dim} wide, {meta['dir']} was made with one of {meta['latent_dim']}")
    iter_num = 0
    torch.manual_seed(seed)
    if init_from in ('scratch', 'resume'):
        try:
            raw_model = ELF(ELFConfig(**model_args))
        except RuntimeError as e:
            raise UserError(f"no network of n_layer={model_args['n_layer']}, n_embd={model_args['n_embd']}: {str(e).splitlines()[0]}") from None
    else:
        raw_model = ELF.from_pretrained(init_from)
        wrong = [f"{k} is {getattr(raw_model.config, k)} there, {meta[k]} in {meta['dir']}" for k in ('vocab_size', 'latent_dim') if getattr(raw_model.config, k) != meta[k]]
        if wrong:
            raise UserError(f"{init_from} does not fit the data: {'; '.join(wrong)}")
        # sizes are the checkpoint's, all else is this run's
        model_args |= {k: getattr(raw_model.config, k) for k in ('n_layer', 'n_embd', 'n_head', 'bottleneck', 'n_time', 'n_scale', 'n_mode')}
        raw_model.config = ELFConfig(**model_args)
    c = raw_model.config
    raw_model.to(device).train()
    raw_model.recompute = recompute
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    if init_from == 'resume':
        raw_model.load_state_dict(ckpt['model'])
        ema.load_state_dict(ckpt['ema'])
        iter_num = ckpt['iter_num']

    # ---- optimizer, compile, DDP ----------------------------------------------------------------------------------------
    params = list(raw_model.parameters())
    if optimizer == 'muon':
        optimizer = make_optimizer(raw_model.named_parameters(), learning_rate, getattr(torch, ns_dtype))
    else:
        optimizer = torch.optim.AdamW(params, learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    if init_from == 'resume':
        optimizer.load_state_dict(ckpt['optimizer'])
        changed = [f"{k} was {ckpt['layout'][k]}, now {v}" for k, v in layout.items() if ckpt.get('layout', layout)[k] != v]
        del ckpt
    compiled = compile and compile_in_place(raw_model, device)
    if compiled:
        text_encoder.compile(dynamic=False)
    # no buffers to broadcast: a rank whose rows need no first guess may skip that pass without the others waiting for it
    net = DistributedDataParallel(raw_model, device_ids=[device] if device.type == 'cuda' else None, forward_sync_buffers=False) if ddp else raw_model

    # ---- say what was decided -------------------------------------------------------------------------------------------
    count = lambda ps: f"{sum(p.numel() for p in ps):,}"
    say(f"device: {decided}, {world} rank{'s' * (world > 1)}, compile {'on' if compiled else 'off'}")
    say(f"model: {size if model_args['n_layer'] == preset['n_layer'] else 'own size'}, {c.n_layer} layers of {c.n_embd}, {c.n_head} heads, {count(params)} parameters; "
        + ', '.join(f"{g.get('name', 'adamw')} {count(g['params'])}" for g in optimizer.param_groups))
    say(f"data: {meta['dir']}, {meta['rows']['train']:,} rows, {meta['tokens']['train']:,} tokens; "
        f"encoder {meta['encoder']}, latents {c.latent_dim} wide, mean {c.latent_mean:.3f}, std {c.latent_std:.3f}")
    say(f"step: {batch_size} rows * {gradient_accumulation_steps} micro-batches = {rows_per_step} rows, {rows_per_step * max_length:,} tokens; "
        f"{max_iters} iterations = {max_iters * rows_per_step / meta['rows']['train']:.2f} epochs, {warmup_iters} of warm-up, peak lr {learning_rate:.2e}")
    say(f"start: {'resumed ' + resumed_from + f' at iteration {iter_num}' if init_from == 'resume' else init_from}")
    if init_from == 'resume' and changed:
        say(f"  {'; '.join(changed)}: same rows and draws, but sums in another order, so not bit for bit")
    stop = []       # why to end before max_iters: the number of a signal, or 0 when the time is up

    def on_signal(number, frame):
        if stop:
            raise KeyboardInterrupt     # a second one does not wait for the step
        stop.append(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if wandb_log and master:
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_log=True, but wandb is not installed; pip install wandb, or drop it") from None
    if sample_interval:
        tok, inputs, n_texts = load_tokenizer(c.tokenizer), None, max(4, world)
        references = os.path.join(meta['dir'], 'val.jsonl')
        if max_input_length and not os.path.exists(references):
            sample_interval = 0
            say(f"no texts on the way: {references} with conditions is not there")
        elif max_input_length:
            inputs = [row['input'] for row in read_inputs(references)[:n_texts]]
            n_texts = len(inputs)
    metrics_file = os.path.join(out_dir, 'metrics.jsonl')
    if master:
        locked = lock(out_dir)
        for name in there if init_from != 'resume' else ():     # of a run that this one overwrites
            os.replace(os.path.join(out_dir, name), os.path.join(out_dir, 'old_' + name))
        with open(os.path.join(out_dir, 'settings.json'), 'w') as f:
            json.dump(dict(config=config, model_args=model_args, torch=torch.__version__, python=sys.version.split()[0], command=sys.argv), f, indent=1)
        # a resumed run writes again what came after its checkpoint
        kept = []
        if init_from == 'resume' and os.path.exists(metrics_file):
            try:
                with open(metrics_file, encoding='utf-8') as f:
                    kept = [line for line in f if line.endswith('\n') and json.loads(line).get('iter', 0) <= iter_num]
            except ValueError as e:
                raise UserError(f"{metrics_file} is damaged ({e}); move it away, the run goes on without its past") from None
        with open(metrics_file + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(kept)
        os.replace(metrics_file + '.tmp', metrics_file)
        if wandb_log:
            wandb.init(project=wandb_project, name=out_dir, config=config)

    def log(**numbers):
        if master:
            with open(metrics_file, 'a', encoding='utf-8') as f:
                f.write(json.dumps(json.loads(json.dumps(numbers), parse_constant=lambda nan: None)) + '\n')     # JSON has no nan: null
            if wandb_log:
                wandb.log(numbers, step=numbers['iter'])

    def next_batch(iter_num, micro_step):
        """Rows and draws of a micro-batch; both follow from its number alone, so a resumed run, or one on another number of ranks, sees the same."""
        number = iter_num * gradient_accumulation_steps + micro_step * world + rank
        rows = rows_at(meta['rows']['train'], seed, number * batch_size, batch_size)
        generator = torch.Generator().manual_seed(row_seed(seed, number))
        batch = get_rows(meta, 'train', rows, max_length, max_input_length, pad_token)
        return [a.pin_memory() if device.type == 'cuda' else a for a in batch], draw(c, batch_size, max_length, generator, device)

    def checkpoint():
        global saved
        saved = iter_num
        if master:
            save_checkpoint(out_dir, dict(config=config, model_args=asdict(c), model=raw_model.state_dict(), ema=ema.state_dict(),
                                          optimizer=optimizer.state_dict(), iter_num=iter_num, rows_seen=iter_num * rows_per_step, layout=layout),
                            f'ckpt_{iter_num}.pt' if keep_interval and iter_num % keep_interval == 0 else '')

    # ---- the loop -------------------------------------------------------------------------------------------------------
    flops = estimate_flops(c, max_length) * rows_per_step / world
    peak = next((v for k, v in PEAK.items() if k in decided), None)
    bar = tqdm(total=max_iters, initial=iter_num, desc='training', unit='it', disable=None if master else True)
    loader = ThreadPoolExecutor(1)
    first_iter, saved, bad_steps, batch = iter_num, iter_num if init_from == 'resume' else -1, 0, loader.submit(next_batch, iter_num, 0)
    clock, timed = time.perf_counter(), 0       # both restart after whatever is not training
    while True:
        last = iter_num >= max_iters
        fresh = iter_num > first_iter or init_from != 'resume'     # else validated, saved and sampled before the interruption
        pause = time.perf_counter()
        if fresh and (iter_num % eval_interval == 0 or last):
            with ctx:
                val = estimate_loss(raw_model, text_encoder, meta, eval_iters, batch_size, device, rank, world)
            edges = t_edges(c)
            if master:
                tqdm.write(f"iter {iter_num}: val loss {val['loss']:.4f} (l2 {val['l2']:.4f}, ce {val['ce']:.4f}) | l2 by t "
                           + ' '.join(f"{a:.2f}-{b:.2f}: {x:.3f}" for a, b, x in zip(edges, edges[1:], val['l2_bins'])))
            log(iter=iter_num, **{'val_' + k: v for k, v in val.items()})
        if (iter_num % save_interval == 0 or last) and iter_num > first_iter:
            checkpoint()
        if fresh and sample_interval and (iter_num % sample_interval == 0 or last) and iter_num > 0:
            with ctx:
                texts = sample_texts(ema, tok, n_texts, 4, seed, device, grid='logit_normal', rank=rank, world=world,
                                     inputs=inputs, encoder=text_encoder, **resolve_sampling(c))
            if master:
                write_texts(os.path.join(out_dir, f'samples_{iter_num}.jsonl'), texts)
                tqdm.write(f"iter {iter_num}: sampled | {printable(texts[0]['generated'])[:120]}")
        if last:
            break
        if max_minutes and time.time() - started > 60 * max_minutes:
            stop.append(0)
        reason = torch.tensor(1 + stop[0] if stop else 0)
        if ddp:
            dist.all_reduce(reason, dist.ReduceOp.MAX, group=host_group)     # all stop at the same step
        if reason:
            if saved < iter_num:
                checkpoint()
            break
        clock += time.perf_counter() - pause

        lr = lr_at(iter_num, config)
        for group in optimizer.param_groups:
            group['lr'] = lr
        sums = torch.zeros(5, device=device)       # loss; sum and count of l2, of ce
        for micro_step in range(micro_steps):
            # no_sync must hold forward and backward, else DDP reduces in every micro-step all the same
            with net.no_sync() if ddp and micro_step < micro_steps - 1 else nullcontext():
                rows, draws = batch.result()
                with ctx:
                    loss, parts = compute_loss(net, *encode(text_encoder, rows, pad_token, draws, device), draws)
                following = (iter_num, micro_step + 1) if micro_step + 1 < micro_steps else (iter_num + 1, 0)
                batch = loader.submit(next_batch, *following)               # while this one is at work
                (loss / micro_steps).backward()
            sums[0] += loss.detach() / micro_steps
            for at, name in ((1, 'l2'), (3, 'ce')):
                if name in parts:
                    sums[at] += parts[name]
                    sums[at + 1] += 1
        # .item() waits for the GPU: what is not finite must touch neither weights nor averages
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
        if math.isfinite(norm):
            bad_steps = 0
            optimizer.step()
            decay = min(ema_decay, (1 + iter_num) / (10 + iter_num)) if ema_warmup else ema_decay
            with torch.no_grad():       # else the averages keep the autograd history of every step
                torch._foreach_lerp_(list(ema.parameters()), params, 1 - decay)
        else:
            bad_steps += 1
            say(f"iter {iter_num + 1}: SKIPPED, the gradient norm is {norm} (loss {sums[0].item()}, lr {lr:.2e}); {bad_steps} in a row")
            log(iter=iter_num + 1, bad_steps=bad_steps, lr=lr)
            if bad_steps == max_bad_steps:
                raise UserError(f"{bad_steps} steps in a row without a finite gradient, up to iter {iter_num + 1} (norm {norm}, loss {sums[0].item()}, lr {lr:.2e}); "
                                + (f"the last checkpoint is of iter {saved}: --init_from={out_dir} starts from its weights in another --out_dir" if saved >= 0 else "nothing was saved yet")
                                + "; lower the learning_rate")
        optimizer.zero_grad(set_to_none=True)
        iter_num += 1
        timed += 1
        bar.update(1)

        if iter_num % log_interval == 0 or iter_num == max_iters:
            if world > 1:
                sums[0] /= world
                dist.all_reduce(sums)
            total, l2, n_l2, ce, n_ce = sums.tolist()
            l2, ce = l2 / n_l2 if n_l2 else math.nan, ce / n_ce if n_ce else math.nan
            seconds = (time.perf_counter() - clock) / timed
            speed, left = rows_per_step * max_length / seconds, seconds * (max_iters - iter_num)
            mfu = f" | mfu {flops / seconds / peak:.0%}" if peak else ''
            bar.clear()
            say(f"iter {iter_num}: loss {total:.4f} (l2 {l2:.4f}, ce {ce:.4f}) | grad {norm:.2f} | lr {lr:.2e} | "
                f"{seconds * 1e3:.0f} ms | {speed:,.0f} tok/s{mfu} | {left / 60:.0f} min left", flush=True)
            log(iter=iter_num, loss=total, l2=l2, ce=ce, grad_norm=norm, lr=lr, ms=seconds * 1e3, tokens_per_s=speed)
            clock, timed = time.perf_counter(), 0

    # ---- the end ----------------------------------------------------------------------------------------------------------
    bar.close()
    loader.shutdown()
    if master:
        plot_losses(out_dir)
        say(f"done: {out_dir}/ckpt.pt, metrics.jsonl, loss.png; next: python sample.py --out_dir={out_dir} --trace=8" if last else
            f"stopped at iteration {iter_num} ({signal.Signals(reason.item() - 1).name if reason > 1 else 'max_minutes'}), saved in {out_dir}; go on with --init_from=resume")
    if ddp:
        dist.destroy_process_group()
    if master:
        locked.close()
    if not last and reason > 1:
        sys.exit(127 + reason.item())       # 128 + the number of the signal, as shells have it
