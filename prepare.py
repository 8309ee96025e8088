"""
Text to tokenised, memory-mapped bins: data/<name>/, see parts/data.py.

    python prepare.py                               # a task made on the spot: 4071 -> in words
    python prepare.py --dataset=my.txt              # a-z only, tokens of its own: a laptop's
    python prepare.py --dataset=my.txt --letters_only=false --max_length=64
    python prepare.py --dataset=pairs.jsonl --encoder=t5-small      # or any other of the hub
    python prepare.py --dataset=openwebtext         # the published ids, from the hub
    python prepare.py --dataset=tinystories         # more names: KNOWN, below

Own data: a file (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow, or .gz, .bz2, .xz of one), a
folder of one kind of them, such as save_to_disk writes, or a hub id. The names of files and folders
say what is train, validation and test; test never trains. Everything streams: memory does not grow
with the data. A set appears under its name whole or not at all.
"""
from configurator import UserError, configure       # before torch: see there

import csv
import glob
import json
import os
import re
import shlex
import shutil
import time
from contextlib import suppress
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model import ELFConfig, TextEncoder
from parts.data import (FILES, add_lines, batched, encode, finish_swap, get_rows, load_tokenizer,
                        open_bins, open_split, read_jsonl, read_lines, sha256, swap_in,
                        write_split)
from parts.process import from_hub
from parts.toy import numbers, save_encoder, train_tokenizer

# --------------------------------------------------------------------------------------------------
# settings

dataset = 'numbers'     # made on the spot; a file, folder or hub id; or a name from KNOWN
val_dataset = ''        # validation from another such source, '' = its own split, else val_fraction
subset = ''             # of several configurations or folders: one, such as 'de-en'; '.' = all
columns = ''            # of a table: 'text', or 'input,output' and the like; '' = by their names
revision = ''           # of hub ids: branch, tag or commit
name = ''               # folder under data_dir, '' = the dataset's name
data_dir = 'data'
letters_only = True     # texts: a-z, lower-case, and single spaces, the easiest; false = all of it
max_length = 24         # texts: tokens per row, its EOS included
pack = 'words'          # texts: rows of whole 'words' or 'paragraphs', or one of 'texts' or 'lines'
val_fraction = 0.05     # set aside, spread evenly: rows, texts, or blocks of about 2,000 characters
tokenizer = ''          # hub id or folder, '' = the encoder's own; with no encoder, train one
token_level = 'subwords'    # of a trained one: 'chars', 'words', or 'subwords', mostly whole words
vocab_size = 6000       # of trained subwords
encoder = ''            # text encoder, hub id or folder, '' = a small untrained one beside the bins
encoder_dim = 64        # its width C: the width of the latents
encoder_layers = 0      # 0 = a vector per token, whatever stands around it
latent_std = 0.0        # of the encoder's outputs, around 0; 0.0 = measured (but t5-small: 0.2)
seed = 0                # of the untrained encoder

CHOICES = dict(pack=('words', 'paragraphs', 'texts', 'lines'),
               token_level=('chars', 'words', 'subwords'))
AT_LEAST_2 = ('max_length',)
ABOVE_0 = AT_MOST_1 = ('val_fraction',)

# --------------------------------------------------------------------------------------------------
# sets by name: where they are, the config that trains on them, settings that the user's go before

T5 = dict(tokenizer='t5-small', encoder='t5-small', letters_only=False)
KNOWN = {
    # 100,000 pairs and 1,000 unseen ones; a digit, a word: a token each
    'numbers': ('numbers', 'numbers', dict(token_level='words', val_fraction=1 / 101)),
    # 9,737,184 rows of 850-1020 tokens
    'openwebtext': ('embedded-language-flows/openwebtext-t5', 'owt_elf_b',
                    dict(T5, val_fraction=0.0005)),
    'wmt14_de-en': ('embedded-language-flows/wmt14_de-en_train_t5', 'wmt14_de_en_elf_b',
                    dict(T5, val_dataset='embedded-language-flows/wmt14_de-en_validation_t5')),
    'xsum': ('embedded-language-flows/xsum_train_t5', 'xsum_elf_b',
             dict(T5, val_dataset='embedded-language-flows/xsum_validation_t5')),
    # The texts that they were made from, to be tokenised here, with --tokenizer=t5-small
    # --encoder=t5-small and:
    #     --dataset=Skylion007/openwebtext --revision=963532436460638ab26b7633e23776e6c7e37d59 \
    #         --letters_only=false --pack=paragraphs --max_length=1024 --val_fraction=0.0005
    #     --dataset=wmt/wmt14 --subset=de-en --columns=de,en
    #     --dataset=EdinburghNLP/xsum --revision=refs/convert/parquet
    # One story a row, so that a model learns where stories begin and end. Of 2,316 stories, 202
    # tokens in the median, 79 % are whole in 256 tokens; that keeps 88 % of the text, and 21 % of
    # the rows is padding. In 512 tokens: 96 %, 98 %, and 56 % padding at twice the work.
    'tinystories': ('roneneldan/TinyStories', 'tinystories',
                    dict(T5, pack='texts', max_length=256,
                         revision='f54c09fd23315a6f9c86f9dc80f725de7d8f9c64')),
}

