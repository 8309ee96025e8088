"""
What is given of a text: the conditions of a model for a task, prompts and holes for any other.
"""
import re

import torch

from parts.data import cut_at_eos, read_inputs
from parts.process import UserError


def encode(text, tokenizer):
    """A text -> its ids; '</s>' and '<pad>' spelled out in it are left out, as in training."""
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    return [i for i in ids if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]


def unknown_in(text, tokenizer, kind):
    """
    What of a text the model does not know -> characters, or words, spaced: its tokens do not give
    them back, or the training texts (kind 'text', or their 'input') had none, where the tokenizer's
    config lists theirs, as text_characters or input_characters.
    """
    ids, unk = encode(text, tokenizer), tokenizer.unk_token_id
    back = tokenizer.decode(ids, skip_special_tokens=True) + ' \t\n'
    trained = tokenizer.init_kwargs.get(f'{kind}_characters', text)
    found = [token for token in tokenizer.all_special_tokens if token in text]      # spelled out
    found = found or [ch for ch in dict.fromkeys(text) if ch not in back or ch not in trained]
    if not found and unk in ids:
        found = [part for part in re.findall(r'\S+|\s', text) if unk in encode(part, tokenizer)]
    return ' '.join(found)


def read_given(config, named, source, tokenizer, c):
    """
    What the settings of sample.py, config, of which those named were set, give of the texts of the
    model source -> given for known_tokens; a task for each text: a dict with 'input' and perhaps
    'target', empty without conditions. UserError for what the model does not know.
    """
    names = named & {'input', 'input_file', 'prompt', 'infill'}
    if len(names) > 1:
        raise UserError(f"{' and '.join(sorted(names))} exclude each other")
    if c.max_input_length and not names & {'input', 'input_file'}:
        raise UserError(f"{source} is a model with conditions; give --input=\"...\" "
                        "or --input_file=x.jsonl")
    if not c.max_input_length:
        if names & {'input', 'input_file'}:
            raise UserError(f"{source} is a model without conditions; "
                            "drop --input and --input_file")
        known = [read_prompt(config[name], name == 'infill', tokenizer, c) for name in names]
        return known[0] if known else None, [{}] * config['num_samples']
    file = config['input_file']
    rows = read_inputs(file) if file else [config]
    tasks = [{k: row[k] for k in ('input', 'target') if k in row} for row in rows]
    texts = [task['input'] for task in tasks]
    if unknown := unknown_in(' '.join(texts), tokenizer, 'input'):
        says = f"{file or repr(texts[0])} has what this model was not trained on: {unknown}"
        if not file:
            raise UserError(says)
        print(says)
    longest = 1 + max(len(encode(text, tokenizer)) for text in texts)
    if longest > c.max_input_length:
        print(f"the longest condition has {longest} tokens with its EOS; the model reads the first "
              f"{c.max_input_length}, the rest is cut off")
    times = config['num_samples'] if 'num_samples' in named else 1
    return texts * times, tasks * times


def read_prompt(text, holes, tokenizer, c):
    """
    What is given of a text -> ids (T,), known (T,) bool: where they count. With holes, each of
    three or more underscores in a row is a token to fill. UserError if the model cannot take it.
    """
    # a space before what is open belongs to the token of the word that comes, in most tokenizers
    joined = len(encode(' a', tokenizer)) < len(encode(' ', tokenizer) + encode('a', tokenizer))
    ids, known = [], []
    for part in re.split('(___+)', text) if holes else [text]:
        hole = holes and part.startswith('___')
        part = part.rstrip(' ') if joined else part
        new = [tokenizer.pad_token_id] * len(part) if hole else encode(part, tokenizer)
        ids += new
        known += [not hole] * len(new)
    written = re.sub('___+', '', text) if holes else text
    if unknown := unknown_in(written, tokenizer, 'text'):
        raise UserError(f"{text!r} has what this model was not trained on: {unknown}")
    if not any(known):
        raise UserError(f"{text!r} gives no token to start from")
    if holes and all(known):
        raise UserError(f"infill={text!r} has no hole; write ___, an underscore for each token")
    rest = c.max_length - len(ids)
    if rest < (not holes):
        raise UserError(f"{text!r} takes {len(ids)} tokens, a text of this model has "
                        f"{c.max_length}, and some must be left to write; shorten it")
    ids += [tokenizer.pad_token_id] * rest
    return torch.tensor(ids), torch.tensor(known + [False] * rest)


def known_tokens(given, numbers, tokenizer, c):
    """
    What is known of the texts with these numbers -> ids, known, both (B, T). given: None, or with
    conditions these, as texts by number, or else what read_prompt gives.
    """
    if given is None:
        nothing = torch.zeros(len(numbers), c.max_length, dtype=torch.long)
        return nothing, nothing.bool()
    if not c.max_input_length:
        return [x.expand(len(numbers), -1) for x in given]
    rows = [encode(given[i], tokenizer) + [tokenizer.eos_token_id] for i in numbers]
    rows = [row[:c.max_input_length] for row in rows]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (c.max_length - len(row)) for row in rows])
    return ids, torch.arange(c.max_length) < torch.tensor([[len(row)] for row in rows])


def text_ids(row, ids, known, tokenizer, c):
    """
    A decoded row (T,) and what was known of it -> list of the ids of its text, where they start:
    cut at the first EOS, without its condition; with a prompt its tokens as given, cut after them.
    """
    start = given = 0
    if c.max_input_length:
        start = int(known.sum())
    elif known.any():
        row, given = torch.where(known, ids, row), int(known.nonzero().max()) + 1
    row = row[start:start + c.max_length - c.max_input_length].tolist()
    return row[:given] + cut_at_eos(row[given:], tokenizer.eos_token_id), start
