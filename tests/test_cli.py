"""The `maskfeat` command: its help, imports and errors; each sub-command is the program behind a script of tools/."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import maskfeat
from maskfeat import cli
from maskfeat.config import load_config
from maskfeat.demos import commands
from maskfeat.engine.run import parse_args
from tests.documents import REPO, fenced_blocks, read, recorded_commands

SCRIPTS = {name: f"{name.replace('-', '_')}.py" for name in cli.PROGRAMS}
SCRIPTS |= {"train": "run_net.py", "inspect": "inspect_checkpoint.py"}  # Python has a module `inspect`


def lines_of_help(text: str) -> dict[str, str]:
    return dict(re.findall(r"^  ([a-z][\w-]*) {2,}(\S.*)$", text.split("commands", 1)[1], re.M))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(arguments) == 0
    except SystemExit as end:
        assert end.code == 0
    assert lines_of_help(capsys.readouterr().out) == {name: found.summary for name, found in cli.PROGRAMS.items()}


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_the_help_of_every_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and said.count(f"maskfeat {name} ") > 1, "once more than its usage"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from maskfeat.cli import main; main([]);"
        "print([m for m in sys.modules if m in ('torch', 'yacs', 'PIL') or m.startswith('maskfeat.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stdout.splitlines()[-1] == "['maskfeat.text', 'maskfeat.cli']"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"maskfeat {maskfeat.__version__}\n"


@pytest.mark.parametrize(
    ("given", "meant"), [("trian", "train"), ("Visualise", "visualize"), ("cifar10", "prepare-cifar10"), ("", "train")]
)
def test_unknown_command(given: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([given, "--cfg", "x"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"unknown command {given!r}; did you mean " in said
    assert not given or f"did you mean {meant!r}?" in said


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_each_command_is_the_program_of_a_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same `main`, with the name of the command that was typed in its usage."""
    text = (REPO / "tools" / SCRIPTS[name]).read_text()
    assert f"from {cli.PROGRAMS[name].module} import main" in text
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith(f"usage: maskfeat {name} ")
    assert SCRIPTS[name] not in shown


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_script_says_its_own_name(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = REPO / "tools" / script
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    own = "quickstart.sh" if script == "quickstart.py" else script
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {own} ")


def test_arguments_and_exit_code_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], str]] = []
    module = SimpleNamespace(main=lambda argv, prog: calls.append((argv, prog)) or 7)
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda name: module))
    assert cli.main(["visualize", "--cfg", "x", "--version", "--", "A", "-1"]) == 7
    assert calls == [(["--cfg", "x", "--version", "--", "A", "-1"], "maskfeat visualize")]


def test_ctrl_c_during_an_import(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=stop))
    assert cli.main(["predict"]) == 130 and caplog.records[-1].getMessage() == "interrupted"


@pytest.mark.slow
def test_failed_training_ends_at_once() -> None:
    """Through `run_program`, as tools/run_net.py: what is registered for the end of Python does not run."""
    code = "import atexit; atexit.register(print, 'tidied up'); from maskfeat.cli import main; main(['train', *{}])"
    command = [sys.executable, "-c", code.format(["--cfg", "quickstart/image_pt"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2 and "error: config file quickstart/image_pt" in done.stderr, done.stderr
    assert "quickstart/images_pt" in done.stderr and "Traceback" not in done.stderr
    assert "tidied up" not in done.stdout


def test_threads_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the scripts set it, before torch is imported; what the user has set stays."""
    module = SimpleNamespace(main=lambda argv, prog: 0)
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda name: module))
    for given, expected in ((None, "passive"), ("active", "active")):
        environment = {} if given is None else {"OMP_WAIT_POLICY": given}
        monkeypatch.setattr(os, "environ", environment)
        cli.main(["visualize"])
        assert environment.get("OMP_WAIT_POLICY") == given
        cli.main(["evidence"])
        assert environment["OMP_WAIT_POLICY"] == expected


def test_commands_that_demos_show(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("quickstart/images_pt.yaml", ["OUTPUT_DIR", "a b"])
    expected = "python tools/run_net.py --cfg configs/quickstart/images_pt.yaml OUTPUT_DIR 'a b'"
    assert commands.train_command(*given) == expected
    monkeypatch.setattr(commands, "INSTALLED", True)
    installed = commands.train_command(*given)
    assert installed == "maskfeat train --cfg quickstart/images_pt OUTPUT_DIR 'a b'"
    assert commands.program("evidence", "evidence.py") == ["maskfeat", "evidence"]
    shown, kept = (parse_args(shlex.split(command)[2:]) for command in (installed, expected))
    assert load_config(*shown.cfg, shown.opts) == load_config(*kept.cfg, kept.opts)


RECORD = (
    "maskfeat() { printf '%s\\0' maskfeat \"$@\" $'\\1'; }\n"
    "cd() { :; }\nsource() { :; }\ncommand_not_found_handle() { :; }\n"
)


def documented_commands() -> list[list[str]]:
    blocks = [text for _, text in fenced_blocks(read("INSTALL.md"))]
    found = recorded_commands(RECORD + "\n".join(blocks), {})
    return [command[1:] for command in found if command[0] == "maskfeat"]


def test_documented_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def check(self: argparse.ArgumentParser, args: list[str] | None = None) -> argparse.Namespace:
        parsed = parse(self, args)
        if self.prog == "maskfeat":
            return parsed
        if "cfg" in parsed:
            for path in [parsed.cfg] if isinstance(parsed.cfg, str) else parsed.cfg:
                load_config(path, parsed.opts)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", check)
    monkeypatch.setattr("maskfeat.distributed.processes.run_program", lambda run: run())
    found = documented_commands()
    assert {"train", "make-synthetic"} <= {command[0] for command in found}
    for command in found:
        with pytest.raises(SystemExit if command[0].startswith("-") else Parsed):
            cli.main(command)


def test_citation() -> None:
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["version"] == maskfeat.__version__
    assert {"message", "title", "authors", "license"} <= cited.keys()
    urls = {paper["url"] for paper in cited["references"]}
    assert urls == {f"https://arxiv.org/abs/{number}" for number in ("2112.09133", "2206.07706")}
    assert all(url in read("setup.py") for url in urls)


def test_docker_context_holds_what_is_copied() -> None:
    """Each path that the Dockerfile copies exists and is let through; it starts `maskfeat` as a user without root."""
    text = read("Dockerfile")
    allowed = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    copied = {path for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for path in line.split()[:-1]}
    assert copied == allowed and all(Path(REPO / path).exists() for path in copied)
    last_stage = text.rpartition("\nFROM ")[2]
    assert 'ENTRYPOINT ["maskfeat"]' in last_stage and re.findall(r"^USER (.+)$", last_stage, re.M) == ["maskfeat"]
