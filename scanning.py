"""
The scan: one pass of the model over val, the index that it leaves in out_dir, and what the viewer
finds there: the numbers of one feature, of a regular expression. Shapes: see features.py.
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

from data.dataset import encode_encoding, eval_batches, load_dataset, load_tokenizer
from features import (VERSION, codes, device_of, keep, load_npz, of_layer, open_run, safe, say,
                      token_pairs, token_statistics, tracked)
from sae import SITES

TOP, RANDOM, SIDE = 16, 8, 16 # contexts kept of a feature; tokens on either side of a peak
BINS, INTERVALS = 32, 8       # of its activations, from 0 to the largest
SHOWN_FROM = 20               # with fewer firings an entropy says little
ORDERS = ('coherence', 'entropy', 'density')

def val_of(run, wanted):
    """The val of run.dataset and its sha256. Where another tokenizer made it, which is said, about
    `wanted` tokens of it are encoded anew with the model's own. Raises ValueError."""
    data = load_dataset(run.dataset)
    val, other = data.val, load_tokenizer(data)
    if encode_encoding(other) != encode_encoding(run.tokenizer):
        say(f"note: {run.dataset} has another tokenizer than this model was trained with: the "
            "model's own is used")
        text = other.decode(val[:4 * wanted].tolist())
        val = np.array(run.tokenizer.encode(text, allowed_special='all'))
    return val, data.meta['val_sha256']

