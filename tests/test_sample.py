"""
Samplers against the official ones, grids, packed products, and that text i depends on (seed, i)
alone.
    python -m pytest -q tests/test_sample.py
"""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command
from test_model import golden, official, small  # noqa: F401, official is a fixture

from configurator import UserError
from model import ELF, ELFConfig
from parts.device import cast_blocks, pick_device
from parts.prompt import texts_in
from parts.data import batched
from sample import decode, generate, load_model, resolve_sampling, sample_batch, time_grid

CPU = torch.device('cpu')


class Spy:
    """A network that always sees the same x0, and notes what it was given."""
    def __init__(self, x0, **settings):
        self.config, self.x0, self.calls = ELFConfig(**settings), x0, []

    def denoise(self, z, x_prev, t, w):
        self.calls.append((z, x_prev))
        return self.x0[:len(z)]


@pytest.fixture(scope='module')
def tiny_model(bins, tmp_path_factory):
    """The folder of a model of the tiny set that was never trained."""
    folder = tmp_path_factory.mktemp('model')
    c = ELFConfig(n_layer=1, n_embd=16, n_head=2, latent_dim=16, bottleneck=4, max_length=13,
                  vocab_size=30, tokenizer=str(bins / 'tiny' / 'tokenizer'))
    torch.save(dict(model=ELF(c).state_dict(), model_args=asdict(c)), folder / 'ckpt.pt')
    return folder

# --------------------------------------------------------------------------------------------------
# samplers

@pytest.mark.parametrize('case', ['uncond_ode', 'uncond_sde', 'cond_ode', 'cond_sde'])
def test_samplers_equal_the_official_ones(case, official):  # noqa: F811
    data, config = golden('sampler.npz')
    how = config['cases'][case]
    d = {name.partition('/')[2]: x for name, x in data.items() if name.startswith(case)}
    w = how['self_cond_cfg_scale']
    z = generate(official, d['z_init'], d['t_steps'], how['sampling_method'], how['sde_gamma'], w,
                 how['cfg_scale'], d.get('cond_seq'), d.get('cond_seq_mask'), d['eps'])
    assert (z - d['z']).norm() <= 1e-5 * d['z'].norm()
    assert torch.equal(decode(official, z, w)[0], d['ids'])


@pytest.mark.parametrize('sampler, gamma', [('ode', 0.0), ('sde', 1.5), ('sde', 40.0),
                                            ('sde_exact', 3.0)])
@pytest.mark.parametrize('grid', ['logit_normal', 'uniform', 'quantile'])
def test_with_an_oracle_every_step_lies_on_the_path_to_the_data(sampler, gamma, grid):
    x0, seen = torch.randn(3, 5, 4), []
    noise = torch.randn(3, 5, 4) * (sampler == 'ode')   # the SDE adds noise of its own: here, none
    oracle = Spy(x0)
    times = time_grid(16, grid, oracle.config, torch.Generator().manual_seed(0))

    def watch(i, t, z):
        seen.append(i)
        t = t[:, None, None]
        torch.testing.assert_close(z, t * x0 + (1 - t) * noise, rtol=0, atol=1e-5)
    generate(oracle, noise, times, sampler, gamma, step_noise=torch.zeros(15, 3, 5, 4), watch=watch)
    assert seen == list(range(17))


@pytest.mark.parametrize('sampler, first, least', [('sde_exact', 1, 1), ('sde', 0.729, 0.56)])
def test_how_noisy_the_network_sees_what_was_renoised(sampler, first, least):
    """At time t there should be noise of (1 - t) * noise_scale: in the official SDE it is less."""
    torch.manual_seed(0)
    oracle, seen = Spy(torch.randn(1, 400, 64), noise_scale=2.0), []
    predict = oracle.denoise

    def denoise(z, x_prev, t, w):
        noise = z - t * oracle.x0
        seen.append((noise.std() / (2 * (1 - t))).item())
        return predict(z, x_prev, t, w)
    oracle.denoise = denoise
    z = 2.0 * torch.randn(1, 400, 64)
    generate(oracle, z, torch.linspace(0, 1, 9), sampler, gamma=3.0)
    # 0.729 is sqrt(0.625^2 + 0.375^2), and what lacks adds up
    assert len(seen) == 8 and seen[0] == pytest.approx(first, abs=0.01)
    assert min(seen) == pytest.approx(least, abs=0.01) and max(seen) < 1.01


