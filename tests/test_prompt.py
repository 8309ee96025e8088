"""
Prompts and holes: what is known stays known, how it is shown to the model, what is refused.
    python -m pytest -q tests/test_prompt.py
"""
import json
import os
import re
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

from configurator import UserError
from model import ELF, ELFConfig, TextEncoder
from parts.prompt import encode_given, known_tokens, texts_in, unknown_in
from parts.data import batched
from sample import decode, generate, resolve_sampling, sample_batch

T5 = os.path.join(os.path.dirname(ROOT), 'shared', 'data', 't5_tokenizer')
CPU = torch.device('cpu')


class Spy:
    """A network that sees x everywhere, and notes what it was given."""
    def __init__(self, x, **settings):
        self.config, self.x, self.calls = ELFConfig(**settings), x, []

    def denoise(self, z, x_prev, t, w):
        self.calls.append((z, x_prev, t))
        return self.x


@pytest.fixture(scope='module')
def letters(bins):
    return AutoTokenizer.from_pretrained(bins / 'tiny' / 'tokenizer')


@pytest.fixture(scope='module')
def folder(bins, tmp_path_factory):
    """The folder of a model of the tiny set that was never trained."""
    torch.manual_seed(0)
    tiny = bins / 'tiny'
    c = ELFConfig(n_layer=1, n_embd=16, n_head=2, latent_dim=16, bottleneck=4, max_length=13,
                  vocab_size=30, steps=5, latent_std=1.0, tokenizer=str(tiny / 'tokenizer'),
                  encoder=str(tiny / 'encoder'))
    net = ELF(c)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.3)
    torch.nn.init.normal_(net.unembed.weight)
    folder = tmp_path_factory.mktemp('model')
    for name, settings in (('', c), ('tasks', ELFConfig(**asdict(c) | dict(max_input_length=4)))):
        (folder / name).mkdir(exist_ok=True)
        ckpt = dict(model=net.state_dict(), model_args=asdict(settings))
        torch.save(ckpt, folder / name / 'ckpt.pt')
    return folder

# --------------------------------------------------------------------------------------------------
# the sampler

@pytest.mark.parametrize('sampler, gamma', [('ode', 0.0), ('sde', 2.0)])
def test_what_is_known_is_as_noisy_as_all_else(sampler, gamma):
    B, T, steps = 3, 400, 8
    torch.manual_seed(0)
    mask = torch.rand(B, T) < 0.5
    cond = torch.full((B, T, 2), 9.0)
    model = Spy(torch.full((B, T, 2), -1.0), noise_scale=0.5)
    z = generate(model, 0.5 * torch.randn(B, T, 2), torch.linspace(0, 1, steps + 1), sampler, gamma,
                 cond=cond, cond_mask=mask, noisy_cond=True)
    assert torch.equal(z[mask], cond[mask]) and (z[~mask] == -1).all()
    noises = []
    for i, (z, x_prev, t) in enumerate(model.calls):
        noises.append((z[mask] - 9 * t[0]) / (1 - t[0]))
        assert noises[-1].mean().abs() < 0.06 and 0.45 < noises[-1].std() < 0.55
        # no guess at first
        assert (x_prev[mask] == (9 if i else 0)).all() and (x_prev[~mask] == (-1 if i else 0)).all()
        free = (z[~mask] + t[0]) / (1 - t[0])           # is on the way to what the network sees
        assert free.mean().abs() < 0.1
        # the SDE had stepped back; what is known had to, too
        assert t[0] == pytest.approx(i / steps * (1 - gamma / steps if i < steps - 1 else 1))
    for a, b in zip(noises, noises[1:]):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.1     # fresh


def test_the_model_is_shown_a_prompt_in_noise(folder, letters):
    """What sample_batch asks of generate: clean latents would be all known from the first step."""
    model = ELF.from_pretrained(str(folder))
    c, encoder, calls = model.config, TextEncoder(model.config.encoder), []
    (ids,), (known,) = known_tokens([encode_given('abcdefghijkl', letters, c)], c)
    cond, denoise = encoder(ids[None], known[None], known[None]), model.denoise

    def noted(z, x_prev, t, w):
        calls.append((z, t[0]))
        return denoise(z, x_prev, t, w)
    model.denoise = noted
    sampling = resolve_sampling(c) | dict(grid='uniform', sampler='ode')
    prompts = ['abcdefghijkl'] * 8
    sample_batch(model, letters, range(8), 5, CPU, sampling, prompts, encoder)
    assert len(calls) == 5
    for z, t in calls:
        noise = (z - t * cond)[:, known] / (1 - t) / c.noise_scale          # (8, 12, 16)
        assert noise.std() == pytest.approx(1, abs=0.1) and noise.mean().abs() < 0.15
        assert noise.std(dim=0).mean() == pytest.approx(1, abs=0.2)         # each text its own


