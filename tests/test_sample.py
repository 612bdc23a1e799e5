"""
sample.py: steering is the affine edit that it claims to be, with and without the KV cache, at all
five sites; what is printed is safe, and true; every bad input is one sentence. How a text is read
is tested in test_features.py. No download, no training: a random tiny model on bytes.

    python -m pytest tests/test_sample.py
"""
import contextlib
import re
import unicodedata
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from rich.cells import cell_len

import features
import sample
from data.dataset import write_dataset
from model import GPT, GPTConfig, save_checkpoint
from sae import SITES

SETTINGS = SimpleNamespace(**sample.DEFAULTS | dict(max_new_tokens=12))

def tiny_model(site='resid', sae_layers=(1, 2), vocab_size=257, **kwargs):
    """Random weights everywhere (as initialised, every block is the identity), alpha 1."""
    torch.manual_seed(0)
    args = dict(block_size=32, n_layer=3, n_head=2, n_embd=16, mlp_ratio=2, sae_ratio=4, sae_k=4,
                sae_cap=0)
    model = GPT(GPTConfig(vocab_size=vocab_size, sae_layers=sae_layers, sae_site=site,
                          **args | kwargs))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()

def write_data(path, eot=256):
    """A data set of bytes (256 is the end of text), without its train.bin and val.bin."""
    enc = tiktoken.Encoding('bytes', pat_str=r'(?s).', special_tokens={'<|endoftext|>': 256},
                            mergeable_ranks={bytes([i]): i for i in range(256)})
    meta = write_dataset(path, [[1, 2]], [[3]], 257, enc, 'test', eot)
    (path / 'train.bin').unlink(), (path / 'val.bin').unlink()
    return meta

def write_run(path, model, eot=256, **changes):
    meta = write_data(path / 'data', eot)
    tokenizer = dict(meta=meta, json=(path / 'data/tokenizer.json').read_text())
    checkpoint = dict(model=model.state_dict(), model_args=asdict(model.config), step=7,
                      dataset=str(path / 'data'), tokenizer=tokenizer)
    save_checkpoint(path, checkpoint | changes)
    return path

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('run'), tiny_model())

def printed(capsys, out_dir, *args):
    sample.main([f'--out_dir={out_dir}', '--device=cpu', '--max_new_tokens=12', *args])
    return capsys.readouterr().out

@contextlib.contextmanager
def steered(model, *specs):
    sample.set_steering(model, sample.parse_steering(specs, model)[0][1])
    yield
    sample.set_steering(model, [])

# --------------------------------------------------------------------------------------------------
# steering

def test_parse_steering():
    model = tiny_model()
    parse = lambda *specs: sample.parse_steering(specs, model)
    assert parse() == [('unsteered', [])]
    assert parse('L1.F3=-2.5', 'L2.F0=off') == [
        ('L1.F3=-2.5 L2.F0=off', [(1, 3, 1.0, -2.5), (2, 0, 0.0, 0.0)])]
    assert parse('L1.F3=0, x2,off', 'L1.F4=1') == [
        ('L1.F3=0 L1.F4=1', [(1, 3, 1.0, 0.0), (1, 4, 1.0, 1.0)]),
        ('L1.F3=x2 L1.F4=1', [(1, 3, 2.0, 0.0), (1, 4, 1.0, 1.0)]),
        ('L1.F3=off L1.F4=1', [(1, 3, 0.0, 0.0), (1, 4, 1.0, 1.0)])]

@pytest.mark.parametrize('specs, part', [
    (['L1.F3'], 'malformed'), (['L1F3=8'], 'names no feature'), (['L1.F3='], 'malformed'),
    (['L-1.F3=8'], 'names no feature'), (['L1.F3=y2'], "'y2'"), (['L1.F3=nan'], "'nan'"),
    (['L1.F3=xinf'], "'xinf'"), (['L1.F3=2e6'], "'2e6'"), (['L1.F3=1,,2'], "''"),
    (['L3.F3=8'], 'block 3 has no SAE; block 1, 2 has one'), (['L0.F3=8'], 'block 0 has no SAE'),
    (['L1.F64=8'], 'block 1 has features 0 to 63'),
    (['L1.F3=1,2', 'L2.F3=1,2'], 'more than one')])
