"""
The viewer: what the features of a trained model mean, in a terminal, in a pipe, or as one HTML file.

    python inspect_features.py --out_dir=out-sae-cpu                          overview of every SAE
    python inspect_features.py --out_dir=out-sae-cpu --feature=L2.F101        all about one feature
    ... --prompt="import os"  a text with its features          --find="self|cls"  features that fire on that
    ... --probe=labels.tsv    features that tell labels apart   --timeline=true    how they formed
    ... --html=out.html       the same as one page              --export=folder    the SAEs, for SAELens

The model runs once over val (the scan); what fired where is kept in out_dir, in index.npz and index_*.npy, until the
checkpoint changes. A view of it takes a moment: torch is loaded only where a model runs, and an HTML page of 1,000 features
or more is made with the scan, and kept too (index_page.html).

  fires          the feature is among the K of a position, and its activation is not 0
  density        share of the scanned positions on which it fires
  token entropy  entropy in bits of the token types on which it fires; rank 1 is the lowest, of equals the densest
  contexts       a peak is never the first or last token of a window nor end-of-text, whose activations are often
                 freakish; one context a window, lest one text fill the list; equal texts are folded and counted
  random         drawn uniformly from the positions where it fires, at most one a window
  intervals      eighths of (0, R], R the power of two above the largest activation
At site stream activations are signed, and "strongest" means by magnitude.

Shapes: B windows, T tokens of a window, N = B*T, F features, K active a token, V vocabulary, S SAEs (in the scan) or
snapshots (in the timeline), P pairs of (feature, position it fires on).
"""
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configurator import configure, run
from data.dataset import eval_batches, load_dataset, load_tokenizer, token_bytes

DEFAULTS = dict(
    out_dir='out',       # a run of train.py
    layer=-1,            # block of the SAE; -1 = all, or the first where one is meant
    feature='',          # 2386 (with --layer) or L6.F2386; several with commas
    examples=5,          # contexts shown of a feature, up to 16
    rows=8,              # lines of a list
    effect=0,            # positions (64 is plenty) on which to measure the feature's removal
    prompt='',           # text to read with the model's eyes
    prompt_file='',
    top=3,               # features shown of each token of a prompt
    find='',             # regular expression: which features fire on it?
    probe='',            # file of lines "label<tab>text": which features tell the labels apart?
    timeline=False,      # how the features formed, from the snapshots of training
    html='',             # write the chosen (or all live) features, or the prompt, to this file
    export='',           # write the SAEs to this folder, for SAELens
    scan_tokens=0,       # 0 = what the index has; with no index 131,072, on a GPU 1,048,576
    dataset='',          # whose val is scanned; '' = that of training
    device='auto',       # 'auto', 'cpu', 'cuda', 'cuda:1'
    seed=1337,           # of everything drawn at random
)
TOPS, RANDOM, INTERVALS, BINS = 16, 8, 8, 32 # contexts kept of a feature; bins of its histogram
SIDE = 16                # tokens shown on either side of a peak
MANY = 1000              # features from which an HTML page is shared out among the CPU's cores
SHOWN_FROM = 20          # with fewer firings an entropy says little: not in the overview's tables
SETTLED = 0.7            # cosine of its token counts to the final ones from which a feature counts as settled
TEMPLATE = Path(__file__).resolve().parent / 'assets/viewer.html'
PLACES = dict(resid='on the residual stream after block', mlp="on the MLP's output in block", hidden='inside the MLP of block',
              attn="on the attention's output in block", stream='on the channels of the stream after block')

def problems(c):
    """What is wrong with the options, as a list of sentences."""
    found = [f"{key}={c[key]} must not be negative" for key in ('examples', 'rows', 'effect', 'top', 'scan_tokens', 'seed') if c[key] < 0]
    try:
        re.compile(c['find'])
    except re.error as e:
        found.append(f"find={c['find']!r} is no regular expression: {e}")
    return found

# ----------------------------------------------------------------------------------------------------
# the scan: one pass of the model over val, in memory that does not grow with the tokens scanned

def open_model(c):
    """Checkpoint, model, device, data set and tokenizer of a run. ValueError: one clear sentence."""
    import torch
    from model import load_checkpoint, load_model
    checkpoint = load_checkpoint(c.out_dir)
    device = c.device if c.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    model = load_model(checkpoint, device)
    if not model.saes():
        raise ValueError(f"the model in {c.out_dir} is dense: it has no SAE to look into; train one with --sae_layers")
    data = load_dataset(c.dataset or checkpoint['dataset'])
    if data.meta['vocab_size'] != model.config.vocab_size:
        raise ValueError(f"{data.dir} has {data.meta['vocab_size']} token types, the model in {c.out_dir} "
                         f"{model.config.vocab_size}: give the --dataset of its training")
    return SimpleNamespace(checkpoint=checkpoint, model=model, device=device, data=data, eot=data.meta['eot'],
                           tokenizer=load_tokenizer(data.dir, data.meta))

def forward(run, x):
    """Logits and SAEOut of the model on tokens x (B, T), in bf16 on a GPU."""
    import torch
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16, enabled='cuda' in run.device):
        logits, _, out = run.model(x.to(run.device))
    return logits, out

