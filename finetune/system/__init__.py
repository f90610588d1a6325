"""What every process needs: files, signals, progress, errors, large arrays on disk."""
