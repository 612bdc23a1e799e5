"""
The viewer against brute force: every number that a view shows is computed again here, by loops over the
positions of a tiny random model, from nothing but what the model returns. Offline, on a CPU.

    python -m pytest tests/test_inspect.py
"""
import copy
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import inspect_features as view
from data.dataset import eval_batches, write_dataset
from model import GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint

torch.set_num_threads(1)
# a vocabulary that means harm: every byte, markup, escape codes, halves of characters, wide, invisible, right-to-left
HOSTILE = [b'[red]', b'[/x]', b'[bold', b'\x1b[31m', b'\x1b]0;x\x07', '漢字'.encode(), '🎉'.encode(), '\u202e'.encode(),
           '\u200b'.encode(), '\u0301'.encode(), 'é'.encode(), b'\xe6\xbc', b'</script>', b'<!--', b'        ', b'\r\n', b'-' * 90,
           '\u2028'.encode(), '\ufeff'.encode(), '\x85'.encode(), b'\xed\xa0\x80', '\U000e0001'.encode()]
EOT = 256 + len(HOSTILE)
V, T, STEP = EOT + 1, 32, 7

def make_run(folder, seed=0, **config):
    """A random GPT, a random data set and what train.py leaves in out_dir. Returns out_dir."""
    import tiktoken
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ranks = {bytes([i]): i for i in range(256)} | {t: 256 + i for i, t in enumerate(HOSTILE)}
    enc = tiktoken.Encoding('bytes', pat_str=r'\s+|\S+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': EOT})
    def tokens(n): # few types are frequent, so that features fire often on some
        return np.where(rng.random(n) < 0.6, rng.choice([10, 32, 97, 98, 99, 256, 257, EOT], n), rng.integers(0, V, n))
    write_dataset(folder / 'data', [tokens(500)], [tokens(6000)], V, enc, 'random', EOT)
    torch.manual_seed(seed)
    config = GPTConfig(**dict(dict(block_size=T, vocab_size=V, n_layer=3, n_head=2, n_embd=16, sae_layers=(1, 2), sae_ratio=3,
                                   sae_k=4), **config))
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) # projections begin at zero: stir
        for sae in model.saes().values():
            sae.b_enc[5] = -1e4 # dead
    out = folder / 'out'
    out.mkdir()
    save_checkpoint(out, dict(model=model.state_dict(), model_args=asdict(config), step=STEP, dataset=str(folder / 'data'),
                              config=dict(dataset=str(folder / 'data'))))
    return out

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('run'))

def options(out, **changes):
    return SimpleNamespace(**dict(view.DEFAULTS, out_dir=str(out), device='cpu', **changes))

@pytest.fixture(scope='module')
def index(out):
    return view.open_index(options(out))

def brute(out, n_tokens):
    """windows (n, T) of tokens, and {layer: {f: [(window, t, activation), ...]}}, window by window."""
    checkpoint = load_checkpoint(out)
    model = load_model(checkpoint)
    val = np.fromfile(Path(checkpoint['dataset']) / 'val.bin', '<u2')
    windows = [x[0] for x, _ in eval_batches(val, T, 1, n_tokens)]
    fires = {i: {f: [] for f in range(sae.n_features)} for i, sae in model.saes().items()}
    fvu = {i: [] for i in fires}
    with torch.no_grad():
        for w, x in enumerate(windows):
            seen = model(x[None])[2]
            for s, i in enumerate(fires):
                for t in range(T):
                    for a, f in zip(seen.values[s, 0, t].tolist(), seen.indices[s, 0, t].tolist()):
                        if a != 0:
                            fires[i][f].append((w, t, a))
    return torch.stack(windows).numpy(), fires, model

@pytest.fixture(scope='module')
def truth(out, index):
    return brute(out, index[1].N)

def check_scan(index, windows, fires):
    """Every statistic and every context of every feature."""
    for layer in fires:
        s, entropies = index[layer], {}
        assert (s.N, s.T) == (windows.size, T)
        for f, where in fires[layer].items():
            with mock.patch.object(view, 'fold', list): # all of them; its own test is below
                d = view.feature_data(s, f)
            assert s.count[f] == d['count'] == len(where) and d['density'] == len(where) / s.N
            if not where:
                assert math.isnan(s.entropy[f]) and s.rank[f] == 0 and not d['top'] + d['random'] + d['intervals']
                continue
            a = np.array([abs(x[2]) for x in where])
            types = Counter(int(windows[w, t]) for w, t, _ in where)
            p = np.array(list(types.values())) / len(where)
            entropies[f] = -(p * np.log2(p)).sum()
            assert s.entropy[f] == d['entropy'] == pytest.approx(entropies[f], abs=1e-5)
            assert s.max[f] == d['max'] == pytest.approx(a.max(), rel=1e-5)
            assert d['mean'] == pytest.approx(np.mean([x[2] for x in where]), rel=1e-3, abs=1e-3 * a.mean()) # kept in fp16
            top = view.fires_on(s, f)
            assert [round(s * len(where)) for _, s in top] == sorted(types.values(), reverse=True)[:8]
            assert all(types[token] == round(s * len(where)) for token, s in top)
            assert a.max() < d['R'] <= 2 * a.max() * (1 + 1e-5) and math.log2(d['R']) % 1 == 0
            hist = np.histogram(a.astype(np.float16), view.BINS, (0, d['R']))[0]
            assert np.abs(hist - d['hist']).sum() <= 2 # a rounding of the model may move one value across an edge
            assert sum(d['hist']) == len(where)
            check_contexts(d, s, windows, where)
        order = sorted(entropies, key=lambda f: (s.entropy[f], -s.count[f], f))
        assert [int(s.rank[f]) for f in order] == list(range(1, len(order) + 1))

