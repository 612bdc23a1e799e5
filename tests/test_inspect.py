"""The viewer: what its views print of the numbers that test_features.py checks; screens of all
kinds, tokens that mean harm, the HTML page, the export, errors. Offline, on a CPU."""
import copy
import functools
import html
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.cells import cell_len

import explain
import features
import inspect_features as view
import scanning
from conftest import ROOT
from model import load_checkpoint, load_model
from sae import SITES
from test_features import harmless, index, make_run, out, refused, snapshots # fixtures, too

def look(capsys, out, *argv):
    """What a view prints, and that it suits any screen."""
    capsys.readouterr()
    view.main([f'--out_dir={out}', '--device=cpu', *argv])
    text = capsys.readouterr().out
    assert text.strip() and harmless(text)
    assert max(cell_len(line) for line in text.splitlines() if '--out_dir' not in line) <= 80
    return text

# -------------------------------------------------------------------------------------------- views

@pytest.mark.parametrize('argv', (
    [], ['--rows=0'], ['--feature=L2.F5'], ['--feature=L1.F3,L2.F9', '--effect=4'],
    ['--prompt=ab c [red]'], ['--find=a|漢'], ['--find=\x1b'], ['--find=never there'],
    ['--feature=3', '--examples=0']), ids=' '.join)
def test_views_keep_to_80_plain_columns(out, index, argv, capsys):
    look(capsys, out, *argv)

@pytest.mark.parametrize('site', ('attn', 'hidden'))
def test_sites(site, tmp_path, capsys):
    out = make_run(tmp_path, sae_site=site)
    assert SITES[site].place in look(capsys, out, '--scan_tokens=640')
    assert 'Nearest' in look(capsys, out, '--feature=L2.F3')
    look(capsys, out, f'--html={tmp_path}/page.html', '--feature=3')
    if site == 'hidden':
        assert 'is no TopK auto' in refused(capsys, view, out, f'--export={tmp_path}/e')

def test_feature_view(out, index, capsys):
    text = look(capsys, out, '--layer=1', '--feature=7', '--examples=4', '--effect=9')
    scan = index[1]
    lines = [f'Layer 1 - Feature 7 - Example {n} - Rank {scan.rank[7]} - Token Entropy '
             f'{scan.entropy[7]:.4f}' for n in range(1, 5)]
    assert [line for line in text.splitlines() if 'Example' in line] == lines
    low, high = scan.down_value[7, 0], scan.up_value[7, 0]
    assert f'{low:+.4f}   |   ' in text and f'{high:+.4f}\n' in text and low < high
    run = features.open_run(out, device='cpu')
    effect = explain.removal_effect(run.model, scan, 7, 9, view.DEFAULTS['seed'])
    assert f'{scan.count[7]:,} of them' in text and f"mean {effect['mean']:+.4f} nats" in text
    squeeze = lambda text: re.sub(r'[\s▁▂▃▄▅▆▇█◌«»]', '', text)
    for c in scanning.feature_numbers(scan, 7, view.DEFAULTS['seed'])['top'][:4]:
        whole = features.safe(b''.join(scan.names[t] for t in c['tokens']))
        assert squeeze(whole) in squeeze(text)               # but for line breaks and bars
        assert [f'«{word}»' for word, _, peak in features.pieces(scan, c) if peak][0] in text

def test_tokens_that_share_a_character_are_one_piece():
    scan = SimpleNamespace(names=[b'x', b' \xe6\xbc', b'\xa2\xe5', b'\xad\x97', b'y', b'\xa2',
                                  b'\xe6', b'z', b'\xe6'])
    context = dict(tokens=list(range(9)), acts=[0, 1, 4, 2, 0, 0, 0, 0, 0], peak=2)
    assert features.pieces(scan, context) == [
        ('x', 0, False), (' 漢字', 4.0, True), ('y', 0, False), ('<0xA2>', 0, False),
        ('<0xE6>z', 0, False), ('<0xE6>', 0, False)]
    parts, _, _ = view.for_page(scan, context | dict(where=3, times=1))
    assert parts == ['x', (' 漢字', 4.0, True), 'y', '<0xA2>', '<0xE6>z', '<0xE6>']
    text, bars = view.paragraph(view.screen(), scan, context, 4.0)
    assert text.plain == '  x «漢字»y<0xA2><0xE6>z<0xE6>' and bars == '   ███████'

