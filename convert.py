"""
Foreign checkpoints become official torch ones, which sample.py, eval.py and train.py load:

    python convert.py SRC DST       # -> DST/checkpoint_<step>, config.yml and model.safetensors
    python convert.py out/owt_elf_b export && hf upload me/my-elf export    # publish a run of ours

SRC is a file, a folder or a hub id of a JAX checkpoint (flax msgpack or Orbax), a .ckpt of
Ugness/elf-torch (Lightning), our ckpt.pt, or any state dict of an ELF. All or nothing: every array
of the network is used, every parameter filled, no shape changed. A tokenizer and an encoder that
are folders here go along, so DST, a new folder, is whole: it can be moved, or uploaded, and used
there.
"""
# before torch: see there
from parts.process import begin, from_hub

import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from pandas import json_normalize
from safetensors.torch import save_file

from model import ELF, MODELS, ELFConfig
from parts.checkpoint import (carry, find_checkpoint, is_jax, load_checkpoint, networks_in,
                              read_settings, step_in, whole)
from parts.official import OFFICIAL_SETTINGS, from_official_names, to_official_names

# -------------------------------------------------------------------------------------------------
# in: JAX

def read_msgpack(path):
    """A file of flax's -> {params.blocks_0.attn.qkv.kernel: array, ..., step: number}."""
    import ml_dtypes  # noqa: F401, numpy has bfloat16 from it
    import msgpack

    def unpack_array(code, data):       # an array or a number; msgpack leaves both to us
        shape, dtype, data = msgpack.unpackb(data)
        return np.frombuffer(data, dtype).reshape(shape)
    data = Path(path).read_bytes()
    tree = msgpack.unpackb(data, ext_hook=unpack_array, strict_map_key=False)
    return json_normalize(tree).iloc[0].to_dict()       # nested names are joined by dots


def read_orbax(folder):
    """A folder of Orbax's -> as read_msgpack; only what is needed is read."""
    import tensorstore as ts
    store = dict(driver='ocdbt', base=f'file://{os.path.realpath(folder)}/')
    arrays = {}
    for key in ts.KvStore.open(store).result().list().result():
        name, _, file = key.decode().rpartition('/')
        is_array = file in ('.zarray', 'zarr.json')
        if is_array and name.partition('.')[0] in ('params', 'ema_params1', 'step', 'epoch'):
            at = dict(driver='auto', kvstore=dict(store, path=f'{name}/'))
            arrays[name] = ts.open(at, open=True, read=True).result().read().result()
    return arrays


def from_flax(arrays):
    """Arrays by their flax names -> a checkpoint: official names, float32, kernels as (out, in)."""
    ckpt = dict(params={}, ema_params1={})
    for name, x in arrays.items():
        part, _, name = re.sub(r'\.blocks_(\d+)\.', r'.blocks.\1.', name).partition('.')
        if part in ('step', 'epoch'):
            ckpt[part] = int(x)
        elif part in ckpt:
            x = torch.from_numpy(np.array(x, dtype=np.float32))     # a copy: theirs is read-only
            if name.endswith('.kernel'):
                name, x = name.removesuffix('kernel') + 'weight', x.T.contiguous()
            ckpt[part][name] = x
    return ckpt

# -------------------------------------------------------------------------------------------------
# in: Lightning

def read_lightning(ckpt):
    """A checkpoint of the Lightning reproduction, Ugness/elf-torch -> as from_flax."""
    params = {name.removeprefix('model.'): x for name, x in ckpt['state_dict'].items()
              if name.startswith('model.')}     # not its frozen encoder
    for state in (params, ckpt['ema']['shadow']):
        # its network differs in a name, and in the GELU
        state['final_layer.norm_final.weight'] = state.pop('final_layer.norm.weight')
    # Lightning itself counts the steps of each of its optimizers
    return dict(params=params, ema_params1=ckpt['ema']['shadow'], epoch=ckpt['epoch'],
                step=ckpt['_my_opt_step'], of_lightning=dict(gelu='none'))

# -------------------------------------------------------------------------------------------------
# out: the official layout

def config_text(c):
    """An ELFConfig as the text of an official config.yml, its samplers as sampling_configs."""
    import yaml
    official = {'model': name for name, m in MODELS.items()
                if (m.n_layer, m.n_embd, m.n_head) == (c.n_layer, c.n_embd, c.n_head)}
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


def write_official(folder, params, ema, step, epoch, config):
    """
    Weights, ours or theirs, and an ELFConfig -> folder/checkpoint_<step> (the path returned),
    config.yml, model.safetensors with the EMA, tokenizer/ and encoder/ if they are no hub ids. All
    or nothing, in a new folder. UserError.
    """
    params, ema = (to_official_names(from_official_names(state)) for state in (params, ema))
    folder = os.path.abspath(folder)
    with whole(folder) as aside:        # refuses, at its end, a folder that has files
        os.makedirs(aside)
        config = carry(config, aside)
        Path(aside, 'config.yml').write_text(config_text(config))
        save_file(ema, f'{aside}/model.safetensors')
        with open(f'{aside}/checkpoint_{step}', 'wb') as f:
            torch.save(dict(params=params, ema_params1=ema, opt_state=new_optimizer(params),
                            step=step, epoch=epoch), f)
    return f'{folder}/checkpoint_{step}'

# -------------------------------------------------------------------------------------------------

def main(source, folder):
    path = find_checkpoint(source)
    with from_hub('no readable checkpoint of an ELF', path):
        if is_jax(path):
            ckpt = from_flax(read_orbax(path) if os.path.isdir(path) else read_msgpack(path))
        else:
            ckpt = load_checkpoint(path)
        if 'state_dict' in ckpt:
            ckpt = read_lightning(ckpt)
        step = int(ckpt.get('iter_num', ckpt.get('step')) or step_in(path))
        ema, params = networks_in(ckpt)
        settings = read_settings(path, ckpt, from_official_names(ema))
        config = ELFConfig(**settings | ckpt.get('of_lightning', {}))
        with torch.device('meta'):
            net = ELF(config)
        for state in (ema, params):
            net.load_state_dict(from_official_names(state), assign=True)        # they fit, all
    if params is ema:
        print(f"{path} has the EMA or the weights alone; taking them for both")
    out = write_official(folder, params, ema, step, ckpt.get('epoch', 0), config)
    print(f"{out}: EMA and weights of step {step}, no optimizer state")


if __name__ == '__main__':
    begin()
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        print(__doc__.strip())
        sys.exit(0 if '--help' in sys.argv else 1)
