"""
How good the features of a run are, measured without a person or a judge: the probe, which the
viewer shows too, and what results/ladder.py stores of each run beside its loss. Shapes: see
features.py; n, B are texts.
"""
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from explain import loss_changes
from features import dense, device_of, encode, read_file, see, tracked
from model import GPT
from sae import norm
from scanning import read_index, scan_val

# -------------------------------------------------- the probe: do a few features tell labels apart?

def read_labels(path):
    """Labels (n,), texts (n,) of a probe file. Raises ValueError, one sentence."""
    labels, texts = [], []
    for n, line in enumerate(read_file('probe', path).split('\n'), 1):
        label, _, text = line.partition('\t')
        if text.strip():
            labels.append(label)
            texts.append(text)
        elif line.strip():
            raise ValueError(f"probe={path!r}, line {n}: expected a label, a tab and a text")
    counts = dict(sorted(Counter(labels).items()))
    if len(counts) < 2 or min(counts.values()) < 4:
        found = ', '.join(f'{n} of {label!r}' for label, n in counts.items()) or 'none'
        raise ValueError(f"probe={path!r} has these texts: {found}; it takes two labels or more, "
                         "and of each 4 texts or more, to train on some and test on the others")
    return labels, texts

@torch.no_grad()
def pooled_codes(run, layer, texts, seed):
    """What the SAE of a block makes of texts: means over the tokens after end-of-text, up to 128.
    {'features': X (n, F), 'random directions': X (n, F), 'channels': X (n, C)}. Random directions
    are F random unit rows on what the SAE reads, relu, the K largest of each token: without them no
    accuracy says anything (arXiv 2602.14111)."""
    model, sae, read_by_sae = run.model, run.model.saes()[layer], []
    F, T = sae.n_features, min(129, model.config.block_size)
    rows = torch.randn(F, len(sae.fill), generator=torch.Generator().manual_seed(seed))
    rows = normalize(rows, dim=-1).to(device_of(model))                      # (F, C)
    hook = sae.register_forward_pre_hook(lambda _, args: read_by_sae.append(args[0]))
    found = {'features': [], 'random directions': [], 'channels': []}
    for begin in tracked(range(0, len(texts), 32), "reading texts"):
        tokens = [torch.tensor(encode(run, text)[:T]) for text in texts[begin:begin + 32]]
        counts = [torch.arange(len(text)) > 0 for text in tokens]            # not end-of-text
        out = see(model, pad_sequence(tokens, True), layer + 1) # no text sees what pads it, later
        x = read_by_sae.pop()
        h = norm(x).float() if sae.site.own else x.float()                   # (B, T, C)
        random = (h @ rows.T).relu().topk(sae.k, dim=-1)
        counts = pad_sequence(counts, True)[..., None].to(h)                 # (B, T, 1), 0 or 1
        codes = dense(out.values[-1], out.indices[-1], F), dense(*random, F), h
        for means, z in zip(found.values(), codes):                          # (B, T, F or C)
            means.append(((z * counts).sum(1) / counts.sum(1).clamp_min(1)).cpu())
    hook.remove()
    return {name: torch.cat(means).numpy() for name, means in found.items()}

def logistic(X, y):
    """Logistic regression on X (n, k), y (n,) of 0 and 1, by Newton's method -> weights (k + 1,),
    the bias last: the least sum of losses + |weights|^2 / 2 (L2, C = 1)."""
    X = np.hstack((X, np.ones((len(X), 1))))
    penalty = np.append(np.ones(X.shape[1] - 1), 1e-9)       # the bias is free
    cost = lambda w: np.logaddexp(0, X @ w).sum() - y @ (X @ w) + penalty @ w ** 2 / 2
    w = np.zeros(X.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-X @ w))
        gradient = X.T @ (p - y) + penalty * w
        if np.abs(gradient).max() < 1e-6:
            break
        step = np.linalg.solve((X.T * (p * (1 - p))) @ X + np.diag(penalty), gradient)
        while cost(w - step) > cost(w) and np.abs(step).max() > 1e-9:
            step = step / 2
        w = w - step
    return w

def probe(X, y, seed, columns=(('B', 1), ('B', 5), ('B', 20)), splits=3):
    """How well k columns of X (n, F) tell one class of y (n,) from the rest, balanced, 80 % of the
    texts to train on -> {(protocol, k): held-out accuracy (classes, splits)} for columns, and
    {class: its best column by protocol B on the first split}. Columns are ranked on the training
    part by the difference of the class means: B (sae-probes, arXiv 2502.16681) divides it by the
    standard deviation, so that loud features have no advantage; A (SAEBench) does not. Of two
    classes one is probed."""
    classes = np.unique(y)
    classes = classes[1:] if len(classes) == 2 else classes
    scores, best = {column: np.zeros((len(classes), splits)) for column in columns}, {}
    for c, split in np.ndindex(len(classes), splits):
        rng = np.random.default_rng((seed, c, split))
        own, rest = (rng.permutation(np.flatnonzero(part))
                     for part in (y == classes[c], y != classes[c]))
        n = min(len(own), len(rest))
        cut = round(0.8 * n)
        rows, held_out = X[[*own[:cut], *rest[:cut]]], X[[*own[cut:n], *rest[cut:n]]]
        t = np.repeat([True, False], cut)
        gap, deviation = np.abs(rows[t].mean(0) - rows[~t].mean(0)), rows.std(0)
        scaled = gap / (deviation + 0.01 * deviation.max() + 1e-12)
        ranked = dict(A=np.argsort(-gap, kind='stable'), B=np.argsort(-scaled, kind='stable'))
        best.setdefault(classes[c], ranked['B'][0])
        for how, k in columns:
            some = ranked[how][:k]
            mean, scale = rows[:, some].mean(0), np.maximum(deviation[some], 1e-6)
            w = logistic((rows[:, some] - mean) / scale, t)
            guess = (held_out[:, some] - mean) / scale @ w[:-1] + w[-1] > 0
            scores[how, k][c, split] = (guess == np.repeat([True, False], n - cut)).mean()
    return scores, best

