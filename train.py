"""
Trains a GPT with (or without) SAE layers. nanoGPT's flat loop; what differs: batches and dropout are pure functions of
(seed, step, micro-batch), so resuming is exact; two schedules more (the blend alpha and K); silent features are revived
after each step; every eval also asks what the model loses without its features; checkpoints are atomic.

on a CPU, in minutes:        $ python train.py config/sae_cpu.py
on one GPU:                  $ python train.py config/sae_gpt.py
on 8 GPUs of one node:       $ torchrun --standalone --nproc_per_node=8 train.py config/sae_gpt.py
on 2 nodes of 8, the first:  $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP train.py config/sae_gpt.py
go on where a run stopped:   $ python train.py config/sae_gpt.py --init_from=resume

Exit codes: 0 done, 1 data or checkpoint unusable, 2 bad config, 3 the loss or a gradient was not finite,
4 ranks came to differ, 128 + signal after SIGTERM or Ctrl-C (the step was finished and saved).
"""
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import timedelta
from importlib.util import find_spec
from itertools import islice

# Before torch is loaded: on a CPU, threads that wait for each other sleep. To spin is a tenth to a fifth faster on idle cores, and was
# 40 times slower where another program kept one of two busy (results/cpu/first_command.txt).
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import configure, stop_if, writable
from data.dataset import data_dir, eval_batches, get_batch, load_dataset
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from sae import blend_alpha, count_pairs, k_at, token_entropy, top_tokens

# ----------------------------------------------------------------------------------------------------
# defaults: a GPT-2 (124M) with one SAE layer, on FineWeb; the presets in config/ change them
# I/O
out_dir = 'out'
init_from = 'scratch'     # 'scratch', 'resume' (go on in out_dir), or another run's out_dir to take weights from
eval_interval = 250       # steps; evaluates, and takes a snapshot of the features
save_interval = 250       # steps; saves a checkpoint. The last step is always evaluated and saved
eval_tokens = 1_048_576   # of val, the same ones each time
probe_tokens = 65_536     # of val, over which features/<step>.npz counts; 0: no snapshots
log_interval = 10
wandb_log = False
wandb_project = 'sae-gpt'
# data
dataset = 'fineweb'       # a folder of data/, or a path
batch_size = 64           # sequences in a micro-batch
gradient_accumulation_steps = 8 # micro-batches a step, over all ranks together
block_size = 1024
# model; the meaning of each key is in GPTConfig
n_layer = 12
n_head = 6
n_embd = 768
mlp_ratio = 4
dropout = 0.0
sae_layers = (6,)
sae_site = 'resid'
sae_ratio = 16
sae_k = 32
sae_k_start = 0
sae_tied_init = False     # True: W_dec starts as a scaled copy of W_enc
sae_token_skip = True
sae_recon = 1.0
sae_auxk = 0.0
sae_nudge = 0.02
sae_silent_tokens = 262_144
# schedules of the sparse layers, as shares of max_iters
sae_blend_start = 0.3     # alpha is 0 until here: the SAE only watches, and learns to reconstruct
sae_blend_end = 0.35      # and 1 from here; both 0: the SAE replaces the stream from step 0
sae_k_end = 0.3           # K annealing ends here
sae_posthoc = False       # freeze all but the SAE and train it to reconstruct; it is spliced in at evals only
# optimiser
optimizer = 'muon'        # 'muon' for the matrices of blocks and SAEs (AdamW for the rest), or 'adamw' for all
sae_muon = True           # False: AdamW for the SAE's matrices, under which a few features fire nearly always (README)
learning_rate = 3e-3
sae_lr_factor = 1.0       # the SAE's learning rate is this times the model's
sae_skip_lr = 0.2         # that of W_skip is this times the SAE's: below 1 the features carry more
max_iters = 5000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0           # 0: no clipping
lr_schedule = 'cosine'    # 'cosine', or 'wsd' (constant, then linear decay over the last 20 %)
warmup_iters = 200
min_lr_ratio = 0.1        # of learning_rate, at the end
# system
seed = 1337
device = 'auto'           # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'            # 'auto', 'float32', 'bfloat16', 'float16'
compile = True
deterministic = False     # the same bits from run to run on a GPU too, a little slower; a CPU nearly always gives them
rank_timeout = 50         # seconds for which ranks wait for one another in a step; a longer silence ends the run
# ----------------------------------------------------------------------------------------------------
defaults = {k: v for k, v in globals().items() if not k.startswith('_') and type(v) in (int, float, bool, str, tuple)}

