"""Masks that lie in files: where they went and how far they agree."""
