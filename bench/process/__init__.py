"""Processes: start of child processes, signals, control groups and standard error."""
