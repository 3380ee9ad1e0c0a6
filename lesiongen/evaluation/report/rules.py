"""The rules of the verdict, in one table: what each reads, its limits with a reason, and its sentences.

`rule.py` explains the columns, and `verdict.py` applies the rules. `python -m lesiongen.evaluation.report` prints the table for
docs/report.md.
"""

from lesiongen.evaluation.report.rules_of_likeness import LIKENESS
from lesiongen.evaluation.report.rules_of_models import MODELS
from lesiongen.evaluation.report.rules_of_privacy import PRIVACY

RULES = (*LIKENESS, *PRIVACY, *MODELS)
