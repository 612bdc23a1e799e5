"""kernels.py against float64 oracles: the selection exactly, values and gradients of the layer, the
MLP and the loss; and what they promise of ties, NaN, empty slots, memory, equal bits, compilation.

On a GPU at real sizes too. Without one, test_under_interpreter runs this file again, in a second
process (conftest.py), in Triton's interpreter: it takes a minute, the rest seconds."""
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, pad

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # before CUDA: for equal bits

import kernels
from model import GPT, GPTConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
BACKEND = "inductor" if GPU else "aot_eager"
needs_kernels = pytest.mark.skipif(
    not kernels.available(DEVICE),
    reason="no Triton" if kernels.triton is None else "no GPU: run by test_under_interpreter")

def compare(tol, **pairs):
    """name=(a value, what it should be): within tol of each other, relative to the whole tensor."""
    for name, (a, b) in pairs.items():
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-3)
        assert error < tol, f"{name}: relative error {error:.1e}"

@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every buffer that code under test allocates starts out as garbage that would show."""
    def garbage(make):
        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.device.type == "meta" or type(out) is not torch.Tensor:   # while tracing
                return out
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max - 7)
        return filled
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, garbage(getattr(torch, name)))

def make(N, C, F, k, dtype=torch.float32, device=DEVICE, shift=0.0):
    """Fresh inputs with gradients wanted, and output gradients."""
    g = torch.Generator().manual_seed(N + 7 * C + 31 * F + 101 * k)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(device)
    inputs = [rand(N, C).to(dtype), rand(F, C) / C**0.5, rand(F) * 0.1 + shift, rand(F, C) / C**0.5,
              rand(C) * 0.3]
    return [t.requires_grad_() for t in inputs], (rand(N, C).to(dtype), rand(N, k))

def oracle(inputs, grads, indices, active):
    """float64 layer at the given indices, where active -> y, values and the five gradients."""
    h, W_enc, b_enc, W_dec, b_dec = P = [t.detach().double().requires_grad_() for t in inputs]
    values = torch.relu((h.unsqueeze(1) * W_enc[indices]).sum(-1) + b_enc[indices])
    values = values * active
    y = (values.unsqueeze(-1) * W_dec[indices]).sum(1) + b_dec
    return y, values, torch.autograd.grad([y, values], P, [g.double() for g in grads])

def check_layer(inputs, grads, k, tol):
    y, values, indices, fired = kernels.topk_autoencode(*inputs, k)
    active, idx = values != 0, indices.long()
    assert torch.equal(fired, torch.bincount(idx[active], minlength=len(fired)).int())
    got = torch.autograd.grad([y, values], inputs, grads)
    y64, values64, want = oracle(inputs, grads, idx, active)
    names = "dh", "dW_enc", "db_enc", "dW_dec", "db_dec"
    compare(tol, y=(y, y64), values=(values, values64), **dict(zip(names, zip(got, want))))
    # the right features, up to rounding: nothing left out is larger than what was taken
    h, W_enc, b_enc, _, _ = [t.detach().double() for t in inputs]
    a = torch.relu(h @ W_enc.T + b_enc)
    assert (idx.where(active, -1 - torch.arange(k, device=DEVICE)).sort().values.diff() > 0).all()
    assert (values.diff() <= 0).all(), "not descending"
    left = a.scatter(1, idx, 0.0).amax(1)
    assert (left <= values.amin(1) + tol * a.max()).all(), "a larger feature was left out"

# ---------------------------------------------------------------------------- selection
def rows(kind, N, F, k):
    """Rows that are hard in one way each."""
    g = torch.Generator().manual_seed(F + k)
    pre = torch.randn(N, F, generator=g)
    nan, inf = pre.clone(), pre.clone()
    nan[0, F // 2], nan[-1], inf[0, F // 3] = float("nan"), float("nan"), float("inf")
    crowded = pre + 10 * (torch.arange(F) < F // 4)   # the large ones are in few groups
    return {"random": pre, "ties": (pre * 2).round() / 2, "few positive": pre - 2.5, "nan": nan,
            "zero": -pre.abs(), "equal": torch.ones(N, F), "crowded": crowded, "inf": inf}[kind]

def span_maxima(a):
    """The largest of each SPAN features of a token; a (N, F)."""
    a = pad(a, (0, -a.shape[1] % kernels.SPAN), value=float("-inf"))
    return a.unflatten(1, (-1, kernels.SPAN)).amax(2)

CASES = [("random", 1, 1000, 8), ("random", 1, 37, 37), ("random", 1, 2500, 1),
         ("ties", 2, 300, 9), ("few positive", 1, 300, 16), ("zero", 1, 100, 12),
         ("equal", 1, 130, 3), ("crowded", 1, 1100, 5), ("nan", 2, 90, 4), ("inf", 1, 90, 4)]
if GPU:
    CASES += [(kind, 257, F, k) for kind in ("random", "ties", "few positive", "crowded", "nan")
              for F, k in ((12288, 32), (12288, 64), (49152, 64), (12289, 100), (3000, 512))]

@needs_kernels
@pytest.mark.parametrize("maxima", [False, True])   # given, as by _matmul
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind,N,F,k", CASES)
def test_selection_is_exact(kind, N, F, k, dtype, maxima, monkeypatch):
    if dtype == torch.bfloat16 and not GPU and kind != "ties":
        pytest.skip("tested on a GPU only: one type is enough in the interpreter")
    pre = rows(kind, N, F, k).to(DEVICE, dtype)
    plain = kind in ("ties", "zero", "equal")
    b_enc = torch.randn(F, generator=torch.Generator().manual_seed(1)).to(DEVICE) * (not plain) / 9
    values = torch.empty(N, k, device=DEVICE)
    indices = torch.empty(N, k, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(kernels, "SPAN", 64 if F > 2000 else 16)
    found = span_maxima(pre.float() + b_enc) if maxima else None
    kernels.select(pre, b_enc, values, indices, found)
    want = torch.relu(pre.float() + b_enc).sort(dim=-1, descending=True, stable=True)
    want_values, want_indices = want[0][:, :k], want[1][:, :k]
    assert torch.equal(indices.long(), want_indices * (want_values != 0))
    torch.testing.assert_close(values, want_values, rtol=0, atol=0, equal_nan=True)

# ---------------------------------------------------------------------------- the layer
MAXIMA = [(1500, 768, 12296, 40), (1111, 512, 8192, 64)] if GPU else [(18, 24, 200, 3)]
LAYERS = [(3, 24, 100, 4, 0.0), (1, 300, 70, 3, 0.0), (2, 16, 20, 20, 0.0), (1, 24, 60, 1, 0.0),
          (2, 24, 80, 12, -2.0)]
if GPU:
    LAYERS += [(3000, 768, 12288, 32, 0.0), (2047, 512, 8192, 64, 0.5), (999, 100, 3001, 77, -1.0),
               (300, 1600, 5000, 200, 0.0), (64, 4096, 1000, 16, 0.0)]

@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N,C,F,k,shift", LAYERS)
def test_layer(N, C, F, k, shift, dtype):
    if dtype != torch.float32 and not GPU and F != 100:
        pytest.skip("tested on a GPU only: one type is enough in the interpreter")
    inputs, grads = make(N, C, F, k, dtype, shift=shift)
    tol = 1e-5 if dtype == torch.float32 else 2e-2   # 16 bits round h, W and y; the oracle nothing
    check_layer(inputs, grads, k, tol)

@needs_kernels
@pytest.mark.parametrize("N,C,F,k", MAXIMA)
def test_encoder_that_gives_maxima(N, C, F, k, monkeypatch):
    """On Hopper _select reads maxima that the encoder found: each is right, and so is the layer."""
    if not kernels._hopper(DEVICE):
        pytest.skip("not a Hopper GPU")
    if kernels.INTERPRET:   # which would take minutes for whole tiles
        for name, value in dict(MATMUL_ROWS=1, ENCODER_TILE=(16, 32, 16, 2, 2), SPAN=16).items():
            monkeypatch.setattr(kernels, name, value)
    inputs, grads = make(N, C, F, k, torch.bfloat16 if GPU else torch.float32, shift=-0.5)
    check_layer(inputs, grads, k, 2e-2 if GPU else 1e-5)
    h, W, bias = inputs[0].detach(), inputs[1].detach().to(inputs[0].dtype), inputs[2].detach()
    h[1, 2], h[2, 3] = float("nan"), float("inf")
    pre, maxima = h.new_empty(N, F), torch.empty(N, -(-F // kernels.SPAN), device=DEVICE)
    kernels._fused_matmul("maxima", h, W, pre, kernels.ENCODER_TILE, bias=bias, maxima=maxima)
    want = span_maxima(pre.float() + bias)
    torch.testing.assert_close(maxima, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pre[3:], h[3:] @ W.T, rtol=2e-2, atol=1e-2)

@needs_kernels
def test_autocast_rounds_nothing():
    """Under autocast h alone decides the precision, and x that of the loss."""
    inputs, grads = make(5, 20, 30, 3)
    with torch.no_grad():
        inputs[4] += 10
    with torch.autocast(DEVICE, torch.bfloat16):
        check_layer(inputs, grads, 3, 1e-5)
        check_head(*make_head(4, 12, 100), 100, 1e-5)

@needs_kernels
@pytest.mark.parametrize("chunks", [1, 2, 7])   # of 5 tokens
def test_busy_features(chunks, monkeypatch):
    """Features with more pairs than one program takes, and tokens in chunks: parts are added."""
    monkeypatch.setattr(kernels, "PAIR_PART", 2 if chunks > 1 else 4)
    monkeypatch.setattr(kernels, "_chunks", lambda h, F, k: chunks)
    monkeypatch.setattr(kernels, "BUFFER_MB", 0)
    inputs, grads = make(5, 20, 30, 3)
    with torch.no_grad():
        inputs[2][7] += 10
        inputs[2][29] += 10
    check_layer(inputs, grads, 3, 1e-5)

@needs_kernels
def test_gradients_from_one_output_only():
    inputs, (gy, gvalues) = make(2, 8, 40, 3)
    y, values = kernels.topk_autoencode(*inputs, 3)[:2]
    from_y = torch.autograd.grad(y, inputs, gy, retain_graph=True)
    from_values = torch.autograd.grad(values, inputs, gvalues, retain_graph=True)
    both = torch.autograd.grad([y, values], inputs, [gy, gvalues])
    torch.testing.assert_close(both, tuple(map(torch.add, from_y, from_values)))

@needs_kernels
def test_nan_stays_in_its_row():
    inputs, _ = make(3, 8, 40, 4)
    with torch.no_grad():
        inputs[0][1, 2] = float("nan")
    for t in kernels.topk_autoencode(*inputs, 4)[:2]:
        assert t[1].isnan().all() and t[[0, 2]].isfinite().all()

def test_out_of_range():
    """What no kernel takes is refused: sae.py asks `fits` and goes its plain way."""
    for k, dtype in (0, torch.float32), (17, torch.float32), (4, torch.float64):
        inputs, _ = make(2, 8, 16, 4)
        inputs[0] = inputs[0].to(dtype)
        assert not kernels.fits(2, 16, 8, k, dtype, DEVICE)
        with pytest.raises(ValueError, match="plain path"):
            kernels.topk_autoencode(*inputs, k)

# ---------------------------------------------------------------------------- MLP
MLPS = [(1, 8, 8), (7, 16, 64), (33, 48, 72), (40, 24, 96)]   # N, C, H: beside tiles' edges, too
if GPU:
    MLPS += [(3000, 768, 3072), (2, 3, 1000, 512, 2048)]

@pytest.mark.parametrize("shape", MLPS)
def test_mlp(shape, monkeypatch):
    """Values, gradients, equal bits, NaN: of the kernel on Hopper and in the interpreter."""
    monkeypatch.setattr(kernels, "MATMUL_ROWS", 1)
    if kernels.INTERPRET:   # which knows no bf16 product, and would take minutes for whole tiles
        monkeypatch.setattr(kernels, "MLP_TILE", (16, 32, 16, 2, 2))
    *N, C, H = shape
    dtype = torch.bfloat16 if GPU else torch.float32
    torch.manual_seed(C)
    x, gy = torch.randn(2, *N, C, device=DEVICE).to(dtype)
    W_fc, W_proj = torch.randn(H, C, device=DEVICE), torch.randn(C, H, device=DEVICE)
    P = [t.requires_grad_() for t in (x, W_fc / C**0.5, W_proj / H**0.5)]
    y = kernels.mlp(*P)
    assert y.shape == P[0].shape and y.dtype == dtype
    got = torch.autograd.grad(y, P, gy)
    assert all(map(torch.equal, got, torch.autograd.grad(kernels.mlp(*P), P, gy)))
    P64 = [p.detach().double().requires_grad_() for p in P]
    y64 = (torch.relu(P64[0] @ P64[1].T) ** 2) @ P64[2].T
    want = torch.autograd.grad(y64, P64, gy.double())
    pairs = dict(zip(("dx", "dW_fc", "dW_proj"), zip(got, want)))
    compare(1e-2 if GPU else 1e-5, y=(y, y64), **pairs)
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32]
    with torch.no_grad():
        P[0].view(-1, C)[0, 5] = float("nan")
        bad = kernels.mlp(*P).view(-1, C).isnan()
    assert bad[0].all() and not bad[1:].any()

# ---------------------------------------------------------------------------- head and loss
def make_head(N, C, V, dtype=torch.float32, device=DEVICE):
    """x, W and targets. The padding of W is large: it would show in the loss and in dx."""
    g = torch.Generator().manual_seed(N + 7 * C + 31 * V)
    x, W = (torch.randn(*s, generator=g) for s in ((N, C), (-(-V // 64) * 64, C)))
    W[:V] *= 2 / C**0.5
    targets = torch.randint(V, (N,), generator=g)
    targets[0], targets[-1] = 0, V - 1
    return [x.to(device, dtype).requires_grad_(), W.to(device).requires_grad_()], targets.to(device)

def check_head(inputs, targets, V, tol, upstream=0.3):
    loss = kernels.linear_cross_entropy(*inputs, targets, V)
    assert loss.dtype == torch.float32 and loss.shape == ()
    got = torch.autograd.grad(loss * upstream, inputs)
    x64, W64 = P = [t.detach().double().requires_grad_() for t in inputs]
    loss64 = cross_entropy((x64 @ W64.T)[:, :V], targets)
    want = torch.autograd.grad(loss64 * upstream, P)
    assert not got[1][V:].any(), "a gradient in the padding"
    compare(tol, loss=(loss, loss64), dx=(got[0], want[0]), dW=(got[1], want[1]))

HEADS = [(1, 8, 1), (1, 8, 50), (5, 16, 64), (7, 12, 100), (4, 30, 257)]   # N, C, V
if GPU:
    HEADS += [(3000, 768, 50257), (257, 512, 50304), (64, 100, 8193)]

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [32, 4096])            # most V are above the one, below the other
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("N,C,V", HEADS)
def test_loss(N, C, V, chunked, block, dtype, monkeypatch):
    """On a CPU without the interpreter this is the reference."""
    inputs, targets = make_head(N, C, V, dtype)
    monkeypatch.setattr(kernels, "LOSS_BLOCK", block)
    if chunked:   # N / 2 rows, rounded down to a power of two: 2, 2 and 1 of 5
        row_mb = inputs[1].shape[0] * dtype.itemsize / 2**20
        monkeypatch.setattr(kernels, "LOGITS_MB", N / 2 * row_mb)
    tol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    check_head(inputs, targets, V, tol)

@needs_kernels
def test_loss_gradients_are_scaled_in_fp32():
    """An incoming gradient of 1/3 is not rounded to bf16, where it would be off by 0.1 %."""
    inputs, targets = make_head(4, 12, 100, torch.bfloat16)
    loss = kernels.linear_cross_entropy(*inputs, targets, 100)
    one = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss / 3, inputs)
    for a, b in zip(one, third, strict=True):
        assert torch.equal((a.float() * (torch.ones_like(loss) / 3)).to(a.dtype), b)

@needs_kernels
def test_loss_without_gradients(monkeypatch):
    """Nobody wants gradients: the same loss, and no gradient computed, stored or promised."""
    inputs, targets = make_head(5, 12, 100)
    want = kernels.linear_cross_entropy(*inputs, targets, 100).detach()
    monkeypatch.setattr(torch, "addmm", None)   # would compute dW
    with torch.no_grad():
        assert torch.equal(kernels.linear_cross_entropy(*inputs, targets, 100), want)
        assert not any(t.numel() for t in kernels._linear_loss(*inputs, targets, 100, False)[1:])
    loss = kernels.linear_cross_entropy(*[t.detach() for t in inputs], targets, 100)
    assert torch.equal(loss, want) and not loss.requires_grad

@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_the_loss(dtype):
    inputs, targets = make_head(3, 8, 100, dtype)
    with torch.no_grad():
        inputs[0][1, 2] = float("nan")
    loss = kernels.linear_cross_entropy(*inputs, targets, 100)
    dx, dW = torch.autograd.grad(loss, inputs)
    assert loss.isnan() and dx[1].isnan().all() and dx[[0, 2]].isfinite().all()
    assert dW[:100].isnan().all()
    inputs, targets = make_head(3, 8, 100, dtype)
    for target in (-100, -1, 100, 127, 2**40):   # in the padding and far outside
        targets[1] = target
        assert kernels.linear_cross_entropy(*inputs, targets, 100).isnan()

@needs_kernels
def test_loss_of_extreme_logits():
    """fp32 logits of 1e4: the maximum is taken out before exp, whichever block it is in."""
    inputs, targets = make_head(4, 8, 100)
    with torch.no_grad():
        inputs[1].mul_(5e3)
    check_head(inputs, targets, 100, 1e-4)

# ---------------------------------------------------------------------------- memory, compilation
@needs_kernels
@pytest.mark.parametrize("name", ["layer", "loss"])
def test_nothing_wide_is_kept_and_runs_agree(name):
    """Kept for backward: of the layer h, parameters, values, indices, order, never (N, F); of the
    loss dx and dW, never (N, V). Twice gives equal bits."""
    if name == "layer":
        N, C, F, k = (4096, 256, 8192, 16) if GPU else (2, 8, 60, 2)
        inputs, _ = make(N, C, F, k)
        forward = lambda: kernels.topk_autoencode(*inputs, k)[:2]
        most = 3 * N * k + N * C + 2 * F * C + C + F + 1
    else:
        N, C, V = (4096, 256, 8000) if GPU else (40, 4, 100)
        inputs, targets = make_head(N, C, V)
        forward = lambda: [kernels.linear_cross_entropy(*inputs, targets, V)]
        most = sum(t.numel() for t in inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = forward()
    assert 0 < sum(t.numel() for t in kept) <= most
    again = forward()
    gradients = [torch.autograd.grad(sum(t.sin().sum() for t in run), inputs)
                 for run in (outputs, again)]
    assert all(map(torch.equal, outputs, again)) and all(map(torch.equal, *gradients))

def case(name):
    """-> a kernel's custom op and its arguments."""
    dtype = torch.bfloat16 if GPU else torch.float32
    if name == "layer":
        return kernels._autoencode, (*make(2, 8, 24, 2)[0], 2)
    if name == "mlp":
        x, W_fc, W_proj = [torch.randn(s, device=DEVICE) for s in ((8, 16), (64, 16), (16, 64))]
        return kernels._mlp, [t.requires_grad_() for t in (x.to(dtype), W_fc, W_proj)]
    P, targets = make_head(4, 8, 100, dtype)
    P = [t.detach() for t in P] if name == "loss alone" else P
    return kernels._linear_loss, (*P, targets, 100, name == "loss")

