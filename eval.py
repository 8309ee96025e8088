"""
How good are the texts? Sample a checkpoint, or take a file of texts, and measure.

    python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram    # no download
    python eval.py --init_from=embedded-language-flows/ELF-B-owt-torch  # the official protocol
    python eval.py --samples=out/samples.jsonl    # score what exists; with 'target': BLEU and ROUGE
    python eval.py --samples=x.jsonl --judge=none --gpt2=gpt2   # GPT-2's tokens without GPT-2
    python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram --num_samples=200 \\
        --sweep="steps=4,8,16,32 gamma=0,1,1.5,2,3"     # table and picture; run again, it goes on

Read the columns together: repetition lowers the perplexity of a judge, and entropy and distinct-4
with it; what is copied from the training text is made of words and has a low perplexity, too.
"""
from configurator import UserError, check_value, configure, from_hub       # first: see there

import itertools
import math
import os
import re
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
                        open_split, printable, read_inputs, read_jsonl, read_row, to_json,
                        write_jsonl)
from parts.device import (autocast, compile_in_place, gather, pack_linears, print0, rank_and_world,
                          start)
from parts.metrics import bleu, entropy, exact_match, rouge  # noqa: F401, for those who import them
from parts.metrics import (count_ids, count_tokens, find_targets, gap_closed, gen_ppl, judge_ids,
                           load_gpt2, load_judge, mean, measure, ngram_nats, over_runs,
                           print_table, train_ngram)
from parts.plots import plot_losses, plot_sweep, read_rows  # noqa: F401
from sample import GRIDS, SAMPLERS, load_model, resolve_sampling, sample_texts

# --------------------------------------------------------------------------------------------------
out_dir = 'out'             # the model in its ckpt.pt (EMA); texts and metrics.jsonl go here
init_from = ''              # instead: a published checkpoint, file, folder or hub id
samples = ''                # instead of sampling: a JSONL file, one object a line, with
                            # 'generated' or 'text', perhaps 'target'
references = ''             # for texts without 'target': a JSONL or save_to_disk folder that
                            # has it, text i its row i
input_file = ''             # conditions and targets of a conditional model, '' = val.jsonl of
                            # the dataset
data_dir = 'data'
dataset = ''                # bins under data_dir: validation loss, real text beside the
                            # samples, training text for the n-gram judge, words and copies
num_samples = 1000
batch_size = 16             # rows sampled at once; changes memory and speed, not the texts
steps = -1                  # forward passes per text, -1 = the checkpoint's default, as below
sampler = ''                # 'ode', 'sde' or 'sde_exact', see sample.py; '' = the default
gamma = -1.0                # of the SDE: how much is re-noised
w = -1.0                    # self-conditioning guidance strength
cfg = -1.0                  # classifier-free guidance on the condition, 1 = off
grid = ''                   # times: 'logit_normal', 'quantile', 'uniform', '' = the default
sweep = ''                  # values of these six, and of out_dir or init_from: all combinations;
                            # to sweep.jsonl and sweep.png in out_dir, without validation loss
judge = 'auto'              # causal LM (folder or hub id), 'ngram' (no download), 'none';
                            # 'auto' = gpt2-large, none if there are targets
gpt2 = ''                   # GPT-2's encoder files (folder or hub id): entropy and distinct-4 in
                            # its tokens, where no GPT-2 is the judge
judge_batch_size = 16       # texts judged at once
eval_iters = 10             # batches of the validation loss, 0 = none
seed = 1337                 # text i depends on (seed, i) alone
seeds = ''                  # several, such as 42,123,456: mean and standard error over them
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # of sampling: 'float32' or 'bfloat16'; the judge is always float32
compile = False             # torch.compile the network: a minute first, then faster
# --------------------------------------------------------------------------------------------------

