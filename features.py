"""
What features do, in numbers. Nothing here prints; inspect_features.py, sample.py and train.py do.

  statistics   of features over a set of tokens
  snapshot     what training keeps of them at each eval, and the timeline read from that
  run          an opened checkpoint, and the one way in which a text is read
  scan         one pass over val; its index in out_dir answers all questions about features
  numbers      of one feature; of a regular expression

Where a `track` is asked for: rich.progress.track, or what stands for it.
Shapes: B windows, T tokens of a window, N scanned tokens, F features, K active a token, S SAEs (in
the scan) or snapshots (in the timeline), V vocabulary, P places where a feature fires.
"""
import contextlib
import json
import math
import os
import re
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize

from data.dataset import eval_batches, load_dataset, load_meta, load_tokenizer, token_bytes
from model import GPT, load_checkpoint, load_model

VERSION = 2                 # of index.npz and timeline.npz: another one is made again
TOP, RANDOM, SIDE = 16, 8, 16 # contexts kept of a feature; tokens on either side of a peak
BINS, INTERVALS = 32, 8     # of its activations, from 0 to a power of two
SETTLED = 0.7               # cosine of its token counts to the last ones: it is settled

# --------------------------------------------------------------------------------------------------
# codes, and statistics of features over a set of tokens

def codes(model, batches):
    """
    Over batches, which yields x (B, T) -> arrays: tokens (N,); the features active on each
    (S, N, K), F where a slot is not active; their activations (S, N, K); FVU (S,).
    """
    tokens, features, values, fvu = [], [], [], []
    for x in batches:
        _, out = forward(model, x)
        F = out.fired.shape[-1]
        active = torch.where(out.values != 0, out.indices, F)                # (S, B, T, K)
        tokens.append(x.flatten().cpu().numpy())
        features.append(active.flatten(1, 2).cpu().numpy().astype(np.uint16 if F < 2**16 else int))
        values.append(out.values.float().flatten(1, 2).cpu().numpy())
        fvu.append(out.fvu.float().cpu().numpy())
    return (np.concatenate(tokens), np.concatenate(features, axis=1),
            np.concatenate(values, axis=1), np.mean(fvu, axis=0))

def token_statistics(features, tokens, n_features, vocab_size):
    """
    features (N, K), n_features where a slot is not active, on tokens (N,) -> a dict of
      count (F,)        on how many of the tokens each feature is active
      entropy (F,)      token entropy in bits: Shannon entropy of the distribution of token types
                        over these. Low: a detector of one word; high: an abstract feature; nan: dead
      top_tokens (F, 8), top_counts (F, 8)    the most frequent types, -1 where there are fewer
    """
    keys = features.astype(np.int64) * vocab_size + tokens[:, None]
    keys, counts = np.unique(keys[features < n_features], return_counts=True) # (P,), (P,)
    f, token = keys // vocab_size, keys % vocab_size
    count = np.bincount(f, counts, n_features)
    p = counts / count[f]
    entropy = np.bincount(f, p * np.log2(1 / p), n_features)
    order = np.lexsort((-counts, f))                         # by feature, then by falling count
    place = np.arange(len(f)) - np.searchsorted(f, f)        # of a pair within its feature
    first, place = order[place < 8], place[place < 8]
    top = np.full((n_features, 8), -1, np.int32)
    top_counts = np.zeros_like(top)
    top[f[first], place], top_counts[f[first], place] = token[first], counts[first]
    return dict(count=count.astype(np.int32), top_tokens=top, top_counts=top_counts,
                entropy=np.where(count > 0, entropy, np.nan).astype(np.float32))

# --------------------------------------------------------------------------------------------------
# snapshots of training, and the timeline read from them

def snapshot(model, batches):
    """{name: array}: what each feature of a GPT does on batches, which yields tokens x (B, T)."""
    tokens, features, values, _ = codes(model, batches)
    F, V = model.config.n_features, model.config.vocab_size
    arrays = dict(probed=tokens.size, layers=list(model.saes()))
    for s, layer in enumerate(model.saes()):
        found = token_statistics(features[s], tokens, F, V)
        total = np.bincount(features[s].reshape(-1), values[s].reshape(-1), F + 1)[:F]
        found['mean'] = (total / np.maximum(found['count'], 1)).astype(np.float32)
        if model.config.sae_site != 'stream':
            found['W_dec'] = model.writes(layer).detach().half().cpu().numpy()
        arrays |= {f'L{layer}.{name}': x for name, x in found.items()}
    return arrays

