"""
Killed anywhere, fed anything, nothing lost.
    python -m pytest -q tests/test_reliability.py           # --slow, or make stress: the long form
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time

import hypothesis
import numpy as np
import pytest
import torch
from conftest import ROOT, command, metrics, same, same_state, state
from hypothesis import strategies as st

from parts import checkpoint, device
import model
from configurator import UserError, settings_of
from parts.data import get_rows, open_bins, rows_at, sha256

STRESS = pytest.mark.slow
QUIET = dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1')


def long_or_short(short, long):
    """The same test twice: a few rounds always, all of them with --slow."""
    return pytest.mark.parametrize('rounds', [short, pytest.param(long, marks=STRESS)])


started = []


def start_command(words, log):
    """A process of its own, one thread (the same sums each time), what it prints in a file."""
    with open(log, 'w') as f:
        process = subprocess.Popen(words, stdout=f, stderr=subprocess.STDOUT,
                                   env=os.environ | QUIET)
    started.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    while started:
        process = started.pop()
        if process.poll() is None:
            signal_all(process, signal.SIGKILL)
            process.wait()


def children(pid):
    """Process ids of the ranks under a torchrun."""
    found = []
    for p in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{p}/stat') as f:
                parent = int(f.read().rpartition(')')[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(p))
    return found


def signal_all(process, number):
    """To a process and all below it. A torchrun's ranks are in sessions of their own."""
    tree = [process.pid]
    for pid in tree:
        tree.extend(children(pid))
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def start(out_dir, *args, **how):
    """train.py as a process of its own; what it prints goes to <out_dir>.log."""
    return start_command(command('train.py', f'--out_dir={out_dir}', *args, **how),
                         f'{out_dir}.log')


def printed(out_dir):
    with open(f'{out_dir}.log') as f:
        return f.read()


def lines(out_dir):
    """How many lines metrics.jsonl has, 0 where there is none yet."""
    file = os.path.join(out_dir, 'metrics.jsonl')
    if not os.path.exists(file):
        return 0
    with open(file) as f:
        return f.read().count('\n')


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.0005)

# --------------------------------------------------------------------------------------------------
# kills

