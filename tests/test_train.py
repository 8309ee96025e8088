"""
train.py: resume bit for bit, ranks against accumulation, learning, where a run starts, and a user's
mistakes.
    python -m pytest -q tests/test_train.py
"""
import ast
import glob
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, command, metrics, same, same_state, state

import model
import train
from configurator import UserError, settings_of
from model import ELF, MODELS, ELFConfig
from parts.checkpoint import save_checkpoint, where_to_start
from parts.data import FILES, sha256, write_split
from parts.device import pick_device, start
from sample import resolve_sampling

TRAIN = os.path.join(ROOT, 'train.py')


def test_learning_rate(monkeypatch):
    settings = dict(warmup_iters=10, learning_rate=2.0, lr_schedule='cosine', max_iters=110)
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    rates = [train.get_lr(i) for i in (0, 5, 10, 60, 110)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])
    monkeypatch.setattr(train, 'lr_schedule', 'constant')
    assert train.get_lr(99) == 2

# --------------------------------------------------------------------------------------------------
# what a run learns, and writes

def test_it_learns_and_samples(run, tiny, tmp_path):
    """Validation loss falls, and the EMA's samples have the data's letters and length."""
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=300', '--log_interval=50',
        '--eval_interval=300', '--sample_interval=300', '--batch_size=16')
    rows = metrics(tmp_path)
    before, after = [row for row in rows if 'val_loss' in row]
    assert after['val_loss'] < 0.6 * before['val_loss'] and after['val_ce'] < 1.0
    assert len(after['val_l2_bins']) == 5
    for row in rows:        # 3 or 4 of 16 rows decode, and all rows are full
        if 'loss' in row:
            sums = [(16 - n) * row['l2'] + n * row['ce'] for n in (3, 4)]
            assert any(row['loss'] == pytest.approx(x / 16, rel=1e-4) for x in sums)
    assert len((tmp_path / 'samples_300.jsonl').read_text().splitlines()) == 4

    out = run('sample.py', f'--out_dir={tmp_path}', '--num_samples=6', '--device=cpu',
              '--dtype=float32', '--trace=3')
    assert out.count('  t=') == 3 and 't=0.00' in out and 't=1.00' in out
    lines = (tmp_path / 'samples.jsonl').read_text().splitlines()
    letters = ''.join(json.loads(line)['generated'] for line in lines)
    assert len(lines) == 6 and len(letters) > 40
    assert sum(letter in 'abcd' for letter in letters) > 0.9 * len(letters)
    averaged = ELF.from_pretrained(str(tmp_path))
    assert averaged.config.steps == 4
    assert not same(dict(averaged.state_dict()), state(tmp_path)['model'])


@pytest.mark.parametrize('warmup, decay', [('false', 0.75), ('true', 0.1)])
def test_the_average_moves_as_said(run, tiny, tmp_path, monkeypatch, warmup, decay):
    clipped, real = [], torch.nn.utils.clip_grad_norm_

    def clip(params, norm):
        clipped.append(norm)
        return real(params, norm)

    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1', '--warmup_iters=0', '--seed=3',
        f'--ema_warmup={warmup}', '--ema_decay=0.75', '--grad_clip=0.5')
    assert clipped == [0.5]
    averaged = run.globals['ema'].parameters()
    assert all(p.grad_fn is None for p in averaged), 'a history of every step, 28 kB each'
    ckpt = state(tmp_path)
    torch.manual_seed(3)
    for name, first in ELF(ELFConfig(**ckpt['model_args'])).state_dict().items():
        now = ckpt['model'][name]
        want = decay * first + (1 - decay) * now
        assert torch.allclose(ckpt['ema'][name], want, atol=1e-6), name
        stays = name == 'final_layer.norm_final.weight'     # behind the head, which starts at 0
        assert torch.equal(first, now) == stays, name
    also = {'ranks', 'bf16', 'bins'}
    assert ckpt['config'].keys() == settings_of(TRAIN).keys() | also


