"""
The viewer: what the features of a trained model mean, in a terminal, in a pipe, or as an HTML file.

    python inspect_features.py --out_dir=out-sae-cpu                    every SAE
    python inspect_features.py --out_dir=out-sae-cpu --feature=L1.F101  all about one feature
    ... --prompt="import os" --why=true    what made the model go on as it does
    ... --help             all views, each by the option that asks for it

The model runs once over val (the scan); what fired where is kept in out_dir, in index.npz, until
the checkpoint changes. A new view is a function that yields what to print, and a line in VIEWS.

  fires          the feature is among the K of a position, and its activation is not 0
  density        share of the scanned positions on which it fires
  token entropy  entropy in bits of the token types on which it fires; rank 1 is the lowest
"""
import json
import math
import os
import re
import shlex
import sys
import warnings
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

# before torch is loaded: threads that wait for each other sleep, so that a busy CPU stays usable
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import numpy as np
from rich.cells import set_cell_size
from rich.text import Text

import configurator
import explain
from export import export
from features import (SETTLED, caption, encode, feature_timeline, open_run, open_timeline,
                      parse_feature, pieces, prompt_text, read, safe, strongest, timeline_curves,
                      tracked, write_whole)
from measures import pooled_codes, probe, read_labels
from scanning import (ORDERS, SHOWN_FROM, by_concept, coherence_curve, feature_numbers, find,
                      in_order, open_index, overview_numbers, words_of)
from terminal import (BARS, SHADES, bold, captions, dim, feature_table, heading, level, line,
                      listing, name, number, one_line, paragraph, percent, screen, show, spark,
                      sparklines, table_of)

DEFAULTS = dict(
    out_dir='out',       # a run of train.py
    layer=-1,            # block of the SAE; -1 = all, or the first where one is meant
    feature='',          # 2386 (with --layer) or L6.F2386; several with commas
    examples=5,          # contexts shown of a feature, up to 16
    rows=8,              # lines of a list
    effect=0,            # positions (64 is plenty) on which to measure the feature's removal
    prompt='',           # text to read with the model's eyes
    prompt_file='',      # or the text is what this file holds
    top=3,               # features shown of each token of a prompt
    find='',             # regular expression, ^ and $ are a line's: which features fire on it?
    probe='',            # file of lines "label<tab>text": which features tell the labels apart?
    why='',              # true: what made the model go on from --prompt as it does; or a feature
    target='',           # the text that --why is to explain; '' = the likeliest token
    trace='',            # a feature, L3.F17: which of the next SAE's does it cause?
    sort='',             # a list, the first by coherence, entropy or density; the page's order
    timeline=False,      # how the features formed, from the snapshots of training
    plot='',             # the timeline as a picture, in this file; takes matplotlib
    html='',             # write the chosen (or all live) features, or the prompt, to this file
    export='',           # write the SAEs to this folder, for SAELens
    scan_tokens=0,       # 0 = what the index has; with no index 131,072, on a GPU 1,048,576
    dataset='',          # whose val is scanned; '' = that of training
    device='auto',       # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    seed=1337,           # of everything drawn at random
)
TEMPLATE = Path(__file__).resolve().parent / 'assets/viewer.html'

def problems(config):
    """What is wrong with the options, as a list of sentences."""
    at_least = dict(examples=0, rows=0, effect=0, top=1, scan_tokens=0, seed=0)
    found = [f"{key}={config[key]} must be at least {low}" for key, low in at_least.items()
             if config[key] < low]
    try:
        re.compile(config['find'])
    except re.error as e:
        found.append(f"find={config['find']!r} is no regular expression: {e}")
    if config['sort'] not in ('', *ORDERS):
        found.append(f"sort={config['sort']!r} must be one of {', '.join(ORDERS)}")
    for key in 'html', 'plot':
        path = os.path.abspath(config[key])
        if config[key] and (os.path.isdir(path) or not os.access(os.path.dirname(path), os.W_OK)):
            found.append(f"{key}={config[key]} must be a file in a folder that can be written")
    if config['export'] and not configurator.writable(config['export']):
        found.append(f"export={config['export']} must be a folder that can be written")
    of_prompt, why = config['prompt'] or config['prompt_file'], config['why']
    if why and bool(of_prompt) != (why == 'true'):
        found.append(f"why={why!r}: with --prompt write --why=true, without it --why=L6.F2386")
    if config['target'] and why != 'true':
        found.append(f"target={config['target']!r} takes --prompt and --why=true beside it")
    return found

