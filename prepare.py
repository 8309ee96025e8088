"""
Text to tokenised, memory-mapped bins: data/<name>/, see data.py.

    python prepare.py                               # the embedded demo corpus: seconds, no download
    python prepare.py --dataset=my.txt --letters_only=false --max_length=64
    python prepare.py --dataset=pairs.jsonl --tokenizer=t5-small --encoder=t5-small
    python prepare.py --dataset=openwebtext         # the published ids, from the hub
    python prepare.py --dataset=openwebtext-raw     # the texts themselves, tokenised here
    python prepare.py --dataset=tinystories         # more names: KNOWN, below

Own data: UTF-8 .txt files; .jsonl files, {"text": ...} or {"input": ..., "output": ...} a line;
.parquet files; what save_to_disk writes; or a folder of one of these, in which the files' names say
what is train, validation and test. Everything streams: memory does not grow with the data. A set
appears under its name whole or not at all.
"""
from configurator import UserError, configure, from_hub       # first: see there

import ast
import glob
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from parts.data import (FILES, batched, finish_swap, get_rows, load_tokenizer, open_bins,
                        open_split, read_jsonl, read_lines, read_row, sha256, write_jsonl,
                        write_split)
from model import ELFConfig, TextEncoder

# --------------------------------------------------------------------------------------------------
# settings

dataset = 'pydocs'      # the text inside every Python; a file, folder or hub id; a name from KNOWN
val_dataset = ''        # validation from another such source, '' = its own split, else val_fraction
subset = ''             # folder inside a hub id, such as 'de-en' of wmt/wmt14
revision = ''           # of a hub id: branch, tag or commit
name = ''               # folder under data_dir, '' = the dataset's name
data_dir = 'data'
letters_only = True     # texts: a-z, lower-case, and single spaces, the easiest; false = all of it
max_length = 24         # texts: tokens per row, its EOS included
pack = 'words'          # texts: rows of whole 'words' or 'paragraphs', or one of the 'texts' a row
val_fraction = 0.05     # set aside, spread evenly: rows, texts, or blocks of about 2,000 characters
tokenizer = ''          # hub id or folder, '' = train one on the text and save it beside the bins
token_level = 'subwords'    # of a trained tokenizer: 'chars' or 'subwords', here mostly whole words
vocab_size = 6000       # of trained subwords
encoder = ''            # T5-family hub id or folder, '' = a small untrained one beside the bins
encoder_dim = 64        # its width C: the width of the latents
encoder_layers = 0      # 0 = a vector per token, whatever stands around it
latent_mean = 0.0       # of the encoder's outputs, taken off the latents;
latent_std = 0.0        # 0.0 = measure both (t5-small: the published 0.0 and 0.2)
seed = 0                # of the untrained encoder

# --------------------------------------------------------------------------------------------------
# sets by name: what stands here holds where the user set nothing else

T5 = dict(tokenizer='t5-small', encoder='t5-small', letters_only=False)
KNOWN = {
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
    'wmt14_de-en-raw': dict(T5, dataset='wmt/wmt14', subset='de-en',
                            revision='636160b43f4e525818592807e71b666c97327445'),
    'xsum-raw': dict(T5, dataset='EdinburghNLP/xsum', revision='refs/convert/parquet'),
    # One story a row, so that a model learns where stories begin and end. Of 2,316 stories, 202
    # tokens in the median, 79 % are whole in 256 tokens; that keeps 88 % of the text, and 21 % of
    # the rows is padding. In 512 tokens: 96 %, 98 %, and 56 % padding at twice the work.
    'tinystories': dict(T5, dataset='roneneldan/TinyStories', pack='texts', max_length=256,
                        revision='f54c09fd23315a6f9c86f9dc80f725de7d8f9c64'),
}
CONFIGS = {'openwebtext': 'config/owt_elf_b.py', 'wmt14_de-en': 'config/wmt14_de_en_elf_b.py',
           'xsum': 'config/xsum_elf_b.py', 'tinystories': 'config/tinystories.py'}

