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
    A condition -> its ids and an EOS. A prompt -> its ids, a HOLE for each of three or more
    underscores in a row.
    """
    (_, ids, _), (_, joined, _) = encode([text, ' a'], tokenizer)
    if c.max_input_length:
        return ids + [tokenizer.eos_token_id]
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


def read_tasks(config, source, tokenizer, c):
    """
    What the settings of sample.py ask of the model source -> a dict for each text: 'input', the
    condition or prompt, if any, perhaps 'target'. UserError for what it cannot take; what it does
    not know, or cuts, of conditions is said.
    """
    asked = {name for name in ('input', 'input_file', 'prompt') if config[name]}
    if not c.max_input_length:
        if asked - {'prompt'}:
            raise UserError(f"{source} is a model without conditions; it takes --prompt")
        for complaint in complaints([config['prompt']], tokenizer, c):
            raise UserError(f"prompt={config['prompt']!r}: {complaint}")
        return [dict(input=config['prompt']) if asked else {}] * (config['num_samples'] or 8)

    if asked not in ({'input'}, {'input_file'}):
        raise UserError(f"{source} is a model with conditions; give one by --input, or more by "
                        "--input_file")
    rows = read_inputs(config['input_file']) if 'input_file' in asked else [config]
    tasks = [{k: row[k] for k in ('input', 'target') if k in row} for row in rows]
    for complaint in complaints([task['input'] for task in tasks], tokenizer, c):
        print(complaint)
    return [tasks[i % len(tasks)] for i in range(config['num_samples'] or len(tasks))]


def complaints(texts, tokenizer, c):
    """What a model cannot read of what is given, sentences; none if it reads all."""
    plain = texts if c.max_input_length else [re.sub('___+', '', text) for text in texts]
    unknown = [found for text in plain if (found := unknown_in(text, tokenizer))]
    if unknown:
        yield (f"the model was not trained on {unknown[0]!r} and cannot read it "
               f"(in {len(unknown)} of {len(texts)} texts given)")
    longest = max(len(encode_given(text, tokenizer, c)) for text in texts)
    longest -= bool(c.max_input_length)         # the EOS of a condition
    limit = c.max_input_length or c.max_length
    if longest > limit:
        yield f"the longest text has {longest} tokens; the model reads the first {limit}"


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