ddp = 'RANK' in os.environ # set by torchrun
rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
master = rank == 0

def resolve(device):
    """'auto' and 'cuda' are this rank's own GPU; local_rank is 0 without torchrun."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() and not ddp else 'cpu'
    return f'cuda:{local_rank}' if device == 'cuda' else device

def usable(device):
    try:
        torch.zeros((), device=device)
        return device.partition(':')[0] in ('cpu', 'cuda', 'mps')
    except (RuntimeError, AssertionError): # AssertionError: a build without CUDA
        return False

def model_args(c):
    """Of the config c, what GPTConfig takes: all but vocab_size, which is the data's."""
    return {f.name: c[f.name] for f in fields(GPTConfig) if f.name in c}

def problems(c):
    """What is out of range or contradictory in the config c, as a list of sentences."""
    found = GPTConfig(**model_args(c)).problems()
    at_least = dict(eval_interval=1, save_interval=1, eval_tokens=1, probe_tokens=0, log_interval=1, batch_size=1, max_iters=0,
                    gradient_accumulation_steps=1, warmup_iters=0, weight_decay=0, grad_clip=0, seed=0, rank_timeout=1)
    found += [f"{k}={c[k]} must be at least {low}" for k, low in at_least.items() if c[k] < low]
    found += [f"{k}={c[k]} must be above 0 and below 1000" for k in ('learning_rate', 'sae_lr_factor', 'sae_skip_lr') if not 0 < c[k] < 1000]
    found += [f"{k}={c[k]} must lie in 0..1" for k in ('sae_blend_start', 'sae_blend_end', 'sae_k_end', 'min_lr_ratio') if not 0 <= c[k] <= 1]
    found += [f"{k}={c[k]} must be at least 0 and below 1" for k in ('beta1', 'beta2') if not 0 <= c[k] < 1]
    one_of = dict(optimizer=('adamw', 'muon'), lr_schedule=('cosine', 'wsd'), dtype=('auto', 'float32', 'bfloat16', 'float16'))
    found += [f"{k}={c[k]!r} must be one of {', '.join(known)}" for k, known in one_of.items() if c[k] not in known]
    source, target = (os.path.realpath(c[k]) + os.sep for k in ('init_from', 'out_dir'))
    return found + [sentence for wrong, sentence in (
        (c['sae_blend_start'] > c['sae_blend_end'],
         f"sae_blend_start={c['sae_blend_start']} must not be after sae_blend_end={c['sae_blend_end']}"),
        (c['gradient_accumulation_steps'] % world_size,
         f"gradient_accumulation_steps={c['gradient_accumulation_steps']} must be a multiple of the {world_size} ranks"),
        (not usable(resolve(c['device'])), f"device={c['device']!r} is not usable here: expected auto, cpu, cuda or mps"),
        (c['wandb_log'] and find_spec('wandb') is None, "wandb_log=True needs wandb: pip install wandb"),
        (c['sae_posthoc'] and (c['init_from'] == 'scratch' or not c['sae_layers'] or c['sae_recon'] == 0),
         "sae_posthoc=True needs --init_from=<out_dir of a trained dense model>, sae_layers, and sae_recon above 0"),
        (not writable(c['out_dir']), f"out_dir={c['out_dir']} must be a folder that can be written"),
        (c['init_from'] not in ('scratch', 'resume') and source.startswith(target),
         f"init_from={c['init_from']} must not lie in out_dir={c['out_dir']}, which a new run clears; "
         "--init_from=resume goes on with the run in there")) if wrong]

config = configure(defaults, sys.argv[1:], problems)
globals().update(config)

