"""
The model under other people's tools: a layer's output and code are the output of an ordinary
module, transformer.h.<block>.sae, so that hooks read and set a feature.

    python -m pytest tests/test_hooks.py
"""
import pytest
import torch

from sample import set_steering
from test_features import make_model

f = 7

@pytest.fixture
def model():
    return make_model(sae_layers=(1,))

def fires(code):
    """How strongly feature f fires on each token (B, T, 1)."""
    return ((code.indices == f) * code.values).sum(-1, keepdim=True)

@torch.no_grad()
def set_to_3(model, idx):
    """The logits with feature f set to 3, by the model's own means."""
    set_steering(model, [(1, f, 0.0, 3.0)])
    logits = model(idx)[0]
    set_steering(model, [])
    return logits

def test_forward_hooks(model):
    """A plain hook reads the code, and what it returns goes on through the model."""
    idx, seen = torch.randint(50, (2, 9)), []

    def hook(module, args, output):
        x, code = output
        seen.append(code)
        return x + (3 - fires(code)) * model.writes(1)[f], code

    want, out = set_to_3(model, idx), model(idx)[2]
    with model.get_submodule('transformer.h.1.sae').register_forward_hook(hook):
        logits = model(idx)[0]
    assert torch.equal(seen[0].values, out.values[0])
    assert torch.equal(seen[0].indices, out.indices[0])
    torch.testing.assert_close(logits, want)

def test_nnsight(model):
    """The README's example."""
    nnsight = pytest.importorskip('nnsight')
    idx = torch.randint(50, (2, 9))
    want, values = set_to_3(model, idx), model(idx)[2].values[0]
    sight = nnsight.NNsight(model)
    with sight.trace(idx):
        x, code = sight.transformer.h[1].sae.output
        read = code.values.save()
        x[:] = x + (3 - fires(code)) * model.writes(1)[f]
        logits = sight.output[0].save()
    torch.testing.assert_close(read, values)
    torch.testing.assert_close(logits, want)