# --------------------------------------------------------------------------- what the ladder stores

def probes(run, layer, folder, wanted):
    """{key: {set of labels: {k: accuracy}}, key_mean: its mean over sets} for wanted {key: name in
    pooled_codes} and the *.tsv of a folder."""
    found = {key: {} for key in wanted}
    for path in sorted(Path(folder).glob('*.tsv')):
        labels, texts = read_labels(path)
        X = pooled_codes(run, layer, texts, seed=0)
        for key, name in wanted.items():
            scores, _ = probe(X[name], np.array(labels, object), 0)
            by_k = {f'k{k}': float(score.mean()) for (_, k), score in scores.items()}
            found[key][path.stem] = by_k
    return found | {f'{key}_mean': mean_of([*by_set.values()]) for key, by_set in found.items()}

def duplicates(values, features, n_features, device):
    """Of the features that fire, the share whose activations correlate above 0.9 with those of one
    whose mean is larger. values, features (N, K), n_features where a slot is not active."""
    F = n_features
    second = torch.zeros(F, F, device=device)                # sums of products
    first = torch.zeros(F, dtype=torch.double, device=device)
    slots = torch.from_numpy(values), torch.from_numpy(features.astype(np.int64))
    for v, f in zip(*(x.to(device).split(4096) for x in slots)):
        z = dense(v, f, F + 1)[:, :F]
        first += z.sum(0)
        second += z.T @ z
    mean = (first / len(values)).float()
    covariance = second / len(values) - mean[:, None] * mean
    deviation = covariance.diagonal().clamp_min(1e-12).sqrt()
    alike = covariance > 0.9 * deviation[:, None] * deviation # never with one that is silent
    weaker = mean[:, None] < mean                             # (F, F): row than column
    return (alike & weaker).any(1)[mean > 0].float().mean().item()

@torch.no_grad()
def causal_share(model, layer, tokens, features, seed=0, n=500, most=64):
    """Of n features, drawn from those that fire 20 times or more on tokens (N,), the share whose
    removal changes the next token's loss: the 95 % interval of the mean change, over up to `most`
    positions where the feature fires, excludes 0. features (N, K)."""
    T, rng = model.config.block_size, np.random.default_rng(seed)
    often = np.bincount(features.reshape(-1), minlength=model.config.n_features + 1)[:-1] >= 20
    changes = {f: [] for f in rng.permutation(np.flatnonzero(often))[:n].tolist()}
    for start in T * rng.permutation(len(tokens) // T):
        fires = features[start:start + T - 1]
        here = [f for f in np.unique(fires).tolist() if f in changes and len(changes[f]) < most]
        if here:
            which, where = (fires == np.array(here)[:, None, None]).any(2).nonzero()
            effects = loss_changes(model, layer, tokens[start:start + T], here, which, where)
            for i, effect in zip(which.tolist(), effects.tolist()):
                changes[here[i]].append(effect)
    some = [np.array(x[:most]) for x in changes.values() if len(x) > 1]
    excludes_0 = [abs(x.mean()) > 1.96 * x.std(ddof=1) / math.sqrt(len(x)) for x in some]
    return float(np.mean(excludes_0)) if some else None

def measure(run, labels, block, k, wanted=262_144):
    """
    What results/ladder.py stores of a run, means over its SAE layers:
      probe, probe_mean   {set of labels: {k1, k5, k20}} and its mean over sets
      coherence, coherent of features with four words or more the mean; how many are above 0.05
      causal_share, duplicates   as above
      dense_features      share of the features that fire on more than a tenth of the tokens
    Of a dense model, on the stream after `block`: probe_random and probe_channels, of k random
    directions a token, and of the channels; and their means. labels: a folder of label files.
    """
    model = run.model
    if not model.saes():
        config = replace(model.config, sae_layers=(block,), sae_k=k)
        untrained = GPT(config).to(device_of(model)).eval()  # it only says where and how many
        untrained.load_state_dict(model.state_dict(), strict=False)
        return probes(run._replace(model=untrained), block, labels, dict(
            probe_random='random directions', probe_channels='channels'))
    layers = []
    for layer, scan in read_index(scan_val(run, wanted, None)).items():
        coherence = scan.coherence[~np.isnan(scan.coherence)]
        layers.append(probes(run, layer, labels, dict(probe='features')) | dict(
            coherence=float(coherence.mean()) if len(coherence) else None,
            coherent=int((coherence > 0.05).sum()),
            causal_share=causal_share(model, layer, scan.tokens, scan.features),
            duplicates=duplicates(scan.values, scan.features, scan.F, device_of(model)),
            dense_features=float((scan.count > 0.1 * scan.N).mean())))
    return mean_of(layers)

def mean_of(records):
    """The mean of records alike, of numbers in dicts; None is left out."""
    if isinstance(records[0], dict):
        return {key: mean_of([record[key] for record in records]) for key in records[0]}
    numbers = [x for x in records if x is not None]
    return float(np.mean(numbers)) if numbers else None