@pytest.mark.parametrize('self_cond_prob, fed', [(0.5, True), (0.0, False)])
def test_only_a_network_that_was_shown_guesses_is_fed_one(self_cond_prob, fed):
    x0, mask = torch.ones(2, 3, 4), torch.tensor([[1, 0, 0], [1, 1, 0]])
    model = Spy(x0, self_cond_prob=self_cond_prob)
    generate(model, torch.zeros(2, 3, 4), torch.linspace(0, 1, 6), cond=7 * x0, cond_mask=mask)
    first, *others = [x_prev[mask == 0] for _, x_prev in model.calls]
    assert not first.any() and len(others) == 4 and all(x.all() == x.any() == fed for x in others)
    assert all((x_prev[mask == 1] == 7).all() for _, x_prev in model.calls)     # the condition


def test_grids():
    c = ELFConfig()
    for schedule in ('logit_normal', 'uniform', 'quantile'):
        t = time_grid(32, schedule, c, torch.Generator().manual_seed(1))
        assert t.shape == (33,) and t.dtype == torch.float32
        assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
        assert time_grid(1, schedule, c).tolist() == [0, 1]
    drawn = time_grid(20001, 'logit_normal', c, torch.Generator().manual_seed(0))[1:-1].logit()
    assert drawn.mean().item() == pytest.approx(-1.5, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.8, abs=0.02)
    assert time_grid(2, 'quantile', c)[1].logit().item() == pytest.approx(-1.5, abs=1e-5)
    with pytest.raises(AssertionError, match="grid=cosine is not one of .*'quantile', 'uniform'"):
        time_grid(4, 'cosine', c)
    with pytest.raises(AssertionError, match="sampler=heun is not one of .*'sde', 'sde_exact'"):
        generate(Spy(None), torch.zeros(1, 1, 1), torch.zeros(2), sampler='heun')


def test_what_is_given_wins_over_what_the_checkpoint_has():
    by_steps = {8: dict(gamma=2.0), 64: dict(sampler='ode', gamma=0.0)}
    c = ELFConfig(by_steps=by_steps, max_input_length=4)
    own = dict(steps=32, sampler='sde', gamma=1.5, w=3.0, cfg=1.0, grid='logit_normal')
    assert resolve_sampling(c) == own
    assert resolve_sampling(c, steps=8) == own | dict(steps=8, gamma=2.0)
    assert resolve_sampling(c, steps=9) == own | dict(steps=9)
    assert resolve_sampling(c, steps=7) == own | dict(steps=7, gamma=0.0)
    for n in (7, 8, 9):
        assert resolve_sampling(c, steps=n, gamma=0.5)['gamma'] == 0.5
    changed = dict(steps=64, sampler='sde', cfg=2.0)
    assert resolve_sampling(c, **changed) == own | changed | dict(gamma=0.0)
    given = dict(steps=64, sampler='sde', gamma=0.0, w=0.0, cfg=0.0, grid='uniform')
    assert resolve_sampling(c, **given) == given
    with pytest.raises(UserError, match='cfg=2: this is a model without conditions; drop it'):
        resolve_sampling(ELFConfig(), cfg=2)
    assert resolve_sampling(ELFConfig(), cfg=1)['cfg'] == 1


