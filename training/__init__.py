"""What the training scripts share: data, processes, checkpoints, logs, reports. No loop stands here."""
