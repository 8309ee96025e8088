"""
prepare.py: texts, pairs and published ids to bins; packing, trained tokenizers, splits by the names
of files, and what is refused.
    python -m pytest -q tests/test_prepare.py
"""
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import prepare
from configurator import UserError
from parts.data import get_rows, open_bins, open_split, read_row, sha256
from model import ELFConfig, TextEncoder

SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')
DE_EN = os.path.join(SHARED, 'wmt14_de-en_validation_t5')
STORIES = os.path.join(SHARED, 'corpora', 'tinystories_2mb.txt')
T5 = os.path.join(SHARED, 't5_tokenizer')
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason=f"needs {SHARED}")


@pytest.fixture(scope='module')
def text():
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghij', k=rng.randint(1, 9))) for _ in range(300)]
    paragraphs = [' '.join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(120)]
    return '\n\n'.join(paragraph.capitalize() + '.' for paragraph in paragraphs)


@pytest.fixture
def tok(bins):
    return [f'--tokenizer={bins}/tiny/tokenizer', f'--encoder={bins}/tiny/encoder']


@pytest.fixture
def make(run, tmp_path):
    """make(source, *args) -> meta of the bins in tmp_path/data; what was printed: make.out."""
    def make(source, *args):
        data_dir = str(tmp_path / 'data')
        make.out = run('prepare.py', f'--dataset={source}', f'--data_dir={data_dir}', *args)
        return open_bins(data_dir, run.globals['name'], verify=True)
    return make


def nothing_made(tmp_path):
    return not os.path.exists(tmp_path / 'data') or os.listdir(tmp_path / 'data') == []


