"""SaRA Train."""
