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
import pydocs
from configurator import UserError
from model import ELFConfig, TextEncoder
from parts.checkpoint import fingerprint
from parts.data import FILES, get_rows, open_bins, open_split, read_row, sha256
from parts.prompt import unknown_in
from parts.toy import in_words, neighbour_vectors, train_tokenizer

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
        return open_bins(data_dir, run.globals['name'])
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
    assert 'it begins: ' in make.out
    assert 'next: python train.py config/pydocs.py --dataset=my' in make.out
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
    # a resume can see if anything was made anew
    made = [*FILES, 'tokenizer/tokenizer.json', 'encoder/model.safetensors']
    assert meta['checksums'].keys() == set(FILES)
    assert fingerprint(meta).items() >= {
        file: sha256(os.path.join(meta['dir'], file)) for file in made}.items()
    # the latents are of the scale that meta.json says
    encoder = TextEncoder(meta['encoder'], meta['latent_mean'], meta['latent_std'])
    ids, valid, _ = get_rows(meta, 'train', range(40), ELFConfig(max_length=32))
    x0 = encoder(ids, valid)[valid]
    assert abs(x0.mean()) < 0.05 and abs(x0.std() - 1) < 0.05
    assert x0.shape[1] == meta['latent_dim']


def test_the_same_twice_and_another_encoder_with_another_seed(make, tmp_path, text):
    file = write(tmp_path / 'my.txt', text)
    a = make(file)
    weights, made = TextEncoder(a['encoder']).state_dict(), fingerprint(a)
    b = make(file)
    assert a == b and fingerprint(b) == made
    again = TextEncoder(b['encoder']).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    c = make(file, '--seed=1')
    again = fingerprint(c)
    changed = {name for name in made if made[name] != again[name]}
    assert changed == {'encoder/model.safetensors', 'latent_std', 'latent_mean'}


def test_latents_measured_given_and_published(make, tmp_path, text, bins, tok, monkeypatch):
    file = write(tmp_path / 'my.txt', text)
    given = make(file, '--latent_std=0.5')
    assert (given['latent_mean'], given['latent_std']) == (0.0, 0.5)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bins / 'tiny' / 'encoder', 't5-small')      # by this name the published hold
    published = make(file, '--encoder=t5-small', tok[0])
    assert (published['latent_mean'], published['latent_std']) == (0.0, 0.2)


def test_an_encoder_that_knows_fewer_ids_is_refused_at_once(make, tmp_path, text, tok):
    with pytest.raises(UserError, match='knows 30 ids, the tokenizer has 4'):
        meta = make(write(tmp_path / 'other.txt', text), *SUBWORDS[:3])
        make(write(tmp_path / 'my.txt', text), tok[1], f"--tokenizer={meta['tokenizer']}")
    assert os.listdir(tmp_path / 'data') == ['other']


def test_tokens_with_the_same_neighbours_have_like_vectors(make, tmp_path):
    """'cat' and 'dog' stand in the same places, 'blue' and 'green' in others."""
    rng = random.Random(0)
    lines = [f"the {rng.choice(['cat', 'dog'])} eats a {rng.choice(['blue', 'green'])} fish now"
             for _ in range(2000)]
    meta = make(write(tmp_path / 'my.txt', '\n'.join(lines)), '--vocab_size=300',
                '--encoder_dim=8')
    tok = AutoTokenizer.from_pretrained(meta['tokenizer'])
    table = neighbour_vectors(meta, 8, seed=0)
    assert table.shape == (meta['vocab_size'], 8)
    assert table.square().sum(-1).mean().item() == pytest.approx(1, rel=1e-4)
    cat, dog, blue, green = (table[tok.convert_tokens_to_ids('\u0120' + word)]
                             for word in ('cat', 'dog', 'blue', 'green'))
    alike = torch.cosine_similarity
    assert min(alike(cat, dog, 0), alike(blue, green, 0)) > 0.9 > 0.5 > alike(cat, blue, 0)


def test_pydocs_is_prose(tmp_path):
    pydocs.main(tmp_path / 'pydocs.txt')
    text = (tmp_path / 'pydocs.txt').read_text(encoding='utf-8')
    assert len(text) > 150_000
    assert not any(sign in text for sign in ('::=', '>>>', '+---'))
    assert 'assert statements are a convenient way to insert debugging assertions' in text.lower()


