"""What the training scripts share: data, processes, checkpoints, logs, reports. Their loops are in the scripts."""
