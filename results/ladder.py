"""
The ladder: dense, naive and every strategy, at equal tokens, over seeds, side by side where there are several GPUs.
Each run is one call of train.py and leaves one JSON in results/ladder/; the table is printed from these alone.

    python results/ladder.py --rows=dense,naive,default,strict --seeds=1,2,3,4,5     65 M tokens each
    python results/ladder.py --rows=dense,default,strict --seeds=1,2,3 --steps=3000  196 M
    python results/ladder.py --size=large --steps=1500 --rows=dense,default --seeds=1
    python results/ladder.py --size=cpu --steps=480 --dataset=stdlib --seeds=1,2,3   1 M tokens each, minutes on a CPU
    python results/ladder.py --size=tiny --rows=dense,default --seeds=1,2            a minute on a CPU
    python results/ladder.py --table=true --plot=assets/ladder.png                    no training: the table, and a plot of --rows

A run whose JSON is there is not run again. The corpus of the committed results is a sample of English Wikipedia
(45 M GPT-2 tokens), given as any data set of this project (see data/text/prepare.py).
"""
import glob
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, run, writable # noqa: E402

SIZES = {
    'tiny': dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, eval_tokens=1024, log_interval=2,
                 sae_silent_tokens=4 * 128, compile=False, device='cpu'),
    'cpu': dict(n_layer=4, n_head=4, n_embd=192, block_size=256, batch_size=4, gradient_accumulation_steps=2, warmup_iters=20, sae_ratio=11,
                sae_k=16, sae_silent_tokens=4 * 2048, sae_skip_lr=1.0, eval_tokens=32_768, compile=False, device='cpu'), # as config/sae_cpu.py, which has 2 heads
    'small': dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=128, sae_silent_tokens=262_144, eval_tokens=524_288),
    'large': dict(n_layer=12, n_head=6, n_embd=768, block_size=1024, batch_size=64, sae_silent_tokens=262_144, eval_tokens=524_288),
}
SAE_LAYER = {'tiny': (0,), 'cpu': (1,), 'small': (3,), 'large': (6,)}

