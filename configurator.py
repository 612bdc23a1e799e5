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
            print("usage: config files and --key=value, later ones win. Keys and defaults:")
            print("\n".join(f"  --{key}={show(value)}" for key, value in defaults.items()))
            sys.exit(0)
        if arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')
            if not equals:
                problems.append(f"{arg}: expected --key=value, e.g. --{nearest(key, defaults) or 'key'}=...")
            else:
                assign(config, defaults, key, value, "on the command line", problems)
        else:
            for key, value in read_file(arg, config, problems).items():
                assign(config, defaults, key, value, f"in {arg}", problems)
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
    Ctrl-C is 130; and a terminal or pipe that is not UTF-8 gets question marks.
    """
    sys.stdout.reconfigure(errors='replace')
    try:
        main(*args)
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
    if not os.path.isfile(path):
        problems.append(f"{path}: no such config file (options are written --key=value)")
        return {}
    try:
        with open(path, encoding='utf-8') as f:
            tree = compile(f.read(), path, 'exec')
        names = dict(config)
        exec(tree, names)
    except (Exception, SystemExit) as e:
        problems.append(f"{path}: not a readable config file ({type(e).__name__}: {e})")
        return {}
    assigned = {name for name in tree.co_names if name in names}
    modules = {n for n in assigned if type(names[n]).__name__ in ('module', 'function', 'type')}
    return {n: names[n] for n in tree.co_names if n in assigned - modules and not n.startswith('_')
            and (n not in config or names[n] is not config[n])}

def assign(config, defaults, key, value, where, problems):
    if key not in defaults:
        near = nearest(key, defaults)
        problems.append(f"unknown key {key!r} {where}" + (f": did you mean {near!r}?" if near else ": --help lists all"))
        return
    try:
        value = convert(value, defaults[key])
        config[key] = config[key] + value if type(value) is list and config[key] is not defaults[key] else value
    except ValueError as e:
        problems.append(f"{key}={show(value)} {where}: expected {e}")

def nearest(key, defaults):
    return next(iter(difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)), None)

def convert(value, default):
    """value as default's type; raises ValueError naming what was expected."""
    kind = type(default)
    if kind is str:
        if isinstance(value, str):
            return value
        raise ValueError("text")
    if kind is list:
        return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    if isinstance(value, str):
        text = value.strip()
        if kind is bool and text.lower() in ('true', 'false'):
            return text.lower() == 'true'
        if kind is tuple:
            text = text.strip('()[]')
            text = f"({text},)" if text.strip() and not text.rstrip().endswith(',') else f"({text})"
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass # still text: refused below
    if kind is bool and type(value) is not bool:
        raise ValueError("true or false")
    if kind is int and (type(value) is not int or abs(value) >= 2**63):
        raise ValueError("a whole number, below 2**63 in size")
    if kind is float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max: # nor nan
            raise ValueError("a finite number")
        return float(value)
    if kind is tuple:
        value = (value,) if type(value) is int else value
        if not isinstance(value, (list, tuple)) or any(type(v) is not int for v in value):
            raise ValueError("whole numbers separated by commas, e.g. 2,5")
        return tuple(value)
    return value

def show(value):
    try:
        return ','.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    except ValueError: # Python will not print more than 4,300 digits
        return "a very long number"
