"""
Students that write in few steps: a frozen teacher walks a student's step in many small ones, and
the student learns the clean latent that takes it to the same place in one.

Progressive distillation as in the official code's branch `distillation` (utils/distill_utils.py,
distill_train_step.py). train.py runs it: see config/owt_elf_b_pd.py.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from model import ELF, Draws, cross_entropy, draw, noise_rows, velocity
from parts.data import check_vocabulary
from parts.device import to_device
from parts.process import UserError


def load_teacher(config, meta, init_from):
    """The teacher that train.py's settings ask for -> frozen ELF. UserError if it cannot teach."""
    source, steps, substeps = (config[k] for k in ('teacher', 'distill_steps', 'distill_substeps'))
    if min(steps, substeps) < 1:
        raise UserError(f"distill_steps={steps}, distill_substeps={substeps}: with a teacher both "
                        "start at 1")
    if init_from == 'scratch':
        raise UserError(f"a student starts from weights: --init_from={source}, or those of a "
                        "student with more steps")
    teacher = ELF.from_pretrained(source).requires_grad_(False)
    check_vocabulary(meta, teacher.config, source)
    for k in ('noise_scale', 'latent_mean', 'latent_std'):
        theirs, ours = getattr(teacher.config, k), {**meta, **config}[k]
        if theirs != ours:
            raise UserError(f"teacher {source} has {k}={theirs}, its student would have {ours}; "
                            "they must be alike")
    return teacher


@dataclass
class StudentDraws(Draws):
    stops: torch.Tensor         # (B, k+1), rising from 0 to 1: the teacher's k steps in a student's


def draw_student(substeps, config, B, T, generator, device):
    """model.draw, and where the teacher stops: its inner stops are drawn as t is."""
    draws = draw(config, B, T, generator, device)
    normal = torch.randn(B, substeps - 1, generator=generator)
    inner = torch.sigmoid(config.t_mean + config.t_std * normal).sort(dim=1).values
    stops = F.pad(F.pad(inner, (1, 0)), (0, 1), value=1.0)
    return StudentDraws(**vars(draws), stops=to_device(stops, device))


@torch.no_grad()
def pd_target(teacher, z, times, w, x_prev, cond=None, cond_mask=None):
    """
    The clean latent towards which one step goes where the teacher goes in many, (B, T, C)
    [teacher_pd_target]. z (B, T, C) at times[:, 0]; times (B, k+1) of the teacher's ODE steps;
    w (B,); x_prev (B, T, C) the guess that teacher and student are fed first; cond, cond_mask:
    clean latents that are held. A step without length has the teacher's last guess as its target.
    """
    keep = torch.zeros_like(z[..., :1], dtype=torch.bool)
    keep = keep if cond_mask is None else cond_mask.bool()[..., None]
    cond = torch.zeros_like(z) if cond is None else cond
    t = times[..., None, None]                                                      # (B, k+1, 1, 1)
    z_end = z
    for i in range(times.shape[1] - 1):
        x = teacher.denoise(z_end, x_prev, times[:, i], w)
        v = velocity(x, z_end, t[:, i], teacher.config.t_eps)
        z_end = torch.where(keep, cond, z_end + (t[:, i + 1] - t[:, i]) * v)
        x_prev = torch.where(keep, cond, x)
    if times.shape[1] == 2:
        return x
    start, length = t[:, 0], t[:, -1] - t[:, 0]
    target = z + (1 - start) / length.clamp(min=1e-6) * (z_end - z)
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
    r = noise_rows(c, x0, tokens, loss_mask, cond_mask, replace(draws, t=times[:, 0]))
    n, guess = r.n, r.guess

    # the guess that both are fed first: the teacher's from nothing, on self-conditioned rows
    if len(guess):
        with torch.no_grad():
            x_u = teacher.denoise(r.z[guess], r.x_prev[guess], r.t[guess], r.w[guess])
        r.x_prev[guess] = torch.where(r.held[guess], r.x0[guess], x_u)

    target = pd_target(teacher, r.z[:n], times[r.order[:n]], r.w[:n], r.x_prev[:n], r.x0[:n],
                       r.held[:n, :, 0])
    x_hat, logits = net(r.z, r.x_prev, r.t, r.w, n_decode=len(r.z) - n)

    # the mean over a row's positions, then over rows
    l2 = (x_hat - target).square().mean(dim=-1)                                     # (n, T)
    losses = torch.cat((l2, cross_entropy(logits, r.tokens[n:])))                   # (B, T)
    rows = (losses * r.mask).sum(dim=1) / r.mask.sum(dim=1).clamp(min=1)            # (B,)
    parts = dict(l2=rows[:n], ce=rows[n:])
    return rows.mean(), {name: x.detach().mean() for name, x in parts.items() if len(x)}
