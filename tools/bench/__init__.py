"""The benchmark, with one file for each kind of measurement: see `python -m tools.bench --help`."""
