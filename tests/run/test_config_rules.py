"""Tests of the rules of config values: absurd values of every key, and relations between keys."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import r3_geneval
from configs import sft_shapes
from r3jax.files import rules
from r3jax.rl import train_state
from r3jax.run import config_rules
from r3jax.sampling import decoding
from r3jax.sampling import schedules
from r3jax.sft import config_rules as sft_rules

# What people type, and what a program computes by mistake.
ABSURD = (
  None,
  True,
  -1,
  0,
  10**12,
  -(10**12),
  -0.5,
  1e300,
  1e-300,
  math.nan,
  math.inf,
  -math.inf,
  "",
  " ",
  "abc",
  "-1",
  "a\nb",
  "a\0b",
  "\ud800",
  b"bytes",
  (),
  [],
  (-1,),
  (math.nan, math.nan),
  (0.9, 0.1),
  ("",),
  ((),),
  {},
  {"a": 1},
)


def words(text: str) -> set[str]:
  return set(text.split())


# Keys that may be 0, -1, "" and (), by what these mean there.
ZERO = words("""
  seed total_steps reflect_rounds model.lora.rank data.generated_seed text.temperature text.top_k
  reason.text_scale reason.image_scale reason.renorm_min
  refine.text_scale refine.image_scale refine.renorm_min
  loss.text_weight loss.image_weight loss.text_kl loss.image_kl loss.format_weight pool.perfect
  optimizer.und_learning_rate optimizer.gen_learning_rate optimizer.warmup_updates optimizer.b1
  optimizer.b2 optimizer.weight_decay reward.cache reward.max_failed_fraction
  reward.clutter_weight health.mismatch_limit eval.prompts eval.temperature eval.seed eval.every
  log.samples_every log.samples profile.start profile.steps
  eval.reason.text_scale eval.reason.image_scale eval.refine.text_scale eval.refine.image_scale
  autoencoder.warmup vision.warmup text.warmup joint.warmup autoencoder.kl_weight
  joint.flow_weight mix.plan_flaws mix.instruction_flaws mix.questions mix.descriptions
  mix.judgement_flaws mix.answer_flaws exam.seed window.edit
""")
MINUS_ONE = words("""
  mesh.data eval.reason.text_scale eval.reason.image_scale
  eval.refine.text_scale eval.refine.image_scale
""")
EMPTY_TEXT = words("""
  world model.folder data.train data.heldout reward.token_env reward.judge.model
  reward.judge.prompt_file reward.judge.system_file reward.judge.eval_prompt_file
  reward.judge.eval_system_file reward.unirl.reward reward.unirl.number
  log.wandb.project log.wandb.name start eval.labelled_images
""")
EMPTY_TUPLE = words("""
  model.lora.und model.lora.gen data.more_tests data.keep_tags reward.endpoints eval.ask
  eval.reason.interval eval.refine.interval
