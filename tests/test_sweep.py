"""
The sweep: its combinations, what it measures once, where it goes on, the picture.
    python -m pytest -q tests/test_sweep.py
"""
import json
import os
import shutil

import pytest
from test_eval import change_settings, eval_command, evaluate, trained  # noqa: F401, fixtures

import sample
from configurator import UserError
from eval import combinations
from parts.plots import at_equal_entropy, plot_sweep

SETTINGS = dict(init_from='', steps=-1, sampler='', gamma=-1.0, w=-1.0, cfg=-1.0,
                grid='logit_normal')


@pytest.fixture
def swept(run, trained):
    """swept(sweep, *args) -> the rows of sweep.jsonl; what was printed is left in swept.out."""
    def swept(text, *args):
        swept.out = run('eval.py', '--device=cpu', *trained, f'--sweep={text}', *args)
        return read(trained)
    return swept


def read(trained):
    with open(os.path.join(trained[0].partition('=')[2], 'sweep.jsonl'), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def count_samplings(monkeypatch, fail_at=None):
    """A list that grows by the settings of each call of the sampler; the call fail_at is a kill."""
    calls, real = [], sample.generate

    def generate(*args, **kwargs):
        calls.append((args[2].shape[1] - 1, *args[3:5]))
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, 'generate', generate)
    return calls


def test_combinations_are_the_product():
    got = combinations('steps=4,8  gamma=0,1.5', SETTINGS)
    assert [(one['steps'], one['gamma']) for one in got] == [(4, 0.0), (4, 1.5), (8, 0.0), (8, 1.5)]
    assert got[0] == SETTINGS | dict(steps=4, gamma=0.0) and type(got[0]['gamma']) is float
    assert combinations('', SETTINGS) == [SETTINGS]
    assert [one['init_from'] for one in combinations('init_from=a,b', SETTINGS)] == ['a', 'b']


