"""The command line: one thin file per command, each reading files, calling one function and writing one file."""
