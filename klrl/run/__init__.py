"""The folder of a run: its loop, checkpoints, metrics, summary and lock."""
