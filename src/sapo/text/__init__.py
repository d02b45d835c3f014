"""What people read: escaped characters, numbers, tables."""
