"""The attention variants, one in each module: `variant=name` selects the module of this name."""
