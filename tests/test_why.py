"""What made the model say it (explain.py) against the plain way: each feature steered off by hand,
and the whole model run again. And its views. Tiny random models, offline, on a CPU."""
import copy
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import explain
import features
import inspect_features as view
import scanning
from sae import SITES
from test_features import index, make_model, out, refused, snapshots, steered, truth # fixtures
from test_inspect import look

TEXT = 'ab c [red] a b\nab'

@pytest.fixture(scope='module')
def run(out):
    return features.open_run(out, device='cpu')

def same_as_by_hand(model, d, layers, measure):
    """The numbers of d are those of measure(logits, codes); every active feature is there."""
    by_hand = lambda off: measure(*steered(model, d['idx'], off))
    close = lambda x: pytest.approx(x, abs=2e-5)
    base, (_, z) = by_hand([]), steered(model, d['idx'])
    assert d['base'] == close(base)
    active = {(layer, f, t) for layer, code in zip(model.saes(), z) if layer in layers
              for t, f in code.nonzero().tolist()}
    assert active == {(layer, f, t) for _, layer, f, at in d['effects'] for t, _ in at}
    assert d['active'] == len(d['effects']) > 10
    for change, layer, f, _ in d['effects']:
        assert change == close(by_hand([(layer, f)]) - base)
    changes = [effect[0] for effect in d['effects']]
    assert changes == sorted(changes) and max(map(abs, changes)) > 1e-3
    assert d['pro'] == [effect for effect in d['effects'][:10] if effect[0] < 0]
    assert d['con'] == [effect for effect in d['effects'][:-11:-1] if effect[0] > 0]
    assert d['together'] == close(by_hand([effect[1:3] for effect in d['pro']]) - base)
    every = [(layer, f) for layer in layers for f in range(model.config.n_features)]
    assert d['whole'] == close(by_hand(every) - base)

@pytest.mark.parametrize('site', SITES)
def test_effects_equal_those_of_steering_by_hand(site, monkeypatch):
    """Also where the upper SAE then selects others, of several target tokens, in batches."""
    monkeypatch.setattr(explain, 'AT_ONCE', 60)
    model = make_model(sae_site=site)
    tokens = np.random.default_rng(0).integers(97, 101, 12).tolist()
    for target in ([], [97, 256, 98]):
        d = explain.why_token(model, tokens, target, [1, 2])
        target = target or [steered(model, tokens)[0][-1].argmax().item()]
        assert d['target'] == target and d['idx'] == tokens + target[:-1]
        same_as_by_hand(model, d, [1, 2], lambda logits, _: sum(
            logits[11 + i].log_softmax(-1)[token].item() for i, token in enumerate(target)))
    f = steered(model, tokens)[1][1, -1].argmax().item()
    same_as_by_hand(model, explain.why_feature(model, tokens, 2, f), [1],
                    lambda _, z: z[1, -1, f].item())

@torch.no_grad()
def test_a_feature_that_does_not_fire_changes_nothing(run):
    scales = explain.kept(run.model, [1], [[], [(1, 5)]])                    # 5 is dead
    both = explain.run_scaled(run.model, torch.arange(9)[None], scales, 3, lambda x, _: x)
    assert torch.equal(*both)

def test_of_many_the_promising(run, monkeypatch):
    """They are those of gradient times activation, by differences; the whole is still the whole."""
    tokens = features.encode(run, TEXT)
    every = explain.why_token(run.model, tokens, [97], [1, 2])
    monkeypatch.setattr(explain, 'MOST', 6)
    some = explain.why_token(run.model, tokens, [97], [1, 2])
    assert some['whole'] == every['whole'] and some['active'] == every['active'] > 6
    def log_p(feature, scale):
        logits, _ = steered(run.model, tokens, [feature], scale)
        return logits[-1].log_softmax(-1)[97].item()
    slope = {effect[1:3]: abs(log_p(effect[1:3], 1.01) - log_p(effect[1:3], 0.99))
             for effect in every['effects']}
    steepest = sorted(slope, key=slope.get)[-6:]
    assert {effect[1:3] for effect in some['effects']} == set(steepest)

def test_a_prompt_longer_than_the_model_reads(run):
    """What is read ends with it, and leaves room for the target."""
    T = run.model.config.block_size
    tokens = list(range(97, 97 + T + 8))
    assert explain.why_token(run.model, tokens, [97], [1])['idx'] == tokens[-T:]
    assert explain.why_token(run.model, tokens, [97, 98], [1])['idx'] == [*tokens[1 - T:], 97]
    with pytest.raises(ValueError, match='do not fit'):
        explain.why_token(run.model, tokens, [97] * (T + 1), [1])

