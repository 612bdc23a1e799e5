"""
A GPT in the style of nanoGPT's model.py, with the sparse layers of sae.py. Unlike GPT-2 it has
- RoPE instead of learned positions, QK-norm, RMSNorm without parameters, ReLU^2 MLP, no biases
- a token embedding that is normalised, and tied to the output head
- in the blocks of `sae_layers` an SAE layer: what `sae_site` names must pass through K features

Shapes: B batch, T time, C n_embd, H heads, D = C/H, V vocabulary, S SAE layers, F features,
K active.
"""
import math
import os
import sys
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from sae import SAE, SITES, SAEOut, norm

@dataclass
class GPTConfig:
    """What a model is. These are the defaults of train.py too; the files in config/ change them."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 6               # heads of 128 channels: faster than heads of 64
    n_embd: int = 768
    mlp_ratio: int = 4
    dropout: float = 0.0
    sae_layers: tuple = (6,)      # block indices, as in transformer.h[i]; () is the dense GPT
    sae_site: str = 'resid'       # resid, mlp, attn, hidden
    sae_ratio: int = 16           # F = sae_ratio * C (site hidden: mlp_ratio * C)
    sae_k: int = 64               # K, active features a token
    sae_recon: float = 1.0        # weight of the reconstruction loss while alpha is 0
    sae_nudge: float = 0.3        # a step of b_enc where one fires too rarely or too often
    sae_silent_steps: int = 4     # too rarely: not once in so many steps
    sae_cap: float = 0.08         # too often: on a larger share of the tokens; 0 = no such bound

    @property
    def n_features(self):
        return getattr(self, SITES[self.sae_site].ratio) * self.n_embd

    def problems(self):
        """Everything that is wrong with this config, as a list of sentences."""
        found = []
        for field in fields(self):
            value, low = getattr(self, field.name), int(field.type is int) # whole numbers: from 1
            high = 1 if field.name == 'dropout' else math.inf
            if field.type in (int, float) and not low <= value < high:
                found.append(f"{field.name}={value} must be at least {low} and below {high}")
        if self.sae_site not in SITES:
            found.append(f"sae_site={self.sae_site!r} must be one of {', '.join(SITES)}")
        if found: # what follows computes with these
            return found
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            found.append(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even number")
        layers, K, F_ = list(self.sae_layers), self.sae_k, self.n_features
        if len(set(layers) & set(range(self.n_layer))) < len(layers):
            found.append(f"sae_layers={layers} must be different blocks of 0..{self.n_layer - 1}")
        if layers and K > F_:
            found.append(f"sae_k={K} must not exceed the {F_} features of site {self.sae_site}")
        elif layers and 0 < self.sae_cap <= K / F_:
            found.append(f"sae_cap={self.sae_cap} must be 0 (off) or above K/F = {K} / {F_}")
        return found

def rotate(x, cos, sin):
    """RoPE (arXiv 2104.09864): channels (a, b) = (i, i + D/2) of x (B, T, H, D) become
    (a cos + b sin, b cos - a sin). sin brings the signs: + in the first half, - in the second."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2) # (b, a)
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
            if self.layer in cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer] = k, v
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, sparse=None):
        """x (B, T, C) -> (B, T, C). sparse: at site hidden, what is done to the hidden layer."""
        if sparse is None:
            x = kernels.mlp(x, self.c_fc.weight, self.c_proj.weight) # c_proj(relu(c_fc(x))^2)
        else:
            x = self.c_proj(sparse(self.c_fc(x).relu().square()))
        return F.dropout(x, self.dropout, self.training)

class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.sae = SAE(config) if layer in config.sae_layers else None
        self.mlp = MLP(config)

    def forward(self, x, rope, outs, cache=None):
        """x (B, T, C) -> (B, T, C). The block's SAE, if any, appends its SAEOut to outs."""
        hook = None if self.sae is None else self.sae.site.hook

        def sparse(x):
            x, out = self.sae(x)
            outs.append(out)
            return x

        h = self.attn(norm(x), rope, cache)
        x = x + (sparse(h) if hook == 'attn' else h)
        h = self.mlp(norm(x), sparse if hook == 'hidden' else None)
        x = x + (sparse(h) if hook == 'mlp' else h)
        return sparse(x) if hook == 'block' else x

