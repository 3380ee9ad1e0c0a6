"""python -m lesiongen.evaluation.report prints the rules of the verdict as the table in docs/report.md."""

from lesiongen.evaluation.report.rule import as_markdown
from lesiongen.evaluation.report.rules import RULES

if __name__ == "__main__":
    print(as_markdown(RULES), end="")