def save_npz(path, arrays, save=np.savez_compressed):
    """Writes {name: array} whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f'{path}.tmp', 'wb') as f:
        save(f, **arrays)
    os.replace(f'{path}.tmp', path)

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

def open_timeline(out_dir, track):
    """
    {block: its SAE in all snapshots}, whose attributes are layer, steps (S,), tokens (S,), probed,
    what a snapshot holds of it, e.g. count (S, F), and two cosines (S, F) to the last snapshot:
    cos, of what a feature writes, and same, of the counts of the tokens on which it fires. Kept in
    timeline.npz. {} where there is no snapshot. Raises ValueError for one that cannot be read.
    """
    files = sorted(Path(out_dir).glob('features/[0-9]*.npz'))
    if not files:
        return {}
    path = Path(out_dir) / 'timeline.npz'
    key = json.dumps([VERSION, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)])
    arrays = load_npz(path)
    if str(arrays.get('key')) != key:
        last = load_npz(files[-1])
        snapshots = [read_snapshot(file, last)               # the last first: all must be like it
                     for file in track(files[::-1], "reading snapshots")]
        arrays = {name: np.stack([s[name] for s in snapshots[::-1]]) for name in snapshots[0]}
        save_npz(path, arrays | dict(key=key))
    return {layer: SimpleNamespace(layer=layer, steps=arrays['step'], tokens=arrays['tokens'],
                                   probed=int(arrays['probed'][0]), **of_layer(arrays, layer))
            for layer in arrays['layers'][0].tolist()}

def read_snapshot(file, last):
    """The arrays of a snapshot; in place of W_dec, which fills GBs, the two cosines to the last."""
    arrays = load_npz(file)
    shapes = {name: x.shape for name, x in arrays.items()}
    try:
        if not arrays or shapes != {name: x.shape for name, x in last.items()}:
            raise ValueError
        for layer in last['layers'].tolist():
            now, end = of_layer(arrays, layer), of_layer(last, layer)
            both = now['top_tokens'][:, :, None] == end['top_tokens'][:, None, :]   # (F, 8, 8)
            a, b = now['top_counts'].astype(float), end['top_counts'].astype(float) # (F, 8)
            dot = np.einsum('fij,fi,fj->f', both, a, b)
            arrays[f'L{layer}.same'] = cosine(dot, a, b)
            arrays[f'L{layer}.cos'] = np.ones(len(a))
            if arrays.pop(f'L{layer}.W_dec', None) is not None:              # site stream has none
                a, b = now['W_dec'].astype(np.float32), end['W_dec'].astype(np.float32) # (F, C)
                arrays[f'L{layer}.cos'] = cosine((a * b).sum(1), a, b)
    except (TypeError, LookupError, ValueError):
        raise ValueError(f"{file} is no readable snapshot of this run: remove it") from None
    return arrays

def cosine(dot, a, b):
    """Of the rows of a and b (F, n), whose products are dot (F,)."""
    return dot / np.maximum(1e-12, np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))

def settled_at(timeline):
    """
    (F,) the snapshot from which on a feature fires on about its last tokens; S if it is silent in
    the last one, or fired on others just before it.
    """
    same = timeline.same >= SETTLED                                          # (S, F)
    since = np.logical_and.accumulate(same[::-1])[::-1]                      # from here to the end
    never = ~since[:-1].any(0) # to itself the last one's cosine is 1, which says nothing
    return np.where(never, len(since), since.argmax(0))

def feature_timeline(timeline, f):
    """Density, entropy, cosines to the end and tokens of one feature at each snapshot."""
    entropy = timeline.entropy[:, f].tolist()
    tokens = timeline.top_tokens[:, f, :4].tolist()
    return dict(steps=timeline.steps.tolist(), settled=int(settled_at(timeline)[f]),
                density=(timeline.count[:, f] / timeline.probed).tolist(),
                entropy=[None if math.isnan(bits) else bits for bits in entropy],
                cos=timeline.cos[:, f].tolist(), same=timeline.same[:, f].tolist(),
                tokens=[[token for token in row if token >= 0] for row in tokens])

# --------------------------------------------------------------------------------------------------
# a run, and the one way in which a text is read

class Run(NamedTuple):
    """A run of train.py, opened."""
    out_dir: str
    checkpoint: dict
    model: GPT
    dataset: str      # whose tokenizer this is, and whose val is scanned
    meta: dict        # its meta.json
    tokenizer: object # a tiktoken Encoding
    names: list       # (V,) bytes: what each token stands for

def open_run(out_dir, dataset='', device='auto', for_features=True):
    """
    The Run in out_dir. dataset '' is that of training. Raises ValueError, one sentence; also for a
    dense model, if it is for_features.
    """
    checkpoint = load_checkpoint(out_dir)
    if device == 'auto':
        device = 'mps' if torch.backends.mps.is_available() else 'cpu'
        device = 'cuda' if torch.cuda.is_available() else device
    model = load_model(checkpoint, device)
    if for_features and not model.saes():
        raise ValueError(f"the model in {out_dir} is dense: it has no SAE, and no features to look "
                         "at or to steer; train one with --sae_layers")
    dataset = dataset or checkpoint['dataset']
    folder, meta, _ = load_meta(dataset)
    V = model.config.vocab_size
    if meta['vocab_size'] != V:
        raise ValueError(f"{folder} has {meta['vocab_size']} token types, the model in {out_dir} "
                         f"{V}: give the --dataset of its training")
    tokenizer = load_tokenizer(folder, meta)
    return Run(out_dir, checkpoint, model, dataset, meta, tokenizer, token_bytes(tokenizer, V))

def parse_feature(text, layers, n_features, layer=-1):
    """
    'L6.F2386' -> (6, 2386); '2386' is of `layer`, and of the first where that is -1. Raises
    ValueError, one sentence.
    """
    match = re.fullmatch(r'(?:L?([0-9]{1,9})\.)?F?([0-9]{1,9})', text.strip(), re.I)
    if not match:
        raise ValueError(f"{text!r} names no feature: write L6.F2386, or 2386 with --layer=6")
    layer, f = int(match[1] or (min(layers) if layer == -1 else layer)), int(match[2])
    if layer not in layers:
        blocks = ', '.join(map(str, layers))
        raise ValueError(f"{text}: block {layer} has no SAE; block {blocks} has one")
    if f >= n_features:
        raise ValueError(f"{text} is out of range: block {layer} has features 0 to "
                         f"{n_features - 1}")
    return layer, f

def read_file(key, path):
    """The text of the file that --key=path names. Raises ValueError, one sentence."""
    try:
        return Path(path).read_text('utf-8')
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, 'strerror', None) or "it is not UTF-8 text"
        raise ValueError(f"{key}={path!r} cannot be read: {why}") from None

def prompt_text(prompt, prompt_file):
    """What --prompt or --prompt_file gives, '' for neither. Raises ValueError, one sentence."""
    if prompt and prompt_file:
        raise ValueError("prompt and prompt_file are both given: choose one")
    if not prompt_file:
        return prompt
    text = read_file('prompt_file', prompt_file)
    if not text:
        raise ValueError(f"prompt_file={prompt_file!r} is empty: write a prompt into it")
    return text

def encode(run, text):
    """
    A text as token ids. Like every document of the data it begins with one end-of-text; the word
    <|endoftext|> is that token in a text, too. Without such a token '' is a line break.
    """
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
def forward(model, idx):
    """idx (B, T) -> logits (B, T, V), SAEOut."""
    with autocast(model):
        logits, _, out = model(idx.to(device_of(model)))
    return logits, out

def read(model, tokens):
    """
    One pass over a text of n ids -> losses (n-1,) in nats, that of token j at j-1; values and
    indices (S, n, K) of its features, None if the model is dense. A text beyond block_size is read
    in windows that overlap by half, so that no token is read with less than half a window.
    """
    idx, T = torch.tensor([tokens]), model.config.block_size
    losses, values, indices, done = [], [], [], 0
    while done < len(tokens):
        start = max(0, done - T // 2)
        new = slice(done - start, None)                     # what no earlier window held
        logits, out = forward(model, idx[:, start:start + T])
        targets = idx[0, done + 1:start + T + 1]
        logits = logits[0, new][:len(targets)].float().cpu() # the last token has no target
        losses.append(cross_entropy(logits, targets, reduction='none'))
        if out is not None:
            values.append(out.values[:, 0, new].float().cpu())
            indices.append(out.indices[:, 0, new].cpu())
        done = start + T
    if not values:
        return torch.cat(losses), None, None
    return torch.cat(losses), torch.cat(values, dim=1), torch.cat(indices, dim=1)

def strongest(values, indices, n):
    """The n strongest features of one token as [(f, activation)]; values, indices (K,)."""
    pairs = [(f, a) for f, a in zip(indices.tolist(), values.tolist()) if a]
    return sorted(pairs, key=lambda pair: -abs(pair[1]))[:n]

# --------------------------------------------------------------------------------------------------
# tokens as text that is safe on any screen

SIGNS = {chr(i): chr(0x2400 + i) for i in range(32)}
SIGNS |= {'\n': '⏎', '\t': '⇥', '\x7f': '␡'}

def safe(raw, keep=''):
    """
    Bytes as text that leaves any screen whole, but for characters to keep. Control bytes become
    symbols, bytes that are no UTF-8 <0xE2>, invisible and direction-changing characters <U+200B>;
    a lone accent gets a circle to sit on.
    """
    out = ''
    for char in raw.decode('utf-8', 'surrogateescape'):
        code, kind = ord(char), unicodedata.category(char)
        if char in keep:
            out += char
        elif char in SIGNS:
            out += SIGNS[char]
        elif 0xDC80 <= code <= 0xDCFF:
            out += f'<0x{code - 0xDC00:02X}>'
        elif kind[0] == 'C' or kind in ('Zl', 'Zp'):
            out += f'<U+{code:04X}>'
        elif kind[0] == 'M' and not out:
            out += '◌' + char
        else:
            out += char
    return out

def caption(raw):
    """A token in a list: spaces at its ends are seen as dots; 16 characters at most."""
    text = re.sub('^ +| +$', lambda spaces: '·' * len(spaces[0]), safe(raw)) or '(none)'
    return text if len(text) <= 16 else text[:15] + '…'

# bytes that end within a character of UTF-8: its first byte, with fewer after it than belong to it
UNFINISHED = re.compile(rb'([\xc2-\xf4]|[\xe0-\xf4][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2})\Z')

def pieces(scan, context):
    """(text, activation, is it the peak) of each token; those that share a character are one."""
    out = []
    for at, (token, act) in enumerate(zip(context['tokens'], context['acts'])):
        raw, peak = scan.names[token], at == context['peak']
        if out and UNFINISHED.search(out[-1][0]):
            before, other, was_peak = out.pop()
            raw, act, peak = before + raw, max(other, act, key=abs), peak or was_peak
        out.append((raw, act, peak))
    return [(safe(raw), act, peak) for raw, act, peak in out]

# --------------------------------------------------------------------------------------------------
# the scan: one pass of the model over val, and the index that it leaves in out_dir

def scan_val(run, wanted, key, track):
    """
    Reads about `wanted` tokens of val, in windows of block_size, and writes out_dir/index.npz:
      tokens    (N,)         those
      features  (S, N, K)    the features active on each; F where a slot is not active
      values    (S, N, K)    their activations
      the statistics of each SAE (S, F, ...), and meta as JSON, with key, the checkpoint
    """
    model, config, saes = run.model, run.model.config, run.model.saes()
    device, T, V, F = device_of(model), config.block_size, config.vocab_size, config.n_features
    site = next(iter(saes.values())).site
    B = max(1, min((32_768 if device.type == 'cuda' else 4096) // T, wanted // T))
    batches = [x for x, _ in eval_batches(load_dataset(run.dataset).val, T, B, wanted)]
    tokens, features, values, fvu = codes(model, track(batches, "scanning"))
    wte = model.transformer.wte.weight[:V].detach().float()                  # (V, C)
    found = []
    for s, layer in enumerate(saes):
        writes = model.writes(layer).detach().float()                        # (F, C)
        found.append(scan_statistics(values[s], features[s], tokens, writes, wte))
    arrays = {name: np.stack([x[name] for x in found]) for name in found[0]} # (S, F, ...)
    arrays |= dict(tokens=tokens, features=features, values=values, fvu=fvu)
    eot = -1 if run.meta['eot'] is None else run.meta['eot']
    names = [raw.decode('latin-1') for raw in run.names]                     # JSON holds no bytes
    meta = dict(version=VERSION, key=key, step=run.checkpoint['step'], layers=list(saes),
                site=site.name, place=site.place, F=F, K=features.shape[2], T=T, N=len(tokens),
                eot=eot, wanted=wanted, dataset=str(run.dataset), names=names)
    save_npz(Path(run.out_dir) / 'index.npz', arrays | dict(meta=json.dumps(meta)), np.savez)

def scan_statistics(values, features, tokens, writes, wte):
    """
    Of one SAE: values and features (N, K), F where a slot is not active; tokens (N,); writes
    (F, C); wte (V, C). Adds to token_statistics
      order (N * K,)   the slots n * K + k sorted by feature: where each one fires
      max, rank (F,)   the largest activation; the place by entropy, of equals the densest first
      up, down, near   the next tokens that a feature promotes and suppresses, and the features
                       that write most like it, each with its values
    """
    F, V = len(writes), len(wte)
    found = token_statistics(features, tokens, F, V)
    order = np.argsort(features.reshape(-1), kind='stable')
    found['order'] = order.astype(np.uint32)
    found['max'] = np.zeros(F, np.float32)
    np.maximum.at(found['max'], features[features < F], np.abs(values[features < F]))
    by_entropy = np.lexsort((-found['count'], found['entropy']))             # nan comes last
    found['rank'] = np.where(found['count'] > 0, by_entropy.argsort() + 1, 0)
    unit = normalize(writes, dim=-1)
    parts = dict(up=[], down=[], near=[])
    for rows in torch.arange(F, device=writes.device).split(1024):
        logits = writes[rows] @ wte.T                                        # (rows, V)
        cosine = unit[rows] @ unit.T                                         # (rows, F)
        cosine[torch.arange(len(rows)), rows] = -2                           # itself
        parts['up'].append(logits.topk(min(10, V)))
        parts['down'].append(logits.topk(min(10, V), largest=False))
        parts['near'].append(cosine.topk(min(5, F - 1)))
    for name, tops in parts.items():
        found[name] = torch.cat([top.indices for top in tops]).int().cpu().numpy()
        found[f'{name}_value'] = torch.cat([top.values for top in tops]).cpu().numpy()
    return found

def read_index(out_dir):
    """
    {block: the scan of its SAE}, whose attributes are
      layer, and what scan_val calls meta: step, site, F, K, T, N, dataset, names (bytes), ...
      count, entropy, rank, max (F,), fvu, top_tokens, up, up_value, ...: statistics
      tokens (N,), features, values (N, K), order (N * K,): what fires where
      first (F,): where in order a feature begins
    {} where the files are missing, damaged, or of another version.
    """
    arrays = load_npz(Path(out_dir) / 'index.npz')
    meta = json.loads(str(arrays.pop('meta', '{}')))
    if meta.get('version') != VERSION:
        return {}
    meta['names'] = [text.encode('latin-1') for text in meta['names']]
    meta['tokens'] = arrays.pop('tokens')
    index = {}
    for s, layer in enumerate(meta['layers']):
        scan = SimpleNamespace(layer=layer, **meta, **{name: x[s] for name, x in arrays.items()})
        scan.first = np.cumsum(scan.count) - scan.count
        index[layer] = scan
    return index

def open_index(out_dir, dataset, device, scan_tokens, say, track):
    """
    read_index, after a scan where there is none that fits. dataset '' and scan_tokens 0 take what
    the index has. say(sentence) is told what is done. Raises ValueError, one sentence.
    """
    index, key = read_index(out_dir), []
    with contextlib.suppress(OSError, zipfile.BadZipFile):
        with zipfile.ZipFile(Path(out_dir) / 'ckpt.pt') as z:
            key = [item.CRC for item in z.infolist()]        # the content, without reading it
    why = "there is no index of this version that is whole"
    for scan in list(index.values())[:1]:
        why = f"the index is of step {scan.step:,}, {scan.wanted:,} tokens of {scan.dataset}"
        if (key in (scan.key, []) and scan_tokens in (scan.wanted, 0)
                and dataset in (scan.dataset, '')):
            if not key:
                say(f"note: no checkpoint in {out_dir} that can be read; {why}")
            return index
    run = open_run(out_dir, dataset, device)
    say(f"{why}: scanning")
    gpu = device_of(run.model).type == 'cuda'
    scan_val(run, scan_tokens or (1_048_576 if gpu else 131_072), key, track)
    return read_index(out_dir)

# --------------------------------------------------------------------------------------------------
# numbers of the views, from the scan of an SAE

def overview_numbers(scan):
    """The numbers of an SAE's overview."""
    live = scan.count > 0
    density, bits = scan.count[live] / scan.N, scan.entropy[live]
    top = math.ceil(bits.max(initial=1))
    busiest = np.sort(scan.count)[-math.ceil(scan.F / 100):].sum()
    return dict(live=int(live.sum()), dead=int((~live).sum()), fvu=float(scan.fvu),
                l0=float(scan.count.sum() / scan.N), top_entropy=top,
                busiest=float(busiest / max(1, scan.count.sum())),
                entropies=np.histogram(bits, 32, (0, top))[0].tolist(),
                densities=np.histogram(np.log10(density).clip(-6), 32, (-6, 0))[0].tolist())

