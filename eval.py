"""
How good are the texts? Sample a checkpoint, or take a file of texts, and measure.

    python eval.py --out_dir=out/demo --dataset=pydocs --judge=ngram    # no download
    python eval.py --init_from=embedded-language-flows/ELF-B-owt-torch  # the official protocol
    python eval.py --samples=out/samples.jsonl    # score what exists; with 'target': BLEU and ROUGE
    python eval.py --out_dir=out/demo --dataset=pydocs --judge=ngram --num_samples=200 \\
        --sweep="steps=4,8,16,32 gamma=0,1,1.5,2,3"     # table and picture; run again, it goes on

Read the columns together: repetition lowers the perplexity of a judge, and entropy and distinct-4
with it; what is copied from the training text is made of words and has a low perplexity, too.
"""
from configurator import UserError, configure, from_hub       # first: see there

import math
import os
import re
import sys
import time
from collections import defaultdict
from operator import itemgetter

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from parts.checkpoint import make_out_dir
from parts.data import (check_vocabulary, cut_at_eos, get_rows, load_tokenizer, open_bins,
                        open_split, printable, read_inputs, read_jsonl, read_row, to_json,
                        write_jsonl)
from parts.device import autocast, gather, pack_linears, print0, rank_and_world, start
from parts.metrics import (count_tokens, find_targets, load_judge, mean, measure, over_runs,
                           print_gap, print_table, signs, train_ngram)
from parts.metrics import bleu, entropy, gen_ppl, rouge  # noqa: F401
from model import TextEncoder, compute_loss, draw, encode_rows
from sample import load_model, resolve_sampling, sample_texts
from parts.sweep import (LEFT_OUT, REAL, combinations, find_done, make_plan, names_of, passes,
                         plot_sweep, read_rows, sampler_of, save_figure, stamp)

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
judge_batch_size = 16       # texts judged at once
eval_iters = 10             # batches of the validation loss, 0 = none
seed = 1337                 # text i depends on (seed, i) alone
seeds = ''                  # several, such as 42,123,456: mean and standard error over them
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # of sampling: 'float32' or 'bfloat16'; the judge is always float32
# --------------------------------------------------------------------------------------------------
# the validation loss, and the curves of a run

T_BINS = 5      # of equal probability under the training distribution of t


def t_edges(c):
    """Edges of the bins of t -> list of T_BINS + 1 numbers from 0 to 1."""
    quantiles = torch.linspace(0, 1, T_BINS + 1, dtype=torch.float64)
    return torch.sigmoid(c.t_mean + c.t_std * torch.special.ndtri(quantiles)).tolist()


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
    bins, others = [[] for _ in range(T_BINS)], defaultdict(list)
    for k in range(batches):
        for name, x in parts[k].items():
            (bins[k % T_BINS] if name == 'l2' else others[name]).append(x)
    l2 = mean([mean(losses) for losses in bins if losses])
    means = dict(l2=l2, ce=math.nan) | {name: mean(losses) for name, losses in others.items()}
    shares = dict(l2=1 - c.decoder_prob, ce=c.decoder_prob)
    loss = sum(share * means[name] for name, share in shares.items() if share)  # off: no mean
    return dict(loss=loss, **means, l2_bins=[mean(losses) for losses in bins])


def describe_val(val, c):
    """What estimate_loss found, for the log."""
    edges = t_edges(c)
    bins = [f"{a:.2f}-{b:.2f}: {x:.3f}" for a, b, x in zip(edges, edges[1:], val['l2_bins'])]
    parts = [f"{k} {x:.4f}" for k, x in val.items() if k not in ('loss', 'l2_bins')]
    return f"val loss {val['loss']:.4f} ({', '.join(parts)}) | l2 by t {' '.join(bins)}"


def write_few(model, encoder, meta, file, seed):
    """Four texts of a model in training, each rank its share, to a JSONL file; the first shown."""
    c, tokenizer, inputs = model.config, load_tokenizer(model.config.tokenizer), None
    if c.max_input_length:
        inputs = [row['input'] for row in read_inputs(os.path.join(meta['dir'], 'val.jsonl'))]
    rank, world = rank_and_world()
    numbers = range(min(4, len(inputs)) if inputs else max(4, world))[rank::world]
    texts = list(sample_texts(model, tokenizer, numbers, 4, seed, model.mode_tokens.device,
                              resolve_sampling(c), inputs, encoder))
    texts = sorted(sum(gather(texts), []), key=itemgetter('id'))
    if rank == 0:
        write_jsonl(file, texts)
        print(f"{file} | {printable(texts[0]['generated'])[:120]}")


