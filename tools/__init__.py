"""Command-line tools: the benchmark, tools for LoRA and weight files, and scripts that make the assets."""
