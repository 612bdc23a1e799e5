"""configurator.py: nanoGPT's exec feel without its holes: no bad input ends in a traceback."""
import re
import signal
import subprocess
import sys

import pytest

from configurator import configure, run
from runs import ROOT, run_script

DEFAULTS = dict(out_dir='out', n_layer=12, learning_rate=1e-3, compile=True, sae_layers=(6,),
                dataset='fineweb', prompt=['x'])

def errors(argv, capsys, *check):
    """The lines on stderr of a configuration that must be refused with exit code 2."""
    with pytest.raises(SystemExit) as e:
        configure(DEFAULTS, argv, *check)
    assert e.value.code == 2
    return capsys.readouterr().err.splitlines()

def write(path, text):
    path.write_text(text)
    return str(path)

@pytest.mark.parametrize('arg, value', [
    ('learning_rate=1', 1.0), # int for float: nanoGPT dies on a bare assertion
    ('learning_rate=3e-4', 3e-4), ('n_layer=1_000', 1000), ('compile=false', False),
    ('compile=True', True), ('compile', True),
    ('out_dir=a=b', 'a=b'), # split at the first =: nanoGPT crashes
    ('out_dir=', ''), ('out_dir=12', '12'), ('sae_layers=1,2', (1, 2)), ('sae_layers=', ()),
    ('sae_layers=[1, 2]', (1, 2)), ('sae_layers=(3,)', (3,)), ('sae_layers=3', (3,)),
])
def test_values_understood(arg, value):
    """Taken for what was meant, with the type of the default."""
    got, key = configure(DEFAULTS, ['--' + arg]), arg.partition('=')[0]
    assert got == DEFAULTS | {key: value} and type(got[key]) is type(value)

@pytest.mark.parametrize('arg, expected', [
    ('n_layer=2.0', 'a whole number'), ('n_layer=two', 'a whole number'),
    ('n_layer=', 'a whole number'), ('n_layer=True', 'a whole number'),
    ('compile=1', 'true or false'), ('learning_rate=fast', 'a finite number'),
    ('learning_rate=1e999', 'a finite number'), ('learning_rate=nan', 'a finite number'),
    ('learning_rate=' + '9' * 400, 'a finite number'),
    ('sae_layers=1,x', 'whole numbers separated by commas'),
    ('sae_layers=1.5', 'whole numbers separated by commas'),
    ('n_layer=\0', 'a whole number'), ('n_layer=' + '9' * 5000, 'a whole number'),
    ('sae_layers=' + '(' * 9999, 'whole numbers'), ('compile=' + '-' * 9999, 'true or false'),
])
def test_wrong_types(arg, expected, capsys):
    """A sentence with key, value, place and what was expected. So is a text left out."""
    line, left_out = errors(['--' + arg, '--out_dir'], capsys)
    assert left_out == 'error: out_dir=True on the command line: expected text'
    assert line.startswith(f'error: {arg} on the command line: expected {expected}')

def test_typos_name_the_nearest_key(tmp_path, capsys):
    """An unknown key is refused in a file (nanoGPT takes it silently) as on the command line."""
    path = write(tmp_path / 'c.py', "n_layre = 3\n")
    in_file, on_line, far = errors([path, '--leraning_rate=1', '--zzzz=none'], capsys)
    assert f"unknown key 'n_layre' in {path}: did you mean 'n_layer'?" in in_file
    assert "'leraning_rate' on the command line: did you mean 'learning_rate'?" in on_line
    assert 'unknown key' in far and '--help' in far
    no_dashes, = errors(['n_layer=3'], capsys)
    assert 'not a readable config file' in no_dashes and '--key=value' in no_dashes

def test_every_problem_at_once(tmp_path, capsys):
    """One line for each problem, of files and of the command line."""
    path = write(tmp_path / 'c.py', "n_layer = 2.5\nlearning_rate = float('nan')\nout_dir = open\n"
                                    "sae_layers = ('a', 1)\ncompile = None\nlayers = 3\n")
    lines = errors([path, '--learning_rate=x', '--what=1'], capsys)
    assert len(lines) == 8 and all(line.startswith('error: ') for line in lines)
    assert sum(f'in {path}: expected' in line for line in lines) == 5

