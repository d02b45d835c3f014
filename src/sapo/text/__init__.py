"""What people read: escaped characters, numbers, lines and tables."""
