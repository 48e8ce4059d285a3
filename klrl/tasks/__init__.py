"""Prompts, texts as tokens, rewards, verifiers, and the tasks that need no files."""
