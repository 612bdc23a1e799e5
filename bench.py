"""
How fast it is: every number beside its alternatives, all of them measured in one run.

    python bench.py                        everything; minutes on one GPU, a tiny version on a CPU
    python bench.py --parts=layer,step     some parts only
    python bench.py --out=/tmp/bench.json  where to write (default: see below)

layer     one SAE layer, forward and backward: the fast path (kernels.py), the plain path (sae.py, eager and compiled), the
          textbook in bf16 (scatter: topk, scatter, dense decode), a dense autoencoder (dense_ae); alone, the encoder's
          matmul, the selection and torch.topk; and the floor. One output head with the loss, fused (kernels.py) and compiled
step      config/dense_gpt.py and config/sae_gpt.py in turns; graphs, recompilations, determinism
overhead  what batches, evals, snapshots, saves and log lines cost, as shares of the training time
ddp       config/sae_gpt.py on one GPU and on several, with the same batch a GPU

Training is measured in train.py itself, in a process of its own; its tokens are made up, with Zipf's frequencies. A run on
a GPU that had all parts and no failure writes results/bench.json; otherwise the numbers are printed, and written with --out.
"""
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
import traceback
from pathlib import Path
from statistics import median

import numpy as np
import torch

import data.dataset
import kernels
from configurator import configure, run
from sae import SAE

ROOT = Path(__file__).resolve().parent
GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
BACKEND = 'inductor' if GPU else 'eager' # the graphs are traced all the same, in seconds and without a C++ compiler
N = 32_768 if GPU else 256 # tokens through the layer and the head
V = 50_257 if GPU else 500 # vocabulary
SHAPES = [(768, 12288, 32), (768, 12288, 64), (768, 49152, 64), (512, 8192, 32)] if GPU else [(32, 256, 4)] # C, F, K
# makes config/*_gpt.py tiny on a CPU; 7 blocks, because the SAE is after the seventh
TINY = {} if GPU else dict(
    n_layer=7, n_head=2, n_embd=16, block_size=32, batch_size=2, gradient_accumulation_steps=2, sae_ratio=8, sae_k=4,
    eval_tokens=128, probe_tokens=128, compile=False)
SHORT_EVAL = dict(eval_tokens=65_536 if GPU else 128, probe_tokens=0)

# bf16 TFLOP/s without sparsity, from NVIDIA's data sheets; the first name found in the card's
PEAK = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'A100': 312,
        'L40S': 362, 'L40': 181, 'L4': 121, 'RTX 4090': 165, 'RTX 3090': 71}

begun = time.time()
def say(text):
    print(f"{time.time() - begun:5.0f} s | {text}", flush=True)

def show(x):
    return '-' if x is None else f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.3g}'

# ----------------------------------------------------------------------------------------------------
# clocks

