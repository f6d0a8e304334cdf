"""The README's commands exist, with the options it gives them."""

import re
from pathlib import Path

import pytest

from tests.trainers.test_cli import run
from trainers.cli import COMMANDS
from trainers.recipe import named_recipes

README = (Path(__file__).parents[2] / "README.md").read_text()
# In blocks of commands only; also behind another program, as in `srun ... zoo train ister`.
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
BLOCKS = [text for language, text in FENCED if language in ("", "bash")]
LINES = [
    line.partition("zoo ")[2].partition(" #")[0].strip('" \n').split()
    for block in BLOCKS
    for line in block.splitlines()
    if re.search(r"(^|[ !/&])zoo (?!-)[a-z]+ ", line) and "gcloud" not in line
]


def test_there_are_commands():
    assert {"train", "eval", "predict", "compare", "compile", "bench"} <= {line[0] for line in LINES}


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_command_and_options_exist(line, capsys):
    command, *arguments = line
    assert command in COMMANDS
    options = {word for word in arguments if word.startswith("--")}
    paper = ["ister"] if command in ("train", "compile", "bench") else []
    if arguments[0] == "backbones":  # has options of its own
        paper = arguments[:1]
    assert run(command, *paper, "--help") == 0
    out = capsys.readouterr().out
    assert not {option for option in options if not re.search(rf"{option}\b", out)}
    if "--config" in options:
        assert arguments[arguments.index("--config") + 1] in named_recipes("ister")
    for name in (word for word in arguments if word.startswith("ister:")):
        assert name.partition(":")[2] in named_recipes("ister")
