"""Code shared by train_a.py, train_b.py and train_c.py, which have the loops: data, processes, checkpoints, logs."""
