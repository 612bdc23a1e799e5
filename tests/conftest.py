"""What all tests share: one thread, the repository on the path, and the mark `slow`."""
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1') # tiny tensors: more threads only wait for each other
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import pytest
import torch

torch.set_num_threads(1)

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help="run the tests marked slow as well")

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes long; runs with --slow only')
    if not config.getoption('--slow'):
        config.option.markexpr = config.option.markexpr or 'not slow'

def pytest_collection_modifyitems(items): # last: it waits for the run below
    items.sort(key=lambda item: item.name == 'test_under_interpreter')

@pytest.fixture(scope='session', autouse=True)
def interpreted(request):
    """test_kernels.py in Triton's interpreter, a process beside all other tests, to save time."""
    import kernels
    process = None
    there = kernels.available('cuda' if torch.cuda.is_available() else 'cpu')
    wanted = request.session.items[-1].name == 'test_under_interpreter'
    if wanted and kernels.triton and not there:
        command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider',
                   str(ROOT / 'tests/test_kernels.py')]
        env = os.environ | {'TRITON_INTERPRET': '1'}
        process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
    yield process
    if process:
        process.kill()

@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    import runs
    return runs.write_tiny_data(tmp_path_factory.mktemp('data') / 'tiny')

@pytest.fixture(scope='session')
def whole(tiny_data, tmp_path_factory):
    """out_dir of the run that nobody disturbed: what interrupted runs are compared with."""
    import runs
    out = tmp_path_factory.mktemp('whole')
    runs.finish(out, tiny_data)
    return out
