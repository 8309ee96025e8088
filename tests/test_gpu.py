"""
Where there is a GPU, on it; else on the pretended one of pretend_gpu.py: the numbers of the CPU, training, evaluation, bench.py, no waiting in the loop.
    python -m pytest -q tests/test_gpu.py
"""
import warnings
from dataclasses import replace

import pretend_gpu
import pytest
import torch
from test_model import batch, rel, small
from test_tasks import SMALL, last_json, prepare, toy  # noqa: F401, toy is a fixture
from test_train import metrics

import model as elf
from model import compute_loss
from sample import decode_ids, generate, time_grid
from train import make_optimizer

REAL = torch.cuda.is_available()


@pytest.fixture
def gpu(monkeypatch):
    """The device's name for --device and .to()."""
    if REAL:
        torch.set_float32_matmul_precision('highest')
        yield 'cuda'
    else:
        warnings.filterwarnings('ignore', 'for .*: copying from a non-meta parameter')      # torch takes it for its own meta device
        pretend_gpu.install(monkeypatch)
        with pretend_gpu.Pretend():
            yield 'meta'


def test_numbers_are_those_of_the_cpu(gpu):
    def numbers(device):
        net, there = small().to(device), lambda x: x.to(device)
        x0, tokens, mask, cond, draws = batch(small(), is_decode=[0, 0, 1, 0, 1, 0], self_cond=[1, 0, 0, 1, 0, 0])
        draws = replace(draws, **{k: there(v) for k, v in vars(draws).items() if v.dtype != torch.bool})        # its flags stay on the CPU
        loss, _ = compute_loss(net, there(x0), there(tokens), there(mask), there(cond), draws)
        loss.backward()
        grads = [p.grad.clone() for p in net.parameters()]
        make_optimizer(net.named_parameters(), 0.01).step()
        how = dict(cfg=2.0, cond=there(x0), cond_mask=there(cond), step_noise=there(torch.randn(3, *x0.shape, generator=torch.Generator().manual_seed(2))))
        z = generate(net, 2 * there(x0.flip(0)), time_grid(4, 'quantile', net.config), **how)
        return [x.detach().cpu() for x in (loss, *grads, *net.parameters(), z, decode_ids(net, z, 3.0))]
    for ours, theirs in zip(numbers(gpu), numbers('cpu')):
        assert rel(ours, theirs) < (1e-4 if REAL else 1e-5)


@pytest.mark.parametrize('more', [['--ns_dtype=bfloat16', '--gradient_accumulation_steps=2'], ['--optimizer=adamw', '--recompute=true']])
def test_training_resumes_where_it_stood(run, tiny, tmp_path, gpu, more):
    how = ['train.py', *tiny, *more, f'--device={gpu}', '--eval_interval=2', '--sample_interval=2']
    run(*how, '--max_iters=4', f'--out_dir={tmp_path}/whole')
    run(*how, '--max_iters=2', f'--out_dir={tmp_path}/parts')
    run(*how, '--max_iters=4', f'--out_dir={tmp_path}/parts', '--init_from=resume')
    for a, b in zip(metrics(tmp_path / 'whole'), metrics(tmp_path / 'parts'), strict=True):
        losses = lambda row: {k: v for k, v in row.items() if 'loss' in k}
        assert losses(a) == (pytest.approx(losses(b), rel=1e-4) if REAL else losses(b))


def test_a_task_from_pairs_to_bleu(run, toy, tmp_path, gpu):  # noqa: F811
    pretend_gpu.waits.clear()
    pairs, data = toy / 'pairs.jsonl', [f'--data_dir={tmp_path}', '--dataset=pairs', f'--out_dir={tmp_path}/out', f'--device={gpu}']
    prepare(run, tmp_path, pairs, f'--tokenizer={toy}/tokenizer')
    run('train.py', *SMALL, *data, '--max_length=24', '--n_embd=32', '--batch_size=8', '--max_iters=3', '--sample_interval=3')
    few = tmp_path / 'few.jsonl'        # goes before the set's own
    few.write_text(''.join(open(pairs).readlines()[:5]))
    score = last_json(run('eval.py', *data, f'--input_file={few}', '--dtype=float32', '--eval_iters=2', '--batch_size=16'))
    assert score['texts'] == 5 and score['bleu'] >= 0 and (REAL or pretend_gpu.waits)
    if REAL:
        run('sample.py', f'--out_dir={tmp_path}/out', f'--input_file={pairs}', '--trace=3', '--compile=true')


def test_benchmark(run, monkeypatch, gpu):
    monkeypatch.setitem(elf.MODELS, 'ELF-B', elf.ELFConfig(n_layer=2, n_embd=64, n_head=2, vocab_size=100))
    report = last_json(run('bench.py', '--batch_size=4', '--max_length=16', '--sample_length=16', '--runs=1', f'--device={gpu}', f'--compile={str(REAL).lower()}'))
    assert ('cuda' if REAL else 'pretended') in report['device'] and report['train'][0]['step_ms'] > 0 and report['sample']['samples_per_s'] > 0


@pytest.mark.skipif(REAL, reason='counted on the pretended GPU')
def test_the_loop_waits_once_a_step(run, tiny, tmp_path, gpu):
    counts = []
    for steps in (2, 6):
        pretend_gpu.waits.clear()
        run('train.py', *tiny, '--log_interval=100', f'--max_iters={steps}', f'--out_dir={tmp_path}/{steps}')
        counts.append(len(pretend_gpu.waits))
    # for the norm of the gradient, which must be finite
    assert counts[1] - counts[0] == 4, pretend_gpu.waits


@pytest.mark.skipif(REAL, reason='of the pretended GPU')
def test_a_tensor_on_the_wrong_device_is_seen(gpu):
    x, host = torch.ones(3).to(gpu), torch.ones(3)
    for wrong in (lambda: x + host, lambda: x[torch.tensor([0])], lambda: torch.cat((x, host)), lambda: x.numpy()):
        with pytest.raises((RuntimeError, TypeError), match='of the GPU'):
            wrong()
    pretend_gpu.waits.clear()
    assert x.sum().item() == 3 and x.cpu().device.type == 'cpu' and len(pretend_gpu.waits) == 2


@pytest.mark.skipif(not REAL, reason='no GPU here')
def test_compiled_in_bfloat16_it_learns_the_same(run, tiny, tmp_path, gpu):
    for name, more in dict(exact=[], fast=['--dtype=bfloat16', '--ns_dtype=bfloat16', '--compile=true']).items():
        run('train.py', *tiny, '--max_iters=20', f'--device={gpu}', f'--out_dir={tmp_path}/{name}', *more)
    for a, b in zip(metrics(tmp_path / 'exact'), metrics(tmp_path / 'fast'), strict=True):
        assert a.get('loss', 0) == pytest.approx(b.get('loss', 0), rel=0.05)
