"""
What features do, in numbers: what training notes of them, and how a text is read for them.

Shapes, here and in the viewer's other files: B windows, T tokens of a window, N tokens, F features,
K active a token, S SAEs (in the timeline snapshots), C n_embd, V vocabulary, P pairs of a feature
and a token type, or places where a feature fires.
"""
import codecs
import json
import math
import os
import re
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy

from data.dataset import decode_encoding, named_encoding, token_bytes
from model import GPT, load_checkpoint, load_model

VERSION = 8   # of index.npz and timeline.npz: another one is made again
SETTLED = 0.7 # cosine of its token counts to the last ones from which on a feature is settled

# ------------------------------------------- codes, and statistics of features over a set of tokens

def codes(model, batches):
    """batches of x (B, T) -> arrays: tokens (N,); the features active on each (S, N, K), F where a
    slot is not active; their activations (S, N, K); FVU (S,)."""
    tokens, features, values, fvu = [], [], [], []
    for x in batches:
        out = see(model, x)
        F = out.fired.shape[-1]
        active = torch.where(out.values != 0, out.indices, F)                # (S, B, T, K)
        tokens.append(x.flatten().cpu().numpy())
        features.append(active.flatten(1, 2).cpu().numpy().astype(np.uint16 if F < 2**16 else int))
        values.append(out.values.float().flatten(1, 2).cpu().numpy())
        fvu.append(out.fvu.float().cpu().numpy())
    return (np.concatenate(tokens), np.concatenate(features, axis=1),
            np.concatenate(values, axis=1), np.mean(fvu, axis=0))

def dense(values, indices, n_features):
    """values, indices (..., K) -> the code (..., F). A slot of value 0 may name any feature."""
    z = torch.zeros(*values.shape[:-1], n_features, device=values.device)
    return z.scatter_add(-1, indices, values.float())

def token_pairs(features, tokens, n_features, vocab_size):
    """features (N, K), n_features where a slot is not active, on tokens (N,) -> f, token, times
    (P,): on which token types each feature is active, and how often; f and token rising."""
    keys = features.astype(np.int64) * vocab_size + tokens[:, None]
    keys, times = np.unique(keys[features < n_features], return_counts=True)
    return keys // vocab_size, keys % vocab_size, times

def token_statistics(pairs, n_features):
    """
    Of token_pairs a dict of
      count (F,)                    on how many of the tokens each feature is active
      entropy (F,)                  Shannon's, in bits, of the types of these tokens. Low: a
                                    detector of one word; nan: dead
      top_tokens, top_counts (F, 8) the most frequent of these types; -1: none
    """
    f, token, times = pairs
    count = np.bincount(f, times, n_features)
    p = times / count[f]
    entropy = np.bincount(f, p * np.log2(1 / p), n_features)
    order = np.lexsort((-times, f))                          # by feature, then by falling count
    place = np.arange(len(f)) - np.searchsorted(f, f)        # of a pair within its feature
    first, place = order[place < 8], place[place < 8]
    top_tokens = np.full((n_features, 8), -1, np.int32)
    top_counts = np.zeros_like(top_tokens)
    top_tokens[f[first], place] = token[first]
    top_counts[f[first], place] = times[first]
    return dict(count=count.astype(np.int32), top_tokens=top_tokens, top_counts=top_counts,
                entropy=np.where(count > 0, entropy, np.nan).astype(np.float32))

# ------------------------------------------- snapshots of training, and the timeline read from them

def snapshot(model, batches):
    """{name: array}: what each feature of a GPT does on batches, which yields tokens x (B, T)."""
    tokens, features, values, _ = codes(model, batches)
    F, V = model.config.n_features, model.config.vocab_size
    arrays = dict(probed=tokens.size, layers=list(model.saes()))
    for s, layer in enumerate(model.saes()):
        found = token_statistics(token_pairs(features[s], tokens, F, V), F)
        total = np.bincount(features[s].reshape(-1), values[s].reshape(-1), F + 1)[:F]
        found['mean'] = (total / np.maximum(found['count'], 1)).astype(np.float32)
        found['W_dec'] = model.writes(layer).detach().half().cpu().numpy()
        arrays |= {f'L{layer}.{name}': x for name, x in found.items()}
    return arrays

def say(note):
    print(note, file=sys.stderr, flush=True)

def tracked(items, description):
    """rich's progress bar, where somebody watches."""
    return track(items, description, console=Console(stderr=True), transient=True,
                 disable=not sys.stderr.isatty())

def write_whole(path, write):
    """A file that write(file) fills, whole or not at all. Raises OSError."""
    temporary = Path(f'{path}.{os.getpid()}.tmp')            # others may write the same file now
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, 'wb') as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def save_npz(path, arrays):
    """{name: array} as an .npz, not compressed: that takes 30 times as long, for a sixth less.
    Raises OSError."""
    write_whole(path, lambda file: np.savez(file, **arrays))

