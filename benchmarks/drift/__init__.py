"""Drift of long videos, window by window."""
