# A small GPT with one SAE layer, trained on the source of Python's own library: minutes on two CPU cores,
# no download. Long enough for features that one can name; the text it writes is Python-shaped nonsense.
out_dir = 'out-sae-cpu'
dataset = 'stdlib'

n_layer = 4
n_head = 4
n_embd = 192
block_size = 256
sae_layers = (2,)        # after the third of four blocks
sae_ratio = 11           # F = 2112 features
sae_k = 16

batch_size = 8           # 8 sequences * 2 micro-batches * 256 tokens = 4,096 tokens a step
gradient_accumulation_steps = 2
max_iters = 500
learning_rate = 3e-3
warmup_iters = 20
sae_silent_tokens = 20 * 4096

eval_interval = 100
save_interval = 100
eval_tokens = 32_768
probe_tokens = 32_768
compile = False          # compiling takes longer than it saves at this size
