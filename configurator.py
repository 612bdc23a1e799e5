"""
Poor man's configurator, after nanoGPT's: a config file is Python that assigns to names, and
--key=value on the command line comes after it. Every script here is configured this way:

    python train.py config/sae_cpu.py --max_iters=100 --sae_layers=1,2

The keys and their types are those of the script's own defaults. A name that is not among them is an
error with the nearest key named, in a file as on the command line (names that begin with _ are a
file's own business). All problems are listed at once, before any work, and the exit code is 2.
"""
import ast
import difflib
import os
import sys
from contextlib import suppress
from types import ModuleType

PATHS = ('out_dir', 'init_from', 'dataset', 'prompt_file', 'probe', 'html', 'export', 'out',
         'results', 'plot') # of all scripts: keys in which ~ is the home folder
EXPECTED = {
    str: "text", list: "text", bool: "true or false", float: "a finite number",
    int: "a whole number below 2**63", tuple: "whole numbers separated by commas, e.g. 2,5"}

def configure(defaults, argv, check=None):
    """
    defaults: {key: value}; argv: config files and --key=value, in order -> a new dict with the same
    keys. int is accepted for float; true/false for bool; "1,2", "[1, 2]" or "3" for a tuple of
    ints; a key whose default is a list of strings may be given several times. check: a function of
    the config that returns what else is wrong with it, as a list of sentences with key=value in
    them. Prints each problem and exits with code 2 if there is any.
    """
    config, problems, unread = dict(defaults), [], []
    for arg in argv:
        if arg in ('--help', '-h'):
            print("usage: config files and --key=value, later ones win. Keys and defaults:",
                  *(f"  --{key}={show(value)}" for key, value in defaults.items()), sep='\n')
            sys.exit(0)
        key, equals, value = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            given, where = read_file(arg, config, problems), f"in {arg}"
        elif equals or key not in defaults:
            given, where = {key: value}, "on the command line"
        else:
            problems.append(f"{arg}: expected {arg}={EXPECTED[type(defaults[key])]}")
            unread.append(key)
            continue
        for key, value in given.items():
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else "--help lists all"
                problems.append(f"unknown key {key!r} {where}: {hint}")
                continue
            kind = type(defaults[key])
            try:
                new = convert(value, kind)
            except ValueError:
                problems.append(f"{key}={show(value)} {where}: expected {EXPECTED[kind]}")
                unread.append(key)
                continue
            if key in PATHS:
                new = os.path.expanduser(new)
            if kind is list and config[key] is not defaults[key]: # given before
                new = config[key] + new
            config[key] = new
    if check: # what it says of a key that could not be read would be about the default
        problems += [p for p in check(config) if not any(f'{key}=' in p for key in unread)]
    stop_if(problems)
    return config

def stop_if(problems):
    """
    Every problem on a line of its own to stderr, then exit code 2; nothing happens if the list is
    empty. Of several ranks the first says all; the others have the same problems, or one of their
    own (a GPU), and say the first.
    """
    rank = os.environ.get('RANK', '0')
    said = problems if rank == '0' else [f"rank {rank}: {problem}" for problem in problems[:1]]
    for problem in said:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)

def run(main, *args):
    """
    A script as a program: ValueError and OSError, which say what the user can mend, are one
    sentence and exit code 1; Ctrl-C is 130; `| head` may close the pipe; and a terminal or pipe
    that is not UTF-8 gets question marks.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')
    try:
        main(*args)
        sys.stdout.flush()
    except BrokenPipeError: # what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)

def writable(folder):
    """Whether folder is one in which to write, or can be made."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return folder != '' and os.path.isdir(path) and os.access(path, os.W_OK)

def read_file(path, config, problems):
    """What the config file at path assigns, {name: value}. It may compute with what is configured
    so far, import, and define functions and classes."""
    if not os.path.exists(path):
        problems.append(f"{path}: no such config file (options are written --key=value)")
        return {}
    names = dict(config)
    try:
        with open(path, encoding='utf-8-sig') as f: # sig: Windows' mark of UTF-8
            exec(compile(f.read(), path, 'exec'), names)
    except (Exception, SystemExit) as e:
        problems.append(f"{path}: not a readable config file ({type(e).__name__}: {e})")
        return {}
    changed = {n: v for n, v in names.items() if n not in config or v is not config[n]}
    tools = [n for n, v in changed.items() if callable(v) or isinstance(v, ModuleType)]
    return {n: v for n, v in changed.items()
            if n in config or not n.startswith('_') and n not in tools}

def convert(value, kind):
    """value as that type; raises ValueError where it cannot be understood."""
    if kind is list:
        return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    if isinstance(value, str) and kind is not str:
        text = value.strip().capitalize() or '()' # true is True; nothing is a tuple of nothing
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text) # or it is still text, which is refused below
    if kind is tuple:
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        ok = all(type(v) is int for v in value)
    elif kind is int:
        ok = type(value) is int and abs(value) < 2**63
    elif kind is float:
        ok = type(value) in (int, float) and abs(value) <= sys.float_info.max # false for nan
    else:
        ok = type(value) is kind
    if not ok:
        raise ValueError
    return kind(value)

def show(value):
    try:
        return ','.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    except ValueError: # Python will not print more than 4,300 digits
        return "a very long number"
