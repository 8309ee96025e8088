"""
On a GPU where there is one, else on the pretended one of pretend_gpu.py: the numbers of the CPU,
training, evaluation, bench.py, no waiting in the loop.
    python -m pytest -q tests/test_gpu.py
"""
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pretend_gpu
import pytest
import torch
from conftest import ROOT, metrics
from test_model import batch, rel, small
from torch._dynamo.utils import counters

import model
from model import ELFConfig, compute_loss, draw
from parts.muon import make_optimizer
from sample import decode, generate, time_grid

REAL = torch.cuda.is_available()
TINY = ELFConfig(n_layer=1, n_embd=64, n_head=2, vocab_size=100)


@pytest.fixture
def gpu(monkeypatch):
    """The device's name for --device and .to()."""
    if REAL:
        torch.set_float32_matmul_precision('highest')
        yield 'cuda'
    else:
        # torch takes it for its own meta device
        warnings.filterwarnings('ignore', 'for .*: copying from a non-meta parameter')
        pretend_gpu.install(monkeypatch)
        with pretend_gpu.Pretend():
            yield 'meta'

# --------------------------------------------------------------------------------------------------
# the numbers of the CPU

def loss_gradients_and_texts(device):
    net = small()
    x0, tokens, mask, cond, draws = batch(net, is_decode=[0, 0, 1, 0, 1, 0],
                                          self_cond=[1, 0, 0, 1, 0, 0])
    noise = torch.randn(3, *x0.shape, generator=torch.Generator().manual_seed(2)).to(device)
    z = 2 * x0.flip(0).to(device)
    net, x0, tokens, mask, cond = (x.to(device) for x in (net, x0, tokens, mask, cond))
    on_device = {}
    for name, x in vars(draws).items():
        if x.dtype != torch.bool:       # the flags stay on the CPU
            on_device[name] = x.to(device)
    loss, _ = compute_loss(net, x0, tokens, mask, cond, replace(draws, **on_device))
    loss.backward()
    times = time_grid(4, 'quantile', net.config)
    z = generate(net, z, times, cfg=2.0, cond=x0, cond_mask=cond, step_noise=noise)
    return [loss, *(p.grad for p in net.parameters()), z, decode(net, z, 3.0)[0]]


def updates(device):
    """
    Of gradients drawn for this: those of a loss have elements and directions that are nearly zero,
    and Adam and Muon make what rounding left of them as large as the others.
    """
    net, g = small(), torch.Generator().manual_seed(3)
    before = [p.detach().clone() for p in net.parameters()]
    grads = [torch.randn(p.shape, generator=g) for p in before]
    net.to(device)
    for p, grad in zip(net.parameters(), grads):
        p.grad = grad.to(device)
    make_optimizer(net.named_parameters(), 0.01).step()
    return [p.detach().cpu() - x for p, x in zip(net.parameters(), before)]


# float32 rounds by 6e-8; sums of hundreds of terms in another order differ by some of it, and the
# five turns of Newton-Schulz multiply that by up to 3.4445**5 = 485 where singular values are small
@pytest.mark.parametrize('numbers, limit', [
    (loss_gradients_and_texts, 1e-4 if REAL else 1e-5), (updates, 3 * 485 * 6e-8)])
def test_numbers_are_those_of_the_cpu(gpu, numbers, limit):
    for ours, theirs in zip(numbers(gpu), numbers('cpu')):
        assert rel(ours.detach().cpu(), theirs) < limit

# --------------------------------------------------------------------------------------------------
# the scripts

def last_json(out):
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize('more', [
    ['--ns_dtype=bfloat16', '--gradient_accumulation_steps=2'],
    ['--optimizer=adamw', '--gradient_checkpointing=true']])
