"""
Text to tokenised, memory-mapped bins: data/<name>/{train,val}.bin, {train,val}.idx.npy, meta.json.

    python prepare.py                                       # the embedded demo corpus, seconds, no download
    python prepare.py --dataset=my.txt --letters_only=false --max_length=64
    python prepare.py --dataset=my.txt --letters_only=false --max_length=256 --tokenizer=t5-small --encoder=t5-small
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
dataset = 'pydocs'          # 'pydocs', the language reference inside every Python, or the path of a .txt file in UTF-8
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
            ids = np.asarray([*cond, *target], dtype=np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise UserError(f"row {len(index) // 2} of {split} has token id {ids.max() if ids.max() >= vocab_size else ids.min()}, the vocabulary has {vocab_size}; is it this tokenizer's?")
            f.write(ids.astype(dtype).tobytes())
            index.extend((at, at + len(cond)))
            at, longest = at + len(ids), max(longest, len(ids))
    np.save(os.path.join(folder, f'{split}.idx.npy'), np.frombuffer(index, dtype=np.int64).reshape(-1, 2))
    return len(index) // 2, at, longest


def measure_latents(encoder_name, folder, dtype, vocab_size):
    """Mean and standard deviation of the raw encoder outputs over up to 512 rows spread over train.bin -> two floats, width C."""
    data = np.fromfile(os.path.join(folder, 'train.bin'), dtype=dtype)
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


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else hashlib.sha256(f.read()).hexdigest()


if __name__ == '__main__':
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
    name = name or os.path.splitext(os.path.basename(dataset))[0]
    if name != os.path.basename(name) or name in ('', '.', '..'):
        raise UserError(f"name={name!r}: must be one folder's name, without slashes; --data_dir says where")
    final = os.path.join(data_dir, name)
    old = os.path.join(data_dir, f'.{name}.old')
    if os.path.isdir(old) and not os.path.exists(final):
        os.replace(old, final)      # a kill between the two renames at the end left only this
    if os.path.isdir(final) and os.listdir(final) and not os.path.exists(os.path.join(final, 'meta.json')):
        raise UserError(f"{final} is there already and holds no bins (no meta.json); choose another --name")

    # ---- text ---------------------------------------------------------------------------------------------------------
    text = pydocs_text() if dataset == 'pydocs' else read_text(dataset)
    found = len(text)
    if letters_only:
        text = re.sub(r'[^a-z\n]+', ' ', text.lower())
    texts = dict(zip(('train', 'val'), split_text(text, val_fraction, seed)))
    if letters_only:        # the newlines were needed for the split
        texts = {split: re.sub(r'\s+', ' ', t).strip() for split, t in texts.items()}
    if min(len(t.split()) for t in texts.values()) < 2:
        left = f", {len(text.strip())} after keeping a-z (--letters_only=false keeps all)" if letters_only else ''
        raise UserError(f"{dataset} has {found} characters{left}, too little for a train and a validation text; give at least some 5,000")

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
            tok = train_tokenizer(texts['train'], token_level, vocab_size)
            tok.save_pretrained(os.path.join(folder, 'tokenizer'))
        dtype = 'uint16' if len(tok) <= 65536 else 'uint32'
        counts = {split: write_split(folder, split, pack_rows(t, tok, max_length), dtype, len(tok)) for split, t in texts.items()}
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
                    checksums={f: sha256(os.path.join(folder, f)) for f in files}, source=dict(dataset=dataset, characters=found, letters_only=letters_only, seed=seed))
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
    print(f"{dataset}: {found:,} characters" + (f", {sum(map(len, texts.values())):,} after keeping a-z and spaces" if letters_only else ''))
    for split, (n, tokens, longest) in counts.items():
        size = os.path.getsize(os.path.join(final, f'{split}.bin'))
        print(f"{os.path.join(final, split)}.bin: {n:,} rows of at most {longest} tokens, {tokens:,} tokens, {size:,} bytes")
        ids = np.fromfile(os.path.join(final, f'{split}.bin'), dtype=dtype, count=longest)
        print(f"  first row: {tok.decode(ids[:ids.tolist().index(tok.eos_token_id)].tolist())!r}")
    print(f"tokenizer: {tokenizer or token_level}, {len(tok)} ids; encoder: {encoder or 'random weights'}, {latent_dim} wide, {measured}; used {mean:.4f}, {std:.4f}")
    print("next: python train.py config/demo.py" + (f" --dataset={name} --max_length={meta['max_length']} --out_dir=out/{name}" if dataset != 'pydocs' else ''))
