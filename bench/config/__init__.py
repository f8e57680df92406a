"""From composed values to a checked cell."""
