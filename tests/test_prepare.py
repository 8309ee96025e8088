"""
prepare.py: bins, trained tokenizers, random encoder, packing, and texts that are refused.
    python -m pytest -q tests/test_prepare.py
"""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import prepare
import train
from configurator import UserError
from model import TextEncoder


@pytest.fixture(scope='module')
def text():
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghij', k=rng.randint(1, 9))) for _ in range(300)]
    return '\n\n'.join(' '.join(rng.choices(words, k=rng.randint(5, 60))).capitalize() + '.' for _ in range(120))


def prepared(run, tmp_path, text, *args):
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    out = run('prepare.py', f'--dataset={tmp_path / "my.txt"}', f'--data_dir={tmp_path / "data"}', *args)
    return out, train.open_bins(str(tmp_path / 'data'), 'my')


@pytest.mark.parametrize('args', [[], ['--letters_only=false'], ['--letters_only=false', '--token_level=subwords', '--vocab_size=400', '--encoder_dim=16']],
                         ids=['letters', 'chars', 'subwords'])
def test_a_text_file_end_to_end(run, tmp_path, text, args):
    out, meta = prepared(run, tmp_path, text, *args)
    assert 'first row' in out and 'next: python train.py config/demo.py --dataset=my' in out
    tok = AutoTokenizer.from_pretrained(meta['tokenizer'])
    assert (tok.pad_token_id, tok.eos_token_id, tok.unk_token_id, len(tok)) == (0, 1, 2, meta['vocab_size'])
    whole, rows = [], 0
    for split in ('train', 'val'):
        data = np.memmap(os.path.join(meta['dir'], f'{split}.bin'), dtype=meta['dtype'], mode='r')
        index = np.load(os.path.join(meta['dir'], f'{split}.idx.npy'))
        assert index.shape == (meta['rows'][split], 2) and index.dtype == np.int64 and len(data) == meta['tokens'][split]
        assert (index[:, 0] == index[:, 1]).all() and index[0, 0] == 0 and (np.diff(index[:, 0]) > 1).all()
        ends = np.append(index[1:, 0], len(data))
        assert (data[ends - 1] == 1).all() and (data == 1).sum() == len(index) and (ends - index[:, 0]).max() <= 32 and not (data == 2).any()
        assert prepare.sha256(os.path.join(meta['dir'], f'{split}.bin')) == meta['checksums'][f'{split}.bin']
        whole += [tok.decode(data[a:b - 1].tolist()) for a, b in zip(index[:, 0], ends)]
        rows += len(index)
    # every word of the text is in some row, whole and in its place
    words = text.lower().replace('.', '').split() if not args else text.split()
    found = ' '.join(whole).split()
    assert sorted(found) == sorted(words)
    assert all(row == row.strip() and row for row in whole) or '--token_level=subwords' in args      # there a space is part of its word
    encoder = TextEncoder(meta['encoder'], meta['latent_mean'], meta['latent_std'])
    ids, valid, _ = train.get_rows(meta, 'train', range(40), 32)
    x0 = encoder(ids, valid)[valid]
    assert abs(x0.mean()) < 0.05 and abs(x0.std() - 1) < 0.05 and x0.shape[1] == meta['latent_dim']


def test_the_same_twice_and_other_with_another_seed(run, tmp_path, text):
    _, a = prepared(run, tmp_path, text)
    weights = TextEncoder(a['encoder']).state_dict()
    _, b = prepared(run, tmp_path, text)
    assert {k: v for k, v in a.items()} == b
    assert all(torch.equal(v, weights[k]) for k, v in TextEncoder(b['encoder']).state_dict().items())
    _, c = prepared(run, tmp_path, text, '--seed=1')
    assert c['checksums'] != a['checksums']


def test_pydocs_is_prose(run):
    text = prepare.pydocs_text()
    assert len(text) > 150_000 and '::=' not in text and '>>>' not in text and '+---' not in text
    assert 'assert statements are a convenient way to insert debugging assertions into a program' in text.lower()


