"""The HTML page, runs.csv and the terminal summary."""
