"""
What ELF is: the network, its training objective, the frozen text encoder.

ELF (Embedded Language Flows, Hu et al., arXiv 2605.10938) is a diffusion language model that
stays continuous until its last step. A frozen T5 encoder turns tokens into latents x0; a
transformer learns the flow from Gaussian noise to x0; the same transformer, switched by learned
mode tokens, decodes the final latent to tokens. What is unusual:

- it predicts the clean latent (x-prediction), but is trained on the velocity that follows from it;
- it sees its own last guess x_prev beside z (self-conditioning), and guidance along that guess is
  trained in: its strength w is an input of the network, so sampling needs one pass per step;
- no adaptive norms: time, guidance strength and mode are 12 extra tokens in front of the text;
- no attention masks: padding takes part, only the loss leaves it out.

t=0 is noise, t=1 is data:
    z = t * x0 + (1 - t) * noise_scale * noise          v(x) = (x - z) / max(1 - t, t_eps)
shapes:
    B batch, T tokens, C latent width, D model width, H heads, P prefix tokens, V vocabulary
"""
import math
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from parts.checkpoint import load_weights
from parts.device import to_device
from parts.official import to_official_names
from parts.process import UserError, from_hub, one_line

# -------------------------------------------------------------------------------------------------
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
    gelu: str = 'tanh'         # of the token head; 'none' = exact, as in the Lightning reproduction
    # denoise branch
    t_mean: float = -1.5             # t = sigmoid(N(t_mean, t_std))
    t_std: float = 0.8
    t_eps: float = 0.05              # floor of 1 - t in v, caps its factor at 20
    noise_scale: float = 2.0         # of the noise at t=0; 2 * sqrt(C / 512) for other widths C
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
    pad_token: str = 'pad'           # rows are padded with 'pad' (in no loss) or 'eos' (in both)
    drop_cond_prob: float = 0.0      # share of rows that lose their condition, for CFG
    # sampling defaults of the task
    sampler: str = 'sde'
    steps: int = 32
    gamma: float = 1.5
    w: float = 3.0
    cfg: float = 1.0
    grid: str = 'logit_normal'
    by_steps: dict = field(default_factory=dict)    # what differs there, {64: {'gamma': 1.0}}

# what weights are made for; everything else a run may change
SIZES = ('n_layer', 'n_embd', 'n_head', 'vocab_size', 'latent_dim', 'bottleneck', 'n_time',
         'n_scale', 'n_mode', 'gelu')

MODELS = {
    'ELF-B': ELFConfig(),                                                   # 104,579,940 parameters
    'ELF-M': ELFConfig(n_layer=24, n_embd=1056, n_head=16, steps=64, gamma=1.0),    # 342M
    'ELF-L': ELFConfig(n_layer=32, n_embd=1280, n_head=16, steps=64, gamma=1.0),    # 652M
}

# -------------------------------------------------------------------------------------------------
# layers; modules are named as in the official PyTorch port (modules/layers.py), so its weights load

class RMSNorm(nn.RMSNorm):
    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)       # also a bfloat16 x in float32


def rope_tables(P, T, dim, device):
    """cos and sin (P+T, dim/2) of the rotary angles: the prefix at 0, the text from 0 on."""
    freqs = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    positions = (torch.arange(P + T, device=device) - P).clamp(min=0)
    angles = torch.outer(positions, freqs)
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
        qkv = self.qkv(h).view(B, N, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, H, N, D/H) each
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v)                 # no mask: all see all
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
    """Numbers (B,) to vectors (B, D): 256 sinusoids of the raw value, cosines first, an MLP."""
    def __init__(self, D):
        super().__init__()
        self.mlp_0 = nn.Linear(256, D)
        self.mlp_2 = nn.Linear(D, D)

    def forward(self, s):
        i = torch.arange(128, device=s.device)
        angles = s.float()[:, None] * torch.exp(-math.log(10000.0) / 128 * i)
        return self.mlp_2(F.silu(self.mlp_0(torch.cat((angles.cos(), angles.sin()), dim=-1))))

# -------------------------------------------------------------------------------------------------
# the network

