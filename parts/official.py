"""
The official code's layout: names and shapes of its weights, its config.yml, its samplers -> ours.

It differs in names, two transposed matrices, and settings to translate; what a config.yml leaves
out is the default of their class, not what the published models were trained with.
"""
import os
import re
from pathlib import Path

import torch

from parts.process import from_hub

# -------------------------------------------------------------------------------------------------
# weights

# they keep two layers as (in, out); ours are Linear, so that Muon sees every matrix as (out, in)
OFFICIAL_WEIGHTS = {'proj.weight': 'proj_kernel', 'proj.bias': 'proj_bias',
                    'unembed.weight': 'unembed_kernel', 'unembed.bias': 'unembed_bias'}


def to_official_names(state):
    """Weights under our names -> copies under the official names and in their layouts."""
    official = {}
    for name, x in state.items():
        x = x.t() if name in OFFICIAL_WEIGHTS else x        # a bias stays as it is
        copy = x.clone(memory_format=torch.contiguous_format)
        official[OFFICIAL_WEIGHTS.get(name, name)] = copy
    return official


def from_official_names(state):
    """The tensors of a state dict, ours or theirs, wrapped or not -> our names and layouts."""
    ours = {official: name for name, official in OFFICIAL_WEIGHTS.items()}
    renamed = {}
    for name, x in state.items():
        name = re.sub(r'^(_orig_mod\.|module\.)+', '', name)    # torch.compile, DDP
        if isinstance(x, torch.Tensor):
            renamed[ours.get(name, name)] = x.t() if name in ours else x
    return renamed


def read_sizes(state):
    """The sizes of the ELF that these weights, under our names, are of. Raises if of none."""
    D = state['t_emb_tokens'].shape[-1]
    layers = {int(name.split('.')[1]) for name in state if name.startswith('blocks.')}
    return dict(
        n_layer=max(layers) + 1,
        n_embd=D,
        n_head=D // len(state['blocks.0.attn.q_norm.weight']),
        vocab_size=len(state['unembed.bias']),
        latent_dim=len(state['self_cond_proj.bias']),
        bottleneck=len(state['text_proj.proj1.weight']),
        n_time=state['t_emb_tokens'].shape[1],
        n_scale=state['self_cond_cfg_tokens'].shape[1],
        n_mode=state['mode_tokens'].shape[1])

# -------------------------------------------------------------------------------------------------
# config.yml, which holds only what its run overrode [configs/config.py]

# their setting: ours, and the default of their class, which is not that of the published runs
OFFICIAL_SETTINGS = dict(
    denoiser_p_mean=('t_mean', 0.8), denoiser_p_std=('t_std', 0.8), t_eps=('t_eps', 0.05),
    denoiser_noise_scale=('noise_scale', 1.0), self_cond_prob=('self_cond_prob', 0.5),
    self_cond_cfg_min=('w_min', 0.5), self_cond_cfg_max=('w_max', 5.0),
    decoder_prob=('decoder_prob', 0.5), decoder_p_mean=('decoder_mean', 0.8),
    decoder_p_std=('decoder_std', 0.8), decoder_noise_scale=('decoder_noise_scale', 1.0),
    encoder_model_name=('encoder', 't5-small'), tokenizer_name=('tokenizer', ''),
    latent_mean=('latent_mean', 0.0), latent_std=('latent_std', 1.0),
    max_length=('max_length', 128), max_input_length=('max_input_length', 0),
    pad_token=('pad_token', 'pad'), label_drop_prob=('drop_cond_prob', 0.0),
    gelu=('gelu', 'tanh'))      # not theirs: convert.py writes it for the Lightning reproduction


def sde(gamma, w):
    return dict(sampler='sde', gamma=gamma, w=w, cfg=1.0, grid='logit_normal')


# their samplers by number of steps [configs/sampling_configs], the default first; 8 and 16 of the
# unconditional ones are from the paper
UNCONDITIONAL = {32: sde(1.5, 3.0), 64: sde(1.0, 3.0), 8: sde(2.0, 3.0), 16: sde(2.0, 3.0)}
UNCONDITIONAL_LARGE = {64: sde(1.0, 3.0)} | UNCONDITIONAL      # ELF-M and ELF-L
CONDITIONAL = {64: dict(sampler='ode', gamma=0.0, w=1.0, cfg=2.0, grid='logit_normal')}
FEW_STEP = {steps: sde(1.5, 2.5) for steps in (8, 4, 2, 1)} | {16: sde(2.0, 2.0), 32: sde(2.0, 2.0)}
# an entry of sampling_configs: the default of each key
SAMPLING_DEFAULTS = dict(sampling_method='ode', num_sampling_steps=[50], cfgs=[1], sde_gamma=0.0,
                         self_cond_cfg_scales=[1.0], time_schedule='logit_normal')


def read_config_yml(path, sizes):
    """The official config.yml beside a checkpoint -> settings for an ELFConfig, without sizes."""
    file = Path(path).with_name('config.yml')
    unconditional = UNCONDITIONAL if sizes['n_layer'] <= 12 else UNCONDITIONAL_LARGE
    if not os.path.lexists(file):
        print(f"no config.yml beside {path}: taking the published OpenWebText settings")
        return sampler_settings(unconditional)
    import yaml
    with from_hub('not readable as the official settings', str(file)):
        official = yaml.safe_load(file.read_bytes()) or {}
        official = {k: v for k, v in official.items() if v is not None}
        # str: PyYAML reads 5e-2 as text, and float(True) is a number
        settings = {name: type(default)(str(official.get(key, default)))
                    for key, (name, default) in OFFICIAL_SETTINGS.items()}
        settings |= sampler_settings(read_samplers(official, unconditional))
    settings['tokenizer'] = settings['tokenizer'] or settings['encoder']
    return settings


def read_samplers(official, unconditional):
    """The samplers by number of steps that a config.yml has, or those of the file it names."""
    named = official.get('sampling_configs_path', '')
    if 'sampling_configs' not in official:
        # the two are settings of progressive distillation
        if official.keys() & {'teacher_path', 'pd_step_size'} or 'fewstep' in named:
            return FEW_STEP
        if 'uncond' in named:
            return unconditional
        if official.get('max_input_length'):
            return CONDITIONAL
    samplers = {}
    for entry in official.get('sampling_configs', [{}]):
        entry = SAMPLING_DEFAULTS | entry
        # lists hold values to try; the first one counts
        sampler = dict(sampler=entry['sampling_method'], gamma=float(entry['sde_gamma']),
                       w=float(entry['self_cond_cfg_scales'][0]), cfg=float(entry['cfgs'][0]),
                       grid=entry['time_schedule'])
        for steps in entry['num_sampling_steps']:
            samplers.setdefault(int(steps), sampler)
    return samplers


def sampler_settings(samplers):
    """
    Samplers by number of steps -> sampler, steps, gamma, w, cfg, grid of the first; by_steps: what
    differs from these at the other numbers.
    """
    steps, *others = samplers
    by_steps = {n: dict(samplers[n].items() - samplers[steps].items()) for n in others}
    return dict(samplers[steps], steps=steps, by_steps=by_steps)
