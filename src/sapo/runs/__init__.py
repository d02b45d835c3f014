"""The folder of a run: layout, checkpoints, files, reading it back."""
