"""
How fast it is: every number beside its alternatives, all of them measured in one run.

    python bench.py                      both parts; minutes on one GPU, a tiny version on a CPU
    python bench.py --parts=layer        one part only
    python bench.py --out=bench.json     also writes the numbers to a file, after each part

layer   one SAE layer, forward and backward: kernels.py (fast; fast_skewed: some features fire
        often), sae.py's plain path, the textbook in bf16 (scatter: topk, scatter, dense decode), a
        dense autoencoder (dense_ae), EleutherAI's sparsify if installed; alone, the encoder's
        matmul, the selection, torch.topk, and the floor. Then the output head with the loss
step    train.py with config/dense_gpt.py and config/sae_gpt.py in turns, on made-up tokens
"""
import json
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.functional import linear

import data.dataset
import kernels
from configurator import configure, run
from model import GPTConfig
from sae import SAE

ROOT = Path(__file__).resolve().parent
GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
BACKEND = 'inductor' if GPU else 'eager' # on a CPU: without a C++ compiler
N = 32_768 if GPU else 256               # tokens through the layer and the head
V = 50_257 if GPU else 500               # vocabulary
SHAPES = [(32, 256, 4)]                  # C, F, K
TINY = dict( # makes config/*_gpt.py tiny; 7 blocks, because the SAE is after the seventh
    n_layer=7, n_head=2, n_embd=16, block_size=32, batch_size=2, gradient_accumulation_steps=2,
    sae_ratio=8, sae_k=4, eval_tokens=128, compile=False)
if GPU:
    SHAPES = [(768, 12288, 32), (768, 12288, 64), (768, 49152, 64), (512, 8192, 32)]
    TINY = dict(eval_tokens=65_536)

begun = time.time()

def say(text):
    print(f"{time.time() - begun:5.0f} s | {text}", flush=True)

# --------------------------------------------------------------------------------------------------
# clocks

def median_ms(fn):
    """
    Median time of fn() after warm-up, on a GPU with a cold L2 cache. It is the GPU's time: a short
    sleep lets the host queue four calls ahead, as it runs ahead in training. Without it, as in
    triton.testing.do_bench, small shapes show Python's speed.
    """
    for _ in range(3):
        fn()
    if not GPU:
        return 1000 * median(timeit.repeat(fn, number=1, repeat=10))
    flush = torch.empty(2**28, dtype=torch.int8, device=DEVICE) # larger than any card's L2
    times, end = [], time.time() + 0.4
    while len(times) < 8 or time.time() < end:
        torch.cuda._sleep(20_000_000) # clock cycles, about 10 ms
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(4)]
        for a, b in events:
            flush.zero_()
            a.record()
            fn()
            b.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in events]
    return median(times)

def measure(what, forward, inputs, gy=None):
    """
    Of forward and backward: median ms; GB on top of the inputs, gradients included, at the peak; GB
    kept between the two beside y. None for what does not fit the card, and for GB on a CPU.
    """
    torch.cuda.empty_cache() # of what the one before has left
    ms = gb = kept_gb = None
    try:
        ms = median_ms(lambda: torch.autograd.grad(forward(), inputs, gy))
        if GPU:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            y = forward()
            kept_gb = (torch.cuda.memory_allocated() - before - y.nbytes) / 1e9
            torch.autograd.grad(y, inputs, gy)
            gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    except torch.OutOfMemoryError:
        pass
    say(f"{what}: " + (f"{ms:.3g} ms" if ms else "does not fit"))
    return ms, gb, kept_gb

def card_rates():
    """The card's own copy bandwidth, TB/s read and written, and its bf16 matmul rate, TFLOP/s."""
    a = torch.zeros(2**29 if GPU else 2**20, dtype=torch.bfloat16, device=DEVICE)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / median_ms(lambda: b.copy_(a)) / 1e9
    matmul = 0.0 # the better of a square and an encoder
    for m, k, n in [(8192, 8192, 8192), (32768, 768, 12288)] if GPU else [(256, 256, 256)]:
        # random: zeros take less power, and clocks would rise
        a, b = (torch.randn(s, k, device=DEVICE).bfloat16() for s in (m, n))
        out = torch.empty(m, n, dtype=torch.bfloat16, device=DEVICE)
        matmul = max(matmul, 2 * m * k * n / median_ms(lambda: torch.mm(a, b.t(), out=out)) / 1e9)
    return copy, matmul

