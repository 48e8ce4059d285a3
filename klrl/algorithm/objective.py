"""The KL penalty as a typed choice, and what each choice does in expectation.

    J = E[r] - beta * KL(pi || pi_ref)

`KLPenalty(placement, estimator, correction, credit)` says how the second term is estimated.

    placement   reward: stopped, subtracted from the reward, credited through the policy loss;
                loss: a term of its own, differentiated; both: a loss term for a token's own KL and
                a reward for the KL that its choice brings about later; none
    estimator   k1, k2, k3 of the tokens taken, or the exact KL of the next-token distributions;
                centred: k1 less its mean at that prefix, which is the exact KL
    correction  of a loss term, for tokens that an older policy drew: none, the token's importance
                ratio, or the ratio of the whole prefix
    credit      sequence: a token answers for all later KL too, so that the target is the KL of
                whole completions; token: it answers for its own KL only, at given prefixes
    divergence  reverse: that KL. For any other, `exact` is that divergence of the next-token
                distributions, and k1 in the reward is f'(pi / pi_ref): the gradient of
                D_f(pi || pi_ref) is E_pi[f' grad log pi] (OPD+, 2026, arXiv 2606.01039)
    weight      of each token's term: none is 1; certainty of the reference, or position

`kl_terms` computes it. `audit` states its expected gradient; tests confirm each claim by
enumeration on random trees. docs/kl.md explains it in plain words.
"""

from typing import NamedTuple

from klrl.errors import UserError


class KLPenalty(NamedTuple):
  """One choice; the fields are the flags --kl_placement, --kl_estimator, and so on."""

  placement: str = "reward"
  estimator: str = "k1"
  correction: str = "none"
  credit: str = "sequence"
  divergence: str = "reverse"
  weight: str = "none"

  def __str__(self):
    if self.placement == "none":
      return "none"
    fields = self[:5] if self.weight == "none" else self
    return "/".join(fields[:4] if fields[4:] == ("reverse",) else fields)

  @property
  def in_loss(self) -> bool:
    return self.placement in ("loss", "both")

  @property
  def in_reward(self) -> bool:
    return self.placement in ("reward", "both")

  @property
  def reads_exact_kl(self) -> bool:
    return self.placement != "none" and self.estimator in ("exact", "centred")


NO_PENALTY = KLPenalty(placement="none")
PLACEMENTS = ("reward", "loss", "both", "none")
ESTIMATORS = ("k1", "k2", "k3", "exact", "centred")
CORRECTIONS = ("none", "token", "prefix")
CREDITS = ("sequence", "token")
# Names as in `kl_terms.DIVERGENCES`, and what reports call them.
_LABELS = {
  "reverse": "KL(pi||ref)",
  "forward": "KL(ref||pi)",
  "jensen_shannon": "Jensen-Shannon(pi, ref)",
  "chi_squared": "chi-squared(pi||ref)",
  "alpha": "alpha-divergence(pi||ref)",
  "hellinger": "Hellinger(pi, ref)",
}
DIVERGENCES = tuple(_LABELS)
# The weight of a token's term is a function of what came before the token, see
# `kl_terms.token_weights`.
WEIGHTS = ("none", "certainty", "position")
REFRESHES = ("iteration", "minibatch")


# Expected gradients by name. "token" is the sum of the KLs of the next-token distributions at given
# prefixes, which are drawn from pi unless the name says otherwise.
SEQUENCE = "KL(pi||ref)"
TOKEN = "token KL(pi||ref)"
TOKEN_AT_OLD = "token KL(pi||ref) at the old policy's prefixes"
TOKEN_FORWARD = "token KL(ref||pi)"
ZERO = "zero"
FUTURE = "KL(pi||ref) - token KL(pi||ref)"
SEQUENCE_LESS_FORWARD = "KL(pi||ref) - token KL(ref||pi)"
TOKEN_LESS_FORWARD = "token KL(pi||ref) - token KL(ref||pi)"
STALE_TOKEN = "token KL(pi||ref) - token KL(pi||old) at the old policy's prefixes"
NO_DIVERGENCE = "no divergence"
KL_GRADIENTS = (SEQUENCE, TOKEN, TOKEN_AT_OLD)


