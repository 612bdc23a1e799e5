"""
The GPT with its SAE layers: no future leaks, the dense twin, KV cache, compile, and checkpoints. CPU, seconds.

    python -m pytest tests/test_model.py
    python -m pytest tests/test_model.py --slow     also compiles with inductor, the real backend (a minute)
"""
import io
import math
import os
import random
from dataclasses import asdict, replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model import GPT, GPTConfig, KVCache, load_checkpoint, load_model, save_checkpoint
from runs import disk_full, same
from sae import SITES, norm

TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=16, mlp_ratio=2, sae_layers=(1, 2), sae_ratio=4, sae_k=4)
DENSE = replace(TINY, sae_layers=())

def make(config=TINY, seed=0, **changes):
    """A model with random weights everywhere: at init every c_proj is 0, and no token would see another."""
    torch.manual_seed(seed)
    model = GPT(replace(config, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model

def tokens(B=2, T=16, seed=1):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))

# ----------------------------------------------------------------------------------------------------
# what a position may see

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('site', SITES)
def test_future_never_changes_earlier_logits(site, training):
    """Changing token t changes no logit before t, to the bit, with dropout too: batch-level TopK fails this."""
    model, idx = make(sae_site=site, dropout=0.1).train(training), tokens()
    for t in (1, 7, 15):
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

@pytest.mark.parametrize('site', SITES)
def test_the_past_matters(site):
    """The counterpart: the first token does change the last logits, so the test above is no test of a blind model."""
    model, idx = make(sae_site=site).eval(), tokens()
    other = idx.clone()
    other[:, 0] = (other[:, 0] + 1) % 50
    assert not torch.equal(model(idx)[0][:, -1], model(other)[0][:, -1])

# ----------------------------------------------------------------------------------------------------
# the dense twin

def dense_twin(model):
    """The dense GPT with the same weights. At hidden the SAE's matrices are the MLP's."""
    twin = GPT(replace(model.config, sae_layers=()))
    state = {k: v for k, v in model.state_dict().items() if '.sae.' not in k}
    for i, sae in model.saes().items():
        if sae.site == 'hidden':
            with torch.no_grad():
                sae.b_enc.zero_() # the dense MLP has no biases
            mlp = twin.transformer.h[i].mlp
            mlp.c_fc.weight, mlp.c_proj.weight = sae.W_enc, torch.nn.Parameter(sae.W_dec.detach().T) # same memory layout
            state |= {f'transformer.h.{i}.mlp.c_fc.weight': sae.W_enc, f'transformer.h.{i}.mlp.c_proj.weight': sae.W_dec.T}
    twin.load_state_dict(state)
    return twin

