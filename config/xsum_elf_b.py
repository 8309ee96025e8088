# ELF-B, one-sentence summaries, XSum: the published recipe. Article (up to 1,024 tokens) and
# summary share a row of 1,088.
#
#   python prepare.py --dataset=xsum
#   torchrun --nproc_per_node=8 train.py config/xsum_elf_b.py
#   python eval.py --out_dir=out/xsum_elf_b --dataset=xsum --num_samples=20000
#
# Published for the official code: ROUGE-1/2/L 36.0 / 12.2 / 27.8 on test, about 36.3 / 12.5 /
# 28.1 on validation. Not run by us.

out_dir = 'out/xsum_elf_b'
dataset = 'xsum'
encoder = 't5-small'
tokenizer = 't5-small'
max_length = 1088
max_input_length = 1024
pad_token = 'eos'

batch_size = 64                     # 64 * 8 = 512 rows per step
gradient_accumulation_steps = 8

decoder_noise_scale = 1.0
drop_cond_prob = 0.1
max_epochs = 100
warmup_iters = 5000

sampler = 'ode'
steps = 64
cfg = 2.0
w = 1.0