def token_gradient(divergence: str) -> str:
  """Returns the name of the token KL's gradient, with another divergence in its place."""
  return f"token {_LABELS[divergence]}"


def token_at_old_gradient(divergence: str) -> str:
  """Returns the name of the same at the prefixes of the old policy."""
  return f"token {_LABELS[divergence]} at the old policy's prefixes"


def summed_gradient(divergence: str) -> str:
  """Returns the name of the gradient of E[sum of the divergences at the prefixes], all credited.

  For the reverse KL this is KL(pi || pi_ref), by its chain rule; no other divergence has one.
  """
  return SEQUENCE if divergence == "reverse" else f"sum of token {_LABELS[divergence]}"


def whole_gradient(divergence: str) -> str:
  """Returns the name of the gradient of the divergence between whole completions."""
  return _LABELS[divergence]


def later_gradient(divergence: str) -> str:
  """Returns the name of what the summed gradient has beyond the token gradient."""
  return f"{summed_gradient(divergence)} - {token_gradient(divergence)}"


# By one of these names a divergence other than the reverse KL has its gradient.
GRADIENTS_OF_OTHERS = (
  whole_gradient,
  summed_gradient,
  token_gradient,
  token_at_old_gradient,
  later_gradient,
  lambda _: ZERO,
)


class Audit(NamedTuple):
  """What a penalty does in expectation.

  `gradient` is the expected gradient of `kl_terms.surrogate` on-policy, and `off_policy_gradient`
  that on completions of an older policy, which is so after the first step on a rollout. Both are
  names of this module.
  """

  verdict: str  # exact | other | refused, by `gradient`
  gradient: str
  off_policy_gradient: str
  unbiased_value: bool  # of the KL, or of the sum of the divergence over the prefixes
  off_policy_unbiased_value: bool
  fixed_point: str  # the policy that maximises reward with this gradient, at horizon 1
  instead: KLPenalty | None  # for a refused one


_P = KLPenalty
# Each choice has a row of its own, so that nothing is claimed of a new estimator: the gradients
# on-policy and off-policy at --kl_refresh=iteration, then whether the value is unbiased on-policy
# and off-policy. A choice without a row has no meaning of its own.
_ROWS = {
  _P("reward", "k1", "none", "sequence"): (SEQUENCE, NO_DIVERGENCE, True, False),
  _P("reward", "k1", "none", "token"): (TOKEN, STALE_TOKEN, True, False),
  _P("reward", "centred", "none", "token"): (TOKEN, STALE_TOKEN, False, False),
  _P("reward", "k2", "none", "sequence"): (NO_DIVERGENCE, NO_DIVERGENCE, False, False),
  _P("reward", "k2", "none", "token"): (NO_DIVERGENCE, NO_DIVERGENCE, False, False),
  _P("reward", "k3", "none", "sequence"): (SEQUENCE_LESS_FORWARD, NO_DIVERGENCE, True, False),
  _P("reward", "k3", "none", "token"): (TOKEN_LESS_FORWARD, NO_DIVERGENCE, True, False),
  _P("reward", "exact", "none", "sequence"): (FUTURE, NO_DIVERGENCE, True, False),
  _P("reward", "exact", "none", "token"): (ZERO, ZERO, True, False),
  _P("loss", "k1", "none", "token"): (ZERO, NO_DIVERGENCE, True, False),
  _P("loss", "k2", "none", "token"): (TOKEN, NO_DIVERGENCE, False, False),
  _P("loss", "k3", "none", "token"): (TOKEN_FORWARD, NO_DIVERGENCE, True, False),
  _P("loss", "exact", "none", "token"): (TOKEN, TOKEN_AT_OLD, True, False),
  _P("loss", "k1", "token", "token"): (TOKEN, TOKEN_AT_OLD, True, False),
  _P("loss", "k2", "token", "token"): (TOKEN, TOKEN_AT_OLD, False, False),
  _P("loss", "k3", "token", "token"): (TOKEN, TOKEN_AT_OLD, True, False),
  _P("loss", "k1", "prefix", "token"): (TOKEN, TOKEN, True, True),
  _P("loss", "k2", "prefix", "token"): (TOKEN, TOKEN, False, False),
  _P("loss", "k3", "prefix", "token"): (TOKEN, TOKEN, True, True),
  _P("loss", "exact", "prefix", "token"): (TOKEN, TOKEN, True, True),
  _P("loss", "k1", "prefix", "sequence"): (SEQUENCE, SEQUENCE, True, True),
  _P("loss", "k3", "prefix", "sequence"): (SEQUENCE, SEQUENCE, True, True),
  _P("loss", "exact", "prefix", "sequence"): (SEQUENCE, SEQUENCE, True, True),
  _P("both", "k2", "none", "sequence"): (SEQUENCE, NO_DIVERGENCE, True, False),
  _P("both", "k3", "none", "sequence"): (SEQUENCE, NO_DIVERGENCE, True, False),
  _P("both", "exact", "none", "sequence"): (SEQUENCE, NO_DIVERGENCE, True, False),
}
DEFINED = tuple(_ROWS)


