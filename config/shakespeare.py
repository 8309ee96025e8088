# Shakespeare, letters and punctuation: a 3M-parameter ELF, an hour on one core of a CPU. Not run by
# us on a GPU.
#
#   curl -o shakespeare.txt \
#       https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
#   python prepare.py --dataset=shakespeare.txt --letters_only=false --vocab_size=4000 \
#       --max_length=64
#   python train.py config/shakespeare.py
#   python sample.py --out_dir=out/shakespeare --trace=32 --html=out/shakespeare/page.html
#
# The text's own tokens, 4,000 of them, capitals, signs and line breaks among them; as the demo's,
# a latent is a token's vector, 64 wide.

out_dir = 'out/shakespeare'
dataset = 'shakespeare'
max_length = 64

batch_size = 30
gradient_accumulation_steps = 1

n_layer = 6
n_embd = 192
n_head = 3
bottleneck = 64
n_time = 1
n_scale = 1
n_mode = 1

learning_rate = 0.006
lr_schedule = 'cosine'
max_iters = 4500
warmup_iters = 100
ema_decay = 0.998
ema_warmup = True

steps = 64
gamma = 1.5
grid = 'quantile'
dtype = 'float32'
compile = False
log_interval = 100
eval_interval = 500
eval_iters = 5
save_interval = 500
sample_interval = 500
