"""Apply: masked tensors that train k numbers, and what was trained as a small file."""
