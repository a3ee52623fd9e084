"""What the trainer is made of: learning rate, precision, checkpoints, and the report of a loss that is no number."""
