"""Text written by the opponent: a seam with one method, `Generator`, and what stands behind it."""
