"""
Killed anywhere, fed anything, nothing lost.
    python -m pytest -q tests/test_reliability.py           # the short form; --slow, or make stress: the long one
"""
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import hypothesis
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import strategies as st
from test_train import metrics, same

import model
import prepare
import train
from configurator import UserError, settings_of

STRESS = pytest.mark.slow
QUIET = dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1')


def long_or_short(short, long):
    """The same test twice: a few rounds always, all of them with --slow."""
    return pytest.mark.parametrize('rounds', [short, pytest.param(long, marks=STRESS)])


def command(script, *args, ranks=0, restarts=0):
    head = [sys.executable] if not ranks else [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', f'--max-restarts={restarts}']
    return [*head, os.path.join(ROOT, script), *map(str, args)]


def start(out_dir, *args, **how):
    """train.py as a process of its own, one thread (the same sums each time), what it prints in <out_dir>.log."""
    with open(f'{out_dir}.log', 'w') as f:
        return subprocess.Popen(command('train.py', f'--out_dir={out_dir}', *args, **how), stdout=f, stderr=subprocess.STDOUT, env=os.environ | QUIET)


def printed(out_dir):
    with open(f'{out_dir}.log') as f:
        return f.read()


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.0005)


def state(out_dir):
    return torch.load(os.path.join(out_dir, 'ckpt.pt'), weights_only=True)


def same_state(a, b):
    a, b = state(a), state(b)
    momenta = lambda c: {f'{i}/{k}': v for i, x in c['optimizer']['state'].items() for k, v in x.items()}
    return a['iter_num'] == b['iter_num'] and all(same(x, y) for x, y in ((a['model'], b['model']), (a['ema'], b['ema']), (momenta(a), momenta(b))))


# ---- kills --------------------------------------------------------------------------------------------------------------