# --------------------------------------------------------------------------------------------------
# a source: files of one kind, by split

TABLES = ('parquet', 'arrow')
TEXTS = ('jsonl', 'json', 'csv', 'tsv', 'txt')
KINDS = TABLES + TEXTS
# what save_to_disk and the hub leave beside the data, and legal texts
NO_CORPUS = re.compile(r'(.*/)?((dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow|'
                       r'(?i:(licen[sc]e|readme|notice|copying)(?![a-z])[^/]*\.txt))')
TEST_WORDS = set('test tests testing testset'.split())
VAL_WORDS = set('validation valid val dev eval evaluation holdout heldout'.split())


def load_source(source):
    """
    A source and that of --val_dataset -> {'train', 'val', 'test': paths, perhaps none}, the columns
    to read. UserError if they cannot be used.
    """
    files = find_files(source)
    if val_dataset:
        other = find_files(val_dataset)
        files.update(val=other['val'] or other['train'] or other['test'], test=[])
    for split, paths in files.items():
        if paths:
            print(f"{split}: {', '.join(paths[:5])}" + ", left out" * (split == 'test'))
    if not files['train']:
        raise UserError(f"{source} has nothing to train on, by the names of its files: {files}")
    names = choose_columns(files['train'])
    print(f"columns: {', '.join(names)}")
    return files, names


def find_files(source):
    """
    The files of what a setting names -> {'train', 'val', 'test': paths}. UserError if they are no
    single corpus.
    """
    source = re.sub('https?://[^/]+/datasets/([^/]+/[^/?#]+).*', r'\1', source)
    files = dict(train=[], val=[], test=[])
    # a file is taken, whatever its name
    if (kind_of(source) or source == 'numbers') and not os.path.isdir(source):
        return files | dict(train=[source])
    folder = source if os.path.exists(source) else fetch(source)
    card = read_card(source, folder)
    splits = card or dict(train=[os.path.join(subset, '**/*')])
    found = {file: split for split, patterns in splits.items() for pattern in patterns
             for file in glob.glob(pattern, root_dir=folder, recursive=True)}   # nothing hidden
    for file, split in sorted(found.items()):
        path = os.path.join(folder, file)
        if not os.access(path, os.R_OK):
            raise UserError(f"cannot read {path}: no permission, or a link to nothing")
        if kind_of(file) and not NO_CORPUS.fullmatch(file):
            files[split_of(f"{split}/{file}")].append(path)
    if not any(files.values()):
        raise UserError(f"{source} has no file of {', '.join(KINDS)} under subset={subset!r}; "
                        f"it has {glob.glob('*', root_dir=folder)[:9]}")
    places = {os.path.join('' if card or subset else os.path.dirname(path), '*.' + kind_of(path))
              for path in files['train']}
    if len(places) > 1:
        raise UserError(f"{source} has {' and '.join(sorted(places))}; choose a folder by "
                        "--subset, --subset=. for all of one kind, or name one file itself")
    return files


def fetch(source):
    """The files of a hub id, from the cache if they are there -> folder."""
    from huggingface_hub import snapshot_download
    get = partial(snapshot_download, source, repo_type='dataset', revision=revision or None)
    with from_hub("no dataset", source):
        card = read_card(source, get(allow_patterns='README.md'))
        for kinds in (TABLES, TEXTS):       # tables first: often a text lies beside them
            endings = [f"{subset.strip('.')}*.{kind}*" for kind in kinds]
            folder = get(allow_patterns=sum(card.values(), []) or endings)
            if any(map(kind_of, glob.glob('**', root_dir=folder, recursive=True))):
                break
    return folder


