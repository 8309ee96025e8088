"""
What lies on disk for training: bins, the order of their rows, text files, the tokenizer.

A set is a folder, data/<name>/:
    train.bin, val.bin              token ids, uint16 or uint32, rows end to end
    train.idx.npy, val.idx.npy      int64 (rows, 2): where a row starts, and where its target starts
    meta.json                       types, sizes, tokenizer, encoder, scale of latents, checksums
    val.jsonl                       of a set with conditions: input and target of each row of val
A row is condition then target, each with its EOS; unconditional rows have an empty condition.
"""
import contextlib
import hashlib
import json
import math
import os
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from parts.process import UserError, from_hub, one_line

# -------------------------------------------------------------------------------------------------
# bins

FILES = ('train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy')


def open_bins(data_dir, dataset, verify=False):
    """
    meta.json of a prepared set -> dict, with its folder as 'dir', tokenizer and encoder as names to
    load. Sizes are checked against it, with verify checksums too. UserError if anything differs.
    """
    folder = os.path.join(data_dir, dataset)
    finish_swap(data_dir, dataset)
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        meta['dir'] = folder
        for part in ('tokenizer', 'encoder'):       # trained or seeded ones lie beside the bins
            if os.path.isdir(os.path.join(folder, meta[part])):
                meta[part] = os.path.join(folder, meta[part])
        for split in ('train', 'val'):
            ids, index = open_split(meta, split)
            if [len(ids), *index.shape] != [meta['tokens'][split], meta['rows'][split], 2]:
                raise ValueError(f"{split} has {len(ids)} tokens in {len(index)} rows, not what "
                                 "meta.json speaks of")
        ids = [meta[name] in range(meta['vocab_size']) for name in ('pad_id', 'eos_id')]
        sizes = [meta[name] in range(1, 1 << 40) for name in ('latent_dim', 'max_length')]
        scale = 0 < meta['latent_std'] < math.inf and math.isfinite(meta['latent_mean'])
        if not all((*ids, *sizes, scale, dict(meta['checksums']))):
            raise ValueError("numbers of meta.json that make no set")
        for name in FILES if verify else ():
            if sha256(os.path.join(folder, name)) != meta['checksums'][name]:
                raise ValueError(f"{name} has another checksum")
    except FileNotFoundError as e:
        raise UserError(f"{e.filename} not found; run: python prepare.py --dataset={dataset}, or "
                        "the command at the top of its config file; in training --dataset is the "
                        f"name of a folder in {data_dir}") from None
    except PermissionError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
    except Exception as e:      # a damaged file can raise nearly anything
        raise UserError(f"{folder} is damaged ({one_line(e)}); prepare the dataset again") from None
    return meta


def finish_swap(data_dir, name):
    """Put a set back that prepare.py had moved aside when it was killed between its two renames."""
    folder, old = os.path.join(data_dir, name), os.path.join(data_dir, f'.{name}.old')
    if os.path.isdir(old) and not os.path.exists(folder):
        with contextlib.suppress(FileNotFoundError):        # another rank was faster
            os.replace(old, folder)


def check_bins(meta, config):
    """UserError if a run with these settings cannot train on these bins."""
    length, input_length = config['max_length'], config['max_input_length']
    for part in ('encoder', 'tokenizer'):
        if config[part] not in ('', meta[part]):
            raise UserError(f"{meta['dir']} was made with {part} {meta[part]}, this run asks for "
                            f"{config[part]}; prepare it again or drop --{part}")
    if bool(input_length) != meta.get('conditional', False):
        raise UserError(f"{meta['dir']} has {'no ' * bool(input_length)}conditions, but "
                        f"max_input_length is {input_length}: the condition tokens to keep, or 0")
    if meta['max_length'] > length and not input_length:
        raise UserError(f"{meta['dir']} has rows of {meta['max_length']} tokens, max_length is "
                        f"{length}; raise it or prepare shorter rows")
    if input_length >= length:
        raise UserError(f"max_input_length={input_length} leaves no room for a target in rows of "
                        f"max_length={length}; lower it")


def check_vocabulary(meta, c, source):
    """UserError if a model with the settings c, from source, is not one for these bins."""
    for k in ('vocab_size', 'latent_dim'):
        if getattr(c, k) != meta[k]:
            raise UserError(f"{source} does not fit the data: {k} is {getattr(c, k)} there, "
                            f"{meta[k]} in {meta['dir']}; name the dataset it was trained on")


def open_split(meta, split):
    """-> ids (tokens,), index (rows, 2), both memory-mapped."""
    # mapped anew each time: a map kept open would count every page ever read as resident memory
    ids = np.memmap(os.path.join(meta['dir'], f'{split}.bin'), dtype=meta['dtype'], mode='r')
    return ids, np.load(os.path.join(meta['dir'], f'{split}.idx.npy'), mmap_mode='r')


