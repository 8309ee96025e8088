"""
How fast training and sampling are here: train.py's step and sample.py's, on random tokens.

    python bench.py                                         # ELF-B, 4 x 128; minutes on a CPU
    python bench.py --batch_size=64 --max_length=1024 --ns_dtype=bfloat16 --compile=true \\
        --sample_batch_size=64 --sample_length=1024         # a large GPU; see docs/speed.md
"""
from configurator import configure       # before torch: see there

import copy
import json
import statistics
import tempfile
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from model import ELF, MODELS, TextEncoder, compute_loss, draw, encode_rows
from parts.device import DTYPES, autocast, cast_blocks, compile_in_place, start
from parts.muon import make_optimizer
from sample import decode, generate, time_grid

# -------------------------------------------------------------------------------------------------
size = 'ELF-B'              # a row of MODELS
batch_size = 4              # rows of a training step
max_length = 128            # positions per row
sample_batch_size = 1       # rows sampled at once
sample_length = 256
runs = 5                    # timed, after warming up; medians are printed
profile = False             # of a training step: its ten largest parts
ns_dtype = 'float32'        # of Muon's Newton-Schulz
device = 'auto'
dtype = 'auto'
compile = False
# -------------------------------------------------------------------------------------------------

CHOICES = dict(size=tuple(MODELS), ns_dtype=('float32', 'bfloat16'), dtype=DTYPES)
# dense bfloat16 peak of a GPU in TFLOP/s, for the fraction of it that a step reaches
PEAKS = {'B200': 2250, 'H200': 989, 'H100': 989, 'A100': 312, 'L40S': 362, '4090': 165, '3090': 71}


def timed(f, warm=1):
    """Median milliseconds of f once it is warm, seconds of its first call."""
    seconds = []
    for _ in range(warm + runs):
        began = time.perf_counter()
        f()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(seconds[warm:]), 2), round(seconds[0], 1)


def make_step(model, encoder, ctx):
    """A step of train.py's loop, as a function."""
    c = model.config
    params = list(model.parameters())
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = make_optimizer(model.named_parameters(), 1e-4, getattr(torch, ns_dtype))
    tokens = torch.randint(3, c.vocab_size, (batch_size, max_length))
    rows = tokens, tokens > 0, tokens < 0       # without padding, without a condition
    generator = torch.Generator().manual_seed(0)

    def step():
        draws = draw(c, batch_size, max_length, generator, device)
        with ctx:
            x0, ids, loss_mask, cond = encode_rows(encoder, rows, draws, c, device)
            loss, _ = compute_loss(model, x0, ids, loss_mask, cond, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), params, 1e-4)
        optimizer.zero_grad(set_to_none=True)
    return step


def profile_step(step):
    """Where a step's time goes: torch's table."""
    with torch.profiler.profile() as profiler:
        step()
    column = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    return profiler.key_averages().table(sort_by=column, row_limit=10)


def bench_train(step, tflop, warm):
    """tflop: what PyTorch counts in a step, encoder and optimizer too; on a CPU no attention."""
    ms, first_s = timed(step, warm)
    rate = 1e3 * tflop / ms
    mfu = [f'{rate / peak:.0%}' for name, peak in PEAKS.items() if name in about]
    return dict(step_ms=ms, tokens_per_s=round(batch_size * max_length / ms * 1e3),
                tflop_per_s=round(rate, 2), mfu=''.join(mfu), first_step_s=first_s)


def bench_sample(model, ctx):
    """Four steps of the sampler, all cost the same, and the decoding."""
    c = model.config
    B = sample_batch_size
    z = c.noise_scale * torch.randn(B, sample_length, c.latent_dim, device=device)
    with ctx:
        four_ms, first_s = timed(lambda: generate(model, z, time_grid(4, 'quantile', c)))
        decode_ms, _ = timed(lambda: decode(model, z, c.w))
    text_ms = c.steps * four_ms / 4 + decode_ms
    return dict(step_ms=four_ms / 4, decode_ms=decode_ms, first_call_s=first_s,
                texts_per_s=round(1e3 * B / text_ms, 2))


if __name__ == '__main__':
    config = configure(globals())
    device, bf16, about = start(device, dtype)
    ctx = autocast(device, bf16)
    c = MODELS[size]
    torch.manual_seed(0)
    model = ELF(c).to(device)
    with tempfile.TemporaryDirectory() as folder:       # t5-small's shape: nothing is downloaded
        T5EncoderModel(T5Config(vocab_size=32128, d_model=c.latent_dim)).save_pretrained(folder)
        encoder = TextEncoder(folder, c.latent_mean, c.latent_std).to(device)
    print(f"{size} on {about}")
    step = make_step(model, encoder, ctx)
    with FlopCounterMode(display=False) as counter:
        step()
    compiled = compile and compile_in_place(model, encoder, device=device)
    report = config | dict(device=about, compile=compiled)
    # compiled, each count of rows is a graph of its own: most of them before the clock starts
    report['train'] = bench_train(step, counter.get_total_flops() / 1e12, 10 if compiled else 2)
    print(f"train {batch_size} x {max_length}: {report['train']}")
    if profile:
        report['profile'] = profile_step(step)
        print(report['profile'])
    model.eval()
    if bf16:
        cast_blocks(model, compiled)
    report['sample'] = bench_sample(model, ctx)
    print(f"sample {sample_batch_size} x {sample_length}: {report['sample']}")
    if device.type == 'cuda':
        report['peak_gib'] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(report))
