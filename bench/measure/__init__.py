"""Cost of a training step: FLOPs, memory, time, predictions, and the gates before them."""
