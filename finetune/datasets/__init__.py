"""Data sets: downloading, unpacking, checking, and the demo's digits."""