def test_values_that_do_not_fit_are_listed_too(capsys):
    """What `check` finds comes in the same list."""
    def check(c):
        return [f"{key}={c[key]} is too large" for key in ('learning_rate', 'compile')]
    lines = errors(['--learning_rate=7', '--n_layer=x', '--compile=false'], capsys, check)
    assert [line.split('=')[0] for line in lines] == [
        'error: n_layer', 'error: learning_rate', 'error: compile']

def test_of_several_ranks_one_says_all(capsys, monkeypatch):
    """The others say only their first problem, with their number: it may be theirs alone."""
    for rank, n in (('0', 2), ('1', 1)):
        monkeypatch.setenv('RANK', rank)
        lines = errors(['--n_layer=x', '--compile=x'], capsys)
        assert len(lines) == n and ('rank 1' in lines[0]) == (rank == '1')

@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'inspect_features.py', 'bench.py',
                                    'results/ladder.py'])
def test_every_key_of_every_script(script):
    """Each key that is not text, with a value of another type: all are listed, before any work."""
    code, text = run_script(script, ['--help'])
    assert code == 0, text
    keys = dict(re.findall(r'^  --(\w+)=(\S*)', text, re.M))
    typed = [k for k, v in keys.items() if re.fullmatch(r'True|False|-?[\d.]+(e-?\d+)?', v)]
    assert len(typed) >= 2
    code, text = run_script(script, [f'--{k}=!' for k in typed])
    named = [line.split('=')[0] for line in text.splitlines()]
    assert code == 2 and named == [f'error: {k}' for k in typed], text

def test_ladder_options():
    """The ladder's own checks: each value named, in one list."""
    bad = dict(size='huge', rows='dense,none', out=__file__, labels='/none', steps=0, seeds=-1)
    code, text = run_script('results/ladder.py', [f'--{key}={x}' for key, x in bad.items()])
    assert code == 2 and re.findall(r'^error: (\w+)=', text, re.M) == list(bad), text

def test_ladder_results(tmp_path):
    """The table without results, or with a torn one: a sentence."""
    argv, said = ['--table=true', f'--results={tmp_path}'], f'results={tmp_path} holds no results'
    for torn in ('{"row": 1', '[]', '{"row": 1}', ''):
        code, text = run_script('results/ladder.py', argv)
        assert code in (1, 2) and text.startswith(f'error: {said}') and text.count('\n') == 1, text
        said = f"{write(tmp_path / 'a.json', torn)} is torn"

def test_files(tmp_path, monkeypatch):
    """A file may import, compute, use values set so far, define, and keep _names of its own. ~ is
    the home folder, in keys that are paths, in a file and on the command line."""
    monkeypatch.setenv('HOME', '/home/me')
    a = write(tmp_path / 'a.py', "\ufeffimport math\n_half = 4\nn_layer = 2 * _half\n"
                                 "learning_rate = math.sqrt(4)\nsae_layers = [1, 2]\n")
    b = write(tmp_path / 'b.py', "n_layer = n_layer + 1\ndef f():\n    return 1\ncompile = False\n"
                                 "dataset = '~/set'\n")
    argv = ['--n_layer=5', a, b, '--compile=true', '--out_dir=~/a', '--find=~/x']
    assert configure(DEFAULTS | dict(find=''), argv) == DEFAULTS | dict(
        n_layer=9, learning_rate=2.0, sae_layers=(1, 2), compile=True, find='~/x',
        dataset='/home/me/set', out_dir='/home/me/a')

@pytest.mark.parametrize('text', ["n_layer = ", "import no_such_module", "exit()", "\x00",
                                  "yield 1", "raise SystemExit", "globals().clear(); n_layer"])
def test_broken_files(tmp_path, text, capsys):
    """A config file that does not run is one sentence with its name and the reason."""
    path = write(tmp_path / 'c.py', text)
    line, = errors([path], capsys)
    assert path in line and 'not a readable config file' in line

def test_lists_repeat():
    """A key whose default is a list may be given several times; the first replaces the default."""
    assert configure(DEFAULTS, ['--prompt=a', '--prompt=b,c'])['prompt'] == ['a', 'b,c']

def test_closed_pipe_is_no_error():
    """`python inspect_features.py | head` has read enough."""
    code = "from configurator import run; run(lambda: [print('x' * 80) for _ in range(10_000)])"
    p = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
    p.stdout.readline()
    p.stdout.close()
    assert p.stderr.read() == b'' and p.wait() == 0

def test_ctrl_c():
    with pytest.raises(SystemExit, match='^130$'):
        run(signal.raise_signal, signal.SIGINT)
