"""The report: one HTML file that shows what a run found, how sure it is, and how to repeat it."""

from __future__ import annotations

from pathlib import Path

from sis_jax.runs import cli


def report(run: str | Path) -> Path:
    """Write RUN/report.html: parts, samples, the choice of layer and k, warnings, and how to repeat
    the run.

    The page is made from the run's files only, opens offline in any browser, and stays under 5 MB.
    A section without data is left out.

    run: the run folder, as `--out` named it.

    Returns the path of the page. Raises UsageError when the folder is no run.
    """
    from sis_jax.runs.page import write_page

    return write_page(run)


if __name__ == "__main__":
    cli.main(report)
