"""
Hub ids as a user types them, with the real clients against a hub on this machine: online, from the cache, and refused.
    python -m pytest -q tests/test_hub.py
"""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hub import Hub
from test_eval import judge  # noqa: F401, a fixture

import convert
from model import ELF, ELFConfig

# Runs scripts: a line of stdin is [arguments, file for stdout, file for stderr], back comes the exit code. Each run is a fork of
# a process that has imported torch and the clients, which takes seconds; the clients' waits between retries are skipped.
WORKER = '''
import json, os, runpy, sys, time
import datasets, eval, model, prepare, sample
from transformers import AutoTokenizer, GPT2LMHeadModel, T5EncoderModel
time.sleep = lambda seconds: None
for line in sys.stdin:
    sys.argv, *files = json.loads(line)
    if not os.fork():
        for fd, file in zip((1, 2), files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except BaseException as e:
            code = e.code if isinstance(e, SystemExit) else 1
            if code == 1:
                sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(code)      # a second faster than a tidy end
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
'''
SIZES = dict(n_layer=1, n_embd=16, n_head=2, vocab_size=30, latent_dim=16, bottleneck=4, max_length=13, latent_std=1.0, encoder='org/t5', tokenizer='org/t5')


@pytest.fixture(scope='module')
def hub(bins, judge, tmp_path_factory):
    """A hub with checkpoints, ids, a T5 and a GPT-2; each once more gated, with an expired token, and with downloads that break off."""
    from datasets import Dataset
    at = tmp_path_factory.mktemp('hub')
    model = ELF(ELFConfig(**SIZES))
    for folder, steps in (('elf', (2, 3)), ('runs/a', (7000,)), ('runs/b', (9,))):
        for step in steps:
            convert.write_official(str(at / folder), model.to_official(), model.to_official(), step, 0, model.config)
    for part in ('tokenizer', 'encoder'):
        shutil.copytree(bins / 'tiny' / part, at / 't5', dirs_exist_ok=True)
    shutil.copytree(judge, at / 'gpt2')
    Dataset.from_dict(dict(input_ids=[[4 + i % 20, 5, 6, 1] for i in range(60)])).save_to_disk(at / 'ids')
    for folder in ('elf', 'runs/a', 't5', 'gpt2', 'ids'):
        (at / folder / 'pytorch_model.bin').write_bytes(b'not needed' * 1000)
    for split, first in (('train', 4), ('validation', 14)):
        Dataset.from_dict(dict(condition_input_ids=[[first, 1]] * 8, input_ids=[[first + 1, 1]] * 8)).save_to_disk(at / f'xsum_{split}_t5')
    kinds = dict(elf='model', runs='model', t5='model', gpt2='model', ids='dataset')
    hub = Hub({(kind, f'org/{state}{n}'): str(at / n) for n, kind in kinds.items() for state in ('', 'gated-', 'token-', 'cut-')})
    hub.repos |= {('dataset', f'embedded-language-flows/xsum_{split}_t5'): str(at / f'xsum_{split}_t5') for split in ('train', 'validation')}
    codes = {'gated-': 'GatedRepo', 'token-': 'Invalid credentials in Authorization header'}
    hub.refused = {f'org/{state}{n}': code for n in kinds for state, code in codes.items()}
    hub.cut |= {f'org/cut-{f}' for f in ('elf/checkpoint_3', 't5/model.safetensors', 't5/tokenizer.json', 'gpt2/model.safetensors', 'ids/data-00000-of-00001.arrow')}
    return hub


