"""
Foreign checkpoints become official torch ones, which sample.py, eval.py and train.py --init_from read:

    python convert.py SRC DST         # -> DST/checkpoint_<step>, DST/config.yml, DST/model.safetensors (the EMA weights alone)
    python convert.py out/owt_elf_b export && hf upload me/my-elf export       # publish a run of ours

SRC is a JAX checkpoint (flax msgpack file or Orbax folder), a Lightning .ckpt, our ckpt.pt, any
state dict of an ELF, a folder with checkpoint_<step> in it (the largest step), or a hub id. All or nothing: every array of
the network is used, every parameter filled, no shape changed.
"""
import json
import math
import mmap
import os
import re
import sys
import tempfile

import numpy as np
import torch

from configurator import UserError, one_line_errors
from model import ELF, KERNELS, MODELS, OFFICIAL, ELFConfig, find_checkpoint, hub_error, load_checkpoint


def write_official(folder, params, ema, step, epoch, config, source='the weights'):
    """
    folder/checkpoint_<step>, config.yml and model.safetensors (EMA) from weights under official names -> path. config: an ELFConfig,
    or the path of a config.yml to copy. All are written aside, read back, then renamed; on any error nothing is left behind.
    """
    import yaml
    from safetensors.torch import save_file
    path, config_path = os.path.join(folder, f'checkpoint_{step}'), os.path.join(folder, 'config.yml')
    if isinstance(config, ELFConfig):
        depth = len([k for k in ema if re.fullmatch(r'blocks\.\d+\.norm1\.weight', k)])
        size = next((k for k, p in MODELS.items() if 't_emb_tokens' in ema and (p.n_layer, p.n_embd) == (depth, ema['t_emb_tokens'].shape[-1])), None)
        text = yaml.safe_dump(({'model': size} if size else {}) | {k: getattr(config, ours) for k, ours in OFFICIAL.items()}, sort_keys=False).encode()
    else:
        with open(config, 'rb') as f:
            text = f.read()
    # the port loads no checkpoint without the state of its optimizer: one that has not stepped yet
    matrices = [x.ndim == 2 for x in params.values()]
    groups = [dict(lr=0.002, initial_lr=0.002, momentum=0.95, weight_decay=0.0, use_muon=True, params=list(range(sum(matrices)))),
              dict(lr=0.002, initial_lr=0.002, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, use_muon=False, params=list(range(sum(matrices), len(matrices))))]
    fresh = dict(state={}, param_groups=groups)
    new = not os.path.isdir(folder)
    try:
        if os.path.lexists(path):
            raise UserError(f"{path} exists already and is not overwritten; remove it or choose another folder")
        if os.path.exists(config_path):
            with open(config_path, 'rb') as f:
                if f.read() != text:
                    raise UserError(f"{config_path} exists already with other settings; choose another folder")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.tmp_', dir=folder) as aside:
            file = os.path.join(aside, f'checkpoint_{step}')
            with open(os.path.join(aside, 'config.yml'), 'wb') as f:
                f.write(text)
            with open(file, 'wb') as f:
                torch.save(dict(params=params, ema_params1=ema, opt_state=fresh, step=step, epoch=epoch), f)
                f.flush()
                os.fsync(f.fileno())
            save_file({k: v.contiguous() for k, v in ema.items()}, os.path.join(aside, 'model.safetensors'))
            try:
                ELF.from_pretrained(file)
            except UserError as e:
                raise UserError(str(e).replace(file, source)) from None
            shapes, others = ({f"{k} {tuple(v.shape)}" for k, v in state.items()} for state in (ema, params))
            if shapes != others:
                raise UserError(f"{source}: weights and EMA differ in names or shapes: {', '.join(sorted(shapes ^ others)[:8])}")
            for name in ('config.yml', 'model.safetensors', f'checkpoint_{step}'):
                os.replace(os.path.join(aside, name), os.path.join(folder, name))
    except (OSError, RuntimeError) as e:        # a full disk is a RuntimeError inside torch.save
        raise UserError(f"could not write {path}: {str(e).splitlines()[0]}") from None
    finally:
        if new and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
    return path

# ---------------------------------------------------------------------------------------------------------------------
# JAX

def from_flax(tree, prefix=''):
    """Nested or flat flax names and arrays -> official names and float32 tensors; a kernel is (in, out), a weight (out, in)."""
    state = {}
    for name, x in tree.items():
        name = prefix + re.sub(r'(^|\.)blocks_(\d+)(?=\.|$)', r'\1blocks.\2', str(name))
        if isinstance(x, dict):
            state |= from_flax(x, name + '.')
        elif isinstance(x, np.ndarray):
            x = torch.from_numpy(np.array(x, dtype=np.float32))         # a copy: the buffers of files are read-only
            kernel = name.endswith('.kernel') and x.ndim == 2
            state[re.sub(r'\.kernel$', '.weight', name)] = x.T.contiguous() if kernel else x
        else:
            raise ValueError(f"{name} is a {type(x).__name__}, not an array")
    return state