def _rows_of(divergence: str) -> dict:
  """Returns the rows of a divergence that is not the reverse KL; k2 and k3 estimate that alone."""
  choices = {
    ("reward", "k1", "none", "sequence"): (whole_gradient, None, False, False),
    ("reward", "k1", "none", "token"): (token_gradient, None, False, False),
    ("reward", "exact", "none", "sequence"): (later_gradient, None, True, False),
    ("reward", "exact", "none", "token"): (lambda _: ZERO, lambda _: ZERO, True, False),
    ("loss", "exact", "none", "token"): (token_gradient, token_at_old_gradient, True, False),
    ("loss", "exact", "prefix", "token"): (token_gradient, token_gradient, True, True),
    ("loss", "exact", "prefix", "sequence"): (summed_gradient, summed_gradient, True, True),
    ("both", "exact", "none", "sequence"): (summed_gradient, None, True, False),
  }
  return {
    _P(*choice, divergence): (
      gradient(divergence),
      NO_DIVERGENCE if off_policy is None else off_policy(divergence),
      *unbiased,
    )
    for choice, (gradient, off_policy, *unbiased) in choices.items()
  }


_ROWS_OF_OTHERS = {
  penalty: row
  for divergence in DIVERGENCES
  if divergence != "reverse"
  for penalty, row in _rows_of(divergence).items()
}
DEFINED_OF_OTHERS = tuple(_ROWS_OF_OTHERS)  # the penalties of every other divergence

_FIXED_POINTS = {
  SEQUENCE: "ref * exp(r / beta) / Z",
  TOKEN: "ref * exp(r / beta) / Z; beyond horizon 1 a policy of lower E[r] - beta * KL",
  TOKEN_FORWARD: "beta * ref / (lambda - r)",
  ZERO: "all mass on the best completion",
  FUTURE: "all mass on the best completion; beyond horizon 1 on one that depends on beta",
}
_FIXED_POINT_OF_OTHERS = "ref * (f')^-1((r - lambda) / beta)"  # see `bandits.optimal_under`


def weighted_gradient(gradient: str, weight: str) -> str:
  """Returns the name of a gradient whose terms, token by token, have a weight."""
  return gradient if gradient in (ZERO, NO_DIVERGENCE) else f"{gradient}, weighted by {weight}"