# -------------------------------------------------------------------------- what the options choose

class Options(SimpleNamespace):
    """The options, and what they choose: opened when a view first asks. All raise ValueError."""

    run = cached_property(lambda self: open_run(self.out_dir, self.dataset, self.device))
    index = cached_property(lambda self: open_index(self.out_dir, self.dataset, self.device,
                                                    self.scan_tokens))
    timelines = cached_property(lambda self: open_timeline(self.out_dir))

    @cached_property
    def prompt_tokens(self):
        """Of the prompt: [(token, {block: its --top strongest features})]."""
        model, tokens = self.run.model, encode(self.run, self.prompt)
        _, values, indices = read(model, tokens)             # (S, n, K) both
        return [(token, {layer: strongest(values[s, t], indices[s, t], self.top)
                         for s, layer in enumerate(model.saes())})
                for t, token in enumerate(tokens)]

    def of_layer(self, by_layer):
        """Of {block: SAE} those that --layer leaves."""
        if self.layer not in (-1, *by_layer):
            blocks = ', '.join(map(str, by_layer))
            raise ValueError(f"layer={self.layer} has no SAE; block {blocks} has one")
        return [sae for layer, sae in by_layer.items() if self.layer in (-1, layer)]

    def features(self, key):
        """--key=L6.F2386,L6.F5 as [(scan, feature)]."""
        F = self.of_layer(self.index)[0].F
        parsed = (parse_feature(part, self.index, F, self.layer)
                  for part in getattr(self, key).split(','))
        return [(self.index[layer], f) for layer, f in parsed]

    def numbers(self, scan, f):
        """All of a feature, with its timeline and effect; None where there is none."""
        d, n = feature_numbers(scan, f, self.seed), self.effect
        t = self.timelines.get(scan.layer)
        effect = explain.removal_effect(self.run.model, scan, f, n, self.seed) if n else None
        return d | dict(timeline=t and feature_timeline(t, f), effect=effect)

# -------------------------------------------------------------------------------------------- views

def overview(scan, options):
    d, live = overview_numbers(scan), scan.count > 0
    yield bold(f"SAE {scan.place} {scan.layer}: {scan.F:,} features, K = {scan.K}")
    yield dim(f"step {scan.step:,} · {scan.N:,} tokens of {Path(scan.dataset).name} val scanned")
    yield (f"\n  live {d['live']:,} ({percent(d['live'] / scan.F)}) · dead {d['dead']:,} · "
           f"L0 {d['l0']:.2f} · FVU {d['fvu']:.3f}")
    yield dim("  L0: features active a token; FVU: share of variance not kept")
    yield f"  density        |{spark(d['densities'])}| 0.0001 to 100 %, log scale"
    yield dim(f"    the busiest 1 % of the features do {percent(d['busiest'])} of all firing")
    yield f"  token entropy  |{spark(d['entropies'])}| 0 to {d['top_entropy']} bits"
    if d['live']:
        density, bits = np.median(scan.count[live]) / scan.N, np.median(scan.entropy[live])
        yield dim(f"    median {bits:.2f} bits, of the density {percent(density)}")
    named = by_concept(scan)[:options.rows]
    if named:
        note = 'words that tell, and keep company: coherence, density, words, contexts'
        yield heading('Concepts', note)
    for f in named:
        density = percent(scan.count[f] / scan.N)
        yield line('  ', bold(name(scan, f)),
                   f'  {scan.coherence[f]:.2f}  {density}  {words_of(scan, f)}')
        for c in feature_numbers(scan, f, options.seed)['top'][:3]:
            yield one_line(scan, c, scan.max[f], options.console.width)
    known = in_order(scan, 'entropy')
    known = known[scan.count[known] >= SHOWN_FROM]
    _, firsts = np.unique(scan.top_tokens[known, 0], return_index=True)
    words = known[np.sort(firsts)]       # one a token: many features may fire on line breaks
    of = f"entropy of {len(known):,} that fire {SHOWN_FROM} times or more"
    for title, note, features in (
            ('Most word-like', f'lowest {of}; one a token', words),
            ('Most abstract', f'highest token {of}', known[::-1]),
            ('Densest', 'fire on the most positions', in_order(scan, 'density'))):
        yield from listing(title, note, scan, features[:options.rows])
    dead = ' '.join(f'F{f}' for f in np.flatnonzero(~live)[:options.rows])
    yield heading('Dead', f"{d['dead']:,} never fired in {scan.N:,} tokens  {dead}")
    yield heading('Next')
    yield line(f"  python inspect_features.py --out_dir={shlex.quote(options.out_dir)} "
               f"--feature={name(scan, [*named, *known, 0][0])}", overflow='ignore')
    yield dim('  or --prompt="text" --why=true, --find="regex", --timeline=true, --html=a.html')

