"""What a user is told when something is wrong. Nothing here imports more than the standard library:
`--help` needs it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SisError(Exception):
    """The work stopped; one sentence a user can act on. The command line exits with `exit_code`."""

    exit_code = 1


class UsageError(SisError, ValueError):
    """The request was wrong (unknown name, impossible number, foreign folder): exit code 2."""

    exit_code = 2


def unknown_name(kind: str, name: str, known: Iterable[str], cure: str = "") -> UsageError:
    """The error for a name that does not exist: the nearest three, and the valid input."""
    known = sorted(known)
    nearest = [k for k in known if k.lower() == name.lower()] or difflib.get_close_matches(
        name, known, n=3, cutoff=0.0
    )
    hint = f"; did you mean {', '.join(map(repr, nearest))}" if nearest else "; none are known here"
    return UsageError(f"unknown {kind} {name!r}{hint}?{' ' + cure if cure else ''}")
