"""The benchmark, one file per question: `python -m tools.bench --help`."""
