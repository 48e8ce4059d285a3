"""Exact ground truth: every completion of a small language, and closed forms of one choice."""
