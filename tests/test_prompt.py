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
from parts.prompt import known_tokens, read_prompt, unknown_in
from sample import generate, read_texts, resolve_sampling, sample_texts

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
    """What sample_texts asks of generate: clean latents would be all known from the first step."""
    model = ELF.from_pretrained(str(folder))
    c, encoder, calls = model.config, TextEncoder(model.config.encoder), []
    given = ids, known = read_prompt('abcdefghijkl', False, letters, c)
    cond, denoise = encoder(ids[None], known[None], known[None]), model.denoise

    def noted(z, x_prev, t, w):
        calls.append((z, t[0]))
        return denoise(z, x_prev, t, w)
    model.denoise = noted
    sampling = resolve_sampling(c) | dict(grid='uniform', sampler='ode')
    list(sample_texts(model, letters, range(8), 8, 5, CPU, sampling, given, encoder))
    assert len(calls) == 5
    for z, t in calls:
        noise = (z - t * cond)[:, known] / (1 - t) / c.noise_scale          # (8, 12, 16)
        assert noise.std() == pytest.approx(1, abs=0.1) and noise.mean().abs() < 0.15
        assert noise.std(dim=0).mean() == pytest.approx(1, abs=0.2)         # each text its own


def test_known_tokens_come_out_as_given_and_text_i_depends_on_seed_and_i(folder, letters):
    model = ELF.from_pretrained(str(folder))
    c, encoder = model.config, TextEncoder(model.config.encoder)
    sampling = resolve_sampling(c) | dict(grid='logit_normal')

    def texts(numbers, batch_size, text, holes):
        torch.manual_seed(batch_size)
        known = read_prompt(text, holes, letters, c)
        rows = list(sample_texts(model, letters, numbers, batch_size, 5, CPU, sampling, known,
                                 encoder, watch))
        for row in rows:
            ids = torch.tensor(row['ids'])
            assert (ids == known[0][:len(ids)])[known[1][:len(ids)]].all()
            assert len(ids) > known[1].nonzero().max() and 1 not in ids[known[1].nonzero().max():]
            assert row['generated'] == letters.decode(ids, skip_special_tokens=True)
        return rows

    def watch(numbers, i, t, z):
        given = known_tokens(read_prompt(text, holes, letters, c), numbers, letters, c)
        watched.append(read_texts(model, letters, z, sampling['w'], *given))

    for text, holes in (('an', False), ('the ___of', True), ('____a____', True)):
        watched = []
        whole = texts(range(6), 6, text, holes)
        last = [ids for ids, _ in watched[-1]]
        assert len({tuple(ids) for ids in last}) > 1 and last == [row['ids'] for row in whole]
        assert all(len(ids) == len(p) for ids, p in watched[-1]) and len(watched) == 6
        assert watched[0][0][1][:1] == [1.0] or holes       # what is given is sure
        assert texts(range(6), 1, text, holes) == texts(range(6), 4, text, holes) == whole
        assert texts([4, 2], 2, text, holes) == [whole[4], whole[2]]


def test_an_eos_in_a_hole_ends_nothing(folder, letters):
    model = ELF.from_pretrained(str(folder))
    model.unembed.bias.data[1] = 100.0              # nothing but EOS
    encoder = TextEncoder(model.config.encoder)
    sampling = resolve_sampling(model.config) | dict(grid='uniform')
    for text, ids in (('a____b', [4, 1, 1, 1, 1, 5]), ('ab___', [4, 5])):
        known = read_prompt(text, True, letters, model.config)
        row, = sample_texts(model, letters, [0], 1, 0, CPU, sampling, known, encoder)
        assert row == dict(id=0, generated='ab', ids=ids)

# --------------------------------------------------------------------------------------------------
# texts to tokens

def shown(tokenizer, text, holes, max_length=12):
    """What is given, as tokens; a hole is a dot."""
    ids, known = read_prompt(text, holes, tokenizer, ELFConfig(max_length=max_length))
    assert len(ids) == len(known) == max_length and ids.dtype == torch.long
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [token if given else '.' for token, given in zip(tokens, known.tolist())]


def test_letters(letters):
    assert shown(letters, 'the ', False) == [*'the ', *'........']
    assert shown(letters, 'a ___ of___', True) == [*'a ... of....']
    assert shown(letters, '___a_____b', True) == [*'...a.....b..']


