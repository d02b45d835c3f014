"""Generation by the opponent: the `Generator` protocol with one method, and its implementations."""