def median_ms(fn):
    """
    Median time of fn() after warm-up, on a GPU with a cold L2 cache. It is the GPU's time: a short sleep lets the host queue
    four calls ahead, as it runs ahead in training. Without it, as in triton.testing.do_bench, small shapes show Python's speed.
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
    Of forward and backward: median ms; GB on top of the inputs, gradients included, at the peak; GB kept between the two
    beside y. None for what does not fit the card, and for GB on a CPU.
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
    say(f"{what} {show(ms)} ms")
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

# ----------------------------------------------------------------------------------------------------
# one layer, and the head

def bench_shape(C, F, K, copy, matmul):
    """One row: *_ms, *_gb (peak) and *_kept_gb of each variant, all with the same bf16 h and dy."""
    torch.manual_seed(0)
    row = dict(C=C, F=F, K=K, N=N)
    layer = SAE(C, F, K).to(DEVICE)
    P = [layer.W_enc, layer.b_enc, layer.W_dec, layer.b_dec] # fp32, as in training
    h = torch.randn(N, C, device=DEVICE).bfloat16().requires_grad_()
    gy = torch.randn(N, C, device=DEVICE).bfloat16()

    def fast(P=P):
        return kernels.topk_autoencode(h, *P, K)[0]

    def plain():
        with torch.autocast(DEVICE, torch.bfloat16):
            values, indices = layer.encode(h)
            z = torch.zeros(N, F, device=DEVICE).scatter(-1, indices, values)
            return layer.decode(z).type_as(h)

    def dense_ae(textbook=False):
        W_enc, b_enc, W_dec, b_dec = (p.bfloat16() for p in P)
        a = torch.nn.functional.linear(h - b_dec, W_enc, b_enc).relu()
        if textbook:
            values, indices = a.topk(K, dim=-1)
            a = torch.zeros_like(a).scatter(-1, indices, values)
        return a @ W_dec + b_dec

    def add(name, forward, params=P):
        row[f'{name}_ms'], row[f'{name}_gb'], row[f'{name}_kept_gb'] = measure(
            f"C={C} F={F} K={K} {name}", forward, [h, *params], gy)

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
    try: # EleutherAI's sparsify (eai-sparsify on PyPI)
        from sparsify import SparseCoder, SparseCoderConfig
        coder = SparseCoder(C, SparseCoderConfig(num_latents=F, k=K), device=DEVICE, dtype=torch.bfloat16)
        add('sparsify', lambda: coder.decode(*coder.encode(h)[:2]), coder.parameters())
    except Exception as e: # not installed, or the interface of another version
        say(f"sparsify is not timed: {type(e).__name__}: {e}")

    x, W = h.detach(), P[0].detach().bfloat16()
    pre = x @ W.t()
    row['encoder_ms'] = median_ms(lambda: torch.mm(x, W.t(), out=pre))
    row['select_ms'] = median_ms(lambda: kernels.topk(pre, P[1], K))
    row['topk_ms'] = median_ms(lambda: pre.topk(K, dim=-1))
    # What nothing with a dense encoder can beat on this card: 2 N C F operations, then once over memory for h (twice), y, dy,
    # dh in bf16; both weights (twice) and their gradients in fp32; values and indices, out and in. Gathered rows are not
    # counted: they can come from L2.
    row['floor_ms'] = 2 * N * C * F / matmul / 1e9 + (10 * N * C + 24 * F * C + 16 * N * K) / copy / 1e9
    row['select_floor_ms'] = pre.nbytes / copy / 1e9 # one reading
    once, again = ([y := fast(), *torch.autograd.grad(y, [h, *P], gy)] for _ in range(2))
    row['same_bits'] = all(map(torch.equal, once, again))
    return row

def bench_head():
    """The output head with the loss: *_ms and *_gb (peak), fused and compiled, x in bf16 and W in fp32 as in training."""
    C = 768 if GPU else 32
    torch.manual_seed(0)
    x = torch.randn(N, C, device=DEVICE).bfloat16().requires_grad_()
    W = (0.02 * torch.randn((V + 63) // 64 * 64, C, device=DEVICE)).requires_grad_() # padded, as in model.py
    targets = torch.randint(V, (N,), device=DEVICE)
    row = dict(N=N, C=C, V=V)
    for name, loss in [('fused', kernels.linear_cross_entropy),
                       ('compiled', torch.compile(kernels.linear_cross_entropy_ref, dynamic=False, backend=BACKEND))]:
        row[f'{name}_ms'], row[f'{name}_gb'], _ = measure(f"head {name}", lambda: loss(x, W, targets, V), [x, W])
    return row

def bench_layer(result, *_):
    """The card's rates, 'layer', a row a shape, and 'head'."""
    result['copy_tb_s'], result['matmul_tflop_s'] = rates = card_rates()
    result['layer'] = []
    for shape in SHAPES:
        result['layer'].append(bench_shape(*shape, *rates))
    result['head'] = bench_head()

# ----------------------------------------------------------------------------------------------------
# training: train.py with stop-watches, in a process of its own

