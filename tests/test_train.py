"""train.py from end to end on one rank. Each run is a process of its own (runs.py) of 8 steps. The
one that nobody disturbed is the fixture `whole`; all that goes wrong must end in the same weights,
optimizer, SAE state and logged numbers."""
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
import runs
from data import dataset
from data.dataset import eval_batches, get_batch, load_dataset
from features import snapshot
from model import GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint
from runs import (ROOT, TINY, arguments, assert_same_run, at_call, at_loss, crash, finish, kill,
                  nan, records, refused, resume, same, send, start, step_in, times, train)

def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob('*') if f.is_file()}

# -------------------------------------------------------------- resume equals the uninterrupted run

def test_the_undisturbed_run(whole):
    """It has everything in it that could go astray on resume, and a full first record."""
    assert sorted(os.listdir(whole)) == ['ckpt.pt', 'ckpt_prev.pt', 'features', 'log.jsonl']
    assert sorted(os.listdir(whole / 'features')) == [f'{s:07d}.npz' for s in (0, 3, 6, 8)]
    first, *log = [json.loads(line) for line in (whole / 'log.jsonl').read_text().splitlines()]
    events = ', '.join(f"{r['event']} {r['step']}" for r in log)
    assert events == 'eval 0, log 2, eval 3, log 4, log 6, eval 6, log 8, eval 8'
    assert 0 < log[4]['alpha'] < 1 and 0 < log[4]['live'] < 1 # mid-blend; the nudge acts
    checkpoint = load_checkpoint(whole)
    assert checkpoint['model']['transformer.h.1.sae.silent'].any()
    _, *adamw = checkpoint['optimizers'] # Muon has the matrices
    shapes = [[tuple(state['exp_avg'].shape) for state in opt['state'].values()] for opt in adamw]
    assert shapes == [[(320, 16)], [(64, 16), (64, 16), (16,), (64,)]] # wte; the SAE
    assert first['config']['seed'] == TINY['seed'] and first['tokens_per_step'] == 128
    assert first['versions']['torch'] == torch.__version__
    assert first['params'] == sum(p.numel() for p in load_model(checkpoint).parameters())

STEP_4 = 4 * 4 + 1 # its first loss

def close_terminal(function, *args, **kwargs):
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)
    os.close(write)
    return send(signal.SIGHUP, function, *args, **kwargs)

def under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_loss(STEP_4, close_terminal)

# What happens; exit code; step of the checkpoint that is left; what is said. Four losses a step;
# saves before the evals at steps 3, 6 and 8. Renamings: the snapshot of step 0; one of the save and
# the snapshot of step 3; two of the save and the snapshot of step 6. More: test_ddp.py
BROKEN = 'at step 4 the loss or a gradient was not finite: stopped; the last checkpoint in'
STOPPED = 'after step 5; saved. Go on with --init_from=resume'
ACCIDENTS = {
    'killed between micro-batches': (partial(at_loss, STEP_4 + 2, kill), -9, 3, ''),
    'while a file is written': (partial(at_call, 'torch.save', 2, runs.half_saved_then_killed),
                                -9, 3, ''),
    'in a snapshot': (partial(at_call, 'os.replace', 6, kill), -9, 6, ''),
    'disk full': (partial(at_call, 'os.replace', 3, runs.no_space), 1, 3,
                  'error: [Errno 28] No space left'),
    'an eval crashes': (partial(at_call, 'data.dataset.eval_batches', 5, crash), 1, 3,
                        'error: RuntimeError: an accident'),
    'no compiler': (partial(at_loss, STEP_4, runs.no_compiler), 1, 3,
                    'error: the model cannot be compiled here: give --compile=False (No working'),
    'Ctrl-C': (partial(at_loss, STEP_4, partial(send, signal.SIGINT)), 130, 5, STOPPED),
    'SIGHUP': (partial(at_loss, STEP_4, partial(send, signal.SIGHUP)), 129, 5, STOPPED),
    'terminal closed under nohup': (under_nohup, 0, 8, 'step 4/8'),
    'nan in a gradient': (partial(at_loss, STEP_4, runs.nan_gradient), 3, 3, BROKEN),
    'nan and SIGTERM': (partial(at_loss, STEP_4, runs.nan_and_terminate), 3, 3, BROKEN),
}

