"""The harness: a config in, a record out, records into a report."""
