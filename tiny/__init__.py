"""Code only for the tiny model that ships with this repository: its judge, and the training of its encoders."""
