"""Gives child processes the tests' network: Python imports this at its start (see conftest.py)."""

from tests.support import network_choice

network_choice.install()
