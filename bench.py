"""
How fast it is: every number beside its alternatives, all of them measured in one run.

    python bench.py                        everything; minutes on one GPU, a tiny version on a CPU
    python bench.py --parts=layer,step     some parts only
    python bench.py --out=/tmp/bench.json  where to write (default: see below)

layer     one SAE layer, forward and backward: the fast path (kernels.py), the plain path (sae.py,
          eager and compiled), the textbook in bf16 (topk, scatter, dense decode), a dense
          autoencoder; alone, the encoder's matmul, the selection and torch.topk; and the floor
step      config/dense_gpt.py and config/sae_gpt.py in turns; graphs, recompilations, determinism
overhead  what batches, evals, snapshots, saves and log lines cost, as shares of the training time
ddp       config/sae_gpt.py on one GPU and on several, with the same batch a GPU

Training is measured in train.py itself, started as a user starts it, in a process of its own; its
tokens are made up, with Zipf's frequencies. A run on a GPU that had all parts and no failure writes
results/bench.json; otherwise the numbers are printed, and written with --out only.
"""
import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import data.dataset
import kernels
from configurator import configure, run, stop_if
from sae import SAE

ROOT = Path(__file__).resolve().parent
GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
PARTS = ('layer', 'step', 'overhead', 'ddp')
DEFAULTS = dict(
    parts=','.join(PARTS if GPU else PARTS[:3]), # on a CPU, ddp by name only
    out='',    # where to write the JSON
    steps=14,  # of each training run; the first third is not counted, since it compiles
    rounds=2)  # dense, SAE, dense, SAE: a drifting clock meets both. Determinism needs two

N = 32_768 if GPU else 256 # tokens through the layer
SHAPES = [(768, 12288, 32), (768, 12288, 64), (768, 49152, 64), (512, 8192, 32)] # C, F, K
if not GPU:
    SHAPES = [(32, 256, 4)]
# makes config/*_gpt.py tiny on a CPU; 7 blocks, because the SAE is after the seventh
TINY = {} if GPU else dict(
    n_layer=7, n_head=2, n_embd=16, block_size=32, batch_size=2, gradient_accumulation_steps=2,
    sae_ratio=8, sae_k=4, eval_tokens=128, probe_tokens=128, compile=False)
SHORT_EVAL = dict(eval_tokens=65_536 if GPU else 128, probe_tokens=0)
LOG_EVERY = 10 # train.py's log_interval; it is 2 here

# bf16 TFLOP/s without sparsity, from NVIDIA's data sheets; the first name found in the card's
PEAK = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'A100': 312,
        'L40S': 362, 'L40': 181, 'L4': 121, 'RTX 4090': 165, 'RTX 3090': 71}

begun = time.time()
def say(text):
    print(f"{time.time() - begun:5.0f} s | {text}", flush=True)

def show(x):
    return '-' if x is None else f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.3g}'

# --------------------------------------------------------------------------------------------------
# clocks

def median_ms(fn, seconds=0.4):
    """
    Median time of fn() after warm-up, on a GPU with a cold L2 cache. It is the GPU's time: a short
    sleep lets the host queue four calls ahead, as it runs ahead in training. Without it the small
    shapes would show Python's speed.
    """
    for _ in range(3):
        fn()
    times, end = [], time.time() + seconds
    if not GPU:
        while len(times) < 5 or time.time() < end - 0.75 * seconds:
            begin = time.perf_counter()
            fn()
            times.append(1000 * (time.perf_counter() - begin))
        return statistics.median(times)
    flush = torch.empty(2**28, dtype=torch.int8, device=DEVICE) # larger than any card's L2
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
    return statistics.median(times)

def memory_gb(forward, inputs, gy):
    """
    GB on top of the inputs: the peak of forward and backward, gradients included, and what is kept
    between the two beside y.
    """
    if not GPU:
        return None, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    torch.autograd.grad(y, inputs, gy)
    return (torch.cuda.max_memory_allocated() - before) / 1e9, kept / 1e9

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
    say(f"copy {show(copy)} TB/s, bf16 matmul {show(matmul)} TFLOP/s")
    return copy, matmul

# --------------------------------------------------------------------------------------------------
# one layer