def read_series(file):
    """
    metrics.jsonl -> {name: {iteration: number}}. A run that was resumed has written again what came
    after its checkpoint: the last line of an iteration counts.
    """
    series = defaultdict(dict)
    for row in read_rows(file):
        for name, x in row.items():
            if 'iter' in row and isinstance(x, (int, float)):
                series[name][row['iter']] = x
    return series


def plot_losses(out_dir):
    """metrics.jsonl -> loss.png."""
    from matplotlib.figure import Figure
    series = read_series(os.path.join(out_dir, 'metrics.jsonl'))
    titles = dict(l2='denoise: l2 of the velocity', ce='decode: cross-entropy, nats per token')
    fig = Figure(figsize=(10, 4), layout='constrained')
    for axis, (part, title) in zip(fig.subplots(1, 2), titles.items()):
        for name, line, label in ((part, '-', 'train'), ('val_' + part, 'o-', 'validation')):
            if points := sorted(series[name].items()):
                axis.plot(*zip(*points), line, markersize=3, linewidth=1, label=label)
                axis.legend()
        axis.set(title=title, xlabel='iteration', yscale='log')
        axis.grid(alpha=0.3)
    save_figure(fig, os.path.join(out_dir, 'loss.png'))

# --------------------------------------------------------------------------------------------------
# texts in: a list of dicts with 'generated', 'ids' and perhaps 'target'

def read_samples(file, references='', tokenizer=None):
    """
    A JSONL file -> list of dicts with 'generated', its 'ids' (without a tokenizer its words), and
    perhaps 'target': its own, or that of the row of references (a JSONL, or a folder of
    save_to_disk) with the number 'id', by default the line's own. UserError names file and line.
    """
    targets = read_targets(references) if references else []
    rows = []
    for where, row in read_jsonl(file):
        if references:
            number = row.get('id', len(rows))
            if number not in range(len(targets)):
                raise UserError(f"{where} has id {number!r}, {references} has {len(targets)} rows")
            row['target'] = targets[int(number)]
        text = row.get('generated', row.get('text'))
        if not isinstance(text, str) or not isinstance(row.get('target', ''), str):
            raise UserError(f"{where} needs a text under 'generated' or 'text', and under 'target' "
                            "if it has one")
        text = text.encode('utf-8', 'replace').decode()     # half a surrogate pair: '?'
        ids = tokenizer(text, add_special_tokens=False)['input_ids'] if tokenizer else text.split()
        row |= dict(generated=text, ids=ids)
        rows.append(row)
        if ('target' in row) != ('target' in rows[0]):
            raise UserError(f"{where}: some lines have a 'target' and some have none; all or none")
    if not rows:
        raise UserError(f"{file} has no texts")
    return rows


def read_targets(references):
    """A JSONL with 'target' (or 'output') or a save_to_disk folder with that column -> list."""
    if not os.path.isdir(references):
        return [row.get('target', row.get('output')) for _, row in read_jsonl(references)]
    from datasets import load_from_disk
    with from_hub("references: no save_to_disk folder with a column 'target'", references):
        return load_from_disk(references)['target'][:]


def read_conditions(c, meta, source):
    """
    What a model with conditions gets -> list of dicts with 'input' and perhaps 'target',
    num_samples at most; [] for a model without.
    """
    if not c.max_input_length:
        return []
    if not input_file and not meta:
        raise UserError(f"{source} is a model with conditions; give --dataset=<folder under "
                        "data_dir> or --input_file=x.jsonl with 'input' and 'target'")
    return read_inputs(input_file or os.path.join(meta['dir'], 'val.jsonl'))[:num_samples]


def open_models(combos, meta, device, bf16):
    """
    -> {source: (model, its tokenizer, its text encoder if it is needed, its conditions)} of all
    combinations. UserError if one does not fit.
    """
    models = {}
    for combo in combos:
        init_from, out_dir = combo['init_from'], combo['out_dir']
        source, encoder = init_from or out_dir, None
        if source in models:
            continue
        model = load_model(init_from, out_dir).to(device)
        c = model.config
        if meta:
            check_vocabulary(meta, c, source)
        conditions = read_conditions(c, meta, source)
        tokenizer = load_tokenizer(c.tokenizer, c.vocab_size)
        if conditions or meta and eval_iters and not sweep:
            encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
        pack_linears(model, bf16)
        models[source] = model, tokenizer, encoder, conditions
    return models


def run_seeds():
    """-> {name of a run: its seed}."""
    return {f'samples_{s}': int(s) for s in seeds.split(',')} if seeds else {'samples': seed}


