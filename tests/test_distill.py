"""
distill.py: the official targets, and what a student learns from a teacher.

    python -m pytest tests/test_distill.py
"""
import pytest
import torch
from conftest import metrics, same_state
from test_model import batch, golden, official, rel, small  # noqa: F401, official is a fixture

from configurator import UserError
from model import ELF
from parts.distill import distill_loss, draw_student, pd_target
from sample import resolve_sampling


@pytest.mark.parametrize('case', ['steps1', 'steps4', 'steps4_uniform', 'span0'])
def test_targets_are_the_official_ones(official, case):
    p, _ = golden('pd.npz')
    cond = p['cond_seq_mask'].bool()
    start, end = p['t_s'], p['t_t']
    if case == 'span0':
        start = end = torch.ones(4)
    k = 1 if case == 'steps1' else 4
    times = start[:, None] + (end - start)[:, None] * torch.linspace(0, 1, k + 1)
    if case == 'steps4':
        times = p['steps4/sub_step_times']
    target = pd_target(official, p['z_t_s'], times, p['self_cond_cfg_scale'], p['sc_half'],
                       p['x0'], cond)
    assert rel(target[~cond], p[f'{case}/target'][~cond]) < 1e-5


def test_stops_rise_from_0_to_1_and_lie_as_t_does():
    c = small().config
    stops = draw_student(8, c, 500, 2, torch.Generator().manual_seed(1), 'cpu').stops
    assert stops.shape == (500, 9) and (stops.diff(dim=1) >= 0).all()
    assert stops[:, 0].unique().tolist() == [0] and stops[:, -1].unique().tolist() == [1]
    inner = stops[:, 1:-1].logit()
    assert abs(inner.mean() - c.t_mean) < 0.05 and abs(inner.std() - c.t_std) < 0.05
    assert draw_student(1, c, 5, 2, torch.Generator(), 'cpu').stops.unique().tolist() == [0, 1]


STEPS = 4       # of the student


def losses(**flags):
    """A student, its teacher, and what distill_loss gets of a batch with these flags."""
    student, teacher = small(0), small(1)
    x0, tokens, mask, cond, d = batch(student, **flags)
    generator = torch.Generator().manual_seed(2)
    d.stops = draw_student(3, student.config, len(x0), 2, generator, 'cpu').stops
    return student, teacher, (x0, tokens, mask, cond, d)


