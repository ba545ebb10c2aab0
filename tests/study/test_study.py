"""Tests of study/runs.py, results.py and study_report.py, with runs that a fake makes."""

import dataclasses
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

from etils import epath
import numpy as np
import pytest

from r3jax.data import contamination
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import sample_log
from r3jax.evaluation import summary as summary_lib
from r3jax.files import jsonl
from r3jax.report import evaluation_report
from r3jax.study import declarations
from r3jax.study import measures
from r3jax.study import results as results_lib
from r3jax.study import runs
from r3jax.study import study_report
from tests import tiny
from tests.evaluation import fakes

ROOT = pathlib.Path(__file__).parents[2]
CONTEXT = summary_lib.Context(
  "an evaluation", 0, contamination.Leaked({}, True), (1e12, 2e12), 0
)
STUDY = declarations.Study(
  title="Does more help more?",
  arms=(
    declarations.Arm("plain", "as it is"),
    declarations.Arm("more", "one more round", {"reflect_rounds": 2}),
  ),
  measures=("draft", "last_round", "refinement", "judgement", "training_draft"),
  claims=(
    declarations.Claim("more raises drafts", "draft", "more", "before"),
    declarations.Claim("more beats plain", "draft", "more", "plain"),
    declarations.Claim(
      "plain is not better", "draft", "plain", "before", says="not more"
    ),
  ),
  overrides={"eval.rounds": 2},
)
# What training adds to every score.
EFFECTS = {"plain": 0.0, "more": 0.2}
SPREADS = {"plain": 0.01, "more": 0.02}


def write_evaluation(folder, effect):
  """Writes a finished evaluation whose scores are those of the fake plus an effect."""
  folder = epath.Path(folder)
  evaluation = fakes.evaluation(fakes.Sampler())
  samples = evaluation.run(None, None, folder, 0)
  changed = []
  for sample in samples:
    turns = []
    for turn in sample.turns:
      score = min(1.0, turn.score + effect)
      turns.append(dataclasses.replace(turn, score=score))
    changed.append(dataclasses.replace(sample, turns=turns))
  sample_log.drop_after(folder, None)
  sample_log.append(
    folder,
    changed,
    {t.image: np.zeros((4, 4, 3), np.uint8) for s in changed for t in s.turns},
  )
  answers = []
  for number in range(12):
    answer = labelled_questions.Answer(
      step=0,
      key=f"{number:05d}_judgement",
      image=str(number),
      tag="colors",
      prompt=f"prompt {number % 6}",
      kind="judgement",
      question="?",
      expected="stop" if number % 2 else "edit",
      answer="stop" if number % 3 or effect else "edit",
      text="",
    )
    answers.append(answer)
  jsonl.append(
    labelled_questions.path(folder), map(dataclasses.asdict, answers)
  )
  evaluation_report.conclude(folder, changed, CONTEXT, answers)


