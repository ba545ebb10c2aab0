"""GenEval as a user runs it: any prompts, a tiny random BAGEL, a judge on this machine.

  R3JAX_GENEVAL=FILE bash launch/test.sh -m slow tests/evaluation/test_geneval.py

takes the prompts of a file, for example GenEval's 553; else some are generated.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys
import zlib

import pytest

from r3jax.data.generators import geneval
from r3jax.evaluation import sample_log
from tests import tiny_bagel
from tests.rewards import scripted

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
  "model.dtype": "float32",
  "image.height": 48,
  "image.width": 48,
  "eval.points": 3,
  "sequence.prompt_tokens": 96,
  "sequence.question_tokens": 96,
  "sequence.thought_tokens": 6,
  "sequence.answer_tokens": 6,
  "sequence.instruction_tokens": 8,
  "eval.question_tokens": 256,
  "eval.ask": "('match',)",
  "reward.name": "judge",
  "eval.images_per_prompt": 4,
  "eval.rounds": 4,
}


def judge(request: scripted.Request) -> scripted.Answer:
  """Answers as a chat server whose one model finds about half of the images right."""
  if request.method == "GET":
    return 200, json.dumps({"data": [{"id": "judge"}]}).encode()
  said = json.dumps({"correct": zlib.crc32(request.body) % 2})
  return 200, json.dumps(
    {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
  ).encode()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_counts_and_files(tmp_path):
  prompts = os.environ.get("R3JAX_GENEVAL", "")
  if not prompts:
    prompts = str(tmp_path / "prompts.jsonl")
    pathlib.Path(prompts).write_text(
      "".join(
        f"{json.dumps(prompt.to_json())}\n"
        for prompt in geneval.generate(24, 0)
      )
    )
  records = [
    json.loads(line) for line in pathlib.Path(prompts).read_text().splitlines()
  ]
  tiny_bagel.write(tmp_path / "model")
  with scripted.serve(judge) as server:
    settings = SETTINGS | {
      "data.heldout": prompts,
      "reward.endpoints": f"('{server.url}',)",
    }
    command = [
      sys.executable,
      "launch/evaluate.py",
      "--config=configs/r3_geneval.py",
      f"--workdir={tmp_path / 'found'}",
      f"--checkpoint={tmp_path / 'model'}",
      *(f"--config.{key}={value}" for key, value in settings.items()),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
      command,
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
  assert done.returncode == 0, done.stderr[-3000:]
  summary = json.loads((tmp_path / "found" / "summary.json").read_text())
  tags = collections.Counter(record["tag"] for record in records)
  assert summary["images_by_tag"] == {
    tag: 4 * number for tag, number in tags.items()
  }
  assert (summary["prompts"], summary["missing"]) == (
    len({record["prompt"] for record in records}),
    0,
  )
  assert [one["round"] for one in summary["rounds"]] == [
    "draft",
    "round 2",
    "round 3",
    "round 4",
  ]
  samples = sample_log.read(tmp_path / "found")
  assert len(samples) == 4 * len(records) and all(
    len(sample.turns) == 4 for sample in samples
  )
  named = {turn.image for sample in samples for turn in sample.turns}
  assert named == {
    f"images/{path.name}" for path in (tmp_path / "found" / "images").iterdir()
  }
  answers = [
    json.loads(line)
    for line in (tmp_path / "found" / "rewards" / "judge.0.jsonl")
    .read_text()
    .splitlines()
  ]
  # The judge is asked about every image once: chains end with their stop.
  assert len(answers) == len(named)
  assert summary["understanding"]["match"]["questions"] == 4 * len(records)
  print(done.stdout)
