"""
Write text: noise at t=0, a few dozen steps along the learned flow, tokens at t=1.

    python sample.py                                    # the model in out/, with its task's settings
    python sample.py --steps=64 --gamma=1.0 --trace=8   # watch the text come out of the noise
    python sample.py --init_from=embedded-language-flows/ELF-B-owt-torch --num_samples=4
    python sample.py --init_from=embedded-language-flows/ELF-B-de-en-torch --input="Guten Morgen"
"""
import json
import os
import tempfile
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from configurator import UserError, configure
from model import ELF, TextEncoder, hub_error

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'             # the model of this folder's ckpt.pt (EMA); samples.jsonl is written here
init_from = ''              # instead: a published checkpoint, file, folder or hub id
num_samples = 8             # texts; with conditions, one for each of them
input = ''                  # condition of a conditional model (translation, summary)
input_file = ''             # or many: a .jsonl with 'input' (or 'source') a line
batch_size = 16             # rows sampled at once; changes memory and speed, not the texts
steps = -1                  # forward passes per text, -1 = the checkpoint's default, as below
sampler = ''                # 'ode' or 'sde' (re-noises a little before each step), '' = the default
gamma = -1.0                # of the SDE: how much is re-noised, 0 = none
w = -1.0                    # self-conditioning guidance strength, trained on 0.5 to 5
cfg = -1.0                  # classifier-free guidance on the condition, 1 = off
grid = 'logit_normal'       # times: 'logit_normal' (random, as trained), 'quantile' (the same, deterministic), 'uniform'
seed = 1337                 # text i depends on (seed, i) alone, not on batch_size
trace = 0                   # print the first text at this many moments between noise and data
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # 'float32' or 'bfloat16', 'auto' = bfloat16 where the hardware is fast at it
compile = False             # torch.compile the network: a minute first, then faster
# ---------------------------------------------------------------------------------------------------------------------

def pick_device(device, dtype):
    """Names or 'auto' -> torch.device, autocast context for it, and a sentence that says why. UserError if not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = next(k for k, ok in there.items() if ok) if device == 'auto' else device.partition(':')[0]
    if not there.get(kind):
        raise UserError(f"device={device!r} is not available here; this machine has {', '.join(k for k, ok in there.items() if ok)}")
    try:
        device = torch.device(kind if device == 'auto' else device)
    except RuntimeError:
        raise UserError(f"device={device!r} is not a device: 'auto', 'cpu', 'mps', 'cuda', or one of several, such as 'cuda:1'") from None
    if kind == 'cuda':
        fast, name = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        fast, name = kind == 'cpu' and torch.cpu._is_avx512_bf16_supported(), {'cpu': f'CPU, {torch.get_num_threads()} threads', 'mps': 'Apple GPU'}[kind]
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise UserError(f"dtype={dtype!r} is not one of 'auto', 'float32', 'bfloat16'")
    bf16 = fast if dtype == 'auto' else dtype == 'bfloat16'
    if kind == 'cuda':      # TF32, finer than bfloat16, for what autocast leaves in float32, as in the port's train.py
        torch.set_float32_matmul_precision('high' if bf16 else 'highest')
    why = 'as asked' if dtype != 'auto' else 'fast here' if fast else 'no fast bfloat16 here'
    return device, torch.autocast(kind, torch.bfloat16, enabled=bf16), f"{device} ({name}), {'bfloat16 autocast' if bf16 else 'float32'} ({why})"


def compile_in_place(module, device):
    """module.compile() if this machine has a working compiler -> whether it does; says so aloud if not."""
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.ones(8, device=device))
    except Exception as e:
        print(f"compile: OFF, torch.compile does not work here ({str(e).strip().splitlines()[0][:120]}); steps will take about twice as long")
        return False
    torch._dynamo.config.recompile_limit = 64       # a few row counts, with and without gradient: each its own graph; with symbols for sizes Inductor can fail
    module.compile(dynamic=False)
    return True


def pack_linears(model, decided):
    """For sampling on an x86 CPU: matrix products by oneDNN from weights in its own layout, in the types that autocast would pick, but faster."""
    def product(x, weight, bias, dtype):
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, 'none', [], '')

    half = 'bfloat16' in decided
    if decided.startswith('cpu') and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and (not half or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                # ELF.forward keeps its ends in float32
                dtype = torch.bfloat16 if half and name.startswith(('blocks.', 'proj', 'unembed')) else torch.float32
                weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().to(dtype), None)
                module.forward = partial(product, weight=weight, bias=None if module.bias is None else module.bias.detach().to(dtype), dtype=dtype)


def time_grid(steps, schedule, config, generator=None):
    """
    The times a sampler visits: 0, steps - 1 inner ones, 1 -> (steps+1,) float32 on the CPU. 'logit_normal' draws them as
    training does [get_sampling_steps], 'quantile' takes the quantiles of that distribution, 'uniform' even spaces.
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
        raise UserError(f"grid={schedule!r} is not one of 'logit_normal', 'quantile', 'uniform'")
    inner = torch.sigmoid(config.t_mean + config.t_std * normal)
    return torch.cat((torch.zeros(1), inner, torch.ones(1)))