def test_what_the_user_sets_goes_before_what_a_name_stands_for(make, tmp_path, tok, monkeypatch):
    """By file or command line, also where it is what the default is; the hub's files are here."""
    calls = []
    parquet(tmp_path / 'hub' / 'train-0.parquet', text=['some words of a story ' * 9] * 60)
    parquet(tmp_path / 'hub' / 'validation-0.parquet', text=['words of another'] * 20)

    def snapshot_download(source, **how):
        calls.append((source, how))
        return str(tmp_path / 'hub')
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    config = write(tmp_path / 'config.py', "max_length = 32\npack = 'words'\n")
    for args, short, pack in (([], False, 'texts'), (['--max_length=32'], True, 'texts'),
                              ([config], True, 'words')):
        meta = make('tinystories', '--name=x', *tok, *args)
        assert meta['source']['pack'] == pack and (meta['max_length'] <= 32) == short
    meta = make('tinystories', *tok)
    story = ('some words of a story ' * 9).strip()
    assert texts_of(meta, 'train') == [story] * 60 and meta['rows']['val'] == 20
    assert [source for source, _ in calls[6:]] == ['roneneldan/TinyStories'] * 2   # card, tables
    from huggingface_hub.utils import filter_repo_objects
    wanted = calls[1][1]['allow_patterns']
    names = ['data/train-0.parquet', 'a/b.arrow', 'README.md', 'stories.txt', 'image.png']
    assert list(filter_repo_objects(names, allow_patterns=wanted)) == names[:2]

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
    rows = list(prepare.make_rows(texts, ('text',), tok, pack, max_length))
    assert all(not cond and ids[-1] == 1 and ids.count(1) == 1 for cond, ids in rows)
    assert all(len(ids) <= max_length for _, ids in rows)
    return [tok.decode(ids[:-1]) for _, ids in rows]


def test_words_longer_than_a_row_are_cut():
    tok = train_tokenizer('abc d', 'chars', 0)
    assert packed(['abcabcabc d  ab'], tok, 5) == ['abca', 'bcab', 'c d', 'ab']


def test_paragraphs_are_packed_as_the_published_openwebtext():
    """Whole, with newlines, across documents, nothing between; a longer one fills whole rows."""
    tok = train_tokenizer('abcdefgh\n', 'chars', 0)
    rows = packed(['aaa\nbb\n', 'cc\n' + 'd' * 20, 'e'], tok, 8, 'paragraphs')
    assert rows == ['aaa\nbb\n', 'cc\n', 'd' * 7, 'd' * 7, 'd' * 6 + 'e']


def test_one_text_a_row(capsys):
    tok = train_tokenizer('abcdefgh\n ', 'chars', 0)
    texts = ['a b\nc\n', '  ', 'abcdefg', 'abcdefgh', 'h' * 20]
    assert packed(texts, tok, 8, 'texts') == ['a b\nc', 'abcdefg', 'abcdefg', 'h' * 7]
    assert '2 texts are cut off at max_length=8' in capsys.readouterr().out


def test_subwords_of_letters_know_no_other_bytes():
    """So that a prompt in capitals or Chinese is refused; the ids of letters are as ever."""
    texts = ['the cat sat on the mat'] * 3
    plain, letters = (train_tokenizer(texts, 'subwords', 300, x) for x in (False, True))
    assert letters.encode('the hat') == plain.encode('the hat') and len(letters) == len(plain)
    assert letters.decode(letters.encode('the hat')) == 'the hat'
    assert unknown_in('The cat 中', letters) == 'T 中' and unknown_in('The cat 中', plain) == ''


@pytest.mark.parametrize('level', ['chars', 'subwords'])
def test_end_tokens_spelled_out_in_the_text_are_text(level):
    text = 'ab</s>ab <pad> ab'
    tok = train_tokenizer([text], level, 300)
    for pack in ('words', 'paragraphs', 'texts'):
        assert packed([text], tok, 50, pack) == [text]


@needs_shared
@pytest.mark.parametrize('pack', ['words', 'paragraphs', 'texts'])
def test_what_t5_takes_for_an_end_is_left_out(make, tmp_path, pack):
    """Its vocabulary has '</s>' as a word: a strike-through of HTML would end the text there."""
    file = write(tmp_path / 'x.txt', 'an old</s> price of <pad>all\n<|endoftext|>' * 200)
    meta = make(file, f'--pack={pack}', '--letters_only=false', '--max_length=64',
                f'--tokenizer={T5}')
    ids, index = open_split(meta, 'train')
    assert (ids == meta['eos_id']).sum() == len(index)
    assert 'an old price of' in texts_of(meta, 'train')[0]


def test_a_pad_token_that_is_a_word_stays_in_texts():
    tokenizer = train_tokenizer(['ab cd'], 'chars', 0)
    tokenizer.pad_token = 'b'
    assert packed(['ab cd'], tokenizer, 50, 'words') == ['ab cd']