def scan_val(run, wanted, key):
    """
    Reads about `wanted` tokens of val, in windows of block_size -> the arrays of index.npz:
      tokens (N,)
      meta                     all else, as JSON; key, the checkpoint's, is in it
    and of the SAE of each block, as L<block>.name, fvu, what token_statistics, concepts and writing
    return, and
      features, values (N, K)  which are active on each token, F where a slot is not; how strongly
      order (N * K,)           the slots n * K + k sorted by feature: where each one fires
      max, rank (F,)           largest activation; place by entropy, of equals the densest first
    """
    model, T, F = run.model, run.model.config.block_size, run.model.config.n_features
    at_once = 32_768 if device_of(model).type == 'cuda' else 4096
    val, sha256 = val_of(run, wanted)
    batches = [x for x, _ in eval_batches(val, T, max(1, min(at_once, wanted) // T), wanted)]
    tokens, *by_layer = codes(model, tracked(batches, "scanning"))
    arrays = dict(tokens=tokens)
    for layer, features, values, fvu in zip(model.saes(), *by_layer):
        pairs = token_pairs(features, tokens, F, len(run.names))
        found = writing(model, layer) | token_statistics(pairs, F)
        count, active = found['count'], features < F
        found |= concepts(count, len(tokens), pairs, tokens, run.names)
        order = np.argsort(features.reshape(-1), kind='stable').astype(np.uint32)
        largest = np.zeros(F, np.float32)
        np.maximum.at(largest, features[active], values[active])
        by_entropy = np.lexsort((-count, found['entropy']))                  # nan comes last
        rank = np.where(count > 0, by_entropy.argsort() + 1, 0)
        found |= dict(features=features, values=values, fvu=fvu, order=order, max=largest,
                      rank=rank)
        arrays |= {f'L{layer}.{name}': x for name, x in found.items()}
    place, eot = SITES[model.config.sae_site].place, run.meta['eot']
    names = [raw.decode('latin-1') for raw in run.names]                     # JSON holds no bytes
    meta = dict(version=VERSION, key=key, step=run.checkpoint['step'], layers=list(model.saes()),
                place=place, F=F, K=features.shape[1], T=T, N=len(tokens),
                eot=-1 if eot is None else eot, wanted=wanted, dataset=str(run.dataset),
                val_sha256=sha256, trained_on=run.checkpoint['dataset'], names=names)
    return arrays | dict(meta=json.dumps(meta))

@torch.no_grad()
def writing(model, layer):
    """Of the features of a block's SAE: up, down (F, 10), the next tokens that each promotes and
    suppresses; near (F, 6), the features that write most like it, itself among them; and up_value,
    down_value, in logits a unit of activation, near_value, a cosine."""
    wte = model.transformer.wte.weight[:model.config.vocab_size].float()     # (V, C)
    writes = model.writes(layer).float()                                     # (F, C)
    unit, found = normalize(writes, dim=-1), {}
    for name, a, b, n in (('up', writes, wte, 10), ('down', -writes, wte, 10),
                          ('near', unit, unit, 6)):
        tops = [(rows @ b.T).topk(min(n, len(b))) for rows in a.split(1024)]
        values, indices = map(torch.cat, zip(*tops))
        found |= {name: indices.int().cpu().numpy(), f'{name}_value': values.cpu().numpy()}
    found['down_value'] *= -1
    return found

def concepts(count, N, pairs, tokens, names):
    """
    What makes features nameable, found without labels or a judge: of each that fires 20 times or
    more and on at most 2 % of N positions, the words on which it fires far more often than they
    occur, and how far these keep company. count (F,); pairs: f, token, times (P,), as of
    token_pairs; tokens (n,): a text, in which words meet; names (V,) bytes ->
      words (F, 8)     token types of three letters or more, on which it fires 3 times or more, by
                       count * log(share of its firings / share of all tokens), one a stem; -1: none
      coherence (F,)   mean over pairs of words of NPMI = log(p_ab / p_a p_b) / -log p_ab in windows
                       of 64 tokens, -1 for two that never meet (Lau 2014, Roeder 2015); nan with
                       fewer than 4 words
      concept (F,)     how nameable: (1 + coherence) times the square of what its words tell, the
                       sum of their count * log(...) over its firings, times the root of how many
                       words these are, exp of the entropy of their counts
    """
    is_word = np.array([bool(re.fullmatch(rb' ?[A-Za-z]{3,}', raw)) for raw in names])
    often = np.bincount(tokens, minlength=len(names)).clip(1) / len(tokens)  # (V,)
    window = np.arange(len(tokens)) // 64

    @functools.cache
    def windows_with(token):
        return np.bincount(window[tokens == token], minlength=window[-1] + 1) > 0

    f, token, times = (x[is_word[pairs[1]]] for x in pairs)
    score = times * np.log(times / count[f] / often[token])
    tells = (times >= 3) & (score > 0) & (count[f] >= 20) & (count[f] <= 0.02 * N)
    order = np.lexsort((-score, f))                          # by feature, the best word first
    stems = {}                                               # {feature: {stem: its best pair}}
    for pair in order[tells[order]].tolist():
        stem = names[token[pair]].strip().lower()[:5]
        stems.setdefault(f[pair], {}).setdefault(stem, pair)
    words = np.full((len(count), 8), -1, np.int32)
    coherence, concept = np.full((2, len(count)), np.nan, np.float32)
    for feature, by_stem in stems.items():
        best = list(by_stem.values())[:8]
        words[feature, :len(best)] = token[best]
        if len(best) < 4:
            continue
        present = np.stack(list(map(windows_with, token[best]))).astype(np.float32)
        both = present @ present.T / len(present[0])                         # (n, n)
        alone = both.diagonal()
        with np.errstate(divide='ignore', invalid='ignore'):
            npmi = np.log(both / np.outer(alone, alone)) / -np.log(both)
        npmi = np.where(both == 0, -1, np.where(both == 1, 1, npmi))
        coherence[feature] = npmi[np.triu_indices(len(best), 1)].mean()
        told = score[best].sum() / count[feature]
        share = times[best] / times[best].sum()
        several = np.exp(-(share * np.log(share)).sum())
        concept[feature] = (1 + coherence[feature]) * told ** 2 * several ** 0.5
    return dict(words=words, coherence=coherence, concept=concept)

def coherence_curve(scan, timeline):
    """Mean coherence of an SAE's features at each snapshot, by the 8 tokens on which each fires
    most: a snapshot holds no others."""
    curve = []
    for count, tokens, times in zip(timeline.count, timeline.top_tokens, timeline.top_counts):
        pairs = np.nonzero(times)[0], tokens[times > 0], times[times > 0]
        found = concepts(count, timeline.probed, pairs, scan.tokens, scan.names)['coherence']
        some = found[~np.isnan(found)]
        curve.append(some.mean() if len(some) else np.nan)
    return curve

def by_concept(scan):
    """Live features, the most nameable first. Of those that share more than a third of their words
    the first one is there alone."""
    shown = {}                                               # {feature: its words}
    nameable = np.flatnonzero(scan.concept > 0)
    for f in nameable[np.argsort(-scan.concept[nameable], kind='stable')].tolist():
        words = set(scan.words[f].tolist()) - {-1}
        if all(len(words & others) <= len(words) / 3 for others in shown.values()):
            shown[f] = words
    return list(shown)

def in_order(scan, order):
    """Live features by one of ORDERS, the best first: coherence, low entropy, high density."""
    live = np.flatnonzero(scan.count)
    entropy = scan.rank + scan.F * (scan.count < SHOWN_FROM)
    worst = dict(coherence=-scan.coherence, entropy=entropy, density=-scan.count)[order]
    return live[np.argsort(worst[live], kind='stable')]      # nan comes last

def words_of(scan, f):
    """The words on which a feature fires far more often than they occur, as text."""
    return ', '.join(safe(scan.names[token]).strip() for token in scan.words[f] if token >= 0)

def read_index(arrays):
    """The arrays of scan_val -> {block: the scan of its SAE}, in which each array is an attribute,
    and layer is one. {} for none, or an older one."""
    meta = json.loads(str(arrays.get('meta', '{}')))
    if meta.get('version') != VERSION:
        return {}
    meta['names'] = [text.encode('latin-1') for text in meta['names']]
    return {layer: SimpleNamespace(layer=layer, tokens=arrays['tokens'], **meta,
                                   **of_layer(arrays, layer)) for layer in meta['layers']}

def open_index(out_dir, dataset, device, scan_tokens):
    """read_index of out_dir/index.npz, after a scan where there is none that fits. dataset '' is
    that of training, scan_tokens 0 takes what the index has. Raises ValueError, one sentence."""
    path, key = Path(out_dir) / 'index.npz', []
    index = read_index(load_npz(path))
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(Path(out_dir) / 'ckpt.pt') as z:
        key = [item.CRC for item in z.infolist()]            # the content, without reading it
    if index:                                                # and not of another version, or torn
        scan = index[min(index)]
        kept = is_of(scan, dataset or scan.trained_on) if key else dataset in (scan.dataset, '')
        if scan_tokens in (scan.wanted, 0) and key in (scan.key, []) and kept:
            return index
    run = open_run(out_dir, dataset, device)
    wanted = scan_tokens or (1_048_576 if device_of(run.model).type == 'cuda' else 131_072)
    say(f"no index of this yet: reading {wanted:,} tokens of val, once; later views use these")
    arrays = scan_val(run, wanted, key)
    keep(path, arrays)
    return read_index(arrays)

def is_of(scan, dataset):
    """Whether a scan is of the val that a data set has now; of one that is gone, by its name."""
    with suppress(ValueError):
        return load_dataset(dataset).meta['val_sha256'] == scan.val_sha256
    return dataset == scan.dataset

# ---------------------------------------------------- numbers of the views, from the scan of an SAE

def overview_numbers(scan):
    """The numbers of an SAE's overview."""
    live, total = scan.count > 0, scan.count.sum()
    density, bits = scan.count[live] / scan.N, scan.entropy[live]
    top = math.ceil(bits.max(initial=1))
    busiest = np.sort(scan.count)[-math.ceil(scan.F / 100):].sum() / max(1, total)
    return dict(live=int(live.sum()), dead=int((~live).sum()), fvu=float(scan.fvu),
                l0=float(total / scan.N), top_entropy=top, busiest=float(busiest),
                entropies=np.histogram(bits, 32, (0, top))[0].tolist(),
                densities=np.histogram(np.log10(density).clip(-6), 32, (-6, 0))[0].tolist())

def fires_on(scan, f):
    """The 8 tokens on which a feature fires most, with their shares of its firings."""
    return [(token, times / int(scan.count[f]))
            for token, times in zipped(scan.top_tokens[f], scan.top_counts[f]) if token >= 0]

def firings(scan, f):
    """Where a feature fires: positions (P,), ascending, and activations (P,)."""
    begin = scan.count[:f].sum()
    slots = scan.order[begin:begin + scan.count[f]]
    return slots.astype(np.int64) // scan.K, scan.values.reshape(-1)[slots]

def joint(scan, where):
    """(F,): of the positions where a feature fires or `where` (P,) is, the share that has both."""
    both = np.bincount(scan.features[where].reshape(-1), minlength=scan.F + 1)[:scan.F]
    return both / np.maximum(1, scan.count + len(where) - both)

def zipped(a, b):
    return list(zip(a.tolist(), b.tolist()))

def feature_numbers(scan, f, seed):
    """
    Every number of one feature's view; tokens are ids.
      top, random   contexts by activation, and drawn uniformly; at most one a window, equal texts
                    folded. A peak is never the first or last token of a window nor end-of-text,
                    whose activations are often freakish
      hist          of its activations, from 0 to max
      intervals     (low, high, share of the firings, a context or None), eighths of that
      joint         the features that fire with it: positions with both / with either
      coherence     None with fewer than four words
      concept_rank  its place among the `concepts` features that have coherence
    """
    where, acts = firings(scan, f)                                           # (P,), (P,)
    count, largest = len(where), float(scan.max[f])
    inner = (where % scan.T > 0) & (where % scan.T < scan.T - 1)
    peaks = np.flatnonzero(inner & (scan.tokens[where] != scan.eot))
    drawn = np.random.default_rng((seed, scan.layer, f)).permutation(peaks)
    strongest_first = peaks[np.argsort(-acts[peaks], kind='stable')]
    eighth = np.minimum(INTERVALS * acts / (largest or 1), INTERVALS - 1).astype(int)  # (P,)
    intervals = []
    for j in reversed(np.unique(eighth).tolist()):
        some = drawn[eighth[drawn] == j][-1:]                # the last: `random` shows the first
        example, = contexts(scan, f, where[some], 1) or [None]
        intervals.append((j * largest / INTERVALS, (j + 1) * largest / INTERVALS,
                          float(np.mean(eighth == j)), example))
    share = joint(scan, where)                                               # (F,)
    share[f] = -1
    together = np.argsort(-share, kind='stable')[:min(5, scan.F - 1)]
    return dict(
        layer=scan.layer, f=f, count=count, density=count / scan.N, rank=int(scan.rank[f]),
        max=largest, mean=float(acts.mean()) if count else 0.0,
        entropy=float(scan.entropy[f]) if count else None, fires_on=fires_on(scan, f),
        up=zipped(scan.up[f], scan.up_value[f]), down=zipped(scan.down[f], scan.down_value[f]),
        near=[pair for pair in zipped(scan.near[f], scan.near_value[f]) if pair[0] != f][:5],
        hist=np.histogram(acts, BINS, (0, largest or 1))[0].tolist(), intervals=intervals,
        joint=zipped(together, share[together]),
        top=contexts(scan, f, where[strongest_first], TOP),
        random=contexts(scan, f, where[drawn], RANDOM), words=words_of(scan, f),
        coherence=None if np.isnan(scan.coherence[f]) else float(scan.coherence[f]),
        concept_rank=1 + int((scan.concept > scan.concept[f]).sum()),
        concepts=int((~np.isnan(scan.concept)).sum()))

def contexts(scan, f, peaks, n):
    """The text around the first peak in each of the first n windows that peaks (P,), positions,
    visit, no further than its window, with the activations of feature f. Those with the same text
    around the peak are one, counted in `times`."""
    _, firsts = np.unique(peaks // scan.T, return_index=True)
    found = {}
    for at in peaks[np.sort(firsts)[:n]].tolist():
        window = at // scan.T * scan.T
        begin, end = max(window, at - SIDE), min(window + scan.T, at + SIDE + 1)
        tokens, peak = scan.tokens[begin:end].tolist(), at - begin
        acts = np.where(scan.features[begin:end] == f, scan.values[begin:end], 0).sum(1)
        context = dict(tokens=tokens, acts=acts.tolist(), peak=peak, where=at, times=0)
        found.setdefault(tuple(tokens[max(0, peak - 8):peak + 5]), context)['times'] += 1
    return list(found.values())

def find(scan, pattern):
    """Arrays (F,): precision, the share of a feature's firings that lie inside a match, and recall,
    the share of matches on some token of which it fires; and the numbers of matches and of tokens
    with any byte inside one. pattern: a compiled regular expression. It sees a document at a time;
    where a window cuts it, a character 0 stands for the unknown: no line begins or ends there."""
    inside, recalled, n = np.zeros(scan.N, bool), np.zeros(scan.F + 1, int), 0
    n_bytes = lambda text: len(text.encode('utf-8', 'surrogateescape'))
    starts = np.union1d(np.arange(0, scan.N, scan.T), np.flatnonzero(scan.tokens == scan.eot))
    for start, end in zip(starts, [*starts[1:], scan.N]):
        pieces = [scan.names[token] for token in scan.tokens[start:end].tolist()]
        before = '\0'                                        # the unknown
        if scan.tokens[start] == scan.eot:
            pieces[0], before = b'', ''
        after = '\0' if end % scan.T == 0 else ''            # else an end-of-text token is there
        owner = np.repeat(np.arange(start, end), list(map(len, pieces)))     # of each byte: a token
        text = before + b''.join(pieces).decode('utf-8', 'surrogateescape') + after
        for match in pattern.finditer(text, len(before)):
            begin, stop = (n_bytes(text[len(before):at]) for at in match.span())
            tokens = np.unique(owner[begin:stop])            # none of what stands for the unknown
            inside[tokens] = True
            recalled[scan.features[tokens]] += 1             # once each, however often it fires
            n += len(tokens) > 0
    hits = np.bincount(scan.features[inside].reshape(-1), minlength=scan.F + 1)[:scan.F]
    return hits / np.maximum(1, scan.count), recalled[:scan.F] / max(1, n), n, int(inside.sum())
