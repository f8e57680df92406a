"""Additional commands: a benchmark of single layers, and pictures of attention masks."""
