"""
Poor man's configurator, after nanoGPT's, of every script: a config file is Python that assigns to
names, and --key=value on the command line comes after it.

    python train.py config/sae_cpu.py --max_iters=100 --sae_layers=1,2

Keys and types are those of the script's defaults; in a file names with _ are its own business.
"""
import ast
import difflib
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from textwrap import fill

PATHS = ('out_dir', 'init_from', 'dataset', 'prompt_file', 'probe', 'html', 'export', 'out',
         'results', 'plot') # of all scripts: keys in which ~ is the home folder
EXPECTED = {
    str: "text", list: "text", bool: "true or false", float: "a finite number",
    int: "a whole number below 2**63", tuple: "whole numbers separated by commas, e.g. 2,5"}

def configure(defaults, argv, check=lambda config: [], given=None):
    """defaults {key: value} and argv, config files and --key=value in order -> a new dict with the
    same keys. check: config -> what else is wrong, in sentences with key=value. given: a set, to
    which the keys that argv names are added. All problems at once, exit code 2."""
    sys.stdout.reconfigure(errors='replace') # question marks for what a terminal cannot show
    if {'--help', '-h'} & set(argv):
        main = sys.modules['__main__']
        source = Path(main.__file__).read_text('utf-8')
        about = dict(re.findall(r'^ *(\w+) ?=.*?  +# (.*)$', source, re.M)) # {key: its comment}
        print(main.__doc__.strip())
        print("\nConfig files and --key=value, later ones win. Keys and defaults:")
        for key, value in defaults.items():
            shown = ','.join(map(str, value)) if isinstance(value, (tuple, list)) else value
            line = f"  --{key}={shown} ".ljust(25) + about.get(key, '')
            print(fill(line, 80, subsequent_indent=25 * ' '))
        sys.exit(0)
    config, problems = dict(defaults), []
    given = set() if given is None else given
    for arg in argv:
        key, equals, value = arg.removeprefix('--').partition('=')
        where, named = "on the command line", {key: value if equals else True}
        if not arg.startswith('--'):
            where, named = f"in {arg}", read_file(arg, config)
        given.update(named)
        for key, value in named.items():
            kind = type(defaults.get(key))
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else "--help lists all"
                problems.append(f"unknown key {key!r} {where}: {hint}")
            elif (new := convert(value, kind)) is None:
                problems.append(f"{key}={value} {where}: expected {EXPECTED[kind]}")
            elif kind is list and config[key] is not defaults[key]: # given before
                config[key] = config[key] + new
            else:
                config[key] = os.path.expanduser(new) if key in PATHS else new
    stop_if(problems + check(config)) # in which a key that could not be read has its default
    return config

def stop_if(problems):
    """If there are problems: each a line on stderr (of other ranks the first), exit code 2."""
    if (rank := os.environ.get('RANK', '0')) != '0':
        problems = [f"rank {rank}: {problem}" for problem in problems[:1]]
    if problems:
        print(*(f"error: {problem}" for problem in problems), sep='\n', file=sys.stderr)
        sys.exit(2)

def run(main, *args, **options):
    """A script as a program: ValueError and OSError are a sentence and exit code 1, Ctrl-C 130."""
    try:
        main(*args, **options)
        sys.stdout.flush()
    except BrokenPipeError: # `| head` is no error: what is still to be written goes nowhere
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

def read_file(path, config):
    """{name: value} that the config file at path assigns; it may use what is configured so far."""
    names = dict(config)
    try:
        with open(path, encoding='utf-8-sig') as f: # sig: Windows' mark of UTF-8
            exec(compile(f.read(), path, 'exec'), names)
    except (Exception, SystemExit) as e:
        stop_if([f"{path}: not a readable config file ({type(e).__name__}: {e}); options are "
                 "written --key=value"])
    assigned = {n: v for n, v in names.items() if n not in config or v is not config[n]}
    return {n: v for n, v in assigned.items() # what it imports, defines or calls _name is its own
            if n in config or type(v) in EXPECTED and not n.startswith('_')}

def convert(value, kind):
    """value as that type, or None where it cannot be understood."""
    if isinstance(value, str) and kind not in (str, list):
        with suppress(Exception): # it is still text then, which is refused below
            value = ast.literal_eval(value.strip().capitalize() or '()') # true is True
    if kind in (tuple, list):
        value = value if isinstance(value, (tuple, list)) else [value]
        ok = all(type(v) is (int if kind is tuple else str) for v in value)
    elif kind is float:
        ok = type(value) in (int, float) and abs(value) <= sys.float_info.max # false for nan
    else:
        ok = type(value) is kind and (kind is not int or abs(value) < 2**63)
    return kind(value) if ok else None
