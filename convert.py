"""
Foreign checkpoints become official torch ones, which sample.py, eval.py and train.py load:

    python convert.py SRC DST       # -> DST/checkpoint_<step>, config.yml and model.safetensors
    python convert.py out/owt_elf_b export && hf upload me/my-elf export    # publish a run of ours

SRC is a file, a folder or a hub id of a JAX checkpoint (flax msgpack or Orbax), a Lightning .ckpt,
our ckpt.pt, or any state dict of an ELF. All or nothing: every array of the network is used, every
parameter filled, no shape changed.
"""
from configurator import UserError, one_line, one_line_errors     # first: see there

import contextlib
import io
import json
import math
import mmap
import os
import re
import sys
import tempfile

import numpy as np
import torch

from parts.checkpoint import check_known, find_checkpoint, is_jax, load_checkpoint
from model import ELF, ELFConfig
from parts.official import (OFFICIAL_SETTINGS, PUBLISHED_SIZES, from_official_names,
                            read_config_yml, read_sizes, to_official_names)

# -------------------------------------------------------------------------------------------------
# out: the official layout

def config_text(config):
    """An ELFConfig as the text of an official config.yml, its samplers as sampling_configs."""
    import yaml
    size = PUBLISHED_SIZES.get((config.n_layer, config.n_embd))
    official = {'model': size} if size else {}
    for key, (name, default) in OFFICIAL_SETTINGS.items():
        if key != 'gelu' or getattr(config, name) != default:       # not a setting of theirs
            official[key] = getattr(config, name)
    own = {k: getattr(config, k) for k in ('sampler', 'gamma', 'w', 'cfg', 'grid')}
    official['sampling_configs'] = []
    for steps, differs in {config.steps: {}, **config.by_steps}.items():
        how = own | differs
        official['sampling_configs'].append(dict(
            sampling_method=how['sampler'], num_sampling_steps=[steps], cfgs=[how['cfg']],
            sde_gamma=how['gamma'], self_cond_cfg_scales=[how['w']], time_schedule=how['grid']))
    return yaml.safe_dump(official, sort_keys=False)


def write_official(folder, params, ema, step, epoch, config, source='the weights'):
    """
    Weights under official names -> folder/checkpoint_<step> (the path returned), config.yml, and
    model.safetensors with the EMA. config: an ELFConfig, or the bytes of a config.yml. All are
    written aside, read back, then renamed; on any error, a UserError, nothing is left behind.
    """
    from safetensors.torch import save_file
    names = ('config.yml', 'model.safetensors', f'checkpoint_{step}')
    path, config_path = os.path.join(folder, names[2]), os.path.join(folder, 'config.yml')
    text = config if isinstance(config, bytes) else config_text(config).encode()
    new = not os.path.isdir(folder)
    try:
        if os.path.lexists(path):
            raise UserError(f"{path} exists already and is not overwritten; "
                            "remove it or choose another folder")
        if os.path.exists(config_path) and read_bytes(config_path) != text:
            raise UserError(f"{config_path} exists already with other settings; "
                            "choose another folder")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.tmp_', dir=folder) as aside:
            with open(os.path.join(aside, 'config.yml'), 'wb') as f:
                f.write(text)
            save_file(ema, os.path.join(aside, 'model.safetensors'))
            with open(os.path.join(aside, names[2]), 'wb') as f:
                torch.save(dict(params=params, ema_params1=ema, opt_state=new_optimizer(params),
                                step=step, epoch=epoch), f)
                f.flush()
                os.fsync(f.fileno())
            read_back(os.path.join(aside, names[2]), params, ema, source)
            for name in names:
                os.replace(os.path.join(aside, name), os.path.join(folder, name))
    except (OSError, RuntimeError) as e:        # a full disk is a RuntimeError inside torch.save
        raise UserError(f"could not write {path}: {str(e).splitlines()[0]}") from None
    finally:
        if new and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
    return path


def read_bytes(path):
    with open(path, 'rb') as f:
        return f.read()


def new_optimizer(params):
    """The state of their optimizer before its first step: their code loads nothing without."""
    matrices = sum(x.ndim == 2 for x in params.values())
    both = dict(lr=0.002, initial_lr=0.002, weight_decay=0.0)
    muon = dict(both, momentum=0.95, use_muon=True, params=list(range(matrices)))
    adam = dict(both, betas=(0.9, 0.999), eps=1e-8, use_muon=False,
                params=list(range(matrices, len(params))))
    return dict(state={}, param_groups=[muon, adam])


