"""
Text from a trained model, with the features behind each token; and features turned up, down or off.
What differs from nanoGPT's sample.py: a KV cache, --show_features, --steer, no sources to edit.

    python sample.py --out_dir=out-sae-cpu --prompt="import os" --show_features=3
    python sample.py --out_dir=out-sae-cpu --steer=L2.F17=8 --compare=true

--steer edits one feature's activation at every position, the prompt's too, before it is decoded:
    L2.F17=8         adds 8, in units of its activation (the run prints what is usual)
    L2.F17=x2        doubles it where it fires
    L2.F17=off       ablates it
    L2.F17=0,2,4,8   a sweep: one sample a strength, and a table
Given several times, the edits apply in their order. At site stream the feature is a channel.
"""
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text

from configurator import configure, run, stop_if
from data.dataset import data_dir, load_tokenizer, read_meta, token_bytes
from inspect_features import PLACES, caption, fit, prompt_text, safe
from model import load_checkpoint, load_model

DEFAULTS = dict(
    out_dir='out',
    prompt='',            # '': the end-of-text token, with which every document begins
    prompt_file='',       # or the prompt is what this file holds
    num_samples=1,        # the first from `seed`, the second from seed + 1, ...
    max_new_tokens=200,
    temperature=0.8,      # 0: always the likeliest token
    top_k=200,            # only among the top_k likeliest; 0: among all
    seed=1337,
    show_features=0,      # so many features beside each token, for each SAE layer
    steer=[],             # see above
    compare=False,        # steered and unsteered text side by side
    dataset='',           # whose tokenizer; '': the data set that the model was trained on
    device='auto',        # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
)

# ----------------------------------------------------------------------------------------------------
# steering

def parse_steering(specs, model):
    """
    The values of --steer -> [(label, edits)], one for each strength of a sweep, where edits is
    [(block, feature, scale, add)]; no specs give [('unsteered', [])]. Raises ValueError.
    """
    saes, choices = model.saes(), []
    for spec in specs:
        match = re.fullmatch(r'(L([0-9]{1,9})\.F([0-9]{1,9}))=(.+)', spec.strip())
        if not match:
            raise ValueError(f"--steer={spec!r} is malformed: expected L6.F2386=8 (add), "
                             "L6.F2386=x2 (scale), =off (ablate) or =0,2,4,8 (a sweep)")
        name, i, f = match[1], int(match[2]), int(match[3])
        if i not in saes:
            raise ValueError(f"{name}: only these blocks have an SAE: {', '.join(map(str, saes))}")
        if f >= saes[i].n_features:
            raise ValueError(f"{name}: the features of block {i} are 0..{saes[i].n_features - 1}")
        if saes[i].alpha == 0 and saes[i].site != 'hidden': # hidden: the edit comes after the blend
            raise ValueError(f"{name}: alpha is 0 in this checkpoint, its features do not act on the text yet; "
                             "train on, then steer")
        strengths = [strength.strip() for strength in match[4].split(',')]
        choices.append([(f"{name}={x}", (i, f, *parse_strength(x, spec))) for x in strengths])
    if sum(len(choice) > 1 for choice in choices) > 1:
        raise ValueError("more than one --steer is a sweep: give a list of strengths to one only")
    return [(" ".join(label for label, _ in run) or "unsteered", [edit for _, edit in run])
            for run in itertools.product(*choices)]

def parse_strength(text, spec):
    """'8' -> (1, 8), 'x2' -> (2, 0), 'off' -> (0, 0): the (scale, add) of z <- scale * z + add."""
    try:
        number = 0.0 if text == 'off' else float(text.removeprefix('x'))
        if not abs(number) <= 1e6: # catches nan; beyond it, squares in the norms could overflow
            raise ValueError
    except ValueError:
        raise ValueError(f"--steer={spec!r}: {text!r} is neither a number to add, x and a number to scale by "
                         "(both from -1e6 to 1e6), nor off") from None
    return (number, 0.0) if text.startswith(('x', 'off')) else (1.0, number)

def set_steering(model, edits):
    """edits [(block, feature, scale, add)] compose in their order; [] undoes all steering."""
    saes = model.saes()
    for sae in saes.values():
        sae.steer = None
    for i, f, scale, add in edits:
        if saes[i].steer is None:
            ones = torch.ones(saes[i].n_features, device=saes[i].alpha.device)
            saes[i].steer = ones, torch.zeros_like(ones)                 # scale (F,), add (F,)
        saes[i].steer[0][f] *= scale
        saes[i].steer[1][f] = saes[i].steer[1][f] * scale + add

