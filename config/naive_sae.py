# Naive insertion, which degrades: hard TopK from step 0. To be given after another config:
# $ python train.py config/sae_cpu.py config/naive_sae.py
out_dir = 'out-naive-sae'

sae_blend_start = 0.0    # no hand-over: the SAE replaces the stream from step 0
sae_blend_end = 0.0
sae_recon = 0.0          # it never learns to reconstruct
sae_nudge = 0.0          # silent features stay silent
sae_steps = 1            # one step of the SAE in each step of the model,
sae_lr_factor = 0.5      # at the rate that suits that
