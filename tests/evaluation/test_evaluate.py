"""Tests of evaluation/evaluate.py and of what an evaluation writes: samples, resuming, files."""

import dataclasses
import json

from etils import epath
import numpy as np
import pytest

from r3jax.data import contamination
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table
from r3jax.evaluation import summary as summary_lib
from r3jax.parallel import multihost
from r3jax.report import evaluation_report
from tests.evaluation import fakes

CONTEXT = summary_lib.Context(
  "an evaluation",
  40,
  contamination.Leaked({"counting": 0}, True),
  (1e12, 2e12),
  0,
)


def run(folder, sampler: fakes.Sampler, **settings) -> list[sample_log.Sample]:
  return fakes.evaluation(sampler, **settings).run(
    None, None, epath.Path(folder), 40
  )


def without_seconds(
  samples: list[sample_log.Sample],
) -> list[sample_log.Sample]:
  return [
    dataclasses.replace(
      sample,
      turns=[dataclasses.replace(turn, seconds=0) for turn in sample.turns],
    )
    for sample in samples
  ]


@pytest.fixture(name="whole", scope="module")
def fixture_whole(tmp_path_factory):
  return run(tmp_path_factory.mktemp("whole"), fakes.Sampler())


class TestRun:
  def test_samples_come_prompt_by_prompt_with_what_was_drawn(self, whole):
    assert [sample.key for sample in whole] == [
      f"{i:05d}_{j:02d}" for i in range(10) for j in range(2)
    ]
    first, second = whole[4], whole[5]  # prompt 2, images 0 and 1
    assert [turn.score for turn in first.turns] == [0.5, 0.5]  # stops
    assert [turn.chain_score for turn in first.turns] == [0.5, 0.75]
    assert [turn.image for turn in first.turns] == ["images/00002_00_0.png"] * 2
    assert [turn.score for turn in second.turns] == [0.5, 0.75]
    assert [turn.image for turn in second.turns] == [
      "images/00002_01_0.png",
      "images/00002_01_1.png",
    ]
    assert (
      second.turns[1].instruction == "remove the smudge at top"
      and not second.turns[0].instruction
    )
    # of a batch by its images
    assert [turn.seconds for turn in first.turns] == [0.5, 1.0]
    answer, about_last = first.answers
    assert about_last.kind == "match, last image"
    assert (answer.kind, answer.expected, answer.answer) == (
      "match",
      "no",
      "no",
    )
    assert fakes.RECORDS[2].text in answer.question

  @pytest.mark.parametrize("batch_size", [1, 7, 32])
  def test_batches_change_nothing(self, whole, tmp_path, batch_size):
    assert without_seconds(
      run(tmp_path, fakes.Sampler(batch_size))
    ) == without_seconds(whole)

  def test_goes_on_without_drawing_anything_again(self, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path, fakes.Sampler(fails_at=3))
    with (tmp_path / "samples.jsonl").open("a") as file:
      file.write('{"step": 40, "key": "0000')  # killed while writing
    before = {
      path.name: path.stat().st_mtime_ns
      for path in (tmp_path / "images").iterdir()
    }
    again = fakes.Sampler(4)
    assert without_seconds(run(tmp_path, again)) == without_seconds(whole)
    assert again.calls == [
      [[4, 1], [5, 0], [5, 1], [6, 0]],
      [[6, 1], [7, 0], [7, 1], [8, 0]],
      [[8, 1], [9, 0], [9, 1], [9, 1]],
    ]
    assert before == {
      name: (tmp_path / "images" / name).stat().st_mtime_ns for name in before
    }
    lines = [
      json.loads(line)["key"]
      for line in (tmp_path / "samples.jsonl").read_text().splitlines()
    ]
    assert lines == [sample.key for sample in whole]

  def test_what_has_no_score_is_tried_again(self, whole, tmp_path):
    lacking = run(tmp_path, fakes.Sampler(missing=(3, 1)))
    assert lacking[7].turns[0].score is None and lacking[7].answers == ()
    assert sample_table.of_samples(lacking).missing == 2 / 40
    again = fakes.Sampler(1)
    assert without_seconds(run(tmp_path, again)) == without_seconds(whole)
    assert again.calls == [[[3, 1]]]

  def test_failure_behind_a_stop_discards_nothing(self, whole, tmp_path):
    lacking = run(tmp_path, fakes.Sampler(missing_behind_stop=(2, 0)))
    scores = [turn.chain_score for turn in lacking[4].turns]
    assert lacking[4].turns[1].stop and scores == [0.5, None]
    table = sample_table.of_samples(lacking)
    assert table.missing == 0
    assert table.never_stops
    # That chain alone is left out where ways of stopping are compared.
    stops = summary_lib.summarize(lacking, CONTEXT).stops.score
    own, never = stops["its own stops"], stops["never stopped"]
    assert own is not None and never is not None
    again = fakes.Sampler()
    run(tmp_path, again)
    assert again.calls == []

  def test_chains_end_with_their_stop_unless_asked(self, whole, tmp_path):
    ending = run(tmp_path, fakes.Sampler(never_stop=False))
    for sample, endless in zip(ending, whole, strict=True):
      for turn, other in zip(sample.turns, endless.turns, strict=True):
        assert turn.score == other.score
        assert turn.image == other.image
        assert turn.chain_score == (None if turn.stop else other.score)
        assert turn.chain_text is None
    stops = summary_lib.summarize(ending, CONTEXT).stops.score
    assert set(stops) == {"its own stops", "stopped at the draft"}
    endless_stops = summary_lib.summarize(whole, CONTEXT).stops.score
    assert stops.items() < endless_stops.items()
    # Every sample has all its scores.
    again = fakes.Sampler(never_stop=False)
    run(tmp_path, again)
    assert again.calls == []

  def test_other_settings_begin_anew(self, tmp_path):
    run(tmp_path, fakes.Sampler())
    again = fakes.Sampler()
    run(tmp_path, again, points=5)
    assert len(again.calls) == 7
    assert len(sample_log.read(tmp_path)) == 20

  def test_other_spelling_of_the_source_of_the_same_prompts_goes_on(
    self, tmp_path
  ):
    first, moved, other = (
      {"source": source, "sha256": digest}
      for source, digest in (("a", "1"), ("./a", "1"), ("a", "2"))
    )
    run(tmp_path, fakes.Sampler(), heldout=first)
    again = fakes.Sampler()
    run(tmp_path, again, heldout=moved)
    assert again.calls == []
    run(tmp_path, again, heldout=other)
    assert len(again.calls) == 7

  def test_what_another_process_has_not_read_is_drawn_again(
    self, tmp_path, monkeypatch
  ):
    run(tmp_path, fakes.Sampler())
    texts = []

    def exchange(text):
      texts.append(text)
      return [text, json.dumps(json.loads(text)[:12])]

    monkeypatch.setattr(multihost, "exchange", exchange)
    again = fakes.Sampler()
    run(tmp_path, again)
    assert len(json.loads(texts[0])) == 20
    # As the process that has read 12 of the 20 samples draws them.
    assert len(again.calls) == 3
    assert len(sample_log.read_evaluated(epath.Path(tmp_path))) == 20

  def test_images_are_what_was_drawn(self, tmp_path):
    run(tmp_path, fakes.Sampler())
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert len(names) == 20 + 10  # no second file where nothing was edited
    from PIL import Image

    assert np.unique(
      Image.open(tmp_path / "images" / "00002_01_1.png")
    ).tolist() == [31]


