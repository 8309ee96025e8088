# Prose, as far as three minutes of a CPU go: a 1.3M-parameter ELF on the text inside every Python,
# nothing downloaded. Words are right, as they are tokens; which words go together is what it
# learns; what they mean it does not, and it writes like this:
#
#   only error where that returns an arbitrary arbitrary  which is provided not used as the string
#
#   python tests/pydocs.py pydocs.txt
#   python prepare.py --dataset=pydocs.txt
#   python train.py config/pydocs.py                                # 2 cores: three minutes
#   python sample.py --out_dir=out/pydocs --trace=8
#   python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram --num_samples=200
#
# Expect 1.01 nats per character of the n-gram judge (real text 1.15, its tokens drawn one by one
# 1.45; 2026-11-25): docs/experiments.md. config/numbers.py has answers that are right or wrong.
#
# Data: the prose in Python's language reference and in its library's docstrings, lower-cased,
# 6,000 tokens that are mostly whole words, rows of 24; a latent is a token's vector, 64 wide.

out_dir = 'out/pydocs'
dataset = 'pydocs'
max_length = 24

# 30 rows split exactly: 6 decode, 24 denoise, 12 of these with a first guess; one shape per pass
batch_size = 30
gradient_accumulation_steps = 1

n_layer = 4
n_embd = 128
n_head = 2
bottleneck = 32
n_time = 1                  # 12 prefix tokens would be half of each row here
n_scale = 1
n_mode = 1

learning_rate = 0.008       # small matrices bear more than the recipe's 0.002
lr_schedule = 'cosine'
max_iters = 1600
warmup_iters = 60
ema_decay = 0.995           # an average over 200 steps; the recipe's 10,000 is longer than the run
ema_warmup = True

steps = 64                  # of sampling
sampler = 'sde_exact'
gamma = 3.0
grid = 'uniform'            # late times matter here: they choose between words that are alike
dtype = 'float32'           # matrices this small gain nothing from bfloat16 on a CPU,
compile = False             # and compiling takes longer than it saves
log_interval = 100
eval_interval = 400
eval_iters = 5
save_interval = 400
sample_interval = 400
