"""See what would train before it does."""
