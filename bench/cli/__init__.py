"""The command line: valid arguments and preset files, the help, and error messages in one line."""
