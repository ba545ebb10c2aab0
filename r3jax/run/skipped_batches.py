"""Writes down every batch whose update was skipped, so that `r3jax replay` can look into it.

An iteration follows from the seed, its number and the state before it, and that from the last
checkpoint. A batch is therefore kept by its number alone; what stands beside it in the file is for
people.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json

from absl import logging
import jax
import ml_collections
import numpy as np

from r3jax.checkpoint import training
from r3jax.data import records
from r3jax.files import atomic
from r3jax.parallel import multihost
from r3jax.rl import nonfinite
from r3jax.rl import stage_outputs
from r3jax.run import health
from r3jax.run import sessions

FILE = "batch.json"
_MOST_FINDINGS = 200  # in a file
_MOST_PROMPTS = 3  # in a line of the log

count_samples = jax.jit(nonfinite.of_samples)


def config_digest(config: ml_collections.ConfigDict) -> str:
  """Returns a hash of all values of a config."""
  text = json.dumps(config.to_dict(), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def findings(
  samples: stage_outputs.Samples, prompts: Sequence[records.Prompt]
) -> list[dict]:
  """Returns what is not finite in the samples of an iteration, in the order of its computation.

  Every process must call it at the same point, because it gathers counts from all processes.

  Args:
    samples: of the iteration.
    prompts: of the iteration, one per group.

  Returns:
    {"stage", "quantity", "sample", "prompt", "count"} of every sample and quantity.
  """
  counts = multihost.fetch(count_samples(samples))
  indices = {"reason": samples.drafts.prompt_index}
  if samples.edits is not None:
    indices["edit"] = samples.edits.prompt_index
  indices = multihost.fetch(indices)
  result = []
  for stage, by_quantity in nonfinite.in_order(counts).items():
    for quantity, rows in nonfinite.in_order(by_quantity).items():
      for row in np.flatnonzero(rows):
        prompt = prompts[indices[stage][row]]
        result.append(
          {
            "stage": stage,
            "quantity": quantity,
            "sample": int(row),
            "prompt": prompt.text,
            "count": int(rows[row]),
          }
        )
  return result


def write(
  session: sessions.Session,
  number: int,
  indices: np.ndarray,
  metrics: Mapping[str, float],
  samples: stage_outputs.Samples,
) -> None:
  """Logs an iteration whose update was skipped in one line, and writes its file.

  Every process must call it at the same point. Where no update was skipped it does nothing.

  Args:
    session: constants of the run.
    number: of the iteration.
    indices: [G] training prompts of the iteration.
    metrics: of the iteration, on the host.
    samples: of the iteration.
  """
  stages = health.skipped_stages(metrics)
  if not stages:
    return
  prompts = [session.experiment.train[index] for index in indices]
  nonfinite_samples = findings(samples, prompts)
  if jax.process_index():
    return
  folder = session.files.skipped / health.folder_name(number)
  logging.warning(
    "iteration %d: the update of %s is not finite and is skipped; %s; %s",
    number,
    ", ".join(stages),
    _concerned(nonfinite_samples, prompts),
    folder,
  )
  batch = {
    "step": number,
    "stages": stages,
    "seed": session.config.seed,
    "indices": [int(index) for index in indices],
    "prompts": [prompt.text for prompt in prompts],
    "checkpoint": training.latest_step(session.files.checkpoints) or 0,
    "config_sha256": config_digest(session.config),
    "not_finite": nonfinite_samples[:_MOST_FINDINGS],
    "metrics": {name: _as_json(value) for name, value in metrics.items()},
  }
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write_text(folder / FILE, json.dumps(batch, indent=1) + "\n")


def _concerned(
  nonfinite_samples: Sequence[Mapping], prompts: Sequence[records.Prompt]
) -> str:
  """Returns what is not finite and for which prompts, for a line of the log."""
  texts = [finding["prompt"] for finding in nonfinite_samples]
  finding = "all samples are finite"
  if nonfinite_samples:
    first = nonfinite_samples[0]
    finding = f"first {first['quantity']} of {first['stage']}"
  else:
    texts = [prompt.text for prompt in prompts]
  distinct = list(dict.fromkeys(texts))
  shown = ", ".join(repr(text[:80]) for text in distinct[:_MOST_PROMPTS])
  num_more = len(distinct) - _MOST_PROMPTS
  more = f" and {num_more} more" if num_more > 0 else ""
  return f"{finding}; prompts {shown}{more}"


def _as_json(value: float) -> float | str:
  """Returns a number, or its name where JSON has none: "nan", "inf", "-inf"."""
  value = float(value)
  return value if np.isfinite(value) else str(value)
