"""
Foreign checkpoints become official torch ones, which sample.py, eval.py and train.py load:

    python convert.py SRC DST       # -> DST/checkpoint_<step>, config.yml and model.safetensors
    python convert.py out/owt_elf_b export && hf upload me/my-elf export    # publish a run of ours

SRC is a file, a folder or a hub id of a JAX checkpoint (flax msgpack or Orbax), a Lightning .ckpt,
our ckpt.pt, or any state dict of an ELF. All or nothing: every array of the network is used, every
parameter filled, no shape changed. A tokenizer and an encoder that are folders here go along, so
DST is whole: it can be moved, or uploaded, and used there.
"""
# before torch: see there
from parts.process import UserError, one_line, one_line_errors, open_streams

import json
import mmap
import os
import re
import shutil
import sys
import tempfile

import numpy as np
import torch

from model import ELF, ELFConfig
from parts.checkpoint import carry, find_checkpoint, is_jax, load_checkpoint, read_settings
from parts.official import (OFFICIAL_SETTINGS, PUBLISHED_SIZES, check_fit, from_official_names,
                            read_sizes, to_official_names)

# A checkpoint that was read is a dict: params and / or ema_params1, both under official names, and
# perhaps step, epoch, model_args, data, gelu.

# -------------------------------------------------------------------------------------------------
# in: JAX

def flatten(tree, prefix=''):
    """Nested dicts -> {names joined by dots: what is no dict}."""
    flat = {}
    for name, x in tree.items():
        flat |= flatten(x, f'{prefix}{name}.') if isinstance(x, dict) else {f'{prefix}{name}': x}
    return flat


def from_flax(tree):
    """Nested or flat flax names and arrays -> official names, float32, kernels as (out, in)."""
    state = {}
    for name, x in flatten(tree).items():
        name = re.sub(r'(^|\.)blocks_(\d+)\.', r'\1blocks.\2.', name)
        x = torch.from_numpy(np.array(x, dtype=np.float32))     # a copy: the file's is read-only
        if name.endswith('.kernel'):
            name = name.removesuffix('kernel') + 'weight'
            x = x.T.contiguous() if x.ndim == 2 else x
        state[name] = x
    return state


def unpack_array(code, data):
    """An extension type of flax's msgpack, 1: array, 3: number -> numpy array or number."""
    import msgpack
    shape, dtype, data = msgpack.unpackb(data, raw=False)
    if dtype == 'bfloat16':         # the upper half of a float32
        x = (np.frombuffer(data, '<u2').astype(np.uint32) << 16).view(np.float32)
    elif code in (1, 3) and re.fullmatch(r'(float|int|uint)(8|16|32|64)|bool', dtype):
        x = np.frombuffer(data, dtype)
    else:
        raise ValueError(f"an extension of type {code} with {dtype!r}")
    return x.reshape(shape) if code == 1 else x[0].item()


def read_msgpack(path):
    import msgpack
    with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        ckpt = msgpack.unpackb(data, ext_hook=unpack_array, raw=False, strict_map_key=False)
    return {k: from_flax(x) if isinstance(x, dict) else x for k, x in ckpt.items()
            if k in ('params', 'ema_params1', 'step', 'epoch')}


def refuse_links_outside(root, inside):
    """ValueError if a file or folder in root is a link that leads out of inside."""
    for where, folders, files in os.walk(root):
        for name in folders + files:
            if not os.path.realpath(os.path.join(where, name)).startswith(inside + os.sep):
                raise ValueError(f"{name} is a link that leads outside")


def read_orbax(folder):
    import tensorstore as ts
    root = os.path.realpath(folder)
    # in the hub's cache all files are links to blobs beside the snapshots
    repo = os.path.abspath(folder).split('/snapshots/')[0]
    refuse_links_outside(root, os.path.realpath(repo))
    with open(os.path.join(root, '_METADATA'), encoding='utf-8') as f:
        meta = json.load(f)
    driver, ckpt = 'zarr3' if meta.get('use_zarr3') else 'zarr', {}
    for entry in meta['tree_metadata'].values():
        name = '.'.join(str(part['key']) for part in entry['key_metadata'])
        if not re.match(r'(params|ema_params1)\.|(step|epoch)$', name):
            continue
        if not re.fullmatch(r'\w+(\.\w+)*', name):
            raise ValueError(f"{name!r} is no name of an array")
        store = dict(driver='ocdbt', base=f'file://{root}/', path=f'{name}/')
        array = ts.open(dict(driver=driver, kvstore=store), open=True, read=True).result()
        part, _, name = name.partition('.')
        if name:
            ckpt.setdefault(part, {})[name] = np.asarray(array.read().result())
        else:
            ckpt[part] = int(array.read().result())
    return {k: from_flax(x) if isinstance(x, dict) else x for k, x in ckpt.items()}

