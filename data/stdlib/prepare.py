"""
Makes data/stdlib: the standard library of the Python that runs this, as a corpus.

    python data/stdlib/prepare.py

says after ten seconds, with Python 3.11:
    620 + 51 documents
    train 2,514,657 tokens, val 269,363

The documents are the library's sources and the help topics of pydoc (`help("assignment")`). Left
out are tests and tables of literals, which teach a model little and swallow dozens of its features.
Every 13th document is for validation. On the others a byte-level BPE is trained.
"""
import hashlib
import re
import sys
import sysconfig
import tokenize
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository
from configurator import configure, run # noqa: E402
from data.dataset import write_texts # noqa: E402

# GPT-2's: contractions, words, numbers, punctuation (each with its leading space), white space
# (possessive, as tiktoken writes it: the same words, found faster)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# folders of no library code: tests, packages, character tables, how this Python was built
SKIP = re.compile(r'(^|/)(tests?|idle_test|(site|dist)-packages|encodings|config-[^/]*)/')
# a line that begins with a string or a number, brackets aside, but not with a docstring: tables
# (html/entities.py, locale.py, _sysconfigdata...) have 0.34 to 1.0 of them, code up to 0.28
LITERAL = re.compile(r"^[ \t]*[\[({]*(?!\"\"\"|''')['\"\d]", re.MULTILINE)

def documents():
    """Yields (name, text) of every document, in sorted order."""
    root = Path(sysconfig.get_path('stdlib'))
    for path in sorted(root.rglob('*.py')):
        name = path.relative_to(root).as_posix()
        if SKIP.search(name):
            continue
        try:
            with tokenize.open(path) as f: # honours a file's own `coding:` line
                text = f.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue # a template, or unreadable: no source
        if text and len(LITERAL.findall(text)) <= 0.3 * (text.count('\n') + 1):
            yield name, text
    with suppress(ImportError): # some distributions ship Python without it
        from pydoc_data.topics import topics
        for name in sorted(topics):
            yield f"help topic {name}", topics[name]

def is_val(name):
    """By name alone: a file stays on its side when others come or go with the next Python."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 13 == 0

def train_bpe(texts, vocab_size):
    """{token bytes: id}: the 256 bytes, then vocab_size - 256 merges of the most frequent pair, of
    equals the one with the lower ids. It works on distinct words, strings of chr(id) for each
    token, with their counts; a merge touches only the words that contain its pair."""
    import regex
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [word.encode().decode('latin-1') for word in counts] # bytes are the first 256 ids
    counts = list(counts.values())

    tokens = [bytes([i]) for i in range(256)]
    pair_count = Counter()
    where = defaultdict(set) # pair -> the words that have it, or once had it

    def count(w, sign):
        for pair in zip(words[w], words[w][1:]):
            pair_count[pair] += sign * counts[w]
            where[pair].add(w)

    for w in range(len(words)):
        count(w, 1)
    while len(tokens) < vocab_size:
        if len(tokens) % 64 == 0: # for speed: what occurs once is no pattern, nor will be
            pair_count = Counter({pair: n for pair, n in pair_count.items() if n > 1})
        most = max(pair_count.values())
        pair = min(pair for pair, n in pair_count.items() if n == most)
        new = chr(len(tokens)) # a new spelling: where an older ab+c was joined, no a+bc is left
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for w in where.pop(pair):
            count(w, -1)
            words[w] = words[w].replace(''.join(pair), new)
            count(w, 1)
    return {token: i for i, token in enumerate(tokens)}

def prepare(out='stdlib', vocab_size=4096):
    """Builds the data set and returns its meta."""
    import tiktoken
    train, val = [], []
    for name, text in documents():
        (val if is_val(name) else train).append(text)
    print(f"{len(train)} + {len(val)} documents")
    ranks = train_bpe(train, vocab_size - 1)
    enc = tiktoken.Encoding('stdlib', pat_str=PATTERN, mergeable_ranks=ranks,
                            special_tokens={'<|endoftext|>': len(ranks)})
    source = f"standard library of Python {sys.version.split()[0]}, without tests and tables"
    return write_texts(out, train, val, enc, source)

if __name__ == '__main__':
    run(prepare, **configure(dict(out='stdlib'), sys.argv[1:]))
