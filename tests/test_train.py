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
from functools import partial

import numpy as np
import pytest
import torch

import runs
from data.dataset import eval_batches, get_batch, load_dataset
from model import GPT, GPTConfig, load_checkpoint, load_model
from runs import (ROOT, TINY, arguments, assert_same_run, at_eval, at_fsync, at_loss, at_replace, at_save, crash, half_saved_then_killed,
                  huge, inf, interrupt, kill, nan, records, same, terminate, train)
from sae import count_pairs, token_entropy

def resume(out, data, **changes):
    code, text = train(out, data, init_from='resume', **changes)
    assert code == 0, text
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
# (one the first time) and one a snapshot: 2 save, 3 snapshot (step 3); 4 and 5 save, 6 snapshot (step 6).
KILLS = {
    'in the first step after a save': partial(at_loss, 7, kill),
    'between two micro-batches': partial(at_loss, 10, kill),
    'while the file is written': partial(at_save, 2, half_saved_then_killed),
    'before it is on the disk': partial(at_fsync, 2, kill),
    'before the first renaming': partial(at_replace, 4, kill),
    'between the two renamings': partial(at_replace, 5, kill),
    'in the snapshot after the save': partial(at_replace, 6, kill),
}

@pytest.mark.parametrize('moment', KILLS)
def test_killed_and_resumed(moment, whole, tiny_data, tmp_path):
    """SIGKILL: there is a loadable checkpoint, and the resumed run ends as if nothing had happened, to the bit."""
    code, text = train(tmp_path, tiny_data, KILLS[moment])
    assert code == -signal.SIGKILL, text
    assert load_checkpoint(str(tmp_path))['step'] == (6 if 'snapshot' in moment else 3)
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
    assert code == 1 and 'No space left' in text
    assert load_checkpoint(str(tmp_path))['step'] == 3
    resume(tmp_path, tiny_data)
    assert_same_run(whole, tmp_path)

# ----------------------------------------------------------------------------------------------------
# numbers that are not finite

