"""The report people read: one HTML file that opens offline."""
