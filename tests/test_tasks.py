"""
Conditional tasks from pairs to BLEU with the real commands: a toy translation, encoders of other
widths, real De-En pairs.
    python -m pytest -q tests/test_tasks.py     # --slow: 32 German sentences learned by heart
"""
import json
import os
import random

import pytest
from conftest import ROOT

from configurator import UserError
from parts.data import read_jsonl

SHARED = os.path.join(os.path.dirname(ROOT), 'shared', 'data')
SMALL = ['--max_input_length=12', '--pad_token=eos', '--gradient_accumulation_steps=1',
         '--drop_cond_prob=0.1', '--decoder_noise_scale=1', '--sampler=ode', '--steps=16',
         '--w=1.0', '--cfg=2.0', '--n_layer=2', '--n_head=4', '--ema_warmup=true',
         '--sample_interval=0', '--eval_iters=5', '--device=cpu', '--dtype=float32',
         '--compile=false']


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """
    A folder with 16 pairs, words of an alphabet and the same words in another, in reverse order,
    and with a tokenizer of these words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    folder, rng = tmp_path_factory.mktemp('toy'), random.Random(0)
    source, target = ['ba', 'be', 'bi', 'bo', 'bu'], ['ka', 'ke', 'ki', 'ko', 'ku']
    with open(folder / 'pairs.jsonl', 'w') as f:
        for _ in range(16):
            words = rng.choices(range(5), k=rng.randint(5, 8))
            pair = dict(input=' '.join(source[i] for i in words),
                        output=' '.join(target[i] for i in reversed(words)))
            f.write(json.dumps(pair) + '\n')
    symbols = ['<pad>', '</s>', '<unk>', *source, *target]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    words = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix='##', cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='</s>',
                            unk_token='<unk>').save_pretrained(folder / 'tokenizer')
    return folder


def prepare(run, folder, pairs, *args):
    return run('prepare.py', f'--dataset={pairs}', f'--val_dataset={pairs}', f'--data_dir={folder}',
               '--name=pairs', *args)


def rows_of(file):
    return [row for _, row in read_jsonl(file)]


def last_json(out):
    return json.loads(out.strip().splitlines()[-1])


def test_bleu_rises_and_order_is_kept(run, toy, tmp_path):
    pairs, out = toy / 'pairs.jsonl', tmp_path / 'out'
    prepare(run, tmp_path, pairs, f'--tokenizer={toy}/tokenizer')
    where = [f'--data_dir={tmp_path}', '--dataset=pairs', f'--out_dir={out}']
    on_cpu = ['--device=cpu', '--dtype=float32']
    train = ['train.py', *where, *SMALL, '--max_length=24', '--batch_size=16', '--n_embd=64',
             '--noise_scale=0.5', '--decoder_noise_scale=0.35', '--learning_rate=0.01',
             '--warmup_iters=20', '--eval_interval=1000', '--save_interval=1000',
             '--log_interval=100']
    score = ['eval.py', *where, *on_cpu, f'--input_file={pairs}', '--eval_iters=0',
             '--batch_size=16']
    inputs = [row['input'] for row in rows_of(pairs)]

    run(*train, '--max_iters=20', '--sample_interval=20')
    on_the_way = rows_of(out / 'samples_20.jsonl')
    assert [row['input'] for row in on_the_way] == inputs[::len(inputs) // 4], 'spread evenly'
    assert all('generated' in row for row in on_the_way)
    before = last_json(run(*score))
    run(*train, '--max_iters=300', '--init_from=resume')
    after = last_json(run(*score))
    assert after['judge'] == 'none' and after['steps'] == 16 and after['texts'] == 16
    assert after['bleu'] > max(30, 2 * before['bleu']), (before['bleu'], after['bleu'])
    # what eval.py wrote is scored alike from the file
    again = run('eval.py', f'--samples={out}/samples_eval.jsonl', f'--out_dir={tmp_path}/other')
    assert last_json(again)['bleu'] == after['bleu']
    # seeds: mean and standard error
    two = last_json(run(*score, '--seeds=1,2'))
    first, second = [scores['bleu'] for scores in two['by_seed']]
    assert two['bleu'] == pytest.approx((first + second) / 2)
    assert two['stderr']['bleu'] == pytest.approx(abs(first - second) / 2)

    # sample.py: a file in its order, whatever the batch; one line from the command line
    texts = []
    for batch in (16, 5):
        run('sample.py', f'--out_dir={out}', f'--input_file={pairs}', f'--batch_size={batch}',
            *on_cpu)
        texts.append(rows_of(out / 'samples.jsonl'))
    assert texts[0] == texts[1]
    assert [(row['id'], row['input']) for row in texts[0]] == list(enumerate(inputs))
    said = run('sample.py', f'--out_dir={out}', f'--input={inputs[0]}', *on_cpu, '--trace=3')
    assert f"--- 0: {inputs[0]}\n{texts[0][0]['generated']}" in said and said.count('  t=') == 3
    with pytest.raises(UserError, match='is a model with conditions; give one by --input'):
        run('sample.py', f'--out_dir={out}', '--num_samples=2')
    with pytest.raises(UserError, match='cannot read'):
        run('sample.py', f'--out_dir={out}', f'--input_file={tmp_path}/none.jsonl')


def test_settings_that_do_not_fit_the_data(run, toy, tiny, tmp_path):
    prepare(run, tmp_path, toy / 'pairs.jsonl', f'--tokenizer={toy}/tokenizer')
    pairs = [f'--data_dir={tmp_path}', '--dataset=pairs']

    def refused(says, *args):
        with pytest.raises(UserError, match=says):
            run('train.py', *tiny, f'--out_dir={tmp_path}/out', *args)
        assert not os.path.exists(tmp_path / 'out')

    refused('has conditions, but max_input_length is 0', *pairs)
    refused('needs max_length=14 or more', *pairs, '--max_input_length=13')
    refused('has no conditions', '--max_input_length=5')


@pytest.mark.parametrize('C', [48, 768])
def test_encoders_of_other_widths(run, toy, tmp_path, C):
    """
    768 is T5-base's; the latent width goes from the encoder through bins, network, checkpoint and
    export.
    """
    prepare(run, tmp_path, toy / 'pairs.jsonl', f'--tokenizer={toy}/tokenizer',
            f'--encoder_dim={C}', '--encoder_layers=1')
    out, export = tmp_path / 'out', tmp_path / 'export'
    run('train.py', f'--data_dir={tmp_path}', '--dataset=pairs', f'--out_dir={out}', *SMALL,
        '--max_length=24', '--batch_size=8', '--n_embd=32', '--max_iters=2')
    run('convert.py', out, export)
    how = ['--input=ba be bi', '--steps=2']
    ours = run('sample.py', f'--out_dir={out}', *how)
    theirs = run('sample.py', f'--init_from={export}', f'--out_dir={tmp_path}', *how)
    texts = [said.split('--- 0: ba be bi\n')[1] for said in (ours, theirs)]
    assert texts[0] == texts[1]


def used_pieces(rows):
    """T5's tokenizer with the pieces alone that rows use -> its tokenizer.json."""
    with open(os.path.join(SHARED, 't5_tokenizer', 'tokenizer.json')) as f:
        tok = json.load(f)
    used = {0, 1, 2}
    for row in rows:
        used.update(row['condition_input_ids'], row['input_ids'])
    pieces = tok['model']['vocab']
    tok['model']['vocab'] = [pieces[i] for i in sorted(used)]   # a text's best path stays the best
    tok['added_tokens'] = [token for token in tok['added_tokens'] if token['id'] < 3]
    tok['post_processor'] = None
    return json.dumps(tok)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(SHARED), reason=f"needs {SHARED}")
