"""Judge swap: scores the images of an evaluation by another reward, and says how far the two agree."""

from collections.abc import Sequence
import io
import json

from etils import epath
import jax
import numpy as np
from PIL import Image

from r3jax import types
from r3jax.evaluation import bootstrap
from r3jax.evaluation import draw
from r3jax.evaluation import render
from r3jax.parallel import multihost
from r3jax.report import page
from r3jax.rewards import combine
from r3jax.rewards import outcome
from r3jax.rl import placement

STRICT = "strict"


def rescore(
  reward: combine.GraphReward,
  mesh: jax.sharding.Mesh,
  folder: epath.Path,
  samples: Sequence[dict],
  records: Sequence[dict],
  batch_size: int,
) -> list[dict]:
  """Scores every image of an evaluation.

  Args:
    reward: scores them.
    mesh: rows are split over its `data` axis.
    folder: of the evaluation.
    samples: of it; their keys are the numbers of prompt and image.
    records: of the prompts, by number.
    batch_size: images at a time.

  Returns:
    {"key", "round", "tag", "prompt", "score", "parts"} of every image that is not that of the round before;
    scores are None where they are missing.

  Raises:
    ValueError: the records are not those that the images were drawn for, or a batch does not split.
  """
  if batch_size % (replicas := mesh.shape[placement.AXIS]):
    raise ValueError(
      f"eval.batch_size ({batch_size}) must be divisible by the number of data replicas ({replicas})"
    )
  rows = jax.sharding.PartitionSpec(placement.AXIS)
  score = jax.jit(
    jax.shard_map(
      reward.on(mesh),
      mesh=mesh,
      in_specs=rows,
      out_specs=rows,
      axis_names={placement.AXIS},
      check_vma=False,
    )
  )
  drawn = [
    (sample, turn)
    for sample in samples
    for turn, one in enumerate(sample["turns"])
    if not one["stop"]
  ]
  numbers = [int(sample["key"].partition("_")[0]) for sample, _ in drawn]
  if any(
    number >= len(records) or records[number]["prompt"] != sample["prompt"]
    for number, (sample, _) in zip(numbers, drawn)
  ):
    raise ValueError(
      "data.heldout, eval.prompts and eval.seed must be those of the evaluation: its prompts are others"
    )
  targets, found = reward.encode(records), []
  for batch, number in draw.batches(
    list(zip(range(len(drawn)), numbers)), batch_size
  ):
    pictures = np.stack(
      [
        _picture(folder / drawn[i][0]["turns"][drawn[i][1]]["image"])
        for i in batch[:, 0]
      ]
    )
    with jax.set_mesh(mesh):
      scored = multihost.fetch(
        score(pictures, jax.tree.map(lambda x: x[batch[:, 1]], targets))
      )
    reward.raise_together()
    found += [
      _line(*drawn[i], scored, row) for row, i in enumerate(batch[:number, 0])
    ]
  return found


def _picture(path: epath.Path) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def _line(sample: dict, turn: int, scored: types.Score, row: int) -> dict:
  return {
    "key": sample["key"],
    "round": turn,
    "tag": sample["tag"],
    "prompt": sample["prompt"],
    **outcome.as_json(scored, row),
  }


def own(samples: Sequence[dict]) -> list[dict]:
  """Returns the scores that an evaluation has, in the form of `rescore`."""
  return [
    {
      "key": sample["key"],
      "round": turn,
      "tag": sample["tag"],
      "prompt": sample["prompt"],
      "score": one["score"],
      "parts": one["parts"],
    }
    for sample in samples
    for turn, one in enumerate(sample["turns"])
    if not one["stop"]
  ]


