"""
train.py on two ranks (gloo, CPU): they compute what one rank computes, and when one fails nobody hangs.

    python -m pytest tests/test_ddp.py
    python -m pytest tests/test_ddp.py --slow      also torchrun itself, and a slow save
"""
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from model import load_checkpoint
from runs import (ROOT, arguments, assert_same_run, at_call, at_loss, at_save, crash, disk_full, kill, nan, out_of_memory, oversleep, records,
                  terminate, train)

@pytest.fixture(scope='module')
def pair(tiny_data, tmp_path_factory):
    """out_dir of the undisturbed run on two ranks, the counterpart of `whole`."""
    out = tmp_path_factory.mktemp('pair')
    codes, text = train(out, tiny_data, ranks=2)
    assert codes == [0, 0], text
    return out

def assert_close_run(a, b):
    """The same run up to the order of float32 sums: silence counters exactly, so the same features fired everywhere."""
    one, two = load_checkpoint(str(a))['model'], load_checkpoint(str(b))['model']
    for key, value in one.items():
        if key.endswith('silent'):
            assert torch.equal(value, two[key])
        else:
            torch.testing.assert_close(value, two[key], rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")
    for event in ('log', 'eval'):
        assert len(records(a, event)) == len(records(b, event))
        for r, q in zip(records(a, event), records(b, event)):
            sae, sae2 = r.pop('sae', {}), q.pop('sae', {})
            assert r.pop('event') == q.pop('event')
            assert r == pytest.approx(q, rel=1e-4)
            for i in sae:
                assert sae[i] == pytest.approx(sae2[i], rel=1e-4)

def test_two_ranks_equal_one(whole, pair):
    """2 ranks x 1 micro-step see the batches, dropout masks and fired features of 1 rank x 2 micro-steps. The logged loss
    is the mean over micro-steps and ranks."""
    assert_close_run(whole, pair)

def test_uneven_evaluation(tiny_data, tmp_path):
    """Three eval batches for two ranks: no hang, and the same validation numbers as on one rank."""
    assert train(tmp_path / 'one', tiny_data, eval_tokens=96, max_iters=0)[0] == 0
    assert train(tmp_path / 'two', tiny_data, eval_tokens=96, max_iters=0, ranks=2)[0] == [0, 0]
    (one,), (two,) = records(tmp_path / 'one', 'eval'), records(tmp_path / 'two', 'eval')
    for key in ('val_loss', 'val_loss_zeroed', 'val_loss_mean'):
        assert one[key] == pytest.approx(two[key], rel=1e-6)
    assert one['sae']['1'] == pytest.approx(two['sae']['1'], rel=1e-5)

def test_killed_and_resumed_on_two(pair, tiny_data, tmp_path):
    """SIGKILL of one rank: the other leaves by itself within seconds. Resumed, the run ends the same, to the bit."""
    begin = time.time()
    codes, text = train(tmp_path, tiny_data, partial(at_loss, 5, kill, rank=1), ranks=2)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None, -signal.SIGKILL), text
    assert time.time() - begin < 60
    assert load_checkpoint(str(tmp_path))['step'] == 3
    codes, text = train(tmp_path, tiny_data, ranks=2, init_from='resume')
    assert codes == [0, 0], text
    assert_same_run(pair, tmp_path)

def at_loss_of_rank_1(action):
    return partial(at_loss, 5, action, rank=1)

@pytest.mark.parametrize('what, reason', [
    (at_loss_of_rank_1(crash), 'rank 1: RuntimeError: an accident'),
    (at_loss_of_rank_1(out_of_memory), 'rank 1: out of memory with batch_size=2'),
    (at_loss_of_rank_1(oversleep), 'rank 0: another rank is gone, or silent for 2 s (rank_timeout)'),
    (at_loss_of_rank_1(kill), 'rank 0: another rank is gone, or silent for 60 s (rank_timeout)'),
    (partial(at_save, 2, disk_full), 'rank 0: no checkpoint could be saved')],
    ids=['raises', 'out of memory', 'lags', 'is killed', 'has a full disk'])
def test_all_leave_when_one_fails(what, reason, tiny_data, tmp_path):
    """The other rank leaves within rank_timeout with the reason that the first one gave, and shows no traceback of its own;
    what was saved is there."""
    begin = time.time()
    codes, text = train(tmp_path, tiny_data, what, ranks=2, rank_timeout=2 if '2 s' in reason else 60)
    assert time.time() - begin < 30
    assert 0 not in codes and None not in codes and codes[0] == 1, text
    assert f'error: {reason}' in text, text
    assert text.count('Traceback') == ('an accident' in text), text # that of an unforeseen error, on the rank that had it
    if reason.startswith('rank 1'):
        assert text.count(f'error: {reason}') == 2, text # said by both
    assert load_checkpoint(str(tmp_path))['step'] == 3

