"""One module a depth schedule, the way through the blocks of a model; its name is the name of the file."""
