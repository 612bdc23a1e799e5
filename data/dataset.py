"""
The one loader, used by train.py, sample.py and inspect_features.py, and the one writer, used by every prepare.py.

A data set is a folder data/<name>/ with
    train.bin, val.bin   token ids, little-endian uint16 (uint32 where vocab_size > 65536)
    meta.json            vocab_size, tokenizer, dtype, token counts, sha256 of all, source, eot
    tokenizer.json       a tiktoken Encoding, where meta's "tokenizer" names it (else: "gpt2", ...)
Every document begins with the token `eot`, as in the FineWeb shards of modded-nanogpt.

What differs from nanoGPT: a batch is a pure function of (seed, step, micro-batch), so a resumed run, or one on another
number of ranks, sees the same batches, and an evaluation cannot disturb them; an epoch shows every window once; files
that do not fit their meta.json are refused, in one sentence and before training.
"""
import base64
import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent # the folder data/
SPLITS = ('train', 'val')

class Dataset(NamedTuple):
    train: np.ndarray # (train_tokens,) memory map
    val: np.ndarray   # (val_tokens,) memory map
    meta: dict        # meta.json
    dir: Path

# ----------------------------------------------------------------------------------------------------
# reading

def data_dir(name_or_path):
    """The folder of a data set: "stdlib" is <repo>/data/stdlib, "./my/set" is taken as it is."""
    name = os.fspath(name_or_path)
    return Path(name) if '/' in name or os.sep in name else ROOT / name

def load_dataset(name_or_path, check_hash=False):
    """
    Opens a data set whose files belong together; anything else is a ValueError, one sentence. Sizes are checked against
    meta.json, token ids against vocab_size (all of them up to 16 M tokens, a spread-out sample beyond), with check_hash
    every byte as well (about 1 GB/s).
    """
    path, meta, how = load_meta(name_or_path)
    if check_hash and meta['tokenizer'].endswith('.json'):
        read_tokenizer(path, meta) # or a run would end with features that nobody can read
    train, val = (read_tokens(path / f'{split}.bin', meta, split, check_hash, how) for split in SPLITS)
    return Dataset(train, val, meta, path)

def load_meta(name_or_path):
    """A data set's folder; meta.json as a dict whose values make sense together; and how to prepare it, for errors."""
    path = data_dir(name_or_path)
    file, ours = path / 'meta.json', ROOT / path.name
    how = f"run `python data/text/prepare.py YOUR_FILES --out={path}`"
    if path.resolve() == ours and (ours / 'prepare.py').exists():
        how = f"run `python data/{path.name}/prepare.py`"
    if not file.exists():
        raise ValueError(f"data set {str(name_or_path)!r} is not prepared ({file} is missing): {how}, or name another with --dataset=")
    try:
        meta = json.loads(file.read_bytes())
        vocab_size, eot = meta['vocab_size'], meta['eot']
        ok = (type(vocab_size) is int and 0 < vocab_size <= 2**32 and isinstance(meta['tokenizer'], str)
              and meta['dtype'] == token_dtype(vocab_size).name
              and (eot is None or type(eot) is int and 0 <= eot < vocab_size)
              and all(type(meta[f'{split}_tokens']) is int and isinstance(meta[f'{split}_sha256'], str) for split in SPLITS)
              and meta.get('meta_sha256') in (None, meta_digest(meta)))
    except (ValueError, KeyError, TypeError, RecursionError):
        ok = False
    if not ok:
        raise ValueError(f"{file} is torn, or is not the meta.json of a data set: {how} again")
    return path, meta, how

