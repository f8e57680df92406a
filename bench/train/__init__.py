"""Training of a cell: the loop, its checkpoints and its loss curve."""
