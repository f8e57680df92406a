"""From a sweep of cells to their records."""
