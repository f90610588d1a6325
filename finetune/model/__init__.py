"""The network as ordered parts, and its weights."""