def feature_view(scan, f, options):
    d = options.numbers(scan, f)
    live = d['count'] > 0
    yield Text.assemble(bold(name(scan, f)), ' is dead' * (not live),
                        f" · fires on {percent(d['density'])} of {scan.N:,} tokens · "
                        f"max {number(d['max'])} · mean {number(d['mean'])}")
    yield dim(f"step {scan.step:,} · {scan.place} {scan.layer}")
    if live:
        yield from firing_panels(scan, d, options)
    yield heading('Suppresses | promotes', 'next tokens, logits per unit; direct path only')
    for (down, low), (up, high) in zip(d['down'][:5], d['up']):
        down, up = (set_cell_size(caption(scan.names[token]), 18) for token in (down, up))
        yield f'  {down}{low:>+9.4f}   |   {up}{high:>+9.4f}'
    near, joint = ([(scan, g, f'{x:.3f}') for g, x in d[kind]] for kind in ('near', 'joint'))
    yield from feature_table('Nearest', 'cosine of what they write', ('',), near)
    if live:
        yield from feature_table('Fires with', 'positions with both / with either', ('',), joint)
    if e := d['effect']:
        yield heading('Without it', f"exact change of the loss, at {e['n']:,} of the "
                                    "positions where it fires")
        yield (f"  mean {e['mean']:+.4f} nats (standard error {e['std'] / e['n'] ** 0.5:.4f}), "
               f"standard deviation {e['std']:.4f}")
    if d['timeline']:
        yield from sparklines(d['timeline'])
    if live:
        yield heading('Next', '--effect=64 beside it: what its removal does to the loss')
        yield line(f"  python sample.py --out_dir={shlex.quote(options.out_dir)} --steer="
                   f"{name(scan, f)}={number(d['max'])} --compare=true", overflow='ignore')

def firing_panels(scan, d, options):
    """The panels of a live feature: where it fires, and how strongly."""
    peak = lambda c: number(c['acts'][c['peak']])
    yield heading('Activations', f"{d['count']:,} of them")
    yield f"  0 |{spark(d['hist'])}| {number(d['max'])}"
    yield heading('Fires on', f"token entropy {d['entropy']:.4f} bits, rank {d['rank']:,} of "
                              f"{(scan.count > 0).sum():,} live features")
    yield line('  ', captions(scan, d['f']))
    if d['words']:
        note = 'fewer than four: they have no coherence'
        if d['coherence'] is not None:
            note = (f"coherence {d['coherence']:.4f}, rank {d['concept_rank']:,} of "
                    f"{d['concepts']:,} as a concept")
        yield heading('Words', note)
        yield line('  ', d['words'])
    yield heading('Top contexts', 'one a window; the peak in «», bars or shades by activation')
    for n, c in enumerate(d['top'][:options.examples], 1):
        yield bold(f"Layer {scan.layer} - Feature {d['f']} - Example {n} - Rank {d['rank']} - "
                   f"Token Entropy {d['entropy']:.4f}")
        yield from paragraph(options.console, scan, c, d['max'])
        more = f", the same text {c['times']} times" if c['times'] > 1 else ''
        yield dim(f"  activation {peak(c)} at token {c['where']:,} of the scan{more}")
    if not d['top']:
        yield '  none: it fires only on first and last tokens of a window, and on end-of-text'
    width = options.console.width
    yield heading('Random contexts', 'drawn from all positions where it fires')
    yield table_of(('', ''), [(peak(c), one_line(scan, c, d['max'], width - 14))
                              for c in d['random'][:options.examples]])
    yield heading('By strength', 'intervals of activation, shares of the firings, an example')
    rows = []
    for low, high, share, c in d['intervals']:
        example = one_line(scan, c, d['max'], width - 32) if c else '(no peak is taken)'
        rows.append((f'{number(low)} to {number(high)}', percent(share), example))
    yield table_of(('', '', ''), rows)