# ----------------------------------------------------------------------------------------------------
# ranks and devices
device = resolve(device)
device_type = device.partition(':')[0]
cuda = device_type == 'cuda'
if cuda:
    torch.cuda.set_device(device)
torch.set_float32_matmul_precision('high') # TF32 on GPUs; no effect on CPUs
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
if dtype == 'auto' and cuda:
    dtype = 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
elif dtype == 'auto': # CPUs with bf16 instructions train 1.6 times as fast in it; without them it is emulated, and slower
    fast = any(getattr(torch.cpu, f, bool)() for f in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'))
    dtype = 'bfloat16' if fast and device_type == 'cpu' else 'float32'
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
local_micros = gradient_accumulation_steps // world_size
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
wide = torch.float32 if device_type == 'mps' else torch.float64 # for sums; MPS has no float64

store = None # where a rank leaves the reason why it failed

def fail(message, code=1):
    """One sentence to stderr and a non-zero exit. Of several ranks, all say why the first of them failed."""
    if store is not None:
        message = f"rank {rank}: {message}"
        with suppress(RuntimeError): # without torchrun the store goes with rank 0
            message = store.compare_set('failed' + os.environ.get('TORCHELASTIC_RESTART_COUNT', ''), '', message).decode()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code) # no waiting in collectives that the others will never join

def on_error(kind, e, trace):
    """What nobody caught: one sentence where the cause lies outside of this program; else with the traceback."""
    message = str(e)
    if kind is KeyboardInterrupt:
        os._exit(130)
    if ddp and (issubclass(kind, dist.DistError) or kind is RuntimeError and 'gloo' in message):
        message = f"another rank is gone, or silent for {rank_timeout} s (rank_timeout): {message.split('] ')[-1].split('. ')[0]}"
    elif issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in message:
        message = f"out of memory with batch_size={batch_size}: halve it, and double gradient_accumulation_steps, or take a smaller model"
    elif issubclass(kind, OSError):
        message += f"; is out_dir={out_dir} a folder that can be written, with room on its disk?"
    else:
        sys.__excepthook__(kind, e, trace)
        message = f"{kind.__name__}: {e}"
    fail(message)

sys.excepthook = on_error

if ddp:
    dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(seconds=rank_timeout))
    sys.excepthook = on_error # again: torch has wrapped it in one that loses what is said before os._exit
    patient = dist.new_group(backend='gloo', timeout=timedelta(seconds=rank_timeout)) # to meet, no more patient than others
    dist.distributed_c10d._set_pg_timeout(timedelta(hours=1), patient)
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), timeout=timedelta(seconds=10))

def all_reduce(t, op=dist.ReduceOp.SUM):
    if ddp and t.numel(): # sums over SAE layers are empty in a dense model
        dist.all_reduce(t, op)
    return t

def wait_for_all():
    """Where one rank works alone (it prepares data, saves, takes a snapshot), maybe for longer than rank_timeout."""
    if ddp:
        dist.barrier(patient)

def say(text):
    if master:
        print(text, flush=True)

# ----------------------------------------------------------------------------------------------------
# data, and the checkpoint to begin with. The default corpus is made here, since that needs nothing but Python itself
if master and dataset == 'stdlib' and not (data_dir(dataset) / 'meta.json').exists():
    say("preparing data/stdlib, once: Python's own library as a corpus")
    from data.stdlib.prepare import prepare
    prepare()
wait_for_all()
resuming = init_from == 'resume'
source = out_dir if resuming else init_from
try:
    data = load_dataset(dataset, check_hash=local_rank == 0) # one rank of a node reads it all, about 1 GB/s
    for name, tokens in (('train', data.train), ('val', data.val)):
        if len(tokens) <= block_size:
            raise ValueError(f"{data.dir}/{name}.bin has {len(tokens)} tokens; block_size={block_size} needs at least one more")
    checkpoint = None if init_from == 'scratch' else load_checkpoint(source)
except ValueError as e:
    fail(e)

