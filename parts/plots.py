"""The two pictures, the losses of a run and samplers side by side, and what is read for them."""
import json
import os
from collections import defaultdict

# of a sweep: the first two that there are, y and x. Quality over diversity: a judge is pleased by
# texts that repeat themselves, and there such texts lie to the left
AXES = dict(
    nats_per_char='nats per character of the n-gram judge (lower is better)',
    gen_ppl='generative perplexity (lower is better)', bleu='BLEU (higher is better)',
    entropy='entropy of a text, nats (GPT-2 tokens)', entropy_own='entropy of a text, nats',
    distinct_4='share of different 4-grams')


def read_rows(file):
    """The objects of a JSONL file that runs add to; a kill can cut a line: left out, and said."""
    rows, broken = [], 0
    with open(file, encoding='utf-8', errors='replace') as f:
        for line in filter(str.strip, f):
            try:
                rows.append({} | json.loads(line))
            except (ValueError, TypeError):
                broken += 1
    if broken:
        print(f"{file}: {broken} lines are no JSON objects, left out")
    return rows


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


def plot_sweep(file, rows, real, names):
    """
    Rows of a sweep -> a picture: quality over diversity, real text (its row, or None) as a star.
    names: the settings in which rows differ; one of them is written beside the points, a line for
    each value of the others. What has no number, such as the nats of blank texts, is left out.
    """
    from matplotlib.figure import Figure
    y, x = [key for key in AXES if key in rows[0]][:2]
    along = [name for name in names if name in ('gamma', 'w', 'cfg')] or names or ['steps']
    lines = defaultdict(list)
    for row in rows:
        if row[x] is not None and row[y] is not None:
            lines[' '.join(f'{k}={row[k]}' for k in names if k != along[0])].append(row)
    fig = Figure(figsize=(8, 5), layout='constrained')
    axis = fig.subplots()
    for name, line in lines.items():
        axis.plot([row[x] for row in line], [row[y] for row in line], 'o-', label=name)
        for row in line:
            axis.annotate(row[along[0]], (row[x], row[y]), (4, 4), textcoords='offset points')
    if real:
        axis.plot(real[x], real[y], '*', markersize=16, color='gold', label='real text')
    axis.set(xlabel=AXES[x], ylabel=AXES[y], title=f"beside the points: {along[0]}")
    axis.margins(0.1)
    axis.grid(alpha=0.3)
    fig.legend(loc='outside right upper')
    save_figure(fig, file)


def save_figure(fig, file):
    fig.savefig(file + '.tmp', dpi=120, format='png')
    os.replace(file + '.tmp', file)