def read_card(source, folder):
    """
    The files of the configuration that subset names, or of the only one, by the card of a dataset
    -> {split: patterns}, empty if it says nothing. UserError if there are several to choose from.
    """
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load
    card = os.path.join(folder, 'README.md')
    with from_hub("cannot read", card):
        data = metadata_load(card) if os.path.exists(card) else None
        configs = MetadataConfigs.from_dataset_card_data(data or {})
        if len(configs) > 1 and subset not in configs:
            raise UserError(f"{source} has several configurations; choose one by --subset: "
                            f"{', '.join(configs)}")
        chosen = configs.get(subset or ''.join(configs))
        if chosen is None:
            return {}
        inside = os.path.join(chosen.get('data_dir', ''), '**')
        return sanitize_patterns(chosen.get('data_files', inside))


def kind_of(path):
    """Its ending without that of a compression, x.JSONL.gz -> jsonl; '' if it is none of KINDS."""
    ending = re.sub(r'\.(gz|bz2|xz)$', '', path.lower()).rpartition('.')[2]
    return ending if ending in KINDS else ''


def split_of(path):
    """'train', 'val' or 'test', by the words in a path; 'test' goes before all, it never trains."""
    words = {word.lower() for word in re.findall('[A-Z]?[a-z]+|[A-Z]+', path)}
    return 'test' if words & TEST_WORDS else 'val' if words & VAL_WORDS else 'train'

# --------------------------------------------------------------------------------------------------
# files to what stands in their rows, streamed

# columns that mean something, and names that may or may not be meant
READINGS = [reading.split() for reading in (
    'condition_input_ids input_ids', 'input_ids', 'text', 'input output', 'source target',
    'input target', 'source output', 'document summary')]
UNCLEAR = set('instruction prompt completion question answer response chosen'.split())
END_OF_TEXT = '<|endoftext|>'
say_once = cache(tqdm.write)        # a file is read up to three times


def first_row(paths):
    """The first row of some files -> where it stands, {column: value}."""
    return next(chain.from_iterable(map(read_rows, paths)), ('', dict(text='')))


def choose_columns(paths):
    """
    What to read of tables, by the names of their columns -> one name, or two of a pair. UserError
    if it can be read in several ways.
    """
    if columns:
        return columns.split(',', 1)
    where, row = first_row(paths)
    readings = [names for names in READINGS if row.keys() >= set(names)]
    if 'condition_input_ids' in row:        # the texts beside ids are the same
        readings = readings[:1]
    if len(readings) != 1 or row.keys() & UNCLEAR:
        raise UserError(f"{where} has the columns {', '.join(row)}; say which to read, such as "
                        "--columns=text, or condition and target: --columns=prompt,completion")
    return readings[0]


def read_rows(file, names=()):
    """
    The rows of a file -> (where they stand, for messages; {column: value}); lists are arrays.
    names: all columns that are needed.
    """
    kind = kind_of(file)
    if kind == 'jsonl':
        return read_jsonl(file)
    if file == 'numbers':
        rows = numbers()
    elif kind == 'txt':     # its last line ends, too
        rows = (dict(text=line.removesuffix('\n') + '\n') for line in read_lines(file))
    elif kind in ('csv', 'tsv'):
        rows = read_csv(file, ',' if kind == 'csv' else '\t')
    else:
        rows = read_table(file, kind, names)
    return ((f"{file}, row {n}", row) for n, row in enumerate(rows))