def child(argv):
    """Becomes `python train.py argv`, with stop-watches on some of its functions, and writes what it saw to out_dir/seen.json."""
    seconds = {}
    def timed(fn):
        def stopwatch(*args):
            begin = time.perf_counter()
            result = fn(*args)
            seconds.setdefault(fn.__name__, []).append(time.perf_counter() - begin)
            return result
        return stopwatch
    source = (ROOT / 'train.py').read_text(encoding='utf-8')
    for name in ('evaluate', 'snapshot', 'save', 'write_log'):
        source = source.replace(f'\ndef {name}(', f'\n@timed\ndef {name}(')
    data.dataset.get_batch = timed(data.dataset.get_batch)
    if not GPU:
        torch.compile = functools.partial(torch.compile, backend=BACKEND)
    sys.argv = ['train.py', *argv]
    scope = dict(__name__='__main__', __file__=str(ROOT / 'train.py'), timed=timed)
    exec(compile(source, scope['__file__'], 'exec'), scope)

    if os.environ.get('RANK', '0') == '0':
        from torch._dynamo.utils import counters, get_compilation_metrics
        weights = b''.join(t.cpu().numpy().tobytes() for t in scope['raw_model'].state_dict().values())
        short = lambda reason: reason.partition('\n')[0].partition('  #')[0].strip()
        seen = dict(
            seconds=seconds, weights=hashlib.sha256(weights).hexdigest(), graphs=counters['stats']['unique_graphs'],
            breaks={short(k): n for k, n in counters['graph_break'].items()}, # why, and how often
            reasons=[short(m.recompile_reason) for m in get_compilation_metrics() if m.recompile_reason],
            gb=torch.cuda.max_memory_allocated() / 1e9 if GPU else None)
        Path(scope['out_dir'], 'seen.json').write_text(json.dumps(seen), encoding='utf-8')

