"""What people read and press: escaped characters, numbers, lines and tables, Ctrl-C."""
