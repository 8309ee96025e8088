"""
Write text: noise at t=0, a few dozen steps along the learned flow, tokens at t=1.

    python sample.py                                   # the model in out/, with its task's settings
    python sample.py --steps=64 --gamma=1.0 --trace=8   # watch the text come out of the noise
    python sample.py --html=out/page.html              # the same as a page, with a slider over t
    python sample.py --prompt="the ___ of"             # fills the holes, and goes on
    python sample.py --init_from=embedded-language-flows/ELF-B-owt-torch --num_samples=4
    python sample.py --init_from=embedded-language-flows/ELF-B-de-en-torch --input="Guten Morgen"
"""
from configurator import UserError, configure       # before torch: see there

import os
from functools import partial
from operator import itemgetter

import torch
from tqdm import tqdm

from model import ELF, TextEncoder, velocity
from parts.checkpoint import make_out_dir
from parts.data import add_lines, batched, load_tokenizer, printable, row_seed
from parts.device import (DTYPES, autocast, cast_blocks, compile_in_place, gather,
                          rank_and_world, start)
from parts.page import make_frame, moments, show, write_page
from parts.prompt import encode_given, known_tokens, read_tasks, texts_in

# -------------------------------------------------------------------------------------------------
out_dir = 'out'             # the model in its ckpt.pt (EMA); samples.jsonl is written here
init_from = ''              # instead: a published checkpoint, file, folder or hub id
num_samples = 0             # texts, 0 = 8, or one for each condition
input = ''                  # condition of a conditional model (a text to translate, a number ...)
input_file = ''             # or many: a .jsonl with 'input' (or 'source') a line, perhaps 'target'
prompt = ''                 # how each text starts, for a model without conditions: not trained on
                            # prompts, it is shown them as noisy as all else. "the ___ of": a hole,
                            # three or more underscores, is filled with a token for each of them
batch_size = 16             # rows sampled at once; changes no text in float32, few in bfloat16
steps = -1                  # forward passes per text, -1 = the checkpoint's default, as below
sampler = ''                # 'ode'; 'sde' re-noises a little before each step, with less noise than
                            # belongs there, 'sde_exact' with as much; '' = the default
gamma = -1.0                # of the SDE: how much is re-noised, 0 = none
w = -1.0                    # self-conditioning guidance strength, trained on 0.5 to 5
cfg = -1.0                  # classifier-free guidance on the condition, 1 = off
grid = ''                   # times: 'logit_normal' (random, as trained), 'quantile' (the same,
                            # without chance), 'uniform'
seed = 1337                 # what is random in text i comes from (seed, i) alone
trace = 0                   # a line of the first text at each of this many moments
html = ''                   # a page to write: the first 8 texts at 48 moments (or trace), a slider;
                            # each moment costs a pass more, of at most 8 rows
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # 'float32' or 'bfloat16', 'auto' = bfloat16 where it is fast
compile = False             # torch.compile the network: a minute first, then faster
# -------------------------------------------------------------------------------------------------

SAMPLING = ('steps', 'sampler', 'gamma', 'w', 'cfg', 'grid')     # -1 or '' = as the checkpoint says
SAMPLERS = ('ode', 'sde', 'sde_exact')
GRIDS = ('logit_normal', 'quantile', 'uniform')
CHOICES = dict(sampler=('', *SAMPLERS), grid=('', *GRIDS), dtype=DTYPES)
MAY_BE_0 = ('seed',)


def time_grid(steps, schedule, config, generator=None):
    """
    The times a sampler visits: 0, steps - 1 inner ones, 1 -> (steps+1,) float32 on the CPU.
    'logit_normal' draws them as training does [get_sampling_steps], 'quantile' takes the quantiles
    of that distribution, 'uniform' even spaces.
    """
    assert schedule in GRIDS, f"grid={schedule} is not one of {GRIDS}"
    if schedule == 'uniform':
        return torch.linspace(0, 1, steps + 1)
    if schedule == 'logit_normal':
        normal = torch.randn(steps - 1, generator=generator).sort().values
    else:
        shares = torch.arange(1, steps, dtype=torch.float64) / steps
        normal = torch.special.ndtri(shares).float()
    inner = torch.sigmoid(config.t_mean + config.t_std * normal)
    return torch.cat((torch.zeros(1), inner, torch.ones(1)))


