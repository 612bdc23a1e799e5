"""Data sets are folders of token ids: dataset.py loads them, <name>/prepare.py makes them."""
