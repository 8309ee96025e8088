"""
Foreign checkpoints: official JAX ones and a real Lightning one bit for bit, self-made ones of other
sizes and layouts, and what must be refused.
    python -m pytest -q tests/test_convert.py
"""
import os
import re
import resource
import shutil
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


def random_pair(**sizes):
    """Official weights and EMA of a model, all random."""
    torch.manual_seed(0)
    shapes = ELF(ELFConfig(**SIZES | sizes)).to_official()
    return [{name: torch.randn(x.shape) for name, x in shapes.items()} for _ in range(2)]


@pytest.fixture
def pair():
    return random_pair()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(path, params, ema):
    got = torch.load(path, weights_only=True)
    return equal(got['params'], params) and equal(got['ema_params1'], ema)


def worst(a, b):
    return (np.abs(a.numpy() - b).max() / np.abs(b).max()).item()


def convert_all(*args):
    """convert.main, files that it leaves in the folder."""
    convert.main(*map(str, args))
    return sorted(os.listdir(args[1]))

# --------------------------------------------------------------------------------------------------
# JAX, and the official torch port

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
        data = msgpack.packb((x.shape, x.dtype.name, x.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1, data)
    path.write_bytes(msgpack.packb(ckpt, default=default, strict_types=True))
    return str(path)


@pytest.mark.parametrize('kind', ['jax_ckpt', 'jax_ckpt_msgpack', 'port_ckpt'])
def test_official_checkpoints(kind, tmp_path):
    folder = os.path.join(GOLDEN, kind)
    convert.main(folder, str(tmp_path))
    model, want = ELF.from_pretrained(str(tmp_path)), np.load(os.path.join(folder, 'expect.npz'))
    ema = torch.load(tmp_path / 'checkpoint_3', weights_only=True)['ema_params1']
    names = {name[4:] for name in want if name.startswith('ema/')}      # the port's has none
    assert not names or names == ema.keys()
    assert all(np.array_equal(ema[name].numpy(), want['ema/' + name]) for name in names)
    x, t, w = (torch.tensor(want[k]) for k in ('x', 't', 'self_cond_cfg_scale'))
    z, x_prev = x.chunk(2, dim=-1)
    with torch.no_grad():
        x_hat, logits = model(z, x_prev, t, w)[0], model(z, x_prev, t, w, n_decode=len(z))[1]
    assert np.abs(x_hat.numpy() - want['denoise_out']).max() <= 1e-5
    assert np.abs(logits.numpy() - want['decode_logits']).max() <= 1e-5


def test_msgpack(pair, tmp_path, capsys):
    dst = tmp_path / 'dst'
    source = pack(tmp_path / 'checkpoint_12', params=flax(pair[0]), ema_params1=flax(pair[1]),
                  step=12, epoch=1, opt_state={'0': {}})
    (tmp_path / 'checkpoint_9').write_bytes(b'older')
    (tmp_path / 'config.yml').write_text('model: ELF-B\nlatent_std: 0.5\n')
    files = convert_all(tmp_path, dst)                  # the largest step in the folder
    assert same(dst / 'checkpoint_12', *pair)
    assert files == ['checkpoint_12', 'config.yml', 'model.safetensors']
    assert ELF.from_pretrained(str(dst)).config.latent_std == 0.5
    with pytest.raises(UserError, match='could not write .*not empty'):
        convert.main(source, str(dst))
    assert sorted(os.listdir(dst)) == files
    only = pack(tmp_path / 'checkpoint_13', params=flax(pair[0]))
    convert.main(only, str(tmp_path / 'only'))
    assert same(tmp_path / 'only' / 'checkpoint_13', pair[0], pair[0])
    assert 'taking them for both' in capsys.readouterr().out


def test_bfloat16_and_numbers_in_msgpack(pair, tmp_path):
    import ml_dtypes
    tree = flax(pair[0])
    tree['proj_bias'] = tree['proj_bias'].astype(ml_dtypes.bfloat16)
    source = pack(tmp_path / 'x', params=tree, step=np.array(12))
    convert.main(source, str(tmp_path / 'dst'))
    want = pair[0] | dict(proj_bias=pair[0]['proj_bias'].bfloat16().float())
    assert same(tmp_path / 'dst' / 'checkpoint_12', want, want)


def test_a_damaged_orbax_folder(tmp_path):
    source = os.path.join(GOLDEN, 'jax_ckpt', 'checkpoint_3')
    for how in ('cut', 'gone'):
        copy = tmp_path / how / 'checkpoint_3'
        shutil.copytree(source, copy)
        for file in [f for f in copy.rglob('d/*') if f.is_file()]:
            if how == 'cut':
                file.write_bytes(file.read_bytes()[:50])
            else:
                file.unlink()
        with pytest.raises(UserError, match='no readable checkpoint') as e:
            convert.main(str(copy), str(tmp_path / 'dst'))
        assert '\n' not in str(e.value) and not (tmp_path / 'dst').exists()

# --------------------------------------------------------------------------------------------------
# Lightning

def lightning(path, params, ema, steps, **more):
    """A file as that project's callbacks write it, see golden/lightning/README.txt."""
    def renamed(state, prefix=''):
        return {prefix + k.replace('norm_final', 'norm'): x for k, x in state.items()}
    frozen = {'encoder.model.shared.weight': torch.ones(2, 2)}
    ckpt = {'pytorch-lightning_version': '2.6.6', 'epoch': 3, 'global_step': 2 * steps,
            'state_dict': renamed(params, 'model.') | frozen, 'optimizer_states': [{}, {}],
            'ema': dict(decay=0.9, shadow=renamed(ema)), '_my_opt_step': steps}
    torch.save(ckpt | more, path)


@torch.no_grad()
@pytest.mark.parametrize('source', ['', 'last.ckpt'])
def test_the_real_lightning_checkpoint(source, tmp_path):
    folder = os.path.join(GOLDEN, 'lightning')
    assert 'checkpoint_15' in convert_all(os.path.join(folder, source), tmp_path)
    ckpt = torch.load(os.path.join(folder, 'last.ckpt'), weights_only=True)
    params = {k[6:]: x for k, x in ckpt['state_dict'].items() if k.startswith('model.')}
    want = [{k.replace('layer.norm.', 'layer.norm_final.'): x for k, x in state.items()}
            for state in (params, ckpt['ema']['shadow'])]
    assert same(tmp_path / 'checkpoint_15', *want)
    model, e = ELF.from_pretrained(str(tmp_path)), np.load(os.path.join(folder, 'expected.npz'))
    z, x_prev, t, w = (torch.tensor(e[name]) for name in ('z', 'x_prev', 't', 'w'))
    assert worst(model.denoise(z, x_prev, t, w), e['denoise']) < 1e-5
    assert worst(model.decode(z, w), e['decode']) < 1e-5        # 1.8e-4 with the tanh GELU
    c = model.config
    assert (c.n_head, c.gelu, c.latent_std, c.noise_scale) == (4, 'none', 0.2, 2.0)
    assert (c.max_length, c.encoder, c.tokenizer) == (24, 'google-t5/tiny', 'google-t5/tiny')
    assert (c.sampler, c.steps, c.gamma, c.w) == ('ode', 50, 0.0, 1.0)     # none is named there


@pytest.mark.parametrize('sizes', [dict(n_layer=3), dict(n_head=4, n_embd=24), dict(n_time=2)])
def test_lightning_of_other_sizes(sizes, tmp_path, capsys):
    old, new = random_pair(**sizes), random_pair(**sizes)[::-1]
    for epoch, steps in enumerate((38034, 152136)):
        name = f'checkpoint_epoch{epoch:02d}_step{steps:08d}.ckpt'
        lightning(tmp_path / name, *(new if epoch else old), steps)
    convert.main(str(tmp_path), str(tmp_path / 'a'))            # the largest step
    assert same(tmp_path / 'a' / 'checkpoint_152136', *new)
    assert 'published OpenWebText settings' in capsys.readouterr().out
    model = ELF.from_pretrained(str(tmp_path / 'a'))
    assert model.config == ELFConfig(**SIZES | sizes, gelu='none', by_steps=model.config.by_steps)
    lightning(tmp_path / 'last.ckpt', *old, 7)
    (tmp_path / 'config.yml').write_text('decoder_prob: 0.3')   # no line break at the end
    convert.main(str(tmp_path), str(tmp_path / 'b'))            # last.ckpt goes before
    c = ELF.from_pretrained(str(tmp_path / 'b')).config
    assert same(tmp_path / 'b' / 'checkpoint_7', *old) and (c.decoder_prob, c.gelu) == (0.3, 'none')
    convert.main(str(tmp_path / 'b'), str(tmp_path / 'c'))
    assert ELF.from_pretrained(str(tmp_path / 'c')).config == c

# --------------------------------------------------------------------------------------------------
# ours

def test_ours_and_export_are_fixed_points(tmp_path):
    config = ELFConfig(**SIZES, latent_std=0.7, t_mean=0.3, tokenizer='mine', sampler='ode',
                       gamma=0.5, gelu='none', steps=9, cfg=1.5,
                       by_steps={64: dict(sampler='sde', gamma=1.0), 2: dict(w=2.5)})
    model = ELF(config)
    weights = model.to_official()
    ema = {'_orig_mod.' + name: x for name, x in model.state_dict().items()}
    torch.save(dict(model=model.state_dict(), ema=ema, model_args=vars(config), iter_num=5),
               tmp_path / 'ckpt.pt')
    convert.main(str(tmp_path), str(tmp_path / 'a'))
    convert.main(str(tmp_path / 'a'), str(tmp_path / 'b'))
    again = ELF.from_pretrained(str(tmp_path / 'b'))
    assert again.config == config
    convert.write_official(str(tmp_path / 'c'), weights, again.to_official(), 5, 0, again.config)
    text = (tmp_path / 'a' / 'config.yml').read_text()
    for folder in 'abc':
        assert same(tmp_path / folder / 'checkpoint_5', weights, weights)
        assert (tmp_path / folder / 'config.yml').read_text() == text
    alone = ELF.from_pretrained(str(tmp_path / 'a' / 'model.safetensors'))      # the EMA alone
    assert alone.config == config and equal(alone.to_official(), weights)


def test_an_export_is_whole(bins, tmp_path, run):
    """The folder of a run becomes one that can be moved, sampled and converted again."""
    from test_checkpoint import write_run
    write_run(tmp_path / 'run', bins)
    parts = ['encoder', 'model.safetensors', 'tokenizer']
    files = convert_all(tmp_path / 'run', tmp_path / 'a')
    assert files == ['checkpoint_1', 'config.yml', *parts]
    convert.main(str(tmp_path / 'a'), str(tmp_path / 'b'))
    assert (tmp_path / 'b' / 'config.yml').read_text() == \
        (tmp_path / 'a' / 'config.yml').read_text()
    shutil.rmtree(tmp_path / 'run')
    shutil.rmtree(tmp_path / 'a')
    shutil.move(tmp_path / 'b', tmp_path / 'moved')
    run('sample.py', f'--init_from={tmp_path}/moved', '--prompt=ab', '--num_samples=2', '--steps=2',
        '--device=cpu', f'--out_dir={tmp_path}/out')
    assert len((tmp_path / 'out' / 'samples.jsonl').read_text().splitlines()) == 2
    # two models are never mixed in one folder
    (tmp_path / 'c').mkdir()
    shutil.copytree(bins / 'tiny' / 'encoder', tmp_path / 'c' / 'tokenizer')
    with pytest.raises(UserError, match='could not write .*/c: .*not empty'):
        convert.main(str(tmp_path / 'moved'), str(tmp_path / 'c'))
    assert os.listdir(tmp_path / 'c') == ['tokenizer']


def test_a_full_disk_leaves_nothing(bins, tmp_path):
    from test_checkpoint import write_run
    write_run(tmp_path / 'run', bins)
    sizes = [f.stat().st_size for f in (tmp_path / 'run').rglob('*') if f.is_file()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sorted(sizes)[-2] + 1, limits[1]))
    try:
        with pytest.raises(UserError, match='could not write'):
            convert.main(str(tmp_path / 'run'), str(tmp_path / 'dst'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ['run']


def test_config_yml_as_theirs():
    import yaml
    got = yaml.safe_load(convert.config_text(ELFConfig(by_steps={64: dict(gamma=1.0)})))
    first = dict(sampling_method='sde', num_sampling_steps=[32], cfgs=[1.0], sde_gamma=1.5,
                 self_cond_cfg_scales=[3.0], time_schedule='logit_normal')
    assert got['sampling_configs'] == [first, first | dict(num_sampling_steps=[64], sde_gamma=1.0)]
    assert got['model'] == 'ELF-B' and got['denoiser_p_mean'] == -1.5 and 'gelu' not in got

# --------------------------------------------------------------------------------------------------
# refusals

class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


def test_what_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = pack(tmp_path / 'checkpoint_1', params=flax(pair[0]), ema_params1=flax(pair[1]))
    data = (tmp_path / 'checkpoint_1').read_bytes()
    torch.save({'state_dict': {'net.' + k: x for k, x in pair[0].items()}, 1: Evil()}, 'evil.ckpt')
    torch.save({'state_dict': {'net.weight': torch.ones(2)}}, 'other.ckpt')
    cases = {'evil.ckpt': r'os\.mkdir|posix\.mkdir|nt\.mkdir', 'nothing': 'nothing',
             'other.ckpt': 'no readable checkpoint of an ELF'}
    noise = bytes(range(256))
    for name, content in (('empty', b''), ('cut', data[:len(data) // 2]), ('noise', noise)):
        (tmp_path / name).write_bytes(content)
        cases[name] = 'readable'
    short = dict(pair[1])
    short.pop('blocks.1.norm2.weight')
    for name, ema, says in (
            ('short', short, r'Missing key.*blocks\.1\.norm2\.weight'),
            ('extra', pair[1] | {'blocks.0.more': torch.ones(2)},
             r'Unexpected key.*blocks\.0\.more'),
            ('shape', pair[1] | {'proj_bias': torch.ones(9)}, 'size mismatch for proj.bias')):
        pack(tmp_path / name, params=flax(pair[0]), ema_params1=flax(ema))
        torch.save(dict(params=pair[0], ema_params1=ema), name + '.pt')
        torch.save(dict(params=ema, ema_params1=pair[0]), name + '_params.pt')
        cases |= {name: says, name + '.pt': f'{name}.pt.* is .*{says}', name + '_params.pt': says}
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / '_METADATA').write_text('{"tree_')
    cases['broken'] = 'no readable checkpoint'
    for name, says in cases.items():
        with pytest.raises(UserError, match=says) as e:
            convert.main(name, 'dst')
        assert '\n' not in str(e.value), name
        assert not os.path.exists('dst') and not os.path.exists('evil'), name
    with pytest.raises(UserError, match='could not write'):
        convert.main(whole, 'cut')          # a file


def test_a_wrong_config_yml_is_named_where_it_lies(pair, tmp_path):
    torch.save(dict(params=pair[0]), tmp_path / 'checkpoint_1')
    (tmp_path / 'config.yml').write_text('t_eps: small')
    with pytest.raises(UserError, match=f"official settings: '{tmp_path}/config.yml' is"):
        convert.main(str(tmp_path), str(tmp_path / 'dst'))
    assert not (tmp_path / 'dst').exists()


def test_settings_of_a_later_version_are_refused(tmp_path):
    model = ELF(ELFConfig(**SIZES))
    torch.save(dict(ema=model.state_dict(), model_args=dict(n_new=1)), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match="unexpected keyword argument 'n_new'"):
        convert.main(str(tmp_path), str(tmp_path / 'dst'))


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path):
    (tmp_path / 'checkpoint_1').write_bytes(b'\xff' * 9)
    script, dst = os.path.join(ROOT, 'convert.py'), str(tmp_path / 'dst')
    done = subprocess.run([sys.executable, script, str(tmp_path), dst], capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