def read_back(file, params, ema, source):
    """Refuse what does not make an ELF, in the name of its source, or differs between the two."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):     # remarks come again when it is loaded
            ELF.from_pretrained(file)
    except UserError as e:
        beside = os.path.join(os.path.dirname(source), 'config.yml')
        said = str(e).replace(file, source)
        said = said.replace(os.path.join(os.path.dirname(file), 'config.yml'), beside)
        raise UserError(said) from None
    shapes = {f"{name} {tuple(x.shape)}" for name, x in ema.items()}
    others = {f"{name} {tuple(x.shape)}" for name, x in params.items()}
    if shapes != others:
        raise UserError(f"{source}: weights and EMA differ in names or shapes: "
                        f"{', '.join(sorted(shapes ^ others)[:8])}")

# -------------------------------------------------------------------------------------------------
# in: JAX

def from_flax(tree, prefix=''):
    """Nested or flat flax names and arrays -> official names, float32, kernels as (out, in)."""
    state = {}
    for name, x in tree.items():
        name = prefix + re.sub(r'(^|\.)blocks_(\d+)(?=\.|$)', r'\1blocks.\2', str(name))
        if isinstance(x, dict):
            state |= from_flax(x, name + '.')
            continue
        if not isinstance(x, np.ndarray):
            raise ValueError(f"{name} is a {type(x).__name__}, not an array")
        x = torch.from_numpy(np.array(x, dtype=np.float32))     # a copy: the file's is read-only
        if name.endswith('.kernel'):
            name = name.removesuffix('kernel') + 'weight'
            x = x.T.contiguous() if x.ndim == 2 else x
        state[name] = x
    return state


def unpack_array(code, data):
    """An extension type of flax's msgpack, 1: array, 3: number -> numpy array or number."""
    import msgpack
    if code not in (1, 3):
        raise ValueError(f"an extension type {code}")
    shape, dtype, data = msgpack.unpackb(data, raw=False)
    if dtype == 'bfloat16':         # the upper half of a float32
        x = (np.frombuffer(data, '<u2').astype(np.uint32) << 16).view(np.float32)
    elif re.fullmatch(r'(float|int|uint)(8|16|32|64)|bool', dtype):
        x = np.frombuffer(data, dtype)
    else:
        raise ValueError(f"an array of type {dtype!r}")
    return x.reshape(shape) if code == 1 else x[0].item()


def read_msgpack(path):
    """A file of flax's -> dict with params and / or ema_params1, perhaps step and epoch."""
    import msgpack
    try:
        with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            ckpt = msgpack.unpackb(data, ext_hook=unpack_array, raw=False, strict_map_key=False)
        kept = {k: ckpt[k] for k in ('step', 'epoch') if ckpt.get(k) is not None}
        for k in ('params', 'ema_params1'):
            if ckpt.get(k) is not None:
                kept[k] = from_flax(ckpt[k])
        return kept
    except Exception as e:      # a damaged file can raise nearly anything
        raise UserError(f"{path} is no readable msgpack checkpoint: {one_line(e)}") from None


def refuse_links_outside(root, inside):
    """ValueError if a file or folder in root is a link that leads out of inside."""
    for where, folders, files in os.walk(root):
        for name in folders + files:
            if not os.path.realpath(os.path.join(where, name)).startswith(inside + os.sep):
                raise ValueError(f"{name} is a link that leads outside")


def read_orbax(folder):
    """A folder of Orbax's -> dict with params and / or ema_params1, perhaps step and epoch."""
    import tensorstore as ts
    root = os.path.realpath(folder)
    try:
        # in the hub's cache all files are links to blobs beside the snapshots
        repo = os.path.abspath(folder).split('/snapshots/')[0]
        refuse_links_outside(root, os.path.realpath(repo))
        with open(os.path.join(root, '_METADATA'), encoding='utf-8') as f:
            meta = json.load(f)
        reads = {}
        for entry in meta['tree_metadata'].values():
            name = '.'.join(str(part['key']) for part in entry['key_metadata'])
            if not re.match(r'(params|ema_params1)\.|(step|epoch)$', name):
                continue
            if not re.fullmatch(r'\w+(\.\w+)*', name):
                raise ValueError(f"{name!r} is no name of an array")
            store = dict(driver='ocdbt', base=f'file://{root}/', path=f'{name}/')
            driver = 'zarr3' if meta.get('use_zarr3') else 'zarr'
            reads[name] = ts.open(dict(driver=driver, kvstore=store), open=True, read=True)
        reads = {name: opened.result().read() for name, opened in reads.items()}    # all at once
        arrays = {name: np.asarray(read.result()) for name, read in reads.items()}
        ckpt = {k: int(arrays[k]) for k in ('step', 'epoch') if k in arrays}
        for k in ('params', 'ema_params1'):
            part = {n.removeprefix(f'{k}.'): x for n, x in arrays.items() if n.startswith(f'{k}.')}
            if part:
                ckpt[k] = from_flax(part)
        return ckpt
    except Exception as e:      # a damaged folder can raise nearly anything
        raise UserError(f"{folder} is no readable Orbax checkpoint: {one_line(e)}") from None

# -------------------------------------------------------------------------------------------------
# in: torch

