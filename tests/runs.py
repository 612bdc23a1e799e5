"""Runs train.py for the tests, on a tiny data set. A fresh Python needs seconds to import torch, so
the runs are children of a fork server that imported it once; each is a process of its own with a
real exit code, and can be killed. An `accident` is called in the child before train.py starts, e.g.
partial(at_loss, 5, kill): what goes wrong, and when."""
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.dataset import write_dataset
from model import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
children = multiprocessing.get_context('forkserver')
children.set_forkserver_preload(['torch', 'numpy', 'torch.distributed', 'torch.nn.parallel',
                                 'torch._dynamo'])

# 8 steps of 4 micro-batches, 128 tokens a step; 3 eval batches, so that two ranks share them
# unevenly. All that changes over a run is still changing at step 4: warm-up, alpha, scale, which
# features are silent
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, mlp_ratio=2, batch_size=2,
    gradient_accumulation_steps=4, dropout=0.1, sae_layers=1, sae_ratio=4, sae_k=4,
    sae_steps=2, sae_recon=0.01, sae_silent_steps=2, sae_cap=0.3, sae_blend_start=0.1,
    sae_blend_end=0.9, lr_schedule='cosine', max_iters=8, warmup_iters=6, eval_interval=3,
    save_interval=3, log_interval=2, eval_tokens=96, probe_tokens=128, seed=6, device='cpu',
    dtype='float32', compile='false')

def write_tiny_data(out, train_tokens=3000, vocab_size=257, name='bytes'):
    """Random letters with a byte-level tokenizer of 257 tokens; returns the folder as text."""
    import tiktoken
    enc = tiktoken.Encoding(name, pat_str='.', special_tokens={'<|endoftext|>': 256},
                            mergeable_ranks={bytes([i]): i for i in range(256)})
    alphabet = np.frombuffer(b'aaaabbbccd   \n', dtype=np.uint8)
    letters = np.random.default_rng(0).choice(alphabet, train_tokens + 500)
    write_dataset(out, [letters[:train_tokens]], [letters[train_tokens:]], vocab_size, enc,
                  'random letters', 256)
    return str(out)

def arguments(out, data, **changes):
    return [f'--{k}={v}' for k, v in (dict(out_dir=out, dataset=data) | TINY | changes).items()]

def train(out, data, accident=None, ranks=1, **changes):
    """train.py with TINY and changes -> exit code (of ranks > 1 a list), and all it printed."""
    return run_script('train.py', arguments(out, data, **changes), accident, ranks)

def finish(out, data, accident=None, **changes):
    """The same of a run that must end well -> what it printed."""
    code, text = train(out, data, accident, **changes)
    assert code in (0, [0, 0]), text
    return text

def refused(out, data, words, want=1, **changes):
    """The same of a run that must end with that exit code and one line with these words."""
    code, text = train(out, data, **changes)
    assert code == want and text.startswith('error: ') and text.count('\n') == 1, text
    assert words in text

def resume(out, data, **changes):
    return finish(out, data, init_from='resume', **changes)

def run_script(script, argv, accident=None, ranks=1):
    """Runs a script of the repository as python would, or with several ranks as torchrun."""
    with tempfile.NamedTemporaryFile('r') as printed:
        processes = start(script, argv, printed.name, accident, ranks)
        for p in processes:
            p.join(120)
            if p.exitcode is None: # it hangs
                p.kill()
                p.join()
        codes = [p.exitcode for p in processes]
        return codes if ranks > 1 else codes[0], printed.read()

def start(script, argv, path, accident=None, ranks=1):
    """The same as processes that can be watched and killed; what they print goes to path."""
    processes = []
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)) # a free one
        port = s.getsockname()[1]
    for rank in range(ranks):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR='127.0.0.1',
                   MASTER_PORT=port) if ranks > 1 else {} # what torchrun sets
        args = script, list(map(str, argv)), str(path), env, accident
        processes.append(children.Process(target=child, args=args, daemon=True)) # ends with us
        processes[-1].start()
    return processes

