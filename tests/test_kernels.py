"""
kernels.py against a float64 oracle: the selection exactly, values and gradients of the layer and of
the loss, and what they promise about ties, NaN, empty slots, memory, determinism and torch.compile.

    python -m pytest tests/test_kernels.py

On a GPU the kernels run on it, at real sizes too. Without one, test_under_interpreter runs this
file again in a second process (conftest.py) through Triton's interpreter (slow: hence the tiny
sizes). Without Triton only the plain paths are tested and the rest is skipped, saying so.
"""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
needs_kernels = pytest.mark.skipif(
    not kernels.available(DEVICE),
    reason="no Triton" if kernels.triton is None else "no GPU: run by test_under_interpreter")


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
    rand = lambda *s: torch.randn(*s, generator=g).to(device)  # noqa: E731
    inputs = [rand(N, C).to(dtype), rand(F, C) / C**0.5, rand(F) * 0.1 + shift, rand(F, C) / C**0.5,
              rand(C) * 0.3]
    return [t.requires_grad_() for t in inputs], (rand(N, C).to(dtype), rand(N, k))


def oracle(inputs, grads, indices):
    """float64 layer at given indices -> y, values and the five gradients."""
    h, W_enc, b_enc, W_dec, b_dec = P = [t.detach().double().requires_grad_() for t in inputs]
    values = torch.relu(((h - b_dec).unsqueeze(1) * W_enc[indices]).sum(-1) + b_enc[indices])
    y = (values.unsqueeze(-1) * W_dec[indices]).sum(1) + b_dec
    return y, values, torch.autograd.grad([y, values], P, [g.double() for g in grads])


def check_layer(inputs, grads, k, fn, tol):
    y, values, indices, fired = fn(*inputs, k)
    active = indices[values != 0].long()
    assert torch.equal(fired, torch.bincount(active, minlength=len(fired)).int())
    got = torch.autograd.grad([y, values], inputs, grads)
    idx = indices.long()
    y64, values64, want = oracle(inputs, grads, idx)
    names = ["y", "values", "dh", "dW_enc", "db_enc", "dW_dec", "db_dec"]
    for name, a, b in zip(names, [y, values, *got], [y64, values64, *want], strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-3)
        assert error < tol, f"{name}: relative error {error:.1e}"
    # the right features, up to rounding: nothing left out is larger than what was taken
    h, W_enc, b_enc, _, b_dec = [t.detach().double() for t in inputs]
    a = torch.relu((h - b_dec) @ W_enc.T + b_enc)
    assert (idx.sort().values.diff() > 0).all(), "an index twice in a row"
    assert (values.diff() <= (0 if fn is kernels.topk_autoencode else tol)).all(), "not descending"
    left = a.scatter(1, idx, 0.0).amax(1)
    assert (left <= a.gather(1, idx).amin(1) + tol * a.max()).all(), "a larger feature was left out"


