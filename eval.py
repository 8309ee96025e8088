"""
How good are the texts? Sample a checkpoint, or take a file of texts, and measure.

    python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram    # no download
    python eval.py --init_from=embedded-language-flows/ELF-B-owt-torch  # the official protocol
    python eval.py --samples=out/samples.jsonl    # score what exists; with 'target': BLEU and ROUGE
    python eval.py --samples=x.jsonl --judge=none --gpt2=gpt2   # GPT-2's tokens without GPT-2
    python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram --num_samples=200 \\
        --sweep="steps=4,8,16,32 gamma=0,1,1.5,2,3"     # table and picture; run again, it goes on

Read the columns together: repetition lowers the perplexity of a judge, and entropy and distinct_4
with it.

    exact, exact_stderr             share of texts equal to their target, its standard error
    length, first_wrong             of the others: share with another number of words; which word
                                    is their first wrong one, the median
    bleu, rouge1, rouge2, rougeL    of other scripts than a to z by words, or by characters where
                                    no spaces are; rouge2 of texts of one word is 0
    nats_per_char, nats_per_token   by n-grams of training text: 5 characters, 3 tokens
    gen_ppl                         perplexity of the texts for a causal LM, the judge
    entropy, distinct_4_judge       of the judge's tokens (GPT-2's): of a text, nats; share of
                                    different ones among all 4-grams
    entropy_own, distinct_4         the same of the tokens of the model or dataset, else of words
    repetition                      share of the 5-grams that their text holds three times or more
    empty                           texts that are blank
"""
from configurator import UserError, check_value, configure      # before torch: see there

import math
import os
import sys
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.distributed as dist
from pandas import DataFrame

from model import TextEncoder, compute_loss, draw, encode_rows
from parts.checkpoint import find_checkpoint, make_out_dir
from parts.data import (add_lines, check_fit, cut_at_eos, get_rows, load_tokenizer, open_bins,
                        open_split, printable, read_inputs, read_row, to_json)
from parts.device import autocast, gather, print0, rank_and_world, start
# five of these for those who look for them here
from parts.metrics import (bleu, entropy, exact_match, find_targets, gen_ppl,  # noqa: F401
                           make_judges, measure, over_runs, print_table, rouge)
from parts.plots import at_equal_entropy, label, plot_losses, plot_sweep, read_rows  # noqa: F401
from sample import (CHOICES, SAMPLING, load_model, resolve_sampling,  # noqa: F401, for configure
                    sample_texts)

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
batch_size = 16             # rows sampled at once; changes no text in float32, few in bfloat16
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
gpt2 = ''                   # GPT-2's merges.txt and vocab.json (folder or hub id): entropy and
                            # distinct-4 in its tokens, where no GPT-2 is the judge
eval_iters = 10             # batches of the validation loss, 0 = none
seed = 1337                 # what is random in text i comes from (seed, i) alone
seeds = ''                  # several, such as 42,123,456: mean and standard error over them
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # of sampling: 'float32' or 'bfloat16'; the judge is always float32
compile = False             # torch.compile the network: a minute first, then faster
# --------------------------------------------------------------------------------------------------

MAY_BE_0 = ('eval_iters', 'seed')
SWEPT = ('init_from', *SAMPLING)
# texts that exist are scored as they are
READ_WITH = dict.fromkeys(('sweep', 'num_samples', 'seeds', 'compile', *SWEPT), 'samples=')

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
    c, (rank, world), mine = net.config, rank_and_world(), []
    for k in range(rank, math.ceil(eval_iters / T_BINS) * T_BINS, world):
        generator = torch.Generator().manual_seed(k)
        draws = draw_step(c, batch_size, c.max_length, generator, device)
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        normal = torch.special.ndtri((k % T_BINS + uniform) / T_BINS)
        draws.t = torch.sigmoid(c.t_mean + c.t_std * normal).float().to(device)
        rows = (k * batch_size + np.arange(batch_size)) % meta['rows']['val']
        batch = encode_rows(encoder, get_rows(meta, 'val', rows, c), draws, c, device)
        _, parts = objective(net, *batch, draws)
        mine += [(k, name, x.item()) for name, x in parts.items()]
    # in the order of the batches, whoever computed them: a sum's last bits depend on it
    table = DataFrame(sorted(sum(gather(mine), [])), columns=['batch', 'part', 'x'])
    l2, ce = [table[table.part == name] for name in ('l2', 'ce')]
    bins = l2.groupby(l2.batch % T_BINS).x.mean(skipna=False).reindex(range(T_BINS))
    l2, ce, p = bins.mean(), ce.x.mean(skipna=False), c.decoder_prob
    # a branch that is off has no mean
    loss = sum(share * x for share, x in ((1 - p, l2), (p, ce)) if share)
    return dict(loss=loss, l2=l2, ce=ce, l2_bins=bins.to_list())


