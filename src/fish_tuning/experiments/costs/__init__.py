"""What arms cost before they run: memory, bytes on the wire, bytes on disk."""
