"""The command line: what arguments and preset files may say, and errors in one line."""