def test_training_resumes_where_it_stood(run, tiny, tmp_path, gpu, more):
    how = [*tiny, *more, f'--device={gpu}', '--n_layer=1', '--eval_interval=2',
           '--sample_interval=2']
    run('train.py', *how, '--max_iters=4', f'--out_dir={tmp_path}/whole')
    how.append(f'--out_dir={tmp_path}/parts')
    run('train.py', *how, '--max_iters=2')
    run('train.py', *how, '--max_iters=4', '--init_from=resume')
    for a, b in zip(metrics(tmp_path / 'whole'), metrics(tmp_path / 'parts'), strict=True):
        a, b = ({name: x for name, x in row.items() if 'loss' in name} for row in (a, b))
        assert a == (pytest.approx(b, rel=1e-4) if REAL else b)


def test_a_task_from_pairs_to_bleu(run, tiny, tmp_path, gpu):
    pretend_gpu.waits.clear()
    pairs, few = tmp_path / 'pairs.jsonl', tmp_path / 'few.jsonl'
    lines = [json.dumps(dict(input=f'a b {i}', output=f'{i} b a')) + '\n' for i in range(16)]
    pairs.write_text(''.join(lines))
    few.write_text(''.join(lines[:5]))      # goes before the set's own
    data, out = [f'--data_dir={tmp_path}', '--dataset=pairs'], f'--out_dir={tmp_path}/out'
    run('prepare.py', f'--dataset={pairs}', f'--val_dataset={pairs}', '--name=pairs', data[0],
        '--encoder_layers=1', '--encoder_dim=16')
    run('train.py', *tiny, *data, out, f'--device={gpu}', '--max_length=40',
        '--max_input_length=20', '--pad_token=eos', '--drop_cond_prob=0.1', '--sampler=ode',
        '--cfg=2.0', '--max_iters=3', '--sample_interval=3')
    score = last_json(run('eval.py', *data, out, f'--device={gpu}', f'--input_file={few}',
                          '--dtype=float32', '--eval_iters=2', '--batch_size=16'))
    assert score['texts'] == 5 and score['bleu'] >= 0 and (REAL or pretend_gpu.waits)
    if REAL:
        run('sample.py', out, f'--input_file={pairs}', '--trace=3', '--compile=true')


def test_benchmark(run, monkeypatch, gpu):
    monkeypatch.setitem(model.MODELS, 'ELF-B', TINY)
    report = last_json(run('bench.py', '--batch_size=4', '--max_length=16', '--sample_length=16',
                           '--runs=1', '--profile=true', f'--device={gpu}',
                           f'--compile={REAL}'))
    assert ('cuda' if REAL else 'pretended') in report['device']
    assert report['train']['step_ms'] > 0 and report['sample']['texts_per_s'] > 0
    assert 'aten::' in report['profile']


@pytest.mark.skipif(REAL, reason='counted on the pretended GPU')
@pytest.mark.parametrize('work, waits', [('training', 1), ('distillation', 1), ('sampling', 0)])
def test_how_often_a_step_waits(run, tiny, tmp_path, gpu, work, waits):
    """Training for the norm of the gradient, which must be finite; a sampler for nothing."""
    args = ['train.py', *tiny, '--n_layer=1', '--log_interval=100']
    start, counts = f'{tmp_path}/start', []
    run(*args, '--max_iters=1', f'--out_dir={start}')
    student = [f'--teacher={start}', f'--init_from={start}', '--distill_steps=2',
               '--distill_substeps=3'] if work == 'distillation' else []
    for steps in (1, 3):
        pretend_gpu.waits.clear()
        if work == 'sampling':
            run('sample.py', f'--init_from={start}', f'--out_dir={tmp_path}/{steps}',
                f'--steps={steps}', '--sampler=sde', '--num_samples=2')
        else:
            run(*args, *student, f'--max_iters={steps}', f'--out_dir={tmp_path}/{steps}')
        counts.append(len(pretend_gpu.waits))
    assert counts[1] - counts[0] == 2 * waits, pretend_gpu.waits


