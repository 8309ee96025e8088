"""
The picture: frames and their tokens, lines in a terminal, the page in a real browser (Debian's
chromium; skipped without one), the SVG made of a page.
    python -m pytest -q tests/test_page.py
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from conftest import ROOT
from tokenizers import decoders
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from configurator import UserError
from model import ELF, ELFConfig
from parts.data import printable
from parts.page import make_frame, moments, token_texts, write_page

sys.path.insert(0, os.path.join(ROOT, 'assets'))
import moving  # noqa: E402, found by the path above

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


def frames_of(*texts):
    """Frames of one text; each word a token with its space, all of probability 0.95."""
    frames = []
    for step, text in enumerate(texts):
        tokens = re.findall(r'\S+ ?', text)
        row = dict(t=step / max(1, len(texts) - 1), tokens=tokens, p=[0.95] * len(tokens))
        frames.append(dict(step=step, texts=[row]))
    return frames


def tokenizer_of(vocab, decoder):
    """A tokenizer of these tokens, the first of which is special."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, vocab[0]))
    words.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=vocab[0], unk_token=vocab[0])

# --------------------------------------------------------------------------------------------------
# frames

def test_moments_are_spread_and_hold_the_end():
    assert moments(64, 0) == [] and moments(64, 1) == [64] and moments(64, 3) == [0, 32, 64]
    assert moments(4, 48) == [0, 1, 2, 3, 4] and len(moments(64, 48)) == 48


def test_tokens_join_to_the_text():
    # as with T5: no space in front of the first word
    tokenizer = tokenizer_of(['<pad>', 'the', 'house', '##s', '.'],
                             decoders.WordPiece(cleanup=False))
    assert token_texts([1, 0, 2, 3, 0, 1], tokenizer) == ['the', '', ' house', 's', '', ' the']
    assert token_texts([], tokenizer) == []
    rows = [([1, 2], [0.1, 0.20004]), ([1], [0.3])]
    frame = make_frame(3, torch.tensor([0.5, 0.25]), rows, tokenizer)
    assert frame == dict(step=3, texts=[dict(t=0.5, tokens=['the', ' house'], p=[0.1, 0.2]),
                                        dict(t=0.25, tokens=['the'], p=[0.3])])


def test_characters_of_several_tokens():
    tokenizer = tokenizer_of(['<pad>', *bytes_to_unicode().values()], decoders.ByteLevel())

    def texts(data):
        ids = [1 + list(bytes_to_unicode()).index(byte) for byte in data]
        return token_texts(ids, tokenizer)
    assert texts('a “é'.encode()) == ['a', ' ', '', '', '“', '', 'é']
    assert texts('aé'.encode()[:2]) == ['a', '\ufffd']          # cut short
    assert ''.join(texts([97, 0x80, 98])) == 'a\ufffdb'


@pytest.mark.skipif(not os.path.isdir(T5), reason=f'needs {T5}')
@pytest.mark.parametrize('ids', [[3, 8] * 510, [8, *[3] * 1018, 8]])
def test_a_thousand_tokens_of_t5_in_no_time(ids):
    """A lone "▁" may add nothing at first: linear, however long the run."""
    tokenizer, start = AutoTokenizer.from_pretrained(T5), time.perf_counter()
    texts = token_texts(ids, tokenizer)
    assert ''.join(texts) == tokenizer.decode(ids, skip_special_tokens=True) and len(texts) == 1020
    took = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(100):
        tokenizer.decode(ids)
    assert took < time.perf_counter() - start           # decoding each of 1,020 prefixes: not

# --------------------------------------------------------------------------------------------------
# in a terminal

