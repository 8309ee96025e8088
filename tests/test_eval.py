"""
Each metric against numbers by hand, the perplexity against plain Hugging Face, the command on a
file and on a model, alone and with two ranks.
    python -m pytest -q tests/test_eval.py
"""
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import eval as eval_py
from configurator import UserError
from data import open_bins
from eval import (bin_rows, bleu, copied, distinct, duplicates, entropy, estimate_loss, gen_ppl,
                  gpt2_bpe, judge_ids, ngram_nats, ngram_p, over_runs, plot_losses, print_table,
                  read_samples, read_series, repetition, rouge, t_edges, train_ngram, words)
from model import ELF, ELFConfig, TextEncoder, draw

SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')
OUTPUTS = os.path.join(SHARED, 'official_outputs')
EOT = '<|endoftext|>'
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason=f'needs {SHARED}')


@pytest.fixture(scope='session')
def judge(tmp_path_factory):
    """A folder with a random GPT-2 of one layer and a BPE of 256 bytes, EOT, 'he', 'llo', 'Ġhe'."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    folder = tmp_path_factory.mktemp('judge')
    merges = ['h e', 'l l', 'll o', 'Ġ he']
    # EOT first: an unusual order of ids
    tokens = [EOT, *sorted(bytes_to_unicode().values()), *(m.replace(' ', '') for m in merges)]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)})
    (folder / 'vocab.json').write_text(vocab, encoding='utf-8')
    lines = '\n'.join(['#version: 0.2', *merges, ''])
    (folder / 'merges.txt').write_text(lines, encoding='utf-8')
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokens), n_embd=16, n_layer=1, n_head=2, n_positions=24,
                        initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


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
# metrics

def test_entropy():
    assert entropy([]) == 0 and entropy([7, 7, 7]) == 0
    assert entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert entropy([1, 1, 1, 2]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_repetition_duplicates_distinct():
    phrase = [1, 2, 3, 4, 5]
    assert repetition([phrase * 2 + [9]]) == 0          # twice is no repetition yet
    thrice = phrase + [8] + phrase + [9] + phrase + [6]
    assert repetition([thrice]) == pytest.approx(15 / 18)
    # overlapping ones count, tokens once
    assert repetition([[7] * 7, [0] * 3]) == pytest.approx(7 / 10)
    # within a text; across: duplicates
    assert repetition([phrase, phrase, phrase]) == 0 and repetition([]) == 0
    assert duplicates(['a', 'b', 'a', 'a']) == 0.5 and duplicates([]) == 0
    two = [[1, 2, 3, 4, 5], [1, 2, 3, 4]]
    assert distinct(two) == pytest.approx(2 / 3)
    assert distinct(two, limit=8) == 1 and distinct([[1]]) == 0


def test_words():
    known = {'cat', 'sat', 'there'}
    # inner: cat sot there / sat; the ends may be cut
    assert words(['e cat sot there zz', 'x sat'], known) == (2 / 3, 1.0)
    assert words(['e cat sat onto ca'], known) == (2 / 3, 0.0)
    assert all(math.isnan(share) for share in words(['two words', ''], known))


def test_copied():
    training = 'the quick brown fox jumps over the lazy dog'
    texts = ['a quick brown cat', 'the lazy  cat jumps\nover the dog', 'nothing', '', training * 2]
    #             ' quick brown '    ' jumps over the '
    assert copied(texts, training) == [13, 16, 0, 0, len(training)]
    assert copied(['over'], training) == [0] and copied(['over'], training, k=3) == [4]


@pytest.mark.parametrize('k', [1, 3, 12])
def test_copied_finds_what_a_search_of_all_runs_finds(k):
    rng = random.Random(0)
    training = ''.join(rng.choices('ab', k=200))
    for text in (''.join(rng.choices('abc', weights=(9, 9, 1), k=60)) for _ in range(50)):
        runs = {text[i:j] for i in range(60) for j in range(i + 1, 61)}
        longest = max(len(run) for run in runs if run in training)
        assert copied([text], training, k) == [longest if longest >= k else 0]


def test_ngram_is_a_distribution():
    ngram = train_ngram(['abracadabra', 'abc'], n=3)
    for context in ('', 'a', 'ab', 'br', 'zz', 'az', 'za'):
        # ? stands for all others
        assert sum(ngram_p(ch, context, ngram) for ch in 'abcdr?') == pytest.approx(1)
    one = train_ngram(['aab'], n=2)
    p_a = (2 + 2 / 3) / 5               # 'a' twice of 3, 2 kinds; below: 1/3 for a, b and any other
    assert ngram_p('a', '', one) == pytest.approx(p_a)
    assert ngram_p('a', 'a', one) == pytest.approx((1 + 2 * p_a) / 4)       # then a, b once each
    assert ngram_p('a', 'b', one) == pytest.approx(p_a)                     # nothing followed b
    nats = -(math.log(p_a) + math.log((1 + 2 * p_a) / 4)) / 2
    assert ngram_nats(['aa'], one) == pytest.approx(nats)
    assert math.isnan(ngram_nats([''], one))


def test_bleu_and_rouge():
    assert bleu(['The cat sat on the mat'], ['the cat sat on the mat']) == pytest.approx(100)
    assert bleu(['The cat sat on the mat'], ['the cat sat on the mat'], cased=True) < 90
    assert bleu(['a b'], ['a b']) == pytest.approx(100)         # effective order: no 4-gram needed
    # pair 1: 2 of 2 unigrams against 4, F = 2/3; pair 2 is equal but for its stem
    got = rouge(['the cat', 'cats run'], ['the cat sat down', 'cat runs'])
    assert got == pytest.approx({'rouge1': 250 / 3, 'rouge2': 75, 'rougeL': 250 / 3})


def test_table_leaves_empty_columns_out_and_fits_a_terminal(capsys):
    paired = ('bleu', 'bleu_cased', 'rouge1', 'rouge2', 'rougeL')
    llm = ('gen_ppl', 'gen_ppl_port', 'entropy')
    row = {key: 0.5 for key, _, _ in eval_py.COLUMNS if key not in paired + llm}
    print_table({'samples': row, 'unigram': {}}, 'words')
    head, samples, unigram, *notes = capsys.readouterr().out.strip('\n').split('\n')
    assert 'own ent' in head and 'BLEU' not in head and 'ppl' not in head
    assert len(samples) == len(head) <= 80 and unigram.strip() == 'unigram' and len(notes) == 3
    print_table({'samples': dict(gen_ppl=12345.678), 'real': dict(gen_ppl=9.1)}, 'words')
    assert capsys.readouterr().out.startswith('''
             ppl
samples 12345.68
real        9.10
''')


def test_means_over_runs_may_be_nan():
    means, errors = over_runs([dict(a=1.0, b=math.nan), dict(a=3.0, b=1.0)])
    assert means['a'] == 2 and errors['a'] == 1 and math.isnan(means['b'] + errors['b'])

# --------------------------------------------------------------------------------------------------
# the judge

def test_bpe(judge):
    bpe = gpt2_bpe(judge)
    assert bpe.decode(bpe.encode('grüß hello')) == 'grüß hello'
    assert bpe.encode('hello he', allowed_special='all') == [257, 259, 260]
    assert bpe.encode(EOT, allowed_special='all') == [bpe.eot_token] == [0]
    with pytest.raises(UserError, match='nowhere'):
        gpt2_bpe(judge + '/nowhere')


@needs_shared
def test_bpe_of_gpt2():
    assert gpt2_bpe(os.path.join(SHARED, 'gpt2')).encode('Hello world') == [15496, 995]


@needs_shared
@pytest.mark.parametrize('epoch, blank', [(1, 25), (4, 0)])
def test_entropies_that_a_reproduction_published(epoch, blank):
    """Over GPT-2's ids, 1024 at most, of the texts that are not blank; they summed in float32."""
    rows = [json.loads(line) for line in open(f'{OUTPUTS}/ugness_lightning/metrics.jsonl')]
    published = {row['epoch']: row['sample_entropy_32step'] for row in rows}[epoch]
    texts = read_samples(f'{OUTPUTS}/ugness_lightning/epoch_{epoch:03}.jsonl')
    ids = judge_ids([row['generated'] for row in texts], gpt2_bpe(os.path.join(SHARED, 'gpt2')))
    assert len(ids) == len(texts) - blank
    assert np.mean([entropy(row) for row in ids]) == pytest.approx(published, rel=1e-7)