def read_torch(path):
    """A torch or safetensors file -> dict with params and / or ema_params1, perhaps step, epoch."""
    ckpt = load_checkpoint(path)
    if 'state_dict' in ckpt:
        return read_lightning(path, ckpt)
    kept = {k: ckpt[k] for k in ('step', 'epoch') if k in ckpt}
    if 'iter_num' in ckpt:
        kept['step'] = ckpt['iter_num']
    for k, names in dict(params=('params', 'model'), ema_params1=('ema', 'ema_params1')).items():
        state = next((ckpt[n] for n in names if isinstance(ckpt.get(n), dict)), None)
        if state:
            kept[k] = to_official_names(from_official_names(state))
    if not kept.keys() & {'params', 'ema_params1'}:     # the weights alone
        kept['ema_params1'] = to_official_names(from_official_names(ckpt))
    if isinstance(ckpt.get('model_args'), dict):
        check_known(ckpt['model_args'], ELFConfig.__dataclass_fields__, path)
        kept['settings'] = ckpt['model_args']
    return kept


def flatten(tree, prefix=''):
    """Nested dicts -> {names joined by dots: tensor}."""
    flat = {}
    for name, x in tree.items():
        if isinstance(x, dict):
            flat |= flatten(x, f'{prefix}{name}.')
        elif isinstance(x, torch.Tensor):
            flat[f'{prefix}{name}'] = x
    return flat


def read_lightning(path, ckpt):
    """
    A Lightning checkpoint -> dict. Each place with a t_emb_tokens is a network; one with ema in its
    name is the EMA. Ugness/elf-torch has them in state_dict.model. and ema.shadow.
    """
    flat = flatten(ckpt)
    places = [name.removesuffix('t_emb_tokens') for name in flat if name.endswith('t_emb_tokens')]
    if not places:
        raise UserError(f"{path} holds no ELF weights: no name ends in t_emb_tokens; "
                        f"it has {', '.join(list(flat)[:5])}, ...")
    kept = dict(epoch=ckpt.get('epoch'))
    for place in sorted(places, key=len):
        # ema_pytorch keeps the network once more, as ema.online_model
        is_ema = 'ema' in place.lower() and 'online' not in place.lower()
        k = 'ema_params1' if is_ema else 'params'
        if k in kept:
            continue
        print(f"{path}: {'EMA' if is_ema else 'weights'} under {place!r}")
        inner = tuple(p for p in places if p != place and p.startswith(place))
        kept[k] = {}
        for name, x in flat.items():
            if name.startswith(place) and not name.startswith(inner) and x.ndim:    # no counts
                kept[k][name.removeprefix(place)] = x
    # the steps of that project; Lightning itself counts those of each optimizer
    kept['step'] = ckpt.get('_my_opt_step')
    if kept['step'] is None and isinstance(ckpt.get('global_step'), int):
        kept['step'] = ckpt['global_step'] // max(1, len(ckpt.get('optimizer_states', ())))
    for k in ('params', 'ema_params1'):
        state = to_official_names(from_official_names(kept.get(k, {})))
        if 'final_layer.norm.weight' in state:      # its network differs in a name, and in the GELU
            state['final_layer.norm_final.weight'] = state.pop('final_layer.norm.weight')
            kept['exact_gelu'] = True
        kept[k] = state
    return kept

# -------------------------------------------------------------------------------------------------

def settings_of(ckpt, path):
    """The settings of a checkpoint that was read -> ELFConfig, or the bytes of its config.yml."""
    exact_gelu = {'gelu': 'none'} if ckpt.get('exact_gelu') else {}
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), 'config.yml')
    if 'settings' not in ckpt and os.path.exists(beside):
        return read_bytes(beside) + (b'\ngelu: none\n' if exact_gelu else b'')
    sizes = read_sizes(from_official_names(ckpt['ema_params1']), path)
    settings = ckpt['settings'] if 'settings' in ckpt else read_config_yml(path, sizes)
    return ELFConfig(**settings | sizes | exact_gelu)


def main(source, folder):
    path = find_checkpoint(source)
    if os.path.isdir(path):
        ckpt = read_orbax(path)
    else:
        ckpt = read_msgpack(path) if is_jax(path) else read_torch(path)
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
        raise UserError(f"{path}: its step and epoch are no numbers: {one_line(e)}") from None
    out = write_official(folder, ckpt['params'], ckpt['ema_params1'], step, epoch,
                         settings_of(ckpt, path), path)
    count = sum(math.prod(x.shape) for x in ckpt['ema_params1'].values())
    print(f"{out}: {count:,} parameters, step {step}; EMA and weights, no optimizer state")


if __name__ == '__main__':
    sys.excepthook = one_line_errors
    if len(sys.argv) != 3 or sys.argv[1].startswith('-'):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] in (['--help'], ['-h']) else 1)
    main(*sys.argv[1:])
