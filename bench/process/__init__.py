"""Processes: their start, signals, control groups and standard error."""
