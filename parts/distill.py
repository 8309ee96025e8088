"""
Students that write in few steps: a frozen teacher walks a student's step in many small ones, and
the student learns the clean latent that takes it to the same place in one.

Progressive distillation as in the official code's branch `distillation` (utils/distill_utils.py,
distill_train_step.py). train.py runs it: see config/owt_elf_b_pd.py.
"""
import torch
import torch.nn.functional as F

from configurator import UserError
from parts.data import check_vocabulary
from model import ELF, velocity


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


def draw_times(c, t, steps, substeps, generator):
    """
    Where the teacher stops within a student's step of length 1 / steps: its start is the row's t
    (B,) squeezed into what leaves room for it, the stops inside are draws as of t
    -> (B, substeps+1).
    """
    normal = torch.randn(len(t), substeps - 1, generator=generator)
    inner = torch.sigmoid(c.t_mean + c.t_std * normal).sort(dim=1).values
    stops = F.pad(F.pad(inner, (1, 0)), (0, 1), value=1.0).to(t)
    return (1 - 1 / steps) * t[:, None] + stops / steps


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


def distill_loss(net, teacher, x0, tokens, loss_mask, cond_mask, draws, times):
    """
    The loss of a student, in place of compute_loss and with its arguments; times: draw_times.
    Denoise rows: squared error of x (not of v) against pd_target; decode rows as ever. Rows weigh
    alike, whatever their length [distill_train_step].
    """
    c, d, device = getattr(net, 'module', net).config, draws, x0.device

    # decode rows go last
    order = torch.argsort(d.is_decode.int(), stable=True)
    n_decode = int(d.is_decode.sum())
    n = len(x0) - n_decode
    guess = d.self_cond[order[:n]].nonzero()[:, 0]
    order, guess, drop = (x.to(device, non_blocking=True) for x in (order, guess, d.drop_cond))
    cond = cond_mask.bool()[:, :, None]
    x0 = torch.where(cond & drop[:, None, None], 0.0, x0)[order]
    tokens, mask, cond = tokens[order], loss_mask[order].float(), cond[order]
    w, times = d.w[order], times[order[:n]]
    x0_n, cond_n, start = x0[:n], cond[:n], times[:, 0]

    # noise, as in compute_loss
    noise, lam = c.noise_scale * d.noise[order[:n]], d.lam[order[n:]]
    s = start[:, None, None]
    z_n = torch.where(cond_n, x0_n, s * x0_n + (1 - s) * noise)                     # (n, T, C)
    z_d = lam * x0[n:] + (1 - lam) * c.decoder_noise_scale * d.decode_noise[order[n:]]

    # the guess that both are fed first: the teacher's from nothing, on self-conditioned rows
    x_prev = torch.where(cond_n, x0_n, 0.0)
    if len(guess):
        with torch.no_grad():
            x_u = teacher.denoise(z_n[guess], x_prev[guess], start[guess], w[guess])
        x_prev[guess] = torch.where(cond_n[guess], x0_n[guess], x_u)

    target = pd_target(teacher, z_n, times, w[:n], x_prev, x0_n, cond_n[..., 0])
    x_hat, logits = net(torch.cat((z_n, z_d)), torch.cat((x_prev, torch.zeros_like(z_d))),
                        torch.cat((start, start.new_ones(n_decode))), w, n_decode=n_decode)

    # the mean over a row's positions, then over rows
    l2 = (x_hat - target).square().mean(dim=-1)                                     # (n, T)
    ce = F.cross_entropy(logits.flatten(0, 1), tokens[n:].flatten(), reduction='none')
    losses = torch.cat((l2, ce.view_as(tokens[n:])))                                # (B, T)
    rows = (losses * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)                # (B,)
    parts = {}
    if n:
        parts['l2'] = rows[:n].detach().mean()
    if n_decode:
        parts['ce'] = rows[n:].detach().mean()
    return rows.mean(), parts
