"""
The training loop: Muon against optax, resume bit for bit, ranks against accumulation, learning, and a user's mistakes.
    python -m pytest -q tests/test_train.py
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import train
from configurator import UserError, settings_of
from model import ELF, MODELS, ELFConfig, TextEncoder, draw, load_checkpoint

GOLDEN = os.path.join(ROOT, 'tests', 'golden')


def metrics(out_dir, drop=('ms', 'tokens_per_s')):
    with open(os.path.join(out_dir, 'metrics.jsonl')) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in f]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_muon_equals_optax():
    data = np.load(os.path.join(GOLDEN, 'muon.npz'))
    names = [k.split('/')[1] for k in data.files if k.startswith('params0/')]
    ours = lambda key: torch.tensor(data[key]).T.contiguous() if data[key].ndim == 2 else torch.tensor(data[key])   # optax: (in, out)
    params = {n: torch.nn.Parameter(ours(f'params0/{n}')) for n in names}
    optimizer = train.make_optimizer(params.items(), 0.02)
    for i in range(5):
        before = {n: p.detach().clone() for n, p in params.items()}
        for n, p in params.items():
            p.grad = ours(f'grads{i}/{n}')
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
        for n, p in params.items():
            want = ours(f'params{i + 1}/{n}') - ours(f'params{i}/{n}')
            assert (p.detach() - before[n] - want).norm() <= 1e-4 * want.norm(), (i, n)


def test_orthogonalize_brings_singular_values_near_one():
    x = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(train.orthogonalize(x, torch.float32))
    assert 0.6 < s.min() and s.max() < 1.3
    close = train.orthogonalize(x, torch.bfloat16) - train.orthogonalize(x, torch.float32)
    assert 0 < close.norm() < 0.05 * 36**0.5


def test_learning_rate():
    config = dict(warmup_iters=10, learning_rate=2.0, lr_schedule='cosine', max_iters=110, min_lr=0.5)
    assert [train.lr_at(i, config) for i in (0, 5, 10, 60, 110, 200)] == pytest.approx([0, 1, 2, 1.25, 0.5, 0.5])
    assert train.lr_at(99, config | dict(lr_schedule='constant')) == 2


def test_rows_every_epoch_sees_each_row_once():
    rows = np.concatenate([train.rows_at(10, 1, first, 4) for first in range(0, 40, 4)])
    for epoch in rows.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(rows[:10], rows[10:20])
    assert np.array_equal(train.rows_at(10, 1, 8, 25), rows[8:33])


def test_get_rows_fills_cuts_and_marks(tmp_path):
    (tmp_path / 'c').mkdir()
    meta = dict(dir=str(tmp_path / 'c'), dtype='uint16', vocab_size=99, pad_id=0, eos_id=1)
    np.array([10, 11, 12, 1, 20, 1, 30, 1, 40, 41, 42, 43, 44, 1], dtype=np.uint16).tofile(tmp_path / 'c' / 'train.bin')
    np.save(tmp_path / 'c' / 'train.idx.npy', np.array([[0, 4], [6, 6], [8, 13]]))
    ids, valid, cond = train.get_rows(meta, 'train', [2, 0, 1], 5, max_input_length=3)
    assert ids.tolist() == [[40, 41, 42, 1, 0], [10, 11, 12, 20, 1], [30, 1, 0, 0, 0]]
    assert valid.sum(1).tolist() == [4, 5, 2] and cond.sum(1).tolist() == [3, 3, 0]
    assert train.get_rows(meta, 'train', [1], 5, 3, 'eos').__next__().tolist() == [[30, 1, 1, 1, 1]]


@pytest.mark.parametrize('pad, counts', [('pad', [0, 0, 1, 1, 0, 0]), ('eos', [0, 0, 1, 1, 1, 1])])
def test_encode_says_what_counts_and_whose_condition_is_dropped(pad, counts):
    ids, valid, cond = torch.arange(6)[None], torch.tensor([[1, 1, 1, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()
    drop, seen = torch.tensor([True]), []
    encoder = lambda *a: (seen.append(a), torch.zeros(1, 6, 8))[1]
    _, tokens, loss_mask, cond_mask = train.encode(encoder, (ids, valid, cond), pad, SimpleNamespace(drop_cond=drop), torch.device('cpu'))
    assert loss_mask.int().tolist() == [counts] and torch.equal(cond_mask, cond) and torch.equal(tokens, ids)
    assert seen[0][3] is drop and all(torch.equal(a, b) for a, b in zip(seen[0], (ids, valid, cond)))


def test_validation_draws_t_from_each_bin_in_turn(bins, monkeypatch):
    meta = train.open_bins(str(bins), 'tiny')
    net = ELF(ELFConfig(n_layer=1, n_embd=32, n_head=2, bottleneck=8, vocab_size=30, latent_dim=16, max_length=13))
    encoder, seen, real = TextEncoder(meta['encoder'], 0.0, 1.0), [], train.compute_loss
    monkeypatch.setattr(train, 'compute_loss', lambda net, *args: (seen.append(args[-1].t), real(net, *args))[1])
    got, edges = train.estimate_loss(net, encoder, meta, 7, 8, torch.device('cpu')), train.t_edges(net.config)
    assert len(seen) == 10 and all(edges[k % 5] <= t.min() and t.max() <= edges[k % 5 + 1] for k, t in enumerate(seen))
    assert len(got['l2_bins']) == 5 and got['l2'] == pytest.approx(np.mean(got['l2_bins'])) and got['loss'] == pytest.approx(0.8 * got['l2'] + 0.2 * got['ce'])
    trained = draw(net.config, 20000, 1, torch.Generator().manual_seed(0), torch.device('cpu')).t
    assert (torch.histogram(trained, torch.tensor(edges)).hist / 20000 - 0.2).abs().max() < 0.01, 'bins of equal probability'


def test_resume_is_bit_identical(run, tiny, tmp_path):
    straight, parts = tmp_path / 'straight', tmp_path / 'parts'
    more = ['--eval_interval=10', '--gradient_accumulation_steps=2']
    run('train.py', *tiny, *more, f'--out_dir={straight}', '--max_iters=20')
    run('train.py', *tiny, *more, f'--out_dir={parts}', '--max_iters=10')
    out = run('train.py', *tiny, *more, f'--out_dir={parts}', '--max_iters=20', '--init_from=resume')
    assert 'at iteration 10' in out
    a, b = (load_checkpoint(str(p / 'ckpt.pt')) for p in (straight, parts))
    assert same(a['model'], b['model']) and same(a['ema'], b['ema']) and a['rows_seen'] == b['rows_seen'] == 320
    for p, q in zip(a['optimizer']['state'].values(), b['optimizer']['state'].values()):
        assert same(p, q)
    assert metrics(straight) == metrics(parts)
    assert (parts / 'ckpt_prev.pt').exists() and (parts / 'loss.png').stat().st_size > 5000


@pytest.mark.parametrize('kind', ['cut', 'gone'])
def test_resume_falls_back_to_the_checkpoint_before(run, tiny, tmp_path, kind):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--save_interval=2')
    newest = tmp_path / 'ckpt.pt'
    newest.write_bytes(newest.read_bytes()[:-500]) if kind == 'cut' else newest.unlink()
    out = run('train.py', *tiny, f'--out_dir={tmp_path}', '--init_from=resume')
    assert 'ckpt_prev.pt at iteration 2' in out and ('SKIPPED' in out) == (kind == 'cut')


def test_two_ranks_equal_one_and_each_bucket_is_reduced_once(tiny, tmp_path):
    """2 ranks x 2 micro-batches against 1 rank x 4, by train.py itself: draws belong to the micro-batch, not the rank."""
    args = [*tiny, '--gradient_accumulation_steps=4', '--max_iters=3', '--decoder_prob=0.06', '--self_cond_prob=0.06', '--grad_clip=0.0']   # often no such row on a rank
    for n in (1, 2):
        env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')} | {'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--master_port=29517', os.path.join(ROOT, 'tests', 'ddp_worker.py'),
                               str(tmp_path / f'count{n}'), *args, f'--out_dir={tmp_path / str(n)}'], capture_output=True, text=True, timeout=240, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (load_checkpoint(str(tmp_path / n / 'ckpt.pt')) for n in '12')
    for k in a['model']:
        assert all(torch.allclose(a[part][k], b[part][k], rtol=1e-4, atol=1e-5) for part in ('model', 'ema')), k
    one, two = (metrics(tmp_path / n, drop=('ms', 'tokens_per_s', 'val_l2_bins')) for n in '12')
    assert [x.keys() for x in one] == [y.keys() for y in two] and {'l2', 'ce', 'val_ce'} <= {k for x in one for k in x}
    for x, y in zip(one, two):
        assert all(y[k] == (x[k] if x[k] is None else pytest.approx(x[k], abs=1e-4)) for k in x), (x, y)
    for rank in '01':
        reduced = json.loads((tmp_path / f'count2.{rank}').read_text())
        assert sum(last for _, last in reduced) == 3, 'one reduction per optimizer step'
        steps = []      # buckets of each step, in order
        for i, last in reduced:
            steps = steps + [[]] if not steps or steps[-1] and steps[-1][-1][1] else steps
            steps[-1].append((i, last))
        assert len(steps) == 3 and all(len({i for i, _ in s}) == len(s) for s in steps) and len(steps[-1]) > 4, reduced


def test_it_learns_and_samples(run, tiny, tmp_path):
    """300 steps on four letters: validation loss falls, the EMA's samples have the data's letters and length."""
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=300', '--log_interval=50', '--eval_interval=300', '--sample_interval=300', '--batch_size=16')
    val = [m for m in metrics(tmp_path) if 'val_loss' in m]
    assert val[-1]['val_loss'] < 0.6 * val[0]['val_loss'] and val[-1]['val_ce'] < 1.0 and len(val[-1]['val_l2_bins']) == 5
    for m in metrics(tmp_path):     # 3 or 4 of 16 rows decode, and all rows are full
        assert 'loss' not in m or any(m['loss'] == pytest.approx(((16 - n) * m['l2'] + n * m['ce']) / 16, rel=1e-4) for n in (3, 4))
    out = run('sample.py', f'--out_dir={tmp_path}', '--num_samples=6', '--device=cpu', '--dtype=float32', '--trace=3')
    assert out.count('  t=') == 3 and 't=0.00' in out and 't=1.00' in out
    texts = [json.loads(line)['generated'] for line in open(tmp_path / 'samples.jsonl')]
    letters = ''.join(texts)
    assert len(texts) == 6 and len(letters) > 40 and sum(ch in 'abcd' for ch in letters) > 0.9 * len(letters)
    ema, raw = ELF.from_pretrained(str(tmp_path)), load_checkpoint(str(tmp_path / 'ckpt.pt'))['model']
    assert not same(dict(ema.state_dict()), raw) and ema.config.steps == 4


@pytest.mark.parametrize('warmup, decay', [('false', 0.75), ('true', 0.1)])
def test_ema_moves_as_said_and_the_checkpoint_holds_every_setting(run, tiny, tmp_path, monkeypatch, warmup, decay):
    clipped, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda params, norm: (clipped.append(norm), clip(params, norm))[1])
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1', '--warmup_iters=0', f'--ema_warmup={warmup}', '--ema_decay=0.75', '--seed=3', '--grad_clip=0.5')
    assert clipped == [0.5]
    assert all(p.grad_fn is None for p in run.globals['ema'].parameters()), 'a history of every step, 28 kB each'
    ckpt = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    torch.manual_seed(3)
    for k, start in ELF(ELFConfig(**ckpt['model_args'])).state_dict().items():
        assert torch.allclose(ckpt['ema'][k], decay * start + (1 - decay) * ckpt['model'][k], atol=1e-6), k
        assert not torch.equal(start, ckpt['model'][k]) or k == 'final_layer.norm_final.weight', k     # behind the head that starts at 0
    assert ckpt['config'].keys() == settings_of(os.path.join(ROOT, 'train.py')).keys()


def test_each_setting_has_one_default_and_is_read():
    """train.py's defaults are those of ELF-B, and no script has a setting that nothing reads."""
    for f in fields(ELFConfig):
        if hasattr(train, f.name) and getattr(train, f.name) not in (-1, ''):
            assert getattr(train, f.name) == getattr(MODELS['ELF-B'], f.name), f.name
    model_settings = {f.name for f in fields(ELFConfig)}       # these train.py hands over by name, all at once
    for script in ('train.py', 'sample.py', 'eval.py', 'prepare.py', 'bench.py'):
        tree = ast.parse(open(os.path.join(ROOT, script)).read())
        # tables such as RANGES name settings without using them
        tree.body = [n for n in tree.body if not (isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id.isupper())]
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not set(settings_of(os.path.join(ROOT, script))) - read - (model_settings if script == 'train.py' else set()), script


