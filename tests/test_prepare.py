"""
prepare.py: bins, trained tokenizers, random encoder, packing, and texts that are refused.
    python -m pytest -q tests/test_prepare.py
"""
import json
import os
import random
import shutil
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
    whole, words = [], text.split() if args else text.lower().replace('.', '').split()
    for split in ('train', 'val'):
        data = np.memmap(os.path.join(meta['dir'], f'{split}.bin'), dtype=meta['dtype'], mode='r')
        index = np.load(os.path.join(meta['dir'], f'{split}.idx.npy'))
        assert index.shape == (meta['rows'][split], 2) and index.dtype == np.int64 and len(data) == meta['tokens'][split]
        assert (index[:, 0] == index[:, 1]).all() and index[0, 0] == 0 and (np.diff(index[:, 0]) > 1).all()
        ends = np.append(index[1:, 0], len(data))
        assert (data[ends - 1] == 1).all() and (data == 1).sum() == len(index) and (ends - index[:, 0]).max() <= 32 and not (data == 2).any()
        assert prepare.sha256(os.path.join(meta['dir'], f'{split}.bin')) == meta['checksums'][f'{split}.bin']
        whole += [tok.decode(data[a:b - 1].tolist()) for a, b in zip(index[:, 0], ends)]
        following = iter(words)
        assert all(word in following for word in ' '.join(whole[-len(index):]).split())
    # every word of the text is in some row, whole; those of a split in their order
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
    assert a == b
    assert all(torch.equal(v, weights[k]) for k, v in TextEncoder(b['encoder']).state_dict().items())
    _, c = prepared(run, tmp_path, text, '--seed=1')
    assert c['latent_std'] != a['latent_std'] and c['checksums'] == a['checksums']      # the seed is the encoder's


def test_latents_measured_given_and_published(run, tmp_path, text, bins, monkeypatch):
    _, given = prepared(run, tmp_path, text, '--latent_mean=0.1', '--latent_std=0.5')
    assert (given['latent_mean'], given['latent_std']) == (0.1, 0.5)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bins / 'tiny' / 'encoder', 't5-small')        # a folder of this name: the published numbers hold
    _, published = prepared(run, tmp_path, text, '--encoder=t5-small')
    assert (published['latent_mean'], published['latent_std']) == (0.0, 0.2)


def test_a_table_with_a_hole_is_refused(run, tmp_path):
    from datasets import Dataset
    (tmp_path / 'set').mkdir()
    Dataset.from_dict(dict(text=['a long enough text'] * 50 + [None])).to_parquet(tmp_path / 'set' / 'x.parquet')
    with pytest.raises(UserError, match='row 50 lacks a text'):
        run('prepare.py', f"--dataset={tmp_path / 'set'}", f"--data_dir={tmp_path / 'data'}", '--letters_only=false')


def test_pydocs_is_prose(run):
    text = prepare.pydocs_text()
    assert len(text) > 150_000 and '::=' not in text and '>>>' not in text and '+---' not in text
    assert 'assert statements are a convenient way to insert debugging assertions into a program' in text.lower()


def test_blocks_give_the_text_back(text):
    for lines in (text.splitlines(keepends=True), [' '.join(text.split())], ['x' * 9000], []):
        got = list(prepare.blocks(lines, 500))
        assert ''.join(got) == ''.join(lines) and all(len(block) >= 500 for block in got[:-1] if len(lines) > 1)
        assert len(lines) > 1 or all(len(block) < 1500 for block in got)
        if len(lines) == 1 and ' ' in lines[0]:
            assert len(got) > 5 and all(block[-1] == ' ' for block in got[:-1])      # one endless line is cut between words


def packed(texts, tok, max_length, kind='words'):
    return list(prepare.pack_rows(prepare.pieces(texts, tok, kind), max_length, tok.eos_token_id))


def test_words_longer_than_a_row_are_cut():
    tok = prepare.train_tokenizer('abc d', 'chars', 0)
    assert [tok.decode(ids[:-1]) for ids in packed(['abcabcabc d  ab'], tok, 5)] == ['abca', 'bcab', 'c d', 'ab']


def test_end_tokens_spelled_out_in_the_text_do_not_end_rows():
    tok = prepare.train_tokenizer('ab </s><pad>', 'chars', 0)
    for kind in ('words', 'paragraphs'):
        assert [ids.count(1) for ids in packed(['ab</s>ab <pad> ab'], tok, 50, kind)] == [1]
    assert packed(['</s>'], tok, 50) == []


