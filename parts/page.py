"""
The picture of texts that come out of noise: redrawn in a terminal, as a page, as a moving SVG.

A frame is what the model would say at one moment, dict(step, texts); each of its texts is a
dict(t, pieces, p): the stretch of text that each token makes, and how likely the model finds it.
"""
import base64
import hashlib
import html
import json
import os
import shutil
import sys
import time
from string import Template

import numpy as np
from tqdm import tqdm

from configurator import UserError
from parts.data import printable

MOMENTS = 48            # frames of a page; of an SVG, which loops, half of them
SETTLED = 3             # a token has settled when so many frames agree on it, and it is likely

# --------------------------------------------------------------------------------------------------
# frames

def moments(steps, count):
    """At most count of the steps 0 ... steps, evenly spread, the last always there -> list."""
    return sorted({round(i) for i in np.linspace(steps, 0, count)})


def split(ids, tokenizer):
    """What each token adds to the decoded text -> list of strings, which join to it."""
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    whole, pieces, before = decode(ids), [], []
    for i in ids:       # beside the one before it: alone, a token may lose its space
        piece = decode(before + [i])[len(decode(before)):]
        before = [i] if piece else before
        pieces.append(piece)
    if ''.join(pieces) == whole:
        return pieces
    # some character takes several tokens. Slow: how much of the text is there after each of them
    ends = [0]
    for k in range(1, len(ids)):
        ends.append(max(ends[-1], len(os.path.commonprefix((whole, decode(ids[:k]))))))
    return [whole[a:b] for a, b in zip(ends, ends[1:] + [len(whole)])]


def make_frame(step, times, rows, tokenizer):
    """Step, times and (ids, p) of some texts, from the watch of sample_texts -> frame."""
    texts = []
    for t, (ids, p) in zip(times.tolist(), rows):
        texts.append(dict(t=t, pieces=split(ids, tokenizer), p=p))
    return dict(step=step, texts=texts)


def agree(frames, i):
    """Of each token of text i in the last frame: is it the same in all of these frames?"""
    *others, last = [frame['texts'][i]['pieces'] for frame in frames]
    return [all(pieces[k:k + 1] == [piece] for pieces in others) for k, piece in enumerate(last)]


def level(p):
    """How sure, 0 to 3: the styles q0 to q3 below."""
    return int(p >= 0.3) + int(p >= 0.6) + int(p >= 0.9)


def lay_out(pieces, marks, width):
    """A text in lines, its own and those cut at spaces -> lists of (stretch, its mark)."""
    signs = [(sign, mark) for piece, mark in zip(pieces, marks) for raw in piece
             for sign in (raw if raw == '\n' else printable(raw))]
    text, lines, start = ''.join(sign for sign, _ in signs), [], 0
    while start < len(text) or not lines:
        end = start + width
        if '\n' in text[start:end + 1]:
            end = text.index('\n', start) + 1
        elif end < len(text):
            end = text.rfind(' ', start, end) + 1 or end
        line = []
        for sign, mark in signs[start:end]:
            sign = sign.strip('\n')
            if line and line[-1][1] == mark:
                sign = line.pop()[0] + sign
            line.append((sign, mark))
        lines.append(line)
        start = end
    return lines

# --------------------------------------------------------------------------------------------------
# in a terminal

def can_redraw():
    return sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'


def screen(frames, steps):
    """The lines of the last frame: a bar, then the texts, what may still change in grey."""
    columns, rows = shutil.get_terminal_size()
    step, texts = frames[-1]['step'], frames[-1]['texts']
    done = round(30 * step / steps)
    lines = [f"t={texts[0]['t']:.2f} {'━' * done}{'┄' * (30 - done)} step {step} of {steps}"]
    for i, text in enumerate(texts):
        settled = []
        for same, p in zip(agree(frames[-SETTLED:], i), text['p']):
            likely = same and level(p) >= 2 and len(frames) >= SETTLED
            settled.append(likely or step == steps)
        for line in lay_out(text['pieces'], settled, columns - 3):
            lines.append('  ')
            for part, is_settled in line:
                lines[-1] += part if is_settled else f'\x1b[90m{part}\x1b[0m'
    return lines[:max(2, rows - 2)]


def show(frames, steps, pause=0.06):
    """Draw the last frame over the one before it; a plain line where nothing can be redrawn."""
    if not can_redraw():
        text = frames[-1]['texts'][0]
        line = printable(''.join(text['pieces']))
        return tqdm.write(f"  t={text['t']:.2f} | {line[:160]}")
    back = f'\x1b[{len(screen(frames[:-1], steps))}F' if len(frames) > 1 else ''
    lines = [line + '\x1b[K\n' for line in screen(frames, steps)]
    # without wrapping, so that going back by so many lines is right whatever the characters' width
    print(back + '\x1b[?7l' + ''.join(lines) + '\x1b[J\x1b[?7h', end='', flush=True)
    time.sleep(pause)       # small models are faster than eyes