@needs_kernels
@pytest.mark.parametrize("name", ["layer", "mlp", "loss", "loss alone"])
def test_ops_are_registered(name):
    """Schema, shapes without data, gradients; traced by AOTAutograd it computes the same."""
    if name == "mlp" and not kernels._hopper(DEVICE):
        pytest.skip("not a Hopper GPU")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_static")
    torch.library.opcheck(*case(name), test_utils=checks)

def loss_and_gradients(forward, model, tokens):
    model.zero_grad()
    _, loss, out = forward(tokens[:, :-1], tokens[:, 1:])
    (loss + out.loss.sum()).backward()
    grads = (p.grad.clone() for p in model.parameters())
    return [loss.detach(), out.fired, out.mean, *grads]

@needs_kernels
def test_the_model_is_one_graph(monkeypatch):
    """Through the kernels a model compiles without a break, and once for all alphas; its loss, its
    gradients and the features fired are those of sae.py's plain path, the layer's reference."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    T = 64 if GPU else 4
    config = GPTConfig(block_size=T, vocab_size=50, n_layer=1, n_head=2, n_embd=16,
                       sae_layers=(0,), sae_ratio=4, sae_k=3, sae_recon=1.0)
    model, tokens = GPT(config).to(DEVICE), torch.randint(50, (1, T + 1), device=DEVICE)
    model.transformer.h[0].sae.mean.normal_()
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for alpha in (0.5, 1.0):
        model.transformer.h[0].sae.alpha.fill_(alpha)
        got = loss_and_gradients(compiled, model, tokens)
        with monkeypatch.context() as plain:
            plain.setattr(kernels, "fits", lambda *args: False)
            plain.setattr(kernels, "topk_autoencode", None)
            want = loss_and_gradients(model, model, tokens)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1

@pytest.mark.skipif(kernels.triton is None, reason="no Triton")
@pytest.mark.skipif(kernels.available(DEVICE), reason="the kernels run in this process")
def test_under_interpreter(interpreted):
    out, _ = interpreted.communicate()
    assert interpreted.returncode == 0, out[out.rfind("FAILED"):] + out[-6000:]   # named first
