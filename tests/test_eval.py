"""
Each metric against numbers by hand, the perplexity against plain Hugging Face, the command on a file and on a model.
    python -m pytest -q tests/test_eval.py
"""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

from configurator import UserError
from eval import bleu, distinct, duplicates, entropy, gen_ppl, gpt2_bpe, ngram_nats, ngram_p, read_samples, repetition, rouge, train_ngram

SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')
EOT = '<|endoftext|>'


@pytest.fixture(scope='session')
def judge(tmp_path_factory):
    """A folder with a random GPT-2 of one layer and a BPE of 256 bytes, EOT, 'he', 'llo', 'Ġhe' in an unusual order of ids."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    folder = tmp_path_factory.mktemp('judge')
    merges = ['h e', 'l l', 'll o', 'Ġ he']
    tokens = [EOT, *sorted(bytes_to_unicode().values()), *(m.replace(' ', '') for m in merges)]
    (folder / 'vocab.json').write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding='utf-8')
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n', encoding='utf-8')
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokens), n_embd=16, n_layer=1, n_head=2, n_positions=24, initializer_range=0.5)).save_pretrained(folder)
    return str(folder)


def test_entropy():
    assert entropy([]) == 0 and entropy([7, 7, 7]) == 0
    assert entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert entropy([1, 1, 1, 2]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_repetition_duplicates_distinct():
    phrase = [1, 2, 3, 4, 5]
    assert repetition([phrase * 2 + [9]]) == 0                                          # twice is no repetition yet
    assert repetition([phrase + [8] + phrase + [9] + phrase + [6]]) == pytest.approx(15 / 18)
    assert repetition([[7] * 7, [0] * 3]) == pytest.approx(7 / 10)                      # overlapping ones count, tokens once
    assert repetition([phrase, phrase, phrase]) == 0 and repetition([]) == 0            # within a text; across: duplicates
    assert duplicates(['a', 'b', 'a', 'a']) == 0.5 and duplicates([]) == 0
    assert distinct([[1, 2, 3, 4, 5], [1, 2, 3, 4]]) == pytest.approx(2 / 3)
    assert distinct([[1, 2, 3, 4, 5], [1, 2, 3, 4]], limit=8) == 1 and distinct([[1]]) == 0


def test_ngram_is_a_distribution():
    ngram = train_ngram(['abracadabra', 'abc'], n=3)
    for context in ('', 'a', 'ab', 'br', 'zz', 'az', 'za'):
        assert sum(ngram_p(ch, context, ngram) for ch in 'abcdr?') == pytest.approx(1)      # ? stands for all others
    one = train_ngram(['aab'], n=2)
    p_a = (2 + 2 / 3) / 5               # 'a' twice of 3, 2 kinds; below: 1/3 each for a, b and any other
    assert ngram_p('a', '', one) == pytest.approx(p_a)
    assert ngram_p('a', 'a', one) == pytest.approx((1 + 2 * p_a) / 4)                       # after 'a': a, b once each
    assert ngram_p('a', 'b', one) == pytest.approx(p_a)                                     # nothing ever followed b
    assert ngram_nats(['aa'], one) == pytest.approx(-(math.log(p_a) + math.log((1 + 2 * p_a) / 4)) / 2)
    assert math.isnan(ngram_nats([''], one))


def test_bleu_and_rouge():
    assert bleu(['The cat sat on the mat'], ['the cat sat on the mat']) == pytest.approx(100)
    assert bleu(['The cat sat on the mat'], ['the cat sat on the mat'], cased=True) < 90
    assert bleu(['a b'], ['a b']) == pytest.approx(100)                                     # effective order: no 4-gram needed
    # pair 1: 2 of 2 unigrams against 4, F = 2/3; pair 2 is equal but for its stem
    assert rouge(['the cat', 'cats run'], ['the cat sat down', 'cat runs']) == pytest.approx({'rouge1': 250 / 3, 'rouge2': 75, 'rougeL': 250 / 3})


def test_bpe(judge):
    bpe = gpt2_bpe(judge)
    assert bpe.decode(bpe.encode('grüß hello')) == 'grüß hello'
    assert bpe.encode('hello he', allowed_special='all') == [257, 259, 260]
    assert bpe.encode(EOT, allowed_special='all') == [bpe.eot_token] == [0]
    with pytest.raises(UserError, match='nowhere'):
        gpt2_bpe(judge + '/nowhere')


def test_bpe_of_gpt2():
    folder = os.path.join(SHARED, 'gpt2')
    if not os.path.isdir(folder):
        pytest.skip('needs ../shared/data/gpt2')
    assert gpt2_bpe(folder).encode('Hello world') == [15496, 995]


def mean_entropy(folder, texts):
    """Mean over the texts that are not blank, of at most 24 tokens each."""
    rows = [torch.tensor(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)['input_ids'][:24]) for text in texts if text.strip()]
    return torch.stack([torch.distributions.Categorical(probs=row.bincount().float()).entropy() for row in rows]).mean().item()


def plain_ppl(folder, texts, port):
    """The protocol once more, text by text and token by token, with Hugging Face's tokenizer and loss."""
    from transformers import GPT2LMHeadModel, GPT2Tokenizer
    tokenizer, model = GPT2Tokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder).eval()
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
                    nll += times * model(torch.tensor([row]), labels=labels).loss.double().item()
                count += times
    return math.exp(nll / count), count


