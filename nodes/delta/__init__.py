"""Load, save, merge, apply and convert deltas."""
