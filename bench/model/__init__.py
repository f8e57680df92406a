"""The transformer around the layers under test, and how its activations are stored."""
