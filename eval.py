"""
How good are the texts? Sample a checkpoint, or take a file of texts, and measure.

    python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram    # no download
    python eval.py --init_from=embedded-language-flows/ELF-B-owt-torch  # the official protocol
    python eval.py --samples=out/samples.jsonl    # score what exists; with 'target': BLEU and ROUGE
    python eval.py --samples=x.jsonl --judge=none --gpt2=gpt2   # GPT-2's tokens without GPT-2
    python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram --num_samples=200 \\
        --sweep="steps=4,8,16,32 gamma=0,1,1.5,2,3"     # table and picture; run again, it goes on

Read the columns together: repetition lowers the perplexity of a judge, and entropy and distinct-4
with it.
"""
from configurator import UserError, check_value, configure      # before torch: see there

import itertools
import math
import os
import sys
import time
from functools import partial
from operator import itemgetter

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import TextEncoder, compute_loss, draw, encode_rows
from parts.checkpoint import find_checkpoint, make_out_dir
from parts.data import (batched, check_vocabulary, cut_at_eos, get_rows, load_tokenizer, open_bins,
                        open_split, printable, read_inputs, read_jsonl, read_row, to_json)
from parts.device import (autocast, compile_in_place, gather, pack_linears, print0, rank_and_world,
                          start)
from parts.metrics import bleu, entropy, exact_match, rouge  # noqa: F401, for those who import them
from parts.metrics import (count_ids, find_targets, gen_ppl, judge_ids, load_gpt2,
                           load_judge, mean, measure, ngram_nats, over_runs, print_table,
                           train_ngram)
from parts.plots import plot_losses, plot_sweep, read_rows  # noqa: F401
from sample import CHOICES, load_model, resolve_sampling, sample_texts  # noqa: F401, for configure

# --------------------------------------------------------------------------------------------------
out_dir = 'out'             # the model in its ckpt.pt (EMA); texts and metrics.jsonl go here
init_from = ''              # instead: a published checkpoint, file, folder or hub id
samples = ''                # instead of sampling: a JSONL file, one object a line, with
                            # 'generated' or 'text', perhaps 'target'
input_file = ''             # conditions and targets of a conditional model, '' = val.jsonl of
                            # the dataset; with samples: targets for them, text i that of line i
data_dir = 'data'
dataset = ''                # bins under data_dir: validation loss, real text beside the
                            # samples, training text for the n-gram judge
num_samples = 1000
batch_size = 16             # rows sampled at once; changes memory and speed, not the texts
steps = -1                  # forward passes per text, -1 = the checkpoint's default, as below
sampler = ''                # 'ode', 'sde' or 'sde_exact', see sample.py; '' = the default
gamma = -1.0                # of the SDE: how much is re-noised
w = -1.0                    # self-conditioning guidance strength
cfg = -1.0                  # classifier-free guidance on the condition, 1 = off
grid = ''                   # times: 'logit_normal', 'quantile', 'uniform', '' = the default
sweep = ''                  # values of these six and of init_from: all combinations; to
                            # sweep.jsonl and sweep.png in out_dir, without validation loss
judge = 'auto'              # causal LM (folder or hub id), 'ngram' (no download), 'none';
                            # 'auto' = gpt2-large, none if there are targets
gpt2 = ''                   # GPT-2's encoder files (folder or hub id): entropy and distinct-4 in
                            # its tokens, where no GPT-2 is the judge
eval_iters = 10             # batches of the validation loss, 0 = none
seed = 1337                 # text i depends on (seed, i) alone
seeds = ''                  # several, such as 42,123,456: mean and standard error over them
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # of sampling: 'float32' or 'bfloat16'; the judge is always float32
compile = False             # torch.compile the network: a minute first, then faster
# --------------------------------------------------------------------------------------------------

AT_LEAST_1 = ('num_samples', 'batch_size', 'steps')
SWEPT = ('init_from', 'steps', 'sampler', 'gamma', 'w', 'cfg', 'grid')

# --------------------------------------------------------------------------------------------------
# during training: the validation loss, a few texts

T_BINS = 5      # of equal probability under the training distribution of t


