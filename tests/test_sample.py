"""
Samplers against the official ones, grids, oracles, and that text i depends on (seed, i) alone.
    python -m pytest -q tests/test_sample.py
"""
import copy
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from configurator import UserError
from model import ELF, ELFConfig
from sample import cut, decode_ids, generate, pack_linears, printable, row_seed, sample_texts, time_grid
from test_model import official  # noqa: F401, a fixture: the model of golden/model.npz

GOLDEN = os.path.join(ROOT, 'tests', 'golden')


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('case', ['uncond_ode', 'uncond_sde', 'cond_ode', 'cond_sde'])
def test_samplers_equal_the_official_ones(case, packed, official):
    data = np.load(os.path.join(GOLDEN, 'sampler.npz'))
    how = json.loads(str(data['config']))['cases'][case]
    get = lambda name: torch.tensor(data[f'{case}/{name}'])
    cond = (get('cond_seq'), get('cond_seq_mask')) if how['conditional'] else (None, None)
    model = official
    if packed:
        pack_linears(model := copy.deepcopy(official), 'cpu (CPU), float32 (as asked)')
        assert 'forward' in vars(model.unembed) or not torch.backends.mkl.is_available()
    z = generate(model, get('z_init'), get('t_steps'), how['sampling_method'], how['sde_gamma'], how['self_cond_cfg_scale'], how['cfg_scale'], *cond, step_noise=get('eps'))
    assert (z - get('z')).norm() <= 1e-4 * get('z').norm()
    assert torch.equal(decode_ids(model, z, how['self_cond_cfg_scale']).int(), get('ids'))


def test_packed_bfloat16_rounds_where_autocast_does(official):
    torch.manual_seed(0)
    z, t = torch.randn(2, 9, official.config.latent_dim), torch.rand(2)
    run = lambda model: [model.denoise(z, z, t, 1 + t), model.decode(z, 1 + t)]
    with torch.no_grad():
        exact = run(official)
        with torch.autocast('cpu', torch.bfloat16):
            plain = run(official)
            pack_linears(model := copy.deepcopy(official), 'cpu (CPU), bfloat16 autocast (as asked)')
            packed = run(model)
    for a, b, c in zip(exact, plain, packed):
        assert c.dtype == b.dtype and 0.95 < (c - a).norm() / (b - a).norm() < 1.05


@pytest.mark.parametrize('sampler, gamma', [('ode', 0.0), ('sde', 1.5), ('sde', 40.0)])
@pytest.mark.parametrize('grid', ['logit_normal', 'uniform', 'quantile'])
def test_with_an_oracle_every_step_lies_on_the_path_to_the_data(sampler, gamma, grid):
    c, x0, seen = ELFConfig(), torch.randn(3, 5, 4), []
    oracle = SimpleNamespace(config=c, denoise=lambda z, x_prev, t, w: x0)
    noise = torch.randn(3, 5, 4) * (sampler == 'ode')       # the SDE adds noise of its own: here, none
    generate(oracle, noise, time_grid(16, grid, c, torch.Generator().manual_seed(0)), sampler, gamma, step_noise=torch.zeros(15, 3, 5, 4),
             watch=lambda i, t, z: seen.append((t[:, None, None], z)))
    assert len(seen) == 17 and all(torch.allclose(z, t * x0 + (1 - t) * noise, atol=1e-5) for t, z in seen)


def test_grids():
    c = ELFConfig()
    for schedule in ('logit_normal', 'uniform', 'quantile'):
        t = time_grid(32, schedule, c, torch.Generator().manual_seed(1))
        assert t.shape == (33,) and t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all() and t.dtype == torch.float32
        assert time_grid(1, schedule, c).tolist() == [0, 1]
    draws = time_grid(20001, 'logit_normal', c, torch.Generator().manual_seed(0))[1:-1]
    assert torch.allclose(draws.logit().mean(), torch.tensor(-1.5), atol=0.02) and torch.allclose(draws.logit().std(), torch.tensor(0.8), atol=0.02)
    assert time_grid(2, 'quantile', c)[1].logit().item() == pytest.approx(-1.5, abs=1e-5)
    for bad in ((0, 'uniform'), (4, 'cosine')):
        with pytest.raises(UserError):
            time_grid(*bad, c)