def test_the_peak_stands_at_the_same_column():
    scan = SimpleNamespace(names=[b'a', b'-' * 50, '漢'.encode(), b' b', b'\n'])
    for tokens, peak in (([1, 2, 3, 1], 2), ([3, 1], 0), ([2] * 30 + [0] * 90, 30), ([4, 0], 1)):
        context = dict(tokens=tokens, acts=[1.0] * len(tokens), peak=peak)
        line = view.one_line(scan, context, 1.0, 40).plain
        assert cell_len(line) <= 40 and not line.startswith('…')
        assert cell_len(line.partition('«')[0]) in (15, 16) # 15: half of 漢

def test_the_most_word_like_are_one_a_token(index, capsys):
    """Of features that fire on one and the same token the overview's table has the first."""
    scan = copy.copy(index[2])
    scan.count, scan.rank = np.full(scan.F, 100), np.arange(1, scan.F + 1)
    scan.entropy, scan.top_tokens = np.linspace(0, 3, scan.F), scan.top_tokens.copy()
    scan.top_tokens[:6, 0] = 7, 7, 8, 7, 9, 8
    options = view.Options(**view.DEFAULTS | dict(rows=16, console=view.screen()))
    view.show(options.console, view.overview(scan, options))
    text = capsys.readouterr().out
    assert f'the busiest 1 % of the features do {view.percent(1 / scan.F)} of all firing' in text
    lines = text.split('Most word-like')[1].splitlines()[2:5]
    assert [line.split()[0] for line in lines] == ['L2.F0', 'L2.F2', 'L2.F4']
    assert text.split('Most abstract')[1].splitlines()[2].split()[0] == f'L2.F{scan.F - 1}'

def test_captions_never_call_a_live_feature_dead(index):
    assert view.captions(index[1], 5) == 'dead'
    scan = SimpleNamespace(names=[b'a', b' b'], count=[1000] * 2, top_tokens=np.array([[1, 0]] * 2),
                           top_counts=np.array([[996, 4], [4, 3]])) # small shares are left out
    assert view.captions(scan, 0) == '·b 100%' and view.captions(scan, 1) == '·b 0%'

def test_numbers_keep_three_or_four_digits():
    shares = {0: '0.00 %', 5e-7: '0.00005 %', 0.000076: '0.00760 %', 0.0123: '1.23 %',
              0.5: '50.0 %', 0.9999: '100 %', 1: '100 %'}
    numbers = {0.00123: '0.001230', 1.5: '1.500', 12: '12.00', 999.9: '999.9', 5e4: '50000',
               -3: '-3.000'}
    assert {x: view.percent(x) for x in shares} == shares
    assert {x: view.number(x) for x in numbers} == numbers
    assert view.spark([0, 0.001, 4, 0, 8]) == ' ▁▄ █' and view.spark([1], 2) == '▄'

TEXT = 'ab c\n' * 12 + '<|endoftext|>[red] 漢字 b' # more than one window

def test_prompt_view(out, index, tmp_path, capsys):
    """The strongest features of each token, as test_features.py has them read."""
    (tmp_path / 'text').write_text(TEXT, 'utf-8')
    text = look(capsys, out, f'--prompt_file={tmp_path}/text', '--layer=2', '--top=2')
    shown = re.findall(r'[▁▂▃▄▅▆▇█] +(\S+)  L2\.F(\d+) ', text)
    run = features.open_run(out, device='cpu')
    tokens = features.encode(run, TEXT)
    assert tokens.count(run.meta['eot']) == 2 and len(tokens) > 32
    _, values, indices = features.read(run.model, tokens)
    want = features.dense(values[1], indices[1], index[2].F).topk(2) # all are above 0 here
    assert [int(f) for _, f in shown] == want.indices.flatten().tolist()
    assert [float(a) for a, _ in shown] == pytest.approx(want.values.flatten().tolist(), rel=1e-3)