# --------------------------------------------------------------------------------------------------
# sources: where texts, pairs of texts or pairs of ids come from

PAIRS = (('input', 'output'), ('source', 'target'), ('input', 'target'), ('source', 'output'),
         ('document', 'summary'))       # names of the two columns of a pair
TEXT_FILES, TABLES = ('.txt', '.jsonl'), ('.parquet', '.arrow')
# save_to_disk leaves data-*.arrow (cache-*.arrow beside it is no data) and notes about them
CORPUS_NAME = re.compile(r'.*\.(txt|jsonl|parquet)|(data-.*|dataset)\.arrow')
NOTES_NAME = re.compile(r'(state|dataset_info|dataset_dict)\.json|cache-.*\.arrow')
NO_CORPUS_NAME = re.compile(r'\.|(?i:(licen[sc]e|readme|notice|copying)(?![a-z]).*\.txt)')
END_OF_TEXT = '<|endoftext|>'


@dataclass
class Source:
    """What a data set gives; train, val and references are functions that start a fresh stream."""
    kind: str                       # 'texts', 'pairs' (input, target), 'ids' (condition, target)
    train: Callable
    val: Callable = None            # None: it has no such split
    references: Callable = None     # of ids: the (input, target) texts of val, else of train
    revision: str = None            # the commit of a hub id
    conditional: bool = False


def load_source(source, subset, revision, pack, for_val=False):
    """What --dataset, or --val_dataset (for_val), names -> Source. UserError if unusable."""
    if source == 'pydocs':
        return pydocs_source(pack)
    commit = None
    if source.endswith(TEXT_FILES + TABLES) and not os.path.isdir(source):
        if not os.path.isfile(source):
            raise UserError(f"cannot read {source}: no such file; --dataset is 'pydocs', a file "
                            "(.txt, .jsonl, .parquet), a folder, or a hub id")
        splits = dict(train=[source], val=[])       # named exactly, it is taken whatever its name
    else:
        folder = source
        if not os.path.isdir(source):
            folder, commit = fetch(source, subset, revision, for_val)
        splits = find_splits(source, folder, for_val)
    if splits['train'][0].endswith(TEXT_FILES):
        return text_source(source, splits, pack)
    return table_source(source, splits, subset, commit)


def fetch(source, subset, revision, with_test):
    """The files of a hub id, which come from the cache if they are there -> folder, commit."""
    from huggingface_hub import snapshot_download
    inside = f'{subset}/' if subset else ''
    # 'test' as a word; the patterns' * crosses slashes
    ignore = None if with_test else ['test[!a-z]*', '*[!a-z]test[!a-z]*']
    data = [f'{inside}*{ending}' for ending in TABLES]
    print(f"{source}: its {' and '.join(TABLES)} files from the hub"
          + ", without those named test" * (not with_test))
    with from_hub("no dataset", source):
        folder = snapshot_download(source, repo_type='dataset', revision=revision or None,
                                   allow_patterns=data, ignore_patterns=ignore)
    return os.path.join(folder, subset), os.path.basename(folder)


