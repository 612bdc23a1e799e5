"""
A GPT with SAE layers inside, in the style of nanoGPT's model.py: the whole model in this one file, the sparse
layer in sae.py. What differs from GPT-2:
- RoPE instead of learned positions, QK-norm, RMSNorm without parameters, ReLU^2 MLP, no biases
- the token embedding is normalised, and tied to the output head
- blocks named in `sae_layers` pass what `sae_site` says through K of F features (see sae.py)
With sae_layers = () it is a plain dense GPT, the twin that every SAE model is compared with.

Shapes: B batch, T time, C n_embd, H heads, D = C/H, V vocabulary, L layers, S SAE layers, F features, K active.
"""
import math
import os
import sys
import zipfile
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from sae import SAE, SAEOut, SITES, norm

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 6               # heads of 128 channels: attention takes 7 ms of a 57 ms step, with heads of 64 8.7
    n_embd: int = 768
    mlp_ratio: int = 4
    dropout: float = 0.0
    sae_layers: tuple = ()        # block indices, as in transformer.h[i]; () is the dense GPT
    sae_site: str = 'resid'       # resid, mlp, attn, hidden, stream
    sae_ratio: int = 16           # F = sae_ratio * C (site hidden: mlp_ratio * C; site stream: C)
    sae_k: int = 32               # K, active features a token
    sae_k_start: int = 0          # K annealing begins here; 0 = off
    sae_tied_init: bool = False
    sae_token_skip: bool = True   # add W_skip norm(wte[token]) to what the SAE writes
    sae_recon: float = 0.0        # weight of the reconstruction loss while alpha is 0 (sites resid, mlp, attn)
    sae_auxk: float = 0.0         # weight of the AuxK loss
    sae_nudge: float = 0.02       # added to b_enc of each silent feature, each step; 0 = off
    sae_silent_tokens: int = 262_144 # a feature is silent when it has not fired over so many tokens, or in the last step if that is longer

    def problems(self):
        """Everything that is wrong with this config, as a list of sentences; [] if it is sound."""
        found = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < (0 if field.name == 'sae_k_start' else 1):
                found.append(f"{field.name}={value} must be at least 1")
            if field.type is float and not 0 <= value < math.inf:
                found.append(f"{field.name}={value} must be 0 or more, and finite")
        sound = not found # what follows computes with these
        if self.dropout >= 1:
            found.append(f"dropout={self.dropout} must be below 1")
        if sound and (self.n_embd % self.n_head or self.n_embd // self.n_head % 2):
            found.append(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even head size (RoPE turns pairs)")
        layers = list(self.sae_layers)
        if sound and (any(type(i) is not int or not 0 <= i < self.n_layer for i in layers) or len(set(layers)) < len(layers)):
            found.append(f"sae_layers={layers} must be different block indices in 0..{self.n_layer - 1}")
        if self.sae_site not in SITES:
            found.append(f"sae_site={self.sae_site!r} must be one of {', '.join(SITES)}")
        elif sound and layers and not 1 <= max(self.sae_k, self.sae_k_start) <= self.n_features:
            found.append(f"sae_k={self.sae_k} (sae_k_start={self.sae_k_start}) must not exceed the "
                         f"{self.n_features} features of site {self.sae_site}")
        elif sound and 0 < self.sae_k_start < self.sae_k:
            found.append(f"sae_k_start={self.sae_k_start} must be 0 (off) or at least sae_k={self.sae_k}")
        if self.sae_auxk and self.sae_site in ('hidden', 'stream'):
            found.append(f"sae_auxk={self.sae_auxk} needs a site with a decoder of its own (resid, mlp, attn), "
                         f"not {self.sae_site}; sae_nudge works at all of them")
        return found

    @property
    def n_features(self):
        return {'hidden': self.mlp_ratio, 'stream': 1}.get(self.sae_site, self.sae_ratio) * self.n_embd

class KVCache:
    """Keys and values of the tokens so far, so that sampling computes each token once."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)   # (L, 2, B, H, T, D)
        self.pos = 0

    def update(self, layer, k, v):
        """Append k, v (B, H, T, D) of new tokens; returns all so far."""
        end = self.pos + k.size(2)
        self.kv[layer, 0, :, :, self.pos:end] = k
        self.kv[layer, 1, :, :, self.pos:end] = v
        return self.kv[layer, :, :, :, :end].unbind(0)

def rotate(x, cos, sin):
    """RoPE (arXiv 2104.09864): turns the pair of channels (i, i + D/2) by its position's angle. x (B, T, H, D)"""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2) # a cat of the two halves instead: 1 ms of 57 slower, in 124M
    return (x * cos + swapped * sin).type_as(x)

class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).unbind(2) # (B, T, H, D)
        q, k = rotate(norm(q), *rope), rotate(norm(k), *rope) # QK-norm bounds the attention logits
        q, k, v = (t.transpose(1, 2) for t in (q, k, v)) # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        x = kernels.mlp(x, self.c_fc.weight, self.c_proj.weight) # c_proj(relu(c_fc(x))^2)
        return F.dropout(x, self.dropout, self.training)

class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.site, self.sae = None, None
        if layer in config.sae_layers:
            self.site = config.sae_site
            self.sae = SAE(config.n_embd, config.n_features, config.sae_k, config.sae_site, config.sae_k_start,
                           config.sae_tied_init, config.sae_token_skip, config.sae_recon, config.sae_auxk,
                           config.sae_nudge, config.sae_silent_tokens)
        self.mlp = None if self.site == 'hidden' else MLP(config) # at site hidden the SAE is the MLP

    def forward(self, x, tok, rope, cache=None):
        out = None
        h = self.attn(norm(x), rope, cache)
        if self.site == 'attn':
            h, out = self.sae(h, tok)
        x = x + h
        if self.site == 'hidden':
            h, out = self.sae(norm(x))
            h = F.dropout(h, self.attn.dropout, self.training) # as in MLP
        else:
            h = self.mlp(norm(x))
        if self.site == 'mlp':
            h, out = self.sae(h, tok)
        x = x + h
        if self.site in ('resid', 'stream'):
            x, out = self.sae(x, tok)
        return x, out

class GPT(nn.Module):

    def __init__(self, config):
        """config: GPTConfig. Raises ValueError listing all of its problems."""
        super().__init__()
        if config.problems():
            raise ValueError("; ".join(config.problems()))
        self.config = config
        padded = math.ceil(config.vocab_size / 64) * 64 # matmuls like multiples of 64; the extra logits never count
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, config.n_embd), # also the output head (tied)
            h=nn.ModuleList([Block(config, i) for i in range(config.n_layer)])))
        D = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.block_size), 10000.0 ** (-torch.arange(0, D, 2) / D)) # (T, D/2)
        self.register_buffer('cos', torch.cat((angles.cos(), angles.cos()), -1).unsqueeze(1), persistent=False)  # (T, 1, D)
        self.register_buffer('sin', torch.cat((angles.sin(), -angles.sin()), -1).unsqueeze(1), persistent=False) # (T, 1, D)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        wte             normal, std 0.02 (as the head it gives first logits of std 0.02 sqrt(C); as input it is normalised)
        c_attn, c_fc    normal, std 1/sqrt(C)
        c_proj          zeros: every block starts as the identity
        SAE             see SAE.reset_parameters
        """
        nn.init.normal_(self.transformer.wte.weight, std=0.02)
        for name, p in self.named_parameters():
            if name.endswith(('c_attn.weight', 'c_fc.weight')):
                nn.init.normal_(p, std=self.config.n_embd ** -0.5)
            elif name.endswith('c_proj.weight'):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        """
        idx (B, T) token ids, targets (B, T) the next ones -> logits (B, T, V), loss, SAEOut.
        loss: mean cross-entropy in nats, without the SAEs' auxiliary losses (SAEOut.loss). With targets logits is None,
        without them loss is.
        SAEOut: its fields stacked over SAE layers along a new first axis, in the order of sae_layers; None if dense.
        cache: a KVCache; idx then continues what it holds, and logits are the last position's only, (B, 1, V).
        """
        B, T = idx.size()
        pos = 0 if cache is None else cache.pos
        if pos + T > self.config.block_size:
            raise ValueError(f"{pos + T} tokens do not fit the model's block_size of {self.config.block_size}")
        if pos and T > 1:
            raise ValueError("a filled KVCache takes one token at a time")
        tok = norm(self.transformer.wte(idx)).to(self.stream_dtype(idx.device)) # (B, T, C)
        x = F.dropout(tok, self.config.dropout, self.training)
        rope = self.cos[pos:pos + T], self.sin[pos:pos + T]         # (T, 1, D) each
        outs = []
        for block in self.transformer.h:
            x, out = block(x, tok, rope, cache)
            if out is not None:
                outs.append(out)
        if cache is not None:
            cache.pos += T
            x = x[:, -1:]
        out = SAEOut(*map(torch.stack, zip(*outs))) if outs else None
        x, wte, V = norm(x), self.transformer.wte.weight, self.config.vocab_size
        if targets is None:
            return F.linear(x, wte)[..., :V], None, out                 # (B, T, V)
        return None, kernels.linear_cross_entropy(x.flatten(0, 1), wte, targets.flatten(), V), out

    def saes(self):
        """{block index: its SAE}, in order."""
        return {i: block.sae for i, block in enumerate(self.transformer.h) if block.sae is not None}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """
        Continue idx (B, T) by max_new_tokens; yields each new token (B, 1). temperature 0 takes the likeliest token,
        top_k keeps the k likeliest. A full cache restarts from the last half of the context.
        """
        cache, new = None, idx[:, -self.config.block_size:]
        for _ in range(max_new_tokens):
            if cache is None or cache.pos == self.config.block_size:
                if cache is not None:
                    new = idx[:, -max(1, self.config.block_size // 2):]
                cache = KVCache(self.config, idx.size(0), idx.device, self.stream_dtype(idx.device))
            logits = self(new, cache=cache)[0][:, -1].float()        # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def stream_dtype(self, device):
        """Under autocast the residual stream is bf16 too, not only the matmuls: half the bytes to move between them."""
        on = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if on else self.transformer.wte.weight.dtype

    def num_params(self, non_embedding=False):
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wte.weight.numel() if non_embedding else n

    def flops_per_token(self):
        """
        Forward and backward: 6 a matmul weight, 12 L C T for attention (PaLM, arXiv 2204.02311, appendix B). Of an SAE
        only the encoder's forward is dense (2 F C); decoding and the four gradients touch K rows (10 K C).
        """
        c = self.config
        matmul = self.transformer.wte.weight.numel()
        matmul += sum(p.numel() for n, p in self.named_parameters() if '.c_' in n or 'W_skip' in n)
        sae = sum(2 * s.W_enc.numel() + 10 * c.sae_k * c.n_embd for s in self.saes().values() if s.site != 'stream')
        return 6 * matmul + 12 * c.n_layer * c.n_embd * c.block_size + sae

    def optimizer_groups(self, weight_decay, learning_rate, sae_lr_factor, sae_skip_lr=1.0):
        """
        Parameter groups by what happens to them: the GPT's matrices decay (at site hidden the SAE's two are the MLP's);
        the SAE's parameters do not (decay would silence rare features, which get few gradients), and have their own
        learning rate; so has the token skip, relative to theirs.
        """
        groups = dict(matrices=[], sae=[], skip=[])
        for n, p in self.named_parameters():
            own = '.sae.' in n and not (self.config.sae_site == 'hidden' and p.dim() > 1)
            groups['matrices' if not own else 'skip' if n.endswith('W_skip') else 'sae'].append(p)
        factor = dict(matrices=1.0, sae=sae_lr_factor, skip=sae_lr_factor * sae_skip_lr)
        return [dict(params=params, weight_decay=weight_decay if name == 'matrices' else 0.0, lr=learning_rate * factor[name],
                     lr_factor=factor[name], name=name) for name, params in groups.items() if params]

# ----------------------------------------------------------------------------------------------------
# checkpoints: ckpt.pt is the newest whole one, ckpt_prev.pt the one before

def save_checkpoint(out_dir, checkpoint):
    """
    Write whole or not at all: a temporary file, synced, then renamed. At every moment ckpt.pt is there, old or new, and
    ckpt_prev.pt goes only after the new one is in place: it may be the only good one. Raises OSError, e.g. for a full disk.
    """
    path, prev, tmp, old = (os.path.join(out_dir, n) for n in ('ckpt.pt', 'ckpt_prev.pt', 'ckpt.tmp', 'ckpt.old'))
    try:
        with open(tmp, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e: # on a full disk torch raises RuntimeError: unexpected pos
        if os.path.exists(tmp):
            os.remove(tmp)
        raise OSError(f"no checkpoint could be saved in {out_dir}, is the disk full? ({str(e).splitlines()[0]})") from None
    if os.path.exists(old): # from a save that was killed
        os.remove(old)
    if os.path.exists(path):
        try:
            os.link(path, old)
        except OSError: # a file system without hard links: ckpt.pt is missing for a moment, but then it is ckpt_prev.pt
            os.replace(path, prev)
    os.replace(tmp, path)
    try:
        if os.path.exists(old):
            os.replace(old, prev)
    except OSError as e: # the new one is safe: no reason to end a run
        print(f"warning: {prev} could not be replaced ({e}): it is older than it should be")

def load_checkpoint(out_dir, map_location='cpu'):
    """
    The newest checkpoint in out_dir that is whole, as a dict; falls back to the one before, and says so.
    Raises ValueError with one sentence if there is none. Only tensors and plain values are ever unpickled.
    """
    problems = []
    for name in ('ckpt.pt', 'ckpt_prev.pt'):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            problems.append(f"{path} is missing")
            continue
        try:
            with zipfile.ZipFile(path) as z:
                if (bad := z.testzip()) is not None: # every record's CRC: torch.load alone misses a flipped bit
                    raise ValueError(f"record {bad} is damaged")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
            if type(checkpoint) is not dict or not {'model', 'model_args'} <= set(checkpoint) or type(checkpoint.get('step')) is not int:
                raise ValueError("another program's file")
        except Exception as e: # damage shows up as almost any exception: unpickling, zip, end of file
            problems.append(f"{path} cannot be read ({type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''})")
            continue
        if problems:
            print(f"warning: {'; '.join(problems)}: using {path} instead")
        return checkpoint
    raise ValueError(f"no checkpoint in {out_dir}: {'; '.join(problems)}. Train first, or give another --out_dir.")

def load_model(checkpoint, device='cpu'):
    """
    The GPT that a checkpoint holds, in eval mode; SAEs that were trained post hoc, watching only, are spliced in.
    Raises ValueError, one sentence, for a checkpoint of another version or program and for an unusable device.
    """
    try:
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError): # AssertionError: a build without CUDA
        raise ValueError(f"device={device!r} is not usable here: expected auto, cpu, cuda or mps") from None
    try:
        model = GPT(GPTConfig(**checkpoint['model_args']))
        model.load_state_dict(checkpoint['model'])
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as e:
        raise ValueError(f"the checkpoint does not fit this version of model.py ({str(e).strip().splitlines()[-1].strip()}): "
                         "use the version that wrote it, or train again") from None
    if checkpoint.get('config', {}).get('sae_posthoc'): # saved with alpha 0
        print("note: the SAEs were trained post hoc, watching only; here they are spliced in (alpha 1)", file=sys.stderr)
        for sae in model.saes().values():
            sae.posthoc = True
            sae.alpha.fill_(1.0)
    return model.to(device).eval()
