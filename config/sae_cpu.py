# A small GPT with one SAE layer, trained on the source of Python's own library: a few minutes on
# two CPU cores. Some features can be named; the text that it writes is Python-shaped nonsense.
# $ python train.py config/sae_cpu.py
out_dir = 'out-sae-cpu'
dataset = 'stdlib'

n_layer = 4
n_head = 2               # heads of 96 channels: faster and better than four of 48
n_embd = 192
block_size = 256
sae_layers = (1,)        # after the second of four blocks
sae_ratio = 11           # F = 11 * 192 = 2,112 features
sae_k = 20               # about one in a hundred
sae_cap = 0.03           # with so few features a laxer one leaves them to "the", "and", "for"
sae_blend_start = 0.7    # at 30 % of so few steps the SAE has not learned enough yet
sae_blend_end = 0.7

batch_size = 4           # 4 sequences * 2 micro-batches * 256 tokens = 2,048 tokens a step
gradient_accumulation_steps = 2
sae_steps = 2
sae_lr_factor = 0.5      # so few steps need a higher rate
max_iters = 480          # at so few tokens small batches and many steps learn more
warmup_iters = 20

eval_interval = 120
save_interval = 120
eval_tokens = 8_192
probe_tokens = 16_384
compile = False          # compiling takes longer than it saves at this size
