"""Groups of tokens that are alike: k-means, hashes and sorted blocks, and attention within them."""
