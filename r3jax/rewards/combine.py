"""Rewards of the compiled step, and how they are combined."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import re

from etils import epath
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.data import records
from r3jax.files import jsonl
from r3jax.parallel import multihost
from r3jax.rewards.from_host import scorer
from r3jax.worlds import base

# Part of a score: the share of an image that shows something which cannot be read.
CLUTTER = "clutter"


@dataclasses.dataclass(frozen=True)
class GraphReward:
  """A reward of the step.

  Attributes:
    encode: returns the target rows of prompts, a pytree of numpy arrays [n, ...].
    on: returns the scoring function on a mesh.
    parts: names of the parts of its scores, "strict" among them.
    scorers: its members that call Python on the host, by name.
  """

  encode: Callable[[Sequence[records.Prompt]], object]
  on: Callable[[jax.sharding.Mesh], types.Scoring]
  parts: tuple[str, ...]
  scorers: Mapping[str, scorer.Scorer] = dataclasses.field(default_factory=dict)

  def describe(self) -> dict:
    """Returns the identity of what scores on the host, by name, as JSON values."""
    return {name: member.describe() for name, member in self.scorers.items()}

  def log_to(self, folder: epath.Path, restored_step: int) -> None:
    """Logs every image's outcome to folder/NAME.PROCESS.jsonl; lines after a step are dropped."""
    if not jax.process_index():
      _drop_lines_of_former_processes(folder, restored_step)
    for name, member in self.scorers.items():
      member.log_to(_log_path(folder, name), restored_step)

  @contextlib.contextmanager
  def logging_to(self, folder: epath.Path) -> Iterator[None]:
    """Appends the outcomes to files of another folder while the context is open."""
    with contextlib.ExitStack() as stack:
      for name, member in self.scorers.items():
        stack.enter_context(member.logging_to(_log_path(folder, name)))
      yield

  def begin(self, step: int) -> None:
    """Sets the iteration of the lines that are logged next."""
    for member in self.scorers.values():
      member.step = step

  def raise_together(self) -> None:
    """Writes the logs, and raises on every process the error of a scorer on one of them.

    See `scorer.Scorer`, which stores the errors.
    """
    for member in self.scorers.values():
      member.flush()
    # Without scorers nothing can have failed, and the processes need not wait for each other.
    if not self.scorers:
      return
    errors = [member.error for member in self.scorers.values() if member.error]
    multihost.raise_together(errors[0] if errors else None)

  def failure(self) -> str:
    """Returns why an image had no score at the last `raise_together`, on this process; or ""."""
    for name, member in self.scorers.items():
      if member.failure:
        return f"{name}: {member.failure}"
    return ""

  def metrics(self) -> dict[str, float]:
    """Returns this process's numbers about its calls since the last time, "service/NAME/..."."""
    metrics = {}
    for name, member in self.scorers.items():
      for key, value in member.metrics().items():
        metrics[f"service/{name}/{key}"] = value
    return metrics


def _log_path(folder: epath.Path, name: str) -> epath.Path:
  """Returns the file of a scorer on this process."""
  return folder / f"{name.replace('/', '.')}.{jax.process_index()}.jsonl"


def _drop_lines_of_former_processes(
  folder: epath.Path, restored_step: int
) -> None:
  """Drops lines after a step from the logs of processes that no longer exist."""
  if not folder.exists():
    return
  # In a bucket a log is a folder of parts.
  names = {path.name.removesuffix(".parts") for path in folder.iterdir()}
  for name in names:
    # Another name is not ours: ".DS_Store", "judge.1 (copy).jsonl".
    log = re.fullmatch(r"[^.].*\.(\d+)\.jsonl", name)
    if log and int(log[1]) >= jax.process_count():
      jsonl.drop_after(folder / name, restored_step)


def of_world(world: base.World) -> GraphReward:
  """Returns the exact verifier of a world, which runs in the graph."""

  def on(mesh: jax.sharding.Mesh) -> types.Scoring:
    del mesh  # every image is verified on its own device

    def score(images: types.Images, target, needed=None) -> types.Score:
      del needed  # a score in the graph costs nothing
      return world.verify(images, target)

    return score

  return GraphReward(world.encode, on, world.parts)


def on_host(name: str, member: scorer.Scorer) -> GraphReward:
  """Returns a reward that Python computes."""
  return GraphReward(member.encode, member.on, member.parts, {name: member})


@dataclasses.dataclass(frozen=True)
class Weighted:
  """A member of a weighted sum.

  Attributes:
    weight: above 0.
    reward: the member.
  """

  weight: float
  reward: GraphReward