def agreement(first: Sequence[dict], second: Sequence[dict], seed: int) -> dict:
  """Returns how far two rewards agree on the images that both have scored.

  Returns:
    "images"; "mean" of both (of the tags' means); "difference" (second minus first, with its interval over prompts);
    "pearson" and "spearman" correlations of the scores, None where one does not vary; "confusion" of
    the parts "strict": "both", "only_first", "only_second", "neither"; "agreement", their share on the
    diagonal, and Cohen's "kappa", which is None where chance alone would agree.
  """
  by_image = {
    (line["key"], line["round"]): line
    for line in second
    if line["score"] is not None
  }
  pairs = [
    (line, other)
    for line in first
    if line["score"] is not None
    and (other := by_image.get((line["key"], line["round"])))
  ]
  if not pairs:
    return {"images": 0}
  a, b = (np.array([pair[i]["score"] for pair in pairs]) for i in range(2))
  right_a, right_b = (
    np.array([pair[i]["parts"][STRICT] == 1 for pair in pairs])
    for i in range(2)
  )
  design = bootstrap.Design(
    [pair[0]["prompt"] for pair in pairs], [pair[0]["tag"] for pair in pairs]
  )
  return {
    "images": len(pairs),
    "mean": [bootstrap.mean(values, design) for values in (a, b)],
    "difference": list(bootstrap.bootstrap_difference(a, b, seed, design)),
    "pearson": _correlation(a, b),
    "spearman": _correlation(_ranks(a), _ranks(b)),
    "confusion": {
      "both": int((right_a & right_b).sum()),
      "only_first": int((right_a & ~right_b).sum()),
      "only_second": int((~right_a & right_b).sum()),
      "neither": int((~right_a & ~right_b).sum()),
    },
    "agreement": float((right_a == right_b).mean()),
    "kappa": _kappa(right_a, right_b),
  }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
  return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else None


def _ranks(values: np.ndarray) -> np.ndarray:
  """Returns ranks; equal values share the mean of theirs."""
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _kappa(a: np.ndarray, b: np.ndarray) -> float | None:
  """Returns Cohen's kappa: (observed - chance) / (1 - chance) agreement."""
  chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
  return (
    float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else None
  )


def by_tag(
  first: Sequence[dict], second: Sequence[dict], seed: int
) -> dict[str, dict]:
  """Returns the agreement on all images, as "all", and on those of every tag."""
  found = {"all": agreement(first, second, seed)}
  for tag in dict.fromkeys(line["tag"] for line in first):
    found[tag] = agreement(
      [line for line in first if line["tag"] == tag], second, seed
    )
  return found


def table(found: dict[str, dict], names: tuple[str, str]) -> page.Table:
  """Returns agreements as a table; `names` are those of the two rewards."""
  columns = [
    "tag",
    "images",
    *names,
    "difference",
    "Pearson",
    "Spearman",
    "both right",
    f"only {names[0]}",
    f"only {names[1]}",
    "neither",
    "agreement",
    "kappa",
  ]
  rows = []
  for tag, one in found.items():
    if not one["images"]:
      continue
    cells = [
      str(one["images"]),
      *map(page.share, one["mean"]),
      page.change("score", one["difference"])[0],
    ]
    cells += [
      page.share(one["pearson"]),
      page.share(one["spearman"]),
      *map(str, one["confusion"].values()),
    ]
    rows.append(
      (tag, [*cells, page.share(one["agreement"]), page.share(one["kappa"])])
    )
  return page.Table(
    "Two rewards on the same images; right: strict is 1", columns, rows
  )


def write(
  folder: epath.Path,
  name: str,
  scores: Sequence[dict],
  found: dict,
  notes: Sequence[str],
) -> str:
  """Writes judges/NAME.json and NAME.md into an evaluation's folder; returns the Markdown.

  Args:
    folder: of the evaluation.
    name: of the other judge.
    scores: see `rescore`.
    found: see `by_tag`.
    notes: what must stand beside numbers of the evaluation.
  """
  (folder / "judges").mkdir(exist_ok=True)
  text = (
    "\n\n".join(
      [
        *(f"**{note}**" for note in notes),
        render.markdown(table(found, ("own", name))),
      ]
    )
    + "\n"
  )
  (folder / "judges" / f"{name}.md").write_text(text)
  (folder / "judges" / f"{name}.json").write_text(
    json.dumps(
      {"notes": list(notes), "agreement": found, "scores": list(scores)},
      allow_nan=False,
    )
    + "\n"
  )
  return text
