"""The data: splits, built-in data, metrics, tasks and digests."""
