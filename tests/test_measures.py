"""
measures.py: by brute force on tiny cases.

    python -m pytest tests/test_measures.py
"""
import numpy as np
import pytest
import torch

import features
import measures
from sae import SITES
from test_features import make_model

def test_duplicates_by_brute_force():
    """Feature 3 is half of feature 2, 5 nearly twice 4, 7 is silent: two doubles."""
    rng = np.random.default_rng(0)
    z = rng.random((300, 9)) * (rng.random((300, 9)) < 0.4)
    z[:, 3], z[:, 5], z[:, 7] = z[:, 2] / 2, 2.1 * z[:, 4] + 0.01 * z[:, 1], 0
    features = np.argsort(-z, axis=1, kind='stable')
    values = np.take_along_axis(z, features, 1).astype(np.float32)
    features[values == 0] = 9
    r = np.corrcoef(np.delete(z, 7, 1).T)
    mean = np.delete(z, 7, 1).mean(0)
    want = np.mean([any(r[f, g] > 0.9 and mean[g] > mean[f] for g in range(8)) for f in range(8)])
    assert want == 0.25
    assert measures.duplicates(values, features, 9, 'cpu') == pytest.approx(want)

@pytest.mark.parametrize('site', [*SITES, 'posthoc'])
def test_causal_share_by_brute_force(site):
    """Each feature is steered off by hand, window by window; the interval is Student's without his
    tables. A feature that writes nothing has no effect."""
    name = 'resid' if site == 'posthoc' else site
    model = make_model(sae_site=name, block_size=12, vocab_size=31, sae_layers=(1,))
    model.saes()[1].posthoc = site == 'posthoc'
    model.saes()[1].alpha.fill_(0.8)
    n_features = model.config.n_features
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)                   # so that features matter
        if site == 'resid':
            model.saes()[1].W_dec[:9] = 0
    start = torch.randint(31, (40, 1))
    windows = torch.cat([start, *model.generate(start, 11)], 1) # its own text, so features help
    tokens = windows.flatten().numpy()
    with torch.no_grad():
        logits, _, out = model(windows)
        log_p = lambda logits: logits[:, :-1].log_softmax(-1)
        nats = lambda logits: -log_p(logits).gather(-1, windows[:, 1:, None])[..., 0]
        active = torch.where(out.values[0] != 0, out.indices[0], n_features) # (40, T, K)
        excludes_0 = []
        for f in range(n_features):
            fires = (active == f).any(-1)
            if fires.sum() >= 20:
                scale = torch.ones(n_features)
                scale[f] = 0
                model.saes()[1].steer = scale, torch.zeros(n_features)
                change = (nats(model(windows)[0]) - nats(logits))[fires[:, :-1]].numpy()
                model.saes()[1].steer = None
                error = change.std(ddof=1) / len(change) ** 0.5
                excludes_0.append(abs(change.mean()) > 1.96 * error)
    features = active.flatten(0, 1).numpy()
    got = measures.causal_share(model, 1, tokens, features, most=10 ** 6)
    assert len(excludes_0) > 9 and got == pytest.approx(np.mean(excludes_0))
    assert 0 < got < 1
    assert 0 <= measures.causal_share(model, 1, tokens, features, n=5, most=4) <= 1

def test_dense_by_hand():
    """Slots that are not active change nothing, whichever feature they name."""
    values = torch.tensor([[2.0, 0.0], [3.0, 1.0]])
    code = features.dense(values, torch.tensor([[1, 1], [2, 0]]), 4)
    assert code.tolist() == [[0, 2, 0, 0], [1, 0, 3, 0]]

def test_means():
    records = [dict(a=1, b=dict(c=2, d=None)), dict(a=3, b=dict(c=4, d=5))]
    assert measures.mean_of(records) == dict(a=2, b=dict(c=3, d=5))
