"""Talk to a model, or to what a run started from, its opponent and its policy side by side."""