def test_a_row_is_compared_with_what_the_teacher_reaches():
    """Row by row, as the official step has it, with z, guess and target made by hand."""
    flags = dict(is_decode=[0, 1, 0, 0, 1, 0], self_cond=[1, 1, 0, 1, 0, 0], drop_cond=False)
    student, teacher, (x0, tokens, mask, cond, d) = losses(**flags)
    loss, parts = distill_loss(teacher, STEPS, student, x0, tokens, mask, cond, d)
    # a step of a quarter, which starts where it ends before 1, divided as the stops divide
    times = (0.75 * d.t)[:, None] + 0.25 * d.stops
    want = []
    for i in range(6):
        keep, w, s = cond[i:i + 1, :, None].bool(), d.w[i:i + 1], times[i:i + 1, 0]
        clean, noise = x0[i:i + 1], student.config.noise_scale * d.noise[i:i + 1]
        if d.is_decode[i]:
            noise = student.config.decoder_noise_scale * d.decode_noise[i:i + 1]
            z = d.lam[i] * clean + (1 - d.lam[i]) * noise
            logits = student.decode(z, w)[0]
            error = torch.nn.functional.cross_entropy(logits, tokens[i], reduction='none')
        else:
            z = torch.where(keep, clean, s * clean + (1 - s) * noise)
            x_prev = torch.where(keep, clean, 0.0)
            if d.self_cond[i]:
                x_prev = torch.where(keep, clean, teacher.denoise(z, x_prev, s, w))
            target = pd_target(teacher, z, times[i:i + 1], w, x_prev, clean, cond[i:i + 1])
            error = (student.denoise(z, x_prev, s, w) - target).square().mean(-1)[0]
        want.append((error * mask[i]).sum() / mask[i].sum())
    assert loss.item() == pytest.approx(torch.stack(want).mean().item(), rel=1e-5)
    assert parts['ce'].item() == pytest.approx(((want[1] + want[4]) / 2).item(), rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_one_step():
    student, _, (x0, tokens, mask, cond, d) = losses(is_decode=False)
    d.self_cond[:] = True
    d.stops = d.stops[:, [0, -1]]       # the teacher walks in one step, too
    loss, _ = distill_loss(student, STEPS, student, x0, tokens, mask, cond, d)
    assert loss.item() < 1e-10


def test_the_teacher_gets_no_gradient_and_the_student_all():
    student, teacher, args = losses(is_decode=[0, 1, 0, 0, 1, 0])
    distill_loss(teacher, STEPS, student, *args)[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())

# --------------------------------------------------------------------------------------------------
# the student of a run

def test_a_student_resumes_bit_for_bit_and_takes_its_sampling_along(run, tiny, tmp_path):
    teacher, straight, parts = (tmp_path / name for name in ('teacher', 'straight', 'parts'))
    run('train.py', *tiny, f'--out_dir={teacher}', '--max_iters=10', '--steps=32')
    args = ['train.py', *tiny, f'--teacher={teacher}', f'--init_from=auto:{teacher}',
            '--distill_steps=2', '--distill_substeps=3', '--eval_interval=10', '--steps=2',
            '--gamma=0.5', '--w=2.5', '--grid=quantile']
    run(*args, f'--out_dir={straight}', '--max_iters=20')
    run(*args, f'--out_dir={parts}', '--max_iters=10')
    out = run(*args, f'--out_dir={parts}', '--max_iters=20')
    assert 'at iteration 10' in out
    assert same_state(straight, parts) and metrics(straight) == metrics(parts)
    assert not same_state(teacher, straight)

    # sample.py asks for nothing, and neither does it of what was published of it
    run('convert.py', parts, tmp_path / 'published')
    for source in (parts, tmp_path / 'published'):
        c = ELF.from_pretrained(str(source)).config
        assert resolve_sampling(c) == dict(steps=2, sampler='sde', gamma=0.5, w=2.5, cfg=1.0,
                                           grid='quantile')
    run('sample.py', f'--out_dir={parts}', '--num_samples=2', '--device=cpu')
    texts = (parts / 'samples.jsonl').read_text()
    run('sample.py', f'--init_from={tmp_path}/published', f'--out_dir={tmp_path}/out',
        '--num_samples=2', '--device=cpu')
    assert (tmp_path / 'out' / 'samples.jsonl').read_text() == texts


def test_teacher_and_substeps_are_those_asked_for(run, tiny, tmp_path):
    """The first loss is of the same weights on the same rows: only what is learned from differs."""
    for name, seed in (('a', 1), ('b', 2)):
        run('train.py', *tiny, f'--out_dir={tmp_path}/{name}', '--max_iters=3', f'--seed={seed}')
    first = {}
    for teacher, substeps in (('a', 3), ('b', 3), ('a', 1)):
        out = tmp_path / f'{teacher}{substeps}'
        run('train.py', *tiny, f'--init_from={tmp_path}/a', f'--teacher={tmp_path}/{teacher}',
            '--distill_steps=2', f'--distill_substeps={substeps}', f'--out_dir={out}',
            '--max_iters=1', '--self_cond_prob=0', '--decoder_prob=0')
        first[out.name] = next(row['loss'] for row in metrics(out) if 'loss' in row)
    assert len(set(first.values())) == 3, first


def test_another_teacher_of_a_resumed_student_is_refused(run, tiny, tmp_path):
    args = ['train.py', *tiny, f'--out_dir={tmp_path}/student', '--distill_steps=2',
            '--distill_substeps=2']
    for name, seed in (('a', 1), ('b', 2)):
        run('train.py', *tiny, f'--out_dir={tmp_path}/{name}', '--max_iters=2', f'--seed={seed}')
    run(*args, f'--teacher={tmp_path}/a', f'--init_from={tmp_path}/a', '--max_iters=2')
    with pytest.raises(UserError, match='teacher'):
        run(*args, f'--teacher={tmp_path}/b', '--init_from=resume')
    with pytest.raises(UserError, match='distill_steps'):
        run(*args, f'--teacher={tmp_path}/a', '--init_from=resume', '--distill_steps=1')


@pytest.mark.parametrize('arg, says', [
    ('--noise_scale=0.7', 'does not fit: noise_scale is 0.35 there, and 0.7 by'),
    ('--distill_substeps=0', 'distill_steps and distill_substeps are at least 1'),
    ('--init_from=scratch', 'a student starts from weights, for example --init_from=')])
def test_a_teacher_that_cannot_teach_is_refused(run, tiny, tmp_path, arg, says):
    run('train.py', *tiny, f'--out_dir={tmp_path}/a', '--max_iters=1')
    with pytest.raises(UserError, match=says):
        run('train.py', *tiny, f'--out_dir={tmp_path}/student', f'--teacher={tmp_path}/a',
            f'--init_from={tmp_path}/a', '--distill_steps=2', '--distill_substeps=2', arg)
    assert not (tmp_path / 'student').exists()