def mean_over_ranks(losses):
    """Each rank's [{name: scalar on the device}] -> {name: mean of all there are}; it waits."""
    mine = [(name, x.item()) for parts in losses for name, x in parts.items()]
    table = DataFrame(sum(gather(mine), []), columns=['part', 'x'])
    return table.groupby('part', sort=False).x.mean(skipna=False).to_dict()


def describe_val(val):
    """What estimate_loss found, for the log. No numbers of t: a student squeezes it."""
    bins = ' '.join(f'{x:.3f}' for x in val['l2_bins'])
    return ("val loss {loss:.4f} (l2 {l2:.4f}, ce {ce:.4f}) | "
            "l2 by fifths of t, noise first: {bins}").format(bins=bins, **val)


def write_few(model, encoder, meta, file, seed):
    """Four texts of a model in training to a JSONL file; the first of them shown."""
    c = model.config
    tasks = [{}] * 4
    if c.max_input_length:      # conditions of the bins, as there may be no val.jsonl
        tasks = list(read_split(meta, 'val', 4))
    rows = sample_texts(model, encoder, tasks, 4, seed, resolve_sampling(c), file)
    print0(f"{file} | {printable(rows[0]['generated'])[:120]}")

# --------------------------------------------------------------------------------------------------
# texts: lists of dicts with 'generated', 'ids' and perhaps 'target'

def read_samples(file, input_file='', meta=None):
    """
    A JSONL file -> list of dicts with 'generated', its 'ids' (of the tokenizer of the bins meta,
    else words) and perhaps 'target': its own, or that of the line of input_file with the number
    'id', by default its own line. UserError if it does not fit.
    """
    rows = read_inputs(file, 'generated', 'text')
    encode = str.split
    if meta:
        encode = partial(load_tokenizer(meta['tokenizer']).encode, add_special_tokens=False)
    for row in rows:
        row['ids'] = encode(row['generated'])
    if input_file:
        found = find_targets(read_inputs(input_file))
        targets = {str(i): target for i, target in enumerate(found)}
        for i, row in enumerate(rows):
            row['target'] = targets.get(str(row.get('id', i)))
    if not find_targets(rows) and any('target' in row for row in rows):
        raise UserError(f"{file}: not each text has a 'target', its own or that of the line of "
                        "input_file which its 'id' names")
    return rows


def read_split(meta, split, n):
    """
    Up to n rows of a split, evenly spaced -> one after the other a dict: 'input', its condition;
    'generated' and 'ids', up to its first EOS.
    """
    decode = partial(load_tokenizer(meta['tokenizer']).decode, skip_special_tokens=True)
    ids, index = open_split(meta, split)
    for r in np.linspace(0, len(index), min(n, len(index)), endpoint=False).astype(int):
        condition, target = read_row(ids, index, r)
        target = cut_at_eos(target.tolist(), meta['eos_id'])
        yield dict(input=decode(condition), generated=decode(target), ids=target)

# --------------------------------------------------------------------------------------------------
# the lines of the table: one setting of the sampler, or several

def combinations(text, settings):
    """
    'steps=4,8 gamma=0,1.5' -> the product of its values: dicts of SWEPT, what is not named as in
    settings; an empty text is one. UserError for other names and wrong values.
    """
    values = {name: [settings[name]] for name in SWEPT}
    for part in text.split():
        name, _, given = part.partition('=')
        if name not in SWEPT:
            raise UserError(f"--sweep: {part!r} is not name=value,value with one of "
                            f"{', '.join(SWEPT)}")
        values[name] = [check_value(globals(), name, x, '--sweep') for x in given.split(',')]
    return [dict(zip(SWEPT, combination)) for combination in product(*values.values())]


