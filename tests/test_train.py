"""
train.py from end to end on one rank: exact resume, kills, signals, torn files, NaN, refusals, honest numbers.

    python -m pytest tests/test_train.py
    python -m pytest tests/test_train.py --slow     also 20 kills at random moments, and a run watched for leaks

Each run is a process of its own (runs.py) of 8 steps, 64 tokens each. The one that nobody disturbed is the fixture
`whole`; everything that goes wrong must end in the same weights, optimizer, SAE state and logged numbers, to the bit.
There is no random state to compare: batches and dropout are functions of (seed, step, micro-batch).
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

import runs
from data.dataset import eval_batches, get_batch, load_dataset
from model import GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint
from runs import (ROOT, TINY, arguments, assert_same_run, at_eval, at_fsync, at_loss, at_replace, at_save, crash, half_saved_then_killed,
                  huge, inf, interrupt, kill, nan, nan_gradient, out_of_memory, records, same, terminate, train)
from sae import count_pairs, token_entropy

def resume(out, data, **changes):
    code, text = train(out, data, init_from='resume', **changes)
    assert code in (0, [0, 0]), text
    return text

# ----------------------------------------------------------------------------------------------------
# resume equals the uninterrupted run

def test_the_undisturbed_run(whole):
    """What all others are compared with: it has everything in it that could go astray on resume."""
    assert sorted(os.listdir(whole)) == ['ckpt.pt', 'ckpt_prev.pt', 'features', 'log.jsonl']
    assert sorted(os.listdir(whole / 'features')) == [f'{s:07d}.npz' for s in (0, 3, 6, 8)]
    assert [r['step'] for r in records(whole, 'log')] == [2, 4, 6, 8]
    assert [r['step'] for r in records(whole, 'eval')] == [0, 3, 6, 8]
    start, middle = records(whole, 'log')[0], records(whole, 'log')[2]
    assert 0 < middle['alpha'] < 1 and 4 < middle['l0'] < start['l0'] # mid-blend, K annealing
    assert load_checkpoint(str(whole))['model']['transformer.h.1.sae.silent'].any()
    assert 0 < middle['live'] < 1                                     # some are silent: nudge and AuxK act
    assert TINY['dropout'] > 0 and TINY['gradient_accumulation_steps'] > 1 and TINY['warmup_iters'] > 3

# Two losses a step; saves before the evals at steps 3, 6 and 8. Renamings: the snapshot of step 0; then two a save
# (one the first time) and one a snapshot: 2 save, 3 snapshot (step 3); 4 and 5 save, 6 snapshot (step 6: "new").
KILLS = {
    'in the first step after a save': partial(at_loss, 7, kill),
    'between two micro-batches': partial(at_loss, 10, kill),
    'while the file is written': partial(at_save, 2, half_saved_then_killed),
    'before it is on the disk': partial(at_fsync, 2, kill),
    'before the new file is in its place': partial(at_replace, 4, kill),
    'before the old one is ckpt_prev.pt (new)': partial(at_replace, 5, kill),
    'in the snapshot after the save (new)': partial(at_replace, 6, kill),
}

@pytest.mark.parametrize('moment', KILLS)
def test_killed_and_resumed(moment, whole, tiny_data, tmp_path):
    """SIGKILL: there is a loadable checkpoint, and the resumed run ends as if nothing had happened, to the bit."""
    code, text = train(tmp_path, tiny_data, KILLS[moment])
    assert code == -signal.SIGKILL, text
    assert load_checkpoint(str(tmp_path))['step'] == (6 if 'new)' in moment else 3)
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)

def test_killed_before_the_first_save(tiny_data, tmp_path):
    """Nothing to resume from yet: one sentence, exit code 1."""
    assert train(tmp_path, tiny_data, partial(at_loss, 3, kill))[0] == -signal.SIGKILL
    code, text = train(tmp_path, tiny_data, init_from='resume')
    assert code == 1 and 'no checkpoint in' in text and 'Traceback' not in text

@pytest.mark.parametrize('sig, code', [(terminate, 143), (interrupt, 130)])
def test_signals_save_and_leave(sig, code, whole, tiny_data, tmp_path):
    """SIGTERM and Ctrl-C finish the step, save, say so and exit with 128 + signal; the resumed run is the same run,
    also where the signal came between two log lines (here: after step 5)."""
    got, text = train(tmp_path, tiny_data, partial(at_loss, 9, sig))
    assert got == code and 'after step 5; saved. Go on with --init_from=resume' in text
    assert load_checkpoint(str(tmp_path))['step'] == 5
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)

def test_torn_newest_checkpoint(whole, tiny_data, tmp_path):
    """Cut in half: the file is named, the one before is used, that is said, and the run still ends the same."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    raw = (tmp_path / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt').write_bytes(raw[:len(raw) // 2])
    text = resume(tmp_path, tiny_data)
    assert 'warning' in text and 'ckpt.pt cannot be read' in text and 'ckpt_prev.pt instead' in text
    assert_same_run(whole, tmp_path)

