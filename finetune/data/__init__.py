"""Pictures on disk, their splits, their order in an epoch, and batches."""