def child(script, argv, path, env, accident):
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({k: str(v) for k, v in env.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)             # and those of nohup this
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    sys.path.insert(0, str(ROOT))
    if accident:
        accident()
    try:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info()) # as the interpreter would; multiprocessing has its own way
        os._exit(1)
    finally:
        sys.stdout.flush()

# ---------------------------------------------------------------------------------- accidents: when

def at_call(target, n, action, rank=None, counts=lambda: True, put=setattr):
    """The n-th call of target, e.g. 'os.replace', becomes action(function, *arguments). rank: on
    that rank alone; counts: which calls count; put: in a test's own process monkeypatch.setattr."""
    if rank is not None and os.environ.get('RANK') != str(rank):
        return
    module, name = target.rsplit('.', 1)
    module = importlib.import_module(module)
    function, calls = getattr(module, name), 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += counts()
        hit = calls == n and counts()
        return action(function, *args, **kwargs) if hit else function(*args, **kwargs)
    put(module, name, wrapped)

def at_loss(n, action, rank=None):
    """The n-th training loss (from 1): there are four a step, on two ranks two each."""
    at_call('kernels.linear_cross_entropy', n, action, rank, torch.is_grad_enabled)

# ---------------------------------------------------------------------------------- accidents: what

def send(signum, function, *args, **kwargs):
    os.kill(os.getpid(), signum)
    return function(*args, **kwargs)

kill, terminate = partial(send, signal.SIGKILL), partial(send, signal.SIGTERM)

def times(factor, function, *args, **kwargs):
    return function(*args, **kwargs) * factor

nan = partial(times, float('nan'))

def nan_gradient(function, *args, **kwargs):
    """A loss that looks sound and whose gradient is not."""
    loss = function(*args, **kwargs)
    loss.register_hook(lambda grad: grad * float('nan'))
    return loss

def matrix_overflows(mlp, x, W_fc, W_proj):
    W_fc = W_fc.clone()
    W_fc.register_hook(lambda grad: grad * float('inf'))
    return mlp(x, W_fc, W_proj)

def nan_and_terminate(function, *args, **kwargs):
    return nan(partial(terminate, function), *args, **kwargs)

def raising(error, *args, **kwargs):
    raise error

crash = partial(raising, RuntimeError("an accident"))
out_of_memory = partial(raising, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
interrupt = partial(raising, KeyboardInterrupt())
no_space = partial(raising, OSError(28, "No space left on device"))

def no_compiler(*args, **kwargs):
    from torch._inductor.exc import InvalidCxxCompiler # what torch.compile raises, in a wrapping
    raise InvalidCxxCompiler

def oversleep(function, *args, **kwargs):
    time.sleep(3)
    return function(*args, **kwargs)

def half_saved(then, save, checkpoint, f):
    f.write(b'PK' + os.urandom(1000))
    f.flush()
    then(None)

half_saved_then_killed = partial(half_saved, kill)
disk_full = partial(half_saved, partial(raising, RuntimeError("unexpected pos 320\nof torch")))

# ----------------------------------------------------------------------------------- comparing runs

def step_in(out):
    return load_checkpoint(out)['step']

def same(a, b):
    """Equal to the bit, however deep."""
    if isinstance(a, torch.Tensor):
        bits = lambda t: (t.dtype, t.shape, t.numpy().tobytes())
        return bits(a) == bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def records(out, event):
    """The records of log.jsonl with that event, without what the clock decides. As for every
    reader of a log, of several lines of one step the last counts, and torn lines do not."""
    found = {}
    for line in (Path(out) / 'log.jsonl').read_text().splitlines():
        with suppress(ValueError): # torn
            record = json.loads(line)
            record.pop('tok_s', None)
            if record['event'] == event:
                found[record.get('step', record.get('at_step'))] = record
    return [found[step] for step in sorted(found)]

def assert_same_run(a, b):
    """Both runs ended in the same state and logged the same numbers, to the bit."""
    one, two = load_checkpoint(a), load_checkpoint(b)
    for key in ('step', 'model', 'model_args', 'optimizers', 'scaler'):
        assert same(one[key], two[key]), key
    for event in 'log', 'eval':
        assert records(a, event) == records(b, event)
