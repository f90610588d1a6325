"""The same sweep.yaml without an account: which runs, on which workers, in which order."""