@torch.no_grad()
def generate(model, z, times, sampler='sde', gamma=1.5, w=3.0, cfg=1.0, cond=None, cond_mask=None, step_noise=None,
             generators=None, watch=None):
    """
    Follow the flow from noise to data [utils/sampling_utils.py] -> final latent (B, T, C).
    z (B, T, C) initial noise, already scaled; times (steps+1,) or (B, steps+1), rising from 0 to 1; w, cfg numbers.
    cond (B, T, C), cond_mask (B, T): clean latents of the condition and where they stand.
    SDE noise: step_noise (steps-1, B, T, C) unit normal, else drawn from generators (one a row, on z's device), else
    from the global one. watch(i, t, z) is called with what each step starts from, and with the result.
    """
    if sampler not in ('ode', 'sde'):
        raise UserError(f"sampler={sampler!r} is not 'ode' or 'sde'")
    c, B = model.config, len(z)
    times = times.to(z).expand(B, -1)                                                       # (B, steps+1)
    steps = times.shape[1] - 1
    col = lambda t: t[:, None, None]
    keep = torch.zeros_like(z[..., :1], dtype=torch.bool) if cond_mask is None else cond_mask.bool()[..., None]
    cond = torch.zeros_like(z) if cond is None else cond
    strength = torch.full((B,), float(w), device=z.device)
    v = lambda x, z, t: (x - z) / (1 - col(t)).clamp(min=c.t_eps)
    z, x_prev = torch.where(keep, cond, z), torch.where(keep, cond, 0.0)                    # no guess yet
    for i in range(steps):
        t, t_next = times[:, i], times[:, i + 1]                                            # (B,)
        if watch:
            watch(i, t, z)
        if sampler == 'sde' and i < steps - 1:
            # step back towards noise, to the time that matches; the last step is always ODE
            if step_noise is not None:
                noise = step_noise[i]
            elif generators is not None:
                noise = torch.stack([torch.randn(z.shape[1:], generator=g, device=z.device) for g in generators])
            else:
                noise = torch.randn_like(z)
            a = (1 - gamma * (t_next - t)).clamp(0, 1)
            z = torch.where(keep, cond, col(a) * z + (1 - col(a)) * c.noise_scale * noise)
            t = a * t
        if cfg == 1:
            x = model.denoise(z, x_prev, t, strength)                                       # (B, T, C)
            velocity = v(x, z, t)
        else:
            # rows with the condition and rows without, as one batch
            both = torch.cat((z, torch.where(keep, 0.0, z)))                                # (2B, T, C)
            both_prev = torch.cat((x_prev, torch.where(keep, 0.0, x_prev)))
            both_t = t.repeat(2)
            x = model.denoise(both, both_prev, both_t, strength.repeat(2))
            v_c, v_u = v(x, both, both_t).chunk(2)
            x_c, x_u = x.chunk(2)
            velocity, x = v_u + cfg * (v_c - v_u), x_u + cfg * (x_c - x_u)
        x_prev = torch.where(keep, cond, x)
        z = torch.where(keep, cond, z + col(t_next - t) * velocity)
    if watch:
        watch(steps, times[:, -1], z)
    return z


