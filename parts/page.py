"""
The picture of texts that come out of noise: redrawn in a terminal, as a page, as a moving SVG.

A frame is what the model would say at one moment, dict(step, texts). Each of its texts is a
dict(t, tokens, p): what each token adds to the text, and how likely the model finds it; with a
condition also its 'input', perhaps 'target', and whether it is right. What the files look like
stands in page.html and page.svg, their colours in page.css.
"""
import html
import os
import re
import shutil
import sys
import time
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from parts.data import printable, to_json
from parts.process import UserError

MOMENTS = 48            # frames of a page; of an SVG, which loops, half of them

# --------------------------------------------------------------------------------------------------
# frames

def moments(steps, count):
    """At most count of the steps 0 ... steps, evenly spread, the last always there -> list."""
    return sorted({round(i) for i in np.linspace(steps, 0, count)})


def token_texts(ids, tokenizer):
    """What each token adds to the text -> list of strings, which join to it, spaces as they are."""
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # decoded beside those before it that said something: alone it may lose its space, or be a part
    # of a character, which counts for the last of its tokens
    special, texts = set(tokenizer.all_special_ids), []
    before, since, said = [], [], ''
    for i in ids:
        if i not in special:
            since.append(i)
        added = decode(before + since)[len(said):]
        texts.append('' if added.endswith('\ufffd') else added)
        if texts[-1]:
            before, since = since, []
            said = decode(before)
    if texts:
        texts[-1] += decode(before + since)[len(said):]
    return texts


def make_frame(step, times, texts, tasks, tokenizer):
    """Step, times, what texts_in gives, a dict for each text, empty or of its task -> frame."""
    shown = []
    for t, (ids, p), task in zip(times.tolist(), texts, tasks):
        tokens = token_texts(ids, tokenizer)
        right = ''.join(tokens).split() == str(task.get('target', '')).split() != []
        shown.append(dict(task, t=t, tokens=tokens, right=right, p=[round(x, 3) for x in p]))
    return dict(step=step, texts=shown)


def styled(text, most=40):
    """A frame's text -> (stretch, its style): the input, its tokens, a tick where it is right."""
    # how sure, 0 to 3: the styles q0 to q3 of page.css
    spans = [(token, f'q{sum(p >= least for least in (0.3, 0.6, 0.9))}')
             for token, p in zip(text['tokens'], text['p'])]
    if 'input' in text:
        given = text['input']
        given = given if len(given) <= most else given[:most - 1] + '…'
        spans.insert(0, (f'{given} → ', 'given'))
    if text['right']:
        spans.append((' ✓', 'right'))
    return spans


def lay_out(spans, width):
    """(Stretch, style) of a text -> its lines, own ones and those cut at spaces: lists of these."""
    chars = [(ch, style) for text, style in spans for raw in text
             for ch in (raw if raw == '\n' else printable(raw))]
    text = ''.join(ch for ch, _ in chars)
    # to a line break, to the end, to the last space that fits, through a long word
    line = re.compile(rf'.{{0,{width}}}\n|.{{1,{width}}}\Z|.{{1,{width}}}(?<= )|.{{{width}}}')
    lines = []
    for found in line.finditer(text):
        parts = groupby(chars[slice(*found.span())], key=itemgetter(1))
        lines.append([(''.join(ch for ch, _ in part).rstrip('\n'), style)
                      for style, part in parts])
    return lines or [[]]

# --------------------------------------------------------------------------------------------------
# in a terminal

def screen(frame, steps):
    """The lines of a frame: the moment, then the texts, what the model is not sure of in grey."""
    columns, rows = shutil.get_terminal_size()
    lines = [f"t={frame['texts'][0]['t']:.2f} step {frame['step']} of {steps}"]
    for text in frame['texts']:
        for line in lay_out(styled(text), columns - 3):
            shown = [f'\x1b[90m{part}\x1b[0m' if style in ('q0', 'q1') else part
                     for part, style in line]
            lines.append('  ' + ''.join(shown))
    return lines[:rows - 2]


def show(frames, steps):
    """Draw the last frame over the one before it; a plain line where nothing can be redrawn."""
    if not sys.stdout.isatty():
        text = frames[-1]['texts'][0]
        return print(f"  t={text['t']:.2f} | {printable(''.join(text['tokens']))[:160]}")
    back = f'\x1b[{len(screen(frames[-2], steps))}F' if len(frames) > 1 else ''
    lines = [line + '\x1b[K\n' for line in screen(frames[-1], steps)]
    # without wrapping, so that going back by so many lines is right whatever the characters' width
    print(back + '\x1b[?7l' + ''.join(lines) + '\x1b[J\x1b[?7h', end='', flush=True)
    time.sleep(0.06)        # small models are faster than eyes

# --------------------------------------------------------------------------------------------------
# files

def check_writable(name, file):
    """Before the work: UserError if the file that a setting names, if any, cannot be written."""
    try:
        os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
        if os.path.isdir(file):
            raise IsADirectoryError(None, 'it is a folder')
    except OSError as e:
        raise UserError(f"{name}={file!r} cannot be written: {e.strerror}") from None


def write(file, template, **parts):
    """Fill @name@ in a file of this folder, @style@ with page.css; say so."""
    here = Path(__file__).parent
    parts['style'] = (here / 'page.css').read_text('utf-8')
    source = (here / template).read_text('utf-8')
    filled = re.sub(r'@(\w+)@', lambda found: str(parts[found[1]]), source)
    Path(f'{file}.tmp').write_text(filled, 'utf-8')
    os.replace(f'{file}.tmp', file)
    print(f"written: {file}")


def write_page(file, frames, facts):
    """One HTML file that needs nothing else: a slider over the frames, the facts (dict) beside."""
    data = to_json(dict(frames=frames, facts=facts))
    write(file, 'page.html', data=data.replace('<', '\\u003c'))       # no text closes the element


def write_svg(file, frames, each=0.25, rest=3, width=72, most=12):
    """
    A picture for an <img> that comes out of the noise again and again, each seconds a frame, then a
    rest: the first texts, as many as fit into most lines of width characters.
    """
    frames = [frames[k] for k in moments(len(frames) - 1, MOMENTS // 2)]
    total, groups = each * len(frames) + rest, ''
    # the lines that each text has at the end: all stay where they are
    room = [len(lay_out(styled(text), width)[:most]) for text in frames[-1]['texts']]
    while sum(room) > most:
        room.pop()
    for k, frame in enumerate(frames):
        # all of them began in the past, each so that its turn comes at k * each
        groups += f'<g style="animation-delay:{k * each - total}s">'
        groups += f'<text x="16" y="32">t = {frame["texts"][0]["t"]:.2f}</text>'
        y = 66
        for text, lines in zip(frame['texts'], room):
            for i, line in enumerate(lay_out(styled(text), width)[:lines]):
                groups += f'<text x="16" y="{y + 22 * i}">'
                for part, style in line:
                    groups += f'<tspan class="{style}">{html.escape(part)}</tspan>'
                groups += '</text>'
            y += 22 * lines + 8
        groups += '</g>\n'
    write(file, 'page.svg', groups=groups, width=round(9.1 * width) + 32, height=y - 8,
          total=total, one=f"{100 * each / total:.3f}", last=f"{100 * (each + rest) / total:.3f}")