# --------------------------------------------------------------------------------------------------
# layer

def bench_layer(C, F, K, copy, matmul):
    """A row: *_ms, *_gb (peak) and *_kept_gb of each variant, all with the same bf16 h and dy."""
    torch.manual_seed(0)
    row = dict(C=C, F=F, K=K, N=N)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=C, sae_layers=(0,), sae_ratio=F // C, sae_k=K)
    layer = SAE(config).to(DEVICE)
    P = [layer.W_enc, layer.b_enc, layer.W_dec, layer.b_dec] # fp32, as in training
    h = torch.randn(N, C, device=DEVICE).bfloat16().requires_grad_()
    gy = torch.randn(N, C, device=DEVICE).bfloat16()
    has_kernels = kernels.fits(N, F, C, K, h.dtype, h.device)

    def fast(P=P):
        return kernels.topk_autoencode(h, *P, K)[0]

    def plain():
        with torch.autocast(DEVICE, torch.bfloat16):
            values, indices = layer.encode(h)
            z = torch.zeros(N, F, device=DEVICE).scatter(-1, indices, values)
            return (z @ layer.W_dec + layer.b_dec).type_as(h)

    def dense_ae(textbook=False):
        W_enc, b_enc, W_dec, b_dec = (p.bfloat16() for p in P)
        a = linear(h - b_dec, W_enc, b_enc).relu()
        if textbook:
            values, indices = a.topk(K, dim=-1)
            a = torch.zeros_like(a).scatter(-1, indices, values)
        return a @ W_dec + b_dec

    def add(name, forward, params=P):
        row[f'{name}_ms'], row[f'{name}_gb'], row[f'{name}_kept_gb'] = measure(
            f"C={C} F={F} K={K} {name}", forward, [h, *params], gy)

    if has_kernels:
        add('fast', fast)
        # trained layers are skewed: here 24 features fire on up to half of all tokens
        bias = 0.3 * torch.randn(F, device=DEVICE)
        bias[:24] += torch.linspace(3, 2, 24, device=DEVICE)
        skewed = [P[0], bias.requires_grad_(), *P[2:]]
        add('fast_skewed', lambda: fast(skewed), skewed)
    add('plain', plain)
    torch._dynamo.reset()
    add('plain_compiled', torch.compile(plain, dynamic=False, backend=BACKEND))
    add('scatter', lambda: dense_ae(textbook=True))
    add('dense_ae', dense_ae)
    try: # eai-sparsify on PyPI
        from sparsify import SparseCoder, SparseCoderConfig
        coder = SparseCoder(C, SparseCoderConfig(num_latents=F, k=K), DEVICE, torch.bfloat16)
        add('sparsify', lambda: coder.decode(*coder.encode(h)[:2]), coder.parameters())
    except Exception as e: # not installed, or the interface of another version
        say(f"sparsify is not timed: {type(e).__name__}: {e}")

    x, W = h.detach(), P[0].detach().bfloat16()
    pre = x @ W.t()
    row['encoder_ms'] = median_ms(lambda: torch.mm(x, W.t(), out=pre))
    if has_kernels:
        values = torch.empty(N, K, device=DEVICE)
        indices = torch.empty(N, K, dtype=torch.int32, device=DEVICE)
        row['select_ms'] = median_ms(lambda: kernels.select(pre, P[1].detach(), values, indices))
    row['topk_ms'] = median_ms(lambda: pre.topk(K, dim=-1))
    # What nothing with a dense encoder can beat on this card: 2 N C F operations, then once over
    # memory for h (twice), y, dy, dh in bf16; both weights (twice) and their gradients in fp32;
    # values and indices, out and in. Gathered rows are not counted: they can come from the L2.
    traffic = 10 * N * C + 24 * F * C + 16 * N * K
    row['floor_ms'] = 2 * N * C * F / matmul / 1e9 + traffic / copy / 1e9
    row['select_floor_ms'] = pre.nbytes / copy / 1e9 # one reading
    return row

