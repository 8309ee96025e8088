# ELF-B on OpenWebText, the published recipe: all of it is in train.py's defaults; this file pins
# the data and names the run.
#
#   python prepare.py --dataset=openwebtext --tokenizer=t5-small --encoder=t5-small
#   torchrun --nproc_per_node=8 train.py config/owt_elf_b.py
#
# 5 epochs of 9.7M rows, 95,085 iterations. Official: about 4 hours an epoch on 8 x H200.
# Published for the official code: Gen. PPL 24.1, entropy 5.15 (32 SDE steps, gamma 1.5, w 3, 1000
# texts).
# Not run by us: it takes 8 large GPUs for most of a day.

out_dir = 'out/owt_elf_b'
dataset = 'openwebtext'
encoder = 't5-small'
tokenizer = 't5-small'

batch_size = 64                     # 64 rows * 8 micro-batches over all ranks = 512 rows per step,
gradient_accumulation_steps = 8     # on 8 GPUs one micro-batch each; on one GPU 8 in turn
