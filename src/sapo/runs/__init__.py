"""The folder of a run: layout, checkpoints, files and reader."""
