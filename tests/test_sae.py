"""
The SAE layer alone: its equations, gradients, revival of silent features, schedules, statistics. CPU, seconds.

    python -m pytest tests/test_sae.py
"""
import math

import pytest
import torch

import kernels
from sae import (SAE, SITES, blend_alpha, count_pairs, fraction_unexplained, k_at, norm, token_entropy, top_tokens)

C, F, K = 16, 64, 4
OWN = ('resid', 'mlp', 'attn') # sites with an encoder and a decoder of their own

def make(site='resid', n_embd=C, n_features=F, k=K, **kw):
    """An SAE with nothing at zero, so that no term can hide."""
    torch.manual_seed(0)
    sae = SAE(n_embd, n_features, k, site, **kw)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return sae

def inputs(B=2, T=8, seed=1):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed))

# ----------------------------------------------------------------------------------------------------
# the equations

@pytest.mark.parametrize('site', SITES)
def test_l0_equals_k(site):
    """Exactly K features are active on every token, also after the buffer k changed (annealing)."""
    sae = make(site, k_start=12)
    for k in (12, 7, K):
        sae.k.fill_(k)
        _, out = sae(inputs())
        assert ((out.values != 0).sum(-1) == k).all()
        assert out.l0 == k

@pytest.mark.parametrize('site', OWN)
def test_all_features_is_the_dense_autoencoder(site):
    """K = F and alpha = 1: nothing is left of TopK, and y = relu(W_enc (h - b_dec) + b_enc) W_dec + b_dec."""
    sae, x = make(site, k=F), inputs()
    y, _ = sae(x)
    dense = torch.relu((norm(x) - sae.b_dec) @ sae.W_enc.T + sae.b_enc) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)

def test_all_features_at_hidden_and_stream():
    """The same at the sites without a space of their own: an ordinary ReLU^2 MLP, and the stream itself."""
    sae, x = make('hidden', k=F), inputs()
    torch.testing.assert_close(sae(x)[0], torch.relu(x @ sae.W_enc.T + sae.b_enc).square() @ sae.W_dec, rtol=1e-5, atol=1e-5)
    assert torch.equal(make('stream', k=C)(x)[0], x)

@pytest.mark.parametrize('site', SITES)
def test_alpha_zero_changes_nothing(site):
    """alpha = 0: x comes out as it went in, to the bit (at hidden: the MLP's dense result), and so does its gradient."""
    sae, x = make(site), inputs().requires_grad_()
    sae.alpha.zero_()
    y, _ = sae(x)
    want = x if site != 'hidden' else torch.relu(torch.nn.functional.linear(x, sae.W_enc) + sae.b_enc).square() @ sae.W_dec
    assert torch.equal(y, want)
    seed = torch.randn_like(y)
    got, = torch.autograd.grad(y, x, seed, retain_graph=True)
    assert torch.equal(got, torch.autograd.grad(want, x, seed)[0] if site == 'hidden' else seed)

def test_alpha_half_is_half_way():
    """x <- (1 - alpha) x + alpha y, between the two ends."""
    sae, x = make(), inputs()
    y = sae(x)[0]
    sae.alpha.fill_(0.5)
    torch.testing.assert_close(sae(x)[0], 0.5 * x + 0.5 * y)

def test_token_skip_adds_the_token():
    """With token_skip, y is the same plus W_skip norm(wte[token])."""
    sae, x, tok = make(token_skip=True), inputs(), inputs(seed=2)
    torch.nn.init.normal_(sae.W_skip)
    y = sae(x, tok)[0]
    W_skip, sae.W_skip = sae.W_skip, None
    torch.testing.assert_close(y, sae(x)[0] + tok @ W_skip.T)

def test_a_posthoc_sae_gives_back_the_length():
    """Spliced in post hoc, an SAE that reconstructs norm(x) perfectly (each channel's two signs are features) changes nothing."""
    sae, x = SAE(8, 16, 16), 5 * torch.randn(2, 3, 8)
    with torch.no_grad():
        for W in (sae.W_enc, sae.W_dec):
            W.copy_(torch.cat((torch.eye(8), -torch.eye(8))))
    assert not torch.allclose(sae(x)[0], x, rtol=0.5)
    sae.posthoc = True
    torch.testing.assert_close(sae(x)[0], x)

