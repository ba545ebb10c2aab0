"""Tests of data/tfds.py."""

import json
import pickle

import pytest
import tensorflow_datasets as tfds

from r3jax.data import benchmarks
from r3jax.data import tfds as tfds_lib
from r3jax.files import atomic
from tests.data import processes

GENEVAL = [
  {
    "tag": "position",
    "prompt": "a photo of a dog right of a bear",
    "include": [
      {"class": "bear", "count": 1},
      {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
  },
  {
    "tag": "counting",
    "prompt": "a photo of two cats",
    "include": [{"class": "cat", "count": 2}],
    "exclude": [{"class": "cat", "count": 3}],
  },
  {
    "tag": "colors",
    "prompt": "a photo of a red cat",
    "include": [{"class": "cat", "count": 1, "color": "red"}],
  },
]
PLUS = [
  {
    "tag": "size_spatial_attr",
    "prompt": "A photo of a larger cow on the left and a smaller cup on the right",
    "include": [
      {"class": "cow", "count": 1, "size": "larger", "region": "left"},
      {"class": "cup", "count": 1, "size": "smaller", "region": "right"},
    ],
  }
]
TIIF = [
  {
    "type": "negation+2d",
    "short_description": "A sign.",
    "yn_question_list": ["Is there a sign? "],
    "yn_answer_list": ["Yes"],
  }
]
LOAD = """
import sys
from r3jax.data import benchmarks, tfds
records = tfds.load(benchmarks.find('geneval'), *sys.argv[1:])
assert 'tensorflow' not in sys.modules
print(len(records))
"""


def load(name, source, data_dir=None):
  """Loads the prompts of a benchmark's file as JSON objects."""
  prompts = tfds_lib.load(benchmarks.find(name), source, data_dir)
  return [prompt.to_json() for prompt in prompts]


def write(path, objects):
  path.write_text("".join(json.dumps(obj) + "\n" for obj in objects))
  return str(path)


class TestLoad:
  def test_records_come_in_file_order(self, tmp_path):
    records = [GENEVAL[0] | {"prompt": f"prompt {i}"} for i in range(50)]
    assert (
      load("geneval", write(tmp_path / "x", records), tmp_path / "data")
      == records
    )

  @pytest.mark.parametrize(
    "benchmark, objects, records",
    [
      ("geneval", GENEVAL, GENEVAL),
      ("geneval_plus", PLUS, PLUS),
      (
        "tiif",
        TIIF,
        [
          {
            "tag": "negation+2d",
            "prompt": "A sign.",
            "questions": [["Is there a sign?", "yes"]],
          }
        ],
      ),
    ],
  )
  def test_every_benchmark_is_read(self, tmp_path, benchmark, objects, records):
    source = write(tmp_path / "x", objects)
    assert load(benchmark, source, tmp_path / "data") == records

  def test_second_load_reads_what_the_first_prepared(
    self, tmp_path, monkeypatch
  ):
    source = write(tmp_path / "x", GENEVAL)
    load("geneval", source, tmp_path / "data")
    monkeypatch.setattr(tfds_lib.Geneval, "_split_generators", None)
    other_name = write(tmp_path / "y", GENEVAL)
    assert load("geneval", other_name, tmp_path / "data") == GENEVAL

  def test_changed_file_is_prepared_anew(self, tmp_path):
    load("geneval", write(tmp_path / "x", GENEVAL), tmp_path / "data")
    fewer = write(tmp_path / "x", GENEVAL[:1])
    assert load("geneval", fewer, tmp_path / "data") == GENEVAL[:1]

  def test_other_version_is_prepared_anew(self, tmp_path, monkeypatch):
    source = write(tmp_path / "x", GENEVAL)
    load("geneval", source, tmp_path / "data")
    monkeypatch.setattr(tfds_lib.Geneval, "VERSION", tfds.core.Version("1.1.1"))
    load("geneval", source, tmp_path / "data")
    prepared = (tmp_path / "data").glob("*/geneval/*/dataset_info.json")
    assert sorted(path.parent.name for path in prepared) == ["1.1.0", "1.1.1"]

  def test_folder_comes_from_the_environment(self, tmp_path, monkeypatch):
    monkeypatch.setenv("R3JAX_DATA", str(tmp_path / "cache"))
    load("geneval", write(tmp_path / "x", GENEVAL))
    assert list((tmp_path / "cache").glob("*/geneval/1.1.0/dataset_info.json"))

  @pytest.mark.parametrize("place", ["/proc/r3jax", "full"])
  def test_file_is_read_where_nothing_can_be_kept(
    self, site, tmp_path, monkeypatch, place
  ):
    source = write(tmp_path / "x", GENEVAL)
    write(site.folder / "x.jsonl", GENEVAL)
    if place == "full":

      def fails(*unused_arguments, **unused_options):
        raise OSError(28, "No space left on device")

      monkeypatch.setattr(tfds_lib.PromptFile, "download_and_prepare", fails)
      monkeypatch.setattr(atomic, "write_text", fails)
      place = str(tmp_path / "data")
    monkeypatch.setenv("R3JAX_DATA", place)
    for name in (source, f"{site.url}/x.jsonl"):
      assert load("geneval", name) == GENEVAL
    with pytest.raises(FileNotFoundError, match="nothing"):
      load("geneval", str(tmp_path / "nothing"))

  def test_url_is_downloaded_once(self, site, tmp_path):
    write(site.folder / "x.jsonl", GENEVAL)
    for _ in range(2):
      assert (
        load("geneval", f"{site.url}/x.jsonl", tmp_path / "data") == GENEVAL
      )
    assert site.requests == ["/x.jsonl"]
    assert len(list((tmp_path / "data" / "downloads").glob("*/note.json"))) == 1

  def test_changed_url_is_refused(self, site, tmp_path):
    write(site.folder / "x.jsonl", GENEVAL)
    load("geneval", f"{site.url}/x.jsonl", tmp_path)
    write(site.folder / "x.jsonl", GENEVAL[:1])
    for kept in (tmp_path / "downloads").glob("*/content"):
      kept.unlink()
    with pytest.raises(
      ValueError, match="if the change is wanted, give the source as http"
    ):
      load("geneval", f"{site.url}/x.jsonl", tmp_path)

  def test_problems_name_the_source(self, site, tmp_path):
    write(site.folder / "x.jsonl", [*GENEVAL, {"tag": "counting"}, *PLUS])
    with pytest.raises(ValueError) as error:
      load("geneval", f"{site.url}/x.jsonl", tmp_path / "data")
    assert str(error.value).splitlines() == [
      "2 problems with prompts:",
      f"{site.url}/x.jsonl:4: a record must have one of prompt, include, questions, "
      "yn_question_list, got none of them",
      f"{site.url}/x.jsonl:5: tag must be one of ['color_attr', 'colors', 'counting', 'position',"
      " 'single_object', 'two_object'], got 'size_spatial_attr'",
    ]

  def test_mended_file_is_read_after_a_refusal(self, tmp_path):
    with pytest.raises(ValueError):
      load("geneval", write(tmp_path / "x", [{}]), tmp_path / "data")
    assert (
      load("geneval", write(tmp_path / "x", GENEVAL), tmp_path / "data")
      == GENEVAL
    )

  def test_file_without_prompts_is_refused(self, tmp_path):
    source = write(tmp_path / "x", [])
    with pytest.raises(
      ValueError, match=f"{source} must hold at least one prompt; there is none"
    ):
      load("geneval", source, tmp_path / "data")

  def test_users_benchmark_is_read_with_its_own_tags(self, tmp_path):
    own = benchmarks.Benchmark("own", ("colors", "position"))
    source = write(tmp_path / "x", GENEVAL[::2])
    prompts = tfds_lib.load(own, source, tmp_path / "data")
    assert [prompt.tag for prompt in prompts] == ["position", "colors"]
    fewer = benchmarks.Benchmark("own", ("colors",))
    with pytest.raises(ValueError, match="tag must be one of .'colors'."):
      tfds_lib.load(fewer, source, tmp_path / "data")

  def test_two_processes_at_once_without_tensorflow(self, site, tmp_path):
    write(site.folder / "x.jsonl", GENEVAL)
    started = [
      processes.start(LOAD, f"{site.url}/x.jsonl", tmp_path / "data")
      for _ in range(2)
    ]
    assert [processes.result(process) for process in started] == [3, 3]
    assert site.requests == ["/x.jsonl"]


class TestBuilders:
  def test_tfds_finds_them_by_name(self, tmp_path):
    source = write(tmp_path / "x", TIIF)
    builder = tfds.builder(
      "tiif", source=source, data_dir=str(tmp_path / "data")
    )
    builder.download_and_prepare()
    assert builder.info.splits["prompts"].num_examples == 1
    assert len(builder.as_data_source(split="prompts")) == 1

  def test_data_source_reaches_another_process(self, tmp_path):
    builder = tfds_lib.Geneval(
      source=write(tmp_path / "x", GENEVAL), data_dir=str(tmp_path)
    )
    builder.download_and_prepare()
    source = pickle.loads(pickle.dumps(builder.as_data_source(split="prompts")))
    assert json.loads(source[2]["record"]) == GENEVAL[2]
