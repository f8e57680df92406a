"""Mathematics that several variants use."""