def audit(penalty: KLPenalty, *, kl_refresh: str = "iteration") -> Audit:
  """Returns what the penalty does in expectation: its value, its gradient and its fixed point.

  Raises:
    UserError: the choice has no meaning of its own; the message names those that have one.
  """
  divergence = penalty.divergence
  if penalty.weight != "none" and not _is_whole(penalty):
    return _weighted(audit(penalty._replace(weight="none"), kl_refresh=kl_refresh), penalty.weight)
  rows = _ROWS if divergence == "reverse" else _ROWS_OF_OTHERS
  if penalty not in rows:
    raise UserError(_undefined(penalty))
  gradient, off_policy_gradient, unbiased, off_policy_unbiased = rows[penalty]
  if kl_refresh == "minibatch" and gradient == token_gradient(divergence) and penalty.in_reward:
    off_policy_gradient = token_at_old_gradient(divergence)
  asked = (f(divergence) for f in (whole_gradient, summed_gradient, token_gradient))
  verdict, instead = "refused", None
  if gradient in asked:
    verdict = "exact"
  elif gradient == TOKEN_FORWARD:
    verdict = "other"
  elif penalty.placement == "loss":
    instead = _P("loss", "k3", "token", "token")
  elif penalty.credit == "sequence":
    both = penalty.estimator if penalty.estimator != "k1" else "k2"
    instead = _P("both", both, "none", "sequence")
  else:
    instead = _P("loss", penalty.estimator, "prefix", "token")
  if instead:
    instead = instead._replace(divergence=divergence)
  if divergence != "reverse" and verdict == "exact":
    fixed_point = _FIXED_POINT_OF_OTHERS
    if gradient != whole_gradient(divergence):
      fixed_point += "; beyond horizon 1 another policy"
  elif gradient == later_gradient(divergence):
    fixed_point = _FIXED_POINTS[FUTURE]
  else:
    fixed_point = _FIXED_POINTS.get(gradient, "not a tilt of the reference")
  return Audit(
    verdict=verdict,
    gradient=gradient,
    off_policy_gradient=off_policy_gradient,
    unbiased_value=unbiased,
    off_policy_unbiased_value=off_policy_unbiased,
    fixed_point=fixed_point,
    instead=instead,
  )


def _is_whole(penalty: KLPenalty) -> bool:
  """Returns whether the divergence is of whole completions, which is no sum over tokens."""
  return penalty.divergence != "reverse" and penalty[:4] == ("reward", "k1", "none", "sequence")


def _weighted(claim: Audit, weight: str) -> Audit:
  """Returns the audit of a penalty whose terms have a weight.

  The weight of a term depends on what came before its token alone, and so multiplies the divergence
  at that prefix: a sum over prefixes is a weighted sum, whichever way it is estimated.
  """
  return claim._replace(
    gradient=weighted_gradient(claim.gradient, weight),
    off_policy_gradient=weighted_gradient(claim.off_policy_gradient, weight),
    fixed_point=f"{claim.fixed_point}, at horizon 1 with beta times the weight",
    instead=claim.instead and claim.instead._replace(weight=weight),
  )


_PLACES = {
  "reward": "the {kl} is taken off the reward",
  "loss": "the {kl} is a loss of its own",
  "both": "a token's own {kl} is a loss, and that of the tokens behind it is taken off its reward",
}


def description(
  penalty: KLPenalty, *, kl_refresh: str = "iteration", one_step: bool = False
) -> str:
  """Returns what a reader of a run must know of its penalty, in two or three sentences.

  `one_step` says that there is but one gradient step on a rollout.
  """
  if penalty.placement == "none":
    return "No KL penalty."
  claim = audit(penalty, kl_refresh=kl_refresh)
  kl = "KL" if penalty.divergence == "reverse" else "divergence"
  if kl != "KL" and penalty.estimator == "k1":
    kl = "derivative f' of the divergence, at the ratio,"
  place = _PLACES[penalty.placement].format(kl=kl)
  text = (
    f"KL penalty {penalty}: {place}. Its expected gradient is "
    f"{_named(claim.gradient)}, and leads to {claim.fixed_point}."
  )
  if one_step or claim.off_policy_gradient == claim.gradient:
    return text
  return f"{text} In later steps on the same rollout it is {_named(claim.off_policy_gradient)}."