@long_or_short(2, 100)
def test_killed_at_random_moments(run, tiny, tmp_path, rounds):
    """
    SIGKILL after a random while, every other time inside a save; started again each time. The end
    is that of a run left alone, bit for bit.
    """
    args = [*tiny, f'--max_iters={12 * rounds + 60}', '--save_interval=3', '--eval_interval=20',
            '--init_from=auto']
    alone, out = tmp_path / 'alone', tmp_path / 'killed'
    assert start(alone, *args).wait() == 0
    rng, kills, in_a_save = random.Random(0), 0, 0

    def saves():
        return (out / 'ckpt.pt.unfinished').exists()

    while kills < rounds or in_a_save < max(1, rounds // 4):
        written = lines(out)
        process = start(out, *args)
        # a line for the resume, then one of a step
        wait_for(lambda: lines(out) > written + 1, process)
        time.sleep(rng.uniform(0, 0.1))
        if kills % 2:
            wait_for(saves, process)
            in_a_save += saves()
        process.kill()
        assert process.wait() != 0, f"finished after {kills} kills"
        kills += 1
    assert start(out, *args).wait() == 0
    assert same_state(alone, out) and metrics(alone) == metrics(out)
    print(f"{kills} kills, {in_a_save} of them with a half-written checkpoint")


@long_or_short(1, 20)
def test_a_rank_dies_and_torchrun_brings_the_run_back(run, tiny, tmp_path, rounds):
    """
    Two ranks, a random one killed at a random moment: the end is that of two left alone, bit for
    bit; then on with one rank.
    """
    iters = 40 * rounds + 40
    args = [*tiny, '--gradient_accumulation_steps=2', '--save_interval=5', '--eval_interval=1000']
    both = [*args, f'--max_iters={iters}', '--init_from=auto']
    alone, out, rng = tmp_path / 'alone', tmp_path / 'killed', random.Random(1)
    process = start(out, *both, ranks=2, restarts=rounds)
    for _ in range(rounds):
        goal = lines(out) + rng.randint(8, 20)
        wait_for(lambda: lines(out) >= goal and (out / 'ckpt.pt').exists(), process)
        ranks, began = children(process.pid), time.time()
        os.kill(rng.choice(ranks), signal.SIGKILL)
        wait_for(lambda: not set(children(process.pid)) & set(ranks), process)
        assert time.time() - began < 60, "the other rank hangs"
    process.wait(timeout=300)
    text = printed(out)
    assert process.returncode == 0 and text.count('resumed') == rounds, text[-3000:]
    assert start(alone, *both, ranks=2).wait() == 0
    assert same_state(alone, out) and metrics(alone) == metrics(out)
    said = run('train.py', *args, f'--max_iters={iters + 3}', f'--out_dir={out}',
               '--init_from=resume')
    assert 'ranks was 2, now 1' in said and 'not the same bit for bit' in said
    assert state(out)['iter_num'] == iters + 3


def agent(node, port, out_dir, *args):
    """One of two nodes, both on this machine: a torchrun with one rank."""
    words = command('train.py', f'--out_dir={out_dir}', *args, ranks=1)
    words[words.index('--standalone')] = '--nnodes=2'
    words[4:4] = [f'--node_rank={node}', '--master_addr=127.0.0.1', f'--master_port={port}']
    return start_command(words, f'{out_dir}.{node}.log')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@STRESS
def test_two_nodes_one_of_which_dies(tiny, tmp_path):
    """Both are started again, with --init_from=auto: the end is that of two left alone."""
    args = [*tiny, '--gradient_accumulation_steps=2', '--save_interval=5', '--init_from=auto',
            '--max_iters=20', '--eval_interval=20']
    alone, out = tmp_path / 'alone', tmp_path / 'killed'

    def nodes(out_dir, *more):
        port = free_port()
        return [agent(node, port, out_dir, *args, *more) for node in (0, 1)]

    assert [node.wait(timeout=120) for node in nodes(alone)] == [0, 0]
    first, second = nodes(out, '--max_iters=100000')
    wait_for(lambda: (out / 'ckpt.pt').exists() and lines(out) > 8, first)
    signal_all(second, signal.SIGKILL)
    began = time.time()
    code, reached = first.wait(timeout=120), state(out)['iter_num']
    print(f"the other node ended after {time.time() - began:.1f} s with code {code}; "
          f"saved: iteration {reached}")
    assert code and second.wait() and 0 < reached < 20
    began = time.time()
    assert [node.wait(timeout=120) for node in nodes(out)] == [0, 0]
    said = printed(f'{out}.0')
    assert f'at iteration {reached}' in said
    assert same_state(alone, out) and metrics(alone) == metrics(out)
    print(f"both again: {time.time() - began:.1f} s from iteration {reached} to 20")


@long_or_short(1, 20)
def test_prepare_killed_anywhere_leaves_the_old_set_or_the_new_one(run, tmp_path, rounds):
    rng, file, data = random.Random(2), tmp_path / 'x.txt', tmp_path / 'data'
    args = [f'--dataset={file}', f'--data_dir={data}', '--encoder_layers=1', '--encoder_dim=8']

    def write(n):
        file.write_bytes(b'one two three four five six seven\n' * n)

    def opened():
        meta = open_bins(str(data), 'x')
        for name, checksum in meta['checksums'].items():
            assert sha256(data / 'x' / name) == checksum
        return meta

    def prepared(n):
        write(n)
        run('prepare.py', *args)
        return opened()

    old, new = prepared(400), prepared(900)
    assert old != new
    for _ in range(rounds):
        write(400)
        process = start_command(command('prepare.py', *args), tmp_path / 'log')
        wait_for(lambda: len(os.listdir(data)) > 1, process)        # it has begun to write
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        assert opened() in (old, new)
    assert prepared(400) == old

# --------------------------------------------------------------------------------------------------
# signals

def raise_at(monkeypatch, module, name, call, *numbers):
    """The function module.name raises these signals in its own process when called that often."""
    real, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                signal.raise_signal(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


# after five batches of validation: in step five; in the validation after six; in the first save
MOMENTS = [(model, 'compute_loss', 10, 5), (model, 'compute_loss', 12, 6), (torch, 'save', 1, 4),
           (model, 'compute_loss', 11, 6)]


def test_signals_save_and_stop(run, tiny, tmp_path, monkeypatch, capsys):
    """
    The step is finished and saved, the exit code is the signal's, twice at once is once. Resumed,
    the run ends as if nothing had been.
    """
    args = [*tiny, '--max_iters=12', '--save_interval=4', '--eval_interval=6', '--init_from=auto']
    run('train.py', *args, f'--out_dir={tmp_path}/alone')
    # the third is of a lost terminal, the fourth what sbatch --signal=USR1@60 sends
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    for number, (module, name, call, reached) in zip(numbers, MOMENTS):
        out = tmp_path / f'{name}_{call}'
        with monkeypatch.context() as m:
            raise_at(m, module, name, call, number, number)
            with pytest.raises(SystemExit) as e:
                run('train.py', *args, f'--out_dir={out}')
        assert e.value.code == 128 + number and f'({number.name})' in capsys.readouterr().out
        assert state(out)['iter_num'] == reached
        run('train.py', *args, f'--out_dir={out}')
        assert same_state(tmp_path / 'alone', out)
        assert metrics(tmp_path / 'alone') == metrics(out)


def test_only_a_third_ctrl_c_interrupts():
    """What the signal handler does, without a run around it."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
               signal.SIGXCPU]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        device.note_signals()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert device.signals[0] == signal.SIGTERM and len(device.signals) == 5
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize('ranks', [0, 2])
@long_or_short(1, 6)
def test_sigterm_to_a_whole_process_tree(tiny, tmp_path, ranks, rounds):
    """As scancel and systemd send it: torchrun's ranks get it twice, and save."""
    for i in range(rounds):
        out = tmp_path / str(i)
        process = start(out, *tiny, '--gradient_accumulation_steps=2', '--max_iters=100000',
                        ranks=ranks)
        wait_for(lambda: lines(out) > 5, process)
        signal_all(process, signal.SIGTERM)
        process.wait(timeout=60)
        text = printed(out)
        assert 'KeyboardInterrupt' not in text and '(SIGTERM), saved in' in text, text[-2000:]
        assert process.returncode == (1 if ranks else 143)
        assert 5 <= state(out)['iter_num'] == metrics(out)[-1]['iter'] < 100000


@STRESS
def test_sigterm_while_it_compiles(tiny, tmp_path):
    process = start(tmp_path, *tiny, '--max_iters=100000', '--compile=true')
    wait_for(lambda: lines(tmp_path) > 0, process)      # validated; now the graphs of a step
    signal_all(process, signal.SIGTERM)
    process.wait(timeout=300)
    text = printed(tmp_path)
    assert process.returncode == 143 and 'Traceback' not in text, text[-2000:]
    assert 'stopped at iteration 1 (SIGTERM)' in text


def test_stopped_before_the_first_step(run, tiny, tmp_path):
    """
    One row a batch: some batches of the validation have no denoise row, their l2 is null, not NaN;
    and there is a checkpoint.
    """
    args = ['train.py', *tiny, f'--out_dir={tmp_path}', '--batch_size=1']
    assert 'stopped at iteration 0 (max_minutes)' in run(*args, '--max_minutes=0.0001')
    assert state(tmp_path)['iter_num'] == 0
    text = (tmp_path / 'metrics.jsonl').read_text()
    assert 'null' in text and 'NaN' not in text
    assert 'resumed' in run(*args, '--init_from=auto')


def test_max_minutes(run, tiny, tmp_path):
    said = run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=100000',
               '--max_minutes=0.04', '--log_interval=1000')
    assert '(max_minutes)' in said and state(tmp_path)['iter_num'] > 0


def test_a_clock_that_is_set_stops_nothing(monkeypatch):
    """By NTP, or after a night asleep: max_minutes are those of the run."""
    monkeypatch.setattr(device, 'signals', [])
    started = time.monotonic()
    monkeypatch.setattr(time, 'time', lambda: 1e12)
    assert not device.should_stop(started, 60) and device.should_stop(started - 3601, 60)


def test_one_run_per_out_dir(run, tiny, tmp_path):
    args = ['train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=1']
    with checkpoint.lock(str(tmp_path)):
        with pytest.raises(UserError, match='another run is writing'):
            run(*args)
    assert os.listdir(tmp_path) == ['lock']
    run(*args)      # the lock of a dead process holds nobody up


def test_permanent_checkpoints(run, tiny, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=6', '--save_interval=2',
        '--keep_interval=4')
    assert state(tmp_path, 'ckpt_4.pt')['iter_num'] == 4 and not (tmp_path / 'ckpt_2.pt').exists()
    assert model.ELF.from_pretrained(str(tmp_path / 'ckpt_4.pt'))

# --------------------------------------------------------------------------------------------------
# steps that are not finite

def spoil(monkeypatch, factor, first, last):
    """The training loss of these calls is multiplied by a factor."""
    real, calls = model.compute_loss, []

    def spoiled(*args):
        loss, parts = real(*args)
        calls.append(1)
        return loss * (factor if first <= len(calls) <= last else 1), parts

    monkeypatch.setattr(model, 'compute_loss', spoiled)


@pytest.mark.parametrize('factor', [float('nan'), float('inf')])
def test_a_bad_step_is_skipped(run, tiny, tmp_path, monkeypatch, factor):
    spoil(monkeypatch, factor, 8, 8)       # five batches of validation come first
    said = run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=5', '--save_interval=1',
               '--keep_interval=1')
    assert 'iter 3: SKIPPED' in said
    assert [row['bad_steps'] for row in metrics(tmp_path) if 'bad_steps' in row] == [1]
    two, three, four = [state(tmp_path, f'ckpt_{i}.pt') for i in (2, 3, 4)]
    assert same(two['model'], three['model']) and same(two['ema'], three['ema'])
    assert not same(three['model'], four['model'])
    for part in ('model', 'ema'):
        assert all(torch.isfinite(x).all() for x in state(tmp_path)[part].values())


