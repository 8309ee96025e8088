"""
The picture of texts that come out of noise: lines in a terminal, and a page, page.html.

A frame is what the model would say at one moment, dict(step, texts). Each of its texts is a
dict(t, tokens, p): what each token adds to the text, and how likely the model finds it.
"""
import shutil
from pathlib import Path

import numpy as np
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

from parts.data import printable, to_json


def moments(steps, count):
    """At most count of the steps 0 ... steps, evenly spread, the last always there -> list."""
    return sorted({round(i) for i in np.linspace(steps, 0, count)})


def token_texts(ids, tokenizer):
    """What each token adds to the text -> list of strings, which join to it, spaces as they are."""
    # a character of several tokens counts for the last of them, or where its text ends within it
    stream = DecodeStream(skip_special_tokens=True)
    texts = [stream.step(tokenizer.backend_tokenizer, i) or '' for i in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if texts:
        texts[-1] += whole[len(''.join(texts)):]
    return texts


def make_frame(step, times, texts, tokenizer):
    """Step, times (B,), what texts_in gives -> frame."""
    return dict(step=step, texts=[
        dict(t=t, tokens=token_texts(ids, tokenizer), p=[round(x, 3) for x in p])
        for t, (ids, p) in zip(times.tolist(), texts)])


def show(frame):
    """A line: the moment and the first text, as far as the terminal is wide."""
    text = frame['texts'][0]
    line = f"  t={text['t']:.2f} | {printable(''.join(text['tokens']))}"
    tqdm.write(line[:shutil.get_terminal_size().columns])       # beside a bar


def write_page(file, frames, tasks, facts):
    """
    One HTML file that needs nothing else: a slider over the frames. tasks: a dict for each text,
    perhaps with 'input' and 'target'; facts: a dict to show beside.
    """
    template = Path(__file__).with_name('page.html').read_text('utf-8')
    data = to_json(dict(frames=frames, tasks=tasks, facts=facts))
    data = data.replace('<', '\\u003c')         # no text closes the element
    Path(file).write_text(template.replace('@data@', data), 'utf-8')
    print(f"written: {file}")
