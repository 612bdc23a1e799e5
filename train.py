"""
Trains a GPT with or without SAE layers, in nanoGPT's flat loop. Batches and dropout are functions
of (seed, step, micro-batch), so a resumed run is exactly the undisturbed one.

on a CPU, in minutes:        $ python train.py config/sae_cpu.py
on one GPU:                  $ python train.py config/sae_gpt.py
on 8 GPUs of one node:       $ torchrun --standalone --nproc_per_node=8 train.py config/sae_gpt.py
on 2 nodes of 8, the first:  $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 \\
      --master_addr=IP train.py config/sae_gpt.py --batch_size=8 --gradient_accumulation_steps=64
go on where a run stopped:   $ python train.py config/sae_gpt.py --init_from=resume

Exit codes: 0 done, 1 data or checkpoint unusable, 2 bad config, 3 loss or gradient not finite,
4 ranks came to differ, 128 + signal after SIGTERM, SIGHUP, Ctrl-C (the step was finished, saved).
"""
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

# Before torch is loaded: threads that wait for each other spin for some microseconds, then sleep.
# To sleep at once is a third slower; to spin on is many times slower where a core is kept busy.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('GOMP_SPINCOUNT', '2000')

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import configure, stop_if, writable
from data.dataset import ROOT, data_dir, eval_batches, get_batch, load_dataset, windows_per_epoch
from features import evaluate, save_npz, snapshot
from model import GPT, GPTConfig, load_checkpoint, resolve_device, save_checkpoint
from sae import SITES, blend_alpha

# ------------------------------------------ defaults: a GPT-2 (124M) with one SAE layer, on FineWeb
# I/O
out_dir = 'out'
init_from = 'scratch'     # 'scratch', 'resume' (in out_dir), or weights of another run's out_dir
eval_interval = 250       # steps; evaluates, and takes a snapshot of the features
save_interval = 250       # steps; saves a checkpoint. The last step is always evaluated and saved
eval_tokens = 1_048_576   # of val, the same ones each time
probe_tokens = 65_536     # of val, over which features/<step>.npz counts; 0: no snapshots
log_interval = 10
wandb_log = False
wandb_project = 'sae-gpt'
# data
dataset = 'fineweb'       # a folder of data/, or a path
batch_size = 16           # sequences in a micro-batch
gradient_accumulation_steps = 32  # micro-batches a step over all ranks; on 8, sae_steps each
# model: the keys of GPTConfig in model.py, with its defaults; vocab_size is the data's
model_keys = [key for key in asdict(GPTConfig()) if key != 'vocab_size']
globals().update({key: getattr(GPTConfig(), key) for key in model_keys})
# the hand-over to the sparse layers, as shares of max_iters
sae_blend_start = 0.3     # alpha is 0 until here: the SAE only watches, and learns to reconstruct
sae_blend_end = 0.3       # and 1 from here; both 0: the SAE replaces the stream from step 0
sae_posthoc = False       # freeze all but the SAE, which evals splice in
# optimiser
optimizer = 'muon'        # for the matrices of blocks, the rest has AdamW; or 'adamw' for all
learning_rate = 3e-3
sae_steps = 4             # of the SAE in each step, one after each part of the micro-batches
sae_lr_factor = 0.25      # its learning rate is this times the model's; b_enc's 50 times that
max_iters = 5000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0           # 0: no clipping
lr_schedule = 'wsd'       # constant, then linear decay over the last 20 %; or 'cosine'
warmup_iters = 200
min_lr_ratio = 0.1        # of learning_rate, at the end
# system
seed = 1337
device = 'auto'           # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'            # 'auto', 'float32', 'bfloat16', 'float16'
compile = True
deterministic = False     # the same bits from run to run on a GPU too, a little slower
rank_timeout = 600        # seconds; a rank that is silent in a step for longer ends the run
# ------------------------------------------------------------------------- what the user asks for
defaults = {key: value for key, value in globals().items()
            if not key.startswith('_') and type(value) in (int, float, bool, str, tuple)}

