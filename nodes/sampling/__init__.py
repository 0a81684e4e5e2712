"""Sample pictures for previews and comparisons."""