@pytest.fixture(scope='module')
def ask(hub, tmp_path_factory):
    """ask(state, script, *args) -> exit code, stdout, stderr; the state: 'online', 'offline' (HF_HUB_OFFLINE=1) or 'down' (nobody answers)."""
    at = tmp_path_factory.mktemp('home')
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    env |= dict(HF_HOME=str(at), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', OMP_NUM_THREADS='1', no_proxy='127.0.0.1')
    env['HF_ENDPOINT'] = hub.url
    start = lambda **extra: subprocess.Popen([sys.executable, '-c', WORKER], cwd=ROOT, env=env | extra, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    online, offline = start(), start(HF_HUB_OFFLINE='1')

    def ask(state, *args):
        files, worker = [str(at / 'stdout'), str(at / 'stderr')], offline if state == 'offline' else online
        if state == 'down':
            hub.down()
        print(json.dumps([list(map(str, args)), *files]), file=worker.stdin, flush=True)
        code = int(worker.stdout.readline())
        if state == 'down':
            hub.up()
        return code, *(open(f, encoding='utf-8').read() for f in files)
    ask.home = at
    yield ask
    for worker in (online, offline):
        worker.kill()
        worker.communicate()


JOBS = {        # as typed; {n} in the ids is the kind of trouble, {at} an empty folder
    'sample.py': 'sample.py --init_from=org/{n}elf --num_samples=1 --steps=2 --device=cpu --out_dir={at}/out',
    'subfolder': 'sample.py --init_from=org/{n}runs/a/checkpoint_7000 --num_samples=1 --steps=2 --device=cpu --out_dir={at}/out',
    'prepare.py': 'prepare.py --dataset=org/{n}ids --tokenizer=org/{n}t5 --encoder=org/{n}t5 --data_dir={at}/data --max_length=13',
    'eval.py': 'eval.py --samples={at}/samples.jsonl --judge=org/{n}gpt2 --device=cpu --out_dir={at}/out',
}
REFUSED = [JOBS['sample.py'], JOBS['prepare.py'], JOBS['eval.py'],
           'prepare.py --tokenizer=org/{n}t5 --name=ids --data_dir={at}/data', 'prepare.py --encoder=org/{n}t5 --name=ids --data_dir={at}/data']


@pytest.mark.parametrize('job', JOBS)
def test_online_then_from_the_cache(job, hub, ask, tmp_path):
    (tmp_path / 'samples.jsonl').write_text('{"generated": "hello he said"}\n{"generated": "so"}\n')
    before = hub.got.copy()
    for state in ('online', 'offline', 'down'):
        code, out, err = ask(state, *JOBS[job].format(n='', at=tmp_path).split())
        assert code == 0, (state, err)
        got = hub.got - before if state == 'online' else got
        assert hub.got - before == got and max(got.values()) == 1, state        # each file once, and not again
    assert not any('pytorch_model.bin' in f for f in got)
    want = {'sample.py': {'org/elf/checkpoint_3', 'org/elf/config.yml'}, 'subfolder': {'org/runs/a/checkpoint_7000', 'org/runs/a/config.yml'}}
    assert {f for f in got if f.startswith(('org/elf', 'org/runs'))} == want.get(job, set())


def test_a_set_by_name(ask, tmp_path):
    """xsum: two repositories, one of them the validation split; what the command line says goes before what the name stands for."""
    code, _, err = ask('online', 'prepare.py', '--dataset=xsum', '--tokenizer=org/t5', '--encoder=org/t5', f'--data_dir={tmp_path}')
    meta = json.loads((tmp_path / 'xsum' / 'meta.json').read_text()) if code == 0 else err
    assert (meta['tokenizer'], meta['conditional'], meta['rows']) == ('org/t5', True, dict(train=8, val=8)), err
    assert [np.fromfile(tmp_path / 'xsum' / f'{split}.bin', np.uint16)[:4].tolist() for split in ('train', 'val')] == [[4, 1, 5, 1], [14, 1, 15, 1]]


@pytest.mark.parametrize('state, n, says', [
    ('online', 'missing-', 'check the spelling'), ('online', 'gated-', 'accept the terms'), ('online', 'token-', 'hf auth logout'), ('online', 'cut-', 'run again'),
    ('offline', 'never-', 'HF_HUB_OFFLINE is set'), ('down', 'never-', 'connect once')])
def test_refused(state, n, says, hub, ask, tmp_path):
    (tmp_path / 'samples.jsonl').write_text('{"generated": "hello he said"}\n')
    for job in REFUSED:
        code, out, err = ask(state, *job.format(n=n, at=tmp_path).split())
        line = err.splitlines()[-1] if err else ''
        assert code == 1 and line.startswith('error: ') and f'org/{n}' in line and says in line, err
        # the client may tell of each new try
        assert err == line + '\n' or 'Traceback' not in err and ('Retrying in' in err or 'Trying to resume' in err)
    # nothing half-written, neither here nor in the cache
    assert sorted(f for _, _, files in os.walk(tmp_path) for f in files) == ['samples.jsonl'] and not list(tmp_path.glob('data/*'))
    assert not list(ask.home.rglob('*.incomplete'))
    if n == 'cut-':
        hub.cut.clear()
        for job in REFUSED:
            assert ask(state, *job.format(n=n, at=tmp_path).split())[0] == 0, job