def test_parse_steering_refuses(specs, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        sample.parse_steering(specs, tiny_model())

def test_alpha_zero_is_refused():
    model = tiny_model()
    model.saes()[1].alpha.zero_()
    with pytest.raises(ValueError, match='alpha is 0'):
        sample.parse_steering(['L1.F3=8'], model)

def test_post_hoc_saes_can_be_steered(capsys, tmp_path):
    """They were saved with alpha 0, since they only watched; here they act."""
    model = tiny_model()
    for sae in model.saes().values():
        sae.alpha.zero_()
    run = write_run(tmp_path, model, config=dict(sae_posthoc=True))
    sample.main([f'--out_dir={run}', '--device=cpu', '--max_new_tokens=12', '--prompt=ab',
                 '--steer=L1.F3=9'])
    seen = capsys.readouterr()
    assert 'spliced in' in seen.err and 'alpha 0' not in seen.out
    write_run(tmp_path / 'twin', tiny_model(), config=dict(sae_posthoc=True)) # saved with alpha 1
    assert seen.out == printed(capsys, tmp_path / 'twin', '--prompt=ab', '--steer=L1.F3=9')

@torch.no_grad()
@pytest.mark.parametrize('site', SITES)
def test_edit_by_hand(site):
    """One SAE alone: add writes strength * W_dec[f] (at hidden and stream: into channel f)."""
    model = tiny_model(site)
    sae = model.saes()[1]
    x = torch.randn(1, 9, 32 if site == 'hidden' else 16)
    sae.alpha.fill_(0.25)
    before, out = sae(x)
    f = out.indices[0, 4, 0].item()
    row = sae.W_dec[f] if sae.site.own else torch.eye(sae.n_features)[f]
    z = torch.zeros(1, 9, sae.n_features).scatter(-1, out.indices, out.values)[..., f:f + 1]
    assert (z == 0).any() and (z != 0).any()
    for specs, change in ((['=8'], 8), (['=off'], -z), (['=x2.5'], 1.5 * z), (['=0'], 0),
                          (['=x2', '=1', '=x3'], 5 * z + 3)):
        with steered(model, *(f'L1.F{f}{spec}' for spec in specs)):
            after, _ = sae(x)
        torch.testing.assert_close(after, before + sae.alpha * change * row, atol=1e-4, rtol=1e-4)
    assert torch.equal(sae(x)[0], before)

@torch.no_grad()
@pytest.mark.parametrize('site', SITES)
def test_cache_equals_recomputation(site):
    """Steered sampling with the KV cache, past block_size too, against a full pass a token."""
    model, prompt = tiny_model(site, block_size=16), [5, 200, 7]
    settings = SimpleNamespace(**vars(SETTINGS) | dict(max_new_tokens=30, top_k=20))
    edits = sample.parse_steering(['L1.F3=20', 'L2.F5=x3', 'L2.F6=off'], model)[0][1]
    got = sample.sample(model, prompt, settings, seed=3, edits=edits)
    assert got != sample.sample(model, prompt, settings, seed=3)
    assert got == sample.sample(model, prompt, settings, seed=3, edits=edits) and len(got) == 33
    sample.set_steering(model, edits)
    generator, idx, start = torch.Generator().manual_seed(3), list(prompt), 0
    for _ in range(30):
        if len(idx) - start > 16:
            start = len(idx) - 8 # a full cache restarts from the last half
        logits = model(torch.tensor([idx[start:]]))[0][0, -1]
        logits[logits < logits.topk(20).values[-1]] = -torch.inf
        p = (logits / 0.8).softmax(-1)
        idx.append(torch.multinomial(p, 1, generator=generator).item())
    assert got == idx

def test_sampling_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sample.sample(model, [1], SETTINGS, 0, [(1, 3, 1.0, 8.0)])
    assert all(sae.steer is None for sae in model.saes().values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def codes(model, tokens, i):
    """[{feature: activation}], one dict a token, of the SAE in block i."""
    _, _, out = model(torch.tensor([tokens]))
    s = list(model.saes()).index(i)
    return [{f: v for f, v in zip(indices, values) if v != 0}
            for indices, values in zip(out.indices[s, 0].tolist(), out.values[s, 0].tolist())]

def brute_force(model, tokens, i, f):
    """Loss and share of firing (%) of a sample whose prompt was end-of-text and one token."""
    logp = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
    loss = -np.mean([logp[t - 1, tokens[t]].item() for t in range(2, len(tokens))])
    return loss, 100 * np.mean([f in code for code in codes(model, tokens, i)[2:]])

# --------------------------------------------------------------------------------------------------
# what is printed

def test_plain(capsys, run):
    out = printed(capsys, run, '--prompt=ab')
    assert out == printed(capsys, run, '--prompt=ab') and out.startswith('ab')
    assert out != printed(capsys, run, '--prompt=ab', '--seed=1')
    both = printed(capsys, run, '--prompt=ab', '--num_samples=2')
    one, two = both.split('--- seed 1338, unsteered ---\n')
    assert one.rstrip('\n').endswith(out.rstrip('\n')) and '--- seed' not in out
    assert two == printed(capsys, run, '--prompt=ab', '--seed=1338')
    assert printed(capsys, run, '--prompt=<|endoftext|>') == printed(capsys, run) # begins a text
    tokens = sample.sample(tiny_model(), [256], SETTINGS, 1337)[1:]
    text = b''.join(b'<|endoftext|>' if t == 256 else bytes([t]) for t in tokens)
    text = sample.safe(text, keep='\n\t')
    assert printed(capsys, run) == text + '\n' # after the end of text, which is not printed
    (run / 'prompt.txt').write_text('ab', encoding='utf-8-sig') # with Windows' mark of UTF-8
    assert printed(capsys, run, f"--prompt_file={run / 'prompt.txt'}") == out
    greedy = printed(capsys, run, '--prompt=ab', '--temperature=0')
    assert greedy == printed(capsys, run, '--prompt=ab', '--top_k=1', '--seed=1')

def test_show_features(capsys, run):
    model = tiny_model()
    lines = printed(capsys, run, '--prompt=a \n', '--show_features=2').splitlines()
    lines = lines[lines.index('strongest features of the text of seed 1337, unsteered:') + 1:]
    tokens = sample.sample(model, [256, 97, 32, 10], SETTINGS, 1337)
    assert len(lines) == 2 * len(tokens) # two SAE layers
    heads = [line.split()[1] for line in lines[:8:2]]
    assert heads == ['<|endoftext|>', 'a', '·', '⏎']
    for n, line in enumerate(lines):
        t, s = divmod(n, 2)
        strongest = sorted(codes(model, tokens, s + 1)[t].items(), key=lambda item: -item[1])[:2]
        want = [(f'L{s + 1}.F{f}', f'{v:.2f}') for f, v in strongest]
        assert re.findall(r'(L\d\.F\d+) (-?[\d.]+)', line) == want
        assert len(line) <= 80

def test_show_features_by_size_of_value(capsys):
    """At stream -3 comes before 2, both are magnitudes. Slots that are not active are not shown."""
    model = tiny_model('stream', sae_layers=(1,))
    model.saes()[1].k = 3
    sample.print_features(model, [1, 2, 3], [b'a'] * 257, 4)
    for line, code in zip(capsys.readouterr().out.splitlines(), codes(model, [1, 2, 3], 1)):
        strongest = [f'{v:.2f}' for v in sorted(code.values(), key=abs)[::-1]]
        assert re.findall(r'-?\d+\.\d\d', line) == strongest and len(code) == 3

@torch.no_grad()
def test_measure_counts_active_slots_only():
    model = tiny_model()
    tokens = torch.randint(257, (30,)).tolist()
    f = max(range(64), key=lambda f: brute_force(model, tokens, 1, f)[1])
    for sae in model.saes().values():
        sae.k = 1
    loss, share = sample.measure(model, tokens, 2, [(1, f)])
    assert (loss, 100 * share) == pytest.approx(brute_force(model, tokens, 1, f), abs=1e-4)

def test_compare(capsys, run):
    model = tiny_model()
    plain = sample.sample(model, [256, 97], SETTINGS, 1337)
    f = next(iter(codes(model, plain, 1)[5])) # one that fires somewhere
    spec = f'L1.F{f}=x-3'
    turned = sample.sample(model, [256, 97], SETTINGS, 1337, [(1, f, -3.0, 0.0)])
    out = printed(capsys, run, '--prompt=a', f'--steer={spec}', '--compare=true')
    assert turned != plain and re.search(rf'unsteered +{spec}', out)
    assert max(map(len, out.splitlines())) <= 80
    for label, tokens in (('unsteered', plain), (spec, turned)):
        loss, share = brute_force(model, tokens, 1, f)
        assert re.search(rf'^{label} +{loss:.3f} +{share:.1f} %$', out, re.M)

def test_sweep(capsys, run):
    model = tiny_model()
    out = printed(capsys, run, '--prompt=a', '--steer=L2.F7=0,4', '--num_samples=2')
    for strength in (0, 4):
        texts = [sample.sample(model, [256, 97], SETTINGS, seed, [(2, 7, 1.0, strength)])
                 for seed in (1337, 1338)]
        loss, share = np.mean([brute_force(model, tokens, 2, 7) for tokens in texts], axis=0)
        assert out.count(f', L2.F7={strength} ---') == 2
        assert re.search(rf'^L2\.F7={strength} +{loss:.3f} +{share:.1f} %$', out, re.M)
    assert out.count('unsteered') == 1 # in the title of the table
    assert printed(capsys, run, '--prompt=a') in out # strength 0 changes nothing

def test_usual_activation(capsys, run):
    assert 'usual activation is not known' in printed(capsys, run, '--steer=L2.F7=4')
    (run / 'features').mkdir()
    count, mean = np.zeros((2, 64))
    count[7], mean[7] = 5, 2.5
    np.savez(run / 'features' / '0000007.npz', probed=200, **{'L2.count': count, 'L2.mean': mean})
    out = printed(capsys, run, '--steer=L2.F7=4', '--steer=L2.F8=4')
    where = 'on the residual stream after block 2'
    assert f'L2.F7, {where}: usually 2.5 where it fires, on 2.50 % of tokens' in out
    assert f'L2.F8, {where}: usually 0 where it fires, on 0.00 % of tokens' in out
    (run / 'features' / '0000007.npz').write_bytes(b'torn')
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
    assert max(map(cell_len, out.splitlines())) <= 80 # of the two columns

# --------------------------------------------------------------------------------------------------
# errors

def refused(capsys, *args):
    with pytest.raises(SystemExit) as e:
        sample.main(list(args))
    message = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
    assert e.value.code not in (0, None) and message.startswith('error: ') and '\n' not in message
    return message

@pytest.mark.parametrize('arg, part', [
    ('--temperature=-1', 'temperature=-1.0'), ('--temperature=1e-9', 'temperature=1e-09'),
    ('--top_k=-1', 'top_k=-1'), ('--max_new_tokens=0', 'max_new_tokens=0'),
    ('--num_samples=0', 'num_samples=0'), ('--seed=-1', 'seed=-1'), ('--device=tpu9', "'tpu9'"),
    ('--device=meta', "'meta'"), ('--compare=true', 'needs something to compare'),
    ('--promt=x', "did you mean 'prompt'"),
    ('--steer=L6.F1=8', 'block 6 has no SAE'), ('--steer=L1.F1', 'malformed')])
def test_bad_options(capsys, run, arg, part):
    assert part in refused(capsys, f'--out_dir={run}', arg)

def test_bad_files(capsys, tmp_path):
    out_dir, prompt_file = f'--out_dir={tmp_path}', f"--prompt_file={tmp_path / 'x'}"
    assert 'no checkpoint in' in refused(capsys, out_dir)
    write_run(tmp_path, tiny_model(sae_layers=()))
    assert 'is dense' in refused(capsys, out_dir, '--steer=L1.F1=8')
    assert 'is dense' in refused(capsys, out_dir, '--show_features=3')
    assert printed(capsys, tmp_path, '--prompt=a') # but it samples
    (tmp_path / 'x').write_bytes(b'')
    assert 'is empty' in refused(capsys, out_dir, prompt_file)
    (tmp_path / 'x').write_bytes(b'\xff')
    assert 'not UTF-8' in refused(capsys, out_dir, prompt_file)

def test_without_end_of_text(capsys, tmp_path):
    write_run(tmp_path, tiny_model(), eot=None)
    assert printed(capsys, tmp_path) # begins after a newline
    assert printed(capsys, tmp_path, '--prompt=ab').startswith('ab')
