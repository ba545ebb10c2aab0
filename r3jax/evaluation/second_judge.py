"""Scores the images of an evaluation by another reward, and measures how far the two agree."""

from collections.abc import Sequence
import dataclasses

from etils import epath
import jax
import numpy as np

from r3jax.data import records
from r3jax.evaluation import bootstrap
from r3jax.evaluation import chains
from r3jax.evaluation import sample_log
from r3jax.files import image_files
from r3jax.parallel import multihost
from r3jax.rewards import combine
from r3jax.rewards import outcome
from r3jax.rl import placement

STRICT = "strict"


@dataclasses.dataclass(frozen=True)
class ImageScore:
  """Score of one image of an evaluation.

  Attributes:
    key: Key of the sample.
    round: Index of the round, 0 is the draft.
    tag: Tag of the prompt.
    prompt: Text of the prompt.
    score: Reward in [0, 1]; None if it is missing.
    parts: Parts of the reward by name; None where one is missing.
  """

  key: str
  round: int
  tag: str
  prompt: str
  score: float | None
  parts: dict[str, float | None]


def scores_of(samples: Sequence[sample_log.Sample]) -> list[ImageScore]:
  """Returns the evaluation's own scores of all its images; a turn that stops has no image."""
  scores = []
  for sample in samples:
    for number, turn in enumerate(sample.turns):
      if not turn.stop:
        score = ImageScore(
          key=sample.key,
          round=number,
          tag=sample.tag,
          prompt=sample.prompt,
          score=turn.score,
          parts=turn.parts,
        )
        scores.append(score)
  return scores


def rescore(
  reward: combine.GraphReward,
  mesh: jax.sharding.Mesh,
  folder: epath.Path,
  samples: Sequence[sample_log.Sample],
  prompts: Sequence[records.Prompt],
  batch_size: int,
) -> list[ImageScore]:
  """Scores every image of an evaluation by another reward.

  Args:
    reward: The other reward.
    mesh: Rows of a batch are split over its `data` axis.
    folder: Folder of the evaluation.
    samples: Its samples; their keys begin with the index of the prompt.
    prompts: All its prompts, by index.
    batch_size: Images per batch.

  Returns:
    The scores, in the order of `scores_of(samples)`.

  Raises:
    ValueError: The prompts are not those that the images were drawn for, or the data replicas do
      not divide the batch.
  """
  replicas = mesh.shape[placement.AXIS]
  if batch_size % replicas:
    raise ValueError(
      f"eval.batch_size ({batch_size}) must be divisible by the number of data replicas "
      f"({replicas})"
    )
  images = scores_of(samples)
  paths = {}
  for sample in samples:
    for number, turn in enumerate(sample.turns):
      paths[sample.key, number] = folder / turn.image
  # A key is "PROMPT_IMAGE", see `evaluate.key_of`.
  prompt_index = [int(image.key.partition("_")[0]) for image in images]
  for image, index in zip(images, prompt_index, strict=True):
    if index >= len(prompts) or prompts[index].text != image.prompt:
      raise ValueError(
        "data.heldout, eval.prompts and eval.seed must be those of the evaluation: its prompts "
        "are others"
      )

  rows = jax.sharding.PartitionSpec(placement.AXIS)
  mapped = jax.shard_map(
    reward.on(mesh),
    mesh=mesh,
    in_specs=rows,
    out_specs=rows,
    axis_names={placement.AXIS},
    check_vma=False,
  )
  score = jax.jit(mapped)
  targets = reward.encode(prompts)
  rescored = []
  for batch, count in chains.batches(list(enumerate(prompt_index)), batch_size):
    image_rows, prompt_rows = batch.T
    batch_images = [images[i] for i in image_rows]
    pixels = np.stack(
      [
        image_files.read(paths[image.key, image.round])
        for image in batch_images
      ]
    )
    batch_targets = _rows_of(targets, prompt_rows)
    # Rows that fill the last batch are no images of their own.
    counts = np.arange(batch_size) < count
    with jax.set_mesh(mesh):
      batch_score = multihost.fetch(score(pixels, batch_targets, counts))
    reward.raise_together()
    for row, image in enumerate(batch_images[:count]):
      values = outcome.as_json(batch_score, row)
      rescored.append(dataclasses.replace(image, **values))
  return rescored