def test_stream_keeps_the_largest_by_magnitude():
    """Site stream: a negative channel counts by its size, and what stays is unchanged."""
    x = torch.tensor([[[0.1, -3.0, 2.0, -0.2, 1.0]]])
    y, out = SAE(5, 5, 2, 'stream')(x)
    assert y.tolist() == [[[0, -3, 2, 0, 0]]]
    assert out.indices.tolist() == [[[1, 2]]] and out.values.tolist() == [[[-3, 2]]]

@pytest.mark.parametrize('site', SITES)
def test_forward_is_decode_of_encode(site):
    """encode, decode and forward are one computation: scattering encode's codes and decoding them is forward's y. The kernels
    take b_dec's share of the pre-activations apart, and round it differently."""
    sae, x = make(site), inputs()
    values, indices = sae.encode(norm(x) if site in OWN else x)
    y, out = sae(x)
    exact = {} if kernels.available('cpu') else dict(rtol=0, atol=0)
    torch.testing.assert_close(out.values, values, **exact)
    assert torch.equal(indices, out.indices)
    z = torch.zeros(2, 8, sae.n_features).scatter(-1, indices, values)
    torch.testing.assert_close(y, sae.decode(z), **exact)

def test_fewer_positive_than_k():
    """Where fewer than K features are positive the rest of the slots hold 0, name nobody, and write nothing."""
    sae, x = make(), inputs()
    with torch.no_grad():
        sae.b_enc.fill_(-100)
        sae.b_enc[7] = 100
    y, out = sae(x)
    assert out.l0 == 1 and out.fired.nonzero().flatten().tolist() == [7]
    assert (out.indices[..., 0] == 7).all() and (out.values[..., 1:] == 0).all()
    with torch.no_grad():
        sae.b_enc[7] = -100
    y, out = sae(x)
    assert out.l0 == 0 and not out.fired.any()
    assert torch.equal(y, sae.b_dec.expand_as(y))

def test_selection_in_fp32_under_autocast():
    """Under autocast the big product is bf16, but the bias is added and features are compared, counted and scored in fp32."""
    with torch.autocast('cpu', torch.bfloat16):
        _, out = make()(inputs())
    assert out.values.dtype == torch.float32 and out.fvu.dtype == torch.float32 and out.loss.dtype == torch.float32

def test_interventions():
    """gate and fill act on the SAE's output, in eval mode, steer on its code: for ablation at evals and for steering in sampling."""
    sae, x = make().eval(), inputs()
    y = sae(x)[0]
    sae.gate.zero_()
    assert not sae(x)[0].any()
    sae.fill.fill_(2.0)
    assert (sae(x)[0] == 2).all()
    sae.gate.fill_(1.0)
    sae.fill.zero_()
    add = torch.zeros(F)
    add[9] = 5.0
    sae.steer = torch.ones(F), add
    torch.testing.assert_close(sae(x)[0], y + 5 * sae.W_dec[9])
    sae.steer = torch.zeros(F), torch.zeros(F)
    torch.testing.assert_close(sae(x)[0], sae.b_dec.expand_as(y))

@pytest.mark.parametrize('bad', [dict(site='middle'), dict(k=0), dict(k=F + 1), dict(k_start=F + 1)])
def test_impossible_arguments(bad):
    """An unknown site or a K outside 1..F is a ValueError that shows the value."""
    with pytest.raises(ValueError, match='middle' if 'site' in bad else 'must lie in 1..64'):
        SAE(**(dict(n_embd=C, n_features=F, k=K) | bad))

# ----------------------------------------------------------------------------------------------------
# gradients

def naive(sae, x, dy):
    """The layer and its gradients one token and one feature at a time, in fp64 and without autograd. x, dy (N, C)."""
    W_enc, W_dec, b_enc = (p.detach().double() for p in (sae.W_enc, sae.W_dec, sae.b_enc))
    hidden = sae.site == 'hidden'
    b_dec = torch.zeros(C).double() if hidden else sae.b_dec.detach().double()
    d = {name: torch.zeros_like(p).double() for name, p in sae.named_parameters()}
    ys, dxs = [], []
    for x, dy in zip(x.double(), dy.double()):
        rms = 1.0 if hidden else (x.square().mean() + torch.finfo(torch.float32).eps).sqrt()
        h = x / rms
        pre = [float(W_enc[f] @ (h - b_dec) + b_enc[f]) for f in range(F)]
        chosen = sorted(range(F), key=lambda f: -max(pre[f], 0))[:K]
        y, dh = b_dec.clone(), torch.zeros(C).double()
        if not hidden:
            d['b_dec'] += dy
        for f in chosen:
            if pre[f] <= 0:
                continue
            z = pre[f] ** 2 if hidden else pre[f]
            y += z * W_dec[f]
            d['W_dec'][f] += z * dy
            dpre = W_dec[f] @ dy * (2 * pre[f] if hidden else 1)
            d['b_enc'][f] += dpre
            d['W_enc'][f] += dpre * (h - b_dec)
            dh += dpre * W_enc[f]
        if not hidden:
            d['b_dec'] -= dh
            dh = (dh - h * (h * dh).mean()) / rms
        ys.append(y)
        dxs.append(dh)
    return torch.stack(ys), torch.stack(dxs), d

