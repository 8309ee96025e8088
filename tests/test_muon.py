"""
muon.py: the updates of optax, which trained the published models, and how its arithmetic behaves.
    python -m pytest -q tests/test_muon.py
"""
import os

import numpy as np
import pytest
import torch
from conftest import ROOT

from parts import muon
from parts.muon import make_optimizer, orthogonalize, turns_on_gram

SHAPES = [(8, 24), (8, 24), (24, 8), (8, 9), (12,), (1, 3, 8)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(ns_dtype=torch.float32, steps=3):
    """A few steps on random gradients -> the parameters, and the optimizer's state."""
    params = [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    named = [(str(i), p) for i, p in enumerate(params)]
    optimizer = make_optimizer(named, 0.02, ns_dtype)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=100 * step + i)
        optimizer.step()
    return params, optimizer.state_dict()


def test_updates_equal_those_of_optax():
    data = np.load(os.path.join(ROOT, 'tests', 'golden', 'muon.npz'))
    names = [key.split('/')[1] for key in data.files if key.startswith('params0/')]

    def ours(key):
        x = torch.tensor(data[key])
        return x.T.contiguous() if x.ndim == 2 else x       # matrices are (in, out) in optax

    params = {name: torch.nn.Parameter(ours(f'params0/{name}')) for name in names}
    optimizer = make_optimizer(params.items(), 0.02)
    for i in range(5):
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = ours(f'grads{i}/{name}')
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
        for name, p in params.items():
            want = ours(f'params{i + 1}/{name}') - ours(f'params{i}/{name}')
            got = p.detach() - before[name]
            # Newton-Schulz multiplies what is off by up to 3.4445**5 = 485, the parameters round
            # the update to 1e-7 of themselves
            assert (got - want).norm() <= 1e-4 * want.norm(), (i, name)


@pytest.mark.parametrize('shape', [(3, 12, 40), (3, 40, 12), (3, 12, 16), (1, 1, 1)])
def test_singular_values_come_near_one(shape):
    x = random(*shape)
    exact, rough = orthogonalize(x), orthogonalize(x, torch.bfloat16)
    s = torch.linalg.svdvals(exact)
    assert exact.shape == x.shape and 0.6 < s.min() and s.max() < 1.3
    assert rough.dtype == torch.bfloat16 and rough.shape == x.shape
    assert 0 < (rough.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize('turns', [1, 2, 3])
def test_turns_on_gram_are_turns_on_the_matrix(turns):
    """Each turn multiplies x by a polynomial in A = x x^T, and all of these commute."""
    x = random(2, 6, 20).double() / 20
    y = x
    for _ in range(turns):
        A = y @ y.mT
        y = 3.4445 * y - 4.7750 * A @ y + 2.0315 * A @ A @ y
    torch.testing.assert_close(turns_on_gram(x @ x.mT, turns) @ x, y, rtol=1e-12, atol=1e-12)


def test_the_same_twice():
    (one, state), (two, again) = train(), train()
    assert all(map(torch.equal, one, two))
    assert [len(group['params']) for group in state['param_groups']] == [4, 2]
    for i, moments in state['state'].items():
        assert all(torch.equal(x, again['state'][i][name]) for name, x in moments.items())


def test_bfloat16_stays_inside_newton_schulz():
    (exact, _), (rough, state) = train(), train(torch.bfloat16)
    for shape, a, b in zip(SHAPES, exact, rough):
        assert b.dtype == torch.float32
        assert torch.equal(a, b) == (len(shape) != 2), shape
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 0.02 * 3**0.5 * 0.05)
    for moments in state['state'].values():
        assert all(x.dtype == torch.float32 for x in moments.values())


def test_its_float32_is_not_tf32(monkeypatch):
    """Which training in bfloat16 allows for what is left in float32 on a GPU."""
    seen = []

    def watched(x, dtype):
        seen.append(torch.get_float32_matmul_precision())
        return orthogonalize(x, dtype)
    monkeypatch.setattr(muon, 'orthogonalize', watched)
    torch.set_float32_matmul_precision('high')
    try:
        train(steps=1)
        assert set(seen) == {'highest'} and torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision('highest')