def test_bad_steps_in_a_row_end_the_run(run, tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, float('nan'), 10, 100)
    with pytest.raises(UserError, match='10 steps in a row without a finite gradient; .*from='):
        run('train.py', *tiny, f'--out_dir={tmp_path}', '--max_iters=50', '--save_interval=4')
    assert state(tmp_path)['iter_num'] == 12        # of 13 that were done
    assert all(torch.isfinite(x).all() for x in state(tmp_path)['ema'].values())


def test_a_line_that_a_kill_has_cut(run, tiny, tmp_path):
    """Of metrics.jsonl: the next one is whole, the curves leave the cut one out."""
    args = ['train.py', *tiny, f'--out_dir={tmp_path}']
    run(*args, '--max_iters=2')
    file = tmp_path / 'metrics.jsonl'
    file.write_text(file.read_text() + '{"iter": 3, "lo')
    said = run(*args, '--init_from=resume')
    assert file.read_text().count('\n{"iter": 3, "loss"') == 1
    assert '1 line' in said

# --------------------------------------------------------------------------------------------------
# anything typed, anything in a file

class Started(Exception):
    """Raised in place of the loop."""


def stop_at_the_loop(monkeypatch):
    def begun(*args):
        raise Started
    monkeypatch.setattr(device, 'note_signals', begun)      # the last call before it