@pytest.mark.parametrize('dropout', [0.0, 0.2])
@pytest.mark.parametrize('site', SITES)
def test_alpha_zero_is_the_dense_model(site, dropout):
    """Until the blend begins, logits, loss and the gradients of all dense weights are the dense twin's, to the bit."""
    model = make(sae_site=site, dropout=dropout)
    for sae in model.saes().values():
        sae.alpha.zero_()
    twin, idx = dense_twin(model), tokens()
    torch.manual_seed(4)
    _, loss, _ = model(idx, tokens(seed=2))
    torch.manual_seed(4)
    _, want_loss, _ = twin(idx, tokens(seed=2))
    assert torch.equal(loss, want_loss) and (dropout or torch.equal(model(idx)[0], twin(idx)[0]))
    loss.backward()
    want_loss.backward()
    grads = {n: p.grad for n, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        if name in grads:
            assert torch.equal(p.grad, grads[name]), name
    if site == 'hidden':
        mlp = twin.transformer.h[1].mlp
        torch.testing.assert_close(model.saes()[1].W_dec.grad, mlp.c_proj.weight.grad.T)

def test_dense_model_has_no_sae():
    """sae_layers = (): a plain GPT, and SAEOut is None."""
    model = GPT(DENSE)
    assert model(tokens())[2] is None and not model.saes() and not any('sae' in n for n in model.state_dict())

@pytest.mark.parametrize('site', SITES)
def test_sae_out_shapes(site):
    """One row of every field for each SAE layer, in the order of the blocks."""
    model = make(sae_site=site)
    _, loss, out = model(tokens(), tokens(seed=2))
    logits = model(tokens())[0]
    F = model.config.n_features
    assert F == {'hidden': 32, 'stream': 16}.get(site, 64) == model.saes()[1].n_features
    assert logits.shape == (2, 16, 50) and loss.shape == ()
    assert out.values.shape == out.indices.shape == (2, 2, 16, 4) and out.fired.shape == (2, F)
    assert out.l0.shape == out.fvu.shape == out.loss.shape == (2,)
    assert out.indices.min() >= 0 and out.indices.max() < F
    model.saes()[1].k.fill_(2)
    assert model(tokens())[2].l0.tolist() == [2, 4]

# ----------------------------------------------------------------------------------------------------
# init, parameter groups, config

def test_init_table():
    """The table in init_weights() is true: at init every block is the identity, and the generic init spares the SAE."""
    torch.manual_seed(0)
    model = GPT(replace(TINY, n_embd=64, n_layer=2, sae_layers=(1,), vocab_size=999))
    close = lambda p, std: torch.testing.assert_close(p.std(), torch.tensor(std), rtol=0.03, atol=0)
    close(model.transformer.wte.weight, 0.02)
    assert model.transformer.wte.weight.shape == (1024, 64) # padded to a multiple of 64
    for block in model.transformer.h:
        close(block.attn.c_attn.weight, 64 ** -0.5)
        close(block.mlp.c_fc.weight, 64 ** -0.5)
        assert not block.attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
    torch.testing.assert_close(model.saes()[1].W_enc.norm(dim=-1), torch.ones(256))
    idx = tokens()
    model.saes()[1].alpha.zero_()
    tok = norm(model.transformer.wte(idx))
    torch.testing.assert_close(model(idx)[0], (norm(tok) @ model.transformer.wte.weight.T)[..., :999])
    loss = GPT(replace(TINY, n_embd=64))(idx, tokens(seed=2))[1]
    assert abs(loss - math.log(50)) < 0.2 # nothing is known yet

def test_padding_never_counts():
    """The vocabulary is padded to 64 rows for the matmuls: loss and gradients are those without the padding."""
    model, idx, targets = GPT(DENSE), tokens(), tokens(seed=2)
    loss = torch.nn.functional.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    want, = torch.autograd.grad(loss, model.transformer.wte.weight)
    _, padded_loss, _ = model(idx, targets)
    padded_loss.backward()
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(model.transformer.wte.weight.grad, want)
    assert not want[50:].any() and want[:50].any()

@pytest.mark.parametrize('site', SITES)
def test_every_parameter_is_optimised_once(site):
    """The GPT's matrices decay, at hidden the SAE's two among them, which are the MLP's; nothing else of an SAE does, and it
    has its own learning rate. Each parameter is in exactly one group."""
    model = make(sae_site=site)
    groups = model.optimizer_groups(0.1, 1e-3, 3.0)
    ids = [id(p) for g in groups for p in g['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    sae = {id(p) for s in model.saes().values() for p in s.parameters() if site != 'hidden' or p.dim() == 1}
    for g in groups:
        assert (g['weight_decay'], g['lr']) == ((0.1, 1e-3) if g['name'] == 'matrices' else (0.0, 3e-3))
        assert all((id(p) in sae) == (g['name'] != 'matrices') for p in g['params'])

def test_flops_by_hand():
    """6 a weight of the dense matmuls and 12 L C T for attention; the SAE's 2 F C + 10 K C. wte counts once: as the head."""
    L, C, T, V, F, K = 3, 16, 16, 64, 64, 4
    dense = 6 * (L * (3 * C * C + C * C + 2 * 2 * C * C) + V * C) + 12 * L * C * T
    assert GPT(DENSE).flops_per_token() == dense
    assert GPT(TINY).flops_per_token() == dense + 2 * (2 * F * C + 10 * K * C + 6 * C * C)
    assert GPT(DENSE).num_params() == L * 8 * C * C + V * C and GPT(DENSE).num_params(True) == L * 8 * C * C

def test_all_problems_of_a_config_at_once():
    """Every contradiction is named in one go, with its value; a sound config has none."""
    assert TINY.problems() == [] and GPTConfig().problems() == []
    bad = replace(TINY, n_embd=15, dropout=1.5, sae_layers=(1, 3), sae_site='middle')
    assert sorted(p.split('=')[0] for p in bad.problems()) == ['dropout', 'n_embd', 'sae_layers', 'sae_site']
    worse = replace(bad, n_head=0, sae_ratio=-1) # what cannot be computed with these is left out, no more
    assert sorted(p.split('=')[0] for p in worse.problems()) == ['dropout', 'n_head', 'sae_ratio', 'sae_site']
    with pytest.raises(ValueError, match='dropout=1.5.*n_embd=15.*sae_layers.*3.*middle'):
        GPT(bad)
    cases = dict(sae_k=65, sae_k_start=65, n_layer=0, sae_recon=-1.0, sae_nudge=math.nan, sae_layers=(1, 1), n_head=16,
                 sae_ratio=0, block_size=-1)
    for key, value in cases.items():
        problems = replace(TINY, **{key: value}).problems()
        assert len(problems) == 1 and key in problems[0], (key, problems)
    assert 'sae_k_start=2' in replace(TINY, sae_k_start=2).problems()[0]
    assert 'sae_k=33' in replace(TINY, sae_site='hidden', sae_k=33).problems()[0]
    assert 'sae_auxk=0.1' in replace(TINY, sae_site='stream', sae_auxk=0.1).problems()[0]

def test_too_long_a_sequence():
    """More tokens than block_size: a sentence, not an index error inside RoPE."""
    with pytest.raises(ValueError, match="17 tokens do not fit the model's block_size of 16"):
        make()(tokens(T=17))

def test_overfits_one_batch():
    """The simplest proof that gradients reach everything: one batch learnt by heart through K features, at alpha 1."""
    torch.manual_seed(0)
    model, x, y = GPT(replace(TINY, n_embd=32, sae_tied_init=True)), tokens(), tokens(seed=2)
    opt = torch.optim.AdamW(model.optimizer_groups(0.0, 1e-2, 1.0))
    for _ in range(120):
        _, loss, out = model(x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 0.1, loss
    assert (out.l0 == 4).all()

# ----------------------------------------------------------------------------------------------------
# KV cache and sampling

@pytest.mark.parametrize('site', SITES)
def test_cache_equals_recomputation(site):
    """A prompt at once, then token by token: the logits and the features of each position are those of a whole pass."""
    model, idx = make(sae_site=site).eval(), tokens()
    want, _, want_out = model(idx)
    cache = KVCache(model.config, 2, 'cpu', torch.float32)
    logits, _, out = model(idx[:, :5], cache=cache)
    torch.testing.assert_close(logits, want[:, 4:5], rtol=1e-4, atol=1e-4)
    for t in range(5, 16):
        logits, _, out = model(idx[:, t:t + 1], cache=cache)
        torch.testing.assert_close(logits, want[:, t:t + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.values[:, :, 0], want_out.values[:, :, t], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="block_size"):
        model(idx[:, :1], cache=cache)

@pytest.mark.parametrize('prompt', [1, 5, 16, 40])
def test_sampling_equals_recomputation_past_block_size(prompt):
    """Greedy text of 40 tokens is what it is without a cache. A full cache goes on from the last half of the context."""
    model, idx = make().eval(), tokens(T=prompt)
    got = torch.cat(list(model.generate(idx, 40, temperature=0)), dim=1)
    window, want = min(prompt, 16), idx
    for _ in range(40):
        if window > 16:
            window = 8
        with torch.no_grad():
            new = model(want[:, -window:])[0][:, -1].argmax(-1, keepdim=True)
        want, window = torch.cat((want, new), dim=1), window + 1
    assert torch.equal(got, want[:, prompt:])

def test_sampling_is_seeded_and_obeys_top_k():
    """The same generator seed gives the same text; top_k=1 is greedy; the global generator is not touched."""
    model, idx = make().eval(), tokens(T=3)
    def sample(seed, **kw):
        return torch.cat(list(model.generate(idx, 12, generator=torch.Generator().manual_seed(seed), **kw)), 1).tolist()
    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_k=1) == sample(2, temperature=0)
    assert torch.equal(state, torch.get_rng_state())

def test_evaluation_and_sampling_leave_the_model_untouched():
    """Neither a forward pass in eval or train mode nor sampling changes a parameter or a buffer, counters included."""
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()(tokens(), tokens(seed=2))
    list(model.eval().generate(tokens(T=2), 20))
    assert same(dict(model.state_dict()), before)

# ----------------------------------------------------------------------------------------------------
# compile

def compile_and_compare(backend, rtol):
    """A compiled step against an eager one at alphas and Ks of a whole run: one graph for all of them."""
    for site in ('resid', 'hidden', 'stream'):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        model = make(sae_site=site, n_layer=1, sae_layers=(0,), sae_k_start=8, sae_recon=0.1)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for alpha, k in ((0.0, 8), (0.3, 6), (0.7, 5), (1.0, 4)):
            for sae in model.saes().values():
                sae.alpha.fill_(alpha)
                sae.k.fill_(k)
            grads = []
            for m in (compiled, model):
                model.zero_grad()
                _, loss, out = m(tokens(), tokens(seed=2))
                (loss + out.loss.sum()).backward()
                grads.append([loss.detach(), out.loss.detach(), out.values.detach()] + [p.grad.clone() for p in model.parameters()])
            torch.testing.assert_close(*grads, rtol=rtol, atol=1e-5)
        assert counter.frame_count == 1, site

def test_compiled_equals_eager_and_compiles_once():
    """alpha and K are buffers: a whole run, with both changing, is one graph without breaks, and computes the same."""
    compile_and_compare('aot_eager', rtol=1e-5)

@pytest.mark.slow
def test_compiled_with_inductor():
    """The same with the backend that train.py uses; needs a C++ compiler.

    python -m pytest tests/test_model.py --slow -k inductor"""
    compile_and_compare('inductor', rtol=1e-3)

# ----------------------------------------------------------------------------------------------------
# checkpoints

def checkpoint(step, model=None):
    model = model or make(seed=step)
    return dict(model=model.state_dict(), model_args=asdict(model.config), step=step)

def two_saves(path):
    """A folder with ckpt.pt of step 2 and ckpt_prev.pt of step 1."""
    save_checkpoint(str(path), checkpoint(1))
    save_checkpoint(str(path), checkpoint(2))
    return path / 'ckpt.pt'

def test_checkpoint_round_trip(tmp_path):
    """What is saved comes back to the bit, config and SAE state included, and the one before is kept."""
    two_saves(tmp_path)
    assert same(load_checkpoint(str(tmp_path)), checkpoint(2))
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_prev.pt']
    model = load_model(load_checkpoint(str(tmp_path)))
    assert model.config == TINY and not model.training
    assert torch.equal(model(tokens())[0], make(seed=2).eval()(tokens())[0])

def test_compile_prefix_never_in_keys(tmp_path):
    """Saving the module that was compiled, not its wrapper: nanoGPT's checkpoints carry _orig_mod. in every key."""
    model = make()
    compiled = torch.compile(model, backend='eager')
    compiled(tokens())
    save_checkpoint(str(tmp_path), checkpoint(1, model))
    assert not any('_orig_mod' in k or k.startswith('module.') for k in load_checkpoint(str(tmp_path))['model'])

@pytest.mark.parametrize('damage', ['empty', 'halved', 'one bit', 'text', 'missing', 'not ours'])
def test_damaged_checkpoint_falls_back(tmp_path, capsys, damage):
    """A torn or foreign newest checkpoint is named, the one before is used, and that is said."""
    path = two_saves(tmp_path)
    raw = bytearray(path.read_bytes())
    if damage == 'missing':
        path.unlink()
    elif damage == 'not ours':
        torch.save({'weights': torch.ones(2)}, path)
    else:
        raw[len(raw) // 2] ^= 4
        path.write_bytes({'empty': b'', 'halved': raw[:len(raw) // 2], 'one bit': raw, 'text': b'hello'}[damage])
    assert same(load_checkpoint(str(tmp_path)), checkpoint(1))
    said = capsys.readouterr().out
    assert 'warning' in said and f'{path} ' in said and 'ckpt_prev.pt' in said and said.count('\n') == 1

def test_no_checkpoint_at_all(tmp_path):
    """Nothing, or nothing readable: one sentence that names both files."""
    with pytest.raises(ValueError, match='no checkpoint in .*ckpt.pt is missing.*ckpt_prev.pt is missing'):
        load_checkpoint(str(tmp_path))
    for name in ('ckpt.pt', 'ckpt_prev.pt'):
        (tmp_path / name).write_bytes(b'')
    with pytest.raises(ValueError, match='ckpt.pt cannot be read.*ckpt_prev.pt cannot be read'):
        load_checkpoint(str(tmp_path))

def test_fuzzed_checkpoints(tmp_path, capsys):
    """200 times a random bit flipped or the tail cut: what is loaded is always whole, from this file or from the one before."""
    path = two_saves(tmp_path)
    raw, newest, previous = path.read_bytes(), checkpoint(2), checkpoint(1)
    rng, fell_back = random.Random(0), 0
    for _ in range(200):
        torn = bytearray(raw)
        if rng.random() < 0.7:
            torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        else:
            del torn[rng.randrange(len(torn)):]
        path.write_bytes(torn)
        got = load_checkpoint(str(tmp_path))
        fell_back += got['step'] == 1
        assert same(got, newest if got['step'] == 2 else previous)
    assert fell_back > 100 # the rest hit padding between records, which means nothing
    capsys.readouterr()

class Malicious:
    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)

def test_malicious_pickle_is_not_executed(tmp_path, capsys):
    """A checkpoint is data: a pickle that calls os.system is refused, and the one before is used."""
    path = two_saves(tmp_path)
    evil = Malicious()
    evil.mark = tmp_path / 'executed'
    torch.save(dict(checkpoint(3), extra=evil), path)
    assert load_checkpoint(str(tmp_path))['step'] == 1
    assert not evil.mark.exists() and 'cannot be read' in capsys.readouterr().out
    torch.load(path, weights_only=False) # the trap itself works
    assert evil.mark.exists()

@pytest.mark.parametrize('corrupt, links', [(True, True), (False, True), (False, False)]) # (True, False): only ckpt.tmp is whole
@pytest.mark.parametrize('n', range(1, 6))
def test_killed_between_any_two_steps_of_a_save(n, corrupt, links, tmp_path, monkeypatch, capsys):
    """At the n-th call that changes the folder: a good checkpoint is left, also where ckpt.pt was torn before and
    ckpt_prev.pt was the only good one, and (ckpt.pt being good) on a file system without hard links. The next save mends all."""
    path, calls = two_saves(tmp_path), [0]
    if corrupt:
        path.write_bytes(b'torn')
    class Killed(BaseException):
        pass
    def counted(function):
        def wrapped(*args):
            calls[0] += 1
            if calls[0] == n:
                raise Killed
            if not links and function is link:
                raise OSError
            return function(*args)
        return wrapped
    link = os.link
    for name in ('link', 'replace', 'remove', 'fsync'):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    try:
        save_checkpoint(str(tmp_path), checkpoint(3))
    except Killed:
        pass
    assert calls[0] >= min(n, 4) # so n goes over all of them
    assert load_checkpoint(str(tmp_path))['step'] in ((1, 3) if corrupt else (2, 3))
    monkeypatch.undo()
    save_checkpoint(str(tmp_path), checkpoint(4))
    save_checkpoint(str(tmp_path), checkpoint(5))
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_prev.pt']
    path.unlink()
    assert load_checkpoint(str(tmp_path))['step'] == 4
    capsys.readouterr()

def test_checkpoint_of_another_version(tmp_path):
    """Sound files that this model.py cannot make a model of: ValueError, one sentence."""
    good = checkpoint(1)
    for bad in (dict(model_args=good['model_args'] | dict(n_heads=3)), dict(model_args=good['model_args'] | dict(n_layer='3')),
                dict(model_args=[1]), dict(model={}), dict(model=None), dict(model=make(n_embd=32).state_dict())):
        with pytest.raises(ValueError, match='does not fit this version') as e:
            load_model(good | bad)
        assert '\n' not in str(e.value)

def test_rotation_fails(tmp_path, monkeypatch, capsys):
    """The old checkpoint cannot be put aside: a warning; the new one is in place, and the run goes on."""
    two_saves(tmp_path)
    replace = os.replace
    def refuse(source, target):
        if str(target).endswith('ckpt_prev.pt'):
            raise PermissionError("not today")
        replace(source, target)
    monkeypatch.setattr(os, 'replace', refuse)
    save_checkpoint(str(tmp_path), checkpoint(3))
    assert 'warning' in capsys.readouterr().out and load_checkpoint(str(tmp_path))['step'] == 3

def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    """No space left in the middle of a save: both older checkpoints are as they were, and the next save works."""
    two_saves(tmp_path)
    save = torch.save
    monkeypatch.setattr(torch, 'save', lambda c, f: disk_full(save, c, f))
    with pytest.raises(OSError, match='No space left'):
        save_checkpoint(str(tmp_path), checkpoint(3))
    assert load_checkpoint(str(tmp_path))['step'] == 2
    monkeypatch.undo()
    save_checkpoint(str(tmp_path), checkpoint(4))
    assert load_checkpoint(str(tmp_path))['step'] == 4 and not (tmp_path / 'ckpt.tmp').exists()
