"""
What features do to what the model says: they are taken away, and the blocks from theirs on run
again. They are part of the model, so each number is exact, in float32, also on a GPU (bf16 would
round small effects away). Shapes: see features.py; B are runs.
"""
import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear

from features import dense, device_of
from sae import norm
from scanning import firings, joint

MOST = 300           # features taken away one by one; of more the most promising
TOGETHER = 10        # features that are taken away together
AT_ONCE = 4096       # tokens of a batch of runs

def run_scaled(model, idx, scales, end, measure):
    """Runs the first `end` blocks on idx (1, T) B times -> measure(stream (B, T, C), SAEOuts),
    joined. scales {block: (B, F)}: what run b multiplies the code of that SAE with; 0 takes a
    feature away wherever it fires. What lies below the lowest of these blocks runs once."""
    saes, first, T, found = model.saes(), min(scales), idx.size(1), []
    x, _ = model.blocks(idx, first)                                          # (1, T, C)
    for rows in torch.arange(len(scales[first])).split(max(1, AT_ONCE // T)):
        for layer, scale in scales.items():
            scale = scale[rows, None]                                        # (b, 1, F)
            saes[layer].steer = scale, torch.zeros_like(scale)
        stream, outs = x.expand(len(rows), -1, -1), []
        for block in model.transformer.h[first:end]:
            stream = block(stream, (model.cos[:T], model.sin[:T]), outs)
        found.append(measure(stream, outs))
    for layer in scales:
        saes[layer].steer = None
    return torch.cat(found)

def kept(model, layers, removals):
    """removals: B sets of (block, f) -> scales, 0 for these and 1 for all others."""
    ones = torch.ones(len(removals), model.config.n_features, device=device_of(model))
    scales = {layer: ones.clone() for layer in layers}
    for b, removal in enumerate(removals):
        for layer, f in removal:
            scales[layer][b, f] = 0
    return scales

@torch.enable_grad()
def promising(model, idx, fires, layers, end, measure):
    """MOST of the features: those with the largest gradient times activation, summed over
    positions: the derivative by a factor that stands before all of a feature's activations."""
    scales = kept(model, layers, [[]])
    for scale in scales.values():
        scale.requires_grad_()
    run_scaled(model, idx, scales, end, measure).backward(inputs=list(scales.values()))
    size = {layer: scale.grad[0].abs().tolist() for layer, scale in scales.items()}
    return sorted(fires, key=lambda feature: -size[feature[0]][feature[1]])[:MOST]

@torch.no_grad()
def explain(model, tokens, layers, end, measure):
    """
    How measure, see run_scaled, changes when features of these layers that are active on tokens are
    taken away, each at all its positions -> a dict of idx, the tokens, and
      base      measure of the model as it is; active: how many features are
      effects   [(change, block, f, [(position, activation), ...])], MOST at most, lowest first
      pro, con  the first and last TOGETHER of them, without which it falls, and rises
      together  change without any of pro
      whole     change without any feature of these layers
      passes    in words: what the features are, and what passes beside them
    """
    idx = torch.tensor([tokens], device=device_of(model))                    # (1, T)
    _, out = model.blocks(idx, max(layers) + 1)
    fires = {}                           # {(block, f): [(position, activation), ...]}
    codes = out.values[:, 0].cpu(), out.indices[:, 0].cpu()                  # (S, T, K) each
    for layer, values, indices in zip(model.saes(), *codes):
        for t, k in values.nonzero().tolist() if layer in layers else []:
            place = t, values[t, k].item()
            fires.setdefault((layer, indices[t, k].item()), []).append(place)
    features = list(fires)
    if len(fires) > MOST:
        features = promising(model, idx, fires, layers, end, measure)
    base = run_scaled(model, idx, kept(model, layers, [[]]), end, measure).item()
    without = kept(model, layers, [[feature] for feature in features])
    changes = run_scaled(model, idx, without, end, measure) - base
    effects = [(change, *feature, fires[feature])
               for change, feature in zip(changes.tolist(), features)]
    effects.sort(key=lambda effect: effect[0])
    pro = [effect for effect in effects[:TOGETHER] if effect[0] < 0]
    con = [effect for effect in effects[::-1][:TOGETHER] if effect[0] > 0]
    without = kept(model, layers, [[effect[1:3] for effect in pro], []])
    for scale in without.values():
        scale[1] = 0                     # all, also those that fire only where others are away
    together, whole = (run_scaled(model, idx, without, end, measure) - base).tolist()
    passes = what_passes(model.saes()[layers[0]], layers[0])
    return dict(idx=tokens, base=base, active=len(fires), effects=effects, pro=pro, con=con,
                together=together, whole=whole, passes=passes)

def what_passes(sae, layer):
    """What the features of an SAE explain, and what they do not, in words."""
    rest = []
    if sae.site.hook != 'block':
        rest.append("the stream passes beside them")
    if sae.alpha < 1:
        rest.append(f"of the stream a share of {1 - sae.alpha:.2f} passes too")
    if sae.posthoc:
        rest.append("the length of each token's stream passes too")
    said = ' and '.join(rest) or "nothing else passes, this is the whole truth"
    return f"the features are {sae.site.place} {layer}: {said}"

def logits_of(model, stream):
    """The stream (B, T, C) after the last block -> logits (B, T, V)."""
    logits = linear(norm(stream), model.transformer.wte.weight)
    return logits[..., :model.config.vocab_size].float()

@torch.no_grad()
def why_token(model, tokens, target, layers):
    """Why target, a list of ids, follows tokens; [] is the likeliest token. What is measured is
    log p(target), a sum over its tokens. Only the last tokens that fit into the model are read.
    Adds to what explain returns: target; likeliest, [(token, probability)] of 5 after tokens."""
    T, device = model.config.block_size, device_of(model)
    p = model(torch.tensor([tokens[-T:]], device=device))[0][0, -1].float().softmax(-1)  # (V,)
    top = p.topk(min(5, len(p)))
    likeliest = list(zip(top.indices.tolist(), top.values.tolist()))
    target = target or [likeliest[0][0]]
    n = len(target)
    read = [*tokens[-max(1, T + 1 - n):], *target[:-1]]

    def log_p(stream, _):
        log_p = logits_of(model, stream[:, -n:]).log_softmax(-1)             # (B, n, V)
        return log_p[:, list(range(n)), target].sum(1)

    d = explain(model, read, layers, model.config.n_layer, log_p)
    return d | dict(target=target, likeliest=likeliest)

@torch.no_grad()
def why_feature(model, tokens, layer, f):
    """Why feature f of a block fires on the last of tokens, by the features of the SAEs below: what
    is measured is its activation, 0 where it is not among the K."""
    def activation(_, outs):
        values, indices = outs[-1].values[:, -1], outs[-1].indices[:, -1]    # (B, K)
        return torch.where(indices == f, values, 0).sum(-1)

    below = [i for i in model.saes() if i < layer]
    return explain(model, tokens, below, layer + 1, activation)

@torch.no_grad()
def loss_changes(model, layer, tokens, features, which, where):
    """tokens (T,), n features of a block, which (P,) of 0..n-1, where (P,) of 0..T-2 -> (P,): how
    the loss of the token after where[p] changes without features[which[p]], in nats."""
    idx = torch.from_numpy(tokens).to(device_of(model))
    scales = kept(model, [layer], [[], *([(layer, f)] for f in features)])
    x = run_scaled(model, idx[None], scales, model.config.n_layer, lambda x, _: x)

    def losses(run):                     # run (P,): 0 is the model as it is, 1 + i lacks feature i
        logits = logits_of(model, x[run, where])             # x (1 + n, T, C), logits (P, V)
        return cross_entropy(logits, idx[where + 1], reduction='none')

    return (losses(which + 1) - losses(0 * which)).cpu().numpy()

def removal_effect(model, scan, f, n, seed):
    """The change of the next token's loss, in nats, when a feature is taken away, at n of the
    positions where it fires, drawn at random; None where there is none."""
    T, where = scan.T, firings(scan, f)[0]                                   # (P,)
    where = np.random.default_rng(seed).permutation(where[where % T < T - 1])[:n]
    if not len(where):
        return None
    changes = []
    for w in np.unique(where // T):
        at, tokens = where[where // T == w] % T, scan.tokens[w * T:(w + 1) * T]
        changes += loss_changes(model, scan.layer, tokens, [f], 0 * at, at).tolist()
    return dict(n=len(changes), mean=float(np.mean(changes)), std=float(np.std(changes)))

@torch.no_grad()
def trace(model, scan, above, f, seed, n=16):
    """
    What a feature does to the next SAE's features. scan, above: the two SAEs' -> arrays (F,):
      share              positions of the scan where both fire, of those where either does
      as_it_is, without  their mean activation where it fires, and what is left of it when it is
                         taken away, in n windows of the scan at most, drawn at random
    """
    T, where = scan.T, firings(scan, f)[0]                                   # (P,)
    rng = np.random.default_rng((seed, scan.layer, f))
    windows = rng.permutation(np.unique(where // T))[:n]
    total, positions = np.zeros((2, above.F)), 0
    scales = kept(model, [scan.layer], [[], [(scan.layer, f)]])
    codes = lambda _, outs: dense(outs[-1].values, outs[-1].indices, above.F)
    for w in windows:
        at, tokens = where[where // T == w] % T, scan.tokens[w * T:(w + 1) * T]
        idx = torch.from_numpy(tokens)[None].to(device_of(model))            # (1, T)
        z = run_scaled(model, idx, scales, above.layer + 1, codes)           # (2, T, F)
        total += z[:, at].sum(1).cpu().numpy()
        positions += len(at)
    as_it_is, without = total / max(1, positions)
    return dict(share=joint(above, where), as_it_is=as_it_is, without=without,
                windows=len(windows), positions=positions)
