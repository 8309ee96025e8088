"""A tiny prepared dataset, and a way to run a script in this process as a user would: run('train.py', '--max_iters=2')."""
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


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help="also the tests of minutes")


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: minutes; run with --slow')


def pytest_collection_modifyitems(config, items):
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow; run with --slow'))


@pytest.fixture(scope='session')
def bins(tmp_path_factory):
    """data_dir with the dataset 'tiny': 96 + 24 rows of 12 letters and an EOS, a tokenizer of 30 symbols, a 16-wide random T5."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    data_dir = tmp_path_factory.mktemp('data')
    folder = data_dir / 'tiny'
    folder.mkdir()
    vocab = {s: i for i, s in enumerate(['<pad>', '</s>', '<unk>', ' ', *map(chr, range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', eos_token='</s>', unk_token='<unk>').save_pretrained(folder / 'tokenizer')
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(folder / 'encoder')
    meta = dict(format=1, dtype='uint16', tokenizer='tokenizer', encoder='encoder', vocab_size=30, pad_id=0, eos_id=1, latent_dim=16,
                latent_mean=0.0, latent_std=1.0, max_length=13, rows={}, tokens={}, source='tests')
    rng = np.random.default_rng(0)
    for split, n in (('train', 96), ('val', 24)):
        ids = np.concatenate((rng.integers(4, 8, (n, 12)), np.ones((n, 1))), axis=1).astype(np.uint16)
        ids.tofile(folder / f'{split}.bin')
        np.save(folder / f'{split}.idx.npy', np.repeat(np.arange(n)[:, None] * 13, 2, axis=1).astype(np.int64))
        meta['rows'][split], meta['tokens'][split] = n, ids.size
    (folder / 'meta.json').write_text(json.dumps(meta))
    return data_dir


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *args) -> what it printed; the script's globals are left in run.globals. Errors come through as exceptions."""
    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            run.globals = runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return capsys.readouterr().out
    return run


@pytest.fixture
def tiny(bins):
    """Arguments of train.py for a run of seconds."""
    return [f'--data_dir={bins}', '--dataset=tiny', '--max_length=13', '--batch_size=8', '--gradient_accumulation_steps=1', '--n_layer=2', '--n_embd=32',
            '--n_head=2', '--bottleneck=8', '--noise_scale=0.35', '--decoder_noise_scale=0.9', '--learning_rate=0.01', '--warmup_iters=2', '--max_iters=4', '--steps=4',
            '--eval_interval=100', '--eval_iters=5', '--save_interval=100', '--sample_interval=0', '--log_interval=1', '--device=cpu', '--dtype=float32', '--compile=false', '--ema_warmup=true']