class Runner:
  """Makes finished runs in no time.

  Attributes:
    commands: All commands.
    fails_at: Number of the command that ends with code 75.
  """

  def __init__(self, fails_at=None):
    self.commands = []
    self.fails_at = fails_at

  def __call__(self, command):
    self.commands.append(list(command))
    if len(self.commands) - 1 == self.fails_at:
      return 75
    flags = dict(word.split("=", 1) for word in command if "=" in word)
    folder = pathlib.Path(flags["--workdir"])
    seed = int(flags["--config.seed"])
    arm = folder.parent.name
    write_evaluation(folder / "evaluation" / "step_000000", 0.0)
    effect = EFFECTS[arm] + SPREADS[arm] * seed
    write_evaluation(folder / "evaluation" / "step_000040", effect)
    rows = [{"step": i, "reason/score": 0.1 * i} for i in range(1, 5)]
    jsonl.append(folder / "metrics.jsonl", rows)
    summary = {"seconds": {"median iteration": 2.0}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return 0


def make_plan(folder, num_seeds=2, study=STUDY, **overrides):
  return runs.Plan(
    study=study,
    folder=epath.Path(folder),
    config_name="r3_geneval:shapes",
    overrides=overrides,
    seeds=range(num_seeds),
  )


@pytest.fixture(name="study", scope="module")
def fixture_study(tmp_path_factory):
  """A plan whose runs have finished, its runs, results and Markdown."""
  plan = make_plan(tmp_path_factory.mktemp("study"), 3)
  for _ in runs.run_missing(plan, Runner()):
    pass
  finished_runs = runs.read_finished(plan)
  results = results_lib.compute(plan, finished_runs)
  text = study_report.write(plan, finished_runs, results)
  return plan, finished_runs, results, text


class TestRuns:
  def test_commands_are_ordinary_ones_seed_by_seed(self, tmp_path):
    runner = Runner()
    plan = make_plan(tmp_path, total_steps=7)
    for _ in runs.run_missing(plan, runner):
      pass
    assert [command[1:4] for command in runner.commands] == [
      ["-m", "r3jax", "train"]
    ] * 4
    first, second, third, _ = runner.commands
    assert first[4:] == [
      "--config=r3_geneval:shapes",
      f"--workdir={tmp_path}/runs/plain/seed_0",
      "--config.total_steps=7",
      "--config.eval.rounds=2",
      "--config.seed=0",
    ]
    assert "--config.reflect_rounds=2" in second
    assert "--config.seed=1" in third

  def test_finished_runs_are_not_repeated_and_a_cut_one_is(self, tmp_path):
    cut = Runner(fails_at=2)
    plan = make_plan(tmp_path)
    with pytest.raises(runs.Failed, match="the same command continues") as end:
      for _ in runs.run_missing(plan, cut):
        pass
    assert end.value.code == 75
    again = Runner()
    for _ in runs.run_missing(plan, again):
      pass
    assert [command[5] for command in again.commands] == [
      f"--workdir={tmp_path}/runs/plain/seed_1",
      f"--workdir={tmp_path}/runs/more/seed_1",
    ]

  def test_a_value_that_cannot_be_names_the_arm(self, tmp_path):
    arm = declarations.Arm("bad", "", {"pool.perfect": 2.0})
    plan = make_plan(tmp_path)
    with pytest.raises(ValueError, match="arm 'bad': pool.perfect must be"):
      plan.config(arm)

  def test_equal_operations_scale_the_iterations(self, tmp_path):
    plan = make_plan(tmp_path, study=declarations.STUDIES["tree"])
    tree, samples, flops = plan.study.arms
    assert runs.computed_overrides(plan, samples) == {}
    steps = runs.computed_overrides(plan, flops)["total_steps"]
    ratio = runs.operations(plan.config(tree)) / runs.operations(
      plan.config(flops)
    )
    assert steps == round(40 * ratio) and 10 < steps < 40

  def test_an_arm_may_train_on_some_tags(self, tmp_path):
    plan = make_plan(tmp_path, study=declarations.STUDIES["transfer"])
    arm = plan.study.arms[0]
    path = runs.computed_overrides(plan, arm)["data.train"]
    lines = pathlib.Path(path).read_text().splitlines()
    assert {json.loads(line)["tag"] for line in lines} == {"counting"}

  def test_the_users_keys_are_those_that_differ(self):
    config = tiny.make_config(pathlib.Path("m"), {"reason.interval": (0.5, 1)})
    keys = runs.overrides_of(config, "r3_geneval:shapes")
    assert keys["reason.interval"] == (0.5, 1.0)
    assert keys["model.folder"] == "m" and "reason.eta" not in keys


class TestDeclarations:
  @pytest.mark.parametrize("name", declarations.STUDIES)
  def test_arms_and_measures_exist(self, name, tmp_path):
    study = declarations.STUDIES[name]
    plan = make_plan(tmp_path, study=study)
    for arm in study.arms:
      plan.config(arm)
      assert re.fullmatch(r"[\w-]+", arm.name)
    used = {*study.measures, *(claim.measure for claim in study.claims)}
    assert used <= set(measures.MEASURES)


class TestResults:
  def test_cells_have_means_by_seed_and_over_seeds(self, study):
    _, _, results, _ = study
    cells = results.cells["draft"]
    before = cells["before"].estimate.mean
    assert cells["plain"].by_seed[0] == pytest.approx(before)
    assert cells["plain"].by_seed[2] == pytest.approx(before + 0.02)
    assert cells["more"].estimate.mean == pytest.approx(before + 0.22)
    assert results.cells["training_draft"]["plain"].by_seed[1] == 0.4
    assert "before" not in results.cells["training_draft"]
    # Three runs of four iterations of two seconds, of two arms.
    assert results.hours == pytest.approx(2 * 3 * 4 * 2 / 3600)

  def test_judgement_is_that_of_the_labelled_images(self, study):
    _, finished_runs, results, _ = study
    cell = results.cells["judgement"]["before"]
    numbers = finished_runs[0].before.summary.labelled["judgement"]
    assert cell.estimate.mean == pytest.approx(numbers.accuracy.mean)

  def test_verdicts(self, study):
    _, _, results, _ = study
    verdicts = [verdict.verdict for verdict in results.verdicts]
    assert verdicts[:2] == ["held", "held"]
    assert results.verdicts[1].difference.mean == pytest.approx(0.21)
    assert results.verdicts[1].num_seeds == 3

  def test_a_study_without_runs_decides_nothing(self, tmp_path):
    plan = make_plan(tmp_path)
    results = results_lib.compute(plan, [])
    text = study_report.write(plan, [], results)
    assert {x.verdict for x in results.verdicts} == {"undecided"}
    assert "0 of 4 runs have finished" in text


class Links(html.parser.HTMLParser):
  """Collects the addresses and anchors of a page."""

  def __init__(self):
    super().__init__()
    self.addresses = []
    self.anchors = set()

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self.anchors.add(values.get("id"))
    if tag in ("a", "img"):
      self.addresses.append(values.get("href") or values["src"])


class TestReport:
  def test_files_are_complete(self, study):
    plan, _, _, text = study
    assert (plan.folder / "study.md").read_text() == text
    for name in ("verdicts", "arms", "seeds"):
      assert (plan.folder / "tables" / f"{name}.csv").exists()
    for name in ("arms", "rounds", "training"):
      assert (plan.folder / "plots" / f"{name}.png").exists()
    values = json.loads(
      (plan.folder / "study.json").read_text(), parse_constant=pytest.fail
    )
    assert values["verdicts"][0]["verdict"] == "held"
    assert values["num_runs"] == [6, 6]
    assert "| more raises drafts | held | draft: more - before > 0 |" in text

  def test_a_cell_leads_to_runs_and_these_to_pictures(self, study):
    plan, _, _, _ = study
    links = Links()
    links.feed((plan.folder / "index.html").read_text())
    files = 0
    for address in links.addresses:
      if address.startswith("#"):
        assert address[1:] in links.anchors
        continue
      path = plan.folder / urllib.parse.unquote(address)
      # The fake writes no report of training.
      if path.parent.name != "report":
        assert path.exists(), address
        files += 1
    assert "#arm-more" in links.addresses and files > 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tiny_study_is_run_and_resumed_by_its_command(tiny_model, tmp_path):
  """Two arms of two iterations with a random model; the second start repeats nothing."""
  changes = tiny.settings(tiny_model) | {
    "total_steps": 2,
    "eval.labelled_images": "",
    "step.quick_compile": True,
  }
  command = [
    sys.executable,
    "launch/study.py",
    "defects",
    "--config=configs/r3_geneval.py:shapes",
    f"--workdir={tmp_path / 'study'}",
    "--seeds=1",
    *(f"--config.{key}={value}" for key, value in changes.items()),
  ]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  outputs = []
  for _ in range(2):
    done = subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs.append(done.stdout)
    assert "2 of 2 runs have finished" in done.stdout
  assert outputs[0] == outputs[1]
  for arm in ("ours", "reference"):
    assert (tmp_path / "study" / "runs" / arm / "seed_0").is_dir()
