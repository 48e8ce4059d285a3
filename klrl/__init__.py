"""KL-regularised reinforcement learning of language models.

    J = E[r] - beta * KL(pi || pi_ref)

* `klrl.ops`: the mathematics, as pure functions of arrays.
* `klrl.algorithm`: what a rollout teaches: advantages, losses, KL penalties and the learner.
* `klrl.exact`: ground truth by enumeration, against which the others are tested.
* `klrl.models`: decoders, value and reward models, adapters, and model directories.
* `klrl.tasks`: prompts, rewards and verifiers.
* `klrl.rlhf`, `klrl.supervised`: whole runs.
* `klrl.run`: the folder of a run, its loop and checkpoints.
* `klrl.devices`: mesh axes and processes.
* `klrl.report`: HTML pages.
* `klrl.cost`: what a program would cost on devices that are not there.

Axis letters in all docstrings: B rows (completions), P prompt tokens, T completion tokens, S tokens
of a whole text, V vocabulary, D width, L layers, N examples, G completions of one prompt.

Nothing is imported here, so that `import klrl.ops` needs jax and chex alone.
"""

__version__ = "0.1.0"
