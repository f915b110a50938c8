"""Score: the Fisher information of every trainable tensor, exact for each example."""
