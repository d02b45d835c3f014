"""What leaves this machine when a run is pushed: a model card, a picture of the curves, and the models."""
