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

from parts.process import rank_and_world


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
    def __init__(self, groups, lr, ns_dtype):
        super().__init__(groups, dict(lr=lr, step=0))
        self.ns_dtype = ns_dtype

    @torch.no_grad()
    def step(self):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')       # a float32 that is not TF32
        for group in self.param_groups:
            group['step'] += 1
            params = group['params']
            grads = [p.grad for p in params]
            if group['name'] == 'muon':
                self.step_muon(group, params, grads)
            else:
                self.step_adam(group, params, grads)
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
        # dealt to the ranks by their work, the largest first
        rank, world = rank_and_world()
        work = [min(p.shape) * p.numel() for p in params]
        numbers = sorted(range(len(params)), key=work.__getitem__, reverse=True)
        alike = defaultdict(list)
        for i in numbers[rank::world]:
            alike[params[i].shape].append(i)
        updates = [torch.empty_like(p, dtype=self.ns_dtype) for p in params]
        for same_shape in alike.values():
            ahead = [nesterov(average[i], grads[i], 0.95, group['step']) for i in same_shape]
            found = orthogonalize(torch.stack(ahead), self.ns_dtype)
            for i, update in zip(same_shape, found):
                updates[i].copy_(update)
        if world > 1:
            for turn, i in enumerate(numbers):
                dist.broadcast(updates[i], turn % world)
        for p, update in zip(params, updates):
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.add_(update, alpha=-group['lr'] * scale)

    def step_adam(self, group, params, grads):
        average = self.moments(params, 'average')
        square = self.moments(params, 'square')
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


def make_optimizer(named_parameters, lr, ns_dtype=torch.float32):
    """Muon on the 2-D tensors, which are (out, in), Nesterov Adam on the others; one rate."""
    params = [p for _, p in named_parameters if p.requires_grad]
    matrices = [p for p in params if p.ndim == 2]
    others = [p for p in params if p.ndim != 2]
    groups = [dict(name='muon', params=matrices), dict(name='adam', params=others)]
    return Muon(groups, lr, ns_dtype)
