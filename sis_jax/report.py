"""The report: one HTML file that shows the results of a run, their confidence, and how to repeat
it: `python -m sis_jax.report RUN`.
"""

from __future__ import annotations

from pathlib import Path

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.report import ReportConfig


@door(ReportConfig, stage="sis_jax.runs.page")
def report(config: ReportConfig) -> Path:
    """Write RUN/report.html: parts, samples, the choice of layer and k, warnings, and how to repeat
    the run.

    The page is made from the run's files only, opens offline in any browser, and stays under 5 MB.
    A section without data is left out.

    Returns the path of the page. Raises UsageError when the folder is no run.
    """
    from sis_jax.runs.page import write_page

    return write_page(config.run)


if __name__ == "__main__":
    cli.main(report)
