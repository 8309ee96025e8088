"""
Foreign checkpoints: the official JAX ones bit for bit, self-made msgpack and Lightning ones, and what must be refused.
    python -m pytest -q tests/test_convert.py
"""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import convert
from configurator import UserError
from model import ELF, ELFConfig

GOLDEN = os.path.join(ROOT, 'tests', 'golden')
SIZES = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=23, latent_dim=8, bottleneck=4)


@pytest.fixture
def pair():
    """Official weights and EMA of a small model, all random."""
    torch.manual_seed(0)
    return [{k: torch.randn(v.shape) for k, v in ELF(ELFConfig(**SIZES)).to_official().items()} for _ in range(2)]


def same(path, params, ema):
    got = torch.load(path, weights_only=True)
    return all(got[k].keys() == want.keys() and all(torch.equal(got[k][n], want[n]) for n in want)
               for k, want in (('params', params), ('ema_params1', ema)))


def flax(state):
    """Official names to flax ones, nested: kernels are (in, out)."""
    tree = {}
    for name, x in state.items():
        *way, last = re.sub(r'blocks\.(\d+)', r'blocks_\1', name).split('.')
        node = tree
        for part in way:
            node = node.setdefault(part, {})
        kernel = last == 'weight' and x.ndim == 2
        node['kernel' if kernel else last] = (x.T if kernel else x).contiguous().numpy()
    return tree


def pack(path, **ckpt):
    import msgpack

    def default(x):
        return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes()), use_bin_type=True))
    path.write_bytes(msgpack.packb(ckpt, default=default, strict_types=True))
    return str(path)


@pytest.mark.parametrize('kind', ['jax_ckpt', 'jax_ckpt_msgpack', 'port_ckpt'])
def test_official_checkpoints(kind, tmp_path):
    folder = os.path.join(GOLDEN, kind)
    convert.main(folder, str(tmp_path))
    model, want = ELF.from_pretrained(str(tmp_path)), np.load(os.path.join(folder, 'expect.npz'))
    ema = torch.load(tmp_path / 'checkpoint_3', weights_only=True)['ema_params1']
    names = {k[4:] for k in want if k.startswith('ema/')}       # the port's has none
    assert not names or names == ema.keys()
    assert all(np.array_equal(ema[k].numpy(), want['ema/' + k]) for k in names)
    x, t, w = (torch.tensor(want[k]) for k in ('x', 't', 'self_cond_cfg_scale'))
    with torch.no_grad():
        z, x_prev = x.chunk(2, dim=-1)
        x_hat, h = model(z, x_prev, t, w)[0], model(z, x_prev, t, w, n_decode=len(z))[1]
    assert np.abs(x_hat.numpy() - want['denoise_out']).max() <= 1e-5
    assert np.abs(h.numpy() - want['decode_logits']).max() <= 1e-5


def test_msgpack(pair, tmp_path, capsys):
    source = pack(tmp_path / 'checkpoint_12', params=flax(pair[0]), ema_params1=flax(pair[1]), step=12, epoch=1, opt_state={'0': {}})
    (tmp_path / 'checkpoint_9').write_bytes(b'older')
    (tmp_path / 'config.yml').write_text('model: ELF-B\nlatent_std: 0.5\n')
    convert.main(str(tmp_path), str(tmp_path / 'dst'))          # the largest step in the folder
    assert same(tmp_path / 'dst' / 'checkpoint_12', *pair) and sorted(os.listdir(tmp_path / 'dst')) == ['checkpoint_12', 'config.yml', 'model.safetensors']
    assert ELF.from_pretrained(str(tmp_path / 'dst')).config.latent_std == 0.5
    with pytest.raises(UserError, match='exists already'):
        convert.main(source, str(tmp_path / 'dst'))
    only = pack(tmp_path / 'checkpoint_13', params=flax(pair[0]))
    convert.main(only, str(tmp_path / 'dst'))
    assert same(tmp_path / 'dst' / 'checkpoint_13', pair[0], pair[0]) and 'no ema_params1' in capsys.readouterr().out


def test_lightning(pair, tmp_path, capsys):
    state = {'model.net.' + k: v for k, v in pair[0].items()} | {'encoder.shared.weight': torch.ones(2, 2)}
    for i, (ema, place) in enumerate([({'state_dict': {'ema.net.' + k: v for k, v in pair[1].items()}}, 'state_dict.ema.net.'),
                                      ({'callbacks': {'EMA': {'ema_weights': pair[1]}}}, 'callbacks.EMA.ema_weights.')]):
        source = str(tmp_path / f'{i}.ckpt')
        torch.save({'pytorch-lightning_version': '2', 'global_step': 7, **ema, 'state_dict': state | ema.get('state_dict', {})}, source)
        convert.main(source, str(tmp_path / str(i)))
        out = capsys.readouterr().out
        assert same(tmp_path / str(i) / 'checkpoint_7', *pair) and 'unverified' in out and repr(place) in out


