"""Where pictures come from, and whether they are sound."""
