"""Würstchen v1: its Stage B, which generates tokens, its pipeline and its training."""
