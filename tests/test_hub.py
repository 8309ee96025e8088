"""
Hub ids as a user types them, with the real clients against a hub on this machine: online, from the
cache, and refused.
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
from test_checkpoint import write_run
from test_eval import judge  # noqa: F401, a fixture

import convert
from model import ELF, ELFConfig

GOLDEN = os.path.join(ROOT, 'tests', 'golden')

# Runs scripts: a line of stdin is [arguments, file for stdout, file for stderr], back comes the
# exit code. Each run is a fork of a process that has imported torch and the clients, which takes
# seconds; the clients' waits between retries are skipped.
WORKER = '''
import json, os, runpy, sys, time
import convert, datasets, eval, model, prepare, sample
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
SIZES = dict(n_layer=1, n_embd=16, n_head=2, vocab_size=30, latent_dim=16, bottleneck=4,
             max_length=13, latent_std=1.0, encoder='org/t5', tokenizer='org/t5')
KINDS = dict(elf='model', runs='model', own='model', t5='model', gpt2='model', ids='dataset',
             lightning='model', jax='model')
XSUM = 'embedded-language-flows/xsum_{}_t5'


@pytest.fixture(scope='module')
def hub(bins, judge, tmp_path_factory):
    """
    A hub with checkpoints (ours, Lightning, JAX), ids, a T5 and a GPT-2; each once more gated, with
    an expired token, and with downloads that break off.
    """
    from datasets import Dataset
    at = tmp_path_factory.mktemp('hub')
    model = ELF(ELFConfig(**SIZES))
    weights = model.to_official()
    for folder, step in (('elf', 3), ('runs/a', 7000), ('runs/b', 9)):
        convert.write_official(str(at / folder), weights, weights, step, 0, model.config)
    shutil.copy(at / 'elf' / 'checkpoint_3', at / 'elf' / 'checkpoint_2')
    for part in ('tokenizer', 'encoder'):
        shutil.copytree(bins / 'tiny' / part, at / 't5', dirs_exist_ok=True)
    write_run(at / 'run', bins)
    convert.main(str(at / 'run'), str(at / 'own'))
    shutil.copytree(judge, at / 'gpt2')
    shutil.copytree(os.path.join(GOLDEN, 'lightning'), at / 'lightning')
    shutil.copytree(os.path.join(GOLDEN, 'jax_ckpt'), at / 'jax')
    (at / 'lightning' / 'checkpoints').mkdir()
    (at / 'lightning' / 'checkpoints' / 'checkpoint_epoch03_step00152136.ckpt').write_bytes(b'x')
    rows = [[4 + i % 20, 5, 6, 1] for i in range(60)]
    Dataset.from_dict(dict(input_ids=rows)).save_to_disk(at / 'ids')
    for folder in ('elf', 'runs/a', 'own', 't5', 'gpt2', 'ids'):
        (at / folder / 'pytorch_model.bin').write_bytes(b'not needed' * 1000)
    hub = Hub({(kind, f'org/{state}{name}'): str(at / name) for name, kind in KINDS.items()
               for state in ('', 'gated-', 'token-', 'cut-')})
    for split, first in (('train', 4), ('validation', 14)):
        rows = dict(condition_input_ids=[[first, 1]] * 8, input_ids=[[first + 1, 1]] * 8)
        Dataset.from_dict(rows).save_to_disk(at / split)
        hub.repos['dataset', XSUM.format(split)] = str(at / split)
    for name in KINDS:
        hub.refused[f'org/gated-{name}'] = 'GatedRepo'
        hub.refused[f'org/token-{name}'] = 'Invalid credentials in Authorization header'
    hub.cut |= {f'org/cut-{file}' for file in (
        'elf/checkpoint_3', 't5/model.safetensors', 't5/tokenizer.json', 'gpt2/model.safetensors',
        'ids/data-00000-of-00001.arrow', 'lightning/last.ckpt')}
    return hub


@pytest.fixture(scope='module')
def ask(hub, tmp_path_factory):
    """
    ask(state, script, *args) -> exit code, stdout, stderr. state: 'online', 'offline' (with
    HF_HUB_OFFLINE=1) or 'down' (nobody answers).
    """
    at = tmp_path_factory.mktemp('home')
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    env |= dict(HF_HOME=str(at), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
                OMP_NUM_THREADS='1', no_proxy='127.0.0.1', HF_ENDPOINT=hub.url)

    def start(**more):
        return subprocess.Popen([sys.executable, '-c', WORKER], cwd=ROOT, env=env | more, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    online, offline = start(), start(HF_HUB_OFFLINE='1')

    def ask(state, *args):
        files = [str(at / 'stdout'), str(at / 'stderr')]
        worker = offline if state == 'offline' else online
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


# as typed; {n} in the ids is the kind of trouble, {at} an empty folder
SAMPLE = ' --num_samples=1 --steps=2 --device=cpu --out_dir={at}/out'
JOBS = {
    'sample': 'sample.py --init_from=org/{n}elf' + SAMPLE,
    'folder': 'sample.py --init_from=org/{n}runs/a' + SAMPLE,
    'file': 'sample.py --init_from=org/{n}runs/a/checkpoint_7000' + SAMPLE,
    'safetensors': 'sample.py --init_from=org/{n}elf/model.safetensors' + SAMPLE,
    'own': 'sample.py --init_from=org/{n}own --prompt=ab' + SAMPLE,
    'prepare': 'prepare.py --dataset=org/{n}ids --tokenizer=org/{n}t5 --encoder=org/{n}t5 '
               '--data_dir={at}/data --max_length=13',
    'eval': 'eval.py --samples={at}/samples.jsonl --judge=org/{n}gpt2 --device=cpu '
            '--out_dir={at}/out',
}
WANT = dict(sample={'org/elf/checkpoint_3', 'org/elf/config.yml'},
            folder={'org/runs/a/checkpoint_7000', 'org/runs/a/config.yml'},
            file=set(),         # as folder, which has fetched them
            safetensors={'org/elf/model.safetensors'},
            own={f'org/own/{file}' for file in (
                'checkpoint_1', 'config.yml', 'encoder/config.json', 'encoder/model.safetensors',
                'tokenizer/tokenizer.json', 'tokenizer/tokenizer_config.json')})
REFUSED = [JOBS['sample'], JOBS['eval'], 'prepare.py --dataset=org/{n}ids --tokenizer=org/t5 '
           '--encoder=org/t5 --data_dir={at}/data']


@pytest.mark.parametrize('job', JOBS)
def test_online_then_from_the_cache(job, hub, ask, tmp_path):
    (tmp_path / 'samples.jsonl').write_text('{"generated": "hello he said"}\n{"generated": "so"}\n')
    before, got = hub.got.copy(), None
    for state in ('online', 'offline', 'down'):
        code, out, err = ask(state, *JOBS[job].format(n='', at=tmp_path).split())
        assert code == 0, (state, err)
        got = hub.got - before if state == 'online' else got
        assert hub.got - before == got, state       # each file once, and not again
    assert all(n == 1 for n in got.values()) and not any('pytorch_model.bin' in f for f in got)
    if job in WANT:
        assert {f for f in got if f.startswith(('org/elf', 'org/runs', 'org/own'))} == WANT[job]


@pytest.mark.parametrize('source, step, files', [
    ('org/lightning', 15, 2), ('org/lightning/last.ckpt', 15, 0), ('org/jax', 3, 12),
    ('org/jax/checkpoint_3', 3, 0)])
def test_convert(source, step, files, hub, ask, tmp_path):
    """Lightning and JAX repositories, as they are published; each file is fetched once."""
    before = sum(hub.got.values())
    for state in ('online', 'offline', 'down'):
        code, out, err = ask(state, 'convert.py', source, tmp_path / state)
        assert code == 0 and (tmp_path / state / f'checkpoint_{step}').exists(), (state, err)
    assert sum(hub.got.values()) - before == files


@pytest.mark.parametrize('source', ['org/lightning', 'org/jax', 'org/lightning/last.ckpt'])
def test_what_must_be_converted(source, ask, tmp_path):
    args = f'--init_from={source}', f'--out_dir={tmp_path}/out'
    code, out, err = ask('online', 'sample.py', *args)
    assert code == 1 and err.splitlines()[-1].startswith('error: ')
    assert f'convert it first: python convert.py {source} FOLDER' in err
    assert 'Traceback' not in err


def test_a_run_that_was_uploaded(ask, bins, tiny, tmp_path):
    """Evaluated and fine-tuned where its own tokenizer and encoder came with it, and no other."""
    at = tmp_path / 'out'
    for state in ('online', 'offline'):
        code, out, err = ask(state, 'eval.py', '--init_from=org/own', f'--out_dir={at}',
                             '--num_samples=2', '--steps=2', '--judge=org/gpt2', '--device=cpu')
        assert code == 0, (state, err)
    code, out, err = ask('offline', 'train.py', *tiny, '--init_from=org/own', f'--out_dir={at}')
    assert code == 0, err


def test_a_name_that_is_not_there(ask, tmp_path):
    for state in ('online', 'offline'):
        code, out, err = ask(state, 'convert.py', 'org/elf/none.pt', tmp_path / 'out')
        assert code == 1 and err.startswith('error: ') and err.count('\n') == 1, err
        assert 'no checkpoint in org/elf/none.pt' in err


def test_a_set_by_name(ask, tmp_path):
    """
    xsum: two repositories, one of them the validation split; what the command line says goes before
    what the name stands for.
    """
    code, _, err = ask('online', 'prepare.py', '--dataset=xsum', '--tokenizer=org/t5',
                       '--encoder=org/t5', f'--data_dir={tmp_path}')
    assert code == 0, err
    meta = json.loads((tmp_path / 'xsum' / 'meta.json').read_text())
    assert meta['tokenizer'] == 'org/t5' and meta['conditional']
    assert meta['rows'] == dict(train=8, val=8)
    for split, first in (('train', 4), ('val', 14)):
        ids = np.fromfile(tmp_path / 'xsum' / f'{split}.bin', np.uint16)[:4]
        assert ids.tolist() == [first, 1, first + 1, 1]


def test_a_pasted_address(ask, tmp_path):
    code, out, err = ask('online', 'prepare.py', '--tokenizer=org/t5', '--encoder=org/t5',
                         '--dataset=https://huggingface.co/datasets/org/ids/tree/main',
                         '--name=ids', f'--data_dir={tmp_path}')
    assert code == 0 and (tmp_path / 'ids' / 'meta.json').exists(), err


@pytest.mark.parametrize('state, n, says', [
    ('online', 'missing-', 'check the spelling'), ('online', 'gated-', 'accepted its terms'),
    ('online', 'token-', 'hf auth login'), ('online', 'cut-', 'check the spelling and the network'),
    ('offline', 'never-', 'HF_HUB_OFFLINE'), ('down', 'never-', 'the network')])
def test_refused(state, n, says, hub, ask, tmp_path):
    (tmp_path / 'samples.jsonl').write_text('{"generated": "hello he said"}\n')
    # one client of three where all would say the same
    jobs = REFUSED if n in ('missing-', 'cut-') else REFUSED[:1]
    for job in jobs:
        code, out, err = ask(state, *job.format(n=n, at=tmp_path).split())
        line = err.splitlines()[-1] if err else ''
        assert code == 1 and line.startswith('error: ') and f'org/{n}' in line and says in line, err
        # the client may tell of each new try, or show a bar
        told = any(x in err for x in ('Retrying in', 'Trying to resume', 'Fetching'))
        assert err == line + '\n' or told and 'Traceback' not in err
    # nothing half-written, neither here nor in the cache
    files = [f.name for f in tmp_path.rglob('*') if f.is_file() and f.stat().st_size]
    assert files == ['samples.jsonl'] and not list(tmp_path.glob('data/*'))
    assert not list(ask.home.rglob('*.incomplete'))
    if n == 'cut-':
        hub.cut.clear()
        for job in jobs[:1]:
            assert ask(state, *job.format(n=n, at=tmp_path).split())[0] == 0, job