step = checkpoint['step'] if resuming else 0
anew = f"begin another run with its weights, --init_from={out_dir} --out_dir=..." # said of what cannot be resumed
if resuming:
    if not {'config', 'optimizers', 'scaler', 'log_sums', 'data_sha256'} <= checkpoint.keys():
        fail(f"{out_dir} holds weights alone, or another version's run: {anew}")
    # all that decides a step must be as it was; these may change
    may_change = ('init_from out_dir dataset device dtype compile deterministic rank_timeout wandb_log wandb_project max_iters '
                  'eval_interval save_interval log_interval eval_tokens probe_tokens').split()
    was = checkpoint['config']
    changed = [f"{k}={v}, but {k}={was.get(k)} in the checkpoint" for k, v in config.items() if was.get(k) != v and k not in may_change]
    if checkpoint['data_sha256'] != data.meta['train_sha256']:
        changed.append(f"dataset={dataset} has another train.bin than the checkpoint's")
    if step > max_iters:
        changed.append(f"max_iters={max_iters}, but the run is at step {step} already")
    stop_if(changed and changed + [f"cannot resume {out_dir} so: use the old values, or {anew}"])

# ----------------------------------------------------------------------------------------------------
# model
torch.manual_seed(seed)
vocab_size = data.meta['vocab_size']
model = GPT(GPTConfig(vocab_size=vocab_size, **model_args(config))).to(device)
raw_model = model # without what compile and DDP put around it
saes = model.saes() # {block: SAE}
model.requires_grad_(not sae_posthoc)
for sae in saes.values():
    sae.requires_grad_(True)
    sae.posthoc = sae_posthoc

def for_muon(g, p):
    """The matrices of blocks and SAEs; the embedding and vectors are for AdamW (kellerjordan.github.io/posts/muon)."""
    return optimizer == 'muon' and p.dim() == 2 and p is not raw_model.transformer.wte.weight and (sae_muon or g['name'] == 'matrices')

optimizers = []
for muon in (True, False):
    groups = [g | dict(params=[p for p in g['params'] if p.requires_grad and for_muon(g, p) == muon])
              for g in model.optimizer_groups(weight_decay, learning_rate, sae_lr_factor, sae_skip_lr)]
    groups = [g for g in groups if g['params']]
    if groups and muon:
        optimizers.append(torch.optim.Muon(groups, adjust_lr_fn='match_rms_adamw'))
    elif groups:
        optimizers.append(torch.optim.AdamW(groups, betas=(beta1, beta2), fused=device_type in ('cuda', 'cpu')))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
log_sums = torch.zeros(4, dtype=wide, device=device) # since the last log line: loss, L0 and FVU (means over SAEs), micro-batches

if checkpoint is not None:
    misfit = f"the weights in {source} do not fit this model"
    try:
        if checkpoint['model_args']['vocab_size'] != vocab_size:
            raise ValueError(f"{checkpoint['model_args']['vocab_size']} tokens in their vocabulary, {vocab_size} in that of {data.dir}")
        missing = model.load_state_dict(checkpoint['model'], strict=resuming).missing_keys
        missing = [key for key in missing if '.sae.' not in key] # SAEs may be new
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        if resuming:
            misfit = f"the optimizer in {out_dir} does not fit this version of train.py: {anew}"
            for opt, state in zip(optimizers, checkpoint['optimizers'], strict=True):
                opt.load_state_dict(state)
            scaler.load_state_dict(checkpoint['scaler'])
            if master: # of all ranks together
                log_sums.copy_(checkpoint['log_sums'])
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as e: # another version's or program's values
        reason = str(e).strip().split('\n')[-1].strip()
        fail(f"{misfit} ({reason})")
checkpoint = None # free the memory

if compile:
    model = torch.compile(model)
eval_model = model
if ddp:
    warnings.filterwarnings('ignore', message='`broadcast_buffers`') # torch 2.13's name for it is unknown to 2.11
    wait_for_all() # above, only the first rank of a node reads all data
    model = DDP(model, device_ids=[local_rank] if cuda else None, broadcast_buffers=False,
                gradient_as_bucket_view=True) # a copy of the gradients less

# ----------------------------------------------------------------------------------------------------
# schedules, as functions of the step alone

