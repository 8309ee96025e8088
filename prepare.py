"""
Text to tokenised, memory-mapped bins: data/<name>/{train,val}.bin, {train,val}.idx.npy, meta.json.

    python prepare.py                                       # the embedded demo corpus, seconds, no download
    python prepare.py --dataset=my.txt --letters_only=false --max_length=64
    python prepare.py --dataset=my.txt --letters_only=false --max_length=256 --tokenizer=t5-small --encoder=t5-small
    python prepare.py --dataset=pairs.jsonl --tokenizer=t5-small --encoder=t5-small     # {"input": "...", "output": "..."} a line
    python prepare.py --dataset=openwebtext                 # the published ids, from the hub; also wmt14_de-en, xsum
"""
import hashlib
import json
import os
import re
import shutil
from array import array

import numpy as np
import torch

from configurator import UserError, configure
from model import TextEncoder

# ---------------------------------------------------------------------------------------------------------------------
dataset = 'pydocs'          # 'pydocs', the language reference inside every Python; a .txt or .jsonl file or a folder of them; a save_to_disk
                            # folder or hub id with input_ids; or 'openwebtext', 'wmt14_de-en', 'xsum', as published
val_dataset = ''            # ids for validation from another save_to_disk folder or hub id, '' = val_fraction of the rows
name = ''                   # folder under data_dir, '' = the dataset's name
data_dir = 'data'
letters_only = True         # keep lower-case a-z and single spaces, 27 symbols, the easiest text to learn; false = all of it
max_length = 32             # tokens per row, its EOS included; rows end between words
val_fraction = 0.05         # share of the text set aside, in blocks of about 2,000 characters
tokenizer = ''              # hub id or folder, '' = train one on the text and save it beside the bins
token_level = 'chars'       # of a trained tokenizer: 'chars' or 'subwords'
vocab_size = 1000           # of trained subwords
encoder = ''                # hub id or folder of a T5-family encoder, '' = a small one with seeded random weights, saved beside the bins
encoder_dim = 32            # its width C: the width of the latents
encoder_layers = 2
latent_mean = 0.0           # of the encoder's outputs, taken off the latents;
latent_std = 0.0            # 0.0 = measure both (t5-small: the published 0.0 and 0.2)
seed = 0
# ---------------------------------------------------------------------------------------------------------------------

# the official pre-tokenised sets on the hub, in ids of t5-small
PUBLISHED = {
    'openwebtext': dict(dataset='embedded-language-flows/openwebtext-t5', val_fraction=0.0005),      # 9,737,184 rows of 850-1020 tokens
    'wmt14_de-en': dict(dataset='embedded-language-flows/wmt14_de-en_train_t5', val_dataset='embedded-language-flows/wmt14_de-en_validation_t5'),
    'xsum': dict(dataset='embedded-language-flows/xsum_train_t5', val_dataset='embedded-language-flows/xsum_validation_t5'),
}


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


def read_text(path):
    """A UTF-8 file as one text. UserError naming the place if it is something else."""
    try:
        with open(path, 'rb') as f:
            data = f.read()
        return data.decode('utf-8-sig').replace('\r\n', '\n')
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; --dataset is 'pydocs' or the path of a .txt file") from None
    except UnicodeDecodeError as e:
        line = data.count(b'\n', 0, e.start) + 1
        raise UserError(f"{path}, line {line}: byte {data[e.start]:#04x} is not UTF-8; save the file as UTF-8") from None


