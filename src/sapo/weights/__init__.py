"""Models: loading, policy, opponent, reference, sharding, memory."""
