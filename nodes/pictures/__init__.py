"""SaRA Image Folder."""
