# The dense twin of config/sae_gpt.py: the same model, data, batches and schedule, and no SAE layer.
# $ torchrun --standalone --nproc_per_node=8 train.py config/dense_gpt.py
out_dir = 'out-dense-gpt'

sae_layers = ()
max_iters = 4768
warmup_iters = 250