def test_text_i_depends_on_seed_and_i_alone():
    torch.manual_seed(0)
    model = ELF(ELFConfig(n_layer=1, n_embd=16, n_head=2, latent_dim=8, bottleneck=4, vocab_size=40, max_length=6)).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.3)
    tokenizer = SimpleNamespace(eos_token_id=1, decode=lambda ids, **_: ' '.join(map(str, ids)))
    how = dict(device=torch.device('cpu'), steps=6, sampler='sde', gamma=1.5, w=3.0, cfg=1.0, grid='logit_normal')
    whole = sample_texts(model, tokenizer, 5, 5, 3, **how)
    torch.manual_seed(99)
    single = sample_texts(model, tokenizer, 5, 1, 3, **how)
    ranks = sorted(sum((sample_texts(model, tokenizer, 5, 2, 3, rank=r, world=2, **how) for r in (0, 1)), []), key=lambda x: x['id'])      # no group: shares
    assert whole == single == ranks and len({x['generated'] for x in whole}) > 1
    assert [x['generated'] for x in sample_texts(model, tokenizer, 5, 5, 4, **how)] != [x['generated'] for x in whole]
    assert len({row_seed(s, i) for s in range(30) for i in range(30)}) == 900


def test_a_condition_is_coded_cut_kept_and_left_out_of_the_text():
    c, seen = ELFConfig(latent_dim=2, max_length=8, max_input_length=3), []
    position = torch.nn.functional.one_hot(torch.arange(10, 18), 20).float().expand(2, -1, -1)      # decodes to 10, 11, ... 17
    model = SimpleNamespace(config=c, denoise=lambda z, x_prev, t, w: seen.append((z, x_prev)) or z, decode=lambda z, w: position[:len(z)])
    encoder = lambda *args: seen.append(args) or torch.full((2, 8, 2), 7.0)
    tokenizer = type('', (), dict(eos_token_id=1, pad_token_id=0, decode=lambda self, ids, **_: str(ids),
                               __call__=lambda self, text, add_special_tokens: dict(input_ids=[*map(ord, text)] + [2] * add_special_tokens)))()
    texts = sample_texts(model, tokenizer, 2, 2, 0, torch.device('cpu'), 3, 'sde', 1.5, 3.0, 1.0, 'uniform', inputs=['d', 'defg'], encoder=encoder)
    (ids, valid, cond), *calls = seen
    assert ids.tolist() == [[100, 1] + [0] * 6, [100, 101, 102] + [0] * 5]          # EOS ends it, or is cut off
    assert torch.equal(valid, cond) and cond.tolist() == [[True] * 2 + [False] * 6, [True] * 3 + [False] * 5]
    assert len(calls) == 3 and all(((x == 7).all(-1) == cond).all() for call in calls for x in call)
    assert [x['ids'] for x in texts] == [[12, 13, 14, 15, 16], [13, 14, 15, 16, 17]] and [x['input'] for x in texts] == ['d', 'defg']


@pytest.mark.parametrize('args', [['--num_samples=0'], ['--batch_size=0'], ['--seed=-1'], ['--trace=-1'], ['--input=a', '--input_file=b']])
def test_settings_out_of_range(run, args):
    with pytest.raises(UserError, match='start at 1'):
        run('sample.py', *args)


def test_the_least_settings_are_allowed(run):
    with pytest.raises(UserError, match='no model in out/none'):
        run('sample.py', '--out_dir=out/none', '--num_samples=1', '--batch_size=1', '--seed=0', '--trace=0', '--device=cpu')


@pytest.mark.parametrize('script', ['sample.py', 'eval.py'])
def test_an_out_dir_is_not_looked_for_on_the_hub(run, script):
    with pytest.raises(UserError, match='no model in out/none: train one'):
        run(script, '--out_dir=out/none', '--device=cpu')


def test_cut_and_printable():
    assert cut([5, 1, 6], 1) == [5] and cut([5, 6], 1) == [5, 6] and cut([1], 1) == []
    assert printable('a\x1b[2Jb\nc é') == 'a\\x1b[2Jb c é'