@pytest.mark.parametrize('texts', [['hello he said', 'so', 'x'], ['one' + EOT + 'two hello', 'plain'], [EOT + 'ab' + EOT + 'cd' + EOT, 'a' + EOT, ' ', ''],
                                   ['far longer than the twenty-four positions', 'hello']])
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


@pytest.mark.skipif(not os.path.isdir(SHARED), reason=f'needs {SHARED}')
def test_official_de_en_scores(run, tmp_path):
    """1,000 official translations and what the official code gave them, to the last digit; references by folder and by file."""
    from datasets import load_from_disk
    references = os.path.join(SHARED, 'wmt14_de-en_validation_t5')
    (tmp_path / 'references.jsonl').write_text(''.join(json.dumps(dict(target=t)) + '\n' for t in load_from_disk(references)['target']))
    for source in (references, tmp_path / 'references.jsonl'):
        out = run('eval.py', f"--samples={SHARED}/official_outputs/de-en_seed_42/all_generated_100_880600.jsonl", f'--references={source}', f'--out_dir={tmp_path}')
        last = json.loads(out.splitlines()[-1])
        assert [last[k] for k in ('bleu', 'rouge1', 'rouge2', 'rougeL')] == [25.834093628144814, 59.04973076336025, 33.30888909160917, 53.81862131068937]
        assert last['texts'] == 1000 and last['judge'] == 'none' and last['bleu_cased'] < last['bleu']


def test_references_go_by_id(tmp_path):
    (tmp_path / 'texts.jsonl').write_text('{"id": 1, "text": "a"}\n{"id": 0, "text": "b"}\n{"text": "c"}\n')
    (tmp_path / 'refs.jsonl').write_text(''.join(f'{{"target": "{t}"}}\n' for t in 'xyz'))
    assert [t['target'] for t in read_samples(str(tmp_path / 'texts.jsonl'), str(tmp_path / 'refs.jsonl'))] == ['y', 'x', 'z']


@pytest.mark.parametrize('content, says', [(None, 'cannot read'), ('{"target": "a"}\n', 'line 2 has id 1, .* has 1 rows'), ('{"input": "a"}\n{"target": "b"}\n', 'needs a text')])
def test_references_that_do_not_fit(run, tmp_path, content, says):
    (tmp_path / 'texts.jsonl').write_text('{"generated": "a"}\n{"generated": "b"}\n')
    if content:
        (tmp_path / 'refs.jsonl').write_text(content)
    with pytest.raises(UserError, match=says):
        run('eval.py', f"--samples={tmp_path / 'texts.jsonl'}", f"--references={tmp_path / 'refs.jsonl'}", f'--out_dir={tmp_path}')


