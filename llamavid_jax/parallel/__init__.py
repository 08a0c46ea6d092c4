"""The device mesh: which array lies where, and what each chip can do."""
