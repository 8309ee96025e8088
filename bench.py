"""
How fast training and sampling are here, on fake data: the real functions of the other files,
timed apart.

    python bench.py                                     # ELF-B, 4 x 128; minutes on a CPU
    python bench.py --what=train,muon --batch_size=64 --max_length=1024 --ns_dtype=bfloat16 \\
        --compile=true                                  # a large GPU
    python bench.py --what=sample --sample_batch_size=64 --sample_length=1024 --compile=true
"""
from configurator import UserError, configure       # first: see there

import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from parts.data import get_rows
from parts.device import autocast, compile_in_place, pack_linears, start
from model import ELF, MODELS, TextEncoder, compute_loss, draw, encode_rows, estimate_flops
from parts.muon import make_optimizer
from sample import decode_ids, generate, time_grid

# -------------------------------------------------------------------------------------------------
what = 'train,sample,data,muon'     # any of these
size = 'ELF-B'              # a row of MODELS
batch_size = 4              # rows of a training step
max_length = 128            # positions per row
grow = False                # also time twice the rows, and twice the length
sample_batch_size = 1       # rows sampled at once
sample_length = 256
sample_steps = 32           # what samples/s is worked out for; all cost the same, four are timed
runs = 5                    # timed, after warming up; medians are printed
ns_dtype = 'float32'        # of Muon's Newton-Schulz in the training step
device = 'auto'
dtype = 'auto'
compile = False
seed = 0
# -------------------------------------------------------------------------------------------------

def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(f, times, warm=1):
    """-> median milliseconds of f, seconds of its first call."""
    took = []
    for _ in range(warm + times):
        start = now()
        f()
        took.append(now() - start)
    return 1e3 * statistics.median(took[warm:]), took[0]


def bench_train(model, encoder, B, T, ctx, device, matmul_rate, warm):
    """A training step of B rows of T tokens in its parts -> dict."""
    c, params = model.config, list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, c.vocab_size, (B, T))
    batch = ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    x0 = torch.randn(B, T, c.latent_dim, device=device)
    h = torch.randn(round(c.decoder_prob * B), T, c.n_embd, device=device)          # decode rows
    n_guess = round(c.self_cond_prob * (B - len(h)))
    t, w = torch.full((B,), 0.3, device=device), torch.ones(B, device=device)

    def encode():
        with ctx:
            encode_rows(encoder, batch, draw(c, B, T, generator, device), c, device)

    def first_guess():
        with ctx, torch.no_grad():
            model(x0[:n_guess], x0[:n_guess], t[:n_guess], w[:n_guess])

    def token_head():
        logits = model.unembed(F.gelu(model.proj(h), approximate=c.gelu))
        tokens = ids[:len(h)].to(device)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        model.zero_grad(set_to_none=True)

    def forward_backward():
        with ctx:
            masks = [a.to(device) for a in batch]
            loss, _ = compute_loss(model, x0, *masks, draw(c, B, T, generator, device))
        loss.backward()

    def without_update():
        forward_backward()
        model.zero_grad(set_to_none=True)

    def train_step():
        forward_backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    grad_ms, first = timed(without_update, runs, warm)
    encode_ms = timed(encode, runs)[0]
    guess_ms = timed(first_guess, runs)[0] if n_guess else 0.0
    head_ms = timed(token_head, runs)[0] if len(h) else 0.0
    optimizer = make_optimizer(model.named_parameters(), 1e-4, getattr(torch, ns_dtype))
    whole_ms = timed(train_step, runs)[0]
    step_ms, flop = whole_ms + encode_ms, estimate_flops(c, T) * B
    fraction = flop / grad_ms * 1e3 / matmul_rate
    print(f"train {B} x {T}: {step_ms:,.1f} ms, {1e3 * B * T / step_ms:,.0f} tokens/s; "
          f"first step {first:.1f} s")
    print(f"  encoder {encode_ms:.1f} + first guess {guess_ms:.1f} + trained pass "
          f"{grad_ms - guess_ms - head_ms:.1f} + token head {head_ms:.1f} + optimizer ({ns_dtype}) "
          f"{whole_ms - grad_ms:.1f} ms")
    print(f"  forward and backward: {flop / 1e12:.3f} TFLOP at {fraction:.0%} of this machine's "
          f"matrix rate, {matmul_rate / 1e12:.2f} TFLOP/s")
    return dict(batch_size=B, max_length=T, step_ms=step_ms, tokens_per_s=1e3 * B * T / step_ms,
                encoder_ms=encode_ms, guess_ms=guess_ms, head_ms=head_ms,
                forward_backward_ms=grad_ms, optimizer_ms=whole_ms - grad_ms,
                first_step_s=first, fraction_of_matmul=fraction)


