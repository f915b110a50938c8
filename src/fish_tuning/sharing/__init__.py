"""Adapters that stand on their own: what lies beside the weights, how it is loaded again, and how it is shared."""
