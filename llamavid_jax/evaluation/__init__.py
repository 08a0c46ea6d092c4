"""A set's questions answered, and the answers scored: one command for one row of the paper's tables."""
