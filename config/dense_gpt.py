# The dense twin of config/sae_gpt.py: the same model, data, batches and schedule, and no SAE layer.
# $ torchrun --standalone --nproc_per_node=8 train.py config/dense_gpt.py
out_dir = 'out-dense-gpt'
dataset = 'fineweb'

n_layer = 12
n_head = 6
n_embd = 768
block_size = 1024
sae_layers = ()

batch_size = 16          # 16 sequences * 32 micro-batches * 1,024 tokens = 524,288 tokens a step
gradient_accumulation_steps = 32
max_iters = 4768         # * 524,288 = 2.5 B tokens
warmup_iters = 250
eval_interval = 250
save_interval = 250
