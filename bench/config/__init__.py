"""Configuration of a cell: declared knobs, groups, parsing and validation."""
