"""
Makes data/fineweb: FineWeb-10B in GPT-2 tokens, from the shards that modded-nanogpt trains on (Hugging Face data set
kjj0/fineweb10B-gpt2). Nothing needs to be tokenised.

    python data/fineweb/prepare.py --shards=10     1.0 B training tokens, 2.2 GB to download

There are 103 training shards of 100 M tokens (0.2 GB) and one for validation. A shard is a header of 256 int32 (magic
20240520, version 1, number of tokens), then the tokens as uint16; <|endoftext|> begins every document. A broken download
goes on where it stopped, in this run or the next. Each shard is deleted once its tokens are in train.bin, so that the disk
holds only one shard twice; a crash in that last minute of copying costs the deleted ones a new download.
"""
import argparse
import http.client
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import run # noqa: E402
from data.dataset import data_dir, named_encoding, write_dataset # noqa: E402

URL = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main'
SHARDS = 103
MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4
VOCAB_SIZE, EOT = 50257, 50256 # GPT-2's
# not every OSError: a full disk is no reason to try again
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
TRIES, WAIT = 5, 2.0 # a broken download is tried so often without progress, after so many seconds

def download(url, path, report):
    """
    Fetches url to path by way of path.part, which a later call goes on with. report(bytes so far, bytes in all) shows
    progress. Raises ValueError when it is no use.
    """
    part, tries = path.with_name(path.name + '.part'), 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
        total, error = None, "the connection broke off"
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                start = have if response.status == 206 else 0 # 200: this server knows no ranges
                total = start + int(response.headers.get('Content-Length', -1))
                with open(part, 'ab' if start else 'wb') as f:
                    while chunk := response.read(2**20):
                        f.write(chunk)
                        report(f.tell(), total)
        except urllib.error.HTTPError as e:
            if e.code == 416 and e.headers.get('Content-Range') == f'bytes */{have}':
                total = have # nothing is left to fetch
            elif e.code == 416:
                part.unlink() # longer than the file: of another one
            elif e.code < 500 and e.code != 429:
                raise ValueError(f"{url} cannot be fetched: {e.code} {e.reason}") from None
            error = f"{e.code} {e.reason}"
        except BROKEN as e:
            error = getattr(e, 'reason', None) or e
        # http.client reports a connection that ends early as the end of the file
        now = part.stat().st_size if part.exists() else 0
        if now == total:
            return part.replace(path)
        tries = 1 if now > have else tries + 1
        if tries > TRIES:
            raise ValueError(f"{url} cannot be fetched ({error}): run this again to go on from byte {now:,}")
        time.sleep(WAIT)

def read_shard(path):
    """A shard's tokens (n,) as a memory map, once its header, length and ids are right."""
    size = path.stat().st_size
    header = np.fromfile(path, '<i4', 3)
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        problem = f"it begins with {header[:2].tolist()}, not with magic {MAGIC}, version {VERSION}"
    elif header[2] < 1 or size != HEADER + 2 * int(header[2]):
        problem = f"it has {size:,} bytes, but its header says {header[2]:,} tokens of 2 bytes"
    else:
        tokens = np.memmap(path, '<u2', mode='r', offset=HEADER)
        if tokens.max() < VOCAB_SIZE:
            return tokens
        problem = f"it has token {tokens.max()}, beyond GPT-2's {VOCAB_SIZE - 1}"
    path.unlink() # or every later run would stop here
    raise ValueError(f"{path} is no GPT-2 shard ({problem}): deleted, run this again")

def pieces(paths):
    """Yields the shards' tokens, 16 M at a time, and deletes each shard once they are taken."""
    for path in paths:
        tokens = read_shard(path)
        for i in range(0, len(tokens), 2**24):
            yield tokens[i:i + 2**24]
        path.unlink()

def prepare(out='fineweb', shards=10, url=URL):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    if not 1 <= shards <= SHARDS:
        raise ValueError(f"--shards={shards} should be from 1 to {SHARDS}")
    out, url = data_dir(out), url.rstrip('/')
    folder = out / 'shards'
    folder.mkdir(parents=True, exist_ok=True)
    val, *train = paths = [folder / f'fineweb_{"train" if i else "val"}_{i:06d}.bin' for i in range(shards + 1)]
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as progress:
        for i, path in enumerate(paths):
            task = progress.add_task(f"{path.name} ({i + 1} of {shards + 1})", total=None)
            if not path.exists():
                download(f'{url}/{path.name}', path, lambda done, total: progress.update(task, completed=done, total=total))
            tokens = read_shard(path)
            progress.remove_task(task)
            progress.console.print(f"{path.name}  {len(tokens):,} tokens")
    try: # kept in the data set, so that a GPU node needs no network
        tokenizer = named_encoding('gpt2')
    except ValueError as e:
        print(f"no tokenizer.json: {e}")
        tokenizer = 'gpt2'
    print(f"writing train.bin and val.bin to {out}")
    meta = write_dataset(out, pieces(train), pieces([val]), VOCAB_SIZE, tokenizer, f"{url}, {shards} of {SHARDS} shards", EOT)
    folder.rmdir()
    print(f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,}")
    return meta

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=int, default=10, help="of 103 to train on (%(default)s)")
    parser.add_argument('--out', default='fineweb', help="folder of the data set (data/fineweb)")
    parser.add_argument('--url', default=URL, help="where the shards are (a mirror)")
    args = parser.parse_args()
    run(prepare, args.out, args.shards, args.url)
