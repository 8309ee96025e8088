"""
Write text: noise at t=0, a few dozen steps along the learned flow, tokens at t=1.

    python sample.py                                   # the model in out/, with its task's settings
    python sample.py --steps=64 --gamma=1.0 --trace=8   # watch the text come out of the noise
    python sample.py --html=out/page.html              # the same as a page, with a slider over t
    python sample.py --prompt="the"                    # goes on; --infill="the ___ of" fills holes
    python sample.py --init_from=embedded-language-flows/ELF-B-owt-torch --num_samples=4
    python sample.py --init_from=embedded-language-flows/ELF-B-de-en-torch --input="Guten Morgen"
"""
from configurator import UserError, configure       # first: see there

import os

import torch
from tqdm import tqdm

from parts.checkpoint import make_out_dir
from parts.data import load_tokenizer, printable, read_inputs, row_seed, write_jsonl
from parts.device import autocast, compile_in_place, pack_linears, start
from model import ELF, TextEncoder, velocity
from parts.page import (MOMENTS, can_redraw, make_frame, make_room, moments, show, write_page,
                        write_svg)
from parts.prompt import encode_inputs, read_prompt, text_ids

# -------------------------------------------------------------------------------------------------
out_dir = 'out'             # the model in its ckpt.pt (EMA); samples.jsonl is written here
init_from = ''              # instead: a published checkpoint, file, folder or hub id
num_samples = 8             # texts; with conditions, one for each of them
input = ''                  # condition of a conditional model (translation, summary)
input_file = ''             # or many: a .jsonl with 'input' (or 'source') a line
prompt = ''                 # how each text starts, for a model without conditions: not trained on
                            # prompts, it is shown them as noisy as all else
infill = ''                 # or a text with holes, "the ___ of": a token for each underscore, 3 or
                            # more; where it ends the model goes on
batch_size = 16             # rows sampled at once; changes memory and speed, not the texts
steps = -1                  # forward passes per text, -1 = the checkpoint's default, as below
sampler = ''                # 'ode'; 'sde' re-noises a little before each step, with less noise than
                            # belongs there, 'sde_exact' with as much; '' = the default
gamma = -1.0                # of the SDE: how much is re-noised, 0 = none
w = -1.0                    # self-conditioning guidance strength, trained on 0.5 to 5
cfg = -1.0                  # classifier-free guidance on the condition, 1 = off
grid = ''                   # times: 'logit_normal' (random, as trained), 'quantile' (the same,
                            # without chance), 'uniform'
seed = 1337                 # text i depends on (seed, i) alone, not on batch_size
trace = 0                   # watch the texts (not in a terminal: the first) at this many moments;
                            # each costs a pass more, of at most 8 rows
html = ''                   # a page to write: the first 8 texts at 48 moments (or trace), a slider
svg = ''                    # a moving picture to write, for a README
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # 'float32' or 'bfloat16', 'auto' = bfloat16 where it is fast
compile = False             # torch.compile the network: a minute first, then faster
# -------------------------------------------------------------------------------------------------

SAMPLERS = ('ode', 'sde', 'sde_exact')
GRIDS = ('logit_normal', 'quantile', 'uniform')


