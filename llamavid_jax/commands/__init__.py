"""The commands: arguments, output and exit codes.  The scripts at the top of the repository call them."""