def write(file, content):
    """A text, or JSON lines of dicts and of lines as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
        content = ''.join(line + '\n' for line in lines)
    file.write_text(content, encoding='utf-8')
    return file


def parquet(file, **columns):
    from datasets import Dataset
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(str(file))
    return file


def rows_of(meta, split):
    """[(condition ids, target ids), ...] as lists."""
    ids, index = open_split(meta, split)
    return [tuple(part.tolist() for part in read_row(ids, index, r)) for r in range(len(index))]


def texts_of(meta, split):
    """The targets as texts, without EOS."""
    tok = AutoTokenizer.from_pretrained(meta['tokenizer'])
    return [tok.decode(target[:-1]) for _, target in rows_of(meta, split)]

# ---- a text file ----

SUBWORDS = ['--letters_only=false', '--token_level=subwords', '--vocab_size=400',
            '--encoder_dim=16']


CHARS = ['--token_level=chars', '--encoder_layers=2']


@pytest.mark.parametrize('args', [CHARS, [*CHARS, '--letters_only=false'], SUBWORDS],
                         ids=['letters', 'chars', 'subwords'])
def test_a_text_file_end_to_end(make, tmp_path, text, args):
    meta = make(write(tmp_path / 'my.txt', text), *args)
    assert 'first row' in make.out
    assert 'next: python train.py config/demo.py --dataset=my' in make.out
    tok = AutoTokenizer.from_pretrained(meta['tokenizer'])
    assert (tok.pad_token_id, tok.eos_token_id, tok.unk_token_id) == (0, 1, 2)
    assert len(tok) == meta['vocab_size']
    words = text.split() if args != CHARS else text.lower().replace('.', '').split()
    whole = []
    for split in ('train', 'val'):
        rows = rows_of(meta, split)
        assert all(not cond and 1 < len(ids) <= 32 for cond, ids in rows)
        assert all(ids[-1] == 1 and ids.count(1) == 1 and 2 not in ids for _, ids in rows)
        texts = texts_of(meta, split)
        whole += texts
        following = iter(words)
        assert all(word in following for word in ' '.join(texts).split())       # in their order
    # every word of the text is in some row, whole
    assert sorted(' '.join(whole).split()) == sorted(words)
    if args != SUBWORDS:        # there a space is part of its word
        assert all(row == row.strip() and row for row in whole)
    # a resume can see from the checksums if anything was made anew
    own = {'tokenizer/tokenizer.json', 'encoder/model.safetensors'}
    assert own < meta['checksums'].keys() and len(meta['checksums']) == 6
    for file, checksum in meta['checksums'].items():
        assert sha256(os.path.join(meta['dir'], file)) == checksum
    # the latents are of the scale that meta.json says
    encoder = TextEncoder(meta['encoder'], meta['latent_mean'], meta['latent_std'])
    ids, valid, _ = get_rows(meta, 'train', range(40), ELFConfig(max_length=32))
    x0 = encoder(ids, valid)[valid]
    assert abs(x0.mean()) < 0.05 and abs(x0.std() - 1) < 0.05
    assert x0.shape[1] == meta['latent_dim']


def test_the_same_twice_and_another_encoder_with_another_seed(make, tmp_path, text):
    file = write(tmp_path / 'my.txt', text)
    a = make(file)
    weights = TextEncoder(a['encoder']).state_dict()
    b = make(file)
    assert a == b
    again = TextEncoder(b['encoder']).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    c = make(file, '--seed=1')
    changed = {name for name in a['checksums'] if a['checksums'][name] != c['checksums'][name]}
    assert changed == {'encoder/model.safetensors'} and c['latent_std'] != a['latent_std']


def test_latents_measured_given_and_published(make, tmp_path, text, bins, monkeypatch):
    file = write(tmp_path / 'my.txt', text)
    given = make(file, '--latent_mean=0.1', '--latent_std=0.5')
    assert (given['latent_mean'], given['latent_std']) == (0.1, 0.5)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bins / 'tiny' / 'encoder', 't5-small')      # by this name the published hold
    published = make(file, '--encoder=t5-small', '--token_level=chars')
    assert (published['latent_mean'], published['latent_std']) == (0.0, 0.2)


def test_an_encoder_that_knows_fewer_ids_is_refused_at_once(make, tmp_path, text, tok):
    with pytest.raises(UserError, match='knows 30 ids, the tokenizer has 4'):
        make(write(tmp_path / 'my.txt', text), tok[1], *SUBWORDS[:3])
    assert nothing_made(tmp_path)


def test_tokens_with_the_same_neighbours_have_like_vectors(make, tmp_path):
    """'cat' and 'dog' stand in the same places, 'blue' and 'green' in others."""
    rng = random.Random(0)
    lines = [f"the {rng.choice(['cat', 'dog'])} eats a {rng.choice(['blue', 'green'])} fish now"
             for _ in range(2000)]
    meta = make(write(tmp_path / 'my.txt', '\n'.join(lines)), '--vocab_size=300',
                '--encoder_dim=8')
    tok = AutoTokenizer.from_pretrained(meta['tokenizer'])
    table = prepare.neighbour_vectors(meta, 8, seed=0)
    assert table.shape == (meta['vocab_size'], 8)
    assert table.square().sum(-1).mean().item() == pytest.approx(1, rel=1e-4)
    cat, dog, blue, green = (table[tok.convert_tokens_to_ids('\u0120' + word)]
                             for word in ('cat', 'dog', 'blue', 'green'))
    alike = torch.cosine_similarity
    assert min(alike(cat, dog, 0), alike(blue, green, 0)) > 0.9 > 0.5 > alike(cat, blue, 0)


def test_pydocs_is_prose():
    text = prepare.pydocs_text()
    assert len(text) > 150_000
    assert not any(sign in text for sign in ('::=', '>>>', '+---'))
    assert 'assert statements are a convenient way to insert debugging assertions' in text.lower()


def test_what_the_user_sets_goes_before_what_a_name_stands_for(make, tmp_path, tok, monkeypatch):
    """By file or command line, also where it is what the default is; the hub's files are here."""
    calls = []
    parquet(tmp_path / 'hub' / 'train-0.parquet', text=['some words of a story'] * 60)
    parquet(tmp_path / 'hub' / 'validation-0.parquet', text=['words of another'] * 20)

    def snapshot_download(source, **how):
        calls.append((source, how))
        return str(tmp_path / 'hub')
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    config = write(tmp_path / 'config.py', "max_length = 32\npack = 'words'\n")
    for args, short, pack in (([], False, 'paragraphs'), (['--max_length=32'], True, 'paragraphs'),
                              ([config], True, 'words')):
        meta = make('openwebtext-raw', '--name=x', *tok, *args)
        assert meta['source']['pack'] == pack and (meta['max_length'] <= 32) == short
    meta = make('tinystories', *tok)
    assert texts_of(meta, 'train') == ['some words of a story'] * 60 and meta['rows']['val'] == 20
    assert [source for source, _ in calls[3:]] == ['roneneldan/TinyStories']
    # of the hub's files, those named test are not fetched
    from huggingface_hub.utils import filter_repo_objects
    how = {name: calls[0][1][name] for name in ('allow_patterns', 'ignore_patterns')}
    names = ['data/train-0.parquet', 'latest/0.parquet', 'contest.arrow', 'test/0.parquet',
             'data/test-0.parquet', 'de_test.arrow', 'README.md', 'stories.txt']
    assert list(filter_repo_objects(names, **how)) == names[:3]

