"""
Text from a trained model, with the features behind each token; and features turned up, down or off.

    python sample.py --out_dir=out-sae-cpu --prompt="import os" --show_features=3
    python sample.py --out_dir=out-sae-cpu --steer=L1.F17=8 --compare=true

--steer edits one feature's activation at every position, the prompt's too, before it is decoded:
    L1.F17=8         adds 8, in units of its activation (the run prints what is usual)
    L1.F17=x2        doubles it where it fires
    L1.F17=off       ablates it
    L1.F17=0,2,4,8   a sweep: one sample a strength, and a table
Given several times, the edits apply in their order.
"""
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import torch
from rich.table import Table

import configurator
from features import (autocast, caption, dense, device_of, encode, load_npz, open_run,
                      parse_feature, prompt_text, read, safe, strongest)
from terminal import screen, show, table_of

DEFAULTS = dict(
    out_dir='out',
    prompt='',            # after the end-of-text token, with which every document begins
    prompt_file='',       # or the prompt is what this file holds
    num_samples=1,        # the first from `seed`, the second from seed + 1, ...
    max_new_tokens=200,   # of each text
    temperature=0.8,      # 0: always the likeliest token
    top_k=200,            # only among the top_k likeliest; 0: among all
    stop=False,           # end a text where the model does, with its end-of-text token
    seed=1337,            # of the first text
    show_features=0,      # so many features beside each token, for each SAE layer
    steer=[],             # see above
    compare=False,        # the unsteered text before the steered ones
    device='auto',        # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
)

def problems(config):
    """Everything that is wrong with the options, as a list of sentences."""
    at_least = dict(num_samples=1, max_new_tokens=1, top_k=0, show_features=0, seed=0)
    found = [f"{key}={config[key]} must be at least {low}" for key, low in at_least.items()
             if config[key] < low]
    if config['temperature'] != 0 and not 1e-3 <= config['temperature'] <= 1e3:
        found.append(f"temperature={config['temperature']} must be 0 or lie in 0.001..1000")
    if config['compare'] and not config['steer']:
        found.append("compare=true needs something to compare with, e.g. --steer=L6.F2386=8")
    return found

# ---------------------------------------------------------------------------------------- steering

def parse_steering(specs, model):
    """The values of --steer -> [(label, edits)], one for each strength of a sweep (of two: for each
    pair), where edits is [(block, feature, scale, add)]. Raises ValueError."""
    choices = []
    for spec in specs:
        name, _, strengths = spec.strip().partition('=')
        i, f = parse_feature(name, model.saes(), model.config.n_features)
        if model.saes()[i].alpha == 0:
            raise ValueError(f"{name} does not act yet, alpha is 0: train on, then steer")
        choices.append([(f"L{i}.F{f}={text}", (i, f, *parse_strength(text, spec)))
                        for text in map(str.strip, strengths.split(','))])
    return [(' '.join(label for label, _ in chosen) or 'unsteered', [edit for _, edit in chosen])
            for chosen in itertools.product(*choices)]

def parse_strength(text, spec):
    """'8' -> (1, 8), 'x2' -> (2, 0), 'off' -> (0, 0): the (scale, add) of z <- scale * z + add."""
    try:
        number = 0.0 if text == 'off' else float(text.removeprefix('x'))
    except ValueError:
        number = np.nan
    if not abs(number) <= 1e6: # beyond it, squares in the norms could overflow
        raise ValueError(f"--steer={spec!r} is malformed: {text!r} is neither a number to add, nor "
                         "x and one to scale by (-1e6 to 1e6), nor off; a sweep is =0,2,4,8")
    return (number, 0.0) if text.startswith(('x', 'off')) else (1.0, number)

def set_steering(model, edits):
    """edits [(block, feature, scale, add)] compose in their order; [] undoes all steering."""
    for sae in model.saes().values():
        ones = torch.ones(sae.n_features, device=device_of(model))
        sae.steer = (ones, torch.zeros_like(ones)) if edits else None        # (F,), (F,)
    for i, f, scale, add in edits:
        scales, adds = model.saes()[i].steer
        scales[f] *= scale
        adds[f] = adds[f] * scale + add

