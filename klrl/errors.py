"""The exception for errors that a person can mend; a full disk or memory becomes one too."""

import contextlib
import errno
import re


class UserError(ValueError):
  """A wrong flag, file, model or data set; its message says what to do about it.

  Experiments print the message without a traceback and exit with status 1. Every other exception
  is a defect of ours and keeps its traceback.
  """


class PeerLost(UserError):
  """Another process of the run has ended or cannot be reached, so none may wait for the others."""


_FULL = "Make room, for files as for bytes, or choose another --workdir."
_REFUSED = "Make it readable and writable, or choose another --workdir."
# How the libraries begin by which the processes of a CPU, and those of any device, talk.
_OF_PEERS = ("Gloo ", "CoordinationServiceError")
# Errors of a disk: the number, the words that Orbax and TensorStore repeat, and what to do.
_MACHINE = (
  (errno.ENOSPC, "No space left on device", _FULL),
  (errno.EDQUOT, "Disk quota exceeded", _FULL),
  (errno.EFBIG, "File too large", "Raise the limit of a file's size, see `ulimit -f`."),
  (errno.EROFS, "Read-only file system", _REFUSED),
  (errno.EACCES, "Permission denied", _REFUSED),
  (errno.EPERM, "Operation not permitted", _REFUSED),
  (errno.EIO, "Input/output error", _REFUSED),
  (errno.ESTALE, "Stale file handle", _REFUSED),
  (errno.EMFILE, "Too many open files", _REFUSED),
)
# Errors of something else that is where a file or folder should be.
_LAYOUT = (
  (errno.EEXIST, "File exists", _REFUSED),
  (errno.ELOOP, "Too many levels of symbolic links", _REFUSED),
  (errno.EISDIR, "Is a directory", _REFUSED),
  (errno.ENOTDIR, "Not a directory", _REFUSED),
  (errno.ENAMETOOLONG, "File name too long", _REFUSED),
)


@contextlib.contextmanager
def troubles_told():
  """Raises UserError in place of an error of a disk, a memory, or a lost process."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # JAX, Orbax and TensorStore have no class for these errors.
    if any(words in str(error) for words in _OF_PEERS):
      raise PeerLost(
        "Another process of this run has ended or cannot be reached any more "
        f"({str(error).splitlines()[0][:200]}). See what it said. The same command, in all "
        "processes, goes on from what was saved."
      ) from error
    message = _disk_message(error, _MACHINE + _LAYOUT) or memory_message(error)
    if message is None:
      raise
    raise UserError(message) from error


def is_of_the_machine(error: Exception) -> bool:
  """Returns whether it is an error of a disk or a memory, and not of the content of a file."""
  return bool(_disk_message(error, _MACHINE) or memory_message(error))


def _disk_message(error: BaseException | None, refusals) -> str | None:
  while error is not None:
    code = error.errno if isinstance(error, OSError) else None
    for number, words, advice in refusals:
      if number == code or words in str(error):
        # TensorStore names the file in its text.
        place = re.search(r"(?:^|[\s'\"])(/[^\s'\":]+)", str(error))
        where = getattr(error, "filename", None) or (place and place[1])
        at = f" at {where}" if where else ""
        return (
          f"{words}{at}. {advice} What was saved before is whole, and the same command goes on "
          "from it."
        )
    error = error.__cause__ or error.__context__
  return None


def memory_message(error: BaseException, held: str = "") -> str | None:
  """Returns what to say of an error of a memory, and None of any other.

  `held` is a sentence on what is in the memory already.
  """
  text = str(error)
  if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
    return None
  said = text.strip().splitlines()[0][:200].rstrip(".") if text.strip() else "out of memory"
  number = re.search(r"(\d{8,}) bytes", text)
  size = f" ({int(number[1]) / 2**30:.1f} GiB at once)" if number else ""
  return (
    f"The memory does not hold this: {said}{size}.{held} --accumulation=K, --remat=full and "
    "--mesh=fsdp=N over more devices need less memory for the same result, and so does a smaller "
    "--eval_batch_size while a policy is judged. A smaller "
    "--batch_size, shorter completions, --dtype=bfloat16 and --lora_rank need less too, but change "
    "the result. --dry_run says what a run needs."
  )
