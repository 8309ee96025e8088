"""
What is given of a text: the condition of a model for a task, a prompt with holes for any other.
"""
import re

import torch

from parts.data import cut_at_eos, encode, read_inputs
from parts.process import UserError

HOLE = -1       # stands for a token that the model is to write


def encode_given(text, tokenizer, c):
    """
    A condition -> its ids and an EOS, as far as the model reads. A prompt -> its ids, a HOLE for
    each of three or more underscores in a row.
    """
    (_, ids, _), (_, joined, _) = encode([text, ' a'], tokenizer)
    if c.max_input_length:
        return (ids + [tokenizer.eos_token_id])[:c.max_input_length]
    # a space before what is open belongs to the token of the word that comes, in most tokenizers
    if len(joined) == 1:
        text = re.sub(r' +(?=___|\Z)', '', text)
    row = []
    for part, ids, _ in encode(re.split('(___+)', text), tokenizer):
        row += [HOLE] * len(part) if part.startswith('___') else ids
    return row


def unknown_in(text, tokenizer):
    """What of a text the tokenizer does not know, or takes for a special token -> spaced."""
    coded = tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                      return_offsets_mapping=True)
    spans = zip(coded['input_ids'], coded['offset_mapping'])
    # a set: a sign may be several tokens
    unknown = {span for i, span in spans if i in tokenizer.all_special_ids}
    return ' '.join(text[a:b] for a, b in sorted(unknown))


def read_tasks(config, named, source, tokenizer, c):
    """
    What the settings of sample.py, config, of which those named were set, ask of the model source
    -> a dict for each text: with conditions 'input', perhaps 'target'. UserError for what it cannot
    take; what it does not know, or cuts, of conditions is said.
    """
    asked, count = named & {'input', 'input_file', 'prompt'}, config['num_samples']
    if not c.max_input_length:
        if asked - {'prompt'}:
            raise UserError(f"{source} is a model without conditions; it takes --prompt")
        check_prompt(config['prompt'], tokenizer, c)
        return [{}] * count

    if asked not in ({'input'}, {'input_file'}):
        raise UserError(f"{source} is a model with conditions; give --input or --input_file")
    rows = read_inputs(config['input_file']) if 'input_file' in asked else [config]
    tasks = [{k: row[k] for k in ('input', 'target') if k in row} for row in rows]
    check_inputs([task['input'] for task in tasks], tokenizer, c)
    return [tasks[i % len(tasks)] for i in range(count)] if 'num_samples' in named else tasks


def check_inputs(texts, tokenizer, c):
    """Say what of conditions the model does not know, and what it will not read."""
    unknown = [found for text in texts if (found := unknown_in(text, tokenizer))]
    if unknown:
        print(f"{len(unknown)} of {len(texts)} conditions have what the model was not trained on "
              f"and cannot read, such as {unknown[0]!r}")
    longest = 1 + max(len(ids) for _, ids, _ in encode(texts, tokenizer))
    if longest > c.max_input_length:
        print(f"the longest condition has {longest} tokens with its EOS; the model reads "
              f"{c.max_input_length}, as in training")


def check_prompt(text, tokenizer, c):
    """UserError if the model does not know it, or it is too long."""
    if unknown := unknown_in(re.sub('___+', '', text), tokenizer):
        raise UserError(f"prompt={text!r} has what the model was not trained on: {unknown!r}")
    row = encode_given(text, tokenizer, c)
    if len(row) > c.max_length:
        raise UserError(f"prompt={text!r} takes {len(row)} tokens, a text of this model has "
                        f"{c.max_length}; shorten it")


def known_tokens(rows, c):
    """Rows of encode_given -> ids, and where they are known, both (B, T)."""
    ids = torch.tensor([row + [HOLE] * (c.max_length - len(row)) for row in rows])
    return ids.clamp(min=0), ids != HOLE


def texts_in(given, ids, p, tokenizer, c):
    """
    Decoded ids (B, T) and how likely they are -> lists of these for each text, up to its EOS.
    given: rows of encode_given: a condition is left out, a prompt comes out as it is.
    """
    texts = []
    for row, ids, p in zip(given, ids.tolist(), p.tolist()):
        for i, known in enumerate(row):
            if known != HOLE:
                ids[i], p[i] = known, 1.0
        said = ids[len(row):len(row) + c.max_length - c.max_input_length]
        first = len(row) if c.max_input_length else 0
        last = len(row) + len(cut_at_eos(said, tokenizer.eos_token_id))
        texts.append((ids[first:last], p[first:last]))
    return texts