def learning_rate_factor(step):
    # 1) linear warm-up
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    # 2) cosine down to min_lr_ratio
    if lr_schedule == 'cosine':
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    # 3) warmup-stable-decay: constant, then linear to min_lr_ratio over the last fifth
    return min(1.0, min_lr_ratio + (1 - min_lr_ratio) * (1 - progress) / 0.2)

def set_schedules(step):
    progress = step / max(1, max_iters)
    alpha = 0.0 if sae_posthoc else blend_alpha(progress, sae_blend_start, sae_blend_end)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = learning_rate * group['lr_factor'] * learning_rate_factor(step)
    for sae in saes.values():
        sae.alpha.fill_(alpha)
        sae.k.fill_(k_at(progress, sae_k_start, sae_k, sae_k_end))
    return alpha

# ----------------------------------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def val_pass():
    """Over the eval tokens of all ranks: mean loss in nats; of the SAE layers mean L0 and FVU (2, S), mean code (S, F), density (S, F)."""
    sums = torch.zeros(3, dtype=wide, device=device) # loss, batches, tokens
    scores = torch.zeros(2, len(saes), dtype=wide, device=device)
    codes = torch.zeros(2, len(saes), raw_model.config.n_features, device=device) # sums of activations, and how often active
    for x, y in islice(eval_batches(data.val, block_size, batch_size, eval_tokens), rank, None, world_size):
        with autocast:
            _, loss, out = eval_model(x.to(device), y.to(device))
        sums += torch.stack((loss.to(wide), sums.new_ones(()), sums.new_tensor(x.numel())))
        if saes:
            scores += torch.stack((out.l0, out.fvu)).to(wide)
            for code, count, indices, values in zip(*codes, out.indices, out.values):
                code.index_add_(0, indices.flatten(), values.flatten())
                count.index_add_(0, indices.flatten(), (values != 0).to(count).flatten())
    for t in (sums, scores, codes):
        all_reduce(t)
    return (sums[0] / sums[1]).item(), scores / sums[1], codes / sums[2].float()

@torch.no_grad()
def evaluate():
    """
    The eval record of log.jsonl: loss; of each SAE layer L0, FVU, the share of its features that is live, and the share of all
    firing that the busiest 1 % of them do; then the loss with the SAEs' outputs zeroed, and with each replaced by its mean.
    The token skip stays, so that only the features are missing.
    """
    if sae_posthoc: # in training the SAE only watches; what counts is the model with it spliced in
        for sae in saes.values():
            sae.alpha.fill_(1.0)
    loss, scores, (codes, density) = val_pass()
    record = dict(val_loss=loss)
    if saes:
        for sae in saes.values():
            sae.gate.zero_()
        record['val_loss_zeroed'], _, _ = val_pass()
        for sae, code in zip(saes.values(), codes):
            sae.fill.copy_(sae.decode(code))
        record['val_loss_mean'], _, _ = val_pass()
        busiest = density.topk(math.ceil(density.size(1) / 100)).values.sum(1) / density.sum(1).clamp_min(1e-12)
        rows = zip(saes, *scores.tolist(), (density > 0).to(wide).mean(1).tolist(), busiest.tolist())
        record['sae'] = {i: dict(l0=l0, fvu=fvu, live=live, busiest=busy) for i, l0, fvu, live, busy in rows}
    for sae in saes.values():
        sae.gate.fill_(1.0)
        sae.fill.zero_()
    set_schedules(step) # alpha as before
    return record

