"""What the frozen prefix computes once, shared by epochs, runs and processes."""
