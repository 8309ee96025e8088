"""
Checkpoints: ours whole or not at all, which file is taken, official weights and settings, refusals.
    python -m pytest -q tests/test_checkpoint.py
"""
import contextlib
import errno
import fcntl
import io
import os
import pickle
import random
import resource
import shutil
import tempfile
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import convert
from parts import checkpoint
from parts.checkpoint import (carry, find_checkpoint, load_checkpoint, lock, newest_checkpoint,
                              save_checkpoint)
from parts.data import load_tokenizer
from configurator import UserError
from model import ELF, MODELS, ELFConfig, TextEncoder
from sample import resolve_sampling

GOLDEN = os.path.join(ROOT, 'tests', 'golden')
SMALL = ELFConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=29, latent_dim=8, bottleneck=4,
                  n_time=3, n_scale=2, n_mode=5)


def small(**changes):
    """A small ELF without zeros in its weights."""
    torch.manual_seed(0)
    net = ELF(replace(SMALL, **changes))
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return net.eval()


def save(path, content):
    torch.save(content, path)
    return str(path)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

# --------------------------------------------------------------------------------------------------
# ours: whole or not at all

def state_of_a_run(iter_num):
    return dict(model=dict(a=torch.full((300,), iter_num)), ema={}, optimizer={}, config={},
                model_args={}, iter_num=iter_num)


def steps_in(folder):
    """Names of the checkpoints in a folder -> the iteration each is of."""
    return {f.name: load_checkpoint(str(f))['iter_num'] for f in folder.glob('*.pt')}


def test_two_are_kept_and_some_for_good(tmp_path):
    for i in (1, 2, 3):
        save_checkpoint(str(tmp_path), state_of_a_run(i), 'ckpt_2.pt' if i == 2 else '')
    assert steps_in(tmp_path) == {'ckpt.pt': 3, 'ckpt_prev.pt': 2, 'ckpt_2.pt': 2}
    path, ckpt = newest_checkpoint(str(tmp_path))
    assert path == str(tmp_path / 'ckpt.pt') and ckpt['iter_num'] == 3


@pytest.mark.parametrize('how', ['cut', 'bit', 'gone'])
def test_a_damaged_one_is_skipped(tmp_path, how, capsys):
    """And stays where it is, as any rank may ask; for what then becomes of it see test_train.py."""
    for i in (1, 2):
        save_checkpoint(str(tmp_path), state_of_a_run(i))
    newest, data = tmp_path / 'ckpt.pt', bytearray((tmp_path / 'ckpt.pt').read_bytes())
    data[data.index(torch.full((9,), 2).numpy().tobytes()) + 50] ^= 1
    newest.write_bytes(data[:-500] if how == 'cut' else data)
    if how == 'gone':
        newest.unlink()
    path, ckpt = newest_checkpoint(str(tmp_path))
    assert path == str(tmp_path / 'ckpt_prev.pt') and ckpt['iter_num'] == 1
    assert ('SKIPPED' in capsys.readouterr().out) == newest.exists() == (how != 'gone')


def test_a_save_reads_nothing(tmp_path, monkeypatch):
    """A checkpoint of gigabytes is checked when it is loaded, not each time the next is written."""
    save_checkpoint(str(tmp_path), state_of_a_run(1))

    def read(*args, **kwargs):
        raise AssertionError("it was read")
    with monkeypatch.context() as m:
        m.setattr(zipfile.ZipFile, 'testzip', read)
        m.setattr(torch, 'load', read)
        save_checkpoint(str(tmp_path), state_of_a_run(2))
    assert steps_in(tmp_path) == {'ckpt.pt': 2, 'ckpt_prev.pt': 1}


