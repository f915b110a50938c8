"""Telling: the files of an experiment, pictures, and the page that joins several."""
