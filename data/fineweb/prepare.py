"""
Makes data/fineweb: FineWeb-10B in GPT-2 tokens, from the shards that modded-nanogpt trains on
(Hugging Face data set kjj0/fineweb10B-gpt2). Nothing needs to be tokenised.

    python data/fineweb/prepare.py --shards=10     1.0 B training tokens, 2.2 GB to download

--out=NAME_OR_PATH makes another data set than data/fineweb, --url=... names a mirror. There are 103
training shards of 100 M tokens (0.2 GB). A run that was stopped goes on at the shard it had come
to. They are deleted once all their tokens are in train.bin, so there must be room for them twice.
"""
import shutil
import socket
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import configure, run # noqa: E402
from data.dataset import data_dir, named_encoding, write_dataset # noqa: E402

URL = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main'

def read_shard(path):
    """A shard's tokens (n,), after 256 int32: magic number, version 1, n. Or ValueError."""
    size, header = path.stat().st_size, np.fromfile(path, '<i4', 3).tolist()
    if header != [20240520, 1, (size - 1024) / 2]:
        raise ValueError(f"{path} is no whole shard: it has {size:,} bytes and begins with "
                         f"{header}, not with 20240520, 1, tokens: delete it, run this again")
    return np.memmap(path, '<u2', mode='r', offset=1024)

def prepare(out='fineweb', shards=10, url=URL):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    import torch # here: it takes seconds
    if not 1 <= shards <= 103:
        raise ValueError(f"--shards={shards} should be from 1 to 103")
    enc = named_encoding('gpt2') # kept in the data set, so that a GPU node needs no network
    folder, url = data_dir(out) / 'shards', url.rstrip('/')
    folder.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(60) # seconds: a connection that died is an error
    names = ['val_000000'] + [f'train_{i:06d}' for i in range(1, shards + 1)]
    val, *train = paths = [folder / f'fineweb_{name}.bin' for name in names]
    for i, path in enumerate(paths, 1):
        print(f"{path.name} ({i} of {len(paths)})", flush=True)
        if not path.exists():
            part = folder / 'part'
            torch.hub.download_url_to_file(f'{url}/{path.name}', part, progress=sys.stderr.isatty())
            read_shard(part) # for its error
            part.rename(path)
    source = f"{url}, {shards} of 103 shards"
    train, val = map(read_shard, train), [read_shard(val)]
    meta = write_dataset(out, train, val, 50257, enc, source, eot=50256)
    shutil.rmtree(folder)
    print(f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,}")
    return meta

if __name__ == '__main__':
    run(prepare, **configure(dict(out='fineweb', shards=10, url=URL), sys.argv[1:]))
