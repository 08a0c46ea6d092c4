"""The small model that ships with the package: what it answers, and how its data and weights are made anew."""