CHOICES = dict(sampler=('', *SAMPLERS), grid=('', *GRIDS))
AT_LEAST_1 = ('num_samples', 'batch_size', 'judge_batch_size', 'steps')
SWEPT = ('init_from', 'out_dir', 'steps', 'sampler', 'gamma', 'w', 'cfg', 'grid')
REAL, UNIGRAM = 'real', 'unigram'       # in the place of a model
LEFT_OUT = ('gen_ppl_port', 'duplicates', 'long_words', 'copied_median', 'copied_max', 'bleu_cased',
            'rouge1', 'rouge2', 'empty')        # of the table of a sweep, whose names are long

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
    batches = math.ceil(eval_iters / T_BINS) * T_BINS
    parts = {}                  # of batch k: {'l2': number, 'ce': number}
    for k in range(rank, batches, world):
        generator = torch.Generator().manual_seed(k)
        draws = draw_step(c, batch_size, c.max_length, generator, device)
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        normal = torch.special.ndtri((k % T_BINS + uniform) / T_BINS)
        draws.t = torch.sigmoid(c.t_mean + c.t_std * normal).float().to(device)
        rows = np.arange(k * batch_size, (k + 1) * batch_size) % meta['rows']['val']
        batch = encode_rows(encoder, get_rows(meta, 'val', rows, c), draws, c, device)
        _, part = objective(net, *batch, draws)
        parts[k] = {name: x.item() for name, x in part.items()}
    for share in gather(parts):
        parts |= share

    # in the order of the batches, whoever computed them: a sum's last bits depend on it
    def losses(name, first, step):
        return [parts[k][name] for k in range(first, batches, step) if name in parts[k]]

    bins = [losses('l2', i, T_BINS) for i in range(T_BINS)]
    l2, ce = mean([mean(x) for x in bins if x]), mean(losses('ce', 0, 1))
    shares = (1 - c.decoder_prob, l2), (c.decoder_prob, ce)
    loss = sum(share * x for share, x in shares if share)       # a branch that is off has no mean
    return dict(loss=loss, l2=l2, ce=ce, l2_bins=[mean(x) for x in bins])


def describe_val(val):
    """What estimate_loss found, for the log. No numbers of t: a student squeezes it."""
    bins = ' '.join(f'{x:.3f}' for x in val['l2_bins'])
    return (f"val loss {val['loss']:.4f} (l2 {val['l2']:.4f}, ce {val['ce']:.4f}) | "
            f"l2 by fifths of t, noise first: {bins}")


def write_few(model, encoder, meta, file, seed):
    """Four texts of a model in training, each rank its share, to a JSONL file; the first shown."""
    c, (rank, world) = model.config, rank_and_world()
    tokenizer, n, inputs = load_tokenizer(meta['tokenizer']), 4, None
    if c.max_input_length:
        ids, index = open_split(meta, 'val')        # there may be no val.jsonl
        conditions = [read_row(ids, index, r)[0] for r in range(min(n, len(index)))]
        inputs = tokenizer.batch_decode(conditions, skip_special_tokens=True)
        n = len(inputs)
    mine = sample_texts(model, tokenizer, range(n)[rank::world], n, seed, model.mode_tokens.device,
                        resolve_sampling(c), inputs, encoder)
    rows = sorted(sum(gather(list(mine)), []), key=itemgetter('id'))
    if rank == 0:
        write_jsonl(file, rows)
    print0(f"{file} | {printable(rows[0]['generated'])[:120]}")

# --------------------------------------------------------------------------------------------------
# texts in: a list of dicts with 'generated', 'ids' and perhaps 'target'

def read_samples(file, references='', encode=str.split):
    """
    A JSONL file -> list of dicts with 'generated', its 'ids' and perhaps 'target': its own, or that
    of the row of references (a JSONL, or a folder of save_to_disk) with the number 'id', by default
    the line's own. UserError names file and line.
    """
    targets, rows = [], []
    if references and os.path.isdir(references):
        from datasets import load_from_disk
        with from_hub("references: no save_to_disk folder with a column 'target'", references):
            targets = load_from_disk(references)['target'][:]
    elif references:
        targets = [row.get('target', row.get('output')) for _, row in read_jsonl(references)]
    for where, row in read_jsonl(file):
        number = row.get('id', len(rows))
        if references:
            if number not in range(len(targets)):
                raise UserError(f"{where} has id {number!r}, {references} has {len(targets)} rows")
            row['target'] = targets[int(number)]
        text = row.get('generated', row.get('text'))
        if not isinstance(text, str) or not isinstance(row.get('target', ''), str):
            raise UserError(f"{where} needs a text under 'generated' or 'text', and under 'target' "
                            "if it has one")
        text = text.encode('utf-8', 'replace').decode()     # half a surrogate pair: '?'
        rows.append(row | dict(generated=text, ids=encode(text)))
        if ('target' in row) != ('target' in rows[0]):
            raise UserError(f"{where}: some lines have a 'target' and some have none; all or none")
    if not rows:
        raise UserError(f"{file} has no texts")
    return rows