def floor_ms(C, F, K, copy, matmul):
    """
    What nothing with a dense encoder can beat on this card: 2 N C F operations, then once over
    memory for h (twice), y, dy, dh in bf16; both weights (twice) and their gradients in fp32;
    values and indices, out and in. Gathered rows are not counted: they can come from L2.
    """
    return 2 * N * C * F / matmul / 1e9 + (10 * N * C + 24 * F * C + 16 * N * K) / copy / 1e9

def sparsify_layer(C, F, K):
    """EleutherAI's sparsify (eai-sparsify on PyPI) if it is installed, else None."""
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        return None
    config = SparseCoderConfig(num_latents=F, k=K)
    return SparseCoder(C, config, device=DEVICE, dtype=torch.bfloat16)

def bench_layer(C, F, K, copy, matmul):
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

    def dense_ae(sparsify=lambda a: a):
        W_enc, b_enc, W_dec, b_dec = (p.bfloat16() for p in P)
        a = functional.linear(h - b_dec, W_enc, b_enc).relu()
        return sparsify(a) @ W_dec + b_dec

    def scatter():
        def sparsify(a):
            values, indices = a.topk(K, dim=-1)
            return torch.zeros_like(a).scatter(-1, indices, values)
        return dense_ae(sparsify)

    def measure(name, forward, params=P):
        inputs = [h, *params]
        try:
            row[f'{name}_ms'] = median_ms(lambda: torch.autograd.grad(forward(), inputs, gy))
            row[f'{name}_gb'], row[f'{name}_kept_gb'] = memory_gb(forward, inputs, gy)
        except torch.OutOfMemoryError:
            row[f'{name}_ms'] = None # a dash in the table
        say(f"C={C} F={F} K={K} {name} {show(row[f'{name}_ms'])} ms")
        if GPU:
            torch.cuda.empty_cache()

    measure('fast', fast)
    # trained layers are skewed: here 24 features fire on up to half of all tokens
    bias = 0.3 * torch.randn(F, device=DEVICE)
    bias[:24] += torch.linspace(3, 2, 24, device=DEVICE)
    skewed = [P[0], bias.requires_grad_(), *P[2:]]
    measure('fast_skewed', lambda: fast(skewed), skewed)
    measure('plain', plain)
    torch._dynamo.reset()
    backend = 'inductor' if GPU else 'eager'
    measure('plain_compiled', torch.compile(plain, dynamic=False, backend=backend))
    measure('scatter', scatter)
    measure('dense_ae', dense_ae)
    coder = sparsify_layer(C, F, K)
    if coder is not None:
        try:
            measure('sparsify', lambda: coder.decode(*coder.encode(h)[:2]), coder.parameters())
        except Exception as e: # the interface of another version, say
            say(f"sparsify is installed, but failed: {type(e).__name__}: {e}")

    x, W = h.detach(), P[0].detach().bfloat16()
    pre = x @ W.t()
    row['encoder_ms'] = median_ms(lambda: torch.mm(x, W.t(), out=pre))
    row['select_ms'] = median_ms(lambda: kernels.topk(pre, P[1], K))
    row['topk_ms'] = median_ms(lambda: pre.topk(K, dim=-1))
    row['floor_ms'] = floor_ms(C, F, K, copy, matmul)
    row['select_floor_ms'] = pre.nbytes / copy / 1e9 # one reading
    say(f"C={C} F={F} K={K} encoder {show(row['encoder_ms'])}, selection {show(row['select_ms'])}, "
        f"torch.topk {show(row['topk_ms'])}, floor {show(row['floor_ms'])} ms")

    def bits():
        y = fast()
        return [y, *torch.autograd.grad(y, [h, *P], gy)]
    row['same_bits'] = all(map(torch.equal, bits(), bits()))
    return row

# --------------------------------------------------------------------------------------------------
# training: train.py with stop-watches, in a process of its own

WATCHED = ('evaluate', 'snapshot', 'save', 'write_log') # functions of train.py

