# ELF-M on OpenWebText: 342M parameters, 4 epochs.
#
#   torchrun --nproc_per_node=8 train.py config/owt_elf_m.py
#
# Published for the official code: Gen. PPL 21.7, entropy 5.18 (64 SDE steps, gamma 1.0, w 3, 1000
# texts). Not run by us.

out_dir = 'out/owt_elf_m'
dataset = 'openwebtext'
encoder = 't5-small'
tokenizer = 't5-small'
n_layer = 24
n_embd = 1056
n_head = 16
steps = 64                          # of sampling
gamma = 1.0

batch_size = 32                     # 32 * 16 = 512 rows per step
gradient_accumulation_steps = 16
max_iters = 76068                   # 4 epochs of 19,017
