"""Train: masks in transformers' Trainer and its loggers."""
