"""Pictures, each drawn once by matplotlib: as PNG for a results folder, as SVG inside the page."""