def test_probe_view(out, index, tmp_path, capsys, monkeypatch):
    """Texts of a and texts of b are told apart."""
    lines = [f'{c}-texts\t{c * n} {c}\n' for c in 'ab' for n in range(1, 12)]
    (tmp_path / 'labels.tsv').write_text(''.join(reversed(lines)), 'utf-8-sig')
    once = [view.read_labels]                                # the file may be a pipe
    monkeypatch.setattr(view, 'read_labels', lambda path: once.pop()(path))
    text = look(capsys, out, f'--probe={tmp_path}/labels.tsv', '--layer=2')
    assert '22 texts of 2 labels' in text and re.search(r'features +100.0 ', text)
    assert re.search(r'random directions +\d', text) and re.search(r'channels +\d', text)
    assert re.search(r'L2.F\d+ +100.0 % +b-texts', text)

def test_timeline_views(out, index, tmp_path, capsys):
    """A folder with features/ and an index, as kept under results/, needs no checkpoint."""
    last = snapshots(tmp_path, F=48)[-1]
    text, live = look(capsys, tmp_path, '--timeline=true'), last['count'] > 0
    line = [line.split() for line in text.splitlines() if line.strip().startswith('40 ')][0]
    settled = features.settled_at(features.open_timeline(tmp_path)[1])
    assert line[1] == '4,000' and line[4] == str((settled[live] < 5).sum())
    assert f"{np.median(last['entropy'][live]):.2f}" in line
    assert f'{100 * live.mean():.1f}' in line
    said = refused(capsys, view, tmp_path, '--timeline=true', '--feature=F3')
    assert 'no checkpoint in' in said # whose tokens have names
    shutil.copy(out / 'index.npz', tmp_path)
    f = np.flatnonzero((settled < 5) & (index[1].count > 0))[0]
    text = look(capsys, tmp_path, '--timeline=true', f'--feature=F{f}')
    assert f'L1.F{f} over training' in text
    assert f'took its final meaning at step {10 * settled[f]}:' in text
    assert re.findall(r'\* (\d+) ', text) == [str(10 * settled[f])]
    text = look(capsys, tmp_path, f'--feature=F{f}')
    assert 'Timeline' in text and 'Top contexts' in text

