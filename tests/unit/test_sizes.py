"""No file and no function is too long, and every public function has annotations and a docstring."""

from tests import sizes


def test_no_limit_is_passed():
    *_, problems = sizes.measure()
    assert problems == []


def test_what_is_measured(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        '"""Doc."""\n\n\ndef f(a, b: int):\n    # comment\n\n    return (\n        a\n        + b\n    )\n\n\ndef _g(a): ...\n'
    )
    first, second = sizes.functions(path)
    assert (first.lines, second.lines) == (5, 1)
    assert first.missing == ("an annotation of a", "an annotation of what it returns", "a docstring")
    assert second.missing == ()
