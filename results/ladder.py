"""
The ladder: dense, naive, the default and its variants, at equal tokens and over seeds. Each run is
one call of train.py and leaves one JSON in results/ladder/, of which table and plot are made.

    python results/ladder.py --rows=dense,naive,default --seeds=1,2,3     65 M tokens, a run a GPU
    python results/ladder.py --size=large --steps=3000                    196 M tokens, 124 M model
    python results/ladder.py --size=cpu --steps=480 --dataset=stdlib      1 M tokens, on a CPU
    python results/ladder.py --table=true --plot=assets/ladder.png        no training

A run whose JSON is there is not made again; one that was interrupted is resumed.
"""
import glob
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, run, writable  # noqa: E402

SIZES = {
    'tiny': dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, sae_layers=(0,),
                 sae_k=8, eval_tokens=1024, log_interval=2, compile=False, device='cpu'),
    'cpu': dict(n_layer=4, n_head=4, n_embd=192, block_size=256, batch_size=4, sae_layers=(1,),
                sae_ratio=11, sae_k=32, sae_cap=0.03, gradient_accumulation_steps=2,
                warmup_iters=20, eval_tokens=32_768, compile=False, device='cpu'),
    'small': dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=128, sae_layers=(3,),
                  eval_tokens=524_288),
    'large': dict(n_layer=12, n_head=6, n_embd=768, block_size=1024, batch_size=64, sae_layers=(6,),
                  eval_tokens=524_288),
}