def read_row(ids, index, r):
    """Row r of a split -> ids of its condition (perhaps none), ids of its target."""
    start, target = index[r]
    end = index[r + 1, 0] if r + 1 < len(index) else len(ids)
    if not 0 <= start <= target <= end <= len(ids):
        raise UserError(f"row {r} of {ids.filename} has offsets {start}, {target}, {end}; "
                        "prepare the dataset again")
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
    lengths, cond_lengths = np.zeros((2, len(rows), 1), dtype=np.int64)
    for i, r in enumerate(rows):
        cond, target = read_row(data, index, r)
        row = np.concatenate((cond[:c.max_input_length], target))[:c.max_length]
        ids[i, :len(row)] = row
        lengths[i], cond_lengths[i] = len(row), min(len(cond), c.max_input_length)
    if ids.max() >= meta['vocab_size']:
        raise UserError(f"{meta['dir']}/{split}.bin has token id {ids.max()}, the vocabulary ends "
                        f"at {meta['vocab_size'] - 1}; prepare it again")
    position = np.arange(c.max_length)
    return tuple(map(torch.from_numpy, (ids, position < lengths, position < cond_lengths)))


def write_split(folder, split, rows, dtype, vocab_size, eos=None):
    """
    Stream (condition ids, target ids) to folder/<split>.bin and .idx.npy -> rows, tokens, longest
    row. UserError for ids outside the vocabulary and, with eos, for ends that are something else.
    """
    index, tokens = [np.empty((0, 2), np.int64)], 0     # 16 bytes a row stay in memory
    with open(os.path.join(folder, f'{split}.bin'), 'wb') as f:
        for batch in batched(rows, 1000):
            parts = [part for row in batch for part in row]
            lengths = np.array([len(part) for part in parts])
            ids, ends = np.concatenate(parts).astype(np.int64), np.cumsum(lengths)
            last = ends[lengths > 0] - 1
            bad = (ids < 0) | (ids >= vocab_size)
            bad[last] |= eos is not None and ids[last] != eos
            if bad.any():
                at = np.argmax(bad)
                row = sum(map(len, index)) + np.searchsorted(ends[1::2], at, side='right')
                raise UserError(f"row {row} of {split} has token id {ids[at]}; the vocabulary has "
                                f"{vocab_size}, and condition and target end in EOS, {eos}: take "
                                "padding off, add EOS, or name the tokenizer they are from")
            f.write(ids.astype(dtype).tobytes())
            index.append(tokens + (ends - lengths).reshape(-1, 2))
            tokens += len(ids)
    index = np.concatenate(index)
    np.save(os.path.join(folder, f'{split}.idx.npy'), index)
    return len(index), tokens, int(np.diff(index[:, 0], append=tokens).max(initial=0))


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


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


def cut_at_eos(ids, eos):
    """A list of ids up to its first EOS, which goes too."""
    return ids[:ids.index(eos)] if eos in ids else ids


def printable(text):
    """For the terminal: one line, without control characters, which could move the cursor."""
    return ''.join(ch if ch.isprintable() else ' ' if ch.isspace() else f"\\x{ord(ch):02x}"
                   for ch in text)


def read_lines(file):
    """Lines of a UTF-8 file, perhaps compressed (.gz, ...). UserError names file and line."""
    from fsspec.implementations.local import LocalFileSystem
    n = 0
    try:
        with LocalFileSystem().open(file, compression='infer') as f:
            for n, line in enumerate(f, 1):
                encoding = 'utf-8-sig' if n == 1 else 'utf-8'
                yield line.decode(encoding).replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as e:
        raise UserError(f"{file}, line {n}: byte {e.object[e.start]:#04x} is not UTF-8; "
                        "save the file as UTF-8") from None
    except Exception as e:      # each compression has errors of its own
        why = getattr(e, 'strerror', None) or one_line(e)
        raise UserError(f"cannot read {file}: {why}") from None


def read_jsonl(file):
    """The objects of a JSONL file -> (file and line, dict). UserError names the line."""
    for n, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}")
            if '\\u' in line:       # half a surrogate pair is valid JSON and no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}, line {n} is no JSON object ({e}): {line[:60]!r}") from None
        yield f"{file}, line {n}", row


def read_inputs(file):
    """The lines of a JSONL with conditions -> dicts with 'input'. UserError names the line."""
    rows = []
    for where, row in read_jsonl(file):
        row['input'] = row.get('input', row.get('source'))
        if not isinstance(row['input'], str):
            raise UserError(f"{where} needs a text under 'input' (or 'source')")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} has no lines")
    return rows


def to_json(x):
    """A dict -> one line of JSON, which has no nan: null."""
    plain = json.loads(json.dumps(x), parse_constant=lambda _: None)
    return json.dumps(plain, ensure_ascii=False)


def write_jsonl(file, rows):
    """Dicts as JSON lines, without their 'ids'; the file is there whole or not at all."""
    with open(file + '.tmp', 'w', encoding='utf-8') as f:
        for row in rows:
            f.write(to_json({k: v for k, v in row.items() if k != 'ids'}) + '\n')
    os.replace(file + '.tmp', file)
