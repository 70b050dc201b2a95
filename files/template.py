"""Renders chat templates, untrusted programs, in a process of its own, of bounded time and memory:

    python -I files/template.py SECONDS MEMORY FOLDER...    where jinja2 is

The sandbox keeps a template from reaching out, but not from asking for 'x' * 10**10. One line of
JSON asks, one answers, until standard input ends. Imports the standard library and jinja2 alone.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

MAX_TEXT = 2**20  # characters of a template, and of what it writes
STAND_INS: dict[str, str] = {}  # of the request: what stands for which character


def limit_memory(size: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # a system without, or a lower limit is set
        import resource

        used = 0
        with suppress(OSError):  # where there is no /proc
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + size, hard))


def limit_time(seconds: int) -> None:
    """From now on. Whoever asked has a clock too, which counts waiting as well."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        now = os.times()
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = int(now.user + now.system) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter of this name, without jinja2's escapes for HTML; stand-ins stay whole, but what
    they stand for is escaped where it must be."""
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    text = json.dumps(x, ensure_ascii=ensure_ascii, **how)
    for stand_in, character in STAND_INS.items():
        spelled = json.dumps(stand_in, ensure_ascii=ensure_ascii)[1:-1]
        escaped = json.dumps(character, ensure_ascii=ensure_ascii)[1:-1]
        text = text.replace(spelled, escaped.replace(character, stand_in))
    return text


def sandbox():  # noqa: ANN201
    """The environment in which transformers renders chat templates."""
    from jinja2 import ext, filters, nodes, sandbox, utils
    from jinja2.exceptions import SecurityError, TemplateError

    class Generation(ext.Extension):
        """{% generation %} marks what the assistant says; here it is the text within."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(utils.Namespace):
        def __setitem__(self, name: str, value: object) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"{name!a:.30} of a namespace is not to be set")
            super().__setitem__(name, value)

    def namespace(*given: object, **values: object) -> Namespace:
        made = Namespace()
        for name, value in dict(*given, **values).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def urlencode(value: object) -> str:
        text = filters.do_urlencode(value)
        for stand_in, character in STAND_INS.items():
            escaped = quote(character, safe="/").replace(character, stand_in)
            text = text.replace(quote(stand_in), escaped)
        return text

    how = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, ext.loopcontrols]}
    made = sandbox.ImmutableSandboxedEnvironment(**how)
    made.filters["tojson"], made.filters["urlencode"] = tojson, urlencode
    made.globals |= {"raise_exception": raise_exception, "namespace": namespace}
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def answer(environment, request: dict) -> dict[str, str]:
    """Under "text" what the template writes, or under "error" why it does not."""
    STAND_INS.clear()
    STAND_INS.update(request["stand_ins"])
    try:
        if request["values"] is None:  # its syntax alone
            environment.parse(request["template"])
            return {"text": ""}
        text = environment.from_string(request["template"]).render(request["values"])
        if len(text) > MAX_TEXT:
            return {"error": f"writes more than {MAX_TEXT} characters"}
        return {"text": text}
    except MemoryError:
        return {"error": "takes too much memory"}
    except Exception as error:  # jinja2's, and whatever an operation of the template raises
        kind, reason = type(error).__name__, str(error).strip().split("\n")[0]
        return {"error": f"{kind}: {reason!a:.120}"}


def main(seconds: str, memory: str, *folders: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asked
    sys.path += [folder for folder in folders if folder not in sys.path]
    environment = sandbox()
    limit_memory(int(memory))
    for line in sys.stdin.buffer:
        limit_time(int(seconds))
        said = json.dumps(answer(environment, json.loads(line)))
        sys.stdout.buffer.write(said.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