def read_conditions(c, meta, source, file, n):
    """
    What a model with conditions gets -> up to n dicts with 'input' and perhaps 'target'; [] for a
    model without. file: '' = val.jsonl of the dataset.
    """
    if not c.max_input_length:
        if file:
            raise UserError(f"{source} is a model without conditions; drop --input_file")
        return []
    if not file and not meta:
        raise UserError(f"{source} is a model with conditions; give --dataset=<folder under "
                        "data_dir> or --input_file=x.jsonl with 'input' and 'target'")
    return read_inputs(file or os.path.join(meta['dir'], 'val.jsonl'))[:n]


def bin_rows(meta, split, n, max_length):
    """Up to n rows of a split, evenly spaced -> lists of their target ids, cut at the first EOS."""
    ids, index = open_split(meta, split)
    numbers = np.linspace(0, len(index), min(n, len(index)), endpoint=False).astype(int)
    targets = (read_row(ids, index, r)[1][:max_length].tolist() for r in numbers)
    return [cut_at_eos(target, meta['eos_id']) for target in targets]


def reference_texts(meta, n, max_length, seed):
    """
    What the texts of a model without conditions are held against -> rows: REAL, n of the validation
    split; UNIGRAM, as many tokens, each drawn from the training text; the training text, of which
    a million tokens are enough for a 5-gram.
    """
    real = bin_rows(meta, 'val', n, max_length)
    rows = 1 + 1_000_000 * meta['rows']['train'] // max(1, meta['tokens']['train'])
    train = bin_rows(meta, 'train', rows, max_length)
    pool, rng = np.concatenate(train), np.random.default_rng(seed)
    unigram = [rng.choice(pool, len(ids)).tolist() for ids in real]
    tokenizer = load_tokenizer(meta['tokenizer'])

    def decode(ids_list):
        return [dict(generated=tokenizer.decode(ids, skip_special_tokens=True), ids=ids)
                for ids in ids_list]

    return {REAL: decode(real), UNIGRAM: decode(unigram)}, decode(train)