@contextlib.contextmanager
def closed_to_us(path):
    """The file or folder without permission; root, who may read all, is somebody else meanwhile."""
    os.chmod(path, 0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        os.chmod(path, 0o755)


def test_no_permission():
    with tempfile.TemporaryDirectory() as folder:       # pytest's tmp_path is closed to others
        os.chmod(folder, 0o755)
        run, path = os.path.join(folder, 'run'), os.path.join(folder, 'run', 'ckpt.pt')
        os.makedirs(run)
        for i in (1, 2):
            save_checkpoint(run, state_of_a_run(i))
        for closed in (run, path):
            with closed_to_us(closed):
                for look in (find_checkpoint, ELF.from_pretrained):
                    with pytest.raises(UserError, match=f"{closed}' is .*Permission denied"):
                        look(closed)
        with closed_to_us(path):        # it is not damaged: the run must not go on from the older
            for look in (ELF.from_pretrained, newest_checkpoint):
                with pytest.raises(UserError, match='Permission denied'):
                    look(run)
        assert newest_checkpoint(run)[1]['iter_num'] == 2


def test_links_to_nothing(tmp_path):
    save_checkpoint(str(tmp_path), state_of_a_run(1))
    path = str(tmp_path / 'ckpt.pt')
    os.rename(path, tmp_path / 'ckpt_prev.pt')
    os.symlink('gone.pt', path)
    for look, source in ((find_checkpoint, path), (find_checkpoint, str(tmp_path)),
                         (newest_checkpoint, str(tmp_path))):
        with pytest.raises(UserError, match='No such file'):
            look(source)


def test_nothing_to_go_on_from(tmp_path, capsys):
    with pytest.raises(UserError, match='nothing to resume'):
        newest_checkpoint(str(tmp_path))
    (tmp_path / 'ckpt.pt').write_bytes(b'noise')
    with pytest.raises(UserError, match='nothing to resume'):
        newest_checkpoint(str(tmp_path))
    save(tmp_path / 'ckpt.pt', dict(ema={}))
    with pytest.raises(UserError, match='nothing to resume'):
        newest_checkpoint(str(tmp_path))


def test_a_full_disk(tmp_path):
    save_checkpoint(str(tmp_path), state_of_a_run(1))
    before = (tmp_path / 'ckpt.pt').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match='could not write .*before is intact') as e:
            save_checkpoint(str(tmp_path), state_of_a_run(2), 'ckpt_2.pt')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(e.value) and os.listdir(tmp_path) == ['ckpt.pt']
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


def test_lock(tmp_path, monkeypatch, capsys):
    held = lock(str(tmp_path))
    with pytest.raises(UserError, match='another run'):
        lock(str(tmp_path))
    held.release()
    lock(str(tmp_path)).release()
    assert not capsys.readouterr().out
    for code in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):        # Lustre, NFS

        def no_locks(*args, code=code):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(fcntl, 'flock', no_locks)
        lock(str(tmp_path))
        assert 'no file locks here' in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / 'another').mkdir()
    (tmp_path / 'another' / 'lock').symlink_to(tmp_path / 'lock')
    with pytest.raises(OSError, match='lock'):      # of another account, say: no reason to go on
        lock(str(tmp_path / 'another'))
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        lock(str(tmp_path / 'file' / 'out'))


def damages(data, cuts, flips):
    """The file cut at each of the last lengths, and with one bit turned at random places."""
    rng = random.Random(0)
    for n in range(1, cuts + 1):
        yield data[:-n]
    for _ in range(flips):
        at = rng.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def test_damaged_checkpoints_are_never_used(tmp_path):
    want, path, refused = state_of_a_run(5), tmp_path / 'ckpt.pt', 0
    data = open(save(path, want), 'rb').read()
    for damaged in damages(data, 64, 200):
        path.write_bytes(damaged)
        try:
            got = load_checkpoint(str(path))
            assert same(got.pop('model'), want['model']) and got | dict(model=want['model']) == want
        except UserError as e:
            assert '\n' not in str(e)
            refused += 1
    assert refused > 200


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_unreadable_checkpoints(tmp_path):
    whole, bad = io.BytesIO(), tmp_path / 'checkpoint_1'
    torch.save({'params': small().to_official()}, whole)
    payload = pickle.dumps(Payload(tmp_path / 'owned'), protocol=2)
    for content in (whole.getvalue()[:-2000], whole.getvalue()[:50], b'', b'text', payload):
        bad.write_bytes(content)
        with pytest.raises(UserError, match='no readable checkpoint'):
            ELF.from_pretrained(str(bad))
    save(bad, {'ema_params1': Payload(tmp_path / 'owned')})
    with pytest.raises(UserError, match='no readable checkpoint .*GLOBAL (io|_io).open was not'):
        ELF.from_pretrained(str(tmp_path))
    assert not (tmp_path / 'owned').exists()
    save(bad, [1, 2])
    with pytest.raises(UserError, match='no readable checkpoint'):
        ELF.from_pretrained(str(bad))

