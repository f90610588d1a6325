"""Using a finished run's best model."""
