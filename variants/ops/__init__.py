"""Mathematics that several variants share."""
