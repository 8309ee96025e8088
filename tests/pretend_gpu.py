"""
A GPU for machines without one: its tensors say that they are elsewhere, and are computed on the CPU. What a GPU would punish
shows: mixing its tensors with those of the CPU is an error, and `waits` lists what made the host wait for it. It is called
'meta', the one other device that a CPU build of torch can differentiate on; autocast, compile and NCCL are not covered.
"""
import concurrent.futures
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

aten, waits = torch.ops.aten, []
elsewhere = lambda device: device is not None and torch.device(device).type == 'meta'
inside = lambda x: x.data_ if isinstance(x, Elsewhere) else x


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device='meta', requires_grad=data.requires_grad)

    def __init__(self, data):
        self.data_ = data.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, leaves = dict(kwargs or {}), tree_leaves((args, kwargs))
        copies, stays = func in (aten._to_copy.default, aten.copy_.default), elsewhere(kwargs.get('device') or 'meta')
        if not copies and any(isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) and x.ndim for x in leaves):
            raise RuntimeError(f"{func}: a tensor of the CPU among those of the GPU")
        if func in (aten._local_scalar_dense.default, aten.nonzero.default) or not stays:
            waits.append(str(func))
        kwargs |= dict(device='cpu') if 'device' in kwargs else {}
        out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
        known = {id(x.data_): x for x in leaves if isinstance(x, Elsewhere)}        # an in-place function gives back what it was given
        return tree_map(lambda x: known[id(x)] if id(x) in known else Elsewhere(x) if isinstance(x, torch.Tensor) and stays else x, out)


class Pretend(TorchFunctionMode):
    """What never reaches __torch_dispatch__: tensors made on the device or moved to it, and lists."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs, leaves = getattr(func, '__name__', ''), dict(kwargs or {}), tree_leaves(args)
        ours = [x for x in leaves if isinstance(x, Elsewhere)]
        if name in ('tolist', 'numpy') and ours:
            waits.append(name)
            if name == 'numpy':
                raise TypeError("can't convert a tensor of the GPU to numpy")
            return args[0].data_.tolist()
        if name == 'where' and ours:
            args = [Elsewhere(torch.tensor(x)) if isinstance(x, (int, float)) else x for x in args]
        if name == 'to':
            x, device, dtype = args[0], kwargs.get('device'), kwargs.get('dtype')
            for other in args[1:]:
                if isinstance(other, torch.Tensor):
                    device, dtype = other.device, other.dtype
                device, dtype = other if isinstance(other, (str, torch.device)) else device, other if isinstance(other, torch.dtype) else dtype
            if elsewhere(device) and not isinstance(x, Elsewhere):
                if not kwargs.get('non_blocking'):
                    waits.append('to the GPU')
                x = Elsewhere(x)
            return x.to(**{k: v for k, v in dict(dtype=dtype, device=None if elsewhere(device) else device).items() if v is not None}) if dtype or device else x
        if elsewhere(kwargs.get('device')) and not any(isinstance(x, torch.Tensor) for x in leaves):
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
    """Scripts that run in this process inside `with Pretend()` find the pretended GPU, whatever their --device."""
    import sample
    save, autocast = torch.save, torch.autocast
    monkeypatch.setattr(sample, 'pick_device', lambda device, dtype: (torch.device('meta'), nullcontext(), 'a pretended GPU, float32'))
    monkeypatch.setattr(torch, 'Generator', Generator)
    monkeypatch.setattr(torch, 'save', lambda content, *args: save(tree_map(inside, content), *args))
    monkeypatch.setattr(torch, 'autocast', lambda kind, *args, **kwargs: nullcontext() if kind == 'meta' else autocast(kind, *args, **kwargs))
    monkeypatch.setattr(concurrent.futures, 'ThreadPoolExecutor', Threads)