def test_torn_and_foreign_snapshots(out, index, tmp_path, capsys):
    snapshots(tmp_path)
    snapshots(tmp_path / 'other', F=11)
    whole = (tmp_path / 'features/0000040.npz').read_bytes()
    other = (tmp_path / 'other/features/0000010.npz').read_bytes()
    bad = tmp_path / 'features/0000025.npz'
    for content in whole[:len(whole) // 2], other, whole[:200] + b'?' * 99 + whole[299:]:
        bad.write_bytes(content)
        assert '0000025.npz is no readable' in refused(capsys, view, tmp_path, '--timeline=true')
    bad.unlink()

# ------------------------------------------------------------------------------------------ screens

def test_colours_on_a_terminal(out, index, monkeypatch, capsys):
    """Shades, no bars, hostile markup unparsed; without colour the same text, with bars."""
    texts = {}
    for name, environment in dict(colour=dict(FORCE_COLOR='1', TERM='xterm-256color'), pipe={},
                                  dumb=dict(FORCE_COLOR='1', TERM='dumb'),
                                  no_colour=dict(FORCE_COLOR='1', NO_COLOR='1')).items():
        with monkeypatch.context() as patch:
            for key in ('FORCE_COLOR', 'NO_COLOR', 'TERM', 'COLUMNS'):
                patch.delenv(key, raising=False)
            for key, value in environment.items():
                patch.setenv(key, value)
            view.main([f'--out_dir={out}', '--layer=1', '--feature=7', '--examples=16'])
        texts[name] = capsys.readouterr().out
    assert texts['pipe'] == texts['dumb'] == texts['no_colour']
    plain = re.sub('\x1b\\[[0-9;]*m', '', texts['colour'])
    assert plain != texts['colour'] and harmless(plain) and '48;5;202' in texts['colour']
    assert max(cell_len(line) for line in plain.splitlines() if '--out_dir' not in line) <= 80
    contexts = lambda text: text.partition('Top contexts')[2].partition('Random')[0]
    assert '█' in contexts(texts['pipe']) and '█' not in contexts(plain) and '«' in plain
    words = lambda text: re.sub('[ ▁▂▃▄▅▆▇█\n]', '', text)
    assert words(plain) == words(texts['pipe'])

def test_commands_can_be_pasted(tmp_path, capsys):
    """Whatever out_dir is called, and however long: they are never wrapped."""
    out = make_run(tmp_path / ('with a space ' + 'x' * 90))
    text = look(capsys, out)
    assert re.search(f"\n  python inspect_features.py --out_dir='{out}' --feature=L1.F\\d+\n", text)
    assert f"--out_dir='{out}' --steer=L1.F3=" in look(capsys, out, '--feature=3')

# ------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('argv, sentence', (
    (['--layer=0'], 'layer=0 has no SAE; block 1, 2 has one'),
    (['--feature=L0.F1'], "'L0.F1' names no feature"), (['--feature=x'], 'write L1.F47'),
    (['--feature=48'], 'features are 0 to 47, SAEs in block 1, 2'),
    (['--prompt=a', '--prompt_file=b'], 'both given'), (['--find=('], 'is no regular expression'),
    (['--timeline=true'], 'there are no snapshots'), (['--top=0'], 'top=0 must be at least 1'),
    (['--device=nonsense', '--scan_tokens=99'], 'is not usable here'),
    (['--html=/no/such/folder/x.html'], 'must be a file in a folder that can be written'),
    (['--plot=/'], 'plot=/ must be a file'), (['--export=/dev/null'], 'export=/dev/null must be a'),
    (['--find=a', '--prompt=b'], 'find and prompt do not go together'),
    (['--html=x', '--timeline=true'], 'html and timeline do not go together'),
    (['--why=true'], "with --prompt write --why=true, without it --why=L6.F2386"),
    (['--why=L2.F1', '--prompt=a'], "with --prompt write --why=true"),
    (['--target=a', '--prompt=b'], 'takes --prompt and --why=true beside it'),
    (['--why=L1.F1'], 'L1.F1: no SAE lies below block 1'),
    (['--why=L2.F5'], 'L2.F5 fires nowhere in the scan'),
    (['--trace=L2.F1'], 'L2.F1: no SAE lies above block 2'),
    (['--sort=size'], "sort='size' must be one of coherence, entropy, density")))
def test_bad_input(out, index, argv, sentence, capsys):
    assert sentence in refused(capsys, view, out, *argv)

@pytest.mark.parametrize('content, sentence', (
    ('', 'has these texts: none; it takes two labels'),
    ('a\tx\n' * 5, "5 of 'a'; it takes two labels"),
    ('a\tx\nb y\n', 'line 2: expected a label, a tab'),
    ('a\tx\n' * 4 + 'b\ty\n', "4 of 'a', 1 of 'b'; it takes"), (None, 'cannot be read')))
def test_bad_probe_files(out, tmp_path, content, sentence, capsys):
    if content is not None:
        (tmp_path / 'p.tsv').write_text(content)
    assert sentence in refused(capsys, view, out, f'--probe={tmp_path}/p.tsv')

# ---------------------------------------------------------------------------------- HTML and export

@pytest.fixture(scope='module')
def page(out, index, tmp_path_factory):
    path = tmp_path_factory.mktemp('html') / 'page.html'
    view.main([f'--out_dir={out}', f'--html={path}', '--sort=density'])
    return path

