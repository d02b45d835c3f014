"""What a person sees in a terminal: checks and summaries printed with rich."""
