"""One module an attention variant: `variant=name` is the name of the file."""