def data_of(path):
    text = path.read_text('utf-8')
    assert text.count('</script>') == 2 and text.endswith('</html>\n')
    assert not re.search(r'(src|href)=.?http|@import|url\(', text)
    return json.loads(text.partition('id="data">')[2].partition('</script>')[0])

def test_html_has_the_same_numbers(index, page):
    data = data_of(page)
    assert len(data['features']) == sum(int((scan.count > 0).sum()) for scan in index.values())
    assert list(page.parent.iterdir()) == [page]
    for d in data['features']:
        scan = index[d['layer']]
        want = scanning.feature_numbers(scan, d['f'], view.DEFAULTS['seed'])
        for name in ('count', 'density', 'entropy', 'rank', 'mean', 'max', 'hist', 'words'):
            assert d[name] == want[name]
        for kind in ('top', 'random'): # as many as --examples
            pages = json.loads(json.dumps([view.for_page(scan, c) for c in want[kind][:5]]))
            assert d[kind] == pages
            assert all(harmless(part if isinstance(part, str) else part[0])
                       for parts, _, _ in pages for part in parts)
        assert [x[:3] for x in d['intervals']] == [list(x[:3]) for x in want['intervals']]
        for name in ('fires_on', 'up', 'down'):
            assert [t for t, _ in d[name]] == [features.safe(scan.names[t]) for t, _ in want[name]]
    assert data['layers']['1']['l0'] == pytest.approx(index[1].count.sum() / index[1].N)
    assert data['layers']['1']['concepts'] == scanning.by_concept(index[1])[:20]
    assert data['sort'] == 'density' and data['why'] is None

def test_page_of_some_features_and_of_a_prompt(out, index, tmp_path, capsys):
    """The prompt is the template's own word; and why the model goes on as it does."""
    path, run = tmp_path / 'DATA.html', features.open_run(out, device='cpu')
    view.main([f'--out_dir={out}', '--feature=L2.F9,7', '--effect=3', f'--html={path}'])
    some = data_of(path)['features']
    assert [(d['layer'], d['f']) for d in some] == [(2, 9), (1, 7)] and some[0]['effect']['n'] == 3
    view.main([f'--out_dir={out}', '--prompt="DATA"', '--why=true', f'--html={path}'])
    data = data_of(path)
    want = explain.why_token(run.model, features.encode(run, '"DATA"'), [], [1, 2])
    assert [text for text, _ in data['prompt']] == ['<|endoftext|>', *'"DATA"']
    assert data['why']['tokens'] == [features.safe(run.names[token]) for token in want['idx']]
    named = {(int(layer), f) for _, by in data['prompt'] for layer in by for f, _ in by[layer]}
    for kind in ('pro', 'con'):
        assert data['why'][kind] == json.loads(json.dumps(want[kind]))
        named |= {(layer, f) for _, layer, f, _ in want[kind]}
    assert {(d['layer'], d['f']) for d in data['features']} == named