def weighted_sum(members: Mapping[str, Weighted]) -> GraphReward:
  """Returns the reward Σ w_i r_i / Σ w_i.

  A sample that one member cannot score has no score at all: otherwise its score would be lower only
  for what is missing. Parts are "NAME" (the member's own score) and "NAME/PART"; "strict" is the
  least of the members' strict parts.

  Args:
    members: the members by name.

  Raises:
    ValueError: there are no members, a name cannot be used, or a weight is not above 0.
  """
  if not members:
    raise ValueError("reward.members must name at least one reward")
  for name, member in members.items():
    if name == "strict" or "/" in name:
      raise ValueError(
        f"a name in reward.members must hold no slash and not be 'strict'; got {name!r}"
      )
    if not member.weight > 0:
      raise ValueError(
        f"reward.members.{name}.weight must be above 0; got {member.weight}"
      )
  total = sum(member.weight for member in members.values())
  weights = {name: member.weight / total for name, member in members.items()}

  def encode(prompts: Sequence[records.Prompt]) -> dict[str, object]:
    return {
      name: member.reward.encode(prompts) for name, member in members.items()
    }

  def on(mesh: jax.sharding.Mesh) -> types.Scoring:
    scoring = {name: member.reward.on(mesh) for name, member in members.items()}

    def score(images: types.Images, target, needed=None) -> types.Score:
      scores = {
        name: score_member(images, target[name], needed)
        for name, score_member in scoring.items()
      }
      return _combined(scores, weights)

    return score

  parts = ["strict", *members]
  scorers = {}
  for name, member in members.items():
    parts += [f"{name}/{part}" for part in member.reward.parts]
    for inner_name, inner_scorer in member.reward.scorers.items():
      scorers[f"{name}/{inner_name}"] = inner_scorer
  return GraphReward(encode, on, tuple(parts), scorers)


def _combined(
  scores: Mapping[str, types.Score], weights: Mapping[str, float]
) -> types.Score:
  """Returns the weighted mean of the members' scores [B]."""
  value = sum(weights[name] * score.value for name, score in scores.items())
  # A member without a score makes the sum NaN; `valid` says so.
  valid = functools.reduce(
    jnp.logical_and, [score.valid for score in scores.values()]
  )
  strict = functools.reduce(
    jnp.minimum, [score.parts["strict"] for score in scores.values()]
  )
  parts = {name: score.value for name, score in scores.items()}
  for name, score in scores.items():
    for part, part_value in score.parts.items():
      parts[f"{name}/{part}"] = part_value
  # Weights that add up to 1 only up to rounding would make a perfect image imperfect.
  perfect = functools.reduce(
    jnp.logical_and, [score.value == 1 for score in scores.values()]
  )
  return types.Score(
    value=jnp.where(perfect, 1.0, value),
    valid=valid,
    parts=parts | {"strict": strict},
  )


def lowered_by_clutter(reward: GraphReward, weight: float) -> GraphReward:
  """Returns the same reward with the value r / (1 + weight * clutter).

  Args:
    reward: has the part "clutter", the share of an image that shows nothing which can be read.
    weight: from 0; 0 leaves the reward as it is.

  Raises:
    ValueError: the weight is below 0, or the reward has no such part.
  """
  if weight == 0:
    return reward
  if not weight > 0:
    raise ValueError(f"reward.clutter_weight must be at least 0; got {weight}")
  if CLUTTER not in reward.parts:
    raise ValueError(
      f"reward.clutter_weight must be 0 where the reward has no part {CLUTTER!r}: it is {weight}, "
      f"the parts are {sorted(reward.parts)}, and a member of a sum may have its own weight"
    )

  def lowered(whole: types.Score) -> types.Score:
    return whole.replace(
      value=whole.value / (1 + weight * whole.parts[CLUTTER])
    )

  return _with_scores(reward, lowered)


def trained_by(reward: GraphReward, part: str) -> GraphReward:
  """Returns the same reward with one of its parts as the value that training uses.

  The original value becomes the part "shaped".

  Args:
    reward: has the part.
    part: its name; "score" leaves the reward as it is.

  Raises:
    ValueError: the reward has no such part.
  """
  if part == "score":
    return reward
  if part not in reward.parts:
    raise ValueError(
      f"reward.value must be 'score' or one of {sorted(reward.parts)}; got {part!r}"
    )

  def replaced(shaped: types.Score) -> types.Score:
    return shaped.replace(
      value=shaped.parts[part],
      parts=shaped.parts | {"shaped": shaped.value},
    )

  changed = _with_scores(reward, replaced)
  return dataclasses.replace(changed, parts=(*reward.parts, "shaped"))


def _with_scores(
  reward: GraphReward, change: Callable[[types.Score], types.Score]
) -> GraphReward:
  """Returns the same reward with every score changed in the graph."""

  def on(mesh: jax.sharding.Mesh) -> types.Scoring:
    scoring = reward.on(mesh)

    def score(images: types.Images, target, needed=None) -> types.Score:
      return change(scoring(images, target, needed))

    return score

  return dataclasses.replace(reward, on=on)
