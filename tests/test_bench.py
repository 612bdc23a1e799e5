"""bench.py in its tiny version: what it writes has what the README's numbers are made of."""
import json

import pytest

import bench
import kernels

@pytest.mark.skipif(bench.GPU, reason="trains the models of config/*_gpt.py: minutes")
def test_every_number(tmp_path, capsys):
    """Layer, step: each field is there and positive; the file and what is printed agree."""
    out = tmp_path / 'bench.json'
    bench.main([f'--out={out}'])
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert json.loads(text[text.index('{'):]) == result
    row, = result['layer']
    timed = 'plain plain_compiled scatter dense_ae encoder topk'
    if kernels.available('cpu'):
        timed += ' fast fast_skewed select'
    for name in timed.split():
        assert row[f'{name}_ms'] > 0, name
    step = result['step']
    assert step['dense_tok_s'] > 0 and step['sae_tok_s'] > 0 and step['sae_share'] < 1

def test_a_failing_step_keeps_the_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'bench_layers', lambda: [])
    monkeypatch.setattr(bench, 'train', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.main([f'--out={tmp_path}/b.json'])
    assert json.loads((tmp_path / 'b.json').read_text())['layer'] == []
