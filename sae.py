"""
The sparse autoencoder (SAE) layer: a place in a GPT through which only K of F features pass.

    h = norm(x)                                 RMSNorm without parameters
    a = relu(W_enc (h - mean) + b_enc)          (N, F)  how strongly each feature fires
    z = the K largest of each token's a, the rest 0
    y = z W_dec + b_dec
    x <- (1 - alpha) x + alpha scale y

Before the hand-over (alpha = 0) it only watches, and learns to reconstruct h; scale is the RMS of
x, as it was then. Afterwards (alpha = 1) the language model's own loss trains it. Row f of W_enc
(F, C) is what feature f reads, row f of W_dec (F, C), all of one length, what it writes. mean is
h's running mean over tokens: were it left in, W_enc mean would be a second b_enc, which AdamW moves
faster than the nudge (in after_step) can, the faster the larger C is: features would die of that.

Shapes: B batch, T time, C n_embd, F features, K active features a token, N = B*T, S SAE layers.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels

class Site(NamedTuple):
    """What is made sparse. A new site is a row below, and its hook in model.py's Block.forward."""
    name: str
    hook: str     # the value in Block.forward that passes through the layer
    ratio: str    # the key of GPTConfig that says how many features there are a channel
    own: bool     # an encoder and a decoder of its own; else TopK over activations of the model
    place: str    # for people; the number of the block follows

SITES = {site.name: site for site in (
    Site('resid', 'block', 'sae_ratio', True, "on the residual stream after block"),
    Site('mlp', 'mlp', 'sae_ratio', True, "on the MLP's output in block"),
    Site('attn', 'attn', 'sae_ratio', True, "on the attention's output in block"),
    Site('hidden', 'hidden', 'mlp_ratio', False, "inside the MLP of block"),
)}

def norm(x):
    return F.rms_norm(x, (x.size(-1),))

class SAEOut(NamedTuple):
    """What an SAE layer saw in one forward pass. GPT.forward stacks its layers on a new axis S."""
    values: torch.Tensor   # (B, T, K) activations of the chosen features, best score first; 0: none
    indices: torch.Tensor  # (B, T, K) which features; means nothing where the value is 0
    fired: torch.Tensor    # (F,) int32, on how many tokens of this batch each feature is active
    l0: torch.Tensor       # () mean number of active features a token
    fvu: torch.Tensor      # () fraction of variance unexplained, |h - y|^2 / |h - mean h|^2
    length: torch.Tensor   # () mean length of x, over sqrt(C)
    mean: torch.Tensor     # (C,) mean of h over tokens; at hidden (F,)
    loss: torch.Tensor     # () sae_recon * fvu while alpha is 0, then 0

def topk(a, score, k):
    """a, score (..., F) -> values (..., k) of a, indices (..., k), the largest score first (arXiv
    2406.04093). Per token: over a batch later tokens would decide what an earlier one may use."""
    indices = torch.topk(score, k, dim=-1).indices
    return a.gather(-1, indices), indices