def test_known_tokens_come_out_as_given_and_text_i_depends_on_seed_and_i(folder, letters):
    model = ELF.from_pretrained(str(folder))
    c, encoder = model.config, TextEncoder(model.config.encoder)
    sampling = resolve_sampling(c) | dict(grid='logit_normal')

    def texts(numbers, batch_size, text):
        torch.manual_seed(batch_size)
        rows = [row for batch in batched(numbers, batch_size)
                for row in sample_batch(model, letters, batch, 5, CPU, sampling, [text] * 6,
                                        encoder, watch)]
        given = encode_given(text, letters, c)
        for row in rows:
            ids = row['ids']
            assert len(ids) >= len(given) and 1 not in ids[len(given):]
            assert all(i == ids[k] for k, i in enumerate(given) if i >= 0)
            assert row['generated'] == letters.decode(ids, skip_special_tokens=True)
        return rows

    def watch(numbers, rows, i, t, z):
        watched.append(texts_in(rows, *decode(model, z, sampling['w']), letters, c))

    for text in ('an', 'the ___of', '____a____'):
        watched = []
        whole = texts(range(6), 6, text)
        last = [ids for ids, _ in watched[-1]]
        assert len({tuple(ids) for ids in last}) > 1 and last == [row['ids'] for row in whole]
        assert all(len(ids) == len(p) for ids, p in watched[-1]) and len(watched) == 6
        assert (watched[0][0][1][0] == 1.0) == (text[0] != '_')     # what is given is sure
        assert texts(range(6), 1, text) == texts(range(6), 4, text) == whole
        assert texts([4, 2], 2, text) == [whole[4], whole[2]]


def test_an_eos_in_a_hole_ends_nothing(folder, letters):
    model = ELF.from_pretrained(str(folder))
    model.unembed.bias.data[1] = 100.0              # nothing but EOS
    encoder = TextEncoder(model.config.encoder)
    sampling = resolve_sampling(model.config) | dict(grid='uniform')
    for text, ids in (('a____b', [4, 1, 1, 1, 1, 5]), ('ab___', [4, 5, 1, 1, 1])):
        row, = sample_batch(model, letters, [0], 0, CPU, sampling, [text], encoder)
        assert row == dict(id=0, generated='ab', ids=ids)

# --------------------------------------------------------------------------------------------------
# texts to tokens

def shown(tokenizer, text):
    """What is given, as tokens; a hole is a dot."""
    row = encode_given(text, tokenizer, ELFConfig())
    return [tokenizer.convert_ids_to_tokens(i) if i >= 0 else '.' for i in row]


def test_letters(letters):
    assert shown(letters, 'the ') == [*'the '] and shown(letters, '') == []
    assert shown(letters, 'a ___ of___') == [*'a ... of...']
    assert shown(letters, '___a_____b') == [*'...a.....b']
    assert shown(letters, '______') == [*'......']
    c = ELFConfig(max_length=7)
    ids, known = known_tokens([encode_given('a___b', letters, c)], c)
    assert ids.tolist() == [[4, 0, 0, 0, 5, 0, 0]] and known.tolist() == [[1, 0, 0, 0, 1, 0, 0]]


def test_a_space_belongs_to_the_word_that_comes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate(['<pad>', '</s>', '<unk>', 'Ġ', 'a', 'b', 'Ġa'])}
    words = Tokenizer(models.BPE(vocab, [('Ġ', 'a')], unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='</s>',
                                    unk_token='<unk>')
    assert shown(words, 'b a ') == ['b', 'Ġa']
    assert shown(words, 'b ___ a') == ['b', '.', '.', '.', 'Ġa']


@pytest.mark.skipif(not os.path.isdir(T5), reason=f'needs {T5}')
def test_t5():
    tokenizer = AutoTokenizer.from_pretrained(T5)
    assert shown(tokenizer, 'The ____ of the house') == [
        '▁The', '.', '.', '.', '.', '▁of', '▁the', '▁house']
    # what T5 has no token for, or one with a meaning; its spaces, dashes and quotes are known
    assert unknown_in('Ein “Satz” – mit\nÜ, ć und {x} 😀 …', tokenizer) == 'ć { } 😀'
    assert unknown_in('a <extra_id_0> and </s>', tokenizer).split() == ['<extra_id_0>', '</s>']
    c = ELFConfig(max_length=8, max_input_length=5)
    assert encode_given('a</s>b', tokenizer, c) == [3, 9, 115, 1], 'T5 takes it for an end'


def test_what_the_training_text_never_had(letters):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    assert unknown_in('ab\ncÜ', letters) == '\n Ü' and unknown_in('the end', letters) == ''
    # words with what joins them, as prepare.py makes them
    names = dict(pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    vocab = [*names.values(), '4', '0', 'one', ' one', '-one']
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, '<unk>'))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r'[ -]?[^\W\d_]+|.'), 'isolated')
    words.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    assert [unknown_in(x, words) for x in ('404', 'one one-one', 'abc', '4 ones')] == [
        '', '', 'abc', ' ones']