@pytest.mark.parametrize('site', OWN + ('hidden',))
def test_gradients_against_naive(site):
    """Values and all gradients equal those written by hand; features that were not chosen get exactly none."""
    sae, x, dy = make(site), inputs().requires_grad_(), inputs(seed=3)
    y, out = sae(x)
    y.backward(dy)
    want_y, want_dx, want = naive(sae, x.detach().flatten(0, 1), dy.flatten(0, 1))
    torch.testing.assert_close(y.flatten(0, 1).double(), want_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), want_dx, rtol=1e-4, atol=1e-5)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad.double(), want[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
    assert not out.fired.all()
    assert not sae.W_enc.grad[~out.fired].any() and not sae.W_dec.grad[~out.fired].any()

@pytest.mark.parametrize('site', SITES)
def test_reconstruction_loss(site):
    """At alpha = 0 the loss is recon * FVU with a fixed target, and trains the SAE alone: x gets no gradient. At alpha above 0
    it is off, as it always is at sites without a target of their own."""
    sae, x = make(site, recon=0.5), inputs().requires_grad_()
    sae.alpha.zero_()
    out = sae(x)[1]
    if site in OWN:
        out.loss.backward()
        h = norm(x).detach()
        want = 0.5 * fraction_unexplained(h, sae.decode(torch.zeros(2, 8, F).scatter(-1, *sae.encode(h)[::-1])))
        torch.testing.assert_close(out.loss, want)
        for p, grad in zip(sae.parameters(), torch.autograd.grad(want, list(sae.parameters()))):
            assert grad.any()
            torch.testing.assert_close(p.grad, grad)
        assert x.grad is None or not x.grad.any()
    else:
        assert out.loss == 0
    for alpha in (1e-3, 0.5, 1.0):
        sae.zero_grad()
        sae.alpha.fill_(alpha)
        out = sae(x)[1]
        assert out.loss == 0 and out.fvu > 0
        if out.loss.requires_grad:
            out.loss.backward()
            assert not any(p.grad.any() for p in sae.parameters() if p.grad is not None)
    assert not make(site, recon=0.0)(x)[1].loss.requires_grad

# ----------------------------------------------------------------------------------------------------
# silent features

def silence(sae, f, tokens=10_000):
    """Make feature f negative on every token, and silent for long."""
    with torch.no_grad():
        sae.W_enc[f] *= 0.1
        sae.b_enc[f] = -1.0
        sae.silent[f] = tokens
    return sae

def test_silence_is_counted_in_tokens():
    """The counter grows by the tokens of a step, over all micro-steps and ranks, and falls to 0 for what fired."""
    sae = make(nudge=0.5, silent_tokens=200)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    fired = torch.arange(F) < 10
    sae.revive(fired, 128)
    assert (sae.silent == torch.where(fired, 0, 128)).all() and torch.equal(sae.b_enc, before['b_enc'])
    sae.revive(fired, 128)
    assert (sae.silent == torch.where(fired, 0, 256)).all()
    assert torch.equal(sae.b_enc, before['b_enc'] + 0.5 * ~fired)
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items() if k not in ('silent', 'b_enc'))

@pytest.mark.parametrize('site', SITES)
def test_silent_feature_fires_again_under_the_nudge(site):
    """A feature that never wins gets its bias raised until it does; then it is left alone."""
    sae, x, f = make(site, nudge=0.1, silent_tokens=100), inputs(), 3
    if site == 'stream':
        sae.b_enc[f] = -9.0
    else:
        silence(sae, f)
    assert not sae(x)[1].fired[f]
    for step in range(300):
        fired = sae(x)[1].fired
        sae.revive(fired, 16)
        if fired[f]:
            break
    assert fired[f] and sae.silent[f] == 0

