"""Runs an evaluation into a folder, and goes on with one that was interrupted."""

from collections.abc import Callable, Sequence
import dataclasses
import json

from etils import epath
import jax
import numpy as np

from r3jax.agent import experience
from r3jax.evaluation import draw
from r3jax.evaluation import questions
from r3jax.evaluation import records as records_lib
from r3jax.files import atomic
from r3jax.report import page

SETTINGS, SUMMARY = "settings.json", "summary.json"
_LAST = 2**31  # later than every iteration


def _is_scored(sample: dict) -> bool:
  return all(
    turn[name] is not None
    for turn in sample["turns"]
    for name in ("score", "chain_score")
  )


@dataclasses.dataclass(frozen=True)
class Exam:
  """What a model is examined with.

  Attributes:
    evaluator: draws and scores.
    records: prompts, see `data/prompts.py`.
    prompts: the same, encoded.
    images_per_prompt: of every prompt.
    examiner: asks about the drafts.
    segments: (texts, capacity) -> ids and lengths of text segments.
    decode: (ids [B, T], lengths [B]) -> texts.
    boxes: what the reward sees in images, if it can tell.
    flush: called after every batch, on every process: writes what the reward logs, and raises what broke it.
    flops: of a draft and of a revision of one image, texts at their longest.
    settings: JSON values; all that the results depend on beside the policy.
  """

  evaluator: draw.Evaluator
  records: Sequence[dict]
  prompts: experience.Prompts
  images_per_prompt: int
  examiner: questions.Examiner
  segments: Callable
  decode: Callable
  boxes: records_lib.Boxes | None
  flush: Callable[[], None]
  flops: tuple[float, float]
  settings: dict

  def keys(self) -> dict[str, tuple[int, int]]:
    """Returns the numbers of prompt and image of all samples, by their names."""
    rows = [
      (i, j)
      for i in range(len(self.records))
      for j in range(self.images_per_prompt)
    ]
    return {records_lib.key_of(*row): row for row in rows}

  def sit(self, policy, towers, folder: epath.Path, step: int) -> list[dict]:
    """Examines a policy on every prompt; returns the samples, prompt by prompt.

    Args:
      policy, towers: parameters on the evaluator's mesh.
      folder: gets samples.jsonl and images/. Samples that are there with all their scores are not drawn
        again, if they were drawn with the same settings.
      step: iteration of the policy, for the record.
    """
    keys, there = self.keys(), self.read(folder)
    if not jax.process_index():
      self._open(folder, keep=bool(there))
    done = {key: sample for key, sample in there.items() if _is_scored(sample)}
    rows = [row for key, row in keys.items() if key not in done]
    for batch_rows, number in draw.batches(rows, self.evaluator.batch_size):
      batch = self._draw(policy, towers, batch_rows, step)
      self.flush()
      samples, images = records_lib.of_batch(
        batch, number, self.decode, self.boxes
      )
      done |= {sample["key"]: sample for sample in samples}
      if not jax.process_index():
        page.append_samples(folder, samples, images)
    return [done[key] for key in keys]

  def read(self, folder: epath.Path) -> dict[str, dict]:
    """Returns the samples of a folder by name, the latest of each; none, if they were drawn with other settings."""
    note = folder / SETTINGS
    if not note.exists() or json.loads(note.read_text()) != self.settings:
      return {}
    return {sample["key"]: sample for sample in page.read_samples(folder)}

  def _open(self, folder: epath.Path, keep: bool):
    """Makes the folder ready for further samples; without `keep`, for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)  # of other settings
    page.drop_samples_after(folder, _LAST if keep else None)
    if not keep:
      # of other images
      said = [folder / name for name in ("judges", "rewards")]
      for path in [
        path for there in said if there.exists() for path in there.iterdir()
      ]:
        path.rmtree() if path.is_dir() else path.unlink()
      atomic.write_text(folder / SETTINGS, json.dumps(self.settings, indent=1))

  def _draw(
    self, policy, towers, rows: np.ndarray, step: int
  ) -> records_lib.Batch:
    prompts = jax.tree.map(lambda x: x[rows[:, 0]], self.prompts)
    records, images = [self.records[i] for i in rows[:, 0]], rows[:, 1]
    made = self.evaluator.run(policy, towers, prompts, images)
    drafts = made[0][0].kept
    asked = self.examiner.questions(drafts, records, rows)
    answers = {}
    for kind, questions_ in asked.items():
      texts = [one.question if one else "" for one in questions_]
      ids, lengths = self.segments(texts, self.evaluator.question_tokens)
      about = prompts.replace(question=ids, question_length=lengths)
      said = self.evaluator.ask(
        policy,
        towers,
        about,
        images,
        self.examiner.number(kind),
        drafts.images,
      )
      answers[kind] = self.decode(said.ids, said.lengths)
    return records_lib.Batch(step, rows, records, made, asked, answers)
