"""The method itself, in one line of any training script."""