def open_model(meta, conditions, config, device, bf16):
    """-> model, its text encoder if it may be needed. UserError if it does not fit the data."""
    source = config['init_from'] or config['out_dir']
    model = load_model(config, device, bf16)
    c = model.config
    encoder = None
    if meta:
        check_fit(meta, c, source)
    if bool(c.max_input_length) != bool(conditions):
        raise UserError(f"{source} is a model {'with' if c.max_input_length else 'without'} "
                        "conditions; --dataset or --input_file must fit it")
    if meta or conditions:
        encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
    return model, encoder


if __name__ == '__main__':
    config = configure(globals())
    seeds = [check_value(globals(), 'seed', s, '--seeds') for s in seeds.split(',') if s] or [seed]
    device, bf16, about = start(device, dtype)
    rank, world = rank_and_world()

    # ---- what is missing or wrong shows here, before the sampling; nothing is written yet --------
    meta = open_bins(data_dir, dataset) if dataset else {}
    texts, models, plan, real, train = [], {}, [], [], []
    if samples:
        plan = [(samples, None, {})]
        texts = read_samples(samples, input_file, meta)
    elif input_file or meta.get('conditional'):
        texts = read_inputs(input_file or f"{meta['dir']}/val.jsonl")[:num_samples]
    for settings in [] if samples else combinations(sweep, config):
        source = settings['init_from'] or out_dir
        if source not in models:
            models[source] = open_model(meta, texts, config | settings, device, bf16)
        weights = os.path.getmtime(find_checkpoint(source))
        sampling = resolve_sampling(models[source][0].config, **settings)
        plan.append((source, weights, sampling))
    if judge == 'auto':
        judge = 'none' if find_targets(texts) else 'gpt2-large'
    if meta and not meta.get('conditional'):
        real = list(read_split(meta, 'val', len(texts) or num_samples))
    if judge == 'ngram':
        if not real:
            raise UserError("--judge=ngram learns from training text without conditions; name its "
                            "bins: --dataset=<folder under data_dir>")
        # a million tokens are enough
        n = 1 + 1_000_000 * meta['rows']['train'] // meta['tokens']['train']
        train = list(read_split(meta, 'train', n))
    log = f"{out_dir}/{'sweep' if sweep else 'metrics'}.jsonl"
    if rank == 0:
        judges = list(make_judges(judge, gpt2, train, device))
        make_out_dir(out_dir)
        add_lines(log, [])
    known = gather(list(read_rows(log)) if sweep and rank == 0 else [])[0]
    print0(f"device: {about}, ranks: {world}; judge: {judge}")

    # ---- the texts: each rank samples its share, the first one measures --------------------------
    rows, beside = [], {}       # what a plain evaluation says besides
    if models and meta and eval_iters and not sweep:
        with autocast(device, bf16):
            beside['val'] = estimate_loss(*models[source], meta, eval_iters, batch_size, device)
        print0(describe_val(beside['val']))
    for source, weights, sampling in plan:
        row = config | dict(sweep='', judge=judge, source=source, weights=weights) | sampling
        done = [old for old in known if row.items() <= old.items()]
        if not done:
            runs = []
            for s in seeds if models else []:
                print0(f'sampling with seed {s}:', sampling)
                number = f'_{s}' if len(seeds) > 1 else ''
                file = '' if sweep else f'{out_dir}/samples_eval{number}.jsonl'
                with autocast(device, bf16):
                    runs.append(sample_texts(*models[source], texts or [{}] * num_samples,
                                             batch_size, s, sampling, file))
            if rank == 0:
                row |= over_runs([measure(run, judges, len(real)) for run in runs or [texts]])
                if sweep:
                    add_lines(log, [row])
        rows += done[:1] or [row]
    if world > 1:
        dist.destroy_process_group()
    if rank:
        sys.exit()

    # ---- the table, and the same as a line of JSON -----------------------------------------------
    real_row = dict(real=measure(real, judges, len(real))) if real else {}
    names = [k for k in ('source', *SAMPLING) if len({row[k] for row in rows}) > 1]
    print_table({label(row, names): row for row in rows} | real_row)
    if sweep and real and judge != 'none':
        print("the judge's number at the entropy of real text:")
        print_table(at_equal_entropy(rows, real_row['real']))
    if sweep:
        plot_sweep(f'{out_dir}/sweep.png', rows, real_row.get('real'), names)
        print(f"{log}, sweep.png")
    else:
        report = rows[0] | beside | real_row
        add_lines(log, [report])
        print(to_json(report))