def sample_runs(model, tokenizer, encoder, conditions, n, how, seeds, batch_size, device, folder):
    """
    Sample n texts, or one for each condition, for each seed -> {seed: rows}. Every rank samples its
    share of a batch and gets all of it; the first one adds it to samples_eval.jsonl in folder, if
    one is named (of several seeds samples_eval_<seed>.jsonl): a kill leaves what is done.
    """
    inputs, targets = [row['input'] for row in conditions] or None, find_targets(conditions)
    (rank, world), runs = rank_and_world(), {seed: [] for seed in seeds}
    batches = batched(range(n), batch_size * world)
    with tqdm(total=n * len(seeds), unit='text', disable=True if rank else None) as bar:
        for seed, numbers in itertools.product(seeds, batches):
            mine = sample_texts(model, tokenizer, numbers[rank::world], batch_size, seed, device,
                                how, inputs, encoder)
            rows = sorted(sum(gather(list(mine)), []), key=itemgetter('id'))
            if targets:
                rows = [row | dict(target=targets[row['id']]) for row in rows]
            if folder and rank == 0:
                name = f'samples_eval_{seed}.jsonl' if len(seeds) > 1 else 'samples_eval.jsonl'
                add_lines(os.path.join(folder, name), rows, 'a' if runs[seed] else 'w')
            runs[seed] += rows
            bar.update(len(rows))
    return runs


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
    settings: an empty text is one combination. UserError if malformed.
    """
    values = {}
    for part in text.split():
        name, _, given = part.partition('=')
        given = given.split(',')
        if name not in SWEPT or name in values or not all(given):
            raise UserError(f"--sweep: {part!r} is not name=value,value with one of "
                            f"{', '.join(SWEPT)}, each once")
        values[name] = [check_value(globals(), name, value, '--sweep') for value in given]
    if 'init_from' in values and 'out_dir' in values:
        raise UserError("--sweep: init_from and out_dir name models both; use one of them")
    base = {name: settings[name] for name in SWEPT}
    if 'out_dir' in values:
        base['init_from'] = ''
    return [base | dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def open_models(combos, meta, config, device, bf16):
    """
    The models of all combinations -> {source: (model, its tokenizer, its text encoder if it is
    needed, its conditions)}. UserError if one does not fit.
    """
    models = {}
    for combo in combos:
        source, encoder = combo['init_from'] or combo['out_dir'], None
        if source in models:
            continue
        model = load_model(combo['init_from'], combo['out_dir']).to(device)
        c = model.config
        if meta:
            check_vocabulary(meta, c, source)
        tokenizer = load_tokenizer(c.tokenizer, c.vocab_size)
        conditions = read_conditions(c, meta, source, config['input_file'], config['num_samples'])
        if conditions or meta and config['eval_iters'] and not config['sweep']:
            encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
        if not config['compile'] or not compile_in_place(model, device=device):
            pack_linears(model, bf16)
        models[source] = model, tokenizer, encoder, conditions
    return models


def stamp(path):
    """What tells a file from others and from its later self."""
    return f"{os.path.abspath(path)}, {os.path.getmtime(path)}" if path else ''


def make_plan(combos, models):
    """
    combinations' dicts, without those that come to the same -> list of dicts: 'source' as named,
    its 'weights', the sampler's settings, passes a text ('nfe').
    """
    plan = []
    for init_from, out_dir, *given in map(dict.values, combos):
        source = init_from or out_dir
        c = models[source][0].config
        how = resolve_sampling(c, *given)
        if how['cfg'] != 1 and not c.max_input_length:
            raise UserError(f"cfg={how['cfg']}: {source} is a model without conditions; drop it")
        if how['sampler'] == 'ode' or how['steps'] == 1:
            how['gamma'] = 0.0          # nothing is re-noised there
        nfe = how['steps'] * (1 if how['cfg'] == 1 else 2)
        entry = dict(source=source, weights=stamp(find_checkpoint(source)), **how, nfe=nfe)
        if entry not in plan:
            plan.append(entry)
    return plan


def make_judges(judge, train, encode_gpt2, batch_size, device):
    """The settings judge and gpt2 -> functions of texts and their ids that give metrics, dicts."""
    judges = []
    if judge == 'ngram':
        of_chars = train_ngram([row['generated'] for row in train], 5)
        of_tokens = train_ngram([tuple(row['ids']) for row in train], 3)
        judges.append(lambda texts, ids: dict(
            nats_per_char=ngram_nats(texts, of_chars),
            nats_per_token=ngram_nats([tuple(row) for row in ids], of_tokens)))
    elif judge != 'none':
        load_judge(judge, str(device))      # if it is missing, that shows now
        judges.append(lambda texts, ids: gen_ppl(texts, judge, batch_size, device))
    if encode_gpt2:
        judges.append(lambda texts, ids: count_ids(judge_ids(texts, encode_gpt2)))
    return judges


def check(given):
    """What makes no sense together: UserError."""
    if seeds and not re.fullmatch(r'\d+(,\d+)*', seeds):
        raise UserError(f"seeds={seeds!r}: whole numbers with commas between, such as 42,123,456")
    if sweep and samples:
        raise UserError("a sweep samples its texts; drop --samples or --sweep")
    unread, where = {'references'}, 'without'
    if samples:
        unread, where = {'num_samples', 'seeds', 'compile', 'input_file', *SWEPT[2:]}, 'beside'
    if unread := sorted(given & unread):
        raise UserError(f"--{unread[0]}: nothing reads it {where} --samples; drop it")


if __name__ == '__main__':
    given = set()
    config = configure(globals(), given=given)
    check(given)
    combos = combinations(sweep, config)
    device, bf16, about = start(device, dtype)
    rank, world = rank_and_world()
    meta = open_bins(data_dir, dataset) if dataset else None
    texts_alone = meta and not meta.get('conditional')
    make_out_dir(out_dir)

    # ---- what is missing or wrong shows here, before the sampling --------------------------------
    encode_gpt2 = load_gpt2(gpt2) if gpt2 else None
    seeds = [int(s) for s in seeds.split(',')] if seeds else [seed]
    models, encode = {}, str.split
    if meta:
        tokenizer, length = load_tokenizer(meta['tokenizer']), meta['max_length']
    if not samples:
        models = open_models(combos, meta, config, device, bf16)
        plan = make_plan(combos, models)
        model, tokenizer, encoder, texts = models[plan[0]['source']]
        n, length = len(texts) or num_samples, model.config.max_length
    if meta or models:
        encode = partial(tokenizer.encode, add_special_tokens=False)
    if samples:
        texts = read_samples(samples, references, encode)
        plan, n = [dict(source=samples)], len(texts)
    if judge == 'auto':
        judge = 'none' if find_targets(texts) else 'gpt2-large'
    if judge == 'ngram' and not texts_alone:
        raise UserError("--judge=ngram learns from training text without conditions; name its "
                        "bins: --dataset=<folder under data_dir>")
    if texts_alone:
        plan += [dict(source=name, length=length, seed=seed) for name in (REAL, UNIGRAM)]
    data = stamp(input_file or meta and os.path.join(meta['dir'], 'meta.json'))
    shared = dict(judge=judge, gpt2=gpt2, num_samples=n, seeds=seeds, bf16=bf16, data=data)
    plan = [entry | shared for entry in plan]
    log = os.path.join(out_dir, 'sweep.jsonl' if sweep else 'metrics.jsonl')
    known, others, train, judges = [], {}, [], []
    if rank == 0:
        add_lines(log, [])
        known = read_rows(log) if sweep else []
    known = gather(known)[0]            # what is on the first rank's disk
    done = [next((row for row in known if entry.items() <= row.items()), None) for entry in plan]
    if rank == 0 and None in done:      # the other ranks wait at the next exchange
        if texts_alone:
            others, train = reference_texts(meta, n, length, seed)
        judges = make_judges(judge, train, encode_gpt2, judge_batch_size, device)
    limit = count_tokens(others.get(REAL, [])) or sys.maxsize
    print0(f"device: {about}, ranks: {world}; judge: {judge}; texts: {n}; to measure: "
           f"{done.count(None)} of {len(plan)}")

    # ---- the texts: each rank samples its share, the first one measures --------------------------
    val = {}
    if models and meta and eval_iters and not sweep:
        with autocast(device, bf16):
            val = dict(val=estimate_loss(model, encoder, meta, eval_iters, batch_size, device))
        print0(describe_val(val['val']))
    for i, entry in enumerate(plan):
        if done[i]:
            continue
        began, runs = time.time(), {seed: others.get(entry['source'], texts)}
        if entry['source'] in models:
            how = {name: entry[name] for name in SWEPT[2:]}
            print0("sampling: " + ', '.join(f'{k}={v}' for k, v in how.items()))
            with autocast(device, bf16):
                runs = sample_runs(*models[entry['source']], n, how, seeds, batch_size, device,
                                   '' if sweep else out_dir)
            entry |= dict(seconds=time.time() - began)
        if rank:
            continue
        if not sweep:       # real text is held to as many tokens
            limit = min(limit, *map(count_tokens, runs.values()))
        of_runs = [measure(rows, limit, train, judges, encode) for rows in runs.values()]
        done[i] = entry | over_runs(of_runs)
        if len(runs) > 1:
            done[i]['by_seed'] = dict(zip(runs, of_runs))
        if sweep:
            add_lines(log, [done[i]])
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        sys.exit()

    # ---- the table, and the same as a line of JSON -----------------------------------------------
    rows = [row for row in done if row['source'] not in (REAL, UNIGRAM)]
    names = [k for k in ('source', *SWEPT[2:]) if len({row.get(k) for row in rows}) > 1]
    table = {' '.join(f'{k}={row[k]}' for k in names) or 'samples': row for row in rows}
    beside = {row['source']: row for row in done[len(rows):]}
    if sweep:
        print_table(table | beside, LEFT_OUT)
        plot_sweep(os.path.join(out_dir, 'sweep.png'), rows, beside.get(REAL), names)
        sys.exit()
    report = rows[0] | val
    for name, row in beside.items():
        report[name] = {k: x for k, x in row.items() if k not in shared}
    if judge == 'ngram':
        report |= gap_closed(report)
    add_lines(log, [report])
    print_table(table | beside)
    if judge == 'ngram':
        print(f"gap closed: {report['gap_closed']:.3f} of the way from unigram to real text by "
              f"characters, {report['gap_closed_tokens']:.3f} by tokens")
    print(to_json(report))
