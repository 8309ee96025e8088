"""
data.py: bins read and refused, the order of rows, what a batch says of itself, text files.
    python -m pytest -q tests/test_data.py
"""
import bz2
import gzip
import json
import lzma
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configurator import UserError
from parts.data import (FILES, add_lines, cut_at_eos, get_rows, load_tokenizer, open_bins,
                        open_split, printable, read_inputs, read_jsonl, read_row, row_seed,
                        rows_at, write_split)
from model import ELFConfig, encode_rows


@pytest.fixture
def tiny_set(bins, tmp_path):
    """A copy of the set 'tiny' in tmp_path -> its folder."""
    return shutil.copytree(bins / 'tiny', tmp_path / 'tiny')


def change_meta(folder, **changes):
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps(meta | changes))


def refused(folder, says=None):
    """open_bins refuses the set, in one line that says this."""
    with pytest.raises(UserError, match=says) as e:
        open_bins(str(folder.parent), folder.name)
    assert '\n' not in str(e.value) and 'prepare' in str(e.value)


# --------------------------------------------------------------------------------------------------
# bins

def test_open_bins(tiny_set):
    meta = open_bins(str(tiny_set.parent), 'tiny')
    assert meta['dir'] == str(tiny_set) and meta['rows'] == dict(train=96, val=24)
    assert meta['tokenizer'] == str(tiny_set / 'tokenizer')     # beside the bins
    change_meta(tiny_set, encoder='t5-small')
    assert open_bins(str(tiny_set.parent), 'tiny')['encoder'] == 't5-small'     # on the hub
    ids, index = open_split(meta, 'val')
    assert ids.shape == (24 * 13,) and index.shape == (24, 2)


def test_a_swap_that_was_cut_short_is_finished(tiny_set):
    tiny_set.rename(tiny_set.parent / '.tiny.old')
    assert open_bins(str(tiny_set.parent), 'tiny')['rows']['val'] == 24
    assert os.listdir(tiny_set.parent) == ['tiny']


@pytest.mark.parametrize('changes, says', [
    (dict(dtype='int8'), 'damaged'), (dict(dtype='uint32'), 'train is not of the sizes'),
    (dict(rows=3), 'damaged'), (dict(rows=dict(train=95, val=24)), 'train is not of the sizes'),
    (dict(latent_std=float('nan')), 'numbers'), (dict(vocab_size='30'), 'damaged'),
    (dict(eos_id=None), 'damaged'), (dict(checksums={}), 'damaged')])
def test_metadata_that_cannot_be(tiny_set, changes, says):
    change_meta(tiny_set, **changes)
    refused(tiny_set, says)


@pytest.mark.parametrize('name', ['meta.json', *FILES])
def test_files_that_are_gone_or_cut(tiny_set, name):
    data = (tiny_set / name).read_bytes()
    (tiny_set / name).write_bytes(data[:-1])
    refused(tiny_set, re.escape(str(tiny_set)))
    (tiny_set / name).unlink()
    refused(tiny_set, f'cannot read .*{name}: No such file .*python prepare.py --dataset=tiny')


@pytest.mark.parametrize('name', ['train.bin', 'val.idx.npy'])
def test_bins_cut_at_each_of_the_last_lengths_are_refused(tiny_set, name):
    whole = (tiny_set / name).read_bytes()
    for n in range(1, 65):
        (tiny_set / name).write_bytes(whole[:-n])
        refused(tiny_set)


def test_bins_without_permission_are_not_called_damaged(tiny_set, monkeypatch):
    def no(file, **how):
        raise PermissionError(13, 'Permission denied', str(file))
    monkeypatch.setattr(np, 'load', no)
    with pytest.raises(UserError, match='^cannot read .*train.idx.npy: Permission denied;'):
        open_bins(str(tiny_set.parent), 'tiny')


def test_rows_without_eos_are_refused(tmp_path):
    good, bad = [([5, 1], [6, 1]), ([], [7, 1])], [([5], [6, 1]), ([], [7, 1, 0])]
    meta = dict(dir=str(tmp_path), dtype='uint16', vocab_size=9, eos_id=1)
    assert write_split(meta, 'val', good * 600)[0] == 1200
    for row, wrong in zip(bad, (5, 0)):
        with pytest.raises(UserError, match=f'val has token id {wrong} .* end in EOS, 1: take'):
            write_split(meta, 'val', good * 600 + [row])


def test_read_row():
    ids, index = np.arange(9), np.array([[0, 2], [3, 3], [5, 9]])
    rows = [[part.tolist() for part in read_row(ids, index, r)] for r in range(3)]
    assert rows == [[[0, 1], [2]], [[], [3, 4]], [[5, 6, 7, 8], []]]


