"""bench.py in its tiny version: what it writes has what the README's table is made of."""
import json
import subprocess

import pytest

import bench
import kernels

@pytest.mark.skipif(bench.GPU, reason="trains the models of config/*_gpt.py: minutes")
def test_every_number(tmp_path, capsys):
    """Layer, head, step: each field is there and positive; the file and what is printed agree."""
    out = tmp_path / 'bench.json'
    bench.main([f'--out={out}'])
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert json.loads(text[text.index('{'):]) == result
    row, = result['layer']
    timed = 'plain plain_compiled scatter dense_ae encoder topk floor'
    if kernels.available('cpu'):
        timed += ' fast fast_skewed select'
    for name in timed.split():
        assert row[f'{name}_ms'] > 0, name
    assert result['head']['fused_ms'] > 0 and result['head']['compiled_ms'] > 0
    assert result['copy_tb_s'] > 0 and result['matmul_tflop_s'] > 0
    step = result['step']
    assert step['dense_tok_s'] > 0 and step['sae_tok_s'] > 0 and step['sae_share'] < 1

def test_a_failing_step_keeps_the_layer(tmp_path, monkeypatch, capfd):
    """What train.py said last is shown, and what was measured before is in the file."""
    monkeypatch.setattr(bench, 'TRAIN', bench.TRAIN | dict(n_head=3))
    monkeypatch.setattr(bench, 'SHAPES', [])
    with pytest.raises(subprocess.CalledProcessError):
        bench.main([f'--out={tmp_path}/b.json'])
    assert "n_head=3" in capfd.readouterr().err
    assert json.loads((tmp_path / 'b.json').read_text())['head']['fused_ms'] > 0
