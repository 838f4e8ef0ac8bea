"""What README.md tells people to run exists, and its tables are what was measured."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusetune import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def commands_of(program):
    return [c[1:] for c in COMMANDS if Path(c[0]).name == program]


def test_every_command_is_of_a_kind_that_is_checked():
    assert {Path(c[0]).name for c in COMMANDS} == {"make", "fusetune", "pip"}


@pytest.mark.parametrize("arguments", commands_of("make"), ids=" ".join)
def test_make_targets_exist(arguments):
    subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("arguments", commands_of("fusetune"), ids=" ".join)
def test_fusetune_takes_these_options(arguments):
    result = CliRunner().invoke(cli.app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output


def test_tables_are_what_was_measured():
    command = [sys.executable, "-m", "benchmarks.readme", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing
