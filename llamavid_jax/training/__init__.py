"""Training: the stages as data, one sharded step, a loop that resumes."""
