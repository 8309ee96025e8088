"""
The validation loss, the curves, and the command on a file and on a model, alone and with two ranks.
    python -m pytest -q tests/test_eval.py
"""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from test_metrics import (OUTPUTS, SHARED, judge, link_gpt2, mean_entropy,  # noqa: F401, a fixture
                          needs_shared)
from transformers import AutoTokenizer

import eval as eval_py
import sample
from configurator import UserError
from parts.data import open_bins
from eval import estimate_loss, mean_over_ranks, plot_losses, read_samples, write_few
from model import ELF, ELFConfig, TextEncoder, compute_loss, draw


@pytest.fixture
def evaluate(run, bins):
    """evaluate(*args) -> the JSON of the last line; the whole output is left in evaluate.out."""
    def evaluate(*args):
        evaluate.out = run('eval.py', '--device=cpu', *args)
        return json.loads(evaluate.out.splitlines()[-1])
    return evaluate


@pytest.fixture
def trained(run, tiny, bins, tmp_path):
    """Arguments of eval.py for a model that has seen four batches, in tmp_path."""
    run('train.py', *tiny, f'--out_dir={tmp_path}')
    return [f'--out_dir={tmp_path}', f'--data_dir={bins}', '--dataset=tiny', '--dtype=float32',
            '--judge=ngram', '--num_samples=6', '--batch_size=4', '--eval_iters=5']


def change_settings(out_dir, **settings):
    """In the model_args of a checkpoint of ours."""
    ckpt = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    ckpt['model_args'] |= settings
    torch.save(ckpt, out_dir / 'ckpt.pt')


def eval_command(*args, ranks=0):
    """A process, or a torchrun of several."""
    launch = [sys.executable]
    if ranks:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    return subprocess.run([*launch, os.path.join(ROOT, 'eval.py'), '--device=cpu', *args],
                          capture_output=True, text=True)

# --------------------------------------------------------------------------------------------------
# the validation loss and the curves

@pytest.fixture
def validation(bins):
    """Arguments of estimate_loss for a small network."""
    meta = open_bins(str(bins), 'tiny')
    torch.manual_seed(0)
    net = ELF(ELFConfig(n_layer=1, n_embd=32, n_head=2, bottleneck=8, vocab_size=30, latent_dim=16,
                        max_length=13))
    return net, TextEncoder(meta['encoder'], 0.0, 1.0), meta, 7, 8, torch.device('cpu')


def test_validation_draws_t_from_each_fifth_in_turn(validation):
    c, times = validation[0].config, []

    def watched(net, *args):
        times.append(args[-1].t)
        return compute_loss(net, *args)

    got = estimate_loss(*validation, watched)
    trained = draw(c, 20000, 1, torch.Generator().manual_seed(0), torch.device('cpu')).t
    edges = [0, *trained.quantile(torch.arange(1, 5) / 5).tolist(), 1]
    assert len(times) == 10 and len(got['l2_bins']) == 5
    for k, t in enumerate(times):
        assert edges[k % 5] - 0.01 <= t.min() and t.max() <= edges[k % 5 + 1] + 0.01
    assert got['l2'] == pytest.approx(np.mean(got['l2_bins']))
    assert got['loss'] == pytest.approx(0.8 * got['l2'] + 0.2 * got['ce'])
    assert got == estimate_loss(*validation)


def test_what_is_not_finite_shows_in_the_means(validation):
    """A branch without rows has no part in a mean; a loss that is no number has."""
    one, three, nan = map(torch.tensor, (1.0, 3.0, math.nan))
    parts = [dict(l2=one, ce=three), dict(l2=nan), dict(ce=one)]
    means = mean_over_ranks(parts)
    assert list(means) == ['l2', 'ce'] and math.isnan(means['l2']) and means['ce'] == 2

    def diverged(net, *args):
        return None, dict(l2=nan, ce=one)
    got = estimate_loss(*validation, diverged)
    assert math.isnan(got['loss']) and got['ce'] == 1 and np.isnan(got['l2_bins']).all()
    got = estimate_loss(*validation, lambda net, *args: (None, dict(ce=one)))
    assert len(got['l2_bins']) == 5 and math.isnan(got['l2']) and got['ce'] == 1