def rows(size):
    """{row: what it changes in train.py's defaults and in its size}, in the order of the table."""
    L, C = SIZES[size]['n_layer'], SIZES[size]['n_embd']
    every = tuple(range(L))
    at_once = dict(sae_blend_start=0.0, sae_blend_end=0.0, sae_recon=0.0)
    slowly = dict(sae_blend_start=0.0, sae_blend_end=0.6, sae_recon=0.0)
    naive = at_once | dict(sae_nudge=0.0)
    # on the frozen dense twin: reconstruction, or its last part on the frozen model's loss
    posthoc = dict(sae_posthoc=True, sae_blend_start=1.0, sae_blend_end=1.0)
    return {
        'dense': dict(sae_layers=()),
        'dense adamw': dict(sae_layers=(), optimizer='adamw'),
        'naive': naive,
        'naive adamw': naive | dict(optimizer='adamw'),
        'default': {},
        'posthoc': posthoc,
        'posthoc K=32': posthoc | dict(sae_k=32),
        'posthoc 95%': posthoc | dict(sae_blend_start=0.95, sae_blend_end=0.95),
        'posthoc 50%': posthoc | dict(sae_blend_start=0.5, sae_blend_end=0.5),
        'default-recon': dict(sae_recon=0.0),
        'default-nudge': dict(sae_nudge=0.0),
        'default-cap': dict(sae_cap=0.0),
        'at 30%': dict(sae_blend_start=0.3, sae_blend_end=0.35),
        'at 50%': dict(sae_blend_start=0.5, sae_blend_end=0.55),
        'K=16': dict(sae_k=16),
        'K=32': dict(sae_k=32),
        'K=128': dict(sae_k=128, sae_cap=0.3),
        'F=4x': dict(sae_ratio=4, sae_cap=0.2),
        'F=64x': dict(sae_ratio=64),
        'first block': dict(sae_layers=(0,)),
        'later block': dict(sae_layers=(3 * L // 4 - 1,)),
        'last block': dict(sae_layers=(L - 1,)),
        'two blocks': dict(sae_layers=(L // 4, L // 2)),
        'four blocks': dict(sae_layers=every[::max(1, L // 4)]),
        'all blocks': dict(sae_layers=every),
        'mlp': dict(sae_site='mlp'),
        'attn': dict(sae_site='attn'),
        'hidden K=C/4': slowly | dict(sae_site='hidden', sae_layers=every, sae_k=C // 4,
                                      sae_cap=0.0),
        'stream': slowly | dict(sae_site='stream', sae_layers=every[:-2] or (0,), sae_k=C // 4,
                                sae_cap=0.0),
        'wider 12%': dict(n_embd=C * 9 // 8),
        'wider 25%': dict(n_embd=C * 5 // 4),
    }

# ------------------------------------------------------------------------------------------------

def make(c, slots, row, seed):
    """
    One run and its JSON, on one of the free slots: a GPU's number, or None for the CPU.
    Returns None, or where the run failed the file with what it printed.
    """
    size, steps = c['size'], c['steps']
    name = f"{size}-{steps}-{row.replace(' ', '-').replace('/', '')}-s{seed}"
    target, out_dir = os.path.join(c['results'], name + '.json'), os.path.join(c['out'], name)
    if os.path.exists(target):
        return None
    evals = 4 if size == 'cpu' else 10
    options = dict(
        gradient_accumulation_steps=1, warmup_iters=max(1, steps // 20),
        eval_interval=max(1, steps // evals), save_interval=10 ** 9, probe_tokens=0)
    options |= SIZES[size] | rows(size)[row]
    options |= dict(seed=seed, max_iters=steps, dataset=c['dataset'], out_dir=out_dir)
    if 'sae_posthoc' in options:
        options['init_from'] = os.path.join(c['out'], f'{size}-{steps}-dense-s{seed}')
    if os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
        options['init_from'] = 'resume'
    command = [sys.executable, os.path.join(ROOT, 'train.py')]
    command += [f'--{key}={value}' for key, value in options.items()]

    slot = slots.pop()   # there are as many threads as slots
    gpu = {} if slot is None else dict(CUDA_VISIBLE_DEVICES=slot)
    with open(out_dir + '.txt', 'w') as printed:
        failed = subprocess.call(command, stdout=printed, stderr=printed, env=os.environ | gpu)
    slots.append(slot)
    print(f"{name} {'FAILED' if failed else 'is done'}", flush=True)
    if failed:
        return out_dir + '.txt'
    with open(target + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(summary(row, size, os.path.join(out_dir, 'log.jsonl')), f, indent=1)
    os.replace(target + '.tmp', target)
    return None

def summary(row, size, log):
    """
    The JSON of a finished run, from its log.jsonl: losses in nats, the mean over SAE layers. Of
    several lines of one step, as a resumed run has, the last counts; a torn line is skipped.
    """
    steps = dict(start={}, log={}, eval={})
    with open(log, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            steps[record['event']][record.get('step')] = record
    (start,), logs, evals = (list(records.values()) for records in steps.values())
    last = evals[-1]
    saes = last.get('sae', {}).values()
    mean = {key: statistics.mean(sae[key] for sae in saes) if saes else None
            for key in ('live', 'busiest', 'l0', 'fvu')}
    return dict(
        row=row, size=size, seed=start['config']['seed'], tokens=last['tokens'],
        val_loss=last['val_loss'], val_loss_zeroed=last.get('val_loss_zeroed'),
        val_loss_mean=last.get('val_loss_mean'), live_share=mean['live'],
        live_share_min=min((sae['live'] for sae in saes), default=None),
        busiest_share=mean['busiest'], l0=mean['l0'], fvu=mean['fvu'],
        tok_s=statistics.median(r['tok_s'] for r in logs[len(logs) // 4:]),   # the first compile
        params=start['params'], params_non_embedding=start['params_non_embedding'],
        flops_per_token=start['flops_per_token'], torch=start['versions']['torch'],
        gpu=start['versions']['gpu'], commit=start['versions']['commit'], config=start['config'],
        curve=[[r['tokens'], r['val_loss']] for r in evals])

# ------------------------------------------------------------------------------------------------

COLUMNS = (   # heading, key of the JSONs, factor, decimals
    ('loss', 'val_loss', 1, 3),
    ('zeroed', 'val_loss_zeroed', 1, 2),
    ('mean', 'val_loss_mean', 1, 2),
    ('live%', 'live_share_min', 100, 1),   # of several layers the lowest
    ('busy%', 'busiest_share', 100, 0),
    ('L0', 'l0', 1, 0),
    ('FVU', 'fvu', 1, 1),
    ('Mpar', 'params_non_embedding', 1e-6, 1),
    ('MF/t', 'flops_per_token', 1e-6, 0),
)

def print_table(results):
    """
    A part for each size and number of tokens, means over seeds; rows that are not known any more
    come last.
    """
    print("n: seeds. -dense: minus dense of the same seed, +-: its standard deviation.\n"
          "zeroed, mean: loss with the SAEs' output zeroed, or replaced by its mean.\n"
          "live%: features that fire. busy%: of all firing, by their busiest 1 %.\n"
          "Mpar: million parameters, embedding apart. MF/t: MFLOP a token.")
    for size, tokens in sorted({(r['size'], r['tokens']) for r in results}):
        part = [r for r in results if (r['size'], r['tokens']) == (size, tokens)]
        dense = {r['seed']: r['val_loss'] for r in part if r['row'] == 'dense'}
        known = list(rows(size))
        lines = [['row', 'n', '-dense', '+-'] + [heading for heading, *_ in COLUMNS]]
        for row in known + sorted({r['row'] for r in part} - set(known)):
            runs = [r for r in part if r['row'] == row]
            diffs = [r['val_loss'] - dense[r['seed']] for r in runs if r['seed'] in dense]
            line = [row, str(len(runs))]
            line.append(f"{statistics.mean(diffs):+.3f}" if diffs else '')
            line.append(f"{statistics.stdev(diffs):.3f}" if len(diffs) > 1 else '')
            for _, key, factor, decimals in COLUMNS:
                values = [r[key] for r in runs if r.get(key) is not None]   # dense has no SAE
                line.append(f"{factor * statistics.mean(values):.{decimals}f}" if values else '')
            if runs:
                lines.append(line)
        widths = [max(len(cell) for cell in column) for column in zip(*lines)]
        print(f"\n{size}, {tokens / 1e6:.1f} M tokens; losses in nats")
        for row, *numbers in lines:
            numbers = [cell.rjust(width) for cell, width in zip(numbers, widths[1:])]
            print(row.ljust(widths[0]), *numbers)

def plot(results, c, names):
    """Validation loss against tokens, the mean over seeds, of the rows in names."""
    import matplotlib.pyplot as plt
    wanted = c['size'], c['steps']
    results = [r for r in results if (r['size'], r['config']['max_iters']) == wanted]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in names:
        curves = [r['curve'] for r in results if r['row'] == name]
        if curves:
            tokens = [n / 1e6 for n, _ in curves[0]]
            losses = [statistics.mean(loss for _, loss in points) for points in zip(*curves)]
            axes.plot(tokens, losses, label=f"{name}: {losses[-1]:.3f}, n={len(curves)}")
    end = min([r['val_loss'] for r in results if r['row'] in names], default=0.0)
    axes.set(xlabel='M tokens', ylabel='validation loss, nats', ylim=(end - 0.05, end + 1.2))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(c['plot'], dpi=130, bbox_inches='tight')

NEEDED = {'row', 'size', 'seed', 'tokens', 'val_loss', 'config', 'curve'}

def load(folder):
    """All results in a folder. Raises ValueError, one sentence, for a file that is none."""
    results = []
    for path in sorted(glob.glob(os.path.join(folder, '*.json'))):
        try:
            with open(path, encoding='utf-8') as f:
                result = json.load(f)
        except ValueError:
            result = None
        if type(result) is not dict or not NEEDED <= set(result) or result['size'] not in SIZES:
            raise ValueError(f"{path} is torn, or no result of this script: delete it, and its run "
                             "will be made again")
        results.append(result)
    return results

# ------------------------------------------------------------------------------------------------

def problems(c):
    """What is wrong with the options c, as a list of sentences."""
    sound, training = c['size'] in SIZES, not c['table']
    known = rows(c['size'] if sound else 'small')
    found = [] if sound else [f"size={c['size']!r} must be one of {', '.join(SIZES)}"]
    for row in c['rows'].split(','):
        if training and row not in known:
            found.append(f"rows={row!r} is unknown: known are {', '.join(known)}")
    for key in ('results', 'out'):
        if training and not writable(c[key]):
            found.append(f"{key}={c[key]} must be a folder that can be written")
    if c['table'] and not glob.glob(os.path.join(c['results'], '*.json')):
        found.append(f"results={c['results']} holds no results: run this without --table=true")
    if c['gpus'] < -1:
        found.append(f"gpus={c['gpus']} must be a number of GPUs, 0 for the CPU, -1 for all")
    if c['steps'] < 1:
        found.append(f"steps={c['steps']} must be at least 1")
    if not c['seeds'] or min(c['seeds']) < 0:
        found.append(f"seeds={c['seeds']} must be one number or more, from 0")
    if c['plot'] and find_spec('matplotlib') is None:
        found.append(f"plot={c['plot']} needs matplotlib: pip install matplotlib")
    return found

def free_slots(gpus):
    """As many GPUs, by their numbers (gpus = -1: all that are visible); [None] for the CPU."""
    import torch
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
    if visible == ['']:
        visible = [str(i) for i in range(torch.cuda.device_count())]
    return (visible if gpus < 0 else visible[:gpus]) or [None]

def main(argv):
    c = configure(dict(
        size='small', rows='dense,naive,default', seeds=(1,), steps=1000, dataset='wiki', gpus=-1,
        results=os.path.join(ROOT, 'results', 'ladder'), out='out-ladder', table=False, plot=''),
        argv, problems)
    names = list(dict.fromkeys(c['rows'].split(',')))
    failed = []
    if not c['table']:
        os.makedirs(c['results'], exist_ok=True)
        os.makedirs(c['out'], exist_ok=True)
        slots = free_slots(c['gpus'])
        jobs = [(row, seed) for seed in dict.fromkeys(c['seeds']) for row in names]
        posthoc = [job for job in jobs if job[0].startswith('posthoc')]
        others = [job for job in jobs if job not in posthoc]   # first: post-hoc needs its twin
        with ThreadPoolExecutor(len(slots)) as pool:
            failed += pool.map(lambda job: make(c, slots, *job), others)
            failed += pool.map(lambda job: make(c, slots, *job), posthoc)
    results = load(c['results'])
    print_table(results)
    if c['plot']:
        plot(results, c, names)
    failed = [printed for printed in failed if printed]
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; what they printed: {', '.join(failed)}")

if __name__ == '__main__':
    run(main, sys.argv[1:])   # Ctrl-C reaches the runs too: each finishes its step and saves
