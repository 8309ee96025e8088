"""
Text to tokenised, memory-mapped bins: data/<name>/, see parts/data.py.

    python prepare.py                               # the embedded demo corpus: seconds, no download
    python prepare.py --dataset=numbers             # a task made on the spot: 4071 -> in words
    python prepare.py --dataset=my.txt --letters_only=false --max_length=64
    python prepare.py --dataset=pairs.jsonl --tokenizer=t5-small --encoder=t5-small
    python prepare.py --dataset=openwebtext         # the published ids, from the hub
    python prepare.py --dataset=openwebtext-raw     # the texts themselves, tokenised here
    python prepare.py --dataset=tinystories         # more names: KNOWN, below

Own data: a file (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow; .gz, .bz2, .xz or .zip of one),
a folder of one kind of them, such as save_to_disk writes, or a hub id. The names of files and
folders say what is train, validation and test; test never trains. Everything streams: memory does
not grow with the data. A set appears under its name whole or not at all.
"""
from configurator import UserError, configure, from_hub       # first: see there

import csv
import glob
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from itertools import chain

import numpy as np
from tqdm import tqdm

from model import ELFConfig, TextEncoder
from parts.data import (FILES, batched, finish_swap, get_rows, load_tokenizer, open_bins,
                        open_split, read_jsonl, read_lines, read_row, sha256, write_jsonl,
                        write_split)
from parts.toy import numbers, pydocs, save_encoder, train_tokenizer

# --------------------------------------------------------------------------------------------------
# settings

dataset = 'pydocs'      # the text inside every Python; a file, folder or hub id; a name from KNOWN
val_dataset = ''        # validation from another such source, '' = its own split, else val_fraction
subset = ''             # of several configurations or folders: one, such as 'de-en'; '.' = all
columns = ''            # of a table: 'text', or 'input,output' and the like; '' = by their names
revision = ''           # of a hub id: branch, tag or commit
name = ''               # folder under data_dir, '' = the dataset's name
data_dir = 'data'
letters_only = True     # texts: a-z, lower-case, and single spaces, the easiest; false = all of it
max_length = 24         # texts: tokens per row, its EOS included
pack = 'words'          # texts: rows of whole 'words' or 'paragraphs', or one of 'texts' or 'lines'
val_fraction = 0.05     # set aside, spread evenly: rows, texts, or blocks of about 2,000 characters
tokenizer = ''          # hub id or folder, '' = train one on the text and save it beside the bins
token_level = 'subwords'    # of a trained one: 'chars', 'words', or 'subwords', mostly whole words
vocab_size = 6000       # of trained subwords
encoder = ''            # T5-family hub id or folder, '' = a small untrained one beside the bins
encoder_dim = 64        # its width C: the width of the latents
encoder_layers = 0      # 0 = a vector per token, whatever stands around it
latent_mean = 0.0       # of the encoder's outputs, taken off the latents;
latent_std = 0.0        # 0.0 = measure both (t5-small: the published 0.0 and 0.2)
seed = 0                # of the untrained encoder

CHOICES = dict(pack=('words', 'paragraphs', 'texts', 'lines'),
               token_level=('chars', 'words', 'subwords'))
AT_LEAST_1 = ('encoder_dim', 'vocab_size')
ABOVE_0 = ('val_fraction',)

# --------------------------------------------------------------------------------------------------
# sets by name: what stands here holds where the user set nothing else

