"""bench.py in its tiny version: what it prints has what the README's numbers are made of."""
import json

import pytest

import bench
import kernels

@pytest.mark.skipif(bench.GPU, reason="trains the models of config/*_gpt.py: minutes")
def test_every_number(capsys):
    bench.main([])
    _, layer, step = map(json.loads, capsys.readouterr().out.splitlines())
    timed = ['plain', 'plain_compiled', 'encoder']
    timed += ['fast', 'fast_skewed'] * kernels.available('cpu')
    assert min(layer[name] for name in timed) > 0
    assert step['dense_tok_s'] > 0 and step['sae_tok_s'] > 0 and step['sae_share'] < 1
