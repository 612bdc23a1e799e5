"""The SAE layer alone: metrics, losses, interventions, revival of silent features, schedules. CPU,
seconds. Its equations and gradients are compared in test_model.py."""
import math

import pytest
import torch
import torch.nn.functional as functional

from model import GPTConfig
from sae import SAE, SITES, blend_alpha, fraction_unexplained, norm

C, F, K = 16, 64, 4

def make(site='resid', **changes):
    """An SAE with nothing at zero, so that no term can hide. F features."""
    torch.manual_seed(0)
    config = dict(n_layer=1, n_head=2, n_embd=C, mlp_ratio=F // C, sae_layers=(0,), sae_site=site,
                  sae_ratio=F // C, sae_k=K, sae_cap=0)
    sae = SAE(GPTConfig(**config | changes))
    with torch.no_grad():
        for p in (*sae.parameters(), sae.mean if sae.site.own else sae.b_enc):
            p.add_(0.1 * torch.randn_like(p))
    return sae

def inputs(width=C):
    return torch.randn(2, 8, width, generator=torch.Generator().manual_seed(1)) # (B, T, width)

# -------------------------------------------------------------------------------- what goes through

def test_layer_metrics_by_hand():
    """L0, on how many tokens each feature fired, FVU; what never fired gets no gradient."""
    sae, x = make(), inputs()
    with torch.no_grad():
        sae.b_enc -= 1.5 # so that some tokens have fewer than K
    y, out = sae(x)
    h = norm(x)
    largest = ((h - sae.mean) @ sae.W_enc.T + sae.b_enc).topk(K)
    active = largest.values > 0
    assert active.sum(-1).min() < K == active.sum(-1).max()
    assert out.l0 == active.sum(-1).float().mean()
    assert torch.equal(out.fired, largest.indices[active].bincount(minlength=F).int())
    want = (h - y).square().sum() / (h - h.mean((0, 1))).square().sum()
    torch.testing.assert_close(out.fvu, want)
    assert fraction_unexplained(torch.ones(1, 3, C), torch.ones(1, 3, C)).isfinite()
    y.sum().backward()
    silent = out.fired == 0
    assert silent.any() and not sae.W_enc.grad[silent].any() and not sae.W_dec.grad[silent].any()

def test_a_posthoc_sae_gives_back_the_length():
    """Spliced in post hoc, an SAE with each channel's two signs as features changes nothing."""
    sae, x = make(sae_ratio=2, sae_k=2 * C), 5 * inputs()
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.mean.zero_()
        for W in (sae.W_enc, sae.W_dec):
            W.copy_(torch.cat((torch.eye(C), -torch.eye(C))))
    assert not torch.allclose(sae(x)[0], x, rtol=0.5)
    sae.posthoc = True
    torch.testing.assert_close(sae(x)[0], x)

def test_selection_in_fp32_under_autocast():
    """Under autocast the big product is bf16; features are compared and scored in fp32."""
    with torch.autocast('cpu', torch.bfloat16):
        y, out = make()(inputs().bfloat16())
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in (out.values, out.fvu, out.loss)} == {torch.float32}

def test_interventions():
    """gate and fill act on y in eval mode alone, for ablation. steer: test_sample.py."""
    sae, x = make().eval(), inputs()
    y = sae(x)[0]
    sae.gate.zero_()
    assert not sae(x)[0].any()
    sae.fill.fill_(2.0)
    assert (sae(x)[0] == 2).all()
    assert torch.equal(sae.train()(x)[0], y)

def test_another_selection_rule():
    """A rule is one function, to be set as SAE.select: here, every positive feature."""
    sae, x = make(sae_k=F), inputs()
    want = sae(x)[0]
    sae.select = lambda a, score, k: (a, torch.arange(F).expand(a.shape))
    torch.testing.assert_close(sae(x)[0], want)

# ----------------------------------------------------------------------------------------- training

@pytest.mark.parametrize('site', SITES)
def test_reconstruction_loss(site):
    """At alpha = 0 the loss is sae_recon * FVU, and trains the SAE alone: x gets no gradient. At
    alpha above 0 it is off, as it always is at sites without a decoder of their own."""
    sae, own = make(site, sae_recon=0.5), SITES[site].own
    x = inputs(F if site == 'hidden' else C).requires_grad_()
    parameters = [*sae.parameters(), x]
    sae.alpha.zero_()
    out = sae(x)[1]
    assert (out.loss > 0) == out.loss.requires_grad == own
    if own:
        h = norm(x).detach()
        values, indices = sae.encode(h)
        y = sae.decode(torch.zeros(2, 8, F).scatter(-1, indices, values))
        want = 0.5 * fraction_unexplained(h, y)
        torch.testing.assert_close(out.loss, want)
        grads, want_grads = (torch.autograd.grad(loss, parameters, materialize_grads=True)
                             for loss in (out.loss, want))
        torch.testing.assert_close(grads, want_grads)
        assert [grad.any().item() for grad in grads] == [True] * 4 + [False]
    for alpha in (1e-3, 0.5, 1.0):
        sae.alpha.fill_(alpha)
        out = sae(x)[1]
        assert out.loss == 0 and out.fvu > 0
        if own:
            grads = torch.autograd.grad(out.loss, parameters, materialize_grads=True)
            assert not any(grad.any() for grad in grads)

