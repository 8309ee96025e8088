# The demo in one step: a student that learns to say at once what its teacher finds in eight, from
# the demo's own weights. What it does not say is config/numbers.py's, which comes first:
#
#   python train.py config/numbers.py config/numbers_distill.py
#   python sample.py --out_dir=out/numbers_1 --input=4071

init_from = 'out/numbers'
teacher = 'out/numbers'
out_dir = 'out/numbers_1'
distill_steps = 1
distill_substeps = 8

learning_rate = 0.003
max_iters = 300
warmup_iters = 20
ema_decay = 0.98            # an average over 50 steps
eval_interval = 150
save_interval = 150
sample_interval = 150

steps = 1                   # of sampling