# --------------------------------------------------------------------------------------------------
# which file

def test_which_file_of_a_folder(tmp_path):
    with pytest.raises(UserError, match='no checkpoint in'):
        find_checkpoint(str(tmp_path))
    (tmp_path / 'old_ckpt.pt').write_bytes(b'')         # of a run that was overwritten
    (tmp_path / 'ckpt_500.pt').write_bytes(b'')
    with pytest.raises(UserError, match='no checkpoint in'):
        find_checkpoint(str(tmp_path))
    # from the last choice to the first
    for name in ('my.ckpt', 'checkpoint_epoch00_step00038034.ckpt', 'epoch=3-step=152136.ckpt',
                 'last.ckpt', 'model.safetensors', 'ckpt_prev.pt', 'ckpt.pt', 'checkpoint_9',
                 'checkpoint_10'):
        (tmp_path / name).write_bytes(b'')
        assert find_checkpoint(str(tmp_path)) == str(tmp_path / name)
    (tmp_path / 'checkpoint_11').mkdir()
    (tmp_path / 'checkpoint_11' / '_METADATA').write_text('')
    for source in (tmp_path, tmp_path / 'checkpoint_11'):
        assert find_checkpoint(str(source)) == str(tmp_path / 'checkpoint_11')


def test_a_file_that_is_named_is_taken(tmp_path):
    net = small()
    for name in ('pytorch_model.bin', 'old_ckpt.pt', 'x', 'last.ckpt'):
        path = save(tmp_path / name, net.state_dict())
        assert find_checkpoint(path) == path
        assert same(ELF.from_pretrained(path).state_dict(), net.state_dict())


@pytest.mark.parametrize('nowhere', ['./none', 'none', '~/none/x', '/none/none', 'a//b', ''])
def test_no_file_and_no_hub_id(nowhere):
    with pytest.raises(UserError, match='no checkpoint: .* is no file or folder here'):
        ELF.from_pretrained(nowhere)


@pytest.mark.parametrize('kind', ['lightning', 'jax_ckpt', 'jax_ckpt/checkpoint_3',
                                  'jax_ckpt_msgpack'])
def test_foreign_ones_name_convert(kind):
    source = os.path.join(GOLDEN, kind)
    with pytest.raises(UserError, match='is a JAX or Lightning checkpoint') as e:
        ELF.from_pretrained(source)
    assert f'python convert.py {source} FOLDER' in str(e.value)

# --------------------------------------------------------------------------------------------------
# weights