def timeline_view(t, options):
    """Needs neither model nor scan."""
    yield bold(f'SAE of block {t.layer} over training: {len(t.steps)} snapshots of '
               f'{t.probed:,} tokens')
    yield dim('settled: fires on about its final tokens from then on (cosine of their counts '
              f'{SETTLED} or more)\n')
    top, rows = math.ceil(t.entropy[t.count > 0].max(initial=1)), []
    snapshots = zip(t.steps, t.tokens, t.entropy, *timeline_curves(t).values())
    for step, tokens, bits, live, settled, median in snapshots:
        bars = spark(np.histogram(bits, 24, (0, top))[0])
        rows.append((f'{step:,}', f'{tokens:,}', percent(live / 100), f'{settled:,}',
                     f'{median:.2f}', f'|{bars}|'))
    of = f'token entropy, 0 to {top} bits'
    yield table_of(('step', 'tokens', 'live', 'settled', 'median', of), rows)

def feature_timeline_view(scan, f, options):
    timeline = options.timelines[scan.layer]
    t, rows = feature_timeline(timeline, f), []
    yield bold(f'{name(scan, f)} over training, on {timeline.probed:,} tokens at each snapshot')
    yield from sparklines(t)
    yield ''
    snapshots = zip(t['steps'], t['tokens'], *t['curves'].values())
    for i, (step, tokens, density, *others) in enumerate(snapshots):
        words = '  '.join(caption(scan.names[token]) for token in tokens)
        rows.append(('* ' * (i == t['settled']) + f'{step:,}', percent(density),
                     *(f'{x:.4f}' for x in others), words))
    yield table_of(('step', 'density', 'entropy', 'direction', 'tokens', 'fires on'), rows)

def prompt_view(scan, options):
    yield bold(f'SAE of block {scan.layer}: the {options.top} strongest features of each token')
    yield dim('bar and activation, full: the largest in the scan; what the feature fires on\n')
    cells = []
    for token, features in options.prompt_tokens:
        word = Text(caption(scan.names[token]))
        for f, act in features[scan.layer]:
            eighths = level(act, max(act, scan.max[f]))
            word.stylize(SHADES[eighths - 1])
            cells.append((word, BARS[eighths], number(act), bold(name(scan, f)),
                          captions(scan, f)))
            word = Text()
        if not features[scan.layer]:
            cells.append((word, '', '', '', 'no feature fires'))
    yield table_of(('token', '', '', 'feature', 'fires on'), cells)