def usual_activation(out_dir, step, i, f):
    """What training noted of the feature at this checkpoint's eval, if it noted anything."""
    try:
        with np.load(Path(out_dir) / 'features' / f'{step:07d}.npz') as z:
            count, mean, probed = int(z[f'L{i}.count'][f]), float(z[f'L{i}.mean'][f]), int(z['probed'])
    except Exception: # missing, torn, another run's: it is only a hint
        return "its usual activation is not known"
    return (f"usually {mean:.3g} where it fires, on {100 * count / probed:.2f} % of tokens" if count
            else f"silent on all {probed:,} tokens of the last eval")

# ----------------------------------------------------------------------------------------------------
# sampling, and reading what was sampled

def sample(model, prompt, config, seed, edits=()):
    """
    prompt, a list of ids -> the same with max_new_tokens more. Equal arguments give equal ids.
    Leaves the model unsteered.
    """
    device = model.transformer.wte.weight.device
    set_steering(model, edits)
    new = list(model.generate(torch.tensor([prompt], device=device), config['max_new_tokens'], config['temperature'],
                              config['top_k'] or None, torch.Generator(device).manual_seed(seed)))
    set_steering(model, [])
    return prompt + torch.cat(new, dim=1)[0].tolist()

@torch.no_grad()
def read(model, tokens):
    """
    One pass over a finished text of n ids -> losses (n-1,) in nats, that of token j at j-1; values and indices of its
    features (S, n, K), None if the model is dense. A text beyond block_size is read in windows that overlap by half,
    so that no token is read with less than half a window.
    """
    idx = torch.tensor([tokens], device=model.transformer.wte.weight.device)
    T, done = model.config.block_size, 0
    losses, values, indices = [], [], []
    while done < len(tokens):
        start = max(0, done - T // 2)
        new = slice(done - start, None) # what no earlier window held
        logits, _, out = model(idx[:, start:start + T])
        targets = idx[0, done + 1:start + T + 1]
        logits = logits[0, new][:len(targets)].float() # the last token of all has no target
        losses.append(F.cross_entropy(logits, targets, reduction='none'))
        if out is not None:
            values.append(out.values[:, 0, new])
            indices.append(out.indices[:, 0, new])
        done = start + T
    return torch.cat(losses).cpu(), *(torch.cat(x, 1).cpu() if x else None for x in (values, indices))

def measure(model, tokens, n_prompt, features):
    """
    The sampled tokens (those after n_prompt) under the unsteered model -> [mean loss, and for each (block, feature)
    the share of these tokens on which it fires].
    """
    losses, values, indices = read(model, tokens)
    layer = {i: s for s, i in enumerate(model.saes())}
    fires = [((indices == f) & (values != 0))[layer[i], n_prompt:].any(-1) for i, f in features]
    return [losses[n_prompt - 1:].mean().item(), *(x.float().mean().item() for x in fires)]

# ----------------------------------------------------------------------------------------------------
# showing

def print_columns(left, right):
    """Two texts side by side, in 80 columns whatever characters they hold."""
    console = Console(width=80)
    columns = [Text(text).wrap(console, 39, overflow='fold', tab_size=4) for text in (left, right)]
    for a, b in itertools.zip_longest(*columns, fillvalue=Text()):
        print(f"{fit(a.plain, 39)}  {b.plain}".rstrip())

def print_features(model, tokens, pieces, n):
    """For each token and SAE layer the n features with the largest activations, in size."""
    _, values, indices = read(model, tokens)
    for t, token in enumerate(tokens):
        head = f"{t:5d}  {fit(caption(pieces[token]), 14)} "
        for s, i in enumerate(model.saes()):
            order = values[s, t].abs().argsort(descending=True, stable=True)[:n].tolist()
            cells = [f"L{i}.F{indices[s, t, j]} {values[s, t, j]:.2f}" for j in order if values[s, t, j] != 0]
            cells = cells or [f"L{i}: none fires"]
            for j in range(0, len(cells), 3):
                print(head + "".join(f"{cell:19}" for cell in cells[j:j + 3]).rstrip())
                head = " " * 22

def print_table(scores, features, n):
    """scores {label: [what measure() returns, one a sample]}: a line of means for each label."""
    samples = len(next(iter(scores.values())))
    print(f"\nloss and firing on the {samples} x {n} sampled tokens, read by the unsteered model:")
    names, width = [f"L{i}.F{f}" for i, f in features], max(map(len, scores)) + 2
    print(f"{'':{width}}    loss" + "".join(f"{name:>13}" for name in names))
    for label, rows in scores.items():
        loss, *shares = np.mean(rows, axis=0)
        print(f"{label:{width}}{loss:8.3f}" + "".join(f"{100 * x:11.1f} %" for x in shares))

# ----------------------------------------------------------------------------------------------------

def load_vocabulary(checkpoint, dataset):
    """The data set's tokenizer, its meta.json, and the bytes of each of the model's token ids."""
    name = dataset or checkpoint['dataset']
    file = data_dir(name) / 'meta.json' # load_dataset would want the tokens, too: not needed here
    if not file.exists():
        raise ValueError(f"the tokenizer of data set {name!r} is missing (there is no {file}): "
                         "prepare it, or name another with --dataset=")
    meta = read_meta(file, "prepare it")
    if meta['tokenizer'].endswith('.json') and meta['train_sha256'] != checkpoint['data_sha256']:
        print(f"warning: {file.parent} is not the data that this model was trained on: if its tokenizer is another "
              "too, the text is garbled", file=sys.stderr)
    enc = load_tokenizer(file.parent, meta)
    return enc, meta, token_bytes(enc, checkpoint['model_args']['vocab_size'])

def encode_prompt(text, enc, meta, vocab_size):
    """The prompt as a list of ids, never empty. Raises ValueError."""
    tokens = enc.encode(text, allowed_special='all') or ([meta['eot']] if meta['eot'] is not None else enc.encode("\n"))
    if max(tokens) >= vocab_size:
        raise ValueError(f"the prompt holds token {max(tokens)}, but the model's end at {vocab_size - 1}: it was "
                         "trained with another tokenizer, name its data set with --dataset=")
    return tokens

def problems_of(c):
    """Everything that is wrong with the options, as a list of sentences."""
    found = [f"{key}={c[key]} must be at least {least}" for key, least in
             dict(num_samples=1, max_new_tokens=1, top_k=0, show_features=0, seed=0).items() if c[key] < least]
    if not (c['temperature'] == 0 or 1e-3 <= c['temperature'] <= 1e3):
        found.append(f"temperature={c['temperature']} must be 0 (always the likeliest token) or lie in 0.001..1000")
    if c['seed'] >= 2**62:
        found.append(f"seed={c['seed']} must be below 2^62")
    if c['compare'] and not c['steer']:
        found.append("compare=true needs something to compare with, e.g. --steer=L6.F2386=8")
    return found

def main(argv):
    c = configure(DEFAULTS, argv)
    stop_if(problems_of(c))
    device = c['device'] if c['device'] != 'auto' else 'cuda' if torch.cuda.is_available() else \
        'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        given = prompt_text(c['prompt'], c['prompt_file'])
        checkpoint = load_checkpoint(c['out_dir'])
        model = load_model(checkpoint, device)
        if (c['steer'] or c['show_features']) and not model.saes():
            raise ValueError(f"the model in {c['out_dir']} is dense: it has no features for --steer or --show_features")
        enc, meta, pieces = load_vocabulary(checkpoint, c['dataset'])
        prompt = encode_prompt(given, enc, meta, model.config.vocab_size)
        runs = parse_steering(c['steer'], model)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None

    features = list(dict.fromkeys(edit[:2] for edit in runs[0][1])) # the steered ones, each once
    for i, f in features:
        sae, usual = model.saes()[i], usual_activation(c['out_dir'], checkpoint['step'], i, f)
        print(f"L{i}.F{f}, {PLACES[sae.site]} {i}: {usual}"
              + (f"; steering acts with alpha {sae.alpha:.2f} only" if sae.alpha < 1 else ""))
    sweep = len(runs) > 1
    if c['compare']:
        runs = [("unsteered", []), *runs]
    def text(tokens): # the default prompt is not printed
        return safe(b"".join(pieces[t] for t in tokens[0 if given else len(prompt):]), keep='\n\t')
    scores = {label: [] for label, _ in runs}
    for seed in range(c['seed'], c['seed'] + c['num_samples']):
        samples = {label: sample(model, prompt, c, seed, edits) for label, edits in runs}
        for label, tokens in samples.items():
            if c['compare'] and label != "unsteered":
                print(f"\n--- seed {seed} ---")
                print_columns(f"unsteered\n\n{text(samples['unsteered'])}", f"{label}\n\n{text(tokens)}")
            elif not c['compare']:
                several = len(runs) * c['num_samples'] > 1 or c['steer'] != []
                print(f"\n--- seed {seed}, {label} ---\n" * several + text(tokens))
        for label, tokens in samples.items():
            if c['compare'] or sweep:
                scores[label].append(measure(model, tokens, len(prompt), features))
            if c['show_features']: # what the unsteered model sees in it, like the numbers
                print(f"\nstrongest features of the text of seed {seed}, {label}:")
                print_features(model, tokens, pieces, c['show_features'])
    if c['compare'] or sweep:
        print_table(scores, features, c['max_new_tokens'])

if __name__ == '__main__':
    run(main, sys.argv[1:])
