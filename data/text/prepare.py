"""
Makes a data set of your own text: .txt and .md files (UTF-8), and .jsonl files with one
{"text": ...} a line; name files, folders (searched through) or quoted globs.

    python data/text/prepare.py notes/ "books/*.txt" chat.jsonl --out=mytext
    python train.py config/sae_cpu.py --dataset=mytext

--out is a name in data/, or a path; --encoding=gpt2 may be any tiktoken name. A document is a file,
or a line of a .jsonl; in a text file a line <|endoftext|> begins the next one. Long ones are cut at
line ends, so that a book alone will do. val.bin gets a 20th of the text.
"""
import glob
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import configure, run # noqa: E402
from data.dataset import data_dir, named_encoding, write_dataset # noqa: E402

SUFFIXES = ('.txt', '.md', '.jsonl')
BOUNDARY = re.compile(r'^<\|endoftext\|>[ \t\r]*(?:\n|\Z)', re.MULTILINE) # alone in its line
LONGEST = 2**17 # characters of a document; above 2^19 a long run of spaces overflows tiktoken

def find_files(patterns):
    """The text files that patterns name, each once, sorted; how many other things are left out."""
    if not patterns:
        raise ValueError("no text is named: give files or folders, and --out=NAME")
    files, others = set(), set()
    for pattern in patterns:
        path = os.path.abspath(os.path.expanduser(pattern))
        named = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        hits = {hit for path in map(Path, named) for hit in (path, *path.rglob('*'))}
        texts = {hit for hit in hits if hit.is_file() and hit.suffix.lower() in SUFFIXES}
        if not texts:
            raise ValueError(f"no {', '.join(SUFFIXES)} file matches {pattern!r}")
        files |= texts
        others |= {hit for hit in hits - texts if hit.is_symlink() or not hit.is_dir()}
    return sorted(files), len(others)

def read(file):
    """Yields the documents of a file."""
    try:
        text = file.read_bytes().decode('utf-8-sig') # sig: Windows' mark of UTF-8
    except UnicodeDecodeError as e:
        around = e.object[max(0, e.start - 20):e.start + 20]
        raise ValueError(f"{file} is not UTF-8 in {around}: convert it first") from None
    if file.suffix.lower() != '.jsonl':
        yield from BOUNDARY.split(text)
        return
    for number, line in enumerate(text.split('\n'), 1):
        try:
            if line.strip():
                yield json.loads(line)['text'] + '' # only text can be added to text
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{file}:{number} is not a JSON object with a "text": {line[:60]!r}; '
                             'write each document as one line {"text": "..."}') from None

def cut(text, size):
    """Yields text in pieces of at most `size` characters; they end at a line end if they can."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind('\n', start, end) + 1 or end
        yield text[start:end]
        start = end

def encode(texts, name, enc):
    """Yields the token ids of each text, <|endoftext|> before them."""
    from rich.progress import track
    for i in track(range(0, len(texts), 64), description=f"encoding {name}"): # 8 MB at most
        for ids in enc.encode_ordinary_batch(texts[i:i + 64], num_threads=os.cpu_count()):
            yield [enc.eot_token] + ids

def prepare(patterns, out, encoding='gpt2'):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    files, others = find_files(patterns)
    enc = named_encoding(encoding)
    documents = [text for file in files for text in read(file) if text]
    size = sum(map(len, documents))
    print(f"{len(files)} files; {others} others left out (not {', '.join(SUFFIXES)})\n"
          f"{size:,} characters in {len(documents):,} documents (a line <|endoftext|> begins one)")
    texts, sizes = dict(train=[], val=[]), dict(train=0, val=0)
    for document in documents:
        for text in cut(document, max(1, min(LONGEST, size // 40))):
            split = 'val' if 20 * sizes['val'] <= sum(sizes.values()) else 'train'
            texts[split].append(text)
            sizes[split] += len(text)
    train, val = (encode(texts[split], split, enc) for split in sizes)
    source = f"{len(files)} files of text, encoded with {encoding}"
    meta = write_dataset(out, train, val, enc.n_vocab, enc, source, enc.eot_token)
    print(f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,}, in {data_dir(out)}")
    return meta

if __name__ == '__main__':
    patterns = [arg for arg in sys.argv[1:] if not arg.startswith('-')]
    options = [arg for arg in sys.argv[1:] if arg.startswith('-')]
    c = configure(dict(out='mytext', encoding='gpt2'), options)
    run(prepare, patterns, c['out'], c['encoding'])