@torch.no_grad()
def generate(model, z, times, sampler='sde', gamma=1.5, w=3.0, cfg=1.0, cond=None, cond_mask=None,
             step_noise=None, generators=None, watch=None, noisy_cond=False):
    """
    Follow the flow from noise to data [utils/sampling_utils.py] -> final latent (B, T, C).

    z (B, T, C) initial noise, already scaled; times (steps+1,) or (B, steps+1), from 0 up to 1; w,
    cfg numbers. cond (B, T, C), cond_mask (B, T): clean latents of the condition and where they
    stand; with noisy_cond the network sees them as noisy as all else, with fresh noise, so that it
    need not be trained on conditions. SDE noise: step_noise (steps-1, B, T, C) unit normal, else
    drawn from generators (one a row, on z's device), else from the global one. watch(i, t, z) is
    called with what each step starts from, and with the end.
    """
    assert sampler in SAMPLERS, f"sampler={sampler} is not one of {SAMPLERS}"
    c = model.config
    B = len(z)
    times = times.to(z).expand(B, -1)[..., None, None]                          # (B, steps+1, 1, 1)
    steps = times.shape[1] - 1
    if cond is None:
        cond = z        # nowhere taken
        cond_mask = torch.zeros_like(z[..., 0])
    known = cond_mask.bool()[..., None]                                                  # (B, T, 1)
    w = z.new_full((B,), w)
    z = torch.where(known, cond, z)
    x_prev = torch.where(known & (not noisy_cond), cond, 0.0)       # no guess yet
    for i in range(steps):
        # contiguous, as a * t below is: torch.compile makes a graph of each layout of t
        t, t_next = times[:, i].contiguous(), times[:, i + 1]                           # (B, 1, 1)
        if watch:
            watch(i, t.flatten(), z)

        # the SDE steps back towards noise, to the time that matches; the last step is always ODE
        if sampler != 'ode' and i < steps - 1:
            noise = step_noise[i] if step_noise is not None else randn(z, generators)
            a = (1 - gamma * (t_next - t)).clamp(0, 1)
            fresh = 1 - a                           # the official weight: a lower temperature
            if sampler == 'sde_exact':              # (a (1 - t))^2 + fresh^2 = (1 - a t)^2
                fresh = ((1 - a) * (1 + a - 2 * a * t)).sqrt()
            t = a * t
            z = torch.where(known, cond, a * z + fresh * c.noise_scale * noise)
        if noisy_cond:
            noise = c.noise_scale * randn(z, generators)
            z = torch.where(known, t * cond + (1 - t) * noise, z)

        if cfg == 1:
            x = model.denoise(z, x_prev, t.flatten(), w)
        else:       # away from what rows without their condition would see; both as one batch
            both = [torch.cat((y, torch.where(known, 0.0, y))) for y in (z, x_prev)]
            x_c, x_u = model.denoise(*both, t.flatten().repeat(2), w.repeat(2)).chunk(2)
            x = x_u + cfg * (x_c - x_u)
        v = velocity(x, z, t, c.t_eps)
        z = torch.where(known, cond, z + (t_next - t) * v)
        if c.self_cond_prob:        # a network that was never shown a guess is not fed one
            x_prev = torch.where(known, cond, x)
    if watch:
        watch(steps, times[:, -1].flatten(), z)
    return z


def randn(z, generators):
    """Unit normal noise of z's shape, each row from its own generator, unless they are None."""
    if generators is None:
        return torch.randn_like(z)
    return torch.stack([torch.randn(z.shape[1:], generator=g, device=z.device) for g in generators])


