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

from configurator import configure, run
from data.dataset import load_meta, load_tokenizer, token_bytes
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

def problems(c):
    """Everything that is wrong with the options, as a list of sentences."""
    at_least = dict(num_samples=1, max_new_tokens=1, top_k=0, show_features=0, seed=0)
    found = [f"{k}={c[k]} must be at least {low}" for k, low in at_least.items() if c[k] < low]
    return found + [sentence for wrong, sentence in (
        (c['temperature'] != 0 and not 1e-3 <= c['temperature'] <= 1e3,
         f"temperature={c['temperature']} must be 0 (always the likeliest token) or lie in 0.001..1000"),
        (c['seed'] >= 2**62, f"seed={c['seed']} must be below 2^62"),
        (c['compare'] and not c['steer'], "compare=true needs something to compare with, e.g. --steer=L6.F2386=8")) if wrong]

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
            raise ValueError(f"--steer={spec!r} is malformed: expected L6.F2386=8 (add), =x2 (scale), =off (ablate) "
                             "or =0,2,4,8 (a sweep)")
        name, i, f = match[1], int(match[2]), int(match[3])
        if i not in saes:
            raise ValueError(f"{name}: only these blocks have an SAE: {', '.join(map(str, saes))}")
        if f >= saes[i].n_features:
            raise ValueError(f"{name}: the features of block {i} are 0..{saes[i].n_features - 1}")
        if saes[i].alpha == 0 and saes[i].site != 'hidden': # hidden: the edit comes after the blend
            raise ValueError(f"{name}: alpha is 0 in this checkpoint, its features do not act on the text yet: train on, then steer")
        choices.append([(f"{name}={x}", (i, f, *parse_strength(x, spec))) for x in map(str.strip, match[4].split(','))])
    if sum(len(choice) > 1 for choice in choices) > 1:
        raise ValueError("more than one --steer is a sweep: give a list of strengths to one only")
    return [(" ".join(label for label, _ in chosen) or "unsteered", [edit for _, edit in chosen])
            for chosen in itertools.product(*choices)]

def parse_strength(text, spec):
    """'8' -> (1, 8), 'x2' -> (2, 0), 'off' -> (0, 0): the (scale, add) of z <- scale * z + add."""
    try:
        number = 0.0 if text == 'off' else float(text.removeprefix('x'))
        if abs(number) <= 1e6: # not nan; beyond it, squares in the norms could overflow
            return (number, 0.0) if text.startswith(('x', 'off')) else (1.0, number)
    except ValueError:
        pass
    raise ValueError(f"--steer={spec!r}: {text!r} is neither a number to add, x and a number to scale by "
                     "(both from -1e6 to 1e6), nor off")

