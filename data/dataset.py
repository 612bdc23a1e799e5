"""
The loader of every script, and the writer of every prepare.py. A data set is a folder data/<name>/:
    train.bin, val.bin   token ids, little-endian uint16 (uint32 where vocab_size > 65536)
    meta.json            vocab_size, tokenizer, dtype, source, eot; token counts and sha256 of files
    tokenizer.json       a tiktoken Encoding, where meta's "tokenizer" names it (else: "gpt2", ...)
Every document begins with the token `eot`, as in the FineWeb shards of modded-nanogpt.

Unlike nanoGPT's, a batch is a pure function of (seed, step, micro-batch): a resumed run, or one on
another number of ranks, sees the same. An epoch shows every window once.
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
# without these a meta.json is none
KEYS = 'vocab_size tokenizer dtype eot train_tokens val_tokens train_sha256 val_sha256'.split()

class Dataset(NamedTuple):
    train: np.ndarray # (train_tokens,) memory map
    val: np.ndarray   # (val_tokens,)
    meta: dict
    dir: Path

def data_dir(name_or_path):
    """The folder of a data set: "stdlib" is <repo>/data/stdlib, "./my/set" is taken as it is."""
    return Path(name_or_path) if '/' in str(name_or_path) else ROOT / name_or_path

def sha256(file):
    """Of a file, at about 1 GB/s; None if it is missing or empty."""
    if file.exists() and file.stat().st_size:
        return hashlib.sha256(np.memmap(file, mode='r')).hexdigest()

# ------------------------------------------------------------------------------------------ reading

def load_dataset(name_or_path, check_hash=False):
    """Opens a data set whose files belong together; anything else is a ValueError. The sha256 of
    train.bin, which takes a while, is compared only with check_hash."""
    path = data_dir(name_or_path)
    file = path / 'meta.json'
    if not file.exists():
        own = not (ROOT / path.name / 'prepare.py').exists()
        script = 'text/prepare.py YOUR_FILES' if own else f'{path.name}/prepare.py'
        raise ValueError(f"data set {str(name_or_path)!r} is not prepared ({file} is missing): run "
                         f"`python data/{script} --out={name_or_path}`, or name another with "
                         "--dataset=")
    try:
        meta = json.loads(file.read_bytes())
        assert all(key in meta for key in KEYS)
    except (ValueError, TypeError, AssertionError):
        raise ValueError(f"{file} is torn, or of another version: prepare it again") from None
    for name in ['val.bin', 'tokenizer.json'] + ['train.bin'] * check_hash:
        file = path / name
        if sha256(file) != meta.get(f'{file.stem}_sha256'): # None: the tokenizer is no file
            raise ValueError(f"{file} is missing or damaged (its sha256 is not the one in "
                             "meta.json): prepare it again")
    train = np.memmap(path / 'train.bin', meta['dtype'], 'r')
    val = np.memmap(path / 'val.bin', meta['dtype'], 'r')
    return Dataset(train, val, meta, path)

# ------------------------------------------------------------------------------------------ batches

def get_batch(tokens, block_size, batch_size, seed, step, micro, micros_per_step):
    """One micro-batch: x and y, (B, T) int64 on the CPU; y is x one token later. `micro` counts
    over all ranks and accumulation steps of a step. Raises ValueError for too few tokens."""
    n = windows_per_epoch(len(tokens), block_size)
    first = (step * micros_per_step + micro) * batch_size
    starts = [epoch_starts(seed, i // n, len(tokens), block_size)[i % n]
              for i in range(first, first + batch_size)]
    return gather(tokens, starts, block_size)

def windows_per_epoch(n_tokens, block_size):
    """How many windows make an epoch: all that fit, less one, which leaves room for the phase."""
    if n_tokens < block_size + 1:
        raise ValueError(f"{n_tokens:,} tokens are too few for block_size={block_size}, which "
                         f"needs {block_size + 1:,}: prepare more text or use a smaller one")
    return max(1, (n_tokens - block_size) // block_size)

@functools.lru_cache(maxsize=2) # two, because a batch can straddle two epochs
def epoch_starts(seed, epoch, n_tokens, block_size):
    """Where the windows of an epoch begin, in their order. The first one's place varies, or tokens
    at the start of a window would never be predicted from what stands before them."""
    n = windows_per_epoch(n_tokens, block_size)
    rng = np.random.default_rng((seed, epoch))
    phase = rng.integers(min(block_size, n_tokens - n * block_size))
    return phase + block_size * rng.permutation(n)

def eval_batches(tokens, block_size, batch_size, n_tokens):
    """Yields (x, y) as get_batch does: about n_tokens in fixed, evenly spaced, disjoint windows.
    All batches have batch_size rows, so that a model is compiled once; fewer are one alone."""
    windows_per_epoch(len(tokens), block_size) # for its error
    last = len(tokens) - 1 - block_size # the last place where a window can begin
    n = max(1, min(n_tokens, len(tokens) - 1) // block_size)
    if n > batch_size:
        n -= n % batch_size
    starts = [i * last // max(1, n - 1) for i in range(n)]
    for i in range(0, n, batch_size):
        yield gather(tokens, starts[i:i + batch_size], block_size)

def gather(tokens, starts, block_size):
    import torch # here: all else in this file works, and starts faster, without
    rows = np.stack([tokens[s:s + block_size + 1] for s in starts])
    rows = torch.from_numpy(rows.astype(np.int64)) # (B, T+1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

# --------------------------------------------------------------------------------------- tokenizers

def load_tokenizer(data):
    """The tiktoken.Encoding of a Dataset. Raises ValueError."""
    file = data.dir / data.meta['tokenizer']
    return decode_encoding(file.read_bytes()) if file.exists() else named_encoding(file.name)

def decode_encoding(raw):
    """The tiktoken.Encoding in the bytes or text of a tokenizer.json."""
    import tiktoken
    parts = json.loads(raw)
    ranks = {base64.b64decode(token): i for token, i in parts['mergeable_ranks'].items()}
    return tiktoken.Encoding(**parts | dict(mergeable_ranks=ranks))

def encode_encoding(enc):
    """A tiktoken Encoding as the bytes of a tokenizer.json."""
    ranks = {base64.b64encode(token).decode(): i for token, i in enc._mergeable_ranks.items()}
    return json.dumps(dict(name=enc.name, pat_str=enc._pat_str, mergeable_ranks=ranks,
                           special_tokens=enc._special_tokens), indent=0).encode()

def named_encoding(name):
    """tiktoken.get_encoding, with its many ways to fail made one ValueError."""
    import tiktoken
    try:
        return tiktoken.get_encoding(name)
    except Exception as e: # requests, TLS, disk: tiktoken documents none of them
        raise ValueError(f"tiktoken has no encoding {name!r} here ({type(e).__name__}): it is one "
                         f"of {', '.join(tiktoken.list_encoding_names())}, and needs network once, "
                         "or TIKTOKEN_CACHE_DIR") from None

def token_bytes(enc, vocab_size):
    """[bytes] that each id stands for, maybe half a character; b'' for padding and gaps."""
    pieces = {i: token for token, i in enc._mergeable_ranks.items()}
    pieces |= {i: name.encode() for name, i in enc._special_tokens.items()}
    return [pieces.get(i, b'') for i in range(vocab_size)]

# ------------------------------------------------------------------------------------------ writing

def write_texts(name_or_path, train, val, enc, source):
    """write_dataset of two lists of texts, encoded with <|endoftext|> before each of them."""
    meta = write_dataset(name_or_path, encode(train, enc), encode(val, enc), enc.n_vocab, enc,
                         source, enc.eot_token)
    print(f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,}")
    return meta

def encode(texts, enc):
    """Yields the token ids of each text, <|endoftext|> before them."""
    for i in range(0, len(texts), 64): # of data/text 8 MB at most
        for ids in enc.encode_ordinary_batch(texts[i:i + 64], num_threads=os.cpu_count()):
            yield [enc.eot_token] + ids

def write_dataset(name_or_path, train_iter, val_iter, vocab_size, tokenizer, source, eot):
    """Writes a data set, whole or not at all, and returns its meta. train_iter and val_iter yield
    arrays or lists of token ids; tokenizer is a tiktoken Encoding, or the name of one. Raises
    ValueError for ids outside the vocabulary and for a split without tokens."""
    out = data_dir(name_or_path)
    out.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype('<u2' if vocab_size <= 2**16 else '<u4')
    meta = dict(vocab_size=vocab_size, tokenizer=tokenizer, dtype=dtype.name, source=source,
                eot=eot)
    with tempfile.TemporaryDirectory(suffix='.tmp', dir=out) as temp:
        temp = Path(temp)
        for split, pieces in dict(train=train_iter, val=val_iter).items():
            with open(temp / f'{split}.bin', 'wb') as f:
                for ids in map(np.asarray, pieces):
                    # numpy would make a uint16 4464 of 70000
                    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                        raise ValueError(f"token ids must lie in 0..{vocab_size - 1}, not in "
                                         f"{ids.min()}..{ids.max()}")
                    f.write(ids.astype(dtype).tobytes())
                meta[f'{split}_tokens'] = f.tell() // dtype.itemsize
            if not meta[f'{split}_tokens']:
                raise ValueError(f"there are no tokens for {out / split}.bin: give more text")
        if not isinstance(tokenizer, str):
            (temp / 'tokenizer.json').write_bytes(encode_encoding(tokenizer))
            meta['tokenizer'] = 'tokenizer.json'
        (out / 'meta.json').unlink(missing_ok=True) # a kill from here on: "not prepared"
        for file in sorted(temp.iterdir()):
            meta[f'{file.stem}_sha256'] = sha256(file)
            os.replace(file, out / file.name)
    (out / 'meta.json').write_text(json.dumps(meta, indent=1))
    return meta