@torch.no_grad()
def snapshot(step):
    """features/<step>.npz: what each feature does on a fixed probe set. Read by inspect_features.py --timeline."""
    tokens, values, indices = [], [], []
    for x, _ in eval_batches(data.val, block_size, batch_size, probe_tokens):
        with autocast:
            _, _, out = raw_model(x.to(device)) # not the compiled one: this rank is alone, and needs no loss
        tokens.append(x)
        values.append(out.values.cpu())
        indices.append(out.indices.cpu())
    tokens, values, indices = torch.cat(tokens), torch.cat(values, dim=1), torch.cat(indices, dim=1) # (N, T), twice (S, N, T, K)
    arrays = dict(step=step, tokens=step * tokens_per_step, probed=tokens.numel(), layers=list(saes))
    for s, (i, sae) in enumerate(saes.items()):
        F, V = sae.n_features, vocab_size
        keys, counts = count_pairs(values[s], indices[s], tokens, V)
        total = torch.zeros(F).index_add_(0, keys // V, counts.float())
        top, top_counts = top_tokens(keys, counts, F, V)
        arrays |= {f'L{i}.count': total.int(), f'L{i}.entropy': token_entropy(keys, counts, F, V).float(),
                   f'L{i}.mean': torch.zeros(F).index_add_(0, indices[s].flatten(), values[s].flatten()) / total.clamp_min(1),
                   f'L{i}.top_tokens': top.int(), f'L{i}.top_counts': top_counts.int()}
        if sae.site != 'stream':
            arrays[f'L{i}.W_dec'] = sae.W_dec.half().cpu()
    path = os.path.join(out_dir, 'features', f'{step:07d}.npz')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + '.tmp', 'wb') as f:
        np.savez_compressed(f, **{k: np.asarray(v) for k, v in arrays.items()})
    os.replace(path + '.tmp', path)

def check_replicas():
    """Every rank must hold the same parameters and SAE buffers; a difference means that gradients or masks went astray."""
    sums = torch.stack([t.to(wide).sum() for t in raw_model.state_dict().values()])
    low, high = all_reduce(sums.clone(), dist.ReduceOp.MIN), all_reduce(sums.clone(), dist.ReduceOp.MAX)
    names = [name for name, a, b in zip(raw_model.state_dict(), low.tolist(), high.tolist()) if a != b]
    if names:
        fail(f"at step {step} the ranks hold different values of {', '.join(names[:3])}", code=4)

# ----------------------------------------------------------------------------------------------------
# logging and saving

def write_log(record):
    """One JSON object a line; numbers that are not finite become null, since JSON has no NaN."""
    if master:
        finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
        log_file.write(json.dumps(finite) + '\n')
        if wandb_log and 'step' in record:
            wandb.log(record, step=record['step'])

def due(interval):
    return step % interval == 0 or step == max_iters

def stays_in_log(line):
    """For a resumed run: torn lines go, and so does what comes after the checkpoint, since it will be written again."""
    try:
        record = json.loads(line)
        again = record['event'] == 'eval' and due(eval_interval)
        return line.endswith('\n') and record.get('step', 0) < step + (not again)
    except (ValueError, KeyError, TypeError):
        return False