def test_trace_by_brute_force(run, index, truth):
    """Every window where it fires is read with and without it; the shares are those of the scan."""
    scan, above, model = index[1], index[2], run.model
    f = int(np.argmax(np.where(scan.count < 60, scan.count, 0)))
    where, _ = scanning.firings(scan, f)
    d = explain.trace(model, scan, above, f, seed=0, n=10**6)
    assert d['positions'] == len(where) and d['windows'] == len(set(where // scan.T))
    means = np.zeros((2, above.F))
    for w in set(where // scan.T):
        tokens = scan.tokens[w * scan.T:][:scan.T].tolist()
        at = where[where // scan.T == w] % scan.T
        for row, off in zip(means, ([], [(1, f)])):
            row += steered(model, tokens, off)[1][1, at].sum(0).numpy() / len(where)
    assert d['as_it_is'] == pytest.approx(means[0], abs=1e-4)
    assert d['without'] == pytest.approx(means[1], abs=1e-4)
    here, theirs = truth[1][1][f] != 0, truth[1][2] != 0                     # (n, T), (F, n, T)
    share = (here & theirs).sum((1, 2)) / (here | theirs).sum((1, 2))
    assert d['share'] == pytest.approx(share)
    few = explain.trace(model, scan, above, f, seed=0, n=2)
    assert few['windows'] == 2 and few['positions'] < len(where)

# -------------------------------------------------------------------------------------------- views

def test_why_view(out, run, index, capsys):
    d = explain.why_token(run.model, features.encode(run, TEXT), [97, 98], [1, 2])
    text = look(capsys, out, f'--prompt={TEXT}', '--why=true', '--target=ab')
    words = ' '.join(text.split())
    assert f"Why ab: probability {view.percent(np.exp(d['base']))}" in text
    assert f"of {d['active']} active features {d['active']} are" in words
    assert 'nothing else passes' in words
    change, layer, f, at = d['effects'][0]
    [row] = re.findall(rf"  ({change:+.4f} +L{layer}.F{f} .*)", text.partition('Against')[0])
    act, word = max((abs(act), features.caption(run.names[d['idx'][t]])) for t, act in at)
    assert f'{act:#.4g}' in row and word in row
    assert text.count('+') > 5 and f"{d['together']:+.4f}" in text and f"{d['whole']:+.4f}" in text
    one = look(capsys, out, f'--prompt={TEXT}', '--why=true', '--layer=2').partition('Together')[0]
    assert 'L2.F' in one and 'L1.F' not in one

def test_why_a_feature_and_its_trace(out, index, capsys):
    f = int(index[2].count.argmax())
    text = look(capsys, out, f'--why=L2.F{f}')
    peak = scanning.feature_numbers(index[2], f, view.DEFAULTS['seed'])['top'][0]
    act = peak['acts'][peak['peak']]
    assert f"fires with {act:#.4g} at token {peak['where']:,}\n" in text
    assert 'L1.F' in text and 'its activation falls' in text
    f = int(index[1].count.argmax())
    text = look(capsys, out, f'--trace=L1.F{f}', '--rows=3')
    assert 'in block 2' in text and 'Fires with' in text
    for title, sign in (('Causes', 1), ('Holds down', -1)):
        rows = re.findall(r'L2\.F\d+ +\S+ +(\S+) +(\S+) ', text.split(title)[1].split('\n\n')[0])
        assert rows and all(sign * (float(a) - float(b)) >= 0 for a, b in rows)

@pytest.mark.parametrize('site, alpha, posthoc, rest', (
    ('resid', 1, False, 'nothing else passes'), ('mlp', 1, False, 'the stream passes beside them'),
    ('resid', 0.25, True, "a share of 0.75 passes too and the length of each token's stream")))
def test_what_else_passes(site, alpha, posthoc, rest):
    sae = SimpleNamespace(site=SITES[site], alpha=alpha, posthoc=posthoc)
    assert rest in explain.what_passes(sae, 3).partition(f'{SITES[site].place} 3: ')[2]

def test_sorted_lists(out, index, capsys):
    """Live features alone; without coherence, or too rare for an entropy, they come last."""
    scan = SimpleNamespace(count=np.array([50, 10, 0, 30, 40]), rank=np.array([2, 1, 0, 4, 3]),
                           coherence=np.array([-0.5, np.nan, np.nan, 0.1, 0.2]), F=5)
    orders = dict(coherence=[4, 3, 0, 1], entropy=[0, 4, 3, 1], density=[0, 4, 3, 1])
    assert {order: scanning.in_order(scan, order).tolist() for order in scanning.ORDERS} == orders
    text = look(capsys, out, '--sort=density', '--rows=999', '--layer=1')
    listed = [int(f) for f in re.findall(r'^ +L1.F(\d+)', text, re.M)]
    assert listed == scanning.in_order(index[1], 'density').tolist()

def test_words_of_a_feature(index):
    """Its rank is its place as a concept."""
    scan = copy.deepcopy(index[1])
    scan.coherence[7], scan.concept[7], scan.words[7, :4] = 0.5, 0.4, (97, 98, 99, 256)
    scan.concept[[3, 9]] = 0.8, 0.1
    d = scanning.feature_numbers(scan, 7, 0)
    options = view.Options(**view.DEFAULTS, console=view.screen())
    text = str(list(view.firing_panels(scan, d, options)))
    some = (~np.isnan(scan.concept)).sum()
    assert f'coherence 0.5000, rank 2 of {some} as a concept' in text and 'a, b, c, [red]' in text
    assert scanning.feature_numbers(scan, 5, 0)['coherence'] is None

def test_picture(out, index, tmp_path, capsys, monkeypatch):
    snapshots(tmp_path, F=48)
    shutil.copy(out / 'index.npz', tmp_path)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert 'takes matplotlib: pip' in refused(capsys, view, tmp_path, '--plot=x.png')
    monkeypatch.undo()
    pytest.importorskip('matplotlib')
    for argv in (['--timeline=true'], ['--feature=L1.F3,L1.F4']):
        picture = tmp_path / 'timeline.png'
        look(capsys, tmp_path, f'--plot={picture}', *argv)
        assert picture.read_bytes()[:4] == b'\x89PNG'
        picture.unlink()