def check_contexts(d, s, windows, where):
    where = [(w, t, float(np.float16(a))) for w, t, a in where]
    eligible = {(w, t): a for w, t, a in where if 0 < t < T - 1 and windows[w, t] != EOT}
    best = {}
    for (w, t), a in eligible.items():
        best[w] = max(best.get(w, 0), abs(a))
    peaks = lambda contexts: [abs(c['acts'][c['peak']]) for c in contexts]
    want = sorted(best.values(), reverse=True)[:view.TOPS]
    tops, drawn = d['top'], d['random']
    assert peaks(tops) == pytest.approx(want, rel=2e-3) and len(drawn) == min(view.RANDOM, len(best))
    for some in (tops, drawn):
        assert len({c['where'] // T for c in some}) == len(some) # one a window
    shares = {low: share for low, _, share, _ in d['intervals']}
    for j in range(view.INTERVALS):
        low, high = j * d['R'] / 8, (j + 1) * d['R'] / 8
        n = sum(low <= abs(a) < high for _, _, a in where)
        assert shares.get(low, 0) == pytest.approx(n / len(where), abs=1.01 / len(where))
    for low, high, _, c in d['intervals']:
        inside = [w for w, a in eligible.items() if low <= abs(a) < high]
        assert (c is None) == (not inside) or len(inside) <= 1
        if c and inside:
            drawn = drawn + [c]
            assert low * 0.999 <= peaks([c])[0] <= high * 1.001
    code = {(w, t): a for w, t, a in where}
    for c in tops + drawn: # the text and the activations around each peak, cut at the window's ends
        w, t = divmod(c['where'], T)
        assert (w, t) in eligible
        around = range(max(0, t - view.SIDE), min(T, t + view.SIDE + 1))
        assert c['tokens'] == [int(windows[w, i]) for i in around] and c['peak'] == t - around[0]
        assert c['acts'] == pytest.approx([code.get((w, i), 0) for i in around], rel=2e-3, abs=1e-6)

def test_every_number_of_the_scan(index, truth):
    windows, fires, _ = truth
    check_scan(index, windows, fires)

@pytest.mark.parametrize('site', ('mlp', 'attn', 'hidden', 'stream'))
def test_every_site(site, tmp_path, capsys):
    out = make_run(tmp_path, seed=1, sae_site=site)
    index = view.open_index(options(out))
    windows, fires, _ = brute(out, index[1].N)
    check_scan(index, windows, fires)
    view.main([f'--out_dir={out}', '--feature=L2.F3'])
    text = capsys.readouterr().out
    assert ('Across layers' in text) == (site == 'stream') and ('Nearest' in text) == (site != 'stream')
    view.main([f'--out_dir={out}', f'--html={tmp_path}/page.html'])
    view.main([f'--out_dir={out}'])

def test_scan_in_any_batches(tmp_path, monkeypatch):
    """Batches only cut the work: one of 128 windows, or 128 of one, merged every 16, give the same index."""
    out, files, whole = make_run(tmp_path), ('index.npz', 'index_tokens.npy', 'index_features.npy', 'index_values.npy'), []
    for size in (128, 1):
        monkeypatch.setattr(view, 'eval_batches', lambda tokens, T, B, n: eval_batches(tokens, T, size, n))
        view.scan(options(out, scan_tokens=128 * T), view.open_model(options(out)), 'key')
        whole.append({f'{file}/{name}': x for file in files for name, x in dict(np.load(out / file) if file.endswith('npz')
                      else {'': np.load(out / file)}).items()})
    assert list(whole[0]) == list(whole[1]) and whole[0]['index_features.npy/'].shape == (2, 128 * T, 4)
    for name, x in whole[0].items():
        if x.dtype.kind == 'f': # the fvu of a batch is about its own mean
            assert name.endswith('fvu') or np.allclose(x, whole[1][name], rtol=2e-3, atol=1e-5, equal_nan=True), name
        else:
            assert np.array_equal(x, whole[1][name]) or name.endswith(('up', 'down', 'near')), name

def test_random_contexts_are_a_fair_draw():
    """Each of 40 windows with one firing is kept with probability 8/40; 300 draws; and a seed fixes the draw."""
    features, values = np.ones((40 * 8, 1), np.uint16), np.zeros((40 * 8, 1), np.float16)
    features[3::8], values[3::8, 0] = 0, np.arange(1, 41) # strength must not matter
    one, none = np.ones(1, np.int32), np.zeros((1, 0), np.int32)
    s = SimpleNamespace(layer=0, site='resid', N=320, T=8, K=1, F=1, eot=-1, tokens=np.arange(320), features=features, values=values,
                        by_feature=None, max=one * 40.0, count=one * 40, entropy=one, rank=one, top_tokens=none, top_counts=none, up=none,
                        up_value=none, down=none, down_value=none, near=none, near_value=none)
    seen, draws = np.zeros(40), []
    for s.seed in [*range(300), 0]:
        draws.append([c['where'] // 8 for c in view.feature_data(s, 0)['random']])
        seen[draws[-1]] += 1
    assert draws[0] == draws[-1] and draws[0] != draws[1] and {len(draw) for draw in draws} == {8}
    assert abs(seen - 60).max() < 4.5 * math.sqrt(60 * 0.8)

def test_logits_and_neighbours(index, truth):
    _, fires, model = truth
    wte = model.transformer.wte.weight[:V].detach().double().numpy()
    for layer, sae in model.saes().items():
        W = sae.W_dec.detach().double().numpy()
        positions = {f: {(w, t) for w, t, _ in where} for f, where in fires[layer].items()}
        for f in range(len(W)):
            d = view.feature_data(index[layer], f)
            logits = wte @ W[f]
            assert [v for _, v in d['up']] == pytest.approx(sorted(logits)[::-1][:10], rel=1e-4)
            assert [v for _, v in d['down']] == pytest.approx(sorted(logits)[:10], rel=1e-4)
            assert all(logits[i] == pytest.approx(v, rel=1e-4) for i, v in d['up'] + d['down'])
            cosines = {g: W[g] @ W[f] / np.linalg.norm(W[g]) / np.linalg.norm(W[f]) for g in range(len(W)) if g != f}
            assert [v for _, v in d['near']] == pytest.approx(sorted(cosines.values())[::-1][:5], rel=1e-4)
            assert all(cosines[g] == pytest.approx(v, rel=1e-4) for g, v in d['near'])
            both = {g: len(positions[f] & positions[g]) / max(1, len(positions[f] | positions[g])) for g in positions if g != f}
            assert [v for _, v in d['joint']] == pytest.approx(sorted(both.values())[::-1][:5])
            assert all(both[g] == pytest.approx(v) for g, v in d['joint'])

def test_a_page_of_many_sorts_the_codes_once(index, monkeypatch):
    for s in index.values():
        want = [view.firings(s, f) for f in range(s.F)]
        monkeypatch.setattr(s, 'by_feature', None)
        view.sort_firings(s, 2, s.F - 3)
        for f in range(2, s.F - 2):
            assert all(np.array_equal(a, b) for a, b in zip(want[f], view.firings(s, f)))

@pytest.mark.parametrize('n', (10, 10**6))
def test_removal_effect(out, index, truth, n):
    """Against a model whose W_dec row is 0, which writes the same as a code of 0."""
    windows, fires, model = truth
    layer, f = 1, max(fires[1], key=lambda f: len(fires[1][f]))
    got = view.removal_effect(view.open_model(options(out)), index[layer], f, n)
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.saes()[layer].W_dec[f] = 0
        change = {}
        for w, x in enumerate(torch.from_numpy(windows)):
            losses = [torch.nn.functional.cross_entropy(m(x[None])[0][0, :-1], x[1:], reduction='none') for m in (model, without)]
            change[w] = losses[1] - losses[0]
    d = np.array([float(change[w][t]) for w, t, _ in fires[layer][f] if t < T - 1])
    if n > len(d):
        want = dict(mean=d.mean(), std=d.std(), worse=(d > 0).mean(), n=len(d))
        assert got == pytest.approx(want, abs=2e-5)
        assert abs(d.mean()) > 1e-3 # there was something to measure
    else:
        assert got['n'] == n and d.min() - 1e-5 <= got['mean'] <= d.max() + 1e-5
    assert view.removal_effect(view.open_model(options(out)), index[layer], 5, 4) is None # a dead feature has no place

@pytest.mark.parametrize('regex', ('a', 'ab|c', 'b+', r'\[red\]', '(?i)A\\s', '漢字?', 'é|<', '^.', 'no such text', 'x*'))
def test_find(index, truth, regex):
    windows, fires, _ = truth
    names, matches = index[1].names, []
    for w, row in enumerate(windows):
        owner, text = [], ''
        for t, token in enumerate(row): # characters whose bytes are split over tokens belong to all of these
            owner += [t] * len(names[token])
        raw = b''.join(names[token] for token in row)
        text = raw.decode('utf-8', 'surrogateescape')
        starts = [0]
        for ch in text:
            starts.append(starts[-1] + len(ch.encode('utf-8', 'surrogateescape')))
        matches += [{(w, t) for t in owner[starts[m.start()]:starts[m.end()]]} for m in re.finditer(regex, text) if m.group()]
    inside = set().union(*matches)
    for layer in fires:
        precision, recall, n, n_tokens = view.find(index[layer], re.compile(regex))
        assert (n, n_tokens) == (len(matches), len(inside))
        for f, where in fires[layer].items():
            on = {(w, t) for w, t, _ in where}
            assert precision[f] == pytest.approx(len(on & inside) / max(1, len(on)))
            assert recall[f] == pytest.approx(sum(bool(on & m) for m in matches) / max(1, len(matches)))

def test_prompt(out, index, truth):
    model = truth[2]
    run = view.open_model(options(out))
    text = 'ab c\n' * 12 # more than one window
    rows = view.read_prompt(run, text, 3)
    ids = [EOT] + run.tokenizer.encode_ordinary(text)
    assert [token for token, _ in rows] == ids and len(ids) > T
    for begin in range(0, len(ids), T):
        with torch.no_grad():
            seen = model(torch.tensor([ids[begin:begin + T]]))[2]
        for t in range(len(ids[begin:begin + T])):
            for s, layer in enumerate(model.saes()):
                want = sorted(zip(seen.values[s, 0, t].tolist(), seen.indices[s, 0, t].tolist()), reverse=True)[:3]
                assert [(f, pytest.approx(a, rel=1e-5)) for a, f in want] == rows[begin + t][1][layer]

# --------------------------------------------------------------------------------------------------
# probe

def test_probe_finds_the_features_that_matter(out, tmp_path, capsys):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 40)
    X = rng.random((120, 50)).astype(np.float32)
    X[:, 7] += 3 * (y == 0)
    X[:, 11] += 3 * (y == 1)
    alone, chosen = view.choose_features(X, y, 2)
    assert set(chosen) == {7, 11} == set(alone[:2].tolist())
    train, test = view.split(y, 0)
    assert not set(train) & set(test) and len(train) + len(test) == 120 and len(test) == 36
    assert view.accuracy(X[:, chosen], y, train, test) == 1.0
    assert view.accuracy(X[:, [20]], y, train, test) < 0.6
    # the pooled codes of texts, by brute force
    run = view.open_model(options(out))
    texts = ['ab', 'cc c', 'a' * 50]
    X = view.pooled_codes(run, 2, texts)
    for row, text in zip(X, texts):
        with torch.no_grad():
            seen = run.model(torch.tensor([([EOT] + run.tokenizer.encode_ordinary(text))[:T]]))[2]
        want = np.zeros(len(row))
        for values, indices in zip(seen.values[1, 0, 1:].tolist(), seen.indices[1, 0, 1:].tolist()):
            for a, f in zip(values, indices):
                want[f] = max(want[f], a)
        assert row == pytest.approx(want, rel=1e-5)
    # and the view: texts of a and texts of b are told apart
    (tmp_path / 'labels.tsv').write_text(''.join(f'{c}-texts\t{c * n} {c}\n' for c in 'ab' for n in range(1, 12)))
    view.main([f'--out_dir={out}', f'--probe={tmp_path}/labels.tsv', '--layer=2'])
    text = capsys.readouterr().out
    assert '22 texts of 2 labels, 16 to train on, 6 held out' in text
    assert re.search(r'k = 1 +100.0 %', text) and re.search(r'majority +50.0 %', text) and 'dense probe' in text

@pytest.mark.parametrize('content, sentence', (
    ('', 'has these texts: none; it takes two labels'), ('a\tx\n' * 5, "5 of 'a'; it takes two labels"),
    ('a\tx\nb y\n', 'line 2: expected a label, a tab'), ('a\tx\n' * 4 + 'b\ty\n', "4 of 'a', 1 of 'b'; it takes"),
    (None, 'cannot be read')))
def test_bad_probe_files(out, tmp_path, content, sentence):
    if content is not None:
        (tmp_path / 'p.tsv').write_text(content)
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        view.main([f'--out_dir={out}', f'--probe={tmp_path}/p.tsv'])

# --------------------------------------------------------------------------------------------------
# timeline

def snapshots(folder, kind, S=5, F=12, C=6):
    """features/*.npz as train.py writes them; kind: W_dec, or tokens (without it, as at site stream)."""
    rng = np.random.default_rng(0)
    (folder / 'features').mkdir(parents=True)
    final, out = rng.standard_normal((F, C)), []
    draw_tokens = lambda: np.stack([np.append(rng.permutation(16)[:7], -1) for _ in range(F)]) # none twice, one free place
    last_top, last_counts = draw_tokens(), rng.integers(1, 9, (F, 8))
    for s in range(S):
        noise = rng.standard_normal((F, C)) * np.linspace(3, 0, S)[s]
        count = rng.integers(0, 50, F)
        count[2] = 0
        W = (final + noise).astype(np.float16)
        top, counts = draw_tokens(), rng.integers(1, 9, (F, 8))
        done = rng.random(F) < s / (S - 1) # these have their final tokens already, more and more of them
        top[done], counts[done] = last_top[done], last_counts[done]
        top[count == 0] = -1
        a = {'L1.count': count, 'L1.entropy': np.where(count > 0, rng.random(F) * 5, np.nan), 'L1.mean': rng.random(F),
             'L1.top_tokens': top, 'L1.top_counts': np.where(top < 0, 0, counts)}
        out.append(dict(a, W=W))
        extra = {'L1.W_dec': W} if kind == 'W_dec' else {}
        np.savez_compressed(folder / 'features' / f'{10 * s:07d}.npz', step=10 * s, tokens=1000 * s, layers=np.array([1]),
                            probed=400, **a, **extra)
    return out

@pytest.mark.parametrize('kind', ('W_dec', 'tokens'))
def test_timeline(tmp_path, kind, capsys):
    want, seen = snapshots(tmp_path, kind), set()
    for again in range(2): # built, then from timeline.npz
        t = view.open_timeline(tmp_path)
        assert list(t) == [1]
        t = t[1]
        assert t.steps.tolist() == [0, 10, 20, 30, 40] and t.probed == 400
        for f in range(12):
            d = view.feature_timeline(t, f)
            assert d['density'] == pytest.approx([s['L1.count'][f] / 400 for s in want])
            assert [e if e is not None else -1 for e in d['entropy']] == pytest.approx([np.nan_to_num(s['L1.entropy'][f], nan=-1) for s in want])
            vectors = [np.zeros(16) for _ in want] # counts of all token types
            for v, s in zip(vectors, want):
                for token, n in zip(s['L1.top_tokens'][f].tolist(), s['L1.top_counts'][f].tolist()):
                    v[token] += n * (token >= 0)
            cosine = lambda a, b: a @ b / max(1e-9, np.linalg.norm(a) * np.linalg.norm(b))
            assert d['same'] == pytest.approx([cosine(v, vectors[-1]) for v in vectors], abs=1e-6)
            W = [s['W'][f].astype(float) for s in want]
            assert d['cos'] == pytest.approx([cosine(w, W[-1]) if kind == 'W_dec' else 1 for w in W], abs=2e-3)
            settled = 5
            while settled > 0 and d['same'][settled - 1] >= 0.7:
                settled -= 1
            if settled == 4: # to itself the cosine is 1
                settled = 5
            assert d['settled'] == settled and (f != 2 or settled == 5) # feature 2 is silent
            seen.add(settled)
    assert {3, 5} <= seen
    live = want[-1]['L1.count'] > 0
    view.main([f'--out_dir={tmp_path}', '--timeline=true'])
    text = capsys.readouterr().out
    last = [line.split() for line in text.splitlines() if line.strip().startswith('40 ')][0]
    median = np.median(want[-1]['L1.entropy'][live])
    assert last[1] == '4,000' and f'{median:.2f}' in last and f'{100 * live.mean():.1f}' in last
    assert last[4] == str((view.settled_at(t)[live] < 5).sum())
    with pytest.raises(SystemExit, match='no checkpoint in'): # whose tokens have names
        view.main([f'--out_dir={tmp_path}', '--timeline=true', '--feature=F3'])

def test_timeline_of_a_feature_needs_no_checkpoint(out, index, tmp_path, capsys):
    """A folder with features/ and an index, as kept under results/."""
    snapshots(tmp_path, 'W_dec')
    for file in out.glob('index*'):
        shutil.copy(file, tmp_path)
    f = np.flatnonzero(index[1].count[:12])[0]
    view.main([f'--out_dir={tmp_path}', '--timeline=true', f'--feature=F{f}'])
    assert f'L1.F{f} over training' in capsys.readouterr().out
    view.main([f'--out_dir={tmp_path}', f'--feature=F{f}'])
    seen = capsys.readouterr()
    assert 'no checkpoint' in seen.err and 'Timeline' in seen.out and 'Top contexts' in seen.out

def test_torn_and_foreign_snapshots(tmp_path):
    snapshots(tmp_path, 'W_dec')
    bad = tmp_path / 'features' / '0000050.npz'
    whole = (tmp_path / 'features' / '0000040.npz').read_bytes()
    for content in (b'PK\x03\x04 torn', b'', whole[:len(whole) // 2], whole[:200] + b'?' * 99 + whole[299:]):
        bad.write_bytes(content)
        with pytest.raises(SystemExit, match='0000050.npz is no readable snapshot'):
            view.main([f'--out_dir={tmp_path}', '--timeline=true'])
    for name in ('0000025.npz', '0000050.npz'): # another program's; and another run's, of other size
        bad.unlink(missing_ok=True)
        bad = tmp_path / 'features' / name
        np.savez(bad, x=1)
        with pytest.raises(SystemExit, match=f'{name} is no readable snapshot'):
            view.main([f'--out_dir={tmp_path}', '--timeline=true'])
    bad.unlink()
    snapshots(tmp_path / 'other', 'W_dec', F=11)
    shutil.copy(tmp_path / 'other' / 'features' / '0000010.npz', tmp_path / 'features' / '0000025.npz')
    with pytest.raises(SystemExit, match='0000025.npz is no readable snapshot of this run'):
        view.main([f'--out_dir={tmp_path}', '--timeline=true'])

# --------------------------------------------------------------------------------------------------
# text

def harmless(text):
    """No control character but the line break, nothing invisible or direction-changing, encodable."""
    import unicodedata
    text.encode('utf-8')
    return not any(unicodedata.category(ch) in ('Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp') for ch in text if ch != '\n')

def test_tokens_are_safe():
    rng = np.random.default_rng(0)
    tokens = HOSTILE + [bytes([i]) for i in range(256)] + [rng.bytes(n) for n in range(1, 40) for _ in range(20)]
    tokens += [chr(c).encode('utf-8', 'surrogatepass') for c in [*range(0, 0x3000, 3), *range(0x3000, 0x110000, 97)]]
    for raw in tokens:
        for text in (view.safe(raw), view.caption(raw)):
            assert harmless(text) and '\n' not in text and (text or not raw)
        assert view.width_of(view.caption(raw)) <= 16
        for width in (1, 2, 7, 30):
            assert view.width_of(view.fit(view.safe(raw), width)) == width
    assert view.safe(b'\x1b[31m') == '␛[31m' and view.safe(b'a\nb\t') == 'a⏎b⇥' and view.safe(b'\xe6\xbc') == '<0xE6><0xBC>'
    assert view.safe(b'[red]') == '[red]' and view.safe('漢字'.encode()) == '漢字' and view.safe('\u202e'.encode()) == '<U+202E>'
    assert view.caption(b'  a ') == '··a·' and view.caption(b'   ') == '···' and view.caption(b'') == '(none)'

VIEWS = ([], ['--layer=2'], ['--layer=1', '--feature=7', '--examples=16'], ['--feature=L2.F5'], ['--feature=L1.F3,L2.F9', '--effect=4'],
         ['--prompt=ab c [red]'], ['--find=a|漢'], ['--find=\x1b'], ['--find=never there'])

@pytest.mark.parametrize('argv', VIEWS, ids=' '.join)
def test_views_keep_to_80_plain_columns(out, index, argv, capsys):
    view.main([f'--out_dir={out}', '--device=cpu', *argv])
    text = capsys.readouterr().out
    assert text.strip() and harmless(text)
    assert not [line for line in text.splitlines() if view.width_of(line) > 80 and '--out_dir' not in line]

def test_feature_view(out, index, truth, capsys):
    windows, fires, _ = truth
    view.main([f'--out_dir={out}', '--layer=1', '--feature=7', '--examples=4'])
    text, s = capsys.readouterr().out, index[1]
    assert text.count('Example ') == 4
    for n in range(1, 5):
        assert f'Layer 1 - Feature 7 - Example {n} - Rank {s.rank[7]} - Token Entropy {s.entropy[7]:.4f}\n' in text
    assert f'{len(fires[1][7]):,} of them' in text and 'direct path only' in text and '«' in text
    squeeze = lambda text: re.sub(r'[\s▁▂▃▄▅▆▇█]', '', text)
    for c in view.feature_data(s, 7)['top'][:4]: # each context is whole, but for line breaks and bars
        pieces = view.pieces(s, c)
        shown = ''.join(f'«{text}»' if peak else text for text, _, peak in pieces)
        assert squeeze(shown) in squeeze(text) and [peak for _, _, peak in pieces].count(True) == 1
        whole = view.safe(b''.join(s.names[t] for t in c['tokens']))
        assert ''.join(text for text, _, _ in pieces).replace('◌', '') == whole.replace('◌', '')

def test_tokens_that_share_a_character_are_one_piece():
    names = [b'x', b' \xe6\xbc', b'\xa2\xe5', b'\xad\x97', b'y', b'\xa2', b'\xe6', b'z', b'\xe6']
    s = SimpleNamespace(names=names)
    acts = [0.0, 1.0, -4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    context = dict(tokens=list(range(9)), acts=acts, peak=2)
    assert view.pieces(s, context) == [('x', 0, False), (' 漢字', -4.0, True), ('y', 0, False), ('<0xA2>', 0, False),
                                       ('<0xE6>z', 0, False), ('<0xE6>', 0, False)]
    text, bars, *_ = view.paragraph(s, context, 4.0, 80, False)
    plain = re.sub('\x1b\\[[0-9;]*m', '', text)
    assert plain == '  x «漢字»y<0xA2><0xE6>z<0xE6>' and bars == '   ███████'

def test_the_most_word_like_are_one_a_token(index):
    """Of features that fire on one and the same token, as many do on line breaks, the overview's table has the first."""
    s = copy.copy(index[max(index)])
    s.count, s.rank, s.entropy = np.full(s.F, 100), np.arange(1, s.F + 1), np.linspace(0, 3, s.F)
    s.top_tokens = s.top_tokens.copy()
    s.top_tokens[:6, 0] = 7, 7, 8, 7, 9, 8
    text = '\n'.join(view.overview(s, 3))
    assert f'the busiest 1 % of the features do {view.percent(math.ceil(s.F / 100) / s.F)} of all firing' in text
    lines = text.split('Most word-like')[1].splitlines()
    assert [re.search(r'L\d+\.F\d+', line)[0] for line in lines[2:5]] == [f'L{s.layer}.F{f}' for f in (0, 2, 4)]

def test_captions_never_call_a_live_feature_dead(index):
    for f in np.flatnonzero(index[1].count):
        for width in (3, 12, 40):
            text = view.captions(index[1], f, width)
            assert text != 'dead' and 0 < view.width_of(text) <= width
            assert ' 0%' not in text or view.fires_on(index[1], f)[0][1] < 0.005 # small shares are left out
    assert view.captions(index[1], 5, 40) == 'dead'

def test_numbers_keep_three_or_four_digits():
    shares, numbers = (0, 5e-7, 0.000076, 0.0123, 0.5, 0.9999, 1), (0.00123, 1.5, 12, 999.9, 5e4, -3)
    assert [view.percent(x) for x in shares] == ['0.00 %', '0.00005 %', '0.00760 %', '1.23 %', '50.0 %', '100 %', '100 %']
    assert [view.number(x) for x in numbers] == ['0.001230', '1.500', '12.00', '999.9', '50000', '-3.000']

def test_equal_texts_are_folded():
    context = lambda where, tokens: dict(tokens=tokens, acts=[0.0] * len(tokens), peak=2, where=where, times=1)
    a, b, c = context(1, [1, 2, 3, 4]), context(50, [1, 2, 3, 4]), context(99, [1, 2, 3, 5])
    assert [(x['where'], x['times']) for x in view.fold([a, b, c])] == [(1, 2), (99, 1)]

def test_colours_on_a_terminal(out, index, monkeypatch, capsys):
    """On a terminal: shades, no bars, hostile markup unparsed and no line longer than in a pipe."""
    monkeypatch.setattr(view, 'has_colour', lambda: True)
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('COLUMNS', '80')
    view.main([f'--out_dir={out}', '--layer=1', '--feature=7', '--examples=16'])
    text = capsys.readouterr().out
    plain = re.sub('\x1b\\[[0-9;]*m', '', text)
    assert text != plain and harmless(plain)
    assert '█' not in plain.partition('Top contexts')[2].partition('Random')[0] and '«' in plain
    assert not [line for line in plain.splitlines() if view.width_of(line) > 80 and '--out_dir' not in line]

# --------------------------------------------------------------------------------------------------
# the cache

def test_a_view_from_the_cache_needs_no_torch(out, index):
    code = ("import sys, inspect_features as v; v.main(sys.argv[1:]); "
            "assert not {'torch', 'tiktoken', 'rich'} & set(sys.modules), 'slow imports'")
    for argv in ([], ['--feature=L1.F7'], ['--find=a'], [f'--html={out}/page.html']):
        done = subprocess.run([sys.executable, '-c', code, f'--out_dir={out}', *argv], cwd=REPO, capture_output=True, text=True,
                              encoding='utf-8')
        assert done.returncode == 0, done.stderr

def test_cache_follows_the_checkpoint(tmp_path, capsys):
    out = make_run(tmp_path / 'with a space', sae_layers=(1,))
    before = hashlib.sha256((out / 'ckpt.pt').read_bytes()).hexdigest()
    def say(*argv):
        view.main([f'--out_dir={out}', *argv])
        seen = capsys.readouterr()
        assert f"--out_dir='{out}' --" in seen.out or '--find=a' in argv # commands that can be pasted
        return seen.err
    files = lambda: {path.name: path.read_bytes() for path in out.glob('index*')}
    assert 'no index yet' in say('--scan_tokens=640')
    first = files()
    alive = np.flatnonzero(view.open_index(options(out))[1].count)[0]
    assert say() == '' and say(f'--feature={alive}', '--scan_tokens=640') == ''
    (out / 'index.npz').unlink()
    assert 'no index yet' in say('--scan_tokens=640')
    assert first == files() and len(first) == 4
    assert '640 tokens' in say('--scan_tokens=960') and say('--seed=2', '--scan_tokens=960') == '' # a seed needs no scan
    assert hashlib.sha256((out / 'ckpt.pt').read_bytes()).hexdigest() == before # looking changes nothing
    checkpoint = load_checkpoint(out)
    checkpoint['model']['transformer.h.1.sae.W_enc'][0, 0] += 1
    checkpoint['step'] = 8
    save_checkpoint(out, checkpoint)
    assert 'another checkpoint, of step 7' in say('--seed=2')
    whole = (out / 'index.npz').read_bytes()
    for damaged in (whole[:5000], whole[:3000] + b'?' * 9 + whole[3009:], b''): # torn, a few bytes flipped, empty
        (out / 'index.npz').write_bytes(damaged)
        assert 'the index is damaged' in say()
    for name in ('tokens', 'features', 'values'):
        (out / f'index_{name}.npy').write_bytes((out / f'index_{name}.npy').read_bytes()[:500])
        assert 'the index is damaged' in say('--find=a')
        (out / f'index_{name}.npy').unlink()
        assert 'the index is damaged' in say('--find=a')

def test_post_hoc_saes_are_spliced_in(tmp_path, capsys):
    """Saved with alpha 0, since they only watched; a view shows what they do when they act."""
    out = make_run(tmp_path)
    checkpoint = load_checkpoint(out)
    for i in (1, 2):
        checkpoint['model'][f'transformer.h.{i}.sae.alpha'].zero_()
    save_checkpoint(out, checkpoint)
    silent = view.open_model(options(out)).model
    save_checkpoint(out, checkpoint | dict(config=dict(sae_posthoc=True)))
    capsys.readouterr()
    spliced = view.open_model(options(out)).model
    assert 'spliced in (alpha 1)' in capsys.readouterr().err
    assert {float(sae.alpha) for sae in silent.saes().values()} == {0} and {float(sae.alpha) for sae in spliced.saes().values()} == {1}

@pytest.mark.parametrize('argv, sentence', (
    (['--layer=0'], 'layer=0 has no SAE; block 1, 2 has one'), (['--feature=L0.F1'], 'block 0 has no SAE'),
    (['--feature=48'], 'out of range: block 1 has features 0 to 47'), (['--feature=x'], 'names no feature'),
    (['--feature=-1'], 'names no feature'), (['--find=('], 'is no regular expression'), (['--prompt_file=/none'], 'cannot be read'),
    (['--prompt=a', '--prompt_file=b'], 'both given'), (['--timeline=true'], 'there are no snapshots'),
    (['--device=nonsense', '--scan_tokens=99'], 'is not usable here'), (['--rows=-1'], 'rows=-1 must not be negative'), (['--html=/no/such/folder/x.html'], 'No such file')))
def test_bad_input(out, index, argv, sentence, capsys):
    with pytest.raises(SystemExit) as e:
        view.main([f'--out_dir={out}', *argv])
    said = e.value.code if type(e.value.code) is str else capsys.readouterr().err.strip() # from configure: printed, and code 2
    assert sentence in said and '\n' not in said and e.value.code != 0

def test_no_checkpoint_and_no_sae(tmp_path, capsys):
    with pytest.raises(SystemExit, match='no checkpoint in'):
        view.main([f'--out_dir={tmp_path}'])
    assert capsys.readouterr() == ('', '') # that sentence is all
    out = make_run(tmp_path / 'dense', sae_layers=())
    with pytest.raises(SystemExit, match='is dense: it has no SAE'):
        view.main([f'--out_dir={out}'])
    for foreign in (dict(model_args=dict(bias=True)), dict(model=dict(x=torch.ones(1))), dict(model=3), dict(model_args=[])):
        save_checkpoint(out, load_checkpoint(out) | foreign)
        (out / 'ckpt_prev.pt').unlink()
        with pytest.raises(SystemExit, match='the checkpoint does not fit') as e:
            view.main([f'--out_dir={out}'])
        assert '\n' not in str(e.value)
    out = make_run(tmp_path / 'hidden', sae_site='hidden')
    with pytest.raises(SystemExit, match='site hidden is no TopK autoencoder'):
        view.main([f'--out_dir={out}', f'--export={tmp_path}/e'])

# --------------------------------------------------------------------------------------------------
# HTML and export

@pytest.fixture(scope='module')
def page(out, index, tmp_path_factory):
    path = tmp_path_factory.mktemp('html') / 'page.html'
    view.main([f'--out_dir={out}', f'--html={path}'])
    return path

def test_html_has_the_same_numbers(index, page):
    text = page.read_text(encoding='utf-8')
    assert text.count('</script>') == 2 and not re.search(r'(src|href)=.?http|@import|url\(', text)
    data = json.loads(text.partition('id="data">')[2].partition('</script>')[0])
    assert len(data['features']) == sum(int((s.count > 0).sum()) for s in index.values())
    for d in data['features']:
        s = index[d['layer']]
        want = view.feature_data(s, d['f'])
        for name in ('count', 'density', 'entropy', 'rank', 'mean', 'max', 'hist'):
            assert d[name] == pytest.approx(want[name], rel=1e-5)
        for kind in ('top', 'random'): # as many as --examples
            for (parts, where, times), c in zip(d[kind], want[kind][:5], strict=True):
                pieces = view.pieces(s, c)
                assert (where, times) == (c['where'], c['times'])
                assert ''.join(part if isinstance(part, str) else part[0] for part in parts) == ''.join(text for text, _, _ in pieces)
                assert [part for part in parts if isinstance(part, list)] == [
                    [text, pytest.approx(a, rel=1e-5), peak] for text, a, peak in pieces if a or peak]
        assert [x[:3] for x in d['intervals']] == [pytest.approx(x[:3], rel=1e-5) for x in want['intervals']]
        for name in ('fires_on', 'up', 'down'):
            assert [t for t, _ in d[name]] == [view.safe(s.names[t]) for t, _ in want[name]]
        assert all(harmless(part if isinstance(part, str) else part[0]) for c in d['top'] + d['random'] for part in c[0])
        assert all(harmless(t) for name in ('fires_on', 'up', 'down') for t, _ in d[name])
    assert data['layers']['1']['l0'] == pytest.approx(index[1].count.sum() / index[1].N)

def test_the_page_is_the_same_from_many_processes(out, page, tmp_path):
    code = f"import inspect_features as view; view.MANY = 2; view.main(['--out_dir={out}', '--html={tmp_path}/many.html'])"
    subprocess.run([sys.executable, '-c', code], cwd=Path(view.__file__).parent, check=True)
    assert (tmp_path / 'many.html').read_bytes() == page.read_bytes()

def test_the_page_of_many_is_made_with_the_scan(out, page, tmp_path, monkeypatch):
    run, html = tmp_path / 'run', tmp_path / 'page.html'
    shutil.copytree(out, run, ignore=shutil.ignore_patterns('index*'))
    monkeypatch.setattr(view, 'MANY', 2)
    view.main([f'--out_dir={run}', '--rows=1'])
    assert (run / 'index_page.html').read_bytes() == page.read_bytes()
    (run / 'index_page.html').write_text('as it was made')
    view.main([f'--out_dir={run}', f'--html={html}'])
    assert html.read_text() == 'as it was made'
    view.main([f'--out_dir={run}', f'--html={html}', '--examples=2'])
    assert 'as it was made' not in html.read_text()
    view.main([f'--out_dir={run}', f'--html={html}', '--scan_tokens=96']) # another scan, another page
    assert html.read_bytes() == (run / 'index_page.html').read_bytes() != page.read_bytes()

def test_a_page_whose_data_has_the_template_s_word(index, tmp_path, monkeypatch):
    monkeypatch.setattr(index[1], 'dataset', 'DATA')
    view.write_html(tmp_path / 'page.html', index, [], None, 5, [(b'D'[0], 0.5)])
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    data = json.loads(text.partition('id="data">')[2].partition('</script>')[0])
    assert data['dataset'] == 'DATA' and data['features'] == [] and text.endswith('</html>\n')

def test_a_peak_too_weak_for_fp16_is_marked(index, tmp_path, monkeypatch):
    s = index[1]
    monkeypatch.setattr(s, 'values', np.zeros_like(s.values))
    some = [(1, np.flatnonzero(s.count)[0].item())]
    view.write_html(tmp_path / 'page.html', index, some, lambda layer, f: view.feature_data(s, f), 5, None)
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    d, = json.loads(text.partition('id="data">')[2].partition('</script>')[0])['features']
    assert d['top'] and all([part[2] for part in parts if isinstance(part, list)] == [True] for parts, *_ in d['top'] + d['random'])

def chromium():
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path:
        pytest.skip('chromium is not installed')
    return path

def test_html_in_chromium(out, page, tmp_path):
    """Renders every feature, searches, walks by keyboard, turns the lights off; an error fails the page."""
    text = page.read_text(encoding='utf-8')
    probe = '''<script>
addEventListener('error', e => report('error ' + e.message))
const report = text => { document.title = text; document.body.append(Object.assign(document.createElement('pre'), {id: 'report', textContent: text})) }
setTimeout(() => { try {
  const seen = []
  for (const d of data.features.filter((d, i) => i % 3 === 0)) { location.hash = name(d); go(); if (!$('main').textContent.includes('Top contexts')) throw Error('no contexts ' + name(d)) }
  if (document.querySelector('red, x')) throw Error('markup')
  $('search').value = '[red]'; $('search').oninput()
  seen.push(shown.length, shown.every(d => [...d.fires_on, ...d.up.slice(0, 5)].some(x => x[0].includes('[red]'))))
  $('search').value = 'l1.f7'; $('search').oninput(); seen.push(shown.map(name).join())
  $('search').value = 'nowhere to be found'; $('search').oninput(); seen.push(shown.length)
  $('search').value = ''; $('search').oninput(); seen.push(shown.length)
  const before = document.documentElement.classList.contains('dark')
  dispatchEvent(new KeyboardEvent('keydown', {key: 't'})); seen.push(before !== document.documentElement.classList.contains('dark'))
  location.hash = name(shown[0]); dispatchEvent(new KeyboardEvent('keydown', {key: 'j'})); seen.push(location.hash === '#' + name(shown[1]))
  dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'})); seen.push(location.hash === '#' + name(shown[0]))
  report('done ' + JSON.stringify(seen))
} catch (e) { report('error ' + e) } }, 50)
</script>'''
    (tmp_path / 'page.html').write_text(text.replace('</body>', probe + '</body>'), encoding='utf-8')
    done = subprocess.run([chromium(), '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--virtual-time-budget=8000',
                           f'--user-data-dir={tmp_path}/profile', '--dump-dom', f'file://{tmp_path}/page.html'],
                          capture_output=True, text=True, encoding='utf-8', timeout=120)
    got = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S)
    assert got and got[1].startswith('done'), got and got[1]
    n, only_hits, named, none, everything, theme, forth, back = json.loads(got[1][5:])
    assert n > 0 and only_hits and named == 'L1.F7' and none == 0 and everything > n and theme and forth and back
    assert 'CONSOLE' not in done.stderr

def test_prompt_html(out, index, tmp_path):
    view.main([f'--out_dir={out}', '--prompt=abc', f'--html={tmp_path}/p.html'])
    data = json.loads((tmp_path / 'p.html').read_text().partition('id="data">')[2].partition('</script>')[0])
    assert [text for text, _ in data['prompt']] == ['<|endoftext|>', 'a', 'b', 'c']
    named = {(d['layer'], d['f']) for d in data['features']}
    assert all((int(layer), f) in named for _, by in data['prompt'] for layer in by for f, _ in by[layer])

def test_export(out, truth, tmp_path):
    """The file, read by its specification; and that codes and reconstruction follow from it by the formula of a TopK SAE."""
    view.main([f'--out_dir={out}', f'--export={tmp_path}/e'])
    for layer, sae in truth[2].saes().items():
        raw = (tmp_path / 'e' / f'L{layer}' / 'sae_weights.safetensors').read_bytes()
        size = int.from_bytes(raw[:8], 'little')
        w = {name: torch.from_numpy(np.frombuffer(raw[8 + size:][slice(*x['data_offsets'])], '<f4').reshape(x['shape']).copy())
             for name, x in json.loads(raw[8:8 + size]).items()}
        cfg = json.loads((tmp_path / 'e' / f'L{layer}' / 'cfg.json').read_text())
        h = torch.nn.functional.rms_norm(torch.randn(50, 16), (16,))
        pre = (h - w['b_dec']) @ w['W_enc'] + w['b_enc']
        top = pre.topk(cfg['k'])
        codes = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        values, indices = sae.encode(h)
        ours = torch.zeros_like(pre).scatter(-1, indices, values)
        assert torch.allclose(codes, ours, atol=1e-5)
        assert torch.allclose(codes @ w['W_dec'] + w['b_dec'], sae.decode(ours), atol=1e-5)

def test_export_in_saelens(out, truth, tmp_path):
    SAE = pytest.importorskip('sae_lens', reason='sae-lens is not installed').SAE
    view.main([f'--out_dir={out}', f'--export={tmp_path}/e'])
    for layer, sae in truth[2].saes().items():
        theirs = SAE.load_from_disk(f'{tmp_path}/e/L{layer}')
        assert type(theirs).__name__ == 'TopKSAE'
        h = torch.nn.functional.rms_norm(torch.randn(50, 16), (16,))
        values, indices = sae.encode(h)
        ours = torch.zeros(50, sae.n_features).scatter(-1, indices, values)
        assert torch.allclose(theirs.encode(h), ours, atol=1e-5)
        assert torch.allclose(theirs.decode(theirs.encode(h)), sae.decode(ours), atol=1e-5)