@pytest.mark.parametrize('given, gamma', [({}, 1.5), (dict(steps=8), 1.5), (dict(steps=16), 2.0),
                                          (dict(steps=8, gamma=0.3), 0.3)])
def test_a_run_with_a_sampler_of_its_own_keeps_it(given, gamma):
    """A student of published weights inherits what they list for its number of steps."""
    c = ELFConfig(steps=8, gamma=1.5, by_steps={8: dict(gamma=2.0, w=2.0), 16: dict(gamma=2.0)})
    assert resolve_sampling(c, **given) == dict(
        steps=given.get('steps', 8), sampler='sde', gamma=gamma, w=3.0, cfg=1.0,
        grid='logit_normal')


def test_a_gigabyte_of_logits_at_a_time():
    """Five rows of which two fit: each is decoded once, in its place."""
    sizes = []

    def logits(z, w):
        sizes.append(len(z))
        return z + 0 * w[:, None, None]
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=2**27), decode=logits)
    z = torch.eye(5)[:, None]
    assert decode(model, z, 3.0)[0].tolist() == [[0], [1], [2], [3], [4]] and sizes == [2, 2, 1]

# --------------------------------------------------------------------------------------------------
# precision

@pytest.mark.parametrize('compiled', [False, True])
def test_blocks_in_bfloat16_give_what_autocast_gives(official, compiled):  # noqa: F811
    """To the bit, but for oneDNN's own layout, which may sum in another order."""
    torch.manual_seed(0)
    z, t = torch.randn(2, 9, official.config.latent_dim), torch.rand(2)
    model = copy.deepcopy(official)
    with torch.no_grad():
        exact = model.denoise(z, z, t, 1 + t), model.decode(z, 1 + t)
        with torch.autocast('cpu', torch.bfloat16):
            plain = model.denoise(z, z, t, 1 + t), model.decode(z, 1 + t)
            cast_blocks(model, compiled)
            cast = model.denoise(z, z, t, 1 + t), model.decode(z, 1 + t)
    packed = 'forward' in vars(model.blocks[0].mlp.w3)
    fast = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert packed == (fast and not compiled)
    for a, b, c in zip(exact, plain, cast):
        assert b.dtype == c.dtype == torch.float32 and (packed or torch.equal(b, c))
        assert 0.95 < (c - a).norm() / (b - a).norm() < 1.05
    in_bfloat16 = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert in_bfloat16 == {f'blocks.{i}.{layer}.{kind}' for i in range(len(model.blocks))
                           for layer in ('attn.qkv', 'attn.proj', 'mlp.w12', 'mlp.w3')
                           for kind in ('weight', 'bias')}


