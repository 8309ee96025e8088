# ELF-B distilled to few steps, the published five rounds: each student starts from the one before,
# the first from the teacher; the teacher is the original in all of them. One epoch a round.
#
#   python prepare.py --dataset=openwebtext --tokenizer=t5-small --encoder=t5-small
#   from=embedded-language-flows/ELF-B-owt-torch
#   for n in 16 8 4 2 1; do
#       torchrun --nproc_per_node=8 train.py config/owt_elf_b_pd.py --init_from=auto:$from \
#           --out_dir=out/pd_$n --distill_steps=$n --distill_substeps=$((64 / n)) --steps=$n
#       from=out/pd_$n
#   done
#
# Published for the last student, Gen. PPL / entropy at 1, 2, 4, 8, 16, 32 steps: 136 / 5.26,
# 68 / 5.24, 34.3 / 5.16, 23.2 / 5.07, 22.1 / 5.06, 21.3 / 5.04. Not run by us.

dataset = 'openwebtext'
encoder = 't5-small'
tokenizer = 't5-small'
teacher = 'embedded-language-flows/ELF-B-owt-torch'

max_epochs = 1
warmup_epochs = 0.1
w = 2.5                             # of sampling, as published for 1 to 8 steps
