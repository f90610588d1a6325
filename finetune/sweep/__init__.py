"""Sweeps on this machine, without an account: which runs, in which order, on which workers."""
