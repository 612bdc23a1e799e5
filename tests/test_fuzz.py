"""
Bad input of every kind, at random: nothing but the one sentence that is promised ever reaches the
user.

    python -m pytest tests/test_fuzz.py             700 cases; more in test_configurator.py
    python -m pytest tests/test_fuzz.py --slow      also damaged files, and more of each

Seeded: a failure names its case and comes again. All runs in this process, on conftest.py's run.
"""
import random
import shutil
from dataclasses import asdict

import pytest
import torch

from data.dataset import load_dataset, load_tokenizer
from model import GPT, GPTConfig, load_checkpoint, load_model

JUNK = [None, True, 0, -1, 7, 1.5, float('nan'), '', 'x', 'é\x00\n', [], [1], {}, {'a': 1},
        torch.ones(3), torch.ones(0), torch.ones(8, 4).long()]
FILES = ['meta.json', 'meta.json', 'train.bin', 'val.bin', 'tokenizer.json']

def times(few, many=10_000):
    """Marks a test that runs so many cases, many more with --slow."""
    return pytest.mark.parametrize('n', [few, pytest.param(many, marks=pytest.mark.slow)])

def damage(raw, rng):
    """raw with a bit flipped, cut, grown, emptied, overwritten or shuffled."""
    raw, n = bytearray(raw), len(raw)
    at, kind = rng.randrange(max(1, n)), rng.randrange(7)
    if kind <= 1 and n:
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del raw[at:]
    elif kind == 3:
        raw += rng.randbytes(rng.randrange(1, 50))
    elif kind == 4:
        raw.clear()
    elif kind == 5:
        raw[at:at + 20] = rng.randbytes(len(raw[at:at + 20]))
    else:
        raw = raw[at:] + raw[:at]
    return bytes(raw)

def refusals(n, seed, attempt):
    """Calls attempt(rng, case) n times -> how often it raised ValueError, in one sentence."""
    rng, refused = random.Random(seed), 0
    for case in range(n):
        try:
            attempt(rng, case)
        except ValueError as e:
            refused += 1
            assert type(e) is ValueError and str(e) and '\n' not in str(e), (case, repr(e))
    return refused

@times(500)
def test_damaged_data(n, tiny_data, tmp_path):
    """Every file of a data set damaged or missing: refused in one sentence, or the tokens and their
    tokenizer are whole (a space in JSON, a letter of its source)."""
    good = load_dataset(tiny_data)
    def attempt(rng, case):
        shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
        file = tmp_path / rng.choice(FILES)
        damaged = damage(file.read_bytes(), rng)
        file.unlink()
        if rng.random() < 0.98:
            file.write_bytes(damaged)
        got = load_dataset(tmp_path, check_hash=True)
        assert (got.train == good.train).all() and (got.val == good.val).all(), case
        assert load_tokenizer(got.dir, got.meta).n_vocab == 257 <= got.meta['vocab_size'], case
    assert refusals(n, 0, attempt) > 0.9 * n

@times(100)
def test_strange_checkpoints(n, tmp_path, capsys):
    """Files that are whole, of another version or program, with any value anywhere: a model, or
    ValueError in one sentence. (Damaged ones: test_model.py, fuzzed_checkpoints.)"""
    config = GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4, sae_layers=(0,),
                       sae_ratio=2, sae_k=2, sae_cap=0)
    good = dict(model=GPT(config).state_dict(), model_args=asdict(config), step=1)
    def attempt(rng, case):
        bad = dict(good, model=dict(good['model']), model_args=dict(good['model_args']))
        where = rng.choice([bad, bad['model'], bad['model_args'], bad['model_args']])
        key = rng.choice(list(where))
        if rng.random() < 0.2:
            where['a' + key] = where.pop(key)
        else:
            where[key] = rng.choice(JUNK)
        torch.save(rng.choice([bad, bad, bad, bad, list(bad), None]), tmp_path / 'ckpt.pt')
        load_model(load_checkpoint(str(tmp_path)))
    assert 0.5 * n < refusals(n, 3, attempt) < n

