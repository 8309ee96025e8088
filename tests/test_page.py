"""
The picture: frames and their tokens, the terminal, the page in a real browser (Debian's chromium;
skipped without one), the SVG.
    python -m pytest -q tests/test_page.py
"""
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from conftest import ROOT
from transformers import AutoTokenizer

from configurator import UserError
from model import ELF, ELFConfig
from parts import page
from parts.data import printable
from parts.page import (lay_out, make_frame, moments, styled, token_texts, write_page,
                        write_svg)

T5 = os.path.join(os.path.dirname(ROOT), 'shared', 'data', 't5_tokenizer')

HOSTILE = ['<script>document.title = "owned"</script>', '</script><script>alert(1)</script>',
           '<img src="http://evil.test/x" onerror="document.title = 1">', '</p><b>', '&amp;', '$x',
           '<!--', ']]>', '\\u003c', '\x1b[31m', '\n', '\u2028', 'é', ' the', ' of', '"', "'"]


@pytest.fixture(scope='session')
def model(tmp_path_factory):
    """The folder of a model that was never trained, whose every other token is markup."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp('model')
    vocab = {token: i for i, token in enumerate(['<pad>', '</s>', '<unk>', *HOSTILE])}
    words = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='</s>',
                            unk_token='<unk>', clean_up_tokenization_spaces=False
                            ).save_pretrained(folder / 'tokenizer')
    torch.manual_seed(0)
    c = ELFConfig(n_layer=1, n_embd=16, n_head=2, latent_dim=8, bottleneck=4, max_length=16,
                  vocab_size=len(vocab), tokenizer=str(folder / 'tokenizer'), encoder='none')
    net = ELF(c)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.3)
    torch.nn.init.normal_(net.unembed.weight, std=3.0)
    net.unembed.bias.data[:3] = -100.0      # no pad, EOS, unk
    net.unembed.bias.data[3:6] = 3.0        # more of what runs and loads
    torch.save(dict(model=net.state_dict(), model_args=asdict(c)), folder / 'ckpt.pt')
    return folder


@pytest.fixture
def sampled(run, model, tmp_path):
    """sampled(*args) -> the texts of samples.jsonl; what was printed is left in sampled.out."""
    def sampled(*args):
        sampled.out = run('sample.py', f'--init_from={model}', f'--out_dir={tmp_path}',
                          '--num_samples=10', '--steps=30', '--device=cpu', '--dtype=float32',
                          *args)
        lines = (tmp_path / 'samples.jsonl').read_text(encoding='utf-8').split('\n')
        return [json.loads(line)['generated'] for line in lines if line]
    return sampled


def frames_of(*texts, **task):
    """Frames of one text; each word a token with its space, all of probability 0.95."""
    frames = []
    for step, text in enumerate(texts):
        tokens = re.findall(r'\S+ ?', text)
        row = dict(task, t=step / max(1, len(texts) - 1), tokens=tokens, p=[0.95] * len(tokens),
                   right=text == task.get('target'))
        frames.append(dict(step=step, texts=[row]))
    return frames

# --------------------------------------------------------------------------------------------------
# frames

def test_moments_are_spread_and_hold_the_end():
    assert moments(64, 0) == [] and moments(64, 1) == [64] and moments(64, 3) == [0, 32, 64]
    assert moments(4, 48) == [0, 1, 2, 3, 4] and len(moments(64, 48)) == 48


def test_tokens_join_to_the_text():
    def decode(ids, **kwargs):                  # as T5 does: no space in front of the first word
        return ' '.join(words[i] for i in ids if words[i]).replace(' ##', '')
    words = ['', 'the', 'house', '##s', '.']
    tokenizer = SimpleNamespace(decode=decode, all_special_ids=[0])
    assert token_texts([1, 0, 2, 3, 0, 1], tokenizer) == ['the', '', ' house', 's', '', ' the']
    assert token_texts([], tokenizer) == []
    rows = [([1, 2], [0.1, 0.2]), ([1], [0.3])]
    tasks = [dict(input='la', target='the house'), {}]
    frame = make_frame(3, torch.tensor([0.5, 0.25]), rows, tasks, tokenizer)
    assert frame == dict(step=3, texts=[
        dict(input='la', target='the house', t=0.5, tokens=['the', ' house'], p=[0.1, 0.2],
             right=True), dict(t=0.25, tokens=['the'], p=[0.3], right=False)])


def test_characters_of_several_tokens():
    def decode(ids, **kwargs):
        return bytes(ids).decode(errors='replace')
    tokenizer = SimpleNamespace(decode=decode, all_special_ids=[])
    assert token_texts([*'a “é'.encode()], tokenizer) == ['a', ' ', '', '', '“', '', 'é']
    assert token_texts([*'aé'.encode()][:2], tokenizer) == ['a', '\ufffd']       # cut short
    broken = [97, 0x80, 98]
    assert ''.join(token_texts(broken, tokenizer)) == 'a\ufffdb'


@pytest.mark.skipif(not os.path.isdir(T5), reason=f'needs {T5}')
@pytest.mark.parametrize('ids', [[3, 8] * 510, [8, *[3] * 1018, 8], [8, *[0] * 1018, 8]])
def test_a_thousand_tokens_of_t5_in_no_time(ids):
    """A lone "▁", which adds nothing at first, and padding: linear, however long the run."""
    tokenizer, start = AutoTokenizer.from_pretrained(T5), time.perf_counter()
    texts = token_texts(ids, tokenizer)
    assert ''.join(texts) == tokenizer.decode(ids, skip_special_tokens=True) and len(texts) == 1020
    took = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(100):
        tokenizer.decode(ids)
    assert took < time.perf_counter() - start           # decoding each of 1,020 prefixes: not


def test_lines_break_at_spaces():
    lines = lay_out([('ab ', 1), ('cd ', 1), ('efghijk', 2), ('\t\x1b', 2)], 6)
    assert lines == [[('ab cd ', 1)], [('efghij', 2)], [('k  ', 2)]]
    lines = lay_out([('AB:\n', 1), ('cd ef\n', 2), ('\ngh', 2)], 5)
    assert lines == [[('AB:', 1)], [('cd ef', 2)], [('', 2)], [('gh', 2)]]
    assert lay_out([], 6) == [[]]


def test_the_condition_stands_before_its_text_and_a_tick_behind_what_is_right():
    text, = frames_of('forty two', input='42', target='forty two')[0]['texts']
    assert styled(text) == [('42 → ', 'given'), ('forty ', 'q3'), ('two', 'q3'), (' ✓', 'right')]
    text, = frames_of('forty three', input='x' * 41, target='forty two')[0]['texts']
    assert styled(text)[0] == ('x' * 39 + '… → ', 'given') and styled(text)[-1] == ('three', 'q3')

# --------------------------------------------------------------------------------------------------
# in a terminal

class Screen:
    """What a terminal shows, as far as sample.py goes: text, colours as marks, and a cursor."""
    def __init__(self):
        self.lines, self.row, self.drawings, self.grey = [''], 0, 0, []

    def feed(self, output):
        for part in re.split(r'(\x1b\[[?\d]*[A-Za-z]|\n)', output):
            code = part[-1:] if part.startswith('\x1b') else ''
            if code == 'F':
                self.row -= int(part[2:-1])
                assert self.row >= 0
                self.fresh = True
            elif code == 'J':
                del self.lines[self.row + 1:]
            elif part == '\x1b[?7l':
                self.drawings += 1
                self.grey.append(0)
            elif part == '\x1b[90m':
                self.grey[-1] += 1
            elif part == '\x1b[K' or code in 'hm' and code:
                pass
            elif part == '\n':
                self.row += 1
                self.lines += [''] * (self.row + 1 - len(self.lines))
                self.fresh = True
            elif part:
                self.lines[self.row] = ('' if self.fresh else self.lines[self.row]) + part
                self.fresh = False

    fresh = True        # what comes next overwrites the line


def test_the_terminal_is_redrawn_in_place(sampled, monkeypatch):
    terminal = SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(page, 'sys', terminal)
    monkeypatch.setattr(shutil, 'get_terminal_size', lambda: (2000, 400))
    texts, screen = sampled('--trace=9'), Screen()
    screen.feed(sampled.out)
    bar = next(i for i, line in enumerate(screen.lines) if line.startswith('t='))
    assert screen.lines[bar].startswith('t=1.00') and screen.lines[bar].endswith('step 30 of 30')
    assert screen.drawings == 9 and sum(line.startswith('t=') for line in screen.lines) == 1
    want = ['  ' + printable(line) for text in texts[:8]
            for line in text.removesuffix('\n').split('\n')]
    assert screen.lines[bar + 1:bar + 1 + len(want)] == want
    assert screen.lines[bar + 1 + len(want)].startswith('10 of 10 texts in ')
    assert all(screen.grey[:3])                             # the model is not sure at first
    assert '\x1b[31m' not in sampled.out                    # no text moves the cursor


def test_a_screen_smaller_than_the_texts(monkeypatch):
    monkeypatch.setattr(shutil, 'get_terminal_size', lambda: (20, 6))
    frame, = frames_of('some words of a text ' * 20)
    lines = page.screen(frame | dict(texts=frame['texts'] * 4), 9)
    assert len(lines) == 4 and '\x1b' not in ''.join(lines[1:])         # sure
    frame['texts'] = [dict(input='3', t=0, tokens=['a ', 'b'], p=[0.9, 0.5], right=False)]
    assert page.screen(frame, 9)[1] == '  3 → a \x1b[90mb\x1b[0m'


def test_plain_lines_where_there_is_no_terminal(sampled):
    assert sampled('--trace=5') and sampled.out.count('  t=') == 5 and '\x1b' not in sampled.out

# --------------------------------------------------------------------------------------------------
# the page

class Page(HTMLParser):
    """What a page holds: the text of each article, the facts, attributes of body, the title."""
    def __init__(self, source):
        super().__init__()
        self.path, self.texts, self.cells, self.body, self.title = [], [], [], {}, ''
        self.button, self.spans, self.inputs, self.verdicts = '', 0, [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        if tag in ('meta', 'input', 'img'):
            return
        self.path.append(tag)
        if tag == 'body':
            self.body = dict(attributes)
        if self.path[-2:] == ['article', 'p']:
            self.texts.append('')
        if tag in ('th', 'td'):
            self.cells.append('')
        self.spans += self.path[-3:] == ['article', 'p', 'span']
        if tag == 'footer':
            given = dict(attributes)
            self.verdicts.append((given.get('class', ''), given['style'].split()[-1][:-1], ''))

    def handle_endtag(self, tag):
        while tag in self.path and self.path.pop() != tag:
            pass

    def handle_data(self, data):
        if 'article' in self.path and 'p' in self.path:
            self.texts[-1] += data
        if self.path and self.path[-1] in ('th', 'td'):
            self.cells[-1] += data.strip()
        if self.path and self.path[-1] == 'blockquote':
            self.inputs.append(data)
        if self.path and self.path[-1] == 'footer':
            self.verdicts[-1] = *self.verdicts[-1][:2], data
        if self.path and self.path[-1] == 'title':
            self.title += data
        if self.path and self.path[-1] == 'button':
            self.button += data


@pytest.fixture(scope='module')
def requests():
    """A proxy that answers nothing -> its address, the first lines of the requests it has got."""
    lines, server = [], socket.create_server(('127.0.0.1', 0))

    def listen():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                lines.append(connection.recv(1000).decode(errors='replace').split('\r\n')[0])
    threading.Thread(target=listen, daemon=True).start()
    yield '127.0.0.1:%d' % server.getsockname()[1], lines
    server.close()


@pytest.fixture
def browse(tmp_path, requests):
    """browse(file, milliseconds, hash) -> the Page that a real browser has made of it by then."""
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip("no chromium here, the page is tested in no browser: apt-get install chromium")
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--disable-sync',
             f'--proxy-server={requests[0]}']

    def browse(file, milliseconds=20000, hash=''):
        profile = tmp_path / 'profile'
        shutil.rmtree(profile, ignore_errors=True)
        return Page(subprocess.run(
            [chromium, *flags, f'--user-data-dir={profile}', '--dump-dom',
             f'--virtual-time-budget={milliseconds}', f'file://{file}{hash}'], timeout=120,
            check=True, capture_output=True, text=True, encoding='utf-8').stdout)
    return browse


def test_the_page_plays_to_the_end(sampled, browse, requests, model, tmp_path):
    """No text runs, or loads anything; the last frame is what samples.jsonl holds."""
    texts = sampled(f'--html={tmp_path}/new/page.html', '--seed=3')
    file = tmp_path / 'new' / 'page.html'
    assert any('<script>' in text for text in texts) and any('<img' in text for text in texts)
    end = browse(file)
    assert end.texts == texts[:8] and end.spans > 8     # drawn by the script
    assert end.title == 'Text out of noise' and end.body == {'data-moment': '30'}
    assert end.button == 'Play'                         # it has stopped
    facts = dict(zip(end.cells[::2], end.cells[1::2]))
    assert facts['seed'] == '3' and facts['steps'] == '30' and facts['model'] == str(model)
    on_the_way = browse(file, 1200)
    assert 0 < int(on_the_way.body['data-moment']) < 30 and on_the_way.button == 'Pause'
    chosen = browse(file, hash='#2')
    assert chosen.body == {'data-moment': '2'} and chosen.texts != end.texts
    assert not [line for line in requests[1] if 'evil.test' in line]
    (tmp_path / 'bad.html').write_text('<img src="http://evil.test/x">')
    browse(tmp_path / 'bad.html')                       # what a page that lets go of one would do
    assert [line for line in requests[1] if 'evil.test' in line]


def test_the_page_holds_the_frames_and_names_no_other_file(sampled, tmp_path):
    texts = sampled(f'--html={tmp_path}/page.html', '--batch_size=3', '--trace=2')
    source = (tmp_path / 'page.html').read_text(encoding='utf-8')
    data = re.search(r'json">(.*)</script>\n<script>', source)[1]
    rest = source.replace(data, '').replace('@media', '')
    assert '<' not in data and not re.search(r'<(img|link|iframe|object)|src=|href=|url\(|@', rest)
    frames = json.loads(data)['frames']
    assert [frame['step'] for frame in frames] == [0, 30]
    assert [''.join(text['tokens']) for text in frames[-1]['texts']] == texts[:3]   # first batch
    assert sampled.out.count('  t=') == 2


def test_the_page_of_a_task(browse, tmp_path):
    """Each text beside its input, with what it should have been; a target may hold markup."""
    frames = frames_of('forty', 'forty two', input='42', target='forty two')
    for frame, said in zip(frames, ('six', 'six')):
        frame['texts'] += frames_of(said, input='7 <b>', target='</p>@data@')[0]['texts']
    write_page(tmp_path / 'page.html', frames, {})
    end = browse(tmp_path / 'page.html', hash='#1')
    assert end.texts == ['forty two', 'six'] and end.inputs == ['42', '7 <b>']
    assert end.verdicts == [('right', 'visible', 'right'), ('', 'visible', '</p>@data@')]
    start = browse(tmp_path / 'page.html', hash='#0')
    assert start.texts == ['forty', 'six']
    assert [seen for _, seen, _ in start.verdicts] == ['hidden', 'hidden']


def test_texts_of_no_token_and_one_frame(browse, tmp_path):
    frames = [dict(step=1, texts=[dict(t=1.0, tokens=[], p=[], right=False)])]
    write_svg(tmp_path / 'a.svg', frames)
    ElementTree.parse(tmp_path / 'a.svg')
    write_page(tmp_path / 'page.html', frames, {})
    assert browse(tmp_path / 'page.html').texts == ['']

# --------------------------------------------------------------------------------------------------
# the SVG

def test_the_svg_holds_the_text_and_nothing_else(sampled, tmp_path):
    texts = sampled(f'--svg={tmp_path}/a/demo.svg')
    file = tmp_path / 'a' / 'demo.svg'
    assert file.stat().st_size < 200_000
    root = ElementTree.parse(file).getroot()
    space = '{http://www.w3.org/2000/svg}'
    kinds = {element.tag.removeprefix(space) for element in root.iter()}
    assert kinds == {'svg', 'title', 'style', 'rect', 'g', 'text', 'tspan'}
    groups = root.findall(space + 'g')
    assert len(groups) == 24
    first, last = [''.join(g.itertext()) for g in (groups[0], groups[-1])]
    assert last.startswith('t = 1.00' + printable(texts[0])) and not first.startswith('t = 1')
    delays = [float(re.search(r'-[\d.]+', g.get('style'))[0]) for g in groups]
    assert delays == pytest.approx([0.25 * k - 9 for k in range(24)])


@pytest.mark.parametrize('name', ['html', 'svg'])
def test_files_that_cannot_be_written(name, sampled, tmp_path):
    (tmp_path / 'a').write_text('')
    for file in (tmp_path / 'a' / 'b', tmp_path):
        with pytest.raises(UserError, match=f'{name}=.* cannot be written'):
            sampled(f'--{name}={file}')
    assert not (tmp_path / 'samples.jsonl').exists()