def usual_activation(run, i, f):
    """What training noted of the feature at this checkpoint's eval."""
    snapshot = load_npz(f"{run.out_dir}/features/{run.checkpoint['step']:07d}.npz")
    try:
        mean = snapshot[f'L{i}.mean'][f]
        share = snapshot[f'L{i}.count'][f] / snapshot['probed']
    except LookupError: # missing, torn, another run's: it is only a hint
        return "its usual activation is not known"
    return f"usually {mean:.3g} where it fires, on {100 * share:.2f} % of tokens"

# ---------------------------------------------------------- sampling, and reading what was sampled

def sample(model, prompt, options, seed, edits=(), stop=None):
    """prompt, a list of ids -> the same with max_new_tokens more, or fewer where `stop` ends it.
    Equal arguments give equal ids. Leaves the model unsteered."""
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    set_steering(model, edits)
    idx, new = torch.tensor([prompt], device=device), []
    with autocast(model):
        for token in model.generate(idx, options.max_new_tokens, options.temperature,
                                    options.top_k, generator):
            new.append(token.item())
            if new[-1] == stop:
                break
    set_steering(model, [])
    return prompt + new

def measure(model, tokens, n_prompt, features):
    """The sampled tokens (those after n_prompt) under the unsteered model -> [mean loss, and for
    each (block, feature) the share of these tokens on which it fires]."""
    losses, values, indices = read(model, tokens)
    code = dense(values, indices, model.config.n_features)[:, n_prompt:]     # (S, n, F)
    shares = dict(zip(model.saes(), (code != 0).float().mean(1).tolist()))
    return [losses[n_prompt - 1:].mean().item(), *(shares[i][f] for i, f in features)]

# ----------------------------------------------------------------------------------------- showing

def features_of(model, tokens, names, n):
    """For each token and SAE layer the n features with the largest activations, in size."""
    _, values, indices = read(model, tokens)
    table = Table.grid(padding=(0, 2, 0, 0))
    for t, token in enumerate(tokens):
        head = f'{t:5d}', caption(names[token])
        for s, i in enumerate(model.saes()):
            cells = [f"L{i}.F{f} {a:.2f}" for f, a in strongest(values[s, t], indices[s, t], n)]
            cells = ''.join(f'{cell:18}' for cell in cells)
            table.add_row(*head, cells or f"L{i}: none fires")
            head = '', ''
    return table

def table_of_scores(scores, features):
    """scores {label: [what measure() returns, one a sample]}: a line of means for each label."""
    rows = []
    for label, found in scores.items():
        loss, *shares = np.mean(found, axis=0)
        rows.append((label, f'{loss:.3f}', *(f'{100 * share:.1f} %' for share in shares)))
    return table_of(('label', 'loss', *(f'L{i}.F{f}' for i, f in features)), rows)

def write_samples(options):
    given, steer, console = prompt_text(options), options.steer, screen()
    run = open_run(options.out_dir, device=options.device,
                   for_features=bool(steer or options.show_features))
    model, prompt, eot = run.model, encode(run, given), run.meta['eot']
    begins = 0 if given and eot is None else 1 # tokens that stand before every text
    versions = parse_steering(steer, model)
    steered = list(dict.fromkeys(edit[:2] for edit in versions[0][1])) # each once
    for i, f in steered:
        print(f"L{i}.F{f}, {model.saes()[i].site.place} {i}:\n  {usual_activation(run, i, f)}")
    if options.compare:
        versions = [('unsteered', []), *versions]
    scores = {label: [] for label, _ in versions}
    for seed in range(options.seed, options.seed + options.num_samples):
        for label, edits in versions:
            tokens = sample(model, prompt, options, seed, edits, eot if options.stop else None)
            text = safe(b''.join(run.names[token] for token in tokens[begins:]), keep='\n\t')
            if steer or options.num_samples > 1:
                print(f"\n--- seed {seed}, {label} ---")
            print(text)
            if steer:
                scores[label].append(measure(model, tokens, len(prompt), steered))
            if options.show_features: # what the unsteered model sees in it, like the numbers
                print(f"\nstrongest features of the text of seed {seed}, {label}:")
                show(console, [features_of(model, tokens, run.names, options.show_features)])
    if steer:
        print("\nloss and firing on the sampled tokens, read by the unsteered model:")
        show(console, [table_of_scores(scores, steered)])

def main(argv):
    options = configurator.configure(DEFAULTS, argv, problems)
    configurator.run(write_samples, SimpleNamespace(**options))

if __name__ == '__main__':
    main(sys.argv[1:])
