"""Tests of rewards/remote/judge.py against a server that speaks OpenAI's chat protocol."""

import base64
import json

import numpy as np
import pytest

from r3jax.data import records
from r3jax.rewards import outcome as outcome_lib
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import judge as judge_lib
from r3jax.rewards.remote import protocol
from tests import documented
from tests.rewards import defaults
from tests.rewards import scripted

IMAGES = (
  np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
)
PLUS = records.Prompt.from_json(
  {
    "tag": "size_spatial_attr",
    "prompt": "A photo of a larger bench on the left and two red cows on the below",
    "include": [
      {"class": "bench", "count": 1, "region": "left", "size": "larger"},
      {"class": "cow", "count": 2, "color": "red", "region": "below"},
    ],
  }
)
TIIF = records.Prompt.from_json(
  {
    "tag": "action+2d",
    "prompt": "Near a pet shop, no hamsters run.",
    "questions": [
      ["Is there a pet shop?", "yes"],
      ["Is there a hamster?", "no"],
      ["Is it near?", "yes"],
    ],
  }
)
POSITION = records.Prompt.from_json(
  {
    "tag": "position",
    "prompt": "a photo of a dog right of a bear",
    "include": [
      {"class": "bear", "count": 1},
      {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
  }
)


class Chat:
  """Answers as a chat server; `say` is the text of every answer except the first, the probe's."""

  def __init__(self, say="", models=("m",), takes_schema=True):
    self.say, self.models, self.takes_schema = say, models, takes_schema
    self.bodies = []

  def __call__(self, request):
    if request.method == "GET":
      return 200, json.dumps(
        {"data": [{"id": name} for name in self.models]}
      ).encode()
    body = json.loads(request.body)
    if "response_format" in body and not self.takes_schema:
      return 400, b'{"error": "response_format is not supported"}'
    self.bodies.append(body)
    say = self.say(body) if callable(self.say) else self.say
    return 200, json.dumps(
      {"choices": [{"message": {"role": "assistant", "content": say}}]}
    ).encode()


def make(server, task, **changes):
  settings = defaults.client(
    endpoints=(server.url,), deadline=5.0, attempts=2, pause=0.01
  )
  return judge_lib.Judge(
    http_client.Client(settings), defaults.judge(task=task, **changes)
  )


def outcome(task, record, say) -> outcome_lib.Outcome:
  with scripted.serve(Chat(say)) as server:
    (found,) = make(server, task).score(IMAGES[:1], [record])
  return found


class TestScore:
  def test_tiif_is_the_share_of_the_questions_asked(self):
    found = outcome("tiif", TIIF, '{"1": "yes", "2": "Yes", "3": "yes"}')
    assert found.score == pytest.approx(2 / 3)
    assert found.parts == {"strict": 0}
    assert found.detail == {"answer": '{"1": "yes", "2": "Yes", "3": "yes"}'}
    assert outcome(
      "tiif", TIIF, '{"3": "yes", "2": "no", "1": "yes"}'
    ) == outcome_lib.Ok(
      1.0, {"strict": 1.0}, {"answer": '{"3": "yes", "2": "no", "1": "yes"}'}
    )

  def test_verdict_is_zero_or_one(self):
    assert (
      outcome("geneval_plus", PLUS, '{"reason": "one cow", "correct": 0}').score
      == 0
    )
    assert outcome("geneval_plus", PLUS, '{"correct": "1"}').score == 1

  def test_checklist_asks_about_every_expectation(self):
    assert outcome("checklist", PLUS, '{"1": "yes", "2": "no"}').score == 0.5

  @pytest.mark.parametrize(
    "say",
    [
      '{"1": "yes"}',  # the reference would call it 1 of 1
      '{"1": "yes", "2": "no", "3": "yes", "4": "yes"}',
      '["yes", "no", "yes"]',
      '{"1": "yes", "2": "maybe", "3": "yes"}',
      '{"1": true, "2": "no", "3": "yes"}',
      '{"1": "yes", "1": "no", "2": "no", "3": "yes"}',
      "yes, no, yes",
      "",
      '{"1": "yes", "2": "no", "3": "ye',
      "{" * 100_000,
      'The answer is {"1": "yes", "2": "no", "3": "yes"}',
    ],
  )
  def test_other_answer_is_no_verdict(self, say):
    found = outcome("tiif", TIIF, say)
    assert isinstance(found, outcome_lib.Invalid)
    assert (
      found.reason.startswith("no verdict: ")
      and repr(say[:2000]) in found.reason
    )

  @pytest.mark.parametrize(
    "say",
    [
      '```json\n{"1": "yes", "2": "no", "3": "yes"}\n```',
      '<think>{"1": "no"}</think> {"1": "YES", "2": " no", "3": "yes"}',
    ],
  )
  def test_fence_and_thought_are_taken_off(self, say):
    assert outcome("tiif", TIIF, say).score == 1

  @pytest.mark.parametrize(
    "reply",
    [
      b"<html>",
      b"{}",
      b'{"choices": []}',
      b'{"choices": [{"message": {"content": null}}]}',
    ],
  )
  def test_other_reply_is_a_failure(self, reply):
    chat, broken = Chat('{"correct": 1}'), []
    with scripted.serve(
      lambda request: (200, reply) if broken else chat(request)
    ) as server:
      judge = make(server, "geneval_plus")
      broken.append(True)
      (found,) = judge.score(IMAGES[:1], [PLUS])
    assert isinstance(found, outcome_lib.Failed)
    assert found.reason.startswith("a reply that is not of the protocol")

  def test_failing_image_leaves_the_other_its_score(self):
    with scripted.serve(
      Chat(lambda body: '{"correct": 1}' if "cow" in str(body) else "no idea")
    ) as server:
      found = make(server, "geneval_plus").score(IMAGES, [PLUS, POSITION])
    assert [type(one) for one in found] == [outcome_lib.Ok, outcome_lib.Invalid]


class TestRequest:
  def test_says_image_prompt_and_expectations(self):
    chat = Chat('{"correct": 1}')
    with scripted.serve(chat) as server:
      make(server, "geneval_plus", image_format="png", max_tokens=77).score(
        IMAGES[:1], [PLUS]
      )
    probe, body = chat.bodies
    assert "image_url" not in str(probe)
    assert (body["model"], body["temperature"], body["max_tokens"]) == (
      "m",
      0,
      77,
    )
    image, text = body["messages"][0]["content"]
    file = base64.b64decode(
      image["image_url"]["url"].removeprefix("data:image/png;base64,")
    )
    assert (protocol.decode_image(file, "png", 64) == IMAGES[0]).all()
    for part in (
      PLUS.text,
      "- exactly 1 x larger bench on the left side of the frame\n",
      "- exactly 2 x red cow in the lower part of the frame\n",
      "photograph",
      "collage",
    ):
      assert part in text["text"]
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["reason", "correct"] and schema["properties"][
      "correct"
    ] == {"enum": [1, 0]}

  def test_questions_are_numbered_and_held_to_a_schema(self):
    chat = Chat('{"1": "yes", "2": "no", "3": "yes"}')
    with scripted.serve(chat) as server:
      make(server, "tiif").score(IMAGES[:1], [TIIF])
    assert (
      "1. Is there a pet shop?\n2. Is there a hamster?\n3. Is it near?"
      in str(chat.bodies[1]["messages"][0]["content"][1]["text"])
    )
    schema = chat.bodies[1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {
      key: {"enum": ["yes", "no"]} for key in "123"
    }

  def test_relation_names_the_other_object(self):
    chat = Chat('{"1": "yes", "2": "yes"}')
    with scripted.serve(chat) as server:
      make(server, "checklist").score(IMAGES[:1], [POSITION])
    assert "2. Does the image show exactly 1 x dog right of the bear?" in str(
      chat.bodies[1]
    )

  def test_server_without_schemas_is_asked_without(self):
    chat = Chat('{"correct": 1}', takes_schema=False)
    with scripted.serve(chat) as server:
      (found,) = make(server, "geneval_plus").score(IMAGES[:1], [PLUS])
    assert found.score == 1
    assert "response_format" not in chat.bodies[0]

  def test_official_wording_is_taken_from_a_file(self, tmp_path):
    path = tmp_path / "official.txt"
    path.write_text('Judge: $prompt\n$expectations\nSay {"correct": 0 or 1}.')
    chat = Chat('{"correct": 1}')
    with scripted.serve(chat) as server:
      judge = make(server, "geneval_plus", prompt_file=str(path))
      judge.score(IMAGES[:1], [PLUS])
      assert (
        judge.describe()["wording_sha256"]
        != make(server, "geneval_plus").describe()["wording_sha256"]
      )
    text = chat.bodies[1]["messages"][0]["content"][1]["text"]
    assert text.startswith(
      f"Judge: {PLUS.text}\n- exactly 1 x"
    ) and text.endswith('Say {"correct": 0 or 1}.')

  @pytest.mark.parametrize(
    "text, message",
    [
      (
        "Is it good?",
        r"must insert \$questions, and may insert .*; it has \[\]",
      ),
      (
        "Is the picture of $prompt good?",
        r"must insert \$questions, .*; it has \['prompt'\]",
      ),
      ("$promt $questions", "it has .'promt', 'questions'"),
      ("costs 5$", "an invalid"),
      (None, "must be readable"),
    ],
  )
  def test_bad_wording_is_refused(self, tmp_path, text, message):
    path = tmp_path / "wording.txt"
    if text is not None:
      path.write_text(text)
    with pytest.raises(ValueError, match=message):
      defaults.judge(task="tiif", prompt_file=str(path)).read_wording()


class TestStart:
  def test_unknown_task_is_refused(self):
    with pytest.raises(ValueError, match="reward.judge.task must be one of"):
      defaults.judge(task="beauty")

  @pytest.mark.parametrize(
    "model, served", [("other", ("m",)), ("", ("m", "n")), ("", ())]
  )
  def test_model_that_is_not_served_is_refused(self, model, served):
    with (
      scripted.serve(Chat("{}", models=served)) as server,
      pytest.raises(
        ValueError, match="reward.judge.model must be one that the server has"
      ),
    ):
      make(server, "tiif", model=model)

  def test_judge_that_does_not_answer_is_refused(self):
    def answer(request):
      return Chat()(request) if request.method == "GET" else (500, b"")

    with (
      scripted.serve(answer) as server,
      pytest.raises(
        ValueError, match="must answer a first question before a run starts"
      ),
    ):
      make(server, "tiif")

  def test_judge_that_refuses_everything_is_refused(self):
    def answer(request):
      return Chat()(request) if request.method == "GET" else (401, b"")

    with (
      scripted.serve(answer) as server,
      pytest.raises(
        ValueError,
        match="first question before a run starts: the service answered with status 401",
      ),
    ):
      make(server, "tiif")

  @pytest.mark.parametrize(
    "task, record",
    [("tiif", PLUS), ("geneval_plus", TIIF), ("checklist", TIIF)],
  )
  def test_record_with_nothing_to_ask_is_refused(self, task, record):
    with (
      scripted.serve(Chat("{}")) as server,
      pytest.raises(ValueError, match="needs prompts with"),
    ):
      make(server, task).check(record)


class TestMetrics:
  def test_judge_that_always_says_yes_is_seen(self):
    with scripted.serve(Chat('{"1": "yes", "2": "yes", "3": "yes"}')) as server:
      judge = make(server, "tiif")
      judge.score(IMAGES, [TIIF] * 2)
      found = judge.metrics()
      assert (found["yes_rate"], found["always_yes"], found["always_no"]) == (
        1,
        1,
        0,
      )
      assert (found["right_on_yes"], found["right_on_no"]) == (1, 0)
      assert found["requests"] == 3  # the probe too
      assert "yes_rate" not in judge.metrics()
      names = {f"service/judge/{name}" for name in found}
      assert not documented.undocumented(
        names, "judge", "service"
      ) and not documented.missing(names, "judge")
