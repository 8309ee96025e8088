"""
model.py against numbers of the official code (golden/README.md): network, loss, gradients, text
encoder; and what the objective promises: rows, draws, guidance, masks, precision.
    python -m pytest -q tests/test_model.py
"""
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import T5Config, T5EncoderModel

from configurator import UserError
from model import (ELF, MODELS, Draws, ELFConfig, TextEncoder, compute_loss, draw, encode_rows,
                   velocity)
from parts.official import to_official_names

GOLDEN = os.path.join(ROOT, 'tests', 'golden')
SMALL = ELFConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=29, latent_dim=8, bottleneck=4,
                  n_time=3, n_scale=2, n_mode=5, drop_cond_prob=0.3)


def golden(file):
    """A golden file -> its arrays as tensors, whole numbers as int64, and its config."""
    arrays = {}
    with np.load(os.path.join(GOLDEN, file)) as f:
        for name in f.files:
            if name != 'config':
                x = torch.tensor(f[name])
                arrays[name] = x.long() if x.dtype == torch.int32 else x
        return arrays, json.loads(str(f['config']))


def weights_in(arrays):
    """The weights of a golden file, under the official names."""
    return {name[2:]: x for name, x in arrays.items() if name.startswith('p/')}


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def small(seed=0, **changes):
    """A small ELF without zeros in its weights."""
    torch.manual_seed(seed)
    net = ELF(replace(SMALL, **changes))
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return net.eval()


def batch(net, B=6, T=7, seed=1, **draws):
    """
    The arguments of compute_loss after net: rows of 2 positions of condition, 4 that count and 1 of
    padding. draws: what replaces a field of the Draws, a flag (one for all rows, or a list).
    """
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(B, T, net.config.latent_dim, generator=g)
    tokens = torch.randint(0, net.config.vocab_size, (B, T), generator=g)
    cond, mask = torch.zeros(B, T), torch.ones(B, T)
    cond[:, :2], mask[:, :2], mask[:, -1] = 1, 0, 0
    for name in ('is_decode', 'self_cond', 'drop_cond'):
        if name in draws:
            draws[name] = torch.tensor(draws[name]).bool().expand(B).clone()
    return [x0, tokens, mask, cond, replace(draw(net.config, B, T, g, 'cpu'), **draws)]


def gradients(net, args):
    net.zero_grad(set_to_none=True)
    compute_loss(net, *args)[0].backward()
    return {name: p.grad for name, p in net.named_parameters()}


class Spy:
    """Stands around a net as DDP does, and notes what each call was given, with gradient or not."""
    def __init__(self, net):
        self.module, self.calls = net, []

    def __call__(self, z, x_prev, t, w, n_decode=0):
        grad = torch.is_grad_enabled()
        self.calls.append(dict(z=z, x_prev=x_prev, t=t, w=w, n=n_decode, grad=grad))
        return self.module(z, x_prev, t, w, n_decode=n_decode)

# --------------------------------------------------------------------------------------------------
# the official numbers

@pytest.fixture(scope='module')
def official(tmp_path_factory):
    """The network with the weights of golden/model.npz, loaded as a checkpoint."""
    path = str(tmp_path_factory.mktemp('golden') / 'checkpoint_1')
    torch.save({'params': weights_in(golden('model.npz')[0])}, path)
    return ELF.from_pretrained(path)


@torch.no_grad()
def test_forward_and_decode(official):
    m, _ = golden('model.npz')
    args = *m['x'].chunk(2, dim=-1), m['t'], m['self_cond_cfg_scale']
    assert rel(official.denoise(*args), m['denoise_out']) < 1e-5
    for n in range(4):      # either half may be empty
        x_hat, logits = official(*args, n_decode=n)
        assert len(x_hat) == 3 - n and len(logits) == n
        torch.testing.assert_close(x_hat, m['denoise_out'][:3 - n], rtol=0, atol=1e-4)
        torch.testing.assert_close(logits, m['decode_logits'][3 - n:], rtol=0, atol=1e-4)
    assert rel(logits, m['decode_logits']) < 1e-5


@pytest.mark.parametrize('case', ['train_case1', 'train_case2', 'train_case3', 'train_case4',
                                  'train_port_case5'])
