# An 11M-parameter ELF on the text inside every Python for one small GPU, with what the large
# runs use: bfloat16, compile, accumulation, Muon, EMA, validation, sampling, checkpoints.
# Not run by us on a GPU yet.
#
#   python tests/pydocs.py pydocs.txt
#   python prepare.py --dataset=pydocs.txt --name=pydocs128 --max_length=128 \
#       --letters_only=false --encoder_dim=128
#   python train.py config/gpu_debug.py

out_dir = 'out/gpu_debug'
dataset = 'pydocs128'
max_length = 128

batch_size = 64
gradient_accumulation_steps = 2     # 64 * 2 = 128 rows per step

n_layer = 6
n_embd = 384
n_head = 6
bottleneck = 64

learning_rate = 0.004
lr_schedule = 'cosine'
max_iters = 1000
warmup_iters = 100
ema_decay = 0.99
ema_warmup = True

grid = 'quantile'            # of sampling
log_interval = 20
eval_interval = 250
eval_iters = 5
save_interval = 250
sample_interval = 250