@pytest.mark.parametrize('text, says', [
    ('step=4', "'step=4' is not name=value,value with one of init_from, .*grid"),
    ('seed=1,2', "'seed=1,2' is not"), ('out_dir=a', "'out_dir=a' is not"),
    ('steps', "steps='' is not"), ('steps=', "steps='' is not"), ('steps=4,,8', "steps='' is not"),
    ('steps=4,a', "--sweep: steps='a' is not of type int"),
    ('steps=4.5', 'not of type int'), ('gamma=x', "gamma='x' is not of type float"),
    ('steps=0', 'between 1 and'), ('sampler=sdf', "sampler='sdf' is not one of .*'ode', 'sde'"),
    ('grid=even', "grid='even' is not one of .*'quantile', 'uniform'"),
])
def test_malformed_is_refused_before_any_model_is_loaded(run, tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        run('eval.py', f'--sweep={text}', f'--out_dir={tmp_path}/none')
    assert not (tmp_path / 'none').exists()


def test_samples_each_combination_once(swept, tmp_path, monkeypatch):
    calls = count_samplings(monkeypatch)
    rows = swept('steps=2,3 sampler=sde,ode gamma=0.5', '--batch_size=6')
    assert calls == [(n, sampler, 0.5) for n in (2, 3) for sampler in ('sde', 'ode')]
    assert [row['source'] for row in rows] == 4 * [str(tmp_path)]
    for row, call in zip(rows, calls):
        assert row['nats_per_char'] > 0 and row['entropy_own'] > 0 and row['texts'] == 6
        assert (row['steps'], row['sampler'], row['gamma']) == call and row['judge'] == 'ngram'
    assert swept.out.count('\nreal ') == swept.out.count('\nsteps=3 sampler=ode ') == 1
    assert swept.out.count(f'\n{tmp_path}, ') == 2, 'at the entropy of real text'
    assert (tmp_path / 'sweep.png').stat().st_size > 10000
    assert not (tmp_path / 'samples_eval.jsonl').exists()


def test_says_what_a_sampling_without_a_sweep_says(swept, evaluate, trained):
    rows = swept('steps=2 gamma=0,1')
    alone = evaluate(*trained, '--steps=2', '--gamma=1', '--eval_iters=0')
    for key in ('nats_per_char', 'entropy_own', 'distinct_4', 'repetition'):
        assert rows[1][key] == alone[key]


def test_goes_on_where_it_was_killed(swept, run, trained, tmp_path, monkeypatch):
    text, file = 'steps=2,3 gamma=0,1', tmp_path / 'sweep.jsonl'
    with monkeypatch.context() as m:
        count_samplings(m, fail_at=4)       # two batches each: in the second combination
        with pytest.raises(KeyboardInterrupt):
            run('eval.py', '--device=cpu', *trained, f'--sweep={text}')
    before = read(trained)
    assert [(row['steps'], row['gamma']) for row in before] == [(2, 0.0)]
    calls = count_samplings(monkeypatch)
    rows = swept(text)
    assert [call[0] for call in calls] == [2, 2, 3, 3, 3, 3] and rows[:1] == before
    with open(file, 'a', encoding='utf-8') as f:
        f.write('{"steps": 2, "gam\n')      # cut by a kill
    calls.clear()
    run_again = dict(nothing=[], seed=['--seed=3'], texts=['--num_samples=3'], model=[])
    for what, args in run_again.items():
        if what == 'model':
            os.utime(tmp_path / 'ckpt.pt')
        run('eval.py', '--device=cpu', *trained, '--sweep=gamma=1,0 steps=2', *args)
        assert len(calls) == dict(nothing=0, seed=4, texts=2, model=4)[what]
        calls.clear()
    assert (tmp_path / 'sweep.png').exists()


def test_several_models_and_seeds(swept, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(tmp_path, other)
    change_settings(other, by_steps={2: dict(gamma=0.25)})
    rows = swept(f'init_from={tmp_path},{other} steps=2', '--seeds=1,2')
    assert [row['source'] for row in rows] == [str(tmp_path), str(other)]
    assert [row['gamma'] for row in rows] == [0.0, 0.25] and rows[1]['seeds'] == '1,2'
    assert rows[1]['stderr']['nats_per_char'] > 0 and 'gamma=0.25 +- ' in swept.out


def test_two_ranks_sweep_as_one(swept, trained, tmp_path):
    alone = swept('steps=2,3')
    os.remove(tmp_path / 'sweep.jsonl')
    got = eval_command(*trained, '--sweep=steps=2,3', ranks=2)
    assert got.returncode == 0, got.stderr
    together = read(trained)
    assert together == alone
    assert got.stdout.count('\nsteps=3 ') == 1, 'one table'


def test_models_are_compared_at_the_entropy_of_real_text():
    """A line of numbers by hand: 2.5 lies midway between 2 and 3, on the line, and beyond 2.4."""
    points = [('a', 8, 3.0, 20.0), ('a', 8, 2.0, 10.0), ('a', 8, None, 5.0), ('a', 8, 4.0, 90.0),
              ('a', 4, 2.0, 9.0), ('a', 4, 2.4, 8.0), ('b', 8, 2.5, 7.0)]
    rows = [dict(source=source, steps=steps, entropy=entropy, gen_ppl=ppl)
            for source, steps, entropy, ppl in points]
    real = dict(gen_ppl=6.0, entropy=2.5)
    found = at_equal_entropy(rows, real)
    assert found.pop('a, 4 steps') == dict(gen_ppl='not reached', entropy=2.5)
    assert found == {'a, 8 steps': dict(gen_ppl=15.0, entropy=2.5),
                     'b, 8 steps': dict(gen_ppl=7.0, entropy=2.5)}


def test_the_picture_without_real_text_and_with_blank_texts(tmp_path):
    rows = [dict(source='m', steps=n, sampler='sde', gamma=g, w=3.0, cfg=1.0, grid='uniform',
                 num_samples=4, gen_ppl=None if g else 30.0 + n, entropy=5.0, entropy_own=4.0)
            for n in (4, 8) for g in (0.0, 1.0)]
    plot_sweep(str(tmp_path / 'sweep.png'), rows, None, ['steps', 'gamma'])
    assert sorted(os.listdir(tmp_path)) == ['sweep.png']
