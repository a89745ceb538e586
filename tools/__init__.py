"""Command-line tools: benchmark, LoRA and weight files, makers of assets."""