@torch.no_grad()
def decode_ids(model, z, w):
    """Most likely token at each position of a latent: (B, T, C) -> (B, T) int64; a few rows at a time, logits are large."""
    return torch.cat([model.decode(part, torch.full((len(part),), float(w), device=z.device)).argmax(-1) for part in z.split(8)])


def cut(ids, eos):
    """A list of ids up to its first EOS, which goes too."""
    return ids[:ids.index(eos)] if eos in ids else ids


def row_seed(seed, i):
    """The seed of sample i, or micro-batch i, of a run: well mixed, so that neighbours share nothing."""
    return int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] >> 1)


def load_model(init_from, out_dir):
    """ELF of init_from, a file, folder or hub id, or of out_dir, which is never looked for on the hub. UserError if there is none."""
    if not init_from and not os.path.isdir(out_dir):
        raise UserError(f"no model in {out_dir}: train one, name its folder with --out_dir, or a published one with --init_from=org/repo")
    return ELF.from_pretrained(init_from or out_dir)


def load_tokenizer(name):
    """A tokenizer from a hub id or folder. UserError if it is gone."""
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as e:      # the hub's clients have a dozen kinds
        raise UserError(f"no tokenizer: {hub_error(name, e)}") from None


def sample_texts(model, tokenizer, num_samples, batch_size, seed, device, steps, sampler, gamma, w, cfg, grid, trace=0,
                 rank=0, world=1, progress=None, inputs=None, encoder=None):
    """
    num_samples texts -> list of {'id', 'generated', 'ids'}, with conditions also 'input'; ids are cut at the first EOS. Each of
    world ranks samples its share, all get the whole list. Grid, first noise and SDE noise of text i come from (seed, i) alone.
    trace: print the first text at that many moments. progress: called with each batch's row count. inputs: num_samples
    conditions, and encoder, the TextEncoder for them; what follows a row's condition is its text [generation.py].
    """
    c, texts, rows = model.config, [], list(range(rank, num_samples, world))
    moments = {round(i) for i in np.linspace(0, steps, trace)} if trace else set()

    def watch(i, t, z):
        if i in moments:
            ids = cut(decode_ids(model, z[:1], w)[0, skip[0]:].tolist(), tokenizer.eos_token_id)
            print(f"  t={t[0]:.2f} | {printable(tokenizer.decode(ids, skip_special_tokens=True))[:160]}", flush=True)

    for first in range(0, len(rows), batch_size):
        part = rows[first:first + batch_size]
        times = torch.stack([time_grid(steps, grid, c, torch.Generator().manual_seed(row_seed(seed, i))) for i in part])
        generators = [torch.Generator(device).manual_seed(row_seed(seed, i)) for i in part]
        z = c.noise_scale * torch.stack([torch.randn(c.max_length, c.latent_dim, generator=g, device=device) for g in generators])
        cond, cond_mask, skip, length = None, None, [0] * len(part), c.max_length - c.max_input_length
        if inputs is not None:
            coded = [[*tokenizer(inputs[i], add_special_tokens=False)['input_ids'], tokenizer.eos_token_id][:c.max_input_length] for i in part]
            skip = [len(ids) for ids in coded]
            cond_mask = (torch.arange(c.max_length) < torch.tensor(skip)[:, None]).to(device)
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (c.max_length - len(ids)) for ids in coded], device=device)
            cond = encoder(ids, cond_mask, cond_mask)
        z = generate(model, z, times, sampler, gamma, w, cfg, cond, cond_mask, generators=generators, watch=watch if first == 0 and trace else None)
        for i, drop, ids in zip(part, skip, decode_ids(model, z, w).tolist()):
            ids = cut(ids[drop:drop + length], tokenizer.eos_token_id)
            texts.append(dict(id=i, **({} if inputs is None else dict(input=inputs[i])), generated=tokenizer.decode(ids, skip_special_tokens=True), ids=ids))
        if progress:
            progress(len(part))
    if dist.is_initialized():
        shares = [None] * world
        dist.all_gather_object(shares, texts)
        texts = sorted(sum(shares, []), key=lambda text: text['id'])
    return texts