def keep(path, arrays):
    """save_npz of a cache: where it cannot be written, that is said."""
    try:
        save_npz(path, arrays)
    except OSError as e:
        say(f"note: {path} cannot be written ({e.strerror}): it will have to be made again")

def load_npz(path):
    """An .npz as {name: array}; {} if it is missing, torn or damaged."""
    try:
        with np.load(path) as z:
            return {name: z[name] for name in z.files}
    except Exception: # damage shows up as almost any: zip, zlib, header, end of file
        return {}

def of_layer(arrays, layer):
    """{'L6.count': ..., ...} -> {'count': ...}"""
    start = f'L{layer}.'
    return {name.removeprefix(start): x for name, x in arrays.items() if name.startswith(start)}

def open_timeline(out_dir):
    """{block: its SAE in all snapshots}, kept in timeline.npz: layer, steps, tokens (S,), probed,
    what a snapshot holds of it, e.g. count (S, F), and two cosines (S, F) to the last snapshot:
    cos, of what a feature writes, and same, of the counts of the tokens on which it fires. {}
    without snapshots. Raises ValueError for one that cannot be read."""
    files = sorted(Path(out_dir).glob('features/[0-9]*.npz'))
    if not files:
        return {}
    path = Path(out_dir) / 'timeline.npz'
    key = json.dumps([VERSION, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)])
    arrays = load_npz(path)
    if str(arrays.get('key')) != key:
        last = load_npz(files[-1])
        snapshots = [read_snapshot(file, last)               # the last first: all must be like it
                     for file in tracked(files[::-1], "reading snapshots")]
        arrays = {name: np.stack([s[name] for s in snapshots[::-1]]) for name in snapshots[0]}
        keep(path, arrays | dict(key=key))
    return {layer: SimpleNamespace(layer=layer, steps=arrays['step'], tokens=arrays['tokens'],
                                   probed=int(arrays['probed'][0]), **of_layer(arrays, layer))
            for layer in arrays['layers'][0].tolist()}

def read_snapshot(file, last):
    """The arrays of a snapshot; in place of W_dec, which fills GBs, the two cosines to the last."""
    arrays = load_npz(file)
    shapes = [{name: x.shape for name, x in some.items()} for some in (arrays, last)]
    if 'layers' not in arrays or shapes[0] != shapes[1]:
        raise ValueError(f"{file} is no readable snapshot of this run: remove it")
    for layer in last['layers'].tolist():
        now, end = of_layer(arrays, layer), of_layer(last, layer)
        alike = now['top_tokens'][:, :, None] == end['top_tokens'][:, None, :]  # (F, 8, 8)
        a, b = now['top_counts'].astype(float), end['top_counts'].astype(float) # (F, 8)
        arrays[f'L{layer}.same'] = cosine(np.einsum('fij,fi,fj->f', alike, a, b), a, b)
        a, b = arrays.pop(f'L{layer}.W_dec').astype(np.float32), end['W_dec'].astype(np.float32)
        arrays[f'L{layer}.cos'] = cosine((a * b).sum(1), a, b)
    return arrays

def cosine(dot, a, b):
    """Of the rows of a and b (F, n), whose products are dot (F,)."""
    return dot / np.maximum(1e-12, np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))

def settled_at(timeline):
    """(F,) the snapshot from which on a feature fires on about its last tokens; S if it is silent
    in the last one, or fired on others just before it."""
    same = timeline.same >= SETTLED                                          # (S, F)
    since = np.logical_and.accumulate(same[::-1])[::-1]                      # from here to the end
    never = ~since[:-1].any(0) # to itself the last one's cosine is 1, which says nothing
    return np.where(never, len(since), since.argmax(0))

def feature_timeline(timeline, f):
    """A feature at each snapshot: curves, {label: numbers}, and the tokens on which it fires."""
    entropy = np.nan_to_num(timeline.entropy[:, f])                          # 0 where it is silent
    curves = {'density': (timeline.count[:, f] / timeline.probed).tolist(),
              'token entropy, bits': entropy.tolist(),
              'direction, cosine to the end': timeline.cos[:, f].tolist(),
              'fires on, cosine to the end': timeline.same[:, f].tolist()}
    tokens = [row[row >= 0].tolist() for row in timeline.top_tokens[:, f, :4]]
    return dict(steps=timeline.steps.tolist(), settled=int(settled_at(timeline)[f]), curves=curves,
                tokens=tokens)