def test_validation_loss_is_the_same_for_any_number_of_ranks(validation, monkeypatch):
    alone, shares = estimate_loss(*validation), []

    def gather(share):
        shares.append(share)
        return shares if len(shares) == 3 else [[]]     # the last rank has all

    monkeypatch.setattr(eval_py, 'gather', gather)
    for rank in range(3):
        monkeypatch.setattr(eval_py, 'rank_and_world', lambda: (rank, 3))
        together = estimate_loss(*validation)
    assert together == alone and math.isfinite(alone['loss'])


def test_a_few_texts_of_a_set_of_ids_with_conditions_alone(validation, bins, tmp_path):
    """There is no val.jsonl: the conditions are in the bins."""
    net, encoder, meta, *_ = validation
    shutil.copytree(bins / 'tiny', tmp_path / 'pairs')
    index = np.load(tmp_path / 'pairs' / 'val.idx.npy')
    index[:, 1] += 3
    np.save(tmp_path / 'pairs' / 'val.idx.npy', index)
    net.config = dataclasses.replace(net.config, max_input_length=5, steps=2,
                                     tokenizer=meta['tokenizer'])
    ids = np.fromfile(tmp_path / 'pairs' / 'val.bin', np.uint16)[:3]
    write_few(net.eval(), encoder, meta | dict(dir=str(tmp_path / 'pairs')),
              str(tmp_path / 'few.jsonl'), 1)
    with open(tmp_path / 'few.jsonl', encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    assert [row['id'] for row in rows] == [0, 1, 2, 3] and 'ids' not in rows[0]
    assert rows[0]['input'] == ''.join('abcd'[i - 4] for i in ids)


def test_curves_take_the_last_line_of_an_iteration(tmp_path, capsys, monkeypatch):
    lines = ['{"iter": 1, "l2": 5.0, "ce": null}', '{"iter": 2, "l2": 4.0}',
             '{"iter": 2, "val_l2": 9.0}', '{"iter": 3, "l2": 9.9}', '{"iter": 3, "l2": 3.',
             '{"iter": 2, "l2": 4.5}', '{"iter": 3, "l2": 3.0, "ce": 2.0}', '{"judge": "none"}',
             '[]']
    file = tmp_path / 'metrics.jsonl'
    file.write_bytes('\n'.join(lines).encode() + b'\n\x00\xff\n')
    pictures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, file: (
        pictures.append(self), real(self, file)))
    plot_losses(str(tmp_path))
    lines = [line for axis in pictures[0].axes for line in axis.lines]
    drawn = [{x: y for x, y in zip(*line.get_data()) if y > 0} for line in lines]
    assert drawn == [{1: 5.0, 2: 4.5, 3: 3.0}, {2: 9.0}, {3: 2.0}, {}]  # l2, ce; train, validation
    assert capsys.readouterr().out.count('no JSON') == 3
    assert (tmp_path / 'loss.png').stat().st_size > 5000
    assert sorted(os.listdir(tmp_path)) == ['loss.png', 'metrics.jsonl']

# --------------------------------------------------------------------------------------------------
# the command on a file

@needs_shared
def test_official_de_en_scores(evaluate, tmp_path):
    """1,000 official translations and what the official code gave them, to the last digit."""
    from datasets import load_from_disk
    pairs = load_from_disk(os.path.join(SHARED, 'wmt14_de-en_validation_t5'))
    file = tmp_path / 'val.jsonl'       # as prepare.py writes it
    file.write_text(''.join(json.dumps(dict(input=row['input'], target=row['target'])) + '\n'
                            for row in pairs.select_columns(['input', 'target'])))
    texts = f'{OUTPUTS}/de-en_seed_42/all_generated_100_880600.jsonl'
    last = evaluate(f'--samples={texts}', f'--input_file={file}', f'--out_dir={tmp_path}')
    assert last['bleu'] == 25.834093628144814
    assert last['rouge1'] == 59.04973076336025
    assert last['rouge2'] == 33.30888909160917
    assert last['rougeL'] == 53.81862131068937
    assert last['texts'] == 1000 and last['judge'] == 'none' and 0 < last['exact'] < 0.1


