"""One module a feed-forward layer; its name is the name of the file."""