@torch.no_grad()
def test_official_checkpoint_round_trip():
    net = ELF.from_pretrained(os.path.join(GOLDEN, 'port_ckpt'))
    file = os.path.join(GOLDEN, 'port_ckpt', 'checkpoint_3')
    assert same(net.to_official(), torch.load(file, weights_only=True)['ema_params1'])
    e = np.load(os.path.join(GOLDEN, 'port_ckpt', 'expect.npz'))
    x, t, w = (torch.tensor(e[name]) for name in ('x', 't', 'self_cond_cfg_scale'))
    args = *x.chunk(2, dim=-1), t, w
    assert rel(net.denoise(*args), torch.tensor(e['denoise_out'])) < 1e-5
    assert rel(net(*args, n_decode=2)[1], torch.tensor(e['decode_logits'])) < 1e-5
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.'])
def test_other_sizes_round_trip(tmp_path, prefix):
    net = small()                                       # 3 time, 2 scale, 5 mode tokens
    save(tmp_path / 'checkpoint_2', {'ema_params1': {}})
    weights = {prefix + name: x for name, x in net.to_official().items()}
    save(tmp_path / 'checkpoint_10', {'params': {}, 'ema_params1': weights})
    again = ELF.from_pretrained(str(tmp_path))          # the largest step number
    c = again.config
    assert (c.n_time, c.n_scale, c.n_mode, c.n_head) == (3, 2, 5, 2)
    assert same(net.to_official(), again.to_official())
    for T in (1, 7, 40):
        args = torch.randn(2, T, 8), torch.randn(2, T, 8), torch.rand(2), torch.ones(2)
        assert torch.equal(net.denoise(*args), again.denoise(*args))
        assert again.decode(args[0], args[3]).shape == (2, T, 29)


def test_to_official_copies():
    net = small()
    for name, x in net.to_official().items():
        x.zero_()
        assert x.is_contiguous(), name
    assert all(p.abs().sum() > 0 for p in net.parameters())


def test_our_checkpoint_keeps_its_settings(tmp_path):
    net = small(t_eps=0.01, encoder='t5-base', sampler='ode', gelu='none',
                by_steps={8: dict(gamma=2.0)})
    ckpt = dict(model=ELF(net.config).state_dict(), ema=net.state_dict(),
                model_args=asdict(net.config))
    again = ELF.from_pretrained(save(tmp_path / 'ckpt.pt', ckpt))
    assert again.config == net.config and same(net.state_dict(), again.state_dict())


def test_settings_of_a_later_version_are_refused(tmp_path):
    net = small()
    ckpt = dict(model=net.state_dict(), ema=net.state_dict(),
                model_args=asdict(net.config) | dict(n_new=3))
    save(tmp_path / 'ckpt.pt', ckpt)
    with pytest.raises(UserError, match="unexpected keyword argument 'n_new'"):
        ELF.from_pretrained(str(tmp_path))


def wide_heads(state):
    state['blocks.0.attn.q_norm.weight'] = torch.ones(64)


def wrong_shape(state):
    state['text_proj.proj2.weight'] = torch.ones(5, 3)


@pytest.mark.parametrize('change, says', [
    (lambda s: s.pop('blocks.1.attn.proj.weight'), 'Missing key.*blocks.1.attn.proj.weight'),
    (lambda s: s.pop('t_emb_tokens'), 'no weights of an ELF: .*t_emb_tokens'),
    (lambda s: s.update(extra=torch.ones(1)), 'Unexpected key.*extra'),
    (lambda s: s.update({7: torch.ones(1)}), 'no weights of an ELF'),
    (lambda s: s.update(mode_tokens=3), 'mode_tokens'),
    (lambda s: s.update(proj_bias=3), 'Missing key.*proj.bias'),
    (lambda s: s.update(unembed_bias=torch.tensor(1.0)), 'no weights of an ELF'),
    (lambda s: s.clear(), 'no weights of an ELF'),
    (wrong_shape, r'text_proj.proj2.weight: .*\[5, 3\].*\[32, 4\]'),
    (wide_heads, 'division')])
def test_weights_that_do_not_fit(tmp_path, change, says):
    state = small().to_official()
    change(state)
    with pytest.raises(UserError, match=says):
        ELF.from_pretrained(save(tmp_path / 'checkpoint_1', {'ema_params1': state}))

# --------------------------------------------------------------------------------------------------
# whole: tokenizer and encoder

OF_THE_BINS = dict(vocab_size=30, latent_dim=16, max_length=13, latent_std=1.0)


