"""Masks that are known before the input: rules, counts of pairs, tiles, and attention over the tiles."""
