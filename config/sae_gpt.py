# GPT-2's size (124 M) with one SAE layer, trained on FineWeb: train.py's defaults, for longer.
# $ python data/fineweb/prepare.py --shards=25        (2.5 B tokens, 5 GB)
# $ torchrun --standalone --nproc_per_node=8 train.py config/sae_gpt.py
out_dir = 'out-sae-gpt'

sae_layers = (6,)        # F = 16 * 768 = 12,288 features on the stream after block 6
max_iters = 4768         # * 16 sequences * 32 micro-batches * 1,024 tokens = 2.5 B tokens
warmup_iters = 250
