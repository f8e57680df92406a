"""Text from trained models: `python -m bench.generate`."""
