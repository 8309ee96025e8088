"""
Text to tokenised, memory-mapped bins: data/<name>/{train,val}.bin, {train,val}.idx.npy, meta.json.

    python prepare.py                                       # the embedded demo corpus, seconds, no download
    python prepare.py --dataset=my.txt --letters_only=false --max_length=64
    python prepare.py --dataset=my.txt --letters_only=false --max_length=256 --tokenizer=t5-small --encoder=t5-small
    python prepare.py --dataset=pairs.jsonl --tokenizer=t5-small --encoder=t5-small     # {"input": "...", "output": "..."} a line
    python prepare.py --dataset=openwebtext                 # the published ids, from the hub; also wmt14_de-en, xsum
    python prepare.py --dataset=openwebtext-raw             # the texts themselves, tokenised here; also wmt14_de-en-raw, xsum-raw

Everything streams: memory does not grow with the data. A set appears under its name whole or not at all.
"""
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
from itertools import islice

import numpy as np
import torch

from configurator import UserError, configure
from model import TextEncoder, hub_error
from sample import load_tokenizer, read_jsonl, read_lines

# ---------------------------------------------------------------------------------------------------------------------
dataset = 'pydocs'          # 'pydocs', the language reference inside every Python; a .txt or .jsonl file or a folder of them; a folder
                            # or hub id with .parquet files or as save_to_disk leaves it; or a name from KNOWN below
val_dataset = ''            # validation from another such source, '' = its own validation split, else val_fraction of it
subset = ''                 # folder inside a hub id, such as 'de-en' of wmt/wmt14
revision = ''               # of a hub id: branch, tag or commit
name = ''                   # folder under data_dir, '' = the dataset's name
data_dir = 'data'
letters_only = True         # own text: keep lower-case a-z and single spaces, 27 symbols, the easiest text to learn; false = all of it
max_length = 32             # of text: tokens per row, its EOS included
pack = 'words'              # of text: what a row is filled with and does not cut, 'words' or 'paragraphs' (OpenWebText's rule)
val_fraction = 0.05         # share set aside, spread evenly: rows, documents, or blocks of about 2,000 characters
tokenizer = ''              # hub id or folder, '' = train one on the text and save it beside the bins
token_level = 'chars'       # of a trained tokenizer: 'chars' or 'subwords'
vocab_size = 1000           # of trained subwords
encoder = ''                # hub id or folder of a T5-family encoder, '' = a small one with seeded random weights, saved beside the bins
encoder_dim = 32            # its width C: the width of the latents
encoder_layers = 2
latent_mean = 0.0           # of the encoder's outputs, taken off the latents;
latent_std = 0.0            # 0.0 = measure both (t5-small: the published 0.0 and 0.2)
seed = 0                    # of the random encoder
# ---------------------------------------------------------------------------------------------------------------------

# sets by name: what stands here holds where the command line says nothing else
KNOWN = {
    'openwebtext': dict(dataset='embedded-language-flows/openwebtext-t5', val_fraction=0.0005),      # 9,737,184 rows of 850-1020 tokens
    'wmt14_de-en': dict(dataset='embedded-language-flows/wmt14_de-en_train_t5', val_dataset='embedded-language-flows/wmt14_de-en_validation_t5'),
    'xsum': dict(dataset='embedded-language-flows/xsum_train_t5', val_dataset='embedded-language-flows/xsum_validation_t5'),
    # the texts they were made from, at the revisions with parquet files
    'openwebtext-raw': dict(dataset='Skylion007/openwebtext', revision='963532436460638ab26b7633e23776e6c7e37d59', pack='paragraphs',
                            max_length=1024, val_fraction=0.0005),
    'wmt14_de-en-raw': dict(dataset='wmt/wmt14', subset='de-en', revision='636160b43f4e525818592807e71b666c97327445'),
    'xsum-raw': dict(dataset='EdinburghNLP/xsum', revision='refs/convert/parquet'),
}
PAIRS = (('input', 'output'), ('source', 'target'), ('input', 'target'), ('source', 'output'), ('document', 'summary'))     # columns