def test_loss_and_gradients(official, case):
    d, config = golden(case + '.npz')
    official.config.decoder_noise_scale = config['decoder_noise_scale']
    is_decode = d['decoder_step_active'].bool().expand(4).clone()
    # by position: the order of the fields is part of the interface
    draws = Draws(d['t'], d['noise'], is_decode, d['decoder_lambda_t'], d['decoder_noise_unit'],
                  d['use_self_cond_mask'].bool(), d['self_cond_cfg_scale'],
                  d['label_drop_mask'].bool())
    args = d['x0'], d['input_ids'], d['loss_mask'], d['cond_seq_mask'], draws
    loss, parts = compute_loss(official, *args)
    assert loss.item() == pytest.approx(d['loss'].item(), rel=1e-6)
    for part in parts:
        assert parts[part].item() == pytest.approx(d[part + '_loss'].item(), rel=1e-6)
    ours = to_official_names(gradients(official, args))
    names = weights_in(golden('model.npz')[0])
    assert ours.keys() == names.keys()
    want = np.ascontiguousarray(d['grad'].numpy().T).view('<f4')[:, 0]
    assert rel(torch.cat([ours[name].flatten() for name in names]), torch.tensor(want)) < 1e-5


@pytest.mark.parametrize('name, count', [
    ('ELF-B', 104_579_940), ('ELF-M', 342_540_036), ('ELF-L', 652_103_332)])
def test_parameter_counts(name, count):
    with torch.device('meta'):
        assert sum(p.numel() for p in ELF(MODELS[name]).parameters()) == count


def test_first_weights():
    torch.manual_seed(0)
    net = ELF(replace(SMALL, n_embd=64))
    for name, p in net.named_parameters():
        if name == 'final_layer.linear.weight' or name.endswith('bias'):
            assert not p.any(), name
        elif 'embedder' in name or 'tokens' in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        elif p.ndim == 2:       # Xavier, uniform
            assert p.abs().max().item() == pytest.approx((6 / sum(p.shape)) ** 0.5, rel=0.05), name
        else:
            assert (p == 1).all(), name
    x = torch.randn(2, 5, 8)
    first_guess = net.denoise(x, x, torch.rand(2), torch.ones(2))
    assert not first_guess.any()        # the mean of the data

# --------------------------------------------------------------------------------------------------
# the text encoder

@pytest.fixture(scope='module')
def t5(tmp_path_factory):
    arrays, config = golden('t5.npz')
    model = T5EncoderModel(T5Config(**config['hf_config']))
    weights = weights_in(arrays)
    weights['encoder.embed_tokens.weight'] = weights['shared.weight']
    model.load_state_dict(weights)
    folder = str(tmp_path_factory.mktemp('t5'))
    model.save_pretrained(folder)
    return folder, arrays


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_text_encoder(t5, attention):
    folder, d = t5
    encoder, ids, valid, cond = TextEncoder(folder), d['input_ids'], d['valid'], d['is_cond']
    encoder.train().model.set_attn_implementation(attention)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.parameters())
    plain, pairs = encoder(ids, valid), encoder(ids, valid, cond)
    assert rel(plain * valid[..., None], d['out_2d']) < 1e-5
    assert rel(pairs * valid[..., None], d['out_3d']) < 1e-5
    assert rel(TextEncoder(folder, 0.05, 0.2)(ids, valid), (plain - 0.05) / 0.2) < 1e-5
    whole = torch.ones_like(valid)
    assert rel(encoder(ids), encoder(ids, whole, ~whole)) < 1e-5

    def change(where, **drop):
        """How far each latent moves when the ids there are others -> (B, T, C)."""
        others = torch.where(where, (ids + 7) % 101, ids)
        return (encoder(others, valid, cond, **drop) - encoder(ids, valid, cond, **drop)).abs()

    target, drop = valid & ~cond, torch.tensor([True, False, True])
    dropped = target & drop[:, None]
    assert change(target)[cond].max() <= 1e-6
    assert change(~valid)[valid].max() <= 1e-6
    assert change(cond)[target].max() > 1e-2
    assert change(cond, drop_cond=drop)[dropped].max() <= 1e-6
    assert change(cond, drop_cond=drop)[target & ~dropped].max() > 1e-2


def test_rows_without_padding_and_condition_need_no_mask():
    seen, some, draws = [], torch.tensor([[True, True, False]]), SimpleNamespace(drop_cond='drop')
    for valid, cond in ((some | True, some & False), (some, some & False), (some | True, some)):
        rows = torch.arange(3)[None], valid, cond
        encode_rows(lambda *args: seen.append(args[1:]), rows, draws, ELFConfig(), 'cpu')
    assert seen[0] == (None,) and len(seen[1]) == 1 and torch.equal(seen[1][0], some)
    assert torch.equal(seen[2][1], some) and seen[2][2] == 'drop'


def test_text_encoder_must_exist(tmp_path):
    with pytest.raises(UserError, match='no text encoder: .*is no file or folder here'):
        TextEncoder(str(tmp_path / 'none'))

