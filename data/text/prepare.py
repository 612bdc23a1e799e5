"""
Makes a data set of your own text: .txt and .md files (UTF-8), and .jsonl files with one {"text": ...} a line; name files,
folders (searched through) or quoted globs.

    python data/text/prepare.py notes/ "books/*.txt" chat.jsonl --out=data/mytext
    python train.py config/sae_cpu.py --dataset=mytext

The default encoding is GPT-2's, which tiktoken fetches once; --encoding takes any other tiktoken name. It is kept in the
data set, so training needs no network. Memory is constant in the size of the text: files are read in pieces, twice (once
for train.bin, once for val.bin), and encoded by all cores.

Every 20th document goes to val.bin, the first among them. A document is a file, or a line of a .jsonl; with fewer than 20
files and no .jsonl, it is a 40th of the text, cut at a line end, so that a single book can be used too.
"""
import argparse
import codecs
import glob
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import run # noqa: E402
from data.dataset import SPLITS, data_dir, named_encoding, write_dataset # noqa: E402

SUFFIXES = ('.txt', '.md', '.jsonl')
VAL_EVERY = 20
PIECE = 2**17 # characters, more or less; above 2^19 a long run of spaces overflows tiktoken

def find_files(patterns):
    """The files that files, folders and globs name, each once, sorted."""
    files = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file() and path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}: convert it first")
        hits = [path] if path.is_file() else path.rglob('*') if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
        hits = {p for p in hits if p.suffix in SUFFIXES and p.is_file()}
        if not hits:
            raise ValueError(f"no {', '.join(SUFFIXES)} file matches {pattern!r}")
        files |= hits
    return sorted(files)

def read_text(file, size):
    """Yields a text file in pieces of `size` bytes and up to the next line end, if it is near; and the bytes of each."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    with open(file, 'rb') as f:
        block = True
        while block:
            block = f.read(size) + f.readline(size)
            start = f.tell() - len(block) - len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise ValueError(f"{file} is not UTF-8 at byte {start + e.start:,} (0x{e.object[e.start]:02x}, {e.reason}): "
                                 "convert it first") from None
            if start == 0:
                text = text.removeprefix('\ufeff') # Windows' mark of UTF-8
            if text:
                yield text, len(block)

def read_jsonl(file):
    """Yields the "text" of every line of a .jsonl file, and the line's bytes."""
    with open(file, 'rb') as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode('utf-8-sig'))['text']
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{file}:{number} is not a JSON object with a "text": '
                                 f"{line[:60].decode('utf-8', 'replace').strip()!r}")
            if text:
                yield text, len(line)

def read_documents(files):
    """Yields (document number, piece of its text, bytes read); a long document has many pieces."""
    parts = len(files) < VAL_EVERY and not any(f.suffix == '.jsonl' for f in files)
    size = min(PIECE, max(1, sum(f.stat().st_size for f in files) // 40)) if parts else PIECE
    number = -1
    for file in files:
        if file.suffix == '.jsonl':
            for text, n in read_jsonl(file):
                number += 1
                for i in range(0, len(text), PIECE):
                    yield number, text[i:i + PIECE], n if i == 0 else 0
        else:
            for i, (text, n) in enumerate(read_text(file, size)):
                number += parts or i == 0
                yield number, text, n

def encode(files, enc, split, progress):
    """Yields the token ids of one split in lists, <|endoftext|> before every document."""
    task = progress.add_task(f"{split}.bin", total=sum(f.stat().st_size for f in files))
    pieces, last = read_documents(files), None
    while batch := list(itertools.islice(pieces, 64)): # 8 to 16 MB of text
        progress.advance(task, sum(n for _, _, n in batch))
        batch = [(number, text) for number, text, _ in batch if (number % VAL_EVERY == 0) == (split == 'val')]
        encoded = enc.encode_ordinary_batch([text for _, text in batch], num_threads=os.cpu_count())
        for (number, _), ids in zip(batch, encoded):
            yield ids if number == last else [enc.eot_token] + ids
            last = number

def prepare(patterns, out, encoding='gpt2'):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    files = find_files(patterns)
    enc = named_encoding(encoding)
    if next(read_documents(files), None) is None:
        raise ValueError(f"there is no text in the {len(files)} file(s) of {' '.join(patterns)}")
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        train, val = (encode(files, enc, split, progress) for split in SPLITS)
        meta = write_dataset(out, train, val, enc.n_vocab, enc, f"{len(files)} files of text, encoded with {encoding}", enc.eot_token)
    total, n_train, n_val = sum(f.stat().st_size for f in files), meta['train_tokens'], meta['val_tokens']
    print(f"{len(files)} files, {total:,} bytes, {total / (n_train + n_val):.2f} bytes a token; train {n_train:,} tokens, "
          f"val {n_val:,}, in {data_dir(out)}")
    return meta

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('patterns', nargs='+', metavar='FILE', help="file, folder or quoted glob")
    parser.add_argument('--out', default='data/mytext', help="folder of the data set (%(default)s)")
    parser.add_argument('--encoding', default='gpt2', help="tiktoken encoding (%(default)s)")
    args = parser.parse_args()
    run(prepare, args.patterns, args.out, args.encoding)