def plot_view(options):
    """The timeline as a picture: of the SAEs, or of the features of --feature."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot takes matplotlib: pip install matplotlib") from None
    warnings.filterwarnings('ignore', 'Glyph')               # no font has a sign for every token
    shown = {}                                               # {title: steps, curves, words}
    if options.feature:
        for scan, f in options.features('feature'):
            t = feature_timeline(options.timelines[scan.layer], f)
            words = ['\n'.join(caption(scan.names[token]) for token in row) for row in t['tokens']]
            shown[name(scan, f)] = t['steps'], t['curves'], words
    else:
        for scan in options.of_layer(options.index):
            t = options.timelines[scan.layer]
            curves = timeline_curves(t) | {'coherence of 8 tokens': coherence_curve(scan, t)}
            shown[f'SAE of block {t.layer}'] = t.steps, curves, [''] * len(t.steps)
    figure = Figure((5 * len(shown) + 1, 9), layout='constrained')
    grid = figure.subplots(4, len(shown), sharex='col', squeeze=False)       # of four curves each
    for (title, (steps, curves, words)), axes in zip(shown.items(), grid.T):
        axes[0].set_title(title)
        for axis, (label, values) in zip(axes, curves.items()):
            axis.plot(steps, values, marker='.')
            axis.set_ylabel(label.replace(', ', '\n'))
        stages = np.linspace(0, len(steps) - 1, 5).round().astype(int)
        axes[-1].set_xticks([steps[i] for i in stages],
                            [f'{steps[i]:,}\n{words[i]}' for i in stages], parse_math=False)
        axes[-1].set_xlabel('step' + ', and what it fires on' * bool(options.feature))
    figure.savefig(options.plot)
    yield f'timeline of {", ".join(shown)} -> {options.plot}'

def why_numbers(options):
    """The numbers of --why=true: those of why_token, and answer, its target as text."""
    layers, run = [scan.layer for scan in options.of_layer(options.index)], options.run
    target = run.tokenizer.encode(options.target, allowed_special='all')
    d = explain.why_token(run.model, encode(run, options.prompt), target, layers)
    return d | dict(answer=caption(b''.join(run.names[token] for token in d['target'])))

def why_view(options):
    d = why_numbers(options)
    yield bold(f"Why {d['answer']}: probability {percent(math.exp(d['base']))}")
    yield from effects(d, f"log p({d['answer']})", options.index)
    yield heading('Likeliest next tokens')
    yield line('  ', '  '.join(f'{caption(options.run.names[token])} {percent(p)}'
                               for token, p in d['likeliest']))

def why_feature_view(scan, f, options):
    if scan.layer == min(options.index):
        raise ValueError(f"{name(scan, f)}: no SAE lies below block {scan.layer}, no features "
                         "made it fire, only tokens: see --feature")
    top = feature_numbers(scan, f, options.seed)['top']
    if not top:
        raise ValueError(f"{name(scan, f)} fires nowhere in the scan, or only on first and "
                         "last tokens of a window and on end-of-text: nothing to explain")
    peak = top[0]['where']
    tokens = scan.tokens[peak // scan.T * scan.T:peak + 1].tolist()
    d = explain.why_feature(options.run.model, tokens, scan.layer, f)
    yield bold(f"Why {name(scan, f)} fires with {number(d['base'])} at token {peak:,}")
    yield one_line(scan, top[0], scan.max[f], options.console.width)
    yield from effects(d, 'its activation', options.index)

def effects(d, what, index):
    """The tables of d, numbers of explain.py. what: the measure, in words."""
    yield dim(f"{len(d['idx']):,} tokens are read; of {d['active']:,} active features "
              f"{len(d['effects'])} are taken away, one at a time: those with the largest gradient "
              "times activation")
    for title, verb, some in (('For', 'falls', d['pro']), ('Against', 'rises', d['con'])):
        rows = []
        for change, layer, f, at in some:
            scan = index[layer]
            t, act = max(at, key=lambda place: place[1])
            others = f' +{len(at) - 1}' if len(at) > 1 else ''
            rows.append((f'{change:+.4f}', bold(name(scan, f)), number(act),
                         caption(scan.names[d['idx'][t]]) + others,
                         words_of(scan, f) or captions(scan, f)))
        if rows:
            yield heading(title, f'without the feature, wherever it fires, {what} {verb}')
            yield table_of(('change', 'feature', 'strongest', 'token', 'words'), rows)
    yield heading('Together', 'taken away at once')
    yield f"  the first {len(d['pro'])} for it   {d['together']:+.4f}"
    yield f"  all features      {d['whole']:+.4f}"
    yield dim('  ' + d['passes'].replace(': ', ':\n  '))

def trace_view(scan, f, options):
    above = next((s for layer, s in options.index.items() if layer > scan.layer), None)
    if above is None:
        raise ValueError(f"{name(scan, f)}: no SAE lies above block {scan.layer}; "
                         "train with several, --sae_layers=1,2 say")
    d = explain.trace(options.run.model, scan, above, f, options.seed)
    share, as_it_is, without = d['share'], d['as_it_is'], d['without']       # (F,)
    change = as_it_is - without
    yield bold(f'What {name(scan, f)} does in block {above.layer}')
    yield line('  ', captions(scan, f))
    yield dim(f"mean activations over {d['positions']:,} positions where it fires, in "
              f"{d['windows']} windows")
    for title, note, score in (('Fires with', 'positions with both / either', share),
                               ('Causes', 'without it these are weaker', change),
                               ('Holds down', 'without it these are stronger', -change)):
        some = np.argsort(-score, kind='stable')[:options.rows]
        rows = [(above, g, f'{share[g]:.3f}', f'{as_it_is[g]:.4f}', f'{without[g]:.4f}')
                for g in some if score[g] > 0]
        yield from feature_table(title, note, ('both', 'with it', 'without'), rows)

def sorted_view(scan, options):
    title, some = f'SAE of block {scan.layer}', in_order(scan, options.sort)[:options.rows]
    said = words_of if options.sort == 'coherence' else captions
    yield from listing(title, f'live features by {options.sort}', scan, some, said)

def find_view(scan, options):
    text = safe(options.find.encode('utf-8', 'surrogateescape'))
    precision, recall, n, n_tokens = find(scan, re.compile(options.find, re.M))
    f1 = 2 * precision * recall / np.maximum(1e-12, precision + recall)
    yield bold(f"/{text}/ in the {scan.N:,} tokens scanned: {n:,} matches, {n_tokens:,} tokens")
    some = np.argsort(-f1, kind='stable')[:options.rows]
    rows = [(scan, f, f'{scan.count[f]:,}', f'{precision[f]:.3f}', f'{recall[f]:.3f}',
             f'{f1[f]:.3f}') for f in some if f1[f] > 0]
    note = 'precision: its firings in a match; recall: matches where it fires'
    yield from feature_table('Features', note, ('fires', 'precision', 'recall', 'F1'), rows)

def probe_view(options):
    labels, texts = read_labels(options.probe)               # before a scan may be needed
    y, note = np.array(labels, object), 'k=1, first split'
    yield bold(f'Probe: {len(y):,} texts of {len(set(y))} labels')
    yield dim('held-out accuracy in % of a logistic regression on the k best of mean codes (A: '
              'ranked unscaled); one label against the rest, chance 50; ± over 3 splits')
    for scan in options.of_layer(options.index):
        pooled, rows = pooled_codes(options.run, scan.layer, texts, options.seed), []
        width = pooled['channels'].shape[1]                  # with as many, all channels
        columns = [('B', 1), ('B', 5), ('B', 20), ('B', width), ('A', 1)]
        found = {code: probe(X, y, options.seed, columns) for code, X in pooled.items()}
        for code, (scores, _) in found.items():
            means = [100 * score.mean(0) for score in scores.values()]       # (splits,) each
            rows.append((code, *(f'{score.mean():.1f} ±{score.std():.1f}' for score in means)))
        yield heading(f'SAE of block {scan.layer}')
        yield table_of(('code', 'k=1', 'k=5', 'k=20', f'k={width}', 'A, k=1'), rows)
        scores, best = found['features']
        rows = [(scan, f, f'{100 * score:.1f} %', caption(label.encode()))
                for (label, f), score in zip(best.items(), scores['B', 1][:, 0])]
        yield from feature_table('The best feature of each label', note, ('alone', 'label'), rows)

# ---------------------------------------------------------------------------------- HTML and export

def page(options):
    """One static file: assets/viewer.html with its data put in."""
    index, prompt, why = options.index, None, None
    scans = options.of_layer(index)
    scan = scans[0]
    words = [safe(raw) for raw in scan.names]
    texts = lambda some: [(words[token], x) for token, x in some]
    if options.feature:
        features = options.features('feature')
    elif options.prompt:
        prompt = options.prompt_tokens
        seen = {(scan.layer, f) for scan in scans for _, by_layer in prompt
                for f, _ in by_layer[scan.layer]}
        if options.why:
            why = why_numbers(options)
            seen |= {(layer, f) for _, layer, f, _ in why['pro'] + why['con']}
            why |= dict(tokens=[words[token] for token in why['idx']],
                        likeliest=texts(why['likeliest']), tried=len(why.pop('effects')))
        features = [(index[layer], f) for layer, f in sorted(seen)]
    else:
        features = [(scan, f) for scan in scans for f in np.flatnonzero(scan.count).tolist()]
    data = {key: getattr(scan, key) for key in ('step', 'place', 'F', 'K', 'N', 'dataset')}
    data |= dict(shown_from=SHOWN_FROM, sort=options.sort, why=why,
                 layers={layer: overview_numbers(scan) | dict(concepts=by_concept(scan)[:20])
                         for layer, scan in index.items()}, prompt=prompt and texts(prompt))
    data['features'] = []
    for scan, f in tracked(features, "writing"):
        d = options.numbers(scan, f)
        d |= {kind: texts(d[kind]) for kind in ('fires_on', 'up', 'down')}
        for kind in ('top', 'random'):
            d[kind] = [for_page(scan, c) for c in d[kind][:options.examples]]
        d['intervals'] = [(*interval, c and for_page(scan, c)) for *interval, c in d['intervals']]
        if d['timeline']:
            d['timeline']['tokens'] = [words[token] for token in d['timeline']['tokens'][-1]]
        data['features'].append(d)
    text = json.dumps(data, separators=(',', ':'))
    text = text.replace('<', '\\u003c')      # no tag in it can end the script
    text = TEMPLATE.read_text('utf-8').replace('"DATA"', text, 1).encode()
    write_whole(options.html, lambda file: file.write(text))
    yield f'features: {len(features):,} -> {options.html}, {len(text) / 1e6:.2f} MB'

def for_page(scan, context):
    """[text, or (text, activation, is it the peak) where the feature fires, ...], where, times."""
    parts = [(text, float(f'{act:.4g}'), peak) if act else text
             for text, act, peak in pieces(scan, context)]
    return parts, context['where'], context['times']

# {the options that choose it, in alphabetical order: (the view, what it is called for)}. It is
# called once for each SAE of the index or of the timelines, or for each feature that the named
# option lists; None: once
VIEWS = {
    '': (overview, 'index'),
    'export': (export, None),
    'feature': (feature_view, 'feature'),
    'feature timeline': (feature_timeline_view, 'feature'),
    'find': (find_view, 'index'),
    'probe': (probe_view, None),
    'prompt': (prompt_view, 'index'),
    'prompt why': (why_view, None),
    'sort': (sorted_view, 'index'),
    'timeline': (timeline_view, 'timelines'),
    'trace': (trace_view, 'trace'),
    'why': (why_feature_view, 'why'),
}
for names in 'html', 'feature html', 'html prompt', 'html prompt why', 'html sort':
    VIEWS[names] = page, None
for names in 'plot', 'feature plot', 'plot timeline', 'feature plot timeline':
    VIEWS[names] = plot_view, None

def look(options):
    """Shows what the options ask for."""
    options.prompt = prompt_text(options)
    names = sorted(key for key in set(' '.join(VIEWS).split()) if getattr(options, key))
    if ' '.join(names) not in VIEWS:
        raise ValueError(f"{' and '.join(names)} do not go together: choose one view; html takes "
                         "feature, prompt or sort beside it, timeline and plot take feature, why "
                         "takes prompt")
    if (options.timeline or options.plot) and not options.timelines:
        raise ValueError(f"there are no snapshots in {options.out_dir}/features: train.py writes "
                         "one at each eval")
    view, each = VIEWS[' '.join(names)]
    subjects = [()]
    if each in ('index', 'timelines'):
        subjects = [(sae,) for sae in options.of_layer(getattr(options, each))]
    elif each:
        subjects = options.features(each)
    for subject in subjects:
        show(options.console, [*view(*subject, options), ''])

def main(argv):
    options = configurator.configure(DEFAULTS, argv, problems)
    configurator.run(look, Options(console=screen(), **options))

if __name__ == '__main__':
    main(sys.argv[1:])