def sample_runs(model, tokenizer, encoder, conditions, how, device, bar):
    """
    Sample num_samples texts, or one for each condition, for each seed -> name of the run, rows, one
    run after the other. Every rank samples its share and gets all of them; bar: of its steps.
    """
    inputs = [row['input'] for row in conditions] or None

    def tick(batch, i, t, texts):
        bar.update(len(batch) if i else 0)      # it is called before the first step, too

    for name, run_seed in run_seeds().items():
        rows = list(sample_texts(model, tokenizer, share_of(conditions), batch_size, run_seed,
                                 device, how, inputs, encoder, watch=tick))
        rows = sorted(sum(gather(rows), []), key=itemgetter('id'))
        for row, target in zip(rows, find_targets(conditions)):
            row['target'] = target
        yield name, rows


def share_of(conditions):
    """The numbers of the texts that this rank samples in a run."""
    rank, world = rank_and_world()
    return range(rank, len(conditions) or num_samples, world)


def step_bar(name, conditions, steps):
    """A bar over this rank's texts, each of so many steps."""
    hidden = True if rank_and_world()[0] else None      # None: where there is no terminal
    total = len(run_seeds()) * len(share_of(conditions)) * steps
    return tqdm(total=total, desc=name, unit='step', disable=hidden)


def bin_rows(meta, split, n, max_length):
    """Up to n rows of a split, evenly spaced -> lists of their target ids, cut at the first EOS."""
    ids, index = open_split(meta, split)
    rows = []
    for r in np.linspace(0, len(index), min(n, len(index)), endpoint=False).astype(int):
        _, target = read_row(ids, index, r)
        rows.append(cut_at_eos(target[:max_length].tolist(), meta['eos_id']))
    return rows


def reference_texts(meta, tokenizer, n, max_length):
    """
    What the texts of a model without conditions are held against -> {'real': n rows of the
    validation split, 'unigram': as many tokens, each drawn from those of the training text}, the
    training text, a list of texts, and the n-gram judges if asked for: of characters, of tokens.
    A million tokens of training text are enough for a 5-gram.
    """
    if not meta or meta.get('conditional'):
        return {}, [], None
    real = bin_rows(meta, 'val', n, max_length)
    rows = 1 + 1_000_000 * meta['rows']['train'] // max(1, meta['tokens']['train'])
    train = bin_rows(meta, 'train', rows, max_length)
    pool, rng = np.concatenate(train), np.random.default_rng(seed)
    unigram = [rng.choice(pool, len(ids)).tolist() for ids in real]

    def decode(ids_list):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_list]
        return [dict(generated=text, ids=ids) for text, ids in zip(texts, ids_list)]

    train_texts = [row['generated'] for row in decode(train)]
    ngram = None
    if judge == 'ngram':
        ngram = train_ngram(train_texts, 5), train_ngram(map(signs, train), 3)
    return dict(real=decode(real), unigram=decode(unigram)), train_texts, ngram

# --------------------------------------------------------------------------------------------------

def check_settings():
    """All that is wrong with the settings whatever the model: UserError."""
    least = dict(num_samples=1, batch_size=1, judge_batch_size=1, seed=0, eval_iters=0)
    for name, smallest in least.items():
        if globals()[name] < smallest:
            raise UserError(f"{name}={globals()[name]}: must be at least {smallest}")
    if seeds and not re.fullmatch(r'\d+(,\d+)*', seeds):
        raise UserError(f"seeds={seeds!r}: whole numbers with commas between, such as 42,123,456")
    if sweep and samples:
        raise UserError("a sweep samples its texts; drop --samples or --sweep")


def choose_judge(targets, meta):
    """The setting judge, with 'auto' resolved. UserError if an n-gram has nothing to learn from."""
    if judge == 'auto':
        return 'none' if targets else 'gpt2-large'
    if judge == 'ngram' and (not meta or meta.get('conditional')):
        raise UserError("--judge=ngram learns from training text without conditions; name its "
                        "bins: --dataset=<folder under data_dir>")
    return judge


def append_json(name, row):
    with open(os.path.join(out_dir, name), 'a', encoding='utf-8') as f:
        f.write(to_json(row) + '\n')