# ---------------------------------------------------------------------------- selection
def rows(kind, N, F, k):
    """Rows that are hard in one way each."""
    g = torch.Generator().manual_seed(F + k)
    pre = torch.randn(N, F, generator=g)
    if kind == "ties":
        pre = (pre * 2).round() / 2
    elif kind == "few positive":
        pre = pre - 2.5
    elif kind == "zero":
        pre = pre.abs().neg()
    elif kind == "equal":
        pre = torch.ones(N, F)
    elif kind == "crowded":      # all the large ones in few groups of the first pass
        pre[:, :F // 4] += 10
    elif kind == "nan":
        pre[0, F // 2] = float("nan")
        pre[-1] = float("nan")
    elif kind == "inf":
        pre[0, F // 3] = float("inf")
    return pre


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
    found = None
    if maxima:
        monkeypatch.setattr(kernels, "SPAN", 64 if F > 2000 else 16)
        a = torch.nn.functional.pad(pre.float() + b_enc, (0, -F % kernels.SPAN), value=float("-inf"))
        found = a.unflatten(1, (-1, kernels.SPAN)).amax(2)
    kernels.select(pre, b_enc, values, indices, found)
    want = torch.relu(pre.float() + b_enc).sort(dim=-1, descending=True, stable=True)
    want_values, want_indices = want[0][:, :k], want[1][:, :k]
    assert torch.equal(indices.long(), want_indices)
    torch.testing.assert_close(values, want_values, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------- the layer
LAYERS = [(3, 24, 100, 4, 0.0), (1, 300, 70, 3, 0.0), (2, 16, 20, 20, 0.0), (1, 24, 60, 1, 0.0),
          (2, 24, 80, 12, -2.0)]
if GPU:
    LAYERS += [(3000, 768, 12288, 32, 0.0), (2047, 512, 8192, 64, 0.5), (999, 100, 3001, 77, -1.0),
               (300, 1600, 5000, 200, 0.0), (64, 4096, 1000, 16, 0.0)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N,C,F,k,shift", LAYERS)
def test_layer(N, C, F, k, shift, dtype):
    if dtype == torch.bfloat16 and not GPU and F != 100:
        pytest.skip("tested on a GPU only: one type is enough in the interpreter")
    inputs, grads = make(N, C, F, k, dtype, shift=shift)
    tol = 2e-2 if dtype == torch.bfloat16 else 1e-5   # bf16 rounds x, W and y; the oracle nothing
    check_layer(inputs, grads, k, kernels.topk_autoencode, tol)


@needs_kernels
@pytest.mark.parametrize("N,C,F,k", [(1500, 768, 12296, 40), (1111, 512, 8192, 64)] if GPU else [(18, 24, 200, 3)])   # beside the tiles' edges
def test_encoder_that_gives_maxima(N, C, F, k, monkeypatch):
    """On Hopper _select reads maxima from the encoder's epilogue: the layer is right, and so is each maximum."""
    if not kernels._hopper(DEVICE):
        pytest.skip("not a Hopper GPU")
    if kernels.INTERPRET:   # which would take minutes for whole tiles
        for name, value in dict(MATMUL_ROWS=1, ENCODER_TILE=(16, 32, 16, 2, 2), SPAN=16).items():
            monkeypatch.setattr(kernels, name, value)
    inputs, grads = make(N, C, F, k, torch.bfloat16 if GPU else torch.float32, shift=-0.5)
    check_layer(inputs, grads, k, kernels.topk_autoencode, 2e-2 if GPU else 1e-5)
    h, W, bias = inputs[0].detach(), inputs[1].detach().to(inputs[0].dtype), inputs[2].detach()
    h[1, 2], h[2, 3] = float("nan"), float("inf")
    pre, maxima = h.new_empty(N, F), torch.empty(N, -(-F // kernels.SPAN), device=DEVICE)
    kernels._fused_matmul("maxima", h, W, pre, kernels.ENCODER_TILE, bias=bias, maxima=maxima)
    a = torch.nn.functional.pad(pre.float() + bias, (0, -F % kernels.SPAN), value=float("-inf"))
    torch.testing.assert_close(maxima, a.unflatten(1, (-1, kernels.SPAN)).amax(2), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pre[3:], h[3:] @ W.T, rtol=2e-2, atol=1e-2)
    assert pre[1].isnan().all() and pre[0].isfinite().all()


@needs_kernels
def test_autocast_rounds_nothing():
    """Under autocast h alone decides the precision, that of b_dec's share of the pre-activations too."""
    inputs, grads = make(5, 20, 30, 3)
    with torch.no_grad():
        inputs[4] += 10
    with torch.autocast(DEVICE, torch.bfloat16):
        check_layer(inputs, grads, 3, kernels.topk_autoencode, 1e-5)


@needs_kernels
@pytest.mark.parametrize("chunks", [1, 2, 7])   # of 5 tokens
def test_busy_features(chunks, monkeypatch):
    """Features with more pairs than one program takes, and tokens in chunks: the parts are added."""
    monkeypatch.setattr(kernels, "PAIR_PART", 2 if chunks > 1 else 4)
    monkeypatch.setattr(kernels, "_chunks", lambda h, F, k: chunks)
    monkeypatch.setattr(kernels, "BUFFER_MB", 0)
    inputs, grads = make(5, 20, 30, 3)
    with torch.no_grad():
        inputs[2][7] += 10
        inputs[2][29] += 10
    check_layer(inputs, grads, 3, kernels.topk_autoencode, 1e-5)


@needs_kernels
def test_gradients_from_one_output_only():
    inputs, (gy, gvalues) = make(2, 8, 40, 3)
    both = torch.autograd.grad(kernels.topk_autoencode(*inputs, 3)[:2], inputs, (gy, gvalues))
    from_y = torch.autograd.grad(kernels.topk_autoencode(*inputs, 3)[0], inputs, gy)
    from_values = torch.autograd.grad(kernels.topk_autoencode(*inputs, 3)[1], inputs, gvalues)
    for whole, a, b in zip(both, from_y, from_values, strict=True):
        torch.testing.assert_close(whole, a + b)


@needs_kernels
def test_nan_stays_in_its_row():
    inputs, _ = make(3, 8, 40, 4)
    with torch.no_grad():
        inputs[0][1, 2] = float("nan")
    y, values, *_ = kernels.topk_autoencode(*inputs, 4)
    assert y[1].isnan().all() and values[1].isnan().all()
    assert y[[0, 2]].isfinite().all() and values[[0, 2]].isfinite().all()


@needs_kernels
def test_nothing_wide_is_kept_and_runs_agree():
    """Kept for backward: h, parameters, values, indices; never (N, F). Twice gives equal bits."""
    N, C, F, k = (4096, 256, 8192, 16) if GPU else (2, 8, 60, 2)
    inputs, grads = make(N, C, F, k)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = kernels.topk_autoencode(*inputs, k)[:2]
    assert kept and max(t.numel() for t in kept) <= max(N * C, F * C)
    assert sum(t.numel() for t in kept) <= 3 * N * k + N * C + 2 * F * C + C + F + 1
    first = torch.autograd.grad(outputs, inputs, grads)
    again = torch.autograd.grad(kernels.topk_autoencode(*inputs, k)[:2], inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_kernels
def test_compiles_without_a_graph_break():
    inputs, grads = make(2, 8, 40, 4)

    def f(*inputs):
        y, values, *_ = kernels.topk_autoencode(*inputs, 4)
        return y.sin(), values * 2

    want = torch.autograd.grad(f(*inputs), inputs, grads)
    fast = torch.compile(f, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    got = torch.autograd.grad(fast(*inputs), inputs, grads)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
def test_opcheck():
    inputs, _ = make(2, 8, 20, 2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._autoencode, (*inputs, 2), test_utils=tests)


# ---------------------------------------------------------------------------- MLP
MLPS = [(1, 8, 8), (7, 16, 64), (33, 48, 72), (40, 24, 96)]   # N, C, H: also beside the tiles' edges
if GPU:
    MLPS += [(3000, 768, 3072), (2, 3, 1000, 512, 2048)]


@pytest.mark.parametrize("shape", MLPS)
@pytest.mark.parametrize("fn", [kernels.mlp_ref, kernels.mlp])
def test_mlp(fn, shape, monkeypatch):
    """Values and gradients; on Hopper and in the interpreter mlp is the kernel, else the reference too."""
    monkeypatch.setattr(kernels, "MATMUL_ROWS", 1)
    if kernels.INTERPRET:   # which knows no bf16 product, and would take minutes for whole tiles
        monkeypatch.setattr(kernels, "MLP_TILE", (16, 32, 16, 2, 2))
    *N, C, H = shape
    dtype = torch.bfloat16 if GPU else torch.float32
    g = torch.Generator().manual_seed(C)
    rand = lambda *s: torch.randn(*s, generator=g).to(DEVICE)  # noqa: E731
    P = [rand(*N, C).to(dtype), rand(H, C) / C**0.5, rand(C, H) / H**0.5]
    P, gy = [p.requires_grad_() for p in P], rand(*N, C).to(dtype)
    y = fn(*P)
    assert y.shape == P[0].shape and y.dtype == dtype
    got = torch.autograd.grad(y, P, gy)
    P64 = [p.detach().double().requires_grad_() for p in P]
    y64 = (torch.relu(P64[0] @ P64[1].T) ** 2) @ P64[2].T
    want = torch.autograd.grad(y64, P64, gy.double())
    for name, a, b in zip(["y", "dx", "dW_fc", "dW_proj"], [y, *got], [y64, *want], strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < (1e-2 if GPU else 1e-5), f"{name}: relative error {error:.1e}"
        assert a.dtype == (dtype if name in ("y", "dx") else torch.float32)


@needs_kernels
def test_mlp_opcheck_nan_and_compile(monkeypatch):
    monkeypatch.setattr(kernels, "MATMUL_ROWS", 1)
    dtype = torch.bfloat16 if GPU else torch.float32
    P = [torch.randn(*s, device=DEVICE) for s in ((8, 16), (64, 16), (16, 64))]
    P = [P[0].to(dtype).requires_grad_(), P[1].requires_grad_(), P[2].requires_grad_()]
    if kernels._hopper(DEVICE):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(kernels._mlp, P, test_utils=tests)
    want = torch.autograd.grad(kernels.mlp(*P).sin().sum(), P)
    fast = torch.compile(lambda *P: kernels.mlp(*P).sin().sum(), fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for a, b in zip(torch.autograd.grad(fast(*P), P), want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        P[0][3, 5] = float("nan")
        y = kernels.mlp(*P)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


# ---------------------------------------------------------------------------- head and loss
def make_head(N, C, V, dtype=torch.float32, device=DEVICE):
    """x, W and targets. The padding of W is large: it would show in the loss and in dx."""
    g = torch.Generator().manual_seed(N + 7 * C + 31 * V)
    x, W = (torch.randn(*s, generator=g) for s in ((N, C), (-(-V // 64) * 64, C)))
    W[:V] *= 2 / C**0.5
    targets = torch.randint(V, (N,), generator=g)
    targets[0], targets[-1] = 0, V - 1
    return [x.to(device, dtype).requires_grad_(), W.to(device).requires_grad_()], targets.to(device)


def check_head(fn, inputs, targets, V, tol, upstream=0.3):
    loss = fn(*inputs, targets, V)
    assert loss.dtype == torch.float32 and loss.shape == ()
    got = torch.autograd.grad(loss * upstream, inputs)
    x64, W64 = P = [t.detach().double().requires_grad_() for t in inputs]
    loss64 = torch.nn.functional.cross_entropy((x64 @ W64.T)[:, :V], targets)
    want = torch.autograd.grad(loss64 * upstream, P)
    assert not got[1][V:].any(), "a gradient in the padding"
    for name, a, b in zip(["loss", "dx", "dW"], [loss, *got], [loss64, *want], strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-3)
        assert error < tol, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("fn", [kernels.linear_cross_entropy_ref, kernels.linear_cross_entropy])
def test_plain_loss(fn):
    """On a CPU without the interpreter both are the reference."""
    inputs, targets = make_head(5, 12, 100, device="cpu")
    check_head(fn, inputs, targets, 100, 1e-5)


HEADS = [(1, 8, 1), (1, 8, 50), (5, 16, 64), (7, 12, 100), (4, 30, 257)]   # N, C, V
if GPU:
    HEADS += [(3000, 768, 50257), (257, 512, 50304), (64, 100, 8193)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [32, 4096])            # most V are above the one, below the other
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("N,C,V", HEADS)
def test_loss(N, C, V, chunked, block, dtype, monkeypatch):
    inputs, targets = make_head(N, C, V, dtype)
    monkeypatch.setattr(kernels, "LOSS_BLOCK", block)
    if chunked:   # N / 2 rows, rounded down to a power of two: 2, 2 and 1 of 5
        row_mb = inputs[1].shape[0] * dtype.itemsize / 2**20
        monkeypatch.setattr(kernels, "LOGITS_MB", N / 2 * row_mb)
    tol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    check_head(kernels.linear_cross_entropy, inputs, targets, V, tol)


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
    assert all(t.numel() for t in kernels._linear_loss(*inputs, targets, 100, True)[1:])
    kernel = kernels._softmax_loss

    class Unwritten:
        """The kernel, which must leave the logits as they are."""
        def __getitem__(self, grid):
            def launch(logits, *args, **kwargs):
                before = logits.clone()
                kernel[grid](logits, *args, **kwargs)
                assert torch.equal(logits, before)
            return launch

    def fail(*args, **kwargs):
        raise AssertionError("a gradient was computed")
    monkeypatch.setattr(torch, "addmm", fail)
    monkeypatch.setattr(kernels, "_softmax_loss", Unwritten())
    with torch.no_grad():
        assert torch.equal(kernels.linear_cross_entropy(*inputs, targets, 100), want)
        assert not any(t.numel() for t in kernels._linear_loss(*inputs, targets, 100, False)[1:])
    with torch.inference_mode():
        assert torch.equal(kernels.linear_cross_entropy(*inputs, targets, 100), want)
    loss = kernels.linear_cross_entropy(*[t.detach() for t in inputs], targets, 100)
    assert torch.equal(loss, want) and not loss.requires_grad


@needs_kernels
def test_one_gradient_only():
    inputs, targets = make_head(3, 8, 70)
    both = torch.autograd.grad(kernels.linear_cross_entropy(*inputs, targets, 70), inputs)
    for i in range(2):
        alone = [t if j == i else t.detach() for j, t in enumerate(inputs)]
        got, = torch.autograd.grad(kernels.linear_cross_entropy(*alone, targets, 70), inputs[i])
        assert torch.equal(got, both[i])


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
    check_head(kernels.linear_cross_entropy, inputs, targets, 100, 1e-4)


@needs_kernels
def test_no_logits_are_kept_and_runs_agree():
    """Kept for backward: dx and dW, never (N, V). Twice gives equal bits."""
    N, C, V = (4096, 256, 8000) if GPU else (40, 4, 100)
    inputs, targets = make_head(N, C, V)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = kernels.linear_cross_entropy(*inputs, targets, V)
    assert sorted(t.numel() for t in kept) == sorted(t.numel() for t in inputs)
    again = kernels.linear_cross_entropy(*inputs, targets, V)
    assert torch.equal(loss, again)
    for a, b in zip(*(torch.autograd.grad(t, inputs) for t in (loss, again)), strict=True):
        assert torch.equal(a, b)


@needs_kernels
def test_loss_compiles_without_a_graph_break():
    inputs, targets = make_head(4, 8, 100, torch.bfloat16)

    def f(x, W):
        return kernels.linear_cross_entropy(x * 2, W, targets, 100).square()

    want = torch.autograd.grad(f(*inputs), inputs)
    fast = torch.compile(f, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    got = torch.autograd.grad(fast(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), f(*inputs))


@needs_kernels
@pytest.mark.parametrize("grads", [True, False])
def test_loss_opcheck(grads):
    inputs, targets = make_head(2, 8, 20)
    if not grads:
        inputs = [t.detach() for t in inputs]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._linear_loss, (*inputs, targets, 20, grads), test_utils=tests)


@pytest.mark.skipif(kernels.triton is None, reason="no Triton")
@pytest.mark.skipif(kernels.available(DEVICE), reason="the kernels run in this process")
def test_under_interpreter(interpreted):
    out, _ = interpreted.communicate()
    assert interpreted.returncode == 0, out[-6000:]
