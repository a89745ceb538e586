"""Weights: files, names and the hub. Nothing in here runs a network."""