def write_tokens(folder):
    """A data set of random tokens. V^u, u uniform, has Zipf's frequencies: P(id) falls as 1/id."""
    n = 8_000_000 if GPU else 10_000
    rng = np.random.default_rng(0)
    splits = ([(V ** rng.random(size)).astype(np.int64) - 1] for size in (n, n // 6))
    data.dataset.write_dataset(folder, *splits, V, 'gpt2', 'random, Zipf', None)

@functools.cache
def train(folder, name, config, steps, ranks=1, **changes):
    """
    Runs train.py with config/<config>.py and the changes on the tokens in `folder` -> what child saw, the records of log.jsonl
    as start and logs, and tok_s, a list: that of each steady log line. RuntimeError with its last words if it fails.
    """
    out = folder / name
    options = dict(dataset=folder, out_dir=out, max_iters=steps, log_interval=max(1, steps // 4)) | TINY | changes
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    command = [sys.executable, *launcher, 'bench.py', '--child', f'config/{config}.py', *(f'--{k}={v}' for k, v in options.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    start, *records = map(json.loads, (out / 'log.jsonl').read_text(encoding='utf-8').splitlines())
    seen = json.loads((out / 'seen.json').read_text(encoding='utf-8'))
    shutil.rmtree(out) # its checkpoint is large
    logs = [r for r in records if r['event'] == 'log']
    tok_s = [r['tok_s'] for r in logs[max(1, len(logs) // 3):]]
    say(f"{name}: {median(tok_s):,.0f} tokens/s ({min(tok_s):,.0f} to {max(tok_s):,.0f})")
    return seen | dict(start=start, logs=logs, tok_s=tok_s)

def mfu(tok_s, flops_per_token):
    """The model's own FLOPs as a share of the card's peak, None if the card is not in PEAK."""
    name = torch.cuda.get_device_name() if GPU else ''
    peak = next((peak for key, peak in PEAK.items() if key in name), None)
    return peak and tok_s * flops_per_token / peak / 1e12

def bench_step(result, folder, steps, rounds):
    """'step', 'graphs' and 'determinism', each as soon as it is known: a later run that fails must not cost it."""
    runs = {'dense': [], 'sae': []}
    for i in range(rounds):
        for kind in runs:
            runs[kind].append(train(folder, f'{kind}-{i + 1}', f'{kind}_gpt', steps))
    step = {}
    for kind, twins in runs.items():
        tok_s = median(v for twin in twins for v in twin['tok_s'])
        step |= {f'{kind}_tok_s': tok_s, f'{kind}_gb': twins[0]['gb'],
                 f'{kind}_mfu': mfu(tok_s, twins[0]['start']['flops_per_token'])}
    result['step'] = step

    # alpha moves in every run; here K does too (on the plain path), in a smaller model
    small = dict(n_layer=2, sae_layers=1, gradient_accumulation_steps=2, **SHORT_EVAL)
    both = train(folder, 'alpha-and-K', 'sae_gpt', 10, sae_k_start=64, sae_k_end=0.8, sae_blend_start=0.1, sae_blend_end=0.9,
                 eval_interval=5, compile=True, **small)
    result['graphs'] = {}
    for name, seen in dict(fast_path=runs['sae'][0], alpha_and_k=both).items():
        if seen['start']['config']['compile']: # two graphs are right: training, and eval without gradients
            result['graphs'][name] = dict(recompilations=seen['graphs'] - 2, **{k: seen[k] for k in ('graphs', 'breaks', 'reasons')})

    result['determinism'] = None
    if rounds > 1:
        a, b = runs['sae'][:2]
        differ = (x['step'] for x, y in zip(a['logs'], b['logs']) if x | {'tok_s': y['tok_s']} != y)
        same = result['determinism'] = dict(same_bits=a['weights'] == b['weights'], log_differs_at=next(differ, None))
        if not same['same_bits']: # then the flag that promises them must hold
            a, b = (train(folder, f'deterministic-{i}', 'sae_gpt', 6, deterministic=True, **small) for i in range(2))
            same['deterministic_same_bits'] = a['weights'] == b['weights']

def bench_overhead(result, folder, steps, rounds):
    """
    {*_ms, *_share of the training time} at the intervals of config/sae_gpt.py. Batches are made while the GPU works:
    data_share is their cost at most. log is the writing of a line; before it the loop waits for the GPU, which then has no
    work for some ms.
    """
    seen = train(folder, f'sae-{rounds}', 'sae_gpt', steps) # the last of the step part, where that ran
    config, seconds = seen['start']['config'], seen['seconds']
    step = seen['start']['tokens_per_step'] / median(seen['tok_s'])
    result['overhead'] = {'step_ms': 1000 * step}
    for name, s, every in ( # seconds, once in so many steps; the last call, as the first one compiles
            ('data', median(seconds['get_batch']) * config['gradient_accumulation_steps'], 1),
            ('log', median(seconds['write_log']), 10), # train.py's log_interval; it is shorter here
            ('eval', seconds['evaluate'][-1], config['eval_interval']),
            ('snapshot', seconds['snapshot'][-1], config['eval_interval']),
            ('save', seconds['save'][-1], config['save_interval'])):
        result['overhead'] |= {f'{name}_ms': 1000 * s, f'{name}_share': s / every / step}

def bench_ddp(result, folder, steps, _):
    """
    Tokens/s and speed-up by number of GPUs, for one micro-batch a GPU and step, as config/sae_gpt.py has on 8 GPUs, and for
    four, as on 2. Empty where there is one GPU, and nothing to compare. On a CPU: two processes.
    """
    n, result['ddp'] = torch.cuda.device_count() if GPU else 2, {}
    for micros in ((1, 4) if GPU else (1,)) if n > 1 else ():
        tok_s = {r: median(train(folder, f'{r}-ranks-{micros}', 'sae_gpt', 2 * steps if micros == 1 else steps, ranks=r,
                                 gradient_accumulation_steps=r * micros, **SHORT_EVAL)['tok_s']) for r in sorted({1, 2, n})}
        result['ddp'][micros] = dict(tok_s=tok_s, speedup={r: v / tok_s[1] for r, v in tok_s.items()})

# ----------------------------------------------------------------------------------------------------
# result

def print_table(title, part, *columns):
    """A line for each x of which part has a field x_<first column>: its fields x_<column>, a dash for None and for none."""
    print(f"\n{title:38}" + ''.join(f"{column:>10}" for column in columns))
    for name in [key.removesuffix(f'_{columns[0]}') for key in part if key.endswith(f'_{columns[0]}')]:
        print(f"  {name:36}" + ''.join(f"{show(part.get(f'{name}_{column}')):>10}" for column in columns))

def print_result(result):
    """What was measured, at most 80 columns wide, under the names of the JSON."""
    print(f"\n{result['gpu']}, torch {result['torch']}")
    if rows := result.get('layer'):
        print(f"copy {show(result['copy_tb_s'])} TB/s, bf16 matmul {show(result['matmul_tflop_s'])} TFLOP/s")
        for row in rows:
            print_table(f"SAE layer, C={row['C']} F={row['F']} K={row['K']} N={row['N']}", row, 'ms', 'gb', 'kept_gb')
        print("two fast passes: the same bits:", all(row['same_bits'] for row in rows))
    if head := result.get('head'):
        print_table(f"head with the loss, N={head['N']}, V={head['V']}", head, 'ms', 'gb')
    if step := result.get('step'):
        print_table("the whole training step", step, 'tok_s', 'mfu', 'gb')
        print(f"an SAE step takes {step['dense_tok_s'] / step['sae_tok_s']:.3f} of a dense one")
    for name, g in result.get('graphs', {}).items():
        breaks = sum(g['breaks'].values())
        print(f"graphs, {name}: {g['graphs']} (training, eval), {breaks} breaks, {g['recompilations']} recompilations")
    if same := result.get('determinism'):
        print(f"two SAE runs: {', '.join(f'{k} {v}' for k, v in same.items())}")
    if overhead := result.get('overhead'):
        print_table("share of the training time", overhead, 'ms', 'share')
    for micros, ddp in result.get('ddp', {}).items():
        speedup = ', '.join(f'{r}: {v:.2f}x' for r, v in ddp['speedup'].items())
        print(f"\nspeed-up by number of GPUs, micro-batches a GPU and step {micros}: {speedup}")

PARTS = dict(layer=bench_layer, step=bench_step, overhead=bench_overhead, ddp=bench_ddp)
DEFAULTS = dict(
    parts=','.join(list(PARTS)[:4 if GPU else 3]), # on a CPU, ddp by name only
    out='',    # where to write the JSON
    steps=20,  # of each training run; the first quarter is not counted, since it compiles
    rounds=2)  # dense, SAE, dense, SAE: a drifting clock meets both. Determinism needs two

def problems(c):
    """What is wrong with the options, as a list of sentences."""
    found = [f"parts: {p!r} is not one of {', '.join(PARTS)}" for p in c['parts'].split(',') if p not in PARTS]
    return found + [f"{k}={c[k]} must be at least {low}" for k, low in dict(steps=4, rounds=1).items() if c[k] < low]

def write(result, out):
    """The result as JSON text; into the file out, if there is one, whole or not at all."""
    # four digits: more than these clocks can tell
    result = json.loads(json.dumps(result), parse_float=lambda text: float(f'{float(text):.4g}'))
    text = json.dumps(result, indent=1) + '\n'
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out + '.tmp').write_text(text, encoding='utf-8')
        os.replace(out + '.tmp', out)
    return text

def main(argv):
    if argv[:1] == ['--child']:
        return child(argv[1:])
    options = configure(DEFAULTS, argv, problems)
    parts, out, failed = options['parts'].split(','), options['out'], []
    torch.set_float32_matmul_precision('high') # as train.py
    result = dict(gpu=torch.cuda.get_device_name() if GPU else 'CPU', torch=str(torch.__version__))
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder)
        for part in [p for p in PARTS if p in parts]:
            try:
                PARTS[part](result, Path(folder), options['steps'], options['rounds'])
            except Exception: # must not cost the other parts their minutes
                failed.append(part)
                traceback.print_exc()
            text = write(result, out) # so far
    if not out and GPU and set(parts) == set(PARTS) and not failed:
        out = str(ROOT / 'results' / 'bench.json')
        write(result, out)
    print(text)
    print_result(result)
    say(f"written to {out}" if out else "not written anywhere (--out says where)")
    if failed:
        sys.exit(f"error: these parts failed, see above: {', '.join(failed)}")

if __name__ == '__main__':
    run(main, sys.argv[1:])