@torch.no_grad()
def estimate_loss(net, encoder, meta, eval_iters, batch_size, device, objective=compute_loss,
                  draw_step=draw):
    """
    Validation loss on fixed rows with fixed draws -> {'loss', 'l2', 'ce', 'l2_bins'}, numbers, the
    same on every rank and for every number of ranks. Batch k has its t in bin k % T_BINS, so that
    the bins come for free and l2, their mean, is the training loss with less variance.
    objective, draw_step: of a student, whose l2 is its own.
    """
    c, (rank, world) = net.config, rank_and_world()
    mine = []                   # (number of a batch, {'l2': number, 'ce': number})
    for k in range(rank, math.ceil(eval_iters / T_BINS) * T_BINS, world):
        generator = torch.Generator().manual_seed(k)
        draws = draw_step(c, batch_size, c.max_length, generator, device)
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        normal = torch.special.ndtri((k % T_BINS + uniform) / T_BINS)
        draws.t = torch.sigmoid(c.t_mean + c.t_std * normal).float().to(device)
        rows = np.arange(k * batch_size, (k + 1) * batch_size) % meta['rows']['val']
        batch = encode_rows(encoder, get_rows(meta, 'val', rows, c), draws, c, device)
        _, parts = objective(net, *batch, draws)
        mine.append((k, {name: x.item() for name, x in parts.items()}))
    # in the order of the batches, whoever computed them: a sum's last bits depend on it
    parts = [part for _, part in sorted(sum(gather(mine), []))]
    bins = [mean([part['l2'] for part in parts[i::T_BINS] if 'l2' in part]) for i in range(T_BINS)]
    l2 = mean([x for x in bins if not math.isnan(x)])
    ce = mean([part['ce'] for part in parts if 'ce' in part])
    p = c.decoder_prob          # a branch that is off has no mean
    loss = sum(share * x for share, x in ((1 - p, l2), (p, ce)) if share)
    return dict(loss=loss, l2=l2, ce=ce, l2_bins=bins)


def describe_val(val):
    """What estimate_loss found, for the log. No numbers of t: a student squeezes it."""
    bins = ' '.join(f'{x:.3f}' for x in val['l2_bins'])
    return (f"val loss {val['loss']:.4f} (l2 {val['l2']:.4f}, ce {val['ce']:.4f}) | "
            f"l2 by fifths of t, noise first: {bins}")


def write_few(model, encoder, meta, file, seed):
    """Four texts of a model in training to a JSONL file; the first of them shown."""
    c, tokenizer, conditions = model.config, load_tokenizer(meta['tokenizer']), []
    if c.max_input_length:
        ids, index = open_split(meta, 'val')        # there may be no val.jsonl
        for r in range(len(index))[:4]:
            condition, _ = read_row(ids, index, r)
            text = tokenizer.decode(condition, skip_special_tokens=True)
            conditions.append(dict(input=text))
    rows = sample_set(model, tokenizer, encoder, conditions, 4, resolve_sampling(c), seed, 4, file)
    print0(f"{file} | {printable(rows[0]['generated'])[:120]}")

# --------------------------------------------------------------------------------------------------
# texts: lists of dicts with 'generated', 'ids' and perhaps 'target'

def read_samples(file, input_file='', meta=None):
    """
    A JSONL file -> list of dicts with 'generated', its 'ids' (of the tokenizer of the bins meta,
    else words) and perhaps 'target': its own, or that of the line of input_file with the number
    'id', by default its own line. UserError names file and line.
    """
    targets, rows = find_targets(read_inputs(input_file)) if input_file else [], []
    encode = str.split
    if meta:
        encode = partial(load_tokenizer(meta['tokenizer']).encode, add_special_tokens=False)
    for where, row in read_jsonl(file):
        number = row.get('id', len(rows))
        if input_file and number not in range(len(targets)):
            raise UserError(f"{where} has id {number!r}; {input_file} has {len(targets)} lines "
                            "that all have a 'target'")
        if input_file:
            row['target'] = targets[int(number)]
        text = row.get('generated', row.get('text'))
        if not isinstance(text, str) or not isinstance(row.get('target', ''), str) or (
                'target' in row) != ('target' in (rows or [row])[0]):
            raise UserError(f"{where} needs a text under 'generated' or 'text', and under 'target' "
                            "if others have one")
        text = text.encode('utf-8', 'replace').decode()     # half a surrogate pair: '?'
        rows.append(row | dict(generated=text, ids=encode(text)))
    if not rows:
        raise UserError(f"{file} has no texts")
    return rows


