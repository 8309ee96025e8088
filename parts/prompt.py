"""
What is given of a text: the conditions of a model for a task, prompts and holes for any other.
"""
import re

import torch

from configurator import UserError
from parts.data import cut_at_eos


def encode_inputs(texts, tokenizer, encoder, c, device):
    """
    Conditions as texts -> clean latents (B, T, C), mask (B, T) of their positions, as in
    training.
    """
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)['input_ids'] + [tokenizer.eos_token_id]
        rows.append(ids[:c.max_input_length])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (c.max_length - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(c.max_length) < lengths[:, None]).to(device)
    return encoder(ids.to(device), mask, mask), mask


def read_prompt(text, holes, tokenizer, c):
    """
    What is given of a text -> ids (T,), known (T,) bool: where they count. With holes, each of
    three or more underscores in a row is a token to fill. UserError if the model cannot take it.
    """
    def encode(text):
        return tokenizer(text, add_special_tokens=False)['input_ids']

    # a space before what is open belongs to the token of the word that comes, in most tokenizers
    joined = len(encode(' a')) < len(encode(' ')) + len(encode('a'))
    ids, known = [], []
    for part in re.split('(___+)', text) if holes else [text]:
        hole = holes and part.startswith('___')
        part = part.rstrip(' ') if joined else part
        new = [tokenizer.pad_token_id] * len(part) if hole else encode(part)
        ids += new
        known += [not hole] * len(new)
    own = {i for i, given in zip(ids, known) if given} & set(tokenizer.all_special_ids)
    if own:
        what = tokenizer.decode(sorted(own))
        if tokenizer.unk_token_id in own:
            signs = dict.fromkeys(re.sub('___+', '', text))
            what = ' '.join(sign for sign in signs if tokenizer.unk_token_id in encode(sign))
        raise UserError(f"{text!r}: the model's tokenizer has no token for {what} in a text "
                        "(the demo's has a to z and the space)")
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


def text_ids(ids, cond_mask, tokenizer, c, prompt=None):
    """
    A decoded row (T,) -> list of the ids of its text, and where they start: without its condition,
    cut at the first EOS. With a prompt: its tokens as given, cut only after them.
    """
    start = given = 0
    if prompt:
        ids = torch.where(prompt[1], prompt[0], ids)
        given = int(prompt[1].nonzero().max()) + 1
    elif cond_mask is not None:
        start = int(cond_mask.sum())
    ids = ids[start:start + c.max_length - c.max_input_length].tolist()
    return ids[:given] + cut_at_eos(ids[given:], tokenizer.eos_token_id), start