def test_resuming_a_finished_run(whole, tiny_data, tmp_path):
    """Nothing is left to do and nothing is changed; fewer steps than are done already is refused."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)
    code, text = train(tmp_path, tiny_data, init_from='resume', max_iters=7)
    assert code == 2 and 'max_iters=7' in text and 'step 8' in text
    assert_same_run(whole, tmp_path)

@pytest.mark.parametrize('event, changes', [
    ('log', dict(eval_interval=1)), ('log', dict(eval_interval=1000)), ('eval', dict(log_interval=1, eval_interval=3)),
    ('none', dict(eval_tokens=400, probe_tokens=32))])
def test_watching_changes_nothing(event, changes, whole, tiny_data, tmp_path):
    """Evals, snapshots and logs at every step or never: the same weights, optimizer and silence counters, to the bit."""
    code, text = train(tmp_path, tiny_data, **changes)
    assert code == 0, text
    one, two = load_checkpoint(str(whole)), load_checkpoint(str(tmp_path))
    assert same(one['model'], two['model']) and same(one['optimizers'], two['optimizers'])
    if event != 'none':
        assert records(whole, event) == records(tmp_path, event)

def test_crash_in_an_eval_loses_nothing(whole, tiny_data, tmp_path):
    """The checkpoint is written before the eval: one that raises costs no step."""
    code, text = train(tmp_path, tiny_data, partial(at_eval, 5, crash))
    assert code == 1 and 'an accident' in text
    assert load_checkpoint(str(tmp_path))['step'] == 3
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)

def test_full_disk_while_saving(whole, tiny_data, tmp_path):
    """No space left at the second save: non-zero exit, the first checkpoint is whole, and the run goes on from it."""
    code, text = train(tmp_path, tiny_data, partial(at_save, 2, runs.disk_full))
    assert code == 1 and text.count('error: ') == 1 and 'No space left' in text and 'Traceback' not in text
    assert load_checkpoint(str(tmp_path))['step'] == 3
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'features', 'log.jsonl'] # the torn half takes no room
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)

def tmpfs(path, pages):
    """A file system of that many pages of 4 KiB at path; called again, it gets another size."""
    options = f"{'remount,' if path.is_mount() else ''}size={pages * 4}k"
    path.mkdir(exist_ok=True)
    return subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(path)], capture_output=True).returncode == 0

@pytest.mark.parametrize('pages', [None] + [pytest.param(n, marks=pytest.mark.slow) for n in range(1, 200, 7)])
def test_full_disk_indeed(pages, whole, tiny_data, tmp_path):
    """A real full disk (needs root), by default one that holds a checkpoint and a half: torch says `unexpected pos` there.
    Wherever it fills up, in a save, a snapshot or the log: one sentence, what was saved is whole, and with more room the
    run ends the same, to the bit.

    python -m pytest tests/test_train.py --slow -k full_disk     (half a minute)"""
    out, size = tmp_path / 'disk', sum(f.stat().st_size for f in whole.rglob('*') if f.is_file())
    one = (whole / 'ckpt.pt').stat().st_size
    if not tmpfs(out, pages or (size - one) // 4096 + one // 8192):
        pytest.skip("cannot mount a tmpfs here")
    try:
        code, text = train(out, tiny_data)
        if code: # it is enough for the whole run at about 90 pages
            assert code == 1 and text.count('error: ') == 1 and text.endswith('\n') and 'Traceback' not in text, text
            assert 'No space left' in text or 'is the disk full?' in text, text
        assert tmpfs(out, 10_000)
        saved = (out / 'ckpt.pt').exists()
        assert pages or code == 1 and saved
        code, text = train(out, tiny_data, init_from='resume' if saved else 'scratch')
        assert code == 0, text
        assert_same_run(whole, out)
    finally:
        subprocess.run(['umount', str(out)], check=True)

def test_new_run_in_an_old_folder(whole, tiny_data, tmp_path):
    """nanoGPT writes over it. Here the old run is set aside, so that neither a later resume nor the viewer takes its files
    for the new run's, and whoever forgot --init_from=resume has lost nothing."""
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    (out / 'index.npz').write_bytes(b'of the old run')
    code, text = train(out, tiny_data, partial(at_loss, 3, kill), n_layer=3)
    assert code == -signal.SIGKILL and text.count(f'{out} held another run') == 1
    assert sorted(os.listdir(out)) == ['features', 'log.jsonl', 'previous'] and os.listdir(out / 'features') == ['0000000.npz']
    assert 'no checkpoint' in train(out, tiny_data, init_from='resume')[1]
    assert_same_run(whole, out / 'previous')
    train(out, tiny_data, max_iters=0) # it had not saved anything: what is set aside stays
    assert_same_run(whole, out / 'previous')
    for inside in (out, out / 'previous'):
        code, text = train(out, tiny_data, init_from=inside)
        assert code == 2 and f'init_from={inside} must not lie in out_dir' in text