def _rows_of(tree, rows: np.ndarray):
  """Returns some rows of every leaf."""
  return jax.tree.map(lambda leaf: leaf[rows], tree)


@dataclasses.dataclass(frozen=True)
class Confusion:
  """Numbers of images by whether two rewards call them right: their part "strict" is 1."""

  both: int
  only_first: int
  only_second: int
  neither: int


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far two rewards agree on the images that both have scored.

  Attributes:
    images: Number of those images.
    mean: Mean of the tags' mean scores, of the first reward and of the second.
    difference: Second minus first.
    pearson: Pearson correlation of the scores; None if one does not vary.
    spearman: Spearman correlation of the scores; None if one does not vary.
    confusion: Images that are right by both rewards, by one, by none.
    agreement: Share of the images that both call right, or both call wrong.
    kappa: Cohen's kappa of right and wrong; None if chance alone would agree.
  """

  images: int
  mean: tuple[float, float]
  difference: bootstrap.Estimate
  pearson: float | None
  spearman: float | None
  confusion: Confusion
  agreement: float
  kappa: float | None


def agreement(
  first: Sequence[ImageScore], second: Sequence[ImageScore], seed: int
) -> Agreement | None:
  """Returns how far two rewards agree, None if no image has both scores.

  Args:
    first: Scores by one reward.
    second: Scores by another reward.
    seed: Seed of the bootstrap over prompts.
  """
  second_by_image = {(image.key, image.round): image for image in second}
  pairs = []
  for image in first:
    other = second_by_image.get((image.key, image.round))
    if other is None or image.score is None or other.score is None:
      continue
    pairs.append((image, other))
  if not pairs:
    return None

  score_a = np.array([image.score for image, _ in pairs])
  score_b = np.array([other.score for _, other in pairs])
  right_a = np.array([image.parts[STRICT] == 1 for image, _ in pairs])
  right_b = np.array([other.parts[STRICT] == 1 for _, other in pairs])
  design = bootstrap.Design(
    clusters=[image.prompt for image, _ in pairs],
    strata=[image.tag for image, _ in pairs],
  )
  confusion = Confusion(
    both=int((right_a & right_b).sum()),
    only_first=int((right_a & ~right_b).sum()),
    only_second=int((~right_a & right_b).sum()),
    neither=int((~right_a & ~right_b).sum()),
  )
  return Agreement(
    images=len(pairs),
    mean=(bootstrap.mean(score_a, design), bootstrap.mean(score_b, design)),
    difference=bootstrap.bootstrap_difference(score_a, score_b, seed, design),
    pearson=_correlation(score_a, score_b),
    spearman=_correlation(_ranks(score_a), _ranks(score_b)),
    confusion=confusion,
    agreement=float((right_a == right_b).mean()),
    kappa=_kappa(right_a, right_b),
  )


def by_tag(
  first: Sequence[ImageScore], second: Sequence[ImageScore], seed: int
) -> dict[str, Agreement | None]:
  """Returns the agreement on all images, as "all", and on those of every tag."""
  agreements = {"all": agreement(first, second, seed)}
  for tag in dict.fromkeys(image.tag for image in first):
    of_tag = [image for image in first if image.tag == tag]
    agreements[tag] = agreement(of_tag, second, seed)
  return agreements


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
  if not a.std() or not b.std():
    return None
  return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
  """Returns ranks; equal values share the mean of theirs."""
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _kappa(a: np.ndarray, b: np.ndarray) -> float | None:
  """Computes Cohen's kappa, (observed - chance) / (1 - chance) agreement."""
  chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
  if chance >= 1:
    return None
  observed = (a == b).mean()
  return float((observed - chance) / (1 - chance))