# ---- sources: generators of texts, (input, target) texts, or (condition, target) ids ----------------------------------
def pydocs_text():
    """The prose of pydoc_data.topics: no code, grammar, tables or headings; one paragraph a line, blank lines between."""
    from pydoc_data.topics import topics
    paragraphs = []
    for topic in sorted(topics):
        for paragraph in topics[topic].split('\n\n'):
            flat = re.sub(r'[*"`]+', '', ' '.join(paragraph.split()))
            prose = sum(ch.isalpha() or ch in ' ,.' for ch in flat) > 0.92 * len(flat)
            if prose and len(flat) > 60 and flat[-1] in '.:;' and '::=' not in flat:
                paragraphs.append(flat)
    return '\n\n'.join(dict.fromkeys(paragraphs))       # some sections stand in two topics


def blocks(lines, size):
    """Lines, their ends included -> blocks of whole lines of about size characters; an endless line is cut between words, an endless word anywhere."""
    block, count = [], 0
    for line in lines:
        for part in [line] if len(line) <= 2 * size else re.findall(rf'(?s).{{1,{size}}}(?:\s+|$)|\S{{1,{size}}}\s*', line):
            block.append(part)
            count += len(part)
            if count >= size:
                yield ''.join(block)
                block, count = [], 0
    if block:
        yield ''.join(block)


def read_items(file):
    """The lines of a .jsonl as texts ('text') or pairs ('input' or 'source' and 'output' or 'target'). UserError names file and line."""
    first = None
    for where, row in read_jsonl(file):
        have = next(((a, b) for a, b in PAIRS if a in row and b in row), ('text',))
        item = tuple(row.get(k) for k in have)
        if item == (None,):
            raise UserError(f"{where} needs 'text', or 'input' and 'output' (or 'source' and 'target'); it has {', '.join(map(repr, row)) or 'nothing'}")
        if not all(isinstance(part, str) and part.strip() for part in item):
            raise UserError(f"{where}: {' and '.join(map(repr, have))} must be text, and not blank")
        first = first or len(item)
        if len(item) != first:
            raise UserError(f"{where} has {'a pair' if len(item) == 2 else 'plain text'}, the lines before have not; give one kind")
        yield item if first == 2 else item[0] + '\n'


def saved_rows(saved):
    """(condition ids, target ids) of each row, as arrays; a thousand rows in memory at a time. UserError names the row."""
    names, first = [c for c in ('condition_input_ids', 'input_ids') if c in saved.features], 0
    for batch in saved.select_columns(names).with_format('arrow').iter(1000):
        columns = []
        for c in names:
            try:
                values = batch[c].combine_chunks()
                lengths, flat = values.value_lengths().to_numpy(zero_copy_only=False), values.flatten()
                if values.null_count or flat.null_count or not lengths.all():
                    raise UserError(f"{c} is empty in one of the rows {first} to {first + len(batch) - 1}; every row needs ids")
                columns.append(np.split(flat.to_numpy(), np.cumsum(lengths)[:-1]))
                if flat.to_numpy().dtype.kind not in 'iu':
                    raise AttributeError
            except AttributeError:
                raise UserError(f"column {c} holds {batch.schema.field(c).type}, not lists of whole numbers") from None
        yield from zip(*columns) if len(names) == 2 else (((), ids) for ids in columns[0])
        first += len(batch)


