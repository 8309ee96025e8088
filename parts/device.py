"""Where it runs: device, precision, compiling, ranks, signals."""
import os
import signal
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from parts.process import UserError, one_line, rank_and_world

DTYPES = ('auto', 'float32', 'bfloat16')
IN_BACKGROUND = ('cuda',)      # see to_device


def pick_device(device, dtype):
    """
    Names, dtype of DTYPES -> torch.device, whether to compute in bfloat16, both in words with the
    reason. 'auto': the GPU if there is one; bfloat16 where it is fast. UserError.
    """
    best = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    try:
        found = torch.device(best if device == 'auto' else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        raise UserError(f"device={device!r} is not available here; --device=auto takes {best}"
                        ) from None
    name = 'GPU'
    fast = False
    if found.type == 'cuda':
        name = torch.cuda.get_device_name(found)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif found.type == 'cpu':
        name = f'{torch.get_num_threads()} threads'
        fast = torch.cpu._is_avx512_bf16_supported()
    bf16 = fast if dtype == 'auto' else dtype == 'bfloat16'
    about = (f"{found} {name}, {'bfloat16 autocast' if bf16 else 'float32'} "
             f"(dtype={dtype}, {'fast' if fast else 'no fast'} bfloat16 here)")
    if found.type == 'cuda':
        # TF32, finer than bfloat16, for what autocast leaves in float32
        torch.set_float32_matmul_precision('high' if bf16 else 'highest')
        if not fast:
            about += "; no tensor cores for float32 on this GPU, expect a small part of its speed"
    return found, bf16, about


def autocast(device, bf16):
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def to_device(x, device):
    """
    A tensor of the CPU on the device. Only CUDA may copy it in the background: others read its
    memory after it was reused (pytorch#139550).
    """
    return x.to(device, non_blocking=torch.device(device).type in IN_BACKGROUND)


def compile_in_place(*modules, device):
    """module.compile() if this machine has a working compiler -> whether it does; or says so."""
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.ones(8, device=device))
    except Exception as e:
        print(f"compile: OFF, torch.compile does not work here ({one_line(e)[:200]}); "
              "steps will take about twice as long")
        return False
    # each count of rows, with and without gradient, is a graph of its own; with symbols Inductor
    # can fail
    torch._dynamo.config.recompile_limit = 64
    for module in modules:
        module.compile(dynamic=False)
    return True


def cast_blocks(model, compiled):
    """
    For sampling alone: the matrices of an ELF's blocks in bfloat16 for good. Autocast, which stays
    on for all else, would cast them anew in each pass; both ends of the network stay in float32.
    On a CPU, unless compiled, they are also laid out for good as oneDNN reads them, beside the
    first: a tenth faster.
    """
    model.requires_grad_(False)
    fast = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
            if module.weight.is_cpu and fast and not compiled:
                packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, None)
                module.forward = partial(packed_linear, packed, module.bias)


def packed_linear(weight, bias, x):
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, bias, 'none', [], '')

# -------------------------------------------------------------------------------------------------
# ranks: the processes of a torchrun, one a GPU

def start(device, dtype):
    """
    Where this process runs, and its place among the ranks of a torchrun, if any -> torch.device,
    whether to compute in bfloat16, both in words. device, dtype: the settings. UserError.
    """
    rank, world = rank_and_world()
    if world > 1:
        if device.startswith('cuda:'):
            raise UserError(f"device={device!r} names one GPU for {world} ranks; "
                            "give --device=cuda, each rank takes its own")
        if device in ('auto', 'cuda') and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device, bf16, about = pick_device(device, dtype)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)        # 'cuda' alone has none
    if world > 1:
        # torchrun keeps its store over restarts on a node: without a prefix of their own, new ranks
        # would find the addresses of dead ones
        store, _, _ = next(dist.rendezvous('env://'))
        if os.environ.get('LOCAL_WORLD_SIZE') == str(world):
            store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
        # gloo for what lies on the CPU, as in gather(): it does not wait for the GPU
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        patience = timedelta(hours=2)       # one rank may download a model while the others wait
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return device, bf16, about


def print0(*args, **kwargs):
    if rank_and_world()[0] == 0:
        print(*args, **kwargs)


def gather(x):
    """Every rank's x, any plain object, in order of the ranks -> list; [x] of one rank."""
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone


# -------------------------------------------------------------------------------------------------
# signals: those that ask a run to stop

TIME_IS_UP = 1000   # a reason to stop, beside the numbers of signals
signals = []        # numbers of those that came


def note_signals():
    """
    SIGTERM, Ctrl-C and their like ask to save and stop, where the process does not ignore them, as
    under nohup; a third Ctrl-C interrupts.
    """
    def note(number, frame):
        signals.append(number)
        # the second may be of the same Ctrl-C: the terminal and torchrun both send it
        if signals.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt

    signals.clear()
    # of a system, a person, a lost terminal; what schedulers send some time before they kill
    for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU'):
        number = getattr(signal, name, signal.SIGINT)       # Windows has the first two
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)


def should_stop(started, max_minutes):
    """Why: the name of a signal that any rank got, 'max_minutes', or ''; the same on all ranks."""
    late = max_minutes and time.monotonic() - started > 60 * max_minutes
    reason = torch.tensor(signals[0] if signals else TIME_IS_UP if late else 0)
    if dist.is_initialized():
        dist.all_reduce(reason, dist.ReduceOp.MAX)      # in each step: a tenth of gather()'s time
    number = reason.item()
    if number in (0, TIME_IS_UP):
        return 'max_minutes' if number else ''
    return signal.Signals(number).name
