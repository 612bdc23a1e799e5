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
from data.dataset import named_encoding, write_texts # noqa: E402

SUFFIXES = ('.txt', '.md', '.jsonl')
BOUNDARY = re.compile(r'^<\|endoftext\|>[ \t\r]*(?:\n|\Z)', re.MULTILINE) # alone in its line
LONGEST = 2**17 # characters of a document; above 2^19 a long run of spaces overflows tiktoken

def find_files(patterns):
    """The text files that patterns name, each once, sorted. Raises ValueError."""
    if not patterns:
        raise ValueError("no text is named: give files or folders, and --out=NAME")
    files = set()
    for pattern in patterns:
        path = os.path.abspath(os.path.expanduser(pattern))
        named = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        hits = [hit for path in map(Path, named) for hit in (path, *path.rglob('*'))]
        texts = {hit for hit in hits if hit.is_file() and hit.suffix.lower() in SUFFIXES}
        if not texts:
            raise ValueError(f"no {', '.join(SUFFIXES)} file matches {pattern!r}")
        files |= texts
    return sorted(files)

def read(file):
    """Yields the documents of a file."""
    try:
        text = file.read_bytes().decode('utf-8-sig') # sig: Windows' mark of UTF-8
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8: convert it first ({e})") from None
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
    """The pieces of text, of at most `size` characters; they end at a line end if they can."""
    pattern = r'.{1,%d}\Z|.{0,%d}\n|.{1,%d}' % (size, size - 1, size) # the first that matches
    return re.findall(pattern, text, re.DOTALL)

def prepare(patterns, out, encoding='gpt2'):
    """Builds the data set and returns its meta. Raises ValueError or OSError, one sentence."""
    files = find_files(patterns)
    enc = named_encoding(encoding)
    documents = [text for file in files for text in read(file) if text]
    size = sum(map(len, documents))
    print(f"{len(files)} files, {len(documents):,} documents, {size:,} characters")
    train, val, owed = [], [], 0 # owed: 20 times the characters that val still needs
    for document in documents:
        for text in cut(document, max(1, min(LONGEST, size // 40))):
            split = val if owed >= 0 else train
            split.append(text)
            owed += len(text) - 20 * len(text) * (split is val)
    source = f"{len(files)} files of text, encoded with {encoding}"
    return write_texts(out, train, val, enc, source)

if __name__ == '__main__':
    patterns = [arg for arg in sys.argv[1:] if not arg.startswith('-')]
    options = [arg for arg in sys.argv[1:] if arg.startswith('-')]
    run(prepare, patterns, **configure(dict(out='mytext', encoding='gpt2'), options))
