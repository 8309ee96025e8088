"""
The official code's layout: names and shapes of its weights, its config.yml, its samplers -> ours.

It differs in names, two transposed matrices, and settings to translate; what a config.yml leaves
out is the default of their class, not what the published models were trained with.
"""
import math
import os
import re

import torch

from parts.process import UserError, one_line

# -------------------------------------------------------------------------------------------------
# weights

# they keep two layers as (in, out); ours are Linear, so that Muon sees every matrix as (out, in)
OFFICIAL_WEIGHTS = {'proj.weight': 'proj_kernel', 'proj.bias': 'proj_bias',
                    'unembed.weight': 'unembed_kernel', 'unembed.bias': 'unembed_bias'}


def to_official_names(state):
    """Weights under our names -> copies under the official names and in their layouts."""
    official = {}
    for name, x in state.items():
        is_kernel = name in OFFICIAL_WEIGHTS and x.ndim == 2
        x = x.detach().clone()
        official[OFFICIAL_WEIGHTS.get(name, name)] = (x.T if is_kernel else x).contiguous()
    return official


def from_official_names(state):
    """The tensors of a state dict, ours or theirs, wrapped or not -> our names and layouts."""
    ours = {official: name for name, official in OFFICIAL_WEIGHTS.items()}
    renamed = {}
    for name, x in state.items():
        name = re.sub(r'^(_orig_mod\.|module\.)+', '', str(name))       # torch.compile, DDP
        if isinstance(x, torch.Tensor):
            renamed[ours.get(name, name)] = x.T if name in ours and x.ndim == 2 else x
    return renamed


def read_sizes(state, path):
    """The sizes of the ELF that these weights are of, under our names -> dict. UserError."""
    try:
        D, head = state['t_emb_tokens'].shape[-1], state['blocks.0.attn.q_norm.weight'].numel()
        layers = {int(name.split('.')[1]) for name in state if name.startswith('blocks.')}
        return dict(
            n_layer=max(layers) + 1,
            n_embd=D,
            n_head=D // head if D % head == 0 else 1,       # 1: check_fit will name q_norm
            vocab_size=len(state['unembed.bias']),
            latent_dim=len(state['self_cond_proj.bias']),
            bottleneck=len(state['text_proj.proj1.weight']),
            n_time=state['t_emb_tokens'].shape[1],
            n_scale=state['self_cond_cfg_tokens'].shape[1],
            n_mode=state['mode_tokens'].shape[1])
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as e:
        raise UserError(f"{path} holds no ELF weights: {one_line(e)} while reading the sizes off "
                        f"them; it has {', '.join(list(state)[:5])}, ...") from None


def check_fit(want, state, path):
    """Compare weights with a model's state dict: UserError with all that is missing or wrong."""
    wrong = [f"missing {name}" for name in want.keys() - state.keys()]
    wrong += [f"left over {name}" for name in state.keys() - want.keys()]
    for name in want.keys() & state.keys():
        is_, expected = tuple(state[name].shape), tuple(want[name].shape)
        if is_ != expected:
            wrong.append(f"{name} is {is_}, expected {expected}")
    if wrong:
        raise UserError(f"{path} does not fit an ELF of its sizes: {'; '.join(sorted(wrong))}")

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

# layers, width, heads
PUBLISHED_SIZES = {(12, 768, 12): 'ELF-B', (24, 1056, 16): 'ELF-M', (32, 1280, 16): 'ELF-L'}


def sde(gamma, w):
    return dict(sampler='sde', gamma=gamma, w=w, cfg=1.0, grid='logit_normal')


# their samplers by number of steps [configs/sampling_configs]; 8 and 16 are from the paper
UNCONDITIONAL = {32: sde(1.5, 3.0), 64: sde(1.0, 3.0), 8: sde(2.0, 3.0), 16: sde(2.0, 3.0)}
CONDITIONAL = {64: dict(sampler='ode', gamma=0.0, w=1.0, cfg=2.0, grid='logit_normal')}
FEW_STEP = {steps: sde(1.5, 2.5) for steps in (8, 4, 2, 1)} | {16: sde(2.0, 2.0), 32: sde(2.0, 2.0)}
PUBLISHED_SAMPLERS = {'uncond_sampling_configs.yml': UNCONDITIONAL,
                      'cond_sampling_configs.yml': CONDITIONAL,
                      'uncond_fewstep_sampling_configs.yml': FEW_STEP}
