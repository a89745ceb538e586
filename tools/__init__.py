"""Command-line tools: benchmark, LoRA and weight files, and scripts that make the assets."""