def test_validation_text_is_not_trained_on(text):
    a, b = prepare.split_text(text, 0.2, 0)
    assert len(a) + len(b) == len(text) and 0.1 < len(b) / len(text) < 0.35
    assert not set(a.split('\n\n')) & set(b.split('\n\n')) - {''}


def test_words_longer_than_a_row_are_cut():
    tok = prepare.train_tokenizer('abc d', 'chars', 0)
    assert [tok.decode(ids[:-1]) for _, ids in prepare.pack_rows('abcabcabc d  ab', tok, 5)] == ['abca', 'bcab', 'c d', 'ab']


def test_end_tokens_spelled_out_in_the_text_do_not_end_rows():
    tok = prepare.train_tokenizer('ab </s><pad>', 'chars', 0)
    assert [ids.count(1) for _, ids in prepare.pack_rows('ab</s>ab <pad> ab', tok, 50)] == [1]
    assert list(prepare.pack_rows('</s>', tok, 50)) == []


def test_one_endless_line_is_split_at_words(text):
    a, b = prepare.split_text(' '.join(text.split()), 0.2, 0)
    assert sorted((a + ' ' + b).split()) == sorted(text.split()) and 0.1 < len(b) / len(a + b) < 0.35


def test_a_killed_swap_is_mended(run, tmp_path, text):
    _, meta = prepared(run, tmp_path, text)
    os.replace(tmp_path / 'data' / 'my', tmp_path / 'data' / '.my.old')
    with pytest.raises(UserError, match='after keeping a-z'):
        prepared(run, tmp_path, 'Ж' * 9000)
    assert train.open_bins(str(tmp_path / 'data'), 'my') == meta


def test_rows_stream_and_ids_are_checked(tmp_path):
    n, tokens, longest = prepare.write_split(tmp_path, 'train', (([5, 1], [i, 1]) for i in range(3, 9)), 'uint16', 9)
    assert (n, tokens, longest) == (6, 24, 4)
    assert np.load(tmp_path / 'train.idx.npy')[1].tolist() == [4, 6]
    for bad in (9, -1):
        with pytest.raises(UserError, match=f'row 0 of val has token id {bad}'):
            prepare.write_split(tmp_path, 'val', [([], [bad, 1])], 'uint16', 9)


@pytest.mark.parametrize('content, says', [(b'', 'too little'), (b'two words', 'too little'), (b'ok\nbad \xff byte', 'line 2: byte 0xff is not UTF-8'), (None, 'cannot read')])
def test_texts_that_are_refused_leave_the_old_bins(run, tmp_path, text, content, says):
    _, meta = prepared(run, tmp_path, text)
    file = tmp_path / 'my.txt'
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        run('prepare.py', f'--dataset={file}', f'--data_dir={tmp_path / "data"}')
    assert train.open_bins(str(tmp_path / 'data'), 'my') == meta and sorted(os.listdir(tmp_path / 'data')) == ['my']


@pytest.mark.parametrize('arg, says', [('--tokenizer=./none', 'tokenizer'), ('--encoder=./none', 'text encoder'), ('--max_length=2', 'at least 4'),
                                       ('--token_level=words', 'token_level'), ('--val_fraction=1.5', 'val_fraction'),
                                       ('--latent_mean=0.5', 'give both'), ('--latent_std=-1', 'give both'), ('--name=a/b', 'without slashes')])
def test_settings_that_are_refused(run, tmp_path, text, arg, says):
    with pytest.raises(UserError, match=says):
        prepared(run, tmp_path, text, arg)
    assert not os.path.exists(tmp_path / 'data') or os.listdir(tmp_path / 'data') == []


def test_a_folder_of_something_else_is_not_replaced_and_errors_are_one_line(tmp_path, text):
    (tmp_path / 'my.txt').write_text(text)
    (tmp_path / 'data' / 'my').mkdir(parents=True)
    (tmp_path / 'data' / 'my' / 'thesis.tex').write_text('years')
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'prepare.py'), f'--dataset={tmp_path / "my.txt"}', f'--data_dir={tmp_path / "data"}'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'holds no bins' in done.stderr
    assert (tmp_path / 'data' / 'my' / 'thesis.tex').read_text() == 'years'
