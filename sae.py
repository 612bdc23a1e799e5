"""
The sparse autoencoder (SAE) layer: a place in a GPT's block through which only K of F features pass.

    h = norm(x)                                 RMSNorm without parameters
    a = relu(W_enc (h - b_dec) + b_enc)         (N, F)  how strongly each feature fires
    z = the K largest of each token's a, the rest 0
    y = z W_dec + b_dec [+ W_skip norm(wte[token]) with token_skip]
    x <- (1 - alpha) x + alpha y

It is trained by the language model's own loss, together with the model: there is no second model and
no reconstruction error to explain away. This file knows nothing of GPTs; model.py calls it.

Shapes: B batch, T time, C n_embd, F features, K active features a token, N = B*T, S SAE layers.
Row f of W_enc (F, C) is what feature f reads, row f of W_dec (F, C) is what it writes.

Where the training strategies live: the tied init in reset_parameters(); the blend (alpha) and K annealing in
blend_alpha() and k_at(), both held in buffers, so that changing them never recompiles; revival of silent
features in revive() and auxk_loss().
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels

SITES = ('resid', 'mlp', 'attn', 'hidden', 'stream')

def norm(x):
    return F.rms_norm(x, (x.size(-1),))

class SAEOut(NamedTuple):
    """What an SAE layer saw in one forward pass. GPT.forward stacks its layers along a new first axis S."""
    values: torch.Tensor   # (B, T, K) activations of the chosen features, largest first; 0 = not active
    indices: torch.Tensor  # (B, T, K) which features; means nothing where the value is 0
    fired: torch.Tensor    # (F,) bool, active at least once in this batch
    l0: torch.Tensor       # () mean number of active features a token
    fvu: torch.Tensor      # () fraction of variance unexplained, |target - y|^2 / |target - mean|^2
    loss: torch.Tensor     # () auxiliary losses (recon, AuxK), weighted; 0 where both are off

class SAE(nn.Module):
    """
    One sparse layer. `site` says what is made sparse; all five answer to the same calls:
      resid, mlp, attn  the equations above, on the stream or on a sub-block's output
      hidden            this module *is* the block's MLP: a = relu(W_enc x + b_enc)^2, y = z W_dec, and
                        alpha blends the dense code a with the sparse z
      stream            no weights: of the stream's own C channels the K largest by magnitude stay
                        (TopK Language Models, arXiv 2506.21468); a feature is a channel, in every layer

    TopK (arXiv 2406.04093) is per token. Batch-level TopK would let later tokens decide which features
    an earlier token may use: it leaks the future into a causal model.
    Raises ValueError for an unknown site or a K outside 1..F.
    """

    def __init__(self, n_embd, n_features, k, site='resid', k_start=0, tied_init=False, token_skip=False,
                 recon=0.0, auxk=0.0, nudge=0.02, silent_tokens=262_144):
        super().__init__()
        if site not in SITES:
            raise ValueError(f"unknown SAE site {site!r}: expected one of {', '.join(SITES)}")
        n_features = n_embd if site == 'stream' else n_features
        k_max = max(k, k_start) # the static width of a run's codes; the buffer k masks the rest
        if not 1 <= k <= k_max <= n_features:
            raise ValueError(f"sae_k={k} (sae_k_start={k_start}) must lie in 1..{n_features} features")
        self.n_embd, self.n_features, self.site = n_embd, n_features, site
        self.k_final, self.k_max = k, k_max
        own_space = site in ('resid', 'mlp', 'attn') # has a target to reconstruct; the others' codes are the model's own
        self.tied_init, self.recon, self.auxk = tied_init, recon if own_space else 0.0, auxk
        self.nudge, self.silent_tokens = nudge, silent_tokens
        if site == 'stream': # no weights; a bias for the selection alone, moved by the nudge
            self.register_buffer('b_enc', torch.zeros(n_features))
        else: # raw parameters: no generic init over nn.Linear modules can overwrite the tied init
            self.W_enc = nn.Parameter(torch.empty(n_features, n_embd))
            self.b_enc = nn.Parameter(torch.zeros(n_features))
            self.W_dec = nn.Parameter(torch.empty(n_features, n_embd))
        self.b_dec = nn.Parameter(torch.zeros(n_embd)) if own_space else None
        # What K features fail to say is mostly the token itself, as the blocks before have turned it. A function of the token id
        # alone is as readable as features are. A vector g wins back 0.009 nats, the matrix 0.058 more (results/README.md).
        self.W_skip = nn.Parameter(torch.zeros(n_embd, n_embd)) if own_space and token_skip else None
        self.register_buffer('alpha', torch.ones(()))
        self.register_buffer('k', torch.tensor(k))
        self.register_buffer('silent', torch.zeros(n_features, dtype=torch.long)) # tokens since it last fired
        # Interventions, for evaluation and sampling only: y <- gate * y + fill and z <- scale * z + add.
        self.register_buffer('gate', torch.ones(()), persistent=False)
        self.register_buffer('fill', torch.zeros(n_embd), persistent=False)
        self.steer = None # or (scale (F,), add (F,))
        self.posthoc = False # an SAE trained to reconstruct norm(x): spliced in, its y gets the length of x
        self.reset_parameters(k)

    @torch.no_grad()
    def reset_parameters(self, k):
        """
        site                W_enc rows             W_dec rows
        resid, mlp, attn    random unit vectors    random, of length c; tied_init: c * W_enc
        hidden              std 1/sqrt(C)          zeros, like every c_proj of the GPT
        W_skip starts at zero.

        The K largest of F unit Gaussians have squares near 2 ln(F/K), so a token's code projects on h with
        S = 2 K ln(F/K) of |h|^2 = C, and c = 1 / (1 + S/C) makes a tied y about the least-squares fit to h. That gains
        0.02 nats where the SAE takes over at step 0, and nothing where it learns to reconstruct first (results/README.md).
        """
        if self.site == 'stream':
            return
        nn.init.normal_(self.W_enc, std=self.n_embd ** -0.5)
        if self.site == 'hidden':
            nn.init.zeros_(self.W_dec)
            return
        self.W_enc.copy_(F.normalize(self.W_enc, dim=-1))
        rows = self.W_enc if self.tied_init else F.normalize(torch.randn_like(self.W_enc), dim=-1)
        self.W_dec.copy_(rows / (1 + 2 * k * math.log(max(self.n_features / k, 2)) / self.n_embd))

    # ------------------------------------------------------------------------------------------------
    # encode, decode, forward

    def pre_activations(self, h):
        """h (..., C) -> (..., F), in fp32 whatever the autocast: selection compares these."""
        if self.site == 'stream':
            return h.float()
        return F.linear(h if self.b_dec is None else h - self.b_dec, self.W_enc).float() + self.b_enc

    def activations(self, pre):
        if self.site == 'stream':
            return pre
        return pre.relu().square() if self.site == 'hidden' else pre.relu()

    def topk(self, a):
        """a (..., F) -> values (..., K) fp32, indices (..., K): the K largest, with slots beyond k zeroed."""
        score = a.abs() + self.b_enc if self.site == 'stream' else a
        indices = torch.topk(score, self.k_max, dim=-1).indices
        kept = torch.arange(self.k_max, device=a.device) < self.k # slots are sorted: the first k are the k largest
        return a.gather(-1, indices) * kept, indices

    def encode(self, h):
        """h (..., C), normalised as in forward -> values (..., K), indices (..., K)."""
        return self.topk(self.activations(self.pre_activations(h)))

    def decode(self, z):
        """A dense code z (..., F) -> what its features write (..., C), b_dec included."""
        if self.site == 'stream':
            return z
        return z @ self.W_dec if self.b_dec is None else z @ self.W_dec + self.b_dec

    def forward(self, x, tok=None):
        """
        x (B, T, C) and tok (B, T, C), the normalised token embedding -> new x (B, T, C), SAEOut.
        At site hidden, x is the MLP's normalised input and the result is the MLP's output.
        """
        h = x if self.site in ('hidden', 'stream') else norm(x)
        if self.recon: # before the hand-over the SAE watches: it learns to reconstruct, and must not pull on the model
            h = torch.where(self.alpha > 0, h, h.detach())
        pre = None
        if self.can_use_kernels(h):
            y, values, indices, fired = self.fast_path(h)
        else:
            pre = self.pre_activations(h)                          # (B, T, F)
            a = self.activations(pre)                              # (B, T, F)
            values, indices = self.topk(a)                         # (B, T, K)
            fired = kernels.fired_ref(values, indices, self.n_features) # (F,)
            z = torch.zeros_like(a).scatter(-1, indices, values)   # (B, T, F)
            if self.site == 'hidden':
                target, code = a, z
                z = torch.lerp(a, z, self.alpha)
            if self.steer is not None:
                z = z * self.steer[0] + self.steer[1]
            y = self.decode(z)                                     # (B, T, C)
        if not self.training: # fill is fp32: on a GPU y and its gradient would be, too, 600 MB more a micro-batch of the 124M
            y = (self.gate * y + self.fill).type_as(y)
        if self.W_skip is not None:
            y = y + F.linear(tok, self.W_skip)
        if self.site != 'hidden':
            target, code = h, y
        fvu = fraction_unexplained(target.detach(), code if self.recon > 0 else code.detach())
        loss = torch.where(self.alpha > 0, 0.0, self.recon * fvu)
        if self.auxk and self.training:
            loss = loss + self.auxk * self.auxk_loss(target, code, pre)
        if self.posthoc:
            y = y * x.float().square().mean(-1, keepdim=True).sqrt()
        new_x = y if self.site == 'hidden' else (1 - self.alpha) * x + self.alpha * y
        l0 = (values != 0).sum() / values[..., 0].numel()
        return new_x.type_as(x), SAEOut(values, indices, fired, l0, fvu.detach(), loss)

    def can_use_kernels(self, h):
        """The fast path computes the same y, values and indices; it knows no intervention and no pre-activations."""
        return (self.site in ('resid', 'mlp', 'attn') and kernels.available(h.device)
                and not self.auxk and self.steer is None and self.k_max == self.k_final)

    def fast_path(self, h):
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))
        y, values, indices, fired = kernels.topk_autoencode(
            h.flatten(0, -2), self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.k_max)
        shape = (*h.shape[:-1], self.k_max)
        return y.view_as(h), values.view(shape), indices.long().view(shape), fired

    # ------------------------------------------------------------------------------------------------
    # revival of silent features

    @torch.no_grad()
    def revive(self, fired, tokens):
        """
        Called once a step. fired (F,): active in any micro-step of any rank; tokens: how many tokens these were.
        The bias nudge: a feature that was silent over the last `silent_tokens` tokens gets `nudge` added to its
        b_enc, without any gradient (the idea of loss-free balancing in mixtures of experts, arXiv 2408.15664).
        All live where an average feature fires some 60 times in that while (sae_cpu.py) or 1,000 (8,192 features, K=32);
        where it fires 11 times this costs 0.01 nats; a while five times as long leaves 1 % silent, at 64x 5 % (results/README.md).
        """
        self.silent.copy_(torch.where(fired, 0, self.silent + tokens))
        self.b_enc.add_(self.nudge * self.is_silent())

    def is_silent(self):
        return self.silent >= self.silent_tokens

    def auxk_loss(self, target, y, pre):
        """
        AuxK (arXiv 2406.04093): the C/2 silent features with the largest pre-activations reconstruct the error that
        the layer left. No relu on them: a feature that is negative everywhere must still get a gradient to W_enc.
        Not at hidden, where it pulls such a feature up to 0 and no further, nor at stream, which has no weights.
        """
        error = (target - y).detach()
        silent = self.is_silent()
        values, indices = torch.where(silent, pre, -torch.inf).topk(min(self.n_embd // 2, self.n_features), dim=-1)
        values = torch.where(values.isfinite(), values, 0.0) # fewer silent features than slots
        z = torch.zeros_like(pre).scatter(-1, indices, values)
        return (error - z @ self.W_dec).square().sum() / error.square().sum().clamp_min(1e-12)

def fraction_unexplained(target, y):
    """FVU: |target - y|^2 over |target - its mean over tokens|^2, both (..., C), summed in fp32. 0 is perfect, 1 the mean."""
    target, y = target.float().flatten(0, -2), y.float().flatten(0, -2)
    return (target - y).square().sum() / (target - target.mean(0)).square().sum().clamp_min(1e-12)

# ----------------------------------------------------------------------------------------------------
# schedules, as functions of the share of training done

def blend_alpha(progress, start, end):
    """0 up to `start`, then linearly to 1 at `end`, then 1. start = end = 0: the SAE takes over at step 0."""
    if progress >= end:
        return 1.0
    return 0.0 if progress < start else (progress - start) / (end - start)

def k_at(progress, k_start, k, end):
    """K annealing: geometrically from k_start to k at `end` of training. k_start = 0: always k."""
    if not k_start or progress >= end:
        return k
    return round(k_start * (k / k_start) ** (progress / end))

# ----------------------------------------------------------------------------------------------------
# statistics of features over a set of tokens

def count_pairs(values, indices, tokens, vocab_size):
    """
    How often feature f is active on token v. values, indices (..., K), tokens (...) ->
    keys f * vocab_size + v (P,), sorted, and counts (P,). Only pairs that occur are stored.
    """
    keys = indices.long() * vocab_size + tokens.unsqueeze(-1)
    return torch.unique(keys[values != 0], return_counts=True)

def token_entropy(keys, counts, n_features, vocab_size):
    """
    Token entropy of each feature, in bits: Shannon entropy of the distribution of token types over the positions
    where it is active. Low: a detector of one word; high: an abstract feature. (F,) fp64; nan for one that never fires.
    """
    f, counts = keys // vocab_size, counts.double()
    total = torch.zeros(n_features, dtype=torch.double, device=keys.device).index_add_(0, f, counts)
    p = counts / total[f]
    entropy = torch.zeros_like(total).index_add_(0, f, -p * p.log2())
    return torch.where(total > 0, entropy.clamp_min(0), torch.nan)

def top_tokens(keys, counts, n_features, vocab_size, n=8):
    """The n most frequent tokens of each feature (F, n), -1 where there are fewer, and their counts (F, n)."""
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[torch.argsort(keys[order] // vocab_size, stable=True)] # by feature, then by falling count
    f, tokens = keys[order] // vocab_size, keys[order] % vocab_size
    first = torch.searchsorted(f, torch.arange(n_features, device=f.device))
    place = torch.arange(len(f), device=f.device) - first[f] # rank of the pair within its feature
    top = torch.full((n_features, n), -1, dtype=torch.long, device=f.device)
    top_counts = torch.zeros_like(top)
    kept = place < n
    top[f[kept], place[kept]] = tokens[kept]
    top_counts[f[kept], place[kept]] = counts[order][kept]
    return top, top_counts