T5 = dict(tokenizer='t5-small', encoder='t5-small', letters_only=False)
KNOWN = {
    # 100,000 pairs and 1,000 unseen ones; a digit, a word: a token each
    'numbers': dict(token_level='words', val_fraction=1 / 101),
    'numbers_back': dict(token_level='words', val_fraction=1 / 101),
    # 9,737,184 rows of 850-1020 tokens
    'openwebtext': dict(T5, dataset='embedded-language-flows/openwebtext-t5', val_fraction=0.0005),
    'wmt14_de-en': dict(T5, dataset='embedded-language-flows/wmt14_de-en_train_t5',
                        val_dataset='embedded-language-flows/wmt14_de-en_validation_t5'),
    'xsum': dict(T5, dataset='embedded-language-flows/xsum_train_t5',
                 val_dataset='embedded-language-flows/xsum_validation_t5'),
    # the texts they were made from, at the revisions with parquet files
    'openwebtext-raw': dict(T5, dataset='Skylion007/openwebtext', val_fraction=0.0005,
                            revision='963532436460638ab26b7633e23776e6c7e37d59',
                            pack='paragraphs', max_length=1024),
    'wmt14_de-en-raw': dict(T5, dataset='wmt/wmt14', subset='de-en', columns='de,en',
                            revision='636160b43f4e525818592807e71b666c97327445'),
    'xsum-raw': dict(T5, dataset='EdinburghNLP/xsum', revision='refs/convert/parquet'),
    # One story a row, so that a model learns where stories begin and end. Of 2,316 stories, 202
    # tokens in the median, 79 % are whole in 256 tokens; that keeps 88 % of the text, and 21 % of
    # the rows is padding. In 512 tokens: 96 %, 98 %, and 56 % padding at twice the work.
    'tinystories': dict(T5, dataset='roneneldan/TinyStories', pack='texts', max_length=256,
                        revision='f54c09fd23315a6f9c86f9dc80f725de7d8f9c64'),
}
# what to train them with: one's own command line adds to it
CONFIGS = {'pydocs': 'pydocs', 'numbers': 'numbers', 'openwebtext': 'owt_elf_b',
           'wmt14_de-en': 'wmt14_de_en_elf_b', 'xsum': 'xsum_elf_b', 'tinystories': 'tinystories'}

# --------------------------------------------------------------------------------------------------
# a source: files of one kind, by split

MADE = dict(pydocs=pydocs, numbers=numbers, numbers_back=partial(numbers, back=True))
TABLES, TEXT_FILES = ('.parquet', '.arrow'), ('.jsonl', '.json', '.csv', '.tsv', '.txt')
PACKED = ('.gz', '.bz2', '.xz', '.zip')
KINDS = f"{', '.join(TABLES + TEXT_FILES)}, also compressed"
# hidden files, what save_to_disk and the hub leave beside the data, and legal texts
NO_CORPUS = re.compile(r'\..*|(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow|'
                       r'(?i:(licen[sc]e|readme|notice|copying)(?![a-z]).*\.txt)')
TEST_WORDS = {'test', 'tests', 'testing', 'testset'}
VAL_WORDS = {'validation', 'valid', 'val', 'dev', 'eval', 'evaluation', 'holdout', 'heldout'}
END_OF_TEXT = '<|endoftext|>'
CARD = 'README.md'


@dataclass
class Source:
    kind: str               # 'texts', 'pairs' (condition, target), 'ids'
    columns: tuple          # one, or two for conditions and targets
    files: dict             # {'train': paths, 'val': paths, perhaps none}
    commits: list           # of hub ids


def load_source():
    """What --dataset and --val_dataset name -> Source. UserError if it cannot be used."""
    splits, commit = find_files(dataset, revision)
    files, commits = dict(train=splits['train'], val=splits['val']), [commit]
    if val_dataset:
        splits, commit = find_files(val_dataset, revision if val_dataset == dataset else '')
        files['val'] = splits['val'] or splits['train'] or splits['test']
        commits.append(commit)
    elif splits['test']:
        print(f"left out as test: {shortened(splits['test'])}")
    if not files['train'] or val_dataset and not files['val']:
        found = shortened(sum(splits.values(), [])) or 'no such file'
        raise UserError(f"{dataset} has nothing to train on: wanted files not named test or "
                        f"validation, {KINDS}; it has {found}")
    columns = {split: choose_columns(paths) for split, paths in files.items() if paths}
    for split, names in columns.items():
        print(f"{split}: {' and '.join(names)} of {shortened(files[split])}")
    names = columns['train']
    if columns.get('val', names) != names:
        raise UserError("train and val have different columns; they must be alike")
    kind = 'texts' if len(names) == 1 else 'pairs'
    return Source('ids' if 'ids' in names[-1] else kind, names, files, commits)


def find_files(source, revision):
    """The files of what a setting names -> {'train', 'val', 'test': paths}, commit of a hub id."""
    address = re.match(r'https?://(?:huggingface\.co|hf\.co)/datasets/([^/]+/[^/?#]+)', source)
    folder = source = address[1] if address else source
    commit, splits = None, dict(train=[], val=[], test=[])
    is_file = os.path.isfile(source)
    if source in MADE or is_file and kind_of(source):   # a file is taken, whatever its name
        return dict(splits, train=[source]), None
    if not os.path.isdir(source):
        if is_file or kind_of(source):
            raise UserError(f"cannot read {source}: no such file, or none of {KINDS}")
        folder, commit = fetch(source, revision)
    for split, path in list_files(source, folder):
        splits[split].append(path)
    return splits, commit