@pytest.mark.parametrize('what', ACCIDENTS)
def test_accidents(what, whole, tiny_data, tmp_path):
    """A good checkpoint is left, a sentence says what was wrong; resumed, it is the same run."""
    accident, code, step, words = ACCIDENTS[what]
    got, text = train(tmp_path, tiny_data, accident)
    assert got == code and words in text and step_in(tmp_path) == step, text
    assert text.count('error: ') == (code in (1, 3)), text
    assert text.count('Traceback') == ('an accident' in text), text
    assert code or 'step 6/8' not in text # nobody reads any more
    if code in (1, 3):
        assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'features', 'log.jsonl']
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"event": "log", "step": 2, "lo') # torn
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)
    assert [r['at_step'] for r in records(tmp_path, 'start')] == [0, step]

@pytest.mark.parametrize('interval', ['save_interval', 'eval_interval'])
def test_what_is_not_finite_is_never_kept(interval, tiny_data, tmp_path):
    """Where nothing is logged the next save or eval finds it."""
    rare = dict(log_interval=100, save_interval=100, eval_interval=100) | {interval: 6}
    code, text = train(tmp_path, tiny_data, partial(at_loss, STEP_4, nan), **rare)
    assert code == 3 and 'at step 4' in text and ': none yet' in text, text
    assert not (tmp_path / 'ckpt.pt').exists()
    assert [r['step'] for r in records(tmp_path, 'eval')] == [0]

def test_never_saved(whole, tiny_data, tmp_path):
    """Ctrl-C before training has begun leaves at once: nothing to resume. A new run takes the
    folder over, and nothing of the old one is left in it."""
    interrupt = partial(at_call, 'torch.compile', 1, partial(send, signal.SIGINT))
    code, text = train(tmp_path, tiny_data, interrupt, compile='true')
    assert code == 130 and 'Traceback' not in text
    (tmp_path / 'features').mkdir()
    for file in 'log.jsonl', 'features/0000001.npz':
        (tmp_path / file).write_text('of the old run')
    refused(tmp_path, tiny_data, 'error: no checkpoint in', init_from='resume')
    finish(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)
    assert not [name for name, raw in contents(tmp_path).items() if b'old run' in raw]

def test_new_run_in_a_used_folder(whole, tiny_data, tmp_path):
    """Refused, and nothing is touched; also where the older checkpoint is all there is."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'ckpt.pt').unlink()
    before = contents(tmp_path)
    refused(tmp_path, tiny_data, f"out_dir={tmp_path} holds a run: --init_from=resume goes on", 2,
            init_from=whole)
    assert contents(tmp_path) == before

def test_two_runs_in_one_folder(tiny_data, tmp_path):
    """The second is refused before it touches anything. A killed run leaves no lock."""
    out = tmp_path / 'out'
    argv = arguments(out, tiny_data, max_iters=10 ** 6, save_interval=10 ** 6)
    first, = start('train.py', argv, tmp_path / 'first.txt')
    while not (out / 'log.jsonl').exists():
        assert first.exitcode is None
        first.join(0.1)
    refused(out, tiny_data, 'error: another run is training in')
    assert first.exitcode is None and records(out, 'start')[0]['config']['max_iters'] == 10 ** 6
    first.kill()
    first.join()
    finish(out, tiny_data)

def test_torn_newest_checkpoint(whole, tiny_data, tmp_path):
    """The one before is used, that is said, and the run ends the same; then nothing is to do."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / 'ckpt.pt', 9999)
    assert 'ckpt_prev.pt instead' in resume(tmp_path, tiny_data)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    resume(tmp_path, tiny_data)
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert_same_run(whole, tmp_path)

def test_watching_changes_nothing(whole, tiny_data, tmp_path):
    """Evals, snapshots and logs at every step: the same run, to the bit."""
    finish(tmp_path, tiny_data, eval_interval=1, log_interval=1, probe_tokens=32)
    one, two = load_checkpoint(whole), load_checkpoint(tmp_path)
    assert same(one['model'], two['model']) and same(one['optimizers'], two['optimizers'])
    evals = records(tmp_path, 'eval')
    assert [evals[step] for step in (0, 3, 6, 8)] == records(whole, 'eval')