def some(names):
    """A list for a message, shortened."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ''
    return ', '.join(map(str, names[:5])) + more


def words_of(path):
    """The words in a path, lower-case: data/x_devSet.jsonl -> data, x, dev, set, jsonl."""
    return [word.lower() for word in re.findall('[A-Z]?[a-z]+|[A-Z]+', path)]


def find_files(folder):
    """Paths in a folder, from there, of what may be a corpus; anything else is left out aloud."""
    found, ignored = [], []
    for at, folders, files in os.walk(folder):
        hidden = [name for name in folders if name.startswith('.')]
        folders[:] = sorted(set(folders) - set(hidden))
        ignored += [os.path.relpath(os.path.join(at, name), folder) for name in hidden]
        for name in sorted(files):
            path = os.path.relpath(os.path.join(at, name), folder)
            if CORPUS_NAME.fullmatch(name) and not NO_CORPUS_NAME.match(name):
                found.append(path)
            elif not NOTES_NAME.fullmatch(name):
                ignored.append(path)
    if ignored:
        print(f"{folder}: ignored, no corpus: {some(ignored)}")
    return found


def split_of(path):
    """'train', 'val' or 'test', by the words in a path; 'test' goes before all, it never trains."""
    words = set(words_of(path))
    if 'test' in words:
        return 'test'
    return 'val' if words & {'validation', 'valid', 'val', 'dev'} else 'train'


def find_splits(source, folder, for_val):
    """
    The files of a folder by their names -> {'train': paths, 'val': paths}; for_val: under 'train'
    what is to validate, test files only if there are no others. UserError: none, or mixed ones.
    """
    splits = dict(train=[], val=[], test=[])
    for path in find_files(folder):
        splits[split_of(path)].append(path)
    if for_val:
        chosen = splits['val'] or splits['train'] or splits['test']
        splits = dict(train=chosen, val=[], test=[] if chosen is splits['test'] else splits['test'])
    if splits['test']:
        print(f"{source}: left out as test: {some(splits['test'])}")
    if not splits['train'] and (splits['val'] or splits['test']):
        raise UserError(f"{source} has nothing to train on, only files of test or validation: "
                        f"{some(splits['test'] + splits['val'])}; rename them, or name one itself")
    files = splits['train'] + splits['val']
    if not files:
        raise UserError(f"{source} has no data: expected .txt, .jsonl or .parquet files, or what "
                        "save_to_disk writes; from the hub .parquet and .arrow, not named test")
    kinds = {os.path.splitext(path)[1]: path for path in files}
    if len(kinds) > 1 and not kinds.keys() <= set(TEXT_FILES):
        raise UserError(f"{source} has {' and '.join(sorted(kinds))} files, such as "
                        f"{' and '.join(kinds.values())}; give one kind, or name one file itself")
    for split, paths in splits.items():
        splits[split] = [os.path.join(folder, path) for path in paths]
    return splits

# ---- texts ----

def docstrings():
    """Every docstring of Python's standard library but its tests; read, never imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    # a distribution may leave some out, or put its own packages beside
    skipped = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'lib2to3'}
    for at, folders, files in os.walk(os.path.dirname(os.__file__)):
        folders[:] = sorted(set(folders) - skipped)
        for file in sorted(files):
            if not file.endswith('.py'):
                continue
            with open(os.path.join(at, file), 'rb') as f:
                tree = ast.parse(f.read())
            for node in ast.walk(tree):
                if isinstance(node, documented):
                    yield ast.get_docstring(node) or ''


def pydocs_text():
    """
    The prose that every Python carries, of its language reference (pydoc_data.topics) and of its
    library's docstrings; a paragraph a line, blank lines between.
    """
    from pydoc_data.topics import topics
    paragraphs = {}             # a dict, as some stand in two places
    for text in chain((topics[topic] for topic in sorted(topics)), docstrings()):
        for paragraph in text.split('\n\n'):
            flat = re.sub(r'[*"`]+', '', ' '.join(paragraph.split()))
            if is_prose(flat):
                paragraphs[flat] = True
    return '\n\n'.join(paragraphs)


def is_prose(paragraph):
    """No code, grammar, table or heading."""
    letters = sum(ch.isalpha() or ch in ' ,.' for ch in paragraph)
    whole = len(paragraph) > 60 and paragraph[-1] in '.:;'
    return whole and letters > 0.92 * len(paragraph) and '::=' not in paragraph


def pydocs_source(pack):
    text = pydocs_text()
    if pack == 'texts':
        return Source('texts', partial(iter, text.split('\n\n')))
    return Source('texts', partial(blocks, text.splitlines(keepends=True), 2000))