# -------------------------------------------------------------------------------------------------
# in: torch

def read_torch(path):
    ckpt = load_checkpoint(path)
    if 'state_dict' in ckpt:
        return read_lightning(path, ckpt)
    kept = {k: ckpt[k] for k in ('step', 'epoch', 'model_args', 'data') if k in ckpt}
    kept['step'] = ckpt.get('iter_num', ckpt.get('step'))
    for k, names in dict(params=('params', 'model'), ema_params1=('ema', 'ema_params1')).items():
        state = next((ckpt[n] for n in names if isinstance(ckpt.get(n), dict)), None)
        if state:
            kept[k] = to_official_names(from_official_names(state))
    if not kept.keys() & {'params', 'ema_params1'}:     # the weights alone
        kept['ema_params1'] = to_official_names(from_official_names(ckpt))
    return kept


def read_lightning(path, ckpt):
    """
    Each place with a t_emb_tokens is a network; one with ema in its name is the EMA.
    Ugness/elf-torch has them in state_dict.model. and ema.shadow.
    """
    flat = {name: x for name, x in flatten(ckpt).items() if isinstance(x, torch.Tensor)}
    places = [name.removesuffix('t_emb_tokens') for name in flat if name.endswith('t_emb_tokens')]
    if not places:
        raise UserError(f"{path} holds no ELF weights: no name ends in t_emb_tokens; "
                        f"it has {', '.join(list(flat)[:5])}, ...")
    # the steps of that project; Lightning itself counts those of each optimizer
    kept = dict(epoch=ckpt.get('epoch'), step=ckpt.get('_my_opt_step'))
    if kept['step'] is None and ckpt.get('global_step') is not None:
        kept['step'] = ckpt['global_step'] // max(1, len(ckpt.get('optimizer_states', ())))
    for place in sorted(places, key=len):
        # ema_pytorch keeps the network once more, as ema.online_model
        is_ema = 'ema' in place.lower() and 'online' not in place.lower()
        k = 'ema_params1' if is_ema else 'params'
        if k in kept:
            continue
        print(f"{path}: {'EMA' if is_ema else 'weights'} under {place!r}")
        inner = tuple(p for p in places if p != place and p.startswith(place))
        state = {name.removeprefix(place): x for name, x in flat.items() if x.ndim      # no counts
                 and name.startswith(place) and not name.startswith(inner)}
        state = to_official_names(from_official_names(state))
        if 'final_layer.norm.weight' in state:      # its network differs in a name, and in the GELU
            state['final_layer.norm_final.weight'] = state.pop('final_layer.norm.weight')
            kept['gelu'] = 'none'
        kept[k] = state
    return kept

# -------------------------------------------------------------------------------------------------
# out: the official layout

def config_text(c):
    """An ELFConfig as the text of an official config.yml, its samplers as sampling_configs."""
    import yaml
    size = PUBLISHED_SIZES.get((c.n_layer, c.n_embd, c.n_head))
    official = {'model': size} if size else {}
    for key, (name, default) in OFFICIAL_SETTINGS.items():
        if key != 'gelu' or c.gelu != default:      # not a setting of theirs
            official[key] = getattr(c, name)
    official['sampling_configs'] = []
    for steps, changes in {c.steps: {}, **c.by_steps}.items():
        x = vars(c) | changes
        official['sampling_configs'].append(dict(
            sampling_method=x['sampler'], num_sampling_steps=[steps], cfgs=[x['cfg']],
            sde_gamma=x['gamma'], self_cond_cfg_scales=[x['w']], time_schedule=x['grid']))
    return yaml.safe_dump(official, sort_keys=False)


