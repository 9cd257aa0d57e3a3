"""What many tests use: command lines, processes, folders of data."""