def set_steering(model, edits):
    """edits [(block, feature, scale, add)] compose in their order; [] undoes all steering."""
    saes = model.saes()
    for sae in saes.values():
        sae.steer = None
    for i, f, scale, add in edits:
        ones = torch.ones(saes[i].n_features, device=saes[i].alpha.device)
        scales, adds = saes[i].steer = saes[i].steer or (ones, torch.zeros_like(ones)) # (F,), (F,)
        scales[f] *= scale
        adds[f] = adds[f] * scale + add

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
    """prompt, a list of ids -> the same with max_new_tokens more. Equal arguments give equal ids. Leaves the model unsteered."""
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
    losses, codes = [], []
    while done < len(tokens):
        start = max(0, done - T // 2)
        new = slice(done - start, None) # what no earlier window held
        logits, _, out = model(idx[:, start:start + T])
        targets = idx[0, done + 1:start + T + 1]
        logits = logits[0, new][:len(targets)].float() # the last token of all has no target
        losses.append(F.cross_entropy(logits, targets, reduction='none'))
        if out is not None:
            codes.append((out.values[:, 0, new], out.indices[:, 0, new]))
        done = start + T
    values, indices = (torch.cat(x, dim=1).cpu() for x in zip(*codes)) if codes else (None, None)
    return torch.cat(losses).cpu(), values, indices

def measure(model, tokens, n_prompt, features):
    """
    The sampled tokens (those after n_prompt) under the unsteered model -> [mean loss, and for each (block, feature)
    the share of these tokens on which it fires].
    """
    losses, values, indices = read(model, tokens)
    layer = {i: s for s, i in enumerate(model.saes())}
    fires = [((indices == f) & (values != 0))[layer[i], n_prompt:].any(-1) for i, f in features]
    return [x.float().mean().item() for x in (losses[n_prompt - 1:], *fires)]

# ----------------------------------------------------------------------------------------------------
# showing

def print_columns(left, right):
    """Two texts side by side, in 80 columns whatever characters they hold."""
    columns = [Text(text).wrap(Console(width=80), 39, overflow='fold', tab_size=4) for text in (left, right)]
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
    width = max(map(len, scores)) + 2
    print(f"{'':{width}}    loss" + "".join(f"{f'L{i}.F{f}':>13}" for i, f in features))
    for label, rows in scores.items():
        loss, *shares = np.mean(rows, axis=0)
        print(f"{label:{width}}{loss:8.3f}" + "".join(f"{100 * x:11.1f} %" for x in shares))

# ----------------------------------------------------------------------------------------------------

def write_samples(c):
    """Does what the options ask for."""
    device = c['device'] if c['device'] != 'auto' else 'cuda' if torch.cuda.is_available() else \
        'mps' if torch.backends.mps.is_available() else 'cpu'
    given = prompt_text(c['prompt'], c['prompt_file'])
    checkpoint = load_checkpoint(c['out_dir'])
    model = load_model(checkpoint, device)
    if (c['steer'] or c['show_features']) and not model.saes():
        raise ValueError(f"the model in {c['out_dir']} is dense: it has no features for --steer or --show_features")
    folder, meta, _ = load_meta(c['dataset'] or checkpoint['dataset'])
    if meta['tokenizer'].endswith('.json') and meta['train_sha256'] != checkpoint['data_sha256']:
        print(f"warning: {folder} is not the data that this model was trained on: if its tokenizer is another too, the text "
              "is garbled", file=sys.stderr)
    enc = load_tokenizer(folder, meta)
    vocab_size, eot = model.config.vocab_size, meta['eot']
    pieces = token_bytes(enc, vocab_size)
    prompt = enc.encode(given, allowed_special='all') or ([eot] if eot is not None else enc.encode("\n")) # never empty
    if max(prompt) >= vocab_size:
        raise ValueError(f"the prompt holds token {max(prompt)}, but the model's end at {vocab_size - 1}: it was trained with "
                         "another tokenizer, name its data set with --dataset=")
    runs = parse_steering(c['steer'], model)

    features = list(dict.fromkeys(edit[:2] for edit in runs[0][1])) # the steered ones, each once
    for i, f in features:
        sae, usual = model.saes()[i], usual_activation(c['out_dir'], checkpoint['step'], i, f)
        print(f"L{i}.F{f}, {PLACES[sae.site]} {i}: {usual}"
              + (f"; steering acts with alpha {sae.alpha:.2f} only" if sae.alpha < 1 else ""))
    measured = c['compare'] or len(runs) > 1
    titled = len(runs) * c['num_samples'] > 1 or c['steer'] != []
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
                print(f"\n--- seed {seed}, {label} ---\n" * titled + text(tokens))
        for label, tokens in samples.items():
            if measured:
                scores[label].append(measure(model, tokens, len(prompt), features))
            if c['show_features']: # what the unsteered model sees in it, like the numbers
                print(f"\nstrongest features of the text of seed {seed}, {label}:")
                print_features(model, tokens, pieces, c['show_features'])
    if measured:
        print_table(scores, features, c['max_new_tokens'])

def main(argv):
    run(write_samples, configure(DEFAULTS, argv, problems))

if __name__ == '__main__':
    main(sys.argv[1:])
