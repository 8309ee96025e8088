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

import numpy as np
from tqdm import tqdm

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
    """Step, times, the pairs of read_texts, for each text a dict, empty or of its task -> frame."""
    shown = []
    for t, (ids, p), task in zip(times.tolist(), texts, tasks):
        said = tokenizer.decode(ids, skip_special_tokens=True)
        right = 'target' in task and is_right(said, task['target'])
        shown.append(dict(task, t=t, tokens=token_texts(ids, tokenizer), right=right,
                          p=[round(x, 3) for x in p]))
    return dict(step=step, texts=shown)


def is_right(text, target):
    return text.split() == str(target).split()


def level(p):
    """How sure, 0 to 3: the styles q0 to q3 of page.css."""
    return int(p >= 0.3) + int(p >= 0.6) + int(p >= 0.9)


def styled(text, most=40):
    """A frame's text -> (stretch, its style): the input, its tokens, a tick where it is right."""
    spans = [(token, f'q{level(p)}') for token, p in zip(text['tokens'], text['p'])]
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
    text, lines, start = ''.join(ch for ch, _ in chars), [], 0
    while start < len(text) or not lines:
        end = start + width
        if '\n' in text[start:end + 1]:
            end = text.index('\n', start) + 1
        elif end < len(text):
            end = text.rfind(' ', start, end) + 1 or end
        line = []
        for ch, style in chars[start:end]:
            ch = ch.strip('\n')
            if line and line[-1][1] == style:
                ch = line.pop()[0] + ch
            line.append((ch, style))
        lines.append(line)
        start = end
    return lines

# --------------------------------------------------------------------------------------------------
# in a terminal

def can_redraw():
    return sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'


def screen(frame, steps):
    """The lines of a frame: a bar, then the texts, what the model is not sure of in grey."""
    columns, rows = shutil.get_terminal_size()
    step, texts = frame['step'], frame['texts']
    done = round(30 * step / steps)
    lines = [f"t={texts[0]['t']:.2f} {'━' * done}{'┄' * (30 - done)} step {step} of {steps}"]
    for text in texts:
        for line in lay_out(styled(text), columns - 3):
            shown = [f'\x1b[90m{part}\x1b[0m' if style in ('q0', 'q1') else part
                     for part, style in line]
            lines.append('  ' + ''.join(shown))
    return lines[:max(2, rows - 2)]


def show(frames, steps):
    """Draw the last frame over the one before it; a plain line where nothing can be redrawn."""
    if not can_redraw():
        text = frames[-1]['texts'][0]
        line = printable(''.join(part for part, _ in styled(text)))
        return tqdm.write(f"  t={text['t']:.2f} | {line[:160]}")
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
    except OSError as e:
        raise UserError(f"{name}={file!r} cannot be written: {e.strerror}") from None
    if os.path.isdir(file):
        raise UserError(f"{name}={file!r} is a folder; name a file in it")


def write(file, template, **parts):
    """Fill @name@ in a file of this folder, @style@ with page.css."""
    def read(name):
        with open(os.path.join(os.path.dirname(__file__), name), encoding='utf-8') as f:
            return f.read()

    parts['style'] = read('page.css')
    with open(f'{file}.tmp', 'w', encoding='utf-8') as f:
        f.write(re.sub(r'@(\w+)@', lambda found: str(parts[found[1]]), read(template)))
    os.replace(f'{file}.tmp', file)


def write_page(file, frames, facts):
    """One HTML file that needs nothing else: a slider over the frames, the facts (dict) beside."""
    frames = [frames[k] for k in moments(len(frames) - 1, MOMENTS)]
    data = to_json(dict(frames=frames, facts=facts))
    write(file, 'page.html', data=data.replace('<', '\\u003c'))       # no text closes the element


def draw_line(line):
    """A line of lay_out -> SVG."""
    spans = [f'<tspan class="{style}">{html.escape(part)}</tspan>' for part, style in line]
    return ''.join(spans)


def write_svg(file, frames, each=0.25, rest=3, width=72, most=12):
    """
    A picture for an <img> that comes out of the noise again and again, each seconds a frame, then a
    rest: the first texts, as many as fit into most lines of width characters.
    """
    frames = [frames[k] for k in moments(len(frames) - 1, MOMENTS // 2)]
    total, groups = each * len(frames) + rest, ''
    room = []               # lines that each text has at the end: all stay where they are
    for text in frames[-1]['texts']:
        lines = len(lay_out(styled(text), width)[:most])
        if sum(room) + lines <= most:
            room.append(lines)
    for k, frame in enumerate(frames):
        y, done = 66, 100 * (k + 1) / len(frames)
        drawn = f'<rect width="{done:.1f}%" height="3" class="bar"/>'
        drawn += f'<text x="16" y="32">t = {frame["texts"][0]["t"]:.2f}</text>'
        for text, lines in zip(frame['texts'], room):
            for i, line in enumerate(lay_out(styled(text), width)[:lines]):
                drawn += f'<text x="16" y="{y + 22 * i}">{draw_line(line)}</text>'
            y += 22 * lines + 8
        kind = 'last' if k == len(frames) - 1 else 'one'
        # all of them began in the past, each so that its turn comes at k * each
        groups += f'<g class="{kind}" style="animation-delay:{k * each - total}s">{drawn}</g>\n'
    write(file, 'page.svg', groups=groups, width=round(9.1 * width) + 32, height=y - 8,
          total=total, one=f"{100 * each / total:.3f}", last=f"{100 * (each + rest) / total:.3f}")