@needs_shared
def test_entropy_in_gpt2s_tokens_without_gpt2(evaluate, tmp_path):
    """As a reproduction published it."""
    link_gpt2(tmp_path)
    last = evaluate(f'--samples={OUTPUTS}/ugness_lightning/epoch_004.jsonl', '--judge=none',
                    f'--gpt2={tmp_path}', f'--out_dir={tmp_path}')
    assert last['entropy'] == pytest.approx(5.157374851007953, rel=1e-7)
    assert 0.9 < last['distinct_4_judge'] < 1 and 'gen_ppl' not in last
    assert ' distinct_4_judge ' in evaluate.out


def test_targets_go_by_id(tmp_path):
    texts, pairs = tmp_path / 'texts.jsonl', tmp_path / 'pairs.jsonl'
    texts.write_text('{"id": 1, "text": "a"}\n{"id": "0", "text": "b"}\n{"text": "c"}\n')
    pairs.write_text(''.join(f'{{"input": "", "output": "{t}"}}\n' for t in 'xyz'))
    rows = read_samples(str(texts), str(pairs))
    assert [row['target'] for row in rows] == ['y', 'x', 'z']


@pytest.mark.parametrize('content, says', [
    (None, 'cannot read'),
    ('{"input": "", "target": "a"}\n', "not each text has a 'target'"),
    ('{"input": "a"}\n{"input": "", "target": "b"}\n', "not each text has a 'target'"),
])
def test_targets_that_do_not_fit(evaluate, tmp_path, content, says):
    texts, pairs = tmp_path / 'texts.jsonl', tmp_path / 'pairs.jsonl'
    texts.write_text('{"generated": "a"}\n{"generated": "b"}\n')
    if content:
        pairs.write_text(content)
    with pytest.raises(UserError, match=says):
        evaluate(f'--samples={texts}', f'--input_file={pairs}', f'--out_dir={tmp_path}/out')
    assert not (tmp_path / 'out').exists()


def test_scores_a_file(evaluate, bins, judge, tmp_path):
    file = tmp_path / 'texts.jsonl'
    args = [f'--samples={file}', f'--out_dir={tmp_path}']
    file.write_text('{"text": "ab ba"}\n\n{"generated": ""}\n{"generated": "\\u001b[2J aaaa"}\n')
    with pytest.raises(UserError, match='name its bins'):
        evaluate(*args, '--judge=ngram')

    last = evaluate(*args, f'--data_dir={bins}', '--dataset=tiny', '--judge=ngram')
    assert last['texts'] == 3 and last['empty'] == 1 and last['real']['texts'] == 3
    for key in ('nats_per_char', 'nats_per_token'):
        assert last[key] > last['real'][key] > 0
    own = mean_entropy(str(bins / 'tiny' / 'tokenizer'), ['ab ba', '', '\x1b[2J aaaa'])
    assert last['entropy_own'] == pytest.approx(own)
    for name in ('samples', 'real'):
        assert evaluate.out.count(f'\n{name} ') == 1
    assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == last

    last = evaluate(*args, f'--judge={judge}')
    assert last['gen_ppl'] > 1 and last['tokens'] > 0 and 'real' not in last
    file.write_text('{"generated": " "}\n')
    assert evaluate(*args, f'--judge={judge}')['gen_ppl'] is None, 'JSON has no nan'
    file.write_text('{"generated": "a b", "target": "a b"}\n')
    assert evaluate(*args)['bleu'] == pytest.approx(100)


@pytest.mark.parametrize('text, said', [
    ('{"generated": "a"}\n{"gener', 'line 2'),
    ('{"generated": 3}\n', 'line 1'),
    ('[]', 'line 1'),
    ('\n', 'no lines'),
    ('{"text": "a", "target": "b"}\n{"text": "a"}', "not each text has a 'target'"),
    ('{"text": "a", "target": 3}', "not each text has a 'target'"),
    ('{"text": "a"}\n"\xff"', 'line 2'),
])
def test_broken_file_is_one_line(evaluate, tmp_path, text, said):
    (tmp_path / 'bad.jsonl').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=said):
        evaluate(f"--samples={tmp_path / 'bad.jsonl'}", f'--out_dir={tmp_path}')


