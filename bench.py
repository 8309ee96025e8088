"""
How fast a training step and sampling are here, on fake data: train.py's step and sample.py's sampler without the rest.

    python bench.py --size=ELF-B --batch_size=4 --max_length=128 --dtype=float32
    python bench.py --batch_size=64 --compile=true          # one large GPU
"""
import json
import resource
import statistics
import tempfile
import time
from dataclasses import replace

import torch
from transformers import T5Config, T5EncoderModel

from configurator import UserError, configure
from model import ELF, MODELS, TextEncoder, compute_loss, draw, estimate_flops
from sample import compile_in_place, decode_ids, generate, pick_device, time_grid
from train import encode, make_optimizer

# ---------------------------------------------------------------------------------------------------------------------
size = 'ELF-B'              # a row of MODELS
batch_size = 4              # rows of a training step
max_length = 128            # positions per row
sample_batch_size = 1       # rows sampled at once
sample_length = 256
sample_steps = 4            # of the sampler; cost is the same for each
runs = 5                    # timed, after one for warming up; medians are printed
ns_dtype = 'float32'        # of Muon's Newton-Schulz
device = 'auto'
dtype = 'auto'
compile = False
seed = 0
# ---------------------------------------------------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals())
    if size not in MODELS:
        raise UserError(f"size={size!r} is not one of {', '.join(MODELS)}")
    device, ctx, decided = pick_device(device, dtype)
    torch.manual_seed(seed)
    c = replace(MODELS[size], max_length=max_length)
    model = ELF(c).to(device).train()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    # t5-small's shape with random weights: nothing is downloaded
    with tempfile.TemporaryDirectory() as folder:
        T5EncoderModel(T5Config(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)).save_pretrained(folder)
        encoder = TextEncoder(folder, c.latent_mean, c.latent_std).to(device)
    optimizer = make_optimizer(model.named_parameters(), 1e-4, getattr(torch, ns_dtype))
    compiled = compile and compile_in_place(model, device)
    print(f"device: {decided}, compile {'on' if compiled else 'off'}\n{size}: {sum(p.numel() for p in model.parameters()):,} parameters; train {batch_size} x {max_length}, sample {sample_batch_size} x {sample_length}")
    ids = torch.randint(3, c.vocab_size, (batch_size, max_length))
    batch = ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)

    def sync():
        torch.cuda.synchronize() if device.type == 'cuda' else None
        return time.perf_counter()

    def train_step():
        """-> milliseconds of encoder and draws, forward and backward, optimizer."""
        start = sync()
        draws = draw(c, batch_size, max_length, generator, device)
        with ctx:
            inputs = encode(encoder, batch, 'pad', draws, device)
            encoded = sync()
            loss, _ = compute_loss(model, *inputs, draws)
        loss.backward()
        graded = sync()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [1e3 * (b - a) for a, b in ((start, encoded), (encoded, graded), (graded, sync()))]

    def sample_step():
        """-> milliseconds of one sampling step and of decoding."""
        z = c.noise_scale * torch.randn(sample_batch_size, sample_length, c.latent_dim, device=device)
        start = sync()
        with ctx:
            z = generate(model, z, time_grid(sample_steps, 'quantile', c))
            sampled = sync()
            decode_ids(model, z, 3.0)
        return [1e3 * (sampled - start) / sample_steps, 1e3 * (sync() - sampled)]

    def timed(f):
        start = sync()
        f()
        first = sync() - start
        return first, [statistics.median(part) for part in zip(*(f() for _ in range(runs)))]

    first_train, (encode_ms, grad_ms, opt_ms) = timed(train_step)
    step_ms = encode_ms + grad_ms + opt_ms
    model.eval()
    first_sample, (sample_ms, decode_ms) = timed(sample_step)
    peak = torch.cuda.max_memory_allocated() if device.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # the limit to compare with: this machine's own rate of matrix products, in the same precision, in the same run
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device)

    def product():
        start = sync()
        with ctx:
            a @ a
        return [1e3 * (sync() - start)]

    _, (product_ms,) = timed(product)
    rate, flops = 2 * n**3 / product_ms * 1e3, estimate_flops(c, max_length) * batch_size
    fraction = flops / grad_ms * 1e3 / rate
    print(f"train step   {step_ms:9.1f} ms = encoder and draws {encode_ms:.1f} + forward and backward {grad_ms:.1f} + optimizer {opt_ms:.1f}; {1e3 * batch_size * max_length / step_ms:,.0f} tokens/s")
    print(f"             forward and backward at {fraction:.0%} of this machine's matrix rate, {rate / 1e12:.2f} TFLOP/s; first step {first_train:.1f} s")
    print(f"sample step  {sample_ms:9.1f} ms, decoding once {decode_ms:.1f} ms; first call {first_sample:.1f} s")
    print(f"peak memory  {peak / 2**30:9.2f} GiB")
    print(json.dumps(dict(size=size, batch_size=batch_size, max_length=max_length, sample_batch_size=sample_batch_size, sample_length=sample_length,
                          device=decided, compile=compiled, step_ms=step_ms, encode_ms=encode_ms, forward_backward_ms=grad_ms, optimizer_ms=opt_ms,
                          tokens_per_s=1e3 * batch_size * max_length / step_ms, first_step_s=first_train, sample_step_ms=sample_ms, decode_ms=decode_ms,
                          peak_bytes=peak, matmul_flops=rate, fraction_of_matmul=fraction)))
