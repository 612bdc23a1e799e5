"""
results/ladder.py: runs what it says, keeps what the table and the README need, and does not run again what is there.

    python -m pytest tests/test_ladder.py      (ten seconds; its other options are in test_configurator.py)
"""
import json
import math
import os
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'results'))
import ladder # noqa: E402

FIELDS = ('row size seed tokens val_loss val_loss_zeroed val_loss_mean live_share l0 fvu tok_s params params_non_embedding '
          'flops_per_token torch gpu commit config curve').split()

def test_tiny_ladder(tiny_data, tmp_path, capsys):
    """A dense run and its post-hoc twin, which waits for the dense one's checkpoint: JSONs, table, differences by hand."""
    results = tmp_path / 'results'
    argv = ['--size=tiny', '--rows=posthoc,dense', '--seeds=3', '--steps=4', f'--dataset={tiny_data}', f'--results={results}',
            f'--out={tmp_path / "out"}', '--gpus=0']
    ladder.main(argv)
    text = capsys.readouterr().out
    dense, posthoc = (json.loads((results / f'tiny-4-{row}-s3.json').read_text()) for row in ('dense', 'posthoc'))
    for r in (dense, posthoc):
        assert set(FIELDS) <= set(r) and r['config']['seed'] == r['seed'] == 3 and r['tokens'] == 4 * 128
        assert r['curve'][-1] == [r['tokens'], r['val_loss']] and len(r['curve']) == 5
    assert dense['val_loss_zeroed'] is None and posthoc['val_loss_zeroed'] > 0 and posthoc['l0'] == posthoc['config']['sae_k']
    assert posthoc['params_non_embedding'] - dense['params_non_embedding'] == 2 * 512 * 32 + 512 + 32
    cells = [line.split(' | ') for line in text.splitlines() if line.startswith('| posthoc')][0]
    assert cells[2] == f"{posthoc['val_loss']:.3f}" and cells[3] == f"{posthoc['val_loss'] - dense['val_loss']:+.3f}"
    begun = os.stat(results / 'tiny-4-dense-s3.json').st_mtime_ns
    ladder.main(argv)
    again = capsys.readouterr().out
    assert 'done in' not in again and os.stat(results / 'tiny-4-dense-s3.json').st_mtime_ns == begun
    assert again.strip() in text

@pytest.mark.parametrize('size', list(ladder.SIZES))
def test_every_row_is_a_config(size):
    """Every row of every size is a model that can be built, and differs from the others."""
    from model import GPTConfig
    seen = set()
    for name, (overrides, _) in ladder.rows(size).items():
        command = ladder.command(size, overrides, 1, 100, 'wiki', 'out')
        assert (key := tuple(command[2:])) not in seen or name.partition(' v1')[0] in DOUBLES, name
        seen.add(key)
        c = GPTConfig(**{k: v for k, v in (ladder.SIZES[size] | overrides).items() if k in GPTConfig.__dataclass_fields__})
        assert not c.problems(), (name, c.problems())

DOUBLES = {f'{mode}@{i}' for mode in ('default', 'strict') for i in range(12)} # one of them is the row itself

def test_plot(tmp_path):
    """The plot is drawn from JSONs alone."""
    pytest.importorskip('matplotlib')
    runs = [dict(row=row, size='tiny', tokens=20, val_loss=loss, curve=[[0, 5.0], [10, 4.0], [20, loss]])
            for row, loss in (('dense', 3.0), ('dense', 3.2), ('default', 3.1), ('default K=8', math.pi))]
    ladder.plot(runs, tmp_path / 'plot.png', ['dense', 'naive', 'default'])
    assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'