VALUES = ['0', '1', '-1', '1e9', '0.5', 'nan', 'inf', '-inf', 'true', 'False', 'cuda', 'cpu',
          'resume', 'auto:', 'muon', 'adamw', 'sde', 'ode', 'eos', '', ' ', '=', '1e400', '0x10',
          '[1]', 'None', '../..', 'ELF-B', 'bfloat16', '10**9', '99999999999999999999']
FINE = ['batch_size=3', 'seed=7', 'lr_schedule=cosine', 'pad_token=eos', 'decoder_prob=0',
        'decoder_prob=1', 'n_layer=1', 'grad_clip=0', 'dtype=bfloat16', 'optimizer=adamw',
        'w_min=0.1', 't_mean=-1', 'max_epochs=0.01', 'gradient_checkpointing=true',
        'init_from=auto', 'ns_dtype=bfloat16', 'save_interval=7', 'max_minutes=1', 'cfg=2']
ODD = ['--help=', '--', '-x', 'config/none.py', 'train.py', '--=1', '--batch_size', '---seed=1', '']


def arguments():
    """Settings of train.py by name, or made-up ones, with values of all kinds."""
    settings = settings_of(os.path.join(ROOT, 'train.py')).keys()
    names = st.sampled_from(sorted(settings - {'out_dir', 'data_dir', 'wandb_log'}))
    values = st.one_of(st.integers(-3, 40).map(str), st.sampled_from(VALUES),
                       st.floats().map(str), st.text(max_size=8))
    any_name = st.one_of(names, st.text(max_size=5))
    made_up = st.tuples(any_name, values).map('--{0[0]}={0[1]}'.format)
    fine = st.sampled_from([f'--{setting}' for setting in FINE])
    return st.lists(st.one_of(made_up, fine, fine, st.sampled_from(ODD)), max_size=3)