def test_only_the_first_rank_scores_a_file(tmp_path):
    (tmp_path / 'texts.jsonl').write_text('{"text": "a", "target": "a"}\n')
    args = [f"--samples={tmp_path / 'texts.jsonl'}", f'--out_dir={tmp_path}']
    got = eval_command(*args, ranks=2)
    assert got.returncode == 0, got.stderr
    assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 1
    assert json.loads(got.stdout.splitlines()[-1])['exact'] == 1


def test_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.jsonl').write_text('{"generated": "a"}\n{"gener')
    got = eval_command('--samples=bad.jsonl')
    assert got.returncode == 1 and got.stderr.count('\n') == 1
    assert 'bad.jsonl, line 2' in got.stderr


@pytest.mark.parametrize('arg', ['num_samples=0', 'batch_size=0', 'seed=-1',
                                 'eval_iters=-1', 'seeds=1,x', 'seeds=1.5', 'steps=0',
                                 'sampler=sdf', 'seeds=1,-2', 'gamma=-2'])
def test_settings_out_of_range(evaluate, arg):
    with pytest.raises(UserError, match=arg.partition('=')[0]):
        evaluate('--' + arg)


@pytest.mark.parametrize('arg', ['sweep=steps=4,8', 'init_from=org/elf', 'steps=4', 'cfg=2',
                                 'num_samples=5', 'seeds=1,2', 'compile=true'])
def test_texts_that_exist_are_not_sampled(evaluate, tmp_path, arg):
    (tmp_path / 'x.jsonl').write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match='is read only without samples;'):
        evaluate(f'--samples={tmp_path}/x.jsonl', '--' + arg)

# --------------------------------------------------------------------------------------------------
# the command on a model

def test_samples_a_model(evaluate, trained, tmp_path):
    last = evaluate(*trained)
    assert last['steps'] == 4 and last['texts'] == 6 and last['val']['loss'] > 0
    with open(tmp_path / 'samples_eval.jsonl', encoding='utf-8') as f:
        assert [json.loads(line)['id'] for line in f] == list(range(6))
    assert f"val loss {last['val']['loss']:.4f}" in evaluate.out
    assert last['real']['texts'] == 6 and "l2 by fifths" in evaluate.out

    # what is held against the texts depends on seed, not on seeds
    for seeds in ('7,8', '8,9'):
        several = evaluate(*trained, f'--seeds={seeds}')
        assert several['real'] == last['real'] and several['seeds'] == seeds
        assert several.keys() - last.keys() == {'stderr', 'by_seed'}
    by_seed = [row['nats_per_char'] for row in several['by_seed']]
    assert several['nats_per_char'] == pytest.approx(np.mean(by_seed)) and len(set(by_seed)) == 2
    assert (tmp_path / 'samples_eval_9.jsonl').exists()


def test_says_which_sampler_holds(evaluate, trained, tmp_path):
    change_settings(tmp_path, by_steps={2: dict(gamma=0.25)})
    args = [*trained, '--num_samples=1', '--eval_iters=0']
    assert evaluate(*args, '--steps=2')['gamma'] == 0.25
    assert "'steps': 2" in evaluate.out and "'gamma': 0.25" in evaluate.out
    assert evaluate(*args, '--steps=2', '--gamma=1')['gamma'] == 1
    assert evaluate(*args)['gamma'] == 1.5 and evaluate(*args, '--steps=3')['gamma'] == 0


def test_refuses_a_tokenizer_of_other_sizes(evaluate, trained, bins, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bins / 'tiny' / 'tokenizer')
    tokenizer.add_tokens(['more'])
    tokenizer.save_pretrained(tmp_path / 'larger')
    change_settings(tmp_path, tokenizer=str(tmp_path / 'larger'))
    with pytest.raises(UserError, match='31 ids, the model.* 30'):
        evaluate(*trained)


