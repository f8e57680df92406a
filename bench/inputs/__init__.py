"""User input: paths, choices, printable text, and the error for invalid values."""
