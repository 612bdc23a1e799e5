# Nothing but features passes: no token skip, and K=64 to make up for some of it. Give it after
# another config:
# $ torchrun --standalone --nproc_per_node=8 train.py config/sae_gpt.py config/strict_sae.py
out_dir = 'out-strict-sae'

sae_token_skip = False
sae_k = 64
