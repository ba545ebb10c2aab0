"""Rewards as the compiled step takes them, and how they are combined."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools

from etils import epath
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.files import jsonl
from r3jax.parallel import multihost
from r3jax.rewards.from_host import scorer as scorer_lib
from r3jax.worlds import base as worlds_base


@dataclasses.dataclass(frozen=True)
class GraphReward:
  """A reward of the step.

  Attributes:
    encode: makes the target rows of records (a pytree of numpy arrays [n, ...]).
    on: makes the scoring function from the mesh.
    parts: names of the parts of its scores, "strict" among them.
    scorers: the parts that call Python on the host, by name.
  """

  encode: Callable[[Sequence[dict]], object]
  on: Callable[[jax.sharding.Mesh], types.Scoring]
  parts: tuple[str, ...]
  scorers: Mapping[str, scorer_lib.Scorer] = dataclasses.field(
    default_factory=dict
  )

  def describe(self) -> dict:
    """Returns what scores on the host, by name, as JSON values."""
    return {name: scorer.describe() for name, scorer in self.scorers.items()}

  def log_to(self, folder: epath.Path, restored_step: int):
    """Keeps what every image got in folder/NAME.PROCESS.jsonl, without lines after a step."""
    # the run may have had more processes before
    if not jax.process_index() and folder.exists():
      for log in {
        path.name.removesuffix(".parts") for path in folder.iterdir()
      }:
        if int(log.split(".")[-2]) >= jax.process_count():
          jsonl.drop_after(folder / log, restored_step)
    for name, scorer in self.scorers.items():
      scorer.log_to(_log(folder, name), restored_step)

  @contextlib.contextmanager
  def logging_to(self, folder: epath.Path):
    """Keeps what images get meanwhile in files of another folder, behind what is there."""
    with contextlib.ExitStack() as stack:
      for name, scorer in self.scorers.items():
        stack.enter_context(scorer.logging_to(_log(folder, name)))
      yield

  def begin(self, step: int):
    """Says which iteration the next calls belong to."""
    for scorer in self.scorers.values():
      scorer.step = step

  def raise_together(self):
    """Writes the logs, and raises on every process what broke a scorer on one of them; see `host.Scorer`."""
    for scorer in self.scorers.values():
      scorer.flush()
    if self.scorers:
      errors = [
        scorer.error for scorer in self.scorers.values() if scorer.error
      ]
      multihost.raise_together(errors[0] if errors else None)

  def metrics(self) -> dict[str, float]:
    """Returns this process's numbers about its calls since the last time, by "service/NAME/..."."""
    return {
      f"service/{name}/{key}": value
      for name, scorer in self.scorers.items()
      for key, value in scorer.metrics().items()
    }


def _log(folder: epath.Path, name: str) -> epath.Path:
  """Returns the file of a scorer on this process."""
  return folder / f"{name.replace('/', '.')}.{jax.process_index()}.jsonl"


def of_world(world: worlds_base.World) -> GraphReward:
  """Returns the exact verifier of a world, which runs in the graph."""

  def on(mesh: jax.sharding.Mesh) -> types.Scoring:
    del mesh  # every image is verified where it is
    return world.verify

  return GraphReward(world.encode, on, world.parts)


def on_host(name: str, scorer: scorer_lib.Scorer) -> GraphReward:
  """Returns a reward that Python computes."""
  return GraphReward(scorer.encode, scorer.on, scorer.parts, {name: scorer})


def weighted_sum(
  members: Mapping[str, tuple[float, GraphReward]],
) -> GraphReward:
  """Returns the reward Σ w_i r_i / Σ w_i.

  A sample that one member cannot score has no score at all: it would be smaller only for what is
  missing. Parts are "NAME" (the member's own score) and "NAME/PART"; "strict" is the least of the
  members' strict parts.

  Args:
    members: name -> (weight, reward).

  Raises:
    ValueError: there are no members, a name cannot be used, or a weight is not above 0.
  """
  if not members:
    raise ValueError("reward.members must name at least one reward")
  for name, (weight, _) in members.items():
    if name == "strict" or "/" in name:
      raise ValueError(
        f"a name in reward.members must hold no slash and not be 'strict'; got {name!r}"
      )
    if not weight > 0:
      raise ValueError(
        f"reward.members.{name}.weight must be above 0; got {weight}"
      )
  weights = {
    name: weight / sum(w for w, _ in members.values())
    for name, (weight, _) in members.items()
  }
  rewards = {name: reward for name, (_, reward) in members.items()}

  def on(mesh: jax.sharding.Mesh) -> types.Scoring:
    scoring = {name: reward.on(mesh) for name, reward in rewards.items()}
    return lambda images, target: _combined(
      {name: score(images, target[name]) for name, score in scoring.items()},
      weights,
    )

  return GraphReward(
    encode=lambda records: {
      name: reward.encode(records) for name, reward in rewards.items()
    },
    on=on,
    parts=(
      "strict",
      *rewards,
      *(
        f"{name}/{part}"
        for name, reward in rewards.items()
        for part in reward.parts
      ),
    ),
    scorers={
      f"{name}/{inner}": scorer
      for name, reward in rewards.items()
      for inner, scorer in reward.scorers.items()
    },
  )


def _combined(
  scores: Mapping[str, types.Score], weights: Mapping[str, float]
) -> types.Score:
  value = sum(weights[name] * score.value for name, score in scores.items())
  valid = functools.reduce(
    jnp.logical_and, [score.valid for score in scores.values()]
  )
  strict = functools.reduce(
    jnp.minimum, [score.parts["strict"] for score in scores.values()]
  )
  parts = {name: score.value for name, score in scores.items()}
  parts |= {
    f"{name}/{part}": x
    for name, score in scores.items()
    for part, x in score.parts.items()
  }
  # Weights that add up to 1 only up to rounding would make a perfect image imperfect.
  perfect = functools.reduce(
    jnp.logical_and, [score.value == 1 for score in scores.values()]
  )
  return types.Score(
    jnp.where(perfect, 1.0, value), valid, parts | {"strict": strict}
  )


def trained_by(reward: GraphReward, part: str) -> GraphReward:
  """Returns the same reward with one of its parts as the value that training uses.

  The former value is kept as the part "shaped".

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

  def on(mesh: jax.sharding.Mesh) -> types.Scoring:
    scoring = reward.on(mesh)

    def score(images: types.Images, target) -> types.Score:
      found = scoring(images, target)
      return found.replace(
        value=found.parts[part], parts=found.parts | {"shaped": found.value}
      )

    return score

  return dataclasses.replace(reward, on=on, parts=(*reward.parts, "shaped"))
