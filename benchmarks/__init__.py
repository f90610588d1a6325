"""Measurements of this project beside an ordinary pipeline. They assert nothing."""
