"""Loading: finds, fetches, checks and reads weights, and puts a pipeline together. Start with pipeline.py."""