class ELF(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.gradient_checkpointing = False     # blocks run again in the backward pass: less memory
        C, D = c.latent_dim, c.n_embd
        self.self_cond_proj = nn.Linear(2 * C, C)
        self.text_proj = nn.ModuleDict(dict(
            proj1=nn.Linear(C, c.bottleneck, bias=False), proj2=nn.Linear(c.bottleneck, D)))
        self.t_embedder = ScalarEmbedder(D)
        self.self_cond_cfg_embedder = ScalarEmbedder(D)
        self.t_emb_tokens = nn.Parameter(torch.empty(1, c.n_time, D))
        self.self_cond_cfg_tokens = nn.Parameter(torch.empty(1, c.n_scale, D))
        self.mode_tokens = nn.Parameter(torch.empty(1, c.n_mode, D))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        # two heads: to the clean latent, D -> C, and to the tokens, D -> C -> V
        self.final_layer = nn.ModuleDict(dict(norm_final=RMSNorm(D), linear=nn.Linear(D, C)))
        self.proj = nn.Linear(D, C)
        self.unembed = nn.Linear(C, c.vocab_size)
        self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        for embedder in (self.t_embedder, self.self_cond_cfg_embedder):
            nn.init.normal_(embedder.mlp_0.weight, std=0.02)
            nn.init.normal_(embedder.mlp_2.weight, std=0.02)
        for tokens in (self.t_emb_tokens, self.self_cond_cfg_tokens, self.mode_tokens):
            nn.init.normal_(tokens, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)  # the first guess is the mean of the data, 0

    def forward(self, z, x_prev, t, w, n_decode=0):
        """
        z, x_prev (B, T, C), t, w (B,); the last n_decode rows are in decode mode -> x_hat (B-n,
        T, C) of the first rows, logits (n, T, V) of the last. Either may have no row: its head
        still runs, so that every parameter has a gradient in every step (DDP waits for all).
        [modules/model.py, ELF.forward]
        """
        c, (B, T, _) = self.config, z.shape
        n = B - n_decode                                                            # denoise rows
        # both ends stay in float32 under autocast: x_hat feeds v with a factor of up to 1 /
        # t_eps, and bfloat16 logits would make ties of near-ties
        with torch.autocast(z.device.type, enabled=False):
            h = self.self_cond_proj(torch.cat((z, x_prev), dim=-1).float())         # (B, T, C)
            h = self.text_proj.proj2(self.text_proj.proj1(h))                       # (B, T, D)
            time = self.t_emb_tokens + self.t_embedder(t)[:, None]                  # (B, n_time, D)
            scale = self.self_cond_cfg_tokens + self.self_cond_cfg_embedder(w)[:, None]
            decoding = (torch.arange(B, device=z.device) >= n).float()
            mode = self.mode_tokens * decoding[:, None, None]                       # (B, n_mode, D)
            h = torch.cat((time, scale, mode, h), dim=1)                            # (B, P+T, D)
        P = h.shape[1] - T
        cos, sin = rope_tables(P, T, c.n_embd // c.n_head, z.device)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, cos, sin, use_reentrant=False)
            else:
                h = block(h, cos, sin)
        h = h[:, P:]                                                                # (B, T, D)
        with torch.autocast(z.device.type, enabled=False):
            h = h.float()
            x_hat = self.final_layer.linear(self.final_layer.norm_final(h[:n]))     # (B-n, T, C)
            logits = self.unembed(F.gelu(self.proj(h[n:]), approximate=c.gelu))     # (n, T, V)
        return x_hat, logits

    def denoise(self, z, x_prev, t, w):
        """The clean latent seen from z at t: (B, T, C), (B, T, C), (B,), (B,) -> (B, T, C)."""
        return self(z, x_prev, t, w)[0]

    def decode(self, z, w):
        """The tokens of a clean latent: (B, T, C), (B,) -> logits (B, T, V)."""
        return self(z, torch.zeros_like(z), torch.ones_like(w), w, n_decode=len(z))[1]

    @classmethod
    def from_pretrained(cls, source):
        """A file, folder or hub id -> ELF with the EMA weights, float32, eval mode. UserError."""
        path, settings, state = load_weights(source)
        with from_hub('not an ELF that this version knows', path):
            model = cls(ELFConfig(**settings))
            model.load_state_dict(state)
        return model.eval()

    def to_official(self):
        """The weights under the names and in the layouts of the official port -> state_dict."""
        return to_official_names(self.state_dict())

# -------------------------------------------------------------------------------------------------
# the objective

def velocity(x, z, t, t_eps):
    """The velocity at z and time t (broadcast) of the straight way to x; t_eps caps its factor."""
    return (x - z) / (1 - t).clamp(min=t_eps)


@dataclass
class Draws:
    """
    All that is random in a step of B rows: unit normal noises (B, T, C), lam (B, T, 1), t and w
    (B,) on the device of the latents; the three flags (B,) bool on the CPU, so that counting rows
    never waits for a GPU.
    """
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
    The random tensors of a step of B rows of T tokens, all from one CPU generator -> Draws. The
    official code tosses a coin per row; row counts by randomised rounding have the same
    expectation, less variance, and give torch.compile at most two shapes per branch.
    """
    c = config

    def count(expected):
        return math.floor(expected + torch.rand((), generator=generator).item())

    rows = torch.randperm(B, generator=generator)
    n_decode = count(c.decoder_prob * B)
    n_guess = count(c.self_cond_prob * (B - n_decode))
    is_decode, self_cond, drop_cond = torch.zeros(3, B, dtype=torch.bool)
    is_decode[rows[:n_decode]] = True
    self_cond[rows[n_decode:n_decode + n_guess]] = True
    rows = torch.randperm(B, generator=generator)
    drop_cond[rows[:count(c.drop_cond_prob * B)]] = True
    t = torch.sigmoid(torch.randn(B, generator=generator) * c.t_std + c.t_mean)
    # 1 + w is log-uniform between 1 + w_min and 1 + w_max
    ratio = (1 + c.w_max) / (1 + c.w_min)
    w = (1 + c.w_min) * ratio ** torch.rand(B, generator=generator) - 1
    # the large tensors are drawn where they are needed
    seed = torch.randint(2**62, (), generator=generator).item()
    on_device = torch.Generator(device).manual_seed(seed)

    def randn(width):
        return torch.randn(B, T, width, generator=on_device, device=device)

    lam = torch.sigmoid(randn(1) * c.decoder_std + c.decoder_mean)
    return Draws(t=to_device(t, device), noise=randn(c.latent_dim), is_decode=is_decode, lam=lam,
                 decode_noise=randn(c.latent_dim), self_cond=self_cond, w=to_device(w, device),
                 drop_cond=drop_cond)


@dataclass
class Rows:
    """Rows of a step, noised: n denoise rows, then decode rows, so that a branch is a slice."""
    n: int
    order: torch.Tensor         # which rows of the batch they are
    guess: torch.Tensor         # numbers of the denoise rows that see their own first guess
    z: torch.Tensor             # (B, T, C)
    x_prev: torch.Tensor        # (B, T, C), no guess yet
    t: torch.Tensor             # (B,), 1 in decode rows
    w: torch.Tensor             # (B,)
    x0: torch.Tensor            # (B, T, C), without dropped conditions
    held: torch.Tensor          # (B, T, 1), where denoise rows have a clean condition
    tokens: torch.Tensor        # (B, T)
    mask: torch.Tensor          # (B, T) float, positions that count


def noise_rows(c, x0, tokens, loss_mask, cond_mask, d):
    """What compute_loss is given, d being its draws -> Rows [train_step.py, train_step]."""
    order = d.is_decode.int().argsort(stable=True)              # on the CPU, as the flags
    n = int((~d.is_decode).sum())
    guess = d.self_cond[order[:n]].nonzero()[:, 0]
    order, guess, decode, drop = (to_device(x, x0.device)
                                  for x in (order, guess, d.is_decode, d.drop_cond))
    t = torch.where(decode, 1.0, d.t)
    decode, cond = decode[:, None, None], cond_mask.bool()[:, :, None]                  # (B, T, 1)
    x0 = torch.where(cond & drop[:, None, None], 0.0, x0)                               # (B, T, C)
    # denoise rows have one share of x0 and a clean condition, decode rows a share per position
    share = torch.where(decode, d.lam, d.t[:, None, None])                              # (B, T, 1)
    noise = torch.where(decode, c.decoder_noise_scale * d.decode_noise, c.noise_scale * d.noise)
    held = cond & ~decode
    z = torch.where(held, x0, share * x0 + (1 - share) * noise)                         # (B, T, C)
    x_prev = torch.where(held, x0, 0.0)
    tensors = z, x_prev, t, d.w, x0, held, tokens, loss_mask.float()
    return Rows(n, order, guess, *(x[order] for x in tensors))


def first_guess(net, r):
    """The clean latents that net sees in the rows r.guess, put into r.x_prev -> (guess, T, C)."""
    i = r.guess
    if not len(i):
        return r.z[i]       # no rows, no pass
    with torch.no_grad():
        x_u, _ = net(r.z[i], r.x_prev[i], r.t[i], r.w[i])
    r.x_prev[i] = torch.where(r.held[i], r.x0[i], x_u)
    return x_u


def compute_loss(net, x0, tokens, loss_mask, cond_mask, draws):
    """
    The training loss of ELF, a pure function of its arguments [train_step.py, train_step]. x0 (B,
    T, C) clean latents, tokens (B, T), loss_mask (B, T) positions that count (never the
    condition), cond_mask (B, T) the condition. net: an ELF, compiled or not, or DDP around it;
    called only as net(...), so that DDP sees it.
    -> loss, {'l2': mean over its positions, 'ce': likewise}, the latter detached and absent
    without rows.
    """
    c = getattr(net, 'module', net).config
    r = noise_rows(c, x0, tokens, loss_mask, cond_mask, draws)
    n, z, t, w, guess = r.n, r.z[:r.n], r.t[:r.n, None, None], r.w[r.guess], r.guess
    target = velocity(r.x0[:n], z, t, c.t_eps)                                          # (n, T, C)

    # a first guess from nothing, without gradient, only for the rows that will see one
    x_u = first_guess(net, r)                                                       # (guess, T, C)

    # the one trained pass: denoise rows say x0, decode rows name the tokens
    x_hat, logits = net(r.z, r.x_prev, r.t, r.w, n_decode=len(r.z) - n)
    v_hat = velocity(x_hat, z, t, c.t_eps)

    # guidance: the official code's guided velocity is this very pass (same input, no dropout),
    # detached
    v_u = velocity(x_u, z[guess], t[guess], c.t_eps)
    target[guess] += (1 - 1 / w)[:, None, None] * (v_hat.detach()[guess] - v_u)

    # one mean over the positions of all rows
    l2 = (v_hat - target).square().mean(dim=-1) * r.mask[:n]                            # (n, T)
    ce = cross_entropy(logits, r.tokens[n:]) * r.mask[n:]                               # (B-n, T)
    loss = (l2.sum() + ce.sum()) / r.mask.sum().clamp(min=1)
    parts = {}
    for name, losses, mask in (('l2', l2, r.mask[:n]), ('ce', ce, r.mask[n:])):
        if len(mask):
            parts[name] = losses.detach().sum() / mask.sum().clamp(min=1)
    return loss, parts


def cross_entropy(logits, tokens):
    """Of each position, in nats: (n, T, V), (n, T) -> (n, T)."""
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction='none')
    return losses.view_as(tokens)

# -------------------------------------------------------------------------------------------------
# the frozen text encoder

class TextEncoder(nn.Module):
    """
    A text encoder that transformers knows, hub id or folder, frozen, float32; latent_dim is its
    width C. Families of T5 and BERT, the encoders of sequence-to-sequence models, and decoders,
    which stay causal. UserError for a model whose attention cannot be told who sees whom.
    """
    def __init__(self, name, latent_mean=0.0, latent_std=1.0):
        super().__init__()
        import transformers as hf
        hf.logging.disable_progress_bar()       # of the loading of a few tensors
        with from_hub("no text encoder", name):
            config = hf.AutoConfig.from_pretrained(name)
            known = type(config) in hf.MODEL_FOR_TEXT_ENCODING_MAPPING
            kind = hf.AutoModelForTextEncoding if known else hf.AutoModel
            self.model = kind.from_pretrained(name, dtype=torch.float32)
        if config.is_encoder_decoder and not known:
            self.model = self.model.get_encoder()
        self.model.eval().requires_grad_(False)
        self.latent_mean, self.latent_std = latent_mean, latent_std
        # how far a token sees in some layers, which may have configs of their own
        configs = [part.config for part in self.model.modules() if hasattr(part, 'config')]
        self.window = min(getattr(x, 'sliding_window', None) or math.inf for x in configs)
        self.try_masks(name)

    def try_masks(self, name):
        """
        Find latent_dim, and causal: whether tokens see only those before them. Under its mask a row
        without a condition must give what the model gives without one, a condition what it gives
        alone. UserError.
        """
        ids = torch.arange(3, 19).view(2, 8) % self.model.get_input_embeddings().num_embeddings
        whole, alone = self(ids[:1]), self(ids[1:, :4])
        self.latent_dim = whole.shape[-1]
        condition = torch.tensor([[0] * 8, [1] * 4 + [0] * 4])
        errors = torch.full((2,), torch.inf)
        for self.causal in (False, True):
            with suppress(Exception):       # each model that takes no such mask raises its own kind
                free, apart = self(ids, torch.ones(2, 8), condition)
                error = (free - whole).abs().mean() + (apart[:4] - alone).abs().mean()
                errors[int(self.causal)] = error.nan_to_num(torch.inf)
        # the better one: where weights are small, even the wrong one is nearly right
        self.causal = bool(errors.argmin())
        if errors.min() > 1e-4 * whole.abs().mean():
            raise UserError(f"{name} is no encoder for ELF: its attention does not take a mask of "
                            "who sees whom, which keeps conditions apart; take one like T5 or BERT")

    def train(self, mode=True):
        return self     # dropout stays off, whatever the module around it does

    @torch.no_grad()
    def forward(self, ids, valid_mask=None, cond_mask=None, drop_cond=None):
        """
        ids (B, T), valid_mask (B, T) no padding, cond_mask (B, T) the condition, drop_cond (B,)
        -> latents (B, T, C). Condition positions attend to the condition, all others to every
        valid position, or in drop_cond rows to all but the condition. Padding is never attended
        to, but gets latents. valid_mask None: all is valid. UserError for rows that are too long.
        [utils/encoder_utils.py]
        """
        T, mask = ids.shape[1], valid_mask      # the model makes its own of it
        if cond_mask is not None:
            if T > self.window:
                raise UserError(f"rows of {T} tokens with conditions are too long for this encoder,"
                                f" whose tokens see only {self.window} around them")
            query, key = cond_mask.bool()[:, :, None], cond_mask.bool()[:, None, :]
            see = valid_mask.bool()[:, None, :]
            if drop_cond is not None:
                see = see & ~(key & to_device(drop_cond, ids.device)[:, None, None])
            see = torch.where(query, key, see)                      # (B, T query, T key)
            if self.causal:
                see = see.tril()
            # additive floats in 4-D: the one form of who sees whom that is right under every
            # attention of transformers 5
            mask = torch.where(see, 0.0, torch.finfo(torch.float32).min)[:, None]
        try:
            latents = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        except (IndexError, RuntimeError) as e:         # no positions for them, no memory
            raise UserError(f"rows of {T} tokens do not fit the encoder: {one_line(e)}") from None
        return (latents.float() - self.latent_mean) / self.latent_std


def encode_rows(encoder, batch, draws, c, device):
    """A batch of get_rows -> x0, tokens, loss_mask, cond_mask on the device, for compute_loss."""
    ids, valid, cond = (to_device(a, device) for a in batch)
    # asked on the CPU, which waits for nothing; T5 makes a (B, H, T, T) of each mask
    if batch[2].any():
        x0 = encoder(ids, valid, cond, draws.drop_cond)
    else:
        x0 = encoder(ids, None if batch[1].all() else valid)
    loss_mask = ~cond if c.pad_token == 'eos' else valid & ~cond
    return x0, ids, loss_mask, cond
