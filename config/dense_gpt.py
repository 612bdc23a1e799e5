# The dense twin of config/sae_gpt.py: the same model, data, batches and schedule, and no SAE layer.
# $ torchrun --standalone --nproc_per_node=8 train.py config/dense_gpt.py
from config.sae_gpt import *

out_dir = 'out-dense-gpt'
sae_layers = ()