def test_get_rows_pads_cuts_and_marks(tmp_path):
    rows = [([10, 11, 12, 1], [20, 1]), ([], [30, 1]), ([40, 41, 42, 43, 1], [44, 1])]
    meta = dict(dir=str(tmp_path), dtype='uint16', vocab_size=99, pad_id=0, eos_id=1)
    assert write_split(meta, 'train', rows) == (3, 15, 7)
    c = ELFConfig(max_length=5, max_input_length=3)
    ids, valid, cond = get_rows(meta, 'train', [2, 0, 1], c)
    assert ids.tolist() == [[40, 41, 42, 44, 1], [10, 11, 12, 20, 1], [30, 1, 0, 0, 0]]
    assert ids.dtype == torch.int64 and valid.dtype == cond.dtype == torch.bool
    assert valid.sum(1).tolist() == [5, 5, 2] and cond.sum(1).tolist() == [3, 3, 0]
    assert valid[2, 0] and cond[0, 0]       # each mask begins at the left
    c.pad_token, c.max_length = 'eos', 4
    assert get_rows(meta, 'train', [1, 0], c)[0].tolist() == [[30, 1, 1, 1], [10, 11, 12, 20]]


@pytest.mark.parametrize('pad, counts', [('pad', [0, 0, 1, 1, 0, 0]), ('eos', [0, 0, 1, 1, 1, 1])])
def test_encode_rows_says_what_counts_and_whose_condition_is_dropped(pad, counts):
    batch = [torch.arange(6)[None], torch.tensor([[1, 1, 1, 1, 0, 0]]).bool(),
             torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()]
    drop, seen = torch.tensor([True]), []

    def encoder(*args):
        seen.extend(args)
        return 'latents'
    draws, c = SimpleNamespace(drop_cond=drop), ELFConfig(pad_token=pad)
    x0, tokens, loss_mask, cond = encode_rows(encoder, batch, draws, c, torch.device('cpu'))
    assert x0 == 'latents' and loss_mask.int().tolist() == [counts]
    assert torch.equal(tokens, batch[0]) and torch.equal(cond, batch[2])
    assert all(map(torch.equal, seen, [*batch, drop]))


# --------------------------------------------------------------------------------------------------
# order

def test_every_epoch_sees_each_row_once():
    rows = np.concatenate([rows_at(10, 1, first, 4) for first in range(0, 40, 4)])
    for epoch in rows.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(rows[:10], rows[10:20])
    assert np.array_equal(rows_at(10, 1, 8, 25), rows[8:33])
    assert not np.array_equal(rows_at(10, 2, 0, 40), rows)


def test_seeds_of_neighbours_share_nothing():
    seeds = {row_seed(s, i) for s in range(30) for i in range(30)}
    assert len(seeds) == 900 and all(0 <= s < 2**63 for s in seeds) and max(seeds) > 2**62

# --------------------------------------------------------------------------------------------------
# text

def test_a_tokenizer_with_more_ids_than_the_model_is_refused(bins):
    name = str(bins / 'tiny' / 'tokenizer')
    assert len(load_tokenizer(name)) == len(load_tokenizer(name, 30)) == 30
    assert len(load_tokenizer(name, 32)) == 30      # T5's own: 32100 ids, 32128 rows
    with pytest.raises(UserError, match="has 30 ids, the model's vocabulary 29"):
        load_tokenizer(name, 29)
    with pytest.raises(UserError, match='no tokenizer: .*is no file or folder here'):
        load_tokenizer(str(bins / 'none'))


def test_cut_at_eos_and_printable():
    assert cut_at_eos([5, 1, 6], 1) == [5] and cut_at_eos([5, 6], 1) == [5, 6]
    assert cut_at_eos([1], 1) == []
    assert printable('a\x1b[2Jb\nc é') == 'a [2Jb c é'


def test_json_lines(tmp_path):
    file = str(tmp_path / 'x.jsonl')
    add_lines(file, [dict(input='é', ids=[3], x=float('nan'))])
    add_lines(file, [dict(source='b', input='c')])
    assert os.listdir(tmp_path) == ['x.jsonl']
    (first, a), (_, b) = read_jsonl(file)
    assert first == f'{file}, line 1' and a == dict(input='é', x=None) and b['source'] == 'b'
    pairs = list(read_jsonl(file))
    for name, pack in (('gz', gzip), ('bz2', bz2), ('xz', lzma)):
        (tmp_path / f'{name}.jsonl.{name}').write_bytes(pack.compress(open(file, 'rb').read()))
        assert [row for _, row in read_jsonl(str(tmp_path / f'{name}.jsonl.{name}'))] == [
            row for _, row in pairs]
    (tmp_path / 'half.jsonl').write_text('{"input": "a\\ud83d\\ude00"}\n{"input": "\\ud83d"}\n')
    with pytest.raises(UserError, match='half.jsonl, line 2 is no JSON object'):
        list(read_jsonl(str(tmp_path / 'half.jsonl')))
    assert [row['input'] for row in read_inputs(file)] == ['é', 'c']
