"""
Run under torchrun by the tests: ddp_worker.py COUNTS --setting=value ... is train.py, but
{rank} in its arguments is the number of the rank, and it counts how often each bucket of gradients
is reduced: COUNTS gets a list of (number of the bucket, whether it is the last).
"""
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


def count(state, bucket):
    reduced.append((bucket.index(), bucket.is_last()))
    return allreduce_hook(state, bucket)


class Counting(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, bucket_cap_mb=0.01, **kwargs)       # several buckets
        self.register_comm_hook(dist.group.WORLD, count)


torch.nn.parallel.DistributedDataParallel = Counting
sys.argv = [arg.replace('{rank}', os.environ['RANK']) for arg in sys.argv]
counts = sys.argv.pop(1)
runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')
with open(counts, 'w') as f:
    json.dump(reduced, f)
