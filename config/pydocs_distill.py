# The prose of config/pydocs.py in few steps: one round of distillation straight to four, from its
# own weights. What it does not say is that file's, which comes first:
#
#   python train.py config/pydocs.py config/pydocs_distill.py
#   python sample.py --out_dir=out/pydocs_4

init_from = 'out/pydocs'
teacher = 'out/pydocs'
out_dir = 'out/pydocs_4'
distill_steps = 4
distill_substeps = 16

learning_rate = 0.003
max_iters = 500
warmup_iters = 20
ema_decay = 0.98            # an average over 50 steps
eval_interval = 250
save_interval = 250
sample_interval = 250

steps = 4                   # of sampling
sampler = 'ode'             # no noise is left to be corrected
gamma = 0.0
grid = 'quantile'           # the times that it was trained at
