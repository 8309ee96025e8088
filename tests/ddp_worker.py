"""Run under torchrun by test_train.py: train.py with a DDP that counts how often each bucket of gradients is reduced."""
import json
import os
import runpy
import sys

import torch.distributed as dist
import torch.nn.parallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
reduced = []


class Counting(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, bucket_cap_mb=0.01, **kwargs)

        def hook(state, bucket):
            reduced.append((bucket.index(), bucket.is_last()))
            return allreduce_hook(state, bucket)
        self.register_comm_hook(dist.group.WORLD, hook)


torch.nn.parallel.DistributedDataParallel = Counting
counts = sys.argv.pop(1)
runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')
with open(f"{counts}.{os.environ['RANK']}", 'w') as f:
    json.dump(reduced, f)
