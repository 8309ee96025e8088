"""
The validation loss, the curves, and the command on a file and on a model, alone and with two ranks.
    python -m pytest -q tests/test_eval.py
"""
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_metrics import OUTPUTS, SHARED, judge, mean_entropy, needs_shared  # noqa: F401, a fixture
from transformers import AutoTokenizer

import eval as eval_py
from configurator import UserError
from parts.data import open_bins
from eval import bin_rows, estimate_loss, plot_losses, read_samples, read_series, t_edges
from model import ELF, ELFConfig, TextEncoder, draw


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


def test_validation_draws_t_from_each_bin_in_turn(validation, monkeypatch):
    c, times, real = validation[0].config, [], eval_py.compute_loss

    def watched(net, *args):
        times.append(args[-1].t)
        return real(net, *args)

    monkeypatch.setattr(eval_py, 'compute_loss', watched)
    got, edges = estimate_loss(*validation), t_edges(c)
    assert len(times) == 10 and len(got['l2_bins']) == 5
    for k, t in enumerate(times):
        assert edges[k % 5] <= t.min() and t.max() <= edges[k % 5 + 1]
    assert got['l2'] == pytest.approx(np.mean(got['l2_bins']))
    assert got['loss'] == pytest.approx(0.8 * got['l2'] + 0.2 * got['ce'])
    trained = draw(c, 20000, 1, torch.Generator().manual_seed(0), torch.device('cpu')).t
    counts = torch.histogram(trained, torch.tensor(edges)).hist
    assert (counts / 20000 - 0.2).abs().max() < 0.01, 'bins of equal probability'


def test_validation_loss_is_the_same_for_any_number_of_ranks(validation, monkeypatch):
    alone, shares = estimate_loss(*validation), []

    def gather(parts, group):
        shares.append(dict(parts))
        return shares if len(shares) == 3 else [dict.fromkeys(range(10), {})]   # the last has all

    monkeypatch.setattr(eval_py, 'gather', gather)
    together = [estimate_loss(*validation, rank, 3) for rank in range(3)][-1]
    assert together == alone and math.isfinite(alone['loss'])


def test_curves_take_the_last_line_of_an_iteration(tmp_path, capsys):
    lines = ['{"iter": 1, "l2": 5.0, "ce": null}', '{"iter": 2, "l2": 4.0}',
             '{"iter": 2, "val_l2": 9.0}', '{"iter": 3, "l2": 9.9}', '{"iter": 3, "l2": 3.',
             '{"iter": 2, "l2": 4.5}', '{"iter": 3, "l2": 3.0, "ce": 2.0}', '{"judge": "none"}',
             '[]']
    file = tmp_path / 'metrics.jsonl'
    file.write_bytes('\n'.join(lines).encode() + b'\n\x00\xff\n')
    series = read_series(file)
    assert series['l2'] == {1: 5.0, 2: 4.5, 3: 3.0} and series['val_l2'] == {2: 9.0}
    assert series['ce'] == {3: 2.0} and '3 lines are no JSON' in capsys.readouterr().out
    plot_losses(str(tmp_path))
    assert (tmp_path / 'loss.png').stat().st_size > 5000
    assert sorted(os.listdir(tmp_path)) == ['loss.png', 'metrics.jsonl']

# --------------------------------------------------------------------------------------------------
# the command on a file

@needs_shared
def test_official_de_en_scores(evaluate, tmp_path):
    """1,000 official translations and what the official code gave them, to the last digit."""
    from datasets import load_from_disk
    folder, file = os.path.join(SHARED, 'wmt14_de-en_validation_t5'), tmp_path / 'references.jsonl'
    texts = f'{OUTPUTS}/de-en_seed_42/all_generated_100_880600.jsonl'
    last = evaluate(f'--samples={texts}', f'--references={folder}', f'--out_dir={tmp_path}')
    assert last['bleu'] == 25.834093628144814
    assert last['rouge1'] == 59.04973076336025
    assert last['rouge2'] == 33.30888909160917
    assert last['rougeL'] == 53.81862131068937
    assert last['texts'] == 1000 and last['judge'] == 'none' and last['bleu_cased'] < last['bleu']
    targets = load_from_disk(folder)['target']
    file.write_text(''.join(json.dumps(dict(target=target)) + '\n' for target in targets))
    assert read_samples(texts, str(file)) == read_samples(texts, folder)


def test_references_go_by_id(tmp_path):
    texts, references = tmp_path / 'texts.jsonl', tmp_path / 'references.jsonl'
    texts.write_text('{"id": 1, "text": "a"}\n{"id": 0, "text": "b"}\n{"text": "c"}\n')
    references.write_text(''.join(f'{{"target": "{t}"}}\n' for t in 'xyz'))
    rows = read_samples(str(texts), str(references))
    assert [row['target'] for row in rows] == ['y', 'x', 'z']