def read_msgpack(path):
    import msgpack

    def array(code, data):
        if code not in (1, 3):          # flax: 1 array, 3 numpy scalar
            raise ValueError(f"an extension type {code}")
        shape, dtype, data = msgpack.unpackb(data, raw=False)
        if dtype == 'bfloat16':         # the upper half of a float32
            x = (np.frombuffer(data, '<u2').astype(np.uint32) << 16).view(np.float32)
        elif re.fullmatch(r'(float|int|uint)(8|16|32|64)|bool', dtype):
            x = np.frombuffer(data, dtype)
        else:
            raise ValueError(f"an array of type {dtype!r}")
        return x.reshape(shape) if code == 1 else x[0].item()
    try:
        with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            ckpt = msgpack.unpackb(data, ext_hook=array, raw=False, strict_map_key=False)
        return {k: from_flax(ckpt[k]) if k in ('params', 'ema_params1') else ckpt[k]
                for k in ('params', 'ema_params1', 'step', 'epoch') if ckpt.get(k) is not None}
    except Exception as e:      # a damaged file can raise nearly anything
        raise UserError(f"{path} is no readable checkpoint, neither of torch nor flax msgpack: {reason(e)}") from None


def read_orbax(folder):
    import tensorstore as ts
    root = os.path.realpath(folder)
    inside = os.path.realpath(os.path.abspath(folder).split('/snapshots/')[0]) + os.sep        # the hub's cache has links to its blobs
    try:
        for where, folders, files in os.walk(root):
            for name in folders + files:
                if not os.path.realpath(os.path.join(where, name)).startswith(inside):
                    raise ValueError(f"{name} is a link that leads outside")
        with open(os.path.join(root, '_METADATA'), encoding='utf-8') as f:
            meta = json.load(f)
        names = ['.'.join(str(part['key']) for part in x['key_metadata']) for x in meta['tree_metadata'].values()]
        names = [n for n in names if re.match(r'(params|ema_params1)\.|(step|epoch)$', n)]
        bad = [n for n in names if not re.fullmatch(r'\w+(\.\w+)*', n)]
        if bad:
            raise ValueError(f"{bad[0]!r} is no name of an array")
        driver, store = 'zarr3' if meta.get('use_zarr3') else 'zarr', dict(driver='ocdbt', base=f'file://{root}/')
        # all reads are under way at once
        opened = {n: ts.open(dict(driver=driver, kvstore=store | dict(path=n + '/')), open=True, read=True) for n in names}
        read = {n: x.result().read() for n, x in opened.items()}
        arrays = {n: x.result() for n, x in read.items()}
        ckpt = {k: int(arrays[k]) for k in ('step', 'epoch') if k in arrays}
        for k in ('params', 'ema_params1'):
            state = from_flax({n[len(k) + 1:]: np.asarray(x) for n, x in arrays.items() if n.startswith(k + '.')})
            ckpt |= {k: state} if state else {}
        return ckpt
    except Exception as e:
        raise UserError(f"{folder} is no readable Orbax checkpoint: {reason(e)}") from None

# ---------------------------------------------------------------------------------------------------------------------
# torch

def reason(e):
    return f"{type(e).__name__} {' '.join(str(e).split())}"[:200]


def read_torch(path):
    """A torch or safetensors file -> dict with params and / or ema_params1, perhaps step and epoch."""
    try:
        ckpt = load_checkpoint(path)
    except UserError as e:
        try:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:       # it is damaged, not refused
            found = []
        if not found:
            raise
        raise UserError(f"{path} is refused, it would run code on loading: its pickle asks for {', '.join(sorted(found))}; "
                        f"save its weights alone (a dict of tensors)") from None
    times = dict(step=next((ckpt[k] for k in ('step', 'iter_num', 'global_step') if isinstance(ckpt.get(k), int)), None), epoch=ckpt.get('epoch'))
    if 'state_dict' in ckpt:
        return pick(path, ckpt) | times
    parts = {k: next((ckpt[n] for n in names if isinstance(ckpt.get(n), dict)), None) for k, names in
             dict(params=('params', 'model'), ema_params1=('ema', 'ema_params1')).items()}
    if not any(parts.values()):
        parts = dict(ema_params1=ckpt)
    if isinstance(ckpt.get('model_args'), dict):
        times['config'] = ELFConfig(**{k: v for k, v in ckpt['model_args'].items() if k in ELFConfig.__dataclass_fields__})
    return {k: official(v) for k, v in parts.items() if v} | times


