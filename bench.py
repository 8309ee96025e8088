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
import sys
import tempfile
import time
from collections import defaultdict

import torch
from torch.autograd import DeviceType
from transformers import T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from model import ELF, MODELS, TextEncoder, compute_loss, draw, encode_rows, estimate_flops
from parts.device import autocast, compile_in_place, pack_linears, start
from parts.muon import make_optimizer
from sample import decode, generate, time_grid

# -------------------------------------------------------------------------------------------------
what = 'train,sample'       # or one of them
size = 'ELF-B'              # a row of MODELS
batch_size = 4              # rows of a training step
max_length = 128            # positions per row
sample_batch_size = 1       # rows sampled at once
sample_length = 256
sample_steps = 32           # what texts/s is worked out for; all cost the same, four are timed
runs = 5                    # timed, after warming up; medians are printed
profile = False             # of a training step: the ten largest kernels, what the host waits for
ns_dtype = 'float32'        # of Muon's Newton-Schulz
gradient_checkpointing = False
device = 'auto'
dtype = 'auto'
compile = False
# -------------------------------------------------------------------------------------------------

CHOICES = dict(what=('train,sample', 'train', 'sample'), size=tuple(MODELS),
               ns_dtype=('float32', 'bfloat16'))
AT_LEAST_1 = ('batch_size', 'max_length', 'sample_batch_size', 'sample_length', 'sample_steps',
              'runs')


def now():
    """Seconds, once the device has done what it was given."""
    if device.type in ('cuda', 'mps'):
        getattr(torch, device.type).synchronize()       # start() chose this device
    return time.perf_counter()


def timed(f, warm=1):
    """Median milliseconds of f, seconds of its first call."""
    took = []
    for _ in range(warm + runs):
        began = now()
        f()
        took.append(now() - began)
    return 1e3 * statistics.median(took[warm:]), took[0]


def matrix_rate(bf16):
    """FLOP/s of this machine's own products of large matrices, a limit to compare with."""
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * n**3 / timed(lambda: a @ a)[0] * 1e3


def peak_memory():
    """Bytes, of the GPU or of this process; None where the system does not say."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:         # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def make_step(model, encoder, ctx):
    """A generator function: a step of train.py's loop, that yields the name of each part done."""
    c, params, B, T = model.config, list(model.parameters()), batch_size, max_length
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = make_optimizer(model.named_parameters(), 1e-4, getattr(torch, ns_dtype))
    tokens = torch.randint(3, c.vocab_size, (B, T))
    rows = tokens, tokens > 0, tokens < 0       # without padding, without a condition
    generator = torch.Generator().manual_seed(0)

    def step():
        draws = draw(c, B, T, generator, device)
        with ctx:
            x0, ids, loss_mask, cond = encode_rows(encoder, rows, draws, c, device)
            yield 'encoder'
            loss, _ = compute_loss(model, x0, ids, loss_mask, cond, draws)
        loss.backward()
        yield 'forward and backward'
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        yield 'optimizer'
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), params, 1e-4)
        optimizer.zero_grad(set_to_none=True)
        yield 'average'
    return step


def bench_train(step, c, rate, warm):
    """A step, and its parts, which wait for each other only where timed apart -> dict."""
    ms, first = timed(lambda: list(step()), warm)
    took = defaultdict(list)
    for _ in range(runs):
        began = now()
        for part in step():
            took[part].append(1e3 * (now() - began))
            began = now()
    parts = {part: statistics.median(times) for part, times in took.items()}
    speed = 1e3 * batch_size * max_length / ms
    flops = 1e3 * estimate_flops(c, max_length) * batch_size / parts['forward and backward']
    print(f"train {batch_size} x {max_length}: {ms:,.1f} ms, {speed:,.0f} tokens/s; forward and "
          f"backward at {flops / rate:.0%} of this machine's matrix rate; first step {first:.1f} s")
    print('  ' + ' + '.join(f'{part} {time:,.1f}' for part, time in parts.items()) + ' ms')
    return dict(step_ms=ms, tokens_per_s=speed, parts_ms=parts, first_step_s=first, flops=flops)


def profile_step(step):
    """Where a step's time goes -> the ten largest kernels (us, calls, name), the host's waits."""
    with torch.profiler.profile() as profiler:
        list(step())
        now()
    where = DeviceType.CUDA if device.type == 'cuda' else DeviceType.CPU
    rows = [(e.self_device_time_total or e.self_cpu_time_total, e.count, e.key)
            for e in profiler.key_averages()
            if e.device_type == where and not e.is_user_annotation]
    rows = sorted(rows, reverse=True)[:10]
    for microseconds, count, name in rows:
        print(f"  {microseconds / 1e3:9.2f} ms {count:6} x {name[:76]}")
    waits = {e.key: e.count for e in profiler.key_averages() if 'Synchronize' in e.key}
    print(f"  waits of the host, one of them this profile's: {waits}")
    return dict(kernels=rows, waits=waits)


def bench_sample(model, ctx):
    """Four steps of the sampler, and the decoding -> dict."""
    c, B, T = model.config, sample_batch_size, sample_length
    z = c.noise_scale * torch.randn(B, T, c.latent_dim, device=device)
    with ctx:
        four_ms, first = timed(lambda: generate(model, z, time_grid(4, 'quantile', c)))
        decode_ms = timed(lambda: decode(model, z, c.w))[0]
    speed = 1e3 * B / (sample_steps * four_ms / 4 + decode_ms)
    print(f"sample {B} x {T}: {four_ms / 4:,.1f} ms a step, decoding {decode_ms:,.1f} ms; "
          f"{speed:.2f} texts/s at {sample_steps} steps; first call {first:.1f} s")
    return dict(step_ms=four_ms / 4, decode_ms=decode_ms, texts_per_s=speed, first_call_s=first)


if __name__ == '__main__':
    config = configure(globals())
    disable_progress_bar()
    device, bf16, about = start(device, dtype)
    ctx, c = autocast(device, bf16), MODELS[size]
    torch.manual_seed(0)
    model = ELF(c).to(device)
    model.gradient_checkpointing = gradient_checkpointing
    with tempfile.TemporaryDirectory() as folder:       # t5-small's shape: nothing is downloaded
        T5EncoderModel(T5Config(vocab_size=32128, d_model=c.latent_dim)).save_pretrained(folder)
        encoder = TextEncoder(folder, c.latent_mean, c.latent_std).to(device)
    compiled = compile and compile_in_place(model, encoder, device=device)
    rate = matrix_rate(bf16)
    report = config | dict(device=about, compile=compiled, matmul_flops=rate)
    print(f"device: {about}, compile {'on' if compiled else 'off'}; {size}; large products: "
          f"{rate / 1e12:.2f} TFLOP/s")
    if 'train' in what:
        step = make_step(model, encoder, ctx)
        # compiled, each count of rows is a graph of its own: most of them before the clock starts
        report['train'] = bench_train(step, c, rate, 10 if compiled else 2)
        if profile:
            report['profile'] = profile_step(step)
    if 'sample' in what:
        model.eval()
        if not compiled:
            pack_linears(model, bf16)
        report['sample'] = bench_sample(model, ctx)
    report['peak_bytes'] = peak = peak_memory()
    print(f"peak memory: {peak / 2**30:.2f} GiB" if peak else "peak memory: not known here")
    print(json.dumps(report))