@pytest.mark.parametrize('what, text', [(nan, 'nan'), (inf, 'nan|inf')])
def test_stops_before_the_update(what, text, whole, tiny_data, tmp_path):
    """NaN or Inf in one micro-batch, on a step that is not logged: exit code 3, the step is named, no update is made and
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

@pytest.mark.parametrize('bad', [
    dict(sae_k=65), dict(n_embd=18, n_head=4), dict(sae_auxk=0.1, sae_site='stream'), dict(sae_posthoc='true'),
    dict(sae_blend_end=1.5), dict(beta1=1), dict(eval_tokens=0), dict(seed=10 ** 20), dict(device='cuda:99'),
    dict(sae_k_start=3), dict(weight_decay='1e999'), dict(block_size='x'), dict(bolck_size=3)])
def test_contradictions(bad, tiny_data, tmp_path):
    """K above F, C not divisible by heads, options that need each other, ...: a sentence with the key, exit code 2."""
    code, text = train(tmp_path, tiny_data, **bad)
    assert code == 2 and 'Traceback' not in text, text
    assert next(iter(bad)) in text and text.startswith('error: ')

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
    ('meta torn', 'meta.json is torn'), ('big id', 'holds token id 400'), ('too short', 'block_size=4000')])
def test_unusable_data(damage, words, tiny_data, tmp_path):
    """Missing, torn, too short, or with ids outside the vocabulary: one sentence with what to do, exit code 1."""
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
    elif damage == 'big id':
        tokens = np.fromfile(data / 'train.bin', dtype='<u2')
        tokens[77] = 400
        tokens.tofile(data / 'train.bin')
    else:
        changes = dict(block_size=4000)
    code, text = train(tmp_path / 'out', data, **changes)
    assert code == 1 and words in text and 'Traceback' not in text and text.count('\n') == 1, text

def test_resume_with_another_config(whole, tiny_data, tmp_path):
    """What decides a step must be the same: each difference is printed with both values, and nothing is touched."""
    shutil.copytree(whole, tmp_path / 'out')
    other = runs.write_tiny_data(tmp_path / 'other', train_tokens=2999)
    code, text = train(tmp_path / 'out', other, init_from='resume', n_layer=3, sae_k=5, learning_rate=0.1, sae_layers='0,1')
    assert code == 2 and 'Traceback' not in text
    for words in ('n_layer: 2 in the checkpoint, 3 now', 'sae_k: 4 in the checkpoint, 5 now', 'sae_layers: (1,) in the checkpoint',
                  'learning_rate: 0.0015 in the checkpoint, 0.1 now', 'another train.bin'):
        assert words in text, words
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
    code, text = train(out, tiny_data, init_from=dense, n_embd=32)
    assert code == 1 and 'do not fit this model' in text and 'Traceback' not in text

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
    dict(optimizer='muon'), dict(lr_schedule='wsd'), dict(sae_layers=''), dict(sae_layers='0,1'), dict(dropout=0, seed=2 ** 40),
    dict(seed=2 ** 31), dict(max_iters=0), dict(grad_clip=0), dict(sae_blend_start=0.5, sae_blend_end=0.5), dict(dtype='bfloat16')],
    ids=lambda c: ','.join(f'{k}={v}' for k, v in c.items()))
def test_every_variant_runs(changes, tiny_data, tmp_path):
    """Each site, optimiser, schedule and dtype from start to end, and its checkpoint makes a model."""
    code, text = train(tmp_path, tiny_data, eval_interval=8, **changes)
    assert code == 0, text
    if changes.get('max_iters') != 0:
        load_model(load_checkpoint(str(tmp_path)))

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
    code, positions = torch.zeros(64), 0
    for out in outs:
        for values, indices in zip(out.values[0].flatten(0, 1), out.indices[0].flatten(0, 1)):
            code[indices] += values
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

def start(out, data, **changes):
    """train.py as a process that can be watched and killed from outside."""
    argv = arguments(out, data, **changes)
    p = runs.children.Process(target=runs.child, args=('train.py', argv, str(out) + '.txt', {}, None))
    p.start()
    return p

@pytest.mark.slow
def test_killed_at_random_moments(tiny_data, tmp_path):
    """SIGKILL from outside at 20 random moments of a run that saves at every step, in mid-save among them. From the first
    save on there is always a loadable checkpoint, and the end is that of the undisturbed run, to the bit.

    python -m pytest tests/test_train.py --slow -k random_moments      (half a minute)"""
    changes = dict(max_iters=300, save_interval=1, eval_interval=20, log_interval=3)
    assert train(tmp_path / 'whole', tiny_data, **changes)[0] == 0
    rng, out, kills, has_one = random.Random(1), tmp_path / 'killed', 0, False
    while kills < 20:
        p = start(out, tiny_data, init_from='resume' if has_one else 'scratch', **changes)
        p.join(rng.uniform(0.1, 0.6))
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL, f"finished after {kills} kills: give it more steps"
        kills += 1
        has_one = has_one or (out / 'ckpt.pt').exists()
        if has_one:
            print(f"kill {kills} after step {load_checkpoint(str(out))['step']}, files {sorted(os.listdir(out))}")
    resume(out, tiny_data, **changes)
    assert_same_run(tmp_path / 'whole', out)

@pytest.mark.slow
def test_long_run_leaks_nothing(tiny_data, tmp_path):
    """1,500 steps with a save, an eval and a snapshot every third: memory and open files stay flat, disk use is two
    checkpoints and one small file a snapshot.

    python -m pytest tests/test_train.py --slow -k leaks -s     (a minute)"""
    p, seen = start(tmp_path / 'out', tiny_data, max_iters=1500, eval_interval=3, save_interval=3), []
    while p.is_alive():
        p.join(2)
        try:
            with open(f'/proc/{p.pid}/statm') as f:
                mb = int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20
            seen.append((mb, len(os.listdir(f'/proc/{p.pid}/fd'))))
        except (OSError, IndexError):
            pass # it has just ended
    assert p.exitcode == 0
    early, late = seen[len(seen) // 4], seen[-1]
    print(f"memory {early[0]:.0f} MB -> {late[0]:.0f} MB, files {early[1]} -> {late[1]}")
    assert late[0] < early[0] + 20 and late[1] <= early[1] + 1
    assert len(os.listdir(tmp_path / 'out' / 'features')) == 501
    assert sorted(f for f in os.listdir(tmp_path / 'out') if f.startswith('ckpt')) == ['ckpt.pt', 'ckpt_prev.pt']