def open_source(source, subset, revision):
    """
    What --dataset names -> dict: kind 'texts', 'pairs' or 'ids'; train and val, functions that give a fresh generator, val None
    if the source has no such split; references, (input, target) texts of ids; revision, the commit of a hub id. UserError if unusable.
    """
    if source == 'pydocs':
        text = pydocs_text()
        return dict(kind='texts', train=lambda: blocks(text.splitlines(keepends=True), 2000), val=None)
    names = sorted(os.listdir(source)) if os.path.isdir(source) else []
    files = [os.path.join(source, f) for f in names if f.endswith(('.txt', '.jsonl'))] or [source] * source.endswith(('.txt', '.jsonl'))
    if files:
        def own():
            for file in files:
                yield from read_items(file) if file.endswith('.jsonl') else blocks(read_lines(file), min(2000, size))
        try:
            size = max(100, sum(map(os.path.getsize, files)) // 40)     # a small corpus, too, has some blocks to set aside
        except OSError as e:
            raise UserError(f"cannot read {e.filename}: {e.strerror}; --dataset is 'pydocs', a .txt or .jsonl file, a folder, or a hub id") from None
        kinds = {type(next(read_items(f), '')) if f.endswith('.jsonl') else str for f in files}
        if len(kinds) > 1:
            raise UserError(f"{source} has both texts and pairs, give one kind")
        return dict(kind='texts' if kinds == {str} else 'pairs', train=own, val=None)
    # a folder, here or from the hub
    folder, commit = source, None
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        try:
            inside = f'{subset}/' if subset else ''
            folder = snapshot_download(source, repo_type='dataset', revision=revision or None, ignore_patterns=['*test*'],
                                       allow_patterns=[inside + '*.parquet', inside + '*.arrow', inside + '*.json'])
        except Exception as e:      # the client has a dozen kinds
            raise UserError(f"no dataset: {hub_error(source, e)}; own data: a .txt or .jsonl file, a folder") from None
        commit = os.path.basename(folder)
        folder = os.path.join(folder, subset)
    # .parquet, or .arrow as save_to_disk leaves it (cache-*.arrow beside it is not data); streamed, not mapped: mapped pages would count as memory
    found = sorted(os.path.join(at, f) for at, _, names in os.walk(folder) for f in names if re.fullmatch(r'.*\.parquet|(data-.*|dataset)\.arrow', f))
    splits = [[f for f in found if ('validation' in os.path.relpath(f, folder)) == which] for which in (False, True)]
    from datasets import load_dataset
    try:
        saved, val = (load_dataset(fs[0].rsplit('.')[-1], data_files=fs, split='train', streaming=True) if fs else None for fs in splits)
        columns = list((saved.features or next(iter(saved), {})) if saved else ())
    except Exception as e:
        raise UserError(f"{source} is not readable: {type(e).__name__} {' '.join(str(e).split())[:200]}") from None
    if not columns:
        raise UserError(f"{source} has no data: expected .txt, .jsonl or .parquet files, or what save_to_disk writes")
    pair = next((p for p in PAIRS if set(p) <= set(columns)), None)
    plain = lambda data, read: data and (lambda: read(data))

    def text_rows(data):
        for n, row in enumerate(data):
            if not all(isinstance(part, str) for part in parts(row)):
                raise UserError(f"{source}, row {n} lacks a text: {str(parts(row))[:100]}")
            yield tuple(parts(row)) if kind == 'pairs' else row['text'] + '\n'

    kind, read = 'ids' if 'input_ids' in columns else 'pairs', saved_rows if 'input_ids' in columns else text_rows
    if 'translation' in columns and subset.count('-') == 1:
        parts = lambda row: [row['translation'].get(language) for language in subset.split('-')]
    elif pair:
        parts = lambda row: [row[column] for column in pair]
    elif 'text' in columns:
        kind, parts = 'texts', lambda row: [row['text']]
    elif kind != 'ids':
        raise UserError(f"{source} has the columns {', '.join(columns)}; needed: input_ids (save_to_disk), text, or a pair such as input and target")
    return dict(kind=kind, train=plain(saved, read), val=plain(val, read), revision=commit, conditional=kind == 'pairs' or 'condition_input_ids' in columns,
                references=plain(val or saved, lambda data: ((r['input'], r['target']) for r in data.select_columns(['input', 'target'])))
                if kind == 'ids' and pair == ('input', 'target') else None)

# ---- texts to rows of ids -----------------------------------------------------------------------------------------------
def batched(items, n):
    items = iter(items)
    while batch := list(islice(items, n)):
        yield batch


def train_tokenizer(texts, level, size):
    """A tokenizer of characters or subwords under T5's conventions (pad 0, eos 1, unk 2) that gives every text of its symbols back exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ['<pad>', '</s>', '<unk>']
    if level == 'chars':
        symbols = sorted({ch for text in texts for ch in text})
        tok = Tokenizer(models.WordLevel({s: i for i, s in enumerate(special + symbols)}, unk_token='<unk>'))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    elif level == 'subwords':
        tok = Tokenizer(models.BPE(unk_token='<unk>'))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    else:
        raise UserError(f"token_level={level!r} is not 'chars' or 'subwords'")
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>', unk_token='<unk>', clean_up_tokenization_spaces=False)


def code(texts, tok, **how):
    """A batch of texts -> lists of ids; the tokenizer takes all cores. A '</s>' or '<pad>' that a text spells out is left out: it would end its row."""
    coded = tok(texts, add_special_tokens=False, verbose=False, **how)
    if any(tok.eos_token_id in ids or tok.pad_token_id in ids for ids in coded['input_ids']):
        for k in coded:
            coded[k] = [[x for x, i in zip(row, ids) if i not in (tok.eos_token_id, tok.pad_token_id)] for row, ids in zip(coded[k], list(coded['input_ids']))]
    return coded


def pieces(texts, tok, kind):
    """Texts -> (ids, is white space) of one 'words' or 'paragraphs' after the other, newlines and spaces included."""
    for batch in batched(texts, 256):
        if kind == 'paragraphs':
            yield from ((ids, False) for ids in code(re.findall(r'[^\n]*\n|[^\n]+', ''.join(batch)), tok)['input_ids'] if ids)
            continue
        coded = code(batch, tok, return_offsets_mapping=True)
        for text, ids, spans in zip(batch, coded['input_ids'], coded['offset_mapping']):
            starts = [k for k, (a, _) in enumerate(spans) if a == 0 or text[a - 1].isspace() or text[a].isspace()]
            for i, j in zip(starts, starts[1:] + [len(ids)]):
                yield ids[i:j], text[spans[i][0]:spans[j - 1][1]].isspace()


def pack_rows(pieces, max_length, eos):
    """
    Pieces end to end in rows of at most max_length ids, each closed by EOS when the next piece does not fit; a longer one is
    cut into full rows. Rows neither start nor end with a piece of white space. [the rule of the published OpenWebText set]
    """
    row, end = [], 0
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


def write_split(folder, split, rows, dtype, vocab_size):
    """Stream (condition ids, target ids) to folder/<split>.bin and .idx.npy -> rows, tokens, longest row. UserError for ids outside the vocabulary."""
    n = at = longest = 0
    with open(os.path.join(folder, f'{split}.bin'), 'wb') as f, open(os.path.join(folder, f'{split}.idx.npy'), 'wb') as g:
        header = lambda: np.lib.format.write_array_header_1_0(g, dict(descr='<i8', fortran_order=False, shape=(n, 2)))
        header()
        for batch in batched(rows, 1000):
            ids = np.concatenate([part for row in batch for part in row]).astype(np.int64)
            cond, target = (np.array([len(row[k]) for row in batch]) for k in (0, 1))
            ends = np.cumsum(cond + target)
            bad = np.nonzero((ids < 0) | (ids >= vocab_size))[0]
            if len(bad):
                raise UserError(f"row {n + np.searchsorted(ends, bad[0], side='right')} of {split} has token id {ids[bad[0]]}, the vocabulary has {vocab_size}; is it this tokenizer's?")
            f.write(ids.astype(dtype).tobytes())
            starts = at + ends - cond - target
            g.write(np.stack((starts, starts + cond), axis=1).astype('<i8').tobytes())
            n, at, longest = n + len(batch), at + int(ends[-1]), max(longest, int((cond + target).max()))
        g.seek(0)
        header()        # with the count now known; numpy leaves room for its digits
    return n, at, longest

# ---- encoder --------------------------------------------------------------------------------------------------------------
def random_encoder(vocab_size, dim, layers, seed):
    """A small T5 encoder with seeded random weights; its latents mix each token with its neighbours, which is all the demo needs."""
    from transformers import T5Config, T5EncoderModel
    heads = 4 if dim % 4 == 0 else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(T5Config(vocab_size=vocab_size, d_model=dim, d_kv=dim // heads, d_ff=2 * dim, num_layers=layers, num_heads=heads))


def measure_latents(encoder_name, folder, dtype, vocab_size):
    """Mean and standard deviation of the raw encoder outputs over up to 512 rows spread over train.bin -> two floats, width C."""
    data = np.memmap(os.path.join(folder, 'train.bin'), dtype=dtype, mode='r')
    index = np.load(os.path.join(folder, 'train.idx.npy'), mmap_mode='r')
    text_encoder, count, total, square = TextEncoder(encoder_name), 0, 0.0, 0.0
    if text_encoder.model.config.vocab_size < vocab_size:
        raise UserError(f"encoder {encoder_name} knows {text_encoder.model.config.vocab_size} ids, the tokenizer has {vocab_size}; take the encoder's own tokenizer")
    for r in np.unique(np.linspace(0, len(index) - 1, 512).astype(int)):
        end = index[r + 1, 0] if r + 1 < len(index) else len(data)
        ids = torch.from_numpy(data[index[r, 0]:end].astype(np.int64))[None]
        x = text_encoder(ids, torch.ones_like(ids)).double()
        count, total, square = count + x.numel(), total + x.sum().item(), square + x.square().sum().item()
    mean = total / count
    return mean, (square / count - mean**2) ** 0.5, text_encoder.latent_dim


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


if __name__ == '__main__':
    from tqdm import tqdm
    from transformers.utils import logging
    logging.disable_progress_bar()
    defaults = dict(globals())
    configure(globals())
    name = name or os.path.splitext(os.path.basename(dataset.rstrip('/')))[0].removesuffix('-raw')
    known = dataset in KNOWN
    said = {arg.partition('=')[0] for arg in sys.argv}
    for key, value in (dict(tokenizer='t5-small', encoder='t5-small', letters_only=False) | KNOWN[dataset]).items() if known else ():
        if key == 'dataset' or '--' + key not in said and globals()[key] == defaults[key]:
            globals()[key] = value
    for key, low in (('max_length', 4), ('encoder_dim', 4), ('encoder_layers', 1), ('vocab_size', 260), ('seed', 0)):
        if globals()[key] < low:
            raise UserError(f"{key}={globals()[key]}: must be at least {low}")
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: must lie between 0 and 1")
    if latent_std < 0 or latent_mean and not latent_std:
        raise UserError(f"latent_mean={latent_mean}, latent_std={latent_std}: give both, the latter above 0, or neither to measure them")
    if pack not in ('words', 'paragraphs'):
        raise UserError(f"pack={pack!r} is not 'words' or 'paragraphs'")
    if name != os.path.basename(name) or name in ('', '.', '..'):
        raise UserError(f"name={name!r}: must be one folder's name, without slashes; --data_dir says where")
    final = os.path.join(data_dir, name)
    old = os.path.join(data_dir, f'.{name}.old')
    if os.path.isdir(old) and not os.path.exists(final):
        os.replace(old, final)      # a kill between the two renames at the end left only this
    if os.path.isdir(final) and os.listdir(final) and not os.path.exists(os.path.join(final, 'meta.json')):
        raise UserError(f"{final} is there already and holds no bins (no meta.json); choose another --name")

    # ---- source -----------------------------------------------------------------------------------------------------------
    source = open_source(dataset, subset, revision)
    kind, val, references, commits = source['kind'], source['val'], source.get('references'), [source.get('revision')]
    if val_dataset:
        other = open_source(val_dataset, subset, revision if val_dataset == dataset else '')
        val, references = other['train'], other.get('references')
        commits.append(other.get('revision'))
        if (kind, source.get('conditional')) != (other['kind'], other.get('conditional')):
            raise UserError(f"{dataset} has {kind}, {val_dataset} has {other['kind']}, or one has conditions and one has not; both must be alike")
    conditional = source.get('conditional', kind == 'pairs')
    if kind == 'ids' and not tokenizer:
        raise UserError(f"{dataset} holds ids; name the tokenizer they are from, for example --tokenizer=t5-small")
    k = max(2, round(1 / val_fraction))

    def items(split, read=source['train'], read_val=val):
        """The source's items of a split, from the start."""
        for i, item in enumerate(read_val() if read_val and split == 'val' else read()):
            if read_val or (i % k == k - 1) == (split == 'val'):
                yield re.sub(r'[^a-z]+', ' ', item.lower()) if kind == 'texts' and letters_only else item

    def rows(split, tok):
        """(condition ids, target ids) of a split, streamed."""
        if kind == 'ids':
            yield from items(split)
        elif kind == 'texts':
            yield from (((), row) for row in pack_rows(pieces(items(split), tok, pack), max_length, tok.eos_token_id))
        else:
            for batch in batched(items(split), 1000):
                coded = [ids + [tok.eos_token_id] for ids in code([text for pair in batch for text in pair], tok)['input_ids']]
                yield from zip(coded[::2], coded[1::2])

    # ---- tokenizer, encoder, bins: in a folder of another name until all is there ---------------------------------------
    for left in glob.glob(os.path.join(data_dir, f'.{name}.tmp-*')):        # by a run that was killed
        if os.path.getmtime(left) < time.time() - 86400:
            shutil.rmtree(left, ignore_errors=True)
    folder = os.path.join(data_dir, f'.{name}.tmp-{os.getpid()}')
    try:
        os.makedirs(folder)
        if tokenizer:
            tok = load_tokenizer(tokenizer)
            if not tok.is_fast or tok.pad_token_id is None or tok.eos_token_id is None:
                raise UserError(f"tokenizer {tokenizer!r} has no pad or EOS token, or no fast version; take a T5 one")
        else:
            tok = train_tokenizer((text for item in items('train') for text in ([item] if kind == 'texts' else item)), token_level, vocab_size)
            tok.save_pretrained(os.path.join(folder, 'tokenizer'))
        dtype = 'uint16' if len(tok) <= 65536 else 'uint32'
        counts = {}
        for split in ('train', 'val'):
            counts[split] = write_split(folder, split, tqdm(rows(split, tok), desc=split, unit=' rows', disable=None), dtype, len(tok))
            if not counts[split][0]:
                raise UserError(f"{dataset} is too little for a train and a validation split: {split} has no row; give at least some 5,000 characters or {k} rows"
                                + "; --letters_only=false keeps more than a-z" * (kind == 'texts' and letters_only))
        texts_of_val = items('val') if kind == 'pairs' else items('val', references, references if val else None) if conditional and references else ()
        if conditional:     # for eval.py's BLEU and ROUGE
            with open(os.path.join(folder, 'val.jsonl'), 'w', encoding='utf-8') as f:
                f.writelines(json.dumps(dict(input=a, target=b), ensure_ascii=False) + '\n' for a, b in texts_of_val)
        encoder_path = encoder or os.path.join(folder, 'encoder')
        if not encoder:
            random_encoder(len(tok), encoder_dim, encoder_layers, seed).save_pretrained(encoder_path)
        mean, std, latent_dim = measure_latents(encoder_path, folder, dtype, len(tok))
        measured = f"measured mean {mean:.4f}, std {std:.4f}"
        if latent_std:
            mean, std = latent_mean, latent_std
        elif encoder in ('t5-small', 'google-t5/t5-small'):
            mean, std = 0.0, 0.2
        files = ('train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy')
        meta = dict(format=1, dtype=dtype, tokenizer=tokenizer or 'tokenizer', vocab_size=len(tok), pad_id=tok.pad_token_id, eos_id=tok.eos_token_id,
                    encoder=encoder or 'encoder', latent_mean=mean, latent_std=std, latent_dim=latent_dim, conditional=conditional,
                    max_length=max(n for _, _, n in counts.values()), rows={s: n for s, (n, _, _) in counts.items()}, tokens={s: n for s, (_, n, _) in counts.items()},
                    checksums={f: sha256(os.path.join(folder, f)) for f in files},
                    source=dict(dataset=dataset, val_dataset=val_dataset, subset=subset, revision=commits, kind=kind, pack=pack, letters_only=kind == 'texts' and letters_only))
        with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        if os.path.isdir(final):
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(folder, final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise UserError(f"could not write {final}: {e.strerror or e}; what was there before is intact") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    # ---- what you should have now -----------------------------------------------------------------------------------------
    print(f"{dataset}: {kind}" + ''.join(f", revision {c}" for c in commits if c))
    for split, (n, tokens, longest) in counts.items():
        print(f"{os.path.join(final, split)}.bin: {n:,} rows of at most {longest} tokens, {tokens:,} tokens, {tokens * np.dtype(dtype).itemsize:,} bytes")
        index = np.load(os.path.join(final, f'{split}.idx.npy'), mmap_mode='r')
        end = index[1, 0] if n > 1 else tokens
        ids = np.fromfile(os.path.join(final, f'{split}.bin'), dtype=dtype, count=end).tolist()
        print("  first row: " + ' -> '.join(repr(tok.decode(part, skip_special_tokens=True)[:100]) for part in (ids[:index[0, 1]], ids[index[0, 1]:]) if part))
    print(f"tokenizer: {tokenizer or token_level}, {len(tok)} ids; encoder: {encoder or 'random weights'}, {latent_dim} wide, {measured}; used {mean:.4f}, {std:.4f}")
    config = {'openwebtext': 'config/owt_elf_b.py', 'wmt14_de-en': 'config/wmt14_de_en_elf_b.py', 'xsum': 'config/xsum_elf_b.py'}.get(name)
    print(f"next: torchrun --nproc_per_node=8 train.py {config}" if known and config else f"next: a config like config/wmt14_de_en_elf_b.py with dataset = {name!r}" if conditional else
          "next: python train.py config/demo.py" + f" --dataset={name} --max_length={meta['max_length']} --out_dir=out/{name}" * (dataset != 'pydocs'))
