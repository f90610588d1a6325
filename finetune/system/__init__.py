"""How a process behaves: files, signals, progress, errors, large arrays on disk."""
