"""Files that are whole or not there, and the formats that this package writes."""