def test_refuses_bins_of_another_vocabulary(evaluate, trained, bins, tmp_path):
    shutil.copytree(bins / 'tiny', tmp_path / 'data' / 'other')
    meta = json.loads((bins / 'tiny' / 'meta.json').read_text())
    (tmp_path / 'data' / 'other' / 'meta.json').write_text(json.dumps(meta | dict(vocab_size=31)))
    with pytest.raises(UserError, match='vocab_size is 30 there, and 31 by'):
        evaluate(*trained, f"--data_dir={tmp_path / 'data'}", '--dataset=other')


def test_two_ranks_write_what_one_writes(evaluate, trained, judge, tmp_path):
    trained += [f'--judge={judge}']
    alone = evaluate(*trained)
    texts = (tmp_path / 'samples_eval.jsonl').read_bytes()
    got = eval_command(*trained, ranks=2)
    assert got.returncode == 0, got.stderr
    together = json.loads(got.stdout.splitlines()[-1])
    # torchrun gives each rank one thread, which sums products in another order
    near = dict(gen_ppl=pytest.approx(alone['gen_ppl'], rel=1e-5))
    near['val'] = {k: pytest.approx(x, rel=1e-5) for k, x in alone['val'].items()}
    assert together == alone | near
    assert (tmp_path / 'samples_eval.jsonl').read_bytes() == texts and 'ranks: 2' in got.stdout


def test_an_interrupted_evaluation_leaves_its_texts(run, evaluate, trained, tmp_path, monkeypatch):
    evaluate(*trained)
    whole, calls, real = (tmp_path / 'samples_eval.jsonl').read_text(), [], sample.generate

    def generate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sample, 'generate', generate)
        evaluate(*trained)
    left = (tmp_path / 'samples_eval.jsonl').read_text()
    assert left.count('\n') == 4 and whole.startswith(left)
    args = ['--device=cpu', '--judge=none', f'--out_dir={tmp_path}/scored']
    run('eval.py', f'--samples={tmp_path}/samples_eval.jsonl', *args)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'sweep.jsonl'])
def test_what_cannot_be_written_shows_before_the_sampling(evaluate, trained, tmp_path, name):
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=name):      # one line, see one_line_errors
        evaluate(*trained, *(['--sweep=steps=2,3'] if name == 'sweep.jsonl' else []))
    assert not (tmp_path / 'samples_eval.jsonl').exists()


def test_conditions_for_a_model_without(evaluate, trained, tmp_path):
    (tmp_path / 'x.jsonl').write_text('{"input": "a"}\n')
    with pytest.raises(UserError, match='without conditions; --dataset or --input_file'):
        evaluate(*trained, f'--input_file={tmp_path}/x.jsonl')
    for cfg in ('--cfg=2', '--sweep=cfg=1,2'):
        with pytest.raises(UserError, match='cfg=2.0: .* without conditions'):
            evaluate(*trained, cfg)


@pytest.mark.parametrize('sampler', ['ode', 'sde'])
def test_compiled_one_graph_serves_all_steps(evaluate, trained, monkeypatch, sampler):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def compile_in_place(module, device):
        module.compile(backend=backend, dynamic=False)
        return True

    args = [*trained, '--eval_iters=0', '--num_samples=4', f'--sampler={sampler}']
    plain = evaluate(*args)
    torch._dynamo.reset()
    monkeypatch.setattr(sample, 'compile_in_place', compile_in_place)
    compiled = evaluate(*args, '--compile=true')
    assert compiled['steps'] == 4 and len(graphs) == 2, 'one for the steps, one for the tokens'
    assert compiled['nats_per_char'] == pytest.approx(plain['nats_per_char'])


def test_a_missing_judge_shows_before_the_sampling(evaluate, trained, tmp_path):
    with pytest.raises(UserError, match='--judge=ngram needs no download'):
        evaluate(*trained, f'--judge={tmp_path}')
    assert not (tmp_path / 'samples_eval.jsonl').exists()


def test_a_refusal_leaves_nothing_behind(evaluate, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'texts.jsonl').write_text('{"text": "a"}\n')
    before = sorted(os.listdir(tmp_path))
    for args in (['--samples=texts.jsonl', '--judge=none/there'], ['--init_from=none/there'], []):
        with pytest.raises(UserError, match='none/there' if args else 'no model in out'):
            evaluate(*args)
    assert sorted(os.listdir(tmp_path)) == before
