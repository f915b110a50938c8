"""Comparing: summaries of arms, paired differences and what they say. Pure functions of run records."""
