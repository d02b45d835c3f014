"""The method: segments, pairs, replay buffer, layouts, objectives."""
