"""The model under other people's tools: a layer's output and code are the output of an ordinary
module, transformer.h.<block>.sae, so that hooks read and set a feature."""
import pytest
import torch

from sample import set_steering
from test_features import make_model

f, idx = 7, torch.arange(18).view(2, 9)

@pytest.fixture
def model():
    return make_model(sae_layers=(1,))

def fires(code):
    """How strongly feature f fires on each token (B, T, 1)."""
    return ((code.indices == f) * code.values).sum(-1, keepdim=True)

@torch.no_grad()
def check(model, values, logits):
    """They are the SAE's, and those with feature f set to 3 by the model's own means."""
    torch.testing.assert_close(values, model(idx)[2].values[0])
    set_steering(model, [(1, f, 0.0, 3.0)])
    torch.testing.assert_close(logits, model(idx)[0])

def test_forward_hooks(model):
    """A plain hook reads the code, and what it returns goes on through the model."""
    seen = []
    def hook(module, args, output):
        x, code = output
        seen.append(code.values)
        return x + (3 - fires(code)) * model.writes(1)[f], code
    with model.get_submodule('transformer.h.1.sae').register_forward_hook(hook):
        logits = model(idx)[0]
    check(model, seen[0], logits)

def test_nnsight(model):
    """The README's example."""
    sight = pytest.importorskip('nnsight').NNsight(model)
    with sight.trace(idx):
        x, code = sight.transformer.h[1].sae.output
        values = code.values.save()
        x[:] = x + (3 - fires(code)) * model.writes(1)[f]
        logits = sight.output[0].save()
    check(model, values, logits)
