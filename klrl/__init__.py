"""KL-regularised reinforcement learning of language models.

Axis letters in all docstrings: B rows (completions), P prompt tokens, T completion tokens, S tokens
of a whole text, V vocabulary, D width, L layers, N examples, G completions of one prompt.

Nothing is imported here, so that `import klrl.ops` needs jax and chex alone.
"""

__version__ = "0.1.0"