def list_files(source, folder):
    """
    Each file of a folder, or of its chosen part -> [(split, path)]. UserError if they are no single
    corpus.
    """
    patterns = choose_configuration(source, folder)
    top = os.path.join(folder, '' if subset == '.' or patterns else subset)
    if not os.path.isdir(top):
        raise UserError(f"{source} has no {subset!r}; it has {shortened(os.listdir(folder))}")
    found, seen = [], set()
    for at, folders, files in os.walk(top, followlinks=True):
        if os.path.realpath(at) in seen:        # by a link to a folder around it
            folders.clear()
            continue
        seen.add(os.path.realpath(at))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in folders + sorted(files):
            path = os.path.join(at, name)
            if not os.access(path, os.R_OK):
                raise UserError(f"cannot read {path}: no permission, or a link to nothing")
            inside = os.path.relpath(path, top)
            label = next((split for split, pattern in patterns if fnmatch(inside, pattern)), None)
            other = NO_CORPUS.fullmatch(name) or patterns and label is None
            if os.path.isfile(path) and kind_of(path) and not other:
                found.append((split_of(f"{label or ''}/{inside}"), path))
    kinds = {kind_of(path): path for split, path in found if split != 'test'}
    if len(kinds) > 1:
        raise UserError(f"{source} has files of several kinds, {' and '.join(kinds.values())}; "
                        "give one kind, or name one file itself")
    folders = {os.path.dirname(path) for split, path in found if split == 'train'}
    folders = sorted(os.path.relpath(at, top) for at in folders if not os.path.samefile(at, top))
    if len(folders) > 1 and not patterns and not subset:
        raise UserError(f"{source} has several folders to train on: {shortened(folders)}; choose "
                        "one by --subset, or --subset=. for all")
    return found


def choose_configuration(source, folder):
    """
    The files of the configuration that subset names, or of the only one, by the card of a dataset
    -> [(split, pattern)], empty if it says nothing. UserError if there are several to choose from.
    """
    from huggingface_hub import metadata_load
    card = os.path.join(folder, CARD)
    if not os.path.isfile(card):
        return []
    patterns = []
    with from_hub("cannot read", card):
        configs = (metadata_load(card) or {}).get('configs') or []
        names = [config['config_name'] for config in configs]
        for config in configs:
            inside = f"{config.get('data_dir')}/*" * ('data_dir' in config)
            files = config.get('data_files') or inside
            for entry in [files] if isinstance(files, str) else files:
                entry = dict(split='', path=entry) if isinstance(entry, str) else entry
                paths = [entry['path']] if isinstance(entry['path'], str) else entry['path']
                if subset in ('', config['config_name']):
                    patterns += [(entry['split'], path) for path in paths if path]
    if len(names) > 1 and subset not in names + ['.']:
        raise UserError(f"{source} has several configurations; choose one by --subset: "
                        f"{', '.join(names)}")
    return patterns


def fetch(source, revision):
    """The files of a hub id, which come from the cache if they are there -> folder, commit."""
    from huggingface_hub import snapshot_download
    print(f"{source}: its files from the hub" + ", without those named test" * (not val_dataset))
    # 'test' as a word; the patterns' * crosses slashes
    ignore = None if val_dataset else ['test[!a-z]*', '*[!a-z]test[!a-z]*']
    get = partial(snapshot_download, source, repo_type='dataset', revision=revision or None,
                  ignore_patterns=ignore)
    with from_hub("no dataset", source):
        patterns = [path for _, path in choose_configuration(source, get(allow_patterns=[CARD]))]
        inside = f'{subset}/' if subset not in ('', '.') else ''
        for kinds in (TABLES, TEXT_FILES):      # tables first: often a text lies beside them
            endings = [kind + packed for kind in kinds for packed in ('', *PACKED)]
            folder = get(allow_patterns=patterns or [f'{inside}*{ending}' for ending in endings])
            names = glob.glob(f'{inside}**', root_dir=folder, recursive=True)
            if any(kind_of(name) in kinds for name in names):
                break
    return folder, os.path.basename(folder)


