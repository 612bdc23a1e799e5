"""features.py by brute force, from nothing but what a tiny random model returns. Offline."""
import copy
import functools
import itertools
import json
import math
import re
import shutil
import unicodedata
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from torch.nn.functional import cross_entropy

import explain
import features
import measures
import scanning
from data.dataset import encode_encoding, eval_batches, write_dataset
from model import GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint
from runs import no_space
from sae import SITES
from sample import set_steering

# a vocabulary that means harm: every byte, markup, escape codes, halves of characters, wide,
# invisible, right-to-left
HOSTILE = [b'[red]', b'[/x]', b'[bold', b'\x1b[31m', b'\x1b]0;x\x07', '漢字'.encode(), '🎉'.encode(),
           '\u202e'.encode(), '\u200b'.encode(), '\u0301'.encode(), 'é'.encode(), b'\xe6\xbc',
           b'</script>', b'<!--', b'        ', b'\r\n', b'-' * 90, '\u2028'.encode(),
           '\ufeff'.encode(), '\x85'.encode(), b'\xed\xa0\x80', '\U000e0001'.encode()]
EOT = 256 + len(HOSTILE)
V, T, STEP = EOT + 1, 32, 7

def make_model(seed=0, **config):
    """A random GPT with SAEs in blocks 1 and 2, their feature 5 dead."""
    torch.manual_seed(seed)
    defaults = dict(block_size=T, vocab_size=V, n_layer=3, n_head=2, n_embd=16, sae_layers=(1, 2),
                    sae_ratio=3, sae_k=4, sae_cap=0)
    model = GPT(GPTConfig(**defaults | config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) # projections begin at zero: stir
        for i, sae in model.saes().items():
            sae.b_enc[5] = -1e4
            sae.b_enc -= 1.2 * (i == 2) # there some tokens have fewer than K
    return model

def make_run(folder, seed=0, **config):
    """A random data set, and what train.py leaves in out_dir of make_model. Returns out_dir."""
    out = folder / 'out'
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    ranks = {bytes([i]): i for i in range(256)} | {t: 256 + i for i, t in enumerate(HOSTILE)}
    enc = tiktoken.Encoding('bytes', pat_str=r'\s+|\S+', mergeable_ranks=ranks,
                            special_tokens={'<|endoftext|>': EOT})
    frequent = rng.choice([10, 32, 97, 98, 99, 256, 257, EOT], 4000) # features fire often on some
    val = np.where(rng.random(4000) < 0.6, frequent, rng.integers(0, V, 4000))
    meta = write_dataset(folder / 'data', [val[:500]], [val], V, enc, 'random', EOT)
    model = make_model(seed, **config)
    tokenizer = dict(meta=dict(tokenizer='tokenizer.json', eot=EOT, vocab_size=V),
                     json=encode_encoding(enc).decode())
    save_checkpoint(out, dict(model=model.state_dict(), model_args=asdict(model.config), step=STEP,
                              dataset=str(folder / 'data'), data_sha256=meta['train_sha256'],
                              config={}, tokenizer=tokenizer))
    return out

def change(out, **changes):
    """Puts other values into a run's checkpoint."""
    save_checkpoint(out, load_checkpoint(out) | changes)

def open_index(out, n_tokens=0, dataset=''):
    return scanning.open_index(str(out), dataset, 'cpu', n_tokens)

def open_aloud(capsys, out, *args):
    """What is said at the opening of an index, and the scan of block 1."""
    index = open_index(out, *args)
    return capsys.readouterr().err, index[1]

def refused(capsys, script, out, *argv):
    """The one sentence with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as e:
        script.main([f'--out_dir={out}', *argv])
    said = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
    assert e.value.code not in (0, None) and said.startswith('error: ') and '\n' not in said
    return said

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('run'))

@pytest.fixture(scope='module')
def index(out):
    return open_index(out)

@torch.no_grad()
def steered(model, tokens, off=(), scale=0.0):
    """Logits (T, V) and codes (S, T, F) of the whole model, with the features [(block, f)] off."""
    set_steering(model, [(layer, f, scale, 0.0) for layer, f in off])
    logits, _, seen = model(torch.tensor([tokens]))
    set_steering(model, [])
    return logits[0], features.dense(seen.values, seen.indices, model.config.n_features)[:, 0]

@torch.no_grad()
def brute(out, n_tokens):
    """Windows of tokens (n, T), {layer: codes (F, n, T)}, and the model."""
    checkpoint = load_checkpoint(out)
    model = load_model(checkpoint)
    val = np.fromfile(Path(checkpoint['dataset']) / 'val.bin', '<u2')
    windows = torch.cat([x for x, _ in eval_batches(val, T, 1, n_tokens)])
    seen = model(windows)[2]
    codes = features.dense(seen.values, seen.indices, model.config.n_features)
    return windows.numpy(), dict(zip(model.saes(), codes.double().movedim(-1, 1).numpy())), model

@pytest.fixture(scope='module')
def truth(out, index):
    return brute(out, index[1].N)

# ----------------------------------------------------------------------------------------- the scan

def check_scan(index, windows, codes):
    """Every statistic and every context of every feature."""
    for layer in codes:
        scan, order = index[layer], []
        assert (scan.N, scan.T) == (windows.size, T)
        for f, z in enumerate(codes[layer]):
            d, signed = scanning.feature_numbers(scan, f, 0), z[z != 0]
            n, a = len(signed), abs(signed)
            assert scan.count[f] == d['count'] == n and d['density'] == n / scan.N
            if not n:
                assert math.isnan(scan.entropy[f]) and scan.rank[f] == 0
                assert not d['top'] + d['random'] + d['intervals']
                continue
            types = Counter(windows[z != 0].tolist())
            p = np.array(list(types.values())) / n
            order.append((scan.entropy[f], -n, f))
            assert d['entropy'] == scan.entropy[f] == pytest.approx(p @ np.log2(1 / p), abs=1e-5)
            assert scan.max[f] == d['max'] == pytest.approx(a.max(), rel=1e-5)
            assert d['mean'] == pytest.approx(signed.mean(), rel=1e-4, abs=1e-4 * a.mean())
            counts = [round(share * n) for _, share in d['fires_on']]
            assert counts == [times for _, times in types.most_common(8)]
            assert counts == [types[token] for token, _ in d['fires_on']]
            hist = np.histogram(a, scanning.BINS, (0, a.max()))[0]
            assert np.abs(hist - d['hist']).sum() <= 2 # rounding may move one across an edge
            check_contexts(d, windows, z)
        assert [scan.rank[f] for _, _, f in sorted(order)] == list(range(1, len(order) + 1))

def check_contexts(d, windows, z):
    eligible, size = np.where(windows == EOT, 0, abs(z)), lambda c: abs(c['acts'][c['peak']])
    eligible[:, [0, -1]] = 0
    best = eligible.max(1)
    want = np.sort(best[best > 0])[::-1][:scanning.TOP]
    assert sum(c['times'] for c in d['top']) == len(want)
    assert sum(c['times'] for c in d['random']) == min(scanning.RANDOM, (best > 0).sum())
    if len(d['top']) == len(want): # none is folded
        assert list(map(size, d['top'])) == pytest.approx(want, rel=1e-4)
    for some in (d['top'], d['random']):
        assert len({c['where'] // T for c in some}) == len(some) # one a window
    a, drawn = abs(z[z != 0]), []
    assert sum(share for _, _, share, _ in d['intervals']) == pytest.approx(1)
    for low, high, share, c in d['intervals']:
        end = high if high < a.max() * 0.999 else np.inf     # the largest is in the last one
        assert share == pytest.approx(np.mean((low <= a) & (a < end)), abs=1.01 / len(a))
        inside = eligible[eligible > 0]
        assert c or ((low <= inside) & (inside < end)).sum() <= 1            # rounded, maybe
        if c:
            drawn.append(c)
            assert low * 0.999 <= size(c) <= high * 1.001
    for c in d['top'] + d['random'] + drawn: # the text and the activations around each peak
        w, t = divmod(c['where'], T)
        around = range(max(0, t - scanning.SIDE), min(T, t + scanning.SIDE + 1))
        assert eligible[w, t] and c['peak'] == t - around[0]
        assert c['tokens'] == windows[w, around].tolist()
        assert c['acts'] == pytest.approx(z[w, around], rel=1e-3, abs=1e-5)

@pytest.mark.parametrize('site', SITES)
def test_scan_and_snapshot_by_brute_force(site, tmp_path):
    """At every site; the snapshot of the same windows agrees."""
    out = make_run(tmp_path, seed=1, sae_site=site)
    index = open_index(out, 40 * T)
    windows, codes, model = brute(out, 40 * T)
    check_scan(index, windows, codes)
    got = features.snapshot(model, torch.from_numpy(windows).split(7))
    assert got['probed'] == windows.size and got['layers'] == [1, 2]
    for layer, scan in index.items():
        for name in ('count', 'entropy', 'top_tokens', 'top_counts'):
            np.testing.assert_array_equal(got[f'L{layer}.{name}'], getattr(scan, name))
        mean = codes[layer].sum((1, 2)) / np.maximum(1, scan.count)
        np.testing.assert_allclose(got[f'L{layer}.mean'], mean, rtol=1e-4, atol=1e-5)
        written = model.writes(layer).detach().half()
        np.testing.assert_array_equal(got[f'L{layer}.W_dec'], written)

def test_dense_by_hand():
    """Slots that are not active change nothing, whichever feature they name."""
    values, indices = torch.tensor([[2.0, 0.0], [3.0, 1.0]]), torch.tensor([[1, 1], [2, 0]])
    assert features.dense(values, indices, 4).tolist() == [[0, 2, 0, 0], [1, 0, 3, 0]]

def test_random_contexts_are_a_fair_draw(index):
    """Windows are drawn about equally often; a seed fixes the draw."""
    f = np.argmin(np.abs(index[1].count - 40))
    drawn = lambda seed: [c['where'] for c in scanning.feature_numbers(index[1], f, seed)['random']]
    assert drawn(0) == drawn(0) != drawn(1)
    seen = Counter(where // T for seed in range(200) for where in drawn(seed))
    assert len(seen) > 20 and max(seen.values()) < 4 * min(seen.values())

def test_equal_texts_are_folded():
    """Two windows with the same text around the peak are one context, of two times."""
    scan = SimpleNamespace(T=4, tokens=np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 7, 3, 4]),
                           features=np.full((12, 1), 5), values=np.ones((12, 1)))
    for n, want in ((9, [(2, 2), (10, 1)]), (2, [(2, 2)])):  # n windows, not texts
        found = scanning.contexts(scan, 5, np.array([2, 6, 10]), n)
        assert [(c['where'], c['times']) for c in found] == want

def test_logits_and_neighbours(index, truth):
    _, codes, model = truth
    wte = model.transformer.wte.weight[:V].detach().double().numpy()
    for layer in codes:
        W = model.writes(layer).detach().double().numpy()
        unit = W / np.linalg.norm(W, axis=1, keepdims=True)
        on = codes[layer].reshape(len(W), -1) != 0
        for f in range(len(W)):
            d = scanning.feature_numbers(index[layer], f, 0)
            both = (on[f] & on).sum(1) / np.maximum(1, (on[f] | on).sum(1))
            for name, want, n in (('up', wte @ W[f], 10), ('down', -wte @ W[f], 10),
                                  ('near', unit @ unit[f], 5), ('joint', both, 5)):
                if name in ('near', 'joint'):
                    want[f] = -2                             # itself is not among them
                got = np.array([v for _, v in d[name]]) * (-1 if name == 'down' else 1)
                assert got == pytest.approx(np.sort(want)[::-1][:n], rel=1e-4)
                assert got == pytest.approx(want[[i for i, _ in d[name]]], rel=1e-4)
            assert len({g for g, _ in d['joint']}) == 5

@torch.no_grad()
def test_removal_effect(index, truth):
    """Against a model whose W_dec row is 0, which writes the same as a code of 0."""
    windows, codes, model = truth
    f = np.abs((codes[1] != 0).sum((1, 2)) - 100).argmin()
    without, x = copy.deepcopy(model), torch.from_numpy(windows)
    without.saes()[1].W_dec[f] = 0
    before, after = (cross_entropy(m(x)[0][:, :-1].transpose(1, 2), x[:, 1:], reduction='none')
                     for m in (model, without))              # (n, T - 1)
    d = (after - before).numpy()[codes[1][f, :, :-1] != 0]
    want = dict(mean=d.mean(), std=d.std(), n=len(d))
    effect = functools.partial(explain.removal_effect, model, index[1])
    assert effect(f, 10**6, 0) == pytest.approx(want, abs=2e-5) and abs(d.mean()) > 1e-3
    few = [effect(f, 8, seed) for seed in range(4)]
    assert {x['n'] for x in few} == {8} and few[0] != few[1] # at random places, not the first
    assert effect(5, 4, 0) is None                           # dead: has no place
    assert all(sae.steer is None for sae in model.saes().values())

@pytest.mark.parametrize('regex', ('ab|c', r'\[red\]', r'(?i)A\s', '漢字?', 'é|<', 'x*',
                                   'no such text'))
def test_find(index, truth, regex):
    windows, codes, _ = truth
    names, matches = index[1].names, []
    for w, row in enumerate(windows):
        cuts = [-1, *np.flatnonzero(row == EOT), T]
        for begin, end in zip(cuts, cuts[1:]): # a document at a time
            owner = [w * T + t for t in range(begin + 1, end) for _ in names[row[t]]] # of each byte
            text = b''.join(names[token] for token in row[begin + 1:end])
            text = text.decode('utf-8', 'surrogateescape')
            n_bytes = lambda part: len(part.encode('utf-8', 'surrogateescape'))
            matches += [set(owner[n_bytes(text[:m.start()]):n_bytes(text[:m.end()])])
                        for m in re.finditer(regex, text) if m[0]]
    inside = set().union(*matches)
    for layer in codes:
        precision, recall, n, n_tokens = scanning.find(index[layer], re.compile(regex))
        assert (n, n_tokens) == (len(matches), len(inside))
        for f, z in enumerate(codes[layer]):
            on = set(np.flatnonzero(z))
            hits = sum(bool(on & match) for match in matches)
            assert precision[f] == pytest.approx(len(on & inside) / max(1, len(on)))
            assert recall[f] == pytest.approx(hits / max(1, n))

@pytest.mark.parametrize('regex, tokens', (
    ('^a', [5, 7, 14]), ('a$', [0, 3, 10, 12]), ('^b', [2]), (r'\Aa', [7]),
    ('a.*', [0, 3, 5, 7, 8, 9, 10, 12, 14, 15, 16, 17])))
def test_find_at_the_edges(regex, tokens):
    """A line begins after a line break or end-of-text, and not where a window cuts the text."""
    windows = np.array([[0, 2, 1, 4, 2, 0], [3, 0, 1, 1, 0, 3], [0, 2, 0, 0, 0, 0]])
    scan = SimpleNamespace(names=[b'a', b'b', b'\n', b'<|endoftext|>', b'ba'], eot=3, N=18, T=6,
                           tokens=windows.ravel(), features=np.arange(18)[:, None], F=18,
                           count=np.ones(18))                # feature f fires on token f
    precision, _, _, n = scanning.find(scan, re.compile(regex, re.M))
    assert np.flatnonzero(precision).tolist() == tokens and n == len(tokens)

# ----------------------------------------------------------------------------------------- concepts

def test_concepts_by_brute_force():
    """Features that fire too rarely, or on more than 2 % of the tokens, have none."""
    rng = np.random.default_rng(0)
    names = [b' cat', b'cats', b' dog', b' bird', b'fish', b' ab', b'1', b' horse', b' catty']
    tokens = rng.integers(0, len(names), 3000)
    tokens[:1200] = 6                                        # windows without a word
    tokens[:1984][tokens[:1984] == 2] = 6                    # two that never meet
    tokens[1984:][tokens[1984:] == 3] = 6
    count = np.array([50, 10, 45, 200])
    where = [rng.choice(np.arange(1000, 3000), n, replace=False) for n in count]
    pairs = features.token_pairs(np.repeat([0, 1, 2, 3], count)[:, None],
                                 tokens[np.concatenate(where)], 4, len(names))
    got = scanning.concepts(count, len(tokens), pairs, tokens, names)
    assert np.isnan(got['coherence'][[1, 3]]).all() and (got['words'][[1, 3]] == -1).all()
    windows = [set(tokens[i:i + 64].tolist()) for i in range(0, 3000, 64)]
    for f in (0, 2):
        fires = Counter(tokens[where[f]].tolist())
        score = {v: n * math.log(n / count[f] / np.mean(tokens == v))
                 for v, n in fires.items() if n >= 3 and v not in (5, 6)}
        best = {} # one a stem
        for v in sorted(score, key=lambda v: (-score[v], v)):
            if score[v] > 0:
                best.setdefault(names[v].strip()[:5], v)
        best = list(best.values())
        assert [v for v in got['words'][f] if v >= 0] == best
        values = []
        for a, b in itertools.combinations(best, 2):
            p, q, both = (sum(some <= w for w in windows) / len(windows)
                          for some in ({a}, {b}, {a, b}))
            values.append(math.log(both / (p * q)) / -math.log(both) if both else -1)
        assert len(best) >= 4 and got['coherence'][f] == pytest.approx(np.mean(values), abs=1e-5)
        told = sum(score[v] for v in best) / count[f]
        shares = [fires[v] / sum(fires[w] for w in best) for v in best]
        want = (1 + np.mean(values)) * told ** 2 * math.prod(p ** -p for p in shares) ** 0.5
        assert got['concept'][f] == pytest.approx(want, rel=1e-4)

def test_by_concept():
    """Of features with more than a third of their words in common one."""
    scan = SimpleNamespace(concept=np.array([0.2, np.nan, 0.15, 0.1, 0.09, -0.1]), words=np.array([
        [1, 2, 3, 4], [-1] * 4, [5, 6, 7, 8], [5, 6, 14, 9], [5, 1, 15, 16], [10, 11, 12, 13]]))
    assert scanning.by_concept(scan) == [0, 2, 4]

# -------------------------------------------------------------------------------------------- probe

def test_logistic_is_the_least_cost():
    """No other weights cost less: the cost is convex, so near ones are enough."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    y = X @ [1, -2, 0] + rng.normal(size=60) > 0.5
    cost = lambda w: np.logaddexp(0, (1 - 2 * y) * (X @ w[:3] + w[3])).sum() + w[:3] @ w[:3] / 2
    w = measures.logistic(X, y)
    assert all(cost(w) < cost(w + 1e-3 * rng.normal(size=4)) for _ in range(100))

def test_probe_finds_what_holds_the_label():
    """A column that holds the label reaches 1 and is named; a loud one is chosen before a quiet
    one by protocol A only; columns without the label are at chance."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 200)
    X = rng.random((600, 40)).astype(np.float32)
    scores, _ = measures.probe(X, y, 0)
    assert all(abs(score.mean() - 0.5) < 0.08 for score in scores.values())
    X[:, 7], X[:, 11] = y == 0, y == 1
    X[:, 5] = 5 * rng.normal(size=600) + 3 * (y == 0)
    scores, best = measures.probe(X, y, 0, [('B', 1), ('B', 5), ('A', 1)])
    assert (best[0], best[1]) == (7, 11) and scores['B', 1].shape == (3, 3)
    assert (scores['B', 1][:2] == scores['B', 5][:2]).all() and (scores['B', 1][:2] == 1).all()
    assert scores['A', 1][0].mean() < 0.8
    two, best = measures.probe(X, np.minimum(y, 1), 0)
    assert two['B', 1].shape == (1, 3) and best == {1: 7}

@torch.no_grad()
def test_pooled_codes_by_brute_force(out):
    """Texts of all lengths in batches, as if each were read alone; end-of-text does not count."""
    run = features.open_run(out, device='cpu')
    texts = ['ab', 'cc c' * 9, 'a' * 25, 'b']
    got = measures.pooled_codes(run, 1, texts * 40, 3)
    sae, before = run.model.saes()[1], []
    rows = torch.randn(sae.n_features, 16, generator=torch.Generator().manual_seed(3))
    rows = rows / rows.norm(dim=1, keepdim=True)
    sae.register_forward_pre_hook(lambda _, args: before.append(args[0][0]))
    dense = functools.partial(features.dense, n_features=sae.n_features)
    for n, text in enumerate(texts):
        seen = run.model(torch.tensor([features.encode(run, text)[:T]]))[2]
        h = before[-1] / before[-1].square().mean(-1, keepdim=True).sqrt()
        codes = {'features': dense(seen.values[0, 0], seen.indices[0, 0]), 'channels': h,
                 'random directions': dense(*(h @ rows.T).relu().topk(4))}
        for name, code in codes.items():
            want = code[1:].mean(0).numpy()
            np.testing.assert_allclose(got[name][n::4], want[None].repeat(40, 0), 1e-3, 1e-4)

# ----------------------------------------------------------------------------------------- timeline

def snapshots(folder, F=12):
    """features/*.npz of layer 1, which is returned, and of 2, which is the same. More and
    more features fire on their final tokens, and write their final rows; feature 2 is silent."""
    rng, found = np.random.default_rng(0), []
    final = rng.standard_normal((F, 6))
    draw = lambda: dict(top_tokens=np.stack([np.append(rng.permutation(16)[:7], -1)
                                             for _ in range(F)]),
                        top_counts=rng.integers(1, 9, (F, 8)))
    last = draw()
    for s in range(5):
        done = rng.random(F) < s / 4
        count = rng.integers(0, 50, F) * (np.arange(F) != 2)
        d = {name: np.where(done[:, None], last[name], x) for name, x in draw().items()}
        d['top_tokens'][count == 0] = -1
        d['top_counts'][d['top_tokens'] < 0] = 0
        noise = rng.standard_normal(final.shape) * (4 - s)
        d |= dict(count=count, mean=rng.random(F), W_dec=(final + noise).astype(np.float16),
                  entropy=np.where(count > 0, rng.random(F) * 5, np.nan))
        arrays = {f'L{layer}.{name}': x for layer in (1, 2) for name, x in d.items()}
        features.save_npz(folder / 'features' / f'{10 * s:07d}.npz', dict(
            arrays, step=10 * s, tokens=1000 * s, layers=np.array([1, 2]), probed=400))
        found.append(d)
    return found

def test_timeline(tmp_path):
    """A feature's; and of all the live share, the settled, median entropy, and coherence."""
    cosine = lambda a, b: a @ b / max(1e-9, np.linalg.norm(a) * np.linalg.norm(b))
    want = snapshots(tmp_path)
    for again in range(2): # built, then from timeline.npz
        timelines, seen = features.open_timeline(tmp_path), []
        assert timelines[1].steps.tolist() == [0, 10, 20, 30, 40] and timelines[1].probed == 400
        for f in range(12):
            d = features.feature_timeline(timelines[1], f)
            density, entropy, cos, same = d['curves'].values()
            assert density == pytest.approx([s['count'][f] / 400 for s in want])
            assert entropy == np.nan_to_num([s['entropy'][f] for s in want]).tolist()
            vectors = [np.bincount(s['top_tokens'][f] % 16, s['top_counts'][f], 16) for s in want]
            assert same == pytest.approx([cosine(v, vectors[-1]) for v in vectors], abs=1e-6)
            W = [s['W_dec'][f].astype(float) for s in want]
            assert cos == pytest.approx([cosine(w, W[-1]) for w in W], abs=2e-3)
            # the last one's cosine to itself is 1, which says nothing
            settled = min((i for i in range(4) if min(same[i:]) >= 0.7), default=5)
            assert d['settled'] == settled and (f != 2 or settled == 5) # feature 2 is silent
            seen.append(settled)
            assert features.feature_timeline(timelines[2], f) == d
    assert {3, 5} <= set(seen)
    t, last = timelines[1], want[-1]
    assert [curve[-1] for curve in features.timeline_curves(t).values()] == pytest.approx(
        [100 * (last['count'] > 0).mean(), sum(i < 5 for i in seen), np.nanmedian(last['entropy'])])
    t.probed = 2000                                          # of them 2 % are 40
    names, rng = [bytes([97 + i] * 3) for i in range(16)], np.random.default_rng(0)
    scan = SimpleNamespace(tokens=rng.integers(0, 16, 3000), names=names)
    pairs = [(f, token, last['top_counts'][f, place]) for f in range(12)
             for place, token in enumerate(last['top_tokens'][f]) if token >= 0]
    found = scanning.concepts(last['count'], 2000, np.array(pairs).T, scan.tokens, names)
    mean = np.nanmean(found['coherence'])
    assert scanning.coherence_curve(scan, t)[-1] == pytest.approx(mean)

# ---------------------------------------------------------------------------------------- the index

def test_index_follows_the_checkpoint(tmp_path, capsys):
    """Made again for another checkpoint, other tokens, another version, any damage; else kept."""
    out = make_run(tmp_path)
    opened = functools.partial(open_aloud, capsys, out)
    before, path = (out / 'ckpt.pt').read_bytes(), out / 'index.npz'
    assert 'no index' in opened(640)[0] and opened()[0] == opened(640)[0] == ''
    assert '960 tokens' in opened(960)[0] and opened()[1].N == 960
    assert (out / 'ckpt.pt').read_bytes() == before # looking changes nothing
    change(out, step=8)
    assert 'no index' in opened()[0] and opened()[1].step == 8
    whole, arrays = path.read_bytes(), features.load_npz(path)
    meta = json.loads(str(arrays['meta'])) | dict(version=features.VERSION - 1)
    np.savez(out / 'old.npz', **arrays | dict(meta=json.dumps(meta)))
    np.savez(out / 'other.npz', x=1)                         # another program's
    for damaged in (whole[:5000], whole[:3000] + b'?' * 9 + whole[3009:], b'',
                    *(file.read_bytes() for file in (out / 'old.npz', out / 'other.npz'))):
        path.write_bytes(damaged)
        assert 'no index' in opened()[0] and opened()[0] == ''
    for file in out.glob('ckpt*'):
        file.unlink()
    assert opened()[0] == '' # its index is there

def test_index_follows_the_val(tmp_path, capsys):
    """Made again for other tokens at the same path; no --dataset is that of training; what was
    scanned of a data set that is gone is kept."""
    out = make_run(tmp_path)
    opened = functools.partial(open_aloud, capsys, out)
    data, gone = tmp_path / 'data', tmp_path / 'gone'
    other = make_run(tmp_path / 'new', seed=1).parent / 'data'
    first = opened(640)[1]
    assert 'no index' in opened(0, str(other))[0]
    assert opened(0, str(other))[0] == ''
    said, again = opened()
    assert 'no index' in said and again.dataset == first.dataset
    data.rename(gone)
    assert opened()[0] == ''
    with pytest.raises(ValueError, match='is not prepared'):
        opened(0, str(tmp_path / 'nowhere'))
    other.rename(data)
    said, new = opened()
    assert 'reading' in said and (new.tokens != again.tokens).any()

def test_the_checkpoint_carries_its_tokenizer(tmp_path, capsys):
    """The data set made again with another one: the captions are those of training, and the new val
    is read as the model reads text. One without it is refused."""
    out = make_run(tmp_path)
    before = features.open_run(out, device='cpu')
    ranks = {bytes([255 - i]): i for i in range(256)}
    ranks |= {b'%d!' % i: i for i in range(256, EOT)}
    enc = tiktoken.Encoding('other', pat_str=r'\s+|\S+', mergeable_ranks=ranks,
                            special_tokens={'<|endoftext|>': EOT})
    text = 'a [red] b\n<|endoftext|>漢字 ' * 99
    ids = enc.encode(text, allowed_special='all')
    write_dataset(tmp_path / 'data', [ids], [ids], V, enc, 'again', EOT)
    said, scan = open_aloud(capsys, out, 640)
    assert said.count('has another tokenizer than this model was trained with') == 1
    assert scan.names == before.names and b''.join(scan.names[t] for t in scan.tokens[:T]).decode(
        'utf-8', 'ignore') in text and open_aloud(capsys, out)[0] == ''
    shutil.rmtree(tmp_path / 'data')
    assert features.open_run(out, device='cpu').names == before.names
    change(out, tokenizer=None)
    with pytest.raises(ValueError, match='is of an older version'):
        features.open_run(out, device='cpu')

@pytest.mark.parametrize('module, name', ((features, 'open'), (features.os, 'replace')))
def test_caches_that_cannot_be_written(module, name, tmp_path, capsys, monkeypatch):
    """The same index and timeline, with a note, and nothing is left behind."""
    out = make_run(tmp_path)
    snapshots(out)
    files = sorted(out.rglob('*'))
    both = lambda: (open_index(out)[1].values, features.open_timeline(out)[1].same)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, no_space, raising=False)
        got = both()
    said = capsys.readouterr().err
    for cache in ('index.npz', 'timeline.npz'):
        assert f'{cache} cannot be written (No space left on device)' in said
    assert sorted(out.rglob('*')) == files
    assert all(map(np.array_equal, got, both()))

def test_two_viewers_scan_one_run(tmp_path, monkeypatch, capsys):
    """Another process, whose scan ends within ours: both end, with one index that is whole."""
    out, savez = make_run(tmp_path), np.savez
    def meanwhile(file, **arrays):
        monkeypatch.undo()
        with monkeypatch.context() as other:
            other.setattr(features.os, 'getpid', lambda: 1)
            open_index(out)
        savez(file, **arrays)
    monkeypatch.setattr(np, 'savez', meanwhile)
    assert (open_index(out)[1].values == open_index(out)[1].values).all()
    said = capsys.readouterr().err                           # the third one read what was left
    assert said.count('reading') == 2 and 'cannot be written' not in said
    assert not list(out.glob('*.tmp'))

# --------------------------------------------------------------------------------------------- text

@torch.no_grad()
@pytest.mark.parametrize('n, block_size', [(1, 8), (7, 8), (8, 8), (9, 8), (30, 8), (9, 1)])
def test_read_against_one_pass_a_token(n, block_size):
    model = make_model(block_size=block_size)
    tokens = torch.randint(V, (n,)).tolist()
    losses, values, indices = features.read(model, tokens)
    assert len(losses) == n - 1 and values.shape == indices.shape == (2, n, 4)
    first = 0 # where the window of token t begins: a full window restarts at its last half
    for t in range(n):
        if t - first == block_size:
            first = t - block_size // 2
        logits, _, seen = model(torch.tensor([tokens[first:t + 1]]))
        torch.testing.assert_close(values[:, t], seen.values[:, 0, -1])
        active = values[:, t] != 0
        assert torch.equal(indices[:, t][active], seen.indices[:, 0, -1][active])
        if t + 1 < n:
            loss = cross_entropy(logits[0, -1:], torch.tensor(tokens[t + 1:t + 2]))
            torch.testing.assert_close(losses[t], loss, atol=1e-4, rtol=1e-4)

def harmless(text):
    """No control character but the line break, nothing invisible or direction-changing."""
    text.encode('utf-8')
    bad = ('Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp')
    return not any(unicodedata.category(char) in bad for char in text if char != '\n')

def test_tokens_are_safe():
    rng = np.random.default_rng(0)
    tokens = HOSTILE + [bytes([i]) for i in range(256)] + [rng.bytes(n) for n in range(400)]
    tokens += [chr(c).encode('utf-8', 'surrogatepass') for c in range(0, 0x110000, 31)]
    for raw in tokens:
        for text in (features.safe(raw), features.caption(raw)):
            assert harmless(text) and '\n' not in text and (text or not raw)
        assert len(features.caption(raw)) <= 16
    for raw, text in ((b'\x1b[31m', '␛[31m'), (b'a\nb\t', 'a⏎b⇥'), (b'\xe6\xbc', '<0xE6><0xBC>'),
                      ('\u202e'.encode(), '<U+202E>'), (b'[red]', '[red]'), (b'\x7f', '␡'),
                      ('漢字'.encode(), '漢字'), ('\u0301a\u0301'.encode(), '◌\u0301a\u0301')):
        assert features.safe(raw) == text
    assert features.safe(b'a\n\t\r', keep='\n\t') == 'a\n\t␍'
    for raw, text in ((b'  a ', '··a·'), (b'   ', '···'), (b'', '(none)'),
                      (b'-' * 90, '-' * 15 + '…')):
        assert features.caption(raw) == text