def timeline_curves(timeline):
    """{label: numbers} of an SAE's features at each snapshot."""
    live, settled = timeline.count > 0, settled_at(timeline)                 # (S, F), (F,)
    return {'live, % of the features': 100 * live.mean(1),
            'settled features': [(settled <= i).sum() for i in range(len(live))],
            'token entropy, median bits': [np.median(bits[on]) if on.any() else 0
                                           for bits, on in zip(timeline.entropy, live)]}

# ------------------------------ evaluation: the loss, and what the model loses without its features

@torch.no_grad()
def evaluate(model, batches, autocast, all_reduce=lambda t: t):
    """
    The eval record of log.jsonl: loss in nats; of each SAE layer L0, FVU, the share of its features
    that is live, and the share of all firing that the busiest 1 % of them do; then the loss with
    the SAEs' outputs zeroed, and with each replaced by its mean.

    model: a GPT; batches: a function that yields this rank's (x, y); all_reduce: sums a tensor over
    ranks, in place.
    """
    saes, F, device = model.saes(), model.config.n_features, device_of(model)

    def val_pass():
        """Means: loss; FVU (S,); share of tokens on which a feature fires, and code (S, F)."""
        sizes = (3,), (len(saes),), (len(saes), F), (len(saes), F)
        sums, fvu, fired, code = (torch.zeros(size, device=device) for size in sizes)
        for x, y in batches():
            with autocast:
                _, loss, out = model(x.to(device), y.to(device))
            sums += torch.stack((loss, torch.ones_like(loss), loss.new_tensor(x.numel())))
            if saes:
                fvu += out.fvu
                fired += out.fired
                code.scatter_add_(1, out.indices.flatten(1), out.values.flatten(1))
        for t in (sums, fvu, fired, code):
            all_reduce(t)
        loss, n, tokens = sums.tolist()
        return loss / n, fvu / n, fired / tokens, code / tokens

    loss, fvu, density, code = val_pass()
    record = dict(val_loss=loss)
    if not saes:
        return record
    for sae in saes.values():
        sae.gate.zero_()
    record['val_loss_zeroed'] = val_pass()[0]
    for sae, mean in zip(saes.values(), code):
        sae.fill.copy_(sae.decode(mean))
    record['val_loss_mean'] = val_pass()[0]
    for sae in saes.values():
        sae.gate.fill_(1.0)
        sae.fill.zero_()
    l0 = density.sum(1)
    busiest = density.topk(math.ceil(F / 100)).values.sum(1) / l0.clamp_min(1e-12)
    columns = dict(l0=l0, fvu=fvu, live=(density > 0).float().mean(1), busiest=busiest)
    record['sae'] = {layer: {name: column[s].item() for name, column in columns.items()}
                     for s, layer in enumerate(saes)}
    return record

# --------------------------------------------------- a run, and the one way in which a text is read

class Run(NamedTuple):
    """A run of train.py, opened."""
    out_dir: str
    checkpoint: dict
    model: GPT
    dataset: str      # whose val is scanned
    meta: dict        # of its training data: eot, vocab_size, ...
    tokenizer: object # a tiktoken Encoding
    names: list       # (V,) bytes: what each token stands for

def open_run(out_dir, dataset='', device='auto', for_features=True):
    """The Run in out_dir, with the tokenizer that its checkpoint carries. dataset '' is that of
    training. Raises ValueError, one sentence; also for a dense model, if it is for_features."""
    checkpoint = load_checkpoint(out_dir)
    model = load_model(checkpoint, device)
    if for_features and not model.saes():
        raise ValueError(f"the model in {out_dir} is dense: it has no SAE, and no features to look "
                         "at or to steer; train one with --sae_layers")
    kept = checkpoint.get('tokenizer')
    if kept is None:
        raise ValueError(f"the checkpoint in {out_dir} is of an older version: train again")
    meta, text = kept['meta'], kept['json']
    tokenizer = decode_encoding(text) if text else named_encoding(meta['tokenizer'])
    return Run(out_dir, checkpoint, model, dataset or checkpoint['dataset'], meta, tokenizer,
               token_bytes(tokenizer, model.config.vocab_size))

def parse_feature(text, layers, n_features, layer=-1):
    """'L6.F2386' -> (6, 2386); '2386' is of `layer`, of the first where that is -1. Raises
    ValueError, one sentence."""
    match = re.fullmatch(r'(?:L?([0-9]{1,9})\.)?F?([0-9]{1,9})', text.strip(), re.I)
    first, last = min(layers), n_features - 1
    if match:
        layer, f = int(match[1] or (first if layer == -1 else layer)), int(match[2])
    if not match or layer not in layers or f > last:
        raise ValueError(f"{text!r} names no feature: write L{first}.F{last}, say; features are 0 "
                         f"to {last}, SAEs in block {', '.join(map(str, layers))}")
    return layer, f