def rows(size):
    """{name: (what differs from train.py's defaults, what it is)}; the order is the table's."""
    L = SIZES[size]['n_layer']
    at = dict(sae_layers=SAE_LAYER[size])
    naive = at | dict(sae_blend_start=0.0, sae_blend_end=0.0, sae_recon=0.0, sae_tied_init=False, sae_nudge=0.0,
                      sae_token_skip=False, sae_muon=False)
    strict = at | dict(sae_token_skip=False)
    posthoc = strict | dict(sae_posthoc=True)
    hidden = dict(sae_layers=tuple(range(L)), sae_site='hidden', sae_blend_start=0.0, sae_blend_end=0.0)
    slow_blend = dict(sae_recon=0.0, sae_blend_start=0.0, sae_blend_end=0.6)
    handover = lambda share: dict(sae_blend_start=share, sae_blend_end=share + 0.05)
    spread = lambda n: tuple(sorted({max(0, round((i + 1) * L / (n + 1)) - 1) for i in range(n)}))
    known = {
        'dense': (dict(sae_layers=()), 'no SAE'),
        'naive': (naive, 'hard TopK from step 0 and nothing else'),
        'default': (at, "train.py's defaults"),
        'strict': (strict, 'default without the token skip'),
        'posthoc': (posthoc, 'SAE trained on the frozen dense twin, spliced in'),
        # each strategy alone
        'naive+tied': (naive | dict(sae_tied_init=True), ''),
        'naive+blend': (naive | slow_blend, 'alpha from 0 to 1 over 60 %'),
        'naive+recon': (naive | handover(0.3) | dict(sae_recon=1.0), 'reconstruction, then hand-over at 30 %'),
        'naive+nudge': (naive | dict(sae_nudge=0.02), ''),
        'naive+auxk': (naive | dict(sae_auxk=0.1), ''),
        'naive+anneal': (naive | dict(sae_k_start=512 if size != 'tiny' else 64), 'K from 512 over 30 %'),
        'naive+skip': (naive | dict(sae_token_skip=True), ''),
        'naive+saelr': (naive | dict(sae_lr_factor=0.3), ''),
        'naive+muon': (naive | dict(sae_muon=True), ''),
        # the default without each, or with another
        'default-recon': (at | dict(sae_recon=0.0), 'hand-over at 30 %, without reconstruction before it'),
        'default-nudge': (at | dict(sae_nudge=0.0), ''),
        'default-muon': (at | dict(sae_muon=False), "AdamW for the SAE's matrices"),
        **{f'default-muon nudge {x}': (at | dict(sae_muon=False, sae_nudge=x), '') for x in (0.05, 0.1)},
        **{f'default-muon nudge {x} saelr 0.5': (at | dict(sae_muon=False, sae_nudge=x, sae_lr_factor=0.5), '') for x in (0.05, 0.1)},
        'posthoc-muon nudge 0.1': (posthoc | dict(sae_muon=False, sae_nudge=0.1), ''),
        'default saelr': (at | dict(sae_lr_factor=0.3), 'SAE learning rate x0.3'),
        'default+auxk': (at | dict(sae_nudge=0.0, sae_auxk=0.1), 'AuxK in place of the nudge'),
        'default blend': (at | slow_blend, 'alpha from 0 to 1 over 60 %, no reconstruction'),
        'strict blend': (strict | slow_blend, 'the same'),
        **{f'{mode} at {share:.0%}': (base | handover(share), 'hand-over there')
           for mode, base in (('default', at), ('strict', strict)) for share in (0.15, 0.5)},
        'dense adamw': (dict(sae_layers=(), optimizer='adamw'), 'AdamW for all'),
        'naive adamw': (naive | dict(optimizer='adamw'), 'an SAE put into nanoGPT: AdamW for all, no strategy'),
        'default adamw': (at | dict(optimizer='adamw'), 'AdamW for all'),
        # where
        **{f'default@{i}': (dict(sae_layers=(i,)), 'after another block') for i in range(L)},
        **{f'strict@{i}': (dict(sae_layers=(i,), sae_token_skip=False), 'after another block') for i in range(L)},
        'mlp': (at | dict(sae_site='mlp'), ''),
        'attn': (at | dict(sae_site='attn'), ''),
        'hidden': (hidden, "every block's MLP, K of 4 C, from step 0"),
        **{f'hidden K={k}': (hidden | dict(sae_k=k), '') for k in (64, 128)},
        **{f'hidden blend K={k}': (hidden | slow_blend | dict(sae_k=k), 'alpha from 0 to 1 over 60 %') for k in (64, 128)},
        **{f'hidden anneal K={k}': (hidden | dict(sae_k=k, sae_k_start=max(k, 2 * SIZES[size]['n_embd']), sae_k_end=0.9),
                                    'K from half of the hidden layer over 90 %') for k in (64, 128, 192) if k <= 4 * SIZES[size]['n_embd']},
        'stream': (dict(sae_layers=tuple(range(max(1, L - 2))), sae_site='stream', sae_k=128 if size != 'tiny' else 8)
                   | slow_blend, 'all blocks but the last two'),
        **{f'default x{n}': (dict(sae_layers=spread(n)), f'at {n} layers') for n in (2, 4) if n < L},
        'default xL': (dict(sae_layers=tuple(range(L))), 'at every layer'),
        # how many
        **{f'{mode} K={k}': (base | dict(sae_k=k), '')
           for mode, base in (('default', at), ('strict', strict), ('naive', naive), ('posthoc', posthoc))
           for k in (8, 16, 32, 64, 128) if k != SIZES[size].get('sae_k', 32)},
        **{f'default x{n} K=64': (dict(sae_layers=spread(n), sae_k=64), f'at {n} layers') for n in (2, 4) if n < L},
        **{f'{mode} F={r}x': (base | dict(sae_ratio=r), '') for mode, base in (('default', at), ('strict', strict))
           for r in (4, 64)},
        # a slightly larger model in exchange
        **{f'{mode} wider': (base | dict(n_embd=SIZES[size]['n_embd'] * 9 // 8), 'C up by an eighth') for mode, base in (('default', at), ('strict', strict))},
        'strict wider 25%': (strict | dict(n_embd=SIZES[size]['n_embd'] * 5 // 4), 'C up by a quarter'),
        'strict deeper': (strict | dict(n_layer=L + 1), 'one block more'),
    }
    known |= {f'{row} skip x{x}': (known[row][0] | dict(sae_skip_lr=x), 'W_skip learns at so many times the rate')
              for row in ('default', 'default K=64', 'default@5', 'default x4 K=64') if row in known for x in (0.1, 0.2, 0.3, 1)}
    # v1: the defaults that most committed runs had, with the tied init, and silent features nudged after 20 steps, not 4 (v1 quick)
    tied, slow = dict(sae_tied_init=True), dict(sae_silent_tokens=5 * SIZES[size]['sae_silent_tokens'])
    return {f'{row}{suffix}': (extra | overrides, note) for row, (overrides, note) in known.items()
            for suffix, extra in (('', {}), (' v1', tied | slow), (' v1 quick', tied))} | {'default-tied v1': (at | slow, '')}

def command(size, overrides, seed, steps, dataset, out_dir):
    options = dict(gradient_accumulation_steps=1, warmup_iters=max(1, steps // 20), eval_interval=max(1, steps // (4 if size == 'cpu' else 10)),
                   save_interval=10 ** 9, probe_tokens=0) | SIZES[size] | overrides
    options |= dict(seed=seed, max_iters=steps, dataset=dataset, out_dir=out_dir)
    show = lambda v: ','.join(map(str, v)) if isinstance(v, (tuple, list)) else str(v)
    return [sys.executable, os.path.join(ROOT, 'train.py')] + [f'--{k}={show(v)}' for k, v in options.items()]

def summary(row, size, out_dir):
    """The JSON of a finished run, from its log.jsonl."""
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        records = [json.loads(line) for line in f]
    start = next(r for r in records if r['event'] == 'start')
    evals = [r for r in records if r['event'] == 'eval']
    logs = [r for r in records if r['event'] == 'log']
    last, sae = evals[-1], list(evals[-1].get('sae', {}).values())
    mean = lambda key: statistics.mean(s[key] for s in sae) if sae else None
    return dict(
        row=row, size=size, seed=start['config']['seed'], tokens=last['tokens'], val_loss=last['val_loss'],
        val_loss_zeroed=last.get('val_loss_zeroed'), val_loss_mean=last.get('val_loss_mean'), live_share=mean('live'),
        live_share_min=min(s['live'] for s in sae) if sae else None, busiest_share=mean('busiest'), l0=mean('l0'), fvu=mean('fvu'),
        tok_s=statistics.median(r['tok_s'] for r in logs[len(logs) // 4:]), params=start['params'],
        params_non_embedding=start['params_non_embedding'], flops_per_token=start['flops_per_token'],
        torch=start['versions']['torch'], gpu=start['versions']['gpu'], commit=start['versions']['commit'],
        config=start['config'], curve=[[r['tokens'], r['val_loss']] for r in evals])

def run_all(jobs, slots):
    """
    jobs: [(name, command, needs, done)], run side by side, one per slot (a GPU number, or None for the CPU).
    needs: a path that must exist before it starts, or None. done() is called after success. Returns the names that failed.
    """
    waiting, running, failed, started = deque(jobs), {}, [], time.time()
    free = list(slots)
    while waiting or running:
        for _ in range(len(waiting)):
            if not free:
                break
            job = waiting.popleft()
            if job[2] and not os.path.exists(job[2]):
                if not running and all(j[2] and not os.path.exists(j[2]) for j in [job, *waiting]):
                    failed.append(job[0])
                    print(f"{job[0]}: {job[2]} is missing, and nothing running makes it", flush=True)
                else:
                    waiting.append(job)
                continue
            slot = free.pop(0)
            env = dict(os.environ) if slot is None else dict(os.environ, CUDA_VISIBLE_DEVICES=str(slot))
            log = open(job[1][-1].partition('=')[2] + '.txt', 'w')
            running[slot] = (subprocess.Popen(job[1], stdout=log, stderr=subprocess.STDOUT, env=env), job, time.time())
        time.sleep(0.2)
        for slot, (process, job, t0) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            free.append(slot)
            if process.returncode == 0:
                job[3]()
            else:
                failed.append(job[0])
            print(f"{time.time() - started:5.0f} s  {job[0]}: {'done' if process.returncode == 0 else 'FAILED'} in "
                  f"{time.time() - t0:.0f} s, {len(waiting)} waiting", flush=True)
    return failed

def print_table(results):
    """One block per (size, tokens); dense of the same seed is the difference's other side."""
    for size, tokens in sorted({(r['size'], r['tokens']) for r in results}, key=lambda k: (len(k[0]), k[1])):
        group = [r for r in results if (r['size'], r['tokens']) == (size, tokens)]
        dense = {r['seed']: r['val_loss'] for r in group if r['row'] == 'dense'}
        print(f"\n{size}, {tokens / 1e6:.0f} M tokens; losses in nats, +- is the standard deviation over seeds\n")
        print("| row | seeds | val loss | minus dense | zeroed | mean | live % | busiest 1 % | L0 | FVU | k tok/s | M params | MFLOP/token |")
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        for row in rows(size):
            runs = [r for r in group if r['row'] == row]
            if not runs:
                continue
            diffs = [r['val_loss'] - dense[r['seed']] for r in runs if r['seed'] in dense]
            mean = lambda key: statistics.mean(r[key] for r in runs)
            pm = lambda v, sign='': f"{statistics.mean(v):{sign}.3f}" + (f" +- {statistics.stdev(v):.3f}" if len(v) > 1 else "")
            sae = [f"{mean('val_loss_zeroed'):.2f}", f"{mean('val_loss_mean'):.2f}", f"{100 * min(r['live_share_min'] for r in runs):.1f}",
                   f"{100 * mean('busiest_share'):.0f} %" if all(r.get('busiest_share') for r in runs) else '', # older runs lack it
                   f"{mean('l0'):.1f}", f"{mean('fvu'):.2f}"] if runs[0]['l0'] is not None else [''] * 6
            print("| " + " | ".join([row, str(len(runs)), pm([r['val_loss'] for r in runs]),
                  pm(diffs, '+') if diffs and row != 'dense' else '', *sae, f"{mean('tok_s') / 1e3:.0f}",
                  f"{mean('params_non_embedding') / 1e6:.1f}", f"{mean('flops_per_token') / 1e6:.0f}"]) + " |")

def plot(results, path, rows):
    """Validation loss against tokens, the mean over seeds; of the sizes that have most of these rows, the one with most tokens."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --plot needs matplotlib: pip install matplotlib")
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    kinds = {(r['size'], r['tokens']) for r in results}
    groups = [[r for r in results if (r['size'], r['tokens']) == kind and r['row'] in rows] for kind in kinds]
    group = max(groups, key=lambda g: (len({r['row'] for r in g}), max((r['tokens'] for r in g), default=0)))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for row, style in zip(rows, itertools.cycle(('k-', 'r-', 'b-', 'c-', 'm:', 'g-', 'y-'))):
        runs = [r for r in group if r['row'] == row]
        if not runs:
            continue
        steps = list(zip(*(r['curve'] for r in runs)))
        x, y = [s[0][0] / 1e6 for s in steps], [statistics.mean(v for _, v in s) for s in steps]
        axes.plot(x[1:], y[1:], style, label=f"{row}: {y[-1]:.3f}" + (f", mean of {len(runs)}" if len(runs) > 1 else ""))
    end = min(r['val_loss'] for r in group)
    axes.set(xlabel='M tokens', ylabel='validation loss, nats', ylim=(end - 0.05, end + 1.2))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)

NEEDED = 'row size seed tokens val_loss val_loss_zeroed val_loss_mean live_share_min l0 fvu tok_s params_non_embedding flops_per_token'

def load(folder):
    results = []
    for path in sorted(glob.glob(os.path.join(folder, '*.json'))):
        try:
            with open(path, encoding='utf-8') as f:
                results.append(json.load(f))
            if not set(NEEDED.split()) <= set(results[-1]):
                raise ValueError
        except (ValueError, TypeError):
            sys.exit(f"error: {path} is torn, or no result of this script: delete it, and its run will be made again")
    return results

def problems(c):
    """What is wrong with the options c, as a list of sentences."""
    found = [] if c['size'] in SIZES else [f"size={c['size']!r} must be one of {', '.join(SIZES)}"]
    known = rows(c['size'] if c['size'] in SIZES else 'small')
    names = ', '.join(row for row in known if ' v1' not in row)
    found += [f"rows={r!r} is unknown: known are {names}; each also with ' v1' and ' v1 quick'" for r in c['rows'].split(',') if r not in known]
    found += [f"{k}={c[k]} must be a folder that can be written" for k in ('results', 'out') if not (c['table'] or writable(c[k]))]
    if c['table'] and not glob.glob(os.path.join(c['results'], '*.json')):
        found.append(f"results={c['results']} holds no results: run this without --table=true first")
    if c['gpus'] < -1:
        found.append(f"gpus={c['gpus']} must be how many GPUs to use, 0 for the CPU, -1 for all there are")
    if c['steps'] < 1:
        found.append(f"steps={c['steps']} must be at least 1")
    if not c['seeds'] or min(c['seeds']) < 0:
        found.append(f"seeds={','.join(map(str, c['seeds']))} must be one number or more, from 0")
    return found

def main(argv):
    c = configure(dict(size='small', rows='dense,naive,default,strict', seeds=(1,), steps=1000, dataset='wiki', table=False, plot='',
                       results=os.path.join(ROOT, 'results', 'ladder'), out='out-ladder', gpus=-1), argv, problems)
    known = rows(c['size'])
    if not c['table']:
        import torch
        n = torch.cuda.device_count() if c['gpus'] < 0 else c['gpus']
        os.makedirs(c['results'], exist_ok=True)
        os.makedirs(c['out'], exist_ok=True)
        jobs = []
        for seed in dict.fromkeys(c['seeds']):
            for row in dict.fromkeys(c['rows'].split(',')):
                name = f"{c['size']}-{c['steps']}-{row.replace(' ', '-')}-s{seed}"
                target, out_dir = os.path.join(c['results'], name + '.json'), os.path.join(c['out'], name)
                overrides, needs = known[row][0], None
                if os.path.exists(target):
                    continue
                if row.startswith('posthoc'):
                    twin = os.path.join(c['out'], f"{c['size']}-{c['steps']}-dense-s{seed}")
                    overrides, needs = overrides | dict(init_from=twin), os.path.join(twin, 'ckpt.pt')
                def done(row=row, out_dir=out_dir, target=target):
                    with open(target + '.tmp', 'w', encoding='utf-8') as f:
                        json.dump(summary(row, c['size'], out_dir), f, indent=1)
                    os.replace(target + '.tmp', target)
                jobs.append((name, command(c['size'], overrides, seed, c['steps'], c['dataset'], out_dir), needs, done))
        visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(n)))).split(',')
        failed = run_all(jobs, visible[:n] or [None])
    results = load(c['results'])
    print_table(results)
    if c['plot']:
        plot(results, c['plot'], c['rows'].split(','))
    if not c['table'] and failed:
        print(f"\nerror: {len(failed)} runs failed ({', '.join(failed)}): see {c['out']}/<run>.txt", file=sys.stderr)
        sys.exit(1)

if __name__ == '__main__':
    run(main, sys.argv[1:]) # Ctrl-C reaches the runs too: each finishes its step and saves