# ---- packing ----

def test_blocks_give_the_text_back(text):
    for lines in (text.splitlines(keepends=True), [' '.join(text.split())], ['x' * 9000], []):
        blocks = list(prepare.blocks(lines, 500))
        assert ''.join(blocks) == ''.join(lines)
        if len(lines) > 1:
            assert all(len(block) >= 500 for block in blocks[:-1])
        else:
            assert all(len(block) < 1500 for block in blocks)
        if len(lines) == 1 and ' ' in lines[0]:     # one endless line is cut between words
            assert len(blocks) > 5 and all(block[-1] == ' ' for block in blocks[:-1])


def packed(texts, tok, max_length, pack='words'):
    """Rows as texts, those that spell an end token out included."""
    rows = list(prepare.make_rows('texts', texts, tok, pack, max_length))
    assert all(not cond and ids[-1] == 1 and ids.count(1) == 1 for cond, ids in rows)
    assert all(len(ids) <= max_length for _, ids in rows)
    return [tok.decode(ids[:-1]) for _, ids in rows]


def test_words_longer_than_a_row_are_cut():
    tok = prepare.train_tokenizer('abc d', 'chars', 0)
    assert packed(['abcabcabc d  ab'], tok, 5) == ['abca', 'bcab', 'c d', 'ab']


def test_paragraphs_are_packed_as_the_published_openwebtext():
    """Whole, with newlines, across documents, nothing between; a longer one fills whole rows."""
    tok = prepare.train_tokenizer('abcdefgh\n', 'chars', 0)
    rows = packed(['aaa\nbb\n', 'cc\n' + 'd' * 20, 'e'], tok, 8, 'paragraphs')
    assert rows == ['aaa\nbb\n', 'cc\n', 'd' * 7, 'd' * 7, 'd' * 6 + 'e']


def test_one_text_a_row(capsys):
    tok = prepare.train_tokenizer('abcdefgh\n ', 'chars', 0)
    texts = ['a b\nc\n', '  ', 'abcdefg', 'abcdefgh', 'h' * 20]
    assert packed(texts, tok, 8, 'texts') == ['a b\nc', 'abcdefg', 'abcdefg', 'h' * 7]
    assert '2 of 4 texts have more than' in capsys.readouterr().out


def test_end_tokens_spelled_out_in_the_text_do_not_end_rows():
    tok = prepare.train_tokenizer('ab </s><pad>', 'chars', 0)
    for pack in ('words', 'paragraphs', 'texts'):
        assert packed(['ab</s>ab <pad> ab'], tok, 50, pack) == ['abab  ab']
        assert packed(['</s>'], tok, 50, pack) == []


@needs_shared
def test_stories_one_a_row(make, tmp_path, tok):
    """<|endoftext|> between them; each is whole, or the start of one."""
    with open(STORIES, encoding='utf-8') as f:
        file = write(tmp_path / 'stories.txt', f.read()[:200_000])
    meta = make(file, '--pack=texts', '--max_length=256', '--letters_only=false',
                f'--tokenizer={T5}')
    want = [' '.join(story.split()) for story in file.read_text().split('<|endoftext|>')]
    got = [texts_of(meta, split) for split in ('train', 'val')]
    assert len(got[0] + got[1]) == len(want)
    assert f"of {len(got[0])} texts have more than max_length=256 tokens" in make.out
    for n, story in enumerate(want):
        row = got[1].pop(0) if n % 20 == 19 else got[0].pop(0)
        assert row == story or story.startswith(row[:80]) and len(row) > 400

