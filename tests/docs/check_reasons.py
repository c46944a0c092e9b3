#!/usr/bin/env python3
"""Each reason that clients can get in an ErrorInfo stands in docs/clients.md, and no other does.

    check_reasons.py ROOT
"""
import pathlib
import re
import sys

FOLDERS = ["server/frontend", "server/engine", "server/scheduler"]  # whose statuses reach clients
NO_REASONS = {"ALTIPLANO_FAULT"}  # other words in capitals: a variable of the environment
STATUSES = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED",
            "DEADLINE_EXCEEDED", "UNAVAILABLE", "ABORTED", "INTERNAL"}


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    files = [p for folder in FOLDERS for p in (root / folder).rglob("*.cc")]
    given = {word for p in files for word in re.findall(r'"([A-Z][A-Z_]{3,})"', p.read_text())} - NO_REASONS
    errors = (root / "docs/clients.md").read_text().split("## Errors", 1)[1]
    rows = [line for line in errors.splitlines() if line.startswith("|")]
    told = {word for row in rows for word in re.findall(r"\b[A-Z][A-Z_]{3,}\b", row)} - STATUSES
    problems = [f"docs/clients.md does not tell of the reason {r}" for r in sorted(given - told)]
    problems += [f"docs/clients.md tells of {r}, which no status has as its reason" for r in sorted(told - given)]
    print("\n".join(problems) if problems else f"reasons in docs/clients.md: ok, {len(given)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