def test_a_text_that_begins_with_an_end_keeps_its_first_word(tok):
    """Of a tokenizer that cannot spell its EOS, and puts nothing in front of a text."""
    tokenizer = train_tokenizer(['ab cd'], 'chars', 0)
    tokenizer.add_tokens('[END]')
    tokenizer.eos_token = '[END]'
    words = [ids for ids, space in prepare.split_words(['[END]ab cd'], tokenizer) if not space]
    assert [tokenizer.decode(ids) for ids in words] == ['ab', 'cd']


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
    assert 'texts are cut off at max_length=256' in make.out
    for n, story in enumerate(want):
        row = got[1].pop(0) if n % 20 == 19 else got[0].pop(0)
        assert row == story or story.startswith(row[:80]) and len(row) > 400

# ---- what is refused ----

@pytest.mark.parametrize('content, says', [
    (b'', 'too little'), (b'two words', 'too little'), (None, 'cannot read'),
    ('Ж'.encode() * 9000, 'keeps more than'),
    (b'ok\nbad \xff byte', 'line 2: .*dcff.* in UTF-8')])
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
    ('--max_length=1', 'between 2 and'), ('--token_level=nothing', 'token_level'),
    ('--pack=pages', "'words', 'paragraphs', 'texts'"), ('--pack=texts', 'endoftext'),
    ('--val_fraction=1.5', 'val_fraction'),
    ('--latent_std=-1', 'latent_std')])
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
    rows = dict(condition_input_ids=[[3 + i % 20, 5, 1][i % 3:] for i in range(n)],
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
    assert meta['conditional'] and meta['columns'] == ['condition_input_ids', 'input_ids']
    assert make.out.count('it begins: ') == 2
    # a set of its own for validation
    save_published(tmp_path / 'val', 7)
    meta = make(tmp_path / 'set', f'--val_dataset={tmp_path / "val"}', *tok)
    assert meta['rows'] == dict(train=2100, val=7) and len(references(meta)) == 7
    # ids alone
    save_published(tmp_path / 'plain', 40, condition_input_ids=None, input=None, target=None)
    meta = make(tmp_path / 'plain', *tok)
    assert not meta['conditional'] and not os.path.exists(os.path.join(meta['dir'], 'val.jsonl'))
    with pytest.raises(UserError, match='lacks ids under condition_input_ids or input_ids'):
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
                    '--columns=de,en' if name == 'wmt' else '--columns=')
        code = AutoTokenizer.from_pretrained(meta['tokenizer'])
        if name == 'owt':       # its tokenizer knows no newline
            found = ''.join(texts_of(meta, 'train')).replace('<unk>', '')
            assert found == ''.join(columns['text']).replace('\n', '')
            continue
        got = [tuple(code.decode(part[:-1]) for part in row) for row in rows_of(meta, 'train')]
        assert got == list(zip(a, b))
        assert meta['rows']['val'] == 5
        assert references(meta) == [dict(input=x, target=y) for x, y in zip(a[:5], b[:5])]


def test_a_table_with_a_hole_is_refused(make, tmp_path):
    parquet(tmp_path / 'set' / 'x.parquet', text=['a long enough text'] * 50 + [None])
    with pytest.raises(UserError, match='row 50 lacks text'):
        make(tmp_path / 'set', '--letters_only=false')


TWO = [[4, 1]] * 29