# ---- what is refused ----

@pytest.mark.parametrize('content, says', [
    (b'', 'too little'), (b'two words', 'too little'), (None, 'cannot read'),
    ('Ж'.encode() * 9000, 'keeps more than a-z'),
    (b'ok\nbad \xff byte', 'line 2: byte 0xff is not UTF-8')])
def test_texts_that_are_refused_leave_the_old_bins(make, tmp_path, text, content, says):
    """Also where a kill between the two renames had left them aside."""
    file = write(tmp_path / 'my.txt', text)
    meta = make(file)
    os.replace(tmp_path / 'data' / 'my', tmp_path / 'data' / '.my.old')
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        make(file)
    assert os.listdir(tmp_path / 'data') == ['my']
    assert open_bins(str(tmp_path / 'data'), 'my') == meta


@pytest.mark.parametrize('arg, says', [
    ('--tokenizer=./none', 'tokenizer'), ('--encoder=./none', 'text encoder'),
    ('--max_length=2', 'at least 4'), ('--token_level=nothing', 'token_level'),
    ('--pack=lines', "'words', 'paragraphs', 'texts'"), ('--pack=texts', 'endoftext'),
    ('--val_fraction=1.5', 'val_fraction'), ('--latent_mean=0.5', 'give both'),
    ('--latent_std=-1', 'give both'), ('--name=a/b', 'without slashes')])
def test_settings_that_are_refused(make, tmp_path, text, arg, says):
    with pytest.raises(UserError, match=says):
        make(write(tmp_path / 'my.txt', text), arg)
    assert nothing_made(tmp_path)


def test_a_folder_of_something_else_is_not_replaced_and_errors_are_one_line(tmp_path, text):
    file = write(tmp_path / 'my.txt', text)
    thesis = write(tmp_path / 'data' / 'my' / 'thesis.tex', 'years')
    argv = ['prepare.py', f'--dataset={file}', f'--data_dir={tmp_path / "data"}']
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'holds no bins' in done.stderr
    assert thesis.read_text() == 'years'

# ---- published sets, tables ----

def save_published(folder, n=60, **columns):
    """A save_to_disk folder in the layout of the published sets; a column of None is left out."""
    from datasets import Dataset, Features, List, Value
    rows = dict(condition_input_ids=[[3 + i % 20, 5, 1][:1 + i % 3] for i in range(n)],
                input_ids=[[4 + i % 9, 1] for i in range(n)],
                input=[f"in {i}" for i in range(n)], target=[f"out {i}" for i in range(n)],
                index=list(range(n)))
    rows = {name: column for name, column in (rows | columns).items() if column is not None}
    types = dict(condition_input_ids=List(Value('int64')), input_ids=List(Value('int32')),
                 input=Value('string'), target=Value('string'), index=Value('int64'))
    features = None if columns else Features({name: types[name] for name in rows})
    Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return rows


def assert_each_20th_set_aside(meta, want):
    assert rows_of(meta, 'val') == want[19::20]
    assert rows_of(meta, 'train') == [row for i, row in enumerate(want) if i % 20 != 19]