def warnings_of(penalty: KLPenalty, *, allowed: bool, per_token_mean: bool) -> list[str]:
  """Returns what is wrong with the KL penalty of a run and was allowed all the same.

  Args:
    penalty: the choice.
    allowed: whether a refused one is (--allow_biased_kl).
    per_token_mean: whether a completion's loss is divided by its length.

  Raises:
    UserError: the penalty is refused and not allowed; the message says which gradient it has and
      what to use. Or it is allowed with nothing to allow.
  """
  if penalty.placement == "none":
    return []
  warnings = []
  claim = audit(penalty)
  if claim.instead is not None:
    what = (
      f"The KL penalty {penalty} does not descend {_LABELS[penalty.divergence]}: its expected "
      "gradient is "
      f"{_named(claim.gradient)}. Use {claim.instead} instead"
    )
    if not allowed:
      raise UserError(f"{what} ({flags_of(claim.instead)}), or pass --allow_biased_kl.")
    warnings.append(f"{what}.")
  elif allowed:
    raise UserError(f"--allow_biased_kl is set, but the KL penalty {penalty} is not refused.")
  if penalty.in_loss and per_token_mean:
    warnings.append(
      "The aggregation sequence_mean_token_mean divides the KL loss by each completion's length, "
      "so beta is not reward per nat of sequence KL: long completions are held less."
    )
  return warnings


def flags_of(penalty: KLPenalty) -> str:
  """Returns the command-line flags of a penalty."""
  named = {
    name: value
    for name, value in penalty._asdict().items()
    if name not in ("divergence", "weight") or value != KLPenalty._field_defaults[name]
  }
  return " ".join(f"--kl_{name}={value}" for name, value in named.items())


def _named(gradient: str) -> str:
  return "zero" if gradient == ZERO else f"that of {gradient}"


def _undefined(penalty: KLPenalty) -> str:
  if penalty.placement == "none":
    return "Placement none is no KL penalty: there is nothing to say of it."
  if penalty.weight != "none" and not _is_whole(penalty):
    penalty = penalty._replace(weight="none")
  if all(row.estimator != penalty.estimator for row in DEFINED):
    why = "the audit has no row of this estimator"
  elif penalty.weight != "none":
    why = "the divergence of whole completions is no sum over tokens that a weight could multiply"
  elif penalty.divergence != "reverse" and penalty.estimator in ("k2", "k3", "centred"):
    why = f"{penalty.estimator} is an estimate of the reverse KL alone"
  elif penalty.estimator == "centred" and penalty.placement == "reward":
    why = "the mean of k1 at a prefix is a baseline of that token's KL, and of no later one"
  elif penalty.estimator == "centred":
    why = "its mean is 0, so that it is a cost in the reward and no loss"
  elif penalty.placement == "reward":
    why = "a reward is weighted by the policy loss's own ratio, not by a correction of the KL"
  elif penalty.placement == "both" and penalty.estimator == "k1":
    why = "a k1 loss term has no gradient, which leaves k1 in the reward"
  elif penalty.placement == "both":
    why = "its reward part is the credit for later KL, and has no correction"
  elif penalty.divergence != "reverse" and penalty.estimator == "k1":
    why = "k1 stands for f' of the ratio, which is a cost in the reward and no loss"
  elif penalty.estimator == "exact" and penalty.correction == "token":
    why = "the exact KL sums over the token's choice itself, so there is no ratio to correct by"
  elif penalty.estimator == "k2" and penalty.correction == "prefix":
    why = "k2 needs its weight stopped, and a stopped weight gives no credit for later KL"
  else:
    why = "without the ratio of the prefix a loss term gives no credit for later KL"
  # The nearest one that descends the KL: same placement, then credit, then estimator.
  nearest = max(
    (
      row
      for row in (x._replace(weight=penalty.weight) for x in (*DEFINED, *DEFINED_OF_OTHERS))
      if row.divergence == penalty.divergence
      and not (row.weight != "none" and _is_whole(row))
      and audit(row).verdict == "exact"
    ),
    key=lambda row: (
      row.placement == penalty.placement,
      row.credit == penalty.credit,
      row.estimator == penalty.estimator,
      row.correction == penalty.correction,
    ),
  )
  return (
    f"The KL penalty {penalty} has no meaning of its own: {why}. The nearest that has is {nearest} "
    f"({flags_of(nearest)}); docs/kl.md has them all."
  )
