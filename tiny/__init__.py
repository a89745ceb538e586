"""Code for the bundled tiny model only: its judge, and the training of its encoders."""
