# ELF-L on OpenWebText: 652M parameters, 3 epochs.
#
#   torchrun --nproc_per_node=8 train.py config/owt_elf_l.py
#
# Published for the official code: Gen. PPL 23.3, entropy 5.28 (64 SDE steps, gamma 1.0, w 3, 1000
# texts). Not run by us.

out_dir = 'out/owt_elf_l'
dataset = 'openwebtext'
encoder = 't5-small'
tokenizer = 't5-small'
n_layer = 32
n_embd = 1280
n_head = 16
steps = 64                          # of sampling
gamma = 1.0

batch_size = 16                     # 16 * 32 = 512 rows per step
gradient_accumulation_steps = 32
max_iters = 57051                   # 3 epochs of 19,017