def child(stats_path, argv):
    """Becomes `python train.py argv`, with a decorator on WATCHED, and notes down what it saw."""
    seconds = {}
    def timed(fn):
        @functools.wraps(fn)
        def run(*args):
            begin = time.perf_counter()
            try:
                return fn(*args)
            finally:
                seconds.setdefault(fn.__name__, []).append(time.perf_counter() - begin)
        return run
    source = (ROOT / 'train.py').read_text(encoding='utf-8')
    for name in WATCHED:
        source = source.replace(f'\ndef {name}(', f'\n@timed\ndef {name}(')
    data.dataset.get_batch = timed(data.dataset.get_batch)
    if not GPU: # the graphs are traced all the same, in seconds and without a C++ compiler
        torch.compile = functools.partial(torch.compile, backend='eager')
    sys.argv = ['train.py', *argv]
    scope = dict(__name__='__main__', __file__=str(ROOT / 'train.py'), timed=timed)
    exec(compile(source, scope['__file__'], 'exec'), scope)

    if os.environ.get('RANK', '0') == '0':
        from torch._dynamo.utils import counters, get_compilation_metrics
        weights = hashlib.sha256()
        for t in scope['raw_model'].state_dict().values():
            weights.update(t.cpu().numpy().tobytes())
        short = lambda reason: reason.partition('\n')[0].partition('  #')[0].strip()
        reasons = [m.recompile_reason for m in get_compilation_metrics() if m.recompile_reason]
        seen = dict(seconds=seconds, weights=weights.hexdigest(), reasons=list(map(short, reasons)),
                    graphs=counters['stats']['unique_graphs'],
                    breaks={short(k): n for k, n in counters['graph_break'].items()},
                    gb=torch.cuda.max_memory_allocated() / 1e9 if GPU else None)
        Path(stats_path).write_text(json.dumps(seen), encoding='utf-8')

