"""
What ELF is: the network, its training objective, the frozen text encoder, and published weights.

ELF (Embedded Language Flows, Hu et al., arXiv 2605.10938) is a diffusion language model that stays continuous until
its last step. A frozen T5 encoder turns tokens into latents x0; a transformer learns the flow from Gaussian noise to
x0; the same transformer, switched by learned mode tokens, decodes the final latent to tokens. What is unusual:

- it predicts the clean latent (x-prediction), but is trained on the velocity that follows from it;
- it sees its own last guess x_prev beside z (self-conditioning), and guidance along that guess is trained in: its
  strength w is an input of the network, so sampling needs one forward pass per step;
- no adaptive norms: time, guidance strength and mode are 12 extra tokens in front of the text;
- no attention masks: fill positions take part, only the loss leaves them out.

t=0 is noise, t=1 is data:  z = t * x0 + (1 - t) * noise_scale * noise,   v(x) = (x - z) / max(1 - t, t_eps)
shapes: B batch, T tokens, C latent width, D model width, H heads, P prefix tokens, V vocabulary
"""
import math
import os
import re
import zipfile
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError

# ---------------------------------------------------------------------------------------------------------------------
# settings: all that rebuilds a model and its task, so that a checkpoint needs no train.py

@dataclass
class ELFConfig:
    # sizes
    n_layer: int = 12
    n_embd: int = 768                # D
    n_head: int = 12                 # H
    vocab_size: int = 32100          # V
    latent_dim: int = 512            # C, the encoder's width
    bottleneck: int = 128            # latents enter the network through this width
    n_time: int = 4                  # prefix tokens that carry t
    n_scale: int = 4                 # prefix tokens that carry w
    n_mode: int = 4                  # prefix tokens that are on in decode mode
    # denoise branch
    t_mean: float = -1.5             # t = sigmoid(N(t_mean, t_std))
    t_std: float = 0.8
    t_eps: float = 0.05              # floor of 1 - t in v, caps its factor at 20
    noise_scale: float = 2.0         # of the noise at t=0; belongs to the latent width, see config/demo.py
    self_cond_prob: float = 0.5      # share of the denoise rows that see their own first guess
    w_min: float = 0.5               # 1 + w is log-uniform between 1 + w_min and 1 + w_max
    w_max: float = 5.0
    # decode branch
    decoder_prob: float = 0.2        # share of rows trained on tokens
    decoder_mean: float = 0.8        # lam = sigmoid(N(decoder_mean, decoder_std)), one per position
    decoder_std: float = 0.8
    decoder_noise_scale: float = 5.0
    # text
    encoder: str = 't5-small'        # hub id or folder
    tokenizer: str = 't5-small'
    latent_mean: float = 0.0         # x0 = (encoder output - latent_mean) / latent_std
    latent_std: float = 0.2
    max_length: int = 1024           # T
    max_input_length: int = 0        # condition tokens kept, 0 = unconditional
    pad_token: str = 'pad'           # rows are filled with this token, 'pad' (in no loss) or 'eos' (in both)
    drop_cond_prob: float = 0.0      # share of rows that lose their condition, for CFG
    # sampling defaults of the task
    sampler: str = 'sde'
    steps: int = 32
    gamma: float = 1.5
    w: float = 3.0
    cfg: float = 1.0

MODELS = {
    'ELF-B': ELFConfig(),                                                             # 104,579,940 parameters
    'ELF-M': ELFConfig(n_layer=24, n_embd=1056, n_head=16, steps=64, gamma=1.0),      # 342M
    'ELF-L': ELFConfig(n_layer=32, n_embd=1280, n_head=16, steps=64, gamma=1.0),      # 652M
}

# ---------------------------------------------------------------------------------------------------------------------
# layers; module names are those of the official PyTorch port (modules/layers.py), so its weights load by name

class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=1e-6).to(x.dtype)


