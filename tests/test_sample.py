"""sample.py: steering is the affine edit that it claims to be, with and without the KV cache, at
all five sites; what is printed is safe, and true; every bad input is one sentence. How a text is
read is tested in test_features.py. A random tiny model, offline, on a CPU."""
import functools
import re
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from torch.nn.functional import cross_entropy

import features
import sample
from model import load_checkpoint, load_model
from sae import SITES
from test_features import EOT, V, change, make_model, make_run, refused, steered
from test_features import out as run # a fixture

SETTINGS = SimpleNamespace(**sample.DEFAULTS | dict(max_new_tokens=12))

def printed(capsys, out_dir, *args):
    sample.main([f'--out_dir={out_dir}', '--device=cpu', '--max_new_tokens=12', *args])
    return capsys.readouterr().out

# ----------------------------------------------------------------------------------------- steering

def test_parse_steering():
    model = make_model()
    parse = lambda *specs: sample.parse_steering(specs, model)
    assert parse() == [('unsteered', [])]
    assert parse('L1.F3=-2.5', 'L2.F0=off') == [
        ('L1.F3=-2.5 L2.F0=off', [(1, 3, 1.0, -2.5), (2, 0, 0.0, 0.0)])]
    assert parse('L1.F3=0, x2,off', 'L1.F4=1') == [
        ('L1.F3=0 L1.F4=1', [(1, 3, 1.0, 0.0), (1, 4, 1.0, 1.0)]),
        ('L1.F3=x2 L1.F4=1', [(1, 3, 2.0, 0.0), (1, 4, 1.0, 1.0)]),
        ('L1.F3=off L1.F4=1', [(1, 3, 0.0, 0.0), (1, 4, 1.0, 1.0)])]

@pytest.mark.parametrize('spec, part', [
    ('L1.F3', 'malformed'), ('L1F3=8', 'names no feature'), ('L-1.F3=8', 'names no feature'),
    ('L1.F3=y2', "'y2'"), ('L1.F3=nan', "'nan'"), ('L1.F3=xinf', "'xinf'"),
    ('L1.F3=2e6', "'2e6'"), ('L1.F3=1,,2', "''"),
    ('L3.F3=8', 'names no feature'), ('L1.F48=8', 'features are 0 to 47, SAEs in block 1, 2')])