@pytest.mark.skipif(REAL or not shutil.which('bash'), reason='it runs this file')
def test_the_script_for_whoever_has_a_gpu(tmp_path):
    """Every command of it, at tiny sizes on a CPU."""
    env = os.environ | dict(TINY='1', OUT=str(tmp_path / 'out'), PYTHON=sys.executable)
    done = subprocess.run(['bash', os.path.join(ROOT, 'tests', 'on_gpu.sh')], env=env,
                          capture_output=True, text=True, timeout=400)
    assert not done.returncode, done.stdout + done.stderr
    report = json.loads((tmp_path / 'out' / 'on_gpu.json').read_text())
    steps = {step['name']: step for step in report['steps']}
    assert report['commit'] and report['torch'] and steps['debug']['samples_6.jsonl']

    def losses(name):
        return [row['loss'] for row in steps[name]['curve'] if 'loss' in row]
    assert losses('two_ranks') == pytest.approx(losses('one_rank'), rel=1e-4)
    assert losses('resumed')[:6] == losses('debug') and len(losses('resumed')) == 8
    assert 'aten::' in steps['B_eager']['report']['profile']

# --------------------------------------------------------------------------------------------------
# graphs of torch.compile, whose number does not depend on what compiles them

def compiled():
    torch._dynamo.reset()
    counters.clear()
    net = small()
    net.compile(dynamic=False, backend='eager')
    return net


@pytest.mark.parametrize('sampler', ['ode', 'sde'])
@pytest.mark.parametrize('cfg', [1.0, 2.0])
def test_one_graph_for_all_steps_of_a_sampler(sampler, cfg):
    """And one for decoding; so it is for another number of steps, but not of rows."""
    net = compiled()
    c = net.config
    for rows, graphs in ((3, 2), (3, 2), (2, 4)):
        steps = 4 + graphs
        times = torch.stack([time_grid(steps, 'logit_normal', c) for _ in range(rows)])
        generators = [torch.Generator().manual_seed(i) for i in range(rows)]
        z = generate(net, torch.randn(rows, 6, c.latent_dim), times, sampler, cfg=cfg,
                     generators=generators)
        decode(net, z, 3.0)[0]
        assert counters['stats']['unique_graphs'] == graphs and not counters['graph_break']


def test_a_graph_for_each_count_of_rows_in_training():
    """At most two counts of decode rows, and two of guesses for each."""
    net = compiled().train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        x0, tokens = torch.randn(8, 6, net.config.latent_dim), torch.ones(8, 6, dtype=torch.int64)
        draws = draw(net.config, 8, 6, generator, 'cpu')
        compute_loss(net, x0, tokens, tokens, 0 * tokens, draws)[0].backward()
    assert counters['stats']['unique_graphs'] <= 6 and not counters['graph_break']


@pytest.mark.skipif(REAL, reason='of the pretended GPU')
def test_a_tensor_on_the_wrong_device_is_seen(gpu):
    x, host = torch.ones(3).to(gpu), torch.ones(3)
    for wrong in (lambda: x + host, lambda: x[torch.tensor([0])], lambda: torch.cat((x, host)),
                  lambda: x.numpy()):
        with pytest.raises((RuntimeError, TypeError), match='of the GPU'):
            wrong()
    pretend_gpu.waits.clear()
    assert x.sum().item() == 3 and x.cpu().device.type == 'cpu' and len(pretend_gpu.waits) == 2


@pytest.mark.skipif(not REAL, reason='no GPU here')
def test_compiled_in_bfloat16_it_learns_the_same(run, tiny, tmp_path, gpu):
    fast = ['--dtype=bfloat16', '--ns_dtype=bfloat16', '--compile=true']
    for name, more in (('exact', []), ('fast', fast)):
        run('train.py', *tiny, '--max_iters=20', f'--device={gpu}', f'--out_dir={tmp_path}/{name}',
            *more)
    for a, b in zip(metrics(tmp_path / 'exact'), metrics(tmp_path / 'fast'), strict=True):
        assert a.get('loss', 0) == pytest.approx(b.get('loss', 0), rel=0.05)
