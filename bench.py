"""
How fast it is, beside the alternatives: minutes on one GPU, a tiny version on a CPU.

    python bench.py > bench.jsonl      a JSON a line; times in ms, None where memory does not do
    python bench.py --step=false       the layer alone; --layer=false: the step alone

layer   one SAE layer, forward and backward, in ms: kernels.py (fast; fast_skewed: some features
        fire often), sae.py's plain path; and the encoder's matmul alone
step    train.py with config/dense_gpt.py and config/sae_gpt.py in turns, on made-up tokens
"""
import json
import subprocess
import sys
import tempfile
import timeit
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import torch

import kernels
from configurator import configure, run
from data.dataset import write_dataset
from model import GPTConfig
from sae import SAE

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
N = 32_768 if GPU else 256    # tokens through the layer
V = 50_257 if GPU else 500    # vocabulary of the step's tokens
SHAPES = [(32, 256, 4)]       # C, F, K
TRAIN = dict( # makes config/*_gpt.py tiny; 7 blocks, because the SAE is after the seventh
    max_iters=4, log_interval=1, n_layer=7, n_head=2, n_embd=16, block_size=32, batch_size=2,
    gradient_accumulation_steps=4, sae_ratio=8, sae_k=4, eval_tokens=128, compile=False)
if GPU:
    SHAPES = [(768, 12288, 32), (768, 12288, 64), (768, 49152, 64), (512, 8192, 32)]
    TRAIN = dict(max_iters=20, log_interval=5, eval_tokens=65_536,
                 batch_size=64, gradient_accumulation_steps=8) # as the README has it for one GPU

def median_ms(fn):
    """Median time of fn() after warm-up, on a GPU with a cold L2 cache."""
    for _ in range(3):
        fn()
    if not GPU:
        return 1000 * median(timeit.repeat(fn, number=1, repeat=10))
    flush = torch.empty(2**28, dtype=torch.int8, device=DEVICE) # larger than any card's L2
    times = []
    for _ in range(8):
        # about 10 ms, in which the host queues four calls: else small shapes show Python's speed
        torch.cuda._sleep(20_000_000)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(4)]
        for a, b in events:
            flush.zero_()
            a.record()
            fn()
            b.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in events]
    return median(times)

def bench_layer(C, F, K):
    """The times of each variant, all with the same bf16 h and dy; None if it does not fit."""
    torch.manual_seed(0)
    row = dict(C=C, F=F, K=K, N=N)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=C, sae_layers=(0,), sae_ratio=F // C, sae_k=K)
    layer = SAE(config).to(DEVICE)
    P = [layer.W_enc, layer.b_enc, layer.W_dec, layer.b_dec] # fp32, as in training
    h = torch.randn(N, C, device=DEVICE).bfloat16().requires_grad_()
    gy = torch.randn(N, C, device=DEVICE).bfloat16()

    def measure(name, forward, *inputs):
        torch.cuda.empty_cache() # of what the one before has left
        row[name] = None
        with suppress(torch.OutOfMemoryError):
            row[name] = median_ms(lambda: torch.autograd.grad(forward(), [h, *inputs], gy))

    def plain():
        with torch.autocast(DEVICE, torch.bfloat16):
            values, indices = layer.encode(h)
            z = torch.zeros(N, F, device=DEVICE).scatter(-1, indices, values)
            return layer.decode(z).type_as(h)

    if kernels.fits(N, F, C, K, h.dtype, h.device):
        measure('fast', lambda: kernels.topk_autoencode(h, *P, K)[0], *P)
        # trained layers are skewed: here 24 features fire on up to half of all tokens
        bias = 0.3 * torch.randn(F, device=DEVICE)
        bias[:24] += torch.linspace(3, 2, 24, device=DEVICE)
        skewed = [P[0], bias.requires_grad_(), *P[2:]]
        measure('fast_skewed', lambda: kernels.topk_autoencode(h, *skewed, K)[0], *skewed)
    measure('plain', plain, *P)
    # a CPU may come without a C++ compiler
    compiled = torch.compile(plain, dynamic=False, backend='inductor' if GPU else 'eager')
    measure('plain_compiled', compiled, *P)
    x, W = h.detach(), layer.W_enc.detach().bfloat16()
    row['encoder'] = median_ms(lambda: x @ W.t())
    return row

def bench_step():
    """Tokens/s, medians over all runs; and the SAE's share of an SAE step's time."""
    found = {'dense': [], 'sae': []}
    u = np.random.default_rng(0).random(8_000_000 if GPU else 10_000)
    tokens = (V**u).astype(np.int64) - 1 # Zipf's frequencies: P(id) falls as 1/id
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, [tokens], [tokens], V, 'gpt2', 'random, Zipf', None)
        for turn, kind in enumerate(['dense', 'sae'] * (2 if GPU else 1)): # in turns: clocks drift
            out = Path(folder, f'run{turn}')
            options = dict(dataset=folder, out_dir=out, probe_tokens=0) | TRAIN
            options = [f'--{key}={value}' for key, value in options.items()]
            subprocess.run([sys.executable, 'train.py', f'config/{kind}_gpt.py', *options],
                           cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, check=True)
            log = map(json.loads, (out / 'log.jsonl').read_text('utf-8').splitlines())
            tok_s = [record['tok_s'] for record in log if record['event'] == 'log']
            found[kind] += tok_s[max(1, len(tok_s) // 3):] # the first ones compile
    dense, sae = median(found['dense']), median(found['sae'])
    return dict(dense_tok_s=dense, sae_tok_s=sae, sae_share=1 - sae / dense)

def main(argv):
    options = configure(dict(layer=True, step=True), argv)
    torch.set_float32_matmul_precision('high') # as train.py
    print(json.dumps(dict(gpu=torch.cuda.get_device_name() if GPU else 'CPU',
                          torch=torch.__version__)))
    if options['layer']:
        for shape in SHAPES:
            print(json.dumps(bench_layer(*shape)), flush=True)
    if options['step']:
        print(json.dumps(bench_step()))

if __name__ == '__main__':
    run(main, sys.argv[1:])
