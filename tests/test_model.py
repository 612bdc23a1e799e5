"""The GPT with its SAE layers. The KV cache is tested in test_sample.py."""
import math
import os
import re
from dataclasses import asdict, replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model import GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint
from runs import at_call, interrupt, no_space, same, step_in
from sae import SITES, norm

TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=16, mlp_ratio=2,
                 sae_layers=(1, 2), sae_ratio=4, sae_k=4, sae_cap=0.3)
DENSE = replace(TINY, sae_layers=())

def make(config=TINY, seed=0, **changes):
    """A model with random weights everywhere: at init no token would see another."""
    torch.manual_seed(seed)
    model = GPT(replace(config, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model

def tokens(B=2, T=16, seed=1):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))

# ------------------------------------------------------------- the equations, once more and plainly

def unit(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

def turned(x):
    """RoPE: channels (i, i + D/2) of x (..., T, D), a complex number, turn by t / 10000^(2i/D)."""
    T, D = x.shape[-2:]
    angles = torch.arange(T)[:, None] * 10000 ** (-2 * torch.arange(D // 2).double() / D)
    z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.exp(-1j * angles)
    return torch.cat((z.real, z.imag), -1)

def plain_sparse(w, site, x, alpha, K):
    """What an SAE of weights w makes of x (B, T, ...)."""
    own = site != 'hidden'
    a = ((unit(x) - w['mean']) @ w['W_enc'].T + w['b_enc']).clamp_min(0) if own else x
    score = a if own else a + w['b_enc']
    kept = score.argsort(-1, descending=True)[..., :K]
    z = torch.zeros_like(a).scatter(-1, kept, a.gather(-1, kept))
    return (1 - alpha) * x + alpha * (z @ w['W_dec'] + w['b_dec'] if own else z)

def plain_logits(c, state, idx, alpha):
    """Logits (B, T, V) from a config and weights, one head at a time."""
    D = c.n_embd // c.n_head
    later = torch.ones(idx.size(1), idx.size(1)).triu(1).bool()
    x = unit(state['transformer.wte.weight'][idx])
    for i in range(c.n_layer):
        start = f'transformer.h.{i}.'
        w = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        def sparse(site, x):
            if site != c.sae_site or i not in c.sae_layers:
                return x
            own = {k.removeprefix('sae.'): v for k, v in w.items()}
            return plain_sparse(own, site, x, alpha, c.sae_k)
        q, k, v = (unit(x) @ w['attn.c_attn.weight'].T).chunk(3, -1)
        heads = []
        for query, key, value in zip(q.split(D, -1), k.split(D, -1), v.split(D, -1)):
            scores = turned(unit(query)) @ turned(unit(key)).mT / math.sqrt(D)     # (B, T, T)
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ value)
        x = x + sparse('attn', torch.cat(heads, -1) @ w['attn.c_proj.weight'].T)
        hidden = sparse('hidden', (unit(x) @ w['mlp.c_fc.weight'].T).clamp_min(0) ** 2)
        x = x + sparse('mlp', hidden @ w['mlp.c_proj.weight'].T)
        x = sparse('resid', x)
    return (unit(x) @ state['transformer.wte.weight'].T)[..., :c.vocab_size]

@pytest.mark.parametrize('site', [*SITES, 'dense'])
def test_forward_by_its_equations(site):
    """Logits, loss and all gradients are those of the plain lines above in fp64, with the blend
    half-way. In eval mode nothing drops out."""
    changes = dict(sae_layers=()) if site == 'dense' else dict(sae_site=site)
    model = make(dropout=0.1, **changes).eval()
    idx, targets = tokens(), tokens(seed=2)
    for sae in model.saes().values():
        sae.alpha.fill_(0.6)
        for t in (sae.b_enc.data, sae.mean) if site != 'hidden' else (sae.b_enc,):
            t.normal_()
    logits, _, out = model(idx)
    assert (out is None) == (site == 'dense')
    state = {k: v.double() for k, v in model.state_dict().items()}
    weights = {k: state[k].requires_grad_() for k, _ in model.named_parameters()}
    want = plain_logits(model.config, state, idx, 0.6)
    torch.testing.assert_close(logits.double(), want, rtol=1e-4, atol=1e-4)
    want_loss = -want.log_softmax(-1).gather(-1, targets[..., None]).mean()
    _, loss, _ = model(idx, targets)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    for grad, (name, p) in zip(torch.autograd.grad(want_loss, [*weights.values()]),
                               model.named_parameters()):
        torch.testing.assert_close(p.grad.double(), grad, rtol=1e-3, atol=1e-5,
                                   msg=lambda text: f"{name}: {text}")

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('site', SITES)
def test_future_never_changes_earlier_logits(site, training):
    """Changing token t changes no logit before t, to the bit, with dropout too, and does change
    later ones. No pass changes a parameter or a buffer."""
    model, idx = make(sae_site=site, dropout=0.1).train(training), tokens()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for t in (1, 15):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 11) % 50
        other[1] = (other[1] + 5) % 50 # nor does another sequence of the batch
        torch.manual_seed(3)
        before, _, out = model(idx)
        torch.manual_seed(3)
        after, _, out2 = model(other)
        assert torch.equal(before[0, :t], after[0, :t])
        assert torch.equal(out.values[:, 0, :t], out2.values[:, 0, :t])
        assert not torch.equal(before[0, t:], after[0, t:])
    assert same(dict(model.state_dict()), state)
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        model(tokens(T=17))

@pytest.mark.parametrize('site', SITES)
def test_sae_out_and_writes(site):
    """One row of every field for each SAE layer, in the order of the blocks; and writes() is what
    a feature adds to the place where its SAE sits."""
    model = make(sae_site=site, sae_layers=(2, 1))
    out, F = model(tokens())[2], 32 if site == 'hidden' else 64
    assert out.values.shape == out.indices.shape == (2, 2, 16, 4) and out.fired.shape == (2, F)
    assert out.l0.shape == out.fvu.shape == out.loss.shape == out.length.shape == (2,)
    assert list(model.saes()) == [1, 2]
    sae, mlp = model.saes()[1], model.transformer.h[1].mlp
    z = torch.zeros(2, F)
    z[1, 3] = 1.0
    sae.scale.fill_(3.0 if sae.site.own else 1.0)
    wrote = sae.decode(z)[1] - sae.decode(z)[0]
    wrote = mlp.c_proj(wrote) if site == 'hidden' else wrote
    assert model.writes(1).shape == (F, 16)
    torch.testing.assert_close(model.writes(1)[3], sae.scale * wrote)

# ------------------------------------------------------------------- init, parameter groups, config

def test_init():
    """Every block is the identity, and nothing is known yet. Padding never counts."""
    torch.manual_seed(0)
    model = GPT(replace(TINY, n_embd=64, vocab_size=999))
    wte, block = model.transformer.wte.weight, model.transformer.h[0]
    assert wte.shape == (1024, 64) # padded to a multiple of 64
    for p, std in ((wte, 0.02), (block.attn.c_attn.weight, 1 / 8), (block.mlp.c_fc.weight, 1 / 8)):
        assert p.std().item() == pytest.approx(std, rel=0.03)
    for sae in model.saes().values():
        sae.alpha.zero_()
    want = norm(norm(wte[tokens()])) @ wte.T
    torch.testing.assert_close(model(tokens())[0], want[..., :999])
    assert abs(model(tokens(), tokens(seed=2))[1] - math.log(999)) < 0.2

@pytest.mark.parametrize('site', SITES)
def test_every_parameter_is_optimised_once(site):
    """The GPT's decay; the SAE's do not, and have a learning rate of their own."""
    model = make(sae_site=site)
    groups = model.optimizer_groups(0.1, 3.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {key: [names.pop(id(p)) for g in gs for p in g['params']] for key, gs in groups.items()}
    assert not names and found['embedding'] == ['transformer.wte.weight']
    assert all(name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
               for name in found['matrices'])
    for key, gs in groups.items():
        rates = [(g['weight_decay'], g['lr_factor']) for g in gs]
        assert rates == ([(0.0, 3.0), (0.0, 150.0)] if key == 'sae' else [(0.1, 1.0)])
        assert key != 'sae' or [len(g['params']) for g in gs] == [6, 2] # of two SAEs; 2 are b_enc

def test_flops_by_hand():
    """6 a weight of the dense matmuls and 12 L C T for attention; the SAE's 2 F C + 10 K C."""
    L, C, T, V, F, K = 3, 16, 16, 64, 64, 4
    dense = 6 * (L * (3 * C * C + C * C + 2 * 2 * C * C) + V * C) + 12 * L * C * T
    assert GPT(DENSE).flops_per_token() == dense
    assert GPT(TINY).flops_per_token() == dense + 2 * (2 * F * C + 10 * K * C)
    assert GPT(replace(TINY, sae_site='hidden')).flops_per_token() == dense
    assert GPT(DENSE).num_params() - V * C == GPT(DENSE).num_params(True) == L * 8 * C * C

def test_all_problems_of_a_config_at_once():
    """Every contradiction is named in one go, with its value; a sound config has none."""
    keys = lambda **bad: sorted(p.split('=')[0] for p in replace(TINY, **bad).problems())
    assert keys() == [] == GPTConfig().problems() and keys(n_head=0) == ['n_head']
    with pytest.raises(ValueError, match='n_embd=15.*sae_layers.*3'):
        GPT(replace(TINY, n_embd=15, sae_layers=(1, 3)))
    cases = dict(sae_k=65, n_layer=0, sae_recon=-1.0, sae_nudge=math.nan, sae_layers=(1, 1),
                 n_head=16, sae_ratio=0, block_size=-1, sae_silent_steps=0, sae_cap=0.0625)
    for key, value in cases.items():
        problem, = replace(TINY, **{key: value}).problems()
        assert key in problem and str(list(value) if key == 'sae_layers' else value) in problem
    assert keys(sae_site='hidden', sae_k=33) == ['sae_k']

# ------------------------------------------------------------------------------------------ compile

@pytest.mark.parametrize('backend, rtol', [
    ('eager', 1e-5), pytest.param('inductor', 1e-3, marks=pytest.mark.slow)])
def test_compiled_equals_eager_and_compiles_once(backend, rtol):
    """alpha is a buffer: a whole run, with it changing, is one graph without breaks, and
    computes the same. inductor, which train.py uses, needs a C++ compiler."""
    for site in ('resid', 'hidden'):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        model = make(sae_site=site, n_layer=1, sae_layers=(0,), sae_recon=0.1)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for alpha in (0.0, 0.3, 0.7, 1.0):
            for sae in model.saes().values():
                sae.alpha.fill_(alpha)
            results = []
            for m in (compiled, model):
                model.zero_grad()
                _, loss, out = m(tokens(), tokens(seed=2))
                (loss + out.loss.sum()).backward()
                grads = [p.grad.clone() for p in model.parameters()]
                results.append([loss.detach(), out.loss.detach(), out.values.detach(), *grads])
            torch.testing.assert_close(*results, rtol=rtol, atol=1e-5)
        assert counter.frame_count == 1, site

# -------------------------------------------------------------------------------------- checkpoints

def checkpoint(step):
    model = make(seed=step)
    return dict(model=model.state_dict(), model_args=asdict(model.config), step=step)

@pytest.fixture
def saved(tmp_path):
    """A folder with ckpt.pt of step 2 and ckpt_prev.pt of step 1."""
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    return tmp_path

def test_checkpoint_round_trip(saved):
    """What is saved comes back to the bit."""
    assert same(load_checkpoint(saved), checkpoint(2))
    model = load_model(load_checkpoint(saved))
    assert model.config == TINY and not model.training

class Malicious:
    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)

def flip(raw):
    at = len(raw) // 2 # among the weights, where torch.load sees nothing
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:]