ddp = 'RANK' in os.environ # set by torchrun
rank = int(os.environ.get('RANK', 0))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0

def problems(c):
    """What is out of range or contradictory in the config c, as a list of sentences."""
    found = GPTConfig(**{key: c[key] for key in model_keys}).problems()
    may_be_0 = ('probe_tokens', 'max_iters', 'warmup_iters', 'seed')
    high = dict(learning_rate=1000, sae_lr_factor=1000, beta1=0.999999, beta2=0.999999,
                sae_blend_start=c['sae_blend_end'], sae_blend_end=1, min_lr_ratio=1)
    for key, value in c.items():
        if type(value) in (int, float) and key not in model_keys:
            low = int(type(value) is int and key not in may_be_0)
            if not low <= value <= high.get(key, math.inf):
                found.append(f"{key}={value} must lie in {low}..{high.get(key, math.inf)}")
    choices = dict(optimizer=('adamw', 'muon'), lr_schedule=('cosine', 'wsd'),
                   dtype=('auto', 'float32', 'bfloat16', 'float16'))
    for key, known in choices.items():
        if c[key] not in known:
            found.append(f"{key}={c[key]!r} must be one of {', '.join(known)}")
    own = [name for name, site in SITES.items() if site.own]
    micros = c['gradient_accumulation_steps']
    parts = world_size * (max(1, c['sae_steps']) if c['sae_layers'] and c['sae_site'] in own else 1)
    if micros % parts:
        found.append(f"gradient_accumulation_steps={micros} must be a multiple of {parts}, the "
                     "number of ranks times sae_steps")
    try:
        resolve_device(c['device'], local_rank)
    except ValueError as e:
        found.append(str(e))
    if c['wandb_log'] and find_spec('wandb') is None:
        found.append("wandb_log=True needs wandb: pip install wandb")
    sound = c['sae_layers'] and c['sae_recon'] and c['sae_site'] in own
    if c['sae_posthoc'] and (c['init_from'] == 'scratch' or not sound):
        found.append("sae_posthoc=True needs --init_from=<out_dir of a trained dense model>, "
                     f"sae_layers, sae_recon above 0, and a sae_site of {', '.join(own)}")
    if not writable(c['out_dir']):
        found.append(f"out_dir={c['out_dir']} must be a folder that can be written")
    if c['init_from'] not in ('scratch', 'resume') and not os.path.isdir(c['init_from']):
        found.append(f"init_from={c['init_from']!r} must be scratch, resume, or a run's out_dir")
    if c['init_from'] != 'resume' and any(Path(c['out_dir']).glob('ckpt*.pt')):
        found.append(f"out_dir={c['out_dir']} holds a run: --init_from=resume goes on with it; "
                     "else give another --out_dir, or delete that folder")
    return found

given = set() # the keys that files and the command line name
config = configure(defaults, sys.argv[1:], problems, given)
globals().update(config)

# -------------------------------------------------------------------------------- ranks and devices
device = resolve_device(device, local_rank)
device_type = device.partition(':')[0]
cuda = device_type == 'cuda'
if cuda:
    torch.cuda.set_device(device)
torch.set_float32_matmul_precision('high') # TF32 on GPUs; no effect on CPUs
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
if dtype == 'auto' and cuda:
    dtype = 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
elif dtype == 'auto': # CPUs without instructions for bf16 emulate it, slowly
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = 'bfloat16' if fast and device_type == 'cpu' else 'float32'
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
local_micros = gradient_accumulation_steps // world_size
tokens_per_step = gradient_accumulation_steps * batch_size * block_size

hosts = None # a gloo group, to decide together, and to wait while one rank works alone
store = None # where the first rank that fails leaves the reason

def fail(message, code=1):
    """A sentence to stderr and that exit code. All ranks say why the first of them failed."""
    if ddp:
        message = f"rank {rank}: {message}"
    if store is not None:
        key = 'failed' + os.environ.get('TORCHELASTIC_RESTART_COUNT', '')
        with suppress(RuntimeError): # without torchrun the store goes with rank 0
            message = store.compare_set(key, '', message).decode()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code) # no waiting in collectives that the others will never join

