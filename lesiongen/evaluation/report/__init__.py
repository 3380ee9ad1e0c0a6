"""The report of an evaluation: the verdict, and one HTML page for clinicians and reviewers. docs/report.md explains both."""

from lesiongen.evaluation.report.page import NearestPair, Strips, page
from lesiongen.evaluation.report.verdict import verdict

__all__ = ["NearestPair", "Strips", "page", "verdict"]
