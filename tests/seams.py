"""
What prompts are worth: real rows with a part filled in, judged by n-grams of the training text.

    python tests/seams.py out/pydocs data pydocs 100      # model, data_dir, dataset, rows

Nats per character (5-gram) and per token (3-gram) over what was filled in and what comes after it
and has it in its context. pasted: the same places of an unconditional sample; held: as sample.py
does it; clean: the known latents shown as they are, as for conditions; real: what stood there.
"""
import math
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import sample  # noqa: E402, found by the path above
from parts.data import load_tokenizer, open_bins, open_split, read_row  # noqa: E402
from parts.metrics import ngram_p, train_ngram  # noqa: E402
from model import ELF, TextEncoder  # noqa: E402
from parts.page import token_texts  # noqa: E402
from parts.prompt import HOLE  # noqa: E402


def rows_of(meta, which, n):
    """Up to n rows of a split, evenly spaced -> lists of ids, with their EOS."""
    ids, index = open_split(meta, which)
    numbers = np.linspace(0, len(index), min(n, len(index)), endpoint=False).astype(int)
    return [read_row(ids, index, r)[1].tolist() for r in numbers]


def signs(ids):
    """Ids as a text with one sign for each."""
    return ''.join(map(chr, ids))


def nats_at(tokens, start, end, ngram, reach):
    """-log P of the characters of tokens start to end and of those they touch -> sum, count."""
    text = ''.join(tokens)
    first = len(''.join(tokens[:start]))
    last = min(len(''.join(tokens[:end])) + reach, len(text))
    nats = 0.0
    for i in range(first, last):
        nats -= math.log(ngram_p(text[i], text[:i], ngram))
    return nats, last - first


def main(source, data_dir, dataset, n):
    meta, model = open_bins(data_dir, dataset), ELF.from_pretrained(source)
    c = model.config
    tokenizer = load_tokenizer(c.tokenizer)
    encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std)
    train = rows_of(meta, 'train', 10**9)
    of_chars = train_ngram([tokenizer.decode(ids, skip_special_tokens=True) for ids in train])
    of_tokens = train_ngram(map(signs, train), 3)
    rows = [ids[:c.max_length] for ids in rows_of(meta, 'val', 3 * n)]
    rows = [ids for ids in rows if len(ids) > 0.8 * c.max_length][:n]
    sampling = sample.resolve_sampling(c)
    device, held = torch.device('cpu'), sample.generate

    def clean(*args, noisy_cond, **kwargs):
        return held(*args, **kwargs)

    free = sample.sample_texts(model, None, [{}] * len(rows), 50, 0, sampling)
    for name, part in (('middle third', (1 / 3, 2 / 3)), ('second half', (0.5, 1))):
        sums = {}
        for i, ids in enumerate(rows):
            start, end = [round(x * len(ids)) for x in part]
            row = ids[:start] + [HOLE] * (end - start) + ids[end:]
            filled = dict(real=ids, pasted=ids[:start] + free[i]['ids'][start:end] + ids[end:])
            for kind, generate in (('held', held), ('clean', clean)):
                sample.generate = generate
                # what is given are ids, not a text
                sample.encode_given = lambda given, tokenizer, c: given
                text, = sample.sample_batch(model, tokenizer, [i], 0, device, sampling,
                                            {i: row}, encoder)
                filled[kind] = text['ids']
            for kind, ids_of in filled.items():
                by_chars = nats_at(token_texts(ids_of, tokenizer), start, end, of_chars, 4)
                by_tokens = nats_at(signs(ids_of), start, end, of_tokens, 2)
                sums.setdefault(kind, []).append((by_chars, by_tokens))
        for kind, of_rows in sums.items():
            line = f"{name:14} {kind:8}"
            for nats, counts in np.array(of_rows).transpose(1, 2, 0):
                # the ratio's standard error over rows
                error = np.std(nats - nats.sum() / counts.sum() * counts) / counts.mean()
                line += f" {nats.sum() / counts.sum():.3f} +- {error / math.sqrt(len(rows)):.3f}"
            print(line, flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:4], int(sys.argv[4]))
