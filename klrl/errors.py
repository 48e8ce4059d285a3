"""The one exception for what a person can mend."""


class UserError(ValueError):
  """A wrong flag, file, model or data set; its message says what to do about it.

  Experiments print the message without a traceback and exit with status 1. Every other exception
  is a defect of ours and keeps its traceback.
  """
