"""Which pictures, which split, which order, as batches."""
