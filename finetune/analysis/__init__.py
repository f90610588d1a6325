"""What can be said of many runs, and how it is shown."""
