"""
How good the features of a run are, measured without a person or a judge: results/ladder.py stores
it for each run, beside its loss. Nothing here prints.

Shapes: N tokens of val, T of a window, F features, K active a token, B runs.
"""
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear

from data.dataset import eval_batches, load_dataset
from explain import kept, run_scaled
from features import codes, device_of, encode
from model import GPT
from sae import norm
from scanning import concepts, pooled_codes, probe, read_labels, types_by

def silently(items, description):
    return items

def probes(run, layer, folder):
    """
    {code: {set of labels: {k: accuracy}}} by protocol B, for the label files *.tsv of a folder.
    The codes are those of pooled_codes.
    """
    found = {}
    for path in sorted(Path(folder).glob('*.tsv')):
        labels, texts = read_labels(path)
        y = np.unique(labels, return_inverse=True)[1]
        tokens = [encode(run, text) for text in texts]
        for code, X in pooled_codes(run.model, layer, tokens, 0, silently).items():
            scores, _ = probe(X, y, 0)
            by_k = {f'k{k}': float(scores['B', k].mean()) for k in (1, 5, 20)}
            found.setdefault(code, {})[path.stem] = by_k
    return found

def duplicates(values, features, n_features, device):
    """
    Of the features that fire, the share whose activations correlate above 0.9 with those of one
    whose mean is larger. values, features (N, K), n_features where a slot is not active.
    """
    N, F = len(values), n_features
    second = torch.zeros(F, F, device=device)                # sums of products
    first = torch.zeros(F, dtype=torch.double, device=device)
    for begin in range(0, N, 4096):
        v = torch.from_numpy(values[begin:begin + 4096]).to(device)
        f = torch.from_numpy(features[begin:begin + 4096].astype(np.int64)).to(device)
        z = torch.zeros(len(v), F + 1, device=device).scatter_(1, f, v)[:, :F]
        first += z.sum(0, dtype=torch.double)
        second += z.T @ z
    mean = (first / N).float()
    live = second.diagonal() > 0
    covariance = second / N - mean[:, None] * mean
    deviation = covariance.diagonal().clamp_min(1e-12).sqrt()
    alike = covariance > 0.9 * deviation[:, None] * deviation
    weaker = mean[:, None] < mean                            # (F, F): row than column
    return (alike & weaker & live[:, None])[:, live].any(1)[live].float().mean().item()

@torch.no_grad()
def causal_share(model, layer, tokens, features, seed=0, n=500, most=64):
    """
    Of n features, drawn from those that fire 20 times or more on tokens (N,), the share whose
    removal changes the next token's loss: the 95 % interval of the mean change, over up to `most`
    positions where the feature fires, excludes 0. features (N, K).
    """
    T, V = model.config.block_size, model.config.vocab_size
    wte, rng = model.transformer.wte.weight, np.random.default_rng(seed)
    often = np.bincount(features.reshape(-1), minlength=model.config.n_features + 1)[:-1] >= 20
    changes = {f: [] for f in rng.permutation(np.flatnonzero(often))[:n].tolist()}
    for start in T * rng.permutation(len(tokens) // T):
        idx = torch.from_numpy(tokens[start:start + T].astype(np.int64)).to(device_of(model))
        fires = features[start:start + T - 1]
        here = [f for f in np.unique(fires).tolist() if len(changes.get(f, [0] * most)) < most]
        if not here:
            continue

        def losses(stream, _):
            logits = linear(norm(stream[:, :-1]), wte)[..., :V].float()      # (B, T - 1, V)
            targets = idx[1:].expand(len(logits), -1)
            return cross_entropy(logits.transpose(1, 2), targets, reduction='none')

        scales = kept(model, [layer], [[], *([(layer, f)] for f in here)])
        loss = run_scaled(model, idx[None], scales, model.config.n_layer, losses).cpu().numpy()
        for f, change in zip(here, loss[1:] - loss[0]):
            changes[f] += change[(fires == f).any(1)].tolist()
    excludes_0 = []
    for x in changes.values():
        x = np.array(x[:most])
        if len(x) > 1:
            excludes_0.append(abs(x.mean()) > 1.96 * x.std(ddof=1) / math.sqrt(len(x)))
    return float(np.mean(excludes_0)) if excludes_0 else None

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
    model, found = run.model, {}
    if not model.saes():
        config = replace(model.config, sae_layers=(block,), sae_k=k)
        untrained = GPT(config).to(device_of(model)).eval()  # it only says where and how many
        untrained.load_state_dict(model.state_dict(), strict=False)
        by_code = probes(run._replace(model=untrained), block, labels)
        for name, code in (('random', 'random directions'), ('channels', 'channels')):
            found[f'probe_{name}'] = by_code[code]
            found[f'probe_{name}_mean'] = mean_of(by_code[code].values())
        return found
    T, F = model.config.block_size, model.config.n_features
    val = load_dataset(run.dataset).val
    batches = [x for x, _ in eval_batches(val, T, max(1, 16_384 // T), wanted)]
    tokens, features, values, _ = codes(model, batches)
    layers = []
    for s, layer in enumerate(model.saes()):
        count = np.bincount(features[s].reshape(-1), minlength=F + 1)[:F]
        where = np.argsort(features[s].reshape(-1), kind='stable') // features.shape[2]
        types_of = types_by(where, count, tokens)
        coherence = concepts(count, len(tokens), types_of, tokens, run.names)['coherence']
        coherence = coherence[~np.isnan(coherence)]
        probe = probes(run, layer, labels)['features']
        layers.append(dict(
            probe=probe, probe_mean=mean_of(probe.values()),
            coherence=float(coherence.mean()) if len(coherence) else None,
            coherent=int((coherence > 0.05).sum()),
            causal_share=causal_share(model, layer, tokens, features[s]),
            duplicates=duplicates(values[s], features[s], F, device_of(model)),
            dense_features=float((count > 0.1 * len(tokens)).mean())))
    return mean_of(layers)

def mean_of(records):
    """The mean of records alike, of numbers in dicts; None is left out."""
    records = list(records)
    if isinstance(records[0], dict):
        return {key: mean_of([record[key] for record in records]) for key in records[0]}
    numbers = [x for x in records if x is not None]
    return float(np.mean(numbers)) if numbers else None
