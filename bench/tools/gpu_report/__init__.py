"""The first command on a machine with a GPU: what works there, how fast, and what to commit of it."""