def test_adamw_and_starting_from_weights(run, tiny, tmp_path):
    out = run('train.py', *tiny, f'--out_dir={tmp_path / "a"}', '--optimizer=adamw', '--max_epochs=1', '--warmup_epochs=0.5', '--learning_rate=0')
    a = load_checkpoint(str(tmp_path / 'a' / 'ckpt.pt'))
    assert (a['iter_num'], a['config']['warmup_iters'], a['config']['learning_rate']) == (12, 6, 0.001 * 8 / 256)
    assert 'adamw' in out.split('parameters; ')[1]
    assert [m['lr'] for m in metrics(tmp_path / 'a') if 'lr' in m] == pytest.approx([0.001 * 8 / 256 * min(1, i / 6) for i in range(12)])
    out = run('train.py', *tiny, f'--out_dir={tmp_path / "b"}', f'--init_from={tmp_path / "a"}', '--n_layer=-1', '--max_iters=1')      # lr is 0 in the first step
    assert '2 layers of 32' in out and same(load_checkpoint(str(tmp_path / 'b' / 'ckpt.pt'))['model'], a['ema'])


def test_a_setting_of_minus_one_that_is_a_number(run, tiny, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1', '--t_mean=-1', '--decoder_mean=-1', '--gamma=-1', '--w=-1')
    args = load_checkpoint(str(tmp_path / 'ckpt.pt'))['model_args']
    assert (args['t_mean'], args['decoder_mean'], args['gamma'], args['w']) == (-1, -1, 1.5, 3)      # the last two: as in the row of MODELS


MISTAKES = [
    (['--steps=0'], 'steps=0 start at 1'),
    (['--max_iters=0'], 'max_iters=0: must lie between 1'),
    (['--dataset=nothing'], 'run: python prepare.py --dataset=nothing'),
    (['--max_length=8'], 'has rows of 13 tokens, max_length is 8'),
    (['--size=ELF-X'], "size='ELF-X' is not one of 'ELF-B', 'ELF-M', 'ELF-L'"),
    (['--encoder=t5-small'], 'was made with encoder'),
    (['--tokenizer=t5-small'], 'was made with tokenizer'),
    (['--device=cuda'], "device='cuda' is not available here"),
    (['--dtype=fp8'], "dtype='fp8' is not one of"),
    (['--n_head=3'], 'n_head=3'),
    (['--batch_size=0'], 'batch_size=0: must lie between'),
    (['--optimizer=sgd'], "optimizer='sgd' is not one of"),
    (['--init_from=resume'], 'nothing to resume'),
    (['--init_from=./nowhere'], 'nothing to load'),
    (['--learning_rat=1'], 'did you mean learning_rate?'),
    (['config/none.py'], 'no such config file'),
]


@pytest.mark.parametrize('args, says', MISTAKES, ids=[a[-1] for a, _ in MISTAKES])
def test_mistakes_of_the_user(run, tiny, tmp_path, args, says):
    if torch.cuda.is_available() and args == ['--device=cuda']:
        pytest.skip('has a GPU')
    with pytest.raises(UserError, match=re.escape(says)):
        run('train.py', *tiny, f'--out_dir={tmp_path / "out"}', *args)
    assert not (tmp_path / 'out').exists(), 'nothing written'


def test_a_checkpoint_is_not_overwritten_nor_resumed_with_other_mathematics(run, tiny, tmp_path, monkeypatch):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    with pytest.raises(UserError, match='there already'):
        run('train.py', *tiny, f'--out_dir={tmp_path}')
    with pytest.raises(UserError, match='n_layer was 2, now 3'):
        run('train.py', *tiny, f'--out_dir={tmp_path}', '--init_from=resume', '--n_layer=3')
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match='pip install wandb'):
        run('train.py', *tiny, f'--out_dir={tmp_path}', '--overwrite=true', '--wandb_log=true')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before and len(metrics(tmp_path)) == 3
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--overwrite=true', '--max_iters=2')
    assert (tmp_path / 'old_ckpt.pt').read_bytes() == before