def kind_of(path):
    """Its ending, without that of a compression: x.JSONL.gz -> .jsonl; '' if we do not read it."""
    root, ending = os.path.splitext(path.lower())
    if ending in PACKED:
        ending = os.path.splitext(root)[1]
    return ending if ending in TABLES + TEXT_FILES else ''


def split_of(path):
    """'train', 'val' or 'test', by the words in a path; 'test' goes before all, it never trains."""
    words = {word.lower() for word in re.findall('[A-Z]?[a-z]+|[A-Z]+', path)}
    return 'test' if words & TEST_WORDS else 'val' if words & VAL_WORDS else 'train'


def shortened(names):
    """A list for a message."""
    return ', '.join(names[:5]) + f" and {len(names) - 5:,} more" * (len(names) > 5)

# --------------------------------------------------------------------------------------------------
# files to texts, pairs (condition, target) of texts, or pairs of ids, streamed

# names of the two columns of a pair, and names that may or may not be meant
PAIRS = (('input', 'output'), ('source', 'target'), ('input', 'target'), ('source', 'output'),
         ('document', 'summary'), ('condition_input_ids', 'input_ids'))
UNCLEAR = {'instruction', 'prompt', 'completion', 'question', 'answer', 'response', 'chosen'}


def read_rows(file, names=()):
    """The rows of a file -> (where they stand, for messages; {column: value}, names at least)."""
    kind = kind_of(file)
    if kind == '.jsonl':
        yield from read_jsonl(file)
    elif kind == '.txt':
        yield from ((file, dict(text=line)) for line in read_lines(file))
    else:
        if kind in ('.csv', '.tsv'):    # `datasets` would take "NA" for nothing, "1" for a number
            csv.field_size_limit(1 << 30)
            rows = csv.DictReader(read_lines(file), delimiter=',' if kind == '.csv' else '\t')
        else:
            rows = MADE[file]() if file in MADE else open_table(file, names)
        with from_hub("not readable", file):
            for n, row in enumerate(rows):
                yield f"{file}, row {n}", row.get('translation') or row