def test_onednn_may_be_held_to_less_than_the_cpu_has():
    """As docs/experiments.md does; on a CPU without bfloat16 there is nothing to hold."""
    script = '''
import torch
from model import ELF, ELFConfig
from parts.device import cast_blocks
model = ELF(ELFConfig(n_layer=1, n_embd=32, n_head=2, latent_dim=8, bottleneck=4, vocab_size=30))
cast_blocks(model, False)
with torch.autocast('cpu', torch.bfloat16):
    model.denoise(torch.ones(1, 4, 8), torch.ones(1, 4, 8), torch.ones(1), torch.ones(1))
'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | dict(ONEDNN_MAX_CPU_ISA='AVX2'))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('bf16', [False, True])
def test_a_model_comes_ready_to_sample(tiny_model, bf16):
    config = dict(init_from='', out_dir=str(tiny_model), compile=False)
    model = load_model(config, CPU, bf16)
    w3 = model.blocks[0].mlp.w3.weight
    assert w3.dtype == (torch.bfloat16 if bf16 else torch.float32) and w3.requires_grad != bf16


@pytest.mark.parametrize('fast', [False, True])
def test_auto_takes_bfloat16_where_it_is_fast(fast, monkeypatch):
    """Whether there is fast bfloat16 is a fact, not a word in the sentence that speaks of it."""
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: fast)
    device, bf16, said = pick_device('cpu', 'auto')
    assert device == CPU and bf16 is fast
    assert said.endswith('bfloat16 autocast (dtype=auto, fast bfloat16 here)' if fast else
                         'float32 (dtype=auto, no fast bfloat16 here)')
    assert pick_device('cpu', 'float32')[1] is False and pick_device('cpu', 'bfloat16')[1] is True


@pytest.mark.parametrize('device, says', [
    ('tpu', "device='tpu' is not available here; .*=auto takes c"),
    ('cpu:x', "device='cpu:x' is not available here")])
def test_devices_that_are_not_there(device, says):
    with pytest.raises(UserError, match=says):
        pick_device(device, 'auto')

# --------------------------------------------------------------------------------------------------
# texts

def test_text_i_depends_on_seed_and_i_alone():
    torch.manual_seed(0)
    c = ELFConfig(n_layer=1, n_embd=16, n_head=2, latent_dim=8, bottleneck=4, vocab_size=40,
                  max_length=6)
    model = ELF(c).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.3)
    tokenizer = SimpleNamespace(eos_token_id=1, decode=lambda ids, **_: ' '.join(map(str, ids)))
    sampling = resolve_sampling(c, steps=6)

    def texts(numbers, batch_size, seed=3):
        torch.manual_seed(batch_size)
        return [row for batch in batched(numbers, batch_size)
                for row in sample_batch(model, tokenizer, batch, seed, CPU, sampling)]

    whole = texts(range(5), 5)
    assert [row['id'] for row in whole] == [0, 1, 2, 3, 4]
    assert len({row['generated'] for row in whole}) > 1
    assert texts(range(5), 1) == texts(range(5), 2) == whole
    assert texts([3, 1], 2) == [whole[3], whole[1]]             # the share of a rank
    assert texts(range(5), 5, seed=4) != whole


def test_a_condition_is_coded_cut_kept_and_left_out_of_the_text():
    model = Spy(torch.zeros(2, 8, 2), latent_dim=2, max_length=8, max_input_length=3)
    position = torch.nn.functional.one_hot(torch.arange(10, 18), 20).float().expand(2, -1, -1)
    model.decode = lambda z, w: position[:len(z)]               # to 10, 11, ... 17
    seen, watched = [], []

    class Tokenizer:
        eos_token_id, pad_token_id = 1, 0

        def __call__(self, texts, add_special_tokens, split_special_tokens, verbose):
            assert split_special_tokens and not add_special_tokens
            return SimpleNamespace(encodings=[
                SimpleNamespace(ids=[*map(ord, text)], offsets=[*text]) for text in texts])

        def decode(self, ids, skip_special_tokens):
            return f'{ids} {skip_special_tokens}'

    def encoder(*args):
        seen.extend(args)
        return torch.full((2, 8, 2), 7.0)

    def watch(numbers, rows, i, t, z):
        assert numbers == [0, 1] and t.tolist() == pytest.approx([i / 3] * 2)
        watched.append(texts_in(rows, *decode(model, z, 3.0), tokenizer, model.config))

    sampling = dict(steps=3, sampler='sde', gamma=1.5, w=3.0, cfg=1.0, grid='uniform')
    given, tokenizer = ['d', 'defg'], Tokenizer()
    rows = sample_batch(model, tokenizer, [0, 1], 0, CPU, sampling, given, encoder, watch)
    ids, valid, cond = seen
    # EOS ends it, or is cut off
    assert ids.tolist() == [[100, 1, 0, 0, 0, 0, 0, 0], [100, 101, 102, 0, 0, 0, 0, 0]]
    assert torch.equal(valid, cond) and torch.equal(cond, ids > 0)
    assert len(model.calls) == 3
    assert all(((x == 7).all(-1) == cond).all() for call in model.calls for x in call)
    texts = [[12, 13, 14, 15, 16], [13, 14, 15, 16, 17]]
    assert len(watched) == 4
    for pairs in watched:
        assert [ids for ids, _ in pairs] == texts
        assert all(len(p) == 5 and 0 < min(p) <= max(p) <= 1 for _, p in pairs)
    assert rows == [dict(id=i, ids=ids, generated=f'{ids} True') for i, ids in enumerate(texts)]


@pytest.mark.parametrize('args, says', [
    (['--num_samples=-1'], "samples='-1' must lie"), (['--batch_size=0'], "size='0' must lie"),
    (['--seed=-1'], "seed='-1' must lie"), (['--trace=-1'], "trace='-1' must lie"),
    (['--steps=0'], "steps='0' must lie"), (['--gamma=-2'], "gamma='-2' must lie"),
    (['--grid=cosine'], "'cosine' is not one of"), (['--sampler=heun'], "'heun' is not one of"),
    (['--dtype=fp8'], "'fp8' is not one of 'auto', 'float32', 'bfloat16'"),
    (['--num_samples=1', '--batch_size=1', '--seed=0', '--trace=0'], 'no model in out/none: tra')])
def test_what_sample_refuses(run, args, says):
    """Last: an out_dir is not looked for on the hub."""
    with pytest.raises(UserError, match=says):
        run('sample.py', '--out_dir=out/none', '--device=cpu', *args)
    assert not os.path.exists('out/none')


def test_under_torchrun_no_rank_writes(tiny_model, tmp_path):
    """Each of them would write all texts to the same file."""
    done = subprocess.run(command('sample.py', f'--init_from={tiny_model}', f'--out_dir={tmp_path}',
                                  ranks=2), capture_output=True, text=True, timeout=120)
    assert done.returncode and not os.listdir(tmp_path)
    assert done.stderr.count('error: sample.py is one process: start it with python') == 1


@pytest.mark.parametrize('done', [6, 2, 0])
def test_an_interrupt_leaves_the_texts_that_are_done(done, tiny_model, run, tmp_path, monkeypatch):
    """It comes in the batch after them; where none is done the file of before stays."""
    (tmp_path / 'samples.jsonl').write_text('{"id": -1}')
    decode, calls = ELF.decode, []

    def decode_or_stop(*args):
        calls.append(1)
        if len(calls) > done / 2:
            raise KeyboardInterrupt
        return decode(*args)
    monkeypatch.setattr(ELF, 'decode', decode_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run('sample.py', f'--init_from={tiny_model}', f'--out_dir={tmp_path}', '--device=cpu',
            '--num_samples=9', '--batch_size=2', '--steps=2')
    rows = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    assert [row['id'] for row in rows] == (list(range(done)) or [-1])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_the_texts_that_are_done(number, tiny_model, tmp_path):
    file = tmp_path / 'samples.jsonl'
    script = command('sample.py', f'--init_from={tiny_model}', f'--out_dir={tmp_path}',
                     '--device=cpu', '--num_samples=100000', '--batch_size=2', '--steps=1')
    with subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not file.exists() or file.read_text().count('\n') < 8:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
    assert process.returncode == -number
    lines = file.read_text().split('\n')[:-1]       # a kill may cut the last
    assert [json.loads(line)['id'] for line in lines] == list(range(len(lines)))


def test_a_reader_that_leaves_loses_nothing(tiny_model, tmp_path):
    script = ' '.join(command('sample.py', f'--init_from={tiny_model}', f'--out_dir={tmp_path}',
                              '--device=cpu', '--num_samples=1000', '--steps=1'))
    done = subprocess.run(f'set -o pipefail; {script} | head -n 1', shell=True, timeout=120,
                          executable='/bin/bash', capture_output=True, text=True)
    assert done.returncode == 0 and 'error' not in done.stderr.lower()
    assert len((tmp_path / 'samples.jsonl').read_text().splitlines()) == 1000