def lock():
    """Of two runs in one out_dir, each would save over the other. The lock goes with this process, however it ends."""
    try:
        import fcntl # not on Windows
        fcntl.flock(os.open(out_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is training in {out_dir}: stop it first, or give another --out_dir")
    except (ImportError, OSError):
        pass # some network file systems cannot lock

def set_aside():
    """A new run in an old out_dir: the old one's files must not be taken for its own. They are kept in out_dir/previous."""
    previous = os.path.join(out_dir, 'previous')
    old = [name for name in os.listdir(out_dir) if name.startswith(('ckpt', 'features', 'log.', 'index', 'timeline'))]
    if any(name.endswith('.pt') for name in old): # else it never saved anything
        shutil.rmtree(previous, ignore_errors=True)
        os.makedirs(previous)
        for name in old:
            os.replace(os.path.join(out_dir, name), os.path.join(previous, name))
        say(f"{out_dir} held another run: it is in {previous} now, in place of an older one")
    shutil.rmtree(os.path.join(out_dir, 'features'), ignore_errors=True)

def save():
    sums = all_reduce(log_sums.clone())
    if master:
        save_checkpoint(out_dir, dict(
            model=raw_model.state_dict(), model_args=asdict(raw_model.config), optimizers=[o.state_dict() for o in optimizers],
            scaler=scaler.state_dict(), step=step, log_sums=sums, config=config, data_sha256=data.meta['train_sha256'],
            dataset=str(dataset), versions=versions))
    wait_for_all()

def duration(seconds):
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}h{m % 60:02d}m" if m >= 60 else f"{m}m{s:02d}s" if m else f"{s}s"

def git_commit():
    try:
        return subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, timeout=5,
                              cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None

versions = dict(torch=str(torch.__version__), numpy=str(np.__version__), python=platform.python_version(), commit=git_commit(),
                gpu=torch.cuda.get_device_name() if cuda else None)
if master:
    os.makedirs(out_dir, exist_ok=True)
    lock()
    if not resuming:
        set_aside()
    log_path = os.path.join(out_dir, 'log.jsonl')
    if resuming and os.path.exists(log_path):
        with open(log_path, encoding='utf-8', errors='replace') as f, open(log_path + '.tmp', 'w', encoding='utf-8') as kept:
            kept.writelines(line for line in f if stays_in_log(line))
        os.replace(log_path + '.tmp', log_path)
    log_file = open(log_path, 'a' if resuming else 'w', encoding='utf-8', buffering=1) # written line by line
    write_log(dict(event='start', at_step=step, config=config, versions=versions, world_size=world_size, dtype=dtype,
                   device=device, params=raw_model.num_params(), params_non_embedding=raw_model.num_params(True),
                   flops_per_token=raw_model.flops_per_token(), tokens_per_step=tokens_per_step))
    if wandb_log:
        import wandb
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)
what = f"SAE at {sae_site} of block {', '.join(map(str, saes))}: {raw_model.config.n_features} features, K={sae_k}"
say(f"{raw_model.num_params() / 1e6:.1f}M parameters, {what if saes else 'dense, no SAE layer'}\n{max_iters} steps of "
    f"{tokens_per_step:,} tokens of {data.dir.name} ({len(data.train):,}) on {world_size} x {device_type}, {dtype}")

stop_signal = 0 # the one that came to this rank
def on_signal(signum, frame):
    global stop_signal
    stop_signal = signum
signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

# ----------------------------------------------------------------------------------------------------
# training loop

def next_batch(step, i):
    """x and y of this rank's micro-batch i; i = local_micros is the first one of the next step."""
    batch = get_batch(data.train, block_size, batch_size, seed, step, i * world_size + rank, gradient_accumulation_steps)
    return [t.pin_memory().to(device, non_blocking=True) if cuda else t.to(device) for t in batch]

def read_later(t):
    """Begins to copy t to the host; what it returns, when called, waits for that copy alone, and gives t as a list."""
    host = t.to('cpu', non_blocking=cuda)
    copied = torch.cuda.current_stream().record_event() if cuda else None
    def read():
        if cuda:
            copied.synchronize()
        return host.tolist()
    return read

def check(done, read):
    """After a step, the done-th: a gradient that was not finite ends the run. Returns the signal that stopped it on any rank, or 0."""
    norm, loss, signum = read()
    if not math.isfinite(norm) and not scaler.is_enabled():
        saved = f"the last checkpoint in {out_dir} is of step {saved_step}" if saved_step else "no checkpoint was saved yet"
        fail(f"at step {done - 1} the gradient norm is {norm} (loss {loss}): stopped; {saved}. "
             f"Try a lower learning rate than {learning_rate}", code=3)
    return int(signum)

x, y = next_batch(step, 0)
started = last_log = time.time()
last_step = saved_step = step
vitals = step, read_later(torch.zeros(3)) # of the last step: gradient norm, loss and stop_signal
stopped = 0 # by which signal, on any rank

