# A small GPT with one SAE layer, trained on the source of Python's own library: a few minutes on two CPU cores, no
# download. Long enough for features that one can name; the text it writes is Python-shaped nonsense.
out_dir = 'out-sae-cpu'
dataset = 'stdlib'

n_layer = 4
n_head = 2               # heads of 96: with four of 48 training takes 3m04s instead of 2m37s, and ends 0.041 higher (results/cpu)
n_embd = 192
block_size = 256
sae_layers = (1,)        # after the second of four blocks
sae_ratio = 11           # F = 11 * 192 = 2,112 features
sae_k = 16

batch_size = 4           # 4 sequences * 2 micro-batches * 256 tokens = 2,048 tokens a step; twice as many tokens a
gradient_accumulation_steps = 2 # step and half the steps ended at 4.48 instead of 4.25
max_iters = 480
warmup_iters = 20
sae_skip_lr = 1.0        # 0.3 makes the features carry twice as much, and the loss 0.018 higher: there is little time to learn here

eval_interval = 120
save_interval = 120
eval_tokens = 8_192
probe_tokens = 16_384
compile = False          # compiling takes longer than it saves at this size
