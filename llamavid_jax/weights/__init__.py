"""The inventory: one row for every weight of the model."""