def killed_at(name):
    if os.environ['RANK'] == '1':
        at_call(torch.distributed, name, 1, kill)

@pytest.mark.parametrize('name', ['new_group', pytest.param('init_process_group', marks=pytest.mark.slow)])
def test_killed_before_the_first_step(name, tiny_data, tmp_path):
    """A rank that is gone before all have met: the other one leaves after rank_timeout, in a sentence."""
    codes, text = train(tmp_path, tiny_data, partial(killed_at, name), ranks=2, rank_timeout=2)
    assert codes == [1, -signal.SIGKILL] and 'Traceback' not in text, text
    assert 'error: another rank is gone, or silent for 2 s (rank_timeout)' in text, text

@pytest.mark.slow
def test_slow_rank_0_is_waited_for(tiny_data, tmp_path):
    """A save may take longer than rank_timeout: there the others wait.

    python -m pytest tests/test_ddp.py --slow -k waited"""
    codes, text = train(tmp_path, tiny_data, partial(at_save, 1, oversleep), ranks=2, rank_timeout=2)
    assert codes == [0, 0], text

def test_another_number_of_ranks(whole, pair, tiny_data, tmp_path):
    """Begun on 2 ranks, gone on with on 1, and back: the same run up to rounding. The signal reached one rank only, and the
    other one learns of it a step later."""
    for first, then in ((2, 1), (1, 2)):
        out = tmp_path / str(first)
        codes, text = train(out, tiny_data, partial(at_loss, 5 if first == 2 else 10, terminate, rank=1 if first == 2 else None), ranks=first)
        assert codes == ([143, 143] if first == 2 else 143), text
        assert text.count(f'after step {6 if first == 2 else 5}; saved') == 1
        codes, text = train(out, tiny_data, ranks=then, init_from='resume')
        assert codes in (0, [0, 0]), text
        assert_close_run(whole, out)

def test_nan_on_one_rank_stops_both(tiny_data, tmp_path):
    """NaN on rank 1: both stop in that step with exit code 3, and the last good checkpoint stays."""
    codes, text = train(tmp_path, tiny_data, partial(at_loss, 5, nan, rank=1), ranks=2)
    assert codes == [3, 3] and 'at step 4' in text, text
    assert load_checkpoint(str(tmp_path))['step'] == 3 and not (tmp_path / 'ckpt_prev.pt').exists()

def diverge():
    """Rank 1 nudges a little differently from rank 0: what a forgotten all-reduce does."""
    import sae
    if os.environ['RANK'] == '1':
        revive = sae.SAE.revive
        sae.SAE.revive = lambda self, fired, tokens: (revive(self, fired, tokens), self.b_enc.data.add_(1e-4))

def test_diverged_ranks_stop(tiny_data, tmp_path):
    """Weights and buffers are compared at every eval: a difference is named and ends the run, exit code 4."""
    codes, text = train(tmp_path, tiny_data, diverge, ranks=2)
    assert codes == [4, 4] and 'at step 3 the ranks hold different values of transformer.h.1.sae.b_enc' in text, text

def test_micro_batches_that_do_not_divide(tiny_data, tmp_path):
    """Three micro-batches on two ranks: refused with exit code 2 before anything is started."""
    codes, text = train(tmp_path, tiny_data, ranks=2, gradient_accumulation_steps=3)
    assert codes == [2, 2] and 'gradient_accumulation_steps=3 must be a multiple of the 2 ranks' in text

def torchrun(script, argv):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)

@pytest.mark.slow
def test_torchrun(whole, tiny_data, tmp_path):
    """The documented command gives the same run.

    python -m pytest tests/test_ddp.py --slow -k torchrun      (half a minute)"""
    r = torchrun('train.py', arguments(tmp_path, tiny_data))
    assert r.returncode == 0, r.stderr
    assert_close_run(whole, tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize('failing', [0, 1])
def test_torchrun_ends_when_a_rank_fails(failing, tiny_data, tmp_path):
    """One rank raises: torchrun ends the other within a minute and shows the reason, which both say.

    python -m pytest tests/test_ddp.py --slow -k torchrun"""
    script = tmp_path / 'accident.py'
    script.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport runs, runpy\n"
                      f"runs.at_loss(5, runs.crash, rank={failing})\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    r = torchrun(script, arguments(tmp_path / 'out', tiny_data))
    assert r.returncode != 0 and 'RuntimeError: an accident' in r.stderr
    assert r.stderr.count(f'error: rank {failing}: RuntimeError: an accident') == 2
    assert load_checkpoint(str(tmp_path / 'out'))['step'] == 3
