"""The fields of a run's config, and the strategies and schedules as data."""
