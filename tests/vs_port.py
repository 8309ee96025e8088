"""
Ours against the official PyTorch port: the same weights, the same shapes, in turn in one process.

    git clone -b pytorch_elf https://github.com/lillian039/ELF /tmp/port
    pip install einops muon-optimizer
    python tests/vs_port.py --port=/tmp/port --batch_size=4 --max_length=128
    python tests/vs_port.py --port=/tmp/port --what=sample --batch_size=1 --max_length=256 \\
        --ours=-/float32,-/bfloat16

The port runs its own train_step and sampler (compiled on a GPU, as its train.py does); an encoder
of t5-small's shape with random weights serves both.
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import UserError, configure
from parts.device import autocast, cast_blocks, compile_in_place, pick_device
from model import ELF, MODELS, TextEncoder, compute_loss, draw, encode_rows
from parts.muon import make_optimizer
from sample import decode, generate, time_grid

# -------------------------------------------------------------------------------------------------
port = ''                   # checkout of the port (measured: commit b29d883)
what = 'train'              # 'train', 'loss' (the same without the optimizer) or 'sample'
size = 'ELF-B'              # a row of MODELS
batch_size = 4
max_length = 128
steps = 32                  # of a sample, SDE
ours = 'float32/float32,bfloat16/float32,bfloat16/bfloat16'     # variants: ns_dtype/dtype
compile = False             # ours
runs = 3                    # rounds after the first; medians
device = 'auto'
# -------------------------------------------------------------------------------------------------

CHOICES = dict(what=('train', 'loss', 'sample'), size=tuple(MODELS))


def make_encoder(c, device):
    t5 = T5Config(vocab_size=32128, d_model=c.latent_dim)      # else as t5-small
    with tempfile.TemporaryDirectory() as folder:
        T5EncoderModel(t5).save_pretrained(folder)
        return TextEncoder(folder, c.latent_mean, c.latent_std).to(device)

# -------------------------------------------------------------------------------------------------
# the port

def port_settings(c):
    """What its functions read of its Config."""
    return SimpleNamespace(
        optimizer='muon', weight_decay=0.0, adam_b1=0.9, adam_b2=0.95, grad_accum_steps=1,
        ema_decay1=0.9999, use_bf16=True, max_length=max_length, pad_token='pad',
        label_drop_prob=0.0, time_schedule='logit_normal', num_self_cond_cfg_tokens=c.n_scale,
        t_eps=c.t_eps, self_cond_prob=c.self_cond_prob, self_cond_cfg_min=c.w_min,
        self_cond_cfg_max=c.w_max, denoiser_p_mean=c.t_mean, denoiser_p_std=c.t_std,
        denoiser_noise_scale=c.noise_scale, decoder_prob=c.decoder_prob,
        decoder_p_mean=c.decoder_mean, decoder_p_std=c.decoder_std,
        decoder_noise_scale=c.decoder_noise_scale, latent_mean=c.latent_mean,
        latent_std=c.latent_std)


def port_model(model, c, device):
    """Its ELF with the weights of ours."""
    from modules.model import ELF as PortELF
    net = PortELF(text_encoder_dim=c.latent_dim, max_length=max_length, hidden_size=c.n_embd,
                  depth=c.n_layer, num_heads=c.n_head, bottleneck_dim=c.bottleneck,
                  num_model_mode_tokens=c.n_mode, vocab_size=c.vocab_size)
    net.load_state_dict(model.to_official())
    net.to(device)
    return torch.compile(net) if device.type == 'cuda' else net


def port_optimizer(net, settings):
    """Its Muon."""
    from utils.train_utils import get_optimizer
    try:
        return get_optimizer(net, settings, 1e-4)
    except ImportError as e:
        raise UserError(f"{e}; pip install einops muon-optimizer") from None


def port_training(net, c, encoder, ids):
    """A function that does one of its training steps."""
    import train_step as port_step
    from utils.train_utils import TrainState
    B, T = ids.shape
    settings = port_settings(c)
    state = TrainState(model=net, optimizer=port_optimizer(net, settings),
                       dropout_generator=torch.Generator().manual_seed(0),
                       ema_params1=TrainState.init_ema(net))
    if what == 'loss':
        state.optimizer.step, port_step.ema_update = lambda: None, lambda *args: None
    batch = dict(input_ids=ids, encoder_attention_mask=torch.ones(B, T, T),
                 cond_seq_mask=torch.zeros(B, T), attention_mask=torch.ones(B, T))

    def port_encoder(input_ids, attention_mask, deterministic=True):
        mask = attention_mask[:, None]
        mask = mask[:, None] if mask.ndim == 3 else mask
        mask = (1 - mask) * torch.finfo(torch.float32).min
        return encoder.model(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def run():
        port_step.train_step(state, port_encoder, batch, settings)
    return run


def port_sampling(net, c, z, times, device):
    """A function that samples one batch with it."""
    from utils.generation_utils import _dlm_decode_batch, _generate_samples_single_batch
    net.eval()
    settings = port_settings(c)
    sde = SimpleNamespace(sampling_method='sde', sde_gamma=c.gamma)
    generator = torch.Generator().manual_seed(0)

    def run():
        with torch.no_grad(), autocast(device, device.type == 'cuda'):
            latent = _generate_samples_single_batch(net, generator, z.clone(), times.to(device),
                                                    None, None, settings, sde, 1, c.w)
            _dlm_decode_batch(latent, net, 1.0, settings, c.w)
    return run

# -------------------------------------------------------------------------------------------------
# ours

def our_training(model, c, encoder, ids, ns_dtype, device, ctx):
    """A function that does one of our training steps."""
    params = list(model.parameters())
    optimizer = make_optimizer(model.named_parameters(), 1e-4, getattr(torch, ns_dtype))
    ema = [p.detach().clone() for p in params]
    rows = ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def run():
        draws = draw(c, *ids.shape, generator, device)
        with ctx:
            loss, _ = compute_loss(model, *encode_rows(encoder, rows, draws, c, device), draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if what == 'train':
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema, params, 1e-4)
        optimizer.zero_grad(set_to_none=True)

    for _ in range(10 if compile else 0):       # each count of rows is a graph of its own
        run()
    return run


def our_sampling(model, c, z, times, ctx):
    """A function that samples one batch."""
    def run():
        with ctx:
            decode(model, generate(model, z, times, gamma=c.gamma, w=c.w), c.w)
    return run


def measure(variants, device):
    """{name: function} in turn, one round to warm up -> {name: seconds of each round}."""
    seconds = {name: [] for name in variants}
    for r in range(runs + 1):
        for name, run in variants.items():
            if device.type == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            if r:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == '__main__':
    configure(globals())
    disable_progress_bar()
    if not os.path.isfile(os.path.join(port, 'src', 'train_step.py')):
        raise UserError(f"port={port!r} must be a checkout of the PyTorch port")
    sys.path.insert(0, os.path.join(port, 'src'))
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    B, T, c = batch_size, max_length, MODELS[size]
    device = pick_device(device, 'auto')[0]
    model = ELF(c).to(device).train()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    net = port_model(model, c, device)
    if what == 'sample':
        model.eval()
        times = time_grid(steps, 'logit_normal', c)
        z = c.noise_scale * torch.randn(B, T, c.latent_dim, device=device)
        variants = dict(port=port_sampling(net, c, z, times, device))
    else:
        encoder, ids = make_encoder(c, device), torch.randint(3, c.vocab_size, (B, T))
        variants = dict(port=port_training(net, c, encoder, ids))
    for name in ours.split(','):
        ns_dtype, _, dtype = name.partition('/')
        bf16 = pick_device(device.type, dtype)[1]
        own, ctx = copy.deepcopy(model), autocast(device, bf16)
        compiled = compile and compile_in_place(own, device=device)
        if what == 'sample' and bf16:
            cast_blocks(own, compiled)
        if what == 'sample':
            variants[name] = our_sampling(own, c, z, times, ctx)
        else:
            variants[name] = our_training(own, c, encoder, ids, ns_dtype, device, ctx)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # as in the port's train.py; for all alike

    seconds = measure(variants, device)
    port_median = statistics.median(seconds['port'])
    for name, times_of in seconds.items():
        median = statistics.median(times_of)
        shown = name + ', compiled' * (compile and name != 'port')
        print(f"{what} {B} x {T}, {shown}: median {median:.3f} s (min {min(times_of):.3f}, "
              f"max {max(times_of):.3f}), {median / port_median:.3f} of the port's")