def test_paragraphs_are_packed_as_the_published_openwebtext():
    """Whole paragraphs with their newlines, across documents, nothing between; a longer one is cut into full rows."""
    tok = prepare.train_tokenizer('abcdefgh\n', 'chars', 0)
    rows = packed(['aaa\nbb\n', 'cc\n' + 'd' * 20, 'e'], tok, 8, 'paragraphs')
    assert [tok.decode(ids[:-1]) for ids in rows] == ['aaa\nbb\n', 'cc\n', 'd' * 7, 'd' * 7, 'd' * 6 + 'e']
    assert all(ids[-1] == 1 and len(ids) <= 8 for ids in rows)


def test_a_killed_swap_is_mended(run, tmp_path, text):
    _, meta = prepared(run, tmp_path, text)
    os.replace(tmp_path / 'data' / 'my', tmp_path / 'data' / '.my.old')
    with pytest.raises(UserError, match='keeps more than a-z'):
        prepared(run, tmp_path, 'Ж' * 9000)
    assert train.open_bins(str(tmp_path / 'data'), 'my') == meta


def test_rows_stream_and_ids_are_checked(tmp_path):
    n, tokens, longest = prepare.write_split(tmp_path, 'train', (([5] * (i % 3), [i % 8, 1]) for i in range(2500)), 'uint16', 9)
    index, data = np.load(tmp_path / 'train.idx.npy'), np.fromfile(tmp_path / 'train.bin', np.uint16)
    assert (n, tokens, longest) == (2500, len(data), 4) and index.shape == (2500, 2) and index.dtype == np.int64
    for i, (start, target) in enumerate(index):
        assert data[start:target + 2].tolist() == [5] * (i % 3) + [i % 8, 1]
    for bad in (9, -1):
        with pytest.raises(UserError, match=f'row 1 of val has token id {bad}'):
            prepare.write_split(tmp_path, 'val', [([], [1]), ([4], [bad, 1])], 'uint16', 9)


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


# ---- published and own sets -------------------------------------------------------------------------------------------

def saved(folder, n=60, **columns):
    """A save_to_disk folder in the layout of the published sets."""
    from datasets import Dataset, Features, List, Value
    rows = dict(condition_input_ids=[[3 + i % 20, 5, 1][:1 + i % 3] for i in range(n)], input_ids=[[4 + i % 9, 1] for i in range(n)],
                input=[f"in {i}" for i in range(n)], target=[f"out {i}" for i in range(n)], index=list(range(n))) | columns
    rows = {k: v for k, v in rows.items() if v is not None}
    types = dict(condition_input_ids=List(Value('int64')), input_ids=List(Value('int32')), input=Value('string'), target=Value('string'), index=Value('int64'))
    features = Features({k: types[k] for k in rows}) if not columns else None
    Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return rows


@pytest.fixture
def tok(bins):
    return [f'--tokenizer={bins}/tiny/tokenizer', f'--encoder={bins}/tiny/encoder']


def read_back(meta):
    """{split: [(condition ids, target ids), ...]} of bins."""
    out = {}
    for split in ('train', 'val'):
        data, index = np.fromfile(os.path.join(meta['dir'], f'{split}.bin'), meta['dtype']), np.load(os.path.join(meta['dir'], f'{split}.idx.npy'))
        out[split] = [(data[a:b].tolist(), data[b:c].tolist()) for (a, b), c in zip(index, [*index[1:, 0], len(data)])]
    return out


def same_but_set_aside(got, want, k=20):
    assert got['val'] == want[k - 1::k] and got['train'] == [x for i, x in enumerate(want) if i % k != k - 1]


def test_published_layout_every_id_survives(run, tmp_path, tok):
    rows = saved(str(tmp_path / 'set'), 2100)
    out = run('prepare.py', f'--dataset={tmp_path / "set"}', f'--data_dir={tmp_path / "data"}', *tok)
    meta = train.open_bins(str(tmp_path / 'data'), 'set')
    same_but_set_aside(read_back(meta), list(zip(rows['condition_input_ids'], rows['input_ids'])))
    references = [json.loads(line) for line in open(os.path.join(meta['dir'], 'val.jsonl'))]
    assert references == [dict(input=f"in {i}", target=f"out {i}") for i in range(19, 2100, 20)]
    assert meta['conditional'] and meta['source']['kind'] == 'ids' and out.count('first row') == 2 and ' -> ' in out
    # a set of its own for validation; and ids alone
    saved(str(tmp_path / 'val'), 7)
    run('prepare.py', f'--dataset={tmp_path / "set"}', f'--val_dataset={tmp_path / "val"}', f'--data_dir={tmp_path / "data"}', *tok)
    assert {s: len(r) for s, r in read_back(train.open_bins(str(tmp_path / 'data'), 'set')).items()} == dict(train=2100, val=7)
    saved(str(tmp_path / 'plain'), 40, condition_input_ids=None, input=None, target=None)
    run('prepare.py', f'--dataset={tmp_path / "plain"}', f'--data_dir={tmp_path / "data"}', *tok)
    meta = train.open_bins(str(tmp_path / 'data'), 'plain')
    assert not meta['conditional'] and not os.path.exists(os.path.join(meta['dir'], 'val.jsonl'))
    with pytest.raises(UserError, match='must be alike'):
        run('prepare.py', f'--dataset={tmp_path / "set"}', f'--val_dataset={tmp_path / "plain"}', f'--data_dir={tmp_path / "data"}', *tok)


SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')
DE_EN, T5 = os.path.join(SHARED, 'wmt14_de-en_validation_t5'), os.path.join(SHARED, 't5_tokenizer')
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason=f"needs {SHARED}")


@needs_shared
def test_the_published_de_en_set(run, tmp_path, tok):
    from datasets import load_from_disk
    run('prepare.py', f'--dataset={DE_EN}', f'--data_dir={tmp_path}', f'--tokenizer={T5}', '--name=de-en')
    want, meta = load_from_disk(DE_EN), train.open_bins(str(tmp_path), 'de-en')
    same_but_set_aside(read_back(meta), list(zip(want['condition_input_ids'][:], want['input_ids'][:])))
    assert sum(meta['rows'].values()) == 3000
    # and by the texts: our tokenisation gives the same bins
    with open(tmp_path / 'pairs.jsonl', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(dict(source=a, target=b)) + '\n' for a, b in zip(want['input'][:], want['target'][:]))
    run('prepare.py', f'--dataset={tmp_path / "pairs.jsonl"}', f'--data_dir={tmp_path}', f'--tokenizer={T5}')
    pairs = train.open_bins(str(tmp_path), 'pairs')
    assert {k: v for k, v in meta['checksums'].items()} == pairs['checksums']
    assert open(os.path.join(meta['dir'], 'val.jsonl')).read() == open(os.path.join(pairs['dir'], 'val.jsonl')).read()


def test_raw_sets_as_the_hub_has_them(run, tmp_path, tok):
    """Parquet: text; a translation column in a folder of its own; document and summary; with and without a validation split."""
    from datasets import Dataset
    letters = lambda i: ' '.join('abcdefgh'[j % 8] * (1 + j % 5) for j in range(i, i + 9))
    layouts = {
        'owt': ('data/train-00000-of-00001.parquet', dict(text=[letters(i) + '\n\n' + letters(i + 1) for i in range(60)]), []),
        'wmt': ('de-en/train-00000-of-00002.parquet', dict(translation=[dict(de=letters(i), en=letters(i + 1)) for i in range(60)]), ['--subset=de-en']),
        'xsum': ('default/train/0000.parquet', dict(document=[letters(i) for i in range(60)], summary=[letters(i)[:9] for i in range(60)], id=list(range(60))), []),
    }
    for name, (file, rows, args) in layouts.items():
        for path in (file, file.replace('train', 'validation')):
            os.makedirs(os.path.dirname(tmp_path / name / path), exist_ok=True)
            Dataset.from_dict(rows if path == file else {k: v[:5] for k, v in rows.items()}).to_parquet(str(tmp_path / name / path))
        folder = tmp_path / name / 'de-en' if args else tmp_path / name
        out = run('prepare.py', f'--dataset={folder}', f'--name={name}', f'--data_dir={tmp_path / "data"}', '--pack=paragraphs', '--letters_only=false', *args, *tok)
        meta = train.open_bins(str(tmp_path / 'data'), name)
        got, code = read_back(meta), AutoTokenizer.from_pretrained(f'{meta["tokenizer"]}')
        if name == 'owt':
            assert ''.join(code.decode(t[:-1]) for _, t in got['train']).replace('<unk>', '') == ''.join(rows['text']).replace('\n', '')
        else:
            a, b = [x['de'] for x in rows['translation']] if name == 'wmt' else rows['document'], [x['en'] for x in rows['translation']] if name == 'wmt' else rows['summary']
            assert [tuple(code.decode(part[:-1]) for part in row) for row in got['train']] == list(zip(a, b))
            assert len(got['val']) == 5 and [json.loads(line)['target'] for line in open(os.path.join(meta['dir'], 'val.jsonl'))] == b[:5]
        assert ('pairs' if name != 'owt' else 'texts') in out


def write_lines(file, rows):
    file.write_text(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows))
    return file


