"""Execution of sweeps: from cells to their records."""
