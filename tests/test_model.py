"""
model.py: the network, loss, gradients and text encoder against numbers of the official code (golden/README.md), loading
and export of its checkpoints, and what the objective promises: rows, draws, guidance, masks, precision.

    python -m pytest tests/test_model.py
"""
import io
import json
import pickle
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from configurator import UserError
from model import ELF, KERNELS, MODELS, Draws, ELFConfig, TextEncoder, compute_loss, draw, estimate_flops, find_checkpoint

GOLDEN = HERE / 'golden'
SMALL = ELFConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=29, latent_dim=8, bottleneck=4, n_time=3, n_scale=2, n_mode=5, drop_cond_prob=0.3)


def golden(file):
    """Arrays of a golden file as tensors, ids as int64, and its config."""
    with np.load(GOLDEN / file) as f:
        arrays = {k: torch.tensor(f[k]) for k in f.files if k != 'config'}
        return {k: v.long() if v.dtype == torch.int32 else v for k, v in arrays.items()}, json.loads(str(f['config']))


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def save(path, content):
    torch.save(content, path)
    return str(path)


def small(seed=0, **changes):
    """A small ELF without zeros in its weights."""
    torch.manual_seed(seed)
    net = ELF(replace(SMALL, **changes))
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return net.eval()


def batch(net, B=6, T=7, seed=1, **flags):
    """Arguments of compute_loss after net: 2 condition and 1 fill position per row; flags replace those of the draws."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(B, T, net.config.latent_dim, generator=g)
    tokens = torch.randint(0, net.config.vocab_size, (B, T), generator=g)
    cond, mask = torch.zeros(B, T), torch.ones(B, T)
    cond[:, :2], mask[:, :2], mask[:, -1] = 1, 0, 0
    flags = {k: torch.tensor(v, dtype=torch.bool).expand(B).clone() if k in ('is_decode', 'self_cond', 'drop_cond') else v for k, v in flags.items()}
    return [x0, tokens, mask, cond, replace(draw(net.config, B, T, g, 'cpu'), **flags)]


def gradients(net, args):
    net.zero_grad(set_to_none=True)
    compute_loss(net, *args)[0].backward()
    return {k: p.grad for k, p in net.named_parameters()}


class Spy:
    """Stands around a net as DDP does, and notes the rows, the inputs and the gradient mode of each call."""
    def __init__(self, net):
        self.module, self.calls = net, []

    def __call__(self, z, x_prev, t, w, n_decode=0):
        self.calls.append(dict(z=z, x_prev=x_prev, t=t, w=w, n=n_decode, grad=torch.is_grad_enabled()))
        return self.module(z, x_prev, t, w, n_decode=n_decode)

# ---------------------------------------------------------------------------------------------------------------------
# the official numbers

@pytest.fixture(scope='module')
def official(tmp_path_factory):
    """The network with the weights of golden/model.npz, loaded as a checkpoint."""
    arrays, _ = golden('model.npz')
    return ELF.from_pretrained(save(tmp_path_factory.mktemp('golden') / 'checkpoint_1', {'params': {k[2:]: v for k, v in arrays.items() if k.startswith('p/')}}))


@torch.no_grad()
def test_forward_and_decode(official):
    m, _ = golden('model.npz')
    z, x_prev = m['x'].chunk(2, dim=-1)
    args = z, x_prev, m['t'], m['self_cond_cfg_scale']
    assert rel(official.denoise(*args), m['denoise_out']) < 1e-5
    assert rel(official(*args, n_decode=3)[1], m['decode_logits']) < 1e-5
    for n in range(4):      # either half may be empty
        x_hat, logits = official(*args, n_decode=n)
        assert len(x_hat) == 3 - n and torch.allclose(x_hat, m['denoise_out'][:3 - n], atol=1e-4)
        assert len(logits) == n and torch.allclose(logits, m['decode_logits'][3 - n:], atol=1e-4)


@pytest.mark.parametrize('file', ['train_case1', 'train_case2', 'train_case3', 'train_case4', 'train_port_case5'])
def test_loss_and_gradients(official, file):
    d, config = golden(file + '.npz')
    official.config.decoder_noise_scale = config['decoder_noise_scale']
    draws = Draws(d['t'], d['noise'], d['decoder_step_active'].bool().expand(4).clone(), d['decoder_lambda_t'], d['decoder_noise_unit'],
                  d['use_self_cond_mask'].bool(), d['self_cond_cfg_scale'], d['label_drop_mask'].bool())
    args = d['x0'], d['input_ids'], d['loss_mask'], d['cond_seq_mask'], draws
    loss, parts = compute_loss(official, *args)
    assert loss.item() == pytest.approx(d['loss'].item(), rel=1e-6)
    for part in parts:
        assert parts[part].item() == pytest.approx(d[part + '_loss'].item(), rel=1e-6)
    ours = {KERNELS.get(k, k): g.T if k in KERNELS and g.ndim == 2 else g for k, g in gradients(official, args).items()}
    names = [k[2:] for k in golden('model.npz')[0] if k.startswith('p/')]
    assert set(names) == set(ours)
    theirs = torch.tensor(np.ascontiguousarray(d['grad'].numpy().T).view('<f4')[:, 0])
    assert rel(torch.cat([ours[k].flatten() for k in names]), theirs) < 1e-5


@pytest.mark.parametrize('name, count', [('ELF-B', 104_579_940), ('ELF-M', 342_540_036), ('ELF-L', 652_103_332)])
def test_parameter_counts(name, count):
    with torch.device('meta'):
        assert sum(p.numel() for p in ELF(MODELS[name]).parameters()) == count


def test_the_first_guess_is_the_mean_of_the_data():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    assert ELF(SMALL).denoise(x, x, torch.rand(2), torch.ones(2)).abs().max() == 0

# ---------------------------------------------------------------------------------------------------------------------
# the text encoder

@pytest.fixture(scope='module')
def t5(tmp_path_factory):
    from transformers import T5Config, T5EncoderModel
    arrays, config = golden('t5.npz')
    model = T5EncoderModel(T5Config(**config['hf_config']))
    weights = {k[2:]: v for k, v in arrays.items() if k.startswith('p/')}
    model.load_state_dict(weights | {'encoder.embed_tokens.weight': weights['shared.weight']})
    folder = str(tmp_path_factory.mktemp('t5'))
    model.save_pretrained(folder)
    return folder, arrays


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_text_encoder(t5, attention):
    folder, d = t5
    encode, ids, valid, cond = TextEncoder(folder).train(), d['input_ids'], d['valid'], d['is_cond']
    encode.model.set_attn_implementation(attention)
    plain, pairs = encode(ids, valid), encode(ids, valid, cond)
    assert rel(plain * valid[..., None], d['out_2d']) < 1e-5 and rel(pairs * valid[..., None], d['out_3d']) < 1e-5
    assert rel(TextEncoder(folder, 0.05, 0.2)(ids, valid), (plain - 0.05) / 0.2) < 1e-5
    other = lambda where: torch.where(where, (ids + 7) % 101, ids)
    change = lambda where, **kw: (encode(other(where), valid, cond, **kw) - encode(ids, valid, cond, **kw)).abs()
    target, drop = valid & ~cond, torch.tensor([True, False, True])
    assert change(target)[cond].max() <= 1e-6 and change(~valid)[valid].max() <= 1e-6
    assert change(cond, drop_cond=drop)[target & drop[:, None]].max() <= 1e-6 and change(cond)[target].max() > 1e-2
    assert change(cond, drop_cond=drop)[target & ~drop[:, None]].max() > 1e-2
    assert not encode.model.training and not any(p.requires_grad for p in encode.parameters())


def test_text_encoder_must_exist(tmp_path):
    with pytest.raises(UserError, match='neither a folder'):
        TextEncoder(str(tmp_path / 'none'))

# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

@torch.no_grad()
def test_official_checkpoint_round_trip():
    net, e = ELF.from_pretrained(str(GOLDEN / 'port_ckpt')), golden('port_ckpt/expect.npz')[0]
    theirs, ours = torch.load(GOLDEN / 'port_ckpt/checkpoint_3', weights_only=True)['ema_params1'], net.to_official()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) for k, v in theirs.items())
    z, x_prev = e['x'].chunk(2, dim=-1)
    args = z, x_prev, e['t'], e['self_cond_cfg_scale']
    assert rel(net.denoise(*args), e['denoise_out']) < 1e-5 and rel(net(*args, n_decode=2)[1], e['decode_logits']) < 1e-5
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.'])
def test_other_sizes_round_trip(tmp_path, prefix):
    net = small()                                       # 3 time, 2 scale, 5 mode tokens
    save(tmp_path / 'checkpoint_2', {'ema_params1': {}})
    save(tmp_path / 'checkpoint_10', {'params': {}, 'ema_params1': {prefix + k: v for k, v in net.to_official().items()}})
    again = ELF.from_pretrained(str(tmp_path))          # the largest step number
    assert (again.config.n_time, again.config.n_scale, again.config.n_mode, again.config.n_head) == (3, 2, 5, 2)
    assert all(torch.equal(v, again.to_official()[k]) for k, v in net.to_official().items())
    for T in (1, 7, 40):
        args = torch.randn(2, T, 8), torch.randn(2, T, 8), torch.rand(2), torch.ones(2)
        assert torch.equal(net.denoise(*args), again.denoise(*args)) and again.decode(args[0], args[3]).shape == (2, T, 29)


def test_our_checkpoint_keeps_its_settings(tmp_path):
    net = small(t_eps=0.01, encoder='data/demo/encoder', sampler='ode')
    ckpt = {'model': ELF(net.config).state_dict(), 'ema': net.state_dict(), 'model_args': asdict(net.config)}
    again = ELF.from_pretrained(save(tmp_path / 'ckpt.pt', ckpt))
    assert again.config == net.config and all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_config_yml(tmp_path, capsys):
    source = save(tmp_path / 'checkpoint_1', {'params': small().to_official()})
    assert ELF.from_pretrained(source).config.latent_std == 0.2 and 'published OpenWebText settings' in capsys.readouterr().out
    (tmp_path / 'config.yml').write_text('model: ELF-L\ndenoiser_p_mean: -0.8\nt_eps: 5e-2\ndecoder_noise_scale: 1\nlatent_mean: 0.01\nlatent_std: 0.3\n'
                                         'self_cond_cfg_max: 3.0\nlabel_drop_prob: 0.1\npad_token: eos\nmax_length: 128\nmax_input_length: 64\nwarmup: 3\n')
    c = ELF.from_pretrained(source).config
    assert (c.t_mean, c.t_eps, c.decoder_noise_scale, c.latent_mean, c.latent_std, c.w_max) == (-0.8, 0.05, 1.0, 0.01, 0.3, 3.0)
    assert (c.drop_cond_prob, c.pad_token, c.max_length, c.max_input_length, c.n_embd) == (0.1, 'eos', 128, 64, 32)
    assert (c.sampler, c.steps, c.w, c.cfg) == ('ode', 64, 1.0, 2.0)        # a conditional task
    assert 'says ELF-L' in capsys.readouterr().out


def test_config_yml_names_the_default_model(tmp_path, capsys):
    (tmp_path / 'config.yml').write_text('model: ELF-B\n')
    ELF.from_pretrained(save(tmp_path / 'checkpoint_1', {'params': small().to_official()}))
    assert 'says ELF-B' in capsys.readouterr().out      # the weights are of no published size


@pytest.mark.parametrize('text', ['t_eps: [1', 't_eps: small', '- 1'])
def test_bad_config_yml(tmp_path, text):
    (tmp_path / 'config.yml').write_text(text)
    with pytest.raises(UserError, match='config.yml'):
        ELF.from_pretrained(save(tmp_path / 'checkpoint_1', {'params': small().to_official()}))


@pytest.mark.parametrize('change, says', [
    (lambda s: s.pop('blocks.1.attn.proj.weight'), 'missing blocks.1.attn.proj.weight'),
    (lambda s: s.pop('t_emb_tokens'), 't_emb_tokens'),
    (lambda s: s.update(extra=torch.ones(1)), 'left over extra'),
    (lambda s: s.update({'text_proj.proj2.weight': torch.ones(5, 3)}), r'text_proj.proj2.weight is \(5, 3\), expected \(32, 4\)'),
    (lambda s: s.update({'blocks.0.attn.q_norm.weight': torch.ones(64)}), 'q_norm'),
    (lambda s: s.update({'blocks.0.attn.q_norm.weight': torch.ones(5)}), 'q_norm'),
    (lambda s: s.update({'mode_tokens': 3}), 'mode_tokens'),
    (lambda s: s.update({'proj_bias': 3}), 'proj.bias'),
    (lambda s: s.clear(), 'holds no ELF weights'),
    (lambda s: s.update({7: torch.ones(1)}), '7'),
])
def test_weights_that_do_not_fit(tmp_path, change, says):
    state = small().to_official()
    change(state)
    with pytest.raises(UserError, match=says):
        ELF.from_pretrained(save(tmp_path / 'checkpoint_1', {'ema_params1': state}))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_unreadable_checkpoints(tmp_path):
    whole, bad = io.BytesIO(), tmp_path / 'checkpoint_1'
    torch.save({'params': small().to_official()}, whole)
    for content in (whole.getvalue()[:-2000], whole.getvalue()[:50], b'', b'text', pickle.dumps(Payload(tmp_path / 'owned'), protocol=2)):
        bad.write_bytes(content)
        with pytest.raises(UserError, match='not a readable checkpoint'):
            ELF.from_pretrained(str(bad))
    save(bad, {'ema_params1': Payload(tmp_path / 'owned')})
    with pytest.raises(UserError, match='not a readable checkpoint .*: it would run (io|_io).open$'):
        ELF.from_pretrained(str(tmp_path))
    assert not (tmp_path / 'owned').exists()
    save(bad, [1, 2])
    with pytest.raises(UserError, match='a list, not a dict'):
        ELF.from_pretrained(str(bad))
    bad.unlink()
    for nowhere in (str(tmp_path), './none', 'none'):       # no name of these is a hub id
        with pytest.raises(UserError, match='no checkpoint in|nothing to load'):
            ELF.from_pretrained(nowhere)

# ---------------------------------------------------------------------------------------------------------------------
# the objective

@pytest.mark.parametrize('t', [0.0, 1.0])
def test_endpoints(t):
    net = small()
    args = batch(net, t=torch.full((6,), t), lam=torch.full((6, 7, 1), t), is_decode=[0, 0, 0, 0, 1, 1], self_cond=False, drop_cond=[0, 1, 0, 0, 0, 0])
    x0, _, _, cond, d = args
    spy = Spy(net)
    compute_loss(spy, *args)
    (call,), c = spy.calls, net.config
    x0[1, :2] = 0       # its condition is dropped
    free = x0 if t else c.noise_scale * d.noise
    assert torch.allclose(call['z'][:4], torch.where(cond[:4, :, None].bool(), x0[:4], free[:4]))
    assert torch.allclose(call['z'][4:], x0[4:] if t else c.decoder_noise_scale * d.decode_noise[4:])
    assert torch.equal(call['x_prev'][:4], x0[:4] * cond[:4, :, None]) and call['x_prev'][4:].abs().max() == 0
    assert call['t'].tolist() == [t] * 4 + [1.0] * 2 and torch.equal(call['w'], d.w) and call['n'] == 2


def test_each_row_is_in_exactly_one_loss():
    net = small()
    x0, tokens, mask, cond, d = batch(net, is_decode=[0, 1, 0, 0, 1, 0], self_cond=[1, 1, 0, 1, 0, 0])
    for row in range(6):
        loss, parts = compute_loss(net, x0, tokens, mask * (torch.arange(6) == row)[:, None], cond, d)
        inside, outside = ('ce', 'l2') if d.is_decode[row] else ('l2', 'ce')
        assert parts[inside] == loss.detach() > 0 and parts[outside] == 0


def test_order_of_rows_does_not_matter():
    net = small()
    args = batch(net, is_decode=[0, 1, 0, 0, 1, 0], self_cond=[1, 1, 0, 1, 0, 0], drop_cond=[0, 1, 1, 0, 0, 0])
    loss = compute_loss(net, *args)[0].item()
    for seed in range(5):
        p = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        moved = [a[p] for a in args[:4]] + [Draws(**{k: v[p] for k, v in vars(args[4]).items()})]
        assert compute_loss(net, *moved)[0].item() == pytest.approx(loss, rel=1e-6)


def test_only_positions_in_the_mask_count():
    net = small()
    x0, tokens, mask, cond, d = batch(net)
    half = mask * (torch.arange(7) < 4)
    total = lambda m: compute_loss(net, x0, tokens, m, cond, d)[0].item() * m.sum().item()
    assert total(mask) == pytest.approx(total(half) + total(mask - half), rel=1e-5)
    assert total(torch.zeros_like(mask)) == 0
    loss = compute_loss(net, x0, tokens, mask, cond, d)[0]
    assert loss == compute_loss(net, x0, torch.where(mask.bool(), tokens, 3), mask, cond, d)[0]


@pytest.mark.parametrize('decode', [0, 1, [0, 0, 1, 0, 0, 1]])
@pytest.mark.parametrize('self_cond', [0, 1])
def test_every_parameter_gets_a_gradient(decode, self_cond):
    net = small()
    grads = gradients(net, batch(net, is_decode=decode, self_cond=self_cond))
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert (grads['unembed.weight'].abs().max() > 0) == (decode != 0) and (grads['final_layer.linear.weight'].abs().max() > 0) == (decode != 1)


@pytest.mark.parametrize('decode, self_cond, rows', [([0, 1, 0, 0, 1, 0], 1, [4, 6]), ([0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1], [2, 6]), (1, 1, [6]), (0, 0, [6])])
def test_extra_pass_on_self_conditioned_rows_only(decode, self_cond, rows):
    net = small()
    spy = Spy(net)
    compute_loss(spy, *batch(net, is_decode=decode, self_cond=self_cond))
    assert [len(c['z']) for c in spy.calls] == rows and [c['grad'] for c in spy.calls] == [False, True][-len(rows):]


def test_guidance_strength_one_changes_only_x_prev():
    net = small()
    x0, tokens, mask, cond, d = args = batch(net, w=torch.ones(6), is_decode=False, self_cond=True, drop_cond=False)
    loss, cond, t = compute_loss(net, *args)[0].item(), cond[..., None].bool(), d.t[:, None, None]
    z = torch.where(cond, x0, t * x0 + (1 - t) * 2.0 * d.noise)
    guess = torch.where(cond, x0, net.denoise(z, x0 * cond, d.t, d.w))
    error = (net.denoise(z, guess, d.t, d.w) - x0) / (1 - t).clamp(min=0.05)
    assert loss == pytest.approx(((error**2).mean(-1) * mask).sum().item() / mask.sum().item(), rel=1e-5)
    assert compute_loss(net, *batch(net, w=torch.full((6,), 3.0), is_decode=False, self_cond=True))[0].item() != pytest.approx(loss, rel=1e-3)


def test_bfloat16_autocast():
    """A cast that autocast caches in the pass without gradient would cut the weights off from the trained pass."""
    net = small()
    args = batch(net, B=16, is_decode=[0] * 12 + [1] * 4, self_cond=[1] * 6 + [0] * 10)
    exact = gradients(net, args)
    with torch.autocast('cpu', torch.bfloat16):
        net.zero_grad(set_to_none=True)
        compute_loss(net, *args)[0].backward()
        x_hat, logits = net(args[0], args[0], args[4].t, args[4].w, n_decode=4)
    rough = {k: p.grad for k, p in net.named_parameters()}
    assert all(rough[k] is not None and rough[k].abs().max() > 0 for k in exact)
    join = lambda grads: torch.cat([g.flatten() for g in grads.values()])
    assert 0.98 < torch.cosine_similarity(join(exact), join(rough), dim=0) < 1 - 1e-9
    assert x_hat.dtype == torch.float32 and logits.dtype == torch.bfloat16     # what feeds the velocity stays exact


def test_first_weights():
    torch.manual_seed(0)
    for name, p in ELF(replace(SMALL, n_embd=64)).named_parameters():
        if name == 'final_layer.linear.weight' or name.endswith('bias'):
            assert not p.any(), name
        elif 'embedder' in name or 'tokens' in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        elif p.ndim == 2:       # Xavier, uniform
            assert p.abs().max().item() == pytest.approx((6 / sum(p.shape)) ** 0.5, rel=0.05), name
        else:
            assert (p == 1).all(), name


def test_recomputed_activations_give_the_same_gradients():
    net = small()
    args = batch(net, B=6, is_decode=[0] * 4 + [1] * 2, self_cond=[1] * 2 + [0] * 4)
    passes = []
    net.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    exact = gradients(net, args)
    assert len(passes) == 2         # the first guess and the trained pass
    net.recompute = True
    assert all(torch.equal(g, exact[k]) for k, g in gradients(net, args).items()) and len(passes) == 2 + 3


def test_estimated_flops_are_those_of_a_step():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    C, D, T = 64, 32, 16
    c = ELFConfig(n_layer=2, n_embd=D, n_head=2, latent_dim=C, bottleneck=24, vocab_size=60, decoder_prob=0.5, self_cond_prob=0.5)
    net, counter, mask = ELF(c), FlopCounterMode(display=False), torch.ones(8, T, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH), counter:     # 4 decode rows, 4 denoise rows, 2 of them self-conditioned
        loss, _ = compute_loss(net, torch.randn(8, T, C), torch.zeros(8, T, dtype=torch.long), mask, ~mask, draw(c, 8, T, torch.Generator().manual_seed(0), 'cpu'))
        loss.backward()
    embedders = 2 * 2 * ((1 + 2 / 8) * (256 * D + D * D) + 256 * D + 2 * D * D)     # of t and w, not estimated
    no_gradient_of_z = 2 * T * 2 * C * C                                            # estimated
    assert counter.get_total_flops() / 8 == estimate_flops(c, T) + embedders - no_gradient_of_z


def test_which_file_of_a_folder(tmp_path):
    for name in ('old_ckpt.pt', 'model.safetensors', 'ckpt_prev.pt', 'ckpt.pt', 'checkpoint_9', 'checkpoint_10'):       # from the last choice to the first
        (tmp_path / name).write_bytes(b'')
        if name == 'old_ckpt.pt':       # of a run that was overwritten
            with pytest.raises(UserError, match='no checkpoint in'):
                find_checkpoint(str(tmp_path))
        else:
            assert find_checkpoint(str(tmp_path)) == str(tmp_path / name)


def test_settings_of_a_later_version_are_refused(tmp_path):
    net = small()
    torch.save(dict(model=net.state_dict(), ema=net.state_dict(), model_args=asdict(net.config) | dict(n_new=3)), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='does not know: n_new'):
        ELF.from_pretrained(str(tmp_path))


def test_draw():
    c, B, g = replace(SMALL, latent_dim=1), 7, torch.Generator().manual_seed(0)
    draws = [draw(c, B, 2, g, 'cpu') for _ in range(2000)]
    every = {k: torch.stack([getattr(d, k) for d in draws]) for k in vars(draws[0])}
    decode, self_cond, drop = every['is_decode'], every['self_cond'], every['drop_cond']
    for flags, low, mean in ((decode, 1, 1.4), (self_cond, 2, 2.8), (drop, 2, 2.1)):     # p * B, of the denoise rows for self_cond
        n = flags.sum(1)
        assert n.min() == low and n.max() <= low + 1 and n.float().mean().item() == pytest.approx(mean, abs=0.06)
        assert (flags.float().mean(0) - mean / B).abs().max() < 0.05                        # no row is favoured
        assert flags.dtype == torch.bool and flags.device.type == 'cpu'
    assert not (decode & self_cond).any()
    w, uniform = every['w'].flatten(), torch.linspace(0, 1, 2000 * B)
    assert 0.5 <= w.min() and w.max() <= 5.0
    assert (((1 + w) / 1.5).log() / np.log(4)).sort().values.sub(uniform).abs().max() < 0.02
    for name, mean, std in (('t', -1.5, 0.8), ('lam', 0.8, 0.8)):
        assert every[name].logit().mean().item() == pytest.approx(mean, abs=0.03) and every[name].logit().std().item() == pytest.approx(std, abs=0.03)
    for name in ('noise', 'decode_noise'):
        assert every[name].mean().abs() < 0.03 and abs(every[name].std() - 1) < 0.03
    assert abs((every['noise'] * every['decode_noise']).mean()) < 0.03


def test_draw_follows_its_generator():
    one, same, other = (draw(SMALL, 4, 5, torch.Generator().manual_seed(s), 'cpu') for s in (1, 1, 2))
    assert all(torch.equal(v, getattr(same, k)) for k, v in vars(one).items()) and not torch.equal(one.noise, other.noise)
    assert one.noise.shape == one.decode_noise.shape == (4, 5, 8) and one.lam.shape == (4, 5, 1) and one.t.shape == one.w.shape == (4,)
    before = torch.random.get_rng_state()
    draw(SMALL, 4, 5, torch.Generator().manual_seed(1), 'cpu')
    assert torch.equal(before, torch.random.get_rng_state())        # nothing comes from the global generator