# --------------------------------------------------------------------------------------------------
# files

def make_room(name, file):
    """Before the work: the folder for the file that a setting names, if any. UserError."""
    try:
        os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
    except OSError as e:
        raise UserError(f"{name}={file!r} cannot be written: {e.strerror}") from None
    if os.path.isdir(file):
        raise UserError(f"{name}={file!r} is a folder; name a file in it")


def write(file, template, **parts):
    with open(f'{file}.tmp', 'w', encoding='utf-8') as f:
        f.write(Template(template).substitute(parts))
    os.replace(f'{file}.tmp', file)


def write_page(file, frames, facts):
    """One HTML file that needs nothing else: a slider over the frames, the facts (dict) beside."""
    frames = [frames[k] for k in moments(len(frames) - 1, MOMENTS)]
    last, data, curve = frames[-1], [], ''
    for k, frame in enumerate(frames):
        texts, same = [], []
        for i, text in enumerate(frame['texts']):
            sure = ''.join(str(level(p)) for p in text['p'])
            texts.append((text['t'], text['pieces'], sure))
            same += agree([frame, last], i)
        data.append((frame['step'], texts))
        curve += f"{100 * k / max(1, len(frames) - 1):.1f},{40 - 40 * np.mean(same or 1):.1f} "
    likely = [p for text in last['texts'] for p in text['p']]
    facts = facts | {'mean probability of a token': f"{np.mean(likely or 0):.3f}"}
    articles = rows = ''
    for i, text in enumerate(last['texts']):
        shown = html.escape(''.join(text['pieces']))
        articles += f'<article><h2>text {i} <small></small></h2><p>{shown}</p></article>\n'
    for name, value in facts.items():
        rows += f'<tr><th>{html.escape(name)}<td>{html.escape(str(value))}\n'
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    write(file, PAGE, shades=SHADES, articles=articles, facts=rows, curve=curve, script=SCRIPT,
          last=len(frames) - 1, digest=base64.b64encode(digest).decode(),
          data=json.dumps(data).replace('<', '\\u003c'))        # no text closes the element


def draw_text(text, y, width, most):
    """A text from height y on, at most so many lines -> SVG, its number of lines."""
    drawn, lines = '', lay_out(text['pieces'], map(level, text['p']), width)[:most]
    for i, line in enumerate(lines):
        drawn += f'<text x="16" y="{y + 22 * i}">'
        for part, mark in line:
            drawn += f'<tspan class="q{mark}">{html.escape(part)}</tspan>'
        drawn += '</text>'
    return drawn, len(lines)


