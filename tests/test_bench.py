"""bench.py in its tiny version: what it prints has what the README's numbers are made of."""
import json

import pytest

import bench

@pytest.mark.skipif(bench.GPU, reason="trains the models of config/*_gpt.py: minutes")
def test_every_number(capsys):
    bench.main([])
    _, layer, step = map(json.loads, capsys.readouterr().out.splitlines())
    fast = ['fast', 'fast_skewed'] if bench.kernels.available('cpu') else []
    assert min(layer[name] for name in ['plain', 'plain_compiled', 'encoder', *fast]) > 0
    assert step['dense_tok_s'] > 0 and step['sae_tok_s'] > 0 and step['sae_share'] < 1
