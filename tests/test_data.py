"""The data path: loader, writer, the BPE, and the three prepare scripts. Offline: tiktoken's own
encodings need network, so the tests build small ones."""
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

from data import dataset
from data.dataset import (eval_batches, get_batch, load_dataset, load_tokenizer, named_encoding,
                          token_bytes, windows_per_epoch, write_dataset)
from data.fineweb import prepare as fineweb
from data.stdlib import prepare as stdlib
from data.text import prepare as text
from runs import at_call, no_space, run_script

def make(path, tokenizer="gpt2"):
    return write_dataset(path, [np.arange(1000)], [np.arange(300)], 5000, tokenizer, "test", None)

def byte_encoding(*words, start=256):
    """An Encoding of the 256 bytes and some words, whose ids begin at `start`."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {word.encode(): start + i for i, word in enumerate(words)}
    return tiktoken.Encoding("test", pat_str=stdlib.PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": start + len(words)})

def documents(data, enc): # of train and of val
    splits = [enc.decode_bytes(tokens.tolist()).decode() for tokens in (data.train, data.val)]
    return [split.split("<|endoftext|>")[1:] for split in splits]

# ------------------------------------------------------------------------------------------ batches

def test_batch_is_a_pure_function():
    """The same arguments give the same batch in any order, and y is x one token later. `micro` is
    global: one batch of twice the size draws the same windows."""
    tokens = np.arange(5000, dtype=np.uint16)
    args = list(itertools.product((0, 1), range(10), (0, 1))) # seed, step, micro
    want = {a: get_batch(tokens, 16, 4, *a, 2)[0] for a in args}
    random.Random(0).shuffle(args)
    for seed, step, micro in args:
        dataset.epoch_starts.cache_clear()
        x, y = get_batch(tokens, 16, 4, seed, step, micro, 2)
        assert x.shape == y.shape == (4, 16) and str(x.dtype) == "torch.int64"
        assert (x == want[seed, step, micro]).all() and (y == x + 1).all()
        whole = get_batch(tokens, 16, 8, seed, step, 0, 1)[0]
        assert (x == whole[4 * micro:4 * micro + 4]).all()
    assert (want[0, 0, 0] != want[1, 0, 0]).any(), "the seed changes nothing"
    # as they always were: a run of an older version goes on with the batches it would have seen
    assert get_batch(np.arange(1000), 8, 3, 1337, 5, 1, 2)[0][:, 0].tolist() == [60, 868, 484]

@pytest.mark.parametrize("n", [17, 18, 32, 33, 47, 48, 1000, 1001])
def test_epoch_shows_every_window_once(n):
    """Disjoint, at one phase, which moves between epochs; also where these end within a batch."""
    tokens, block = np.arange(n, dtype=np.uint16), 16
    per_epoch = windows_per_epoch(n, block)
    assert per_epoch * block > n - 2 * block - 1, "windows are wasted"
    steps = 3 * per_epoch # of batch 3: 9 epochs
    rows = [row for s in range(steps) for row in get_batch(tokens, block, 3, 0, s, 0, 1)[0]]
    firsts = np.array([int(row[0]) for row in rows]).reshape(9, per_epoch)
    for epoch in np.sort(firsts):
        assert (np.diff(epoch) == block).all() and epoch[-1] + block < n
    assert n < 2 * block or len({epoch.min() % block for epoch in firsts}) > 1

@pytest.mark.parametrize("n,batch_size,n_tokens", [
    (1000, 4, 320), (1000, 4, 10**9), (40, 4, 320), (17, 4, 1), (1000, 1, 16)])
def test_eval_batches(n, batch_size, n_tokens):
    """Disjoint windows, from the first token to the last, in batches of one shape, or an error."""
    tokens = np.arange(n, dtype=np.uint16)
    batches = [x for x, y in eval_batches(tokens, 16, batch_size, n_tokens) if (y == x + 1).all()]
    starts = [int(row[0]) for x in batches for row in x]
    assert starts[0] == 0 and (np.diff(starts) >= 16).all()
    assert len(starts) * 16 <= max(16, min(n_tokens, n))
    assert len({x.shape for x in batches}) == 1
    assert len(starts) == 1 or starts[-1] == n - 17
    with pytest.raises(ValueError, match="16 tokens are too few for block_size=16, .* 17"):
        next(eval_batches(tokens[:16], 16, batch_size, n_tokens))

# ------------------------------------------------------------------------------ reading and writing

@pytest.mark.parametrize("vocab_size,dtype", [(65536, "uint16"), (65537, "uint32")])
def test_round_trip(tmp_path, vocab_size, dtype):
    """What is written is what is read, in pieces of any kind. Ids that do not fit are refused, and
    a split without tokens; then the older data set is still there."""
    top = vocab_size - 1
    pieces = [[1, 2], np.array([3], np.int64), [], np.array([4, top], np.uint32)]
    meta = write_dataset(tmp_path, iter(pieces), [[0, 9]], vocab_size, "gpt2", "test", eot=0)
    for bad in ([70000], [vocab_size], [-1], np.array([2**40])):
        with pytest.raises(ValueError, match=f"must lie in 0..{top}"):
            write_dataset(tmp_path, [[1], bad], [[0]], vocab_size, "gpt2", "", None)
    with pytest.raises(ValueError, match="no tokens for .*val.bin"): # nor could it be mapped
        write_dataset(tmp_path, [[1]], [], vocab_size, "gpt2", "", None)
    data = load_dataset(tmp_path, check_hash=True)
    assert data.train.tolist() == [1, 2, 3, 4, top] and data.val.tolist() == [0, 9]
    assert data.train.dtype == meta["dtype"] == dtype
    assert data.meta == meta and data.dir == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]

@pytest.mark.parametrize("damage,message", [
    (lambda p: (p / "meta.json").unlink(), "is not prepared .* run `python data/text/prepare.py"),
    (lambda p: (p / "train.bin").unlink(), "train.bin is missing or damaged"),
    (lambda p: (p / "train.bin").write_bytes(b"x"), "train.bin is .* damaged"),
    (lambda p: (p / "train.bin").write_bytes(b"\1" * 2000), "train.bin is .* damaged"),
    (lambda p: (p / "val.bin").write_bytes(b"\xff" * 600), "val.bin is .* damaged"),
    (lambda p: (p / "meta.json").write_text('{"vocab_si'), "meta.json is torn"),
    (lambda p: (p / "meta.json").write_text("[1]"), "meta.json is torn"),
    (lambda p: (p / "meta.json").write_text('{"eot": 1}'), "torn, or of another version"),
])
def test_what_does_not_fit_is_named(tmp_path, damage, message):
    """Every kind of missing, torn or mixed-up file is refused by name and in one sentence."""
    make(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as e:
        load_dataset(tmp_path, check_hash=True)
    assert "\n" not in str(e.value)

def test_where_a_data_set_is(monkeypatch):
    """A bare name is a folder of data/; all else is a path."""
    assert dataset.data_dir("stdlib") == dataset.ROOT / "stdlib"
    assert dataset.data_dir("./stdlib") == Path("stdlib")
    with pytest.raises(ValueError, match="data/text/prepare.py YOUR_FILES --out=/old/mine`"):
        load_dataset("/old/mine")
    monkeypatch.setattr(dataset, "data_dir", lambda name: Path("/no") / name)
    with pytest.raises(ValueError, match="`python data/stdlib/prepare.py --out=stdlib`"):
        load_dataset("stdlib")

def test_a_failed_write_leaves_the_old_set(tmp_path, monkeypatch):
    """A failure while tokens come leaves the old set as it was; one between the renames a set that
    counts as not prepared, never a mixture. No temporary file stays."""
    make(tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_dataset(tmp_path, ([1 // i] for i in (1, 0)), [[0]], 5000, "gpt2", "", None)
    assert len(load_dataset(tmp_path, check_hash=True).train) == 1000
    at_call("os.replace", 2, no_space, put=monkeypatch.setattr)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path)
    with pytest.raises(ValueError, match="not prepared"):
        load_dataset(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))

# --------------------------------------------------------------------------------------- tokenizers

def test_tokenizer_file(tmp_path):
    """An Encoding survives its tokenizer.json, gaps in its ids too; ids without bytes give b""."""
    enc, file = byte_encoding("the", " cat", start=300), tmp_path / "tokenizer.json"
    make(tmp_path, enc)
    again = load_tokenizer(load_dataset(tmp_path))
    assert again.encode("the cat sat") == enc.encode("the cat sat") and enc.encode("the") == [300]
    table = token_bytes(again, 310)
    assert table[65] == b"A" and table[299] == b"" and table[301] == b" cat"
    assert table[302] == b"<|endoftext|>" and table[303:] == [b""] * 7
    file.write_bytes(file.read_bytes().replace(b"301", b"308"))
    with pytest.raises(ValueError, match="tokenizer.json is missing or damaged"):
        load_dataset(tmp_path, check_hash=True)
    file.unlink()
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        load_dataset(tmp_path)
    with pytest.raises(ValueError, match="no encoding 'gpt5' here .ValueErr.*gpt2.*CACHE"):
        named_encoding("gpt5")

def naive_bpe(texts, n):
    """BPE as its definition has it: recount all pairs of all words after each merge."""
    words = [[bytes([b]) for b in word.encode()]
             for t in texts for word in regex.findall(stdlib.PATTERN, t)]
    ids = {bytes([i]): i for i in range(256)}
    while len(ids) < n:
        counts = Counter(p for w in words for p in zip(w, w[1:]))
        pair = min(counts, key=lambda p: (-counts[p], ids[p[0]], ids[p[1]]), default=None)
        if counts[pair] < 2:
            break
        ids[pair[0] + pair[1]] = len(ids)
        for w in words:
            for i in range(len(w)):
                if tuple(w[i:i + 2]) == pair:
                    w[i:i + 2] = [pair[0] + pair[1]]
    return ids

def test_bpe_equals_the_naive_one():
    """On prose, on runs of one letter (pairs overlap themselves), on random letters (ties)."""
    rng = random.Random(0)
    letters = ["".join(rng.choices("ab ", k=300)) for _ in range(6)]
    for texts, n in (([stdlib.__doc__, fineweb.__doc__], 380), (["a" * k for k in range(40)], 267),
                     (letters, 316)):
        assert list(stdlib.train_bpe(texts, n).items()) == list(naive_bpe(texts, n).items())

def test_stdlib(tmp_path, monkeypatch):
    """Help topics and sources are in, tests and tables are not; about a 13th is for validation.
    The first files end to end, with more than two bytes a token; made again they are the same."""
    found = dict(stdlib.documents())
    assert {"argparse.py", "json/decoder.py", "help topic assignment"} <= found.keys()
    assert not {"html/entities.py", "locale.py", "_compat_pickle.py"} & found.keys()
    skipped = "/test|site-packages|^(encodings|test|pydoc_data)/"
    assert not [name for name in found if re.search(skipped, name)]
    assert 0.04 < sum(map(stdlib.is_val, found)) / len(found) < 0.12
    first = dict(itertools.islice(found.items(), 60))
    monkeypatch.setattr(stdlib, "documents", first.items)
    meta = stdlib.prepare(tmp_path / "a", vocab_size=600)
    assert stdlib.prepare(tmp_path / "b", vocab_size=600) == meta
    data = load_dataset(tmp_path / "a", check_hash=True)
    enc = load_tokenizer(data)
    assert meta["vocab_size"] == 600 and meta["eot"] == enc.eot_token == 599
    train, val = documents(data, enc)
    assert val == [doc for name, doc in first.items() if stdlib.is_val(name)] and len(val) > 1
    assert sorted(train + val) == sorted(first.values())
    assert sum(len(doc.encode()) for doc in train) > 2 * len(data.train)

# ---------------------------------------------------------------------------------------- data/text

@pytest.fixture
def big_encoding(monkeypatch): # ids above 65535
    enc = byte_encoding("hello", " world", start=70_000)
    monkeypatch.setattr(text, "named_encoding", lambda name: enc)
    return enc

def test_text_end_to_end(tmp_path, big_encoding, capsys):
    """Files, a folder twice and a glob of all three kinds, a BOM and capitals in names among them:
    every document is in exactly one split, whole; ids above 65535 survive. A line <|endoftext|>
    alone begins a document, CRLF too."""
    deep = tmp_path / "in" / "deep"
    deep.mkdir(parents=True)
    (tmp_path / "in" / "A.TXT").write_bytes("\ufeffhello world, ärger\n".encode())
    (deep / "b.md").write_text("# hello\n<|endoftext|x>\n", encoding="utf-8")
    stories = [f"story {i} <|endoftext |>\n" for i in range(60)]
    ends = itertools.cycle(["<|endoftext|>\n", "<|endoftext|>\r\n", "<|endoftext|> \n"])
    crlf = "".join(end + story for end, story in zip(ends, stories)) + "<|endoftext|>"
    (deep / "c.txt").write_bytes(crlf.encode())
    (deep / "d.csv").write_text("1,2")
    (deep / "link").symlink_to(tmp_path, target_is_directory=True)
    lines = [json.dumps({"text": f"line {i} hello", "id": i}) for i in range(78)]
    (tmp_path / "d.jsonl").write_text("\n\n".join(lines) + '\n{"text": ""}\n')
    patterns = [tmp_path / "in", deep / ".." / "deep", tmp_path / "*.jsonl", tmp_path / "d.jsonl"]
    text.prepare(map(str, patterns), tmp_path / "out")
    data = load_dataset(tmp_path / "out", check_hash=True)
    train, val = documents(data, big_encoding)
    assert data.train.dtype == np.uint32 and data.train.max() >= 70_000
    assert load_tokenizer(data).encode("hello") == [70_000]
    want = ["hello world, ärger\n", "# hello\n<|endoftext|x>\n", *stories]
    assert sorted(train + val) == sorted(want + [f"line {i} hello" for i in range(78)])
    said = capsys.readouterr().out
    assert "4 files, 140 documents" in said

UNEVEN = ["x"] + [" hello" * 500] * 19

@pytest.mark.parametrize("files", [
    {"book.txt": ["".join(f"{i} hello world é\n" for i in range(2000))]},
    {"line.txt": ["hello " * 5000]},
    {"20.jsonl": UNEVEN},
    {f"{i:02}.txt": [part] for i, part in enumerate(UNEVEN)},
    {"a.jsonl": ["first\n", "é" * 900, " " * 60_000], "b.txt": ["€uro" * 600 + "\n" * 9000]},
])
def test_val_is_a_share_of_the_text(tmp_path, big_encoding, monkeypatch, files):
    """A 20th of the tokens; nothing is lost or doubled. Long documents are cut, at line ends."""
    monkeypatch.setattr(text, "LONGEST", 1001)
    for name, docs in files.items():
        lines = [json.dumps({"text": doc}) for doc in docs]
        raw = "\n".join(lines) if name.endswith("l") else docs[0]
        (tmp_path / name).write_text(raw, encoding="utf-8")
    text.prepare([f"{tmp_path}/*.*"], tmp_path / "out")
    data = load_dataset(tmp_path / "out", check_hash=True)
    assert 0.04 < len(data.val) / len(data.train) < 0.09
    parts = sum(documents(data, big_encoding), [])
    assert Counter("".join(parts)) == Counter("".join(sum(files.values(), [])))
    assert max(map(len, parts)) <= 1001 # in one go, a long run of spaces overflows tiktoken
    assert "book.txt" not in files or all(part.endswith("\n") for part in parts)

@pytest.mark.parametrize("name,raw,message", [
    ("a.txt", b"fine\n" * 100 + b"caf\xe9 au lait\n", "a.txt is not UTF-8: .* position 503"),
    ("a.txt", b"", "no tokens for .*train.bin: give more text"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', 'a.jsonl:3 is not a JSON object with a "text"'),
    ("a.jsonl", b'[{"text": "a"}]', "a.jsonl:1 is not .*; write each document as one line"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is not"),
    ("a.csv", b"1,2", "no .txt, .md, .jsonl file matches"),
])
def test_bad_text_is_named(tmp_path, big_encoding, name, raw, message):
    """What the user can mend is said in one sentence with its place, and nothing is left behind."""
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as e:
        text.prepare([str(tmp_path)], tmp_path / "out")
    assert "\n" not in str(e.value) and not list(tmp_path.glob("out/*"))

@pytest.mark.parametrize("name,argv,said", [
    ("stdlib", ["--vocab=9"], "error: unknown key 'vocab' on the command line"),
    ("text", [], "error: no text is named"),
    ("fineweb", ["--shards=0"], "error: --shards=0 should be from 1 to 103"),
])
def test_command_line_errors_are_one_sentence(name, argv, said):
    code, text = run_script(f"data/{name}/prepare.py", argv)
    assert code in (1, 2) and text.startswith(said) and text.count("\n") == 1

# ------------------------------------------------------------------------------------- data/fineweb

def shard(ids, magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids)
    return header.tobytes() + np.asarray(ids, "<u2").tobytes()

def test_fineweb(tmp_path, monkeypatch):
    """Shards become train.bin and val.bin. A server that sends what is no shard (cut, another
    version, a login page) ends the run in one sentence; the next run fetches only what is missing.
    The server is a folder here."""
    monkeypatch.setattr(fineweb, "named_encoding", lambda name: byte_encoding())
    folder, out, rng = tmp_path / "server", tmp_path / "out", np.random.default_rng(0)
    val, train1, train2 = (folder / f"fineweb_{name}.bin" for name in (
        "val_000000", "train_000001", "train_000002"))
    ids = {file: rng.integers(0, 50257, 4000) for file in (val, train1, train2)}
    folder.mkdir()
    val.write_bytes(shard(ids[val]))
    train1.write_bytes(shard(ids[train1]))
    for raw, reason in ((None, "No such file"), (b"<!DOCTYPE html>", "it has 15 bytes"),
                        (shard(ids[train2])[:3000], "it has 3,000 bytes"),
                        (shard([1, 2], magic=20240801), "begins with .20240801, 1, 2., not with")):
        if raw:
            train2.write_bytes(raw)
        with pytest.raises((ValueError, OSError), match=reason) as e:
            fineweb.prepare(out, 2, folder.as_uri())
        assert "\n" not in str(e.value) and not (out / "meta.json").exists()
        val.unlink(missing_ok=True)
    train2.write_bytes(shard(ids[train2]))
    train1.unlink()
    fineweb.prepare(out, 2, folder.as_uri())
    data = load_dataset(out, check_hash=True)
    assert (data.val == ids[val]).all()
    assert (data.train == np.concatenate([ids[train1], ids[train2]])).all()
    assert data.meta["vocab_size"] == 50257 and data.meta["eot"] == 50256
    assert not (out / "shards").exists()