def test_own_jsonl_and_folders(run, tmp_path, tok, text):
    rows = write_lines(tmp_path / 'a.jsonl', [dict(input=f'a{"b" * (i % 7)}', output='c d', more=1) for i in range(50)])
    run('prepare.py', f'--dataset={rows}', f'--data_dir={tmp_path / "data"}', *tok)
    assert train.open_bins(str(tmp_path / 'data'), 'a')['rows'] == dict(train=48, val=2)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'one.txt').write_text(text)
    write_lines(tmp_path / 'folder' / 'two.jsonl', [dict(text='zz zzz\nzzzz') for _ in range(50)])
    run('prepare.py', f'--dataset={tmp_path / "folder"}', f'--data_dir={tmp_path / "data"}', *tok)
    meta = train.open_bins(str(tmp_path / 'data'), 'folder')
    words = ' '.join(AutoTokenizer.from_pretrained(meta['tokenizer']).decode(t[:-1]) for split in read_back(meta).values() for _, t in split).split()
    assert sorted(words) == sorted(text.lower().replace('.', '').split() + ['zz', 'zzz', 'zzzz'] * 50)


@pytest.mark.parametrize('rows, says', [
    ([dict(input='a', output='b')] * 30 + ['{"input": "a", '], 'line 31 is no JSON object'), ([dict(input='a')], 'line 1 needs'), (['[1]'], 'line 1 is no JSON object'),
    ([dict(input='a', output='b'), dict(text='c')], 'line 2 has plain text'), ([dict(text='c'), dict(input='a', output='b')], 'line 2 has a pair'),
    ([dict(input='a', output=' ')], 'not blank'), ([dict(input='a', output=5)], 'must be text'), ([dict(text='')], 'not blank'), ([], 'too little'),
    ([dict(input='a', output='b')] * 3, 'too little'), (['\x00'], 'line 1 is no JSON object'), (['[' * 100000], 'line 1 is no JSON object')])
def test_broken_jsonl(run, tmp_path, tok, rows, says):
    file = write_lines(tmp_path / 'a.jsonl', rows)
    with pytest.raises(UserError, match=says) as e:
        run('prepare.py', f'--dataset={file}', f'--data_dir={tmp_path / "data"}', *tok)
    assert '\n' not in str(e.value) and (not os.path.exists(tmp_path / 'data') or os.listdir(tmp_path / 'data') == [])


@pytest.mark.parametrize('columns, says', [
    (dict(input_ids=None, condition_input_ids=None, input=None), 'has the columns target, index'), (dict(input_ids=[[4, 1]] * 59 + [[30, 1]]), r'row \d+ of val has token id 30'),
    (dict(input_ids=[[4, 1]] * 30 + [[]] + [[4, 1]] * 29), 'input_ids is empty in one of the rows'), (dict(condition_input_ids=[[]] + [[4, 1]] * 59), 'condition_input_ids is empty'),
    (dict(input_ids=['text'] * 60), 'not lists of whole numbers'), (dict(input_ids=[[0.5]] * 60), 'not lists of whole numbers'), (dict(input_ids=[None] * 60), 'input_ids')])
def test_broken_sets(run, tmp_path, tok, columns, says):
    saved(str(tmp_path / 'set'), 60, **columns)
    with pytest.raises(UserError, match=says) as e:
        run('prepare.py', f'--dataset={tmp_path / "set"}', f'--data_dir={tmp_path / "data"}', *tok)
    assert '\n' not in str(e.value) and (not os.path.exists(tmp_path / 'data') or os.listdir(tmp_path / 'data') == [])


def test_what_is_no_source(run, tmp_path, tok):
    saved(str(tmp_path / 'set'))
    for name in ('cut', 'empty', 'noise'):
        (tmp_path / name).mkdir()
    whole = (tmp_path / 'set' / 'data-00000-of-00001.arrow').read_bytes()
    (tmp_path / 'cut' / 'data-00000-of-00001.arrow').write_bytes(whole[:700])
    (tmp_path / 'noise' / 'a.parquet').write_bytes(b'PAR1' + bytes(range(200)))
    for name, says in (('cut', 'not readable|no data|cut'), ('empty', 'has no data'), ('noise', 'not readable'), ('none', 'offline|hub'), ('./none', 'neither a folder')):
        with pytest.raises(UserError, match=says) as e:
            run('prepare.py', f'--dataset={tmp_path / name if name[0] != "." else name}', f'--data_dir={tmp_path / "data"}', *tok)
        assert '\n' not in str(e.value) and (not os.path.exists(tmp_path / 'data') or os.listdir(tmp_path / 'data') == [])
    with pytest.raises(UserError, match='name the tokenizer'):
        run('prepare.py', f'--dataset={tmp_path / "set"}', f'--data_dir={tmp_path / "data"}')