DAMAGES = dict(empty=lambda raw: b'', cut=lambda raw: raw[:-1], flipped=flip)

@pytest.mark.parametrize('what', [*DAMAGES, 'missing', 'foreign', 'malicious'])
def test_damaged_checkpoint_falls_back(what, saved, capsys):
    """It is named, and the one before is used. A pickle that calls os.system is not executed."""
    path, evil = saved / 'ckpt.pt', Malicious()
    evil.mark = saved / 'executed'
    if what in DAMAGES:
        path.write_bytes(DAMAGES[what](path.read_bytes()))
    elif what == 'missing':
        path.unlink()
    else:
        torch.save(dict(checkpoint(3), extra=evil) if what == 'malicious' else {}, path)
    assert same(load_checkpoint(saved), checkpoint(1)) and not evil.mark.exists()
    assert re.fullmatch("warning: .*ckpt.pt .*ckpt_prev.pt instead\n", capsys.readouterr().err)
    if what == 'malicious':
        torch.load(path, weights_only=False) # the trap itself works
        assert evil.mark.exists()

# torn: ckpt.pt was torn before, and ckpt_prev.pt is the only good one
@pytest.mark.parametrize('torn', [True, False])
@pytest.mark.parametrize('call, n', [('os.fsync', 1), ('os.replace', 1), ('os.replace', 2)])
def test_killed_between_any_two_steps_of_a_save(call, n, torn, saved, monkeypatch):
    """At each call that changes the folder: a good checkpoint is left, and saves go on."""
    if torn:
        (saved / 'ckpt.pt').write_bytes(b'torn')
    at_call(call, n, interrupt, put=monkeypatch.setattr)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, checkpoint(3))
    assert step_in(saved) in ((1, 3) if torn else (2, 3))
    save_checkpoint(saved, checkpoint(4))
    save_checkpoint(saved, checkpoint(5))
    assert sorted(os.listdir(saved)) == ['ckpt.pt', 'ckpt_prev.pt']
    (saved / 'ckpt.pt').unlink()
    assert step_in(saved) == 4

def test_rotation_fails(saved, monkeypatch, capsys):
    """The old checkpoint cannot be put aside: a warning; the new one is in place."""
    at_call('os.replace', 1, no_space, put=monkeypatch.setattr)
    save_checkpoint(saved, checkpoint(3))
    assert 'warning' in capsys.readouterr().out and step_in(saved) == 3
