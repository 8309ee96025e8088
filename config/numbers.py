# The demo: numbers in digits become numbers in words, 4071 -> four thousand seventy-one. A
# 0.9M-parameter ELF with conditions, whose answers anyone can check; nothing is downloaded.
#
#   python prepare.py --dataset=numbers
#   python train.py config/numbers.py                       # 2 cores: two to three minutes
#   python sample.py --out_dir=out/numbers --input=4071 --trace=8
#   python eval.py --out_dir=out/numbers --dataset=numbers --batch_size=100
#
# Expect 99.5 to 99.9 % of 1,000 unseen numbers exactly right: three seeds of training times three
# of sampling; 97 to 99 % in one step of sampling (2026-11-26; docs/experiments.md has the search
# and what each part does). It knows 0 ... 999,999: a longer number is beyond what it was shown.
#
# Data: 100,000 pairs; each digit is a token, each word is one; a latent is a token's vector, 64
# wide. A row is at most 6 digits, EOS, 9 words, EOS.

out_dir = 'out/numbers'
dataset = 'numbers'
max_length = 17
max_input_length = 7        # six digits and EOS
pad_token = 'eos'           # it learns to end

# 60 rows split exactly: 12 decode, 48 denoise, 24 of these with a first guess; one shape per pass
batch_size = 60
gradient_accumulation_steps = 1

n_layer = 4
n_embd = 128
n_head = 4
bottleneck = 64
n_time = 1                  # 12 prefix tokens would be nearly half of each row here
n_scale = 1
n_mode = 1

learning_rate = 0.008       # small matrices bear more than the recipe's 0.002; 0.016 is too much
lr_schedule = 'cosine'
max_iters = 1500
warmup_iters = 60
ema_decay = 0.99            # an average over 100 steps; the recipe's 10,000 is longer than the run
ema_warmup = True

steps = 8                   # of sampling
sampler = 'ode'             # there is one right answer: fresh noise brings nothing
w = 1.0
grid = 'quantile'
dtype = 'float32'           # matrices this small gain nothing from bfloat16 on a CPU,
compile = False             # and compiling takes longer than it saves
log_interval = 100
eval_interval = 500
eval_iters = 5
save_interval = 500
sample_interval = 500
