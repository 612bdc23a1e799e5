"""results/ladder.py, but for its options' errors, which are in test_configurator.py."""
import json
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT
from model import GPTConfig

sys.path.insert(0, str(ROOT / 'results'))
import ladder # noqa: E402

ladder.SIZES['tiny'] = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2,
                            sae_layers=(0,), sae_k=8, gradient_accumulation_steps=4,
                            eval_tokens=1024, log_interval=2, compile=False, device='cpu')

def test_tiny_ladder(tiny_data, tmp_path, capsys, monkeypatch):
    """A dense run and its post-hoc twin, which needs its checkpoint: JSONs, with what features
    tell of labels, and table. What is there is not made again."""
    results, out, labels = tmp_path / 'results', tmp_path / 'out', tmp_path / 'labels'
    labels.mkdir()
    for name in 'ab':
        (labels / f'{name}.tsv').write_text('x\tone two\n' * 9 + 'y\tthree, four\n' * 9)
    argv = ['--size=tiny', '--rows=posthoc,dense', '--seeds=3', '--steps=4', f'--labels={labels}',
            f'--dataset={tiny_data}', f'--results={results}', f'--out={out}']
    ladder.main(argv)
    text = capsys.readouterr().out
    dense, posthoc = (json.loads((results / f'tiny-4-{row}-s3.json').read_text())
                      for row in ('dense', 'posthoc'))
    for r, key in ((dense, 'probe_random'), (dense, 'probe_channels'), (posthoc, 'probe')):
        assert ladder.NEEDED <= set(r) and r['config']['seed'] == r['seed'] == 3
        assert r['curve'][-1] == [4 * 256, r['val_loss']] and len(r['curve']) == 5
        assert r[key].keys() == {'a', 'b'} and r[f'{key}_mean']['k20'] == 1
    assert {'coherence', 'coherent', 'causal_share', 'duplicates'} <= posthoc.keys()
    assert posthoc['val_loss_zeroed'] > 0 and posthoc['l0'] == pytest.approx(8)
    more = posthoc['params_non_embedding'] - dense['params_non_embedding']
    assert more == 2 * 512 * 32 + 512 + 32 and dense['val_loss_zeroed'] is None
    table = [line.split()[:4] for line in text.splitlines()]
    loss, k = posthoc['val_loss'], dense['probe_random_mean']
    assert ['posthoc', '1', f"{loss - dense['val_loss']:+.3f}", f'{loss:.3f}'] in table
    assert ['random', '1', f"{k['k1']:.3f}", f"{k['k5']:.3f}"] in table

    ladder.main(argv)
    assert 'done' not in capsys.readouterr().out

    # its checkpoint is there: it is resumed; one that fails is named, and leaves no JSON
    (results / 'tiny-4-dense-s3.json').unlink()
    def fails(command, stdout, **other):
        stdout.write(' '.join(map(str, command)))
        return SimpleNamespace(wait=lambda: 1)
    monkeypatch.setattr(ladder.subprocess, 'Popen', fails)
    with pytest.raises(SystemExit, match='tiny-4-dense-s3.txt'):
        ladder.main(argv)
    assert '--init_from=resume' in (out / 'tiny-4-dense-s3.txt').read_text()
    assert not (results / 'tiny-4-dense-s3.json').exists()

def test_log_of_a_resumed_run(tmp_path):
    """The last line of a step counts; torn lines are skipped."""
    start = dict(event='start', config=dict(seed=7), params=3, params_non_embedding=2,
                 flops_per_token=1, versions=dict(torch='2', gpu=None, commit='abc'))
    evals = [dict(event='eval', step=step, tokens=10 * step, val_loss=loss)
             for step, loss in ((0, 9.0), (1, 8.0), (2, 7.0), (1, 6.0), (2, 5.0))]
    log = [dict(event='log', step=step, loss=5.5, tok_s=100 * step) for step in (1, 2)]
    lines = [json.dumps(r) for r in [start, *evals[:3], start, *log, *evals[3:]]]
    lines.insert(4, '{"event": "ev')
    (tmp_path / 'log.jsonl').write_text('\n'.join(lines) + '\n')
    r = ladder.summary(tmp_path / 'log.jsonl')
    assert r['curve'] == [[0, 9.0], [10, 6.0], [20, 5.0]]
    assert r['val_loss'] == 5.0 and r['tok_s'] == 150

@pytest.mark.parametrize('size', ladder.SIZES)
def test_every_row_is_a_config(size):
    for name, changes in ladder.rows(size).items():
        options = ladder.SIZES[size] | changes
        config = {k: v for k, v in options.items() if k in GPTConfig.__dataclass_fields__}
        assert not GPTConfig(**config).problems(), name

def test_table_and_plot(capsys, tmp_path):
    """Differences are paired by seed; rows that are not known any more come last."""
    runs = [dict(row=row, size='tiny', seed=seed, tokens=20, val_loss=loss,
                 config=dict(max_iters=4), curve=[[0, 5.0], [10, 4.0], [20, loss]])
            for row, seed, loss in (('dense', 1, 3.0), ('dense', 2, 3.2), ('naive', 2, 3.8),
                                    ('default', 1, 3.5), ('default', 2, 3.6), ('old', 1, 3.1))]
    results = ladder.compare(runs)
    ladder.print_table(results)
    *_, default, old = capsys.readouterr().out.splitlines()
    # naive's 3.8 lies half-way between 4.0 after 10 tokens and 3.6 after 20
    assert default.split() == ['default', '2', '+0.450', '0.071', '3.550', '75']
    assert old.split() == ['old', '1', '+0.100', '3.100']
    pytest.importorskip('matplotlib')
    c = dict(size='tiny', steps=4, plot=tmp_path / 'plot.png')
    ladder.plot([r | dict(k1=0.7) for r in results], c)
    assert c['plot'].read_bytes()[:4] == b'\x89PNG'