def read_split(meta, split, n):
    """Up to n rows of a split, evenly spaced, each up to its first EOS."""
    tokenizer, (ids, index) = load_tokenizer(meta['tokenizer']), open_split(meta, split)
    numbers = np.linspace(0, len(index), min(n, len(index)), endpoint=False).astype(int)
    targets = [read_row(ids, index, r)[1].tolist() for r in numbers]
    targets = [cut_at_eos(target, meta['eos_id']) for target in targets]
    return [dict(generated=tokenizer.decode(target, skip_special_tokens=True), ids=target)
            for target in targets]


def sample_set(model, tokenizer, encoder, conditions, n, sampling, seed, batch_size, file):
    """
    Sample n texts, or one for each condition. Each rank samples its share of a batch and gets all
    of it; the first one adds it to a file, if one is named: a kill leaves what is done.
    """
    inputs, targets = [row['input'] for row in conditions] or None, find_targets(conditions)
    (rank, world), rows = rank_and_world(), []
    batches = list(batched(range(len(conditions) or n), batch_size * world))
    for numbers in tqdm(batches, unit='batch', leave=False, disable=True if rank else None):
        mine = sample_texts(model, tokenizer, numbers[rank::world], batch_size, seed,
                            model.mode_tokens.device, sampling, inputs, encoder)
        batch = sorted(sum(gather(list(mine)), []), key=itemgetter('id'))
        if targets:
            batch = [row | dict(target=targets[row['id']]) for row in batch]
        if file and rank == 0:
            add_lines(file, batch, 'a' if rows else 'w')
        rows += batch
    return rows


def add_lines(file, rows, mode='a'):
    """Rows, without their ids, to a file of JSON lines. UserError if it cannot be written."""
    try:
        with open(file, mode, encoding='utf-8') as f:
            for row in rows:
                f.write(to_json({k: v for k, v in row.items() if k != 'ids'}) + '\n')
    except OSError as e:
        raise UserError(f"cannot write {file}: {e.strerror}") from None

# --------------------------------------------------------------------------------------------------
# the lines of the table: one setting of the sampler, or several

def combinations(text, settings):
    """
    'steps=4,8 gamma=0,1.5' -> the product of its values, dicts with all of SWEPT, the others as in
    settings: an empty text is one combination. UserError for other names and wrong values.
    """
    values = {name: [settings[name]] for name in SWEPT}
    for part in text.split():
        name, _, given = part.partition('=')
        if name not in SWEPT:
            raise UserError(f"--sweep: {part!r} is not name=value,value with one of "
                            f"{', '.join(SWEPT)}")
        values[name] = [check_value(globals(), name, x, '--sweep') for x in given.split(',')]
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def open_model(init_from, meta, config, device, bf16):
    """
    -> model, its tokenizer, its text encoder if it may be needed, what it gets: dicts with 'input'
    and perhaps 'target', none if it is a model without conditions. UserError if it does not fit.
    """
    source, file = init_from or config['out_dir'], config['input_file']
    model = load_model(init_from, config['out_dir']).to(device)
    c, encoder, conditions = model.config, None, []
    if meta:
        check_vocabulary(meta, c, source)
    if bool(c.max_input_length) != bool(file or meta and meta.get('conditional')):
        raise UserError(f"{source} is a model {'with' if c.max_input_length else 'without'} "
                        "conditions; --dataset or --input_file must fit it")
    if c.max_input_length:
        conditions = read_inputs(file or os.path.join(meta['dir'], 'val.jsonl'))
    tokenizer = load_tokenizer(c.tokenizer, c.vocab_size)
    if conditions or meta:
        encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
    if not config['compile'] or not compile_in_place(model, device=device):
        pack_linears(model, bf16)
    return model, tokenizer, encoder, conditions[:config['num_samples']]


def open_models(combos, meta, config, device, bf16):
    """
    combinations' dicts -> {source: what open_model gives}, and of each combination a dict: 'source'
    and when its weights were written, the sampler's settings.
    """
    models, plan = {}, []
    for init_from, *given in map(dict.values, combos):
        source = init_from or config['out_dir']
        if source not in models:
            models[source] = open_model(init_from, meta, config, device, bf16)
        sampling = resolve_sampling(models[source][0].config, *given)
        weights = os.path.getmtime(find_checkpoint(source))
        plan.append(dict(source=source, weights=weights, **sampling))
    return models, plan