def on_error(kind, e, trace):
    """What nobody caught: one sentence, and a traceback where this program is the cause."""
    message = str(e)
    if kind is KeyboardInterrupt:
        os._exit(130)
    if ddp and (issubclass(kind, dist.DistError) or kind is RuntimeError and 'gloo' in message):
        message = f"another rank is gone, or silent for {rank_timeout} s (rank_timeout)"
    elif issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in message:
        message = (f"out of memory with batch_size={batch_size}: halve it, and double "
                   "gradient_accumulation_steps, or take a smaller model")
    elif kind.__module__.startswith(('torch._inductor', 'torch._dynamo')): # no C++ compiler, say
        reason, *_ = message.split('\n')
        message = f"the model cannot be compiled here: give --compile=False ({reason})"
    elif not issubclass(kind, OSError): # a full disk, say
        sys.__excepthook__(kind, e, trace)
        message = f"{kind.__name__}: {e}"
    fail(message)

sys.excepthook = on_error
if ddp:
    dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(seconds=rank_timeout))
    sys.excepthook = on_error # again: torch has wrapped it in one that loses what os._exit leaves
    hosts = dist.new_group(backend='gloo', timeout=timedelta(hours=1))
    address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    store = dist.TCPStore(*address, timeout=timedelta(seconds=10))

def all_reduce(t, op=dist.ReduceOp.SUM, group=None):
    if ddp and t.numel(): # sums over SAE layers are empty in a dense model
        dist.all_reduce(t, op, group)
    return t

def wait_for_all(): # where one rank works alone, maybe for longer than rank_timeout
    if ddp:
        dist.barrier(hosts)

# ----------------------------------------------------------- data, and the checkpoint to begin with
if master and dataset == 'stdlib' and not (data_dir(dataset) / 'meta.json').exists():
    print("preparing data/stdlib, once: Python's own library as a corpus", flush=True)
    from data.stdlib.prepare import prepare
    prepare()
wait_for_all()
resuming = init_from == 'resume'
source = out_dir if resuming else init_from
try:
    data = load_dataset(dataset, check_hash=local_rank == 0) # one rank of a node, about 1 GB/s
    for tokens in data.train, data.val:
        windows_per_epoch(len(tokens), block_size) # for its error
    checkpoint = {} if init_from == 'scratch' else load_checkpoint(source)
except ValueError as e:
    fail(e)
# kept in the checkpoint: one may look from another folder, after the data set was made anew
place = data.dir.name if data.dir.parent == ROOT else os.path.abspath(data.dir)
file = data.dir / data.meta['tokenizer'] # a file, or a name that tiktoken knows
tokenizer = dict(meta={key: data.meta[key] for key in ('tokenizer', 'eot', 'vocab_size')},
                 json=file.read_text('utf-8') if file.suffix == '.json' else None)

step = checkpoint['step'] if resuming else 0
was = checkpoint.get('config', {}) # with which it was trained
anew = f"begin another run with its weights, --init_from={shlex.quote(out_dir)} --out_dir=..."
if resuming:
    if not {'config', 'optimizers', 'scaler', 'log_sums', 'data_sha256'} <= checkpoint.keys():
        fail(f"{out_dir} holds weights alone, or another version's run: {anew}")
    may_change = ('init_from out_dir dataset device dtype compile deterministic rank_timeout '
                  'wandb_log wandb_project max_iters eval_interval save_interval log_interval '
                  'eval_tokens probe_tokens').split()
    changed = [f"{key}={value}, but {key}={was.get(key)} in the checkpoint"
               for key, value in config.items() if was.get(key) != value and key not in may_change]
    if checkpoint['data_sha256'] != data.meta['train_sha256']:
        changed.append(f"dataset={dataset} has another train.bin than the checkpoint's")
    if step > max_iters:
        changed.append(f"max_iters={max_iters}, but the run is at step {step} already")
    if changed:
        stop_if(changed + [f"cannot resume {out_dir} so: use the old values, or {anew}"])

