"""
The probe: do a few features tell labels apart? Sparse probing (arXiv 2305.01610): logistic
regression on the k features that serve best, beside one on all. Used by inspect_features.py.

Shapes: n texts, F features, L labels.
"""
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from features import encode, read, read_file

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
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    if len(counts) < 2 or min(counts.values()) < 4:
        found = ', '.join(f'{n} of {label!r}' for label, n in counts.items()) or 'none'
        raise ValueError(f"probe={path!r} has these texts: {found}; it takes two labels or more, "
                         "and of each 4 texts or more, to train on some and test on the others")
    return labels, texts

def pooled_codes(run, texts):
    """{block: X (n, F)}: for each text each feature's strongest activation on any token."""
    X = {layer: np.zeros((len(texts), sae.n_features), np.float32)
         for layer, sae in run.model.saes().items()}
    skip = 0 if run.meta['eot'] is None else 1               # not what end-of-text sets off
    for n, text in enumerate(texts):
        _, values, indices = read(run.model, encode(run, text))
        for s, layer in enumerate(X):
            acts, features = values[s, skip:].flatten().numpy(), indices[s, skip:].flatten().numpy()
            order = np.abs(acts).argsort()                   # the strongest last, and so it stays
            X[layer][n, features[order]] = acts[order]
    return X

def split(y, seed):
    """Indices of train and test texts: 70 % and 30 % of each class, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind='stable')]       # class by class
    train = np.concatenate([np.arange(n) < 0.7 * n for n in np.bincount(y)])
    return order[train], order[~train]

def choose_features(X, y, k):
    """
    The columns of X (n, F) that tell the classes y (n,) apart: all those of any use, the best alone
    first; and the best k together, by orthogonal matching pursuit on one-hot labels.
    """
    X, Y = X - X.mean(0), np.eye(y.max() + 1)[y]
    Y = Y - Y.mean(0)
    power = np.maximum(np.square(X).sum(0), 1e-6)                            # (F,)
    score = np.square(X.T @ Y).sum(1) / power                # what each column alone explains
    alone = np.argsort(-score, kind='stable')[:int((score > 0).sum())]
    chosen = []
    for _ in range(k):
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        rest = Y - X[:, chosen] @ np.linalg.lstsq(X[:, chosen], Y, rcond=None)[0]
        score = np.square(X.T @ rest).sum(1) / power
    return alone, chosen

def accuracy(X, y, train, test):
    """Held-out accuracy of multinomial logistic regression (L2 0.01, standardised inputs)."""
    X = (X - X[train].mean(0)) / np.maximum(X[train].std(0), 1e-3)
    X, y = torch.from_numpy(X.astype(np.float32)), torch.from_numpy(y)
    w = torch.zeros(X.size(1), int(y.max()) + 1, requires_grad=True)
    b = torch.zeros(w.size(1), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(X[train] @ w + b, y[train]) + 0.01 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(((X[test] @ w + b).argmax(1) == y[test]).float().mean())