def write_run(out_dir, bins):
    """A run's checkpoint as train.py writes it -> ELFConfig."""
    parts = {part: str(bins / 'tiny' / part) for part in ('tokenizer', 'encoder')}
    net = small(**OF_THE_BINS, **parts)
    out_dir.mkdir(exist_ok=True)
    args = asdict(carry(net.config, str(out_dir)))
    save_checkpoint(str(out_dir), state_of_a_run(1) | dict(
        model=net.state_dict(), ema=net.state_dict(), model_args=args))
    return net.config


def test_a_run_is_whole(bins, tmp_path):
    c = write_run(tmp_path / 'run', bins)
    args = load_checkpoint(str(tmp_path / 'run' / 'ckpt.pt'))['model_args']
    assert (args['tokenizer'], args['encoder']) == ('tokenizer', 'encoder')
    shutil.move(tmp_path / 'run', tmp_path / 'moved')
    (tmp_path / 'ckpt.pt').symlink_to('moved/ckpt.pt')
    for source in ('moved', 'moved/ckpt.pt'):
        got = ELF.from_pretrained(str(tmp_path / source)).config
        assert got.tokenizer == str(tmp_path / 'moved' / 'tokenizer')
        assert load_tokenizer(got.tokenizer, 30).encode('abc') == \
            load_tokenizer(c.tokenizer).encode('abc')
        assert same(TextEncoder(got.encoder).state_dict(), TextEncoder(c.encoder).state_dict())


def test_a_checkpoint_in_the_working_directory(bins, tmp_path, monkeypatch):
    write_run(tmp_path, bins)
    monkeypatch.chdir(tmp_path)
    assert len(load_tokenizer(ELF.from_pretrained('ckpt.pt').config.tokenizer)) == 30


def test_carry(bins, tmp_path):
    c = small(tokenizer=str(bins / 'tiny' / 'tokenizer'), encoder='t5-small').config
    for _ in range(2):                                  # the second time: a run that is resumed
        got = carry(c, str(tmp_path))
        assert (got.tokenizer, got.encoder) == ('tokenizer', 't5-small')
        assert os.listdir(tmp_path) == ['tokenizer']


def test_carry_takes_what_is_read(bins, tmp_path):
    """One read-only folder that is both, with links, and weights of another framework."""
    t5 = tmp_path / 't5'
    for part in ('tokenizer', 'encoder'):
        shutil.copytree(bins / 'tiny' / part, t5, dirs_exist_ok=True)
    os.rename(t5 / 'model.safetensors', tmp_path / 'blob')
    (t5 / 'model.safetensors').symlink_to(tmp_path / 'blob')
    (t5 / 'tf_model.h5').write_bytes(b'x')
    t5.chmod(0o555)
    carry(small(tokenizer=str(t5), encoder=str(t5)).config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'tokenizer' / 'model.safetensors').exists()
    weights = tmp_path / 'run' / 'encoder' / 'model.safetensors'
    assert weights.is_file() and not weights.is_symlink()
    assert not (tmp_path / 'run' / 'encoder' / 'tf_model.h5').exists()
    assert os.access(tmp_path / 'run' / 'encoder', os.W_OK)