def read_documents(path):
    """
    A .txt or .jsonl file, or a folder of them -> texts, pairs: lists of str and of (input, target). A line of .jsonl has 'text', or
    'input' (or 'source') and 'output' (or 'target'). UserError names file and line.
    """
    texts, pairs, files = [], [], [path]
    if os.path.isdir(path):
        files = sorted(os.path.join(path, f) for f in os.listdir(path) if f.endswith(('.txt', '.jsonl')))
    for file in files:
        if not file.endswith('.jsonl'):
            texts.append(read_text(file))
            continue
        for n, line in enumerate(read_text(file).split('\n'), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                pair = [next((row[k] for k in keys if k in row), None) for keys in (('input', 'source'), ('output', 'target'))]
                text = row.get('text')
            except (ValueError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{file}, line {n} is no JSON object ({e}): {line[:60]!r}") from None
            if all(isinstance(part, str) for part in pair):
                pairs.append(tuple(pair))
            elif isinstance(text, str):
                texts.append(text)
            else:
                raise UserError(f"{file}, line {n} needs 'text', or 'input' and 'output' (or 'source' and 'target'), as text: {line[:60]!r}")
    if bool(texts) == bool(pairs):
        raise UserError(f"{path} has {'both texts and pairs, give one kind' if texts else 'no .txt or .jsonl text in it'}")
    return texts, pairs


def open_saved(source):
    """A save_to_disk folder, here or on the hub -> datasets.Dataset, memory-mapped, with a column input_ids."""
    from datasets import Dataset, load_from_disk
    try:
        if not os.path.isdir(source):
            from huggingface_hub import snapshot_download
            source = snapshot_download(source, repo_type='dataset')
        saved = load_from_disk(source)
    except Exception as e:      # the clients have a dozen kinds
        raise UserError(f"dataset {source!r} is no .txt, .jsonl or save_to_disk folder here, and the hub did not give it: {type(e).__name__}: {str(e).strip().splitlines()[0]}") from None
    if not isinstance(saved, Dataset) or 'input_ids' not in saved.column_names:
        have = list(saved) if not isinstance(saved, Dataset) else saved.column_names
        raise UserError(f"{source} needs a column input_ids and no further splits; it has {', '.join(have)}")
    return saved


def saved_rows(saved, keep=lambda i: True):
    """(condition ids, target ids) of the rows number i with keep(i), as arrays; a thousand at a time, so memory stays flat."""
    def column(batch, name):
        if name not in saved.column_names:
            return [()] * len(batch)
        values = batch[name].combine_chunks()
        if values.null_count or values.flatten().null_count:
            raise UserError(f"column {name} has empty cells")
        return np.split(values.flatten().to_numpy(), np.cumsum(values.value_lengths().to_numpy())[:-1])
    first = 0
    for batch in saved.with_format('arrow').iter(1000):
        for i, pair in enumerate(zip(column(batch, 'condition_input_ids'), column(batch, 'input_ids')), first):
            if keep(i):
                yield pair
        first += len(batch)


def split_text(text, fraction, seed):
    """Blocks of whole paragraphs, about 2,000 characters, a seeded share of them for validation -> train text, val text."""
    blocks, size = [[]], 0
    starts = r'(?<=\n)(?=\S)' if '\n' in text.strip() else r'(?<=\s)(?=\S)'      # of lines; in one endless line, of words
    for paragraph in re.split(starts, text):
        blocks[-1].append(paragraph)
        size += len(paragraph)
        if size >= 2000:
            blocks.append([])
            size = 0
    blocks = [''.join(b) for b in blocks if b]
    val = set(np.random.default_rng(seed).permutation(len(blocks))[:max(1, round(fraction * len(blocks)))].tolist())
    return tuple(''.join(b for i, b in enumerate(blocks) if (i in val) == which) for which in (False, True))


def train_tokenizer(text, level, size):
    """A tokenizer of characters or subwords under T5's conventions (pad 0, eos 1, unk 2) that gives every text of its symbols back exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ['<pad>', '</s>', '<unk>']
    if level == 'chars':
        tok = Tokenizer(models.WordLevel({s: i for i, s in enumerate(special + sorted(set(text)))}, unk_token='<unk>'))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    elif level == 'subwords':
        tok = Tokenizer(models.BPE(unk_token='<unk>'))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tok.train_from_iterator(text.splitlines(keepends=True), trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    else:
        raise UserError(f"token_level={level!r} is not 'chars' or 'subwords'")
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>', unk_token='<unk>', clean_up_tokenization_spaces=False)


def pack_rows(text, tokenizer, max_length):
    """Running text in rows of at most max_length tokens, as full as words allow, each closed by EOS; yields (condition, ids), the condition empty."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # a '</s>' or '<pad>' that the text itself spells out is left out: it would end the row early
    kept = [k for k, i in enumerate(coded['input_ids']) if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    ids, spans = [coded['input_ids'][k] for k in kept], [coded['offset_mapping'][k] for k in kept]
    word = [a == 0 or text[a - 1].isspace() or text[a].isspace() for a, _ in spans]    # a row may end before this token
    space = [text[a:b].isspace() for a, b in spans]
    i = 0
    while i < len(ids):
        if space[i]:
            i += 1          # no row starts with white space
            continue
        end = min(i + max_length - 1, len(ids))
        if end < len(ids):
            end = next((j for j in range(end, i, -1) if word[j]), end)      # a word longer than a row is cut
        stop = next(j for j in range(end, i, -1) if not space[j - 1])       # nor ends with it
        yield [], ids[i:stop] + [tokenizer.eos_token_id]
        i = end


def random_encoder(vocab_size, dim, layers, seed):
    """A small T5 encoder with seeded random weights; its latents mix each token with its neighbours, which is all the demo needs."""
    from transformers import T5Config, T5EncoderModel
    heads = 4 if dim % 4 == 0 else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(T5Config(vocab_size=vocab_size, d_model=dim, d_kv=dim // heads, d_ff=2 * dim, num_layers=layers, num_heads=heads))


def write_split(folder, split, rows, dtype, vocab_size):
    """Stream (condition ids, target ids) to folder/<split>.bin and .idx.npy -> rows, tokens, longest row. UserError for ids outside the vocabulary."""
    index, at, longest = array('q'), 0, 0
    with open(os.path.join(folder, f'{split}.bin'), 'wb') as f:
        for cond, target in rows:
            ids = np.concatenate((cond, target)).astype(np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise UserError(f"row {len(index) // 2} of {split} has token id {ids.max() if ids.max() >= vocab_size else ids.min()}, the vocabulary has {vocab_size}; is it this tokenizer's?")
            f.write(ids.astype(dtype).tobytes())
            index.extend((at, at + len(cond)))
            at, longest = at + len(ids), max(longest, len(ids))
    np.save(os.path.join(folder, f'{split}.idx.npy'), np.frombuffer(index, dtype=np.int64).reshape(-1, 2))
    return len(index) // 2, at, longest


def measure_latents(encoder_name, folder, dtype, vocab_size):
    """Mean and standard deviation of the raw encoder outputs over up to 512 rows spread over train.bin -> two floats, width C."""
    data = np.memmap(os.path.join(folder, 'train.bin'), dtype=dtype, mode='r')
    index = np.load(os.path.join(folder, 'train.idx.npy'))[:, 0].tolist() + [len(data)]
    text_encoder, count, total, square = TextEncoder(encoder_name), 0, 0.0, 0.0
    if text_encoder.model.config.vocab_size < vocab_size:
        raise UserError(f"encoder {encoder_name} knows {text_encoder.model.config.vocab_size} ids, the tokenizer has {vocab_size}; take the encoder's own tokenizer")
    for r in np.unique(np.linspace(0, len(index) - 2, 512).astype(int)):
        ids = torch.from_numpy(data[index[r]:index[r + 1]].astype(np.int64))[None]
        x = text_encoder(ids, torch.ones_like(ids)).double()
        count, total, square = count + x.numel(), total + x.sum().item(), square + x.square().sum().item()
    mean = total / count
    return mean, (square / count - mean**2) ** 0.5, text_encoder.latent_dim


def write_references(folder, rows):
    """The texts of conditional validation rows, (input, target) or dicts with both -> folder/val.jsonl; nothing if the set has none."""
    if isinstance(rows, list) or {'input', 'target'} <= set(rows.column_names):
        with open(os.path.join(folder, 'val.jsonl'), 'w', encoding='utf-8') as f:
            for row in rows:
                a, b = row if isinstance(row, tuple) else (row['input'], row['target'])
                f.write(json.dumps(dict(input=a, target=b), ensure_ascii=False) + '\n')


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else hashlib.sha256(f.read()).hexdigest()


if __name__ == '__main__':
    from tqdm import tqdm
    from transformers import AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    configure(globals())
    for key, value, low in (('max_length', max_length, 4), ('encoder_dim', encoder_dim, 4), ('encoder_layers', encoder_layers, 1), ('vocab_size', vocab_size, 260), ('seed', seed, 0)):
        if value < low:
            raise UserError(f"{key}={value}: must be at least {low}")
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: must lie between 0 and 1")
    if latent_std < 0 or latent_mean and not latent_std:
        raise UserError(f"latent_mean={latent_mean}, latent_std={latent_std}: give both, the latter above 0, or neither to measure them")
    name = name or os.path.splitext(os.path.basename(dataset.rstrip('/')))[0]
    asked = dataset
    if dataset in PUBLISHED:
        globals().update(PUBLISHED[dataset])
        tokenizer, encoder = tokenizer or 't5-small', encoder or 't5-small'
    if name != os.path.basename(name) or name in ('', '.', '..'):
        raise UserError(f"name={name!r}: must be one folder's name, without slashes; --data_dir says where")
    final = os.path.join(data_dir, name)
    old = os.path.join(data_dir, f'.{name}.old')
    if os.path.isdir(old) and not os.path.exists(final):
        os.replace(old, final)      # a kill between the two renames at the end left only this
    if os.path.isdir(final) and os.listdir(final) and not os.path.exists(os.path.join(final, 'meta.json')):
        raise UserError(f"{final} is there already and holds no bins (no meta.json); choose another --name")

    # ---- source: running text, pairs, or ids -----------------------------------------------------------------------------
    texts = pairs = saved = None
    k = max(2, round(1 / val_fraction))
    is_val = lambda i: i % k == k - 1       # rows set aside, spread evenly
    if dataset == 'pydocs':
        texts = [pydocs_text()]
    elif dataset.endswith(('.txt', '.jsonl')) or os.path.isdir(dataset) and any(f.endswith(('.txt', '.jsonl')) for f in os.listdir(dataset)):
        texts, pairs = read_documents(dataset)
    else:
        saved = open_saved(dataset)
        val_saved = open_saved(val_dataset) if val_dataset else None
        if not tokenizer:
            raise UserError(f"{dataset} holds ids; name the tokenizer they are from, for example --tokenizer=t5-small")
        found = f"{len(saved):,} rows" + (f" and {len(val_saved):,}" if val_saved else '')
        if min(len(saved), len(val_saved) if val_saved else len(saved) // k) < 1:
            raise UserError(f"{dataset} has {found}, too few for a train and a validation split")
    if pairs:
        found = f"{len(pairs):,} pairs"
        if len(pairs) < k:
            raise UserError(f"{dataset} has {found}, too few to set 1 in {k} aside; raise --val_fraction or give more")
        train_text = '\n'.join(part for i, pair in enumerate(pairs) if not is_val(i) for part in pair)
    if texts:
        text = '\n\n'.join(texts)
        count = len(text)
        found = f"{count:,} characters"
        if letters_only:
            text = re.sub(r'[^a-z\n]+', ' ', text.lower())
        texts = dict(zip(('train', 'val'), split_text(text, val_fraction, seed)))
        if letters_only:        # the newlines were needed for the split
            texts = {split: re.sub(r'\s+', ' ', t).strip() for split, t in texts.items()}
            found += f", {sum(map(len, texts.values())):,} after keeping a-z and spaces"
        if min(len(t.split()) for t in texts.values()) < 2:
            left = f", {len(text.strip())} after keeping a-z (--letters_only=false keeps all)" if letters_only else ''
            raise UserError(f"{dataset} has {count} characters{left}, too little for a train and a validation text; give at least some 5,000")
        train_text = texts['train']

    def rows_of(split, tok):
        """(condition ids, target ids) of a split, streamed."""
        mine = lambda i: is_val(i) == (split == 'val')
        if saved:
            return saved_rows(val_saved if split == 'val' else saved) if val_saved else saved_rows(saved, mine)
        if texts:
            return pack_rows(texts[split], tok, max_length)
        code = lambda t: tok(t, add_special_tokens=False)['input_ids'] + [tok.eos_token_id]
        return ((code(a), code(b)) for i, (a, b) in enumerate(pairs) if mine(i))

    # ---- tokenizer, encoder, bins: in a folder of another name until all is there ---------------------------------------
    folder = os.path.join(data_dir, f'.{name}.tmp-{os.getpid()}')
    os.makedirs(folder)
    try:
        if tokenizer:
            try:
                tok = AutoTokenizer.from_pretrained(tokenizer)
            except (OSError, ValueError) as e:
                raise UserError(f"tokenizer {tokenizer!r} is no folder here and not on the hub: {str(e).splitlines()[0]}") from None
            if not tok.is_fast or tok.pad_token_id is None or tok.eos_token_id is None:
                raise UserError(f"tokenizer {tokenizer!r} has no pad or EOS token, or no fast version; take a T5 one")
        else:
            tok = train_tokenizer(train_text, token_level, vocab_size)
            tok.save_pretrained(os.path.join(folder, 'tokenizer'))
        dtype = 'uint16' if len(tok) <= 65536 else 'uint32'
        counts = {split: write_split(folder, split, tqdm(rows_of(split, tok), desc=split, unit=' rows', disable=None), dtype, len(tok)) for split in ('train', 'val')}
        conditional = bool(pairs) or saved is not None and 'condition_input_ids' in saved.column_names
        if conditional:     # validation texts, for eval.py's BLEU and ROUGE
            write_references(folder, [pair for i, pair in enumerate(pairs) if is_val(i)] if pairs else val_saved or saved.select(range(k - 1, len(saved), k)))
        if encoder:
            encoder_path = encoder
        else:
            encoder_path = os.path.join(folder, 'encoder')
            random_encoder(len(tok), encoder_dim, encoder_layers, seed).save_pretrained(encoder_path)
        mean, std, latent_dim = measure_latents(encoder_path, folder, dtype, len(tok))
        measured = f"measured mean {mean:.4f}, std {std:.4f}"
        if latent_std:
            mean, std = latent_mean, latent_std
        elif encoder in ('t5-small', 'google-t5/t5-small'):
            mean, std = 0.0, 0.2
        files = ('train.bin', 'val.bin', 'train.idx.npy', 'val.idx.npy')
        meta = dict(format=1, dtype=dtype, tokenizer=tokenizer or 'tokenizer', vocab_size=len(tok), pad_id=tok.pad_token_id, eos_id=tok.eos_token_id,
                    encoder=encoder or 'encoder', latent_mean=mean, latent_std=std, latent_dim=latent_dim, max_length=max(n for _, _, n in counts.values()),
                    rows={s: n for s, (n, _, _) in counts.items()}, tokens={s: n for s, (_, n, _) in counts.items()},
                    checksums={f: sha256(os.path.join(folder, f)) for f in files}, conditional=conditional, source=dict(dataset=dataset, val_dataset=val_dataset, found=found, letters_only=bool(texts) and letters_only, seed=seed))
        with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if os.path.isdir(final):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(folder, final)
    shutil.rmtree(old, ignore_errors=True)

    # ---- what you should have now -----------------------------------------------------------------------------------------
    print(f"{dataset}: {found}")
    for split, (n, tokens, longest) in counts.items():
        size = os.path.getsize(os.path.join(final, f'{split}.bin'))
        print(f"{os.path.join(final, split)}.bin: {n:,} rows of at most {longest} tokens, {tokens:,} tokens, {size:,} bytes")
        index = np.load(os.path.join(final, f'{split}.idx.npy'), mmap_mode='r')
        end = index[1, 0] if n > 1 else tokens
        ids = np.fromfile(os.path.join(final, f'{split}.bin'), dtype=dtype, count=end).tolist()
        print(f"  first row: " + ' -> '.join(repr(tok.decode(part, skip_special_tokens=True)[:100]) for part in (ids[:index[0, 1]], ids[index[0, 1]:]) if part))
    print(f"tokenizer: {tokenizer or token_level}, {len(tok)} ids; encoder: {encoder or 'random weights'}, {latent_dim} wide, {measured}; used {mean:.4f}, {std:.4f}")
    print("next: python train.py config/demo.py" + (f" --dataset={name} --max_length={meta['max_length']} --out_dir=out/{name}" if dataset != 'pydocs' else '') if not conditional and asked not in PUBLISHED else
          f"next: a config like config/wmt14_de_en_elf_b.py with dataset = {name!r}" if conditional else 'next: torchrun --nproc_per_node=8 train.py config/owt_elf_b.py')