def read_file(key, path):
    """The text of the file that --key=path names. Raises ValueError, one sentence."""
    try:
        return Path(path).read_text('utf-8-sig')             # sig: Windows' mark of UTF-8
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, 'strerror', None) or "it is not UTF-8 text"
        raise ValueError(f"{key}={path!r} cannot be read: {why}") from None

def prompt_text(options):
    """What --prompt or --prompt_file gives, '' for neither. Raises ValueError, one sentence."""
    if options.prompt and options.prompt_file:
        raise ValueError("prompt and prompt_file are both given: choose one")
    file = options.prompt_file
    return read_file('prompt_file', file) if file else options.prompt

def encode(run, text):
    """A text as token ids. Like every document of the data it begins with one end-of-text; the word
    <|endoftext|> is that token in a text, too. Without such a token '' is a line break."""
    ids = run.tokenizer.encode(text, allowed_special='all')
    eot = run.meta['eot']
    if eot is None:
        return ids or run.tokenizer.encode("\n")
    return ids if ids[:1] == [eot] else [eot, *ids]

def device_of(model):
    return model.transformer.wte.weight.device

def autocast(model):
    """bf16 on a GPU, as in training."""
    return torch.autocast('cuda', torch.bfloat16, enabled=device_of(model).type == 'cuda')

@torch.no_grad()
def see(model, idx, upto=None):
    """The SAEOut of the first `upto` blocks, all if None, on idx (B, T), without the logits."""
    with autocast(model):
        return model.blocks(idx.to(device_of(model)), upto)[1]

@torch.no_grad()
def read(model, tokens):
    """One pass over a text of n ids -> losses (n-1,) in nats, that of token j at j-1; values and
    indices (S, n, K) of its features. A text beyond block_size is read in windows that overlap by
    half, so that no token is read with less than half a window."""
    idx, T = torch.tensor([tokens], device=device_of(model)), model.config.block_size
    losses, values, indices, done = [], [], [], 0
    while done < len(tokens):
        start = max(0, done - T // 2)
        new = slice(done - start, None)                     # what no earlier window held
        with autocast(model):
            logits, _, out = model(idx[:, start:start + T])
        targets = idx[0, done + 1:start + T + 1]
        logits = logits[0, new][:len(targets)].float()      # the last token has no target
        losses.append(cross_entropy(logits, targets, reduction='none'))
        values.append(out.values[:, 0, new].float())
        indices.append(out.indices[:, 0, new])
        done = start + T
    return torch.cat(losses).cpu(), torch.cat(values, 1).cpu(), torch.cat(indices, 1).cpu()

def strongest(values, indices, n):
    """The n strongest features of one token as [(f, activation)]; values, indices (K,)."""
    pairs = [(f, a) for f, a in zip(indices.tolist(), values.tolist()) if a]
    return sorted(pairs, key=lambda pair: -pair[1])[:n]

# -------------------------------------------------------- tokens as text that is safe on any screen

SIGNS = {chr(i): chr(0x2400 + i) for i in range(32)}
SIGNS |= {'\n': '⏎', '\t': '⇥', '\x7f': '␡'}
SIGNS |= {chr(0xDC00 + i): f'<0x{i:02X}>' for i in range(128, 256)} # as surrogateescape has them

def safe(raw, keep=''):
    """Bytes as text that leaves any screen whole, but for characters to keep. Control bytes become
    symbols, bytes that are no UTF-8 <0xE2>, invisible and direction-changing characters <U+200B>;
    a lone accent gets a circle to sit on."""
    out = ''
    for char in raw.decode('utf-8', 'surrogateescape'):
        kind = unicodedata.category(char)
        if (kind[0] == 'C' or kind in ('Zl', 'Zp')) and char not in keep:
            char = SIGNS.get(char, f'<U+{ord(char):04X}>')
        elif kind[0] == 'M' and not out:
            char = '◌' + char
        out += char
    return out

def caption(raw):
    """A token in a list: spaces at its ends are seen as dots; 16 characters at most."""
    text = re.sub('^ +| +$', lambda spaces: '·' * len(spaces[0]), safe(raw)) or '(none)'
    return text if len(text) <= 16 else text[:15] + '…'

def pieces(scan, context):
    """(text, activation, is it the peak) of each token; those that share a character are one."""
    out, decoder = [], codecs.getincrementaldecoder('utf-8')('ignore')
    for at, (token, act) in enumerate(zip(context['tokens'], context['acts'])):
        raw, peak = scan.names[token], at == context['peak']
        begun, _ = decoder.getstate()                        # bytes of a character not yet whole
        decoder.decode(raw)
        if begun:
            before, other, was_peak = out.pop()
            raw, act, peak = before + raw, max(other, act), peak or was_peak
        out.append((raw, act, peak))
    return [(safe(raw), act, peak) for raw, act, peak in out]