def write_tokens(folder):
    """A data set of random tokens. V^u, u uniform, has Zipf's frequencies: P(id) falls as 1/id."""
    V, n = (50257, 8_000_000) if GPU else (500, 10_000)
    rng = np.random.default_rng(0)
    splits = ([(V ** rng.random(size)).astype(np.int64) - 1] for size in (n, n // 6))
    data.dataset.write_dataset(folder, *splits, V, 'gpt2', 'random, Zipf', None)

def train(folder, name, config, steps, ranks=1, **changes):
    """
    Runs train.py with config/<config>.py and the changes on the tokens in `folder` -> what child
    saw, the records of log.jsonl as start and logs, tok_s of each steady log line, and their
    median. RuntimeError with its last words if it fails.
    """
    out, stats = folder / name, folder / f'{name}.json'
    options = dict(dataset=folder, out_dir=out, max_iters=steps, log_interval=2) | TINY | changes
    command = [sys.executable, 'bench.py', '--child', stats, f'config/{config}.py',
               *(f'--{k}={v}' for k, v in options.items())]
    if ranks > 1:
        command[1:1] = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}:\n{text[-3000:]}")
    with open(out / 'log.jsonl', encoding='utf-8') as f:
        records = [json.loads(line) for line in f]
    shutil.rmtree(out) # its checkpoint is large
    logs = [r for r in records if r['event'] == 'log']
    run = json.loads(stats.read_text(encoding='utf-8')) | dict(start=records[0], logs=logs)
    run['all_tok_s'] = [r['tok_s'] for r in logs[max(1, len(logs) // 3):]]
    run['tok_s'] = statistics.median(run['all_tok_s'])
    low, high = min(run['all_tok_s']), max(run['all_tok_s'])
    say(f"{name}: {run['tok_s']:,.0f} tokens/s ({low:,.0f} to {high:,.0f})")
    return run

def mfu(tok_s, flops_per_token):
    """The model's own FLOPs as a share of the card's peak, None if the card is not in PEAK."""
    name = torch.cuda.get_device_name() if GPU else ''
    peak = next((peak for key, peak in PEAK.items() if key in name), None)
    return peak and tok_s * flops_per_token / peak / 1e12

def bench_step(folder, steps, rounds):
    """-> 'step', 'graphs' and 'determinism' of the result, and the last SAE run."""
    runs = {'dense': [], 'sae': []}
    for i in range(rounds):
        for kind in runs:
            runs[kind].append(train(folder, f'{kind}-{i + 1}', f'{kind}_gpt', steps))
    step = {}
    for kind, twins in runs.items():
        tok_s = statistics.median(v for run in twins for v in run['all_tok_s'])
        step |= {f'{kind}_tok_s': tok_s, f'{kind}_gb': twins[0]['gb'],
                 f'{kind}_mfu': mfu(tok_s, twins[0]['start']['flops_per_token'])}

    # alpha moves in every run; here K does too (on the plain path), in a smaller model
    both = train(folder, 'alpha-and-K', 'sae_gpt', 10, n_layer=2, sae_layers=1, sae_k_start=64,
                 sae_k_end=0.8, sae_blend_start=0.1, sae_blend_end=0.9, eval_interval=5,
                 gradient_accumulation_steps=2, compile=True, **SHORT_EVAL)
    graphs = {}
    for name, run in [('fast_path', runs['sae'][0]), ('alpha_and_k', both)]:
        if run['start']['config']['compile']: # two are right: training, and eval without gradients
            graphs[name] = dict(recompilations=run['graphs'] - 2,
                                **{key: run[key] for key in ('graphs', 'breaks', 'reasons')})

    determinism = None
    if rounds > 1:
        a, b = runs['sae'][:2]
        differ = [x['step'] for x, y in zip(a['logs'], b['logs']) if x | {'tok_s': y['tok_s']} != y]
        determinism = dict(same_bits=a['weights'] == b['weights'],
                           log_differs_at=differ[0] if differ else None)
        if not determinism['same_bits']: # then the flag that promises them must hold
            try:
                twins = [train(folder, f'deterministic-{i}', 'sae_gpt', 6, n_layer=2, sae_layers=1, deterministic=True,
                               gradient_accumulation_steps=2, **SHORT_EVAL) for i in range(2)]
            except RuntimeError as e: # must not cost the numbers above
                say(str(e))
                twins = [dict(weights=0), dict(weights=1)]
            determinism['deterministic_same_bits'] = twins[0]['weights'] == twins[1]['weights']
    return dict(step=step, graphs=graphs, determinism=determinism), runs['sae'][-1]

def bench_overhead(run):
    """
    {*_ms, *_share of the training time} at the intervals of config/sae_gpt.py. Batches are made
    while the GPU works: data_share is their cost at most. The loop waits for the GPU in each step,
    for the gradient's norm, so that a log line costs no more than its writing.
    """
    config, seen = run['start']['config'], run['seconds']
    step = run['start']['tokens_per_step'] / run['tok_s']
    batches = statistics.median(seen['get_batch']) * config['gradient_accumulation_steps']
    costs = dict( # seconds, once in so many steps; the last call, as the first one compiles
        data=(batches, 1), log=(statistics.median(seen['write_log']), LOG_EVERY),
        eval=(seen['evaluate'][-1], config['eval_interval']),
        snapshot=(seen['snapshot'][-1], config['eval_interval']),
        save=(seen['save'][-1], config['save_interval']))
    return {'step_ms': 1000 * step, **{f'{k}_ms': 1000 * s for k, (s, _) in costs.items()},
            **{f'{k}_share': s / every / step for k, (s, every) in costs.items()}}

def bench_ddp(folder, steps):
    """
    Tokens/s and speed-up by number of GPUs, with two micro-batches a GPU and step, as
    config/sae_gpt.py has on 8. {} where there is one GPU. On a CPU: two processes.
    """
    n = torch.cuda.device_count() if GPU else 2
    if n < 2:
        say("ddp: one GPU, nothing to compare")
        return {}
    runs = {r: train(folder, f'{r}-ranks', 'sae_gpt', 2 * steps, ranks=r,
                     gradient_accumulation_steps=2 * r, **SHORT_EVAL) for r in sorted({1, 2, n})}
    return dict(tok_s={str(r): run['tok_s'] for r, run in runs.items()},
                speedup={str(r): run['tok_s'] / runs[1]['tok_s'] for r, run in runs.items()})

# --------------------------------------------------------------------------------------------------
# result

def rounded(x):
    """Four digits: more than these clocks can tell."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f'{x:.4g}') if isinstance(x, float) else x

ROWS = dict(
    fast_ms='fast path', fast_skewed_ms='  with skewed features', plain_ms='plain path',
    plain_compiled_ms='  compiled', scatter_ms='topk, scatter, dense decode',
    dense_ae_ms='dense autoencoder', sparsify_ms='sparsify', floor_ms='floor',
    encoder_ms='encoder matmul alone', select_ms='selection alone', topk_ms='torch.topk alone',
    fast_gb='peak GB, fast path', plain_gb='  plain path', plain_compiled_gb='  compiled',
    dense_ae_gb='  dense autoencoder', fast_kept_gb='kept for backward, GB, fast path',
    plain_kept_gb='  plain path', dense_ae_kept_gb='  dense autoencoder')

def print_table(result):
    """What was measured, at most 80 columns wide."""
    line = lambda label, cells: print(f"{label:36}" + ''.join(f"{c:>10}" for c in cells))
    print(f"\n{result['gpu']}, torch {result['torch']}")
    if rows := result.get('layer'):
        copy, matmul = show(result['copy_tb_s']), show(result['matmul_tflop_s'])
        print(f"copy {copy} TB/s, bf16 matmul {matmul} TFLOP/s")
        print(f"\none SAE layer, forward and backward, ms, N={N}, bf16")
        for key in 'CFK':
            line(f"{key:>36}", [row[key] for row in rows])
        for key, label in ROWS.items():
            if any(row.get(key) is not None for row in rows):
                line(label, [show(row.get(key)) for row in rows])
        if 'sparsify_ms' not in rows[0]:
            print("sparsify: not installed, not timed")
        print("two fast passes: the same bits:", all(row['same_bits'] for row in rows))
    if step := result.get('step'):
        print()
        line("the whole training step", ['tokens/s', 'MFU', 'peak GB'])
        for kind in ('dense', 'sae'):
            cells = [step[f'{kind}_{key}'] for key in ('tok_s', 'mfu', 'gb')]
            line(f"config/{kind}_gpt.py", map(show, cells))
        print(f"an SAE step takes {step['dense_tok_s'] / step['sae_tok_s']:.3f} of a dense one")
        for name, g in result['graphs'].items():
            print(f"graphs, {name}: {g['graphs']} (training, eval), {sum(g['breaks'].values())} "
                  f"breaks, {g['recompilations']} recompilations")
        if same := result['determinism']:
            print(f"two runs: the same bits: {same['same_bits']}; "
                  f"first log line that differs: step {show(same['log_differs_at'])}")
            if 'deterministic_same_bits' in same:
                print(f"with --deterministic=True: {same['deterministic_same_bits']}")
    if cost := result.get('overhead'):
        print("\nshare of training time: " + ', '.join(
            f"{k[:-6]} {100 * v:.2g} %" for k, v in cost.items() if k.endswith('_share')))
    if ddp := result.get('ddp'):
        print("\nspeed-up by number of GPUs: " + ', '.join(
            f"{r}: {v:.2f}x" for r, v in ddp['speedup'].items()))

def main(argv):
    if argv[:1] == ['--child']:
        return child(argv[1], argv[2:])
    options = configure(DEFAULTS, argv)
    parts, out = options['parts'].split(','), options['out']
    problems = [f"parts: {p!r} is not one of {', '.join(PARTS)}" for p in parts if p not in PARTS]
    problems += [f"{key}={options[key]} must be at least {low}"
                 for key, low in (('steps', 4), ('rounds', 1)) if options[key] < low]
    stop_if(problems)
    torch.set_float32_matmul_precision('high') # as train.py
    result = dict(gpu=torch.cuda.get_device_name() if GPU else 'CPU', torch=str(torch.__version__))
    sae_run, failed = None, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tokens(folder)
        for part in [p for p in PARTS if p in parts]:
            try:
                if part == 'layer':
                    result['copy_tb_s'], result['matmul_tflop_s'] = rates = card_rates()
                    result['layer'] = []
                    for shape in SHAPES:
                        result['layer'].append(bench_layer(*shape, *rates))
                elif part == 'step':
                    found, sae_run = bench_step(folder, options['steps'], options['rounds'])
                    result |= found
                elif part == 'overhead':
                    sae_run = sae_run or train(folder, 'sae', 'sae_gpt', options['steps'])
                    result['overhead'] = bench_overhead(sae_run)
                else:
                    result['ddp'] = bench_ddp(folder, options['steps'])
            except Exception: # must not cost the other parts their minutes
                failed.append(part)
                traceback.print_exc()
    result = rounded(result)
    text = json.dumps(result, indent=1) + '\n'
    print(text)
    if not out and GPU and set(parts) == set(PARTS) and not failed:
        out = str(ROOT / 'results' / 'bench.json')
    if out: # whole or not at all
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out + '.tmp').write_text(text, encoding='utf-8')
        os.replace(out + '.tmp', out)
    print_table(result)
    say(f"written to {out}" if out else "not written anywhere (--out says where)")
    if failed:
        sys.exit(f"error: these parts failed, see above: {', '.join(failed)}")

if __name__ == '__main__':
    run(main, sys.argv[1:])
