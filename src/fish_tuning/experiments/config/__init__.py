"""What an experiment file says: sections, names of arms, loading and errors.

Imports neither torch nor the other rooms.
"""
