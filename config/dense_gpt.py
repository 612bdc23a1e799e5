# The dense twin of config/sae_gpt.py: the same model, data, batches and schedule, and no SAE layer.
# $ torchrun --standalone --nproc_per_node=8 train.py config/dense_gpt.py
out_dir = 'out-dense-gpt'
sae_layers = ()

batch_size = 16          # 16 sequences * 32 micro-batches * 1,024 tokens = 524,288 tokens a step
gradient_accumulation_steps = 32
max_iters = 4768         # * 524,288 = 2.5 B tokens
warmup_iters = 250