class SAE(nn.Module):
    """
    One sparse layer, at any site:
      resid, mlp, attn  the equations above, on the stream or on a sub-block's output
      hidden            K of the MLP's hidden layer, relu(c_fc x)^2: c_fc encodes, c_proj decodes
    At hidden z takes the place of y, and b_enc counts in the selection only.
    """
    select = staticmethod(topk) # another rule goes here; the kernels know topk alone

    def __init__(self, config):
        super().__init__()
        self.config, self.site = config, SITES[config.sae_site]
        self.n_embd, self.n_features, self.k = config.n_embd, config.n_features, config.sae_k
        C, F_ = self.n_embd, self.n_features
        self.recon = config.sae_recon if self.site.own else 0.0
        if self.site.own:
            self.W_enc = nn.Parameter(F.normalize(torch.randn(F_, C), dim=-1))
            self.b_enc = nn.Parameter(torch.zeros(F_))
            self.W_dec = nn.Parameter(torch.randn(F_, C))
            self.b_dec = nn.Parameter(torch.zeros(C))
            self.register_buffer('mean', torch.zeros(C)) # of h over tokens and steps
            self.normalize_rows()
        else:
            self.register_buffer('b_enc', torch.zeros(F_))
        self.register_buffer('alpha', torch.ones(())) # a buffer: to change it never recompiles
        self.register_buffer('scale', torch.ones(())) # RMS of x in the last step with alpha 0
        self.register_buffer('silent', torch.zeros(F_, dtype=torch.long)) # steps since it fired
        self.register_buffer('share', torch.zeros(F_)) # of tokens on which it fires, running mean
        # Interventions, not in training: z <- scale * z + add, then y <- gate * y + fill
        self.steer = None # or (scale, add), each (F,)
        self.register_buffer('gate', torch.ones(()), persistent=False)
        self.register_buffer('fill', torch.zeros(C if self.site.own else F_), persistent=False)
        # trained on a frozen model: y gets the length of x, and evals have alpha 1
        self.posthoc = False

    @torch.no_grad()
    def normalize_rows(self):
        """Gives the rows of W_dec their length, so that what a feature does is all in its
        activation. The K largest of F unit Gaussians have squares near 2 ln(F/K): of |h|^2 = C a
        code reads S = 2 K ln(F/K), and an untrained decoder writes at most sqrt(C)/2."""
        C, F_, K = self.n_embd, self.n_features, self.k
        S = 2 * K * math.log(max(F_ / K, 2)) # max: with K near F it would be 0
        length = 1 / (1 + S / C)
        self.W_dec.copy_(length * F.normalize(self.W_dec, dim=-1))

    def encode(self, h):
        """h (..., C), normalised as in forward -> values (..., K), indices (..., K)."""
        if self.site.own:
            pre = F.linear(h - self.mean, self.W_enc).float() + self.b_enc # fp32, to compare
            score = a = pre.relu()                                          # (..., F)
        else:
            a = h.float()                                                   # (..., F)
            score = a + self.b_enc
        return self.select(a, score, self.k)

    def decode(self, z):
        """A dense code z (..., F) -> what it writes (..., C); z itself at hidden."""
        return z @ self.W_dec + self.b_dec if self.site.own else z

    def forward(self, x):
        """x (B, T, C) -> new x (B, T, C), SAEOut."""
        h = norm(x) if self.site.own else x
        if self.recon: # while alpha is 0 it must not pull on the model
            h = torch.where(self.alpha > 0, h, h.detach())
        fast = self.fast_path(h)
        if fast is not None:
            y, values, indices, fired = fast
        else:
            values, indices = self.encode(h)                                # (B, T, K)
            active = (values != 0).flatten().int()
            fired = torch.zeros_like(self.b_enc, dtype=torch.int32)         # (F,)
            fired = fired.scatter_add(0, indices.flatten(), active)
            z = values.new_zeros(*h.shape[:-1], self.n_features)
            z = z.scatter(-1, indices, values)                              # (B, T, F)
            if self.steer is not None:
                z = z * self.steer[0] + self.steer[1]
            y = self.decode(z)                                              # (B, T, C)
        if not self.training:
            y = (self.gate * y + self.fill).type_as(y)
        fvu = fraction_unexplained(h.detach(), y if self.recon else y.detach())
        loss = torch.where(self.alpha > 0, 0.0, self.recon * fvu)
        lengths = x.detach().float().square().mean(-1, keepdim=True).sqrt() # (B, T, 1)
        y = y * (lengths if self.posthoc else self.scale)
        alpha = 1.0 if self.posthoc and not self.training else self.alpha
        new_x = (1 - alpha) * x + alpha * y
        l0 = (values != 0).sum() / values[..., 0].numel()
        mean = h.detach().float().mean((0, 1))
        out = SAEOut(values, indices, fired, l0, fvu.detach(), lengths.mean(), mean, loss)
        return new_x.type_as(x), out

    def fast_path(self, h):
        """y, values, indices and fired from kernels.py; None where its kernels do not run."""
        if not self.site.own or self.select is not topk or self.steer is not None:
            return None
        h = h - self.mean                                                         # (B, T, C)
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))
        rows, F_, K = h.flatten(0, -2), self.n_features, self.k                   # (N, C)
        if not kernels.fits(len(rows), F_, self.n_embd, K, h.dtype, h.device):
            return None
        y, values, indices, fired = kernels.topk_autoencode(
            rows, self.W_enc, self.b_enc, self.W_dec, self.b_dec, K)
        shape = (*h.shape[:-1], K)
        return y.view_as(h), values.view(shape), indices.long().view(shape), fired

    @torch.no_grad()
    def after_step(self, fired, tokens, length, mean):
        """fired (F,): on how many of the step's tokens, over all ranks, each feature was active;
        tokens: how many these are; length (), mean (C,): SAEOut's, over them. b_enc rises where a
        feature fires too rarely, falls where too often (as in mixtures of experts, arXiv
        2408.15664)."""
        if self.site.own:
            self.mean.lerp_(mean, 0.1)
            self.scale.copy_(torch.where(self.alpha > 0, self.scale, length))
        self.silent.copy_(torch.where(fired > 0, 0, self.silent + 1))
        self.share.lerp_(fired / tokens, 0.1)
        self.b_enc.add_(self.config.sae_nudge * self.is_silent())
        if self.config.sae_cap:
            self.b_enc.sub_(self.config.sae_nudge * (self.share > self.config.sae_cap))

    def is_silent(self):
        return self.silent >= self.config.sae_silent_steps

def fraction_unexplained(h, y):
    """FVU: |h - y|^2 / |h - mean h|^2, both (..., C), sums in fp32. 0 is perfect, 1 the mean."""
    h, y = h.float().flatten(0, -2), y.float().flatten(0, -2)
    return (h - y).square().sum() / (h - h.mean(0)).square().sum().clamp_min(1e-12)

def blend_alpha(progress, start, end):
    """alpha by the share of training done: 0 up to `start`, then linearly to 1 at `end`, then 1."""
    if progress >= end:
        return 1.0
    return 0.0 if progress < start else (progress - start) / (end - start)