def scan(c, run, key):
    """
    Runs the model over val, and writes into out_dir index.npz, the statistics of each SAE, and the codes themselves:
    index_tokens.npy (N,), index_features.npy (S, N, K), F where a slot is not active, and index_values.npy (S, N, K).
    """
    import torch
    from rich.console import Console
    from rich.progress import track
    from sae import count_pairs
    saes, gpu, path = run.model.saes(), 'cuda' in run.device, Path(c.out_dir) / 'index.npz'
    T, V, S = run.model.config.block_size, run.model.config.vocab_size, len(saes)
    F, K = next((sae.n_features, sae.k_max) for sae in saes.values())
    wanted = c.scan_tokens or (1_048_576 if gpu else 131_072)
    B = max(1, min((32_768 if gpu else 4096) // T, wanted // T))
    batches = lambda: (x for x, _ in eval_batches(run.data.val, T, B, wanted))
    sizes = [x.numel() for x in batches()]
    N = sum(sizes)
    for old in (path, page_of(c)):                                       # from here to the end there is no index
        old.unlink(missing_ok=True)
    create = lambda name, dtype, *shape: np.lib.format.open_memmap(path.with_name(f'index_{name}.npy'), 'w+', dtype, shape)
    all_tokens = create('tokens', run.data.val.dtype, N)
    all_features = create('features', np.uint16 if F < 2**16 else np.uint32, S, N, K)
    all_values = create('values', np.float16, S, N, K)
    pairs, fvu, largest = [[] for _ in saes], torch.zeros(S), torch.zeros(S, F, device=run.device)
    started, terminal = time.time(), sys.stderr.isatty()
    spoken = started
    for i, x in enumerate(track(batches(), "scanning", total=len(sizes), console=Console(stderr=True), transient=True, disable=not terminal)):
        tokens, here = x.to(run.device), slice(i * x.numel(), (i + 1) * x.numel())
        if not terminal and time.time() > spoken + 20:
            spoken = time.time()
            say(f"  {here.start:,} of {N:,} tokens, {time.time() - started:.0f} s")
        _, out = forward(run, tokens)
        all_tokens[here] = x.flatten()
        fvu += out.fvu.float().cpu() / len(sizes)
        for s in range(S):
            values, indices = out.values[s].float(), out.indices[s].long()
            largest[s].scatter_reduce_(0, indices.flatten(), values.abs().flatten(), 'amax')
            pairs[s].append(count_pairs(values, indices, tokens, V))
            if len(pairs[s]) == 16:
                pairs[s] = [merge(pairs[s])]
            all_features[s, here] = torch.where(values != 0, indices, F).int().view(-1, K).cpu()
            all_values[s, here] = values.clamp(-65504, 65504).half().view(-1, K).cpu()
    wte = run.model.transformer.wte.weight[:V].detach().float()
    found = [statistics(sae, wte, *merge(p)) for sae, p in zip(saes.values(), pairs)]
    arrays = {name: torch.stack([x[name] for x in found]).cpu().numpy() for name in found[0]} # (S, F, ...)
    meta = dict(key=key, step=run.checkpoint['step'], layers=list(saes), site=run.model.config.sae_site, F=F, K=K, T=T, N=N,
                eot=-1 if run.eot is None else run.eot, wanted=wanted, dataset=str(c.dataset or run.checkpoint['dataset']),
                names=[raw.decode('latin-1') for raw in token_bytes(run.tokenizer, V)]) # JSON holds no bytes
    np.savez(path, meta=json.dumps(meta), max=largest.cpu().numpy(), fvu=fvu.numpy(), **arrays)
    say(f"scanned {N:,} tokens of {meta['dataset']} val in {time.time() - started:.1f} s -> {path}")

def merge(pairs):
    """Several results of sae.count_pairs as one."""
    import torch
    keys, counts = map(torch.cat, zip(*pairs))
    keys, inverse = torch.unique(keys, return_inverse=True)
    return keys, torch.zeros_like(keys).index_add_(0, inverse, counts)

def statistics(sae, wte, keys, counts):
    """Of each feature, from its (feature, token) pairs and from the weights; wte (V, C) are the tokens' embeddings."""
    import torch
    from sae import token_entropy, top_tokens
    F, V, everyone = sae.n_features, len(wte), torch.arange(sae.n_features, device=wte.device)
    count = torch.zeros_like(everyone).index_add_(0, keys // V, counts)
    entropy = token_entropy(keys, counts, F, V).float()
    order = np.lexsort((-count.cpu().numpy(), entropy.cpu().numpy()))    # nan, of those that never fire, comes last
    rank = (torch.from_numpy(order).to(wte.device).argsort() + 1) * (count > 0)
    out = dict(zip(('top_tokens', 'top_counts'), top_tokens(keys, counts, F, V)), count=count, entropy=entropy, rank=rank)
    writes = torch.eye(F, device=wte.device) if sae.site == 'stream' else sae.W_dec.detach().float()
    unit = torch.nn.functional.normalize(writes, dim=-1)
    best = dict(up=[], down=[], near=[])
    for rows in everyone.split(1024):
        logits, cosine = writes[rows] @ wte.T, unit[rows] @ unit.T       # (rows, V), (rows, F)
        cosine[everyone[:len(rows)], rows] = -2                          # itself
        best['up'].append(logits.topk(min(10, V)))
        best['down'].append(logits.topk(min(10, V), largest=False))
        best['near'].append(cosine.topk(min(5, F - 1)))
    for name, parts in best.items():
        out[name + '_value'], out[name] = map(torch.cat, zip(*parts))
    return {name: x if x.is_floating_point() else x.int() for name, x in out.items()}

# ----------------------------------------------------------------------------------------------------
# the index: what the scan left in out_dir

def load_npz(path):
    """An .npz as {name: array}; None if it is missing, torn or damaged: then it is made again."""
    try:
        with np.load(path) as z:
            return {name: z[name] for name in z.files}
    except Exception: # damage shows up as almost any: zip, zlib, header, end of file
        return None

def open_index(c):
    """read_index, after a scan where nothing that fits is there. ValueError: one sentence."""
    index, key, why, out = read_index(c), [], None, Path(c.out_dir)
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(out / 'ckpt.pt') as z: # empty if it is not whole
        key = [i.CRC for i in z.infolist()]                              # checksums: the content, without reading it
    s = next(iter(index.values()), None)
    if s is None:
        why = "the index is damaged or of an older version" if (out / 'index.npz').exists() else "there is no index yet"
    elif key and s.key != key:
        why = f"the index is of another checkpoint, of step {s.step:,}"
    elif c.scan_tokens not in (0, s.wanted) or c.dataset not in ('', s.dataset):
        why = f"the index is of {s.wanted:,} tokens of {s.dataset}"
    elif not key:
        say(f"note: no checkpoint in {c.out_dir} that can be read; its index is of step {s.step:,}")
    if why:
        run = open_model(c)
        say(f"{why}: scanning")
        scan(c, run, key)
        index = read_index(c)
        if sum(int((s.count > 0).sum()) for s in index.values()) >= MANY: # in a process without torch, which can be forked
            say("and a page of all live features, for --html:")
            subprocess.run([sys.executable, __file__, f'--out_dir={c.out_dir}', f'--html={page_of(c)}'], stdout=subprocess.DEVNULL)
    return index

def page_of(c):
    """The HTML page of all live features, made with the scan where they are many: --html copies it."""
    return Path(c.out_dir) / 'index_page.html'

def page_is_ready(c):
    """Is it there (a scan removes it first), of this version, and what is asked for?"""
    with contextlib.suppress(OSError):
        return (all(getattr(c, key) == DEFAULTS[key] for key in ('examples', 'seed'))
                and all(page_of(c).stat().st_mtime > path.stat().st_mtime for path in (Path(__file__), TEMPLATE)))
    return False

def read_index(c):
    """
    {block: its SAE}, whose attributes are the statistics, e.g. s.count (F,); what scan() calls meta, e.g. s.step, s.names (the bytes
    of each token); and as memory maps s.tokens (N,), s.features and s.values (N, K). {} where the files are missing or not whole.
    """
    path = Path(c.out_dir) / 'index.npz'
    try:
        arrays = load_npz(path)
        meta = json.loads(str(arrays.pop('meta')))
        meta['names'] = [text.encode('latin-1') for text in meta['names']]
        tokens, features, values = (np.asarray(np.load(path.with_name(f'index_{name}.npy'), mmap_mode='r'))
                                    for name in ('tokens', 'features', 'values'))
        if not (features.shape == values.shape == (len(arrays['count']), len(tokens), meta['K'])
                and tokens.max() < len(meta['names']) and features.max() <= meta['F']): # a bit has flipped
            raise ValueError
    except Exception: # of almost any kind: numpy reads a file's header as Python
        return {}
    return {layer: SimpleNamespace(**meta, **{name: x[i] for name, x in arrays.items()}, layer=layer, out_dir=c.out_dir, seed=c.seed,
                                   by_feature=None, tokens=tokens, features=features[i], values=values[i])
            for i, layer in enumerate(meta['layers'])}

# ----------------------------------------------------------------------------------------------------
# the numbers of the views, for the terminal and the HTML alike

def layer_data(s):
    """The numbers of an SAE's overview, for both."""
    live = s.count > 0
    density, bits = s.count[live] / s.N, s.entropy[live]
    top = math.ceil(bits.max(initial=1))
    busiest = np.sort(s.count)[-math.ceil(s.F / 100):].sum() / max(1, s.count.sum())
    return dict(live=int(live.sum()), dead=int((~live).sum()), l0=float(s.count.sum() / s.N), fvu=float(s.fvu),
                busiest=float(busiest), top_entropy=top, entropies=np.histogram(bits, 32, (0, top))[0].tolist(),
                densities=np.histogram(np.log10(density).clip(-6), 32, (-6, 0))[0].tolist())

def feature_data(s, f, timeline=None, effect=None):
    """Every number of the panels of one feature. Tokens are ids."""
    where, a = firings(s, f)
    size = abs(a)
    R = 2.0 ** math.frexp(s.max[f])[1]                                   # the power of two above it
    bins = np.minimum(BINS * size / R, BINS - 1).astype(int)
    hist = np.bincount(bins, minlength=BINS)
    shares = hist.reshape(INTERVALS, -1).sum(1) / max(1, len(where))
    peaks = np.flatnonzero(((where + 1) % s.T > 1) & (s.tokens.take(where) != s.eot)) # neither first nor last of a window
    strongest = peaks[np.argsort(~size[peaks].astype(np.float16).view(np.uint16), kind='stable')] # bits: a fast radix sort
    drawn = np.random.default_rng((s.seed, s.layer, f)).permutation(peaks)
    top, random = one_a_window(s, where[strongest], TOPS), one_a_window(s, where[drawn], RANDOM)
    example = np.full(INTERVALS, -1)
    example[bins[drawn] * INTERVALS // BINS] = where[drawn]              # the last: the random contexts are the first
    some = np.flatnonzero(example >= 0)
    found = contexts(s, where, a, top + random + example[some].tolist()) # at once: many cost little more than one
    examples = dict(zip(some.tolist(), found[len(top) + len(random):]))
    both = np.bincount(s.features.take(where, axis=0).reshape(-1), minlength=s.F + 1)[:s.F]
    share = both / np.maximum(1, s.count + len(where) - both)            # of the positions where either fires
    share[f], joint = -1, []
    for _ in range(min(5, s.F - 1)):                                     # faster than a sort
        joint.append((int(share.argmax()), float(share.max())))
        share[joint[-1][0]] = -1
    pairs = lambda tokens, values: list(zip(tokens[f].tolist(), values[f].tolist()))
    return dict(
        layer=s.layer, f=f, count=len(where), density=len(where) / s.N, rank=int(s.rank[f]), max=float(s.max[f]), R=R,
        entropy=float(s.entropy[f]) if len(where) else None, mean=float(a.sum() / max(1, len(a))), hist=hist.tolist(),
        fires_on=fires_on(s, f), up=pairs(s.up, s.up_value), down=pairs(s.down, s.down_value),
        near=pairs(s.near, s.near_value) if s.site != 'stream' else [],  # whose channels are orthogonal
        joint=joint, top=fold(found[:len(top)]), random=fold(found[len(top):len(top) + len(random)]),
        intervals=[(j * R / INTERVALS, (j + 1) * R / INTERVALS, float(shares[j]), examples.get(j))
                   for j in reversed(np.flatnonzero(shares).tolist())],
        effect=effect, timeline=timeline and feature_timeline(timeline, f))

def fires_on(s, f):
    """The 8 tokens on which a feature fires most, with their shares of its firings."""
    both = zip(s.top_tokens[f].tolist(), s.top_counts[f].tolist())
    return [(token, times / int(s.count[f])) for token, times in both if token >= 0]

def firings(s, f):
    """Where a feature fires: positions (P,), ascending, and activations (P,)."""
    if s.by_feature is None:
        slots = np.flatnonzero(s.features.reshape(-1) == f)
    else:
        slots, first = s.by_feature
        begin = int(s.count[first:f].sum())
        slots = slots[begin:begin + s.count[f]]
    return slots // s.K, s.values.reshape(-1)[slots].astype(np.float32)

def sort_firings(s, first, last):
    """From now on the firings of features first to last are looked up, and no longer searched for one by one."""
    features, block = s.features.reshape(-1), 2**22                      # in blocks: whatever the tokens scanned, a few MB each
    slots = np.concatenate([i + np.flatnonzero((features[i:i + block] >= first) & (features[i:i + block] <= last))
                            for i in range(0, len(features), block)])
    s.by_feature = slots[np.argsort(features[slots], kind='stable')], first

def one_a_window(s, positions, n):
    """The first of the positions in each of the first n windows that they visit."""
    first = {}
    for at in map(int, positions):                                       # few are visited
        first.setdefault(at // s.T, at)
        if len(first) == n:
            break
    return list(first.values())

def contexts(s, where, a, peaks):
    """The texts around peaks, no further than their windows: token ids, activations, and which is the peak. where, a: firings."""
    spans = np.array(peaks, int)[:, None] + np.arange(-SIDE, SIDE + 1)   # (contexts, tokens)
    slot = np.searchsorted(where, spans)
    acts = np.where(where.take(slot, mode='clip') == spans, a.take(slot, mode='clip'), 0).tolist()
    out = []
    for at, tokens, acts in zip(peaks, s.tokens.take(spans, mode='clip').tolist(), acts):
        before = min(SIDE, at % s.T)
        part = slice(SIDE - before, SIDE + s.T - at % s.T)
        out.append(dict(tokens=tokens[part], acts=acts[part], peak=before, where=at, times=1))
    return out

def fold(contexts):
    """Contexts with the same text around the peak as one, counted in `times`."""
    seen = {}
    for c in contexts:
        first = seen.setdefault(tuple(c['tokens'][max(0, c['peak'] - 8):c['peak'] + 5]), c)
        first['times'] += first is not c
    return list(seen.values())

def removal_effect(run, s, f, n):
    """
    The change of the next token's loss, in nats, when a feature's code is set to 0 wherever it fires: exact, since the feature is part
    of the model. At n of the positions where it fires, drawn at random; None where there is none.
    """
    import torch
    sae, (where, _), change = run.model.saes()[s.layer], firings(s, f), []
    where = np.random.default_rng(s.seed).permutation(where[where % s.T < s.T - 1])[:n]
    scale = torch.ones(2, 1, sae.n_features, device=run.device)
    scale[1, 0, f] = 0
    sae.steer = scale, torch.zeros_like(scale) # a batch of two: as it is, and without f
    for w in np.unique(where // s.T).tolist():
        x = torch.from_numpy(s.tokens[w * s.T:(w + 1) * s.T].astype(np.int64)).to(run.device)
        at = torch.from_numpy(where[where // s.T == w] % s.T).to(run.device)
        logits = forward(run, x.expand(2, -1))[0][:, at].float()         # (2, positions, V): all T of them would be 200 MB
        losses = torch.nn.functional.cross_entropy(logits.mT, x[at + 1].expand(2, -1), reduction='none')
        change += (losses[1] - losses[0]).tolist()
    sae.steer = None
    worse = sum(d > 0 for d in change) / max(1, len(change))
    return dict(n=len(change), mean=float(np.mean(change)), std=float(np.std(change)), worse=worse) if change else None

def find(s, pattern):
    """
    Arrays (F,): precision, the share of a feature's firings that lie inside a match, and recall, the share of matches on
    some token of which it fires; and the numbers of matches and of tokens inside them, i.e. with any byte inside.
    """
    sizes, spans = np.array([len(raw) for raw in s.names]), [np.zeros((0, 2), int)]
    for start in range(0, s.N, s.T):
        window = s.tokens[start:start + s.T]
        text = b''.join([s.names[token] for token in window.tolist()]).decode('utf-8', 'surrogateescape')
        code = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
        n_bytes = 1 + np.searchsorted((0x80, 0x800, 0x10000), code, 'right') # of each character in UTF-8
        n_bytes[code >> 8 == 0xDC] = 1                                   # a byte that is none
        ends = np.append(0, np.cumsum(n_bytes))                          # of the characters before each, in bytes
        owner = np.repeat(np.arange(start, start + s.T), sizes[window])  # the position that each byte belongs to
        found = np.fromiter(itertools.chain.from_iterable(map(re.Match.span, pattern.finditer(text))), int).reshape(-1, 2)
        found = found[found[:, 0] < found[:, 1]]
        spans.append(owner[ends[found] - (0, 1)])                        # first and last position
    first, last = np.concatenate(spans).T                                # (matches,)
    n = last - first + 1
    match = np.repeat(np.arange(len(n)), n)                              # an entry a (match, position)
    inside = np.arange(n.sum()) + np.repeat(first - np.cumsum(n) + n, n)
    counted = lambda features, weights=None: np.bincount(features.reshape(-1), weights, s.F + 1)[:s.F]
    tokens = np.flatnonzero(np.bincount(inside, minlength=s.N))
    short = np.bincount(first[n == 1], minlength=s.N)                    # matches within one token: it fires there or not
    at = np.flatnonzero(short)
    recalled = counted(s.features[at], np.repeat(short[at], s.K))
    long = n[match] > 1                                                  # it may fire on several tokens of a match: counted once
    once = np.sort((match[long, None] * (s.F + 1) + s.features[inside[long]]).reshape(-1), kind='stable') # faster than np.unique
    recalled = recalled + counted(once[np.diff(once, prepend=-1) > 0] % (s.F + 1))
    return counted(s.features[tokens]) / np.maximum(1, s.count), recalled / max(1, len(n)), len(n), len(tokens)

def read_text(key, path):
    """The file that --key=path names. ValueError: one sentence."""
    try:
        return Path(path).read_text('utf-8')
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, 'strerror', None) or "it is not UTF-8 text"
        raise ValueError(f"{key}={path!r} cannot be read: {why}") from None

def prompt_text(prompt, prompt_file):
    """What --prompt or --prompt_file gives, '' for neither. ValueError: one sentence."""
    if prompt and prompt_file:
        raise ValueError("prompt and prompt_file are both given: choose one")
    if prompt_file and not (prompt := read_text('prompt_file', prompt_file)):
        raise ValueError(f"prompt_file={prompt_file!r} is empty: write a prompt into it")
    return prompt

def read(run, text):
    """Yields token ids (T,) and SAEOut of a text, window by window; end-of-text before it, as in the data."""
    import torch
    ids, T = ([] if run.eot is None else [run.eot]) + run.tokenizer.encode_ordinary(text), run.model.config.block_size
    for begin in range(0, len(ids), T):
        window = ids[begin:begin + T]
        yield window, forward(run, torch.tensor([window]))[1]

def read_prompt(run, text, top):
    """[(token, {layer: [(feature, activation)] strongest first})] of a text."""
    rows = []
    for window, out in read(run, text):
        order = out.values.abs().argsort(dim=-1, descending=True, stable=True)[..., :top] # (S, 1, T, top)
        values, indices = (x.gather(-1, order)[:, 0].tolist() for x in (out.values.float(), out.indices))
        for t, token in enumerate(window):
            strongest = [[(f, a) for f, a in zip(indices[s][t], values[s][t]) if a] for s in range(len(values))]
            rows.append((token, dict(zip(run.model.saes(), strongest))))
    return rows

# ----------------------------------------------------------------------------------------------------
# the probe: do a few features tell labels apart?

def read_labels(path):
    """Labels (n,), texts (n,) of a probe file. ValueError: one sentence."""
    labels, texts = [], []
    for n, line in enumerate(read_text('probe', path).split('\n'), 1):
        label, _, text = line.partition('\t')
        if text.strip():
            labels.append(label)
            texts.append(text)
        elif line.strip():
            raise ValueError(f"probe={path!r}, line {n}: expected a label, a tab and a text")
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    if len(counts) < 2 or min(counts.values()) < 4:
        found = ', '.join(f'{n} of {label!r}' for label, n in counts.items()) or 'none'
        raise ValueError(f"probe={path!r} has these texts: {found}; it takes two labels or more, and of each 4 texts "
                         "or more, to train on some and test on the others")
    return labels, texts

def pooled_codes(run, layer, texts):
    """X (n, F): for each text, each feature's strongest activation on any of its tokens."""
    s, X = list(run.model.saes()).index(layer), np.zeros((len(texts), run.model.saes()[layer].n_features), np.float32)
    for row, text in zip(X, texts):
        _, out = next(read(run, text))                                   # the first window
        skip = 0 if run.eot is None else 1                               # not what end-of-text sets off
        values, indices = (x[s, 0, skip:].flatten().cpu().numpy() for x in (out.values.float(), out.indices))
        order = abs(values).argsort()                                    # the strongest last, and so it stays
        row[indices[order]] = values[order]
    return X

def split(y, seed):
    """Indices of train and test texts: 70 % and 30 % of each class, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind='stable')]                   # class by class
    train = np.concatenate([np.arange(n) < 0.7 * n for n in np.bincount(y)])
    return order[train], order[~train]

def choose_features(X, y, k):
    """The columns of X (n, F) that tell the classes y (n,) apart: all those of any use, best alone first, and the best k together."""
    X, Y = X - X.mean(0), np.eye(y.max() + 1)[y]
    residual = Y = Y - Y.mean(0)
    explained = lambda Y: np.square(X.T @ Y).sum(1) / np.maximum(np.square(X).sum(0), 1e-6) # by each column alone
    score, chosen = explained(Y), []
    alone = np.argsort(-score, kind='stable')[:int((score > 0).sum())]
    for _ in range(k):                                                   # orthogonal matching pursuit on one-hot labels
        score = explained(residual)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        residual = Y - X[:, chosen] @ np.linalg.lstsq(X[:, chosen], Y, rcond=None)[0]
    return alone, chosen

def accuracy(X, y, train, test):
    """Held-out accuracy of multinomial logistic regression (L2 of 0.01 on standardised inputs)."""
    import torch
    X = torch.from_numpy(((X - X[train].mean(0)) / np.maximum(X[train].std(0), 1e-3)).astype(np.float32))
    y = torch.from_numpy(y)
    w = torch.zeros(X.size(1), int(y.max()) + 1, requires_grad=True)
    b = torch.zeros(w.size(1), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn='strong_wolfe')
    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(X[train] @ w + b, y[train]) + 0.01 * w.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return float(((X[test] @ w + b).argmax(1) == y[test]).float().mean())

# ----------------------------------------------------------------------------------------------------
# the timeline: what training wrote into features/ at each eval

def open_timeline(out_dir):
    """
    {block: its SAE in all snapshots}, whose attributes are steps, tokens (S,), what a snapshot holds of it, e.g. count (S, F), and two
    cosines (S, F) to the last snapshot: cos, of what a feature writes, and same, of the counts of the tokens on which it fires. Kept in
    timeline.npz. {} where there is no snapshot. ValueError: one sentence.
    """
    files, path = sorted(Path(out_dir).glob('features/[0-9]*.npz')), Path(out_dir) / 'timeline.npz'
    if not files:
        return {}
    key = json.dumps(['cos', 'same', *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)])
    z = load_npz(path)
    if z is None or str(z.get('key')) != key:
        say(f"reading {len(files)} snapshots of {out_dir}/features, once")
        last = load_npz(files[-1])
        snapshots = [read_snapshot(file, last) for file in reversed(files)][::-1] # the last first: it is the measure of all
        z = {name: np.stack([snapshot[name] for snapshot in snapshots]) for name in snapshots[0]}
        np.savez(path, key=key, **z)
    return {layer: SimpleNamespace(**of_layer(z, layer), layer=layer, steps=z['step'], tokens=z['tokens'], probed=int(z['probed'][0]))
            for layer in z['layers'][0].tolist()}

def of_layer(arrays, layer):
    """{'L6.count': ..., ...} -> {'count': ...}"""
    return {name.removeprefix(f'L{layer}.'): x for name, x in arrays.items() if name.startswith(f'L{layer}.')}

def read_snapshot(file, last):
    """The arrays of a snapshot; in place of W_dec, which would fill GBs, the two cosines to the last. ValueError: one sentence."""
    norms = lambda a, b: np.maximum(1e-12, np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    try:
        z = load_npz(file)
        if z.keys() != last.keys() or any(z[name].shape != x.shape for name, x in last.items()):
            raise ValueError
        for layer in last['layers'].tolist():
            here, end = of_layer(z, layer), of_layer(last, layer)
            match = here['top_tokens'][:, :, None] == end['top_tokens'][:, None, :] # (F, 8, 8)
            a, b = (x['top_counts'].astype(float) for x in (here, end))  # (F, 8), 0 for token -1, where there are fewer
            z[f'L{layer}.same'] = np.einsum('fij,fi,fj->f', match, a, b) / norms(a, b)
            z[f'L{layer}.cos'] = np.ones(len(a))
            if z.pop(f'L{layer}.W_dec', None) is not None:               # site stream has none
                a, b = (x['W_dec'].astype(np.float32) for x in (here, end)) # (F, C)
                z[f'L{layer}.cos'] = (a * b).sum(1) / norms(a, b)
        return z
    except (AttributeError, TypeError, LookupError, ValueError):
        raise ValueError(f"{file} is no readable snapshot of this run: remove it") from None

def settled_at(t, f=slice(None)):
    """The snapshot (F,) from which on a feature fires on about its final tokens; S if it is silent in the last, or changed just before."""
    late = np.logical_and.accumulate((t.same[:, f] >= SETTLED)[::-1])[::-1] # (S, F)
    return np.where(late[:-1].any(0), late.argmax(0), len(late))            # to the last itself the cosine is always 1

def feature_timeline(t, f):
    """Density, entropy, cosines to the end and tokens of one feature at each snapshot."""
    return dict(steps=t.steps.tolist(), density=(t.count[:, f] / t.probed).tolist(), settled=int(settled_at(t, f)),
                entropy=[None if x != x else x for x in t.entropy[:, f].tolist()],
                cos=t.cos[:, f].tolist(), same=t.same[:, f].tolist(),
                tokens=[[token for token in row[:4] if token >= 0] for row in t.top_tokens[:, f].tolist()])

# ----------------------------------------------------------------------------------------------------
# text that is safe on any screen. A view is a list of lines; their colours are escape codes, which
# show() takes out in a pipe: no token can bring its own, since safe() makes them visible

BARS = ' ▁▂▃▄▅▆▇█'
ORANGES = (230, 223, 222, 216, 215, 209, 208, 202) # of 256 colours, for eighths of the maximum activation
SIGNS = {'\n': '⏎', '\t': '⇥', '\x7f': '␡'} | {chr(i): chr(0x2400 + i) for i in range(32) if i not in (9, 10)}

# bytes that end within a character of UTF-8: its first byte, with fewer after it than belong to it
UNFINISHED = re.compile(rb'([\xc2-\xf4]|[\xe0-\xf4][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2})\Z')

def say(text):
    """A remark about what is being done; views alone go to stdout."""
    print(text, file=sys.stderr, flush=True)

def has_colour():
    return sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM', 'dumb') != 'dumb'

def show(views):
    text = '\n\n\n'.join('\n'.join(view) for view in views)
    print(text if has_colour() else re.sub('\x1b\\[[0-9;]*m', '', text))

bold, dim = '\x1b[1m{}\x1b[0m'.format, '\x1b[2m{}\x1b[0m'.format

def title(text, note=''):
    return f'\n{bold(text)}' + f'  {dim(note)}' * bool(note)

def panel(text, note, lines):
    """Lines under a title; nothing if there are none."""
    lines = list(lines)
    return [title(text, note), *lines] if lines else []

def shaded(text, levels):
    """Text on a ground of the shade of each character's level, an eighth of the maximum."""
    runs = ((level, ''.join(ch for ch, _ in run)) for level, run in itertools.groupby(zip(text, levels), key=lambda c: c[1]))
    return ''.join(f'\x1b[30;48;5;{ORANGES[level - 1]}m{run}\x1b[0m' if level else run for level, run in runs)

@functools.cache
def safe(raw, keep=''):
    """
    Bytes as text that leaves any screen whole, but for characters to keep. Control bytes become symbols, bytes that are
    no UTF-8 <0xE2>, invisible and direction-changing characters <U+200B>; a lone accent gets a circle to sit on.
    """
    out = ''
    for ch in raw.decode('utf-8', 'surrogateescape'):
        code, kind = ord(ch), unicodedata.category(ch)
        if ch in SIGNS and ch not in keep:
            ch = SIGNS[ch]
        elif 0xDC80 <= code <= 0xDCFF:
            ch = f'<0x{code - 0xDC00:02X}>'
        elif kind[0] == 'C' and ch not in keep or kind in ('Zl', 'Zp'):
            ch = f'<U+{code:04X}>'
        elif kind[0] == 'M' and not out:
            ch = '◌' + ch
        out += ch
    return out

def width_of(text):
    """Columns of a terminal that text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.category(ch) in ('Mn', 'Me') else 1 + (unicodedata.east_asian_width(ch) in 'WF') for ch in text)

def crop(text, width):
    """The first characters that fill at most width columns; … if not all."""
    ends = np.cumsum([width_of(ch) for ch in text])
    return text if not text or ends[-1] <= width else text[:int((ends < width).sum())] + '…'

def fit(text, width):
    """Text padded to width columns, or cut to it."""
    text = crop(text, width)
    return text + ' ' * (width - width_of(text))

def caption(raw):
    """A token in a list, in 16 columns at most: spaces at its ends are seen as dots."""
    return crop(re.sub('^ +| +$', lambda spaces: '·' * len(spaces[0]), safe(raw)) or '(none)', 16)

def spark(numbers, top=None):
    """Numbers of 0 or more as one row of bars, up to the largest or to top; above 0 is never invisible."""
    numbers = [0.0 if n is None or n != n else float(n) for n in numbers]
    top = top or max(numbers, default=0) or 1
    return ''.join(BARS[0 if n <= 0 else max(1, min(8, round(8 * n / top)))] for n in numbers)

def percent(x):
    return (f'{100 * x:.5f}' if 0 < x < 1e-6 else f'{100 * x:#.3g}'.rstrip('.')) + ' %'

def number(x):
    """Four digits, so that columns of them align."""
    return f'{x:.0f}' if abs(x) >= 1000 else f'{x:#.4g}'

def pieces(s, context):
    """A context as (text, activation, is it the peak) for each token; tokens that share a character are one piece."""
    out = []
    for at, (token, act) in enumerate(zip(context['tokens'], context['acts'])):
        raw, peak = s.names[token], at == context['peak']
        if out and UNFINISHED.search(out[-1][0]):
            before, other, was_peak = out.pop()
            raw, act, peak = before + raw, max(other, act, key=abs), peak or was_peak
        out.append((raw, act, peak))
    return [(safe(raw), act, peak) for raw, act, peak in out]

def eighth(act, largest):
    return min(8, math.ceil(8 * abs(act) / largest)) if act else 0

def marked(s, context, largest):
    """A context as text, its peak in «», the eighth of the largest activation of each character, and where the peak begins."""
    text, levels = '', []
    for piece, act, peak in pieces(s, context):
        if peak:
            word = piece.lstrip(' ') or piece
            piece = piece.removesuffix(word) + f'«{word}»'
            begin = len(text) + piece.index('«')
        text += piece
        levels += [eighth(act, largest)] * len(piece)
    return text, levels, begin

def paragraph(s, context, largest, width, colour):
    """A context wrapped at its line breaks and at spaces, shaded by activation or, without colour, with bars under its tokens."""
    text, levels, _ = marked(s, context, largest)
    while text.strip(' ') or any(levels):
        fits = max(1, int((np.cumsum([width_of(ch) for ch in text]) <= width - 2).sum()))
        newline, space = re.match('[^⏎]*⏎+»?', text[:fits]), text.rfind(' ', 0, fits) + 1
        n = newline.end() if newline else space if space and fits < len(text) else fits
        yield '  ' + shaded(text[:n], levels[:n])
        bars = ''.join(BARS[level] * width_of(ch) for ch, level in zip(text[:n], levels)).rstrip()
        if bars and not colour:
            yield '  ' + bars
        text, levels = text[n:], levels[n:]

def one_line(s, context, largest, width):
    """A context cut to one line, the peak beginning at the same column in all: to be read downwards."""
    (text, levels, begin), column = marked(s, context, largest), width * 2 // 5
    left, right = crop(text[:begin][::-1], column)[::-1], crop(text[begin:], width - column)
    return ' ' * (column - width_of(left)) + shaded(left + right, levels[begin - len(left):])

# ----------------------------------------------------------------------------------------------------
# panels: generators of lines

def name(s, f):
    return bold(f'L{s.layer}.F{f}'.ljust(11))

def captions(s, f, width):
    """The tokens on which a feature fires most, with shares of its firings, as many as fit and are not 0 %."""
    text = ''
    for token, share in fires_on(s, f):
        more = f'{"  " if text else ""}{caption(s.names[token])} {100 * share:.0f}%'
        if width_of(text + more) > width or share < 0.005:
            return text or fit(more, width)
        text += more
    return text or 'dead'

RANKED = f'{"rank":>6}{"entropy":>9}{"density":>10}'

def ranked(s, f):
    return f"{s.rank[f] or '-':>6}{f'{s.entropy[f]:.4f}' if s.count[f] else '-':>9}{percent(s.count[f] / s.N):>10}"

def table(head, rows):
    """A line for each (SAE, feature, cells): its name, the cells under head, and what it fires on. Nothing for no rows."""
    lines = [f"  {name(s, f)}{cells}   {captions(s, f, 64 - len(cells))}" for s, f, cells in rows]
    return [dim(f'  {"feature":<11}{head}   fires on'), *lines] if lines else []

def overview(s, rows):
    d, live = layer_data(s), s.count > 0
    yield bold(f"SAE {PLACES[s.site]} {s.layer}: {s.F:,} features, K = {s.K}")
    yield dim(f"step {s.step:,} · {s.N:,} tokens of {Path(s.dataset).name} val scanned")
    yield f"\n  live {d['live']:,} ({percent(d['live'] / s.F)}) · dead {d['dead']:,} · L0 {d['l0']:.2f} · FVU {d['fvu']:.3f}"
    yield dim('                  L0: features active a token; FVU: share of variance not kept')
    if d['live']:
        low, median, high = map(percent, np.percentile(s.count[live] / s.N, (10, 50, 90)))
        yield f"  density        |{spark(d['densities'])}| 0.0001 to 100 %, log scale"
        yield dim(f'                  median {median}, the middle 80 % from {low} to {high};')
        yield dim(f"                  the busiest 1 % of the features do {percent(d['busiest'])} of all firing")
        yield f"  token entropy  |{spark(d['entropies'])}| 0 to {d['top_entropy']} bits"
        yield dim(f'                  median {np.median(s.entropy[live]):.2f}, highest {s.entropy[live].max():.2f}')
    order = np.argsort(s.rank)
    known = order[s.count[order] >= SHOWN_FROM]
    between = known[np.linspace(0, len(known) - 1, rows + 2).astype(int)[1:-1]] if len(known) > 3 * rows else []
    words = known[np.sort(np.unique(s.top_tokens[known, 0], return_index=True)[1])] # the first of each: many may fire on line breaks
    which = f'entropy of {len(known):,} that fire {SHOWN_FROM} times or more'
    for kind, note, features in (
            ('Most word-like', f'one a token, lowest {which}', words[:rows]), ('Most abstract', f'highest token {which}', known[::-1][:rows]),
            ('Densest', 'fire on the most positions', np.argsort(-s.count, kind='stable')[:min(rows, d['live'])])):
        yield from panel(kind, note, table(RANKED, [(s, f, ranked(s, f)) for f in features]))
    if len(between):
        yield title('In between', 'evenly spaced by rank; their strongest contexts, the peak in «»')
        for f in between:
            yield f"  {name(s, f)}{captions(s, f, 66)}"
            feature = feature_data(s, f)
            yield from (f"    {one_line(s, c, feature['max'], 74)}" for c in feature['top'][:3])
    yield title('Dead', f"never fired in {s.N:,} tokens")
    some = ' '.join(f'F{f}' for f in np.flatnonzero(s.count == 0)[:rows])
    yield f"  {some} ... {d['dead']:,} in all" if d['dead'] > rows else f"  {some or 'none'}"
    if len(known):
        yield title('Next')
        yield f"  python inspect_features.py --out_dir={shlex.quote(s.out_dir)} --feature=L{s.layer}.F{known[len(known) // 2]}"
        yield dim('  or end with --prompt="text", --find="regex", --timeline=true, --html=page.html')

def feature_view(index, d, examples):
    """All panels of one feature; d from feature_data."""
    s, f, count = index[d['layer']], d['f'], d['count']
    live, which, colour = np.flatnonzero(s.count), f'L{s.layer}.F{f}', has_colour()
    peak = lambda c: number(c['acts'][c['peak']])
    yield bold(which) + (f" · alive · fires on {percent(d['density'])} of {s.N:,} tokens · max {number(d['max'])} · "
                         f"mean {number(d['mean'])}" if count else f" is dead: it never fired in {s.N:,} tokens")
    yield dim(f"step {s.step:,} · {PLACES[s.site]} {s.layer}")
    if count:
        used = int(np.flatnonzero(d['hist'])[-1]) + 1
        yield title('Activations', f"{count:,} of them" + ", by magnitude" * (s.site == 'stream'))
        yield f"  0 |{spark(d['hist'][:used])}| {number(used / BINS * d['R'])}"
        yield title('Fires on', f"token entropy {d['entropy']:.4f} bits, rank {d['rank']:,} of {len(live):,} live features")
        yield '  ' + captions(s, f, 78)
    yield title('Suppresses | promotes', 'next tokens, logits per unit; direct path only')
    for pair in zip(d['down'][:5], d['up']):
        yield '  ' + '   |   '.join(f'{fit(caption(s.names[token]), 18)}{logit:>+9.4f}' for token, logit in pair)
    if count:
        yield title('Top contexts', f"one a window; the peak in «», {'shaded' if colour else 'bars'} by activation")
        for n, c in enumerate(d['top'][:examples], 1):
            yield bold(f"Layer {s.layer} - Feature {f} - Example {n} - Rank {d['rank']} - Token Entropy {d['entropy']:.4f}")
            yield from paragraph(s, c, d['max'], 80, colour)
            more = f", the same text {c['times']} times" if c['times'] > 1 else ''
            yield dim(f"  activation {peak(c)} at token {c['where']:,} of the scan{more}")
        if not d['top']:
            yield dim('  none: it fires only on first and last tokens of a window, and on end-of-text')
        yield from panel('Random contexts', 'drawn from all positions where it fires', (
            f"{dim(f'{peak(c):>8}')}  {one_line(s, c, d['max'], 70)}" for c in d['random'][:examples]))
        yield title('By strength', 'intervals of activation, their shares of the firings, an example')
        for low, high, share, c in d['intervals']:
            line = one_line(s, c, d['max'], 54) if c else dim('(only where no peak is taken)')
            yield f"{dim(f'{low:.4g} to {high:.4g}'.rjust(16) + percent(share).rjust(9))} {line}"
    for neighbours, kind, note in ((d['near'], 'Nearest', 'cosine of what they write'),
                                   (d['joint'] if count else [], 'Fires with', 'positions with both / positions with either')):
        yield from panel(kind, note, (f'  {value:6.3f}  {name(s, g)}{captions(s, g, 58)}' for g, value in neighbours))
    if s.site == 'stream' and len(index) > 1:
        yield from panel('Across layers', f'channel {f} of the stream, after each block with an SAE', table(
            RANKED + f'{"max":>9}', [(x, f, ranked(x, f) + f'{number(x.max[f]):>9}') for x in index.values()]))
    if e := d['effect']:
        yield title('Without it', f"exact change of the loss, at {e['n']:,} of the positions where it fires")
        yield f"  mean {e['mean']:+.4f} nats (standard error {e['std'] / e['n'] ** 0.5:.4f}), standard deviation {e['std']:.4f}"
        yield f"  the loss rises at {percent(e['worse'])} of them"
    elif count:
        yield title('Without it', 'what its removal does to the loss: takes the model, some seconds')
        yield f"  --feature={which} --effect=64"
    if d['timeline']:
        yield from sparklines(d['timeline'])
    yield title('Next')
    if len(live):
        before, after = live[np.searchsorted(live, f) - 1], live[np.searchsorted(live, f, 'right') % len(live)]
        yield f'  previous: --feature=L{s.layer}.F{before}   next: --feature=L{s.layer}.F{after}'
    if count:
        yield f"  python sample.py --out_dir={shlex.quote(s.out_dir)} --steer={which}={number(d['max'])} --compare=true"

def sparklines(t):
    """A feature over training; t from feature_timeline."""
    steps, settled, n = t['steps'], t['settled'], len(t['steps'])
    yield title('Timeline', f'{n} snapshots, steps {steps[0]:,} to {steps[-1]:,}')
    yield f"  density        |{spark(t['density'])}| 0 to {percent(max(t['density']))}"
    yield f"  token entropy  |{spark(t['entropy'])}| 0 to {max(e or 0 for e in t['entropy']):.2f} bits"
    yield f"  direction      |{spark(t['cos'], 1)}| cosine to the end, 0 to 1"
    yield f"  fires on       |{spark(t['same'], 1)}| cosine of the token counts to the end, 0 to 1"
    if settled < n:
        yield ' ' * (18 + settled) + '^'
        yield f'  took its final meaning at step {steps[settled]:,}: fires on about the same tokens ever since'
    else:
        yield '  not settled: silent in the last snapshot, or other tokens just before it'

def feature_timeline_view(names, snapshots, f):
    t = feature_timeline(snapshots, f)
    yield f"{bold(f'L{snapshots.layer}.F{f}')} over training, on {snapshots.probed:,} tokens at each snapshot"
    yield from sparklines(t)
    yield dim(f'\n{"step":>9}{"density":>11}{"entropy":>9}{"direction":>11}{"tokens":>8}   fires on')
    for i, step in enumerate(t['steps']):
        entropy = '-' if t['entropy'][i] is None else f"{t['entropy'][i]:.4f}"
        tokens = crop('  '.join(caption(names[token]) for token in t['tokens'][i]), 29)
        yield (f"{'*' if i == t['settled'] else ' '}{step:>8,}{percent(t['density'][i]):>11}{entropy:>9}"
               f"{t['cos'][i]:>11.4f}{t['same'][i]:>8.4f}   {tokens}")

def timeline_view(t):
    """An SAE over training; t from open_timeline."""
    S, live, settled = len(t.steps), t.count > 0, settled_at(t)
    top = math.ceil(t.entropy[live].max(initial=1))
    yield bold(f'SAE of block {t.layer} over training: {S} snapshots of {t.probed:,} tokens each')
    yield dim(f'settled: fires on about its final tokens from then on (cosine of their counts {SETTLED} or more)')
    yield dim(f'\n{"step":>9}{"tokens":>15}{"live":>9}{"settled":>9}{"median":>8}   token entropy, 0 to {top} bits')
    for i in range(S):
        bits = t.entropy[i][live[i]]
        yield (f'{int(t.steps[i]):>9,}{int(t.tokens[i]):>15,}{percent(live[i].mean()):>9}{(settled <= i).sum():>9,}'
               f'{np.median(bits) if len(bits) else 0:>8.2f}   |{spark(np.histogram(bits, 24, (0, top))[0])}|')
    when = np.bincount(settled[live[-1]], minlength=S + 1)
    yield f'\n  settling       |{spark(when[:S])}| features a snapshot; {when[S]:,} of {live[-1].sum():,} never'

def prompt_view(s, rows, top):
    yield bold(f'SAE of block {s.layer}: the {top} strongest features of each token')
    yield dim('activation, its bar of the largest in the scan, and what the feature fires on\n')
    for token, features in rows:
        text = fit(safe(s.names[token]), 16)
        for n, (f, a) in enumerate(features[s.layer]):
            level = eighth(a, max(abs(a), s.max[f]))
            yield (f"{' ' * 16 if n else shaded(text, [level] * len(text))} {BARS[level]} {number(a):>7}  "
                   f"{name(s, f)}{captions(s, f, 40)}")
        if not features[s.layer]:
            yield text + dim(' no feature fires')

def find_view(s, pattern, rows):
    precision, recall, n, n_tokens = find(s, pattern)
    f1 = 2 * precision * recall / np.maximum(1e-12, precision + recall)
    best = [f for f in np.argsort(-f1, kind='stable')[:rows] if f1[f] > 0]
    text = safe(pattern.pattern.encode('utf-8', 'surrogateescape'))
    yield bold(f"/{text}/ in the {s.N:,} tokens scanned: {n:,} matches, {n_tokens:,} tokens")
    yield dim('precision: share of its firings in a match; recall: of matches on which it fires')
    yield from table(f'{"fires":>9}{"precision":>11}{"recall":>8}{"F1":>7}', [
        (s, f, f'{s.count[f]:>9,}{precision[f]:>11.3f}{recall[f]:>8.3f}{f1[f]:>7.3f}') for f in best])
    if not best:
        yield '  no feature fires on any of them' if n else '  no match: nothing to rank'

def probe_view(s, run, labels, texts, rows, seed):
    kinds, y = np.unique(np.array(labels, object), return_inverse=True)
    X, (train, test) = pooled_codes(run, s.layer, texts), split(y, seed)
    yield bold(f'Probe of block {s.layer}: {len(texts):,} texts of {len(kinds)} labels, {len(train):,} to train on, '
               f'{len(test):,} held out')
    yield dim("each text is its features' strongest activations; logistic regression on k of them;")
    yield dim(f'accuracy on the held-out texts, of which one is {percent(1 / len(test))}\n')
    alone, chosen = choose_features(X[train], y[train], min(5, s.F))
    for k in sorted({1, min(2, s.F), min(5, s.F)}):
        names = ' '.join(f'F{f}' for f in chosen[:k])
        yield f'  k = {k:<7}{100 * accuracy(X[:, chosen[:k]], y, train, test):>6.1f} %   {names}'
    yield f'  all {s.F:<7,}{100 * accuracy(X, y, train, test):>6.1f} %   dense probe on the same activations'
    yield f'  majority   {100 * (y[test] == np.bincount(y[train]).argmax()).mean():>6.1f} %'
    yield title('Single features', 'accuracy of each alone; the label on which it is strongest')
    label = np.stack([X[train][y[train] == k].mean(0) for k in range(len(kinds))]).argmax(0)
    yield from table(f'{"alone":>9}  {"label":<12}', [
        (s, f, f'{100 * accuracy(X[:, [f]], y, train, test):>7.1f} %  ' + fit(safe(kinds[label[f]].encode()), 12))
        for f in alone[:rows]])

# ----------------------------------------------------------------------------------------------------
# HTML and export

def write_html(path, index, features, data, examples, prompt):
    """
    One static file: assets/viewer.html with its data put in. features: [(layer, feature)], data(layer, feature): its
    feature_data; prompt: of read_prompt. Many features are shared out among the CPU's cores.
    """
    s = next(iter(index.values()))
    texts, cut = [safe(raw) for raw in s.names], {token for token, raw in enumerate(s.names) if UNFINISHED.search(raw)}
    words = lambda pairs: pairs and [(texts[token], x) for token, x in pairs]
    encode = json.JSONEncoder(separators=(',', ':')).encode
    def segments(c):
        """[text, activation, is it the peak] for tokens on which the feature fires, a text for those between; where; times."""
        parts, begin, tokens, acts, peak = [], 0, [texts[token] for token in c['tokens']], c['acts'], c['peak']
        if not cut.isdisjoint(c['tokens']):                              # some share a character
            tokens, acts, peaks = zip(*pieces(s, c))
            peak = peaks.index(True)
        for at in [i for i, act in enumerate(acts) if act or i == peak]: # a peak can be too weak for fp16
            parts += [''.join(tokens[begin:at]), (tokens[at], acts[at], at == peak)]
            begin = at + 1
        return [*parts, ''.join(tokens[begin:])], c['where'], c['times']
    def encoded(layer, f):
        d = data(layer, f)
        d |= {kind: words(d[kind]) for kind in ('fires_on', 'up', 'down')}
        d |= {kind: [segments(c) for c in d[kind][:examples]] for kind in ('top', 'random')}
        d['intervals'] = [(*interval, c and segments(c)) for *interval, c in d['intervals']]
        if d['timeline']:
            d['timeline']['tokens'] = [texts[token] for token in d['timeline']['tokens'][-1]]
        return encode(d)
    harmless = lambda text: text.replace('<', '\\u003c').encode()        # no tag in it can end the script
    def share(part):
        s = index[part[0][0]]
        s.by_feature = None                                              # of the last part that this process had
        if len(part) > 20:
            sort_firings(s, min(f for _, f in part), max(f for _, f in part))
        return harmless(','.join(encoded(layer, f) for layer, f in part)) # of thousands, only their texts are kept
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
    if len(features) < MANY or 'torch' in sys.modules:                   # forks of torch's threads can hang
        cores = 1
    costs = np.cumsum([300 + int(index[i].count[f]) for i, f in features]) # in firings; of 4 M, an SAE's slots take 32 MB
    n = max(cores, costs[-1] // 2**22) if features else 0
    chunks = [[x for x, _ in group] for _, group in itertools.groupby(
        zip(features, (costs - 1) * n // costs[-1:]), key=lambda x: (x[0][0], x[1]))]
    about = encode(dict(step=s.step, site=s.site, place=PLACES[s.site], F=s.F, K=s.K, N=s.N, dataset=s.dataset,
                        shown_from=SHOWN_FROM, layers={s.layer: layer_data(s) for s in index.values()}, prompt=words(prompt)))
    head, tail = TEMPLATE.read_bytes().split(b'"DATA"', 1)
    with contextlib.ExitStack() as stack:
        parts = map(share, chunks)
        if cores > 1:
            pool = multiprocessing.get_context('fork').Pool(cores, globals().update, [dict(SHARE=share)])
            parts = stack.enter_context(pool).imap(in_child, chunks)
        out = stack.enter_context(open(f'{path}.tmp', 'wb'))
        out.write(head + harmless(about[:-1]) + b',"features":[')
        for i, part in enumerate(parts):
            out.write(b',' * (i > 0) + part)
        out.write(b']}' + tail)
    os.replace(f'{path}.tmp', path)
    say(f'{len(features):,} features -> {path}, {Path(path).stat().st_size / 1e6:.1f} MB')

def in_child(part):
    """What a forked process of write_html runs: the parent's closure, which cannot be pickled."""
    return SHARE(part)

def export(c):
    """
    The SAEs as folders L<block> that SAELens loads with SAE.load_from_disk: architecture topk, on the layer's
    normalised input norm(x). The token skip, which no SAE of SAELens has, stays behind.
    """
    run = open_model(c)
    config = run.model.config
    hook = dict(resid='hook_resid_post', mlp='hook_mlp_out', attn='hook_attn_out').get(config.sae_site)
    if not hook:
        raise ValueError(f"site {config.sae_site} is no TopK autoencoder (relu^2, or no encoder at all): SAELens has "
                         "no such SAE; resid, mlp and attn can be exported")
    for layer, sae in run.model.saes().items():
        folder = Path(c.export) / f'L{layer}'
        folder.mkdir(parents=True, exist_ok=True)
        cfg = dict(architecture='topk', d_in=sae.n_embd, d_sae=sae.n_features, k=int(sae.k), dtype='float32', device='cpu',
                   apply_b_dec_to_input=True, normalize_activations='none', reshape_activations='none',
                   rescale_acts_by_decoder_norm=False,
                   metadata=dict(sae_lens_version='6.0.0',               # that of the format
                                 hook_name=f'blocks.{layer}.{hook}', context_size=config.block_size,
                                 input='RMS-normalised: x / sqrt(mean(x^2))', step=run.checkpoint['step']))
        (folder / 'cfg.json').write_text(json.dumps(cfg, indent=1), 'utf-8')
        header, data = {}, b'' # safetensors: length of the header, the header in JSON, the raw little-endian data
        for name, x in dict(W_enc=sae.W_enc.T, b_enc=sae.b_enc, W_dec=sae.W_dec, b_dec=sae.b_dec).items():
            raw = x.detach().float().cpu().numpy().astype('<f4').tobytes()
            header[name] = dict(dtype='F32', shape=x.shape, data_offsets=[len(data), len(data) + len(raw)])
            data += raw
        header = json.dumps(header).encode()
        header += b' ' * (-len(header) % 8)
        (folder / 'sae_weights.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + data)
        say(f'SAE of block {layer} -> {folder}')

# ----------------------------------------------------------------------------------------------------

def choose(c, by_layer, F):
    """Of {layer: SAE} those that --layer leaves, and --feature as [(layer, feature)]. ValueError: one sentence."""
    layers, features = list(by_layer), []
    blocks = ', '.join(map(str, layers))
    if c.layer not in (-1, *layers):
        raise ValueError(f"layer={c.layer} has no SAE; block {blocks} has one")
    for text in filter(None, map(str.strip, c.feature.split(','))):
        m = re.fullmatch(r'(?:L?(\d+)\.)?F?(\d+)', text, re.I)
        if not m:
            raise ValueError(f"feature={text!r} names no feature: write 2386 (with --layer=6) or L6.F2386")
        layer, f = int(m[1]) if m[1] else c.layer if c.layer != -1 else layers[0], int(m[2])
        if layer not in layers:
            raise ValueError(f"feature={text!r}: block {layer} has no SAE; block {blocks} has one")
        if f >= F:
            raise ValueError(f"feature={text!r} is out of range: block {layer} has features 0 to {F - 1}")
        features.append((layer, f))
    return [x for i, x in by_layer.items() if c.layer in (-1, i)], features

def look(c):
    """Does what the options ask for."""
    if c.export:
        return export(c)
    timelines = open_timeline(c.out_dir) if c.timeline or c.feature or c.html else {}
    if c.timeline and not timelines:
        raise ValueError(f"there are no snapshots in {c.out_dir}/features: train.py writes one at each eval")
    if c.timeline and not c.feature: # needs neither model nor scan
        chosen, _ = choose(c, timelines, 0)
        return show(timeline_view(t) for t in chosen)
    labels, texts = read_labels(c.probe) if c.probe else (None, None)
    prompt = prompt_text(c.prompt, c.prompt_file)
    index = open_index(c)
    some = next(iter(index.values()))
    chosen, features = choose(c, index, some.F)
    if c.timeline:
        return show(feature_timeline_view(some.names, timelines[i], f) for i, f in features)
    run = open_model(c) if prompt or c.probe or c.effect and features else None
    rows = read_prompt(run, prompt, c.top) if prompt else None
    effects = {(i, f): removal_effect(run, index[i], f, c.effect) for i, f in features if c.effect}
    if c.html and rows:
        features = sorted({(s.layer, f) for _, by_layer in rows for s in chosen for f, _ in by_layer[s.layer]})
    elif c.html and not features:
        if len(chosen) == len(index) and page_is_ready(c) and Path(c.html).resolve() != page_of(c).resolve():
            shutil.copyfile(page_of(c), c.html)
            return say(f"{page_of(c)} -> {c.html}, {page_of(c).stat().st_size / 1e6:.1f} MB")
        features = [(s.layer, f) for s in chosen for f in np.flatnonzero(s.count).tolist()]
    data = lambda i, f: feature_data(index[i], f, timelines.get(i), effects.get((i, f)))
    if c.html:
        write_html(c.html, index, features, data, c.examples, rows)
    elif rows:
        show(prompt_view(s, rows, c.top) for s in chosen)
    elif c.find:
        show(find_view(s, re.compile(c.find), c.rows) for s in chosen)
    elif c.probe:
        show(probe_view(s, run, labels, texts, c.rows, c.seed) for s in chosen)
    elif features:
        show(feature_view(index, data(i, f), c.examples) for i, f in features)
    else:
        show(overview(s, c.rows) for s in chosen)

def main(argv):
    run(look, SimpleNamespace(**configure(DEFAULTS, argv, problems)))

if __name__ == '__main__':
    main(sys.argv[1:])