def test_scores_a_file(run, bins, judge, tmp_path):
    file = tmp_path / 'texts.jsonl'
    file.write_text('{"text": "ab ba"}\n\n{"generated": ""}\n{"generated": "\\u001b[2J aaaa"}\n')
    with pytest.raises(UserError, match='name its bins'):
        run('eval.py', f'--samples={file}', f'--out_dir={tmp_path}', '--judge=ngram', '--device=cpu')
    out = run('eval.py', f'--samples={file}', f'--out_dir={tmp_path}', f'--data_dir={bins}', '--dataset=tiny', '--judge=ngram', '--device=cpu')
    last = json.loads(out.splitlines()[-1])
    assert last['texts'] == 3 and last['empty'] == 1 and last['real']['texts'] == 3
    worst, best, own = last['unigram']['nats_per_char'], last['real']['nats_per_char'], last['nats_per_char']
    assert last['gap_closed'] == pytest.approx((worst - own) / (worst - best))
    assert last['entropy_own'] == pytest.approx(mean_entropy(str(bins / 'tiny' / 'tokenizer'), ['ab ba', '', '\x1b[2J aaaa']))
    assert out.count('samples  ') == 1 and 'unigram text' in out
    assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == last
    last = json.loads(run('eval.py', f'--samples={file}', f'--out_dir={tmp_path}', f'--judge={judge}', '--device=cpu').splitlines()[-1])
    assert last['gen_ppl'] > 1 and last['tokens'] > 0
    file.write_text('{"generated": "a b", "target": "a b"}\n')
    assert json.loads(run('eval.py', f'--samples={file}', f'--out_dir={tmp_path}').splitlines()[-1])['bleu'] == pytest.approx(100)


def test_samples_a_model(run, tiny, bins, tmp_path):
    run('train.py', *tiny, f'--out_dir={tmp_path}')
    out = run('eval.py', f'--out_dir={tmp_path}', f'--data_dir={bins}', '--dataset=tiny', '--judge=ngram', '--num_samples=6', '--batch_size=4', '--eval_iters=5', '--device=cpu')
    last = json.loads(out.splitlines()[-1])
    assert last['nfe'] == last['steps'] == 4 and last['texts'] == 6 and last['val']['loss'] > 0
    with open(tmp_path / 'samples_eval.jsonl', encoding='utf-8') as f:
        assert [json.loads(line)['id'] for line in f] == list(range(6))


@pytest.mark.parametrize('text, said', [('{"generated": "a"}\n{"gener', 'line 2'), ('{"generated": 3}\n', 'line 1'), ('[]', 'line 1'), ('\n', 'no texts'),
                                        ('{"text": "a", "target": "b"}\n{"text": "a"}', 'line 2'), ('{"text": "a"}\n"\xff"', 'line 2')])
def test_broken_file_is_one_line(run, tmp_path, text, said):
    (tmp_path / 'bad.jsonl').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=said):
        run('eval.py', f"--samples={tmp_path / 'bad.jsonl'}", f'--out_dir={tmp_path}')


def test_only_the_first_rank_scores_a_file(tmp_path):
    (tmp_path / 'texts.jsonl').write_text('{"text": "a", "target": "a"}\n')
    for rank in '10':
        got = subprocess.run([sys.executable, os.path.join(ROOT, 'eval.py'), f"--samples={tmp_path / 'texts.jsonl'}", f'--out_dir={tmp_path}'], capture_output=True, text=True,
                             env=os.environ | dict(RANK=rank, WORLD_SIZE='2', LOCAL_RANK=rank))
        assert got.returncode == 0 and ('BLEU' in got.stdout) == (rank == '0'), got.stderr
    assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 1


def test_exit_code(tmp_path):
    (tmp_path / 'bad.jsonl').write_text('{"generated": "a"}\n{"gener')
    got = subprocess.run([sys.executable, os.path.join(ROOT, 'eval.py'), f"--samples={tmp_path / 'bad.jsonl'}"], capture_output=True, text=True, cwd=tmp_path)
    assert got.returncode == 1 and got.stderr.count('\n') == 1 and 'bad.jsonl, line 2' in got.stderr
    assert os.listdir(tmp_path) == ['bad.jsonl']
