"""The example workflows, from what they consist of."""
