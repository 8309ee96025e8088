"""
Conditional tasks from pairs to BLEU with the real commands: a toy translation, encoders of other widths, real De-En pairs.
    python -m pytest -q tests/test_tasks.py             # --slow: 32 German sentences learned by heart
"""
import json
import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import UserError
from sample import read_jsonl

SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')
SMALL = ['--max_input_length=12', '--pad_token=eos', '--gradient_accumulation_steps=1', '--drop_cond_prob=0.1', '--decoder_noise_scale=1', '--sampler=ode', '--steps=16', '--w=1.0', '--cfg=2.0',
         '--n_layer=2', '--n_head=4', '--ema_warmup=true', '--sample_interval=0', '--eval_iters=5', '--device=cpu', '--dtype=float32', '--compile=false']


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """16 pairs: words of an alphabet, and the same words in another, in reverse order; and a tokenizer of these words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    folder, rng = tmp_path_factory.mktemp('toy'), random.Random(0)
    source, target = ([a + b for b in 'aeiou'] for a in 'bk')
    with open(folder / 'pairs.jsonl', 'w') as f:
        for _ in range(16):
            words = rng.choices(range(5), k=rng.randint(5, 8))
            f.write(json.dumps(dict(input=' '.join(source[i] for i in words), output=' '.join(target[i] for i in reversed(words)))) + '\n')
    tok = Tokenizer(models.WordLevel({s: i for i, s in enumerate(['<pad>', '</s>', '<unk>', *source, *target])}, unk_token='<unk>'))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix='##', cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>', unk_token='<unk>').save_pretrained(folder / 'tokenizer')
    return folder


def prepare(run, folder, pairs, *args):
    return run('prepare.py', f'--dataset={pairs}', f'--val_dataset={pairs}', f'--data_dir={folder}', '--name=pairs', *args)


def last_json(out):
    return json.loads(out.strip().splitlines()[-1])


def test_bleu_rises_and_order_is_kept(run, toy, tmp_path):
    pairs, data, out_dir = toy / 'pairs.jsonl', [f'--data_dir={tmp_path}', '--dataset=pairs'], f'--out_dir={tmp_path}/out'
    prepare(run, tmp_path, pairs, f'--tokenizer={toy}/tokenizer')
    how = ['train.py', *data, out_dir, *SMALL, '--max_length=24', '--batch_size=32', '--n_embd=64', '--noise_scale=0.5', '--decoder_noise_scale=0.35', '--learning_rate=0.01',
           '--warmup_iters=20', '--eval_interval=1000', '--save_interval=1000', '--log_interval=100']
    score = ['eval.py', *data, out_dir, f'--input_file={pairs}', '--device=cpu', '--dtype=float32', '--eval_iters=0', '--batch_size=16']
    run(*how, '--max_iters=20', '--sample_interval=20')
    on_the_way = [row for _, row in read_jsonl(tmp_path / 'out' / 'samples_20.jsonl')]
    rows = [row for _, row in read_jsonl(pairs)]
    assert [x['input'] for x in on_the_way] == [x['input'] for x in rows[:4]] and all('generated' in x for x in on_the_way)
    before = last_json(run(*score))
    run(*how, '--max_iters=300', '--init_from=resume')
    after = last_json(run(*score))
    assert after['judge'] == 'none' and after['nfe'] == 32 and after['texts'] == 16
    assert after['bleu'] > max(30, 2 * before['bleu']), (before['bleu'], after['bleu'])
    # what eval.py wrote is scored alike from the file; without cfg there is half the work
    assert last_json(run('eval.py', f'--samples={tmp_path}/out/samples_eval.jsonl', f'--out_dir={tmp_path}/other'))['bleu'] == after['bleu']
    # sample.py: a file in its order, whatever the batch; one line from the command line
    texts = []
    for batch in (16, 5):
        run('sample.py', out_dir, f'--input_file={pairs}', f'--batch_size={batch}', '--dtype=float32', '--device=cpu')
        texts.append([row for _, row in read_jsonl(tmp_path / 'out' / 'samples.jsonl')])
    assert texts[0] == texts[1] and [(x['id'], x['input']) for x in texts[0]] == [(i, x['input']) for i, x in enumerate(rows)]
    out = run('sample.py', out_dir, f'--input={rows[0]["input"]}', '--dtype=float32', '--device=cpu', '--trace=3')
    assert f"--- 0\n{texts[0][0]['generated']}" in out and out.count('  t=') == 3
    # seeds: mean and standard error
    two = last_json(run(*score, '--seeds=1,2'))
    by_seed = [x['bleu'] for x in two['by_seed'].values()]
    assert two['bleu'] == pytest.approx(sum(by_seed) / 2) and two['stderr']['bleu'] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2)
    # two ranks write what one writes
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', os.path.join(ROOT, 'eval.py'), *map(str, score[1:])],
                          capture_output=True, text=True, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {k: v for k, v in last_json(done.stdout).items() if k not in ('seconds', 'seed')} == {k: v for k, v in after.items() if k not in ('seconds', 'seed')}
    for args, says in ((['--num_samples=2'], 'is a model with conditions; give --input'), ([f'--input_file={tmp_path}/none.jsonl'], 'cannot read')):
        with pytest.raises(UserError, match=says):
            run('sample.py', out_dir, *args)


def test_settings_that_do_not_fit_the_data(run, toy, tiny, tmp_path):
    prepare(run, tmp_path, toy / 'pairs.jsonl', f'--tokenizer={toy}/tokenizer')
    for args, says in (([f'--data_dir={tmp_path}', '--dataset=pairs'], 'has conditions, max_input_length is 0'), (['--max_input_length=5'], 'has no conditions'),
                       ([f'--data_dir={tmp_path}', '--dataset=pairs', '--max_input_length=13'], 'leaves no room')):
        with pytest.raises(UserError, match=says):
            run('train.py', *tiny, f'--out_dir={tmp_path}/out', *args)
    assert not os.path.exists(tmp_path / 'out')


@pytest.mark.parametrize('C', [48, 768])
def test_encoders_of_other_widths(run, toy, tmp_path, C):
    """768 is T5-base's; the latent width goes from the encoder through bins, network and checkpoint."""
    prepare(run, tmp_path, toy / 'pairs.jsonl', f'--tokenizer={toy}/tokenizer', f'--encoder_dim={C}', '--encoder_layers=1')
    run('train.py', f'--data_dir={tmp_path}', '--dataset=pairs', f'--out_dir={tmp_path}/out', *SMALL, '--max_length=24', '--batch_size=8', '--n_embd=32', '--max_iters=2')
    out = run('sample.py', f'--out_dir={tmp_path}/out', '--input=ba be bi', '--steps=2')
    assert '--- 0' in out
    run('convert.py', f'{tmp_path}/out', f'{tmp_path}/export')
    assert run('sample.py', f'--init_from={tmp_path}/export', f'--out_dir={tmp_path}', '--input=ba be bi', '--steps=2').split('--- 0')[1].split('\n1 texts')[0] == out.split('--- 0')[1].split('\n1 texts')[0]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(SHARED), reason=f"needs {SHARED}")
