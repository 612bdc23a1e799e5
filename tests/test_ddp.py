"""train.py on two ranks (gloo, CPU): they compute what one does; when one fails nobody hangs."""
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from model import load_checkpoint
from runs import (ROOT, arguments, assert_same_run, at_call, at_loss, disk_full, finish, kill,
                  nan, out_of_memory, oversleep, records, resume, step_in, terminate, train)

@pytest.fixture(scope='module')
def pair(tiny_data, tmp_path_factory):
    """out_dir of the undisturbed run on two ranks, the counterpart of `whole`."""
    out = tmp_path_factory.mktemp('pair')
    finish(out, tiny_data, ranks=2)
    return out

def assert_close_run(a, b):
    """The same up to the order of float32 sums. The same features fired everywhere."""
    one, two = load_checkpoint(a)['model'], load_checkpoint(b)['model']
    for key, value in one.items():
        close = dict(rtol=0, atol=0) if key.endswith('silent') else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value, two[key], **close, msg=lambda text: f"{key}: {text}")
    for event in ('log', 'eval'):
        for r, q in zip(records(a, event), records(b, event), strict=True):
            for record in r, q:
                record |= record.pop('sae', {}).get('1', {})
            assert r.pop('event') == q.pop('event') and r == pytest.approx(q, rel=1e-4)

def test_two_ranks_equal_one(whole, pair):
    """In batches, dropout masks, fired features. Of 3 eval batches one rank has 2."""
    assert_close_run(whole, pair)

def at_step_4(action): # its first loss
    return partial(at_loss, 2 * 4 + 1, action, rank=1)

@pytest.mark.parametrize('what, reason', [
    (at_step_4(out_of_memory), 'rank 1: out of memory with batch_size=2: halve it'),
    (at_step_4(oversleep), 'rank 0: another rank is gone, or silent for 2 s (rank_timeout)'),
    (at_step_4(kill), 'rank 0: another rank is gone, or silent for 60 s (rank_timeout)'),
    (partial(at_call, 'torch.save', 2, disk_full), 'rank 0: no checkpoint could be saved in')],
    ids=['out of memory', 'lags', 'is killed', 'has a full disk'])
def test_all_leave_when_one_fails(what, reason, pair, tiny_data, tmp_path):
    """The other one leaves in time, with the first one's reason; resumed, it is the same run."""
    begin = time.time()
    codes, text = train(tmp_path, tiny_data, what, 2, rank_timeout=2 if '2 s' in reason else 60)
    assert time.time() - begin < 30
    assert codes[0] == 1 and codes[1] not in (0, None) and 'Traceback' not in text, text
    assert text.count(f'error: {reason}') >= 1 + reason.startswith('rank 1'), text # said by both
    assert step_in(tmp_path) == 3
    if codes[1] == -signal.SIGKILL:
        resume(tmp_path, tiny_data, ranks=2)
        assert_same_run(pair, tmp_path)

@pytest.mark.slow
def test_killed_before_the_first_step(tiny_data, tmp_path):
    """Before all have met: the other one leaves after rank_timeout."""
    gone = partial(at_call, 'torch.distributed.init_process_group', 1, kill, rank=1)
    codes, text = train(tmp_path, tiny_data, gone, ranks=2, rank_timeout=2)
    assert codes == [1, -signal.SIGKILL] and 'Traceback' not in text, text
    assert 'error: rank 0: another rank is gone, or silent for 2 s (rank_timeout)' in text, text

@pytest.mark.slow
def test_slow_rank_0_is_waited_for(tiny_data, tmp_path):
    """A save may take longer than rank_timeout: there the others wait."""
    slow = partial(at_call, 'torch.save', 1, oversleep)
    finish(tmp_path, tiny_data, slow, ranks=2, rank_timeout=2)

@pytest.mark.parametrize('first, then', [(2, 1), (1, 2)])
def test_another_number_of_ranks(first, then, whole, tiny_data, tmp_path):
    """The same run up to rounding. The signal reached one rank only, and both stop."""
    signalled = partial(at_loss, 9 if first == 2 else 17, terminate, rank=1 if first == 2 else None)
    codes, text = train(tmp_path, tiny_data, signalled, ranks=first)
    assert codes == ([143, 143] if first == 2 else 143), text
    assert text.count('after step 5; saved') == 1
    resume(tmp_path, tiny_data, ranks=then)
    assert_close_run(whole, tmp_path)

def diverge():
    """Rank 1 nudges a little differently from rank 0: what a forgotten all-reduce does."""
    import sae
    after = sae.SAE.after_step
    if os.environ['RANK'] == '1':
        sae.SAE.after_step = lambda self, *args: (after(self, *args), self.b_enc.data.add_(1e-4))

@pytest.mark.parametrize('what, code, words', [
    (diverge, 4, 'at step 3 the ranks hold different values of transformer.h.1.sae.b_enc'),
    (at_step_4(nan), 3, 'at step 4 the loss or a gradient was not finite')])
def test_both_stop(what, code, words, tiny_data, tmp_path):
    """At an eval a difference is named. NaN on rank 1 stops both. A good checkpoint stays."""
    codes, text = train(tmp_path, tiny_data, what, ranks=2)
    assert codes == [code, code] and words in text and step_in(tmp_path) == 3, text

def test_micro_batches_that_do_not_divide(tiny_data, tmp_path):
    """Three micro-batches on two ranks: refused with exit code 2 before anything is started."""
    codes, text = train(tmp_path, tiny_data, ranks=2, gradient_accumulation_steps=3)
    assert codes == [2, 2]
    assert 'steps=3 must be a multiple of 4, the number of ranks times sae_steps' in text

@pytest.mark.slow
def test_torchrun(whole, tiny_data, tmp_path):
    """The documented command gives the same run. Half a minute."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               ROOT / 'train.py', *arguments(tmp_path, tiny_data)]
    r = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr
    assert_close_run(whole, tmp_path)