def fires_on(scan, f):
    """The 8 tokens on which a feature fires most, with their shares of its firings."""
    pairs = zip(scan.top_tokens[f].tolist(), scan.top_counts[f].tolist())
    return [(token, times / int(scan.count[f])) for token, times in pairs if token >= 0]

def firings(scan, f):
    """Where a feature fires: positions (P,), ascending, and activations (P,)."""
    slots = scan.order[scan.first[f]:scan.first[f] + scan.count[f]]
    return slots.astype(np.int64) // scan.K, scan.values.reshape(-1)[slots]

def feature_numbers(scan, f, seed):
    """
    Every number of one feature's view; tokens are ids.
      top, random   contexts by activation, and drawn uniformly; at most one a window, equal texts
                    folded. A peak is never the first or last token of a window nor end-of-text,
                    whose activations are often freakish
      intervals     (low, high, share of the firings, a context or None), eighths of (0, R]
      joint         the features that fire with it: positions with both / with either
    """
    where, acts = firings(scan, f)                                           # (P,), (P,)
    size, count = np.abs(acts), len(where)
    R = 2.0 ** math.frexp(scan.max[f])[1]                    # the power of two above the largest
    bins = np.minimum(BINS * size / R, BINS - 1).astype(int)                 # (P,)
    inner = (where % scan.T > 0) & (where % scan.T < scan.T - 1)
    peaks = np.flatnonzero(inner & (scan.tokens[where] != scan.eot))
    drawn = np.random.default_rng((seed, scan.layer, f)).permutation(peaks)
    strongest_first = peaks[np.argsort(-size[peaks], kind='stable')]
    intervals = []
    for j in reversed(range(INTERVALS)):
        inside = bins * INTERVALS // BINS == j                               # (P,)
        some = where[drawn[inside[drawn]]]                   # the last: random has the first
        if inside.any():
            example = context(scan, where, acts, int(some[-1])) if len(some) else None
            intervals.append((j * R / INTERVALS, (j + 1) * R / INTERVALS, float(inside.mean()),
                              example))
    both = np.bincount(scan.features[where].reshape(-1), minlength=scan.F + 1)[:scan.F]
    share = both / np.maximum(1, scan.count + count - both)                  # (F,)
    share[f] = -1
    joint = np.argsort(-share, kind='stable')[:min(5, scan.F - 1)]
    pairs = {name: list(zip(getattr(scan, name)[f].tolist(),
                            getattr(scan, f'{name}_value')[f].tolist()))
             for name in ('up', 'down', 'near')}
    if scan.site == 'stream':
        pairs['near'] = []                                   # channels are orthogonal
    return dict(
        layer=scan.layer, f=f, count=count, density=count / scan.N, rank=int(scan.rank[f]),
        max=float(scan.max[f]), mean=float(acts.mean()) if count else 0.0, R=R,
        entropy=float(scan.entropy[f]) if count else None, fires_on=fires_on(scan, f), **pairs,
        hist=np.bincount(bins, minlength=BINS).tolist(), intervals=intervals,
        joint=list(zip(joint.tolist(), share[joint].tolist())),
        top=contexts(scan, where, acts, where[strongest_first], TOP),
        random=contexts(scan, where, acts, where[drawn], RANDOM))

