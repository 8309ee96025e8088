"""
What lies on disk for training: bins, the order of their rows, text files, the tokenizer.

A set is a folder, data/<name>/:
    train.bin, val.bin              token ids, uint16 or uint32, rows end to end
    train.idx.npy, val.idx.npy      int64 (rows, 2): where a row starts, and where its target starts
    meta.json                       types, sizes, tokenizer, encoder, scale of latents, checksums
    val.jsonl                       of a set with conditions: input and target of each row of val
A row is condition then target, each with its EOS; unconditional rows have an empty condition.
"""
import hashlib
import json
import os
import shutil
from contextlib import suppress
from functools import lru_cache
from itertools import compress, islice
from pathlib import Path

import numpy as np
import torch

from parts.process import UserError, from_hub, one_line

# -------------------------------------------------------------------------------------------------
# bins

FILES = ('train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy')
NUMBERS = ('vocab_size', 'pad_id', 'eos_id', 'max_length', 'latent_dim', 'latent_mean',
           'latent_std')     # of meta.json


def open_bins(data_dir, dataset):
    """
    meta.json of a prepared set -> dict, with its folder as 'dir', tokenizer and encoder as names to
    load. UserError if it is gone, or if the bins are not of the sizes that it speaks of.
    """
    folder = os.path.join(data_dir, dataset)
    finish_swap(Path(folder))
    try:
        meta = json.loads(Path(folder, 'meta.json').read_text('utf-8'))
        meta['dir'] = folder
        for part in ('tokenizer', 'encoder'):       # trained or seeded ones lie beside the bins
            beside = os.path.join(folder, meta[part])
            if os.path.isdir(beside):
                meta[part] = beside
        for split in ('train', 'val'):
            ids, index = open_split(meta, split)
            if [len(ids), *index.shape] != [meta['tokens'][split], meta['rows'][split], 2]:
                raise ValueError(f"{split} is not of the sizes that meta.json has")
        numbers = [meta[name] for name in NUMBERS]
        if not np.isfinite(numbers).all() or not meta['checksums']:
            raise ValueError("meta.json has numbers that are none")
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}; --dataset is the name of a set "
                        f"made before, by python prepare.py --dataset={dataset} or the command at "
                        "the top of its config file") from None
    except Exception as e:      # a damaged file can raise nearly anything
        raise UserError(f"{folder} is damaged ({one_line(e)}); prepare the dataset again") from None
    return meta


def swap_in(new, folder):
    """Put a new set in the place of the old; finish_swap mends what a kill in between leaves."""
    aside = folder.with_name(f'.{folder.name}.old')
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def finish_swap(folder):
    """Put a set back that was moved aside by a swap_in that was killed between its two renames."""
    with suppress(OSError):         # there is none, its place is taken, another rank was faster
        folder.with_name(f'.{folder.name}.old').rename(folder)


def check_bins(meta, config):
    """UserError if a run with these settings cannot train on these bins."""
    length = config['max_length']
    input_length = config['max_input_length']
    for part in ('encoder', 'tokenizer'):
        if config[part] not in ('', meta[part]):
            raise UserError(f"{meta['dir']} was made with {part} {meta[part]}, this run asks for "
                            f"{config[part]}; prepare it again or drop --{part}")
    if bool(input_length) != meta.get('conditional', False):
        raise UserError(f"{meta['dir']} has {'no ' * bool(input_length)}conditions, but "
                        f"max_input_length is {input_length}: the condition tokens to keep, or 0")
    # a condition is cut, and then its target; a text on its own is not
    needed = input_length + 1 if input_length else meta['max_length']
    if length < needed:
        raise UserError(f"{meta['dir']} needs max_length={needed} or more here, not {length}; "
                        "raise it, or lower max_input_length or that of prepare.py")


def check_fit(meta, c, source, *names):
    """
    UserError if a model with the settings c, from source, is not one for these bins; names: what
    else must be alike.
    """
    for name in ('vocab_size', 'latent_dim', *names):
        if getattr(c, name) != meta[name]:
            raise UserError(f"{source} does not fit: {name} is {getattr(c, name)} there, and "
                            f"{meta[name]} by {meta['dir']} or a setting; take the dataset and "
                            "settings that it was trained with")


def open_split(meta, split):
    """-> ids (tokens,), index (rows, 2), both memory-mapped."""
    # mapped anew each time: a map kept open would count every page ever read as resident memory
    ids = np.memmap(f"{meta['dir']}/{split}.bin", dtype=meta['dtype'], mode='r')
    return ids, np.load(f"{meta['dir']}/{split}.idx.npy", mmap_mode='r')


def read_row(ids, index, r):
    """Row r of a split -> ids of its condition (perhaps none), ids of its target."""
    start, target = index[r]
    end = index[r + 1, 0] if r + 1 < len(index) else len(ids)
    return ids[start:target], ids[target:end]


def get_rows(meta, split, rows, c):
    """
    Rows of a split by number -> ids (B, T) int64, valid (B, T) no padding, cond (B, T) the
    condition. The condition is cut to c.max_input_length, the row to c.max_length and padded to it
    (c.pad_token).
    """
    data, index = open_split(meta, split)
    padding = meta['eos_id'] if c.pad_token == 'eos' else meta['pad_id']
    ids = np.full((len(rows), c.max_length), padding, dtype=np.int64)
    valid, cond = np.zeros((2, *ids.shape), dtype=bool)
    for i, r in enumerate(rows):
        condition, target = read_row(data, index, r)
        condition = condition[:c.max_input_length]
        row = np.concatenate((condition, target))[:c.max_length]
        ids[i, :len(row)] = row
        valid[i, :len(row)] = cond[i, :len(condition)] = True
    return tuple(map(torch.from_numpy, (ids, valid, cond)))


