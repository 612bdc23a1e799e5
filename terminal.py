"""
What the viewer's views are made of, on rich: the screen, tables, bars, a feature's captions and
contexts. Views to stdout, remarks to stderr.
"""
import functools
import math
import os
import re

from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from features import caption, pieces
from scanning import fires_on

def screen():
    """80 columns, or what a narrower terminal has. NO_COLOR takes bold and dim away as well."""
    return Console(width=min(80, Console().width), markup=False, emoji=False, highlight=False,
                   color_system=None if os.environ.get('NO_COLOR') else 'auto')

def show(console, parts):
    """Prints what a view yields, without the spaces with which rich fills its tables."""
    with console.capture() as capture:
        console.print(Group(*parts), crop=False) # a group keeps what a Text says of wrapping
    print(re.sub(' +$', '', capture.get(), flags=re.M), end='')

BARS = ' ▁▂▃▄▅▆▇█'
SHADES = [f'black on color({shade})' for shade in (230, 223, 222, 216, 215, 209, 208, 202)]

bold = functools.partial(Text, style='bold')
dim = functools.partial(Text, style='dim')

def heading(text, note=''):
    return Text.assemble('\n', bold(text), '  ', dim(note))

def line(*parts, overflow='ellipsis'):
    """Never wrapped: cut, or with overflow='ignore', to be copied, as long as it is."""
    return Text.assemble(*parts, no_wrap=True, overflow=overflow)

def spark(numbers, top=None):
    """Numbers of 0 or more as a row of bars, up to top or the largest; above 0 is always seen."""
    top = top or max(numbers, default=0) or 1
    return ''.join(BARS[min(8, max(1, round(8 * x / top)))] if x > 0 else ' ' for x in numbers)

def percent(x):
    return (f'{100 * x:.5f}' if 0 < x < 1e-6 else f'{100 * x:#.3g}'.rstrip('.')) + ' %'

def number(x):
    """Four digits, so that columns of them align."""
    return f'{x:.0f}' if abs(x) >= 1000 else f'{x:#.4g}'

def sparklines(t):
    """A feature over training; t from feature_timeline."""
    steps, settled = t['steps'], t['settled']
    yield heading('Timeline', f'{len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}')
    for label, values in t['curves'].items():
        what, _, unit = label.partition(', ')
        yield f'  {what:14} |{spark(values)}| 0 to {max(values):.4g} {unit}'
    if settled < len(steps):
        yield ' ' * (18 + settled) + '^'
        yield f'  took its final meaning at step {steps[settled]:,}: about the same tokens since'
    else:
        yield '  not settled: silent in the last snapshot, or other tokens just before it'

def name(scan, f):
    return f'L{scan.layer}.F{f}'

def captions(scan, f):
    """The tokens on which a feature fires most, with their shares of its firings."""
    tokens = fires_on(scan, f)
    words = [f'{caption(scan.names[token])} {100 * share:.0f}%' for token, share in tokens
             if share >= 0.005 or token == tokens[0][0]]
    return '  '.join(words) or 'dead'

def table_of(columns, rows):
    """Numbers are right-aligned, names are not; the last column is cut where the line ends."""
    table = Table(box=None, padding=(0, 0, 0, 2), header_style='dim', expand=True,
                  show_header=any(columns))
    for column in columns[:-1]:
        side = 'left' if column in ('feature', 'token', 'label', 'code') else 'right'
        table.add_column(column, justify=side, no_wrap=True)
    table.add_column(columns[-1], no_wrap=True, overflow='ellipsis', ratio=1)
    for row in rows:
        table.add_row(*row)
    return table

def feature_table(title, note, columns, rows, said=captions):
    """rows: (scan, feature, *cells). Nothing for no rows."""
    rows = [(bold(name(scan, f)), *cells, said(scan, f)) for scan, f, *cells in rows]
    table = table_of(('feature', *columns, 'fires on'), rows)
    return [heading(title, note), table] if rows else []

def listing(title, note, scan, features, said=captions):
    """The same of live features of one SAE, with their numbers."""
    rows = [(scan, f, f'{scan.coherence[f]:.2f}'.replace('nan', '-'), f'{scan.entropy[f]:.4f}',
             percent(scan.count[f] / scan.N)) for f in features]
    return feature_table(title, note, ('coherence', 'entropy', 'density'), rows, said)

def level(act, largest):
    """The eighth of the largest activation, from 1 on."""
    return min(8, math.ceil(8 * act / largest))

def shaded(scan, context, largest):
    """A context as Text, shaded by activation, its peak in «»; and where the « is."""
    text, begin = Text(), 0
    for word, act, peak in pieces(scan, context):
        if peak:
            core = word.lstrip(' ') or word
            word = f'{word.removesuffix(core)}«{core}»'
            begin = len(text) + word.index('«')
        text.append(word, SHADES[level(act, largest) - 1] if act else None)
    return text, begin

def paragraph(console, scan, context, largest):
    """A context wrapped at its own line breaks and at spaces; without colour with bars below."""
    text, _ = shaded(scan, context, largest)
    for part in text.divide([match.end() for match in re.finditer('⏎+»?', text.plain)]):
        for row in part.wrap(console, console.width - 2):
            bars = [' '] * len(row.plain)
            for begin, end, shade in row.spans:
                bars[begin:end] = BARS[SHADES.index(shade) + 1] * (end - begin)
            bars = ''.join(bar * cell_len(char) for bar, char in zip(bars, row.plain)).rstrip()
            yield Text.assemble('  ', row)
            if bars and console.color_system is None:
                yield '  ' + bars

def one_line(scan, context, largest, width):
    """A context cut to one line, the peak at the same column in all: to be read downwards."""
    text, begin = shaded(scan, context, largest)
    width = max(width, 10)                   # a narrower one has no room for a context
    column = width * 2 // 5
    while cell_len(text.plain[:begin]) > column:
        text, begin = text[1:], begin - 1
    text.pad_left(column - cell_len(text.plain[:begin]))
    text.truncate(width, overflow='ellipsis')
    return text