""")
# Names of the user's own, of which no rule can know whether they exist.
FREE_TEXT = EMPTY_TEXT - {"world"} | {"reward.value"}


TABLES = {
  "r3": (r3_geneval.get_config("shapes"), config_rules),
  "sft": (sft_shapes.get_config(), sft_rules),
}


def problem_of(module, config: ml_collections.ConfigDict) -> str:
  """Returns the message about a config, "" where it is accepted."""
  try:
    module.check(config)
  except ValueError as error:
    return str(error)
  return ""


def put(config: ml_collections.ConfigDict, key: str, value) -> None:
  """Sets a dotted key to a value of any type."""
  *sections, name = key.split(".")
  for part in sections:
    config = config[part]
  del config[name]
  config[name] = value


def refusal(table: str, changes: dict) -> str:
  """Returns the message about a default config with changes, "" where it is accepted."""
  default, module = TABLES[table]
  config = default.copy_and_resolve_references().unlock()
  for key, value in changes.items():
    put(config, key, value)
  return problem_of(module, config)


@pytest.fixture(scope="module", params=TABLES)
def verdicts(request):
  """Returns (rules, [(key, absurd value, message)])."""
  default, module = TABLES[request.param]
  messages = []
  for key in module.RULES:
    config = default.copy_and_resolve_references().unlock()
    for value in ABSURD:
      put(config, key, value)
      messages.append((key, value, problem_of(module, config)))
  return module.RULES, messages


class TestAbsurdValues:
  def test_are_refused_in_a_line_with_key_rule_and_value(self, verdicts):
    table, messages = verdicts
    refused = [verdict for verdict in messages if verdict[2]]
    assert len(refused) > 0.9 * len(messages)
    for key, value, message in refused:
      rule = table[key]
      if rule.allows(value):
        assert key in message  # a relation between keys
        continue
      assert message.startswith(f"{key} must be {rule.describe()}"), message
      is_secret = getattr(rule, "is_secret", False)
      assert ("; got " in message) != is_secret
      assert message.isprintable()  # in one line

  def test_are_accepted_only_where_they_mean_something(self, verdicts):
    table, messages = verdicts
    reals = {
      key: rule for key, rule in table.items() if isinstance(rule, rules.Real)
    }
    meanings = {
      "0": ZERO,
      # 0 in float32
      "1e-300": [key for key, rule in reals.items() if rule.least == 0],
      "-1": MINUS_ONE,
      "''": EMPTY_TEXT,
      "'abc'": FREE_TEXT,
      "'-1'": FREE_TEXT - {"reward.token_env"},
      "()": EMPTY_TUPLE,
      "[]": EMPTY_TUPLE,
      "True": [key for key, rule in table.items() if rule == rules.Flag()],
      "{}": ["reward.members", "sharding.train", "sharding.rollout"]
      + ["mix.reflect_tags"],
    }
    accepted = {}
    for key, value, message in messages:
      if not message:
        accepted.setdefault(repr(value), set()).add(key)
    expected = {
      value: set(keys) & set(table) for value, keys in meanings.items()
    }
    assert accepted == {value: keys for value, keys in expected.items() if keys}

  def test_huge_and_tiny_numbers_that_are_allowed_are_normal_in_float32(self):
    tiny = float(np.finfo(np.float32).tiny)
    for _, module in TABLES.values():
      for key, rule in module.RULES.items():
        if isinstance(rule, rules.Real):
          bounds = [abs(x) for x in (rule.least, rule.most) if x]
          assert all(tiny < x < 1e30 for x in bounds), key
        if isinstance(rule, rules.Whole):
          assert -1 <= rule.least <= rule.most < 2**32, key


@pytest.mark.parametrize("key", ["loss.clip_range", "text.temperature"])
def test_whole_number_that_no_float_holds_is_refused(key):
  line = rules.problem(key, config_rules.RULES[key], 10**399)
  assert line.startswith(f"{key} must be ") and len(line) < 200


class TestSeed:
  @pytest.mark.parametrize("seed", [-1, 2**32, 1.5, math.nan])
  def test_that_cannot_be_is_refused(self, seed):
    assert refusal("r3", {"seed": seed}) == (
      f"seed must be a whole number in 0..4294967295; got {seed!r}"
    )

  @pytest.mark.parametrize("key", ["seed", "eval.seed", "data.generated_seed"])
  def test_largest_makes_keys_of_its_own(self, key):
    largest = config_rules.RULES[key].most
    assert not refusal("r3", {key: largest})
    bits = jax.random.key_data(jax.random.key(np.uint32(largest)))
    assert bits.tolist() == [0, 2**32 - 1]
    np.random.default_rng(largest)


class TestExtremes:
  @pytest.mark.parametrize("end", ["least", "most"])
  def test_optimizer_stays_finite(self, end):
    section = TABLES["r3"][0].optimizer.to_dict()
    for key in section:
      rule = config_rules.RULES[f"optimizer.{key}"]
      section[key] = getattr(rule, end, False)
    settings = train_state.OptimizerSettings(**section)
    optimizer = train_state.make_optimizer(settings)
    policy = {"lm_head": {"kernel": jnp.ones(3)}}
    state = optimizer.init(policy)
    for gradient in (0.0, 1.0):
      gradients = jax.tree.map(lambda x, g=gradient: g * x, policy)
      updates, state = optimizer.update(gradients, state, policy)
      assert np.isfinite(updates["lm_head"]["kernel"]).all()

  @pytest.mark.parametrize("end", ["least", "most"])
  def test_temperature_and_top_p_leave_a_distribution(self, end):
    sampling = decoding.TextSampling(
      getattr(config_rules.RULES["text.temperature"], end),
      getattr(config_rules.RULES["text.top_p"], end),
    )
    logits = jnp.array([[-40.0, 0.0, 1.0, 40.0]])
    _, probabilities = decoding.candidates(logits, sampling)
    assert float(probabilities.sum()) == pytest.approx(1)

  @pytest.mark.parametrize("end", ["least", "most"])
  def test_times_of_the_schedule_fall(self, end):
    shift = getattr(config_rules.RULES["reason.shift"], end)
    points = 100
    times = schedules.Schedule(points, shift).times().astype(np.float32)
    assert (np.diff(times) < 0).all()
    assert (times[0], times[-1]) == (1, 0)


class TestKeys:
  def test_unknown_one_is_named_with_the_nearest(self):
    config = r3_geneval.get_config("shapes").unlock()
    config.optimizer.warmup_update = 3
    with pytest.raises(ValueError) as error:
      config_rules.check(config)
    assert str(error.value) == (
      "the config has no key optimizer.warmup_update; "
      "did you mean optimizer.warmup_updates?"
    )

  def test_config_of_another_command_is_one_line(self):
    with pytest.raises(ValueError, match="it lacks checkpoint.every, .* more$"):
      config_rules.check(sft_shapes.get_config())

  def test_every_wrong_value_has_a_line(self):
    message = refusal("r3", {"seed": -1, "group_size": 1, "world": "shaps"})
    assert len(message.splitlines()) == 3
    assert message.endswith("got 'shaps'; did you mean shapes?")

  def test_token_in_place_of_its_variable_is_not_shown(self):
    message = refusal("r3", {"reward.token_env": "sk-123"})
    assert message == (
      "reward.token_env must be the name of an environment variable, or ''"
    )

  def test_password_in_a_url_is_not_shown(self):
    message = refusal("r3", {"reward.endpoints": ("ftp://me:secret@host",)})
    assert "secret" not in message and "reward.endpoints" in message


class TestMembers:
  def test_value_of_a_member_keeps_the_rule_of_the_key(self):
    members = {"ocr": {"name": "service", "weight": -1.0, "batch": 0}}
    assert refusal("r3", {"reward.members": members}).splitlines() == [
      "reward.members.ocr.batch must be a whole number in 1..65536; got 0",
      "reward.members.ocr.weight must be a number in 1e-06..1e+06; got -1.0",
    ]


class TestRelationsOfSupervisedTraining:
  @pytest.mark.parametrize(
    "changes, message",
    [
      ({"model.num_heads": 3}, "model.hidden_size must be divisible by"),
      ({"model.num_kv_heads": 3}, "must be divisible by model.num_kv_heads"),
      ({"model.vision_num_heads": 5}, "must be divisible by model.vision_num"),
      ({"model.autoencoder_channels": 33}, "must be divisible by 32; got 33"),
      ({"model.autoencoder_multipliers": (1, 2)}, "must have 4 levels"),
      ({"text.warmup": 1500}, "text.warmup must be below text.num_steps"),
      (
        {"mix.questions": 0.9},
        "must be at most 1, the share of both; got 1.15",
      ),
    ],
  )
  def test_is_refused(self, changes, message):
    assert message in refusal("sft", changes)
