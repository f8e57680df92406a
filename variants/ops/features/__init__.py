"""Attention by feature maps of queries and keys: random and positive features, and their sums."""
