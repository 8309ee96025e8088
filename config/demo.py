# The embedded default: a 0.9M-parameter ELF that learns to spell, on a CPU, in minutes, with
# nothing downloaded.
#
#   python prepare.py && python train.py config/demo.py
#
# Data: the prose of Python's language reference, lower-cased, 27 symbols, rows of 32; latents of
# a small random T5, 32 wide.

out_dir = 'out/demo'
dataset = 'pydocs'
overwrite = True            # the demo may be run again and again
max_length = 32

# 60 rows split exactly: 12 decode, 48 denoise, 24 of these with a first guess; so there is one
# shape per pass to compile
batch_size = 60
gradient_accumulation_steps = 1

n_layer = 4
n_embd = 128
n_head = 4
bottleneck = 32
n_time = 1                  # 12 prefix tokens would be a quarter of each row here
n_scale = 1
n_mode = 1

# noise belongs to the latent width: 2 * sqrt(32 / 512) and 5 * sqrt(32 / 512); with the recipe's
# 2 and 5 narrow latents drown
noise_scale = 0.5
decoder_noise_scale = 1.25

learning_rate = 0.006       # small matrices bear more than the recipe's 0.002
lr_schedule = 'cosine'
max_iters = 2200
warmup_iters = 100
ema_decay = 0.995           # an average over 200 steps; the recipe's 10,000 is longer than the run
ema_warmup = True

steps = 64                  # of sampling, and how much of it is re-noised; a text takes 0.04 s on
                            # 2 CPU cores
gamma = 2.5
dtype = 'float32'           # matrices this small gain nothing from bfloat16 on a CPU
log_interval = 100
eval_interval = 550
eval_iters = 5
save_interval = 550
sample_interval = 550
