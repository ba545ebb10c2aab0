"""Evaluation: the R3 loop at inference on fixed prompts (R3.md section 9).

The draft and then `rounds - 1` reflect-refine rounds, by ODE; a sample that says "no further edit"
is finished and keeps its image and score. Noise comes from (seed, prompt, image, round), so results
do not depend on the batch size or the number of devices.
"""

from collections.abc import Iterator
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import statistics
from r3jax import types
from r3jax.parallel import multihost
from r3jax.rl import placement
from r3jax.rl import rollout as rollout_lib
from r3jax.rl import settings as settings_lib
from r3jax.rl import step as step_lib


@flax.struct.dataclass
class Round:
  """One round of a batch; leaves are [B, ...]."""

  images: types.Images
  score: jax.Array
  valid: jax.Array
  parts: dict[str, jax.Array]  # of the reward
  format: jax.Array
  stop: jax.Array  # finished in this round or before; False for drafts
  text: rollout_lib.Text


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Compiled rounds on a mesh.

  Attributes:
    modules: the model.
    settings: how to sample (see `experiment.evaluation_settings`).
    reward, parse: as in `rl.step.Iteration`.
    mesh: rows are split over its `data` axis.
    rounds: images in a chain, the draft included.
    batch_size: rows per call.
    seed: of all noise.
  """

  modules: settings_lib.Modules
  settings: settings_lib.Settings
  reward: step_lib.Reward
  parse: step_lib.Parse
  mesh: jax.sharding.Mesh
  rounds: int
  batch_size: int
  seed: int

  def __post_init__(self):
    for name in ("rounds", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"eval.{name} must be at least 1; got {getattr(self, name)}")
    replicas = self.mesh.shape[placement.AXIS]
    if self.batch_size % replicas:
      raise ValueError(
          f"eval.batch_size ({self.batch_size}) must be divisible by the number of data replicas ({replicas})"
      )
    one, many = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(placement.AXIS)
    compiled = lambda function, rows: jax.jit(
        jax.shard_map(
            function, mesh=self.mesh, in_specs=(one, one) + (many,) * rows, out_specs=many,
            axis_names={placement.AXIS}, check_vma=False,
        )
    )
    object.__setattr__(self, "draft", compiled(self._draft, 2))
    object.__setattr__(self, "revise", compiled(self._revise, 3))

  def _keys(self, ids: jax.Array) -> rollout_lib.Keys:
    """Returns the keys of rows; ids are [B, 3] (prompt, image, round)."""
    return rollout_lib.numbered_keys(self.seed, ids)

  def _actor(self, policy, towers) -> rollout_lib.Actor:
    return rollout_lib.sampler(self.modules, policy, towers, self.settings)

  def _draft(self, policy, towers, prompts: rollout_lib.Prompts, ids) -> Round:
    made = rollout_lib.reason(self._actor(policy, towers), prompts, self._keys(ids))
    parsed = self.parse(made.text.ids, made.text.lengths, "reason")
    score = self.reward(made.images, prompts.target)
    stop = jnp.zeros_like(score.valid)
    return Round(made.images, score.value, score.valid, score.parts, parsed.format, stop, made.text)

  def _revise(self, policy, towers, prompts: rollout_lib.Prompts, ids, last: Round) -> Round:
    actor = self._actor(policy, towers)
    reflect_keys, refine_keys = rollout_lib.split_keys(self._keys(ids))
    source = rollout_lib.look(actor, last.images)
    text = rollout_lib.reflect(actor, prompts, source, reflect_keys)
    parsed = self.parse(text.ids, text.lengths, "reflect")
    stop = parsed.stop | last.stop
    told = rollout_lib.Instruction(parsed.instruction, parsed.instruction_length, stop)
    refined = rollout_lib.refine(actor, source, told, refine_keys)
    score = self.reward(refined.images, prompts.target)
    keep = lambda old, new: jnp.where(stop, old, new)
    return Round(
        refined.images, keep(last.score, score.value), keep(last.valid, score.valid),
        jax.tree.map(keep, last.parts, score.parts), parsed.format, stop, text,
    )

  def run(self, policy, towers, prompts: rollout_lib.Prompts, images_per_prompt: int) -> list[Round]:
    """Evaluates every prompt; returns one numpy `Round` per round, rows prompt by prompt."""
    number = prompts.index.shape[0] * images_per_prompt
    batches = [self._batch(policy, towers, prompts, rows) for rows in self._rows(prompts, images_per_prompt)]
    joined = [jax.tree.map(lambda *leaves: np.concatenate(leaves)[:number], *rounds) for rounds in zip(*batches)]
    return joined

  def _rows(self, prompts: rollout_lib.Prompts, images: int) -> Iterator[np.ndarray]:
    """Yields [batch_size, 2] of (row of the prompt, image); the last batch repeats its last row."""
    rows = np.stack(np.meshgrid(np.arange(prompts.index.shape[0]), np.arange(images), indexing="ij"), -1)
    rows = rows.reshape(-1, 2).astype(np.int32)
    for start in range(0, len(rows), self.batch_size):
      batch = rows[start : start + self.batch_size]
      missing = self.batch_size - len(batch)
      yield np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])

  def _batch(self, policy, towers, prompts: rollout_lib.Prompts, rows: np.ndarray) -> list[Round]:
    taken = jax.tree.map(lambda x: x[rows[:, 0]], prompts)
    ids = lambda turn: np.stack([taken.index, rows[:, 1], np.full_like(rows[:, 1], turn)], axis=1)
    found = [self.draft(policy, towers, taken, ids(0))]
    for turn in range(1, self.rounds):
      found.append(self.revise(policy, towers, taken, ids(turn), found[-1]))
    return [multihost.fetch(one) for one in found]


@dataclasses.dataclass(frozen=True)
class Result:
  """What an evaluation found, per image."""

  tags: list[str]  # [n]
  prompts: list[str]  # [n]
  score: np.ndarray  # [rounds, n]; NaN where the reward is missing
  parts: dict[str, np.ndarray]  # name -> [rounds, n]; likewise
  stop: np.ndarray  # [rounds, n] bool
  format: np.ndarray  # [rounds, n]

  @property
  def missing(self) -> float:
    """Share of the images of all rounds that have no score."""
    return float(np.isnan(self.score).mean())

  def to_json(self) -> dict:
    """Returns plain lists; what is missing becomes None, for JSON has no NaN."""
    plain = lambda x: np.where(np.isfinite(x), x.astype(object), None).tolist()
    rounds = {name: plain(getattr(self, name)) for name in ("score", "stop", "format")}
    parts = {name: plain(values) for name, values in self.parts.items()}
    return {"tags": self.tags, "prompts": self.prompts, "parts": parts} | rounds

  @classmethod
  def from_json(cls, obj: dict) -> "Result":
    """Undoes `to_json`."""
    parts = {name: np.array(values, float) for name, values in obj["parts"].items()}
    score, stop, format_ = (np.array(obj[name], kind) for name, kind in (("score", float), ("stop", bool), ("format", float)))
    return cls(obj["tags"], obj["prompts"], score, parts, stop, format_)

  def design(self, images: np.ndarray) -> statistics.Design:
    """Returns how the given images (their numbers) were drawn: prompts, tag by tag."""
    return statistics.Design(*([labels[i] for i in images] for labels in (self.prompts, self.tags)))


def result(rounds: list[Round], tags: list[str], prompts: list[str]) -> Result:
  """Collects what the rounds found; `tags` and `prompts` have one entry per image."""
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(one.replace(images=None, text=None) for one in rounds))
  known = lambda values: np.where(stacked.valid, values, np.nan)
  score, parts = known(stacked.score), {name: known(values) for name, values in stacked.parts.items()}
  return Result(tags, prompts, score, parts, stacked.stop, stacked.format)


def behaviour(found: Result) -> dict[str, float]:
  """Returns how the chain edits and stops, over all reflect-refine rounds.

  edit_rate: edits per round in which a sample was not finished. stop_when_right / stop_when_wrong:
  share of those rounds that stop when the image is perfect / is not. improvement: mean change of
  the score by an edit. Rounds without a score count in none of the shares that need one.
  """
  open_before = ~found.stop[:-1]
  stopped = found.stop[1:] & open_before
  edited = ~found.stop[1:]
  before, change = found.score[:-1], np.diff(found.score, axis=0)
  judged = edited & np.isfinite(change)
  right, wrong = open_before & (before == 1), open_before & (before < 1)
  share = lambda part, whole: float(np.sum(part & whole) / max(np.sum(whole), 1))
  return {
      "edit_rate": share(edited, open_before),
      "stop_precision": share(before == 1, stopped & np.isfinite(before)),
      "stop_when_right": share(stopped, right),
      "stop_when_wrong": share(stopped, wrong),
      "improvement": float(change[judged].mean()) if judged.any() else 0.0,
      "improved": share(change > 0, judged),
      "worse": share(change < 0, judged),
      "finished": float(found.stop[-1].mean()),
  }


def _views(found: Result) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns name -> (a value per image, the numbers of the images in the view)."""
  tags, every = np.asarray(found.tags), np.arange(len(found.tags))
  rounds = {"draft": 0, "last round": -1}
  views = {name: (found.score[i], every) for name, i in rounds.items()}
  views |= {f"{name}, {part}": (values[i], every) for part, values in found.parts.items() for name, i in rounds.items()}
  for tag in dict.fromkeys(found.tags):
    views |= {f"{name}, {tag}": (found.score[i], every[tags == tag]) for name, i in rounds.items()}
  return views


def compare(before: Result, after: Result, seed: int) -> dict[str, dict[str, list[float]]]:
  """Returns scores before and after with 95 % bootstrap intervals, and of the paired difference.

  Views without any image that has both scores are left out.
  """
  compared = {}
  old, new = _views(before), _views(after)
  for name, (values, images) in old.items():
    known = images[np.isfinite(values[images]) & np.isfinite(new[name][0][images])]
    if not known.size:
      continue
    a, b, design = values[known], new[name][0][known], before.design(known)
    compared[name] = {
        "before": list(statistics.bootstrap_mean(a, seed, design)),
        "after": list(statistics.bootstrap_mean(b, seed, design)),
        "difference": list(statistics.bootstrap_difference(a, b, seed, design)),
    }
  return compared


def refinement(found: Result, seed: int) -> list[float] | None:
  """Returns the last round's score minus the draft's, with its 95 % interval; None without scores."""
  known = np.flatnonzero(np.isfinite(found.score[0]) & np.isfinite(found.score[-1]))
  if not known.size:
    return None
  draft, last = found.score[0][known], found.score[-1][known]
  return list(statistics.bootstrap_difference(draft, last, seed, found.design(known)))