def bench_muon(model):
    """The optimizer's step alone, in both precisions -> dict of milliseconds."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    ms = {}
    for kind in ('float32', 'bfloat16'):
        optimizer = make_optimizer(model.named_parameters(), 1e-4, getattr(torch, kind))
        ms[f'muon_{kind}_ms'] = timed(optimizer.step, 3)[0]
    model.zero_grad(set_to_none=True)
    print(f"optimizer step alone: float32 {ms['muon_float32_ms']:,.1f} ms, "
          f"bfloat16 {ms['muon_bfloat16_ms']:,.1f} ms")
    return ms


def bench_sample(model, ctx, device):
    """Four steps of the sampler and the decoding -> dict."""
    c = model.config
    z = c.noise_scale * torch.randn(sample_batch_size, sample_length, c.latent_dim, device=device)

    def sample():
        with ctx:
            generate(model, z, time_grid(4, 'quantile', c))

    def decode():
        with ctx:
            decode_ids(model, z, 3.0)

    four_ms, first = timed(sample, runs)
    decode_ms = timed(decode, runs)[0]
    speed = 1e3 * sample_batch_size / (sample_steps * four_ms / 4 + decode_ms)
    print(f"sample {sample_batch_size} x {sample_length}: {four_ms / 4:,.1f} ms a step, decoding "
          f"{decode_ms:.1f} ms; {speed:.2f} samples/s at {sample_steps} steps; "
          f"first call {first:.1f} s")
    return dict(batch_size=sample_batch_size, length=sample_length, step_ms=four_ms / 4,
                decode_ms=decode_ms, samples_per_s=speed, first_call_s=first)


def bench_data(c):
    """Rows from a bin of 128 MB in random order -> tokens a second of one loader thread."""
    c = replace(c, max_length=max_length)
    rng, rows = np.random.default_rng(seed), 64_000_000 // max_length
    with tempfile.TemporaryDirectory() as folder:
        ids = rng.integers(3, c.vocab_size, rows * max_length).astype(np.uint16)
        ids.tofile(os.path.join(folder, 'train.bin'))
        starts = np.repeat(np.arange(rows)[:, None] * max_length, 2, axis=1)
        np.save(os.path.join(folder, 'train.idx.npy'), starts)
        meta = dict(dir=folder, dtype='uint16', vocab_size=c.vocab_size, pad_id=0, eos_id=1)
        order = rng.permutation(rows)[:256]
        ms = timed(lambda: get_rows(meta, 'train', order, c), 20)[0]
    speed = 1e3 * 256 * max_length / ms
    print(f"data: {speed:,.0f} tokens/s from one loader thread")
    return speed


if __name__ == '__main__':
    configure(globals())
    disable_progress_bar()
    parts = what.split(',')
    if not set(parts) <= {'train', 'sample', 'data', 'muon'}:
        raise UserError(f"what={what!r} must be some of train,sample,data,muon")
    if size not in MODELS or ns_dtype not in ('float32', 'bfloat16'):
        raise UserError(f"size={size!r} must be one of {', '.join(MODELS)}; "
                        f"ns_dtype={ns_dtype!r} 'float32' or 'bfloat16'")
    if min(batch_size, max_length, sample_batch_size, sample_length, sample_steps, runs) < 1:
        raise UserError("batch_size, max_length, sample_batch_size, sample_length, sample_steps "
                        "and runs start at 1")
    device, bf16, about = start(device, dtype)
    ctx = autocast(device, bf16)
    torch.manual_seed(seed)
    c = MODELS[size]
    model = ELF(c).to(device)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    compiled = compile and compile_in_place(model, device=device)
    report = dict(size=size, device=about, compile=compiled)
    print(f"device: {report['device']}, compile {'on' if compiled else 'off'}")
    print(f"{size}: {sum(p.numel() for p in model.parameters()):,} parameters")

    # the limit to compare with: this machine's own rate of matrix products, in the same precision
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device)
    with ctx:
        rate = 2 * n**3 / timed(lambda: a @ a, runs)[0] * 1e3
    report['matmul_flops'] = rate

    if 'train' in parts:
        # t5-small's shape with random weights: nothing is downloaded
        t5 = T5Config(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)
        with tempfile.TemporaryDirectory() as folder:
            T5EncoderModel(t5).save_pretrained(folder)
            encoder = TextEncoder(folder, c.latent_mean, c.latent_std).to(device)
        shapes = [(batch_size, max_length)]
        if grow:
            shapes += [(2 * batch_size, max_length), (batch_size, 2 * max_length)]
        # compiled, each count of rows is a graph of its own: all of them before the clock starts
        warm = 10 if compiled else 2
        report['train'] = [bench_train(model, encoder, B, T, ctx, device, rate, warm)
                           for B, T in shapes]
    if 'muon' in parts:
        report |= bench_muon(model)
    if 'sample' in parts:
        model.eval()
        if not compiled:
            pack_linears(model, bf16)
        report['sample'] = bench_sample(model, ctx, device)
    if 'data' in parts:
        report['data_tokens_per_s'] = bench_data(c)
    if device.type == 'cuda':
        report['peak_bytes'] = torch.cuda.max_memory_allocated()
    else:
        report['peak_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory: {report['peak_bytes'] / 2**30:.2f} GiB")
    print(json.dumps(report))
