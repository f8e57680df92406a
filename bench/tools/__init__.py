"""Commands beside the benchmark: single layers, and pictures of what a token reads."""
