"""
Muon on matrices, Nesterov Adam on the rest, exactly as optax.contrib.muon, which trained the
published models.

torch.optim.Muon is not exact enough: no bias correction, bfloat16 only, updates off by 9-24 % on
small matrices. Equal shapes are orthogonalised as one batch, and ranks share the work. Nothing of
ELF is in here.
"""
from collections import defaultdict

import torch
import torch.distributed as dist


def orthogonalize(x, dtype=torch.float32):
    """
    Matrices (k, m, n) -> roughly the nearest ones whose singular values are all 1, by five turns of
    Newton-Schulz: x <- (3.4445 I - 4.7750 A + 2.0315 A^2) x with A = x x^T.
    """
    x = x.to(dtype)
    m, n = x.shape[-2:]
    if m > n:
        return orthogonalize(x.mT, dtype).mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-8)
    # five turns on one A would lose the small singular values; nearly square x gain nothing by it
    for turns in (3, 2) if n >= 1.5 * m else (1,) * 5:
        x = turns_on_gram(x @ x.mT, turns) @ x
    return x


def turns_on_gram(A, turns):
    """
    Q with Q x = x after so many turns, from A = x x^T alone. All factors are polynomials in A, so
    they commute, and a turn costs products of the short side only: a third less work than on x.
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Q = None
    for i in range(turns):
        turn = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315).add_(eye, alpha=3.4445)
        Q = turn if Q is None else turn @ Q
        if i < turns - 1:
            A = turn @ A @ turn
    return Q


class Muon(torch.optim.Optimizer):
    """Two groups, 'muon' for the 2-D tensors, (out, in), and 'adam' for the others; one rate."""
    def __init__(self, params, lr, ns_dtype):
        self.ns_dtype = ns_dtype
        matrices, others = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
        groups = [dict(name='muon', params=matrices), dict(name='adam', params=others)]
        super().__init__([g for g in groups if g['params']], dict(lr=lr, step=0))

    @torch.no_grad()
    def step(self):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')       # a float32 that is not TF32
        for group in self.param_groups:
            group['step'] += 1
            params = group['params']
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            (self.step_muon if group['name'] == 'muon' else self.step_adam)(group, params, grads)
        torch.set_float32_matmul_precision(precision)

    def moments(self, params, name):
        """A running average of each parameter, zeros at first -> list of tensors."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def step_muon(self, group, params, grads):
        average = self.moments(params, 'average')
        torch._foreach_lerp_(average, grads, 1 - 0.95)
        shares, alike = share_out(params), defaultdict(list)
        for i in shares[rank()]:
            alike[params[i].shape].append(i)
        updates = [None] * len(params)
        for numbers in alike.values():
            ahead = [nesterov(average[i], grads[i], 0.95, group['step']) for i in numbers]
            for i, u in zip(numbers, orthogonalize(torch.stack(ahead), self.ns_dtype)):
                updates[i] = u
        if ranks() > 1:
            gather(params, updates, shares, self.ns_dtype)
        for p, u in zip(params, updates):
            p.add_(u, alpha=-group['lr'] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def step_adam(self, group, params, grads):
        average, square = self.moments(params, 'average'), self.moments(params, 'square')
        k = group['step']
        torch._foreach_lerp_(average, grads, 1 - 0.9)
        torch._foreach_mul_(square, 0.999)
        torch._foreach_addcmul_(square, grads, grads, value=0.001)
        scale = torch._foreach_div(square, 1 - 0.999 ** k)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        updates = [nesterov(m, g, 0.9, k) for m, g in zip(average, grads)]
        torch._foreach_addcdiv_(params, updates, scale, value=-group['lr'])


def nesterov(average, grad, beta, k):
    """The average gradient of step k, one step ahead, with the bias of both terms taken out."""
    ahead = average * (beta / (1 - beta ** (k + 1)))
    return ahead.add_(grad, alpha=(1 - beta) / (1 - beta ** k))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def share_out(params):
    """The matrices dealt to the ranks by their work, the largest first -> numbers of each rank."""
    work = [min(p.shape) * p.numel() for p in params]
    load, shares = [0] * ranks(), [[] for _ in range(ranks())]
    for i in sorted(range(len(params)), key=work.__getitem__, reverse=True):
        r = load.index(min(load))
        shares[r].append(i)
        load[r] += work[i]
    return shares


def gather(params, updates, shares, dtype):
    """Fill in the updates that other ranks have, by one transfer of equal lengths."""
    sizes = [[params[i].numel() for i in share] for share in shares]
    mine = params[0].new_zeros(max(map(sum, sizes)), dtype=dtype)
    flat = [updates[i].flatten() for i in shares[rank()]]
    if flat:
        torch.cat(flat, out=mine[:sum(sizes[rank()])])
    parts = [torch.empty_like(mine) for _ in shares]
    dist.all_gather(parts, mine)
    for share, size, part in zip(shares, sizes, parts):
        for i, u in zip(share, part[:sum(size)].split(size)):
            updates[i] = u.view_as(params[i])


def make_optimizer(named_parameters, lr, ns_dtype=torch.float32):
    """Muon on the 2-D tensors, which are (out, in), Nesterov Adam on the others; one rate."""
    return Muon([p for _, p in named_parameters if p.requires_grad], lr, ns_dtype)
