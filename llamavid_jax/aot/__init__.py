"""Programs compiled ahead of time, for TPUs that are not there: do they compile, do they fit, what do they move."""
