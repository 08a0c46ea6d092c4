"""The command lines: each module has `main(arguments)`, which returns the exit code; `program` starts and ends them."""