@pytest.mark.parametrize('site', OWN)
def test_auxk_reaches_the_encoder(site):
    """AuxK gives a feature that is negative everywhere a gradient, to W_enc too: a published library gives none there."""
    sae, x, f = silence(make(site, auxk=1.0, silent_tokens=100), 3), inputs(), 3
    sae(x)[1].loss.backward()
    assert sae.W_enc.grad[f].any() and sae.b_enc.grad[f] != 0
    others = torch.arange(F) != f
    assert not sae.W_enc.grad[others].any(), "features that are not silent get nothing from AuxK"

@pytest.mark.parametrize('site', OWN)
def test_silent_feature_fires_again_under_auxk(site):
    """With the nudge off, training on the reconstruction of what the layer missed is enough to bring it back."""
    sae, x, f = silence(make(site, auxk=1.0, recon=1.0, nudge=0.0, silent_tokens=100), 3), inputs(8, 16), 3
    opt = torch.optim.Adam(sae.parameters(), lr=0.02)
    assert not sae(x)[1].fired[f]
    for step in range(200):
        _, out = sae(x)
        opt.zero_grad()
        out.loss.backward()
        opt.step()
        sae.revive(out.fired, 128)
        if out.fired[f]:
            break
    assert out.fired[f], "still silent after 200 steps"

def test_auxk_without_silent_features():
    """Nobody is silent: the loss is a constant, gradients are 0 and finite. And eval has no auxiliary loss of AuxK."""
    sae, x = make(auxk=1.0), inputs()
    loss = sae(x)[1].loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or not p.grad.any() for p in sae.parameters())
    assert sae.eval()(x)[1].loss == 0

@pytest.mark.parametrize('site', SITES)
@pytest.mark.parametrize('training', [True, False])
def test_forward_changes_no_state(site, training):
    """A forward pass only looks: counters move in revive() alone. Published SAEs count in eval too."""
    sae = make(site).train(training)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    sae(inputs())
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())

# ----------------------------------------------------------------------------------------------------
# init

def test_init_table():
    """The table in reset_parameters() is true, and makes y about the least-squares fit to h."""
    torch.manual_seed(0)
    C, F, k = 256, 4096, 32
    length = 1 / (1 + 2 * k * math.log(F / k) / C)
    tied, untied, hidden = SAE(C, F, k, tied_init=True), SAE(C, F, k), SAE(C, F, k, 'hidden')
    for sae in (tied, untied):
        torch.testing.assert_close(sae.W_enc.norm(dim=-1), torch.ones(F))
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((F,), length))
        assert not sae.b_enc.any() and not sae.b_dec.any()
    torch.testing.assert_close(tied.W_dec, length * tied.W_enc)
    cosine = torch.nn.functional.cosine_similarity(untied.W_dec, untied.W_enc)
    assert cosine.abs().mean() < 0.1
    torch.testing.assert_close(hidden.W_enc.std(), torch.tensor(C ** -0.5), rtol=0.02, atol=0)
    assert not hidden.W_dec.any() and hidden.b_dec is None
    assert not list(SAE(C, F, k, 'stream').parameters())
    h = norm(torch.randn(64, C))
    y = tied(h[None])[0][0]
    best = (h * y).sum() / y.square().sum() # the factor that would fit h best
    assert 0.8 < best < 1.2, best # measured 1.15: 2 ln(F/K) is a little more than the mean square

# ----------------------------------------------------------------------------------------------------
# schedules

def test_blend_alpha():
    """0 before the start, 1 from the end on, linear between; 0 and 0 is full strength from step 0 (naive insertion)."""
    assert [blend_alpha(p, 0.2, 0.6) for p in (0, 0.2, 0.6, 1)] == [0, 0, 1, 1]
    assert blend_alpha(0.4, 0.2, 0.6) == pytest.approx(0.5)
    assert blend_alpha(0, 0, 0) == 1
    assert (blend_alpha(0.49, 0.5, 0.5), blend_alpha(0.5, 0.5, 0.5)) == (0, 1)