def new_optimizer(params):
    """The state of their optimizer before its first step: their code loads nothing without."""
    matrices = sum(x.ndim == 2 for x in params.values())
    both = dict(lr=0.002, initial_lr=0.002, weight_decay=0.0)
    muon = dict(both, momentum=0.95, use_muon=True, params=list(range(matrices)))
    adam = dict(both, betas=(0.9, 0.999), eps=1e-8, use_muon=False,
                params=list(range(matrices, len(params))))
    return dict(state={}, param_groups=[muon, adam])


def write_official(folder, params, ema, step, epoch, config, source='the weights'):
    """
    Weights under official names and an ELFConfig -> folder/checkpoint_<step> (the path returned),
    config.yml, model.safetensors with the EMA, tokenizer/ and encoder/ if they are no hub ids. All
    or nothing: written aside, then renamed. UserError. source: the weights' name in it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    with torch.device('meta'):
        want = ELF(config).state_dict()
    for name, state in dict(ema_params1=ema, params=params).items():
        check_fit(want, from_official_names(state), f"{source} ({name})")
    names = ('config.yml', 'model.safetensors', f'checkpoint_{step}')
    config_path, _, path = (os.path.join(folder, name) for name in names)
    new = not os.path.lexists(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(path):
            raise UserError(f"{path} exists already and is not overwritten; "
                            "remove it or choose another folder")
        text = config_text(carry(config, folder)).encode()
        if os.path.exists(config_path) and read_bytes(config_path) != text:
            raise UserError(f"{config_path} exists already with other settings; "
                            "choose another folder")
        with tempfile.TemporaryDirectory(prefix='.tmp_', dir=folder) as aside:
            with open(os.path.join(aside, 'config.yml'), 'wb') as f:
                f.write(text)
            save_file(ema, os.path.join(aside, 'model.safetensors'))
            with open(os.path.join(aside, names[-1]), 'wb') as f:
                torch.save(dict(params=params, ema_params1=ema, opt_state=new_optimizer(params),
                                step=step, epoch=epoch), f)
                f.flush()
                os.fsync(f.fileno())
            for name in names:
                os.replace(os.path.join(aside, name), os.path.join(folder, name))
    except (OSError, RuntimeError, SafetensorError, UserError) as e:    # three for a full disk
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, UserError):
            raise
        raise UserError(f"could not write {path}: {str(e).splitlines()[0]}") from None
    return path


def read_bytes(path):
    with open(path, 'rb') as f:
        return f.read()

# -------------------------------------------------------------------------------------------------

def main(source, folder):
    path = find_checkpoint(source)
    read, kind = read_torch, 'torch'
    if is_jax(path):
        read, kind = (read_orbax, 'Orbax') if os.path.isdir(path) else (read_msgpack, 'msgpack')
    try:
        ckpt = read(path)
        named = re.search(r'_(\d+)$', path)
        step = int(ckpt['step'] if ckpt.get('step') is not None else named[1] if named else 0)
        epoch = int(ckpt.get('epoch') or 0)
    except UserError:
        raise
    except Exception as e:      # a damaged file can raise nearly anything
        raise UserError(f"{path} is no readable {kind} checkpoint: {one_line(e)}") from None
    for name, other in (('ema_params1', 'params'), ('params', 'ema_params1')):
        if not (ckpt.get(name) or ckpt.get(other)):
            raise UserError(f"{path} holds no ELF weights: neither params nor ema_params1")
        if not ckpt.get(name):
            print(f"{path}: no {name}; taking {other} for both")
            ckpt[name] = ckpt[other]
    ema = ckpt['ema_params1']
    sizes = read_sizes(from_official_names(ema), path)
    settings = read_settings(path, ckpt, sizes, ELFConfig.__dataclass_fields__)
    config = ELFConfig(**settings | {k: ckpt[k] for k in ('gelu',) if k in ckpt})
    out = write_official(folder, ckpt['params'], ema, step, epoch, config, path)
    print(f"{out}: {sum(x.numel() for x in ema.values()):,} parameters, step {step}; "
          "EMA and weights, no optimizer state")


if __name__ == '__main__':
    sys.excepthook = one_line_errors
    open_streams()
    if len(sys.argv) != 3 or sys.argv[1].startswith('-'):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] in (['--help'], ['-h']) else 1)
    main(*sys.argv[1:])
