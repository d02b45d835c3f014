"""What a run did, for a person to look at: recorded while it runs, and written as one page that needs nothing else."""