@pytest.mark.parametrize('columns, says', [
    (dict(input_ids=None, condition_input_ids=None, input=None), 'has the columns target, index'),
    (dict(input_ids=[*TWO, *TWO, [4, 1], [30, 1]]), 'val has token id 30'),
    (dict(input_ids=[[4, 1], [4, 1, 0, 0], *TWO, *TWO]), 'train has token id 0 .*take padding off'),
    (dict(condition_input_ids=[[4], [4, 1], *TWO, *TWO]), 'train .*in EOS, 1'),
    (dict(input_ids=[[4, 1], [-1, 1], *TWO, *TWO]), 'train has token id -1'),
    (dict(input_ids=[*TWO, [4, 1], [], *TWO]), 'row 30 lacks ids under'),
    (dict(condition_input_ids=[[], [4, 1], *TWO, *TWO]), 'row 0 lacks ids under'),
    (dict(input_ids=['text'] * 60), 'lacks ids'), (dict(input_ids=[['text']] * 60), 'lacks ids'),
    (dict(input_ids=[[0.5]] * 60), 'lacks ids'), (dict(input_ids=[[4, None]] * 60), 'lacks ids'),
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
    for source, says in ((tmp_path / 'cut', 'cannot read.*cut'),
                         (tmp_path / 'empty', 'has no file of parquet'),
                         (tmp_path / 'noise', 'cannot read.*noise'),
                         (tmp_path / 'none', 'offline|hub'), ('./none', 'no file or folder here')):
        with pytest.raises(UserError, match=says) as e:
            make(source, *tok)
        assert '\n' not in str(e.value) and nothing_made(tmp_path)

# ---- own .jsonl ----

def test_own_jsonl_and_folders(make, tmp_path, tok, text):
    pairs = [dict(input=f'a{"b" * (i % 7)}', output='c d', more=1) for i in range(50)]
    assert make(write(tmp_path / 'a.jsonl', pairs), *tok)['rows'] == dict(train=48, val=2)
    write(tmp_path / 'folder' / 'one.txt', text)
    write(tmp_path / 'folder' / 'two.txt', 'zz zzz\nzzzz\n' * 50)
    meta = make(tmp_path / 'folder', *tok)
    words = ' '.join(texts_of(meta, 'train') + texts_of(meta, 'val')).split()
    want = text.lower().replace('.', '').split() + ['zz', 'zzz', 'zzzz'] * 50
    assert sorted(words) == sorted(want)


AB = dict(input='a', output='b')


@pytest.mark.parametrize('rows, says', [
    ([AB] * 30 + ['{"input": "a", '], 'line 31 is no JSON object'),
    ([dict(input='a')], 'line 1 has the columns input; say'), (['[1]'], 'line 1 is no JSON object'),
    ([AB, dict(text='c')], 'line 2 lacks text under input or output'),
    ([dict(text='c'), AB], 'line 2 lacks text under text'),
    ([AB, dict(input='a', output=5)], 'line 2 lacks text'), ([dict(text='')], 'too little'),
    ([], 'too little'), ([AB] * 3, 'too little'),
    ([AB, '{"input": "\\ud83d", "output": "b"}'], 'line 2 is no JSON object .*surrogate'),
    (['\x00'], 'line 1 is no JSON object'), (['[' * 100000], 'line 1 is no JSON object')])
def test_broken_jsonl(make, tmp_path, tok, rows, says):
    with pytest.raises(UserError, match=says) as e:
        make(write(tmp_path / 'a.jsonl', rows), *tok)
    assert '\n' not in str(e.value) and nothing_made(tmp_path)

# ---- splits by the names of files ----

@pytest.mark.parametrize('path, split', [
    ('train-00000-of-00001.parquet', 'train'), ('default/partial-train/0000.parquet', 'train'),
    ('a.txt', 'train'), ('latest.txt', 'train'), ('contest/evaluate.txt', 'train'),
    ('eval.jsonl', 'val'), ('my_holdout.jsonl', 'val'), ('evaluation/a.txt', 'val'),
    ('old_testament.txt', 'train'), ('Testing/dev.txt', 'test'),
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
    left_out, = [line for line in make.out.splitlines() if line.endswith('left out')]
    assert left_out.startswith('test: ') and names[2].format('00') in left_out


def test_test_files_only_where_they_are_named(make, tmp_path, tok):
    for name, content in (('train', TRAIN), ('test', TEST)):
        save_text(tmp_path / 'set' / name, 'txt', content)
    meta = make(tmp_path / 'set', *tok)
    assert words_of(meta, 'val') == set(TRAIN.split())      # set aside
    meta = make(tmp_path / 'set', f'--val_dataset={tmp_path / "set" / "test.txt"}', *tok)
    assert words_of(meta, 'val') == set(TEST.split())
    for name in ('test.txt', 'x_val.txt'):
        write(tmp_path / 'only' / name, TEST * 900)
    with pytest.raises(UserError, match='nothing to train on.*x_val.txt.*test.txt'):
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
    for name in noise:
        write(tmp_path / 'legal' / name, TEST * 900)
    with pytest.raises(UserError, match='has no file of'):
        make(tmp_path / 'legal', *tok)


def test_folders_of_mixed_kinds_are_refused(make, tmp_path, tok):
    parquet(tmp_path / 'a' / 'x.parquet', text=[TRAIN] * 60)
    write(tmp_path / 'a' / 'more.txt', TRAIN * 900)
    write(tmp_path / 'b' / 'more.txt', TRAIN * 900)
    write(tmp_path / 'b' / 'pairs.jsonl', [AB] * 60)
    for name, says in (('a', 'has .*parquet and .*txt'), ('b', 'has .*jsonl and .*txt')):
        with pytest.raises(UserError, match=says):
            make(tmp_path / name, *tok)
    assert nothing_made(tmp_path)

# ---- files as others write them ----

PAIR_ROWS = [dict(input=f'{i} "a", b', output='NA') for i in range(60)]


@pytest.mark.parametrize('name', ['x.jsonl', 'x.JSONL', 'x.jsonl.gz', 'x.jsonl.bz2', 'x.jsonl.xz',
                                  'x.json', 'x.json.gz', 'x.csv', 'x.csv.gz', 'x.tsv',
                                  'x.parquet', 'x.Parquet'])
def test_every_kind_of_file_gives_the_same_bins(make, tmp_path, name):
    """As pandas writes them; "NA" is a text, and so are digits."""
    import pandas
    wanted = make(write(tmp_path / 'want.jsonl', PAIR_ROWS), '--encoder_dim=8')
    table, file = pandas.DataFrame(PAIR_ROWS), str(tmp_path / name)
    if '.json' in name.lower():
        lines = 'jsonl' in name.lower()
        table.to_json(file, orient='records', lines=lines)
    elif 'sv' in name:
        table.to_csv(file, index=False, sep='\t' if 'tsv' in name else ',')
    else:
        table.to_parquet(file)
    meta = make(file, '--encoder_dim=8')
    assert meta['checksums'] == wanted['checksums'] and references(meta) == references(wanted)


@pytest.mark.parametrize('name, content, says', [
    ('x.csv', 'text\na, b\n', 'after line 1 .*more fields than names'),
    ('x.csv', 'text\na\nb, c\n', 'after line 2 .*more fields'),
    ('x.tsv', 'input\toutput\n"a\tb\nc\td\n"e\tf\n', 'after line 1 .* expected after'),
    ('x.tsv', 'input\toutput\na\tb\n"c\td\ne\tf\n', 'after line 2 .*unexpected end of data')])
def test_texts_with_the_signs_of_the_table(make, tmp_path, tok, name, content, says):
    """Else the text ends at its comma, or a quote takes the lines up to the next one with it."""
    with pytest.raises(UserError, match=says + '.* must stand in quotes'):
        make(write(tmp_path / name, content), *tok)
    assert nothing_made(tmp_path)


def test_a_last_line_without_an_end_ends(make, tmp_path, tok):
    for i in range(60):
        write(tmp_path / 'many' / f'{i}.txt', 'some words\nand an end')
    meta = make(tmp_path / 'many', *tok, '--max_length=64')
    assert words_of(meta, 'train') == set('some words and an end'.split())


def test_lines_that_end_as_on_an_old_mac(make, tmp_path, tok):
    file = tmp_path / 'x.txt'
    file.write_bytes(b'some words\r' * 60)
    assert make(file, *tok, '--pack=lines')['rows'] == dict(train=57, val=3)


def test_texts_in_other_letters_are_said_to_be_broken(make, tmp_path, tok):
    make(write(tmp_path / 'fr.txt', 'le château près de la forêt\n' * 300), *tok)
    assert make.out.count('letters other than a-z are left out') == 1
    make(write(tmp_path / 'en.txt', 'a naïve word among others of plain letters\n' * 300), *tok)
    assert 'letters other' in make.out
    make(write(tmp_path / 'de.txt', ('plain words of English ' * 9 + 'naïve\n') * 300), *tok)
    assert 'letters other' not in make.out


@pytest.mark.parametrize('name', ['x.zip', 'x.docx'])
def test_a_file_of_no_kind_is_no_folder(make, tmp_path, tok, name):
    with pytest.raises(UserError, match=f'{name} has no file of parquet'):
        make(write(tmp_path / name, 'PK'), *tok)


def test_a_set_that_is_a_link(make, tmp_path, tok, text):
    """To a larger disk, say: the new set would take the place of the link, on the small one."""
    write(tmp_path / 'x.txt', text)
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'x').symlink_to(tmp_path / 'disk')
    with pytest.raises(UserError, match='is a link or holds no bins'):
        make(tmp_path / 'x.txt', *tok)
    make(tmp_path / 'x.txt', *tok, f'--data_dir={tmp_path}/data', '--name=y')
    (tmp_path / 'data').rename(tmp_path / 'disk' / 'sets')
    (tmp_path / 'data').symlink_to(tmp_path / 'disk' / 'sets')
    for name in ('y', 'deep/er', 'deep/er'):
        assert make(tmp_path / 'x.txt', *tok, f'--name={name}')['rows']
    assert (tmp_path / 'data').is_symlink() and os.listdir(tmp_path / 'data' / 'deep') == ['er']


def test_what_another_container_with_this_pid_left(make, tmp_path, tok, text):
    """The folder of a set that it makes, or was killed over."""
    left = write(tmp_path / 'data' / f'.x.tmp-{os.getpid()}' / 'train.bin', 'half')
    meta = make(write(tmp_path / 'x.txt', text), *tok)
    assert meta['rows']['train'] and os.path.exists(left)


def test_the_next_command_can_be_pasted(make, tmp_path, tok, text):
    make(write(tmp_path / 'my book.txt', text), *tok)
    assert "'--dataset=my book' '--out_dir=out/my book' --max_length" in make.out


@pytest.mark.parametrize('name', ['a.txt.gz', 'a.txt.xz'])
def test_compressed_texts_and_broken_ones(make, tmp_path, text, name, tok):
    import gzip
    import lzma
    packed = (gzip if 'gz' in name else lzma).compress(text.encode())
    (tmp_path / name).write_bytes(packed)
    plain, ours = make(write(tmp_path / 'b.txt', text), *tok), make(tmp_path / name, *tok)
    words = ' '.join(texts_of(plain, 'train') + texts_of(plain, 'val')).split()
    got = ' '.join(texts_of(ours, 'train') + texts_of(ours, 'val')).split()
    assert sorted(got) == sorted(words)
    (tmp_path / name).write_bytes(packed[:len(packed) // 2])
    with pytest.raises(UserError, match=f'cannot read .*{name}'):
        make(tmp_path / name, *tok)


def test_shards_may_be_empty_or_have_a_column_more(make, tmp_path, tok):
    parquet(tmp_path / 'set' / 'a.parquet', text=[])
    parquet(tmp_path / 'set' / 'b.parquet', text=[TRAIN] * 60)
    parquet(tmp_path / 'set' / 'c.parquet', text=[VAL] * 60, more=[1] * 60)
    meta = make(tmp_path / 'set', *tok)
    found = words_of(meta, 'train')
    assert found == set(f'{TRAIN} {VAL}'.split())
    parquet(tmp_path / 'set' / 'd.parquet', texts=[VAL] * 60)
    with pytest.raises(UserError, match='d.parquet, row 0 lacks text under text'):
        make(tmp_path / 'set', *tok)


def test_pairs_of_ids_after_an_empty_shard(make, tmp_path, tok):
    parquet(tmp_path / 'set' / 'a.parquet', condition_input_ids=[], input_ids=[])
    parquet(tmp_path / 'set' / 'b.parquet', condition_input_ids=[[4, 1]] * 60,
            input_ids=[[5, 1]] * 60)
    meta = make(tmp_path / 'set', *tok)
    assert meta['rows'] == dict(train=57, val=3) and len(references(meta)) == 3


def test_blank_lines_and_pairs(make, tmp_path, tok):
    pairs = [dict(input='a', output='b')] * 60 + [dict(input='a', output=' '), '']
    meta = make(write(tmp_path / 'a.jsonl', pairs), *tok)
    assert sum(meta['rows'].values()) == 60
    assert make.out.count('pairs with a blank side are left out') == 1
    texts = [dict(text=TRAIN)] * 60 + [dict(text='')]
    assert make(write(tmp_path / 'b.jsonl', texts), *tok)['rows']['train'] > 0


def test_one_text_per_line(make, tmp_path, tok):
    file = write(tmp_path / 'names.txt', ''.join(f'a{"b" * (i % 9)}\n\n' for i in range(60)))
    meta = make(file, '--pack=lines', *tok)
    want = ['a' + 'b' * (i % 9) for i in range(60)]
    assert texts_of(meta, 'val') == want[19::20] and len(texts_of(meta, 'train')) == 57


def test_latents_are_measured_without_padding(make, tmp_path, text):
    """Rows of one to forty words, most of each batch padding."""
    lines = [' '.join(text.split()[i:i + 1 + (i % 40 == 0) * 39]) for i in range(400)]
    meta = make(write(tmp_path / 'a.txt', '\n'.join(lines)), '--pack=lines', '--max_length=64')
    encoder = TextEncoder(meta['encoder'])
    rows = [torch.tensor([ids]) for _, ids in rows_of(meta, 'train')]
    x = torch.cat([encoder(row, torch.ones_like(row).bool())[0] for row in rows])
    assert meta['latent_mean'] == pytest.approx(x.mean().item(), abs=1e-4)
    assert meta['latent_std'] == pytest.approx(x.std().item(), rel=1e-3)

# ---- several readings ----

@pytest.mark.parametrize('names, chosen', [
    (['text', 'input', 'output'], 'text'), (['text', 'source', 'target'], 'source,target'),
    (['instruction', 'input', 'output'], 'instruction,output'),
    (['prompt', 'completion'], 'prompt,completion'), (['question', 'answer'], 'answer,question'),
    (['input', 'output', 'target'], 'input,target'), (['text', 'prompt'], 'text'),
    (['title', 'body'], 'body')])
def test_tables_that_can_be_read_in_several_ways(make, tmp_path, tok, names, chosen):
    rows = [{name: f'{chr(97 + n)} b' for n, name in enumerate(names)} for _ in range(60)]
    file = write(tmp_path / 'a.jsonl', rows)
    with pytest.raises(UserError, match=f"has the columns {', '.join(names)}; say which to read"):
        make(file, *tok)
    meta = make(file, f'--columns={chosen}', *tok)
    assert f"columns: {', '.join(chosen.split(','))}\n" in make.out
    row = [part for part in rows_of(meta, 'train')[0] if part]
    code = AutoTokenizer.from_pretrained(meta['tokenizer'])
    want = [rows[0][name] for name in chosen.split(',')]
    assert len(row) == len(want)
    assert all(code.decode(ids[:-1]).startswith(text) for ids, text in zip(row, want))
    with pytest.raises(UserError, match='lacks text under nothing: .*' + names[0]):
        make(file, '--columns=nothing', *tok)
    with pytest.raises(UserError, match='lacks text under a or b,c'):
        make(file, '--columns=a,b,c', *tok)


def test_text_beside_metadata_is_text(make, tmp_path, tok):
    """RedPajama, Dolma: 'source' alone is no pair."""
    rows = [dict(text=TRAIN, source='web', id=i) for i in range(60)]
    assert words_of(make(write(tmp_path / 'a.jsonl', rows), *tok), 'train') == set(TRAIN.split())


def test_translations_need_a_direction(make, tmp_path, tok):
    parquet(tmp_path / 'a.parquet', translation=[dict(de='a', en='b')] * 60)
    with pytest.raises(UserError, match='has the columns de, en'):
        make(tmp_path / 'a.parquet', *tok)
    assert references(make(tmp_path / 'a.parquet', '--columns=en,de', *tok))[0]['input'] == 'b'


CARD = """---
configs:
- config_name: one
  data_files:
  - split: train
    path: data/first-*
  - split: validation
    path: [data/check-*]
- config_name: two
  data_files:
  - split: train
    path: other/*
  - split: test
    path: other/last*
---
# A set
"""


def test_configurations_of_a_card(make, tmp_path, tok):
    for name, content in (('data/first-0', TRAIN), ('data/check-0', VAL), ('other/x', TEST)):
        save_text(tmp_path / 'set' / name, 'parquet', content)
    write(tmp_path / 'set' / 'README.md', CARD)
    for args in ([], ['--subset=three']):
        with pytest.raises(UserError, match='several configurations; .*: one, two'):
            make(tmp_path / 'set', *args, *tok)
    meta = make(tmp_path / 'set', '--subset=one', *tok)
    assert words_of(meta, 'train') == set(TRAIN.split())
    assert words_of(meta, 'val') == set(VAL.split())
    assert words_of(make(tmp_path / 'set', '--subset=two', *tok), 'train') == set(TEST.split())


@pytest.mark.parametrize('configs, args', [
    ('[{config_name: default, data_files: "x/*"}]', []),
    ('[{config_name: default, data_files: ["x/*.txt"]}]', []), ('[{config_name: default}]', ['.']),
    ('[{config_name: a, data_dir: x}, {config_name: b, data_dir: y}]', ['a'])])
def test_other_forms_of_cards(make, tmp_path, tok, configs, args):
    save_text(tmp_path / 'set' / 'x' / 'a', 'txt', TRAIN)
    save_text(tmp_path / 'set' / 'y' / 'val', 'txt', VAL)
    write(tmp_path / 'set' / 'README.md', f'---\nconfigs: {configs}\n---\n')
    meta = make(tmp_path / 'set', *[f'--subset={name}' for name in args], *tok)
    assert words_of(meta, 'train') == set(TRAIN.split())
    write(tmp_path / 'set' / 'README.md', '---\nconfigs: [\n---\n')
    with pytest.raises(UserError, match='cannot read: .*README.md'):
        make(tmp_path / 'set', *tok)


def test_one_folder_per_language(make, tmp_path, tok):
    for name, content in (('de/a', TRAIN), ('en/a', VAL)):
        save_text(tmp_path / 'set' / name, 'txt', content)
    with pytest.raises(UserError, match='has .*/de/.*txt and .*/en/.*txt; choose a folder'):
        make(tmp_path / 'set', *tok)
    with pytest.raises(UserError, match="subset='fr'; it has .*en"):
        make(tmp_path / 'set', '--subset=fr', *tok)
    assert words_of(make(tmp_path / 'set', '--subset=en', *tok), 'train') == set(VAL.split())
    both = make(tmp_path / 'set', '--subset=.', *tok)
    assert words_of(both, 'train') == set(f'{TRAIN} {VAL}'.split())

# ---- what would be lost in silence ----

def test_linked_folders_are_read_and_what_cannot_be_read_is_named(make, tmp_path, tok, monkeypatch):
    save_text(tmp_path / 'elsewhere' / 'b', 'txt', VAL)
    save_text(tmp_path / 'set' / 'a', 'txt', TRAIN)
    (tmp_path / 'set' / 'more').symlink_to(tmp_path / 'elsewhere')
    both = make(tmp_path / 'set', '--subset=.', *tok)
    assert words_of(both, 'train') == set(f'{TRAIN} {VAL}'.split())
    access = os.access
    for shut in ('more', 'a.txt'):      # root may read everything
        monkeypatch.setattr(os, 'access', lambda path, mode: not path.endswith(shut)
                            and access(path, mode))
        with pytest.raises(UserError, match=f'cannot read .*{shut}: no permission'):
            make(tmp_path / 'set', *tok)
    monkeypatch.undo()
    (tmp_path / 'set' / 'c.txt').symlink_to(tmp_path / 'gone')
    with pytest.raises(UserError, match='cannot read .*c.txt: .*a link to nothing'):
        make(tmp_path / 'set', *tok)


def test_markers_between_texts_are_no_text(make, tmp_path, tok):
    file = write(tmp_path / 'a.txt', f'{TRAIN}\n<|endoftext|>\n{VAL}<|endoftext|>{TRAIN}\n' * 200)
    meta = make(file, *tok)
    assert words_of(meta, 'train') == set(f'{TRAIN} {VAL}'.split())
    assert make.out.count('<|endoftext|> counts as') == 1


def test_a_little_text_in_one_line(make, tmp_path):
    """6,399 Chinese characters: what can be done is said, and does it."""
    file = write(tmp_path / 'a.txt', '天地玄黃宇宙洪荒日' * 711)
    args = ['--letters_only=false', '--token_level=chars']
    with pytest.raises(UserError, match='no rows for val; give more, a larger val_fraction'):
        make(file, *args)
    assert make(file, '--val_fraction=0.2', *args)['rows']['val'] > 0


def test_unknown_tokens_are_said(make, tmp_path, tok):
    args = ['--letters_only=false', '--pack=lines', *tok]
    make(write(tmp_path / 'a.txt', 'abc ж\n' * 3000), *args)
    assert 'WARNING: 16.7% of the tokens are unknown' in make.out
    make(write(tmp_path / 'b.txt', 'abc d\n' * 3000), *args)
    assert 'WARNING' not in make.out


def test_ids_with_conditions_and_no_texts_get_references(make, tmp_path, tok):
    """Training samples conditions of val.jsonl at its default interval."""
    save_published(tmp_path / 'set', input=None, target=None)
    meta = make(tmp_path / 'set', *tok)
    code = AutoTokenizer.from_pretrained(meta['tokenizer'])
    want = [[code.decode(part[:-1]) for part in row] for row in rows_of(meta, 'val')]
    assert [[row['input'], row['target']] for row in references(meta)] == want and want
    assert 'the set has no texts' in make.out

# ---- numbers ----

@pytest.mark.parametrize('n, words', [
    (0, 'zero'), (7, 'seven'), (20, 'twenty'), (4071, 'four thousand seventy-one'),
    (999_999, 'nine hundred ninety-nine thousand nine hundred ninety-nine'),
    (100_000, 'one hundred thousand'), (310_012, 'three hundred ten thousand twelve')])
def test_in_words(n, words):
    assert in_words(n) == words


def test_numbers(make):
    meta = make('numbers')
    assert meta['rows'] == dict(train=100_000, val=1000)
    assert 'next: python train.py config/numbers.py --dataset=numbers\n' in make.out
    assert 'WARNING' not in make.out
    code = AutoTokenizer.from_pretrained(meta['tokenizer'])
    seen = {split: {tuple(cond) for cond, _ in rows_of(meta, split)} for split in ('train', 'val')}
    assert len(seen['val']) == 1000 and not seen['train'] & seen['val']
    # one of each size first, the README's among them; short numbers are known, too
    assert [row['input'] for row in references(meta)[:4]] == ['6', '42', '305', '4071']
    assert [sum(len(ids) == k + 1 for ids in seen['train']) for k in (1, 2, 3)] == [9, 88, 898]
    for row in references(meta):
        assert in_words(int(row['input'])) == row['target']
        for text in row.values():
            ids = code(text, add_special_tokens=False)['input_ids']
            assert code.decode(ids) == text and code.unk_token_id not in ids
        assert code.tokenize(row['input']) == list(row['input'])


def test_the_hint_for_own_pairs_runs(make, run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    make(write(tmp_path / 'pairs.jsonl', PAIR_ROWS))
    command = make.out.split('next: python ')[1].split()
    data = [f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out']
    out = run(*command, *data, '--max_iters=2', '--batch_size=8', '--eval_interval=100')
    assert os.path.exists(tmp_path / 'out' / 'ckpt.pt') and 'iter 2' in out
