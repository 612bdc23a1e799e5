"""
bench.py in its tiny version: what it writes has the fields that the README's table is made of, and
its stop-watches hang on functions that train.py really has.

    python -m pytest tests/test_bench.py      (10 seconds; the numbers of a CPU mean nothing)
"""
import json

import pytest

import bench

def test_mfu(monkeypatch):
    """tokens/s times FLOPs a token over the card's peak; None for a card that is not in the list."""
    monkeypatch.setattr(bench, 'GPU', True)
    monkeypatch.setattr(bench.torch.cuda, 'get_device_name', lambda: 'NVIDIA H200')
    assert bench.mfu(1e6, 494.5e6) == pytest.approx(0.5)
    monkeypatch.setattr(bench.torch.cuda, 'get_device_name', lambda: 'another')
    assert bench.mfu(1e6, 494.5e6) is None

def test_layer(tmp_path, capsys, monkeypatch):
    """Every field of a row and of the head is there and positive; file and print agree; 80 columns do."""
    monkeypatch.setattr(bench, 'N', 64)
    monkeypatch.setattr(bench, 'SHAPES', [(32, 256, 4), (24, 128, 8)])
    out = tmp_path / 'new' / 'bench.json'
    bench.main(['--parts=layer', f'--out={out}'])
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert json.loads(text[text.index('{'):text.rindex('}') + 1]) == result
    assert [(row['C'], row['F'], row['K'], row['N']) for row in result['layer']] == [
        (32, 256, 4, 64), (24, 128, 8, 64)]
    for row in result['layer']:
        for key in ('fast', 'fast_skewed', 'plain', 'plain_compiled', 'scatter', 'dense_ae',
                    'encoder', 'select', 'topk', 'floor', 'select_floor'):
            assert row[key + '_ms'] > 0, key
        assert row['same_bits']
    head = result['head']
    assert (head['N'], head['V']) == (64, bench.V) and head['fused_ms'] > 0 and head['compiled_ms'] > 0
    assert set(head) == {'N', 'C', 'V'} | {f'{name}_{unit}' for name in ('fused', 'compiled') for unit in ('ms', 'gb')}
    assert f"head with the loss, N=64, V={bench.V}" in text
    assert result['copy_tb_s'] > 0 and result['matmul_tflop_s'] > 0
    assert max(map(len, text[text.rindex('}'):].splitlines())) <= 80
    assert not out.with_name('bench.json.tmp').exists()

@pytest.mark.skipif(bench.GPU, reason="trains the model of config/sae_gpt.py: minutes")
def test_training_with_stop_watches(tmp_path):
    """train.py runs to its end under the stop-watches, and all of them ran."""
    bench.main(['--parts=overhead', '--steps=4', f'--out={tmp_path}/b.json'])
    cost = json.loads((tmp_path / 'b.json').read_text())['overhead']
    parts = {'data', 'log', 'eval', 'snapshot', 'save'}
    assert set(cost) == {'step_ms'} | {f'{p}_{unit}' for p in parts for unit in ('ms', 'share')}
    assert cost['eval_share'] == pytest.approx(cost['eval_ms'] / 250 / cost['step_ms'], rel=1e-2)
    assert cost['data_share'] == pytest.approx(cost['data_ms'] / cost['step_ms'], rel=1e-2)

def test_a_failing_part_costs_no_other(tmp_path, monkeypatch):
    """Its traceback is shown, the exit code is not 0, and what the other parts found is written."""
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")
    monkeypatch.setattr(bench, 'train', fail)
    monkeypatch.setattr(bench, 'SHAPES', [(16, 64, 2)])
    with pytest.raises(SystemExit, match="step, overhead"):
        bench.main(['--parts=layer,step,overhead', f'--out={tmp_path}/b.json'])
    assert len(json.loads((tmp_path / 'b.json').read_text())['layer']) == 1

def test_options(capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(['--parts=layers', '--steps=1'])
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert "'layers' is not one of layer, step, overhead, ddp" in error and "steps=1" in error