def references(meta):
    with open(os.path.join(meta['dir'], 'val.jsonl'), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def test_published_layout_every_id_survives(make, tmp_path, tok):
    rows = save_published(tmp_path / 'set', 2100)
    meta = make(tmp_path / 'set', *tok)
    assert_each_20th_set_aside(meta, list(zip(rows['condition_input_ids'], rows['input_ids'])))
    want = [dict(input=f"in {i}", target=f"out {i}") for i in range(19, 2100, 20)]
    assert references(meta) == want
    assert meta['conditional'] and meta['source']['kind'] == 'ids'
    assert make.out.count('first row') == 2 and ' -> ' in make.out
    # a set of its own for validation
    save_published(tmp_path / 'val', 7)
    meta = make(tmp_path / 'set', f'--val_dataset={tmp_path / "val"}', *tok)
    assert meta['rows'] == dict(train=2100, val=7) and len(references(meta)) == 7
    # ids alone
    save_published(tmp_path / 'plain', 40, condition_input_ids=None, input=None, target=None)
    meta = make(tmp_path / 'plain', *tok)
    assert not meta['conditional'] and not os.path.exists(os.path.join(meta['dir'], 'val.jsonl'))
    with pytest.raises(UserError, match='must be alike'):
        make(tmp_path / 'set', f'--val_dataset={tmp_path / "plain"}', *tok)
    with pytest.raises(UserError, match='name the tokenizer'):
        make(tmp_path / 'set')


@needs_shared
def test_the_published_de_en_set(make, tmp_path):
    from datasets import load_from_disk
    meta = make(DE_EN, f'--tokenizer={T5}', '--name=de-en')
    want = load_from_disk(DE_EN)
    rows = zip(want['condition_input_ids'][:], want['input_ids'][:])
    assert_each_20th_set_aside(meta, list(rows))
    assert sum(meta['rows'].values()) == 3000
    # and by the texts: our tokenisation gives the same bins
    pairs = [dict(source=a, target=b) for a, b in zip(want['input'][:], want['target'][:])]
    ours = make(write(tmp_path / 'pairs.jsonl', pairs), f'--tokenizer={T5}')
    assert meta['checksums'] == ours['checksums'] and references(meta) == references(ours)


def test_raw_sets_as_the_hub_has_them(make, tmp_path, tok):
    """Text; a translation column in a folder of its own; document and summary."""
    a = [' '.join('abcdefgh'[j % 8] * (1 + j % 5) for j in range(i, i + 9)) for i in range(60)]
    b = a[1:] + a[:1]
    both = [dict(de=x, en=y) for x, y in zip(a, b)]
    layouts = {
        'owt': ('data/{}-00000-of-00001.parquet', dict(text=[f"{x}\n\n{y}" for x, y in zip(a, b)])),
        'wmt': ('de-en/{}-00000-of-00002.parquet', dict(translation=both)),
        'xsum': ('default/{}/0000.parquet', dict(document=a, summary=b, id=list(range(60))))}
    for name, (file, columns) in layouts.items():
        parquet(tmp_path / name / file.format('train'), **columns)
        few = {column: values[:5] for column, values in columns.items()}
        parquet(tmp_path / name / file.format('validation'), **few)
        folder = tmp_path / name / 'de-en' if name == 'wmt' else tmp_path / name
        meta = make(folder, f'--name={name}', '--pack=paragraphs', '--letters_only=false', *tok,
                    '--subset=de-en' if name == 'wmt' else '--subset=')
        code = AutoTokenizer.from_pretrained(meta['tokenizer'])
        if name == 'owt':       # its tokenizer knows no newline
            found = ''.join(texts_of(meta, 'train')).replace('<unk>', '')
            assert found == ''.join(columns['text']).replace('\n', '') and 'texts' in make.out
            continue
        got = [tuple(code.decode(part[:-1]) for part in row) for row in rows_of(meta, 'train')]
        assert got == list(zip(a, b)) and 'pairs' in make.out
        assert meta['rows']['val'] == 5
        assert references(meta) == [dict(input=x, target=y) for x, y in zip(a[:5], b[:5])]


def test_a_table_with_a_hole_is_refused(make, tmp_path):
    parquet(tmp_path / 'set' / 'x.parquet', text=['a long enough text'] * 50 + [None])
    with pytest.raises(UserError, match='row 50 lacks a text'):
        make(tmp_path / 'set', '--letters_only=false')


TWO = [[4, 1]] * 29


@pytest.mark.parametrize('columns, says', [
    (dict(input_ids=None, condition_input_ids=None, input=None), 'has the columns target, index'),
    (dict(input_ids=[*TWO, *TWO, [4, 1], [30, 1]]), r'row \d+ of val has token id 30'),
    (dict(input_ids=[[4, 1], [4, -1], *TWO, *TWO]), 'row 1 of train has token id -1'),
    (dict(input_ids=[*TWO, [4, 1], [], *TWO]), 'input_ids is empty in one of the rows'),
    (dict(condition_input_ids=[[], [4, 1], *TWO, *TWO]), 'condition_input_ids is empty'),
    (dict(input_ids=['text'] * 60), 'not lists of whole numbers'),
    (dict(input_ids=[[0.5]] * 60), 'not lists of whole numbers'),
    (dict(input_ids=[None] * 60), 'input_ids')])
def test_broken_sets(make, tmp_path, tok, columns, says):
    save_published(tmp_path / 'set', 60, **columns)
    with pytest.raises(UserError, match=says) as e:
        make(tmp_path / 'set', *tok)
    assert '\n' not in str(e.value) and nothing_made(tmp_path)


def test_what_is_no_source(make, tmp_path, tok):
    save_published(tmp_path / 'set')
    arrow = 'data-00000-of-00001.arrow'
    for name in ('cut', 'empty', 'noise'):
        (tmp_path / name).mkdir()
    (tmp_path / 'cut' / arrow).write_bytes((tmp_path / 'set' / arrow).read_bytes()[:700])
    (tmp_path / 'noise' / 'a.parquet').write_bytes(b'PAR1' + bytes(range(200)))
    for source, says in ((tmp_path / 'cut', 'not readable|no data|cut'),
                         (tmp_path / 'empty', 'has no data'), (tmp_path / 'noise', 'not readable'),
                         (tmp_path / 'none', 'offline|hub'), ('./none', 'neither a folder')):
        with pytest.raises(UserError, match=says) as e:
            make(source, *tok)
        assert '\n' not in str(e.value) and nothing_made(tmp_path)

# ---- own .jsonl ----

def test_own_jsonl_and_folders(make, tmp_path, tok, text):
    pairs = [dict(input=f'a{"b" * (i % 7)}', output='c d', more=1) for i in range(50)]
    assert make(write(tmp_path / 'a.jsonl', pairs), *tok)['rows'] == dict(train=48, val=2)
    write(tmp_path / 'folder' / 'one.txt', text)
    write(tmp_path / 'folder' / 'two.jsonl', [dict(text='zz zzz\nzzzz') for _ in range(50)])
    meta = make(tmp_path / 'folder', *tok)
    words = ' '.join(texts_of(meta, 'train') + texts_of(meta, 'val')).split()
    want = text.lower().replace('.', '').split() + ['zz', 'zzz', 'zzzz'] * 50
    assert sorted(words) == sorted(want)


AB = dict(input='a', output='b')


@pytest.mark.parametrize('rows, says', [
    ([AB] * 30 + ['{"input": "a", '], 'line 31 is no JSON object'),
    ([dict(input='a')], 'line 1 needs'), (['[1]'], 'line 1 is no JSON object'),
    ([AB, dict(text='c')], 'line 2 has plain text'), ([dict(text='c'), AB], 'line 2 has a pair'),
    ([dict(input='a', output=' ')], 'not blank'), ([dict(input='a', output=5)], 'must be text'),
    ([dict(text='')], 'not blank'), ([], 'too little'), ([AB] * 3, 'too little'),
    (['\x00'], 'line 1 is no JSON object'), (['[' * 100000], 'line 1 is no JSON object')])
def test_broken_jsonl(make, tmp_path, tok, rows, says):
    with pytest.raises(UserError, match=says) as e:
        make(write(tmp_path / 'a.jsonl', rows), *tok)
    assert '\n' not in str(e.value) and nothing_made(tmp_path)

# ---- splits by the names of files ----

@pytest.mark.parametrize('path, split', [
    ('train-00000-of-00001.parquet', 'train'), ('default/partial-train/0000.parquet', 'train'),
    ('a.txt', 'train'), ('latest.txt', 'train'), ('contest/evaluation.txt', 'train'),
    ('val.txt', 'val'), ('x_dev.jsonl', 'val'), ('validation/0000.parquet', 'val'),
    ('valid/data-00000-of-00001.arrow', 'val'), ('StoriesVal2.txt', 'val'), ('VALID.txt', 'val'),
    ('TinyStoriesV2-GPT4-valid.txt', 'val'), ('test/train.txt', 'test'), ('my.test.jsonl', 'test'),
    ('x_test_dev.txt', 'test'), ('data/test-00000-of-00001.parquet', 'test')])
def test_split_of(path, split):
    assert prepare.split_of(path) == split


TRAIN, VAL, TEST = 'aaa aa a', 'bbb bb b', 'ccc cc c'
NAMES = ['train/{}', 'val/{}', 'test/{}'], ['a_{}', 'x_dev_{}', 'x_test_{}']


def words_of(meta, split):
    return set(' '.join(texts_of(meta, split)).split())


def save_text(file, kind, content):
    """This text many times, in a file or save_to_disk folder of this kind."""
    if kind == 'txt':
        write(file.with_suffix('.txt'), f'{content}\n' * 600)
    elif kind == 'jsonl':
        write(file.with_suffix('.jsonl'), [dict(text=content)] * 60)
    elif kind == 'parquet':
        parquet(file.with_suffix('.parquet'), text=[content] * 60)
    else:
        from datasets import Dataset
        Dataset.from_dict(dict(text=[content] * 60)).save_to_disk(str(file))


@pytest.mark.parametrize('names', NAMES, ids=['folders', 'files'])
@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'parquet', 'arrow'])
def test_validation_files_validate_and_test_files_are_left_out(make, tmp_path, tok, kind, names):
    for name, content in zip(names, (TRAIN, VAL, TEST)):
        save_text(tmp_path / 'set' / name.format('00'), kind, content)
    meta = make(tmp_path / 'set', *tok)
    for split, content in (('train', TRAIN), ('val', VAL)):
        assert words_of(meta, split) == set(content.split())
    assert 'left out as test: ' + names[2].format('00') in make.out