# -------------------------------------------------------------------------------------------- model
torch.manual_seed(seed)
model_args = {key: config[key] for key in model_keys}
model = GPT(GPTConfig(vocab_size=data.meta['vocab_size'], **model_args)).to(device)
saes = model.saes() # {block: SAE}
model.requires_grad_(not sae_posthoc)
for sae in saes.values():
    sae.requires_grad_(True)
    sae.posthoc = sae_posthoc
    sae.alpha.zero_() # a new layer has 1; a checkpoint, below, may bring its own


# Muon is for hidden matrices (kellerjordan.github.io/posts/muon); under it features tell less. The
# SAE learns best in smaller batches, since each feature fires on few tokens: it steps by itself.
optimizers = {}
for name, groups in model.optimizer_groups(weight_decay, sae_lr_factor).items():
    if optimizer == 'muon' and name == 'matrices':
        optimizers[name] = torch.optim.Muon(groups, adjust_lr_fn='match_rms_adamw')
    else:
        optimizers[name] = torch.optim.AdamW(groups, betas=(beta1, beta2), fused=True)
sae_optimizer = optimizers.get('sae')
model_optimizers = [opt for name, opt in optimizers.items() if name != 'sae'] # post hoc: none
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
# since the last log line: loss, L0 and FVU (means over SAEs), micro-batches
wide = torch.float32 if device_type == 'mps' else torch.float64 # so that no order of ranks shows
log_sums = torch.zeros(4, dtype=wide, device=device)

if checkpoint:
    args = checkpoint['model_args']
    misfit = f"the weights in {source} do not fit this model"
    try:
        if not resuming and checkpoint.get('tokenizer', tokenizer) != tokenizer:
            raise ValueError(f"their tokenizer is another than that of {data.dir}")
        if saes and args['sae_layers'] and args['sae_site'] != sae_site:
            raise ValueError(f"their SAEs are of site {args['sae_site']}, not {sae_site}")
        if sae_posthoc and args['sae_layers'] and not was.get('sae_posthoc'):
            raise ValueError("sae_posthoc takes a dense model, these have SAEs")
        missing = model.load_state_dict(checkpoint['model'], strict=resuming).missing_keys
        missing = [key for key in missing if '.sae.' not in key] # SAEs may be new
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        if resuming:
            misfit = f"the optimizer in {out_dir} does not fit this version of train.py: {anew}"
            for opt, state in zip(optimizers.values(), checkpoint['optimizers'], strict=True):
                opt.load_state_dict(state)
            scaler.load_state_dict(checkpoint['scaler'])
            if master: # of all ranks together
                log_sums.copy_(checkpoint['log_sums'])
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as e:
        *_, reason = str(e).split('\n')
        fail(f"{misfit} ({reason.strip()})")
    # its SAEs keep their alpha, unless a hand-over is given that was not theirs
    asked = given & {'sae_blend_start', 'sae_blend_end'}
    if sae_posthoc and not resuming or any(config[key] != was.get(key) for key in asked):
        for sae in saes.values():
            sae.alpha.zero_()
checkpoint = {} # free the memory

if compile:
    model.compile()
forward = model # and what DDP puts around it
wait_for_all() # hashing the data, on one rank a node, may take longer than rank_timeout
if ddp:
    for value in model.state_dict().values(): # all ranks begin with rank 0's
        dist.broadcast(value, 0)
if ddp and model_optimizers: # the SAEs' gradients are averaged for each of their steps, below
    # torch warns that broadcast_buffers has a new name, which 2.11 does not know yet
    warnings.filterwarnings('ignore', message='`broadcast_buffers`')
    names = [name for name, _ in model.named_parameters() if '.sae.' in name]
    DDP._set_params_and_buffers_to_ignore_for_model(model, names)
    forward = DDP(model, device_ids=[local_rank] if cuda else None, broadcast_buffers=False,
                  gradient_as_bucket_view=True) # saves a second copy of the gradients

