# GPT-2's size (124 M) with one SAE layer after block 6, trained on FineWeb. The model, its data and
# the strategies are train.py's defaults: F = 16 * 768 = 12,288 features, 64 of them for each token;
# reconstruction before a hand-over at once, several steps of the SAE in each step, the nudge.
# $ python data/fineweb/prepare.py --shards=25        (2.5 B tokens, 5 GB)
# $ torchrun --standalone --nproc_per_node=8 train.py config/sae_gpt.py
out_dir = 'out-sae-gpt'

batch_size = 16          # 16 sequences * 32 micro-batches * 1,024 tokens = 524,288 tokens a step
gradient_accumulation_steps = 32 # on 8 GPUs four each, so that the SAE can make four steps
max_iters = 4768         # * 524,288 = 2.5 B tokens
warmup_iters = 250