def run_sweep(combos, models, meta, device, bf16):
    """
    Sample and measure what is not in out_dir/sweep.jsonl yet, and add it there one by one; then the
    table and sweep.png of all. The ranks share each sampling, the first one measures.
    """
    rank, _ = rank_and_world()
    model, tokenizer, _, conditions = next(iter(models.values()))
    length = model.config.max_length
    data = input_file or meta and os.path.join(meta['dir'], 'meta.json')
    shared = dict(num_samples=num_samples, seeds=list(run_seeds().values()), judge=judge, bf16=bf16,
                  data=stamp(data))
    plan = make_plan(combos, models)
    if meta and not meta.get('conditional'):
        plan.insert(0, dict(model=REAL, length=length, steps=0, cfg=1))
    plan = [entry | shared for entry in plan]
    file = os.path.join(out_dir, 'sweep.jsonl')
    done = gather(find_done(file, plan))[0]      # what is on the first rank's disk
    todo = [entry for entry, row in zip(plan, done) if not row]
    print0(f"sweep: {len(plan)} to measure, {len(plan) - len(todo)} of them are in {file}")
    others, train_texts, ngram = {}, [], None
    if todo and rank == 0:
        others, train_texts, ngram = reference_texts(meta, tokenizer, num_samples, length)
    real = others.get('real', [])
    limit = count_tokens(real) or sys.maxsize

    with step_bar('sweep', conditions, sum(entry['steps'] for entry in todo)) as bar:
        for entry in todo:
            start, runs = time.time(), dict(real=real)
            if entry['model'] != REAL:
                with autocast(device, bf16):
                    runs = dict(sample_runs(*models[entry['model']], sampler_of(entry), device,
                                            bar))
            cost = dict(nfe=passes(entry), seconds=time.time() - start)
            if rank == 0:
                of_runs = [measure(rows, limit, train_texts, ngram, judge, judge_batch_size, device)
                           for rows in runs.values()]
                append_json('sweep.jsonl', entry | cost | over_runs(of_runs))
    if rank == 0:
        rows = find_done(file, plan)
        print_table(dict(zip(names_of(rows), rows)), "the model's tokens", LEFT_OUT)
        plot_sweep(os.path.join(out_dir, 'sweep.png'), rows)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == '__main__':
    configure(globals())
    check_settings()
    combos = combinations(sweep, globals())
    rank, world = rank_and_world()
    if samples and rank:
        sys.exit()                      # one rank is enough to read a file
    device, bf16, about = start(device, dtype)
    meta = open_bins(data_dir, dataset) if dataset else None
    make_out_dir(out_dir)

    # ---- what is missing or wrong shows here, before the sampling --------------------------------
    if samples:
        tokenizer = load_tokenizer(meta['tokenizer'], meta['vocab_size']) if meta else None
        unit, length = (f"tokens of {meta['dir']}", meta['max_length']) if meta else ('words', 0)
        given = read_samples(samples, references, tokenizer)
    else:
        models, unit = open_models(combos, meta, device, bf16), "the model's tokens"
        model, tokenizer, encoder, given = opened = next(iter(models.values()))
        c = model.config
        length = c.max_length
    judge = choose_judge(find_targets(given), meta)
    if judge not in ('ngram', 'none') and rank == 0:
        load_judge(judge, str(device))      # the other ranks wait for it at the first exchange
    print0(f"device: {about}, ranks: {world}; judge: {judge}")
    if sweep:
        run_sweep(combos, models, meta, device, bf16)
        sys.exit()

    # ---- the texts: each rank samples its share, the first one measures --------------------------
    report, runs = dict(source=samples or init_from or out_dir, judge=judge), {}
    report |= dict(seeds=seeds) if seeds else dict(seed=seed)
    if samples:
        runs['samples'] = given
    else:
        how = resolve_sampling(c, steps, sampler, gamma, w, cfg, grid)
        nfe = passes(how)
        print0("sampling: " + ', '.join(f'{k}={v}' for k, v in how.items()) + f", NFE={nfe}")
        if meta and eval_iters:
            with autocast(device, bf16):
                report['val'] = estimate_loss(model, encoder, meta, eval_iters, batch_size, device)
            print0(describe_val(report['val'], c))
        start = time.time()
        with autocast(device, bf16), step_bar('samples', given, how['steps']) as bar:
            for name, rows in sample_runs(*opened, how, device, bar):
                runs[name] = rows
                if rank == 0:
                    file = name.replace('samples', 'samples_eval') + '.jsonl'
                    write_jsonl(os.path.join(out_dir, file), rows)
                    print(f"{len(rows)} texts in {os.path.join(out_dir, file)}")
        report |= how | dict(nfe=nfe, seconds=time.time() - start)
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        sys.exit()

    # ---- beside them real text, and tokens of the training text drawn one by one -----------------
    count = len(next(iter(runs.values())))
    others, train_texts, ngram = reference_texts(meta, tokenizer, count, length)

    # ---- the table, and the same as a line of JSON -----------------------------------------------
    limit = min(count_tokens(rows) for rows in (runs | others).values())
    results = {}
    for name, rows in (runs | others).items():
        results[name] = measure(rows, limit, train_texts, ngram, judge, judge_batch_size, device)
    of_runs = [results[name] for name in runs]
    over_all = over_runs(of_runs)
    report |= over_all
    if len(runs) > 1:
        results['mean'], results['std err'] = over_all, over_all['stderr']
        report['by_seed'] = dict(zip(seeds.split(','), of_runs))
    report |= {name: results[name] for name in others}
    print_table(results, unit)
    if ngram:
        report |= print_gap(results, report)
    append_json('metrics.jsonl', report)
    print(to_json(report))