def rope_tables(P, T, dim, device):
    """cos and sin (P+T, dim/2) of the rotary angles; prefix tokens are not rotated, the text counts from 0."""
    freqs = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(T, device=device, dtype=torch.float32), freqs)
    angles = F.pad(angles, (0, 0, P, 0))
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[2i], x[2i+1]) of x (B, H, N, D/H) by its angle."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.q_norm = RMSNorm(c.n_embd // c.n_head)
        self.k_norm = RMSNorm(c.n_embd // c.n_head)
        self.proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, h, cos, sin):
        B, N, D = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)     # (B, H, N, D/H) each
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v)                                     # no mask: all see all
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden = int(4 * c.n_embd * 2 / 3)
        self.w12 = nn.Linear(c.n_embd, 2 * hidden)
        self.w3 = nn.Linear(hidden, c.n_embd)

    def forward(self, h):
        gate, value = self.w12(h).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = RMSNorm(c.n_embd)
        self.attn = Attention(c)
        self.norm2 = RMSNorm(c.n_embd)
        self.mlp = SwiGLU(c)

    def forward(self, h, cos, sin):
        h = h + self.attn(self.norm1(h), cos, sin)
        return h + self.mlp(self.norm2(h))


class ScalarEmbedder(nn.Module):
    """A number (B,) to a vector (B, D): 256 sinusoids of the raw value, cosines first, then an MLP."""
    def __init__(self, D):
        super().__init__()
        self.mlp_0 = nn.Linear(256, D)
        self.mlp_2 = nn.Linear(D, D)

    def forward(self, s):
        freqs = torch.exp(-math.log(10000.0) / 128 * torch.arange(128, device=s.device, dtype=torch.float32))
        angles = s.float()[:, None] * freqs
        return self.mlp_2(F.silu(self.mlp_0(torch.cat((angles.cos(), angles.sin()), dim=-1))))

# ---------------------------------------------------------------------------------------------------------------------
# the network