def write_split(meta, split, rows):
    """
    Stream (condition ids, target ids) to <split>.bin and .idx.npy -> rows, tokens, longest row.
    UserError for ids outside the vocabulary and for ends that are no EOS.
    """
    lengths = [np.empty(0, np.int64)]       # of all parts: 16 bytes a row stay in memory
    with open(f"{meta['dir']}/{split}.bin", 'wb') as f:
        for batch in batched(rows, 1000):
            parts = [part for row in batch for part in row]
            n = np.array([len(part) for part in parts])
            lengths.append(n)
            ids = np.concatenate(parts).astype(np.int64)
            last = n.cumsum()[n > 0] - 1
            bad = (ids < 0) | (ids >= meta['vocab_size'])
            bad[last] |= ids[last] != meta['eos_id']
            if bad.any():
                raise UserError(f"{split} has token id {ids[bad][0]} out of place: the vocabulary "
                                f"has {meta['vocab_size']}, and condition and target end in EOS, "
                                f"{meta['eos_id']}: take padding off, add EOS, or name the "
                                "tokenizer they are from")
            f.write(ids.astype(meta['dtype']).tobytes())
    lengths = np.concatenate(lengths).reshape(-1, 2)        # of condition and target
    starts = lengths.cumsum().reshape(-1, 2) - lengths
    np.save(f"{meta['dir']}/{split}.idx.npy", starts)
    return len(lengths), int(lengths.sum()), int(lengths.sum(1).max(initial=0))


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def batched(items, n):
    """Lists of n items, the last one of what is left."""
    items = iter(items)
    while batch := list(islice(items, n)):
        yield batch

# -------------------------------------------------------------------------------------------------
# order: where a run stands is one number; what is random in a row or a text follows from its own

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def rows_at(n, seed, first, count):
    """Numbers first ... first+count-1 of an endless stream of shuffled epochs of n rows."""
    return np.array([epoch_order(n, seed, i // n)[i % n] for i in range(first, first + count)])


def row_seed(seed, i):
    """The seed of text i, or micro-batch i, of a run: mixed, so that neighbours share nothing."""
    return int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] >> 1)

# -------------------------------------------------------------------------------------------------
# text

def load_tokenizer(name, vocab_size=None):
    """A tokenizer by hub id or folder. UserError if it is gone or has more ids than vocab_size."""
    from transformers import AutoTokenizer
    with from_hub("no tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    # of a folder without one transformers makes a tokenizer that knows nothing
    if len(tokenizer) <= 1 + len(tokenizer.all_special_ids):
        raise UserError(f"no tokenizer in {name!r}")
    if tokenizer.eos_token is None:         # BERT ends with [SEP]
        tokenizer.eos_token = tokenizer.sep_token
    if vocab_size and len(tokenizer) > vocab_size:
        raise UserError(f"tokenizer {name!r} has {len(tokenizer)} ids, the model's vocabulary "
                        f"{vocab_size}; it is not the one that the model was trained with")
    return tokenizer


def encode(texts, tokenizer):
    """
    Texts -> (text, its ids, where in it each stands) one after the other, made on all cores. '</s>'
    spelled out in a text is no EOS, but text; nothing where a tokenizer, T5's, cannot spell it.
    """
    for batch in batched(texts, 1000):
        codes = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)
        for text, code in zip(batch, codes.encodings):
            kept = [i != tokenizer.eos_token_id for i in code.ids]
            yield text, [*compress(code.ids, kept)], [*compress(code.offsets, kept)]


def cut_at_eos(ids, eos):
    """A list of ids up to its first EOS, which goes too."""
    return ids[:ids.index(eos)] if eos in ids else ids


def printable(text):
    """For the terminal: one line, without control characters, which could move the cursor."""
    return ''.join(ch if ch.isprintable() else ' ' for ch in text)


def read_lines(file):
    """Lines of a UTF-8 file, perhaps compressed (.gz, ...). UserError names file and line."""
    from fsspec.implementations.local import LocalFileSystem
    n = 0
    how = dict(encoding='utf-8-sig', errors='surrogateescape', compression='infer')
    try:
        with LocalFileSystem().open(file, 'rt', **how) as f:
            for n, line in enumerate(f, 1):
                line.encode()       # what is no UTF-8 fails here, where its line is known
                yield line
    except Exception as e:      # each compression has errors of its own
        where = f"{file}, line {n}" if n else file
        raise UserError(f"cannot read {where}: {one_line(e)}; it must be text in UTF-8, perhaps "
                        "compressed as its name says") from None


def read_jsonl(file):
    """The objects of a JSONL file -> (file and line, dict). UserError names the line."""
    for n, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a list or a value")
            if '\\u' in line:       # half a surrogate pair is valid JSON and no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}, line {n} is no JSON object ({e})") from None
        yield f"{file}, line {n}", row


def read_inputs(file, name='input', or_name='source'):
    """The lines of a JSONL -> dicts with a text under name. UserError names the line."""
    rows = []
    for where, row in read_jsonl(file):
        row[name] = row.get(name, row.get(or_name))
        if not isinstance(row[name], str):
            raise UserError(f"{where} needs a text under {name!r} (or {or_name!r})")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} has no lines")
    return rows


def to_json(x):
    """A dict -> one line of JSON, which has no nan: null."""
    plain = json.loads(json.dumps(x), parse_constant=lambda _: None)
    return json.dumps(plain, ensure_ascii=False)


def add_lines(file, rows, mode='a'):
    """Dicts, without their 'ids', to a file of JSON lines."""
    with open(file, mode, encoding='utf-8') as f:
        for row in rows:
            f.write(to_json({k: v for k, v in row.items() if k != 'ids'}) + '\n')
