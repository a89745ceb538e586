"""Code that the training scripts share: data, processes, checkpoints, logs, reports. The loops are in the scripts."""
