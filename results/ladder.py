"""
The ladder: dense, naive, the default and its variants, at equal tokens and over seeds. Each run is
a call of train.py and leaves a JSON in results/ladder/, of which table and plot are made.

    python results/ladder.py --rows=dense,naive,default --seeds=1,2,3     65 M tokens a run
    python results/ladder.py --size=large --steps=3000                    196 M tokens, 124 M model
    python results/ladder.py --size=cpu --steps=480 --dataset=stdlib      1 M tokens, on a CPU
    python results/ladder.py --table=true --plot=assets/ladder.png        no training
    ... --labels=folder     of files *.tsv: what features tell of these is measured too

A run whose JSON is there is not made again; one that was interrupted is resumed. One GPU is used:
on several start a seed each, with CUDA_VISIBLE_DEVICES.
"""
import json
import os
import statistics
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import configure, read_file, run, writable # noqa: E402
from data.dataset import load_dataset # noqa: E402
from features import open_run, write_whole # noqa: E402
from measures import mean_of, measure # noqa: E402
from model import GPTConfig # noqa: E402

SIZES = {
    'cpu': read_file(ROOT / 'config/sae_cpu.py', {}) | dict(eval_tokens=32_768, device='cpu'),
    'small': dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=32, sae_layers=(3,),
                  gradient_accumulation_steps=4, eval_tokens=524_288),
    'large': dict(n_layer=12, n_head=6, n_embd=768, block_size=1024, batch_size=16, sae_layers=(6,),
                  gradient_accumulation_steps=4, eval_tokens=524_288),
}

