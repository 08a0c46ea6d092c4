"""Answers the questions of an evaluation set and scores the answers: one command per row of the paper's tables."""
