"""What only the bundled model needs: its judge, and the training of its encoders."""
