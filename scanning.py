"""
The scan: one pass of the model over val, the index that it leaves in out_dir, and what the viewer
finds there: the numbers of one feature, of a regular expression.

Where a `track` is asked for: rich.progress.track, or what stands for it.
Shapes: B windows, T tokens of a window, N scanned tokens, F features, K active a token, S SAEs, C
n_embd, V vocabulary, P places where a feature fires.
"""
import functools
import json
import math
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import normalize

from data.dataset import eval_batches, load_dataset, load_meta
from features import (VERSION, codes, device_of, keep, load_npz, open_run, other_tokenizer, safe,
                      say, token_statistics)

TOP, RANDOM, SIDE = 16, 8, 16 # contexts kept of a feature; tokens on either side of a peak
BINS, INTERVALS = 32, 8       # of its activations, from 0 to a power of two
SHOWN_FROM = 20               # with fewer firings an entropy says little
ORDERS = ('coherence', 'entropy', 'density')

def scan_val(run, wanted, key, track):
    """
    Reads about `wanted` tokens of val, in windows of block_size -> what index.npz keeps:
      tokens    (N,)         those
      features  (S, N, K)    the features active on each; F where a slot is not active
      values    (S, N, K)    their activations
      the statistics of each SAE (S, F, ...), and meta as JSON, with key, the checkpoint
    """
    model, config, saes = run.model, run.model.config, run.model.saes()
    device, T, V, F = device_of(model), config.block_size, config.vocab_size, config.n_features
    site = next(iter(saes.values())).site
    B = max(1, min((32_768 if device.type == 'cuda' else 4096) // T, wanted // T))
    folder, _, _ = load_meta(run.dataset, run.checkpoint.get('data_sha256'))
    data = load_dataset(folder)
    val = data.val
    if other := other_tokenizer(run):                        # its text, as this model reads it
        text = other.decode(val[:4 * wanted].tolist())
        val = np.array(run.tokenizer.encode(text, allowed_special='all'))
    batches = [x for x, _ in eval_batches(val, T, B, wanted)]
    tokens, features, values, fvu = codes(model, track(batches, "scanning"))
    wte = model.transformer.wte.weight[:V].detach().float()                  # (V, C)
    found = []
    for s, layer in enumerate(saes):
        writes = model.writes(layer).detach().float()                        # (F, C)
        found.append(scan_statistics(values[s], features[s], tokens, writes, wte))
        where, count = found[-1]['order'] // features.shape[2], found[-1]['count']
        found[-1] |= concepts(count, len(tokens), types_by(where, count, tokens), tokens, run.names)
    arrays = {name: np.stack([x[name] for x in found]) for name in found[0]} # (S, F, ...)
    arrays |= dict(tokens=tokens, features=features, values=values, fvu=fvu)
    eot = -1 if run.meta['eot'] is None else run.meta['eot']
    names = [raw.decode('latin-1') for raw in run.names]                     # JSON holds no bytes
    meta = dict(version=VERSION, key=key, step=run.checkpoint['step'], layers=list(saes),
                site=site.name, place=site.place, F=F, K=features.shape[2], T=T, N=len(tokens),
                eot=eot, wanted=wanted, dataset=str(run.dataset),
                val_sha256=data.meta['val_sha256'], trained_on=run.checkpoint['dataset'],
                names=names)
    return arrays | dict(meta=json.dumps(meta))

def types_by(where, count, tokens):
    """f -> the token types on which feature f fires, and how often; where: feature by feature."""
    fires_on = np.split(tokens[where[:count.sum()]], np.cumsum(count)[:-1])
    return lambda f: np.unique(fires_on[f], return_counts=True)

def scan_statistics(values, features, tokens, writes, wte):
    """
    Of one SAE: values and features (N, K), F where a slot is not active; tokens (N,); writes
    (F, C); wte (V, C). Adds to token_statistics
      order (N * K,)   the slots n * K + k sorted by feature: where each one fires
      max, rank (F,)   the largest activation; the place by entropy, of equals the densest first
      up, down, near   the next tokens that a feature promotes and suppresses, and the features
                       that write most like it, each with its values
    """
    F, V = len(writes), len(wte)
    found = token_statistics(features, tokens, F, V)
    order = np.argsort(features.reshape(-1), kind='stable')
    found['order'] = order.astype(np.uint32)
    found['max'] = np.zeros(F, np.float32)
    np.maximum.at(found['max'], features[features < F], np.abs(values[features < F]))
    by_entropy = np.lexsort((-found['count'], found['entropy']))             # nan comes last
    found['rank'] = np.where(found['count'] > 0, by_entropy.argsort() + 1, 0)
    unit = normalize(writes, dim=-1)
    parts = dict(up=[], down=[], near=[])
    for rows in torch.arange(F, device=writes.device).split(1024):
        logits = writes[rows] @ wte.T                                        # (rows, V)
        cosine = unit[rows] @ unit.T                                         # (rows, F)
        cosine[torch.arange(len(rows)), rows] = -2                           # itself
        parts['up'].append(logits.topk(min(10, V)))
        parts['down'].append(logits.topk(min(10, V), largest=False))
        parts['near'].append(cosine.topk(min(5, F - 1)))
    for name, tops in parts.items():
        found[name] = torch.cat([top.indices for top in tops]).int().cpu().numpy()
        found[f'{name}_value'] = torch.cat([top.values for top in tops]).cpu().numpy()
    return found

def concepts(count, N, types_of, tokens, names):
    """
    What makes features nameable, found without labels or a judge: of each that fires 20 times or
    more and on at most 2 % of N positions, the words on which it fires far more often than they
    occur, and how far these keep company. count (F,); types_of(f): the token types on which f
    fires, and how often on each; tokens (n,): a text, in which words meet; names (V,) bytes ->
      words (F, 8)     token types of three letters or more, on which it fires 3 times or more, by
                       count * log(share of its firings / share of all tokens), one a stem; -1: none
      coherence (F,)   mean over pairs of words of NPMI = log(p_ab / p_a p_b) / -log p_ab in windows
                       of 64 tokens, -1 for two that never meet (Lau 2014, Roeder 2015); nan with
                       fewer than 4 words
      word_share (F,)  of its firings, on words of three letters or more
    """
    is_word = np.array([bool(re.fullmatch(rb' ?[A-Za-z]{3,}', raw)) for raw in names])
    often = np.bincount(tokens, minlength=len(names)).clip(1) / len(tokens)  # (V,)
    window = np.arange(len(tokens)) // 64

    @functools.cache
    def windows_with(token):
        return np.bincount(window[tokens == token], minlength=window[-1] + 1) > 0

    words = np.full((len(count), 8), -1, np.int32)
    coherence = np.full(len(count), np.nan, np.float32)
    word_share = np.zeros(len(count), np.float32)
    for f in np.flatnonzero((count >= 20) & (count <= 0.02 * N)):
        types, times = types_of(f)
        types, times = types[is_word[types]], times[is_word[types]]
        word_share[f] = times.sum() / count[f]
        score = times * np.log(times / count[f] / often[types])
        chosen = {}
        for i in np.argsort(-score, kind='stable'):
            if times[i] >= 3 and score[i] > 0 and len(chosen) < 8:
                chosen.setdefault(names[types[i]].strip().lower()[:5], types[i])
        chosen = list(chosen.values())
        words[f, :len(chosen)] = chosen
        if len(chosen) >= 4:
            present = np.stack([windows_with(token) for token in chosen]).astype(np.float32)
            joint = present @ present.T / len(present[0])                    # (n, n)
            alone = joint.diagonal()
            with np.errstate(divide='ignore', invalid='ignore'):
                npmi = np.log(joint / np.outer(alone, alone)) / -np.log(joint)
            npmi = np.where(joint == 0, -1, np.where(joint == 1, 1, npmi))
            coherence[f] = npmi[np.triu_indices(len(chosen), 1)].mean()
    return dict(words=words, coherence=coherence, word_share=word_share)

def timeline_curves(scan, timeline):
    """
    {label: one number a snapshot}: how an SAE's features moved. Coherence is that of concepts, but
    of the 8 tokens on which a feature fires most: a snapshot holds no others.
    """
    curves = {'live, % of the features': [], 'token entropy, median bits': [],
              'coherence, mean': []}
    live_share, entropy, coherence = curves.values()
    for count, bits, tokens, times in zip(timeline.count, timeline.entropy, timeline.top_tokens,
                                          timeline.top_counts):              # (F,), (F,), (F, 8)
        types_of = lambda f: (tokens[f][times[f] > 0], times[f][times[f] > 0])
        found = concepts(count, timeline.probed, types_of, scan.tokens, scan.names)
        some = found['coherence'][~np.isnan(found['coherence'])]
        live_share.append(100 * (count > 0).mean())
        entropy.append(np.median(bits[count > 0]) if count.any() else np.nan)
        coherence.append(some.mean() if len(some) else np.nan)
    return curves

def concept_value(scan):
    """(F,): how nameable: coherence times the share of firings on words; nan without coherence."""
    return scan.coherence * scan.word_share

def by_concept(scan):
    """Live features, the most nameable first. Of those that share more than half of their words the
    first one is there alone."""
    value = np.nan_to_num(concept_value(scan), nan=-1)
    shown, seen = [], []
    for f in np.argsort(-value, kind='stable'):
        words = set(scan.words[f].tolist()) - {-1}
        if value[f] > 0 and all(len(words & others) <= len(words) / 2 for others in seen):
            shown.append(int(f))
            seen.append(words)
    return shown

def concept_numbers(scan, f):
    """A feature's words, coherence (None without), and its place among those that have one."""
    value = concept_value(scan)
    coherence = None if np.isnan(scan.coherence[f]) else float(scan.coherence[f])
    return dict(words=words_of(scan, f), coherence=coherence,
                concept_rank=1 + int((value > value[f]).sum()),
                concepts=int((~np.isnan(value)).sum()))

def in_order(scan, order):
    """Live features by one of ORDERS, the best first: coherence, low entropy, high density."""
    live = np.flatnonzero(scan.count)
    coherence = np.nan_to_num(scan.coherence, nan=-2)
    entropy = scan.rank + scan.F * (scan.count < SHOWN_FROM)
    worst = dict(coherence=-coherence, entropy=entropy, density=-scan.count)[order]
    return live[np.argsort(worst[live], kind='stable')]

def words_of(scan, f):
    """The words on which a feature fires far more often than they occur, as text."""
    return ', '.join(safe(scan.names[token]).strip() for token in scan.words[f] if token >= 0)

def read_index(arrays):
    """
    Of the arrays of index.npz {block: the scan of its SAE}, whose attributes are
      layer, and what scan_val calls meta: step, site, F, K, T, N, dataset, names (bytes), ...
      count, entropy, rank, max (F,), fvu, top_tokens, up, up_value, ...: statistics
      tokens (N,), features, values (N, K), order (N * K,): what fires where
      first (F,): where in order a feature begins
    {} where they are missing or of another version.
    """
    meta = json.loads(str(arrays.pop('meta', '{}')))
    if meta.get('version') != VERSION:
        return {}
    meta['names'] = [text.encode('latin-1') for text in meta['names']]
    meta['tokens'] = arrays.pop('tokens')
    index = {}
    for s, layer in enumerate(meta['layers']):
        scan = SimpleNamespace(layer=layer, **meta, **{name: x[s] for name, x in arrays.items()})
        scan.first = np.cumsum(scan.count) - scan.count
        index[layer] = scan
    return index

def open_index(out_dir, dataset, device, scan_tokens, track):
    """
    read_index of out_dir/index.npz, after a scan where there is none that fits. dataset '' is that
    of training, scan_tokens 0 takes what the index has. Raises ValueError, one sentence.
    """
    path, key = Path(out_dir) / 'index.npz', []
    index = read_index(load_npz(path))
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(Path(out_dir) / 'ckpt.pt') as z:
        key = [item.CRC for item in z.infolist()]            # the content, without reading it
    why = "there is no index of this version that is whole"
    for scan in list(index.values())[:1]:
        why = f"the index is of step {scan.step:,}, {scan.wanted:,} tokens of {scan.dataset}"
        if scan_tokens in (scan.wanted, 0):
            if not key and dataset in (scan.dataset, ''):
                say(f"note: no checkpoint in {out_dir} that can be read; {why}")
                return index
            if key == scan.key and is_of(scan, dataset or scan.trained_on):
                return index
    run = open_run(out_dir, dataset, device)
    say(f"{why}: scanning")
    gpu = device_of(run.model).type == 'cuda'
    arrays = scan_val(run, scan_tokens or (1_048_576 if gpu else 131_072), key, track)
    keep(path, arrays, np.savez)
    return read_index(arrays)

def is_of(scan, dataset):
    """Whether a scan is of the val that a data set has now; of one that is gone, by its name."""
    try:
        return load_meta(dataset)[1]['val_sha256'] == scan.val_sha256
    except ValueError:
        return dataset == scan.dataset

# --------------------------------------------------------------------------------------------------
# numbers of the views, from the scan of an SAE

def overview_numbers(scan):
    """The numbers of an SAE's overview."""
    live = scan.count > 0
    density, bits = scan.count[live] / scan.N, scan.entropy[live]
    top = math.ceil(bits.max(initial=1))
    busiest = np.sort(scan.count)[-math.ceil(scan.F / 100):].sum()
    return dict(live=int(live.sum()), dead=int((~live).sum()), fvu=float(scan.fvu),
                l0=float(scan.count.sum() / scan.N), top_entropy=top,
                busiest=float(busiest / max(1, scan.count.sum())),
                entropies=np.histogram(bits, 32, (0, top))[0].tolist(),
                densities=np.histogram(np.log10(density).clip(-6), 32, (-6, 0))[0].tolist())

def fires_on(scan, f):
    """The 8 tokens on which a feature fires most, with their shares of its firings."""
    pairs = zip(scan.top_tokens[f].tolist(), scan.top_counts[f].tolist())
    return [(token, times / int(scan.count[f])) for token, times in pairs if token >= 0]

def firings(scan, f):
    """Where a feature fires: positions (P,), ascending, and activations (P,)."""
    slots = scan.order[scan.first[f]:scan.first[f] + scan.count[f]]
    return slots.astype(np.int64) // scan.K, scan.values.reshape(-1)[slots]

def joint(scan, where):
    """(F,): of the positions where a feature fires or `where` (P,) is, the share that has both."""
    both = np.bincount(scan.features[where].reshape(-1), minlength=scan.F + 1)[:scan.F]
    return both / np.maximum(1, scan.count + len(where) - both)

def feature_numbers(scan, f, seed):
    """
    Every number of one feature's view; tokens are ids.
      top, random   contexts by activation, and drawn uniformly; at most one a window, equal texts
                    folded. A peak is never the first or last token of a window nor end-of-text,
                    whose activations are often freakish
      intervals     (low, high, share of the firings, a context or None), eighths of (0, R]
      joint         the features that fire with it: positions with both / with either
    """
    where, acts = firings(scan, f)                                           # (P,), (P,)
    size, count = np.abs(acts), len(where)
    R = 2.0 ** math.frexp(scan.max[f])[1]                    # the power of two above the largest
    bins = np.minimum(BINS * size / R, BINS - 1).astype(int)                 # (P,)
    inner = (where % scan.T > 0) & (where % scan.T < scan.T - 1)
    peaks = np.flatnonzero(inner & (scan.tokens[where] != scan.eot))
    drawn = np.random.default_rng((seed, scan.layer, f)).permutation(peaks)
    strongest_first = peaks[np.argsort(-size[peaks], kind='stable')]
    intervals = []
    for j in reversed(range(INTERVALS)):
        inside = bins * INTERVALS // BINS == j                               # (P,)
        some = where[drawn[inside[drawn]]]                   # the last: random has the first
        if inside.any():
            example = context(scan, where, acts, int(some[-1])) if len(some) else None
            intervals.append((j * R / INTERVALS, (j + 1) * R / INTERVALS, float(inside.mean()),
                              example))
    share = joint(scan, where)                                               # (F,)
    share[f] = -1
    together = np.argsort(-share, kind='stable')[:min(5, scan.F - 1)]
    pairs = {name: list(zip(getattr(scan, name)[f].tolist(),
                            getattr(scan, f'{name}_value')[f].tolist()))
             for name in ('up', 'down', 'near')}
    if scan.site == 'stream':
        pairs['near'] = []                                   # channels are orthogonal
    return dict(
        layer=scan.layer, f=f, count=count, density=count / scan.N, rank=int(scan.rank[f]),
        max=float(scan.max[f]), mean=float(acts.mean()) if count else 0.0, R=R,
        entropy=float(scan.entropy[f]) if count else None, fires_on=fires_on(scan, f), **pairs,
        hist=np.bincount(bins, minlength=BINS).tolist(), intervals=intervals,
        joint=list(zip(together.tolist(), share[together].tolist())),
        top=contexts(scan, where, acts, where[strongest_first], TOP),
        random=contexts(scan, where, acts, where[drawn], RANDOM))

def contexts(scan, where, acts, peaks, n):
    """
    The contexts of the first peak in each of the first n windows that peaks visit. Those with the
    same text around the peak are one, counted in `times`.
    """
    windows, found = set(), {}
    for peak in map(int, peaks):
        if peak // scan.T not in windows:
            c = context(scan, where, acts, peak)
            text = tuple(c['tokens'][max(0, c['peak'] - 8):c['peak'] + 5])
            found.setdefault(text, c)['times'] += 1
            windows.add(peak // scan.T)
        if len(windows) == n:
            break
    return list(found.values())

def context(scan, where, acts, peak):
    """The text around a peak, no further than its window. where, acts: the feature's firings."""
    window = peak // scan.T * scan.T
    begin, end = max(window, peak - SIDE), min(window + scan.T, peak + SIDE + 1)
    around = np.zeros(end - begin, np.float32)
    inside = slice(*np.searchsorted(where, (begin, end)))
    around[where[inside] - begin] = acts[inside]
    return dict(tokens=scan.tokens[begin:end].tolist(), acts=around.tolist(), peak=peak - begin,
                where=peak, times=0)

def find(scan, pattern):
    """
    Arrays (F,): precision, the share of a feature's firings that lie inside a match, and recall,
    the share of matches on some token of which it fires; and the numbers of matches and of tokens
    inside them, i.e. with any byte inside. pattern: a compiled regular expression. It sees one
    document at a time, and where a window cuts that, a character 0 in place of the unknown: there
    is no line's beginning or end.
    """
    inside, recalled, n = np.zeros(scan.N, bool), np.zeros(scan.F + 1, int), 0
    starts = np.union1d(np.arange(0, scan.N, scan.T), np.flatnonzero(scan.tokens == scan.eot))
    for start, end in zip(starts, [*starts[1:], scan.N]):
        pieces = [scan.names[token] for token in scan.tokens[start:end].tolist()]
        before, after = '\0', '\0'
        if scan.tokens[start] == scan.eot:
            pieces[0], before = b'', ''
        if end % scan.T:                                     # an end-of-text token is there
            after = ''
        ends = np.cumsum([len(piece) for piece in pieces])   # of the tokens, in bytes
        text = b''.join(pieces).decode('utf-8', 'surrogateescape')
        for match in pattern.finditer(before + text + after, len(before)):
            begin, stop = (at - len(before) for at in match.span())
            left, word = (part.encode('utf-8', 'surrogateescape')
                          for part in (text[:begin], text[begin:stop]))
            if word:
                bounds = len(left), len(left) + len(word) - 1
                first, last = start + np.searchsorted(ends, bounds, 'right')
                inside[first:last + 1] = True
                recalled[scan.features[first:last + 1]] += 1 # once each, however often it fires
                n += 1
    hits = np.bincount(scan.features[inside].reshape(-1), minlength=scan.F + 1)[:scan.F]
    return hits / np.maximum(1, scan.count), recalled[:scan.F] / max(1, n), n, int(inside.sum())