def open_table(file, names=()):
    """A file -> a dataset, with these columns if it has them; streamed: mapped pages are memory."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)       # errors are one line of ours
    with from_hub("not readable", file):
        table = datasets.load_dataset(kind_of(file)[1:], data_files=glob.escape(file),
                                      split='train', streaming=True)
    inside = names and set(names) <= set(table.features or ())
    return table.select_columns(list(names)) if inside else table


def choose_columns(paths):
    """
    What to read of tables, by the names of their columns -> one name, or two of a pair. UserError
    if it can be read in several ways.
    """
    where, row = next(chain.from_iterable(map(read_rows, paths)), ('', dict(text='')))
    have = f"{where} has the columns {', '.join(map(str, row))}"
    if columns:
        names = tuple(columns.split(','))
        if not set(names) <= row.keys() or len(names) > 2:
            raise UserError(f"{have}; --columns={columns} must name one or two of them")
        return names
    readings = [names for names in (*PAIRS, ('input_ids',), ('text',)) if row.keys() >= set(names)]
    if 'input_ids' in row and 'text' not in row:    # beside ids stand the pairs that they are of
        readings = [names for names in readings if 'input_ids' in names][:1]
    if len(readings) != 1 or UNCLEAR & row.keys():
        raise UserError(f"{have}; say what to read, such as --columns=text, or condition and "
                        "target: --columns=prompt,completion")
    return readings[0]


def read_texts(file, names):
    """The text, or pair, in each row of a file. A pair with a blank side is left out, aloud."""
    blank = 0
    for where, row in read_rows(file, names):
        texts = tuple(row.get(name) for name in names)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} lacks a text under {' or '.join(names)}: {str(row)[:100]}")
        if len(names) == 1:
            yield texts[0]
        elif all(map(str.strip, texts)):
            yield texts
        else:
            blank += 1
    if blank:
        say_once(f"{file}: {blank:,} pairs with a blank side are left out")


say_once = cache(tqdm.write)        # a file is read up to three times


def read_items(source, paths, names):
    """What stands in the columns of files: texts, pairs, or pairs of ids."""
    # a small corpus, too, has some blocks to set aside
    size = sum(map(os.path.getsize, filter(kind_of, source.files['train']))) // 40 or 2000
    for file in paths:
        texts = read_texts(file, names)
        if 'ids' in names[-1]:
            yield from id_rows(file, names)
        elif len(names) == 2:
            yield from texts
        elif pack == 'lines' or pack == 'texts' and file == 'pydocs':
            yield from (line for text in texts for line in text.split('\n') if line.strip())
        elif kind_of(file) != '.txt' and file != 'pydocs':
            yield from (text + '\n' for text in texts)
        elif pack == 'texts':
            yield from marked_texts(file, texts)
        else:
            yield from blocks(texts, min(2000, max(100, size)))


def marked_texts(file, lines):
    """The texts of a .txt with <|endoftext|> between them. UserError if one is endless."""
    parts, count = [], 0        # of the text at hand
    for line in lines:
        *ends, rest = line.split(END_OF_TEXT)
        for end in ends:
            yield ''.join(parts) + end
            parts, count = [], 0
        parts.append(rest)
        count += len(rest)
        if count > 1_000_000:
            raise UserError(f"{file} has a text of over a million characters; --pack=texts needs "
                            f"{END_OF_TEXT} between the texts, or a .jsonl file")
    yield ''.join(parts)


def blocks(lines, size):
    """
    Lines, their ends included -> blocks of whole lines of about size characters. An endless line is
    cut between words, an endless word anywhere.
    """
    between_words = re.compile(rf'(?s).{{1,{size}}}(?:\s+|$)|\S{{1,{size}}}\s*')
    block, count = [], 0
    for line in lines:
        for part in [line] if len(line) <= 2 * size else between_words.findall(line):
            block.append(part)
            count += len(part)
            if count >= size:
                yield ''.join(block)
                block, count = [], 0
    if block:
        yield ''.join(block)


def id_rows(file, names):
    """(condition ids, target ids) of each row, as arrays, a thousand rows in memory at a time."""
    first = 0
    with from_hub("not readable", file):
        for batch in open_table(file, names).with_format('arrow').iter(1000):
            parts = [split_column(file, first, name, batch[name].combine_chunks())
                     for name in names]
            yield from zip(*parts) if len(parts) == 2 else (((), part) for part in parts[0])
            first += len(batch)


def split_column(file, first, name, column):
    """An Arrow array of lists of ids -> an array for each row, all of them views of one."""
    import pyarrow
    is_list = hasattr(column, 'value_lengths')
    if not is_list or not pyarrow.types.is_integer(column.type.value_type):
        raise UserError(f"{file}: {name} holds {column.type}, not lists of whole numbers")
    lengths, ids = column.value_lengths().to_numpy(zero_copy_only=False), column.flatten()
    if column.null_count or ids.null_count or not lengths.all():
        raise UserError(f"{file}: {name} is empty in one of the rows {first} to "
                        f"{first + len(column) - 1}; every row needs ids")
    return np.split(ids.to_numpy(), np.cumsum(lengths)[:-1])


def read_split(source, split, names=()):
    """The items of 'train' or 'val'; without files of its own, val is each k-th of train."""
    k = max(2, round(1 / val_fraction))
    paths = source.files[split] or source.files['train']
    for i, item in enumerate(read_items(source, paths, names or source.columns)):
        if source.files['val'] or (i % k == k - 1) == (split == 'val'):
            yield plain(item) if source.kind == 'texts' else item


def plain(text):
    """A text without markers between texts, and, if asked for, with letters only."""
    if END_OF_TEXT in text:
        say_once(f"{END_OF_TEXT} counts as a line's end; --pack=texts makes rows of the texts")
        text = text.replace(END_OF_TEXT, '\n')
    return re.sub(r'[^a-z]+', ' ', text.lower()) if letters_only else text

# --------------------------------------------------------------------------------------------------
# rows to ids

def find_tokenizer(folder, source):
    """The tokenizer that is named, else one trained on the texts and saved in folder."""
    if tokenizer:
        tok = load_tokenizer(tokenizer)
        if not tok.is_fast or tok.pad_token_id is None or tok.eos_token_id is None:
            raise UserError(f"tokenizer {tokenizer!r} has no pad or EOS token, or no fast version; "
                            "take a T5 one")
        return tok
    if source.kind == 'ids':
        raise UserError("the dataset holds ids; name the tokenizer they are from, "
                        "for example --tokenizer=t5-small")
    texts = read_split(source, 'train')
    if source.kind == 'pairs':
        texts = chain.from_iterable(texts)
    tok = train_tokenizer(texts, token_level, vocab_size)
    tok.save_pretrained(os.path.join(folder, 'tokenizer'))
    return tok


def tokenize(texts, tok, offsets=False):
    """
    A batch of texts -> lists of ids, with offsets also lists of their (start, end) in the text; the
    tokenizer takes all cores. '</s>' and '<pad>' spelled out in a text are left out: they end rows.
    """
    out = tok(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=offsets)
    ids, spans = out['input_ids'], out.get('offset_mapping')
    ends = {tok.eos_token_id, tok.pad_token_id}
    for n, row in enumerate(ids):
        if not ends.isdisjoint(row):
            keep = [i for i, token in enumerate(row) if token not in ends]
            ids[n] = [row[i] for i in keep]
            if offsets:
                spans[n] = [spans[n][i] for i in keep]
    return (ids, spans) if offsets else ids


def split_pieces(texts, tok, pack):
    """Texts -> (ids, is white space) of one of their 'words' or 'paragraphs' after the other."""
    for batch in batched(texts, 256):
        if pack == 'paragraphs':        # their newlines included
            for ids in tokenize(re.findall(r'[^\n]*\n|[^\n]+', ''.join(batch)), tok):
                if ids:
                    yield ids, False
            continue
        for text, ids, spans in zip(batch, *tokenize(batch, tok, offsets=True)):
            # a word starts where there is white space before or at a token
            starts = [i for i, (start, _) in enumerate(spans)
                      if start == 0 or text[start - 1].isspace() or text[start].isspace()]
            for i, j in zip(starts, starts[1:] + [len(ids)]):
                yield ids[i:j], text[spans[i][0]:spans[j - 1][1]].isspace()


def pack_rows(pieces, max_length, eos):
    """
    Pieces end to end in rows of at most max_length ids, each closed by EOS when the next piece does
    not fit; a longer one is cut into full rows. Rows neither start nor end with a piece of white
    space. [the rule of the published OpenWebText set]
    """
    row, end = [], 0            # end: where its last piece ends that is no white space
    for ids, space in pieces:
        if row and len(row) + len(ids) >= max_length:
            yield row[:end] + [eos]
            row, end = [], 0
        if space and not row:
            continue
        while len(ids) >= max_length:
            yield ids[:max_length - 1] + [eos]
            ids = ids[max_length - 1:]
        row = row + ids
        end = end if space else len(row)
    if row:
        yield row[:end] + [eos]


def cut_rows(texts, tok, max_length):
    """One text a row, closed by EOS; what does not fit into max_length ids is cut off, aloud."""
    count = cut = 0
    for batch in batched(texts, 256):
        for ids in tokenize([text.strip() for text in batch], tok):
            if ids:
                yield ids[:max_length - 1] + [tok.eos_token_id]
                count += 1
                cut += len(ids) >= max_length
    if cut:
        tqdm.write(f"{cut:,} of {count:,} texts ({cut / count:.0%}) have more than max_length="
                   f"{max_length} tokens, the rest of them is left out")


def make_rows(kind, items, tok, pack, max_length):
    """Texts, pairs or ids -> (condition ids, target ids) of each row, streamed."""
    eos = tok.eos_token_id
    if kind == 'ids':
        yield from items
    elif kind == 'pairs':
        for batch in batched(items, 1000):
            rows = [ids + [eos] for ids in tokenize(list(chain.from_iterable(batch)), tok)]
            yield from zip(rows[::2], rows[1::2])
    elif pack in ('texts', 'lines'):
        yield from (((), row) for row in cut_rows(items, tok, max_length))
    else:
        yield from (((), row) for row in pack_rows(split_pieces(items, tok, pack), max_length, eos))


def write_splits(folder, source, tok, dtype):
    """train and val of a Source to bins -> {split: n} of rows, of tokens, of the longest row."""
    counts = {}
    for split in ('train', 'val'):
        rows = make_rows(source.kind, read_split(source, split), tok, pack, max_length)
        rows = tqdm(rows, desc=split, unit=' rows', disable=None)
        counts[split] = write_split(folder, split, rows, dtype, len(tok), tok.eos_token_id)
        if not counts[split][0]:
            hint = "; give more, or a larger val_fraction" * (split == 'val')
            hint += "; --letters_only=false keeps more than a-z" * letters_only
            hint += f"; --pack=texts needs {END_OF_TEXT} in a .txt" * (pack == 'texts')
            raise UserError(f"{dataset} is too little: no rows for {split}{hint}")
    return [dict(zip(counts, column)) for column in zip(*counts.values())]


def write_references(folder, source, tok):
    """val.jsonl: the texts of the validation pairs, for samples, BLEU and ROUGE."""
    names, decode = source.columns, partial(tok.decode, skip_special_tokens=True)
    if source.kind == 'ids':
        paths = source.files['val'] or source.files['train']
        if {'input', 'target'} <= set(open_table(paths[0]).features):
            names = ('input', 'target')
        else:
            print("val.jsonl: the set has no texts, so what its tokenizer makes of the ids")
    pairs = (map(decode, pair) if names[0].endswith('ids') else pair
             for pair in read_split(source, 'val', names))
    write_jsonl(os.path.join(folder, 'val.jsonl'), (dict(input=a, target=b) for a, b in pairs))

# --------------------------------------------------------------------------------------------------
# encoder

def load_encoder(name, vocab_size):
    """A TextEncoder for a tokenizer of vocab_size ids. UserError if it knows fewer."""
    text_encoder = TextEncoder(name)
    known = text_encoder.model.config.vocab_size
    if known < vocab_size:
        raise UserError(f"encoder {name} knows {known} ids, the tokenizer has {vocab_size}; "
                        "take the encoder's own tokenizer")
    return text_encoder


def measure_latents(text_encoder, meta):
    """Mean and standard deviation of the encoder's outputs on 512 rows, spread over train.bin."""
    T = min(1024, meta['max_length'])       # an endless row would not fit into memory
    c = ELFConfig(max_length=T, max_input_length=T)
    rows = np.unique(np.linspace(0, meta['rows']['train'] - 1, 512).astype(int))
    count, total, square = 0, 0.0, 0.0
    for batch in batched(rows, max(1, 2048 // T)):
        ids, valid, _ = get_rows(meta, 'train', batch, c)
        x = text_encoder(ids, valid)[valid].double()        # (valid tokens, C)
        count += x.numel()
        total += x.sum().item()
        square += x.square().sum().item()
    mean = total / count
    return mean, (square / count - mean**2) ** 0.5

# --------------------------------------------------------------------------------------------------
# before and after

def check():
    """All that is refused before anything is read; a set that a kill left aside is put back."""
    if max_length < 2 or val_fraction >= 1:
        raise UserError("max_length starts at 2, as EOS is one of a row's tokens; val_fraction is "
                        "below 1")
    if latent_mean and not latent_std:
        raise UserError("give latent_mean and latent_std both, or neither to measure them")
    if name != os.path.basename(name) or name in ('', '.', '..'):
        raise UserError(f"name={name!r}: must be one folder's name, without slashes; "
                        "--data_dir says where")
    finish_swap(data_dir, name)
    final = os.path.join(data_dir, name)
    if os.path.isdir(final) and os.listdir(final) and 'meta.json' not in os.listdir(final):
        raise UserError(f"{final} is there already and holds no bins (no meta.json); "
                        "choose another --name")
    for left in glob.glob(os.path.join(glob.escape(data_dir), f'.{glob.escape(name)}.tmp-*')):
        if os.path.getmtime(left) < time.time() - 86400:    # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)


def checksums(folder):
    """Of the bins, and of our own tokenizer and encoder: a resume sees if one was made anew."""
    own = ('tokenizer/tokenizer.json', 'encoder/model.safetensors')
    files = [file for file in FILES + own if os.path.exists(os.path.join(folder, file))]
    return {file: sha256(os.path.join(folder, file)) for file in files}


def swap_in(folder):
    """Put the new set in the place of the old; finish_swap mends what a kill in between leaves."""
    final, old = os.path.join(data_dir, name), os.path.join(data_dir, f'.{name}.old')
    if os.path.isdir(final):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(folder, final)
    shutil.rmtree(old, ignore_errors=True)


def show(meta, tok, longest):
    """Print what the user should have now: sizes, what was lost, the first rows as text."""
    for split in ('train', 'val'):
        ids, index = open_split(meta, split)
        print(f"{ids.filename}: {len(index):,} rows of at most {longest[split]} tokens, "
              f"{len(ids):,} tokens, {ids.nbytes:,} bytes")
        first = [tok.decode(part, skip_special_tokens=True) for part in read_row(ids, index, 0)]
        print("  first row: " + ' -> '.join(repr(text[:100]) for text in filter(None, first)))
        unknown = np.mean(ids[:10_000_000] == tok.unk_token_id)
        if unknown > 0.01:
            print(f"  WARNING: {unknown:.1%} of the tokens are {tok.unk_token}, their text lost; "
                  "without --tokenizer one is trained on this text")


def next_command(meta, asked):
    """What to run on the new set; asked: --dataset."""
    own = f" --dataset={name} --max_length={meta['max_length']} --out_dir=out/{name}"
    if meta['conditional']:
        lengths = np.diff(open_split(meta, 'train')[1])
        print(f"conditions: half of them up to {np.median(lengths):.0f} tokens, 95 % up to "
              f"{np.quantile(lengths, 0.95):.0f}, all up to {lengths.max()}")
        own += f" --max_input_length={lengths.max()}"
    if asked == name in CONFIGS:
        return f"python train.py config/{CONFIGS[name]}.py"
    if encoder:
        config = 'wmt14_de_en_elf_b' if meta['conditional'] else 'owt_elf_b'
    else:
        config = 'numbers' if meta['conditional'] else 'pydocs'
    return f"python train.py config/{config}.py{own}"


if __name__ == '__main__':
    given = set()
    configure(globals(), given=given)
    name = name or os.path.splitext(os.path.basename(dataset.rstrip('/')))[0].removesuffix('-raw')
    asked = dataset
    globals().update({key: value for key, value in KNOWN.get(asked, {}).items()
                      if key == 'dataset' or key not in given})
    check()
    source = load_source()
    letters_only = letters_only and source.kind == 'texts'

    # in a folder of another name until all is there
    folder = os.path.join(data_dir, f'.{name}.tmp-{os.getpid()}')
    try:
        os.makedirs(folder)
        tok = find_tokenizer(folder, source)
        text_encoder = load_encoder(encoder, len(tok)) if encoder else None
        dtype = 'uint16' if len(tok) <= 65536 else 'uint32'
        rows, tokens, longest = write_splits(folder, source, tok, dtype)
        if len(source.columns) == 2:
            write_references(folder, source, tok)
        meta = dict(format=1, dtype=dtype, tokenizer=tokenizer or 'tokenizer', vocab_size=len(tok),
                    pad_id=tok.pad_token_id, eos_id=tok.eos_token_id, encoder=encoder or 'encoder',
                    conditional=len(source.columns) == 2, max_length=max(longest.values()),
                    rows=rows, tokens=tokens,
                    source=dict(dataset=dataset, val_dataset=val_dataset, subset=subset,
                                columns=source.columns, revision=source.commits, kind=source.kind,
                                pack=pack, letters_only=letters_only))
        if not encoder:
            path = os.path.join(folder, 'encoder')
            save_encoder(path, dict(meta, dir=folder), encoder_dim, encoder_layers, seed)
            text_encoder = load_encoder(path, len(tok))
        mean, std = measured = measure_latents(text_encoder, dict(meta, dir=folder))
        if latent_std:
            mean, std = latent_mean, latent_std
        elif encoder in ('t5-small', 'google-t5/t5-small'):
            mean, std = 0.0, 0.2
        meta.update(latent_dim=text_encoder.latent_dim, latent_mean=mean, latent_std=std,
                    checksums=checksums(folder))
        with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        swap_in(folder)
    except OSError as e:
        raise UserError(f"could not write {os.path.join(data_dir, name)}: {e.strerror or e}; "
                        "what was there before is intact") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    meta = open_bins(data_dir, name)
    show(meta, tok, longest)
    print(f"tokenizer: {tokenizer or token_level}, {len(tok)} ids; "
          f"encoder: {encoder or 'untrained'}, {text_encoder.latent_dim} wide")
    print(f"latents: mean {measured[0]:.4f} and std {measured[1]:.4f} measured, "
          f"{mean:.4f} and {std:.4f} used")
    print(f"next: {next_command(meta, asked)}")
