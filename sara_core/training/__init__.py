"""The training loop, and a run on disk."""