def test_fp16(whole, dense, tiny_data, tmp_path):
    """Gradients that overflow skip the update and halve the scale. They are clipped as they are,
    not as they were scaled. In the log, which is strict JSON, what is not finite is null."""
    accident = partial(at_loss, 9, partial(times, math.inf))
    finish(tmp_path, tiny_data, accident, dtype='float16', log_interval=1)
    assert not re.search('NaN|Infinity', (tmp_path / 'log.jsonl').read_text())
    log = records(tmp_path, 'log')
    scale = [r['loss_scale'] for r in log]
    assert log[2]['loss'] is None and scale[1] == 2 * scale[2] and scale[2] == scale[-1]
    assert log[1]['grad_norm'] == pytest.approx(records(whole, 'log')[0]['grad_norm'], rel=0.02)
    finish(tmp_path / 'post hoc', tiny_data, accident, dtype='float16', log_interval=1,
           sae_posthoc=True, init_from=dense) # whose scaler knows the SAE's gradients alone
    assert scale == [r['loss_scale'] for r in records(tmp_path / 'post hoc', 'log')]

def test_fp16_overflow_of_one_optimizer(tiny_data, tmp_path):
    """Of a matrix alone: the embedding, which another optimizer steps, stays too."""
    accident = partial(at_call, 'kernels.mlp', 9, runs.matrix_overflows, None,
                       torch.is_grad_enabled)
    finish(tmp_path, tiny_data, accident, dtype='float16', grad_clip=0, log_interval=1)
    assert None in [r['grad_norm'] for r in records(tmp_path, 'log')]
    assert all(x.isfinite().all() for x in load_checkpoint(tmp_path)['model'].values())

# ----------------------------------------------------------------------------------------- refusals

RANGES = dict(dropout=2, sae_site='middle', batch_size=0, learning_rate=-1, warmup_iters=-1,
              min_lr_ratio=2, optimizer='sgd', lr_schedule='linear', dtype='int8', device='abacus',
              seed=-1, grad_clip=-1, beta1=1, eval_tokens=0, sae_silent_steps='many')
CONTRADICTIONS = dict(sae_layers=7, n_embd=18, sae_k=99, sae_posthoc='true', device='cuda:99',
                      sae_blend_start=0.95, bolck_size=3)
NUMBERS = [key for key, value in TINY.items()
           if type(value) in (int, float) and key != 'sae_layers']
NUMBERS += ['rank_timeout', 'weight_decay', 'beta2', 'sae_lr_factor', 'sae_nudge']

@pytest.mark.parametrize('bad', [RANGES, CONTRADICTIONS, dict.fromkeys(NUMBERS, -7)])
def test_all_problems_at_once(bad, tiny_data, tmp_path):
    """What is out of range or contradicts another, one line each, exit code 2, before any work."""
    code, text = train(tmp_path / 'out', tiny_data, **bad)
    named = re.findall(r"^error: (?:unknown key ')?(\w+)", text, re.M)
    assert code == 2 and sorted(named) == sorted(bad) and text.count('\n') == len(bad), text
    assert not (tmp_path / 'out').exists()

def test_unusable_out_dir(tiny_data, tmp_path):
    """No folder, or one that cannot be made: said before any work."""
    (tmp_path / 'a file').write_text('precious')
    for out in '', tmp_path / 'a file', tmp_path / 'a file' / 'sub':
        refused(out, tiny_data, f'out_dir={out} must be a folder that can be written', 2)
    refused('/proc/nowhere', tiny_data, '/proc/nowhere')
    assert (tmp_path / 'a file').read_text() == 'precious'

