"""What is known of a run: its record, and the key of all that it depends on."""