def test_adamw_and_epochs(run, tiny, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--optimizer=adamw', '--max_epochs=1',
        '--warmup_epochs=0.5', '--learning_rate=0')
    ckpt, peak = state(tmp_path), 0.001 * 8 / 256
    config = ckpt['config']
    assert ckpt['iter_num'] == 12 and config['warmup_iters'] == 6
    assert config['learning_rate'] == peak and 'exp_avg' in ckpt['optimizer']['state'][0]
    rates = [row['lr'] for row in metrics(tmp_path) if 'lr' in row]
    assert rates == pytest.approx([peak * min(1, i / 6) for i in range(12)])


# --------------------------------------------------------------------------------------------------
# ranks

def reductions(file):
    """A file of ddp_worker.py's -> for each step the numbers of the buckets, in order."""
    steps = [[]]
    for bucket, is_last in json.loads(file.read_text()):
        steps[-1].append(bucket)
        if is_last:
            steps.append([])
    return steps[:-1]


def test_two_ranks_equal_one_and_each_bucket_is_reduced_once(run, tiny, tmp_path):
    """2 ranks of 2 micro-batches, 1 rank of 4: draws belong to the micro-batch, not the rank."""
    args = [*tiny, '--gradient_accumulation_steps=4', '--max_iters=3', '--sample_interval=3',
            '--grad_clip=0.0', '--init_from=auto',
            '--decoder_prob=0.06', '--self_cond_prob=0.06']     # often no such row on a rank
    run('train.py', *args, f'--out_dir={tmp_path}/alone')
    # the second rank sees another folder, with a checkpoint: the first decides, and starts anew
    shutil.copytree(tmp_path / 'alone', tmp_path / '1')
    worker = command('tests/ddp_worker.py', f'{tmp_path}/{{rank}}.json', *args,
                     f'--out_dir={tmp_path}/{{rank}}', ranks=2)
    done = subprocess.run(worker, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and 'start: scratch' in done.stdout, done.stderr[-2000:]
    assert 'all_gather' not in done.stderr, 'a warning of every rank'

    alone, two = state(tmp_path / 'alone'), state(tmp_path / '0')
    for part in ('model', 'ema'):
        for name, x in alone[part].items():
            assert torch.allclose(x, two[part][name], rtol=1e-4, atol=1e-5), name
    alone, two = metrics(tmp_path / 'alone'), metrics(tmp_path / '0')
    assert {'l2', 'ce', 'val_ce'} <= {name for row in alone for name in row}
    for a, b in zip(alone, two, strict=True):
        assert a.keys() == b.keys()
        for name, x in a.items():
            assert b[name] == (None if x is None else pytest.approx(x, abs=1e-4)), (a, b)
    texts = [(tmp_path / out / 'samples_3.jsonl').read_text() for out in ('alone', '0')]
    assert texts[0] == texts[1] and texts[0].count('\n') == 4

    for rank in '01':
        steps = reductions(tmp_path / f'{rank}.json')
        assert len(steps) == 3, 'one reduction per optimizer step'
        assert all(len(set(buckets)) == len(buckets) for buckets in steps) and len(steps[-1]) > 4


@pytest.mark.parametrize('second, says', [
    ('another', 'the ranks see different bins or checkpoints'),
    pytest.param('none', 'nothing to resume in', marks=pytest.mark.slow)])
def test_ranks_that_see_different_checkpoints_stop(run, tiny, tmp_path, second, says):
    """Folders that they do not share: nobody goes on alone, nobody waits for the other."""
    run('train.py', *tiny, f'--out_dir={tmp_path}/0', '--max_iters=2', '--save_interval=1',
        '--gradient_accumulation_steps=2')
    (tmp_path / '1').mkdir()
    if second == 'another':
        shutil.copy(tmp_path / '0' / 'ckpt_prev.pt', tmp_path / '1' / 'ckpt.pt')
    worker = command('tests/ddp_worker.py', f'{tmp_path}/none', *tiny, '--init_from=auto',
                     '--gradient_accumulation_steps=2', f'--out_dir={tmp_path}/{{rank}}', ranks=2)
    done = subprocess.run(worker, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and says in done.stderr, done.stderr[-2000:]
    assert state(tmp_path / '0')['iter_num'] == 2 and 'iter 3' not in done.stdout


def test_ranks_that_see_different_bins_stop(bins, tiny, tmp_path):
    """Nodes without a shared disk, each with a set of its own: tokens would not mean the same."""
    for rank in '01':
        shutil.copytree(bins, tmp_path / rank)
    file = tmp_path / '1' / 'tiny' / 'meta.json'
    meta = json.loads(file.read_text())
    meta['checksums']['train.bin'] = 'another'
    file.write_text(json.dumps(meta))
    worker = command('tests/ddp_worker.py', f'{tmp_path}/none', *tiny,
                     '--gradient_accumulation_steps=2', f'--out_dir={tmp_path}/out',
                     f'--data_dir={tmp_path}/{{rank}}', ranks=2)
    done = subprocess.run(worker, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'the ranks see different bins or checkpoints' in done.stderr
    assert not (tmp_path / 'out').exists()


def test_the_next_command_can_be_pasted(run, tiny, tmp_path):
    out = tmp_path / 'my runs'
    assert f"--out_dir='{out}' --trace" in run('train.py', *tiny, f'--out_dir={out}')


def test_ranks_must_divide_and_errors_are_one_line(tiny, tmp_path):
    done = subprocess.run(command('train.py', *tiny, f'--out_dir={tmp_path}'), text=True,
                          capture_output=True, env=os.environ | dict(
                              WORLD_SIZE='3', RANK='0', MASTER_ADDR='localhost', MASTER_PORT='1'))
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'does not divide over 3 ranks' in done.stderr



def test_a_mistake_is_shown_once_by_all_ranks(tiny, tmp_path):
    done = subprocess.run(command('train.py', *tiny, f'--out_dir={tmp_path}', '--n_head=3',
                                  ranks=2), text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count('error: ') == 1, done.stderr
    assert 'error: n_embd=32 does not split into n_head=3' in done.stderr


def test_one_gpu_for_several_ranks_is_refused(monkeypatch):
    for name, value in dict(RANK='1', WORLD_SIZE='2', MASTER_ADDR='x', MASTER_PORT='1').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='names one GPU for 2 ranks; give --device=cuda'):
        start('cuda:0', 'auto')


@pytest.mark.parametrize('name, index', [('cuda', 0), ('cuda:2', 2)])
def test_the_gpu_that_is_named_is_the_current_one(monkeypatch, name, index):
    current = []
    monkeypatch.setattr('parts.device.pick_device', lambda *names: (torch.device(name), True, ''))
    monkeypatch.setattr(torch._C, '_cuda_setDevice', current.append, raising=False)
    start(name, 'auto')
    assert current == [index]


def test_a_rank_left_in_the_environment_is_no_launch(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '3')
    assert 'ranks: 1' in run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1')
    assert state(tmp_path)['iter_num'] == 1

# --------------------------------------------------------------------------------------------------
# resume

def test_resume_is_bit_identical(run, tiny, tmp_path):
    straight, parts = tmp_path / 'straight', tmp_path / 'parts'
    args = ['train.py', *tiny, '--eval_interval=10', '--gradient_accumulation_steps=2']
    run(*args, f'--out_dir={straight}', '--max_iters=20')
    run(*args, f'--out_dir={parts}', '--max_iters=10')
    out = run(*args, f'--out_dir={parts}', '--max_iters=20', '--init_from=resume')
    assert 'at iteration 10' in out and 'learning rate' not in out
    assert same_state(straight, parts) and metrics(straight) == metrics(parts)
    assert state(straight)['rows_seen'] == state(parts)['rows_seen'] == 320
    assert state(parts, 'ckpt_prev.pt')['iter_num'] == 10
    assert (parts / 'loss.png').stat().st_size > 5000


@pytest.mark.parametrize('kind', ['cut', 'gone'])
def test_a_damaged_checkpoint_is_never_kept_for_the_good_one(run, tiny, tmp_path, kind):
    """Resume from the one before it; the next save leaves that one where it is."""
    args = ['train.py', *tiny, f'--out_dir={tmp_path}']
    run(*args, '--save_interval=2')
    newest = tmp_path / 'ckpt.pt'
    if kind == 'cut':
        newest.write_bytes(newest.read_bytes()[:-500])
    else:
        newest.unlink()
    out = run(*args, '--init_from=resume', '--max_iters=5')
    assert 'ckpt_prev.pt at iteration 2' in out and ('SKIPPED' in out) == (kind == 'cut')
    assert state(tmp_path)['iter_num'] == 5 and state(tmp_path, 'ckpt_prev.pt')['iter_num'] == 2
    assert (tmp_path / 'damaged_ckpt.pt').exists() == (kind == 'cut')


def test_resume_refuses_other_mathematics_and_says_what_changed(run, tiny, tmp_path):
    args = ['train.py', *tiny, f'--out_dir={tmp_path}', '--lr_schedule=cosine']
    run(*args)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    with pytest.raises(UserError, match='n_layer was 2, now 3'):
        run(*args, '--init_from=resume', '--n_layer=3')
    with pytest.raises(UserError, match="lr_schedule was 'cosine', now 'constant'"):
        run(*args, '--init_from=resume', '--lr_schedule=constant')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    out = run(*args, '--init_from=resume', '--max_iters=6')
    assert 'max_iters was 4, now 6' in out


def test_resume_refuses_other_bins(run, tiny, bins, tmp_path):
    folder = shutil.copytree(bins / 'tiny', tmp_path / 'tiny')
    args = ['train.py', *tiny, f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out']
    run(*args, '--max_iters=1')
    meta = json.loads((folder / 'meta.json').read_text())

    def refused(what, **changes):
        (folder / 'meta.json').write_text(json.dumps(meta | changes))
        with pytest.raises(UserError, match=f'other settings or bins: {what} was [^;]*; drop'):
            run(*args, '--max_iters=1', '--init_from=resume')

    refused('latent_std', latent_std=0.5)
    refused('latent_mean', latent_mean=0.5)
    rows = [([], [5] * 12 + [1])] * 24
    n, tokens, _ = write_split(meta | dict(dir=folder), 'val', rows)      # as many, but others
    checksums = {name: sha256(folder / name) for name in FILES}
    refused('val.bin', checksums=checksums)
    n, tokens, _ = write_split(meta | dict(dir=folder), 'val', rows[:20])
    refused('rows', rows=meta['rows'] | dict(val=n), tokens=meta['tokens'] | dict(val=tokens))
    assert state(tmp_path / 'out')['iter_num'] == 1


@pytest.mark.parametrize('part, file', [('encoder', 'model.safetensors'),
                                        ('tokenizer', 'tokenizer.json')])
def test_resume_refuses_an_encoder_or_tokenizer_made_again(run, tiny, bins, tmp_path, part, file):
    """Of the same size, beside the same ids."""
    folder = shutil.copytree(bins / 'tiny', tmp_path / 'tiny')
    args = ['train.py', *tiny, f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out']
    run(*args, '--max_iters=1')
    content = bytearray((folder / part / file).read_bytes())
    content[-2] ^= 8 if part == 'encoder' else 0x2a     # a weight; white space before the last }
    (folder / part / file).write_bytes(content)
    with pytest.raises(UserError, match=f'{part}/{file} was'):
        run(*args, '--init_from=resume', '--max_iters=2')


def test_a_run_of_older_versions_goes_on(run, tiny, bins, tmp_path):
    """They kept tokenizer and encoder by paths, and the bins elsewhere."""
    args = ['train.py', *tiny, f'--out_dir={tmp_path}', '--init_from=auto']
    run(*args, '--max_iters=1')
    ckpt = state(tmp_path)
    del ckpt['config']['bins']
    for part in ('tokenizer', 'encoder'):
        ckpt['model_args'][part] = str(bins / 'tiny' / part)
        shutil.rmtree(tmp_path / part)
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    assert 'resumed' in run(*args, '--max_iters=2')
    assert state(tmp_path)['iter_num'] == 2


def test_a_smaller_gpu_may_go_on(run, tiny, tmp_path):
    """Half the rows at once, twice as often: the same rows a step. Half of them is another run."""
    args = ['train.py', *tiny, f'--out_dir={tmp_path}']
    run(*args, '--max_iters=2')
    smaller = [*args, '--init_from=resume', '--max_iters=4', '--batch_size=4']
    with pytest.raises(UserError, match='batch_size was 8, now 4'):
        run(*smaller)
    out = run(*smaller, '--gradient_accumulation_steps=2')
    assert 'batch_size was 8, now 4' in out and 'accumulation_steps was 1, now 2' in out
    assert 'the same rows a step' in out and 'other draws' in out
    assert state(tmp_path)['rows_seen'] == 32


def test_a_resumed_run_takes_new_settings_of_the_sampler(run, tiny, tmp_path):
    args = ['train.py', *tiny, f'--out_dir={tmp_path}']
    run(*args, '--max_iters=1')
    run(*args, '--max_iters=2', '--init_from=resume', '--steps=7', '--gamma=0.25', '--grid=uniform')
    c = ELF.from_pretrained(str(tmp_path)).config
    assert (c.steps, c.gamma, c.grid) == (7, 0.25, 'uniform')


def test_a_resumed_run_keeps_its_noise_unless_another_is_given(run, tiny, tmp_path):
    """tiny gives 0.35, where the width would give 0.354."""
    args = [arg for arg in tiny if 'noise_scale' not in arg]
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1')
    run('train.py', *args, f'--out_dir={tmp_path}', '--max_iters=2', '--init_from=resume')
    assert ELF.from_pretrained(str(tmp_path)).config.noise_scale == 0.35
    with pytest.raises(UserError, match='noise_scale was 0.35, now 0.4'):
        run('train.py', *args, f'--out_dir={tmp_path}', '--init_from=resume', '--noise_scale=0.4')


def test_a_fine_tune_samples_as_it_says(run, tiny, tmp_path):
    """Not as the weights that it starts from were published to be sampled in so many steps."""
    run('train.py', *tiny, f'--out_dir={tmp_path}/a', '--max_iters=1')
    ckpt = state(tmp_path / 'a')
    ckpt['model_args']['by_steps'] = {8: dict(gamma=2.0)}
    torch.save(ckpt, tmp_path / 'a' / 'ckpt.pt')
    run('train.py', *tiny, f'--init_from={tmp_path}/a', f'--out_dir={tmp_path}/b', '--max_iters=1',
        '--steps=8', '--gamma=0.3')
    settings = [ELF.from_pretrained(f'{tmp_path}/{x}').config for x in 'ab']
    assert [resolve_sampling(c, steps=8)['gamma'] for c in settings] == [2.0, 0.3]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_each_pass_of_a_run_is_in_the_precision_asked_for(run, tiny, tmp_path, monkeypatch, dtype):
    real, seen = model.compute_loss, set()

    def watched(*args):
        seen.add(torch.is_autocast_enabled('cpu'))
        return real(*args)

    monkeypatch.setattr(model, 'compute_loss', watched)
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1', f'--dtype={dtype}')
    assert seen == {dtype == 'bfloat16'}


@pytest.mark.parametrize('dtype, fast, precision', [
    ('float32', True, 'highest'), ('bfloat16', True, 'high'), ('auto', True, 'high'),
    ('auto', False, 'highest')])
def test_tf32_goes_with_bfloat16_alone(monkeypatch, dtype, fast, precision):
    asked = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch, 'empty', lambda size, device: None)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a T4')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: fast)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', asked.append)
    _, _, about = pick_device('cuda', dtype)
    assert asked == [precision] and ('no tensor cores' in about) == (not fast)


def test_a_fine_tune_of_other_sizes_is_resumed(run, tiny, tmp_path):
    """Its sizes are those of the checkpoint that it starts from, its other settings its own."""
    run('train.py', *tiny, f'--out_dir={tmp_path}/a', '--max_iters=2')
    tune = ['train.py', *tiny, '--n_layer=3', '--t_mean=-1']
    out = run(*tune, f'--out_dir={tmp_path}/first', '--max_iters=1',
              f'--init_from={tmp_path}/a')
    first, c = state(tmp_path / 'first'), state(tmp_path / 'first')['model_args']
    assert '2 layers of 32' in out and c['n_layer'] == 2 and c['t_mean'] == -1
    assert same(first['model'], state(tmp_path / 'a')['ema']), 'the rate of the first step is 0'

    # the same command again: refused, but for 'auto', which goes on
    with pytest.raises(UserError, match='there already'):
        run(*tune, f'--out_dir={tmp_path}/first', f'--init_from={tmp_path}/a')
    auto = [*tune, f'--init_from=auto:{tmp_path}/a']
    run(*auto, f'--out_dir={tmp_path}/straight', '--max_iters=6')
    out = run(*auto, f'--out_dir={tmp_path}/parts', '--max_iters=3')
    assert f'start: {tmp_path}/a\n' in out
    out = run(*auto, f'--out_dir={tmp_path}/parts', '--max_iters=6')
    assert 'at iteration 3' in out and same_state(tmp_path / 'straight', tmp_path / 'parts')

# --------------------------------------------------------------------------------------------------
# where a run starts

def test_a_checkpoint_is_not_overwritten_unasked(run, tiny, tmp_path, monkeypatch):
    args = ['train.py', *tiny, f'--out_dir={tmp_path}']
    run(*args, '--max_iters=1')
    before = {name: (tmp_path / name).read_bytes() for name in ('ckpt.pt', 'metrics.jsonl')}
    with pytest.raises(UserError, match='there already'):
        run(*args)
    # none, or the folder that its runs leave behind, which Python takes for a module
    for wandb in (None, type(sys)('wandb')):
        monkeypatch.setitem(sys.modules, 'wandb', wandb)
        with pytest.raises(ImportError, match='wandb'):      # one line, see one_line_errors
            run(*args, '--overwrite=true', '--wandb_log=true')
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content
    run(*args, '--overwrite=true', '--max_iters=2')
    for name, content in before.items():
        assert (tmp_path / 'old_1' / name).read_bytes() == content
    assert state(tmp_path)['iter_num'] == 2 and len(metrics(tmp_path)) == 4
    # again: nothing that was ever there is lost, and each can be sampled
    run(*args, '--overwrite=true', '--max_iters=3')
    for name, iters in (('old_1', 1), ('old_2', 2)):
        assert state(tmp_path / name)['iter_num'] == iters
        c = ELF.from_pretrained(str(tmp_path / name)).config
        assert c.tokenizer == str(tmp_path / name / 'tokenizer')


def test_where_to_start(tmp_path):
    out = str(tmp_path)

    def start(init_from, overwrite=False):
        return where_to_start(init_from, out, overwrite)

    with_auto = [start(x) for x in ('auto', 'auto:weights', 'auto:org/repo')]
    assert with_auto == ['scratch', 'weights', 'org/repo']
    assert [start(x) for x in ('scratch', 'resume', 'weights')] == ['scratch', 'resume', 'weights']
    save_checkpoint(out, dict(iter_num=1))
    assert [start(x) for x in ('auto', 'auto:weights', 'resume')] == ['resume'] * 3
    for init_from in ('scratch', 'weights'):
        with pytest.raises(UserError, match='there already'):
            start(init_from)
        assert start(init_from, overwrite=True) == init_from

# --------------------------------------------------------------------------------------------------
# what is refused

TABLES = 'CHOICES', 'MAY_BE_0', 'AT_MOST_1', 'ABOVE_0', 'MAY_BE_NEGATIVE', 'READ_WITH'


def words_in(file):
    """The texts of one word in a file's code."""
    tree = ast.parse(open(os.path.join(ROOT, file), encoding='utf-8').read())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_each_setting_has_one_default_and_is_read():
    """train.py's defaults are those of ELF-B, and no script has a setting that nothing reads."""
    model_settings = {f.name for f in fields(ELFConfig)}
    of_bins = {'encoder', 'tokenizer', 'noise_scale', 'decoder_noise_scale'}    # '' and 0.0
    for name in model_settings - of_bins:
        if hasattr(train, name):
            assert getattr(train, name) == getattr(MODELS['ELF-B'], name), name
    for script in ('train.py', 'sample.py', 'eval.py', 'prepare.py', 'bench.py'):
        path, read = os.path.join(ROOT, script), set()
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read())
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in TABLES:
                continue        # of the configurator: they name settings without using them
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    read.add(node.id)
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    read.add(node.value)
        # some are handed over all at once, and read by name
        read |= dict(zip(('train.py', 'eval.py', 'sample.py'), (
            model_settings | {'wandb_log', 'wandb_project'},
            words_in('sample.py'), words_in('parts/prompt.py')))).get(script, set())
        assert settings_of(path).keys() <= read, script


MISTAKES = [
    ('--steps=0', "steps='0' must lie between 1"),
    ('--max_iters=0', "max_iters='0' must lie between 1"),
    ('--batch_size=0', "batch_size='0' must lie between 1"),
    ('--ema_decay=1.5', "ema_decay='1.5' must lie between 0 and 1"),
    ('--weight_decay=-1', "weight_decay='-1' must lie between 0"),
    ('--gamma=-2', "gamma='-2' must lie between 0"),
    ('--w_min=0', 'must lie between 1e-09 and'),           # v would be guided by 1 - 1 / 0
    ('--t_eps=0', 'must lie between 1e-09 and'),
    # what nothing would read
    ('--distill_steps=4', 'distill_steps=4 is read only with teacher; leave it at 0'),
    ('--distill_substeps=4', 'distill_substeps=4 is read only with teacher; leave it at 0'),
    ('--weight_decay=0.1', 'only with optimizer=adamw; leave it at 0.0'),
    ('--cfg=2', 'cfg=2.0 is read only with max_input_length'),
    ('--drop_cond_prob=0.1', 'only with max_input_length'),
    ('--learning_rate=nan', 'learning_rate'),
    ('--dataset=nothing', 'by python prepare.py --dataset=nothing'),
    ('--max_length=8', 'needs max_length=13 or more here, not 8'),
    ('--encoder=t5-small', 'was made with encoder'),
    ('--tokenizer=t5-small', 'was made with tokenizer'),
    ('--device=cuda', "device='cuda' is not available here"),
    ('--dtype=fp8', "dtype='fp8' is not one of"),
    ('--n_head=3', 'n_head=3'),
    ('--optimizer=sgd', "optimizer='sgd' is not one of 'muon', 'adamw'"),
    ('--init_from=resume', 'nothing to resume'),
    ('--init_from=./nowhere', 'is no file or folder here'),
    ('--learning_rat=1', 'did you mean learning_rate?'),
    ('config/none.py', 'config/none.py is no config file that runs'),
]


@pytest.mark.parametrize('arg, says', MISTAKES, ids=[arg for arg, _ in MISTAKES])
def test_mistakes_of_the_user(run, tiny, tmp_path, arg, says):
    if torch.cuda.is_available() and arg == '--device=cuda':
        pytest.skip('has a GPU')
    with pytest.raises(UserError, match=re.escape(says)):
        run('train.py', *tiny, f'--out_dir={tmp_path}/out', arg)
    assert not (tmp_path / 'out').exists(), 'nothing written'


def commands_in(text):
    """Each `script.py ...` in a text -> the line, the script, what follows it."""
    for line in text.replace('\\\n', ' ').splitlines():
        for part in re.split(r'&&|\s#\s|`|\|', line.lstrip('# ')):
            for script, rest in re.findall(r'(?:python|torchrun.*?) ((?:tests/)?\w+\.py)\b(.*)',
                                           part):
                yield line, script, rest


def test_commands_in_the_documents_exist():
    """README, Makefile, configs and docstrings name files and settings that are there."""
    scripts = glob.glob('*.py', root_dir=ROOT)
    documents = ['README.md', 'Makefile', '.ci/run', 'tests/vs_port.py', *scripts,
                 *glob.glob('config/*.py', root_dir=ROOT)]
    found = 0
    for document in documents:
        with open(os.path.join(ROOT, document), encoding='utf-8') as f:
            text = f.read()
        for line, script, rest in commands_in(text):
            settings = set(re.findall(r'--(\w+)=', rest))
            assert settings <= settings_of(os.path.join(ROOT, script)).keys(), (document, line)
            for config in re.findall(r' (config/\w+\.py)', rest):
                assert os.path.exists(os.path.join(ROOT, config)), (document, line)
            found += 1
        if document == 'README.md':
            every = {'help'}.union(*(settings_of(os.path.join(ROOT, f)) for f in scripts))
            assert set(re.findall(r'`--(\w+)(?![\w-])', text)) <= every
    assert found > 40