def test_two_runs_in_one_folder(whole, tiny_data, tmp_path):
    """The second one is refused before it touches anything, and the first one ends as if alone. A killed run leaves no lock."""
    first = start(tmp_path / 'out', tiny_data, max_iters=10 ** 6)[0]
    while not (tmp_path / 'out' / 'ckpt.pt').exists():
        assert first.exitcode is None
        first.join(0.1)
    for init_from in ('scratch', 'resume'):
        code, text = train(tmp_path / 'out', tiny_data, max_iters=10 ** 6, init_from=init_from)
        assert code == 1 and 'another run is training in' in text and 'Traceback' not in text, text
    assert not (tmp_path / 'out' / 'previous').exists() and first.exitcode is None
    first.kill()
    first.join()
    code, text = train(tmp_path / 'out', tiny_data)
    assert code == 0, text
    assert_same_run(whole, tmp_path / 'out')

# ----------------------------------------------------------------------------------------------------
# numbers that are not finite

@pytest.mark.parametrize('what, text', [(nan, 'nan'), (inf, 'nan|inf'), (nan_gradient, 'nan')])
def test_stops_at_what_is_not_finite(what, text, whole, tiny_data, tmp_path):
    """NaN or Inf in one micro-batch, in the loss or only in its gradient, on a step that is not logged: exit code 3, the step is named, nothing is saved and
    the last good checkpoint is untouched; going on from it gives the undisturbed run."""
    code, said = train(tmp_path, tiny_data, partial(at_loss, 9, what)) # the first half of the step after step 4
    assert code == 3 and 'at step 4' in said and 'Traceback' not in said
    assert 'of step 3' in said # where the last checkpoint is
    assert load_checkpoint(str(tmp_path))['step'] == 3
    assert not (tmp_path / 'ckpt_prev.pt').exists()
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)

def test_nan_before_the_first_checkpoint(tiny_data, tmp_path):
    """There is none yet, and the message does not speak of one."""
    code, said = train(tmp_path, tiny_data, partial(at_loss, 2, nan))
    assert code == 3 and 'at step 0' in said and 'no checkpoint' in said
    assert not (tmp_path / 'ckpt.pt').exists()

def test_fp16_overflow_is_for_the_scaler(tiny_data, tmp_path):
    """fp16: gradients that overflow skip the update, halve the scale, and are logged; training goes on."""
    code, text = train(tmp_path, tiny_data, partial(at_loss, 5, huge), dtype='float16', log_interval=1)
    assert code == 0, text
    scale = [r['loss_scale'] for r in records(tmp_path, 'log')]
    assert scale[1] == 2 * scale[2] and scale[2] == scale[-1]

def interrupt_at_compile():
    runs.at_call(torch, 'compile', 1, interrupt)

def test_out_of_memory(tiny_data, tmp_path):
    """One sentence with what to change; and Ctrl-C before training has begun leaves no traceback either."""
    code, text = train(tmp_path, tiny_data, partial(at_loss, 3, out_of_memory))
    assert code == 1 and text.count('error: out of memory with batch_size=2') == 1 and 'Traceback' not in text
    code, text = train(tmp_path, tiny_data, interrupt_at_compile, compile='true')
    assert code == 130 and 'Traceback' not in text

def test_log_is_json_whatever_the_numbers(tiny_data, tmp_path):
    """JSON has no NaN: what is not finite is null, and every line parses strictly."""
    train(tmp_path, tiny_data, partial(at_loss, 5, inf), dtype='float16', log_interval=1)
    def refuse(name):
        raise ValueError(name)
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert any(r.get('loss', 0) is None for r in lines)

# ----------------------------------------------------------------------------------------------------
# refusals

BAD = dict(dropout=2, sae_layers=7, sae_site='middle', batch_size=0, learning_rate=-1, warmup_iters=-1, min_lr_ratio=2,
           optimizer='sgd', lr_schedule='linear', dtype='int8', device='abacus', sae_blend_start=0.95, seed=-1, grad_clip=-1)

def test_all_problems_at_once(tiny_data, tmp_path):
    """Every value that is out of range or contradicts another, one line each, exit code 2, before any work."""
    code, text = train(tmp_path, tiny_data, **BAD)
    lines = text.splitlines()
    assert code == 2 and len(lines) == len(BAD) and all(line.startswith('error: ') for line in lines), text
    for key, value in BAD.items():
        assert sum(f'{key}=' in line for line in lines) == 1, key
    assert not os.listdir(tmp_path)