@pytest.mark.parametrize('content, says', [
    (None, 'cannot read'),
    ('{"target": "a"}\n', 'line 2 has id 1, .* has 1 rows'),
    ('{"input": "a"}\n{"target": "b"}\n', 'needs a text'),
])
def test_references_that_do_not_fit(evaluate, tmp_path, content, says):
    texts, references = tmp_path / 'texts.jsonl', tmp_path / 'references.jsonl'
    texts.write_text('{"generated": "a"}\n{"generated": "b"}\n')
    if content:
        references.write_text(content)
    with pytest.raises(UserError, match=says):
        evaluate(f'--samples={texts}', f'--references={references}', f'--out_dir={tmp_path}')


def test_scores_a_file(evaluate, bins, judge, tmp_path):
    file = tmp_path / 'texts.jsonl'
    args = [f'--samples={file}', f'--out_dir={tmp_path}']
    file.write_text('{"text": "ab ba"}\n\n{"generated": ""}\n{"generated": "\\u001b[2J aaaa"}\n')
    with pytest.raises(UserError, match='name its bins'):
        evaluate(*args, '--judge=ngram')

    last = evaluate(*args, f'--data_dir={bins}', '--dataset=tiny', '--judge=ngram')
    assert last['texts'] == 3 and last['empty'] == 1 and last['real']['texts'] == 3
    worst, best = last['unigram']['nats_per_char'], last['real']['nats_per_char']
    gap = (worst - last['nats_per_char']) / (worst - best)
    worst, best = last['unigram']['nats_per_token'], last['real']['nats_per_token']
    tokens = (worst - last['nats_per_token']) / (worst - best)
    assert last['gap_closed_tokens'] == pytest.approx(tokens)
    assert last['gap_closed'] == pytest.approx(gap)
    own = mean_entropy(str(bins / 'tiny' / 'tokenizer'), ['ab ba', '', '\x1b[2J aaaa'])
    assert last['entropy_own'] == pytest.approx(own)
    assert last['copied_max'] == 0 and last['long_words'] is None
    for name in ('samples', 'real', 'unigram'):
        assert evaluate.out.count(f'\n{name} ') == 1
    assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == last

    last = evaluate(*args, f'--judge={judge}')
    assert last['gen_ppl'] > 1 and last['tokens'] > 0 and 'words' not in last
    file.write_text('{"generated": " "}\n')
    assert evaluate(*args, f'--judge={judge}')['gen_ppl'] is None, 'JSON has no nan'
    file.write_text('{"generated": "a b", "target": "a b"}\n')
    assert evaluate(*args)['bleu'] == pytest.approx(100)


def test_sees_copies_of_the_training_text(evaluate, bins, tmp_path):
    meta = open_bins(str(bins), 'tiny')
    tokenizer = AutoTokenizer.from_pretrained(meta['tokenizer'])
    rows = [tokenizer.decode(ids) for ids in bin_rows(meta, 'train', 96, 13)]
    line = ' '.join(' '.join(rows[5:9]).split())        # across rows, which are packed in order
    (tmp_path / 'texts.jsonl').write_text(json.dumps(dict(text='zz ' + line + ' zz')) + '\n')
    last = evaluate(f"--samples={tmp_path / 'texts.jsonl'}", f'--out_dir={tmp_path}',
                    f'--data_dir={bins}', '--dataset=tiny', '--judge=none')
    assert last['words'] == 1 and last['copied_max'] == last['copied_median'] == len(line) + 2
    assert last['real']['copied_max'] < len(line)


@pytest.mark.parametrize('text, said', [
    ('{"generated": "a"}\n{"gener', 'line 2'),
    ('{"generated": 3}\n', 'line 1'),
    ('[]', 'line 1'),
    ('\n', 'no texts'),
    ('{"text": "a", "target": "b"}\n{"text": "a"}', 'line 2'),
    ('{"text": "a"}\n"\xff"', 'line 2'),
])
def test_broken_file_is_one_line(evaluate, tmp_path, text, said):
    (tmp_path / 'bad.jsonl').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=said):
        evaluate(f"--samples={tmp_path / 'bad.jsonl'}", f'--out_dir={tmp_path}')


def test_only_the_first_rank_scores_a_file(evaluate, tmp_path, monkeypatch):
    (tmp_path / 'texts.jsonl').write_text('{"text": "a", "target": "a"}\n')
    monkeypatch.setenv('WORLD_SIZE', '2')
    args = [f"--samples={tmp_path / 'texts.jsonl'}", f'--out_dir={tmp_path}']
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(SystemExit) as end:
        evaluate(*args)
    assert not end.value.code and not (tmp_path / 'metrics.jsonl').exists()
    monkeypatch.setenv('RANK', '0')
    assert evaluate(*args)['texts'] == 1