@torch.no_grad()
def decode(model, z, w):
    """The most likely token at each position of a latent (B, T, C) -> ids, their p, both (B, T)."""
    parts = []
    # as many rows at a time as make a gigabyte of logits
    for rows in z.split(max(1, 2**28 // (z.shape[1] * model.config.vocab_size))):
        logits = model.decode(rows, rows.new_full((len(rows),), w))
        best = logits.max(dim=-1)
        parts.append((best.indices, (best.values - logits.logsumexp(dim=-1)).exp()))
    return tuple(map(torch.cat, zip(*parts)))


def sample_batch(model, tokenizer, numbers, seed, device, sampling, given=None, encoder=None,
                 watch=None):
    """
    The texts with these numbers, all at once -> rows {'id', 'generated', 'ids'}. Grid, first noise
    and SDE noise of text i come from (seed, i) alone. given: by number, the 'input' of each; the
    other arguments: see sample_texts.
    """
    c = model.config
    steps, sampler, gamma, w, cfg, grid = sampling.values()
    seeds = [row_seed(seed, i) for i in numbers]
    generators = [torch.Generator(device).manual_seed(s) for s in seeds]
    times = [time_grid(steps, grid, c, torch.Generator().manual_seed(s)) for s in seeds]
    z = torch.empty(len(numbers), c.max_length, c.latent_dim, device=device)
    z = c.noise_scale * randn(z, generators)
    limit = c.max_input_length or c.max_length
    rows = [encode_given(given[i], tokenizer, c)[:limit] if given else [] for i in numbers]
    ids, known = [x.to(device) for x in known_tokens(rows, c)]
    # what is known is all that the encoder sees
    cond = encoder(ids, known, known) if given else None
    z = generate(
        model, z, torch.stack(times), sampler, gamma, w, cfg, cond, known,
        generators=generators,
        watch=watch and partial(watch, numbers, rows),
        noisy_cond=given and not c.max_input_length)
    texts = texts_in(rows, *decode(model, z, w), tokenizer, c)
    return [
        dict(id=i, generated=tokenizer.decode(ids, skip_special_tokens=True), ids=ids)
        for i, (ids, _) in zip(numbers, texts)]


def sample_texts(model, encoder, tasks, batch_size, seed, sampling, file='', watch=None):
    """
    A text for each task, a dict that its row joins -> rows. Each rank samples its share of a batch
    and gets all of it; the first one adds it to a file, if one is named: a kill leaves what is
    done.

    All tasks or none have an 'input': a condition, or how the text starts; encoder: the TextEncoder
    for it, or None. sampling: what resolve_sampling gives. watch(numbers, ids of what is given, i,
    t, z) is called at each step of a batch, see generate.
    """
    given = [task['input'] for task in tasks if 'input' in task]
    tokenizer = load_tokenizer(model.config.tokenizer, model.config.vocab_size)
    device, (rank, world), rows = model.mode_tokens.device, rank_and_world(), []
    batches = list(batched(range(len(tasks)), batch_size * world))
    for numbers in tqdm(batches, leave=False, disable=True if rank else None):
        batch = []
        if share := numbers[rank::world]:
            batch = sample_batch(model, tokenizer, share, seed, device, sampling, given, encoder,
                                 watch)
        batch = sorted(sum(gather(batch), []), key=itemgetter('id'))
        batch = [tasks[row['id']] | row for row in batch]
        if file and rank == 0:
            add_lines(file, batch, 'a' if rows else 'w')
        rows += batch
    return rows


def load_model(config, device, bf16):
    """
    The model of the setting init_from, or of out_dir, which is never looked for on the hub, ready
    to sample. UserError.
    """
    source = config['init_from'] or config['out_dir']
    if not config['init_from'] and not os.path.isdir(source):
        raise UserError(f"no model in {source}: train one, name its folder with --out_dir, "
                        "or a published one with --init_from=org/repo")
    model = ELF.from_pretrained(source).to(device)
    compiled = config['compile'] and compile_in_place(model, device=device)
    if bf16:
        cast_blocks(model, compiled)
    return model


def resolve_sampling(c, **settings):
    """
    The settings SAMPLING where they are given, else what the checkpoint has for that number of
    steps -> dict of all six. Below 8 steps of which it says nothing gamma is 0: so long a step back
    costs more than it brings. UserError for guidance without conditions.
    """
    own = {name: getattr(c, name) for name in SAMPLING}
    given = {name: settings[name] for name in SAMPLING
             if settings.get(name, '') not in (-1, '')}
    steps = given.get('steps', c.steps)
    if given.get('cfg', 1) != 1 and not c.max_input_length:
        raise UserError(f"cfg={given['cfg']}: this is a model without conditions; drop it")
    # of its own number of steps by_steps says nothing: there the checkpoint's settings are meant
    if steps != c.steps:
        few = dict(gamma=0.0) if steps < min(8, c.steps) else {}
        own |= c.by_steps.get(steps, few)
    return own | given


if __name__ == '__main__':
    # ---- read what is given ----------------------------------------------------------------------
    config = configure(globals())
    if rank_and_world()[1] > 1:
        raise UserError("sample.py is one process: start it with python; "
                        "eval.py shares its texts among the ranks of a torchrun")
    device, bf16, about = start(device, dtype)
    source = init_from or out_dir
    model = load_model(config, device, bf16)
    c = model.config
    tokenizer = load_tokenizer(c.tokenizer, c.vocab_size)
    sampling = resolve_sampling(c, **config)
    tasks = read_tasks(config, source, tokenizer, c)
    encoder = None
    if 'input' in tasks[0]:
        encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
    make_out_dir(out_dir)
    if html:
        make_out_dir(os.path.dirname(html) or '.')
    facts = dict(model=source, device=about, seed=seed, length=c.max_length) | sampling
    print(', '.join(f'{name}: {value}' for name, value in facts.items()))

    # ---- sample: what is done is in the file at once ---------------------------------------------
    frames = []
    file = f'{out_dir}/samples.jsonl'
    watched = moments(sampling['steps'], trace or (48 if html else 0))

    def take_frame(numbers, given, i, t, z):
        if numbers[0] == 0 and i in watched:
            texts = texts_in(given, *decode(model, z[:8], sampling['w']), tokenizer, c)
            frames.append(make_frame(i, t, texts, tokenizer))
            if trace:
                show(frames[-1])

    print(f"{len(tasks)} texts, to {file}")
    with autocast(device, bf16):
        rows = sample_texts(model, encoder, tasks, batch_size, seed, sampling, file, take_frame)
    if html:
        write_page(html, frames, tasks[:8], facts)

    # ---- show ------------------------------------------------------------------------------------
    for row in rows:
        print(f"--- {row['id']}: {printable(row.get('input', ''))}")
        print(*map(printable, row['generated'].split('\n')), sep='\n')
        if 'target' in row:
            print(f"target: {printable(str(row['target']))}")