def make_out_dir(out_dir):
    """Before hours of work: the folder is there and can be written to, or UserError."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as e:
        raise UserError(f"out_dir={out_dir!r} cannot be written: {e.strerror}") from None


def write_texts(file, texts):
    """Texts of sample_texts as JSONL, without their ids; whole or not at all."""
    with open(file + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps({k: v for k, v in text.items() if k != 'ids'}, ensure_ascii=False) + '\n' for text in texts)
    os.replace(file + '.tmp', file)


def read_lines(file):
    """Lines of a UTF-8 file. UserError names file and line."""
    n = 0
    try:
        with open(file, 'rb') as f:
            for n, line in enumerate(f, 1):
                yield line.decode('utf-8-sig' if n == 1 else 'utf-8').replace('\r\n', '\n')
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}, line {n}: byte {e.object[e.start]:#04x} is not UTF-8; save the file as UTF-8") from None


def read_jsonl(file):
    """The objects of a JSONL file, one after the other -> (file and line for messages, dict). UserError names the line."""
    for n, line in enumerate(read_lines(file), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__}")
            except (ValueError, RecursionError) as e:
                raise UserError(f"{file}, line {n} is no JSON object ({e}): {line[:60]!r}") from None
            yield f"{file}, line {n}", row


def read_inputs(file):
    """The conditions in a JSONL -> list of dicts with 'input', in order, and whatever else a line has. UserError names file and line."""
    rows = []
    for where, row in read_jsonl(file):
        row['input'] = row.get('input', row.get('source'))
        if not isinstance(row['input'], str):
            raise UserError(f"{where} needs a text under 'input' (or 'source')")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} has no lines")
    return rows


def printable(text):
    """For the terminal: a text without control characters that could move the cursor; one line."""
    return ''.join(ch if ch.isprintable() else ' ' if ch.isspace() else f"\\x{ord(ch):02x}" for ch in text)


def resolve_sampling(config, steps=-1, sampler='', gamma=-1, w=-1, cfg=-1):
    """Settings where given, else the checkpoint's own -> dict for sample_texts."""
    given = dict(steps=steps, sampler=sampler, gamma=gamma, w=w, cfg=cfg)
    return {k: getattr(config, k) if v in (-1, '') else v for k, v in given.items()}


if __name__ == '__main__':
    from tqdm import tqdm
    configure(globals())
    if min(num_samples, batch_size) < 1 or min(seed, trace) < 0 or input and input_file:
        raise UserError(f"num_samples={num_samples}, batch_size={batch_size} start at 1, seed={seed}, trace={trace} at 0; input and input_file exclude each other")
    device, ctx, decided = pick_device(device, dtype)
    model = load_model(init_from, out_dir).to(device)
    inputs = [row['input'] for row in read_inputs(input_file)] if input_file else [input] if input else None
    if bool(inputs) != bool(model.config.max_input_length):
        raise UserError(f"{init_from or out_dir} is a model with{'' if model.config.max_input_length else 'out'} conditions; "
                        + ('give --input="..." or --input_file=x.jsonl' if model.config.max_input_length else 'drop --input and --input_file'))
    tokenizer, encoder = load_tokenizer(model.config.tokenizer), None
    if inputs:
        num_samples = len(inputs)
        encoder = TextEncoder(model.config.encoder, model.config.latent_mean, model.config.latent_std).to(device)
    make_out_dir(out_dir)
    file = os.path.join(out_dir, 'samples.jsonl')
    how = resolve_sampling(model.config, steps, sampler, gamma, w, cfg)
    print(f"device: {decided}\nsampling: {', '.join(f'{k}={v}' for k, v in how.items())}, grid={grid}, length {model.config.max_length}")
    compile_in_place(model, device) if compile else pack_linears(model, decided)
    with ctx, tqdm(total=num_samples, desc='texts', disable=None) as bar:
        texts = sample_texts(model, tokenizer, num_samples, batch_size, seed, device, grid=grid, trace=trace, progress=bar.update, inputs=inputs, encoder=encoder, **how)
    for text in texts:
        print(f"--- {text['id']}\n{printable(text['generated'])}")
    write_texts(file, texts)
    print(f"{len(texts)} texts in {file}")