class GPT(nn.Module):

    def __init__(self, config):
        """Raises ValueError listing all problems of the config."""
        super().__init__()
        if config.problems():
            raise ValueError("; ".join(config.problems()))
        self.config = config
        C, D = config.n_embd, config.n_embd // config.n_head
        padded = math.ceil(config.vocab_size / 64) * 64 # matmuls like multiples of 64
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, C), # also the output head (tied); padded logits never count
            h=nn.ModuleList([Block(config, i) for i in range(config.n_layer)])))
        frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)                 # (D/2,)
        angles = torch.arange(config.block_size).view(-1, 1, 1) * frequencies # (T, 1, D/2)
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer('cos', torch.cat((cos, cos), -1), persistent=False) # (T, 1, D)
        self.register_buffer('sin', torch.cat((sin, -sin), -1), persistent=False)
        nn.init.normal_(self.transformer.wte.weight, std=0.02) # as the input it is normalised
        for name, p in self.named_parameters():
            if name.endswith(('c_attn.weight', 'c_fc.weight')):
                nn.init.normal_(p, std=C ** -0.5)
            elif name.endswith('c_proj.weight'):
                nn.init.zeros_(p) # every block starts as the identity

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids, targets (B, T) the next ones -> logits (B, T, V), loss, SAEOut.
        loss is the mean cross-entropy in nats, without the SAEs' own; with targets logits is None,
        without them loss is. SAEOut is stacked along a new first axis, None if dense. cache, {} at
        first, keeps k and v (B, H, T, D) of each block: then one token at a time continues it, and
        logits are the last position's. Raises ValueError for more tokens than block_size."""
        x, out = self.blocks(idx, cache=cache)
        x, wte, V = norm(x), self.transformer.wte.weight, self.config.vocab_size
        if targets is None:
            return F.linear(x, wte)[..., :V], None, out                 # (B, T, V)
        loss = kernels.linear_cross_entropy(x.flatten(0, 1), wte, targets.flatten(), V)
        return None, loss, out

    def blocks(self, idx, upto=None, cache=None):
        """forward up to the stream (B, T, C) after the first `upto` blocks, and their SAEOut."""
        B, T = idx.size()
        pos = cache[0][0].size(2) if cache else 0
        assert pos == 0 or T == 1, "a filled cache takes one token at a time"
        if pos + T > self.config.block_size:
            raise ValueError(f"{pos + T} tokens do not fit block_size={self.config.block_size}")
        x = norm(self.transformer.wte(idx))                         # (B, T, C)
        if torch.is_autocast_enabled(idx.device.type): # a stream in bf16: half the bytes to move
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        x = F.dropout(x, self.config.dropout, self.training)
        rope = self.cos[pos:pos + T], self.sin[pos:pos + T]         # (T, 1, D) each
        outs = []
        for block in self.transformer.h[:upto]:
            x = block(x, rope, outs, cache)
        if cache is not None:
            x = x[:, -1:]
        return x, SAEOut(*map(torch.stack, zip(*outs))) if outs else None

    def saes(self):
        """{block index: its SAE}, in order."""
        return {i: block.sae for i, block in enumerate(self.transformer.h) if block.sae is not None}

    def writes(self, layer):
        """What each feature of the SAE in that block writes, in rows (F, C)."""
        block = self.transformer.h[layer]
        if block.sae.site.own:
            return block.sae.scale * block.sae.W_dec
        return block.mlp.c_proj.weight.T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
        """Yields tokens (B, 1) that continue idx (B, T). temperature 0: the likeliest one; top_k 0:
        of all. A full cache restarts from the last half of the context."""
        size, cache = self.config.block_size, {}
        new = idx[:, -size:]
        for _ in range(max_new_tokens):
            if cache and cache[0][0].size(2) == size:
                cache, new = {}, idx[:, -max(1, size // 2):]
            logits = self(new, cache=cache)[0][:, -1].float()        # (B, V)
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def num_params(self, non_embedding=False):
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wte.weight.numel() if non_embedding else n

    def flops_per_token(self):
        """Forward and backward: 6 a matmul weight, 12 n_layer C T for attention (arXiv 2204.02311,
        appendix B). Of an SAE the encoder's forward alone is dense (2 F C), the rest is 10 K C."""
        c = self.config
        matmul = sum(p.numel() for n, p in self.named_parameters() if '.c_' in n or 'wte' in n)
        own = sum(sae.site.own for sae in self.saes().values())
        sae = own * (2 * c.n_features + 10 * c.sae_k) * c.n_embd
        return 6 * matmul + 12 * c.n_layer * c.n_embd * c.block_size + sae

    def optimizer_groups(self, weight_decay, sae_lr_factor):
        """{optimizer: its parameter groups}, of what is not frozen. The SAE has no decay, which
        would silence rare features: they get few gradients. A group's learning rate is lr_factor
        times the model's; b_enc is no weight but a threshold, as large as activations."""
        def group(endings, lr_factor, decay=0.0):
            params = [p for name, p in self.named_parameters()
                      if p.requires_grad and name.endswith(endings)]
            return [dict(params=params, lr_factor=lr_factor, weight_decay=decay)] if params else []

        matrices = 'c_attn.weight', 'c_fc.weight', 'c_proj.weight'
        groups = dict(matrices=group(matrices, 1.0, weight_decay),
                      embedding=group('wte.weight', 1.0, weight_decay),
                      sae=group(('W_enc', 'W_dec', 'b_dec'), sae_lr_factor)
                      + group('b_enc', 50 * sae_lr_factor))
        return {name: found for name, found in groups.items() if found}

# -------------------------------------------------------------------------------------- checkpoints

CHECKPOINTS = ('ckpt.pt', 'ckpt.tmp', 'ckpt_prev.pt') # the newest whole one is the first of these

def save_checkpoint(out_dir, checkpoint):
    """Whole or not at all: at every moment one of the three files is whole. Raises OSError."""
    path, tmp, prev = (Path(out_dir, name) for name in CHECKPOINTS)
    try:
        with open(tmp, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e: # on a full disk torch raises RuntimeError: unexpected pos
        tmp.unlink(missing_ok=True)
        raise OSError(f"no checkpoint could be saved in {out_dir}, is the disk full? "
                      f"({str(e).splitlines()[0]})") from None
    try:
        if path.exists():
            os.replace(path, prev)
    except OSError as e: # no reason to end a run
        print(f"warning: {prev} could not be replaced ({e}): it is older than it should be")
    os.replace(tmp, path)

def load_checkpoint(out_dir):
    """The newest whole checkpoint in out_dir, a dict on the CPU. Raises ValueError for none."""
    problems = []
    for name in CHECKPOINTS:
        path = Path(out_dir, name)
        try:
            with zipfile.ZipFile(path) as z:
                if z.testzip(): # every record's CRC: torch.load alone misses a flipped bit
                    raise ValueError("a record is damaged")
            checkpoint = torch.load(path, map_location='cpu', weights_only=True) # runs no code
            if not {'model', 'model_args', 'step'} <= set(checkpoint):
                raise ValueError("another program's file")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except Exception as e: # damage shows up as almost any: unpickling, zip, end of file
            reason = (str(e).splitlines() or [''])[0][:80]
            problems.append(f"{path} cannot be read ({type(e).__name__}: {reason})")
        else:
            if problems:
                print(f"warning: {problems[0]}: using {path} instead", file=sys.stderr)
            return checkpoint
    raise ValueError(f"no checkpoint in {out_dir}: {problems[0]}. Train, or give another --out_dir")

def load_model(checkpoint, device='cpu'):
    """The GPT of a checkpoint, in eval mode. Raises ValueError for one of another version."""
    try:
        model = GPT(GPTConfig(**checkpoint['model_args']))
        model.load_state_dict(checkpoint['model'])
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[-1].strip()
        raise ValueError(f"the checkpoint does not fit this version of model.py ({reason}): use "
                         "the version that wrote it, or train again") from None
    if checkpoint.get('config', {}).get('sae_posthoc'): # maybe saved with alpha 0
        print("note: the SAEs were trained post hoc; here they are spliced in", file=sys.stderr)
        for sae in model.saes().values():
            sae.posthoc = True
            sae.alpha.fill_(1.0)
    return model.to(resolve_device(device)).eval()

def resolve_device(device, local_rank=0):
    """'auto' as what there is, 'cuda' as this rank's own GPU. Raises ValueError, if unusable."""
    if device == 'auto':
        device = 'mps' if torch.backends.mps.is_available() else 'cpu'
        device = 'cuda' if torch.cuda.is_available() else device
    name = f'cuda:{local_rank}' if device == 'cuda' else device
    try:
        torch.ones((), device=name).item()
    except (RuntimeError, AssertionError): # AssertionError: a build without CUDA
        raise ValueError(f"device={device!r} is not usable here: expected auto, cpu, cuda or mps")
    return name