def test_every_number_out_of_range(tiny_data, tmp_path):
    """Every key with a number, at -7: each is named, with text for a number among them, in one list."""
    keys = [k for k, v in TINY.items() if type(v) in (int, float) and k != 'sae_layers'] + ['rank_timeout', 'weight_decay', 'beta1', 'beta2',
            'grad_clip', 'learning_rate', 'sae_lr_factor', 'min_lr_ratio', 'sae_k_end', 'sae_blend_start', 'sae_nudge']
    code, text = train(tmp_path, tiny_data, **dict.fromkeys(keys, -7) | dict(sae_silent_tokens='many'))
    assert code == 2 and 'Traceback' not in text
    assert sorted(line.partition('=')[0] for line in text.splitlines()) == sorted(f'error: {k}' for k in set(keys)), text

@pytest.mark.parametrize('out', ['', 'a file', 'a file/sub', '/proc/nowhere'])
def test_unusable_out_dir(out, tiny_data, tmp_path):
    """No folder, or one that cannot be made: said before any work."""
    (tmp_path / 'a file').write_text('precious')
    code, text = train(out if out[:1] in ('', '/') else tmp_path / out, tiny_data)
    assert code in (1, 2) and f"out_dir={out if out[:1] == '/' else ''}" in text and text.count('\n') == 1, text
    assert (tmp_path / 'a file').read_text() == 'precious'

@pytest.mark.parametrize('bad', [
    dict(sae_k=65), dict(n_embd=18, n_head=4), dict(sae_auxk=0.1, sae_site='stream'), dict(sae_posthoc='true'),
    dict(sae_blend_end=1.5), dict(beta1=1), dict(eval_tokens=0), dict(seed=10 ** 20), dict(device='cuda:99'),
    dict(sae_k_start=3), dict(weight_decay='1e999'), dict(block_size='x'), dict(learning_rate=1e300), dict(bolck_size=3)])
def test_contradictions(bad, tiny_data, tmp_path):
    """K above F, C not divisible by heads, options that need each other, ...: a sentence with the key, exit code 2."""
    code, text = train(tmp_path, tiny_data, **bad)
    assert code == 2 and 'Traceback' not in text, text
    assert next(iter(bad)) in text and text.startswith('error: ')