def text_source(source, splits, pack):
    """A Source of .txt and .jsonl files."""
    files = dict(texts=[], pairs=[])
    for file in splits['train'] + splits['val']:
        pair = file.endswith('.jsonl') and isinstance(next(read_items(file), ''), tuple)
        files['pairs' if pair else 'texts'].append(file)
    if files['texts'] and files['pairs']:
        raise UserError(f"{source} has both texts ({some(files['texts'])}) and pairs "
                        f"({some(files['pairs'])}); give one kind")
    # a small corpus, too, has some blocks to set aside
    size = min(2000, max(100, sum(map(os.path.getsize, splits['train'])) // 40))
    train = partial(read_files, splits['train'], pack, size)
    val = partial(read_files, splits['val'], pack, size) if splits['val'] else None
    kind = 'pairs' if files['pairs'] else 'texts'
    return Source(kind, train, val, conditional=kind == 'pairs')


def read_files(files, pack, size):
    """The items of .jsonl files; the texts, or else blocks of size characters, of .txt files."""
    for file in files:
        if file.endswith('.jsonl'):
            yield from read_items(file)
        elif pack == 'texts':
            yield from marked_texts(file)
        else:
            yield from blocks(read_lines(file), size)


def read_items(file):
    """
    Lines of a .jsonl: texts (under 'text') or pairs ('input' or 'source', 'output' or 'target').
    UserError names file and line.
    """
    first = None                # 1 or 2 texts a line
    for where, row in read_jsonl(file):
        names = next((pair for pair in PAIRS if row.keys() >= set(pair)), ('text',))
        item = tuple(row.get(name) for name in names)
        if item == (None,):
            have = some([repr(key) for key in row]) or 'nothing'
            raise UserError(f"{where} needs 'text', or 'input' and 'output' (or 'source' and "
                            f"'target'); it has {have}")
        if not all(isinstance(text, str) and text.strip() for text in item):
            needed = ' and '.join(map(repr, names))
            raise UserError(f"{where}: {needed} must be text, and not blank")
        first = first or len(item)
        if len(item) != first:
            this, others = ('a pair', 'have not') if first == 1 else ('plain text', 'have pairs')
            raise UserError(f"{where} has {this}, the lines before {others}; give one kind")
        yield item if first == 2 else item[0] + '\n'


def marked_texts(file):
    """The texts of a .txt with <|endoftext|> between them. UserError if one is endless."""
    parts, count = [], 0        # of the text at hand
    for line in read_lines(file):
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

# ---- tables ----

def table_source(source, splits, subset, commit):
    """A Source of .parquet or .arrow files, ids or texts. UserError if columns are missing."""
    train, columns = open_table(splits['train'])
    val = open_table(splits['val'])[0] if splits['val'] else None
    pair = next((pair for pair in PAIRS if set(pair) <= set(columns)), None)
    references, inside = None, ''
    if 'input_ids' in columns:
        names = [name for name in ('condition_input_ids', 'input_ids') if name in columns]
        if pair == ('input', 'target'):
            references = partial(text_rows, val or train, source, pair, '')
    elif 'translation' in columns and subset.count('-') == 1:
        names, inside = subset.split('-'), 'translation'        # a dict of languages
    elif pair or 'text' in columns:
        names = pair or ['text']
    else:
        raise UserError(f"{source} has the columns {', '.join(columns)}; needed: input_ids "
                        "(save_to_disk), text, or a pair such as input and target")
    conditional = len(names) == 2
    if 'input_ids' in names:
        kind, read = 'ids', partial(id_rows, source=source, names=names)
    else:
        kind = 'pairs' if conditional else 'texts'
        read = partial(text_rows, source=source, names=names, inside=inside)
    val = partial(read, val) if val else None
    return Source(kind, partial(read, train), val, references, commit, conditional)


def open_table(files):
    """Files of one kind -> a streamed dataset, names of its columns. UserError if unreadable."""
    from datasets import load_dataset
    kind = files[0].rpartition('.')[2]
    with from_hub("not readable", os.path.dirname(files[0])):
        # streamed, not mapped: mapped pages would count as memory
        table = load_dataset(kind, data_files=files, split='train', streaming=True)
        return table, list(table.features or next(iter(table), {}))


def text_rows(table, source, names, inside):
    """The text or pair under names in each row, or its dict `inside`. UserError names the row."""
    with from_hub("not readable", source):
        for n, row in enumerate(table.select_columns([inside] if inside else list(names))):
            row = row[inside] or {} if inside else row
            texts = tuple(row.get(name) for name in names)
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{source}, row {n} lacks a text: {str(list(texts))[:100]}")
            yield texts if len(texts) == 2 else texts[0] + '\n'


def id_rows(table, source, names):
    """
    (condition ids, target ids) of each row, as arrays, a thousand rows in memory at a time.
    UserError names the rows.
    """
    first = 0
    with from_hub("not readable", source):
        for batch in table.select_columns(names).with_format('arrow').iter(1000):
            rows = f"the rows {first} to {first + len(batch) - 1}"
            columns = [split_column(batch[name].combine_chunks(), name, rows) for name in names]
            if len(columns) == 1:
                columns = [[()] * len(batch), *columns]
            yield from zip(*columns)
            first += len(batch)


def split_column(column, name, rows):
    """An Arrow array of lists of ids -> an array for each row, all of them views of one."""
    import pyarrow
    is_list = hasattr(column, 'value_lengths')
    if not is_list or not pyarrow.types.is_integer(column.type.value_type):
        raise UserError(f"column {name} holds {column.type}, not lists of whole numbers")
    lengths, ids = column.value_lengths().to_numpy(zero_copy_only=False), column.flatten()
    if column.null_count or ids.null_count or not lengths.all():
        raise UserError(f"{name} is empty in one of {rows}; every row needs ids")
    return np.split(ids.to_numpy(), np.cumsum(lengths)[:-1])

# ---- validation, letters ----

def hold_out(source, k):
    """A Source without a validation split -> one with it: each k-th item."""
    references = source.references and partial(every_kth, source.references, k, True)
    return replace(source, train=partial(every_kth, source.train, k, False),
                   val=partial(every_kth, source.train, k, True), references=references)


def every_kth(read, k, chosen):
    """Each k-th item of a stream, or (not chosen) all others."""
    for i, item in enumerate(read()):
        if (i % k == k - 1) == chosen:
            yield item


def only_letters(read):
    """a-z, lower-case, and single spaces of each text."""
    for text in read():
        yield re.sub(r'[^a-z]+', ' ', text.lower())

# --------------------------------------------------------------------------------------------------
# texts to rows of ids

def train_tokenizer(texts, level, size):
    """
    A tokenizer of 'chars' or at most size 'subwords' under T5's conventions (pad 0, eos 1, unk 2),
    which gives every text of its symbols back exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ['<pad>', '</s>', '<unk>']
    if level == 'chars':
        symbols = set()
        for text in texts:
            symbols.update(text)
        ids = {symbol: i for i, symbol in enumerate(special + sorted(symbols))}
        tok = Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
        tok.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
        tok.decoder = decoders.Fuse()
    elif level == 'subwords':
        tok = Tokenizer(models.BPE(unk_token='<unk>'))
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tok.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>',
                                   unk_token='<unk>', clean_up_tokenization_spaces=False)


def find_tokenizer(name, folder, source, level, size):
    """The tokenizer of that name, or without a name one trained on the texts, saved in folder."""
    if name:
        tok = load_tokenizer(name)
        if not tok.is_fast or tok.pad_token_id is None or tok.eos_token_id is None:
            raise UserError(f"tokenizer {name!r} has no pad or EOS token, or no fast version; "
                            "take a T5 one")
        return tok
    if source.kind == 'ids':
        raise UserError("the dataset holds ids; name the tokenizer they are from, "
                        "for example --tokenizer=t5-small")
    texts = source.train()
    if source.kind == 'pairs':
        texts = chain.from_iterable(texts)
    tok = train_tokenizer(texts, level, size)
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
        tqdm.write(f"{cut:,} of {count:,} texts have more than max_length={max_length} tokens, "
                   "the rest of them is left out")


def make_rows(kind, items, tok, pack, max_length):
    """The items of a Source -> (condition ids, target ids) of each row, streamed."""
    if kind == 'ids':
        yield from items
    elif kind == 'pairs':
        for batch in batched(items, 1000):
            flat = [text for pair in batch for text in pair]
            rows = [ids + [tok.eos_token_id] for ids in tokenize(flat, tok)]
            yield from zip(rows[::2], rows[1::2])
    else:
        rows = (cut_rows(items, tok, max_length) if pack == 'texts' else
                pack_rows(split_pieces(items, tok, pack), max_length, tok.eos_token_id))
        for row in rows:
            yield (), row


def write_splits(folder, source, tok, dtype, pack, max_length):
    """train and val of a Source to bins -> {split: n} of rows, of tokens, of the longest row."""
    rows, tokens, longest = {}, {}, {}
    for split, read in (('train', source.train), ('val', source.val)):
        stream = make_rows(source.kind, read(), tok, pack, max_length)
        stream = tqdm(stream, desc=split, unit=' rows', disable=None)
        counts = write_split(folder, split, stream, dtype, len(tok))
        rows[split], tokens[split], longest[split] = counts
    return rows, tokens, longest

# --------------------------------------------------------------------------------------------------
# encoder

def neighbour_vectors(meta, dim, seed):
    """
    Vectors (V, dim) of tokens by the company they keep, so that "is" lies near "was": how much more
    often than by chance each other token stands right before or after, as a positive logarithm,
    reduced to dim singular directions. The strongest one only tells how frequent a token is and is
    left out. Mean square norm 1; rare tokens are short.
    """
    V = meta['vocab_size']
    ids = open_split(meta, 'train')[0][:2_000_000].astype(np.int64)
    # a token and a neighbour as one number; neighbours on the right count from V on
    before, after = ids[1:] * 2 * V + ids[:-1], ids[:-1] * 2 * V + V + ids[1:]
    pairs, counts = np.unique(np.concatenate((before, after)), return_counts=True)
    at = np.stack(np.divmod(pairs, 2 * V))
    tokens = np.bincount(at[0], counts, V)
    # the power keeps rare neighbours from ruling
    neighbours = np.bincount(at[1], counts, 2 * V) ** 0.75
    chance = tokens[at[0]] * neighbours[at[1]] / neighbours.sum()
    surprise = np.log(counts / chance).clip(0).astype(np.float32)
    surprise = torch.sparse_coo_tensor(at, surprise, (V, 2 * V), check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)         # the method starts from random directions
        u, s, _ = torch.svd_lowrank(surprise, q=min(dim + 1, V), niter=4)
    vectors = F.pad(u[:, 1:] * s[1:].sqrt(), (0, dim + 1 - len(s)))
    return vectors / vectors.square().sum(-1).mean().sqrt()


def save_own_encoder(path, meta, dim, layers, seed):
    """
    A small T5 encoder with seeded random weights, but for its token vectors: those of their
    neighbours, and some noise that tells apart what is alike. That is all the demo needs.
    """
    from transformers import T5Config, T5EncoderModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    heads = 4 if dim % 4 == 0 else 1
    config = T5Config(vocab_size=meta['vocab_size'], d_model=dim, d_kv=dim // heads, d_ff=2 * dim,
                      num_layers=layers, num_heads=heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    table = model.get_input_embeddings().weight.data        # unit normal
    table.mul_(0.4).add_(neighbour_vectors(meta, dim, seed), alpha=dim ** 0.5)
    model.save_pretrained(path)


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
    for some_rows in batched(rows, max(1, 2048 // T)):
        ids, valid, _ = get_rows(meta, 'train', some_rows, c)
        x = text_encoder(ids, valid)[valid].double()        # (valid tokens, C)
        count += x.numel()
        total += x.sum().item()
        square += x.square().sum().item()
    mean = total / count
    return mean, (square / count - mean**2) ** 0.5

# --------------------------------------------------------------------------------------------------
# before and after

def check(config):
    """All that is refused before anything is read; a set that a kill left aside is put back."""
    lowest = dict(max_length=4, encoder_dim=4, encoder_layers=0, vocab_size=260, seed=0)
    choices = dict(pack=('words', 'paragraphs', 'texts'), token_level=('chars', 'subwords'))
    for key, low in lowest.items():
        if config[key] < low:
            raise UserError(f"{key}={config[key]}: must be at least {low}")
    for key, values in choices.items():
        if config[key] not in values:
            raise UserError(f"{key}={config[key]!r} is none of {', '.join(map(repr, values))}")
    if not 0 < config['val_fraction'] < 1:
        raise UserError(f"val_fraction={config['val_fraction']}: must lie between 0 and 1")
    mean, std = config['latent_mean'], config['latent_std']
    if std < 0 or mean and not std:
        raise UserError(f"latent_mean={mean}, latent_std={std}: give both, the latter above 0, "
                        "or neither to measure them")
    name, data_dir = config['name'], config['data_dir']
    if name != os.path.basename(name) or name in ('', '.', '..'):
        raise UserError(f"name={name!r}: must be one folder's name, without slashes; "
                        "--data_dir says where")
    finish_swap(data_dir, name)
    final = os.path.join(data_dir, name)
    holds_bins = os.path.exists(os.path.join(final, 'meta.json'))
    if os.path.isdir(final) and os.listdir(final) and not holds_bins:
        raise UserError(f"{final} is there already and holds no bins (no meta.json); "
                        "choose another --name")


def remove_leftovers(data_dir, name):
    """The folders of runs that were killed, a day ago or longer."""
    for left in glob.glob(f'.{glob.escape(name)}.tmp-*', root_dir=data_dir):
        left = os.path.join(data_dir, left)
        if os.path.getmtime(left) < time.time() - 86400:
            shutil.rmtree(left, ignore_errors=True)


def write_references(folder, source):
    """val.jsonl: the texts of the validation pairs, as far as the source has them."""
    read = source.val if source.kind == 'pairs' else source.references
    write_jsonl(os.path.join(folder, 'val.jsonl'),
                (dict(input=a, target=b) for a, b in (read() if read else ())))


def checksums(folder):
    """Of the bins, and of our own tokenizer and encoder: a resume sees if one was made anew."""
    own = ('tokenizer/tokenizer.json', 'encoder/model.safetensors')
    files = [file for file in FILES + own if os.path.exists(os.path.join(folder, file))]
    return {file: sha256(os.path.join(folder, file)) for file in files}


def swap_in(folder, data_dir, name):
    """Put the new set in the place of the old; finish_swap mends what a kill in between leaves."""
    final, old = os.path.join(data_dir, name), os.path.join(data_dir, f'.{name}.old')
    if os.path.isdir(final):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(folder, final)
    shutil.rmtree(old, ignore_errors=True)


def describe(meta, tok, longest):
    """Print what the user should have now: sizes, and the first row of each split as text."""
    commits = [f", revision {commit}" for commit in meta['source']['revision'] if commit]
    print(f"{meta['source']['dataset']}: {meta['source']['kind']}" + ''.join(commits))
    for split in ('train', 'val'):
        ids, index = open_split(meta, split)
        file = os.path.join(meta['dir'], f'{split}.bin')
        print(f"{file}: {len(index):,} rows of at most {longest[split]} tokens, "
              f"{len(ids):,} tokens, {ids.nbytes:,} bytes")
        first = [tok.decode(part.tolist(), skip_special_tokens=True)
                 for part in read_row(ids, index, 0) if len(part)]
        print("  first row: " + ' -> '.join(repr(text[:100]) for text in first))


def next_command(meta, name, known):
    """What to run on the new set."""
    own = f"--dataset={name} --max_length={meta['max_length']} --out_dir=out/{name}"
    if known and name in CONFIGS:
        return f"torchrun --nproc_per_node=8 train.py {CONFIGS[name]}"
    if meta['conditional']:
        return f"a config like config/wmt14_de_en_elf_b.py with dataset = {name!r}"
    if meta['encoder'] != os.path.join(meta['dir'], 'encoder'):
        return f"python train.py config/owt_elf_b.py {own}"
    return "python train.py config/demo.py" + f" {own}" * (name != 'pydocs')


if __name__ == '__main__':
    given = set()
    config = configure(globals(), given=given)
    known = KNOWN.get(dataset, {})
    name = name or os.path.splitext(os.path.basename(dataset.rstrip('/')))[0].removesuffix('-raw')
    for key, value in known.items():
        if key == 'dataset' or key not in given:
            globals()[key] = value
    check({key: globals()[key] for key in config})

    # ---- source
    source = load_source(dataset, subset, revision, pack)
    commits = [source.revision]
    if val_dataset:
        at = revision if val_dataset == dataset else ''
        other = load_source(val_dataset, subset, at, pack, for_val=True)
        if (source.kind, source.conditional) != (other.kind, other.conditional):
            raise UserError(f"{dataset} has {source.kind}, {val_dataset} has {other.kind}, or one "
                            "has conditions and one has not; both must be alike")
        source = replace(source, val=other.train, references=other.references)
        commits.append(other.revision)
    k = max(2, round(1 / val_fraction))
    source = source if source.val else hold_out(source, k)
    letters = letters_only and source.kind == 'texts'
    if letters:
        source = replace(source, train=partial(only_letters, source.train),
                         val=partial(only_letters, source.val))

    # ---- tokenizer, bins, encoder: in a folder of another name until all is there
    folder = os.path.join(data_dir, f'.{name}.tmp-{os.getpid()}')
    try:
        remove_leftovers(data_dir, name)
        os.makedirs(folder)
        tok = find_tokenizer(tokenizer, folder, source, token_level, vocab_size)
        text_encoder = load_encoder(encoder, len(tok)) if encoder else None
        dtype = 'uint16' if len(tok) <= 65536 else 'uint32'
        rows, tokens, longest = write_splits(folder, source, tok, dtype, pack, max_length)
        empty = [split for split in rows if not rows[split]]
        if empty:
            hint = "; --letters_only=false keeps more than a-z" if letters else ""
            hint += f"; --pack=texts needs {END_OF_TEXT} in a .txt" if pack == 'texts' else ""
            raise UserError(f"{dataset} is too little: no rows for {' and '.join(empty)}; "
                            f"give some 5,000 characters or {k} rows{hint}")
        if source.conditional:      # for eval.py's BLEU and ROUGE
            write_references(folder, source)
        if not encoder:
            path = os.path.join(folder, 'encoder')
            made = dict(dir=folder, dtype=dtype, vocab_size=len(tok))
            save_own_encoder(path, made, encoder_dim, encoder_layers, seed)
            text_encoder = load_encoder(path, len(tok))
        meta = dict(format=1, dtype=dtype, tokenizer=tokenizer or 'tokenizer', vocab_size=len(tok),
                    pad_id=tok.pad_token_id, eos_id=tok.eos_token_id, encoder=encoder or 'encoder',
                    latent_dim=text_encoder.latent_dim, conditional=source.conditional,
                    max_length=max(longest.values()), rows=rows, tokens=tokens,
                    checksums=checksums(folder),
                    source=dict(dataset=dataset, val_dataset=val_dataset, subset=subset,
                                revision=commits, kind=source.kind, pack=pack,
                                letters_only=letters))
        mean, std = measured = measure_latents(text_encoder, dict(meta, dir=folder))
        if latent_std:
            mean, std = latent_mean, latent_std
        elif encoder in ('t5-small', 'google-t5/t5-small'):
            mean, std = 0.0, 0.2
        meta.update(latent_mean=mean, latent_std=std)
        with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        swap_in(folder, data_dir, name)
    except OSError as e:
        raise UserError(f"could not write {os.path.join(data_dir, name)}: {e.strerror or e}; "
                        "what was there before is intact") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    meta = open_bins(data_dir, name)
    describe(meta, tok, longest)
    print(f"tokenizer: {tokenizer or token_level}, {len(tok)} ids; "
          f"encoder: {encoder or 'untrained'}, {text_encoder.latent_dim} wide")
    print(f"latents: mean {measured[0]:.4f} and std {measured[1]:.4f} measured, "
          f"{mean:.4f} and {std:.4f} used")
    print(f"next: {next_command(meta, name, known)}")
