"""What a rollout teaches: `Algorithm` and `Hypers`, and the learner that they make."""

from klrl.algorithm.spec import Algorithm as Algorithm
from klrl.algorithm.spec import Hypers as Hypers