def test_parse_steering_refuses(spec, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        sample.parse_steering([spec], make_model())

def test_alpha_0_cannot_be_steered(capsys, tmp_path):
    """Features that only watch; but those trained post hoc are spliced in, which is said."""
    out, steer = make_run(tmp_path), '--steer=L1.F3=9'
    model = load_checkpoint(out)['model']
    model['transformer.h.1.sae.alpha'].zero_()
    change(out, model=model)
    assert 'alpha is 0' in refused(capsys, sample, out, steer)
    change(out, config=dict(sae_posthoc=True))
    sae = load_model(load_checkpoint(out)).saes()[1]
    assert sae.posthoc and sae.alpha == 1 and 'post hoc' in capsys.readouterr().err
    assert printed(capsys, out, steer) != printed(capsys, out)

@torch.no_grad()
@pytest.mark.parametrize('site', SITES)
def test_edit_by_hand(site):
    """One SAE alone: add writes strength * W_dec[f] (at hidden: into channel f)."""
    model = make_model(sae_site=site)
    sae = model.saes()[1]
    x = torch.randn(1, 9, len(sae.fill))
    sae.alpha.fill_(0.25)
    before, out = sae(x)
    f = out.indices[0, 4, 0].item()
    row = sae.W_dec[f] if sae.site.own else torch.eye(sae.n_features)[f]
    z = torch.zeros(1, 9, sae.n_features).scatter(-1, out.indices, out.values)[..., f:f + 1]
    assert (z == 0).any() and (z != 0).any()
    for specs, by in ((['=8'], 8), (['=off'], -z), (['=x2.5'], 1.5 * z), (['=0'], 0),
                      (['=x2', '=1', '=x3'], 5 * z + 3), ([], 0)):
        specs = [f'L1.F{f}{spec}' for spec in specs]
        sample.set_steering(model, sample.parse_steering(specs, model)[0][1])
        torch.testing.assert_close(sae(x)[0], before + sae.alpha * by * row)

@torch.no_grad()
@pytest.mark.parametrize('site, n', [*zip(SITES, (1, 3, 15, 16)), ('resid', 40)])
def test_cache_equals_recomputation(site, n):
    """Steered sampling with the KV cache, past block_size too, against a full pass a token. A full
    cache goes on from the last half of the context. No other random state is touched."""
    model, prompt = make_model(sae_site=site, block_size=16), torch.randint(V, (n,)).tolist()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    settings = SimpleNamespace(**vars(SETTINGS) | dict(max_new_tokens=30, top_k=20))
    edits = sample.parse_steering(['L1.F3=20', 'L2.F5=x3', 'L2.F6=off'], model)[0][1]
    random = torch.get_rng_state()
    got = sample.sample(model, prompt, settings, seed=3, edits=edits)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert got != sample.sample(model, prompt, settings, seed=3) # unsteered again
    assert got == sample.sample(model, prompt, settings, seed=3, edits=edits)
    assert torch.equal(random, torch.get_rng_state()) and len(got) == n + 30
    sample.set_steering(model, edits)
    generator, idx, start = torch.Generator().manual_seed(3), list(prompt), max(0, n - 16)
    for _ in range(30):
        if len(idx) - start > 16:
            start = len(idx) - 8 # a full cache restarts from the last half
        logits = model(torch.tensor([idx[start:]]))[0][0, -1]
        logits[logits < logits.topk(20).values[-1]] = -torch.inf
        p = (logits / 0.8).softmax(-1)
        idx.append(torch.multinomial(p, 1, generator=generator).item())
    assert got == idx

# ---------------------------------------------------------------------------------- what is printed

def text_of(out, prompt):
    """What is printed of a sample after a prompt, a token that is not shown."""
    tokens = sample.sample(make_model(), prompt, SETTINGS, 1337)[1:]
    text = b''.join(features.open_run(out).names[token] for token in tokens)
    return sample.safe(text, keep='\n\t') + '\n'

def test_plain(capsys, run):
    out = printed(capsys, run, '--prompt=ab')
    assert out == printed(capsys, run, '--prompt=ab') and out.startswith('ab')
    assert out != printed(capsys, run, '--prompt=ab', '--seed=1')
    both = printed(capsys, run, '--prompt=ab', '--num_samples=2')
    one, two = both.split('--- seed 1338, unsteered ---\n')
    assert one.rstrip('\n').endswith(out.rstrip('\n')) and '--- seed' not in out
    assert two == printed(capsys, run, '--prompt=ab', '--seed=1338')
    assert printed(capsys, run, '--prompt=<|endoftext|>') == printed(capsys, run) # begins a text
    assert printed(capsys, run) == text_of(run, [EOT])       # without that end of text
    (run / 'prompt.txt').write_text('ab', encoding='utf-8-sig') # with Windows' mark of UTF-8
    assert printed(capsys, run, f"--prompt_file={run / 'prompt.txt'}") == out
    greedy = printed(capsys, run, '--prompt=ab', '--temperature=0')
    assert greedy == printed(capsys, run, '--prompt=ab', '--top_k=1', '--seed=1')

def test_show_features(run, capsys):
    """The largest of those that are active."""
    model = make_model()
    lines = printed(capsys, run, '--prompt=a \n', '--show_features=3').splitlines()
    lines = lines[lines.index('strongest features of the text of seed 1337, unsteered:') + 1:]
    tokens = sample.sample(model, [EOT, 97, 32, 10], SETTINGS, 1337)
    _, code = steered(model, tokens)                         # (S, T, F)
    assert len(lines) == 2 * len(tokens) # two SAE layers
    assert [line.split()[1] for line in lines[:8:2]] == ['<|endoftext|>', 'a', '·', '⏎']
    for n, line in enumerate(lines):
        t, s = divmod(n, 2)
        strongest = code[s, t].abs().argsort(descending=True)[:3].tolist()
        want = [(f'L{s + 1}.F{f}', f'{code[s, t, f]:.2f}') for f in strongest if code[s, t, f]]
        assert re.findall(r'(L\d\.F\d+) (-?[\d.]+)', line) == want and cell_len(line) <= 80

def test_stop_at_the_end_of_a_text(capsys, run):
    """--stop ends a text with its first end-of-text token; the same text goes on without it."""
    model = make_model()
    whole = sample.sample(model, [EOT, 97], SETTINGS, 1337)
    stop = whole[5]
    at = whole.index(stop, 2)
    assert sample.sample(model, [EOT, 97], SETTINGS, 1337, stop=stop) == whole[:at + 1]
    assert sample.sample(model, [EOT, 97], SETTINGS, 1337, stop=10 ** 6) == whole
    assert printed(capsys, run, '--prompt=a').startswith(
        printed(capsys, run, '--prompt=a', '--stop').rstrip('\n'))

@pytest.mark.parametrize('compare', (False, True))
def test_sweep(compare, capsys, run):
    """Texts below each other; a table of means, where only active slots count."""
    model = make_model()
    _, values, indices = features.read(model, sample.sample(model, [EOT, 97], SETTINGS, 1337))
    f = indices[1, 2:][values[1, 2:] == 0][0].item()
    out = printed(capsys, run, '--prompt=a', f'--steer=L2.F{f}=0,4', '--num_samples=2',
                  f'--compare={compare}')
    labels = {f'L2.F{f}=0': 0, f'L2.F{f}=4': 4} | ({'unsteered': 0} if compare else {})
    for label, strength in labels.items():
        losses, fires = [], []                               # of the tokens after the prompt
        for seed in (1337, 1338):
            tokens = sample.sample(model, [EOT, 97], SETTINGS, seed, [(2, f, 1.0, strength)])
            logits, code = steered(model, tokens)
            losses.append(cross_entropy(logits[1:-1], torch.tensor(tokens[2:])).item())
            fires += (code[1, 2:, f] != 0).tolist()
        numbers = f'{np.mean(losses):.3f} +{100 * np.mean(fires):.1f} %'
        assert re.search(rf'^ +{label} +{numbers}$', out, re.M)
    assert out.count(f', L2.F{f}=4 ---') == 2 and out.count(', unsteered ---') == 2 * compare
    assert printed(capsys, run, '--prompt=a') in out # strength 0 changes nothing

def test_usual_activation(capsys, run):
    path, arrays = run / 'features/0000007.npz', {'L2.count': [5] * 9, 'L2.mean': [2.5] * 9}
    assert 'usual activation is not known' in printed(capsys, run, '--steer=L2.F7=4')
    features.save_npz(path, arrays | dict(probed=200))
    out = printed(capsys, run, '--steer=L2.F7=4')
    assert ('L2.F7, on the residual stream after block 2:\n'
            '  usually 2.5 where it fires, on 2.50 % of tokens\n') in out
    path.write_bytes(b'torn')
    assert 'usual activation is not known' in printed(capsys, run, '--steer=L2.F7=4')

def test_hostile_text(capsys, run):
    hostile = bytes(range(256)).decode('latin-1')
    hostile += '\x1b[31m[red][/x]:smile:\u202e\u200d' + '宽' * 50
    (run / 'hostile.txt').write_text(hostile, encoding='utf-8', newline='')
    args = f"--prompt_file={run / 'hostile.txt'}", '--top_k=0', '--temperature=5'
    for more in ([], ['--show_features=1'], ['--steer=L1.F3=9', '--compare=true']):
        out = printed(capsys, run, *args, *more)
        assert all(c in '\n\t' or unicodedata.category(c)[0] != 'C' for c in out)
        assert more or '\u241b[31m[red][/x]:smile:<U+202E><U+200D>宽' in out

# ------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('arg, part', [
    ('--temperature=-1', 'temperature=-1.0'), ('--temperature=1e-9', 'temperature=1e-09'),
    ('--top_k=-1', 'top_k=-1'), ('--max_new_tokens=0', 'max_new_tokens=0'),
    ('--num_samples=0', 'num_samples=0'), ('--seed=-1', 'seed=-1'), ('--device=tpu9', "'tpu9'"),
    ('--compare=true', 'needs something to compare'), ('--steer=L1.F1', 'malformed')])
def test_bad_options(capsys, run, arg, part):
    assert part in refused(capsys, sample, run, arg)

def test_bad_files(capsys, tmp_path):
    said = functools.partial(refused, capsys, sample)
    assert 'no checkpoint in' in said(tmp_path)
    out, prompt = make_run(tmp_path, sae_layers=()), tmp_path / 'x'
    assert 'is dense' in said(out, '--steer=L1.F1=8')
    assert 'is dense' in said(out, '--show_features=3')
    assert printed(capsys, out, '--prompt=a') # but it samples
    prompt.write_bytes(b'\xff')
    assert 'not UTF-8' in said(out, f'--prompt_file={prompt}')

def test_no_end_of_text(capsys, tmp_path):
    """A text begins after a line break, or as it is."""
    out = make_run(tmp_path)
    tokenizer = load_checkpoint(out)['tokenizer']
    change(out, tokenizer=tokenizer | dict(meta=tokenizer['meta'] | dict(eot=None)))
    assert printed(capsys, out) == text_of(out, [10])
    assert printed(capsys, out, '--prompt=ab').startswith('ab')
