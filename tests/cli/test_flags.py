"""Tests of flags with absurd values: one line that names the flag, and nothing runs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from r3jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]
# Reads command lines from its input; parses each in a process of its own, and runs nothing.
PARSE_EACH = """
import importlib, json, os, sys
from r3jax.cli import main
modules = {}
for name in main.COMMANDS:
  module = importlib.import_module("r3jax.cli." + name.replace("-", "_"))
  module.run = lambda *words: print("RUNS")
for rules in ("r3jax.run.config_rules", "r3jax.sft.config_rules",
    "r3jax.benchmark.config_rules"):
  importlib.import_module(rules)
outputs = []
for name, *arguments in json.load(sys.stdin):
  reader, writer = os.pipe()
  if not os.fork():
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    try:
      main.run_command(name, arguments)
    except SystemExit as end:
      print(end.code or "", flush=True)
    finally:
      sys.stdout.flush()
      os._exit(0)
  os.close(writer)
  with os.fdopen(reader, errors="replace") as file:
    outputs.append(file.read())
  os.wait()
json.dump(outputs, sys.stdout)
"""
PROCESSES = ["coordinator=h:1", "num_processes=2"]
# What a command needs beside the flag that is tried.
COMPLETE = {
  "train": ["config=r3_geneval:shapes", "workdir=w", *PROCESSES],
  "evaluate": ["config=r3_geneval:shapes", "workdir=w", *PROCESSES],
  "rescore": ["config=r3_geneval:shapes", "judge=j", *PROCESSES],
  "compare": ["workdir=w"],
  "study": ["config=r3_geneval:shapes", "workdir=w"],
  "replay": PROCESSES,
  "generate": ["prompt=p", "out=o"],
  "edit": ["image=i", "instruction=t", "out=o"],
  "ask": ["image=i", "question=q"],
  "sft": ["config=sft_shapes", "out=o"],
  "convert": ["source=s", "out=o", "format=orbax"],
  "compile": ["config=r3_geneval", "topology=v5e:2x2"],
  "benchmark": ["config=benchmark", *PROCESSES],
  "serve-reward": [],
  "check-parity": ["goldens=g"],
}
WORDS = {"compare": ["a"], "rescore": ["a"], "replay": ["a"], "study": ["main"]}
NUMBERS = ["", "abc", "nan", "inf", "-inf", "-1", "0", "0.5", "1e300", "9" * 30]
TEXTS = ["", " "]
# Flag -> the absurd numbers that mean something there.
ALLOWED_NUMBERS = {
  "train": {"num_processes": [], "process_id": ["0"]},
  "evaluate": {"num_processes": [], "process_id": ["0"]},
  "rescore": {"num_processes": [], "process_id": ["0"]},
  "benchmark": {"num_processes": [], "process_id": ["0"]},
  "replay": {"num_processes": [], "process_id": ["0"]},
  "generate": {
    "seed": ["0"],
    "points": [],
    "temperature": ["0", "0.5"],
    "rounds": [],
    "num_images": [],
  },
  "edit": {"seed": ["0"], "points": [], "num_images": []},
  "ask": {"seed": ["0"], "temperature": ["0", "0.5"]},
  "study": {"seeds": []},
  "compile": {"find": ["0"], "layers": [], "effort": ["-1", "0", "0.5"]},
  "serve-reward": {
    "port": ["0"],
    "grace": ["0", "0.5"],
    "confidence": ["0", "0.5"],
    "counting_confidence": ["0", "0.5"],
    "max_body_bytes": [],
    "max_items": [],
    "max_pixels": [],
    "max_request_pixels": [],
    "queue": ["0"],
  },
  "check-parity": {"tolerance_scale": ["0.5"]},
}
# Texts that must be there.
REQUIRED = {
  "train": ["config", "workdir"],
  "evaluate": ["config", "workdir"],
  "rescore": ["config"],
  "compare": ["workdir"],
  "study": ["config", "workdir"],
  "generate": ["out"],
  "edit": ["image", "instruction", "out"],
  "ask": ["image", "question"],
  "sft": ["config", "out"],
  "convert": ["source", "out", "format"],
  "compile": ["config", "topology"],
  "benchmark": ["config"],
  "serve-reward": ["host", "reward"],
  "check-parity": ["goldens"],
}
# (command, flag or key, value, message)
EXAMPLES = [
  ("train", "config", "r3_geneval:shaps", "did you mean shapes?"),
  ("train", "config.optimizr.b1", "1", "did you mean optimizer.b1?"),
  ("train", "config.seed", "abc", "in 0..4294967295; got 'abc'"),
  ("train", "config.seed", "-1", "in 0..4294967295; got -1"),
  ("train", "config.reason.interval[0]", "0.5", "must be set as a whole"),
  ("train", "config.reason.interval", "(1,", "with 0 <= low <= high <= 1"),
  ("train", "config.log.tensorboard", "maybe", "must be True or False"),
  ("train", "config.eval", "3", "--config.eval=3"),
  ("train", "config.reward.members", "3", "a section of sections"),
  ("train", "coordinator", "host", "--coordinator must be HOST:PORT"),
  ("train", "coordinator", "", "both need --coordinator"),
  ("train", "process_id", "2", "--process_id must be below --num_processes"),
  ("train", "config", "sft_shapes", "it lacks checkpoint.every"),
  ("sft", "config", "r3_geneval", "it lacks autoencoder.batch_size"),
  ("sft", "config.text.num_steps", "0", "text.num_steps must be a whole"),
  ("generate", "config.seed", "1", "--config must name the config file"),
  ("generate", "point", "1", "Did you mean: points"),
  ("convert", "format", "orbux", "orbax"),
  ("serve-reward", "token_env", "sk-1", "must be the name of an environment"),
  ("compile", "topology", "v5q:2x2", "CHIP:SHAPE with a chip among v4, v5e"),
  ("compile", "topology", "v5e", "--topology must be CHIP:SHAPE"),
  ("benchmark", "programs", "think,drift", "one of 'fused', 'split', 'think'"),
  ("benchmark", "page", "page.md", "--page must be FILE#NAME"),
  ("benchmark", "config.reflect_rounds", "2", "reflect_rounds must be 1"),
  ("rescore", "judge", "../x", "--judge must be letters, digits"),
]


def line(command: str, flag: str, value: str) -> list[str]:
  """Returns a command line in which one flag has the value that is tried.

  Connected processes check their config after they have met: it is tried in one process.
  """
  others = [
    f"--{text}"
    for text in COMPLETE[command]
    if text.split("=")[0] != flag
    and not (flag.startswith("config") and text in PROCESSES)
  ]
  return [command, *WORDS.get(command, []), *others, f"--{flag}={value}"]


def tries() -> list[tuple[str, str, str]]:
  """Returns (command, flag, value) of all that is tried."""
  numbers = [
    (command, flag, value)
    for command, flags in ALLOWED_NUMBERS.items()
    for flag in flags
    for value in NUMBERS
  ]
  texts = [
    (command, flag, value)
    for command, flags in REQUIRED.items()
    for flag in flags
    for value in TEXTS
  ]
  examples = [example[:3] for example in EXAMPLES]
  return [*numbers, *texts, *examples]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[tuple[str, str, str], str]:
  """Returns what each command prints."""
  cwd = tmp_path_factory.mktemp("flags")
  lines = [line(*attempt) for attempt in tries()]
  lines += [line(command, "undefok", "") for command in COMPLETE]
  done = subprocess.run(
    [sys.executable, "-c", PARSE_EACH],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert not list(cwd.iterdir())
  complete = [(command, "", "") for command in COMPLETE]
  return dict(zip([*tries(), *complete], json.loads(done.stdout), strict=True))


def refusal_of(output: str) -> str:
  """Returns the message of a refusal in one line."""
  (message,) = output.splitlines()
  assert message.startswith("r3jax: ")
  return message


def test_every_command_is_tried():
  takes_no_flags = {"report"}
  assert set(COMPLETE) == set(main.COMMANDS) - takes_no_flags


def test_complete_command_lines_run(outputs):
  for command in COMPLETE:
    assert outputs[command, "", ""].strip() == "RUNS", command


@pytest.mark.parametrize("command", ALLOWED_NUMBERS)
def test_absurd_numbers_are_refused_in_a_line_that_names_the_flag(
  outputs, command
):
  for flag, allowed in ALLOWED_NUMBERS[command].items():
    for value in NUMBERS:
      output = outputs[command, flag, value]
      if value in allowed:
        assert output.strip() == "RUNS", (flag, value)
        continue
      message = refusal_of(output)
      assert f"--{flag} must be " in message, (flag, value, message)
      assert "; got " in message


@pytest.mark.parametrize("command", REQUIRED)
def test_empty_texts_are_refused(outputs, command):
  for flag in REQUIRED[command]:
    for value in TEXTS:
      assert f"--{flag}" in refusal_of(outputs[command, flag, value])


@pytest.mark.parametrize("command, flag, value, message", EXAMPLES)
def test_message(outputs, command, flag, value, message):
  assert message in refusal_of(outputs[command, flag, value])
