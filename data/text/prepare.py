"""
Makes a data set of your own text: .txt and .md files (UTF-8), and .jsonl files with one
{"text": ...} a line; name files, folders (searched through) or quoted globs.

    python data/text/prepare.py notes/ "books/*.txt" chat.jsonl --out=mytext
    python train.py config/sae_cpu.py --dataset=mytext

The default encoding is GPT-2's, which tiktoken fetches once; --encoding takes any other tiktoken
name. It is kept in the data set, so training needs no network. Memory is constant in the size of
the text: files are read in pieces, three times (to measure, for train.bin, for val.bin), and
encoded by all cores.

A document is a file, or a line of a .jsonl; in a text file a line <|endoftext|> begins the next
one. What is longer than a 40th of the whole is cut into several, at line ends, so that a single
book can be used too. Documents go to val.bin whenever it has less than a 20th of the text so far.
"""
import argparse
import functools
import glob
import itertools
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import run # noqa: E402
from data.dataset import SPLITS, data_dir, named_encoding, write_dataset # noqa: E402

SUFFIXES = ('.txt', '.md', '.jsonl')
BOUNDARY = re.compile(r'^<\|endoftext\|>[ \t\r]*(?:\n|\Z)', re.MULTILINE) # alone in its line
PIECE = 2**17 # characters; above 2^19 a long run of spaces overflows tiktoken

def find_files(patterns):
    """The text files that files, folders and globs name, each once, sorted; how many are others."""
    files, others = set(), set()
    for pattern in patterns:
        path = Path(os.path.expanduser(pattern))
        if path.is_dir():
            hits = path.rglob('*')
        elif path.exists():
            hits = [path]
        else:
            hits = map(Path, glob.glob(str(path), recursive=True))
        hits = {hit for hit in hits if hit.is_file()}
        texts = {hit for hit in hits if hit.suffix.lower() in SUFFIXES}
        if not texts:
            raise ValueError(f"no {', '.join(SUFFIXES)} file matches {pattern!r}")
        files |= texts
        others |= hits - texts
    return sorted(files), len(others)

def read_text(file):
    """Yields (whether a document begins, text) of a text file, in pieces of 2 * PIECE or less."""
    begins = True
    try:
        with open(file, encoding='utf-8-sig', newline='') as f: # sig: Windows' mark of UTF-8
            while block := f.read(PIECE) + f.readline(PIECE): # to a line end, if it is near
                for i, part in enumerate(BOUNDARY.split(block)):
                    begins = begins or i > 0
                    if part:
                        yield begins, part
                        begins = False
    except UnicodeDecodeError as e:
        around = e.object[max(0, e.start - 20):e.start + 20]
        raise ValueError(f"{file} is not UTF-8 in {around}: convert it first") from None

def read_jsonl(file):
    """Yields (True, text) of every line of a .jsonl file."""
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
                yield True, text

def read(file):
    return read_jsonl(file) if file.suffix.lower() == '.jsonl' else read_text(file)

def cut(text, size):
    """Yields text in pieces of at most `size` characters; they end at a line end if they can."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind('\n', start, end) + 1 or end
        yield text[start:end]
        start = end

def documents(files, longest):
    """Yields (split, whether a document begins, piece of it); a document ends at `longest`."""
    size, length = dict(train=0, val=0), 0 # of splits, and of this document, in characters
    for file in files:
        for begins, text in read(file):
            for piece in cut(text, min(longest, PIECE)):
                if begins or length + len(piece) > longest:
                    split = 'val' if 20 * size['val'] <= sum(size.values()) else 'train'
                    begins, length = True, 0
                yield split, begins, piece
                size[split] += len(piece)
                length += len(piece)
                begins = False

def encode(pieces, split, enc, advance):
    """Yields the token ids of one split in lists, <|endoftext|> before every document."""
    pieces = (piece for piece in pieces if piece[0] == split)
    while batch := list(itertools.islice(pieces, 64)): # 8 MB of text, at most
        texts = [text for _, _, text in batch]
        encoded = enc.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        for (_, begins, _), ids in zip(batch, encoded):
            yield [enc.eot_token] + ids if begins else ids
        advance(sum(map(len, texts)))

def prepare(patterns, out, encoding='gpt2'):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    from rich.progress import Progress
    files, others = find_files(patterns)
    enc = named_encoding(encoding)
    print(f"reading {len(files)} files")
    if others:
        print(f"{others} files are left out: they are none of {', '.join(SUFFIXES)}")
    size, lines = 0, 0
    for file in files:
        begun = 0
        for begins, text in read(file):
            size += len(text)
            begun += begins
        if file.suffix.lower() != '.jsonl':
            lines += max(0, begun - 1)
    if size == 0:
        raise ValueError(f"there is no text in the {len(files)} file(s) of {' '.join(patterns)}")
    if lines:
        print(f"{lines:,} lines of <|endoftext|> are taken as boundaries between documents")
    with Progress() as progress:
        task = progress.add_task("encoding", total=size)
        advance = functools.partial(progress.advance, task)
        longest = max(1, size // 40)
        train, val = (encode(documents(files, longest), split, enc, advance) for split in SPLITS)
        source = f"{len(files)} files of text, encoded with {encoding}"
        meta = write_dataset(out, train, val, enc.n_vocab, enc, source, enc.eot_token)
    n_train, n_val = meta['train_tokens'], meta['val_tokens']
    print(f"{size:,} characters, {size / (n_train + n_val):.2f} a token; "
          f"train {n_train:,} tokens, val {n_val:,}\nin {data_dir(out)}")
    return meta

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('patterns', nargs='+', metavar='FILE', help="file, folder or quoted glob")
    parser.add_argument('--out', default='mytext', help="name in data/, or a path (%(default)s)")
    parser.add_argument('--encoding', default='gpt2', help="tiktoken encoding (%(default)s)")
    args = parser.parse_args()
    run(prepare, args.patterns, args.out, args.encoding)
