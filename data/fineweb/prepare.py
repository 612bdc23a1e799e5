"""
Makes data/fineweb: FineWeb-10B in GPT-2 tokens, from the shards that modded-nanogpt trains on
(Hugging Face data set kjj0/fineweb10B-gpt2). Nothing needs to be tokenised.

    python data/fineweb/prepare.py --shards=10     1.0 B training tokens, 2.2 GB to download

--out=NAME_OR_PATH makes another data set than data/fineweb, --url=... names a mirror. There are 103
training shards of 100 M tokens (0.2 GB). A run that was stopped goes on at the shard it had come
to. Each is deleted once its tokens are in train.bin.
"""
import http.client
import socket
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import configure, run # noqa: E402
from data.dataset import data_dir, named_encoding, write_dataset # noqa: E402

URL = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main'
SHARDS = 103

def fetch(url, path):
    """Fetches a shard to path and returns its tokens (n,). Raises ValueError when it is no use."""
    import torch # here: it takes seconds
    socket.setdefaulttimeout(60)
    for wait in (0, 2, 20): # seconds before each try
        time.sleep(wait)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
            return read_shard(path)
        except (OSError, http.client.HTTPException, ValueError) as e: # ValueError: no whole shard
            problem = e
    raise ValueError(f"{url} cannot be fetched ({problem}): a new run will go on from here")

def read_shard(path):
    """A shard's tokens (n,), after 256 int32: magic number, version 1, n. Or ValueError."""
    size, header = path.stat().st_size, np.fromfile(path, '<i4', 3).tolist()
    if header != [20240520, 1, (size - 1024) / 2]:
        path.unlink() # or every later run would stop here
        raise ValueError(f"{path.name} is no whole shard: it has {size:,} bytes and begins with "
                         f"{header}, not with 20240520, 1, tokens; deleted: run this again")
    return np.memmap(path, '<u2', mode='r', offset=1024)

def pieces(paths):
    """Yields the shards' tokens, and deletes each shard once they are taken."""
    for path in paths:
        yield read_shard(path)
        path.unlink()

def prepare(out='fineweb', shards=10, url=URL):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    if not 1 <= shards <= SHARDS:
        raise ValueError(f"--shards={shards} should be from 1 to {SHARDS}")
    enc = named_encoding('gpt2') # kept in the data set, so that a GPU node needs no network
    folder, url = data_dir(out) / 'shards', url.rstrip('/')
    folder.mkdir(parents=True, exist_ok=True)
    names = ['val_000000'] + [f'train_{i:06d}' for i in range(1, shards + 1)]
    val, *train = paths = [folder / f'fineweb_{name}.bin' for name in names]
    for i, path in enumerate(paths, 1):
        tokens = read_shard(path) if path.exists() else fetch(f'{url}/{path.name}', path)
        print(f"{path.name}  {len(tokens):,} tokens ({i} of {len(paths)})")
    source = f"{url}, {shards} of {SHARDS} shards"
    meta = write_dataset(out, pieces(train), pieces([val]), 50257, enc, source, eot=50256)
    if not any(folder.iterdir()): # there may be shards that were not asked for
        folder.rmdir()
    print(f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,}")
    return meta

if __name__ == '__main__':
    c = configure(dict(out='fineweb', shards=10, url=URL), sys.argv[1:])
    run(prepare, c['out'], c['shards'], c['url'])
