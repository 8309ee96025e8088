"""
Ours against the official PyTorch port: the same weights, the same shapes, alternating in one process.

    git clone -b pytorch_elf https://github.com/lillian039/ELF /tmp/port && pip install einops muon-optimizer
    python tests/vs_port.py --port=/tmp/port --batch_size=4 --max_length=128 --ours=float32/float32,bfloat16/float32,bfloat16/bfloat16
    python tests/vs_port.py --port=/tmp/port --what=sample --batch_size=1 --max_length=256 --ours=-/float32,-/bfloat16

The port runs its own train_step and sampler (compiled on a GPU, as its train.py does); t5-small's shape with random weights encodes for both.
"""
import copy
import logging
import os
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from transformers import T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import UserError, configure
from model import ELF, MODELS, TextEncoder, compute_loss, draw
from sample import compile_in_place, decode_ids, generate, pack_linears, pick_device, time_grid
from train import encode, make_optimizer

port = ''                   # checkout of the port (measured: commit b29d883)
what = 'train'              # 'train', 'loss' (the same without the optimizer) or 'sample'
size = 'ELF-B'
batch_size = 4
max_length = 128
steps = 32                  # of a sample, SDE
ours = 'float32/float32,bfloat16/float32,bfloat16/bfloat16'     # variants: ns_dtype/dtype
compile = False             # ours
runs = 3                    # rounds after the first; medians
device = 'auto'

if __name__ == '__main__':
    configure(globals())
    disable_progress_bar()
    if not os.path.isfile(os.path.join(port, 'src', 'train_step.py')) or what not in ('train', 'loss', 'sample') or size not in MODELS:
        raise UserError(f"port={port!r} must be a checkout of the PyTorch port, what={what!r} 'train', 'loss' or 'sample', size={size!r} one of {', '.join(MODELS)}")
    sys.path.insert(0, os.path.join(port, 'src'))
    import train_step as port_step
    from modules.model import ELF as PortELF
    from utils.generation_utils import _dlm_decode_batch, _generate_samples_single_batch
    from utils.train_utils import TrainState, get_optimizer
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    B, T, c = batch_size, max_length, MODELS[size]
    device = pick_device(device, 'auto')[0]
    with tempfile.TemporaryDirectory() as folder:
        T5EncoderModel(T5Config(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)).save_pretrained(folder)
        encoder = TextEncoder(folder, c.latent_mean, c.latent_std).to(device)
    model = ELF(c).to(device).train()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    net = PortELF(text_encoder_dim=c.latent_dim, max_length=T, hidden_size=c.n_embd, depth=c.n_layer, num_heads=c.n_head, bottleneck_dim=c.bottleneck,
                  num_model_mode_tokens=c.n_mode, vocab_size=c.vocab_size)
    net.load_state_dict(model.to_official())
    net.to(device)
    settings = SimpleNamespace(
        optimizer='muon', weight_decay=0.0, adam_b1=0.9, adam_b2=0.95, grad_accum_steps=1, ema_decay1=0.9999, use_bf16=True, max_length=T, pad_token='pad', label_drop_prob=0.0,
        time_schedule='logit_normal', num_self_cond_cfg_tokens=c.n_scale, t_eps=c.t_eps, self_cond_prob=c.self_cond_prob, self_cond_cfg_min=c.w_min, self_cond_cfg_max=c.w_max,
        denoiser_p_mean=c.t_mean, denoiser_p_std=c.t_std, denoiser_noise_scale=c.noise_scale, decoder_prob=c.decoder_prob, decoder_p_mean=c.decoder_mean, decoder_p_std=c.decoder_std,
        decoder_noise_scale=c.decoder_noise_scale, latent_mean=c.latent_mean, latent_std=c.latent_std)
    ids, generator = torch.randint(3, c.vocab_size, (B, T)), torch.Generator().manual_seed(0)
    if device.type == 'cuda':
        net = torch.compile(net)

    if what == 'sample':
        net.eval()
        times, z, sde = time_grid(steps, 'logit_normal', c, generator), c.noise_scale * torch.randn(B, T, c.latent_dim, device=device), SimpleNamespace(sampling_method='sde', sde_gamma=c.gamma)

        def port_run():
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                latent = _generate_samples_single_batch(net, generator, z.clone(), times.to(device), None, None, settings, sde, 1, c.w)
                _dlm_decode_batch(latent, net, 1.0, settings, c.w)
    else:
        state = TrainState(model=net, optimizer=get_optimizer(net, settings, 1e-4), dropout_generator=torch.Generator().manual_seed(0), ema_params1=TrainState.init_ema(net))
        if what == 'loss':
            state.optimizer.step, port_step.ema_update = lambda: None, lambda *args: None
        batch = dict(input_ids=ids, encoder_attention_mask=torch.ones(B, T, T), cond_seq_mask=torch.zeros(B, T), attention_mask=torch.ones(B, T))

        def port_encoder(input_ids, attention_mask, deterministic=True):
            mask = attention_mask[:, None, None] if attention_mask.ndim == 2 else attention_mask[:, None]
            return encoder.model(input_ids=input_ids, attention_mask=(1 - mask) * torch.finfo(torch.float32).min).last_hidden_state

        def port_run():
            port_step.train_step(state, port_encoder, batch, settings)

    def variant(ns_dtype, dtype):
        """One of ours as a function without arguments."""
        own, (_, ctx, decided) = copy.deepcopy(model), pick_device(device.type, dtype)
        if compile:
            compile_in_place(own, device)
        if what == 'sample':
            own.eval()
            if not compile:
                pack_linears(own, decided)

            def run():
                with ctx:
                    decode_ids(own, generate(own, z, times, gamma=c.gamma, w=c.w), c.w)
            return run
        optimizer, ema = make_optimizer(own.named_parameters(), 1e-4, getattr(torch, ns_dtype)), [p.detach().clone() for p in own.parameters()]
        rows = ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)

        def run():
            draws = draw(c, B, T, generator, device)
            with ctx:
                loss, _ = compute_loss(own, *encode(encoder, rows, 'pad', draws, device), draws)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            if what == 'train':
                optimizer.step()
                with torch.no_grad():
                    torch._foreach_lerp_(ema, list(own.parameters()), 1e-4)
            optimizer.zero_grad(set_to_none=True)
        for _ in range(10 if compile else 0):       # each count of rows is a graph of its own
            run()
        return run

    variants = {'port': port_run} | {name: variant(*name.split('/')) for name in ours.split(',')}
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # as in the port's train.py; for all alike
    times_of = {name: [] for name in variants}
    for r in range(runs + 1):
        for name, run in variants.items():
            torch.cuda.synchronize() if device.type == 'cuda' else None
            start = time.perf_counter()
            run()
            torch.cuda.synchronize() if device.type == 'cuda' else None
            if r:
                times_of[name].append(time.perf_counter() - start)
    for name, seconds in times_of.items():
        median = statistics.median(seconds)
        print(f"{what} {B} x {T}, {name}{', compiled' * (compile and name != 'port')}: median {median:.3f} s (min {min(seconds):.3f}, max {max(seconds):.3f}), "
              f"{median / statistics.median(times_of['port']):.3f} of the port's")
