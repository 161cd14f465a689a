"""`nbdlink doctor`: can this machine do it?"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; fail if one of them keeps devices from being attached."""
    from dataclasses import asdict

    from nbdlink.cli import output
    from nbdlink.link.checkup import examine

    findings = list(examine())
    if arguments.json:
        output.print_json([asdict(finding) for finding in findings])
    else:
        rows = [(finding.status, finding.check, finding.found) for finding in findings]
        output.print_table(("status", "check", "found"), rows)
        for finding in findings:
            if finding.remedy:
                print(f"{finding.check}: {finding.remedy}")
    return 1 if any(finding.status == "failed" for finding in findings) else 0