class TestConclude:
  def test_files_and_numbers(self, tmp_path):
    folder, evaluation = epath.Path(tmp_path), fakes.evaluation(fakes.Sampler())
    samples = evaluation.run(None, None, folder, 40)
    assert evaluation.finished(folder) is None
    evaluation_report.conclude(folder, samples, CONTEXT)
    assert evaluation.finished(folder) == samples
    names = {
      str(path.relative_to(folder))
      for path in tmp_path.rglob("*")
      if path.suffix != ".png"
    } - {"images", "tables"}
    tables = {
      f"tables/{name}.csv"
      for name in (
        "rounds",
        "tags",
        "correct",
        "lengths",
        "stops",
        "stop_policies",
        "understanding",
      )
    }
    assert (
      names
      == {
        "samples.jsonl",
        "settings.json",
        "summary.json",
        "tables.md",
        "index.html",
      }
      | tables
    )
    summary = json.loads(
      (folder / "summary.json").read_text(), parse_constant=pytest.fail
    )
    assert (summary["images"], summary["prompts"], summary["iteration"]) == (
      20,
      10,
      40,
    )
    assert [one["tflops"] for one in summary["rounds"]] == [1, 2]
    assert [one["seconds"] for one in summary["rounds"]] == [0.5, 1]
    assert summary["understanding"]["match"]["questions"] == 20
    assert sum(summary["images_by_tag"].values()) == 20
    typed = summary_lib.Summary.from_json(summary)
    assert typed == summary_lib.summarize(samples, CONTEXT)
    assert typed.to_json() == summary_lib.summarize(samples, CONTEXT).to_json()

  def test_correct_images_are_reported_by_tag(self, tmp_path):
    folder = epath.Path(tmp_path)
    samples = fakes.evaluation(fakes.Sampler()).run(None, None, folder, 40)
    summary = evaluation_report.conclude(folder, samples, CONTEXT)
    # Prompts 2, 5, 8 begin at .5; their image 1 or 0 is edited, and reaches .75.
    assert summary.correct["all tags"][0].mean == 0
    assert 0 < summary.correct["all tags"][1].mean < 1
    assert summary.correct.keys() == {"all tags", *summary.tags}
    values = json.loads((folder / "summary.json").read_text())
    mean, _, _ = values["correct"]["all tags"][1]
    row = f"| all tags | 20 | 0.000 [0.000, 0.000] | {mean:.3f} ["
    assert "GenEval's score" in evaluation_report.console_text(summary)
    assert row in evaluation_report.console_text(summary)
    assert row in (folder / "tables.md").read_text()
    assert "GenEval&#39;s score" in (folder / "index.html").read_text()
    chart, _ = evaluation_report.charts(summary)
    assert [series.label for series in chart.series] == ["all tags", "correct"]
    lines = (folder / "tables" / "correct.csv").read_text().splitlines()
    assert lines[1].startswith("all tags,20,0.0,0.0,0.0,")

  def test_not_finished_where_another_process_has_not_read_all(
    self, tmp_path, monkeypatch
  ):
    folder, evaluation = epath.Path(tmp_path), fakes.evaluation(fakes.Sampler())
    samples = evaluation.run(None, None, folder, 40)
    evaluation_report.conclude(folder, samples, CONTEXT)
    monkeypatch.setattr(multihost, "exchange", lambda text: [text, "[]"])
    assert evaluation.finished(folder) is None

  def test_another_evaluation_in_the_folder_is_not_finished(self, tmp_path):
    folder, evaluation = epath.Path(tmp_path), fakes.evaluation(fakes.Sampler())
    evaluation_report.conclude(
      folder, evaluation.run(None, None, folder, 40), CONTEXT
    )
    other = fakes.evaluation(fakes.Sampler(), points=5)
    assert other.finished(folder) is None
    with pytest.raises(KeyboardInterrupt):
      run(folder, fakes.Sampler(fails_at=1), points=5)
    # it was of the other settings
    assert not (folder / "summary.json").exists()

  @pytest.mark.parametrize(
    "leaked, said",
    [
      (contamination.Leaked({"a": 0}, False), ["is not known in full"]),
      (
        contamination.Leaked({"a": 0, "b": 2, "c": 1}, True),
        [
          "CONTAMINATED: the model was trained on 3 of these prompts (b 2, c 1)."
        ],
      ),
      (
        contamination.Leaked({"b": 1}, False),
        ["CONTAMINATED: the model was trained on 1", "is not known in full"],
      ),
    ],
  )
  def test_what_was_trained_on_stands_beside_the_numbers(
    self, tmp_path, leaked, said
  ):
    folder, evaluation = epath.Path(tmp_path), fakes.evaluation(fakes.Sampler())
    context = summary_lib.Context("an evaluation", 0, leaked, (1.0, 1.0), 0)
    summary = evaluation_report.conclude(
      folder, evaluation.run(None, None, folder, 0), context
    )
    for part, note in zip(said, summary.notes(), strict=True):
      assert (
        part in note
        and note in (folder / "tables.md").read_text()
        and note in (folder / "index.html").read_text()
      )

  def test_clean_model_has_no_note(self, tmp_path):
    folder, evaluation = epath.Path(tmp_path), fakes.evaluation(fakes.Sampler())
    samples = evaluation.run(None, None, folder, 0)
    assert evaluation_report.conclude(folder, samples, CONTEXT).notes() == []
