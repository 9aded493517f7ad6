"""`world-distill doctor`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Check this installation: Python, JAX and its plugins, accelerators, optional parts, video, the hub, disk, the folder.

Every finding is a line: ok, note (something that you may not need is missing) or problem, with what to do. Nothing is
changed. Ends with exit code 1 if there is a problem.

  world-distill doctor
  world-distill doctor --offline --json doctor.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not try whether the Hugging Face hub answers")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import doctor

    findings = []
    for finding in doctor.findings(offline=args.offline):
        findings.append(finding)
        console.say(doctor.line(finding))
    problems = sum(finding.state == doctor.PROBLEM for finding in findings)
    if args.json:
        atomic.write_json(args.json, {"findings": [finding._asdict() for finding in findings], "problems": problems})
    where = [args.json] if args.json else []
    if problems:
        console.finish(f"{problems} {'problem' if problems == 1 else 'problems'}", *where)
        return 1
    console.finish("no problem found", *where, then=[("quickstart",)])
    return 0
