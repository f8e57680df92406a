"""Locality-sensitive hashing, and attention within its buckets."""
