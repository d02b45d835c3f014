"""The trainer and what only a running training needs."""