# --------------------------------------------------------------------------------------------------
# the objective

def test_velocity_is_capped():
    t = torch.tensor([0.0, 0.5, 0.99, 1.0])
    assert velocity(torch.tensor(3.0), torch.tensor(1.0), t, 0.05).tolist() == [2, 4, 40, 40]


@pytest.mark.parametrize('t', [0.0, 1.0])
def test_endpoints(t):
    net = small()
    args = batch(net, t=torch.full((6,), t), lam=torch.full((6, 7, 1), t), self_cond=False,
                 is_decode=[0, 0, 0, 0, 1, 1], drop_cond=[0, 1, 0, 0, 0, 0])
    x0, _, _, cond, d = args
    spy = Spy(net)
    compute_loss(spy, *args)
    (call,), c = spy.calls, net.config
    x0[1, :2] = 0       # its condition is dropped
    condition = cond[:4, :, None].bool()
    free = x0 if t else c.noise_scale * d.noise
    corrupt = x0 if t else c.decoder_noise_scale * d.decode_noise
    assert torch.equal(call['z'][:4], torch.where(condition, x0[:4], free[:4]))
    assert torch.equal(call['z'][4:], corrupt[4:])
    assert torch.equal(call['x_prev'][:4], torch.where(condition, x0[:4], 0.0))
    assert not call['x_prev'][4:].any()
    assert call['t'].tolist() == [t] * 4 + [1.0] * 2
    assert torch.equal(call['w'], d.w) and call['n'] == 2


def test_each_row_is_in_exactly_one_loss():
    net = small()
    args = batch(net, is_decode=[0, 1, 0, 0, 1, 0], self_cond=[1, 1, 0, 1, 0, 0])
    x0, tokens, mask, cond, d = args
    for row in range(6):
        of_row = mask * (torch.arange(6) == row)[:, None]
        loss, parts = compute_loss(net, x0, tokens, of_row, cond, d)
        inside, outside = ('ce', 'l2') if d.is_decode[row] else ('l2', 'ce')
        assert parts[inside] == loss.detach() > 0 and parts[outside] == 0


def test_order_of_rows_does_not_matter():
    net = small()
    args = batch(net, is_decode=[0, 1, 0, 0, 1, 0], self_cond=[1, 1, 0, 1, 0, 0],
                 drop_cond=[0, 1, 1, 0, 0, 0])
    loss = compute_loss(net, *args)[0].item()
    for seed in range(5):
        p = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        draws = Draws(**{name: x[p] for name, x in vars(args[4]).items()})
        moved = compute_loss(net, *[x[p] for x in args[:4]], draws)[0]
        assert moved.item() == pytest.approx(loss, rel=1e-5)


def test_only_positions_in_the_mask_count():
    net = small()
    x0, tokens, mask, cond, d = batch(net)

    def mean(mask, tokens=tokens):
        return compute_loss(net, x0, tokens, mask, cond, d)[0].item()

    half = mask * (torch.arange(7) < 4)
    rest = mask - half
    sums = mean(half) * half.sum() + mean(rest) * rest.sum()
    assert mean(mask) == pytest.approx((sums / mask.sum()).item(), rel=1e-5)
    assert mean(torch.zeros_like(mask)) == 0
    assert mean(mask) == mean(mask, torch.where(mask.bool(), tokens, 3))


@pytest.mark.parametrize('decode', [0, 1, [0, 0, 1, 0, 0, 1]])
@pytest.mark.parametrize('self_cond', [0, 1])
def test_every_parameter_gets_a_gradient(decode, self_cond):
    net = small()
    args = batch(net, is_decode=decode, self_cond=self_cond)
    grads = gradients(net, args)
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert grads['unembed.weight'].any() == (decode != 0)
    assert grads['final_layer.linear.weight'].any() == (decode != 1)
    parts = compute_loss(net, *args)[1]     # a branch without rows has no mean
    assert list(parts) == ['l2'] * (decode != 1) + ['ce'] * (decode != 0)


@pytest.mark.parametrize('decode, self_cond, rows', [
    ([0, 1, 0, 0, 1, 0], 1, [4, 6]), ([0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1], [2, 6]),
    (1, 1, [6]), (0, 0, [6])])
def test_extra_pass_on_self_conditioned_rows_only(decode, self_cond, rows):
    net = small()
    spy = Spy(net)
    compute_loss(spy, *batch(net, is_decode=decode, self_cond=self_cond))
    assert [len(call['z']) for call in spy.calls] == rows
    assert [call['grad'] for call in spy.calls] == [False, True][-len(rows):]