def meta_digest(meta):
    """sha256 of all else in meta.json: a flipped bit in vocab_size is still good JSON."""
    rest = {key: value for key, value in meta.items() if key != 'meta_sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

def read_tokens(file, meta, split, check_hash, how):
    """One split as a memory map."""
    n, dtype = meta[f'{split}_tokens'], token_dtype(meta['vocab_size'])
    if not file.exists():
        raise ValueError(f"{file} is missing, though its meta.json is there: {how} again")
    size = file.stat().st_size
    if size != n * dtype.itemsize or n < 1:
        raise ValueError(f"{file} has {size:,} bytes, but its meta.json says {n:,} tokens of {dtype.name}, "
                         f"{n * dtype.itemsize:,} bytes: {how} again")
    if check_hash:
        with open(file, 'rb') as f:
            if hashlib.file_digest(f, 'sha256').hexdigest() != meta[f'{split}_sha256']:
                raise ValueError(f"{file} is damaged (not the sha256 in its meta.json): {how} again")
    tokens = np.memmap(file, dtype=dtype, mode='r')
    # all of 16 M tokens take 10 ms; of more, look at 64 pieces from the first to the last token
    starts, size = ([0], n) if n <= 2**24 else (np.linspace(0, n - 2**18, 64, dtype=int), 2**18)
    top = max(int(tokens[start:start + size].max()) for start in starts)
    if top >= meta['vocab_size']:
        raise ValueError(f"{file} holds token id {top}, but the ids of its vocabulary end at {meta['vocab_size'] - 1} "
                         f"(meta.json): {how} again")
    return tokens

# ----------------------------------------------------------------------------------------------------
# batches

def get_batch(tokens, block_size, batch_size, seed, step, micro, micros_per_step):
    """
    One micro-batch: x and y, both (B, T) int64 on the CPU; y is x one token later. A pure function of its arguments.
    `micro` counts over all ranks and accumulation steps of an optimizer step, micros_per_step is how many there are:
    1 rank x 2 micro-steps sees what 2 ranks x 1 see. Raises ValueError where `tokens` is too short for one window.
    """
    n = windows_per_epoch(len(tokens), block_size)
    phases = min(block_size, len(tokens) - n * block_size)
    first = (step * micros_per_step + micro) * batch_size
    starts = []
    for index in range(first, first + batch_size):
        epoch, i = divmod(index, n)
        order, phase = epoch_order(seed, epoch, n, phases)
        starts.append(phase + int(order[i]) * block_size)
    return gather(tokens, starts, block_size)

def windows_per_epoch(n_tokens, block_size):
    """How many windows make an epoch: all that fit, less one, which leaves room for the phase."""
    if n_tokens < block_size + 1:
        raise ValueError(f"{n_tokens:,} tokens are too few for block_size={block_size}, which needs {block_size + 1:,}: "
                         "prepare more text or use a smaller one")
    return max(1, (n_tokens - block_size) // block_size)

@functools.lru_cache(maxsize=2) # two, because a batch can straddle two epochs
def epoch_order(seed, epoch, n, phases):
    """
    The order of an epoch's n windows, and where the first one begins. That phase differs from epoch to epoch: with
    fixed borders, the tokens at the start of a window would never be predicted from what stands before them.
    """
    rng = np.random.default_rng((seed, epoch))
    phase = int(rng.integers(phases))
    return rng.permutation(n), phase

def eval_batches(tokens, block_size, batch_size, n_tokens):
    """
    Yields (x, y) as get_batch does: about n_tokens in fixed, evenly spaced, disjoint windows. Every batch has batch_size
    rows, so that a compiled model meets one shape only; where the tokens fill less than one, a single smaller one comes.
    """
    windows_per_epoch(len(tokens), block_size) # for its error
    last = len(tokens) - 1 - block_size # the last place where a window can begin
    n = max(1, min(n_tokens, len(tokens) - 1) // block_size)
    n = n // batch_size * batch_size or n
    starts = [i * last // max(1, n - 1) for i in range(n)]
    for i in range(0, n, batch_size):
        yield gather(tokens, starts[i:i + batch_size], block_size)

def gather(tokens, starts, block_size):
    import torch # here: the viewer reads data sets, and starts faster without
    rows = np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64)
    rows = torch.from_numpy(rows) # (B, T+1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

# ----------------------------------------------------------------------------------------------------
# tokenizers: always a tiktoken Encoding, by its name or from a file beside the tokens

def read_tokenizer(folder, meta):
    """Path and bytes of a data set's tokenizer.json, once they have the sha256 in its meta.json."""
    file = Path(folder) / meta['tokenizer']
    try:
        raw = file.read_bytes()
    except (OSError, ValueError) as e: # ValueError: a zero byte in its name
        raise ValueError(f"{file} cannot be read ({getattr(e, 'strerror', e)}): prepare its data set again") from None
    if hashlib.sha256(raw).hexdigest() != meta.get('tokenizer_sha256'):
        raise ValueError(f"{file} is damaged (not the sha256 in its meta.json): prepare its data set again")
    return file, raw

def load_tokenizer(folder, meta):
    """The tiktoken.Encoding of the data set in `folder`. Raises ValueError, one sentence."""
    if not meta['tokenizer'].endswith('.json'):
        return named_encoding(meta['tokenizer'])
    import regex # tiktoken's own engine for patterns comes with it
    import tiktoken
    file, raw = read_tokenizer(folder, meta)
    try:
        d = json.loads(raw)
        ranks = {base64.b64decode(token): i for token, i in d['mergeable_ranks'].items()}
        ids = [*ranks.values(), *d['special_tokens'].values()]
        if (len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < meta['vocab_size']
                or b'' in ranks or not ranks.keys() >= {bytes([i]) for i in range(256)}
                or not all(m.group() for m in regex.finditer(d['pat_str'], "it's 1 é,\n\n  x"))):
            raise ValueError # tiktoken would panic, as an exception that nobody can catch
        return tiktoken.Encoding(d['name'], pat_str=d['pat_str'], mergeable_ranks=ranks, special_tokens=d['special_tokens'])
    except Exception as e: # json, base64, regex, tiktoken: of the last nothing is documented
        raise ValueError(f"{file} is no tiktoken Encoding of all bytes with ids below {meta['vocab_size']} "
                         f"({type(e).__name__}): prepare its data set again") from None

def encoding_to_json(enc):
    """A tiktoken Encoding as the bytes of a tokenizer.json."""
    ranks = {base64.b64encode(token).decode(): i for token, i in enc._mergeable_ranks.items()}
    return json.dumps(dict(name=enc.name, pat_str=enc._pat_str, mergeable_ranks=ranks, special_tokens=enc._special_tokens),
                      indent=0).encode()

def named_encoding(name):
    """tiktoken.get_encoding, with its many ways to fail made one sentence each."""
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"{name!r} is no tiktoken encoding; there are {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as e: # requests, TLS, disk: tiktoken documents none of them
        raise ValueError(f"the encoding {name!r} is not in tiktoken's cache and cannot be fetched ({type(e).__name__}): run "
                         "once with network, or set TIKTOKEN_CACHE_DIR to a folder filled elsewhere") from None

def token_bytes(enc, vocab_size):
    """
    A list of vocab_size bytes: what each id stands for, b'' for ids without (padding, gaps). A token may be half of a
    UTF-8 character, hence bytes. Special tokens give their names.
    """
    pieces = {i: token for token, i in enc._mergeable_ranks.items()}
    pieces |= {i: name.encode() for name, i in enc._special_tokens.items()}
    return [pieces.get(i, b'') for i in range(vocab_size)]

# ----------------------------------------------------------------------------------------------------
# writing

def token_dtype(vocab_size):
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')

def write_dataset(name_or_path, train_iter, val_iter, vocab_size, tokenizer, source, eot):
    """
    Writes a data set, whole or not at all, and returns its meta.
    train_iter, val_iter: yield arrays or lists of token ids; memory stays at one of them.
    tokenizer: a tiktoken Encoding, which is kept in the data set, so that no network is needed; or the name of one.
    All is written to a temporary folder first: a failure until then leaves an older data set as it was. Then its
    meta.json goes, the files are moved, and the new meta.json comes last: a kill in between leaves a folder that counts
    as not prepared. Raises ValueError for ids outside the vocabulary and for a split without tokens.
    """
    out, dtype = data_dir(name_or_path), token_dtype(vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    meta = dict(vocab_size=vocab_size, tokenizer=tokenizer if isinstance(tokenizer, str) else 'tokenizer.json',
                dtype=dtype.name, source=source, eot=eot)
    with tempfile.TemporaryDirectory(suffix='.tmp', dir=out) as temp:
        temp = Path(temp)
        for split, pieces in zip(SPLITS, (train_iter, val_iter)):
            size, digest = write(temp / f'{split}.bin', (to_bytes(ids, vocab_size, split) for ids in pieces))
            if size == 0:
                raise ValueError(f"there are no tokens for {out / split}.bin: give more documents")
            meta |= {f'{split}_tokens': size // dtype.itemsize, f'{split}_sha256': digest}
        if not isinstance(tokenizer, str):
            _, meta['tokenizer_sha256'] = write(temp / 'tokenizer.json', [encoding_to_json(tokenizer)])
        meta['meta_sha256'] = meta_digest(meta)
        write(temp / 'meta.json', [json.dumps(meta, indent=1).encode()])
        (out / 'meta.json').unlink(missing_ok=True)
        for file in sorted(temp.iterdir(), key=lambda file: file.name == 'meta.json'):
            os.replace(file, out / file.name)
    return meta

def write(file, pieces):
    """Writes the pieces down to the disk; returns (bytes, sha256)."""
    digest = hashlib.sha256()
    with open(file, 'wb') as f:
        for raw in pieces:
            f.write(raw)
            digest.update(raw)
        f.flush()
        os.fsync(f.fileno())
        return f.tell(), digest.hexdigest()

def to_bytes(ids, vocab_size, split):
    """Token ids as they stand in the file. Checked first: numpy makes a uint16 4464 of 70000."""
    ids = np.asarray(ids)
    if ids.size and (ids.dtype.kind not in 'iu' or ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"token ids for {split}.bin must be integers from 0 to {vocab_size - 1}, got {ids.dtype.name} "
                         f"from {ids.min()} to {ids.max()}")
    return ids.astype(token_dtype(vocab_size)).tobytes()