def test_a_space_belongs_to_the_word_that_comes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate(['<pad>', '</s>', '<unk>', 'Ġ', 'a', 'b', 'Ġa'])}
    words = Tokenizer(models.BPE(vocab, [('Ġ', 'a')], unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='</s>',
                                    unk_token='<unk>')
    assert shown(words, 'b a ', False, 5) == ['b', 'Ġa', '.', '.', '.']
    assert shown(words, 'b ___ a', True, 5) == ['b', '.', '.', '.', 'Ġa']


@pytest.mark.skipif(not os.path.isdir(T5), reason=f'needs {T5}')
def test_t5():
    tokenizer = AutoTokenizer.from_pretrained(T5)
    assert shown(tokenizer, 'The ____ of the house', True, 9) == [
        '▁The', '.', '.', '.', '.', '▁of', '▁the', '▁house', '.']
    for text in ('a <extra_id_0>', '😀'):
        with pytest.raises(UserError, match="was not trained on: (😀|<extra_id_0>)$"):
            shown(tokenizer, text, False)
    # what T5 maps to others or has no token for; its spaces, dashes and quotes are known
    assert unknown_in('Ein “Satz” – mit\nÜ, ć und {x} 😀 …', tokenizer, 'text') == 'ć { } 😀 …'


def test_what_the_training_text_never_had(letters, tmp_path):
    """The tokenizer takes it, byte by byte, or maps it to what it knows."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    every = Tokenizer(models.BPE({sign: i for i, sign in enumerate(
        ['<pad>', '</s>', '<unk>', *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    every.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    every.decoder = decoders.ByteLevel()
    names = dict(pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    PreTrainedTokenizerFast(tokenizer_object=every, text_characters='ab 0123456789',
                            input_characters='0123456789', **names).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert unknown_in('ab A中7\n', tokenizer, 'text') == 'A 中 \n'
    assert unknown_in('4071', tokenizer, 'input') == '' and unknown_in('4b a', tokenizer, 'input')
    # of words, or letters without a line break, all that is unknown
    assert unknown_in('ab\nc', letters, 'text') == '\n'
    words = Tokenizer(models.WordLevel(dict(zip(names.values(), range(3)), ab=3, ba=4), '<unk>'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    assert [unknown_in(x, words, 'text') for x in ('ab ba', 'ab bb', 'ab c')] == ['', 'bb', 'c']
    every.normalizer = normalizers.Lowercase()
    lower = PreTrainedTokenizerFast(tokenizer_object=every, **names)
    assert unknown_in('The Ü', lower, 'text') == 'T Ü' and unknown_in('中 e', lower, 'text') == ''

# --------------------------------------------------------------------------------------------------
# the command

@pytest.mark.parametrize('arg, text', [
    ('--prompt=abc', 'abc'), ('--infill=ab___cd', 'ab(.{0,3})cd'), ('--infill=____ad', '.{0,4}ad')])
def test_what_is_given_is_in_every_text(arg, text, run, folder, tmp_path):
    run('sample.py', f'--init_from={folder}', f'--out_dir={tmp_path}', '--device=cpu',
        '--dtype=float32', '--num_samples=3', '--batch_size=2', arg)
    lines = (tmp_path / 'samples.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3 and all(re.match(text, row['generated']) for row in rows)


@pytest.mark.parametrize('args, says', [
    (['--prompt=a', '--infill=b___'], 'infill and prompt exclude each other'),
    (['--prompt=a', '--input=b'], 'input and prompt exclude each other'),
    (['--prompt='], "'' gives no token"), (['--infill='], "'' gives no token"),
    (['--infill=______'], 'gives no token'),
    (['--infill=abc'], "infill='abc' has no hole; write ___, an underscore for each token"),
    (['--infill=a__c'], "'a__c' has what this model was not trained on: _$"),
    (['--prompt=The Ü'], "'The Ü' has what this model was not trained on: T Ü$"),
    (['--prompt=中文'], "not trained on: 中 文$"), (['--prompt=a</s>b'], "not trained on: </s>$"),
    (['--prompt=abcdefghijklm'], "takes 13 tokens, a text of this model has 13, .*; shorten it"),
    (['--infill=abc___________'], 'takes 14 tokens'),
    (['--prompt=a', '--cfg=2'], 'cfg=2.0: .* has no conditions to guide with'),
    (['--cfg=2'], 'has no conditions to guide with, the texts would be the same for twice'),
    (['--input=ab'], 'is a model without conditions; drop --input'),
    (['--input_file=none.jsonl'], 'is a model without conditions; drop --input')])
def test_what_is_refused(args, says, run, folder, tmp_path):
    with pytest.raises(UserError, match=says) as e:
        run('sample.py', f'--init_from={folder}', f'--out_dir={tmp_path}', '--device=cpu', *args)
    assert '\n' not in str(e.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize('args, says', [
    (['--prompt=abc'], 'is a model with conditions; give --input='),
    ([], 'is a model with conditions; give --input='),
    (['--input=aB7'], "'aB7' has what this model was not trained on: B 7$"),
    (['--input=a</s>b'], "not trained on: </s>$")])
def test_what_a_model_with_conditions_refuses(args, says, run, folder, tmp_path):
    with pytest.raises(UserError, match=says) as e:
        run('sample.py', f'--init_from={folder}/tasks', f'--out_dir={tmp_path}', '--device=cpu',
            *args)
    assert '\n' not in str(e.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize('args, ids', [([], [0, 1]), (['--num_samples=2'], [0, 1, 0, 1])])
def test_a_file_of_conditions_and_targets(args, ids, run, folder, tmp_path):
    """num_samples is how many of each; what the model will not see as it is, is said."""
    file = tmp_path / 'pairs.jsonl'
    file.write_text('{"source": "abcdef", "target": "x"}\n{"input": "ü", "target": 7, "n": 3}\n')
    out = run('sample.py', f'--init_from={folder}/tasks', f'--out_dir={tmp_path}', '--device=cpu',
              f'--input_file={file}', *args)
    lines = (tmp_path / 'samples.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row['id'] for row in rows] == list(range(len(ids)))
    assert [(row['input'], row['target']) for row in rows] == [
        [('abcdef', 'x'), ('ü', 7)][i] for i in ids]
    assert f'{file} has what this model was not trained on: ü\n' in out
    assert 'the longest condition has 7 tokens with its EOS; the model reads the first 4' in out
    assert '--- 0: abcdef\n' in out and '\ntarget: 7\n' in out
    assert len({row['generated'] for row in rows[::2]}) == len(rows[::2])       # not the same twice


def test_what_ends_a_row_is_left_out_of_conditions(letters):
    c = ELFConfig(max_length=8, max_input_length=5)
    ids, known = known_tokens(['a</s>b<pad>', 'abcdefgh'], [1, 0], letters, c)
    assert ids.tolist() == [[4, 5, 6, 7, 8, 0, 0, 0], [4, 5, 1, 0, 0, 0, 0, 0]]
    assert known.sum(1).tolist() == [5, 3] and known.dtype == torch.bool