def time_grid(steps, schedule, config, generator=None):
    """
    The times a sampler visits: 0, steps - 1 inner ones, 1 -> (steps+1,) float32 on the CPU.
    'logit_normal' draws them as training does [get_sampling_steps], 'quantile' takes the
    quantiles of that distribution, 'uniform' even spaces.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: at least 1 is needed")
    if schedule == 'uniform':
        return torch.linspace(0, 1, steps + 1)
    if schedule == 'logit_normal':
        normal = torch.randn(steps - 1, generator=generator).sort().values
    elif schedule == 'quantile':
        normal = torch.special.ndtri(torch.arange(1, steps, dtype=torch.float64) / steps).float()
    else:
        raise UserError(f"grid={schedule!r} is not one of {', '.join(GRIDS)}")
    inner = torch.sigmoid(config.t_mean + config.t_std * normal)
    return torch.cat((torch.zeros(1), inner, torch.ones(1)))


def predict(model, z, x_prev, t, w, cfg, keep):
    """
    The clean latent seen from z (B, T, C) at t (B,), and the velocity towards it -> x, v, both
    (B, T, C). With cfg: guided away from what rows without their condition (where keep (B, T, 1)
    is) would see.
    """
    t_eps = model.config.t_eps
    if cfg == 1:
        x = model.denoise(z, x_prev, t, w)
        return x, velocity(x, z, t[:, None, None], t_eps)
    z = torch.cat((z, torch.where(keep, 0.0, z)))                 # rows with and without, one batch
    x_prev = torch.cat((x_prev, torch.where(keep, 0.0, x_prev)))
    t = t.repeat(2)
    x = model.denoise(z, x_prev, t, w.repeat(2))                                        # (2B, T, C)
    v_c, v_u = velocity(x, z, t[:, None, None], t_eps).chunk(2)
    x_c, x_u = x.chunk(2)
    return x_u + cfg * (x_c - x_u), v_u + cfg * (v_c - v_u)


@torch.no_grad()
def generate(model, z, times, sampler='sde', gamma=1.5, w=3.0, cfg=1.0, cond=None, cond_mask=None,
             step_noise=None, generators=None, watch=None, noisy_cond=False):
    """
    Follow the flow from noise to data [utils/sampling_utils.py] -> final latent (B, T, C). z (B,
    T, C) initial noise, already scaled; times (steps+1,) or (B, steps+1), rising from 0 to 1; w,
    cfg numbers. cond (B, T, C), cond_mask (B, T): clean latents of the condition and where they
    stand; with noisy_cond the network sees them as noisy as all else, with fresh noise, so that it
    need not be trained on conditions. SDE noise: step_noise (steps-1, B, T, C) unit normal, else
    drawn from generators (one a row, on z's device), else from the global one. watch(i, t, z):
    called with what each step starts from, and the end.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler={sampler!r} is not one of {', '.join(SAMPLERS)}")
    c, B = model.config, len(z)
    times = times.to(z).expand(B, -1)                                                 # (B, steps+1)
    steps = times.shape[1] - 1
    keep = torch.zeros_like(z[..., :1], dtype=torch.bool)                                # (B, T, 1)
    keep = keep if cond_mask is None else cond_mask.bool()[..., None]
    cond = torch.zeros_like(z) if cond is None else cond
    w = torch.full((B,), float(w), device=z.device)
    z, x_prev = torch.where(keep, cond, z), torch.where(keep, cond, 0.0)              # no guess yet
    if noisy_cond:
        x_prev = torch.zeros_like(z)
    for i in range(steps):
        t, t_next = times[:, i], times[:, i + 1]                                            # (B,)
        if watch:
            watch(i, t, z)

        # the SDE steps back towards noise, to the time that matches; the last step is always ODE
        if sampler != 'ode' and i < steps - 1:
            noise = step_noise[i] if step_noise is not None else randn(z, generators)
            a = (1 - gamma * (t_next - t)).clamp(0, 1)
            fresh = 1 - a                           # the official weight: a lower temperature
            if sampler == 'sde_exact':              # (a (1 - t))^2 + fresh^2 = (1 - a t)^2
                fresh = ((1 - a) * (1 + a - 2 * a * t)).sqrt()
            t = a * t
            a, fresh = a[:, None, None], fresh[:, None, None]
            z = torch.where(keep, cond, a * z + fresh * c.noise_scale * noise)
        if noisy_cond:
            s, noise = t[:, None, None], c.noise_scale * randn(z, generators)
            z = torch.where(keep, s * cond + (1 - s) * noise, z)

        x, v = predict(model, z, x_prev, t, w, cfg, keep)
        z = torch.where(keep, cond, z + (t_next - t)[:, None, None] * v)
        if c.self_cond_prob:        # a network that was never shown a guess is not fed one
            x_prev = torch.where(keep, cond, x)
    if watch:
        watch(steps, times[:, -1], z)
    return z


def randn(z, generators=None):
    """Unit normal noise of z's shape, each row from its own generator, if there are any."""
    if generators is None:
        return torch.randn_like(z)
    return torch.stack([torch.randn(z.shape[1:], generator=g, device=z.device) for g in generators])


def decode_logits(model, z, w):
    """Logits (b, T, V) of a latent (B, T, C), as many rows b at a time as make a gigabyte."""
    for part in z.split(max(1, 2**28 // (z.shape[1] * model.config.vocab_size))):
        yield model.decode(part, torch.full((len(part),), float(w), device=z.device))


@torch.no_grad()
def decode_ids(model, z, w):
    """Most likely token at each position of a latent: (B, T, C) -> (B, T) int64."""
    return torch.cat([logits.argmax(-1) for logits in decode_logits(model, z, w)])


@torch.no_grad()
def decode_first(model, z, w):
    """The same of the first 8 rows at most, and how likely each token is -> ids, p, both (8, T)."""
    logits = next(decode_logits(model, z[:8], w))
    ids = logits.argmax(-1)
    return ids, logits.softmax(-1).gather(-1, ids[..., None])[..., 0]


def sample_texts(model, tokenizer, numbers, batch_size, seed, device, how, inputs=None,
                 encoder=None, watch=None, prompt=None):
    """
    The texts with these numbers -> rows {'id', 'generated', 'ids'}, with conditions 'input' too,
    one after the other. Grid, first noise and SDE noise of text i come from (seed, i) alone. how:
    resolve_sampling's settings and the grid. inputs: all conditions, by number, or prompt: what
    read_prompt gives, for all texts; encoder: the TextEncoder for them. watch(numbers, i, t,
    decode): called at each step; decode() -> of the first 8 texts at most (ids, p), two lists as
    long: what the model would say now, and how likely each token is.
    """
    c = model.config
    how = dict(how)
    steps, grid = how.pop('steps'), how.pop('grid')
    for first in range(0, len(numbers), batch_size):
        batch = numbers[first:first + batch_size]
        seeds = [row_seed(seed, i) for i in batch]
        generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        times = [time_grid(steps, grid, c, torch.Generator().manual_seed(s)) for s in seeds]
        empty = torch.empty(len(batch), c.max_length, c.latent_dim, device=device)
        z = c.noise_scale * randn(empty, generators)
        cond = mask = None
        if inputs is not None:
            cond, mask = encode_inputs([inputs[i] for i in batch], tokenizer, encoder, c, device)
        elif prompt:
            mask = prompt[1].expand(len(batch), -1).to(device)
            # what is known is all that the encoder sees
            cond = encoder(prompt[0].expand(len(batch), -1).to(device), mask, mask)

        def texts_of(ids):
            masks = [None] * len(ids) if mask is None else mask
            return [text_ids(row, m, tokenizer, c, prompt) for row, m in zip(ids.cpu(), masks)]

        def look(i, t, z):
            def decode():
                ids, p = decode_first(model, z, how['w'])
                if prompt:
                    p = p.masked_fill(mask[:len(p)], 1.0)
                return [(text, row[start:start + len(text)].tolist())
                        for (text, start), row in zip(texts_of(ids), p)]
            watch(batch, i, t, decode)

        z = generate(model, z, torch.stack(times), cond=cond, cond_mask=mask, generators=generators,
                     watch=look if watch else None, noisy_cond=bool(prompt), **how)
        for i, (ids, _) in zip(batch, texts_of(decode_ids(model, z, how['w']))):
            row = dict(id=i, generated=tokenizer.decode(ids, skip_special_tokens=True), ids=ids)
            yield row if inputs is None else dict(id=i, input=inputs[i]) | row


def load_model(init_from, out_dir):
    """The model of init_from, or of out_dir, which is never looked for on the hub. UserError."""
    if not init_from and not os.path.isdir(out_dir):
        raise UserError(f"no model in {out_dir}: train one, name its folder with --out_dir, "
                        "or a published one with --init_from=org/repo")
    return ELF.from_pretrained(init_from or out_dir)


def resolve_sampling(config, steps=-1, sampler='', gamma=-1, w=-1, cfg=-1, grid=''):
    """
    Settings where given, else what the checkpoint has for that number of steps -> dict. Below 8
    steps of which it says nothing gamma is 0: so long a step back costs more than it brings.
    """
    given = dict(steps=steps, sampler=sampler, gamma=gamma, w=w, cfg=cfg, grid=grid)
    own = {k: getattr(config, k) for k in given}
    given = {k: v for k, v in given.items() if v not in (-1, '')}
    steps = given.get('steps', own['steps'])
    if steps < min(8, own['steps']) and steps not in config.by_steps:
        own['gamma'] = 0.0
    return own | config.by_steps.get(steps, {}) | given


if __name__ == '__main__':
    given = set()
    configure(globals(), given=given)
    for name, value, least in (('num_samples', num_samples, 1), ('batch_size', batch_size, 1),
                               ('seed', seed, 0), ('trace', trace, 0)):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    starts = [name for name in ('input', 'input_file', 'prompt', 'infill') if name in given]
    if len(starts) > 1:
        raise UserError(f"{' and '.join(starts)} exclude each other")
    make_room('html', html)
    make_room('svg', svg)
    device, bf16, name = start(device, dtype)
    model = load_model(init_from, out_dir).to(device)
    c, source = model.config, init_from or out_dir
    inputs = encoder = known = None
    if input or input_file:
        inputs = [row['input'] for row in read_inputs(input_file)] if input_file else [input]
        num_samples = len(inputs)
    if inputs and not c.max_input_length:
        raise UserError(f"{source} is a model without conditions; drop --input and --input_file")
    if not inputs and c.max_input_length:
        raise UserError(f"{source} is a model with conditions; give --input=\"...\" "
                        "or --input_file=x.jsonl")
    how = resolve_sampling(c, steps, sampler, gamma, w, cfg, grid)
    tokenizer = load_tokenizer(c.tokenizer, c.vocab_size)
    if given & {'prompt', 'infill'}:
        known = read_prompt(prompt or infill, 'infill' in given, tokenizer, c)
        if how['cfg'] != 1:
            raise UserError(f"cfg={how['cfg']}: a prompt is no condition to guide with; drop it")
        print(f"prompt: {known[1].sum()} of {c.max_length} tokens are given")
    if inputs or known:
        encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
    make_out_dir(out_dir)
    print(f"device: {name}")
    print("sampling: " + ', '.join(f'{k}={v}' for k, v in how.items()) + f", length {c.max_length}")
    if not compile or not compile_in_place(model, device=device):
        pack_linears(model, bf16)

    frames = []
    watched = moments(how['steps'], trace or (MOMENTS if html or svg else 0))

    def look(numbers, i, t, decode):
        if numbers[0] == 0 and i in watched:
            frames.append(make_frame(i, t, decode(), tokenizer))
            if trace:
                show(frames, how['steps'])

    rows, quiet = [], True if trace and can_redraw() else None
    with autocast(device, bf16), tqdm(total=num_samples, desc='texts', disable=quiet) as bar:
        for row in sample_texts(model, tokenizer, range(num_samples), batch_size, seed, device, how,
                                inputs, encoder, look, known):
            rows.append(row)
            bar.update()
    for row in rows:
        print(f"--- {row['id']}", *map(printable, row['generated'].split('\n')), sep='\n')
    file = os.path.join(out_dir, 'samples.jsonl')
    write_jsonl(file, rows)
    print(f"{len(rows)} texts in {file}")
    if html:
        nfe = how['steps'] * (1 if how['cfg'] == 1 else 2)
        facts = dict(model=source, seed=seed, device=name, texts=len(rows), length=c.max_length)
        if known:
            facts['prompt'] = prompt or infill
        write_page(html, frames, facts | how | {'NFE (passes per text)': nfe})
        print(f"page: {html}")
    if svg:
        write_svg(svg, frames)
        print(f"picture: {svg}")