def contexts(scan, where, acts, peaks, n):
    """
    The contexts of the first peak in each of the first n windows that peaks visit. Those with the
    same text around the peak are one, counted in `times`.
    """
    windows, found = set(), {}
    for peak in map(int, peaks):
        if peak // scan.T not in windows:
            c = context(scan, where, acts, peak)
            text = tuple(c['tokens'][max(0, c['peak'] - 8):c['peak'] + 5])
            found.setdefault(text, c)['times'] += 1
            windows.add(peak // scan.T)
        if len(windows) == n:
            break
    return list(found.values())

def context(scan, where, acts, peak):
    """The text around a peak, no further than its window. where, acts: the feature's firings."""
    window = peak // scan.T * scan.T
    begin, end = max(window, peak - SIDE), min(window + scan.T, peak + SIDE + 1)
    around = np.zeros(end - begin, np.float32)
    inside = slice(*np.searchsorted(where, (begin, end)))
    around[where[inside] - begin] = acts[inside]
    return dict(tokens=scan.tokens[begin:end].tolist(), acts=around.tolist(), peak=peak - begin,
                where=peak, times=0)

def removal_effect(model, scan, f, n, seed):
    """
    The change of the next token's loss, in nats, when a feature's code is set to 0 wherever it
    fires: exact, since the feature is part of the model. At n of its positions, drawn at random;
    None where there is none.
    """
    sae, T = model.saes()[scan.layer], scan.T
    where, _ = firings(scan, f)
    where = np.random.default_rng(seed).permutation(where[where % T < T - 1])[:n]
    as_it_is = torch.ones(scan.F, device=device_of(model))
    without = as_it_is.clone()
    without[f] = 0
    changes = []
    for w in np.unique(where // T).tolist():
        x = torch.from_numpy(scan.tokens[w * T:(w + 1) * T].astype(np.int64))
        at = torch.from_numpy(where[where // T == w] % T)
        losses = []
        for scale in (as_it_is, without):
            sae.steer = scale, torch.zeros_like(scale)
            logits = forward(model, x[None])[0][0, at.to(device_of(model))]  # (positions, V)
            losses.append(cross_entropy(logits.float().cpu(), x[at + 1], reduction='none'))
        changes += (losses[1] - losses[0]).tolist()
    sae.steer = None
    if not changes:
        return None
    return dict(n=len(changes), mean=float(np.mean(changes)), std=float(np.std(changes)),
                worse=float(np.mean(np.array(changes) > 0)))

def find(scan, pattern):
    """
    Arrays (F,): precision, the share of a feature's firings that lie inside a match, and recall,
    the share of matches on some token of which it fires; and the numbers of matches and of tokens
    inside them, i.e. with any byte inside. pattern: a compiled regular expression.
    """
    inside, recalled, n = np.zeros(scan.N, bool), np.zeros(scan.F + 1, int), 0
    for start in range(0, scan.N, scan.T):
        pieces = [scan.names[token] for token in scan.tokens[start:start + scan.T].tolist()]
        ends = np.cumsum([len(piece) for piece in pieces])   # of the tokens, in bytes
        text = b''.join(pieces).decode('utf-8', 'surrogateescape')
        for match in pattern.finditer(text):
            before, word = (part.encode('utf-8', 'surrogateescape')
                            for part in (text[:match.start()], match.group()))
            if word:
                bounds = len(before), len(before) + len(word) - 1
                first, last = start + np.searchsorted(ends, bounds, 'right')
                inside[first:last + 1] = True
                recalled[scan.features[first:last + 1]] += 1 # once each, however often it fires
                n += 1
    hits = np.bincount(scan.features[inside].reshape(-1), minlength=scan.F + 1)[:scan.F]
    return hits / np.maximum(1, scan.count), recalled[:scan.F] / max(1, n), n, int(inside.sum())
