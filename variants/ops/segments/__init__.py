"""Memories that one segment or window leaves to the next."""
