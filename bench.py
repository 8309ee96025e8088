"""
How fast training and sampling are here, on fake data: the real functions of model.py, train.py and sample.py, timed apart.

    python bench.py                                                      # ELF-B, 4 x 128; minutes on a CPU
    python bench.py --what=train,muon --batch_size=64 --max_length=1024 --ns_dtype=bfloat16 --compile=true      # a large GPU
    python bench.py --what=sample --sample_batch_size=64 --sample_length=1024 --compile=true
"""
import json
import os
import resource
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from configurator import UserError, configure
from model import ELF, MODELS, TextEncoder, compute_loss, draw, estimate_flops
from sample import compile_in_place, decode_ids, generate, pack_linears, pick_device, time_grid
from train import encode, get_rows, make_optimizer

# ---------------------------------------------------------------------------------------------------------------------
what = 'train,sample,data,muon'     # any of these
size = 'ELF-B'              # a row of MODELS
batch_size = 4              # rows of a training step
max_length = 128            # positions per row
grow = False                # also time twice the rows, and twice the length
sample_batch_size = 1       # rows sampled at once
sample_length = 256
sample_steps = 32           # what samples/s is worked out for; cost is the same for each, four are timed
runs = 5                    # timed, after warming up; medians are printed
ns_dtype = 'float32'        # of Muon's Newton-Schulz in the training step
device = 'auto'
dtype = 'auto'
compile = False
seed = 0
# ---------------------------------------------------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals())
    disable_progress_bar()
    parts = what.split(',')
    if size not in MODELS or ns_dtype not in ('float32', 'bfloat16') or not set(parts) <= {'train', 'sample', 'data', 'muon'}:
        raise UserError(f"size={size!r} must be one of {', '.join(MODELS)}; ns_dtype={ns_dtype!r} 'float32' or 'bfloat16'; what={what!r} some of train,sample,data,muon")
    if min(batch_size, max_length, sample_batch_size, sample_length, sample_steps, runs) < 1:
        raise UserError("batch_size, max_length, sample_batch_size, sample_length, sample_steps and runs start at 1")
    device, ctx, decided = pick_device(device, dtype)
    torch.manual_seed(seed)
    c = MODELS[size]
    model = ELF(c).to(device)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    params, generator = list(model.parameters()), torch.Generator().manual_seed(seed)
    compiled = compile and compile_in_place(model, device)
    report = dict(size=size, device=decided, compile=compiled)
    print(f"device: {decided}, compile {'on' if compiled else 'off'}\n{size}: {sum(p.numel() for p in params):,} parameters")

    def now():
        torch.cuda.synchronize() if device.type == 'cuda' else None
        return time.perf_counter()

    def timed(f, times=runs, warm=1):
        """-> median milliseconds of f, seconds of the first call."""
        took = []
        for _ in range(warm + times):
            start = now()
            f()
            took.append(now() - start)
        return 1e3 * statistics.median(took[warm:]), took[0]

    # the limit to compare with: this machine's own rate of matrix products, in the same precision, in the same run
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device)
    with ctx:
        rate = 2 * n**3 / timed(lambda: a @ a)[0] * 1e3
    report['matmul_flops'] = rate

    if 'train' in parts:
        # t5-small's shape with random weights: nothing is downloaded
        with tempfile.TemporaryDirectory() as folder:
            T5EncoderModel(T5Config(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)).save_pretrained(folder)
            encoder = TextEncoder(folder, c.latent_mean, c.latent_std).to(device)
        for B, T in [(batch_size, max_length)] + [(2 * batch_size, max_length), (batch_size, 2 * max_length)] * grow:
            ids = torch.randint(3, c.vocab_size, (B, T))
            batch = ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
            x0 = torch.randn(B, T, c.latent_dim, device=device)
            n_decode, n_guess = round(c.decoder_prob * B), round(c.self_cond_prob * (1 - c.decoder_prob) * B)       # the usual ones
            t, w = torch.full((B,), 0.3, device=device), torch.ones(B, device=device)

            def encode_rows():
                with ctx:
                    encode(encoder, batch, 'pad', draw(c, B, T, generator, device), device)

            def first_guess():
                with ctx, torch.no_grad():
                    model(x0[:n_guess], x0[:n_guess], t[:n_guess], w[:n_guess])

            def token_head():
                with ctx:
                    logits = model.unembed(F.gelu(model.proj(torch.randn(n_decode, T, c.n_embd, device=device)), approximate='tanh'))
                F.cross_entropy(logits.float().flatten(0, 1), ids[:n_decode].flatten().to(device)).backward()
                model.zero_grad(set_to_none=True)

            def forward_backward():
                with ctx:
                    loss, _ = compute_loss(model, x0, *(a.to(device) for a in batch), draw(c, B, T, generator, device))
                loss.backward()

            def train_step():
                forward_backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            # with compile, each count of rows is a graph of its own: all of them before the clock starts
            grad_ms, first = timed(lambda: (forward_backward(), model.zero_grad(set_to_none=True)), warm=10 if compiled else 2)
            encode_ms, guess_ms, head_ms = timed(encode_rows)[0], timed(first_guess)[0] if n_guess else 0.0, timed(token_head)[0] if n_decode else 0.0
            optimizer = make_optimizer(model.named_parameters(), 1e-4, getattr(torch, ns_dtype))
            whole_ms = timed(train_step)[0]
            optimizer, step_ms, opt_ms = None, whole_ms + encode_ms, whole_ms - grad_ms
            fraction = estimate_flops(c, T) * B / grad_ms * 1e3 / rate
            print(f"train {B} x {T}: {step_ms:,.1f} ms, {1e3 * B * T / step_ms:,.0f} tokens/s; first step {first:.1f} s\n"
                  f"  encoder {encode_ms:.1f} + first guess {guess_ms:.1f} + trained pass {grad_ms - guess_ms - head_ms:.1f} "
                  f"+ token head {head_ms:.1f} + optimizer ({ns_dtype}) {opt_ms:.1f} ms\n"
                  f"  forward and backward: {estimate_flops(c, T) * B / 1e12:.3f} TFLOP at {fraction:.0%} of this machine's matrix rate, {rate / 1e12:.2f} TFLOP/s")
            report.setdefault('train', []).append(dict(batch_size=B, max_length=T, step_ms=step_ms, tokens_per_s=1e3 * B * T / step_ms, encoder_ms=encode_ms, guess_ms=guess_ms, head_ms=head_ms,
                                                       forward_backward_ms=grad_ms, optimizer_ms=opt_ms, first_step_s=first, fraction_of_matmul=fraction))

    if 'muon' in parts:
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        for kind in ('float32', 'bfloat16'):
            report[f'muon_{kind}_ms'] = timed(make_optimizer(model.named_parameters(), 1e-4, getattr(torch, kind)).step, times=3)[0]
        model.zero_grad(set_to_none=True)
        print(f"optimizer step alone: float32 {report['muon_float32_ms']:,.1f} ms, bfloat16 {report['muon_bfloat16_ms']:,.1f} ms")

    if 'sample' in parts:
        model.eval()
        if not compiled:
            pack_linears(model, decided)
        z = c.noise_scale * torch.randn(sample_batch_size, sample_length, c.latent_dim, device=device)

        def sample():
            with ctx:
                return generate(model, z, time_grid(4, 'quantile', c))

        def decode():
            with ctx:
                decode_ids(model, z, 3.0)
        (four_ms, first), decode_ms = timed(sample), timed(decode)[0]
        seconds = (sample_steps * four_ms / 4 + decode_ms) / 1e3
        print(f"sample {sample_batch_size} x {sample_length}: {four_ms / 4:,.1f} ms a step, decoding {decode_ms:.1f} ms; "
              f"{sample_batch_size / seconds:.2f} samples/s at {sample_steps} steps; first call {first:.1f} s")
        report['sample'] = dict(batch_size=sample_batch_size, length=sample_length, step_ms=four_ms / 4, decode_ms=decode_ms,
                                samples_per_s=sample_batch_size / seconds, first_call_s=first)

    if 'data' in parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = 64_000_000 // (2 * max_length)
            np.random.default_rng(seed).integers(3, c.vocab_size, rows * max_length).astype(np.uint16).tofile(os.path.join(folder, 'train.bin'))
            np.save(os.path.join(folder, 'train.idx.npy'), np.repeat(np.arange(rows)[:, None] * max_length, 2, axis=1))
            meta = dict(dir=folder, dtype='uint16', vocab_size=c.vocab_size, pad_id=0, eos_id=1)
            order = np.random.default_rng(seed).permutation(rows)
            load_ms = timed(lambda: list(get_rows(meta, 'train', order[:256], max_length)), times=20)[0]
        report['data_tokens_per_s'] = 1e3 * 256 * max_length / load_ms
        headroom = f", {report['data_tokens_per_s'] / report['train'][0]['tokens_per_s']:,.0f} times what the training step takes" if 'train' in parts else ''
        print(f"data: {report['data_tokens_per_s']:,.0f} tokens/s from one loader thread{headroom}")

    report['peak_bytes'] = torch.cuda.max_memory_allocated() if device.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory: {report['peak_bytes'] / 2**30:.2f} GiB")
    print(json.dumps(report))