@long_or_short(60, 1000)
def test_generated_command_lines(run, tiny, tmp_path, monkeypatch, rounds):
    """Either the run starts or one line says why not; by command line and by config file."""
    stop_at_the_loop(monkeypatch)
    outcomes, config = [], tmp_path / 'config.py'

    @hypothesis.settings(max_examples=rounds, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(arguments(), st.booleans())
    def check(args, as_file):
        if as_file:
            settings = [arg[2:] for arg in args if arg.startswith('--')]
            config.write_text('\n'.join(settings) + '\n', encoding='utf-8', errors='replace')
            args = [config]
        try:
            run('train.py', *tiny, f'--out_dir={tmp_path}/{len(outcomes)}', *args)
            outcomes.append('ran')
        except Started:
            outcomes.append('started')
        except UserError as e:
            assert '\n' not in str(e).strip()
            outcomes.append('refused')
        except SystemExit as e:
            assert e.code == 0      # --help
            outcomes.append('refused')

    check()
    assert outcomes.count('started') > rounds // 10 and outcomes.count('refused') > rounds // 4
    print({outcome: outcomes.count(outcome) for outcome in set(outcomes)})


SIGNS = [b'\0', b'\xff', '\u202eabc'.encode(), '🙂'.encode(), b'\x1b[2J', b'"', b'}', b'\n\n',
         b'null', b'-1', b'1e999', b'</s>', b'\xed\xa0\x80']


def mutated(data, rng):
    """A file with a few random changes: bytes, cuts, doubled parts, special characters."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.randint(1, 20)
        kind = rng.choice(['byte', 'gone', 'doubled', 'sign', 'cut'])
        if kind == 'byte' and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 'gone':
            del data[at:at + n]
        elif kind == 'doubled':
            data[at:at] = data[at:at + n]
        elif kind == 'sign':
            data[at:at] = rng.choice(SIGNS)
        elif kind == 'cut':
            data = data[:at]
    return bytes(data)


@long_or_short(24, 200)
def test_broken_corpora_and_metadata(run, bins, tiny, tmp_path, monkeypatch, rounds):
    """Mutated .txt, .jsonl and meta.json: used, or refused in one line, nothing left behind."""
    stop_at_the_loop(monkeypatch)
    shutil.copytree(bins / 'tiny', tmp_path / 'tiny')
    text = [f'the quick brown fox number {i} jumps over the lazy dog' for i in range(120)]
    pairs = [json.dumps(dict(input=f'a b {i}', output=f'c d {i}')) for i in range(45)]
    whole = {tmp_path / 'x.txt': '\n'.join(text).encode(),
             tmp_path / 'x.jsonl': '\n'.join(pairs).encode(),
             tmp_path / 'tiny' / 'meta.json': (bins / 'tiny' / 'meta.json').read_bytes()}
    made = tmp_path / 'made'
    made.mkdir()
    rng, outcomes = random.Random(0), set()
    for i in range(rounds):
        file = list(whole)[i % 3]
        file.write_bytes(mutated(whole[file], rng))
        try:
            if file.name == 'meta.json':
                run('train.py', *tiny, f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out{i}')
            else:
                run('prepare.py', f'--dataset={file}', f'--data_dir={made}',
                    '--letters_only=false', '--encoder_layers=1')
                open_bins(str(made), 'x')
            outcomes.add('used')
        except Started:
            outcomes.add('used')
        except UserError as e:
            assert '\n' not in str(e)
            outcomes.add('refused')
        assert set(os.listdir(made)) <= {'x'}
    assert outcomes == {'used', 'refused'}


STRANGE = dict(
    signs='emoji 🙂👩‍👩‍👧 and عربي and \u202e rtl \x07\x1b[31m\x00 NUL ' * 200,
    a_line_of_2_MB='x' * 2_000_000,
    long_lines=('word ' * 2000 + '\n') * 30,
    crlf='\r\n'.join(['a b c'] * 500))


@pytest.mark.parametrize('kind', STRANGE)
def test_strange_texts_go_through(run, tmp_path, kind):
    text = STRANGE[kind]
    (tmp_path / 'x.txt').write_bytes(text.encode())
    run('prepare.py', f'--dataset={tmp_path}/x.txt', f'--data_dir={tmp_path}', '--max_length=128',
        '--letters_only=false', '--encoder_layers=1', '--encoder_dim=8')
    sample = json.dumps(dict(generated=text[:100_000], target='a'))
    (tmp_path / 'x.jsonl').write_text(sample + '\n')
    out = run('eval.py', f'--samples={tmp_path}/x.jsonl', f'--out_dir={tmp_path}')
    assert '\x1b' not in out and '\x07' not in out

# --------------------------------------------------------------------------------------------------
# memory

def resident(pid='self'):
    """Bytes of a process that are in memory."""
    with open(f'/proc/{pid}/statm') as f:
        return int(f.read().split()[1]) * resource.getpagesize()


@long_or_short(2000, 10000)
def test_the_loader_leaks_nothing_and_does_not_keep_what_it_has_read(tmp_path, rounds):
    n, width = 200_000 if rounds < 10000 else 10_000_000, 1000
    with open(tmp_path / 'train.bin', 'wb') as f:
        f.truncate(2 * n * width)       # 400 MB, or 20 GB, of zeros, which take no room on the disk
    starts = np.arange(n)[:, None] * width
    np.save(tmp_path / 'train.idx.npy', np.repeat(starts, 2, axis=1))
    meta = dict(dir=str(tmp_path), dtype='uint16', vocab_size=99, pad_id=0, eos_id=1)
    c = model.ELFConfig(max_length=width)

    def load(rounds):
        for i in range(rounds):
            for x in get_rows(meta, 'train', rows_at(n, 0, i * 8, 8), c):
                x.sum()

    load(200)
    before = resident()
    load(rounds)
    assert resident() - before < 8 << 20


@STRESS
def test_memory_of_a_long_run_is_flat(tiny, tmp_path):
    """Ten minutes of training with validation, saves and samples."""
    process = start(tmp_path, *tiny, '--max_iters=10000000', '--max_minutes=10',
                    '--log_interval=500', '--eval_interval=500', '--save_interval=500',
                    '--sample_interval=1000')
    began, early, late = time.time(), [], []
    while process.poll() is None:
        time.sleep(10)
        seconds = time.time() - began
        try:
            if 60 < seconds < 180:
                early.append(resident(process.pid))
            if 480 < seconds < 590:
                late.append(resident(process.pid))
        except (OSError, IndexError):
            break
    assert process.wait() == 0
    two, nine = np.median(early), np.median(late)
    print(f"resident {two / 2**20:.0f} MiB after two minutes, {nine / 2**20:.0f} after nine")
    assert nine - two < 24 << 20
