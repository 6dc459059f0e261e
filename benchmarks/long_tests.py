"""The tests that take minutes each, which `make test` leaves out: whole runs killed and resumed, and the like.

Records each test's outcome and seconds. Ends with pytest's own exit code, so that a failure is one here too; arguments go on to
pytest: `make bench NAME=long_tests ARGS="-k killed"`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks._record import record

ROOT = Path(__file__).parent.parent


def outcome(case: ET.Element) -> str:
    """What became of a test, in the words of JUnit's format: passed where it holds no other word."""
    found = {child.tag for child in case} & {"failure", "error", "skipped"}
    return found.pop() if found else "passed"


def main() -> None:
    """Run and record."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "long", f"--junitxml={report}", *sys.argv[1:]]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():
            sys.exit(code)
        cases = list(ET.parse(report).iter("testcase"))
    results = {f"{case.get('classname')}::{case.get('name')}": case for case in cases}
    record(
        "long_tests",
        settings={"marker": "long"},
        figures={
            "passed": sum(outcome(case) == "passed" for case in cases),
            "not_passed": sum(outcome(case) != "passed" for case in cases),
            **{f"{name} ({outcome(case)})": float(case.get("time", "nan")) for name, case in results.items()},
        },
    )
    sys.exit(code)


if __name__ == "__main__":
    main()