VALUES = ['', '0', '1', '-1', '3', '63', '64', '999999', 'L1.F3', 'L0.F3', 'F3,L1.F4', '1.5', 'x',
          'é\U0001f600', '\x1b[31m', 'true', 'false', '.', '(', 'a|b', '[a', 'a' * 50,
          'no/such/file', 'L1.F3=8', 'L1.F3=x2', 'L1.F3=0,1', 'cpu', 'cuda', '1e99', '-5', '2']
COMMANDS = dict(
    inspect_features='layer feature examples rows effect prompt prompt_file top find probe '
                     'timeline html scan_tokens device seed dataset'.split(),
    sample='prompt prompt_file num_samples max_new_tokens temperature top_k seed show_features '
           'steer compare device'.split())
SOUND = dict(feature='L1.F3', prompt='ab', prompt_file='', find='a', probe='', timeline='true',
             html='x.html', device='cpu', dataset='', steer='L1.F3=1,2', compare='true') # else 1

def run_main(module, argv, capsys):
    """Whether it was refused; all it may raise is SystemExit, with a sentence or after one."""
    try:
        module.main(argv)
        refused = False
    except SystemExit as e:
        refused = e.code not in (0, None)
        said = e.code if isinstance(e.code, str) else capsys.readouterr().err
        assert not refused or 'error: ' in said and 'Traceback' not in said, (argv, said)
    except BaseException as e:
        raise AssertionError(f"{module.__name__} {argv}: {type(e).__name__}: {e}") from e
    capsys.readouterr()
    return refused

@times(60, 400)
@pytest.mark.parametrize('name', list(COMMANDS))
def test_strange_command_lines(name, n, whole, tmp_path, capsys, monkeypatch):
    """The viewer and the sampler with random values for random keys: a view, or one sentence."""
    module, rng, refused = pytest.importorskip(name), random.Random(6), 0
    shutil.copytree(whole, tmp_path / 'out')
    monkeypatch.chdir(tmp_path)
    for case in range(n):
        keys = rng.sample(COMMANDS[name], rng.randint(1, 3))
        argv = ['--out_dir=out'] + ['--max_new_tokens=2'] * (name == 'sample')
        for key in keys:
            value = SOUND.get(key, '1') if rng.random() < 0.5 else rng.choice(VALUES)
            if key in ('num_samples', 'max_new_tokens') and len(value) > 1 and value.isdigit():
                value = '2' # or it takes its time
            argv.append(f'--{key}={value}')
        refused += run_main(module, argv, capsys)
    assert 0.2 * n < refused < n

@pytest.mark.slow
@pytest.mark.parametrize('name', list(COMMANDS))
def test_views_of_damaged_files(name, whole, tmp_path, capsys):
    """Every file of a run and of the viewer's cache damaged in turn: seen through, mended, or named
    in one sentence. Four minutes."""
    module, rng = pytest.importorskip(name), random.Random(7)
    views = [[], ['--feature=L1.F3'], ['--timeline=true'], ['--find=a'], ['--prompt=ab'],
             ['--feature=3', '--effect=8']]
    if name == 'sample':
        views = [[], ['--steer=L1.F3=8', '--show_features=2']]
        views = [['--max_new_tokens=2', *view] for view in views]
    for case in range(1700): # 10,200 views
        out = tmp_path / f'out{case}'
        shutil.copytree(whole, out)
        if name == 'inspect_features':
            module.main([f'--out_dir={out}'])
            module.main([f'--out_dir={out}', '--timeline=true'])
        file = rng.choice(sorted(f for f in out.rglob('*') if f.is_file()))
        file.write_bytes(damage(file.read_bytes(), rng))
        for view in views:
            run_main(module, [f'--out_dir={out}', *view], capsys)
        shutil.rmtree(out)
