"""What is sent to Weights & Biases, and what is read from it."""
