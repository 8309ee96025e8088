"""
Text that comes out of noise again and again, as an SVG for an <img>: the frames of a page that
sample.py --html wrote. How assets/demo.svg is made, after make demo:

    python sample.py --out_dir=out/numbers --input_file=asked.jsonl --steps=16 \
        --html=out/numbers/page.html
    python assets/moving.py out/numbers/page.html assets/demo.svg

asked.jsonl has a line {"input": "42", "target": "forty-two"} for each of the numbers.
"""
import html
import json
import re
import sys
from itertools import groupby
from operator import itemgetter
from string import Template

EACH, REST = 0.25, 3            # seconds of a frame, and of the last one in addition
FRAMES, LINES, WIDTH = 24, 12, 72       # at most; the width in characters

SVG = Template("""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" role="img">
<title>Text coming out of noise</title>
<style>
/* how sure the model is shows in weight, slant and underline, too: not in colour alone */
:root { --paper: #fcfbf8; --ink: #1b1a18; --grey: #66635c; --hot: #a8410e; --faint: #7d776c;
        --mark: #2b62b0; --good: #2a6f3c; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #f1eee7; --grey: #a19c91;
        --hot: #f09a5f; --faint: #8f897d; --mark: #7fb0f5; --good: #7cc98f } }
.q3 { fill: var(--ink); font-weight: 600 }
.q2 { fill: var(--ink) }
.q1 { fill: var(--hot); text-decoration: underline dotted 1px }
.q0 { fill: var(--faint); font-style: italic }
.given { fill: var(--mark) }
.right { fill: var(--good); font-weight: 600 }
text { font: 15px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
       white-space: pre; fill: var(--grey) }
g { visibility: hidden; animation: one ${total}s step-end infinite }
g:last-of-type { visibility: visible; animation-name: last }
@keyframes one { 0% { visibility: visible } $one%, 100% { visibility: hidden } }
@keyframes last { 0% { visibility: visible } $last%, 100% { visibility: hidden } }
@media (prefers-reduced-motion: reduce) { g { animation: none } }
</style>
<rect width="100%" height="100%" fill="var(--paper)"/>
$groups</svg>
""")


def read_page(file):
    """A page of sample.py -> its frames, and what was asked of each text: input, target."""
    with open(file, encoding='utf-8') as f:
        data = json.loads(re.search(r'"application/json">(.*)</script>', f.read())[1])
    return data['frames'], data['tasks']


def styled(text, task):
    """A frame's text -> (stretch, its style): the input, its tokens, a tick where it is right."""
    # how sure, 0 to 3: the styles q0 to q3
    spans = [(token, f'q{sum(p >= least for least in (0.3, 0.6, 0.9))}')
             for token, p in zip(text['tokens'], text['p'])]
    if 'input' in task:
        spans.insert(0, (task['input'][:40] + ' → ', 'given'))
    if 'target' in task and ''.join(text['tokens']).split() == str(task['target']).split():
        spans.append((' ✓', 'right'))
    return spans


def lay_out(spans):
    """(Stretch, style) of a text -> its lines, own ones and those cut at spaces: lists of these."""
    chars = [(ch if ch == '\n' or ch.isprintable() else ' ', style)
             for text, style in spans for ch in text]
    text = ''.join(ch for ch, _ in chars)
    # to a line break, to the end, to the last space that fits, through a long word
    line = re.compile(rf'.{{0,{WIDTH}}}\n|.{{1,{WIDTH}}}\Z|.{{1,{WIDTH}}}(?<= )|.{{{WIDTH}}}')
    lines = []
    for found in line.finditer(text):
        parts = groupby(chars[slice(*found.span())], key=itemgetter(1))
        lines.append([(''.join(ch for ch, _ in part).rstrip('\n'), style)
                      for style, part in parts])
    return lines or [[]]


def draw(frames, tasks):
    """The picture of frames: the first texts, as many as fit into so many lines -> SVG."""
    if len(frames) > FRAMES:
        frames = [frames[round(k * (len(frames) - 1) / (FRAMES - 1))] for k in range(FRAMES)]
    laid_out = [[lay_out(styled(text, task))[:LINES] for text, task in zip(frame['texts'], tasks)]
                for frame in frames]
    # the lines that each text has at the end: all stay where they are
    room = [len(lines) for lines in laid_out[-1]]
    while sum(room) > LINES:
        room.pop()
    total, groups = EACH * len(frames) + REST, ''
    for k, texts in enumerate(laid_out):
        # all of them began in the past, each so that its turn comes at k * EACH
        groups += f'<g style="animation-delay:{k * EACH - total}s">'
        groups += f'<text x="16" y="32">t = {frames[k]["texts"][0]["t"]:.2f}</text>'
        y = 66
        for lines, most in zip(texts, room):
            for i, line in enumerate(lines[:most]):
                groups += f'<text x="16" y="{y + 22 * i}">'
                for part, style in line:
                    groups += f'<tspan class="{style}">{html.escape(part)}</tspan>'
                groups += '</text>'
            y += 22 * most + 8
        groups += '</g>\n'
    return SVG.substitute(
        groups=groups, width=round(9.1 * WIDTH) + 32, height=y - 8, total=total,
        one=f'{100 * EACH / total:.3f}', last=f'{100 * (EACH + REST) / total:.3f}')


if __name__ == '__main__':
    page, picture = sys.argv[1:]
    drawn = draw(*read_page(page))
    with open(picture, 'w', encoding='utf-8') as f:
        f.write(drawn)