def write_svg(file, frames, each=0.25, rest=3, width=72, most=12):
    """
    A picture for an <img> that comes out of the noise again and again, each seconds a frame, then a
    rest: the first texts, as many as fit into most lines of width characters.
    """
    frames = [frames[k] for k in moments(len(frames) - 1, MOMENTS // 2)]
    total, groups = each * len(frames) + rest, ''
    room = []               # lines that each text has at the end: all stay where they are
    for text in frames[-1]['texts']:
        lines = draw_text(text, 0, width, most)[1]
        if sum(room) + lines <= most:
            room.append(lines)
    for k, frame in enumerate(frames):
        y, done = 66, 100 * (k + 1) / len(frames)
        drawn = f'<rect width="{done:.1f}%" height="3" fill="var(--mark)"/>'
        drawn += f'<text x="16" y="32">t = {frame["texts"][0]["t"]:.2f}</text>'
        for text, lines in zip(frame['texts'], room):
            drawn += draw_text(text, y, width, lines)[0]
            y += 22 * lines + 8
        kind = 'last' if k == len(frames) - 1 else 'one'
        # all of them began in the past, each so that its turn comes at k * each
        groups += f'<g class="{kind}" style="animation-delay:{k * each - total}s">{drawn}</g>\n'
    write(file, SVG, shades=SHADES, groups=groups, width=round(9.1 * width) + 32, height=y - 8,
          total=total, one=f"{100 * each / total:.3f}", last=f"{100 * (each + rest) / total:.3f}")

# --------------------------------------------------------------------------------------------------
# templates. How sure the model is shows in weight, slant and underline, too: not in colour alone

SHADES = """
:root { --paper: #fcfbf8; --ink: #1b1a18; --grey: #66635c; --line: #d9d5cb; --hot: #a8410e;
        --faint: #7d776c; --mark: #2b62b0; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #f1eee7; --grey: #a19c91;
        --line: #3a3731; --hot: #f09a5f; --faint: #8f897d; --mark: #7fb0f5 } }
.q3 { color: var(--ink); fill: var(--ink); font-weight: 600 }
.q2 { color: var(--ink); fill: var(--ink) }
.q1 { color: var(--hot); fill: var(--hot); text-decoration: underline dotted 1px }
.q0 { color: var(--faint); fill: var(--faint); font-style: italic }
"""

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" role="img">
<title>Text coming out of noise</title>
<style>$shades
text { font: 15px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
       white-space: pre; fill: var(--grey) }
g { visibility: hidden; animation: one ${total}s step-end infinite }
.last { visibility: visible; animation-name: last }
@keyframes one { 0% { visibility: visible } $one%, 100% { visibility: hidden } }
@keyframes last { 0% { visibility: visible } $last%, 100% { visibility: hidden } }
@media (prefers-reduced-motion: reduce) { g { animation: none } }
</style>
<rect width="100%" height="100%" fill="var(--paper)"/>
$groups</svg>
"""

SCRIPT = """
const frames = JSON.parse(document.querySelector('#frames').textContent), last = frames.length - 1
const [play, at, when, cursor] = document.querySelectorAll('#play, #at, #when, #cursor')
const articles = document.querySelectorAll('article')
let timer = 0

function show(k) {
  const [step, texts] = frames[k]
  at.value = document.body.dataset.moment = k
  when.textContent = 'step ' + step + ' of ' + frames[last][0]
  at.setAttribute('aria-valuetext', when.textContent)
  cursor.setAttribute('transform', 'translate(' + 100 * k / Math.max(1, last) + ')')
  texts.forEach(([t, pieces, sure], i) => {
    const [small, p] = articles[i].querySelectorAll('small, p')
    small.textContent = 't = ' + t.toFixed(2)
    p.replaceChildren()
    pieces.forEach((piece, j) => {
      if (!j || sure[j] !== sure[j - 1]) {      // a span for each stretch of one shade
        p.append(document.createElement('span'))
        p.lastChild.className = 'q' + sure[j]
      }
      p.lastChild.append(piece)                 // as text, whatever it holds
    })
    p.style.minHeight = p.offsetHeight + 'px'   // what is below stays where it is
  })
}
function stop() { clearInterval(timer); timer = 0; play.textContent = 'Play' }
function start() {
  if (+at.value === last) show(0)
  play.textContent = 'Pause'
  timer = setInterval(() => { +at.value < last ? show(+at.value + 1) : stop() }, 150)
}
play.onclick = () => timer ? stop() : start()
at.oninput = () => { stop(); show(+at.value) }
window.onresize = () => articles.forEach(a => a.querySelector('p').style.minHeight = '')
show(last)
if (location.hash) show(Math.min(last, +location.hash.slice(1) || 0))   // #12 opens moment 12
else if (!matchMedia('(prefers-reduced-motion: reduce)').matches) start()
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-$digest'">
<title>Text out of noise</title>
<style>$shades
body { margin: 0 auto; padding: 1.5rem 1rem; max-width: 70rem; background: var(--paper);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.6rem }
h2 { margin: 0; font-size: .85rem }
header p { margin: .25rem 0 1rem; max-width: 46rem }
header p, h2, th, small, #when { color: var(--grey); font-weight: 400 }
nav { position: sticky; top: 0; display: flex; flex-wrap: wrap; align-items: center;
      gap: .25rem .75rem; padding: .75rem 0; background: var(--paper);
      border-bottom: 1px solid var(--line) }
button { font: inherit; min-width: 5.5rem; min-height: 2.75rem; border: 0; border-radius: .5rem;
         color: var(--paper); background: var(--mark); cursor: pointer }
input { flex: 1 1 12rem; min-width: 8rem; height: 2.75rem; accent-color: var(--mark) }
main { display: grid; grid-template-columns: minmax(0, 1fr) 19rem; gap: 1rem 2.5rem;
       margin-top: 1.25rem }
@media (max-width: 46rem) { main { grid-template-columns: minmax(0, 1fr) } }
article p, aside p { margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
       font: 1rem/1.6 ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
svg { width: 100%; height: 5rem; overflow: visible; fill: none; stroke: var(--mark) }
svg * { vector-effect: non-scaling-stroke }
table { border-collapse: collapse; width: 100%; margin-top: 1rem; font-size: .9rem }
th { text-align: left; width: 55% }
th, td { border-bottom: 1px solid var(--line); padding: .25rem 1rem .25rem 0;
         overflow-wrap: anywhere }
</style>
<header><h1>Text out of noise</h1>
<p>At t = 0 there is only noise, at t = 1 there is text. All tokens of a text change together until
they settle. Here is what the model would read at each moment.</p></header>
<nav><button id="play">Play</button>
<input id="at" type="range" min="0" max="$last" value="$last" aria-label="from noise to text">
<span id="when"></span></nav>
<main><section aria-label="texts">
$articles</section><aside>
<p aria-label="how sure the model is of a token"><span class="q3">sure</span>
<span class="q2">likely</span> <span class="q1">unsure</span> <span class="q0">a guess</span></p>
<svg viewBox="0 0 100 40" preserveAspectRatio="none" aria-hidden="true">
<polyline points="$curve" stroke-width="2"/><path id="cursor" d="M0 0V40"/></svg>
<small>share of the tokens that are as at the end</small>
<table>
$facts</table></aside></main>
<script type="application/json" id="frames">$data</script>
<script>$script</script>
</html>
"""