def mean_entropy(folder, texts):
    """Mean over the texts that are not blank, of at most 24 tokens each."""
    tokenizer, entropies = AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        if text.strip():
            ids = tokenizer(text, add_special_tokens=False)['input_ids'][:24]
            counts = torch.tensor(ids).bincount().float()
            entropies.append(torch.distributions.Categorical(probs=counts).entropy().item())
    return np.mean(entropies)


def plain_ppl(folder, texts, port):
    """The protocol once more, token by token, with Hugging Face's tokenizer and loss."""
    from transformers import GPT2LMHeadModel, GPT2Tokenizer
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    rows = [tokenizer(t)['input_ids'][:24] for t in texts if t.strip()]
    width, nll, count = max(map(len, rows)), 0.0, 0
    for row in rows:
        row, eos_seen = row + [0] * (width - len(row)), 0
        for i, token in enumerate(row):
            eos_seen += token == 0
            times = 1 if token != 0 or eos_seen == 1 else 0
            if port and token != 0 and eos_seen == 1:
                times = 2
            if i and times:
                labels = torch.full((1, width), -100)
                labels[0, i] = token
                with torch.no_grad():
                    loss = model(torch.tensor([row]), labels=labels).loss
                nll += times * loss.double().item()
                count += times
    return math.exp(nll / count), count


@pytest.mark.parametrize('texts', [
    ['hello he said', 'so', 'x'],
    ['one' + EOT + 'two hello', 'plain'],
    [EOT + 'ab' + EOT + 'cd' + EOT, 'a' + EOT, ' ', ''],
    ['far longer than the twenty-four positions', 'hello'],
])
def test_gen_ppl_equals_hugging_face(judge, texts):
    got = gen_ppl(texts, judge, batch_size=2)
    want, count = plain_ppl(judge, texts, port=False)
    assert got['gen_ppl'] == pytest.approx(want, rel=1e-5) and got['tokens'] == count
    assert got['gen_ppl_port'] == pytest.approx(plain_ppl(judge, texts, port=True)[0], rel=1e-5)
    assert got['empty'] == sum(not t.strip() for t in texts)
    assert got['entropy'] == pytest.approx(mean_entropy(judge, texts))


def test_nothing_to_judge(judge):
    got = gen_ppl(['', '\n'], judge)
    assert math.isnan(got['gen_ppl']) and got['tokens'] == 0 and got['empty'] == 2

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
    assert evaluate(*args)['gamma'] == 1.5


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
    assert together | dict(seconds=0) == alone | dict(seconds=0)
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
