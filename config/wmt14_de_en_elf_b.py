# ELF-B, German to English, WMT14: the published recipe. Condition and translation share a row of
# 128.
#
#   python prepare.py --dataset=wmt14_de-en
#   torchrun --nproc_per_node=8 train.py config/wmt14_de_en_elf_b.py
#   python eval.py --out_dir=out/wmt14_de_en_elf_b --dataset=wmt14_de-en --num_samples=3000
#
# Published for the official code: BLEU 26.4 on test, about 26.7 on validation (64 ODE steps, cfg
# 2, w 1). Not run by us.

out_dir = 'out/wmt14_de_en_elf_b'
dataset = 'wmt14_de-en'
encoder = 't5-small'
tokenizer = 't5-small'
max_length = 128
max_input_length = 64
pad_token = 'eos'                   # fill counts in both losses, so that the model learns where a
                                    # sentence ends

batch_size = 64                     # 64 * 8 = 512 rows per step
gradient_accumulation_steps = 8

decoder_noise_scale = 1.0
drop_cond_prob = 0.1                # rows without their condition, for cfg
max_epochs = 100
warmup_iters = 5000

sampler = 'ode'
steps = 64
cfg = 2.0
w = 1.0
