"""What others say neither steers a terminal nor forges a line of a log."""

from __future__ import annotations

import io
import json
import logging

import pytest

from fedra_edge.console import Output
from fedra_edge.errors import FedraEdgeError
from fedra_edge.protocol.messages import FailureReport
from fedra_edge.protocol.plain_text import PlainFormatter, plain
from fedra_edge.protocol.problems import Problem, ProblemCode

EVIL = "\x1b]0;owned\x07\x1b[2Jlost\r\n2026 forged\x9b31m\u202e\0"


def is_harmless(text: str) -> bool:
    return all(it.isprintable() or it in "\n\t\N{REPLACEMENT CHARACTER}" for it in text)


def test_text_of_the_other_side_comes_without_control_characters() -> None:
    problem = Problem.of(ProblemCode.INTERNAL, status=500, detail="", remedy="")
    sent = {**problem.model_dump(mode="json"), "detail": EVIL, "remedy": EVIL, "title": EVIL}
    read = Problem.model_validate_json(json.dumps(sent))
    failure = FailureReport.model_validate_json(json.dumps({"detail": EVIL}))
    for text in (read.detail, read.remedy, read.title, failure.detail):
        assert is_harmless(text)
        assert "lost\n2026 forged" in text


def test_good_text_stays_as_it_is() -> None:
    text = "Prüfung\t1:\n  naïve 図 \N{PARTY POPPER}"
    assert plain(text) == text


def test_a_record_is_one_line_of_the_log_and_a_traceback_is_indented() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("of-this-test")
    logger.addHandler(handler)
    logger.warning("a client said: %s", EVIL)
    try:
        int(EVIL)
    except ValueError as error:
        error.add_note(EVIL)
        logger.exception("failed")
    logger.removeHandler(handler)
    first, second, *trace = written.getvalue().splitlines()
    assert (
        first
        == r"WARNING a client said: \x1b]0;owned\x07\x1b[2Jlost\r\n2026 forged\x9b31m\u202e\x00"
    )
    assert second == "ERROR failed"
    assert trace
    assert all(line.startswith("  ") for line in trace)
    assert is_harmless(written.getvalue())


def test_the_terminal_of_a_site_is_told_nothing_that_it_would_obey(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output(as_json=False).fail(FedraEdgeError(EVIL, remedy=EVIL))
    Output(as_json=False).show({"name": EVIL})
    told = capsys.readouterr()
    assert is_harmless(told.out + told.err)
    assert "lost" in told.err
