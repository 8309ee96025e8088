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
max_iters = 3000
warmup_iters = 100
ema_decay = 0.995
ema_warmup = True

sampler = 'sde_exact'
steps = 64
gamma = 3.0
w = 1.0
grid = 'uniform'
dtype = 'float32'
compile = False
log_interval = 100
eval_interval = 500
eval_iters = 5
save_interval = 500
keep_interval = 500
sample_interval = 1000
