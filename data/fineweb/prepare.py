"""
Makes data/fineweb: FineWeb-10B in GPT-2 tokens, from the shards that modded-nanogpt trains on
(Hugging Face data set kjj0/fineweb10B-gpt2). Nothing needs to be tokenised.

    python data/fineweb/prepare.py --shards=10     1.0 B training tokens, 2.2 GB to download

--out=NAME_OR_PATH makes another data set than data/fineweb, --url=... names a mirror of the shards.

There are 103 training shards of 100 M tokens (0.2 GB) and one for validation. A shard is a header
of 256 int32 (magic 20240520, version 1, number of tokens), then the tokens as uint16;
<|endoftext|> begins every document. A run that was stopped goes on at the shard it had come to.
Each shard is deleted once its tokens are in train.bin, so that the disk holds only one shard twice;
a crash in that last minute of copying costs the deleted ones a new download.
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
MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4
VOCAB_SIZE, EOT = 50257, 50256 # GPT-2's
WAITS = (0, 2, 20) # seconds before each try

def fetch(url, path):
    """Fetches a shard to path and returns its tokens (n,). Raises ValueError when it is no use."""
    import torch # here: it takes seconds
    socket.setdefaulttimeout(60)
    for wait in WAITS:
        time.sleep(wait)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
            return read_shard(path)
        except (OSError, http.client.HTTPException, ValueError) as e: # ValueError: no whole shard
            problem = e
    raise ValueError(f"{url} cannot be fetched ({problem}): a new run will go on from here")

def read_shard(path):
    """A shard's tokens (n,) as a memory map, once its header, length and ids are right."""
    size = path.stat().st_size
    header = np.fromfile(path, '<i4', 3)
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        problem = f"begins with {header[:2].tolist()}, not with magic {MAGIC}, version {VERSION}"
    elif header[2] < 1 or size != HEADER + 2 * int(header[2]):
        problem = f"has {size:,} bytes, but its header says {header[2]:,} tokens of 2 bytes"
    else:
        tokens = np.memmap(path, '<u2', mode='r', offset=HEADER)
        if tokens.max() < VOCAB_SIZE:
            return tokens
        problem = f"has token {tokens.max()}, beyond GPT-2's {VOCAB_SIZE - 1}"
    path.unlink() # or every later run would stop here
    raise ValueError(f"{path.name} is no GPT-2 shard, since it {problem}; deleted: run this again")

def pieces(paths):
    """Yields the shards' tokens, 16 M at a time, and deletes each shard once they are taken."""
    for path in paths:
        tokens = read_shard(path)
        for i in range(0, len(tokens), 2**24):
            yield tokens[i:i + 2**24]
        path.unlink()

def prepare(out='fineweb', shards=10, url=URL):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    if not 1 <= shards <= SHARDS:
        raise ValueError(f"--shards={shards} should be from 1 to {SHARDS}")
    folder, url = data_dir(out) / 'shards', url.rstrip('/')
    folder.mkdir(parents=True, exist_ok=True)
    names = ['val_000000'] + [f'train_{i:06d}' for i in range(1, shards + 1)]
    val, *train = paths = [folder / f'fineweb_{name}.bin' for name in names]
    for i, path in enumerate(paths, 1):
        tokens = read_shard(path) if path.exists() else fetch(f'{url}/{path.name}', path)
        print(f"{path.name}  {len(tokens):,} tokens ({i} of {len(paths)})")
    try: # kept in the data set, so that a GPU node needs no network
        tokenizer = named_encoding('gpt2')
    except ValueError as e:
        print(f"no tokenizer.json: {e}")
        tokenizer = 'gpt2'
    print(f"writing train.bin and val.bin to {data_dir(out)}")
    source = f"{url}, {shards} of {SHARDS} shards"
    meta = write_dataset(out, pieces(train), pieces([val]), VOCAB_SIZE, tokenizer, source, EOT)
    for partial in folder.glob('*.part*'): # of a download that was killed
        partial.unlink()
    if not any(folder.iterdir()): # there may be shards that were not asked for
        folder.rmdir()
    print(f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,}")
    return meta

if __name__ == '__main__':
    c = configure(dict(out='fineweb', shards=10, url=URL), sys.argv[1:])
    run(prepare, c['out'], c['shards'], c['url'])
