"""Renders chat templates, in a process that can be ended.

A template comes with a model, so it is anybody's program. It runs in jinja2's sandbox, which keeps
it from files and from the interpreter, but bounds neither its time nor its memory; a process of its
own does. `klrl.models.chat` starts this file as a program, which answers one JSON request. The file
imports nothing of klrl.

The environment is that of `transformers`: its functions `raise_exception` and `strftime_now`, its
`tojson`, loop controls, and blocks trimmed as there. What stands in a `generation` block is marked.
"""

import contextlib
import datetime
import json
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

try:
  import resource
except ImportError:  # Windows has no such limits; the time is still bounded.
  resource = None

# Two characters that Unicode keeps free of any meaning, around what a `generation` block holds.
OPEN, CLOSE = "\U0010fffe", "\U0010ffff"


class _Generation(jinja2.ext.Extension):
  """The block `{% generation %}...{% endgeneration %}`."""

  tags = frozenset({"generation"})

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("marked")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def marked(self, caller):
    return f"{OPEN}{caller()}{CLOSE}"


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # jinja2's own escapes what HTML reserves.
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _strftime_now(form):
  return datetime.datetime.now().strftime(form)


def compiled(source: str) -> jinja2.Template:
  """Returns the template in the environment that `transformers` has for it."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson
  environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
  return environment.from_string(source)


def answer(request: dict) -> dict:
  """Returns {"texts": texts}, or {"error": text, "chat": index or None} at the first that fails.

  `request` holds the `template`, its `variables`, the `chats`, the `jobs`, each of them [index of a
  chat, how many of its messages, whether the assistant is asked to go on], and `max_len`, the most
  characters of a text.
  """
  try:
    template = compiled(request["template"])
  except jinja2.TemplateSyntaxError as error:
    return {"error": f"line {error.lineno}: {error.message}", "chat": None}
  except Exception as error:  # from constants that are computed when it is compiled
    return {"error": _told(error), "chat": None}
  texts = []
  for chat, num_messages, asks in request["jobs"]:
    try:
      text = template.render(
        messages=request["chats"][chat][:num_messages],
        tools=None,
        documents=None,
        add_generation_prompt=asks,
        **request["variables"],
      )
    except Exception as error:  # A template can raise whatever Python's operators raise.
      return {"error": _told(error), "chat": chat}
    if len(text) > request["max_len"]:
      return {"error": f"it makes a text of {len(text)} characters", "chat": chat}
    texts.append(text)
  return {"texts": texts}


def _told(error: Exception) -> str:
  message = str(error)[:500]
  if type(error) is jinja2.TemplateError:  # what the template itself says
    return message
  return f"{type(error).__name__}: {message}" if message else type(error).__name__


def main() -> None:
  """Answers one request, within its limits of memory (bytes) and processor time (seconds)."""
  request = json.load(sys.stdin.buffer)
  if resource is not None:
    for name, limit in (("RLIMIT_AS", request["max_bytes"]), ("RLIMIT_CPU", request["seconds"])):
      _, most = resource.getrlimit(getattr(resource, name))
      limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
      with contextlib.suppress(OSError, ValueError):  # macOS refuses some.
        resource.setrlimit(getattr(resource, name), (limit, most))
  sys.stdout.write(json.dumps(answer(request)))


if __name__ == "__main__":
  main()