def official(state):
    """Any names that ELF.from_pretrained reads -> official names and layouts."""
    state = {re.sub(r'^(_orig_mod\.|module\.)+', '', str(k)): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {KERNELS.get(k, k): (v.T if k in KERNELS and v.ndim == 2 else v).contiguous() for k, v in state.items()}


def pick(path, ckpt):
    """The weights in a Lightning checkpoint, wherever they are: each place that has a t_emb_tokens; one with ema in its name is the EMA."""
    flat = {}

    def walk(x, prefix):
        for k, v in x.items():
            if isinstance(v, torch.Tensor):
                flat[f'{prefix}{k}'] = v
            elif isinstance(v, dict):
                walk(v, f'{prefix}{k}.')
    walk(ckpt, '')
    places = sorted((k[:-len('t_emb_tokens')] for k in flat if re.search(r'(^|\.)t_emb_tokens$', k)), key=len)
    # a place within another is not part of it; numbers (a decay, a count) are no weights
    states = {p: official({k[len(p):]: v for k, v in flat.items() if k.startswith(p) and v.ndim and
                           not any(q != p and q.startswith(p) and k.startswith(q) for q in places)}) for p in places}
    is_ema = lambda p: 'ema' in p.lower() and 'online' not in p.lower()         # ema_pytorch keeps ema.online_model too
    ema, plain = next((p for p in places if is_ema(p)), None), next((p for p in places if not is_ema(p)), None)
    if not places:
        raise UserError(f"{path} holds no ELF weights: no name ends in t_emb_tokens; it has {', '.join(list(flat)[:5])}, ...")
    print(f"{path}: Lightning checkpoint, unverified: weights under {plain!r}, EMA under {ema!r}" + (f", of {places}" if len(places) > 2 else ''))
    return {k: states[p] for k, p in dict(params=plain, ema_params1=ema).items() if p is not None}

# ---------------------------------------------------------------------------------------------------------------------

def locate(source):
    """File, folder or hub id -> path of a file or an Orbax folder here."""
    if os.path.isfile(os.path.join(source, '_METADATA')):
        return source
    if os.path.isdir(source):
        steps = [n for n in os.listdir(source) if re.fullmatch(r'checkpoint_\d+', n)]
        others = [n for n in sorted(os.listdir(source)) if n.endswith('.ckpt')]
        name = max(steps, key=lambda n: int(n.rsplit('_', 1)[1])) if steps else others[0] if len(others) == 1 else None
        return os.path.join(source, name) if name else find_checkpoint(source)
    try:
        return find_checkpoint(source)
    except UserError as e:
        if len(source.split('/')) < 2 or source[0] in './~':
            raise
        from huggingface_hub import HfApi, snapshot_download
        repo, inside = '/'.join(source.split('/')[:2]), '/'.join(source.split('/')[2:])
        try:
            found = [re.fullmatch(r'((?:.*/)?checkpoint_(\d+))/_METADATA', f.rfilename) for f in HfApi().model_info(repo).siblings]
            found = [m for m in found if m and (m[1] + '/').startswith(inside.rstrip('/') + '/' if inside else '')]
            name = max(found, key=lambda m: int(m[2]))[1]
        except Exception:       # the first error says what is wrong
            raise e from None
        try:
            return os.path.join(snapshot_download(repo, allow_patterns=[f'{name}/*', os.path.join(os.path.dirname(name), 'config.yml')]), name)
        except Exception as broken:     # the client has a dozen kinds
            raise UserError(hub_error(source, broken)) from None


def main(source, folder):
    path = locate(source)
    if os.path.isdir(path):
        ckpt = read_orbax(path)
    else:
        with open(path, 'rb') as f:
            start = f.read(2)
        is_torch = start == b'PK' or start[:1] == b'\x80' or path.endswith(('.safetensors', '.pt', '.ckpt'))     # zip or pickle
        ckpt = (read_torch if is_torch else read_msgpack)(path)
    if not (ckpt.get('ema_params1') or ckpt.get('params')):
        raise UserError(f"{path} holds no ELF weights: neither params nor ema_params1")
    for name, other in (('ema_params1', 'params'), ('params', 'ema_params1')):
        if not ckpt.get(name):
            print(f"{path}: no {name}; taking {other} for both")
            ckpt[name] = ckpt[other]
    named = re.search(r'_(\d+)$', os.path.basename(os.path.abspath(path)))
    try:
        step = int(ckpt['step'] if ckpt.get('step') is not None else named[1] if named else 0)
        epoch = int(ckpt.get('epoch') or 0)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: its step and epoch are no numbers: {reason(e)}") from None
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), 'config.yml')
    config = ckpt.get('config') or beside
    if config == beside and not os.path.exists(beside):
        print(f"no config.yml beside {path}: taking the published OpenWebText settings")
        config = ELFConfig()
    out = write_official(folder, ckpt['params'], ckpt['ema_params1'], step, epoch, config, path)
    count = sum(math.prod(v.shape) for v in ckpt['ema_params1'].values())
    print(f"{out}: {count:,} parameters, step {step}; EMA and weights, no optimizer state")


if __name__ == '__main__':
    sys.excepthook = one_line_errors
    if len(sys.argv) != 3 or sys.argv[1].startswith('-'):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] in (['--help'], ['-h']) else 1)
    main(*sys.argv[1:])