@pytest.mark.parametrize('site', SITES)
def test_scale_and_rows(site):
    """Up to the hand-over scale is the stream's mean length, which an SAE gives to what it writes;
    then it stays; mean follows h in steps of a tenth. Rows of W_dec keep their length."""
    sae, before = make(site), make(site)
    x = 5 * inputs(sae.n_features if site == 'hidden' else C)
    out = sae(x)[1]
    torch.testing.assert_close(out.length, x.square().mean(-1).sqrt().mean())
    torch.testing.assert_close(out.mean, (norm(x) if sae.site.own else x).mean((0, 1)))
    for alpha, length in ((0.0, 2.0), (0.0, 3.0), (0.5, 4.0), (1.0, 5.0)):
        sae.alpha.fill_(alpha)
        sae.after_step(torch.ones(sae.n_features), 1000, torch.tensor(length), out.mean)
    if sae.site.own:
        want = out.mean + 0.9 ** 4 * (before.mean - out.mean)
        torch.testing.assert_close(sae.mean, want)
        sae.mean.copy_(before.mean)
        sae.W_dec.data *= torch.rand(sae.n_features, 1) + 0.5
        before.normalize_rows()
        sae.normalize_rows()
        torch.testing.assert_close(sae.W_dec, before.W_dec)
        before.scale.fill_(3.0)
    torch.testing.assert_close(sae(x)[0], before(x)[0])
    assert sae.scale == (3 if sae.site.own else 1)

def test_balance_by_hand():
    """b_enc rises by the nudge in each step in which a feature is silent for sae_silent_steps or
    more, and falls where the mean share of tokens, of which a step is a tenth, is above the cap;
    one busy step is no reason. Nothing else changes."""
    sae = make(sae_nudge=0.5, sae_silent_steps=3, sae_cap=0.25)
    before = {key: t.clone() for key, t in sae.state_dict().items()}
    b_enc, silent, share = before['b_enc'], torch.zeros(F), torch.zeros(F)
    for step in range(40):
        fired = torch.tensor([0, 0, 10, 26, 90])[torch.randint(5, (F,))] # of 100 tokens
        fired[:3] = torch.tensor([0, 90, 90 if step == 20 else 10])
        sae.after_step(fired, 100, 1.0, before['mean'])
        share += 0.1 * (fired / 100 - share)
        silent = torch.where(fired > 0, 0, silent + 1)
        b_enc += 0.5 * (silent >= 3).float() - 0.5 * (share > 0.25).float()
        assert sae.silent.tolist() == silent.tolist()
        assert torch.equal(sae.is_silent(), silent >= 3)
        torch.testing.assert_close(sae.share, share)
        torch.testing.assert_close(sae.b_enc, b_enc)
    rise = (b_enc - make().b_enc).detach().round(decimals=3)
    assert rise[0] == 19 and rise[1] < -15 and rise[2] == 0
    for key, t in sae.state_dict().items():
        assert key in ('silent', 'share', 'b_enc', 'W_dec') or torch.equal(t, before[key])

def test_init_table():
    """Rows of W_enc have length 1, W_dec theirs; untrained it writes less than it reads."""
    torch.manual_seed(0)
    C, F, k = 256, 4096, 32
    sae = SAE(GPTConfig(n_embd=C, sae_ratio=F // C, sae_k=k))
    length = 1 / (1 + 2 * k * math.log(F / k) / C)
    torch.testing.assert_close(sae.W_enc.norm(dim=-1), torch.ones(F))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((F,), length))
    assert not (sae.b_enc.any() or sae.b_dec.any())
    assert functional.cosine_similarity(sae.W_dec, sae.W_enc).abs().mean() < 0.1
    h = norm(torch.randn(1, 64, C))
    assert 0.1 < sae(h)[0].square().mean() < 1

def test_blend_alpha():
    """0 before the start, 1 from the end on, linear between; 0 and 0 is 1 from step 0 on."""
    assert [blend_alpha(p, 0.2, 0.6) for p in (0, 0.2, 0.6, 1)] == [0, 0, 1, 1]
    assert blend_alpha(0.3, 0.2, 0.6) == pytest.approx(0.25)
    assert blend_alpha(0, 0, 0) == 1
    assert (blend_alpha(0.49, 0.5, 0.5), blend_alpha(0.5, 0.5, 0.5)) == (0, 1)
