"""
Settings of the sampler side by side: their combinations, what is known of them already, and the
picture that compares samplers, quality over diversity: a judge is pleased by texts that repeat
themselves, and there such texts lie to the left.
"""
import itertools
import json
import os
from collections import defaultdict

from parts.checkpoint import find_checkpoint
from configurator import UserError, check_value
from sample import GRIDS, SAMPLERS, resolve_sampling

NAMES = ('init_from', 'out_dir', 'steps', 'sampler', 'gamma', 'w', 'cfg', 'grid')
CHOICES = dict(sampler=SAMPLERS, grid=GRIDS)
REAL = 'real text'          # in the place of a model
LEFT_OUT = ('gen_ppl_port', 'duplicates', 'long_words', 'copied_median', 'copied_max', 'bleu_cased',
            'rouge1', 'rouge2', 'empty')       # of the table's columns
TITLES = dict(          # of the picture: the first two that there are, y and x
    nats_per_char='nats per character of the n-gram judge (lower is better)',
    gen_ppl='generative perplexity (lower is better)', bleu='BLEU (higher is better)',
    entropy='entropy of a text, nats (GPT-2 tokens)', entropy_own='entropy of a text, nats',
    distinct_4='share of different 4-grams')


def combinations(text, settings):
    """
    'steps=4,8 gamma=0,1.5' -> the product of its values, dicts with all NAMES, those not swept as
    in settings: an empty text is one combination. UserError if malformed.
    """
    values = {}
    for part in text.split():
        name, _, given = part.partition('=')
        given = given.split(',')
        if name not in NAMES or name in values or not all(given):
            raise UserError(f"--sweep: {part!r} is not name=value,value with one of "
                            f"{', '.join(NAMES)}, each once")
        values[name] = [check_value(settings, name, value, '--sweep') for value in given]
        if not set(values[name]) <= set(CHOICES.get(name, values[name])):
            raise UserError(f"--sweep: {part!r}: {name} is one of {', '.join(CHOICES[name])}")
    if min(values.get('steps', [1])) < 1:
        raise UserError(f"--sweep: steps={min(values['steps'])}: must be at least 1")
    if 'init_from' in values and 'out_dir' in values:
        raise UserError("--sweep: init_from and out_dir name models both; use one of them")
    base = {name: settings[name] for name in NAMES}
    if 'out_dir' in values:
        base['init_from'] = ''
    return [base | dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def stamp(path):
    """What tells a file from others and from its later self."""
    return f"{os.path.abspath(path)}, {os.path.getmtime(path)}" if path else ''


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


def find_done(file, plan):
    """For each entry of a plan the row of sweep.jsonl that holds all of it, or None -> list."""
    rows = read_rows(file) if os.path.exists(file) else []
    return [next((row for row in rows if entry.items() <= row.items()), None) for entry in plan]


def make_plan(combos, models):
    """
    combinations' dicts, without those that come to the same -> list of dicts: 'model' as named, its
    'weights', the sampler's settings. models: {name: (ELF, ...)}.
    """
    plan = []
    for combo in combos:
        init_from, out_dir, *given = (combo[name] for name in NAMES)
        source = init_from or out_dir
        how = resolve_sampling(models[source][0].config, *given)
        if how['sampler'] == 'ode' or how['steps'] == 1:
            how['gamma'] = 0.0          # nothing is re-noised there
        entry = dict(model=source, weights=stamp(find_checkpoint(source))) | how
        if entry not in plan:
            plan.append(entry)
    return plan


def sampler_of(entry):
    """Of an entry of a plan what sample_texts wants to know."""
    return {name: entry[name] for name in NAMES[2:]}


def passes(how):
    """Forward passes that a text costs."""
    return how['steps'] * (1 if how['cfg'] == 1 else 2)


def varying(rows):
    """Names of the settings in which rows differ, real text aside."""
    rows = [row for row in rows if row['model'] != REAL]
    return [name for name in ('model', *NAMES[2:]) if len({row[name] for row in rows}) > 1]


def describe(row, names):
    return ' '.join(f'{name}={row[name]}' for name in names) or row['model']


def names_of(rows):
    """A name for each row: the settings that vary, or 'real text'."""
    names = varying(rows)
    return [REAL if row['model'] == REAL else describe(row, names) for row in rows]

# --------------------------------------------------------------------------------------------------
# the picture

PLACES = [(6, 5, 'left'), (6, -5, 'left'), (-6, 5, 'right'), (-6, -5, 'right'), (0, 10, 'center'),
          (0, -10, 'center'), (12, 12, 'left'), (12, -12, 'left'), (-12, 12, 'right')]


def write_beside(axis, points):
    """Write the text of each point (x, y, text, color) beside it, where there is room."""
    from matplotlib.transforms import Bbox
    axis.figure.draw_without_rendering()        # now it is known where the points are
    taken = []
    for x, y, *_ in points:
        px, py = axis.transData.transform((x, y))
        taken.append(Bbox.from_extents(px - 4, py - 4, px + 4, py + 4))
    for x, y, text, color in points:
        note = axis.annotate(text, (x, y), (0, 0), textcoords='offset points', va='center',
                             fontsize=8, color=color, in_layout=False)
        for dx, dy, side in PLACES:
            note.set(position=(dx, dy), ha=side)
            box = note.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            note.remove()


def plot_sweep(file, rows):
    """
    Rows of sweep.jsonl -> a picture: quality over entropy, real text as a star. A line for each
    number of steps (and what else varies), its points named by gamma, or else another setting.
    What has no number, such as the nats of blank texts, is left out.
    """
    import matplotlib
    from matplotlib.figure import Figure
    y, x = [key for key in TITLES if key in rows[0]][:2]
    title = f"{rows[0]['num_samples']} texts each"
    rows = [row for row in rows if row[x] is not None and row[y] is not None]
    real = [row for row in rows if row['model'] == REAL]
    names = varying(rows)
    by = next((name for name in ('gamma', 'w', 'cfg', 'grid', 'sampler') if name in names), 'steps')
    lines = defaultdict(list)
    for row in rows[len(real):]:
        lines[describe(row, [name for name in names if name != by])].append(row)

    fig = Figure(figsize=(8, 5), layout='constrained')
    axis, points = fig.subplots(), []
    colors = matplotlib.colormaps['viridis'].resampled(len(lines) + 1)
    for i, (name, line) in enumerate(lines.items()):
        xs, ys = [row[x] for row in line], [row[y] for row in line]
        axis.plot(xs, ys, 'o-', markersize=5, color=colors(i), label=name)
        points += [(row[x], row[y], str(row[by]), colors(i)) for row in line]
    for row in real:
        # far below all others it would leave them no room: then at the edge, with its number
        low, high = axis.dataLim.intervaly
        at = max(row[y], low - (high - low) / 2) if high > low else row[y]
        label = REAL if at == row[y] else f'{REAL}, below: {row[y]:.2f}'
        axis.plot(row[x], at, '*', markersize=16, color='gold', markeredgecolor='black',
                  label=label)
        points.append((row[x], at, '', 'black'))
    axis.set(xlabel=TITLES[x], ylabel=TITLES[y], title=f"{title}; beside the points: {by}")
    axis.margins(0.1)
    axis.grid(alpha=0.3)
    fig.legend(loc='outside right upper')
    write_beside(axis, points)
    save_figure(fig, file)


def save_figure(fig, file):
    fig.savefig(file + '.tmp', dpi=120, format='png')
    os.replace(file + '.tmp', file)
