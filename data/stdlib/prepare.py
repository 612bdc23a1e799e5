"""
Makes data/stdlib: the standard library of the Python that runs this, as a corpus.

    python data/stdlib/prepare.py

says after six seconds, with Python 3.11 (3.12 and 3.13 have 9.5 MB):
    620 + 51 documents, 10,161,169 bytes
    train 2,514,657 tokens, val 269,363

The documents are the library's sources and the help topics of pydoc (`help("assignment")`). Left
out are tests and tables of literals, which teach a model little and swallow dozens of its features.
Every 13th document is for validation. On the others a byte-level BPE is trained.
"""
import hashlib
import heapq
import re
import sys
import sysconfig
import tokenize
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import configure, run # noqa: E402
from data.dataset import write_dataset # noqa: E402

# GPT-2's: contractions, words, numbers, punctuation (each with its leading space), white space
# (possessive, as tiktoken writes it: the same words, found faster)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# folders that hold no library code, or character tables only (encodings)
SKIP = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', 'encodings'}
# a line that begins with a string or a number, brackets aside, but not with a docstring: tables
# (html/entities.py, locale.py, _sysconfigdata...) have 0.34 to 1.0 of them, code up to 0.28
LITERAL = re.compile(r"^[ \t]*[\[({]*(?!\"\"\"|''')['\"\d]", re.MULTILINE)

def documents():
    """Yields (name, text) of every document, in sorted order."""
    root = Path(sysconfig.get_path('stdlib'))
    for path in sorted(root.rglob('*.py')):
        folders = path.relative_to(root).parts[:-1]
        if SKIP.intersection(folders) or any(f.startswith('config-') for f in folders):
            continue # config-3.11-...: how this Python was built
        try:
            with tokenize.open(path) as f: # honours a file's own `coding:` line
                text = f.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue # a template, or unreadable: no source
        if text and len(LITERAL.findall(text)) <= 0.3 * (text.count('\n') + 1):
            yield path.relative_to(root).as_posix(), text
    with suppress(ImportError): # some distributions ship Python without it
        from pydoc_data.topics import topics
        for name in sorted(topics):
            yield f"help topic {name}", topics[name]

def is_val(name):
    """By name alone: a file stays on its side when others come or go with the next Python."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 13 == 0

def train_bpe(texts, vocab_size):
    """
    {token bytes: id}: the 256 bytes, then up to vocab_size - 256 merges of the most frequent pair,
    of equals the one with the lower ids. It works on distinct words, strings of chr(id) for each
    token, with their counts; a merge touches only the words that contain its pair.
    """
    import regex
    split = regex.compile(PATTERN)
    counts = Counter()
    for text in texts:
        counts.update(split.findall(text))
    words = [word.encode().decode('latin-1') for word in counts] # bytes are the first 256 ids
    counts = list(counts.values())

    tokens = [bytes([i]) for i in range(256)]
    pair_count = Counter()
    where = defaultdict(set) # pair -> the words that have it, or once had it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += counts[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)

    while len(tokens) < vocab_size and heap:
        n, pair = heapq.heappop(heap)
        if -n != pair_count[pair]: # counts only sink unseen: put it back with the true one
            heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        if -n < 2:
            break # what occurs once is no pattern
        new = chr(len(tokens)) # a new spelling: where an older ab+c was joined, no a+bc is left
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for w in where.pop(pair):
            word = words[w]
            for old in zip(word, word[1:]):
                pair_count[old] -= counts[w]
            words[w] = word = word.replace(''.join(pair), new)
            for now in zip(word, word[1:]):
                pair_count[now] += counts[w]
                if new in now:
                    where[now].add(w)
                    heapq.heappush(heap, (-pair_count[now], now))
    return {token: i for i, token in enumerate(tokens)}

def prepare(out='stdlib', vocab_size=4096):
    """Builds the data set and returns its meta."""
    import tiktoken
    train, val = [], []
    for name, text in documents():
        (val if is_val(name) else train).append(text)
    size = sum(len(text.encode()) for text in train + val)
    print(f"{len(train)} + {len(val)} documents, {size:,} bytes")
    ranks = train_bpe(train, vocab_size - 1)
    eot = len(ranks) # = vocab_size - 1 unless the corpus ran out of pairs
    enc = tiktoken.Encoding('stdlib', pat_str=PATTERN, mergeable_ranks=ranks,
                            special_tokens={'<|endoftext|>': eot})
    train, val = (([eot] + enc.encode_ordinary(text) for text in texts) for texts in (train, val))
    source = f"standard library of Python {sys.version.split()[0]}, without tests and tables"
    meta = write_dataset(out, train, val, eot + 1, enc, source, eot)
    print(f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,}")
    return meta

if __name__ == '__main__':
    configure({}, sys.argv[1:]) # which refuses whatever is there
    run(prepare)
