# Stories, between the laptop and eight GPUs: a 43M-parameter ELF on TinyStories, T5's tokens and
# latents, one GPU of 8 to 24 GB, one to three hours by estimate. Not run by us on a GPU.
#
#   python prepare.py --dataset=tinystories
#   python train.py config/tinystories.py
#   python sample.py --out_dir=out/tinystories --trace=16
#
# One story a row of 256 tokens. Where it leaves the published recipe: smaller batches, so a lower
# learning rate by the same rule; cosine, since the run is short; an average that warms up, since
# 0.9999 from the first step would still be the initial weights.
#
# Tried on a CPU at reduced size for its first 2,000 steps, 2026-11-26: 2 MB of the stories with a
# tokenizer of their own (2,000 subwords), --max_length=64 --batch_size=16 --n_layer=4 --n_embd=128
# --n_head=2 --noise_scale=0.7 --decoder_noise_scale=1.8 --learning_rate=0.004, five CPU minutes:
# validation l2 1.80 to 0.87, ce 7.62 to 0.56; it writes "Once upon a time there was was a little
# girl named named Lily. Lily loved sit in the park."

out_dir = 'out/tinystories'
dataset = 'tinystories'
encoder = 't5-small'
tokenizer = 't5-small'
max_length = 256

batch_size = 32
gradient_accumulation_steps = 4     # 32 * 4 = 128 rows per step; 64 * 2 on 24 GB

n_layer = 8
n_embd = 512
n_head = 8

learning_rate = 0.001               # the rule, 0.001 * 128 / 256, twice: a smaller network bears it
lr_schedule = 'cosine'
max_iters = 20000                   # 1.2 epochs of 2.1M stories
warmup_iters = 1000
ema_decay = 0.999
ema_warmup = True

ns_dtype = 'bfloat16'
steps = 64
gamma = 1.0
grid = 'quantile'
log_interval = 50
sample_interval = 2000