def read_csv(file, delimiter):
    """The rows of a .csv or .tsv; not by pandas, to which "NA" is nothing."""
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(read_lines(file), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in rows:
            if None in row:
                raise csv.Error("more fields than names in the first line")
            yield row
            line = rows.line_num
    except csv.Error as e:
        raise UserError(f"{file} is not readable after line {line} ({e}); a text with separators "
                        "or quotes in it must stand in quotes, each of its own doubled") from None


def read_table(file, kind, names):
    """The rows of a file that `datasets` opens; of these columns, if it has them, else of all."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)   # errors are one line of ours
    with from_hub("cannot read", file):
        rows = datasets.load_dataset(kind, data_files=glob.escape(file), split='train',
                                     streaming=True)    # the pages of a mapped file are memory
        for table in rows.with_format('arrow').iter(1000):
            if names and set(names) <= set(table.column_names):     # long texts are slow
                table = table.select(names)
            for row in table.to_pandas().to_dict('records'):
                yield row.get('translation') or row


def read_values(file, names):
    """
    What the columns of a file hold, row for row: texts or arrays of ids. A pair with a blank side
    is left out, aloud.
    """
    ids = 'ids' in names[-1]
    for where, row in read_rows(file, names):
        values = tuple(map(row.get, names))
        if not all(is_ids(value) if ids else isinstance(value, str) for value in values):
            raise UserError(f"{where} lacks {'ids' if ids else 'text'} under {' or '.join(names)}: "
                            f"{str(row)[:100]}")
        if ids or len(names) == 1 or all(map(str.strip, values)):
            yield values
        else:
            say_once(f"{file}: pairs with a blank side are left out")


def is_ids(value):
    return isinstance(value, np.ndarray) and value.dtype.kind in 'iu' and len(value)


def read_items(file, names, size):
    """What is held out as one: pairs, ids, texts, lines, or blocks of some size of a text file."""
    values = read_values(file, names)
    if len(names) == 2 or 'ids' in names[0]:
        return values
    texts = chain.from_iterable(values)
    if pack == 'lines':
        return (line for text in texts for line in text.split('\n') if line.strip())
    if kind_of(file) != 'txt':
        return (text + '\n' for text in texts)
    return marked_texts(texts) if pack == 'texts' else blocks(texts, size)


def marked_texts(lines):
    """The texts of a .txt with <|endoftext|> between them."""
    text = ''
    for line in lines:
        end, *starts = line.split(END_OF_TEXT)
        text += end
        for start in starts:
            yield text
            text = start
    yield text


def blocks(lines, size):
    """
    Lines, their ends included -> blocks of whole lines of about size characters. An endless line is
    cut between words, an endless word anywhere.
    """
    between_words = rf'(?s).{{1,{size}}}(?:\s+|$)|\S{{1,{size}}}\s*'
    block = ''
    for line in lines:
        for part in [line] if len(line) <= 2 * size else re.findall(between_words, line):
            block += part
            if len(block) >= size:
                yield block
                block = ''
    if block:
        yield block


def read_split(files, names, split):
    """The items of 'train' or 'val'; without files of its own, val is each k-th of train."""
    k = max(2, round(1 / val_fraction))
    # a small corpus, too, has some blocks to set aside
    size = sum(os.path.getsize(file) for file in files['train'] if kind_of(file)) // 40
    size = min(2000, max(100, size))
    items = chain.from_iterable(read_items(file, names, size)
                                for file in files[split] or files['train'])
    for i, item in enumerate(items):
        if files['val'] or (i % k == k - 1) == (split == 'val'):
            yield plain(item) if isinstance(item, str) else item


def plain(text):
    """A text without markers between texts, and, if asked for, with letters only."""
    if END_OF_TEXT in text:
        say_once(f"{END_OF_TEXT} counts as a line's end; --pack=texts makes rows of the texts")
        text = text.replace(END_OF_TEXT, '\n')
    if letters_only:
        text = text.lower()
        if len(re.findall(r'[^\W\d_a-z]', text)) > len(text) / 100:
            say_once("WARNING: letters other than a-z are left out, their words broken; "
                     "--letters_only=false keeps them")
        text = re.sub('[^a-z]+', ' ', text)
    return text

# --------------------------------------------------------------------------------------------------
# items to rows of ids

def find_tokenizer(folder, files, names):
    """The tokenizer that is named, else one trained on the texts and saved in folder."""
    path = tokenizer or encoder
    if not path:
        if 'ids' in names[-1]:
            raise UserError("the dataset holds ids; name the tokenizer they are from, "
                            "for example --tokenizer=t5-small")
        path = folder / 'tokenizer'
        texts = read_split(files, names, 'train')
        texts = texts if len(names) == 1 else chain.from_iterable(texts)
        train_tokenizer(texts, token_level, vocab_size, letters_only).save_pretrained(path)
    tok = load_tokenizer(path)
    if not tok.is_fast or None in (tok.pad_token_id, tok.eos_token_id):
        raise UserError(f"tokenizer {path!r} has no pad token, no EOS or SEP, or no fast version; "
                        "take another, or save it with a pad_token of its vocabulary")
    return tok


def check_pair(text_encoder, tok):
    """UserError for an encoder and a tokenizer that are not made for each other."""
    known = text_encoder.model.get_input_embeddings().num_embeddings
    own = tok
    with suppress(UserError):       # some encoders lie without one
        own = load_tokenizer(encoder)
    if known < len(tok) or own.get_vocab() != tok.get_vocab():
        raise UserError(f"encoder {encoder} knows {known} ids, the tokenizer has {len(tok)}, or "
                        "others than its own; leave out --tokenizer")


def split_words(texts, tok):
    """Texts -> (ids, is white space) of one word after the other."""
    for text, ids, spans in encode(texts, tok):
        # a word starts where there is white space before or at a token
        around = ' ' + text
        starts = [i for i, (start, _) in enumerate(spans)
                  if i == 0 or around[start].isspace() or around[start + 1].isspace()]
        for i, j in pairwise([*starts, len(ids)]):
            yield ids[i:j], text[spans[i][0]:spans[j - 1][1]].isspace()


def split_paragraphs(texts, tok):
    """Texts end to end -> (ids, is white space: no) of one paragraph, with its newline, a time."""
    for batch in batched(texts, 256):
        for _, ids, _ in encode(re.findall(r'.*\n|.+', ''.join(batch)), tok):
            yield ids, False


def pack_rows(pieces, max_length, eos):
    """
    Pieces end to end in rows of at most max_length ids, each closed by EOS when the next piece does
    not fit; a longer one is cut into full rows. Rows neither start nor end with a piece of white
    space. [the rule of the published OpenWebText set]
    """
    row, between = [], []       # between: white space that only counts if another word fits
    for ids, space in pieces:
        if space:
            between += ids
            continue
        if row and len(row) + len(between) + len(ids) >= max_length:
            yield row + [eos]
            row = []
        row = row + between + ids if row else ids
        between = []
        while len(row) >= max_length:
            yield row[:max_length - 1] + [eos]
            row = row[max_length - 1:]
    if row:
        yield row + [eos]


def cut_rows(texts, tok, max_length):
    """One text a row, closed by EOS; what does not fit into max_length ids is cut off, aloud."""
    cut = 0
    for _, ids, _ in encode(map(str.strip, texts), tok):
        if ids:
            yield ids[:max_length - 1] + [tok.eos_token_id]
            cut += len(ids) >= max_length
    if cut:
        tqdm.write(f"{cut:,} texts are cut off at max_length={max_length} tokens")


def make_rows(items, names, tok, pack, max_length):
    """Items of a split -> (condition ids, target ids) of each row, streamed."""
    eos = tok.eos_token_id
    if 'ids' in names[-1]:
        return (((), *item)[-2:] for item in items)
    if len(names) == 2:
        sides = (ids + [eos] for _, ids, _ in encode(chain.from_iterable(items), tok))
        return zip(sides, sides)        # a condition, then its target
    if pack in ('texts', 'lines'):
        rows = cut_rows(items, tok, max_length)
    else:
        split = split_words if pack == 'words' else split_paragraphs
        rows = pack_rows(split(items, tok), max_length, eos)
    return (((), row) for row in rows)


def write_references(folder, files, names, tok):
    """val.jsonl: the texts of the validation pairs, for samples, BLEU and ROUGE."""
    texts = ('input', 'target') if 'ids' in names[-1] else names
    _, row = first_row(files['val'] or files['train'])
    if row.keys() >= set(texts):
        pairs = read_split(files, texts, 'val')
    else:
        print("val.jsonl: the set has no texts, so what its tokenizer makes of the ids")
        pairs = (tok.batch_decode(pair, skip_special_tokens=True)
                 for pair in read_split(files, names, 'val'))
    add_lines(f'{folder}/val.jsonl', (dict(input=a, target=b) for a, b in pairs))

# --------------------------------------------------------------------------------------------------
# encoder

def measure_latents(text_encoder, meta):
    """Mean and standard deviation of the encoder's outputs on 512 rows, spread over train.bin."""
    T = min(1024, meta['max_length'])       # an endless row would not fit into memory
    c = ELFConfig(max_length=T, max_input_length=T)
    rows = np.unique(np.linspace(0, meta['rows']['train'] - 1, 512).astype(int))
    sums = np.zeros(3)      # of 1, of the values, of their squares
    for batch in batched(rows, 2048 // T):
        ids, valid, _ = get_rows(meta, 'train', batch, c)
        x = text_encoder(ids, valid)[valid].double()        # (valid tokens, C)
        sums += x.numel(), x.sum(), x.square().sum()
    _, mean, square = (sums / sums[0]).tolist()
    return mean, (square - mean**2) ** 0.5

# --------------------------------------------------------------------------------------------------
# before and after

def make_set(folder, files, names, settings):
    """All of a set but meta.json -> meta, its tokenizer."""
    text_encoder = TextEncoder(encoder) if encoder else None
    tok = find_tokenizer(folder, files, names)
    if encoder:
        check_pair(text_encoder, tok)
    meta = dict(dir=folder, format=1, dtype='uint16' if len(tok) <= 65536 else 'uint32',
                tokenizer=tokenizer or encoder or 'tokenizer', encoder=encoder or 'encoder',
                vocab_size=len(tok), pad_id=tok.pad_token_id, eos_id=tok.eos_token_id,
                conditional=len(names) == 2, max_length=0, rows={}, tokens={}, columns=names,
                source=settings, first_file=files['train'][0])      # of the hub: with its commit
    for split in ('train', 'val'):
        rows = make_rows(read_split(files, names, split), names, tok, pack, max_length)
        rows = tqdm(rows, desc=split, unit=' rows', disable=None)
        meta['rows'][split], meta['tokens'][split], longest = write_split(meta, split, rows)
        meta['max_length'] = max(meta['max_length'], longest)
        if not meta['rows'][split]:
            raise UserError(f"{dataset} is too little: no rows for {split}; give more, a larger "
                            "val_fraction, or --letters_only=false, which keeps more than a-z "
                            "(--pack=texts needs <|endoftext|> in a .txt)")
    if len(names) == 2:
        write_references(folder, files, names, tok)
    if not encoder:
        save_encoder(f'{folder}/encoder', meta, encoder_dim, encoder_layers, seed)
        text_encoder = TextEncoder(f'{folder}/encoder')
    std = latent_std or 0.2 * (encoder in ('t5-small', 'google-t5/t5-small'))       # published
    mean, std = (0.0, std) if std else measure_latents(text_encoder, meta)
    meta.update(latent_dim=text_encoder.latent_dim, latent_mean=mean, latent_std=std)
    del meta['dir']
    return meta, tok


def show(meta, tok, config):
    """Print what the user should have now, what was lost, what to run: config, '' = a small one."""
    longest = 0         # condition
    for split in ('val', 'train'):
        ids, index = open_split(meta, split)
        print(f"{ids.filename}: {len(index):,} rows, {len(ids):,} tokens; it begins: "
              f"{tok.decode(ids[:40])!r}")
        longest = max(longest, np.diff(index).max())
        unknown = np.mean(ids[:10_000_000] == tok.unk_token_id)
        if unknown > 0.01:
            print(f"  WARNING: {unknown:.1%} of the tokens are unknown, their text lost; "
                  "without --tokenizer one is trained on this text")
    options = [f'--dataset={name}']
    if not config:
        config = 'numbers' if meta['conditional'] else 'pydocs'
        options += [f'--out_dir=out/{name}', f"--max_length={meta['max_length']}",
                    f'--max_input_length={longest}']
    print(f"next: python train.py config/{config}.py {shlex.join(options)}")


if __name__ == '__main__':
    given = set()
    settings = configure(globals(), given=given)
    source, config, known = KNOWN.get(dataset, (dataset, '', {}))
    settings.update({key: known[key] for key in known.keys() - given})
    globals().update(settings)
    name = name or Path(dataset).stem
    final = Path(data_dir, name)
    finish_swap(final)
    if final.is_symlink() or final.exists() and not (final / 'meta.json').exists():
        raise UserError(f"{final} is there already, and is a link or holds no bins (no meta.json); "
                        "choose another --name or --data_dir")
    files, names = load_source(source)
    letters_only &= len(names) == 1

    # in a folder of another name until all is there; not by its pid: many containers have the same
    folder = final.with_name(f'.{final.name}.tmp-{time.time_ns()}')
    try:
        folder.mkdir(parents=True)
        meta, tok = make_set(folder, files, names, settings)
        meta['checksums'] = {file: sha256(folder / file) for file in FILES}
        (folder / 'meta.json').write_text(json.dumps(meta, indent=1))
        swap_in(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(open_bins(data_dir, name), tok, config)
