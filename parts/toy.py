"""
What lets everything run without a download: a task made on the spot, tokenizers trained on the text
at hand, and a small T5 encoder whose vectors are made, not trained.
"""
import json
import random
import re
import string

import numpy as np
import torch
import torch.nn.functional as F

from parts.data import open_split

# -------------------------------------------------------------------------------------------------
# a task

BELOW_20 = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen '
            'fifteen sixteen seventeen eighteen nineteen').split()
TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()


def in_words(n):
    """A number from 0 to 999,999 in English: 4071 -> 'four thousand seventy-one'."""
    for size, word in ((1000, 'thousand'), (100, 'hundred')):
        if n >= size:
            rest = f' {in_words(n % size)}' if n % size else ''
            return f'{in_words(n // size)} {word}{rest}'
    if n < 20:
        return BELOW_20[n]
    return TENS[n // 10 - 2] + (f'-{BELOW_20[n % 10]}' if n % 10 else '')


def numbers():
    """
    Rows of a number below a million in digits and in words: 100 to train on, then one that is held
    out, a thousand times. The former have as many digits as the largest of three dice, and
    in one of four half the digits are zeros, so that short and round numbers are known, too.
    """
    rng = random.Random(0)
    examples = [6, 42, 305, 4071, 58_213, 70_006, 311_840, 900_017]
    held_out = examples + rng.sample(range(1_000_000), 992)
    unseen = set(held_out)
    for last in held_out:
        drawn = []
        while len(drawn) < 100:
            length = max(rng.randint(1, 6) for _ in range(3))
            digits = '0123456789' if len(drawn) % 4 else '000000000123456789'
            drawn += {int(''.join(rng.choices(digits, k=length)))} - unseen
        for n in (*drawn, last):
            yield dict(input=str(n), target=in_words(n))

# -------------------------------------------------------------------------------------------------
# tokens

def train_tokenizer(texts, level, size, letters_only=False):
    """
    A tokenizer of 'chars', of 'words' (each with what joins it to the one before; each digit by
    itself), or of at most size 'subwords', under T5's conventions (pad 0, eos 1, unk 2), which
    gives every text of its symbols back exactly. With letters_only only a to z and the space are
    symbols of subwords, else all bytes are.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ['<pad>', '</s>', '<unk>']
    if level == 'subwords':
        signs = pre_tokenizers.ByteLevel.alphabet()
        tok = Tokenizer(models.BPE(unk_token='<unk>'))
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                      initial_alphabet=signs)
        tok.train_from_iterator(texts, trainer)
        if letters_only:        # other bytes keep their ids, but no text has them: they are unknown
            state = json.loads(tok.to_str())
            vocab = state['model']['vocab']
            for sign in set(signs) - set('Ġ' + string.ascii_lowercase):
                i = vocab.pop(sign)
                vocab[f'[unused{i}]'] = i
            tok = Tokenizer.from_str(json.dumps(state))
    else:
        pattern = r'[\s\S]' if level == 'chars' else r'[ -]?[^\W\d_]+|[\s\S]'
        symbols = {symbol for text in texts for symbol in re.findall(pattern, text)}
        ids = {symbol: i for i, symbol in enumerate(special + sorted(symbols))}
        tok = Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
        tok.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), 'isolated')
        tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>',
                                   unk_token='<unk>', clean_up_tokenization_spaces=False)

# -------------------------------------------------------------------------------------------------
# latents

def neighbour_vectors(meta, dim, seed):
    """
    Vectors (V, dim) of tokens by the company they keep, so that "is" lies near "was": how much more
    often than by chance each other token stands right before or after, as a positive logarithm,
    reduced to dim singular directions. The strongest one only tells how frequent a token is and is
    left out. Mean square norm 1; rare tokens are short.
    """
    V = meta['vocab_size']
    ids = torch.from_numpy(open_split(meta, 'train')[0][:2_000_000].astype(np.int64))
    torch.sparse.check_sparse_tensor_invariants.disable()       # who does not choose is warned
    ones = torch.ones(len(ids) - 1, dtype=torch.float64)
    after = torch.sparse_coo_tensor(ids.unfold(0, 2, 1).T, ones, (V, V))
    pairs = torch.cat((after.T, after), dim=1).coalesce()
    counts, (token, beside) = pairs.values(), pairs.indices()       # each (pairs,)
    # the power keeps rare neighbours from ruling
    often = token.bincount(counts)
    often_beside = beside.bincount(counts) ** 0.75
    chance = often[token] * often_beside[beside] / often_beside.sum()
    surprise = (counts / chance).log().clamp(0).float()
    surprise = torch.sparse_coo_tensor(pairs.indices(), surprise, pairs.shape)
    torch.manual_seed(seed)         # the method starts from random directions
    u, s, _ = torch.svd_lowrank(surprise, q=min(dim + 1, V), niter=4)
    vectors = F.pad(u[:, 1:] * s[1:].sqrt(), (0, dim + 1 - len(s)))
    return vectors / vectors.square().sum(-1).mean().sqrt()


def save_encoder(path, meta, dim, layers, seed):
    """
    A small T5 encoder with seeded random weights, but for its token vectors: those of their
    neighbours, and some noise that tells apart what is alike. That is all the demo needs.
    """
    from transformers import T5Config, T5EncoderModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    config = T5Config(vocab_size=meta['vocab_size'], d_model=dim, d_kv=dim // 4,
                      d_ff=2 * dim, num_layers=layers, num_heads=4)
    torch.manual_seed(seed)
    model = T5EncoderModel(config)
    table = model.get_input_embeddings().weight.data        # unit normal
    table.mul_(0.4).add_(neighbour_vectors(meta, dim, seed), alpha=dim ** 0.5)
    model.save_pretrained(path)