@long_or_short(3, 100)
def test_killed_at_random_moments(tiny, tmp_path, rounds):
    """SIGKILL after a random while, every other time inside a save; started again each time. The end is that of a run left alone, bit for bit."""
    how = [*tiny, f'--max_iters={12 * rounds + 60}', '--save_interval=3', '--eval_interval=20', '--log_interval=1', '--init_from=auto']
    assert start(tmp_path / 'alone', *how).wait() == 0
    rng, out, kills, in_a_save = random.Random(0), tmp_path / 'killed', 0, 0
    while kills < rounds or in_a_save < max(1, rounds // 4):
        process, stamp = start(out, *how), len(metrics(out)) if (out / 'metrics.jsonl').exists() else 0
        wait_for(lambda: (out / 'metrics.jsonl').exists() and (out / 'metrics.jsonl').read_text().count('\n') > stamp, process)
        time.sleep(rng.uniform(0, 0.1))
        if kills % 2:
            wait_for(lambda: (out / 'ckpt.pt.tmp').exists(), process)
            in_a_save += (out / 'ckpt.pt.tmp').exists()
        process.kill()
        done = process.wait() == 0
        assert not done, f"finished after {kills} kills"
        kills += 1
    assert start(out, *how).wait() == 0
    assert same_state(tmp_path / 'alone', out) and metrics(tmp_path / 'alone') == metrics(out)
    print(f"{kills} kills, {in_a_save} of them with a half-written checkpoint")


def children(pid):
    """Process ids of the ranks under a torchrun."""
    found = []
    for p in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{p}/stat') as f:
                if int(f.read().rpartition(')')[2].split()[1]) == pid:
                    found.append(int(p))
        except OSError:
            pass
    return found


@long_or_short(1, 20)
def test_a_rank_dies_and_torchrun_brings_the_run_back(run, tiny, tmp_path, rounds):
    """Two ranks, a random one killed at a random moment: the end is that of two left alone, bit for bit; then on with one rank."""
    iters = 40 * rounds + 40
    how = [*tiny, '--gradient_accumulation_steps=2', '--save_interval=5', '--log_interval=1', '--eval_interval=1000']
    out, rng = tmp_path / 'killed', random.Random(1)
    process = start(out, *how, f'--max_iters={iters}', ranks=2, restarts=rounds)
    lines = lambda: (out / 'metrics.jsonl').read_text().count('\n') if (out / 'metrics.jsonl').exists() else 0
    for _ in range(rounds):
        goal = lines() + rng.randint(8, 20)
        wait_for(lambda: lines() >= goal and (out / 'ckpt.pt').exists(), process)
        ranks = children(process.pid)
        began = time.time()
        os.kill(rng.choice(ranks), signal.SIGKILL)
        wait_for(lambda: not set(children(process.pid)) & set(ranks), process)
        assert time.time() - began < 60, "the other rank hangs"
    process.wait(timeout=300)
    text = printed(out)
    assert process.returncode == 0 and text.count('resumed') == rounds, text[-3000:]
    assert start(tmp_path / 'alone', *how, f'--max_iters={iters}', ranks=2).wait() == 0
    assert same_state(tmp_path / 'alone', out) and metrics(tmp_path / 'alone') == metrics(out)
    said = run('train.py', *how, f'--max_iters={iters + 3}', f'--out_dir={out}', '--init_from=resume')
    assert 'ranks was 2, now 1' in said and 'not bit for bit' in said and state(out)['iter_num'] == iters + 3


@long_or_short(2, 20)
def test_prepare_killed_anywhere_leaves_the_old_set_or_the_new_one(run, tmp_path, rounds):
    rng, texts = random.Random(2), [b'one two three four five six seven\n' * n for n in (400, 900)]
    args = [f'--dataset={tmp_path}/x.txt', f'--data_dir={tmp_path}/data', '--encoder_layers=1', '--encoder_dim=8']
    (tmp_path / 'x.txt').write_bytes(texts[0])
    run('prepare.py', *args)
    old = train.open_bins(str(tmp_path / 'data'), 'x', verify=True)
    (tmp_path / 'x.txt').write_bytes(texts[1])
    run('prepare.py', *args)
    new = train.open_bins(str(tmp_path / 'data'), 'x', verify=True)
    (tmp_path / 'x.txt').write_bytes(texts[0])
    run('prepare.py', *args)
    assert train.open_bins(str(tmp_path / 'data'), 'x', verify=True) == old != new
    (tmp_path / 'x.txt').write_bytes(texts[1])
    for _ in range(rounds):
        process = subprocess.Popen(command('prepare.py', *args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len(os.listdir(tmp_path / 'data')) > 1, process)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        assert train.open_bins(str(tmp_path / 'data'), 'x', verify=True) in (old, new)
    run('prepare.py', *args)
    assert train.open_bins(str(tmp_path / 'data'), 'x', verify=True) == new


@pytest.mark.parametrize('moment', ['step', 'validation', 'save'])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(run, tiny, tmp_path, monkeypatch, capsys, moment, number):
    """At any moment: the step is finished, saved, the exit code is the signal's; resumed, it ends as if nothing had been."""
    how = [*tiny, '--max_iters=12', '--save_interval=4', '--eval_interval=6', '--init_from=auto']
    run('train.py', *how, f'--out_dir={tmp_path}/alone')
    calls, real = [], dict(step=model.compute_loss, save=torch.save)

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == (1 if moment == 'save' else 10):       # five are the validation at the start; then the fifth step, or the next validation
            os.kill(os.getpid(), number)
        return (real['save'] if moment == 'save' else real['step'])(*args, **kwargs)
    with monkeypatch.context() as m:
        if moment == 'validation':
            m.setattr(model, 'compute_loss', lambda *a: interrupt(*a) if torch.is_inference_mode_enabled() or not torch.is_grad_enabled() else real['step'](*a))
        else:
            m.setattr(torch if moment == 'save' else model, 'save' if moment == 'save' else 'compute_loss', interrupt)
        with pytest.raises(SystemExit) as e:
            run('train.py', *how, f'--out_dir={tmp_path}/out')
    assert e.value.code == 128 + number and f'({number.name})' in capsys.readouterr().out
    assert state(tmp_path / 'out')['iter_num'] == dict(step=5, validation=6, save=4)[moment]
    run('train.py', *how, f'--out_dir={tmp_path}/out')
    assert same_state(tmp_path / 'alone', tmp_path / 'out') and metrics(tmp_path / 'alone') == metrics(tmp_path / 'out')


def test_sigterm_to_a_real_process_while_it_compiles(tiny, tmp_path):
    process = start(tmp_path, *tiny, '--max_iters=100000', '--compile=true')
    wait_for(lambda: (tmp_path / 'settings.json').exists(), process)
    process.terminate()
    process.wait(timeout=300)
    text = printed(tmp_path)
    assert process.returncode == 143 and 'Traceback' not in text and '(SIGTERM)' in text, text[-2000:]


def test_stopped_before_the_first_step(run, tiny, tmp_path, monkeypatch):
    """One row a batch: some batches of the validation have no denoise row, their l2 is null, not NaN; and there is a checkpoint."""
    real = model.compute_loss
    monkeypatch.setattr(model, 'compute_loss', lambda *args: (signal.raise_signal(signal.SIGTERM), real(*args))[1] if not args[5].is_decode.any() else real(*args))
    with pytest.raises(KeyboardInterrupt):      # from the second signal on it does not wait
        run('train.py', *tiny, f'--out_dir={tmp_path / "twice"}', '--batch_size=1')
    monkeypatch.setattr(model, 'compute_loss', real)
    said = run('train.py', *tiny, f'--out_dir={tmp_path}', '--batch_size=1', '--max_minutes=0.0001')
    assert 'stopped at iteration 0' in said and state(tmp_path)['iter_num'] == 0
    text = (tmp_path / 'metrics.jsonl').read_text()
    assert 'null' in text and 'NaN' not in text
    assert 'resumed' in run('train.py', *tiny, f'--out_dir={tmp_path}', '--batch_size=1', '--init_from=auto')


def test_max_minutes(run, tiny, tmp_path):
    said = run('train.py', *tiny, '--max_iters=100000', '--max_minutes=0.02', f'--out_dir={tmp_path}', '--log_interval=1000')
    assert 'stopped at iteration' in said and 'max_minutes' in said and state(tmp_path)['iter_num'] > 0


def test_one_run_per_out_dir(run, tiny, tmp_path):
    with train.lock(str(tmp_path)):
        done = subprocess.run(command('train.py', *tiny, f'--out_dir={tmp_path}'), capture_output=True, text=True)
    assert done.returncode == 1 and 'another run is writing' in done.stderr and done.stderr.count('\n') == 1 and os.listdir(tmp_path) == ['lock']
    run('train.py', *tiny, f'--out_dir={tmp_path}')      # the lock of a dead process holds nobody up


def test_permanent_checkpoints_and_overwriting(run, tiny, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=6', '--save_interval=2', '--keep_interval=4')
    assert torch.load(tmp_path / 'ckpt_4.pt', weights_only=True)['iter_num'] == 4 and not (tmp_path / 'ckpt_2.pt').exists()
    assert model.ELF.from_pretrained(str(tmp_path / 'ckpt_4.pt'))
    last = (tmp_path / 'ckpt.pt').read_bytes()
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--overwrite=true', '--max_iters=1')
    assert (tmp_path / 'old_ckpt.pt').read_bytes() == last and state(tmp_path)['iter_num'] == 1


# ---- steps that are not finite --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_bad_step_is_skipped(run, tiny, tmp_path, monkeypatch, value):
    real, calls = model.compute_loss, []

    def spoiled(net, *args):
        loss, parts = real(net, *args)
        calls.append(torch.is_grad_enabled())
        return (loss * value if sum(calls) == 3 and calls[-1] else loss), parts
    monkeypatch.setattr(model, 'compute_loss', spoiled)
    said = run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=5', '--save_interval=1', '--keep_interval=1')
    at = [torch.load(tmp_path / f'ckpt_{i}.pt', weights_only=True) for i in (2, 3, 4)]
    assert 'iter 3: SKIPPED' in said and [x['bad_steps'] for x in metrics(tmp_path) if 'bad_steps' in x] == [1]
    assert same(at[0]['model'], at[1]['model']) and same(at[0]['ema'], at[1]['ema']) and not same(at[1]['model'], at[2]['model'])
    assert all(torch.isfinite(v).all() for part in ('model', 'ema') for v in state(tmp_path)[part].values())


def test_bad_steps_in_a_row_end_the_run(run, tiny, tmp_path, monkeypatch):
    real, calls = model.compute_loss, []

    def spoiled(net, *args):
        calls.append(torch.is_grad_enabled())
        loss, parts = real(net, *args)
        return loss * (float('nan') if sum(calls) > 4 and calls[-1] else 1), parts
    monkeypatch.setattr(model, 'compute_loss', spoiled)
    with pytest.raises(UserError, match=r'3 steps in a row without a finite gradient, up to iter 7 .* checkpoint is of iter 4: --init_from='):
        run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=50', '--save_interval=4', '--max_bad_steps=3')
    assert all(torch.isfinite(v).all() for v in state(tmp_path)['ema'].values())


# ---- a full disk, damaged files --------------------------------------------------------------------------------------------

def test_a_full_disk_during_a_save(run, tiny, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=2')
    before, size = (tmp_path / 'ckpt.pt').read_bytes(), os.path.getsize(tmp_path / 'ckpt.pt')
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    done = subprocess.run(command('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=4', '--init_from=resume'), capture_output=True, text=True, preexec_fn=full)
    assert done.returncode == 1 and 'could not write' in done.stderr and 'Traceback' not in done.stderr
    assert (tmp_path / 'ckpt.pt').read_bytes() == before and not (tmp_path / 'ckpt.pt.tmp').exists()
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=4', '--init_from=resume')


def test_damaged_metrics_are_named(run, tiny, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=2')
    (tmp_path / 'metrics.jsonl').write_bytes(b'{"iter": 1}\n\x00\x00\n')
    done = subprocess.run(command('train.py', *tiny, f'--out_dir={tmp_path}', '--init_from=resume'), capture_output=True, text=True)
    assert done.returncode == 1 and 'metrics.jsonl is damaged' in done.stderr and done.stderr.count('\n') == 1
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b'{"iter": 1}\n\x00\x00\n'
    (tmp_path / 'metrics.jsonl').unlink()
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--init_from=resume')


def damages(data, seed, cuts, flips):
    """The file cut at each of the last lengths, and with one bit turned at random places."""
    rng = random.Random(seed)
    for n in range(1, cuts + 1):
        yield data[:-n]
    for _ in range(flips):
        at = rng.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def test_damaged_checkpoints_are_never_used(run, tiny, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1')
    want, path, refused = state(tmp_path), str(tmp_path / 'damaged.pt'), 0
    for data in damages((tmp_path / 'ckpt.pt').read_bytes(), 0, 64, 200):
        with open(path, 'wb') as f:
            f.write(data)
        try:
            got = model.load_checkpoint(path)
            assert same(got['model'], want['model']) and same(got['ema'], want['ema']) and got['config'] == want['config'] and got['iter_num'] == 1
        except UserError as e:
            assert '\n' not in str(e)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize('name', ['train.bin', 'val.idx.npy', 'train.idx.npy'])
def test_damaged_bins_are_refused(bins, tmp_path, name):
    import shutil
    shutil.copytree(bins / 'tiny', tmp_path / 'tiny')
    meta = json.loads((tmp_path / 'tiny' / 'meta.json').read_text())
    meta['checksums'] = {f: prepare.sha256(tmp_path / 'tiny' / f) for f in ('train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy')}
    (tmp_path / 'tiny' / 'meta.json').write_text(json.dumps(meta))
    train.open_bins(str(tmp_path), 'tiny', verify=True)
    whole = (tmp_path / 'tiny' / name).read_bytes()
    for data in damages(whole, 1, 64, 200):
        (tmp_path / 'tiny' / name).write_bytes(data)
        with pytest.raises(UserError) as e:
            train.open_bins(str(tmp_path), 'tiny', verify=True)
        assert '\n' not in str(e.value)


# ---- anything typed, anything in a file ------------------------------------------------------------------------------------

class Started(Exception):
    pass


@long_or_short(60, 1000)
def test_generated_command_lines(run, tiny, tmp_path, monkeypatch, rounds):
    """Either the run starts or one line says why not; by command line and by config file."""
    names = sorted(settings_of(os.path.join(ROOT, 'train.py')).keys() - {'out_dir', 'data_dir', 'wandb_log'})
    values = st.one_of(st.integers(-3, 40).map(str), st.sampled_from(['0', '1', '-1', '1e9', '0.5', 'nan', 'inf', '-inf', 'true', 'False', 'cuda', 'cpu', 'resume', 'muon', 'adamw', 'sde', 'ode', 'eos', '', ' ', '=',
                       '1e400', '0x10', '[1]', 'None', '../..', 'ELF-B', 'bfloat16', '10**9', '99999999999999999999']), st.floats().map(str), st.text(max_size=8))
    one = st.tuples(st.one_of(st.sampled_from(names), st.text(max_size=5)), values).map(lambda x: f'--{x[0]}={x[1]}')
    fine = st.sampled_from([f'--{x}' for x in ('batch_size=3', 'seed=7', 'lr_schedule=cosine', 'pad_token=eos', 'decoder_prob=0', 'decoder_prob=1', 'n_layer=1', 'grad_clip=0', 'dtype=bfloat16',
                            'optimizer=adamw', 'w_min=0.1', 't_mean=-1', 'max_epochs=0.01', 'recompute=true', 'init_from=auto', 'ns_dtype=bfloat16', 'save_interval=7', 'max_minutes=1', 'cfg=2')])
    odd = st.sampled_from(['--help=', '--', '-x', 'config/none.py', 'train.py', '--=1', '--batch_size', '---seed=1', ''])

    def begun(*args):
        raise Started
    monkeypatch.setattr(model, 'estimate_flops', begun)     # the last call before the loop
    outcomes = []

    @hypothesis.settings(max_examples=rounds, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.lists(st.one_of(one, fine, fine, odd), max_size=3), st.booleans())
    def check(args, as_file):
        out = tmp_path / str(len(outcomes))
        if as_file:
            (tmp_path / 'config.py').write_text('\n'.join(a[2:] for a in args if a.startswith('--')) + '\n', encoding='utf-8', errors='replace')
            args = [str(tmp_path / 'config.py')]
        try:
            run('train.py', *tiny, f'--out_dir={out}', *args)
            outcomes.append('ran')
        except Started:
            outcomes.append('started')
        except (UserError, SystemExit) as e:
            assert e.code == 0 if isinstance(e, SystemExit) else '\n' not in str(e).strip(), e       # --help
            outcomes.append('refused')
    check()
    assert outcomes.count('started') > rounds // 10 and outcomes.count('refused') > rounds // 4
    print({k: outcomes.count(k) for k in set(outcomes)})


def mutated(data, rng):
    """A file with a few random changes: bytes, cuts, doubled parts, special characters."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.randint(1, 20)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[at:at + n]
        elif kind == 2:
            data[at:at] = data[at:at + n]
        elif kind == 3:
            data[at:at] = rng.choice([b'\0', b'\xff', '\u202eabc'.encode(), '🙂'.encode(), b'\x1b[2J', b'"', b'}', b'\n\n', b'null', b'-1', b'1e999', b'</s>', b'\xed\xa0\x80'])
        else:
            data = data[:at]
    return bytes(data)


@long_or_short(24, 200)
def test_broken_corpora_and_metadata(run, bins, tiny, tmp_path, monkeypatch, rounds):
    """Mutated .txt, .jsonl and meta.json: used, or refused in one line with nothing left behind."""
    import shutil
    rng, outcomes = random.Random(0), []
    monkeypatch.setattr(model, 'estimate_flops', lambda *a: (_ for _ in ()).throw(Started()))
    text = b''.join(b'the quick brown fox number %d jumps over the lazy dog\n' % i for i in range(120))
    pairs = b''.join(json.dumps(dict(input=f'a b {i}', output=f'c d {i}')).encode() + b'\n' for i in range(45))
    shutil.copytree(bins / 'tiny', tmp_path / 'data' / 'tiny')
    whole = (bins / 'tiny' / 'meta.json').read_bytes()
    for i in range(rounds):
        kind = ('txt', 'jsonl', 'meta')[i % 3]
        try:
            if kind == 'meta':
                (tmp_path / 'data' / 'tiny' / 'meta.json').write_bytes(mutated(whole, rng))
                run('train.py', *tiny, f'--data_dir={tmp_path / "data"}', f'--out_dir={tmp_path / "out"}')
            else:
                file = tmp_path / f'x.{kind}'
                file.write_bytes(mutated(text if kind == 'txt' else pairs, rng))
                run('prepare.py', f'--dataset={file}', f'--data_dir={tmp_path / "made"}', '--letters_only=false', '--encoder_layers=1')
                train.open_bins(str(tmp_path / 'made'), 'x')
            outcomes.append('used')
        except Started:
            outcomes.append('used')
        except UserError as e:
            assert '\n' not in str(e), e
            outcomes.append('refused')
        assert not os.path.exists(tmp_path / 'made') or set(os.listdir(tmp_path / 'made')) <= {'x'}
    assert {'used', 'refused'} == set(outcomes)


@pytest.mark.parametrize('text', ['emoji 🙂👩‍👩‍👧 and عربي and \u202e rtl \x07\x1b[31m\x00 NUL ' * 200, 'x' * 10_000_000, ('word ' * 2000 + '\n') * 30, '\r\n'.join(['a b c'] * 500)], ids=['signs', '10 MB line', 'long lines', 'crlf'])
def test_strange_texts_go_through(run, tmp_path, text):
    (tmp_path / 'x.txt').write_bytes(text.encode())
    run('prepare.py', f'--dataset={tmp_path / "x.txt"}', f'--data_dir={tmp_path}', '--letters_only=false', '--max_length=1024', '--encoder_layers=1', '--encoder_dim=8')
    (tmp_path / 'x.jsonl').write_text(json.dumps(dict(generated=text[:100_000], target='a')) + '\n')
    out = run('eval.py', f'--samples={tmp_path / "x.jsonl"}', f'--out_dir={tmp_path}')
    assert '\x1b' not in out and '\x07' not in out


# ---- memory ----------------------------------------------------------------------------------------------------------------

def resident():
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * resource.getpagesize()


@long_or_short(2000, 10000)
def test_the_loader_leaks_nothing_and_does_not_keep_what_it_has_read(tmp_path, rounds):
    n, width = 200_000 if rounds < 10000 else 10_000_000, 1000
    with open(tmp_path / 'train.bin', 'wb') as f:
        f.truncate(2 * n * width)       # 400 MB, or 20 GB, of zeros, which take no room on the disk
    np.save(tmp_path / 'train.idx.npy', np.repeat(np.arange(n)[:, None] * width, 2, axis=1))
    meta = dict(dir=str(tmp_path), dtype='uint16', vocab_size=99, pad_id=0, eos_id=1)
    load = lambda i: [a.sum() for a in train.get_rows(meta, 'train', train.rows_at(n, 0, i * 8, 8), width)]
    for i in range(200):
        load(i)
    before = resident()
    for i in range(rounds):
        load(i)
    assert resident() - before < 8 << 20


@STRESS
def test_memory_of_a_long_run_is_flat(tiny, tmp_path):
    """Ten minutes of training with validation, saves and samples."""
    process, seen = start(tmp_path, *tiny, '--max_iters=10000000', '--max_minutes=10', '--log_interval=500', '--eval_interval=500', '--save_interval=500', '--sample_interval=1000'), []
    began = time.time()
    while process.poll() is None:
        time.sleep(10)
        try:
            with open(f'/proc/{process.pid}/statm') as f:
                seen.append((time.time() - began, int(f.read().split()[1]) * resource.getpagesize()))
        except (OSError, IndexError):
            break
    process.wait()
    early = [m for t, m in seen if 60 < t < 180]
    late = [m for t, m in seen if 480 < t < 590]
    print(f"resident {np.median(early) / 2**20:.0f} MiB after two minutes, {np.median(late) / 2**20:.0f} after nine")
    assert process.returncode == 0 and np.median(late) - np.median(early) < 24 << 20