def test_real_de_en_pairs_learned_by_heart(run, tmp_path):
    """32 short pairs of WMT14, rows of at most 48, T5's pieces but only those that occur, a random encoder: BLEU > 80 on themselves."""
    from datasets import load_from_disk
    rows = [r for r in load_from_disk(os.path.join(SHARED, 'wmt14_de-en_validation_t5')) if len(r['condition_input_ids']) <= 24 and len(r['input_ids']) <= 24][:32]
    with open(tmp_path / 'pairs.jsonl', 'w') as f:
        f.writelines(json.dumps(dict(input=r['input'], output=r['target'])) + '\n' for r in rows)
    tokenizer = tmp_path / 't5'
    tokenizer.mkdir()
    with open(os.path.join(SHARED, 't5_tokenizer', 'tokenizer.json')) as f:
        tok = json.load(f)
    used = sorted({i for r in rows for part in ('condition_input_ids', 'input_ids') for i in r[part]} | {0, 1, 2})
    tok['model']['vocab'] = [tok['model']['vocab'][i] for i in used]        # the best path of a text stays the best
    tok['added_tokens'] = [t for t in tok['added_tokens'] if t['id'] < 3]
    tok['post_processor'] = None
    (tokenizer / 'tokenizer.json').write_text(json.dumps(tok))
    (tokenizer / 'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='PreTrainedTokenizerFast', pad_token='<pad>', eos_token='</s>', unk_token='<unk>')))
    prepare(run, tmp_path, tmp_path / 'pairs.jsonl', f'--tokenizer={tokenizer}', '--encoder_dim=64')
    run('train.py', f'--data_dir={tmp_path}', '--dataset=pairs', f'--out_dir={tmp_path}/out', *SMALL, '--max_input_length=24', '--max_length=48', '--batch_size=32', '--n_embd=128', '--n_layer=4',
        '--noise_scale=0.7', '--decoder_noise_scale=0.35', '--learning_rate=0.005', '--lr_schedule=cosine', '--warmup_iters=50', '--max_iters=1200', '--eval_interval=2000', '--save_interval=2000', '--log_interval=100')
    score = last_json(run('eval.py', f'--data_dir={tmp_path}', '--dataset=pairs', f'--out_dir={tmp_path}/out', f'--input_file={tmp_path}/pairs.jsonl', '--eval_iters=0', '--batch_size=32', '--steps=32'))
    assert score['bleu'] > 80, score
