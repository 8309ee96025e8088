"""
A GPU for machines without one: its tensors say that they are elsewhere, and are computed on the
CPU. What a GPU would punish shows: mixing its tensors with those of the CPU is an error, and
`waits` lists what made the host wait for it. It is called 'meta', the one other device that a CPU
build of torch can differentiate on; autocast, compile and NCCL are not covered.
"""
import concurrent.futures
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from parts import device

aten = torch.ops.aten
waits = []


def elsewhere(where):
    return where is not None and torch.device(where).type == 'meta'


def inside(x):
    """The tensor of the CPU that a tensor of the GPU stands for; anything else as it is."""
    return x.data_ if isinstance(x, Elsewhere) else x


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype,
            device='meta', requires_grad=x.requires_grad)

    def __init__(self, x):
        self.data_ = x.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        stays = elsewhere(kwargs.get('device') or 'meta')
        if not copies and any(x.ndim and not isinstance(x, Elsewhere) for x in tensors):
            raise RuntimeError(f"{func}: a tensor of the CPU among those of the GPU")
        if func in (aten._local_scalar_dense.default, aten.nonzero.default) or not stays:
            waits.append(str(func))
        if 'device' in kwargs:
            kwargs['device'] = 'cpu'
        known = {id(x.data_): x for x in tensors if isinstance(x, Elsewhere)}

        def outside(x):
            if id(x) in known:      # an in-place function gives back what it was given
                return known[id(x)]
            return Elsewhere(x) if isinstance(x, torch.Tensor) and stays else x

        out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
        return tree_map(outside, out)


def move(x, *args, device=None, dtype=None, non_blocking=False):
    """x.to(...), from or to the GPU or neither."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (str, torch.device)):
            device = arg
    if elsewhere(device):
        if not isinstance(x, Elsewhere):
            x = Elsewhere(x)
            if not non_blocking:
                waits.append('to the GPU')
        device = None
    how = dict(device=device, dtype=dtype)
    how = {name: value for name, value in how.items() if value is not None}
    return x.to(**how) if how else x


class Pretend(TorchFunctionMode):
    """What never reaches __torch_dispatch__: tensors made on the GPU or moved to it, and lists."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, '__name__', ''), dict(kwargs or {})
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        of_gpu = any(isinstance(x, Elsewhere) for x in tensors)
        if name == 'to':
            return move(*args, **kwargs)
        if name == 'numpy' and of_gpu:
            raise TypeError("can't convert a tensor of the GPU to numpy")
        if name == 'tolist' and of_gpu:
            waits.append(name)
            return inside(args[0]).tolist()
        if name == 'where' and of_gpu:
            args = [Elsewhere(torch.tensor(x)) if isinstance(x, (int, float)) else x for x in args]
        if elsewhere(kwargs.get('device')) and not tensors:
            return Elsewhere(func(*args, **kwargs | dict(device='cpu')))
        return func(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device='cpu'):
        return super().__new__(cls, 'cpu')


class Threads(concurrent.futures.ThreadPoolExecutor):
    """A mode like the one above holds in its own thread only."""
    def submit(self, f, *args, **kwargs):
        def there():
            with Pretend():
                return f(*args, **kwargs)
        return super().submit(there)


def install(monkeypatch):
    """Scripts that run inside `with Pretend()` find the pretended GPU, whatever their --device."""
    save, autocast = torch.save, torch.autocast

    def pick_device(device, dtype):
        return torch.device('meta'), False, 'meta (a pretended GPU)'

    def save_inside(content, *args):
        return save(tree_map(inside, content), *args)

    def no_autocast(kind, *args, **kwargs):
        return nullcontext() if kind == 'meta' else autocast(kind, *args, **kwargs)

    monkeypatch.setattr(device, 'pick_device', pick_device)
    monkeypatch.setattr(device, 'IN_BACKGROUND', ('meta',))
    monkeypatch.setattr(torch, 'Generator', Generator)
    monkeypatch.setattr(torch, 'save', save_inside)
    monkeypatch.setattr(torch, 'autocast', no_autocast)
    monkeypatch.setattr(concurrent.futures, 'ThreadPoolExecutor', Threads)
