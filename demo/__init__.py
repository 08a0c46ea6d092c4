"""The small model that ships with the package: its demo, and the scripts that make its data and weights."""