# --------------------------------------------------------------------------------------------------
# the command

@pytest.mark.parametrize('arg, text', [
    ('--prompt=abc', 'abc'), ('--prompt=ab___cd', 'ab(.{0,3})cd'), ('--prompt=____ad', '.{0,4}ad'),
    ('--prompt=______', '')])
def test_what_is_given_is_in_every_text(arg, text, run, folder, tmp_path):
    run('sample.py', f'--init_from={folder}', f'--out_dir={tmp_path}', '--device=cpu',
        '--dtype=float32', '--num_samples=3', '--batch_size=2', arg)
    lines = (tmp_path / 'samples.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3 and all(re.match(text, row['generated']) for row in rows)


@pytest.mark.parametrize('args, says', [
    (['--prompt=a', '--input=b'], 'a model without conditions; it takes --prompt$'),
    (['--input=ab'], 'is a model without conditions; it takes --prompt$'),
    (['--input_file=none.jsonl'], 'is a model without conditions; it takes --prompt$'),
    (['--prompt=a__c'], "'a__c': the model was not trained on '_ _' and cannot read it"),
    (['--prompt=The Ü'], "'The Ü': the model was not trained on 'T Ü' and cannot read it"),
    (['--prompt=中文'], "not trained on '中 文' and"),
    (['--prompt=a</s>b'], "not trained on '< / >' and"),
    (['--prompt=a\nb'], r"not trained on '.n' and"),
    (['--prompt=abc___________'], 'the longest text has 14 tokens; the model reads the first 13$'),
    (['--prompt=a', '--cfg=2'], 'cfg=2.0: this is a model without conditions'),
    (['--cfg=2'], 'cfg=2.0: this is a model without conditions; drop it')])
def test_what_is_refused(args, says, run, folder, tmp_path):
    with pytest.raises(UserError, match=says) as e:
        run('sample.py', f'--init_from={folder}', f'--out_dir={tmp_path}', '--device=cpu', *args)
    assert '\n' not in str(e.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize('args', [
    ['--prompt=abc'], [], ['--input='], ['--input=a', '--input_file=b']])
def test_what_a_model_with_conditions_refuses(args, run, folder, tmp_path):
    says = 'is a model with conditions; give one by --input, or more by --input_file$'
    with pytest.raises(UserError, match=says) as e:
        run('sample.py', f'--init_from={folder}/tasks', f'--out_dir={tmp_path}', '--device=cpu',
            *args)
    assert '\n' not in str(e.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize('args, ids', [([], [0, 1]), (['--num_samples=1'], [0]),
                                       (['--num_samples=4'], [0, 1, 0, 1])])
def test_a_file_of_conditions_and_targets(args, ids, run, folder, tmp_path):
    """num_samples is how many texts in all; what the model will not see as it is, is said."""
    file = tmp_path / 'pairs.jsonl'
    file.write_text('{"source": "abcdef", "target": "x"}\n'
                    '{"input": "ü</s>", "target": 7, "n": 3}\n')
    out = run('sample.py', f'--init_from={folder}/tasks', f'--out_dir={tmp_path}', '--device=cpu',
              f'--input_file={file}', *args)
    lines = (tmp_path / 'samples.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row['id'] for row in rows] == list(range(len(ids)))
    assert [(row['input'], row['target']) for row in rows] == [
        [('abcdef', 'x'), ('ü</s>', 7)][i] for i in ids]
    assert "the model was not trained on 'ü < / >' and cannot read it (in 1 of 2 texts" in out
    assert 'the longest text has 6 tokens; the model reads the first 4\n' in out
    assert '--- 0: abcdef\n' in out and '\ntarget: x\n' in out
    assert len({row['generated'] for row in rows[::2]}) == len(rows[::2])       # not the same twice


def test_a_condition_that_the_model_does_not_know_is_answered_with_a_note(run, folder, tmp_path):
    out = run('sample.py', f'--init_from={folder}/tasks', f'--out_dir={tmp_path}', '--device=cpu',
              '--input=aB7')
    assert "the model was not trained on 'B 7' and cannot read it (in 1 of 1 texts given)" in out
    assert '1 texts, to ' in out and 'longest' not in out


def test_conditions_are_encoded_as_in_training(letters):
    c = ELFConfig(max_length=8, max_input_length=5)
    rows = [encode_given(text, letters, c)[:5] for text in ('abcdefgh', 'ab')]
    assert rows == [[4, 5, 6, 7, 8], [4, 5, 1]]
    assert encode_given('a</s>', letters, c) == [4, 2, 2, 22, 2, 1], 'text, no end'
    ids, known = known_tokens(rows, c)
    assert ids.tolist() == [[4, 5, 6, 7, 8, 0, 0, 0], [4, 5, 1, 0, 0, 0, 0, 0]]
    assert known.sum(1).tolist() == [5, 3] and known.dtype == torch.bool
