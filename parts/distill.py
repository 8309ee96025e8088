"""
Students that write in few steps: a frozen teacher walks a student's step in many small ones, and
the student learns the clean latent that takes it to the same place in one.

Progressive distillation as in the official code's branch `distillation` (utils/distill_utils.py,
distill_train_step.py). train.py runs it: see config/owt_elf_b_pd.py.
"""
from dataclasses import replace
from itertools import pairwise

import torch

from model import ELF, cross_entropy, draw, first_guess, noise_rows, velocity
from parts.data import check_fit
from parts.device import to_device
from parts.process import UserError


def load_teacher(config, meta, init_from):
    """The teacher that train.py's settings ask for -> frozen ELF. UserError if it cannot teach."""
    source = config['teacher']
    if min(config['distill_steps'], config['distill_substeps']) < 1:
        raise UserError("distill_steps and distill_substeps are at least 1 with a teacher")
    if init_from == 'scratch':
        raise UserError(f"a student starts from weights, for example --init_from={source}")
    teacher = ELF.from_pretrained(source).requires_grad_(False)
    check_fit(meta | config, teacher.config, source, 'noise_scale', 'latent_mean', 'latent_std')
    return teacher


def draw_student(substeps, config, B, T, generator, device):
    """
    model.draw, with stops (B, k+1) as well, rising from 0 to 1: where the teacher's k substeps
    divide a student's step; the inner ones are drawn as t is.
    """
    draws = draw(config, B, T, generator, device)
    normal = torch.randn(B, substeps - 1, generator=generator).sort(dim=1).values
    inner = torch.sigmoid(config.t_mean + config.t_std * normal)
    stops = torch.cat((torch.zeros(B, 1), inner, torch.ones(B, 1)), dim=1)
    draws.stops = to_device(stops, device)
    return draws


@torch.no_grad()
def pd_target(teacher, z, times, w, x_prev, cond=None, cond_mask=None):
    """
    The clean latent towards which one step goes where the teacher goes in many, (B, T, C)
    [teacher_pd_target]. z (B, T, C) at times[:, 0]; times (B, k+1) of the teacher's ODE steps;
    w (B,); x_prev (B, T, C) the guess that teacher and student are fed first; cond, cond_mask:
    clean latents that are held. A step without length has the teacher's last guess as its target.
    """
    if cond is None:
        cond = z        # nowhere taken
        cond_mask = torch.zeros_like(z[..., 0])
    keep = cond_mask.bool()[..., None]                                              # (B, T, 1)
    stops = times[..., None, None].unbind(dim=1)                                    # (B, 1, 1) each
    z_end = z
    for t, t_next in pairwise(stops):
        x = teacher.denoise(z_end, x_prev, t.flatten(), w)
        v = velocity(x, z_end, t, teacher.config.t_eps)
        z_end = torch.where(keep, cond, z_end + (t_next - t) * v)
        x_prev = torch.where(keep, cond, x)
    if len(stops) == 2:
        return x

    # x at the start whose velocity there, held until the last stop, leads to z_end
    length = stops[-1] - stops[0]
    v = (z_end - z) / length.clamp(min=1e-6)
    target = z + (1 - stops[0]) * v
    return torch.where(length < 1e-3, x, target)


def distill_loss(teacher, steps, net, x0, tokens, loss_mask, cond_mask, draws):
    """
    The loss of a student that writes in so many steps, else as compute_loss. Its step of length
    1 / steps starts at the row's t squeezed into what leaves room for it, and draws.stops divide
    it into the teacher's. Denoise rows: squared error of x (not of v) against pd_target; decode
    rows as ever. Rows weigh alike, whatever their length [distill_train_step].
    """
    times = (1 - 1 / steps) * draws.t[:, None] + draws.stops / steps                # (B, k+1)
    c = getattr(net, 'module', net).config
    draws = replace(draws, t=times[:, 0])
    r = noise_rows(c, x0, tokens, loss_mask, cond_mask, draws)
    n = r.n
    first_guess(teacher, r)         # the teacher's; both are fed it
    target = pd_target(
        teacher,
        r.z[:n],
        times[r.order[:n]],
        r.w[:n],
        r.x_prev[:n],
        cond=r.x0[:n],
        cond_mask=r.held[:n, :, 0])
    x_hat, logits = net(r.z, r.x_prev, r.t, r.w, n_decode=len(r.z) - n)

    # the mean over a row's positions, then over rows
    l2 = (x_hat - target).square().mean(dim=-1)                                     # (n, T)
    ce = cross_entropy(logits, r.tokens[n:])                                        # (B-n, T)
    losses = torch.cat((l2, ce)) * r.mask                                           # (B, T)
    count = r.mask.sum(dim=1).clamp(min=1)                                          # (B,)
    rows = losses.sum(dim=1) / count
    parts = dict(l2=rows[:n].detach(), ce=rows[n:].detach())
    return rows.mean(), {name: x.mean() for name, x in parts.items() if len(x)}
