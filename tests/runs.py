"""
Runs train.py for the tests, on a tiny data set, as often as they like.

A fresh Python needs seconds to import torch, so the runs are children of a fork server that imported it once; each
is a process of its own with a real exit code, and can be killed. An `accident` is a function that is called in the
child before train.py starts, e.g. partial(at_loss, 5, kill): what goes wrong, and when.
"""
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data.dataset import write_dataset
from model import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
children = multiprocessing.get_context('forkserver')
children.set_forkserver_preload(['torch', 'numpy', 'torch.distributed', 'torch.nn.parallel', 'torch._dynamo'])

# 8 steps in which all that changes over a run is still changing at step 4: warm-up, alpha, K, silent features
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, mlp_ratio=2, batch_size=2, gradient_accumulation_steps=2,
    dropout=0.1, sae_layers=1, sae_ratio=4, sae_k=4, sae_k_start=8, sae_auxk=0.03, sae_recon=0.01, sae_silent_tokens=100,
    sae_blend_start=0.1, sae_blend_end=0.9, sae_k_end=0.8, max_iters=8, warmup_iters=6, eval_interval=3, save_interval=3,
    log_interval=2, eval_tokens=128, probe_tokens=128, seed=5, device='cpu', dtype='float32', compile='false')

def write_tiny_data(out, train_tokens=3000, vocab_size=257):
    """A data set of random letters with a byte-level tokenizer of 257 tokens (and gaps); returns its folder as text."""
    import tiktoken
    enc = tiktoken.Encoding('bytes', pat_str='.', mergeable_ranks={bytes([i]): i for i in range(256)},
                            special_tokens={'<|endoftext|>': 256})
    letters = np.random.default_rng(0).choice(np.frombuffer(b'aaaabbbccd   \n', dtype=np.uint8), train_tokens + 500)
    write_dataset(out, [letters[:train_tokens]], [letters[train_tokens:]], vocab_size, enc, 'random letters', 256)
    return str(out)

def arguments(out, data, **changes):
    return [f'--{k}={v}' for k, v in (dict(out_dir=out, dataset=data) | TINY | changes).items()]

def train(out, data, accident=None, ranks=1, **changes):
    """Runs train.py with TINY and the changes -> its exit code (a list of them for ranks > 1) and all it printed."""
    return run_script('train.py', arguments(out, data, **changes), accident, ranks)

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def environments(ranks, port):
    """What torchrun sets, for each rank; nothing for one."""
    return [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR='127.0.0.1', MASTER_PORT=port) if ranks > 1 else {}
            for rank in range(ranks)]

def run_script(script, argv, accident=None, ranks=1, timeout=120):
    """Runs a script of the repository as `python script argv` would, or as torchrun would with several ranks."""
    port = free_port()
    path = Path(os.environ.get('TMPDIR', '/tmp')) / f'runs-{os.getpid()}-{port}.txt'
    processes = []
    for env in environments(ranks, port):
        processes.append(children.Process(target=child, args=(script, list(map(str, argv)), str(path), env, accident)))
        processes[-1].start()
    for p in processes:
        p.join(timeout)
        if p.exitcode is None: # it hangs
            p.kill()
            p.join()
    text = path.read_text()
    path.unlink()
    codes = [p.exitcode for p in processes]
    return codes if ranks > 1 else codes[0], text

def child(script, argv, path, env, accident):
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({k: str(v) for k, v in env.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs ignore it
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    sys.path.insert(0, str(ROOT))
    if accident:
        accident()
    try:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info()) # as the interpreter would; multiprocessing has a way of its own
        os._exit(1)
    finally:
        sys.stdout.flush()

# ----------------------------------------------------------------------------------------------------
# accidents

def at_call(module, name, n, action):
    """The n-th call of module.name (from 1) becomes action(function, *its arguments)."""
    function, calls = getattr(module, name), 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        return action(function, *args, **kwargs) if calls == n else function(*args, **kwargs)
    setattr(module, name, wrapped)

def at_loss(n, action, rank=None):
    """The n-th training loss (from 1; two a step on one rank) becomes action(cross_entropy, ...), on one rank or on all."""
    if rank is not None and os.environ.get('RANK') != str(rank):
        return
    F, calls = torch.nn.functional, 0
    function = F.cross_entropy
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += torch.is_grad_enabled()
        hit = calls == n and torch.is_grad_enabled()
        return action(function, *args, **kwargs) if hit else function(*args, **kwargs)
    F.cross_entropy = wrapped

def at_replace(n, action):
    """The n-th renaming of a file: a save is two, new into place and old to prev (the first one: one); a snapshot is one."""
    at_call(os, 'replace', n, action)

def at_fsync(n, action):
    """The n-th save, when its file is written but may not be on the disk yet."""
    at_call(os, 'fsync', n, action)

def at_save(n, action):
    at_call(torch, 'save', n, action)

def at_eval(n, action):
    """The n-th pass over val; an eval of a model with SAEs is four: normal, zeroed, mean, and the snapshot."""
    import data.dataset # train.py takes the name from here, later
    at_call(data.dataset, 'eval_batches', n, action)

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def terminate(function, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return function(*args, **kwargs)

def interrupt(function, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return function(*args, **kwargs)

def nan(function, *args, **kwargs):
    return function(*args, **kwargs) * float('nan')

def inf(function, *args, **kwargs):
    return function(*args, **kwargs) * float('inf')

def huge(function, *args, **kwargs):
    """A finite loss whose gradients overflow in fp16."""
    return function(*args, **kwargs) * 1e20

def nan_gradient(function, *args, **kwargs):
    """A loss that looks sound and whose gradient is not."""
    loss = function(*args, **kwargs)
    loss.register_hook(lambda grad: grad * float('nan'))
    return loss

def crash(*args, **kwargs):
    raise RuntimeError("an accident")

def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

def oversleep(function, *args, **kwargs):
    time.sleep(3)
    return function(*args, **kwargs)

def half_saved_then_killed(save, checkpoint, f):
    f.write(b'PK' + os.urandom(1000))
    f.flush()
    kill()

def disk_full(save, checkpoint, f):
    f.write(os.urandom(1000))
    raise OSError(28, "No space left on device")

# ----------------------------------------------------------------------------------------------------
# comparing runs

def same(a, b):
    """Equal to the bit, however deep. Tensors of NaN are equal too."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def records(out, event):
    """The records of log.jsonl with that event, without what the clock decides."""
    lines = [json.loads(line) for line in (Path(out) / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != 'tok_s'} for r in lines if r['event'] == event]

def assert_same_run(a, b):
    """Both runs ended in the same state and logged the same numbers, to the bit."""
    one, two = load_checkpoint(str(a)), load_checkpoint(str(b))
    for key in ('step', 'model', 'model_args', 'optimizers', 'scaler'):
        assert same(one[key], two[key]), key
    assert records(a, 'log') == records(b, 'log')
    assert records(a, 'eval') == records(b, 'eval')
