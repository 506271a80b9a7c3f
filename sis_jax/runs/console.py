"""Output on consoles of any encoding: a path that the console cannot show must not end a job."""

from __future__ import annotations

import codecs
import io
import sys

_RULE = "sis_jax.console"


def any_console() -> None:
    """From now on stdout takes every text: bytes of a file name that are no text are given as they
    are, characters that the encoding lacks as a backslash and their number.
    """
    codecs.register_error(_RULE, _replaced)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_RULE)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)