@pytest.mark.parametrize('file', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_presets_are_sound(file, tmp_path):
    """Every file in config/ passes all checks: the first thing that it then lacks is data."""
    argv = [ROOT / 'config' / file, '--dataset=/nowhere', f'--out_dir={tmp_path}', '--device=cpu']
    code, text = runs.run_script('train.py', argv)
    assert code == 1 and 'is not prepared' in text, text

def test_unusable_data(tiny_data, tmp_path):
    """A wrong bit, too short: one sentence, exit code 1. More damages are test_data.py's."""
    shutil.copytree(tiny_data, tmp_path / 'data')
    with open(tmp_path / 'data' / 'val.bin', 'r+b') as f:
        f.write(b'\x01')
    refused(tmp_path / 'out', tmp_path / 'data', 'val.bin is missing or damaged')
    refused(tmp_path / 'out', tiny_data, '3,000 tokens are too few for block_size=4000',
            block_size=4000)

def test_resume_with_another_config(whole, tiny_data, tmp_path):
    """Every key is changed: those that may not are printed with both values; nothing is touched."""
    shutil.copytree(whole, tmp_path / 'out')
    other = runs.write_tiny_data(tmp_path / 'other', train_tokens=2999)
    config = load_checkpoint(whole)['config']
    other_value = {bool: lambda x: not x, int: lambda x: x + 4, float: lambda x: x / 2 + 0.1}
    changed = {key: other_value[type(value)](value) for key, value in config.items()
               if type(value) in other_value}
    changed |= dict(
        sae_site='mlp', optimizer='adamw', lr_schedule='wsd', dtype='bfloat16', sae_layers='0,1',
        n_embd=36, max_iters=7, gradient_accumulation_steps=12, wandb_project='x',
        sae_posthoc=False, wandb_log=False) # these two cannot be on here
    code, text = train(tmp_path / 'out', other, init_from='resume', **changed)
    assert code == 2 and contents(tmp_path / 'out') == contents(whole)
    *lines, data, steps, last = text.splitlines()
    assert f'dataset={other} has another train.bin' in data and 'cannot resume' in last
    assert 'max_iters=7, but the run is at step 8' in steps
    named = sorted(line.removeprefix('error: ').partition('=')[0] for line in lines)
    readme = (ROOT / 'tests/README.md').read_text('utf-8')
    may_change = re.search('keys may change: `(.*?)`', readme, re.S)[1]
    assert named == sorted(set(config) - set(may_change.split()) - {'sae_posthoc'})
    assert 'error: n_layer=6, but n_layer=2 in the checkpoint' in lines

def test_a_longer_run_and_a_fine_tune_begin_where_the_old_one_ended(whole, tiny_data, tmp_path):
    """Alpha stays at 1, unless a key asks for another one. Another learning rate is said."""
    def goes_on(out, step):
        log = [r for r in records(out, 'log') if r['step'] > step]
        assert [r['alpha'] for r in log] == [1] * 4
        return records(out, 'eval')[-2]['val_loss'] == records(whole, 'eval')[-1]['val_loss']
    longer, tuned = tmp_path / 'longer', tmp_path / 'tuned'
    shutil.copytree(whole, longer)
    shutil.copytree(tiny_data, tmp_path / 'moved')
    text = resume(longer, tmp_path / 'moved', max_iters=16, eval_interval=8)
    assert goes_on(longer, 8)
    assert 'learning rate at step 8: 0.0003 with max_iters=8, now 0.00274\n' in text
    new = dict(init_from=whole, eval_interval=8)
    finish(tuned, tiny_data, **new)
    assert goes_on(tuned, 0)
    for asks, alpha in (dict(sae_blend_start=0.2), 0), (dict(sae_k=6), 1):
        finish(tmp_path / str(alpha), tiny_data, **new, **asks)
        first = records(tmp_path / str(alpha), 'log')[0]
        assert first['alpha'] == alpha and first['l0'] > asks.get('sae_k', 4) - 2

def set_beside_the_code(folder):
    dataset.ROOT = folder

def test_the_checkpoint_knows_its_data(whole, tiny_data, tmp_path):
    """It keeps the tokenizer, and the data's absolute path, or the name of a folder of data/."""
    folder = Path(tiny_data)
    assert load_checkpoint(whole)['tokenizer'] == dict(
        meta=dict(tokenizer='tokenizer.json', eot=256, vocab_size=257),
        json=(folder / 'tokenizer.json').read_text())
    beside = partial(set_beside_the_code, folder.parent)
    for data, accident, kept in ((os.path.relpath(folder), None, tiny_data),
                                 ('tiny', beside, 'tiny')):
        finish(tmp_path / str(accident is None), data, accident, max_iters=1)
        assert load_checkpoint(tmp_path / str(accident is None))['dataset'] == kept

def ascii_only():
    sys.stdout.reconfigure(encoding='ascii', errors='strict')

def test_ascii_terminal(tiny_data, tmp_path):
    """What cannot be shown is a question mark, and a hint can be pasted."""
    text = finish(tmp_path / 'mes données', tiny_data, ascii_only, max_iters=0)
    assert f"inspect_features.py --out_dir='{tmp_path}/mes donn?es'\n" in text

@pytest.fixture(scope='module')
def dense(tiny_data, tmp_path_factory):
    """out_dir of a dense run."""
    out = tmp_path_factory.mktemp('dense')
    finish(out, tiny_data, sae_layers='')
    return out

def test_weights_of_another_run(whole, dense, tiny_data, tmp_path):
    """--init_from=DIR takes a dense run's weights: alpha is still 0. Misfits are refused."""
    finish(tmp_path, tiny_data, init_from=dense, max_iters=0)
    assert records(dense, 'eval')[-1]['val_loss'] == records(tmp_path, 'eval')[0]['val_loss']
    named = runs.write_tiny_data(tmp_path / 'named', name='another')
    for source, data, changes, reason in (
            (dense, tiny_data, dict(n_embd=32), 'size mismatch for'),
            (dense, tiny_data, dict(n_layer=3), 'it lacks transformer.h.2.'),
            (dense, named, {}, 'their tokenizer is another than that of'),
            (whole, tiny_data, dict(sae_site='mlp'), 'their SAEs are of site resid, not mlp'),
            (whole, tiny_data, dict(sae_posthoc=True), 'sae_posthoc takes a dense model')):
        refused(tmp_path / 'new', data, f'{source} do not fit this model ({reason}',
                init_from=source, **changes)
    assert not (tmp_path / 'new').exists()

def test_resume_of_another_version(whole, tiny_data, tmp_path):
    """One sentence, and it stays. Weights alone are no run to resume."""
    good = load_checkpoint(whole)
    alone = {key: good[key] for key in good if key != 'optimizers'}
    for bad, words in ((alone, 'holds weights alone'), (good | dict(model=None), ' fit this '),
                       (good | dict(optimizers=[{}, {}]), ' fit this ')):
        save_checkpoint(tmp_path, bad)
        refused(tmp_path, tiny_data, words, init_from='resume')
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_prev.pt']

# --------------------------------------------------------------------------------- what is computed

def test_posthoc_trains_the_sae_alone(whole, dense, tiny_data, tmp_path):
    """The frozen model's weights stay, the SAE learns to reconstruct, from the hand-over on by the
    frozen model's loss, and evals splice it in."""
    last = {}
    for start in (1, 0.2):
        out = tmp_path / str(start)
        finish(out, tiny_data, init_from=dense, sae_posthoc='true', sae_recon=1, sae_nudge=0,
               learning_rate=0.01, max_iters=30, eval_interval=30,
               sae_blend_start=start, sae_blend_end=start)
        a, b = load_checkpoint(dense)['model'], load_checkpoint(out)['model']
        assert all(torch.equal(a[key], b[key]) for key in a)
        evals = records(out, 'eval')
        assert all(e['val_loss'] != e['val_loss_zeroed'] for e in evals)
        last[start] = evals[-1]['val_loss'], evals[-1]['sae']['1']['fvu']
    assert last[1][1] < evals[0]['sae']['1']['fvu'] and last[1][1] < last[0.2][1]
    assert last[0.2][0] < last[1][0]
    # made longer, it stays handed over, in evals too
    resume(out, tiny_data, sae_posthoc='true', sae_recon=1, sae_nudge=0, learning_rate=0.01,
           max_iters=160, sae_blend_start=0.2, sae_blend_end=0.2)
    assert {r['alpha'] for r in records(out, 'log')[4:]} == {1}
    refused(tmp_path / 'hidden', tiny_data, 'a sae_site of resid, mlp, attn', 2, init_from=dense,
            sae_posthoc='true', sae_site='hidden') # it has nothing to train

@pytest.mark.parametrize('changes', [
    dict(sae_site='mlp', sae_layers='0,1'), dict(sae_site='attn', optimizer='adamw'),
    dict(sae_site='hidden', dtype='bfloat16', seed=2 ** 40),
    dict(sae_site='hidden', sae_blend_start=0.5, sae_blend_end=0.5, grad_clip=0)], ids=str)
def test_every_variant_runs(changes, tiny_data, tmp_path):
    """Each site, optimiser and dtype from start to end, and its checkpoint makes a model."""
    finish(tmp_path, tiny_data, eval_interval=8, **changes)
    load_model(load_checkpoint(tmp_path))

@pytest.mark.parametrize('schedule, then', [
    ('cosine', [0.55 + 0.45 * math.cos(math.pi * n / 20) for n in range(20)]),
    ('wsd', [1] * 17 + [0.775, 0.55, 0.325])])
def test_learning_rate_by_hand(schedule, then, tiny_data, tmp_path):
    """Warm-up over 4 steps; then of 20 a cosine to a tenth, or a linear end over the last 4."""
    finish(tmp_path, tiny_data, lr_schedule=schedule, log_interval=1, warmup_iters=4,
           max_iters=24, learning_rate=0.01, eval_interval=100, sae_layers='')
    lr = [r['lr'] / 0.01 for r in records(tmp_path, 'log')]
    assert lr == pytest.approx([0.2, 0.4, 0.6, 0.8, *then])
    assert load_checkpoint(tmp_path)['optimizers'][0]['param_groups'][0]['lr'] < 0.01

def test_sae_lr_and_clipping(tiny_data, tmp_path):
    """sae_lr_factor=0.25: one step moves b_dec a quarter as far, and the rest alike. AdamW's first
    average, of the gradient's tenth, has a tenth of the length grad_clip."""
    now = {}
    for x in (1, 0.25):
        finish(tmp_path / str(x), tiny_data, sae_lr_factor=x, sae_steps=1, sae_blend_start=0,
               sae_blend_end=0, max_iters=1, optimizer='adamw', grad_clip=0.01)
        checkpoint = load_checkpoint(tmp_path / str(x))
        now[x], (*models, of_sae) = checkpoint['model'], checkpoint['optimizers']
    assert now[1]['transformer.h.1.sae.b_dec'].any()
    for name, full in now[1].items():
        if '.sae.' not in name or name.endswith('b_dec'):
            factor = 0.25 if name.endswith('b_dec') else 1
            torch.testing.assert_close(now[0.25][name], full * factor)
    for optimizers in models, [of_sae]:
        squares = [float(state['exp_avg'].square().sum())
                   for adamw in optimizers for state in adamw['state'].values()]
        assert math.sqrt(sum(squares)) == pytest.approx(0.001, rel=1e-3)
        assert optimizers[0]['param_groups'][0]['betas'] == (0.9, 0.95)

def keep_the_mean():
    import sae
    after = sae.SAE.after_step
    sae.SAE.after_step = lambda self, *seen: after(self, *seen[:-1], self.mean)

def test_steps_of_the_sae(tiny_data, tmp_path):
    """Beside a frozen model four in one step are four steps of a micro-batch, not one of four (but
    for the mean that is subtracted, which follows h in whole steps)."""
    finish(tmp_path / 'dense', tiny_data, sae_layers='', max_iters=2)
    rows, norms = {}, {}
    for name, numbers in (('in one', (1, 4, 4)), ('alone', (4, 1, 1)), ('once', (1, 4, 1))):
        steps = zip(('max_iters', 'gradient_accumulation_steps', 'sae_steps'), numbers)
        finish(tmp_path / name, tiny_data, keep_the_mean, init_from=tmp_path / 'dense',
               sae_posthoc=True, **dict(steps), warmup_iters=0, lr_schedule='wsd', grad_clip=0.05,
               dropout=0, sae_nudge=0, sae_blend_start=1, sae_blend_end=1, sae_recon=1,
               log_interval=1)
        norms[name] = [r['grad_norm'] for r in records(tmp_path / name, 'log')]
        rows[name] = load_checkpoint(tmp_path / name)['model']['transformer.h.1.sae.W_dec']
    torch.testing.assert_close(rows['in one'], rows['alone'], rtol=1e-3, atol=1e-5)
    assert (rows['once'] - rows['alone']).abs().max() > 1e-3
    assert norms['in one'] == pytest.approx([math.hypot(*norms['alone'])], rel=1e-4)

def test_train_loss_by_brute_force(tiny_data, tmp_path):
    """It is the mean since the last line; the first, its gradient's norm, and what the SAE takes
    over from that step, are recomputed."""
    for name, n in ('each', 1), ('mean', 4), ('first', 1):
        train(tmp_path / name, tiny_data, log_interval=n, dropout=0, sae_steps=1,
              max_iters=1 if name == 'first' else 4)
    each, (mean,) = records(tmp_path / 'each', 'log'), records(tmp_path / 'mean', 'log')
    for key in ('loss', 'l0', 'fvu'):
        assert mean[key] == pytest.approx(sum(r[key] for r in each) / 4, rel=1e-6)
    torch.manual_seed(TINY['seed'])
    model = GPT(GPTConfig(**load_checkpoint(tmp_path / 'each')['model_args']))
    model.saes()[1].alpha.zero_()
    tokens, losses, means, scale = load_dataset(tiny_data).train, [], 0, 0
    for micro in range(4):
        _, loss, out = model(*get_batch(tokens, 16, 2, TINY['seed'], 0, micro, 4))
        ((loss + out.loss.sum()) / 4).backward()
        losses.append(loss.item())
        means, scale = means + out.mean[0] / 4, scale + out.length[0] / 4
    first = load_checkpoint(tmp_path / 'first')['model']
    torch.testing.assert_close(first['transformer.h.1.sae.mean'], 0.1 * means)
    torch.testing.assert_close(first['transformer.h.1.sae.scale'], scale)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert each[0]['loss'] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert each[0]['grad_norm'] == pytest.approx(norm, rel=1e-5) and each[0]['tokens'] == 128

def test_eval_metrics_by_brute_force(whole, tiny_data):
    """Val loss, with the SAE zeroed and replaced by its mean, L0, FVU and shares, by plain sums."""
    record, model = records(whole, 'eval')[-1], load_model(load_checkpoint(whole))
    sae, tokens = model.saes()[1], load_dataset(tiny_data).val
    @torch.no_grad()
    def loss(gate, fill):
        sae.gate.fill_(gate)
        sae.fill.copy_(fill)
        results = [model(x, y) for x, y in eval_batches(tokens, 16, 2, TINY['eval_tokens'])]
        return float(np.mean([r[1].item() for r in results])), [r[2] for r in results]
    normal, outs = loss(1, torch.zeros(16))
    values = torch.cat([out.values.flatten() for out in outs])
    indices = torch.cat([out.indices.flatten() for out in outs])
    code = indices.bincount(values, 64)
    fired = indices[values > 0].bincount(minlength=64)
    with torch.no_grad():
        mean = code / (len(values) / 4) @ sae.W_dec + sae.b_dec # K = 4 slots a token
    want = dict(val_loss=normal, val_loss_zeroed=loss(0, torch.zeros(16))[0],
                val_loss_mean=loss(0, mean)[0])
    assert {key: record[key] for key in want} == pytest.approx(want, rel=1e-5)
    assert record['sae']['1'] == pytest.approx(dict(
        l0=np.mean([out.l0.item() for out in outs]), fvu=np.mean([out.fvu.item() for out in outs]),
        live=(code > 0).float().mean().item(),
        busiest=(fired.max() / fired.sum()).item()), rel=1e-5) # 1 % of 64 features is one

def test_snapshot_of_training(whole, tiny_data):
    """features/<step>.npz is what features.py says of the model at that step, on the probe."""
    model = load_model(load_checkpoint(whole))
    probe = eval_batches(load_dataset(tiny_data).val, 16, 2, TINY['probe_tokens'])
    with torch.no_grad():
        want = snapshot(model, (x for x, _ in probe)) | dict(step=8, tokens=8 * 128)
    saved = np.load(whole / 'features' / '0000008.npz')
    assert set(saved.files) == set(want) and saved['probed'] == 128
    for name in want:
        np.testing.assert_array_equal(saved[name], want[name], err_msg=name)

def slow_clock():
    """time.time() goes on by 1 s with each micro-batch, by 1,000 s with each pass of an eval."""
    now = [0.0]
    def takes(seconds, function, *args, **kwargs):
        now[0] += seconds()
        return function(*args, **kwargs)
    loss = kernels.linear_cross_entropy
    kernels.linear_cross_entropy = partial(takes, torch.is_grad_enabled, loss)
    dataset.eval_batches = partial(takes, lambda: 1000, dataset.eval_batches)
    time.time = lambda: now[0]

def test_tokens_a_second_by_a_slow_clock(tiny_data, tmp_path):
    """128 tokens in four micro-batches of 1 s, evals left out; times are written h:mm:ss."""
    text = finish(tmp_path, tiny_data, slow_clock, eval_interval=1, log_interval=3)
    log = map(json.loads, (tmp_path / 'log.jsonl').read_text().splitlines())
    assert [r['tok_s'] for r in log if r['event'] == 'log'] == pytest.approx([32] * 3)
    assert ' 0:00:20 left\n' in text # 5 steps of 4 s
    assert 'done in 10:00:32: ' in text # 8 steps, and 9 evals of 4 passes

# --------------------------------------------------------------------------------------------- slow

@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
def test_killed_at_random_moments(ranks, tiny_data, tmp_path):
    """SIGKILL of a random rank, every fourth time in mid-save: the same run. Two minutes."""
    changes = dict(max_iters=900, warmup_iters=500, save_interval=1, eval_interval=20,
                   log_interval=3, rank_timeout=20)
    finish(tmp_path / 'whole', tiny_data, ranks=ranks, **changes)
    rng, out, in_saves, at = random.Random(1), tmp_path / 'killed', 0, 0
    for kills in range(20):
        argv = arguments(out, tiny_data, init_from='resume' if at else 'scratch', **changes)
        processes = start('train.py', argv, tmp_path / 'text', ranks=ranks)
        victim = rng.choice(processes)
        victim.join(rng.uniform(0.2, 0.9) + 0.5 * (ranks - 1))
        end = time.time() + 5 * (kills % 4 == 3) # chance alone may miss every save
        while not (out / 'ckpt.tmp').exists() and time.time() < end:
            pass
        victim.kill()
        for p in processes:
            p.join(60)
            assert p.exitcode not in (0, None), f"finished or hung after {kills} kills"
        in_saves += (out / 'ckpt.tmp').exists()
        if at or (out / 'ckpt.pt').exists():
            at = step_in(out)
    resume(out, tiny_data, ranks=ranks, **changes)
    assert_same_run(tmp_path / 'whole', out)
    assert in_saves

@pytest.mark.slow
def test_long_run_leaks_nothing(tiny_data, tmp_path):
    """Memory and open files stay flat, and the disk holds two checkpoints, a snapshot an eval, a
    line a log or eval: LONG_RUN_MINUTES=30 pytest tests/test_train.py --slow -k leaks -s"""
    seconds, out, seen = 60 * float(os.environ.get('LONG_RUN_MINUTES', 0.5)), tmp_path / 'out', []
    argv = arguments(out, tiny_data, max_iters=10 ** 7, sae_blend_start=0, sae_blend_end=0)
    p, = start('train.py', argv, tmp_path / 'text')
    for i in range(21): # when a twentieth is over all that is allocated once has been
        p.join(seconds / 21)
        assert p.is_alive(), (tmp_path / 'text').read_text()[-1000:]
        pages = int(Path(f'/proc/{p.pid}/statm').read_text().split()[1])
        mb = pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20
        seen.append((mb, len(os.listdir(f'/proc/{p.pid}/fd'))))
        print(f"{mb:.1f} MB, {seen[-1][1]} open files", flush=True)
    p.terminate()
    p.join(60)
    assert p.exitcode == 143
    assert seen[-1][0] < seen[0][0] + 20 and seen[-1][1] <= seen[0][1] + 1
    steps, snapshots = step_in(out), sorted((out / 'features').iterdir())
    assert steps > seconds # or there was nothing to see
    assert sorted(os.listdir(out)) == ['ckpt.pt', 'ckpt_prev.pt', 'features', 'log.jsonl']
    assert [int(f.stem) for f in snapshots] == list(range(0, 3 * len(snapshots), 3))
    assert len(snapshots) >= steps // 3
    assert max(f.stat().st_size for f in snapshots) < 2 * 64 * 16 + 400 * 64 # 2 F C, and the rest
    lines = (out / 'log.jsonl').read_text().splitlines()
    assert len(lines) == 1 + steps // 2 + len(snapshots)
