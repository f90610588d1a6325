"""This project's figures, measured beside an ordinary pipeline: benchmarks, not gates."""