def test_ours_and_export_are_fixed_points(tmp_path):
    model = ELF(ELFConfig(**SIZES, latent_std=0.7, t_mean=0.3, tokenizer='mine', sampler='ode', gamma=0.5))
    weights = model.to_official()
    torch.save(dict(model=model.state_dict(), ema={'_orig_mod.' + k: v for k, v in model.state_dict().items()},
                    model_args=vars(model.config), iter_num=5), tmp_path / 'ckpt.pt')
    convert.main(str(tmp_path), str(tmp_path / 'a'))
    convert.main(str(tmp_path / 'a'), str(tmp_path / 'b'))
    again = ELF.from_pretrained(str(tmp_path / 'b'))
    convert.write_official(str(tmp_path / 'c'), weights, again.to_official(), 5, 0, again.config)
    for folder in 'abc':
        assert same(tmp_path / folder / 'checkpoint_5', weights, weights)
        assert (tmp_path / folder / 'config.yml').read_text() == (tmp_path / 'a' / 'config.yml').read_text()
    assert (again.config.latent_std, again.config.t_mean) == (0.7, 0.3)
    alone = ELF.from_pretrained(str(tmp_path / 'a' / 'model.safetensors'))        # the EMA alone, with the config.yml beside it
    assert alone.config == again.config and all(torch.equal(v, weights[k]) for k, v in alone.to_official().items())


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


def test_what_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = pack(tmp_path / 'checkpoint_1', params=flax(pair[0]), ema_params1=flax(pair[1]))
    data = (tmp_path / 'checkpoint_1').read_bytes()
    short, extra, other = dict(pair[1]), pair[1] | {'blocks.0.more': torch.ones(2)}, pair[1] | {'proj_bias': torch.ones(9)}
    short.pop('blocks.1.norm2.weight')
    torch.save({'state_dict': {'net.' + k: v for k, v in pair[0].items()}, 'x': Evil()}, 'evil.ckpt')
    cases = {'evil.ckpt': r'os\.mkdir|posix\.mkdir|nt\.mkdir', 'nothing': 'nothing', 'empty': 'readable', 'cut': 'readable', 'noise': 'readable'}
    for name, content in (('empty', b''), ('cut', data[:len(data) // 2]), ('noise', bytes(range(256)))):
        (tmp_path / name).write_bytes(content)
    for name, ema, says in (('short', short, r'missing blocks\.1\.norm2\.weight'), ('extra', extra, r'left over blocks\.0\.more'), ('other', other, 'proj.bias is')):
        pack(tmp_path / name, params=flax(pair[0]), ema_params1=flax(ema))
        torch.save(dict(params=pair[0], ema_params1=ema), name + '.pt')
        cases |= {name: says, name + '.pt': says}
    for name, text in (('broken', '{"tree_'), ('outside', '{"tree_metadata": {"a": {"key_metadata": [{"key": "params"}, {"key": "../../x"}]}}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / '_METADATA').write_text(text)
        cases[name] = 'Orbax' if name == 'broken' else 'no name of an array'
    for name, says in cases.items():
        with pytest.raises(UserError, match=says) as e:
            convert.main(name, 'dst')
        assert '\n' not in str(e.value) and not os.path.exists('dst') and not os.path.exists('evil'), name
    with pytest.raises(UserError, match='could not write'):
        convert.main(whole, 'cut')          # a file


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path):
    (tmp_path / 'checkpoint_1').write_bytes(b'\xff' * 9)
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'convert.py'), str(tmp_path), str(tmp_path / 'dst')], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


def test_a_damaged_orbax_folder(tmp_path):
    source = os.path.join(GOLDEN, 'jax_ckpt', 'checkpoint_3')
    import shutil
    for i, how in enumerate(('cut', 'gone', 'link')):
        copy = tmp_path / f'{i}' / 'checkpoint_3'
        shutil.copytree(source, copy)
        for file in [f for f in copy.rglob('d/*') if f.is_file()]:
            file.write_bytes(file.read_bytes()[:50]) if how == 'cut' else file.unlink()
            if how == 'link':
                file.symlink_to(os.path.join(source, os.path.relpath(file, copy)))
        with pytest.raises(UserError, match='outside' if how == 'link' else 'Orbax') as e:
            convert.main(str(copy), str(tmp_path / 'dst'))
        assert '\n' not in str(e.value) and not (tmp_path / 'dst').exists()