def bench_head():
    """The output head with the loss: *_ms and *_gb (peak); x in bf16, W in fp32, as in training."""
    C = 768 if GPU else 32
    x = torch.randn(N, C, device=DEVICE).bfloat16().requires_grad_()
    W = 0.02 * torch.randn((V + 63) // 64 * 64, C, device=DEVICE) # padded, as in model.py
    W.requires_grad_()
    targets = torch.randint(V, (N,), device=DEVICE)
    compiled = torch.compile(kernels.linear_cross_entropy_ref, dynamic=False, backend=BACKEND)
    row = dict(N=N, C=C, V=V)
    for name, loss in (('fused', kernels.linear_cross_entropy), ('compiled', compiled)):
        row[f'{name}_ms'], row[f'{name}_gb'], _ = measure(
            f"head {name}", lambda: loss(x, W, targets, V), [x, W])
    return row

# --------------------------------------------------------------------------------------------------
# step

def write_tokens(folder):
    """A data set of random tokens. V^u, u uniform, has Zipf's frequencies: P(id) falls as 1/id."""
    n = 8_000_000 if GPU else 10_000
    rng = np.random.default_rng(0)
    splits = ([(V ** rng.random(size)).astype(np.int64) - 1] for size in (n, n // 6))
    data.dataset.write_dataset(folder, *splits, V, 'gpt2', 'random, Zipf', None)

def train(folder, config, name, steps):
    """Runs train.py on the tokens in `folder` -> tokens/s of each steady log line, FLOPs a token.
    RuntimeError with its last words if it fails."""
    out = folder / name
    options = dict(dataset=folder, out_dir=out, max_iters=steps, log_interval=max(1, steps // 4),
                   probe_tokens=0) | TINY
    command = [sys.executable, 'train.py', f'config/{config}.py']
    command += [f'--{key}={value}' for key, value in options.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        text = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{name} ended with code {done.returncode}:\n{text}")
    start, *records = map(json.loads, (out / 'log.jsonl').read_text(encoding='utf-8').splitlines())
    tok_s = [record['tok_s'] for record in records if record['event'] == 'log']
    tok_s = tok_s[max(1, len(tok_s) // 3):] # the first ones compile
    say(f"{name}: {median(tok_s):,.0f} tokens/s ({min(tok_s):,.0f} to {max(tok_s):,.0f})")
    return tok_s, start['flops_per_token']

def bench_step(steps, rounds):
    """{dense,sae}_tok_s and _tflop_s, the model's own FLOPs: medians over all runs. Each kind is
    trained `rounds` times, in turns, as clocks drift."""
    step, found, flops = {}, {'dense': [], 'sae': []}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder)
        for i in range(rounds):
            for kind in found:
                tok_s, flops[kind] = train(Path(folder), f'{kind}_gpt', f'{kind}-{i + 1}', steps)
                found[kind] += tok_s
    for kind, tok_s in found.items():
        step[f'{kind}_tok_s'] = median(tok_s)
        step[f'{kind}_tflop_s'] = median(tok_s) * flops[kind] / 1e12
    say(f"an SAE step takes {step['dense_tok_s'] / step['sae_tok_s']:.3f} times a dense one")
    return step

# --------------------------------------------------------------------------------------------------

DEFAULTS = dict(
    parts='layer,step',
    out='',    # where to write the JSON
    steps=20,  # of each training run; those of the first log line are not counted: they compile
    rounds=2)  # of training runs: dense, SAE, dense, SAE

def problems(c):
    """What is wrong with the options, as a list of sentences."""
    found = [f"parts: {part!r} is not one of layer, step"
             for part in c['parts'].split(',') if part not in ('layer', 'step')]
    if c['steps'] < 4:
        found.append(f"steps={c['steps']} must be at least 4")
    if c['rounds'] < 1:
        found.append(f"rounds={c['rounds']} must be at least 1")
    return found

def main(argv):
    options = configure(DEFAULTS, argv, problems)
    torch.set_float32_matmul_precision('high') # as train.py
    result = dict(gpu=torch.cuda.get_device_name() if GPU else 'CPU', torch=str(torch.__version__))
    for part in options['parts'].split(','):
        if part == 'layer':
            result['copy_tb_s'], result['matmul_tflop_s'] = rates = card_rates()
            result['layer'] = [bench_layer(*shape, *rates) for shape in SHAPES]
            result['head'] = bench_head()
        else:
            result['step'] = bench_step(options['steps'], options['rounds'])
        text = json.dumps(result, indent=1)
        if options['out']:
            Path(options['out']).write_text(text + '\n', encoding='utf-8')
    print(text)

if __name__ == '__main__':
    run(main, sys.argv[1:])
