"""Synthetic anatomy, for the demo and the tests."""
