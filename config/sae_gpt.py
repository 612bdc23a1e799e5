# GPT-2's size (124 M) with one SAE layer after block 6, trained on FineWeb.
# $ python data/fineweb/prepare.py --shards=25        (2.5 B tokens, 5 GB)
# $ torchrun --standalone --nproc_per_node=8 train.py config/sae_gpt.py
out_dir = 'out-sae-gpt'
dataset = 'fineweb'

n_layer = 12
n_head = 6
n_embd = 768
block_size = 1024
sae_layers = (6,)        # F = 16 * 768 = 12,288 features on the stream after block 6
sae_ratio = 16
sae_k = 64               # of them for each token

batch_size = 16          # 16 sequences * 32 micro-batches * 1,024 tokens = 524,288 tokens a step
gradient_accumulation_steps = 32 # on 8 GPUs four each, so that the SAE can make four steps
max_iters = 4768         # * 524,288 = 2.5 B tokens
warmup_iters = 250
eval_interval = 250
save_interval = 250
