"""
Poor man's configurator, after nanoGPT's: a config file is Python that assigns to names, and --key=value on the
command line comes after it. Every script here is configured this way:

    python train.py config/sae_cpu.py --max_iters=100 --sae_layers=1,2

The keys and their types are those of the script's own defaults. A name that is not among them is an error with the
nearest key named, in a file as on the command line (names that begin with _ are a file's own business). All problems
are listed at once, before any work, and the exit code is 2.
"""
import ast
import difflib
import os
import sys
from contextlib import suppress

def configure(defaults, argv, check=None):
    """
    defaults: {key: value}; argv: config files and --key=value, in order -> a new dict with the same keys.
    int is accepted for float; true/false for bool; "1,2", "[1, 2]" or "3" for a tuple of ints; a key whose default
    is a list of strings may be given several times. check: a function of the config that returns what else is wrong
    with it, as a list of sentences with key=value in them. Prints each problem and exits with code 2 if there is any.
    """
    config, problems = dict(defaults), []
    for arg in argv:
        if arg in ('--help', '-h'):
            print("usage: config files and --key=value, later ones win. Keys and defaults:",
                  *(f"  --{key}={show(value)}" for key, value in defaults.items()), sep='\n')
            sys.exit(0)
        key, equals, value = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            given, where = read_file(arg, config, problems), f"in {arg}"
        elif equals:
            given, where = {key: value}, "on the command line"
        else:
            given = {}
            problems.append(f"{arg}: expected --key=value, e.g. --{nearest(key, defaults) or 'key'}=...")
        for key, value in given.items():
            if key not in defaults:
                near = nearest(key, defaults)
                problems.append(f"unknown key {key!r} {where}: " + (f"did you mean {near!r}?" if near else "--help lists all"))
                continue
            try:
                new = convert(value, type(defaults[key]))
                config[key] = config[key] + new if type(new) is list and config[key] is not defaults[key] else new
            except ValueError as e:
                problems.append(f"{key}={show(value)} {where}: expected {e}")
    if check: # what it says of a key that could not be read would be about the default
        unread = [problem.partition('=')[0] + '=' for problem in problems]
        problems += [problem for problem in check(config) if not any(key in problem for key in unread)]
    stop_if(problems)
    return config

def stop_if(problems):
    """
    Every problem on a line of its own to stderr, then exit code 2; nothing happens if the list is empty. Of several
    ranks the first says all; the others have the same problems, or one of their own (a GPU), and say the first.
    """
    rank = os.environ.get('RANK', '0')
    for problem in problems if rank == '0' else problems[:1]:
        print(f"error: {problem}" if rank == '0' else f"error: rank {rank}: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)

def run(main, *args):
    """
    A script as a program: ValueError and OSError, which say what the user can mend, are one sentence and exit code 1;
    Ctrl-C is 130; `| head` may close the pipe; and a terminal or pipe that is not UTF-8 gets question marks.
    """
    sys.stdout.reconfigure(errors='replace')
    try:
        main(*args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # what is still to be written goes nowhere
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
    """Names that the config file at path assigns, as a dict. It may compute with the values configured so far."""
    names = dict(config)
    try:
        with open(path, encoding='utf-8') as f:
            code = compile(f.read(), path, 'exec')
        exec(code, names)
    except (Exception, SystemExit) as e:
        problems.append(f"{path}: not a readable config file ({type(e).__name__}: {e})" if os.path.isfile(path)
                        else f"{path}: no such config file (options are written --key=value)")
        return {}
    found = {n: names[n] for n in code.co_names if n in names and not n.startswith('_')}
    return {n: v for n, v in found.items() if type(v).__name__ not in ('module', 'function', 'type')
            and (n not in config or v is not config[n])}

def nearest(key, defaults):
    return next(iter(difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)), None)

def convert(value, kind):
    """value as that type; raises ValueError naming what was expected."""
    if kind is list:
        return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    if kind is bool and isinstance(value, str):
        value = {'true': True, 'false': False}.get(value.strip().lower())
    elif isinstance(value, str) and kind is not str:
        text = value.strip()
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError): # still text: refused below
            value = ast.literal_eval(f"[{text.strip('()[]')}]" if kind is tuple else text)
    value = [value] if kind is tuple and type(value) is int else value
    understood, expected = {
        str: (isinstance(value, str), "text"),
        bool: (type(value) is bool, "true or false"),
        int: (type(value) is int and abs(value) < 2**63, "a whole number, below 2**63 in size"),
        float: (type(value) in (int, float) and abs(value) <= sys.float_info.max, "a finite number"), # nor nan
        tuple: (isinstance(value, (list, tuple)) and all(type(v) is int for v in value), "whole numbers separated by commas, e.g. 2,5"),
    }[kind]
    if not understood:
        raise ValueError(expected)
    return kind(value)

def show(value):
    try:
        return ','.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    except ValueError: # Python will not print more than 4,300 digits
        return "a very long number"
