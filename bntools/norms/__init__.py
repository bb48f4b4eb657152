"""Norm layers of our own."""