class ELF(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.recompute = False      # activations of the blocks in the backward pass: a forward more, far less memory
        C, D = c.latent_dim, c.n_embd
        if D % c.n_head or D // c.n_head % 2:
            raise UserError(f"n_embd={D} does not split into n_head={c.n_head} heads of even width; change one of them")
        self.self_cond_proj = nn.Linear(2 * C, C)
        self.text_proj = nn.ModuleDict(dict(proj1=nn.Linear(C, c.bottleneck, bias=False), proj2=nn.Linear(c.bottleneck, D)))
        self.t_embedder = ScalarEmbedder(D)
        self.self_cond_cfg_embedder = ScalarEmbedder(D)
        self.t_emb_tokens = nn.Parameter(torch.empty(1, c.n_time, D))
        self.self_cond_cfg_tokens = nn.Parameter(torch.empty(1, c.n_scale, D))
        self.mode_tokens = nn.Parameter(torch.empty(1, c.n_mode, D))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.final_layer = nn.ModuleDict(dict(norm_final=RMSNorm(D), linear=nn.Linear(D, C)))
        self.proj = nn.Linear(D, C)
        self.unembed = nn.Linear(C, c.vocab_size)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in (self.t_embedder, self.self_cond_cfg_embedder):
            nn.init.normal_(embedder.mlp_0.weight, std=0.02)
            nn.init.normal_(embedder.mlp_2.weight, std=0.02)
        for tokens in (self.t_emb_tokens, self.self_cond_cfg_tokens, self.mode_tokens):
            nn.init.normal_(tokens, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)      # the first guess is the mean of the data, 0

    def forward(self, z, x_prev, t, w, n_decode=0):
        """
        z, x_prev (B, T, C), t, w (B,); the last n_decode rows are in decode mode.
        -> x_hat (B-n, T, C) of the first rows, logits (n, T, V) of the last. Either may have no row: its head still
        runs, so that every parameter has a gradient in every step (DDP waits for all). [modules/model.py, ELF.forward]
        """
        B, T, _ = z.shape
        m = B - n_decode
        # all that x_hat goes through at the ends stays in float32 under autocast: it feeds v with a factor of up to 1 / t_eps
        with torch.autocast(z.device.type, enabled=False):
            h = self.self_cond_proj(torch.cat((z, x_prev), dim=-1).float())                 # (B, T, C)
            h = self.text_proj.proj2(self.text_proj.proj1(h))                               # (B, T, D)
            time = self.t_emb_tokens + self.t_embedder(t)[:, None]                          # (B, n_time, D)
            scale = self.self_cond_cfg_tokens + self.self_cond_cfg_embedder(w)[:, None]     # (B, n_scale, D)
            decoding = (torch.arange(B, device=z.device) >= m).float()[:, None, None]
            mode = self.mode_tokens * decoding                                              # (B, n_mode, D)
            h = torch.cat((time, scale, mode, h), dim=1)                                    # (B, P+T, D)
        P = h.shape[1] - T
        cos, sin = rope_tables(P, T, self.config.n_embd // self.config.n_head, z.device)
        for block in self.blocks:
            h = checkpoint(block, h, cos, sin, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else block(h, cos, sin)
        h = h[:, P:]                                                                        # (B, T, D)
        with torch.autocast(z.device.type, enabled=False):
            x_hat = self.final_layer.linear(self.final_layer.norm_final(h[:m].float()))     # (B-n, T, C)
        logits = self.unembed(F.gelu(self.proj(h[m:]), approximate='tanh'))                 # (n, T, V)
        return x_hat, logits

    def denoise(self, z, x_prev, t, w):
        """The clean latent as seen from z at time t: (B, T, C), (B, T, C), (B,), (B,) -> x_hat (B, T, C)."""
        return self(z, x_prev, t, w)[0]

    def decode(self, z, w):
        """The tokens of a clean latent: (B, T, C), (B,) -> logits (B, T, V)."""
        return self(z, torch.zeros_like(z), torch.ones_like(w), w, n_decode=len(z))[1]

    @classmethod
    def from_pretrained(cls, source):
        """
        Path of a checkpoint file, a folder with one, or a hub id (org/repo or org/repo/path/inside) -> ELF with the
        EMA weights, float32, eval mode. Sizes come from the weights; the rest from our own checkpoint, or from the
        official config.yml beside it, else the published OpenWebText settings, said aloud. UserError if it does not fit.
        """
        path = find_checkpoint(source)
        ckpt = load_checkpoint(path)
        state = next((ckpt[k] for k in ('ema', 'ema_params1', 'params') if isinstance(ckpt.get(k), dict)), ckpt)
        state = {re.sub(r'^(_orig_mod\.|module\.)+', '', str(k)): v for k, v in state.items() if isinstance(v, torch.Tensor)}
        ours = {official: name for name, official in KERNELS.items()}
        state = {ours.get(k, k): v.T if k in ours and v.ndim == 2 else v for k, v in state.items()}
        try:
            D, width = state['t_emb_tokens'].shape[-1], state['blocks.0.attn.q_norm.weight'].numel()
            sizes = dict(n_embd=D, n_layer=1 + max(int(k.split('.')[1]) for k in state if k.startswith('blocks.')),
                         n_head=1 if D % width else D // width, vocab_size=len(state['unembed.bias']),
                         latent_dim=len(state['self_cond_proj.bias']), bottleneck=len(state['text_proj.proj1.weight']),
                         n_time=state['t_emb_tokens'].shape[1], n_scale=state['self_cond_cfg_tokens'].shape[1],
                         n_mode=state['mode_tokens'].shape[1])
        except (KeyError, ValueError, IndexError, AttributeError, ZeroDivisionError) as e:
            raise UserError(f"{path} holds no ELF weights: {type(e).__name__} {e} while reading the sizes off them; "
                            f"it has {', '.join(map(str, list(state)[:5]))}, ...") from None
        settings = ckpt.get('model_args') or read_config_yml(path, sizes)
        if unknown := settings.keys() - ELFConfig.__dataclass_fields__.keys():
            raise UserError(f"{path} has settings that this code does not know: {', '.join(sorted(unknown))}; was it written by a later version?")
        model = cls(ELFConfig(**{**settings, **sizes}))
        want = {k: v.shape for k, v in model.state_dict().items()}
        wrong = [f"missing {k}" for k in want.keys() - state.keys()] + [f"left over {k}" for k in state.keys() - want.keys()]
        wrong += [f"{k} is {tuple(state[k].shape)}, expected {tuple(want[k])}" for k in want.keys() & state.keys() if state[k].shape != want[k]]
        if wrong:
            raise UserError(f"{path} does not fit an ELF of its sizes: {'; '.join(sorted(wrong))}")
        model.load_state_dict(state)
        return model.eval()

    def to_official(self):
        """The weights under the names and in the layouts of the official PyTorch port -> dict of tensors."""
        return {KERNELS.get(k, k): v.detach().T.clone() if k in KERNELS and v.ndim == 2 else v.detach().clone()
                for k, v in self.state_dict().items()}

# ---------------------------------------------------------------------------------------------------------------------
# the objective

@dataclass
class Draws:
    """All that is random in one step. Unit normal noises (B, T, C), lam (B, T, 1), t and w (B,) on the device of the
    latents; the three flags (B,) bool on the CPU, so that counting rows never waits for the GPU."""
    t: torch.Tensor
    noise: torch.Tensor
    is_decode: torch.Tensor
    lam: torch.Tensor
    decode_noise: torch.Tensor
    self_cond: torch.Tensor
    w: torch.Tensor
    drop_cond: torch.Tensor


def draw(config, B, T, generator, device):
    """
    The random tensors of a step of B rows of T tokens, all from one CPU generator -> Draws.
    The official code tosses a coin per row; row counts fixed by randomised rounding have the same expectation, less
    variance, and give torch.compile at most two shapes per branch.
    """
    c = config
    rand = lambda: torch.rand((), generator=generator).item()
    perm = torch.randperm(B, generator=generator)
    n = math.floor(c.decoder_prob * B + rand())
    s = math.floor(c.self_cond_prob * (B - n) + rand())
    is_decode, self_cond, drop_cond = (torch.zeros(B, dtype=torch.bool) for _ in range(3))
    is_decode[perm[:n]] = True
    self_cond[perm[n:n + s]] = True
    drop_cond[torch.randperm(B, generator=generator)[:math.floor(c.drop_cond_prob * B + rand())]] = True
    t = torch.sigmoid(torch.randn(B, generator=generator) * c.t_std + c.t_mean)
    w = (1 + c.w_min) * ((1 + c.w_max) / (1 + c.w_min)) ** torch.rand(B, generator=generator) - 1
    big = torch.Generator(device).manual_seed(torch.randint(2**62, (), generator=generator).item())
    randn = lambda width: torch.randn(B, T, width, generator=big, device=device)
    lam = torch.sigmoid(randn(1) * c.decoder_std + c.decoder_mean)
    there = lambda x: x.to(device, non_blocking=True)
    return Draws(there(t), randn(c.latent_dim), is_decode, lam, randn(c.latent_dim), self_cond, there(w), drop_cond)


def compute_loss(net, x0, tokens, loss_mask, cond_mask, draws):
    """
    The training loss of ELF, a pure function of its arguments [train_step.py, train_step].
    x0 (B, T, C) clean latents, tokens (B, T), loss_mask (B, T) positions that count (never the condition), cond_mask
    (B, T) the condition. net: an ELF, compiled or not, or DDP around it; called only as net(...), so that DDP sees it.
    -> loss, {'l2': mean over its positions, 'ce': likewise}, the latter detached and absent without rows.
    """
    c, d, device = getattr(net, 'module', net).config, draws, x0.device
    B, n = len(x0), int(d.is_decode.sum())
    m = B - n
    # denoise rows first, decode rows last; copies to the GPU do not wait for it
    order = torch.argsort(d.is_decode.int(), stable=True)
    there = lambda x: x.to(device, non_blocking=True)
    sc = there(d.self_cond[order[:m]].nonzero()[:, 0])              # the self-conditioned among the first m rows
    rows, drop = there(order), there(d.drop_cond)[:, None, None]
    cond = cond_mask.bool()[:, :, None]                                                     # (B, T, 1)
    x0 = torch.where(cond & drop, 0.0, x0)[rows]                                            # (B, T, C)
    tokens, mask, cond, t, w = tokens[rows], loss_mask[rows].float(), cond[rows], d.t[rows], d.w[rows]
    first, last = rows[:m], rows[m:]

    # noise the denoise rows and keep their condition clean; corrupt the decode rows everywhere
    t_m, x0_m, cond_m = t[:m, None, None], x0[:m], cond[:m]
    z_m = torch.where(cond_m, x0_m, t_m * x0_m + (1 - t_m) * c.noise_scale * d.noise[first])            # (m, T, C)
    z_n = d.lam[last] * x0[m:] + (1 - d.lam[last]) * c.decoder_noise_scale * d.decode_noise[last]       # (n, T, C)
    v = lambda x, z, t: (x - z) / (1 - t).clamp(min=c.t_eps)
    target = v(x0_m, z_m, t_m)                                                                          # (m, T, C)

    # a first guess from nothing, without gradient, only for the rows that will see one
    x_prev = torch.where(cond_m, x0_m, 0.0)                                                             # (m, T, C)
    if len(sc):
        with torch.no_grad():
            x_u, _ = net(z_m[sc], x_prev[sc], t[sc], w[sc])                                             # (s, T, C)
        x_prev[sc] = torch.where(cond_m[sc], x0_m[sc], x_u)

    # the one trained pass; its own velocity, detached, is the guided one of the official code (same input, no dropout)
    x_hat, logits = net(torch.cat((z_m, z_n)), torch.cat((x_prev, torch.zeros_like(z_n))),
                        torch.cat((t[:m], torch.ones_like(t[m:]))), w, n_decode=n)          # (m, T, C), (n, T, V)
    v_hat = v(x_hat, z_m, t_m)
    if len(sc):
        strength = (1 - 1 / w[sc])[:, None, None]
        target[sc] += strength * (v_hat.detach()[sc] - v(x_u, z_m[sc], t_m[sc]))

    l2 = (v_hat - target).square().mean(dim=-1) * mask[:m]                                              # (m, T)
    ce = F.cross_entropy(logits.float().flatten(0, 1), tokens[m:].flatten(), reduction='none').view_as(tokens[m:]) * mask[m:]
    loss = (l2.sum() + ce.sum()) / mask.sum().clamp(min=1)          # one mean over the positions of all rows
    parts = {}
    if m:
        parts['l2'] = l2.detach().sum() / mask[:m].sum().clamp(min=1)
    if n:
        parts['ce'] = ce.detach().sum() / mask[m:].sum().clamp(min=1)
    return loss, parts


def estimate_flops(config, T):
    """Floating-point operations of one training row of T tokens, on average over the branches; the encoder excluded."""
    c = config
    N = T + c.n_time + c.n_scale + c.n_mode
    block = 2 * N * (4 * c.n_embd**2 + 3 * c.n_embd * int(4 * c.n_embd * 2 / 3)) + 4 * N * N * c.n_embd
    ends = 2 * T * (2 * c.latent_dim**2 + c.bottleneck * (c.latent_dim + c.n_embd))
    x_head, token_head = 2 * T * c.n_embd * c.latent_dim, 2 * T * c.latent_dim * (c.n_embd + c.vocab_size)
    forward = c.n_layer * block + ends
    denoise = (3 + c.self_cond_prob) * (forward + x_head)           # backward costs two forwards
    return (1 - c.decoder_prob) * denoise + c.decoder_prob * 3 * (forward + token_head)

# ---------------------------------------------------------------------------------------------------------------------
# the frozen text encoder

class TextEncoder(nn.Module):
    """A T5-family encoder from a hub id or folder, frozen, float32, in eval mode; latent_dim is its width C."""
    def __init__(self, name, latent_mean=0.0, latent_std=1.0):
        super().__init__()
        from transformers import AutoModelForTextEncoding
        from transformers.utils import logging
        logging.disable_progress_bar()      # of the loading of a few tensors
        try:
            self.model = AutoModelForTextEncoding.from_pretrained(name, dtype=torch.float32)
        except Exception as e:      # the hub's clients have a dozen kinds
            raise UserError(f"no text encoder (a T5-family model): {hub_error(name, e)}") from None
        self.model.eval().requires_grad_(False)
        self.latent_mean, self.latent_std, self.latent_dim = latent_mean, latent_std, self.model.config.d_model

    def train(self, mode=True):
        return self     # dropout stays off, whatever the module around it does

    @torch.no_grad()
    def forward(self, ids, valid_mask, cond_mask=None, drop_cond=None):
        """
        ids (B, T), valid_mask (B, T) no fill, cond_mask (B, T) the condition, drop_cond (B,) -> latents (B, T, C).
        Condition positions attend to the condition, all others to every valid position, or in drop_cond rows to all
        but the condition. Fill is never attended to, but gets latents. [utils/encoder_utils.py]
        """
        see = valid_mask.bool()[:, None, :].expand(-1, ids.shape[1], -1)                    # (B, T query, T key)
        if cond_mask is not None:
            query, key = cond_mask.bool()[:, :, None], cond_mask.bool()[:, None, :]
            see = torch.where(query, key, see)
            if drop_cond is not None:
                see = see & ~(drop_cond.to(ids.device, non_blocking=True)[:, None, None] & ~query & key)
        # additive floats in 4-D: the one form that is right under every attention implementation of transformers 5
        mask = torch.zeros(see.shape, device=ids.device).masked_fill_(~see, torch.finfo(torch.float32).min)
        latents = self.model(input_ids=ids, attention_mask=mask[:, None]).last_hidden_state
        return (latents.float() - self.latent_mean) / self.latent_std

# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

# two matrices that the official code keeps as (in, out); ours are Linear layers, so that Muon sees every matrix as (out, in)
KERNELS = {'proj.weight': 'proj_kernel', 'proj.bias': 'proj_bias', 'unembed.weight': 'unembed_kernel', 'unembed.bias': 'unembed_bias'}

# official config.yml -> ELFConfig
OFFICIAL = dict(denoiser_p_mean='t_mean', denoiser_p_std='t_std', denoiser_noise_scale='noise_scale', t_eps='t_eps',
                decoder_prob='decoder_prob', decoder_p_mean='decoder_mean', decoder_p_std='decoder_std',
                decoder_noise_scale='decoder_noise_scale', self_cond_prob='self_cond_prob', self_cond_cfg_min='w_min',
                self_cond_cfg_max='w_max', label_drop_prob='drop_cond_prob', encoder_model_name='encoder',
                latent_mean='latent_mean', latent_std='latent_std', max_length='max_length',
                max_input_length='max_input_length', pad_token='pad_token',
                tokenizer_name='tokenizer', sampler='sampler', steps='steps', gamma='gamma', w='w', cfg='cfg')    # the last five are ours


def find_checkpoint(source):
    """File, folder or hub id[/path inside] -> path of the weights here: the largest checkpoint_<step>, else ckpt.pt,
    else ckpt_prev.pt, else *.safetensors. Local paths come first; from the hub only this file and its config.yml are fetched."""
    def best(names):
        steps = [n for n in names if re.fullmatch(r'checkpoint_\d+', os.path.basename(n))]
        if steps:
            return max(steps, key=lambda n: int(n.rsplit('_', 1)[1]))
        kinds = (r'(.*/)?ckpt\.pt', r'(.*/)?ckpt_prev\.pt', r'.*\.safetensors')      # not old_ckpt.pt, of a run that was overwritten
        return next((n for kind in kinds for n in sorted(names) if re.fullmatch(kind, n)), None)
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        name = best([n for n in os.listdir(source) if os.path.isfile(os.path.join(source, n))])
        if name is None:
            raise UserError(f"no checkpoint in {source}: expected checkpoint_<step>, ckpt.pt or a .safetensors file")
        return os.path.join(source, name)
    parts = source.split('/')
    if len(parts) < 2 or not all(parts) or source[0] in './~':
        raise UserError(f"{source!r} is no file or folder here, and no hub id (org/repo); nothing to load")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    repo, inside, refused = '/'.join(parts[:2]), '/'.join(parts[2:]), None
    try:
        try:
            names = [f.rfilename for f in HfApi().model_info(repo).siblings]
        except Exception as e:      # no network: what the cache has of it, if anything; [] asks for no file, only for the folder
            refused, here = e, snapshot_download(repo, allow_patterns=[], local_files_only=True)
            names = [os.path.relpath(os.path.join(at, f), here).replace(os.sep, '/') for at, _, fs in os.walk(here) for f in fs]
        name = best([n for n in names if not inside or n == inside or n.startswith(inside + '/')])
        if name is None:
            raise refused or UserError(f"no checkpoint in hub repository {source}: expected checkpoint_<step>, ckpt.pt or a .safetensors file")
        beside = os.path.join(os.path.dirname(name), 'config.yml')
        if beside in names:
            hf_hub_download(repo, beside)
        return hf_hub_download(repo, name)
    except UserError:
        raise
    except Exception as e:      # the hub client has a dozen kinds
        raise UserError(hub_error(source, refused or e)) from None


def hub_error(source, e):
    """What huggingface_hub, transformers or datasets raised while they fetched source -> one line: what is wrong, what to do."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx
    chain = [e]
    while chain[-1].__cause__ or chain[-1].__context__:     # transformers wraps the hub's errors in OSError
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    seen = lambda *kinds: any(isinstance(x, kinds) for x in chain)
    reason = f"{type(e).__name__}: {(str(e).strip() or '?').splitlines()[0]}"
    if os.path.exists(source):
        return f"{source!r} is not usable: {reason}"
    if seen(errors.GatedRepoError):
        return f"{source!r} is gated: accept the terms on its page on the hub, then: hf auth login"
    if seen(errors.RepositoryNotFoundError, errors.HFValidationError):
        return f"{source!r} is neither a folder nor a file here, nor on the hub; check the spelling; if it is private: hf auth login"
    if any(getattr(getattr(x, 'response', None), 'status_code', 0) in (401, 403) for x in chain):
        return f"the hub refuses {source!r} to your token; renew it: hf auth login, or do without: hf auth logout"
    if seen(httpx.RemoteProtocolError) or 'Consistency check failed' in str(chain):
        return f"the download of {source!r} broke off; run again, nothing incomplete was kept"
    if constants.is_offline_mode() and seen(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        return f"{source!r} is no path here and not in the cache, and HF_HUB_OFFLINE is set; unset it once to download"
    if seen(httpx.TransportError, errors.LocalEntryNotFoundError):
        return f"{source!r} is no path here and not in the cache, and the hub cannot be reached; connect once to download"
    return f"{source!r} is no path here, and the hub did not give it: {reason}"


def load_checkpoint(path):
    """The dict in a checkpoint file, tensors and plain types only: a pickle with code in it is refused. UserError if unreadable."""
    try:
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):        # torch.load does not check its own files, and reads noise where one bit says "folder"
            with zipfile.ZipFile(path) as z:
                damaged = next((i.filename for i in z.infolist() if i.compress_type or i.external_attr or i.file_size != i.compress_size), None) or z.testzip()
                if damaged:
                    raise ValueError(f"{damaged} in it is damaged (checksum)")
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:      # unpickling a damaged file can raise nearly anything
        # torch's own message goes on to advise how to run it
        called = re.search(r'GLOBAL (\S+)', str(e))
        reason = f"it would run {called[1]}" if called else f"{type(e).__name__} {e}".splitlines()[0].split('. ')[0]
        raise UserError(f"{path} is not a readable checkpoint (only tensors and plain types are loaded): {reason}") from None
    if not isinstance(ckpt, dict):
        raise UserError(f"{path} holds a {type(ckpt).__name__}, not a dict of weights")
    return ckpt


def read_config_yml(path, sizes):
    """Settings in the official config.yml beside a checkpoint -> dict for ELFConfig; the published ones when there is none."""
    preset = next((k for k, p in MODELS.items() if (p.n_layer, p.n_embd) == (sizes['n_layer'], sizes['n_embd'])), None)
    settings = {k: getattr(MODELS[preset or 'ELF-B'], k) for k in ('steps', 'gamma')}
    file = os.path.join(os.path.dirname(path), 'config.yml')
    if not os.path.exists(file):
        print(f"no config.yml beside {path}: taking the published OpenWebText settings")
        return settings
    import yaml
    types = {f.name: f.type for f in fields(ELFConfig)}
    try:
        with open(file) as f:
            official = yaml.safe_load(f) or {}
        if official.get('max_input_length'):        # De-En and XSum: the published sampling settings of the conditional tasks
            settings |= dict(sampler='ode', steps=64, gamma=0.0, w=1.0, cfg=2.0)
        settings |= {ours: types[ours](official[k]) for k, ours in OFFICIAL.items() if official.get(k) is not None}
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is not readable as the official settings: {' '.join(str(e).split())}") from None
    if official.get('model', preset) != preset:
        print(f"{file} says {official['model']}, the weights have n_layer={sizes['n_layer']}, n_embd={sizes['n_embd']}; going by the weights")
    settings.setdefault('tokenizer', settings.get('encoder', ELFConfig.tokenizer))
    return settings