def test_ids_outside_the_vocabulary_are_refused(run, tiny, bins, tmp_path):
    shutil.copytree(bins, tmp_path / 'data')
    file = tmp_path / 'data' / 'tiny' / 'train.bin'
    np.full_like(np.fromfile(file, dtype=np.uint16), 77).tofile(file)
    with pytest.raises(UserError, match='token id 77, the vocabulary ends at 29'):
        run('train.py', *tiny, f'--data_dir={tmp_path / "data"}', f'--out_dir={tmp_path / "out"}')


def test_ranks_must_divide_and_errors_are_one_line(tiny, tmp_path):
    env = os.environ | {'WORLD_SIZE': '3', 'RANK': '0'}
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'train.py'), *tiny, f'--out_dir={tmp_path}'], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'do not divide over 3 ranks' in done.stderr


def test_commands_in_the_documents_exist():
    """Every `script.py ... --setting=` in README, Makefile, configs and docstrings names a file and a setting that are there."""
    import glob
    seen, every = 0, set().union(*(settings_of(os.path.join(ROOT, f)) for f in glob.glob('*.py', root_dir=ROOT)))
    for document in ['README.md', 'Makefile', '.ci/run', 'tests/vs_port.py', *glob.glob('config/*.py', root_dir=ROOT), *glob.glob('*.py', root_dir=ROOT)]:
        with open(os.path.join(ROOT, document), encoding='utf-8') as f:
            text = f.read().replace('\\\n', ' ')
        for line in text.splitlines():
            for part in re.split(r'&&|\s#\s|`|\|', line.lstrip('# ')):
                for script, rest in re.findall(r'(?:python|torchrun.*?) ((?:tests/)?\w+\.py)\b(.*)', part):
                    assert set(re.findall(r'--(\w+)=', rest)) <= settings_of(os.path.join(ROOT, script)).keys(), (document, line)
                    assert all(os.path.exists(os.path.join(ROOT, file)) for file in re.findall(r' (config/\w+\.py)', rest)), (document, line)
                    seen += 1
        if document == 'README.md':
            assert set(re.findall(r'`--(\w+)', text)) <= every | {'help'}
    assert seen > 40