# ------------------------------------------------------------------- evaluating, logging and saving

def learning_rate_at(step, max_iters):
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    progress = (step - warmup_iters) / max(1, max_iters - warmup_iters)
    if lr_schedule == 'cosine':
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    else: # wsd: constant, then linear over the last fifth
        decay = min(1.0, (1 - progress) / 0.2)
    return learning_rate * (min_lr_ratio + (1 - min_lr_ratio) * decay)

def check_replicas():
    """Every rank must hold the same parameters and buffers, or gradients or counts went astray."""
    sums = torch.stack([t.sum(dtype=torch.float64) for t in model.state_dict().values()])
    low, high = (all_reduce(sums.clone(), op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    names = [name for name, differs in zip(model.state_dict(), low != high) if differs]
    if names:
        fail(f"at step {step} the ranks hold different values of {', '.join(names[:3])}", code=4)

def say(text, record=None):
    """text to the terminal, record to log.jsonl: there of several of one step the last counts."""
    if not master:
        return
    if record:
        finite = json.loads(json.dumps(record), parse_constant=lambda name: None) # JSON has no NaN
        log_file.write(json.dumps(finite) + '\n')
        if wandb_log and 'step' in record:
            wandb.log(record, step=step)
    with suppress(OSError): # nobody reads any more: no reason to end a run
        print(text, flush=True)

def due(*intervals):
    return step == max_iters or any(step % interval == 0 for interval in intervals)

if master:
    os.makedirs(out_dir, exist_ok=True)
    try: # of two runs in one out_dir each would save over the other
        import fcntl
        fcntl.flock(os.open(out_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is training in {out_dir}: stop it first, or give another --out_dir")
    except (ImportError, OSError):
        pass # Windows has no fcntl, and some network file systems cannot lock
    if not resuming: # what a run left that never saved anything is not of this one
        shutil.rmtree(os.path.join(out_dir, 'features'), ignore_errors=True)
    log_file = open(f'{out_dir}/log.jsonl', 'a' if resuming else 'w', buffering=1) # line by line
    log_file.write('\n' if resuming else '') # after a line that may be torn
    if wandb_log:
        import wandb
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)
failed, commit = subprocess.getstatusoutput(f'git -C "{ROOT}" rev-parse --short HEAD')
versions = dict(commit=None if failed else commit, torch=torch.__version__, numpy=np.__version__,
                python=sys.version, gpu=torch.cuda.get_device_name() if cuda else None)
F, blocks = model.config.n_features, ', '.join(map(str, saes))
what = f"SAE at {sae_site} of block {blocks}: {F} features, K={sae_k}" if saes else "dense"
say(f"{model.num_params() / 1e6:.1f}M parameters, {what}\n"
    f"{max_iters} steps of {tokens_per_step:,} tokens of {data.dir.name} ({len(data.train):,}) on "
    f"{world_size} x {device_type}, {dtype}",
    dict(event='start', at_step=step, config=config, versions=versions, world_size=world_size,
         dtype=dtype, device=device, params=model.num_params(),
         params_non_embedding=model.num_params(True), flops_per_token=model.flops_per_token(),
         tokens_per_step=tokens_per_step))
if resuming and was['max_iters'] != max_iters:
    say(f"learning rate at step {step}: {learning_rate_at(step, was['max_iters']):.3g} with "
        f"max_iters={was['max_iters']}, now {learning_rate_at(step, max_iters):.3g}")

signals = [0] # that came to this rank
for name in ('SIGTERM', 'SIGINT', 'SIGHUP'): # Windows has no SIGHUP; nohup ignores it
    signum = getattr(signal, name, signal.SIGTERM)
    if signal.getsignal(signum) != signal.SIG_IGN:
        signal.signal(signum, lambda signum, frame: signals.append(signum))

# ------------------------------------------------------------------------------------ training loop

def step_saes():
    """The SAEs' own step, on one of sae_steps parts. Returns the norm of its gradient."""
    params = [p for group in sae_optimizer.param_groups for p in group['params']]
    for p in params:
        all_reduce(p.grad).div_(world_size * scaler.get_scale())
    # the loss was divided by all micro-batches: a part's gradient is 1/sae_steps of its mean
    norm = torch.nn.utils.clip_grad_norm_(params, (grad_clip or math.inf) / sae_steps) * sae_steps
    if not scaler.is_enabled() or norm.isfinite(): # no step where fp16 overflows
        sae_optimizer.step()
    sae_optimizer.zero_grad(set_to_none=True)
    for sae in saes.values():
        sae.normalize_rows()
    return norm

started = last_log = time.time()
last_step = saved_step = step
stop = 0 # the signal that came to any rank
broken = torch.full((), -1, device=device) # the first step that was not finite

while True:
    tokens = step * tokens_per_step
    # 1) once in a while look back: what is not finite is neither logged nor saved
    if (stop or due(log_interval, save_interval, eval_interval)) and broken >= 0:
        kept = f"step {saved_step}" if saved_step else "none yet"
        fail(f"at step {int(broken)} the loss or a gradient was not finite: stopped; the last "
             f"checkpoint in {out_dir}: {kept}. Try a learning_rate below {learning_rate}", code=3)
    if step > last_step and due(log_interval):
        *sums, n = all_reduce(log_sums).tolist()
        mean_loss, l0, fvu = (total / n for total in sums)
        now = time.time()
        tok_s = (step - last_step) * tokens_per_step / max(1e-9, now - last_log)
        record = dict(event='log', step=step, tokens=tokens, loss=mean_loss, tok_s=tok_s,
                      lr=learning_rate_at(step - 1, max_iters), grad_norm=float(grad_norm))
        line = f"step {step}/{max_iters} | loss {mean_loss:.4f}"
        if saes:
            silent = torch.stack([sae.is_silent().float().mean() for sae in saes.values()])
            live, alpha = 1 - silent.mean().item(), min(sae.alpha.item() for sae in saes.values())
            record |= dict(l0=l0, fvu=fvu, live=live, alpha=alpha)
            line += f" | FVU {fvu:.3f} | live {100 * live:.1f} %"
        if scaler.is_enabled():
            record['loss_scale'] = scaler.get_scale()
        left = timedelta(seconds=int((max_iters - step) * tokens_per_step / tok_s))
        say(f"{line} | {tok_s / 1000:.1f}k tok/s | {left} left", record)
        log_sums.zero_()
        last_log, last_step = now, step

    # 2) schedules. alpha never falls: a checkpoint's SAE may be further than this run is
    for opt in optimizers.values():
        for group in opt.param_groups:
            group['lr'] = group['lr_factor'] * learning_rate_at(step, max_iters)
    for sae in saes.values():
        sae.alpha.clamp_(min=blend_alpha(step / max(1, max_iters), sae_blend_start, sae_blend_end))

    # 3) save, then evaluate (in that order: a crash in the eval loses nothing)
    pause = time.time()
    if step > saved_step and (stop or due(save_interval)):
        sums = all_reduce(log_sums.clone())
        if master:
            save_checkpoint(out_dir, dict(
                model=model.state_dict(), model_args=asdict(model.config), step=step,
                optimizers=[opt.state_dict() for opt in optimizers.values()], log_sums=sums,
                scaler=scaler.state_dict(), config=config, dataset=place, tokenizer=tokenizer,
                data_sha256=data.meta['train_sha256']))
        wait_for_all()
        saved_step = step
    if due(eval_interval) and not stop:
        if ddp:
            check_replicas()
        model.eval()
        batches = lambda: islice(eval_batches(data.val, block_size, batch_size, eval_tokens),
                                 rank, None, world_size) # this rank's share
        record = evaluate(model, batches, autocast, all_reduce)
        line = f"step {step:5d} | val loss {record['val_loss']:.4f}"
        if saes:
            live = min(sae['live'] for sae in record['sae'].values())
            line += (f" | SAE zeroed {record['val_loss_zeroed']:.3f}"
                     f" | mean {record['val_loss_mean']:.3f} | live {100 * live:.1f} %")
        say(line, dict(event='eval', step=step, tokens=tokens, **record))
        if saes and master and probe_tokens: # what each feature does, for the viewer's timeline
            probe = eval_batches(data.val, block_size, batch_size, probe_tokens)
            arrays = snapshot(model, (x for x, _ in probe)) # not compiled: it needs no loss
            save_npz(f'{out_dir}/features/{step:07d}.npz', dict(step=step, tokens=tokens, **arrays))
        model.train()
        wait_for_all()
    last_log += time.time() - pause # tokens a second are those of training
    if stop or step == max_iters:
        break

    # 4) one step: micro-batches, forward and backward, and the SAEs' own steps
    fired = torch.zeros(len(saes), F, dtype=torch.int32, device=device)
    lengths = torch.zeros(len(saes), device=device)
    means = torch.zeros(len(saes), 1, device=device) # and then (S, C)
    sae_norm = torch.zeros((), device=device)
    for i in range(local_micros):
        if ddp: # gradients are averaged over ranks with the last; to be set before the forward pass
            forward.require_backward_grad_sync = i == local_micros - 1
        micro = i * world_size + rank
        batch = get_batch(data.train, block_size, batch_size, seed, step, micro,
                          gradient_accumulation_steps)
        x, y = (t.pin_memory().to(device, non_blocking=True) if cuda else t.to(device)
                for t in batch)
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + micro) % 2**63) # for dropout
        with autocast:
            _, loss, out = forward(x, y)
        total, scores = loss, loss.new_zeros(2)
        if saes:
            total = loss + out.loss.sum()
            scores = torch.stack((out.l0.mean(), out.fvu.mean()))
            fired += out.fired
            lengths += out.length / gradient_accumulation_steps
            means = means + out.mean / gradient_accumulation_steps
        scaler.scale(total / local_micros).backward()
        if sae_optimizer and (i + 1) % (local_micros // sae_steps) == 0:
            sae_norm = torch.hypot(sae_norm, step_saes())
        log_sums += torch.cat((loss.detach().view(1), scores, loss.new_ones(1))).to(wide)

    # 5) clip, update, nudge
    for opt in model_optimizers:
        scaler.unscale_(opt)
    model_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    grad_norm = torch.hypot(model_norm, sae_norm)
    if not scaler.is_enabled() or model_norm.isfinite(): # the scaler would skip one optimizer alone
        for opt in model_optimizers:
            scaler.step(opt)
    if scaler.is_enabled() and model_norm.isfinite() and not sae_norm.isfinite():
        scaler.update(scaler.get_scale() / 2) # of the SAEs' overflows it knows nothing
    elif model_optimizers:
        scaler.update()
    model.zero_grad(set_to_none=True)
    all_reduce(fired) # all ranks must nudge the same features
    all_reduce(lengths)
    all_reduce(means)
    for sae, counts, length, mean in zip(saes.values(), fired, lengths, means):
        sae.after_step(counts, tokens_per_step, length, mean)
    # read above, where the loop waits for the GPU anyway; in fp16 gradients may overflow
    finite = loss.isfinite() & (grad_norm.isfinite() | scaler.is_enabled())
    broken = torch.where((broken < 0) & ~finite, step, broken)
    step += 1
    stop = int(all_reduce(torch.tensor(signals[-1]), dist.ReduceOp.MAX, hosts))

if ddp:
    dist.destroy_process_group()
if stop:
    say(f"stopped by signal {stop} after step {step}; saved. Go on with --init_from=resume")
    sys.exit(128 + stop)
say(f"done in {timedelta(seconds=int(time.time() - started))}: {out_dir}")
if saes:
    say(f"its features: python inspect_features.py --out_dir={shlex.quote(out_dir)}")