def make_judges(judge, gpt2, meta, device):
    """The settings judge and gpt2 -> functions of texts and their ids that give metrics, dicts."""
    judges = []
    if judge == 'ngram':
        if not meta or meta.get('conditional'):
            raise UserError("--judge=ngram learns from training text without conditions; name its "
                            "bins: --dataset=<folder under data_dir>")
        # a million tokens are enough for a 5-gram
        n = 1 + 1_000_000 * meta['rows']['train'] // meta['tokens']['train']
        train = read_split(meta, 'train', n)
        of_chars = train_ngram([row['generated'] for row in train], 5)
        of_tokens = train_ngram([tuple(row['ids']) for row in train], 3)
        judges.append(lambda texts, ids: dict(
            nats_per_char=ngram_nats(texts, of_chars),
            nats_per_token=ngram_nats([tuple(row) for row in ids], of_tokens)))
    elif judge != 'none':
        load_judge(judge, str(device))      # if it is missing, that shows now
        judges.append(lambda texts, ids: gen_ppl(texts, judge, device=device))
    if gpt2:
        encode = load_gpt2(gpt2)
        judges.append(lambda texts, ids: count_ids(judge_ids(texts, encode)))
    return judges


if __name__ == '__main__':
    given = set()
    config = configure(globals(), given=given)
    if samples and (unread := given & {'sweep', 'num_samples', 'seeds', 'compile', *SWEPT}):
        raise UserError(f"--samples are scored as they are; drop {', '.join(sorted(unread))}")
    seeds = [check_value(globals(), 'seed', s, '--seeds') for s in seeds.split(',') if s] or [seed]
    combos = combinations(sweep, config)
    device, bf16, about = start(device, dtype)
    rank, world = rank_and_world()

    # ---- what is missing or wrong shows here, before the sampling; nothing is written yet --------
    meta = open_bins(data_dir, dataset) if dataset else None
    models, real = {}, []
    if samples:
        texts, plan = read_samples(samples, input_file, meta), [dict(source=samples)]
    else:
        models, plan = open_models(combos, meta, config, device, bf16)
        model, _, encoder, texts = models[plan[0]['source']]
    if judge == 'auto':
        judge = 'none' if find_targets(texts) else 'gpt2-large'
    if meta and not meta.get('conditional'):
        real = read_split(meta, 'val', len(texts) or num_samples)
    log = os.path.join(out_dir, 'sweep.jsonl' if sweep else 'metrics.jsonl')
    if rank == 0:
        judges = make_judges(judge, gpt2, meta, device)
        make_out_dir(out_dir)
        add_lines(log, [])
    known = gather(read_rows(log) if sweep and rank == 0 else [])[0]
    print0(f"device: {about}, ranks: {world}; judge: {judge}")

    # ---- the texts: each rank samples its share, the first one measures --------------------------
    val, rows, limit = {}, [], sum(len(row['ids']) for row in real) or sys.maxsize
    if models and meta and eval_iters and not sweep:
        with autocast(device, bf16):
            val = dict(val=estimate_loss(model, encoder, meta, eval_iters, batch_size, device))
        print0(describe_val(val['val']))
    for entry in plan:
        entry = config | dict(sweep='', judge=judge) | entry
        row = next((row for row in known if entry.items() <= row.items()), None)
        if row is None:
            sampling, runs, began = {k: entry[k] for k in SWEPT[1:]}, [], time.time()
            for s in seeds if models else []:
                print0(f'sampling with seed {s}:', sampling)
                name = 'samples_eval' + f'_{s}' * (len(seeds) > 1) + '.jsonl'
                file = '' if sweep else os.path.join(out_dir, name)
                with autocast(device, bf16):
                    runs.append(sample_set(*models[entry['source']], num_samples, sampling, s,
                                           batch_size, file))
            row = entry | dict(seconds=round(time.time() - began, 2))
            if rank == 0:
                row |= over_runs([measure(run, limit, judges) for run in runs or [texts]])
                add_lines(log, [row] if sweep else [])
        rows.append(row)
    if world > 1:
        dist.destroy_process_group()
    if rank:
        sys.exit()

    # ---- the table, and the same as a line of JSON -----------------------------------------------
    beside = dict(real=measure(real, limit, judges)) if real else {}
    names = [k for k in ('source', *SWEPT[1:]) if len({row[k] for row in rows}) > 1]
    table = {' '.join(f'{k}={row[k]}' for k in names) or 'samples': row for row in rows}
    report = rows[0] | val | beside
    if sweep:
        plot_sweep(os.path.join(out_dir, 'sweep.png'), rows, beside.get('real'), names)
    else:
        add_lines(log, [report])
    print_table(table | beside)
    print(f"\n{log}, sweep.png" if sweep else to_json(report))