# an entry of sampling_configs: the default of each key, and what we have for their words
SAMPLING_DEFAULTS = dict(sampling_method='ode', num_sampling_steps=[50], cfgs=[1], sde_gamma=0.0,
                         self_cond_cfg_scales=[1.0], time_schedule='logit_normal')
# the last of each is ours
SAMPLING_CHOICES = dict(sampling_method=('ode', 'sde', 'sde_exact'),
                        time_schedule=('logit_normal', 'uniform', 'quantile'))


def read_config_yml(path, sizes):
    """The official config.yml beside a checkpoint -> settings for an ELFConfig, without sizes."""
    file = os.path.join(os.path.dirname(path), 'config.yml')
    size = PUBLISHED_SIZES.get((sizes['n_layer'], sizes['n_embd'], sizes['n_head']))
    if not os.path.lexists(file):
        print(f"no config.yml beside {path}: taking the published OpenWebText settings")
        return choose_sampler(UNCONDITIONAL, 64 if size in ('ELF-M', 'ELF-L') else 32)
    import yaml
    try:
        with open(file, encoding='utf-8') as f:
            official = yaml.safe_load(f) or {}
        official = {k: v for k, v in official.items() if v is not None}
        settings = {name: to_type(key, official.get(key, default), default)
                    for key, (name, default) in OFFICIAL_SETTINGS.items()}
        settings |= read_sampling(official, size or official.get('model', 'ELF-B'))
    except (OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise UserError(f"{file} is not readable as the official settings: {one_line(e)}") from None
    settings['tokenizer'] = settings['tokenizer'] or settings['encoder']
    if official.get('model', size) != size:
        print(f"{file} says {official['model']}, the weights have n_layer={sizes['n_layer']}, "
              f"n_embd={sizes['n_embd']}; going by the weights")
    return settings


def to_type(key, value, default):
    """The value as the type of default, if that keeps it: PyYAML reads 5e-2 as text. ValueError."""
    kind = type(default)
    wrong = isinstance(value, bool) or (kind is str and not isinstance(value, str))
    if not wrong and kind is not str:
        value = float(value)
        wrong = not math.isfinite(value) or (kind is int and value % 1)
    if wrong:
        raise ValueError(f"{key}: {value!r} is not of type {kind.__name__}")
    return kind(value)


def read_sampling(official, size):
    """The samplers that a .yml has and those of the file it names -> settings. ValueError."""
    entries = official.get('sampling_configs', [])
    named = os.path.basename(str(official.get('sampling_configs_path', '')))
    published = PUBLISHED_SAMPLERS.get(named, {})
    if 'teacher_path' in official or 'pd_step_size' in official:        # progressive distillation
        published = FEW_STEP
    elif official.get('max_input_length') and not entries and not named:
        published = CONDITIONAL
    samplers = {}
    for entry in entries or ([] if published else [{}]):
        entry = SAMPLING_DEFAULTS | entry
        for key, allowed in SAMPLING_CHOICES.items():
            if entry[key] not in allowed:
                raise ValueError(f"{key}: {entry[key]!r} is not known")
        # lists hold values to try; the first one counts
        sampler = dict(sampler=entry['sampling_method'],
                       gamma=to_type('sde_gamma', entry['sde_gamma'], 0.0),
                       w=to_type('self_cond_cfg_scales', entry['self_cond_cfg_scales'][0], 0.0),
                       cfg=to_type('cfgs', entry['cfgs'][0], 0.0),
                       grid=entry['time_schedule'])
        for steps in entry['num_sampling_steps']:
            samplers.setdefault(to_type('num_sampling_steps', steps, 0), sampler)
    samplers |= {k: x for k, x in published.items() if k not in samplers}
    first = next(iter(samplers), 0)         # 0: no entry names a number of steps
    if published is UNCONDITIONAL and size in ('ELF-M', 'ELF-L'):
        first = 64
    elif published is FEW_STEP:
        first = 8
    return choose_sampler(samplers, first)


def choose_sampler(samplers, steps):
    """
    Samplers by number of steps -> sampler, steps, gamma, w, cfg, grid of one of them; by_steps:
    what differs from these at the other numbers.
    """
    own = samplers[steps]
    by_steps = {n: {k: x for k, x in other.items() if x != own[k]}
                for n, other in samplers.items() if n != steps}
    return dict(own, steps=steps, by_steps=by_steps)