def test_html_in_chromium(page, tmp_path):
    """Fits a phone, searches, walks by keyboard, turns the lights off; errors fail the page."""
    names = ('chromium', 'chromium-browser', 'google-chrome')
    chromium = next(filter(None, map(shutil.which, names)), None)
    if not chromium:
        pytest.skip('chromium is not installed')
    probe = '''<script>{
const failed = [], check = (what, holds) => holds || failed.push(what)
const key = key => dispatchEvent(new KeyboardEvent('keydown', {key}))
const dark = () => document.documentElement.classList.contains('dark')
const search = text => { $('search').value = text; $('search').oninput(); return shown }
addEventListener('error', e => failed.push(e.message))
setTimeout(() => {
  for (const d of data.features.filter((d, i) => i % 3 === 0)) {
    location.hash = name(d)
    go()
    check('contexts of ' + name(d), $('main').textContent.includes('Top contexts'))
    check('width of ' + name(d), document.documentElement.scrollWidth <= 420)
  }
  const some = data.features.filter(d => d.layer === 1).slice(0, 2)
  some.forEach(d => d.coherence = 0.5)
  const told = concepts('1', some.map(d => d.f)).textContent // each, with its first contexts
  check('concepts', some.every(d => told.includes(name(d) + ' 0.50') && d.top.slice(0, 3).every(
    c => c[0].every(part => told.includes(typeof part === 'string' ? part : part[0])))))
  check('markup', !document.querySelector('red, x'))
  const hits = search('[red]'), of = d => [...d.fires_on, ...d.up.slice(0, 5)]
  check('token', hits.length && hits.every(d => of(d).some(x => x[0].includes('[red]'))))
  check('name', search('L1.f7 ').map(name).join() === 'L1.F7' && search('nowhere').length === 0)
  check('F7', search('F7').map(name).includes('L2.F7'))
  check('spaces', search('·'.repeat(8)).some(d => d.fires_on.some(x => x[0] === ' '.repeat(8))))
  check('button', $('theme').getBoundingClientRect().right <= 420)
  check('right to left', $('list').querySelector('code > bdi'))
  check('all', search('').length === data.features.length)
  const before = dark()
  key('t'); check('lights', before !== dark())
  location.hash = name(shown[0])
  key('j'); check('j', location.hash === '#' + name(shown[1]))
  key('ArrowLeft'); check('arrow', location.hash === '#' + name(shown[0]))
}, 50)
setTimeout(() => parent.document.title = 'failed: ' + failed, 1000)
}</script>'''
    text = page.read_text('utf-8').replace('</body>', probe + '</body>')
    frame = f'<iframe width=420 height=900 frameborder=0 srcdoc="{html.escape(text)}"></iframe>'
    (tmp_path / 'page.html').write_text(frame, 'utf-8') # no window is as narrow
    done = subprocess.run(
        [chromium, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
         '--virtual-time-budget=8000', f'--user-data-dir={tmp_path}/profile', '--dump-dom',
         f'file://{tmp_path}/page.html'], capture_output=True, encoding='utf-8', timeout=120)
    assert re.findall('<title>(.*?)</title>', done.stdout)[:1] == ['failed: ']
    assert 'CONSOLE' not in done.stderr

@torch.no_grad()
def test_export(out, tmp_path):
    """The file, read by its specification; codes and reconstruction follow by a TopK SAE's formula;
    and SAELens, where it is installed, finds the same."""
    alike = functools.partial(torch.allclose, atol=1e-6)
    view.main([f'--out_dir={out}', f'--export={tmp_path}/e'])
    for layer, sae in load_model(load_checkpoint(out)).saes().items():
        folder, w = tmp_path / 'e' / f'L{layer}', {}
        raw = (folder / 'sae_weights.safetensors').read_bytes()
        size = int.from_bytes(raw[:8], 'little')
        for name, x in json.loads(raw[8:8 + size]).items():
            data = bytearray(raw[8 + size:][slice(*x['data_offsets'])])
            w[name] = torch.frombuffer(data, dtype=torch.float32).view(x['shape'])
        k = json.loads((folder / 'cfg.json').read_text())['k']
        h = torch.nn.functional.rms_norm(torch.randn(50, 16), (16,))
        values, indices = (h @ w['W_enc'] + w['b_enc']).relu().topk(k)
        codes = features.dense(values, indices, sae.n_features)
        ours = features.dense(*sae.encode(h), sae.n_features)
        assert alike(codes, ours)
        assert alike(codes @ w['W_dec'] + w['b_dec'], sae.decode(ours))
        try:
            from sae_lens import SAE
        except ImportError:
            continue
        theirs = SAE.load_from_disk(str(folder))
        assert type(theirs).__name__ == 'TopKSAE'
        assert alike(theirs.encode(h), ours)
        assert alike(theirs.decode(theirs.encode(h)), sae.decode(ours))

def test_starts_light():
    """A view does not load torch's compiler, which takes longer than most views."""
    code = "import inspect_features, sample, sys; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
