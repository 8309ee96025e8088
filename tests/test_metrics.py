"""
Each metric against numbers by hand, the perplexity against plain Hugging Face.
    python -m pytest -q tests/test_metrics.py
"""
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

from configurator import UserError
from eval import read_samples, read_split
from parts.data import open_bins
from parts.metrics import (bleu, distinct, entropy, exact_match, gen_ppl, judge_ids, load_gpt2,
                           load_judge, make_judges, measure, ngram_nats, ngram_p, over_runs,
                           print_table, repetition, rouge, train_ngram)

SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')
OUTPUTS = os.path.join(SHARED, 'official_outputs')
OWT = 'all_generated_5_95085.jsonl'
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


def test_entropy():
    assert entropy([]) == 0 and entropy([7, 7, 7]) == 0
    assert entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert entropy([1, 1, 1, 2]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_repetition_distinct():
    phrase = [1, 2, 3, 4, 5]
    assert repetition([phrase * 2 + [9]]) == 0          # twice is no repetition yet
    thrice = phrase + [8] + phrase + [9] + phrase + [6]
    assert repetition([thrice]) == pytest.approx(3 / 14)
    # overlapping ones count
    assert repetition([[7] * 7, [0] * 3]) == 1
    # within a text; across: distinct
    assert repetition([phrase, phrase, phrase]) == 0 and repetition([]) == 0
    two = [[1, 2, 3, 4, 5], [1, 2, 3, 4]]
    assert distinct(two) == pytest.approx(2 / 3)
    assert distinct([two[0], two[1][:3]]) == 1 and distinct([[1]]) == 0


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
    tokens = train_ngram([(7, 7, 40_000)], n=2)
    assert ngram_nats([(7, 7)], tokens) == pytest.approx(nats)


def test_ngram_judge_learns_characters_and_tokens(bins):
    train = list(read_split(open_bins(str(bins), 'tiny'), 'train', 999))
    row = measure([dict(generated='ab', ids=[4, 5])], make_judges('ngram', '', train, 'cpu'), 0)
    assert len(train) == 96
    of_tokens = train_ngram([tuple(text['ids']) for text in train], n=3)
    of_chars = train_ngram([text['generated'] for text in train])
    assert row['nats_per_token'] == pytest.approx(ngram_nats([(4, 5)], of_tokens))
    assert row['nats_per_char'] == pytest.approx(ngram_nats(['ab'], of_chars))


def test_bleu_and_rouge():
    assert bleu(['The cat sat on the mat'], ['the cat sat on the mat']) == pytest.approx(100)
    assert bleu(['a b'], ['a b']) == pytest.approx(100)         # effective order: no 4-gram needed
    # pair 1: 2 of 2 unigrams against 4, F = 2/3; pair 2 is equal but for its stem
    got = rouge(['the cat', 'cats run'], ['the cat sat down', 'cat runs'])
    assert got == pytest.approx({'rouge1': 250 / 3, 'rouge2': 75, 'rougeL': 250 / 3})


@pytest.mark.parametrize('text, spaced', [
    ('Die Katze sitzt auf der Matte, für immer', True), ('4071', True),
    ('Кошка сидит на коврике у двери', True), ('बिल्ली चटाई पर बैठी है आज', True),
    ('猫坐在门口的垫子上。', False), ('猫がマットの上に座っています。', False),
    ('แมวนั่งอยู่บนเสื่อ', False)])
def test_texts_of_any_script_that_equal_their_targets_are_right(text, spaced):
    """The official tokens of ROUGE are a to z, and BLEU's need spaces: these had 0.00."""
    assert rouge([text], [text])['rouge1'] == pytest.approx(100)
    assert bleu([text], [text]) == pytest.approx(100)
    if not spaced:          # half right is half right
        assert 10 < rouge([text[:-4]], [text])['rougeL'] < 100 > bleu([text[:-2]], [text]) > 10


def test_rouge_of_words_with_marks_and_of_mixed_texts():
    # a vowel sign is part of its word; latin words among Chinese characters are words
    assert rouge(['बिल्ली है'], ['बिल्ली थी'])['rouge1'] == pytest.approx(50)
    got = rouge(['他们用 Python 写代码'], ['他们用 Python 读写代码'])
    assert got['rouge1'] == pytest.approx(1400 / 15)


def test_exact():
    hyps = ['four', 'four one ', 'four two', 'four two three', 'one', 'two']
    refs = ['four', 'four one', 'four one', 'four two', 'one two', 'two']
    assert exact_match(hyps, refs) == 0.5
    rows = [dict(generated=h, target=r, ids=h.split()) for h, r in zip(hyps, refs)]
    got = measure(rows, [], 0)
    assert got['exact'] == 0.5 and got['exact_stderr'] == pytest.approx(math.sqrt(0.25 / 6))
    # three miss: "four two" at word 2, "four two three" at 3 and longer, "one" at 2 and shorter
    assert (got['length'], got['first_wrong']) == (pytest.approx(2 / 3), 2)
    assert measure(rows[:1], [], 0)['exact_stderr'] == 0
    # no pairs of words: nothing for ROUGE-2 to count, as --help says
    assert rouge(['seven'], ['seven']) == dict(rouge1=100, rouge2=0, rougeL=100)


def test_table_leaves_empty_columns_out_and_fits_a_terminal(capsys):
    row = dict(texts=9, steps=4, gen_ppl=0.5, entropy=0.25, entropy_own=2.0,
               distinct_4=0.5, repetition=0.5, bleu=None, empty=3)
    print_table({'samples': row, 'real': {'empty': 0}})
    head, samples, real = capsys.readouterr().out.strip('\n').split('\n')
    assert head.split() == [key for key in row if key not in ('texts', 'steps', 'bleu')]
    assert samples.split()[-2:] == ['0.5000', '3'] and real.split() == ['real', '0']
    assert len(samples) == len(head) <= 80
    several = dict(gen_ppl=1234.5678, stderr=dict(gen_ppl=0.5), by_seed=[])
    print_table({'samples': several, 'real': dict(gen_ppl=9.1)})
    lines = capsys.readouterr().out.split('\n')
    assert [line.split() for line in lines if line] == [
        ['gen_ppl'], ['samples', '1235.'], ['samples', '+-', '0.5000'], ['real', '9.100']]


def test_means_over_runs_may_be_nan():
    got = over_runs([dict(a=1.0, b=math.nan), dict(a=3.0, b=1.0)])
    assert got['a'] == 2 and got['stderr']['a'] == 1 and math.isnan(got['b'] + got['stderr']['b'])
    assert over_runs([dict(a=1.0)]) == dict(a=1.0)

# --------------------------------------------------------------------------------------------------
# the judge

def test_ids_of_the_judge(judge, tmp_path):
    _, tokenizer = load_judge(judge, 'cpu')
    assert judge_ids(['hello he', ' ', EOT + 'h' * 9], tokenizer.encode, 4)[0] == [257, 259, 260]
    cut = [[0] + [tokenizer.vocab['h']] * 3]
    assert judge_ids(['', '\n', EOT + 'h' * 9], tokenizer.encode, 4) == cut
    with pytest.raises(UserError, match='nowhere'):
        load_judge(str(tmp_path / 'nowhere'), 'cpu')


def link_gpt2(folder):
    """GPT-2's encoder files under the names that the hub has for them -> folder, a str."""
    for name, source in (('vocab.json', 'encoder.json'), ('merges.txt', 'vocab.bpe')):
        os.symlink(os.path.join(SHARED, 'gpt2', source), folder / name)
    return str(folder)


@needs_shared
def test_tiktoken_gives_the_ids_of_the_judge(tmp_path):
    encode = load_gpt2(link_gpt2(tmp_path))
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [row['generated'] for row in read_samples(f'{OUTPUTS}/owt_elf_b/{OWT}')]
    texts += ["Hello world", f"a{EOT}b", "it's  3 o'clock\n\n \tüñí 猫 🙂", "x" * 2000, " lead"]
    assert load_gpt2(f'{SHARED}/gpt2')('Hello world') == encode('Hello world') == [15496, 995]
    assert all(encode(text) == theirs.encode(text) for text in texts)
    with pytest.raises(UserError, match='no encoder files of GPT-2'):
        load_gpt2(str(tmp_path / '..'))
    (tmp_path / 'merges.txt').unlink()
    (tmp_path / 'merges.txt').write_text('#version: 0.2\na b\n')      # another tokenizer's
    with pytest.raises(UserError, match='no encoder files of GPT-2'):
        load_gpt2(str(tmp_path))


@needs_shared
def test_gpt2_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants
    repo = tmp_path / 'models--openai-community--gpt2'
    (repo / 'snapshots' / 'abc').mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('abc')
    link_gpt2(repo / 'snapshots' / 'abc')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    assert load_gpt2('openai-community/gpt2')('Hello world') == [15496, 995]
    with pytest.raises(UserError, match='openai-community/gpt3'):
        load_gpt2('openai-community/gpt3')


@needs_shared
@pytest.mark.parametrize('epoch, blank', [(1, 25), (4, 0)])
def test_entropies_that_a_reproduction_published(epoch, blank, tmp_path):
    """Over GPT-2's ids, 1024 at most, of the texts that are not blank; they summed in float32."""
    rows = [json.loads(line) for line in open(f'{OUTPUTS}/ugness_lightning/metrics.jsonl')]
    published = {row['epoch']: row['sample_entropy_32step'] for row in rows}[epoch]
    texts = read_samples(f'{OUTPUTS}/ugness_lightning/epoch_{epoch:03}.jsonl')
    ids = judge_ids([row['generated'] for row in texts], load_gpt2(link_gpt2(tmp_path)))
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


def plain_ppl(folder, texts):
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
    got = gen_ppl(texts, judge)
    want, count = plain_ppl(judge, texts)
    assert got['gen_ppl'] == pytest.approx(want, rel=1e-5) and got['tokens'] == count
    assert got['entropy'] == pytest.approx(mean_entropy(judge, texts))


def test_nothing_to_judge(judge):
    got = gen_ppl(['', '\n'], judge)
    assert math.isnan(got['gen_ppl']) and got['tokens'] == 0


def test_the_judge_leaves_the_precision_of_products_as_it_was(judge, monkeypatch):
    seen, real = [], torch.nn.functional.cross_entropy

    def watched(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, 'cross_entropy', watched)
    torch.set_float32_matmul_precision('high')      # as start() has it on a GPU
    try:
        gen_ppl(['hello he'], judge)
        assert set(seen) == {'highest'} and torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision('highest')
