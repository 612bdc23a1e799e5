"""measures.py: by brute force on tiny cases."""
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import measures
from sae import SITES
from sample import set_steering
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

@torch.no_grad()
@pytest.mark.parametrize('site', [*SITES, 'posthoc'])
def test_causal_share_by_brute_force(site):
    """Each feature is steered off by hand. One that writes nothing has no effect."""
    name = 'resid' if site == 'posthoc' else site
    model = make_model(sae_site=name, block_size=12, vocab_size=31, sae_layers=(1,))
    sae, F = model.saes()[1], model.config.n_features
    for p in model.parameters():
        p += 0.3 * torch.randn_like(p)                       # so that features matter
    sae.posthoc = site == 'posthoc'
    if name == 'resid':
        sae.W_dec[:9] = 0
    sae.alpha.fill_(0.8)
    start = torch.randint(31, (40, 1))
    windows = torch.cat([start, *model.generate(start, 11)], 1) # its own text, so features help
    loss = lambda: cross_entropy(model(windows)[0][:, :-1].mT, windows[:, 1:], reduction='none')
    out, before, excludes_0 = model(windows)[2], loss(), []
    active = torch.where(out.values[0] != 0, out.indices[0], F)              # (40, T, K)
    for f in range(F):
        fires = (active == f).any(-1)
        if fires.sum() >= 20:
            set_steering(model, [(1, f, 0.0, 0.0)])
            change = (loss() - before)[fires[:, :-1]].numpy()
            set_steering(model, [])
            error = change.std(ddof=1) / len(change) ** 0.5
            excludes_0.append(abs(change.mean()) > 1.96 * error)
    given = model, 1, windows.flatten().numpy(), active.flatten(0, 1).numpy()
    got = measures.causal_share(*given, most=10 ** 6)
    assert len(excludes_0) > 9 and got == pytest.approx(np.mean(excludes_0)) and 0 < got < 1
    assert 0 <= measures.causal_share(*given, n=5, most=4) <= 1

def test_means():
    records = [dict(a=1, b=dict(c=2, d=None)), dict(a=3, b=dict(c=4, d=5))]
    assert measures.mean_of(records) == dict(a=2, b=dict(c=3, d=5))