while True:
    alpha = set_schedules(step)

    # once in a while: save, then evaluate (in that order: a crash in the evaluation loses nothing)
    pause = time.time()
    if step > saved_step and due(save_interval):
        save()
        saved_step = step
    if due(eval_interval):
        if ddp:
            check_replicas()
        model.eval()
        record = dict(event='eval', step=step, tokens=step * tokens_per_step, alpha=alpha, **evaluate())
        write_log(record)
        line = f"step {step:5d} | val loss {record['val_loss']:.4f}"
        if saes:
            live = min(100 * s['live'] for s in record['sae'].values())
            line += f" | SAE zeroed {record['val_loss_zeroed']:.3f} | mean {record['val_loss_mean']:.3f} | live {live:.1f} %"
            if master and probe_tokens:
                snapshot(step)
        say(line)
        model.train()
        wait_for_all()
    last_log += time.time() - pause # tokens a second are those of training
    if step == max_iters:
        hint = f". Look at its features: python inspect_features.py --out_dir={out_dir}" if saes else ""
        say(f"done in {duration(time.time() - started)}: {out_dir}{hint}")
        break

    # one step: micro-batches, forward and backward
    fired = torch.zeros(len(saes), raw_model.config.n_features, dtype=torch.bool, device=device)
    for i in range(local_micros):
        if ddp: # gradients are averaged over ranks with the last micro-batch; to be set before the forward pass
            model.require_backward_grad_sync = i == local_micros - 1
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + i * world_size + rank) % 2**63) # for dropout
        with autocast:
            _, loss, out = model(x, y)
        total, scores = loss, loss.new_zeros(2)
        if saes:
            total = out.loss.sum() if sae_posthoc else loss + out.loss.sum()
            scores = torch.stack((out.l0.mean(), out.fvu.mean()))
            fired |= out.fired
        scaler.scale(total / local_micros).backward()
        x, y = next_batch(step, i + 1) # while the GPU works
        log_sums += torch.cat((loss.detach().view(1), scores, loss.new_ones(1))).to(wide)

    for opt in optimizers:
        scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf) # averaged over ranks: all see the same
    for opt in optimizers:
        scaler.step(opt)
    scaler.update()
    raw_model.zero_grad(set_to_none=True)
    fired = all_reduce(fired.int(), dist.ReduceOp.MAX).bool() # all ranks must nudge the same features
    for s, sae in enumerate(saes.values()):
        sae.revive(fired[s], tokens_per_step)
    step += 1

    # What this step came to. To read it right away would be to wait for the GPU, which would then wait for its next work: so it
    # is read one step later, or now if this step is to be logged, saved or evaluated, so that nothing of a broken step is
    before, vitals = vitals, (step, read_later(torch.stack((
        grad_norm, loss.detach(), all_reduce(torch.full_like(grad_norm, stop_signal), dist.ReduceOp.MAX)))))
    stopped = check(*before)
    if stopped or stop_signal and not ddp or due(log_interval) or due(save_interval) or due(eval_interval):
        stopped = check(*vitals) or (0 if ddp else stop_signal)

    if due(log_interval):
        loss_sum, l0_sum, fvu_sum, n = all_reduce(log_sums).tolist()
        now = time.time()
        tok_s = (step - last_step) * tokens_per_step / max(1e-9, now - last_log)
        record = dict(event='log', step=step, tokens=step * tokens_per_step, loss=loss_sum / n,
                      lr=learning_rate * learning_rate_factor(step - 1), grad_norm=float(grad_norm), tok_s=tok_s)
        line = f"step {step:5d}/{max_iters} | loss {loss_sum / n:.4f}"
        if saes:
            live = 1 - torch.stack([sae.is_silent().to(wide).mean() for sae in saes.values()]).mean().item()
            record |= dict(l0=l0_sum / n, fvu=fvu_sum / n, live=live, alpha=alpha)
            line += f" | FVU {fvu_sum / n:.3f} | L0 {l0_sum / n:.1f} | live {100 * live:.1f} % | alpha {alpha:.2f}"
        if scaler.is_enabled():
            record['loss_scale'] = scaler.get_scale()
        write_log(record)
        say(f"{line} | {tok_s / 1000:.1f}k tok/s | {duration((max_iters - step) * tokens_per_step / tok_s)} left")
        if not math.isfinite(loss_sum):
            fail(f"the loss is not finite at step {step}", code=3)
        log_sums.zero_()
        last_log, last_step = now, step

    # SIGTERM or Ctrl-C on any rank, seen by all in the same step: the first rank saves, and everybody leaves
    if stopped:
        save()
        say(f"stopped by signal {stopped} after step {step}; saved. Go on with --init_from=resume")
        break

if ddp:
    dist.destroy_process_group()
if stopped:
    sys.exit(128 + stopped)