def test_a_line_a_moment(sampled, monkeypatch):
    """As wide as the terminal, and no text moves its cursor."""
    monkeypatch.setenv('COLUMNS', '30')
    texts = sampled('--trace=5')
    lines = [line for line in sampled.out.split('\n') if line.startswith('  t=')]
    assert len(lines) == 5 and lines[0].startswith('  t=0.00 | ') and '\x1b' not in sampled.out
    assert lines[-1] == f'  t=1.00 | {printable(texts[0])}'[:30]

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
    frames, others = frames_of('forty', 'forty two'), frames_of('six', 'six')
    for frame, other in zip(frames, others):
        frame['texts'] += other['texts']
    tasks = [dict(input='42', target='forty  two '), dict(input='7 <b>', target='</p>@data@')]
    write_page(tmp_path / 'page.html', frames, tasks, {})
    end = browse(tmp_path / 'page.html', hash='#1')
    assert end.texts == ['forty two', 'six'] and end.inputs == ['42', '7 <b>']
    assert end.verdicts == [('right', 'visible', 'right'), ('', 'visible', '</p>@data@')]
    start = browse(tmp_path / 'page.html', hash='#0')
    assert start.texts == ['forty', 'six']
    assert [seen for _, seen, _ in start.verdicts] == ['hidden', 'hidden']


def test_texts_of_no_token_and_one_frame(browse, tmp_path):
    frames = [dict(step=1, texts=[dict(t=1.0, tokens=[], p=[])])]
    ElementTree.fromstring(moving.draw(frames, [{}]))
    write_page(tmp_path / 'page.html', frames, [{}], {})
    assert browse(tmp_path / 'page.html').texts == ['']


def test_a_page_that_cannot_be_written(sampled, tmp_path):
    (tmp_path / 'a').write_text('')
    with pytest.raises(UserError, match='a/b. cannot be written'):
        sampled(f"--html={tmp_path / 'a' / 'b' / 'page.html'}")
    assert not (tmp_path / 'samples.jsonl').exists()

# --------------------------------------------------------------------------------------------------
# the SVG

def test_lines_break_at_spaces(monkeypatch):
    monkeypatch.setattr(moving, 'WIDTH', 6)
    lines = moving.lay_out([('ab ', 1), ('cd ', 1), ('efghijk', 2), ('\t\x1b', 2)])
    assert lines == [[('ab cd ', 1)], [('efghij', 2)], [('k  ', 2)]]
    lines = moving.lay_out([('AB:\n', 1), ('cd efg\n', 2), ('\ngh', 2)])
    assert lines == [[('AB:', 1)], [('cd efg', 2)], [('', 2)], [('gh', 2)]]
    assert moving.lay_out([]) == [[]]


def test_the_condition_stands_before_its_text_and_a_tick_behind_what_is_right():
    text, task = dict(tokens=['forty ', 'two'], p=[0.95, 0.5]), dict(input='42', target='forty two')
    assert moving.styled(text, task) == [('42 → ', 'given'), ('forty ', 'q3'), ('two', 'q1'),
                                         (' ✓', 'right')]
    assert moving.styled(text, dict(target='forty three')) == [('forty ', 'q3'), ('two', 'q1')]


def test_the_svg_of_a_page_holds_the_text_and_nothing_else(sampled, tmp_path):
    texts = sampled(f'--html={tmp_path}/page.html')
    file = tmp_path / 'demo.svg'
    subprocess.run([sys.executable, f'{ROOT}/assets/moving.py', tmp_path / 'page.html', file],
                   check=True)
    assert file.stat().st_size < 200_000
    root = ElementTree.parse(file).getroot()
    space = '{http://www.w3.org/2000/svg}'
    kinds = {element.tag.removeprefix(space) for element in root.iter()}
    assert kinds == {'svg', 'title', 'style', 'rect', 'g', 'text', 'tspan'}
    groups = root.findall(space + 'g')
    assert len(groups) == 24
    first, last = [''.join(g.itertext()) for g in (groups[0], groups[-1])]
    said = ''.join(ch if ch.isprintable() else ' ' for ch in texts[0].replace('\n', ''))
    assert last.startswith('t = 1.00' + said) and not first.startswith('t = 1')
    delays = [float(re.search(r'-[\d.]+', g.get('style'))[0]) for g in groups]
    assert delays == pytest.approx([0.25 * k - 9 for k in range(24)])
