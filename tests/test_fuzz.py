"""Bad input of every kind, at random: nothing but the one sentence that is promised ever reaches
the user. Seeded: a failure names its case and comes again."""
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import inspect_features
import sample
from model import GPT, GPTConfig, load_checkpoint, load_model
from test_features import make_run, snapshots

JUNK = [None, True, 0, -1, 7, 1.5, float('nan'), '', 'x', 'é\x00\n', [], [1], {}, {'a': 1},
        torch.ones(3), torch.ones(0), torch.ones(8, 4).long()]

def times(few, many=10_000): # cases, without and with --slow
    return pytest.mark.parametrize('n', [few, pytest.param(many, marks=pytest.mark.slow)])

@times(100)
def test_strange_checkpoints(n, tmp_path):
    """Of another version or program, any value anywhere: a model, or ValueError in a sentence."""
    config = GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4, sae_layers=(0,),
                       sae_ratio=2, sae_k=2, sae_cap=0)
    good = dict(model=GPT(config).state_dict(), model_args=asdict(config), step=1)
    rng, refused = random.Random(3), 0
    for case in range(n):
        bad = dict(good, model=dict(good['model']), model_args=dict(good['model_args']))
        where = rng.choice([bad, bad['model'], bad['model_args'], bad['model_args']])
        key = rng.choice(list(where))
        if rng.random() < 0.2:
            where['a' + key] = where.pop(key)
        else:
            where[key] = rng.choice(JUNK)
        torch.save(rng.choice([bad, bad, bad, bad, list(bad), None]), tmp_path / 'ckpt.pt')
        try:
            load_model(load_checkpoint(str(tmp_path)))
        except ValueError as e:
            refused += 1
            assert type(e) is ValueError and str(e) and '\n' not in str(e), (case, repr(e))
    assert 0.5 * n < refused < n

VALUES = ['', '0', '1', '-1', '3', '63', '64', '999999', 'L1.F3', 'L0.F3', 'F3,L1.F4', '1.5', 'x',
          'é\U0001f600', '\x1b[31m', 'true', 'false', '.', '(', 'a|b', '[a', 'a' * 50,
          'no/such/file', 'L1.F3=8', 'L1.F3=x2', 'L1.F3=0,1', 'cpu', 'cuda', '1e99', '-5', '2']
COMMANDS = {
    inspect_features: 'layer feature examples rows effect prompt prompt_file top find probe why '
                      'target trace sort timeline html scan_tokens device seed dataset'.split(),
    sample: 'prompt prompt_file num_samples max_new_tokens temperature top_k seed show_features '
            'steer compare stop device'.split()}
SOUND = dict(feature='L1.F3', prompt='ab', prompt_file='', find='a', probe='', timeline='true',
             html='x.html', device='cpu', dataset='', steer='L1.F3=1,2', compare='true', why='true',
             target='a', trace='L1.F3', sort='entropy', stop='true') # else 1

def run_main(module, argv, capsys):
    """Whether it was refused; all it may raise is SystemExit, with a sentence or after one."""
    refused, said = False, ''
    try:
        module.main(argv)
    except SystemExit as e:
        refused = e.code not in (0, None)
        said = e.code if isinstance(e.code, str) else ''
    said += capsys.readouterr().err
    assert not refused or 'error: ' in said and 'Traceback' not in said, (argv, said)
    return refused

@times(60, 400)
@pytest.mark.parametrize('module', COMMANDS)
def test_strange_command_lines(module, n, tmp_path, capsys, monkeypatch):
    """The viewer and the sampler with random values for random keys: a view, or one sentence."""
    rng, refused = random.Random(6), 0
    snapshots(make_run(tmp_path), F=48)
    monkeypatch.chdir(tmp_path)
    for case in range(n):
        argv = ['--out_dir=out'] + ['--max_new_tokens=2'] * (module == sample)
        for key in rng.sample(COMMANDS[module], rng.randint(1, 3)):
            value = SOUND.get(key, '1') if rng.random() < 0.5 else rng.choice(VALUES)
            if key in ('num_samples', 'max_new_tokens') and value.isdigit():
                value = '2' # or it takes its time
            argv.append(f'--{key}={value}')
        refused += run_main(module, argv, capsys)
        for made in filter(Path.is_file, tmp_path.iterdir()): # a page is no prompt of a later case
            made.unlink()
    assert 0.2 * n < refused < n

def damage(raw, rng):
    """raw with a bit flipped, cut, grown, emptied, overwritten or shuffled."""
    at, some = rng.randrange(max(1, len(raw))), rng.randbytes(rng.randrange(1, 50))
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in raw[at:at + 1])
    return rng.choice([raw[:at] + flipped + raw[at + 1:]] * 2 + [
        raw[:at], raw + some, b'', raw[:at] + some + raw[at + len(some):], raw[at:] + raw[:at]])

@pytest.mark.slow
@pytest.mark.parametrize('module, views', (
    (inspect_features, ('', '--feature=L1.F3', '--timeline', '--find=a', '--prompt=ab',
                        '--feature=3 --effect=8')),
    (sample, ('--max_new_tokens=2', '--max_new_tokens=2 --steer=L1.F3=8'))))
def test_views_of_damaged_files(module, views, tmp_path, capsys):
    """Each file of a run and of the viewer's cache: seen through, mended, or named. 4 minutes."""
    rng, sound = random.Random(7), make_run(tmp_path)
    snapshots(sound, F=48)
    inspect_features.main([f'--out_dir={sound}'])
    inspect_features.main([f'--out_dir={sound}', '--timeline=true'])
    for case in range(500): # 4,000 views
        out = tmp_path / f'out{case}'
        shutil.copytree(sound, out)
        file = rng.choice(sorted(f for f in out.rglob('*') if f.is_file()))
        file.write_bytes(damage(file.read_bytes(), rng))
        for view in views:
            run_main(module, [f'--out_dir={out}', *view.split()], capsys)
        shutil.rmtree(out)
