"""The two pictures, the losses of a run and samplers side by side, and what is read for them."""
import json

import numpy as np
from pandas import DataFrame

# of a sweep: the first two that there are, y and x. Quality over diversity: a judge is pleased by
# texts that repeat themselves, and there such texts lie to the left
AXES = dict(
    nats_per_char='nats per character of the n-gram judge (lower is better)',
    gen_ppl='generative perplexity (lower is better)', bleu='BLEU (higher is better)',
    entropy='entropy of a text, nats (GPT-2 tokens)', entropy_own='entropy of a text, nats',
    distinct_4='share of different 4-grams', steps='steps of the sampler')


def read_rows(file):
    """The objects of a JSONL file that runs add to; a kill can cut a line: left out, and said."""
    with open(file, encoding='utf-8', errors='replace') as f:
        for line in filter(str.strip, f):
            try:
                yield {} | json.loads(line)
            except (ValueError, TypeError):
                print(f"{file}: 1 line is no JSON object, left out: {line[:40]!r}")


def plot_losses(out_dir):
    """
    metrics.jsonl -> loss.png. A run that was resumed has written again what came after its
    checkpoint: the last line of an iteration counts.
    """
    from matplotlib.figure import Figure        # not by pyplot, which may want a display
    sides = [('l2', 'val_l2'), ('ce', 'val_ce')]
    rows = DataFrame(read_rows(f'{out_dir}/metrics.jsonl'),
                     columns=['iter', *sides[0], *sides[1]], dtype=float)
    points = rows.groupby('iter').last()        # of each column the last that is a number
    fig = Figure(figsize=(10, 4), layout='constrained')
    points.plot(ax=fig.subplots(1, 2), subplots=sides, style='.', logy=True)
    fig.savefig(f'{out_dir}/loss.png')


def at_equal_entropy(rows, real):
    """
    A sampler buys a judge's praise with entropy, so models are compared where theirs is that of
    real text (its row): of each model and number of steps, the judge's number there, interpolated
    between the points to both sides -> {label: it, or 'not reached'; and the entropy}.
    """
    y, x = [key for key in AXES if key in real][:2]
    found = {}
    points = DataFrame(rows).dropna(subset=[x, y]).sort_values(x)
    for (source, steps), line in points.groupby(['source', 'steps'], sort=False):
        number = np.interp(real[x], line[x], line[y], np.nan, np.nan)
        number = 'not reached' if np.isnan(number) else number
        found[f'{source}, {steps} steps'] = {y: number, x: real[x]}
    return found


def label(row, names):
    """What tells a row from others, the settings with these names, or 'samples' if nothing does."""
    return ' '.join(f'{name}={row[name]}' for name in names) or 'samples'


def plot_sweep(file, rows, real, names):
    """
    Rows of a sweep -> a picture: quality over diversity, real text (its row, or None) as a star.
    A sampler buys a judge's praise with entropy: compare where the lines cross that of real text.
    names: the settings in which rows differ; the last is written beside the points, a line for each
    value of the others. What has no number, such as the nats of blank texts, is left out.
    """
    from matplotlib.figure import Figure
    y, x = [key for key in AXES if key in rows[0]][:2]
    *others, last = names or ['steps']
    points = DataFrame(rows, [label(row, others) for row in rows]).dropna(subset=[x, y])
    fig = Figure(figsize=(8, 5), layout='constrained')
    axis = fig.subplots()
    for name, line in points.groupby(level=0, sort=False):
        axis.plot(line[x], line[y], 'o-', label=name)
    for text, *at in zip(points[last], points[x], points[y]):
        axis.annotate(text, at, (4, 4), textcoords='offset points')
    if real:
        axis.axvline(real[x], color='gold')
        axis.plot(real[x], real[y], '*', markersize=16, color='gold', label='real text')
    axis.set(xlabel=AXES[x], ylabel=AXES[y], title=f"beside the points: {last}")
    fig.legend(loc='outside right upper')
    fig.savefig(file)
