"""Linear recurrences with decays and delta rules, computed in chunks, and their states."""