@pytest.mark.parametrize('file', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_presets_are_sound(file, tmp_path):
    """Every file in config/ passes all checks: the first thing that it then lacks is data."""
    code, text = runs.run_script('train.py', [ROOT / 'config' / file, f'--dataset={tmp_path}/nowhere', '--device=cpu'])
    assert code == 1 and 'is not prepared' in text, text

def test_as_a_user_starts_it(tmp_path, tiny_data):
    """Once without the fork server: `python train.py FILE --key=value` from another folder, a typo in each."""
    config = tmp_path / 'c.py'
    config.write_text("n_layre = 2\n")
    r = subprocess.run([sys.executable, str(ROOT / 'train.py'), str(config), '--max_itres=3', f'--dataset={tiny_data}'],
                       capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 2 and r.stdout == ''
    assert "did you mean 'n_layer'?" in r.stderr and "did you mean 'max_iters'?" in r.stderr

@pytest.mark.parametrize('damage, words', [
    ('no folder', 'prepare.py'), ('no train.bin', 'train.bin is missing'), ('train.bin cut', 'train.bin has'),
    ('meta torn', 'meta.json is torn'), ('a bit flipped', 'val.bin is damaged'), ('too short', 'block_size=4000')])
def test_unusable_data(damage, words, tiny_data, tmp_path):
    """Missing, torn, too short, or with a wrong bit: one sentence with what to do, exit code 1."""
    data, changes = tmp_path / 'data', {}
    shutil.copytree(tiny_data, data)
    if damage == 'no folder':
        shutil.rmtree(data)
    elif damage == 'no train.bin':
        (data / 'train.bin').unlink()
    elif damage == 'train.bin cut':
        (data / 'train.bin').write_bytes((data / 'train.bin').read_bytes()[:-1])
    elif damage == 'meta torn':
        (data / 'meta.json').write_text((data / 'meta.json').read_text()[:40])
    elif damage == 'a bit flipped':
        raw = bytearray((data / 'val.bin').read_bytes())
        raw[500] ^= 1
        (data / 'val.bin').write_bytes(raw)
    else:
        changes = dict(block_size=4000)
    code, text = train(tmp_path / 'out', data, **changes)
    assert code == 1 and words in text and 'Traceback' not in text and text.count('\n') == 1, text

MAY_CHANGE = ('init_from out_dir dataset device dtype compile deterministic rank_timeout wandb_log wandb_project max_iters '
              'eval_interval save_interval log_interval eval_tokens probe_tokens').split() # the table in README.md

def test_resume_with_another_config(whole, tiny_data, tmp_path):
    """All that decides a step must be the same: with every key changed, each that may not is printed with both values, no
    other is, and nothing is touched."""
    shutil.copytree(whole, tmp_path / 'out')
    other = runs.write_tiny_data(tmp_path / 'other', train_tokens=2999)
    config = load_checkpoint(str(whole))['config']
    choices = dict(sae_site='mlp', optimizer='adamw', lr_schedule='wsd', dtype='bfloat16', sae_layers='0,1', dropout=0.2, beta1=0.5,
                   beta2=0.5, min_lr_ratio=0.2, n_embd=32, sae_k_end=0.7, sae_blend_start=0.2, sae_blend_end=0.8, max_iters=7,
                   sae_posthoc=False, gradient_accumulation_steps=4, wandb_project='x', sae_skip_lr=0.5)
    changed = {k: not v if type(v) is bool else v + 2 for k, v in config.items() if type(v) in (bool, int, float)} | choices
    code, text = train(tmp_path / 'out', other, init_from='resume', **changed | dict(wandb_log=False))
    assert code == 2 and 'Traceback' not in text
    lines = text.splitlines()
    assert 'dataset' in lines[-3] and 'another train.bin' in lines[-3] and 'max_iters=7' in lines[-2] and 'step 8' in lines[-2]
    assert 'cannot resume' in lines[-1]
    named = [line.removeprefix('error: ').partition('=')[0] for line in lines[:-3]]
    assert sorted(named) == sorted(set(config) - set(MAY_CHANGE) - {'sae_posthoc'}) # which cannot be on with a resume of this one
    assert 'error: n_layer=4, but n_layer=2 in the checkpoint' in lines
    assert_same_run(whole, tmp_path / 'out')

def test_resume_with_what_may_change(whole, tiny_data, tmp_path):
    """More steps, other intervals, a moved data set: the table of what may change is true, and the run goes on."""
    shutil.copytree(whole, tmp_path / 'out')
    shutil.copytree(tiny_data, tmp_path / 'moved')
    resume(tmp_path / 'out', tmp_path / 'moved', max_iters=10, eval_interval=5, log_interval=1, eval_tokens=64)
    assert load_checkpoint(str(tmp_path / 'out'))['step'] == 10
    assert [r['step'] for r in records(tmp_path / 'out', 'log')] == [2, 4, 6, 8, 9, 10]

def test_weights_of_another_run(whole, tiny_data, tmp_path):
    """--init_from=DIR takes weights: a dense run's for a model with an SAE; those that do not fit are refused."""
    dense, out = tmp_path / 'dense', tmp_path / 'out'
    assert train(dense, tiny_data, sae_layers='')[0] == 0
    code, text = train(out, tiny_data, init_from=dense, max_iters=0)
    assert code == 0, text
    loss = records(dense, 'eval')[-1]['val_loss'], records(out, 'eval')[0]['val_loss']
    assert loss[0] == loss[1] # alpha is 0 at step 0: still the dense model
    other = runs.write_tiny_data(tmp_path / 'other', vocab_size=300) # the same shapes, since both are padded to 320
    for data, changes, reason in ((tiny_data, dict(n_embd=32), 'size mismatch'), (other, {}, '257 tokens in their vocabulary, 300 in')):
        code, text = train(out, data, init_from=dense, **changes)
        assert code == 1 and 'do not fit this model' in text and reason in text and text.count('\n') == 1, text
    weights = {k: v for k, v in load_checkpoint(str(dense)).items() if k != 'optimizers'}
    save_checkpoint(str(dense), weights)
    code, text = train(dense, tiny_data, init_from='resume', sae_layers='')
    assert code == 1 and 'holds weights alone' in text and text.count('\n') == 1, text

@pytest.mark.parametrize('key, value', [('optimizers', []), ('optimizers', [{}, {}]), ('model_args', {}), ('model', None), ('step', None)])
def test_resume_of_another_version(key, value, whole, tiny_data, tmp_path):
    """A whole checkpoint that another version of the code wrote: one sentence, and it stays as it was."""
    save_checkpoint(str(tmp_path), load_checkpoint(str(whole)) | {key: value})
    before = (tmp_path / 'ckpt.pt').read_bytes()
    code, text = train(tmp_path, tiny_data, init_from='resume')
    assert code == 1 and text.count('error: ') == 1 and 'Traceback' not in text, text
    assert (tmp_path / 'ckpt.pt').read_bytes() == before

def test_posthoc_trains_the_sae_alone(tiny_data, tmp_path):
    """The classic SAE, for comparison: the frozen model's weights stay to the bit, and the SAE learns to reconstruct."""
    dense, out = tmp_path / 'dense', tmp_path / 'out'
    train(dense, tiny_data, sae_layers='')
    code, text = train(out, tiny_data, init_from=dense, sae_posthoc='true', sae_recon=1, learning_rate=0.01, max_iters=30)
    assert code == 0, text
    a, b = load_checkpoint(str(dense))['model'], load_checkpoint(str(out))['model']
    assert all(torch.equal(a[k], b[k]) for k in a)
    fvu = [r['sae']['1']['fvu'] for r in records(out, 'eval')]
    assert fvu[-1] < fvu[0]

@pytest.mark.parametrize('changes', [dict(sae_site=s, sae_auxk=0) for s in ('mlp', 'attn', 'hidden', 'stream')] + [
    dict(optimizer='adamw'), dict(lr_schedule='wsd'), dict(sae_layers=''), dict(sae_layers='0,1'), dict(dropout=0, seed=2 ** 40),
    dict(seed=2 ** 31), dict(max_iters=0), dict(grad_clip=0), dict(sae_blend_start=0.5, sae_blend_end=0.5), dict(dtype='bfloat16')],
    ids=lambda c: ','.join(f'{k}={v}' for k, v in c.items()))
def test_every_variant_runs(changes, tiny_data, tmp_path):
    """Each site, optimiser, schedule and dtype from start to end, and its checkpoint makes a model."""
    code, text = train(tmp_path, tiny_data, eval_interval=8, **changes)
    assert code == 0, text
    if changes.get('max_iters') != 0:
        load_model(load_checkpoint(str(tmp_path)))

def test_skip_lr(tiny_data, tmp_path):
    """sae_skip_lr=0.25: one step moves W_skip, from zero, a quarter as far, and all else as without it."""
    now = {}
    for x in (1, 0.25):
        code, text = train(tmp_path / str(x), tiny_data, sae_skip_lr=x, sae_token_skip=True, sae_blend_start=0, sae_blend_end=0, max_iters=1)
        assert code == 0, text
        now[x] = load_checkpoint(str(tmp_path / str(x)))['model']
    assert now[1]['transformer.h.1.sae.W_skip'].any()
    for name, full in now[1].items():
        torch.testing.assert_close(now[0.25][name], full * (0.25 if name.endswith('W_skip') else 1))

# ----------------------------------------------------------------------------------------------------
# honest numbers

def test_train_loss_by_brute_force(tiny_data, tmp_path):
    """The logged loss is the mean over the micro-steps since the last log line; the first one can be recomputed."""
    train(tmp_path / 'each', tiny_data, log_interval=1, dropout=0, max_iters=4)
    train(tmp_path / 'mean', tiny_data, log_interval=4, dropout=0, max_iters=4)
    each, (mean,) = records(tmp_path / 'each', 'log'), records(tmp_path / 'mean', 'log')
    for key in ('loss', 'l0', 'fvu'):
        assert mean[key] == pytest.approx(sum(r[key] for r in each) / 4, rel=1e-6)
    checkpoint = load_checkpoint(str(tmp_path / 'each'))
    torch.manual_seed(TINY['seed'])
    model = GPT(GPTConfig(**(checkpoint['model_args'] | dict(dropout=0.0))))
    model.saes()[1].alpha.zero_()
    tokens = load_dataset(tiny_data).train
    losses = [model(*get_batch(tokens, 16, 2, TINY['seed'], 0, micro, 2))[1].item() for micro in (0, 1)]
    assert each[0]['loss'] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert each[0]['tokens'] == 64

@pytest.mark.parametrize('eval_tokens', [128, 16])
def test_eval_metrics_by_brute_force(eval_tokens, tiny_data, tmp_path):
    """Val loss, with the SAE zeroed and replaced by its mean, L0, FVU and live share, from the checkpoint by loops; also
    where the eval tokens do not fill one batch."""
    train(tmp_path, tiny_data, eval_tokens=eval_tokens, max_iters=6)
    record = records(tmp_path, 'eval')[-1]
    model = load_model(load_checkpoint(str(tmp_path)))
    sae, tokens = model.saes()[1], load_dataset(tiny_data).val
    sae.alpha.fill_(1.0) # the last eval is at progress 1
    sae.k.fill_(4)
    def loss(mode, mean=None):
        sae.gate.fill_(mode == 'normal')
        sae.fill.copy_(mean if mode == 'mean' else torch.zeros(16))
        with torch.no_grad():
            results = [model(x, y) for x, y in eval_batches(tokens, 16, 2, eval_tokens)]
        return float(np.mean([r[1].item() for r in results])), [r[2] for r in results]
    normal, outs = loss('normal')
    code, fired, positions = torch.zeros(64), torch.zeros(64), 0
    for out in outs:
        for values, indices in zip(out.values[0].flatten(0, 1), out.indices[0].flatten(0, 1)):
            code[indices] += values
            fired[indices] += values > 0
            positions += 1
    with torch.no_grad():
        mean = code / positions @ sae.W_dec + sae.b_dec
    close = lambda a, b: a == pytest.approx(b, rel=1e-5)
    assert close(record['val_loss'], normal)
    assert close(record['val_loss_zeroed'], loss('zeroed')[0])
    assert close(record['val_loss_mean'], loss('mean', mean)[0])
    assert close(record['sae']['1']['l0'], float(np.mean([out.l0.item() for out in outs])))
    assert close(record['sae']['1']['fvu'], float(np.mean([out.fvu.item() for out in outs])))
    assert close(record['sae']['1']['live'], (code > 0).float().mean().item())
    assert close(record['sae']['1']['busiest'], (fired.max() / fired.sum()).item()) # 1 % of 64 features is one

def test_snapshot_by_brute_force(whole, tiny_data):
    """features/<step>.npz: how often each feature fired on the probe, how strongly, on what, with what token entropy."""
    snap = np.load(whole / 'features' / '0000008.npz')
    model = load_model(load_checkpoint(str(whole)))
    counts, sums, seen = np.zeros(64, int), np.zeros(64), [[] for _ in range(64)]
    model.saes()[1].alpha.fill_(1.0)
    model.saes()[1].k.fill_(4)
    for x, _ in eval_batches(load_dataset(tiny_data).val, 16, 2, TINY['probe_tokens']):
        with torch.no_grad():
            out = model(x)[2]
        for v, i, t in zip(out.values[0].flatten(0, 1), out.indices[0].flatten(0, 1), x.flatten()):
            for value, f in zip(v.tolist(), i.tolist()):
                if value > 0:
                    counts[f] += 1
                    sums[f] += value
                    seen[f].append(int(t))
    assert snap['probed'] == 128 and snap['step'] == 8 and snap['tokens'] == 512 and snap['layers'].tolist() == [1]
    assert (snap['L1.count'] == counts).all()
    np.testing.assert_allclose(snap['L1.mean'], sums / counts.clip(1), rtol=1e-5)
    for f in range(64):
        if not counts[f]:
            assert np.isnan(snap['L1.entropy'][f])
            continue
        p = np.bincount(seen[f])[np.unique(seen[f])] / counts[f]
        assert snap['L1.entropy'][f] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-5)
        assert snap['L1.top_counts'][f, 0] == np.bincount(seen[f]).max()
    np.testing.assert_allclose(snap['L1.W_dec'], model.saes()[1].W_dec.detach().numpy(), atol=1e-3)

def slow_clock():
    """time.time() goes on by 1 s with each training micro-batch and by 1,000 s with each pass of an eval, and stands else."""
    import data.dataset
    now, F, eval_batches = [0.0], torch.nn.functional, data.dataset.eval_batches
    cross_entropy = F.cross_entropy
    def loss(*args, **kwargs):
        now[0] += 1 if torch.is_grad_enabled() else 0
        return cross_entropy(*args, **kwargs)
    def batches(*args):
        now[0] += 1000
        return eval_batches(*args)
    F.cross_entropy, data.dataset.eval_batches, runs.time.time = loss, batches, lambda: now[0]

def test_tokens_a_second_by_a_slow_clock(tiny_data, tmp_path):
    """tok_s counts the tokens of all steps since the last log line over the time they took, saves and evals left out."""
    code, text = train(tmp_path, tiny_data, slow_clock, eval_interval=1, log_interval=3)
    lines = (json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines())
    speeds = [r['tok_s'] for r in lines if r['event'] == 'log']
    assert len(speeds) == 3 and speeds == pytest.approx([32] * 3) # 64 tokens in two micro-batches of 1 s, whatever comes between

def test_start_of_the_log(whole, tiny_data):
    """The log's first line is a full record: config, versions, sizes."""
    start, = records(whole, 'start')
    assert start['config']['sae_k'] == 4 and start['config']['dataset'] == tiny_data
    assert start['versions']['torch'] == torch.__version__ and start['tokens_per_step'] == 64
    checkpoint = load_checkpoint(str(whole))
    assert start['params'] == sum(p.numel() for p in load_model(checkpoint).parameters())
    assert checkpoint['config']['n_layer'] == checkpoint['model_args']['n_layer'] == 2

# ----------------------------------------------------------------------------------------------------
# slow

def start(out, data, ranks=1, **changes):
    """train.py as processes that can be watched and killed from outside."""
    argv, port = arguments(out, data, **changes), runs.free_port()
    processes = [runs.children.Process(target=runs.child, args=('train.py', argv, str(out) + '.txt', env, None))
                 for env in runs.environments(ranks, port)]
    for p in processes:
        p.start()
    return processes

@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
def test_killed_at_random_moments(ranks, tiny_data, tmp_path):
    """SIGKILL of a random rank at 20 random moments of a run that saves at every step, every fourth in mid-save. From the
    first save on there is always a loadable checkpoint, a second rank leaves by itself, and the end is that of the
    undisturbed run, to the bit. Warm-up, alpha, K annealing and dropout go on over the whole run.

    python -m pytest tests/test_train.py --slow -s -k random_moments      (two minutes)"""
    changes = dict(ranks=ranks, max_iters=900, warmup_iters=500, gradient_accumulation_steps=4, save_interval=1, eval_interval=20,
                   log_interval=3, rank_timeout=20)
    assert train(tmp_path / 'whole', tiny_data, **changes)[0] in (0, [0, 0])
    rng, out, kills, in_saves, at = random.Random(1), tmp_path / 'killed', 0, 0, 0
    while kills < 20:
        processes = start(out, tiny_data, init_from='resume' if at else 'scratch', **changes)
        victim = rng.choice(processes)
        victim.join(rng.uniform(0.2, 0.9) + 0.5 * (ranks - 1))
        if kills % 4 == 3: # chance alone may miss every save
            end = time.time() + 5
            while not (out / 'ckpt.tmp').exists() and time.time() < end:
                pass
        victim.kill()
        for p in processes:
            p.join(60)
            assert p.exitcode not in (0, None), f"finished or hung after {kills} kills"
        assert victim.exitcode == -signal.SIGKILL
        kills += 1
        in_saves += any((out / name).exists() for name in ('ckpt.tmp', 'ckpt.old'))
        if at or (out / 'ckpt.pt').exists():
            at = load_checkpoint(str(out))['step']
            print(f"kill {kills} after step {at}, files {sorted(os.listdir(out))}")
    resume(out, tiny_data, **changes)
    assert_same_run(tmp_path / 'whole', out)
    print(f"{in_saves} of {kills} in mid-save")
    assert in_saves

@pytest.mark.slow
def test_long_run_leaks_nothing(tiny_data, tmp_path):
    """Steps with a save, an eval and a snapshot every third: memory and open files stay flat, and the disk holds two
    checkpoints, one features/<step>.npz an eval, one line a log or eval, and nothing else.

    python -m pytest tests/test_train.py --slow -k leaks -s         (half a minute)
    LONG_RUN_MINUTES=30 python -m pytest tests/test_train.py --slow -k leaks -s"""
    seconds, out, seen = 60 * float(os.environ.get('LONG_RUN_MINUTES', 0.5)), tmp_path / 'out', []
    (p,) = start(out, tiny_data, max_iters=10 ** 7, eval_interval=3, save_interval=3, sae_blend_start=0, sae_blend_end=0)
    for i in range(21): # the first look is when a twentieth is over: all that is allocated once has been
        p.join(seconds / 21)
        assert p.is_alive(), (tmp_path / 'out.txt').read_text()[-1000:]
        with open(f'/proc/{p.pid}/statm') as f:
            mb = int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20
        seen.append((mb, len(os.listdir(f'/proc/{p.pid}/fd'))))
        print(f"{(i + 1) * seconds / 21:5.0f} s: {mb:.1f} MB, {seen[-1][1]} open files", flush=True)
    p.terminate()
    p.join(60)
    assert p.exitcode == 143
    steps, snapshots = load_checkpoint(str(out))['step'], sorted((out / 'features').iterdir())
    log, size = (out / 'log.jsonl').read_bytes(), lambda files: sum(f.stat().st_size for f in files)
    disk = size(f for f in out.rglob('*') if f.is_file())
    print(f"{steps:,} steps: memory {seen[0][0]:.0f} -> {seen[-1][0]:.0f} MB, open files {seen[0][1]} -> {seen[-1][1]}; disk {disk:,} bytes: "
          f"2 checkpoints {size(out.glob('*.pt')):,}, {len(snapshots):,} snapshots {size(snapshots):,}, log {len(log):,}")
    assert steps > seconds # or there was nothing to see
    assert seen[-1][0] < seen[0][0] + 20 and seen[-1][1] <= seen[0][1] + 1
    assert sorted(os.listdir(out)) == ['ckpt.pt', 'ckpt_prev.pt', 'features', 'log.jsonl']
    assert [int(f.stem) for f in snapshots] == list(range(0, steps + 1, 3))[:len(snapshots)] and len(snapshots) >= steps // 3
    assert max(f.stat().st_size for f in snapshots) < 2 * 64 * 16 + 400 * 64 # 2 F C, and top tokens, counts, ... of F features
    assert len(log.splitlines()) == 1 + steps // 2 + len(snapshots) and len(log) < 500 * (steps + 10)