def test_real_de_en_pairs_learned_by_heart(run, tmp_path):
    """
    32 short pairs of WMT14, rows of at most 48, those of T5's pieces that occur, a random encoder:
    BLEU > 80 on themselves.
    """
    from datasets import load_from_disk
    rows = []
    for row in load_from_disk(os.path.join(SHARED, 'wmt14_de-en_validation_t5')):
        if max(len(row['condition_input_ids']), len(row['input_ids'])) <= 24 and len(rows) < 32:
            rows.append(row)
    pairs, tokenizer = tmp_path / 'pairs.jsonl', tmp_path / 't5'
    with open(pairs, 'w') as f:
        for row in rows:
            f.write(json.dumps(dict(input=row['input'], output=row['target'])) + '\n')
    tokenizer.mkdir()
    (tokenizer / 'tokenizer.json').write_text(used_pieces(rows))
    (tokenizer / 'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='PreTrainedTokenizerFast', pad_token='<pad>', eos_token='</s>',
        unk_token='<unk>')))
    prepare(run, tmp_path, pairs, f'--tokenizer={tokenizer}', '--encoder_dim=64')
    where = [f'--data_dir={tmp_path}', '--dataset=pairs', f'--out_dir={tmp_path}/out']
    run('train.py', *where, *SMALL, '--max_input_length=24', '--max_length=48', '--batch_size=32',
        '--n_embd=128', '--n_layer=4', '--noise_scale=0.7', '--decoder_noise_scale=0.35',
        '--learning_rate=0.005', '--lr_schedule=cosine', '--warmup_iters=50', '--max_iters=1200',
        '--eval_interval=2000', '--save_interval=2000', '--log_interval=100')
    score = last_json(run('eval.py', *where, f'--input_file={pairs}', '--eval_iters=0',
                          '--batch_size=32', '--steps=32'))
    assert score['bleu'] > 80, score