def test_guidance_strength_one_changes_only_x_prev():
    net = small()
    flags = dict(is_decode=False, self_cond=True, drop_cond=False)
    x0, tokens, mask, cond, d = args = batch(net, w=torch.ones(6), **flags)
    loss, cond, t = compute_loss(net, *args)[0].item(), cond[..., None].bool(), d.t[:, None, None]
    z = torch.where(cond, x0, t * x0 + (1 - t) * 2.0 * d.noise)
    guess = torch.where(cond, x0, net.denoise(z, x0 * cond, d.t, d.w))
    error = (net.denoise(z, guess, d.t, d.w) - x0) / (1 - t).clamp(min=0.05)
    want = ((error**2).mean(-1) * mask).sum() / mask.sum()
    assert loss == pytest.approx(want.item(), rel=1e-5)
    guided = compute_loss(net, *batch(net, w=torch.full((6,), 3.0), **flags))[0].item()
    assert guided != pytest.approx(loss, rel=1e-3)


def test_bfloat16_autocast():
    """A cast that autocast keeps from the pass without gradient would cut the weights off."""
    net = small()
    args = batch(net, B=16, is_decode=[0] * 12 + [1] * 4, self_cond=[1] * 6 + [0] * 10)
    exact = gradients(net, args)
    net.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16):
        compute_loss(net, *args)[0].backward()
        x_hat, logits = net(args[0], args[0], args[4].t, args[4].w, n_decode=4)
    rough = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None and g.any() for g in rough.values())
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rough))
    assert 0.98 < torch.cosine_similarity(a, b, dim=0) < 1 - 1e-9
    # both ends stay exact: x_hat feeds the velocity, and rounded logits would tie
    assert x_hat.dtype == logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16())


def test_gradient_checkpointing_gives_the_same_gradients():
    net, passes = small(), []
    args = batch(net, is_decode=[0] * 4 + [1] * 2, self_cond=[1] * 2 + [0] * 4)

    def count(*_):
        passes.append(1)
    net.blocks[0].register_forward_pre_hook(count)
    exact = gradients(net, args)
    assert len(passes) == 2             # the first guess and the trained pass
    net.gradient_checkpointing = True
    again = gradients(net, args)
    assert all(torch.equal(again[name], exact[name]) for name in exact) and len(passes) == 2 + 3

# --------------------------------------------------------------------------------------------------
# what is random

def test_draw():
    c, B, n, g = replace(SMALL, latent_dim=1), 7, 2000, torch.Generator().manual_seed(0)
    draws = [draw(c, B, 2, g, 'cpu') for _ in range(n)]
    every = {name: torch.stack([getattr(d, name) for d in draws]) for name in vars(draws[0])}

    # rows by randomised rounding: the expected p * B, of the denoise rows for self_cond
    for name, low, mean in (('is_decode', 1, 1.4), ('self_cond', 2, 2.8), ('drop_cond', 2, 2.1)):
        flags = every[name]
        rows = flags.sum(1)
        assert flags.dtype == torch.bool and flags.device.type == 'cpu'
        assert rows.min() == low and rows.max() <= low + 1
        assert rows.float().mean().item() == pytest.approx(mean, abs=0.06)
        assert (flags.float().mean(0) - mean / B).abs().max() < 0.05    # no row is favoured
    assert not (every['is_decode'] & every['self_cond']).any()

    w = every['w'].flatten().sort().values
    log_w = ((1 + w) / 1.5).log() / np.log(4)
    assert 0.5 <= w[0] and w[-1] <= 5.0
    assert (log_w - torch.linspace(0, 1, n * B)).abs().max() < 0.02
    for name, mean, std in (('t', -1.5, 0.8), ('lam', 0.8, 0.8)):
        x = every[name].logit()
        assert x.mean().item() == pytest.approx(mean, abs=0.03), name
        assert x.std().item() == pytest.approx(std, abs=0.03), name
    for name in ('noise', 'decode_noise'):
        assert every[name].mean().abs() < 0.03 and abs(every[name].std() - 1) < 0.03
    assert (every['noise'] * every['decode_noise']).mean().abs() < 0.03


def test_draw_follows_its_generator_alone():
    before = torch.random.get_rng_state()
    one, same, other = (draw(SMALL, 4, 5, torch.Generator().manual_seed(s), 'cpu')
                        for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(x, getattr(same, name)) for name, x in vars(one).items())
    assert not torch.equal(one.noise, other.noise)
    assert one.noise.shape == one.decode_noise.shape == (4, 5, 8) and one.lam.shape == (4, 5, 1)
    assert one.t.shape == one.w.shape == (4,)