def test_test_files_only_where_they_are_named(make, tmp_path, tok):
    for name, content in (('train', TRAIN), ('test', TEST)):
        save_text(tmp_path / 'set' / name, 'txt', content)
    meta = make(tmp_path / 'set', *tok)
    assert words_of(meta, 'val') == set(TRAIN.split())      # set aside
    meta = make(tmp_path / 'set', f'--val_dataset={tmp_path / "set" / "test.txt"}', *tok)
    assert words_of(meta, 'val') == set(TEST.split())
    for name in ('test.txt', 'x_val.txt'):
        write(tmp_path / 'only' / name, TEST * 900)
    with pytest.raises(UserError, match='only files of test or validation: test.txt, x_val.txt'):
        make(tmp_path / 'only', *tok)
    # the folder's own path says nothing, and a file is named on purpose
    meta = make(tmp_path / 'set', f'--val_dataset={tmp_path / "only"}', *tok)
    assert meta['rows']['val'] > 0
    assert make(tmp_path / 'only' / 'test.txt', *tok)['rows']['train'] > 0


def test_licences_and_hidden_files_are_no_corpus(make, tmp_path, tok):
    parquet(tmp_path / 'set' / 'x.parquet', text=[TRAIN] * 60)
    noise = ['LICENSE.txt', 'readme_first.txt', 'Notice.txt', 'COPYING.LESSER.txt', '.notes.txt']
    for name in (*noise[:2], '.cache/x.txt'):
        write(tmp_path / 'set' / name, TEST * 900)
    meta = make(tmp_path / 'set', *tok)
    assert words_of(meta, 'train') | words_of(meta, 'val') == set(TRAIN.split())
    assert 'ignored, no corpus: .cache, LICENSE.txt, readme_first.txt' in make.out
    for name in noise:
        write(tmp_path / 'legal' / name, TEST * 900)
    with pytest.raises(UserError, match='has no data'):
        make(tmp_path / 'legal', *tok)


def test_folders_of_mixed_kinds_are_refused(make, tmp_path, tok):
    parquet(tmp_path / 'a' / 'x.parquet', text=[TRAIN] * 60)
    write(tmp_path / 'a' / 'more.txt', TRAIN * 900)
    write(tmp_path / 'b' / 'more.txt', TRAIN * 900)
    write(tmp_path / 'b' / 'pairs.jsonl', [AB] * 60)
    cases = ('a', '.parquet and .txt files, such as'), ('b', 'texts .*more.txt.* and pairs')
    for name, says in cases:
        with pytest.raises(UserError, match=says):
            make(tmp_path / name, *tok)
    assert nothing_made(tmp_path)
