"""
A tiny prepared dataset, and a way to run a script in this process as a user would:
run('train.py', '--max_iters=2').
"""
import json
import os
import runpy
import signal
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault('HF_HUB_OFFLINE', '1')        # tests never ask the network

from parts.data import FILES, sha256, write_split  # noqa: E402, found by the path above


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help="also the tests of minutes")


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: minutes; run with --slow')


def pytest_collection_modifyitems(config, items):
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow; run with --slow'))


def write_tokenizer(folder):
    """A tokenizer of letters: <pad>, </s>, <unk>, a space, a to z."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    symbols = ['<pad>', '</s>', '<unk>', ' ', *'abcdefghijklmnopqrstuvwxyz']
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    letters = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    letters.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token='<pad>', eos_token='</s>',
                            unk_token='<unk>').save_pretrained(folder)


def write_encoder(folder):
    """A random T5 encoder of one layer, 16 wide."""
    from transformers import T5Config, T5EncoderModel
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)


@pytest.fixture(scope='session')
def bins(tmp_path_factory):
    """data_dir with the set 'tiny': 96 + 24 rows of twelve letters, a to d, and an EOS."""
    data_dir = tmp_path_factory.mktemp('data')
    folder = data_dir / 'tiny'
    write_tokenizer(folder / 'tokenizer')
    write_encoder(folder / 'encoder')
    meta = dict(format=1, dtype='uint16', tokenizer='tokenizer', encoder='encoder',
                vocab_size=30, pad_id=0, eos_id=1, latent_dim=16, latent_mean=0.0, latent_std=1.0,
                max_length=13, rows={}, tokens={}, source='tests')
    rng = np.random.default_rng(0)
    for split, n in (('train', 96), ('val', 24)):
        rows = [([], [*rng.integers(4, 8, 12), 1]) for _ in range(n)]
        n, tokens, _ = write_split(meta | dict(dir=folder), split, rows)
        meta['rows'][split], meta['tokens'][split] = n, tokens
    meta['checksums'] = {name: sha256(folder / name) for name in FILES}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return data_dir


@pytest.fixture
def run(monkeypatch, capsys):
    """
    run(script, *args) -> what it printed; the script's globals are left in run.globals. Errors
    come through as exceptions.
    """
    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        streams = sys.stdout, sys.stderr        # configure() replaces them
        capsys.readouterr()
        numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            run.globals = runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            sys.stdout.flush()
            sys.stdout, sys.stderr = streams    # here, before capsys closes them
        return capsys.readouterr().out
    return run


@pytest.fixture
def tiny(bins):
    """Arguments of train.py for a run of seconds."""
    return [f'--data_dir={bins}', '--dataset=tiny', '--max_length=13', '--batch_size=8',
            '--gradient_accumulation_steps=1', '--n_layer=2', '--n_embd=32', '--n_head=2',
            '--bottleneck=8', '--noise_scale=0.35', '--decoder_noise_scale=0.9', '--steps=4',
            '--learning_rate=0.01', '--warmup_iters=2', '--max_iters=4', '--ema_warmup=true',
            '--log_interval=1', '--eval_interval=100', '--eval_iters=5', '--save_interval=100',
            '--sample_interval=0', '--device=cpu', '--dtype=float32', '--compile=false']


# --------------------------------------------------------------------------------------------------
# processes, and what they leave behind

def command(script, *args, ranks=0, restarts=0):
    """The words that start a script as a process, under torchrun with that many ranks if any."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}',
                f'--max-restarts={restarts}']
    return [sys.executable, *(torchrun if ranks else []), os.path.join(ROOT, script),
            *map(str, args)]


def metrics(out_dir):
    """
    Rows of metrics.jsonl without their times, in order. A run that was resumed writes again what
    came after its checkpoint: the last row of its kind counts.
    """
    rows = {}
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        for line in filter(str.strip, f):
            row = json.loads(line)
            for name in ('ms', 'tokens_per_s'):
                row.pop(name, None)
            rows[row['iter'], *sorted(row)] = row
    return [rows[key] for key in sorted(rows)]


def same(a, b):
    """Whether two dicts of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def state(out_dir, name='ckpt.pt'):
    return torch.load(os.path.join(out_dir, name), weights_only=True)


def same_state(a, b):
    """Whether the checkpoints in two folders hold the same weights, average, momenta and step."""
    a, b = state(a), state(b)
    momenta, others = (ckpt['optimizer']['state'] for ckpt in (a, b))
    return (a['iter_num'] == b['iter_num'] and same(a['model'], b['model'])
            and same(a['ema'], b['ema']) and momenta.keys() == others.keys()
            and all(same(momenta[i], others[i]) for i in momenta))
