"""Folders of pictures and captions, as people and other trainers lay them out."""