def rows(size):
    """{row: what it changes in train.py's defaults and in its size}, in the order of the table."""
    L, C = SIZES[size]['n_layer'], SIZES[size]['n_embd']
    every = tuple(range(L))
    one_step = dict(sae_steps=1, sae_lr_factor=0.5)
    naive = one_step | dict(sae_blend_start=0.0, sae_blend_end=0.0, sae_recon=0.0, sae_nudge=0.0)
    # on the frozen dense twin: reconstruction, or its last part on the frozen model's loss; with
    # no cap and a higher learning rate than the default's, which suit it better
    posthoc = dict(sae_posthoc=True, sae_blend_start=1.0, sae_blend_end=1.0, sae_lr_factor=0.5,
                   sae_cap=0.0)
    return { # 'default-x' is the default without x
        'dense': dict(sae_layers=()),
        'naive': naive,
        'default': {},
        'posthoc': posthoc,
        'posthoc K=32': posthoc | dict(sae_k=32),
        'posthoc 95%': posthoc | dict(sae_blend_start=0.95, sae_blend_end=0.95),
        'posthoc 50%': posthoc | dict(sae_blend_start=0.5, sae_blend_end=0.5),
        'default-steps': one_step,
        'default-recon': dict(sae_recon=0.0),
        'default-nudge': dict(sae_nudge=0.0),
        'default-cap': dict(sae_cap=0.0),
        'hand-over 50%': dict(sae_blend_start=0.5, sae_blend_end=0.5),
        'hand-over 70%': dict(sae_blend_start=0.7, sae_blend_end=0.7),
        'cap 5%': dict(sae_cap=0.05),
        'cap 10%': dict(sae_cap=0.1),
        'K=32': dict(sae_k=32),
        'K=C/8': dict(sae_k=C // 8), # small's own
        'F=64x': dict(sae_ratio=64),
        'first block': dict(sae_layers=(0,)),
        'later block': dict(sae_layers=(3 * L // 4 - 1,)),
        'two blocks': dict(sae_layers=(L // 4, L // 2)),
        'four blocks': dict(sae_layers=every[::max(1, L // 4)]),
        'all blocks': dict(sae_layers=every),
        'mlp': dict(sae_site='mlp'),
        'attn': dict(sae_site='attn'),
        'hidden K=C/4': dict(sae_site='hidden', sae_layers=every, sae_k=C // 4, sae_cap=0.0,
                             sae_blend_start=0.0, sae_blend_end=0.6, sae_recon=0.0),
        'wider 12%': dict(n_embd=C * 9 // 8),
        'wider 25%': dict(n_embd=C * 5 // 4),
        'a block more': dict(n_layer=L + 1),
        'dense of its FLOPs': dict(sae_layers=(), n_embd=C + 8, n_head=4),
    }

def make(c, row, seed):
    """One run and its JSON. Returns None, or where it failed the file with what it printed."""
    size, steps = c['size'], c['steps']
    name = f"{size}-{steps}-{row}-s{seed}".replace(' ', '-').replace('/', '')
    target, out_dir = Path(c['results'], f'{name}.json'), Path(c['out'], name)
    if target.exists():
        return None
    options = dict(warmup_iters=max(1, steps // 20), eval_interval=max(1, steps // 10))
    options |= SIZES[size] | rows(size)[row]
    options |= dict(seed=seed, max_iters=steps, dataset=c['dataset'], out_dir=out_dir,
                    probe_tokens=0, save_interval=10**9)
    if 'sae_posthoc' in options:
        options['init_from'] = Path(c['out'], f'{size}-{steps}-dense-s{seed}')
    if (out_dir / 'ckpt.pt').exists():
        options['init_from'] = 'resume'
    options = [f'--{key}={value}' for key, value in options.items()]
    printed = f'{out_dir}.txt'
    with open(printed, 'w') as f:
        # not subprocess.call, which at Ctrl-C kills train.py before it has saved
        train = subprocess.Popen([sys.executable, ROOT / 'train.py', *options], stdout=f, stderr=f)
        failed = train.wait()
    print(f"{name} {'FAILED' if failed else 'is done'}", flush=True)
    if failed:
        return printed
    result = dict(row=row, size=size, dataset=os.path.basename(c['dataset']))
    result |= summary(out_dir / 'log.jsonl')
    result['unique_tokens'] = min(result['tokens'], load_dataset(c['dataset']).meta['train_tokens'])
    if c['labels']:
        model = open_run(str(out_dir), c['dataset'], for_features=False)
        k = SIZES[size].get('sae_k', GPTConfig.sae_k)
        result |= measure(model, c['labels'], SIZES[size]['sae_layers'][0], k)
    write_whole(target, lambda file: file.write(json.dumps(result, indent=1).encode()))

def summary(log):
    """
    What a finished run's log.jsonl tells: its start, losses in nats, means over SAE layers. Of
    several lines of one step the last counts; a torn line is skipped.
    """
    steps = dict(start={}, log={}, eval={})
    for line in log.read_text(encoding='utf-8', errors='replace').splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            steps[record['event']][record.get('step')] = record
    (start,), logs, evals = (list(records.values()) for records in steps.values())
    last = evals[-1]
    saes = list(last.get('sae', {}).values())
    mean = mean_of(saes) if saes else dict.fromkeys(('live', 'busiest', 'l0', 'fvu'))
    return start | start['versions'] | dict(
        seed=start['config']['seed'], tokens=last['tokens'],
        train_loss=logs[-1]['loss'], val_loss=last['val_loss'],
        val_loss_zeroed=last.get('val_loss_zeroed'), val_loss_mean=last.get('val_loss_mean'),
        live_share=mean['live'], live_share_min=min((sae['live'] for sae in saes), default=None),
        busiest_share=mean['busiest'], l0=mean['l0'], fvu=mean['fvu'],
        tok_s=statistics.median(r['tok_s'] for r in logs[len(logs) // 4:]), # the first compile
        curve=[[r['tokens'], r['val_loss']] for r in evals])

# ---------------------------------------------------------------------------- table and picture

NEEDED = {'row', 'size', 'seed', 'tokens', 'val_loss', 'config', 'curve'}
PRICE = ( # heading, key of a result, factor, format
    ('-dense', 'price', 1, '+.3f'),
    ('+-', 'price', 1, '.3f'),
)
LOSSES = (
    ('loss', 'val_loss', 1, '.3f'),
    ('train', 'train_loss', 1, '.3f'),
    ('zeroed', 'val_loss_zeroed', 1, '.2f'),
    ('toN%', 'to_naive', 100, '.0f'),
    ('L0', 'l0', 1, '.0f'),
    ('FVU', 'fvu', 1, '.1f'),
    ('Mpar', 'params_non_embedding', 1e-6, '.1f'),
    ('MF/t', 'flops_per_token', 1e-6, '.0f'),
)
FEATURES = (
    ('k=1', 'k1', 1, '.3f'),
    ('k=5', 'k5', 1, '.3f'),
    ('k=20', 'k20', 1, '.3f'),
    ('cohe', 'coherence', 1, '.2f'),
    ('>.05', 'coherent', 1, '.0f'),
    ('caus%', 'causal_share', 100, '.0f'),
    ('dupl%', 'duplicates', 100, '.1f'),
    ('dense%', 'dense_features', 100, '.2f'),
    ('live%', 'live_share_min', 100, '.1f'), # of several layers the lowest
)

def load(folder):
    """All results in a folder, compared. Raises ValueError for a file that is none."""
    results = []
    for path in sorted(Path(folder).glob('*.json')):
        try:
            results.append(json.loads(path.read_text(encoding='utf-8')))
            assert NEEDED <= set(results[-1]) and results[-1]['size'] in SIZES
        except (ValueError, TypeError, AssertionError):
            raise ValueError(f"{path} is torn, or no result of this script: delete it, and its run "
                             "will be made again") from None
    return compare(results)

def compare(results):
    """
    Adds what each result is beside dense and naive of its seed, its probes (means over sets), and
    two more rows: what random directions and channels of the dense models' streams tell.
    """
    losses = {(r.get('dataset'), r['size'], r['tokens'], r['seed'], r['row']): r['val_loss']
              for r in results}
    more = []
    for r in results:
        same = r.get('dataset'), r['size'], r['tokens'], r['seed']
        if (*same, 'dense') in losses:
            r['price'] = r['val_loss'] - losses[(*same, 'dense')]
        r['to_naive'] = tokens_to(losses.get((*same, 'naive'), -1), r['curve'], r['tokens'])
        r |= r.get('probe_mean', {})
        for name in 'random', 'channels':
            if f'probe_{name}_mean' in r:
                shared = {key: r[key] for key in ('size', 'tokens', 'config')}
                more.append(shared | r[f'probe_{name}_mean'] | dict(row=name))
    return more + results

def tokens_to(loss, curve, tokens):
    """The share of tokens after which a curve [[tokens, loss], ...] first falls to loss, or None"""
    for (n, high), (m, low) in zip(curve, curve[1:]):
        if low <= loss < high:
            return (n + (m - n) * (high - loss) / (high - low)) / tokens
    return None

def print_part(part, columns, order):
    """One table: a line a row, means over seeds; nothing for rows that have none of the columns."""
    lines = [['row', 'n', *(heading for heading, *_ in columns)]]
    for row in order:
        runs = [r for r in part if r['row'] == row]
        line = [row, str(len(runs))]
        for heading, key, factor, form in columns:
            values = [factor * r[key] for r in runs if r.get(key) is not None]
            if heading == '+-':
                values = [statistics.stdev(values)] if len(values) > 1 else []
            line.append(format(statistics.mean(values), form) if values else '')
        if any(line[4:]):
            lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for row, *cells in lines:
        print(row.ljust(widths[0]), *map(str.rjust, cells, widths[1:]))

def print_table(results):
    """Two tables for each size and number of tokens; rows that are not known any more come last."""
    print("n: seeds. -dense: minus dense of the same seed, +-: its standard deviation.\n"
          "zeroed: without the SAEs' output. toN%: tokens to naive's last loss. Mpar:\n"
          "million parameters, embedding apart. MF/t: MFLOP a token. k=1, 5, 20: accuracy\n"
          "of probes, mean over sets. cohe, >.05: coherence, and features above 0.05.\n"
          "caus%: features whose removal changes the loss. dupl%: doubles of others.\n"
          "dense%: fire on a tenth of the tokens.")
    for size, tokens in sorted({(r['size'], r['tokens']) for r in results}):
        part = [r for r in results if (r['size'], r['tokens']) == (size, tokens)]
        found = sorted(r['row'] for r in part)
        order = dict.fromkeys(['random', 'channels', *rows(size), *found])
        print(f"\n{size}, {tokens / 1e6:.1f} M tokens; losses in nats")
        print_part(part, PRICE + LOSSES, order)
        if any('k1' in r for r in part):
            print("\nits features")
            print_part(part, PRICE + FEATURES, order)

def plot(results, c):
    """Each row a dot: its price, minus dense, to the right, its probes with one feature upwards."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 5))
    probed = [r for r in results if 'k1' in r
              and (r['size'], r['config']['max_iters']) == (c['size'], c['steps'])]
    dots = []
    for row in dict.fromkeys(r['row'] for r in probed):
        runs = [r for r in probed if r['row'] == row]
        y = statistics.mean(r['k1'] for r in runs)
        if row in ('random', 'channels'):
            style = ':' if row == 'random' else '--'
            axes.axhline(y, color='grey', ls=style, lw=1, label=row)
        elif all('price' in r for r in runs):
            dots.append((statistics.mean(r['price'] for r in runs), y, row))
    for i, (x, y, row) in enumerate(sorted(dots), 1): # names would lie upon each other
        color = 'C3' if row == 'default' else 'C1' if 'posthoc' in row else 'C0'
        axes.plot(x, y, 'o', color=color, label=f'{i}  {row}')
        axes.annotate(i, (x, y), xytext=(4, 3), textcoords='offset points', fontsize=8)
    axes.set(xlabel='loss minus dense, nats', ylabel='accuracy of probes with one feature')
    axes.legend(bbox_to_anchor=(1, 1), loc='upper left', fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(c['plot'], dpi=130, bbox_inches='tight')

def problems(c):
    """What is wrong with the options c, as a list of sentences."""
    known, table = rows('small'), c['table'] # the same rows at every size
    checks = [
        (c['size'] in SIZES, f"size={c['size']!r} must be one of {', '.join(SIZES)}"),
        (set(c['rows'].split(',')) <= set(known),
         f"rows={c['rows']!r} must be of these: {', '.join(known)}"),
        *((table or writable(c[key]), f"{key}={c[key]} must be a folder that can be written")
          for key in ('results', 'out')),
        (not c['labels'] or any(Path(c['labels']).glob('*.tsv')),
         f"labels={c['labels']} must be a folder of files *.tsv: label, tab, text"),
        (not table or any(Path(c['results']).glob('*.json')),
         f"results={c['results']} holds no results: run this without --table=true"),
        (c['steps'] > 0, f"steps={c['steps']} must be at least 1"),
        (c['seeds'] and min(c['seeds']) >= 0, f"seeds={c['seeds']} must be numbers from 0"),
        (not c['plot'] or find_spec('matplotlib'),
         f"plot={c['plot']} needs matplotlib: pip install matplotlib")]
    return [sentence for sound, sentence in checks if not sound]

def main(argv):
    c = configure(dict(
        size='small', rows='dense,naive,default', seeds=(1,), steps=1000, dataset='fineweb',
        labels='', results=str(ROOT / 'results' / 'ladder'), out='out-ladder', table=False,
        plot=''), argv, problems)
    failed = []
    if not c['table']:
        load_dataset(c['dataset']) # for its error
        os.makedirs(c['out'], exist_ok=True)
        jobs = [(row, seed) for seed in c['seeds'] for row in c['rows'].split(',')]
        jobs.sort(key=lambda job: 'posthoc' in job[0]) # which needs its dense twin's checkpoint
        failed = [printed for job in jobs if (printed := make(c, *job))]
    results = load(c['results'])
    print_table(results)
    if c['plot']:
        plot(results, c)
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; what they printed: {', '.join(failed)}")

if __name__ == '__main__':
    run(main, sys.argv[1:]) # Ctrl-C reaches the runs too: each finishes its step and saves
