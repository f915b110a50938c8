"""Select: from scores and a budget to a mask of exactly k entries."""