def test_k_annealing():
    """From k_start down to k, never outside, reached at the end of annealing; k_start = 0 is off."""
    ks = [k_at(p / 100, 256, 16, 0.5) for p in range(101)]
    assert ks[0] == 256 and ks[25] == 64 and ks[50:] == [16] * 51
    assert ks == sorted(ks, reverse=True)
    assert k_at(0, 0, 16, 0.5) == 16 and k_at(0, 256, 16, 0) == 16

# ----------------------------------------------------------------------------------------------------
# metrics, against loops

def test_fvu_by_hand():
    """|t - y|^2 / |t - mean|^2 over tokens: 0 for a perfect copy, 1 for the mean, and a loop for the rest."""
    t, y = inputs(), inputs(seed=9)
    assert fraction_unexplained(t, t) == 0
    mean = t.flatten(0, 1).mean(0)
    torch.testing.assert_close(fraction_unexplained(t, mean.expand_as(t)), torch.tensor(1.0))
    above = sum(float((t[b, i, c] - y[b, i, c]) ** 2) for b in range(2) for i in range(8) for c in range(C))
    below = sum(float((t[b, i, c] - mean[c]) ** 2) for b in range(2) for i in range(8) for c in range(C))
    assert float(fraction_unexplained(t, y)) == pytest.approx(above / below, rel=1e-5)
    assert fraction_unexplained(torch.ones(1, 3, C), torch.ones(1, 3, C)).isfinite()

def test_layer_metrics_by_hand():
    """L0, fired and FVU of a forward pass equal a loop over its tokens."""
    sae, x = make(), inputs()
    with torch.no_grad():
        sae.b_enc -= 1.5 # so that some tokens have fewer than K
    y, out = sae(x)
    pre = ((norm(x) - sae.b_dec) @ sae.W_enc.T + sae.b_enc).tolist()
    sets = [[f for f in sorted(range(F), key=lambda f: -row[f])[:K] if row[f] > 0] for seq in pre for row in seq]
    assert any(len(s) < K for s in sets) and any(len(s) == K for s in sets)
    assert float(out.l0) == pytest.approx(sum(map(len, sets)) / len(sets))
    assert out.fired.nonzero().flatten().tolist() == sorted(set().union(*sets))
    torch.testing.assert_close(out.fvu, fraction_unexplained(norm(x), y))

def test_token_entropy_and_top_tokens_by_brute_force():
    """Entropy in bits and the most frequent tokens of each feature, from plain dictionaries."""
    g = torch.Generator().manual_seed(0)
    F, V, N, K = 12, 7, 200, 3
    values = torch.rand(N, K, generator=g) * (torch.rand(N, K, generator=g) > 0.3)
    indices = torch.stack([torch.randperm(F - 1, generator=g)[:K] for _ in range(N)]) # feature 11 never fires
    tokens = torch.randint(V, (N,), generator=g)
    tokens[values[:, 0] > 0.9] = 2
    seen = [{} for _ in range(F)]
    for n in range(N):
        for j in range(K):
            if values[n, j] != 0:
                counts, v = seen[indices[n, j]], int(tokens[n])
                counts[v] = counts.get(v, 0) + 1
    keys, counts = count_pairs(values.view(4, 50, K), indices.view(4, 50, K), tokens.view(4, 50), V)
    entropy = token_entropy(keys, counts, F, V)
    top, top_counts = top_tokens(keys, counts, F, V, n=5)
    for f in range(F):
        total = sum(seen[f].values())
        if total == 0:
            assert entropy[f].isnan() and (top[f] == -1).all() and not top_counts[f].any()
            continue
        want = sum(-c / total * math.log2(c / total) for c in seen[f].values())
        assert float(entropy[f]) == pytest.approx(want, abs=1e-12)
        best = sorted(seen[f].items(), key=lambda item: (-item[1], item[0]))[:5]
        assert top[f].tolist() == [v for v, _ in best] + [-1] * (5 - len(best))
        assert top_counts[f].tolist() == [c for _, c in best] + [0] * (5 - len(best))

def test_entropy_of_one_token_is_zero():
    """A detector of one word: 0 bits, and not -0 or nan; of two words equally often: 1 bit."""
    values, indices = torch.ones(4, 1), torch.tensor([[0], [0], [1], [1]])
    pairs = count_pairs(values, indices, torch.tensor([5, 5, 5, 6]), 10)
    assert token_entropy(*pairs, 2, 10).tolist() == [0, 1]
    assert math.copysign(1, token_entropy(*pairs, 2, 10)[0]) == 1
