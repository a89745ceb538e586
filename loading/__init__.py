"""Finds, fetches, checks and reads weights, and puts a pipeline together. Start reading with pipeline.py."""