def test_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.jsonl').write_text('{"generated": "a"}\n{"gener')
    got = eval_command('--samples=bad.jsonl')
    assert got.returncode == 1 and got.stderr.count('\n') == 1
    assert 'bad.jsonl, line 2' in got.stderr


@pytest.mark.parametrize('arg', ['num_samples=0', 'batch_size=0', 'judge_batch_size=0', 'seed=-1',
                                 'eval_iters=-1', 'seeds=1,', 'seeds=1.5'])
def test_settings_out_of_range(evaluate, arg):
    with pytest.raises(UserError, match=arg.partition('=')[0]):
        evaluate('--' + arg)

# --------------------------------------------------------------------------------------------------
# the command on a model

def test_samples_a_model(evaluate, trained, tmp_path):
    last = evaluate(*trained)
    assert last['nfe'] == last['steps'] == 4 and last['texts'] == 6 and last['val']['loss'] > 0
    with open(tmp_path / 'samples_eval.jsonl', encoding='utf-8') as f:
        assert [json.loads(line)['id'] for line in f] == list(range(6))
    assert f"val loss {last['val']['loss']:.4f}" in evaluate.out
    columns = {'words', 'long_words', 'copied_median', 'copied_max'}
    assert columns < last.keys() and columns < last['real'].keys()

    # what is held against the texts depends on seed, not on seeds
    for seeds in ('7,8', '8,9'):
        several = evaluate(*trained, f'--seeds={seeds}')
        assert several['unigram'] == last['unigram'] and several['real'] == last['real']
        assert several.keys() - last.keys() == {'seeds', 'stderr', 'by_seed'}
    by_seed = [several['by_seed'][s]['nats_per_char'] for s in '89']
    assert several['nats_per_char'] == pytest.approx(np.mean(by_seed)) and len(set(by_seed)) == 2
    assert (tmp_path / 'samples_eval_9.jsonl').exists()


def test_says_which_sampler_holds(evaluate, trained, tmp_path):
    change_settings(tmp_path, by_steps={2: dict(gamma=0.25)})
    args = [*trained, '--num_samples=1', '--eval_iters=0']
    assert evaluate(*args, '--steps=2')['gamma'] == 0.25
    assert 'steps=2' in evaluate.out and 'gamma=0.25' in evaluate.out and 'NFE=2' in evaluate.out
    assert evaluate(*args, '--steps=2', '--gamma=1')['gamma'] == 1
    assert evaluate(*args)['gamma'] == 1.5 and evaluate(*args, '--steps=1')['gamma'] == 0


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
    with pytest.raises(UserError, match='vocab_size is 30 .* 31 in'):
        evaluate(*trained, f"--data_dir={tmp_path / 'data'}", '--dataset=other')


def test_two_ranks_write_what_one_writes(evaluate, trained, judge, tmp_path):
    trained += [f'--judge={judge}']
    alone = evaluate(*trained)
    texts = (tmp_path / 'samples_eval.jsonl').read_bytes()
    got = eval_command(*trained, ranks=2)
    assert got.returncode == 0, got.stderr
    together = json.loads(got.stdout.splitlines()[-1])
    # torchrun gives each rank one thread, which sums products in another order
    near = {k: pytest.approx(alone[k], rel=1e-5) for k in ('gen_ppl', 'gen_ppl_port')}
    near['val'] = {k: pytest.approx(x, rel=1e-5) for k, x in alone['val'].items()}
    assert together | dict(seconds=0) == alone | dict(seconds=0) | near
    assert (tmp_path / 'samples_eval.jsonl').read_bytes() == texts and 'ranks: 2' in got.stdout


def test_ranks_wait_while_the_first_one_downloads_the_judge(evaluate, trained, judge, monkeypatch):
    calls, join = [], torch.distributed.init_process_group

    def watched(*args, **kwargs):
        calls.append(kwargs['timeout'].total_seconds())
        return join(*args, **kwargs)

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    rank = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    for name, value in rank.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, 'init_process_group', watched)
    assert evaluate(*trained, f'--judge={judge}')['texts'] == 6
    assert calls and min(calls) >= 3600


def test_a_missing_judge_shows_before_the_sampling(evaluate, trained, tmp_path):
    with pytest.raises(UserError, match='--judge=ngram needs no download'):
        evaluate(*trained, f'--judge={tmp_path}')
    assert not (tmp_path / 'samples_eval.jsonl').exists()