def test_a_copy_that_fails(bins, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match='could not write .*/tokenizer: .*File too large') as e:
            carry(small(tokenizer=str(bins / 'tiny' / 'tokenizer')).config, str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


def test_a_file_without_its_folders(bins, tmp_path, monkeypatch):
    write_run(tmp_path / 'run', bins)
    (tmp_path / 'other').mkdir()
    shutil.copy(tmp_path / 'run' / 'ckpt.pt', tmp_path / 'other')
    monkeypatch.chdir(tmp_path / 'run')                 # another model's, which must not be taken
    with pytest.raises(UserError, match='other/ckpt.pt needs its tokenizer; copy the one .* '
                                        f'to {tmp_path}/other/tokenizer'):
        ELF.from_pretrained(str(tmp_path / 'other'))

# --------------------------------------------------------------------------------------------------
# config.yml

def settings(folder, text, **sizes):
    """What config.yml of this text beside weights of these sizes, small ones by default, sets."""
    (folder / 'config.yml').write_text(text)
    return checkpoint.read_config_yml(str(folder / 'checkpoint_1'),
                                      dict(n_layer=2, n_embd=32, n_head=2) | sizes)


def test_config_yml(tmp_path, capsys):
    source = save(tmp_path / 'checkpoint_1', {'params': small().to_official()})
    c = ELF.from_pretrained(source).config              # no config.yml
    assert c == replace(SMALL, by_steps={64: dict(gamma=1.0), 8: dict(gamma=2.0),
                                         16: dict(gamma=2.0)})
    assert 'published OpenWebText settings' in capsys.readouterr().out
    (tmp_path / 'config.yml').write_text(
        'model: ELF-L\ndenoiser_p_mean: -0.8\nt_eps: 5e-2\ndecoder_noise_scale: 3\n'
        'latent_mean: 0.1\nself_cond_cfg_max: 3.0\nlabel_drop_prob: 0.1\npad_token: eos\n'
        'max_length: 99\nmax_input_length: 64\nencoder_model_name: t5-base\nlr: null\n')
    c = ELF.from_pretrained(source).config
    assert (c.t_mean, c.t_eps, c.decoder_noise_scale, c.latent_mean) == (-0.8, 0.05, 3.0, 0.1)
    assert (c.w_max, c.drop_cond_prob, c.pad_token, c.n_embd) == (3.0, 0.1, 'eos', 32)
    assert (c.max_length, c.max_input_length, c.tokenizer) == (99, 64, 't5-base')
    assert (c.sampler, c.steps, c.w, c.cfg) == ('ode', 64, 1.0, 2.0)        # a conditional task


def test_a_missing_key_is_the_default_of_their_class(tmp_path):
    """The values of class Config in their configs/config.py, not those of the published runs."""
    got = settings(tmp_path, 'seed: 1\ntokenizer_name: null\n')
    assert got == dict(
        t_mean=0.8, t_std=0.8, t_eps=0.05, noise_scale=1.0,
        self_cond_prob=0.5, w_min=0.5, w_max=5.0, decoder_prob=0.5,
        decoder_mean=0.8, decoder_std=0.8, decoder_noise_scale=1.0, gelu='tanh',
        encoder='t5-small', tokenizer='t5-small', latent_mean=0.0, latent_std=1.0, max_length=128,
        max_input_length=0, pad_token='pad', drop_cond_prob=0.0,
        sampler='ode', steps=50, gamma=0.0, w=1.0, cfg=1.0, grid='logit_normal', by_steps={})
    assert got == settings(tmp_path, '') and got.keys() <= ELFConfig.__dataclass_fields__.keys()


SDE = dict(sampler='sde', w=3.0, cfg=1.0)
OF_SIZE_B, OF_SIZE_M, OF_SIZE_L = ({k: asdict(c)[k] for k in ('n_layer', 'n_embd', 'n_head')}
                                   for c in MODELS.values())
CONDITIONAL = dict(sampler='ode', steps=64, gamma=0.0, w=1.0, cfg=2.0, by_steps={})
UNCOND = 'sampling_configs_path: src/configs/sampling_configs/uncond_sampling_configs.yml\n'
FEW = {4: {}, 2: {}, 1: {}, 16: dict(gamma=2.0, w=2.0), 32: dict(gamma=2.0, w=2.0)}
OF_B = {8: dict(gamma=2.0), 16: dict(gamma=2.0), 64: dict(gamma=1.0)}
OF_M = {8: dict(gamma=2.0), 16: dict(gamma=2.0), 32: dict(gamma=1.5)}
EMBEDDED = UNCOND + '''sampling_configs:
- {sampling_method: sde, num_sampling_steps: [20, 40], cfgs: [1], sde_gamma: 1.2, \
self_cond_cfg_scales: [2], time_schedule: logit_normal}
- {num_sampling_steps: [64], cfgs: [1, 2], self_cond_cfg_scales: [2]}
'''


@pytest.mark.parametrize('text, sizes, want', [
    (UNCOND, OF_SIZE_B, SDE | dict(steps=32, gamma=1.5, by_steps=OF_B)),
    (UNCOND, OF_SIZE_M, SDE | dict(steps=64, gamma=1.0, by_steps=OF_M)),
    (UNCOND, OF_SIZE_L, SDE | dict(steps=64, gamma=1.0, by_steps=OF_M)),
    ('max_input_length: 1024', {}, CONDITIONAL),
    ('teacher_path: x', {}, dict(sampler='sde', steps=8, gamma=1.5, w=2.5, cfg=1.0, by_steps=FEW)),
    ('pd_step_size: 1.0', {}, dict(steps=8, gamma=1.5, w=2.5, by_steps=FEW)),
    (UNCOND.replace('uncond', 'uncond_fewstep'), {}, dict(steps=8, gamma=1.5, w=2.5, by_steps=FEW)),
    (EMBEDDED, {}, dict(sampler='sde', steps=20, gamma=1.2, w=2.0, by_steps={
        40: {}, 64: dict(sampler='ode', gamma=0.0)}))])
def test_samplers(tmp_path, text, sizes, want):
    got = settings(tmp_path, text, **sizes)
    assert {name: got[name] for name in want} == want


@pytest.mark.parametrize('text', ['pd_step_size: 1.0', UNCOND.replace('uncond', 'uncond_fewstep')])
def test_the_distilled_model_at_each_number_of_steps(tmp_path, text):
    """As published, and once more after an export."""
    c = replace(SMALL, **settings(tmp_path, text))
    for c in (c, replace(SMALL, **settings(tmp_path, convert.config_text(c)))):
        for steps in (1, 2, 4, 8, 16, 32):
            gamma, w = (1.5, 2.5) if steps <= 8 else (2.0, 2.0)
            assert resolve_sampling(c, steps=steps) == dict(
                sampler='sde', steps=steps, gamma=gamma, w=w, cfg=1.0, grid='logit_normal')
        assert resolve_sampling(c)['steps'] == 8


def test_published_models_without_config_yml(tmp_path):
    """model.py's presets have the same defaults."""
    for name, c in MODELS.items():
        got = checkpoint.read_config_yml(str(tmp_path / 'x'), asdict(c))
        assert {k: getattr(c, k) for k in ('sampler', 'steps', 'gamma', 'w', 'cfg')} == \
            {k: got[k] for k in ('sampler', 'steps', 'gamma', 'w', 'cfg')}, name


@pytest.mark.parametrize('text', [
    't_eps: [1', 't_eps: small', '- 1', 'a', 't_eps: true', 'max_length: 1.5',
    'max_length: 1e400', 'latent_std: {a: 1}',
    'sampling_configs: 3', 'sampling_configs: [3]', 'sampling_configs: {a: 1}',
    'sampling_configs: [{cfgs: []}]', 'sampling_configs: [{num_sampling_steps: []}]',
    'sampling_configs: [{num_sampling_steps: 5}]', 'sampling_configs_path: 3',
    'sampling_configs: [{sde_gamma: x}]', 'a: \x00'])
def test_bad_config_yml(tmp_path, text):
    says = r'not readable as the official settings: .*config\.yml'
    with pytest.raises(UserError, match=says) as e:
        settings(tmp_path, text)
    assert '\n' not in str(e.value)


def test_another_grid(tmp_path):
    got = settings(tmp_path, 'sampling_configs: [{time_schedule: uniform}]')
    assert got['grid'] == 'uniform' and settings(tmp_path, '{}')['grid'] == 'logit_normal'
