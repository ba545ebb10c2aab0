"""Tests of reading and writing safetensors files, against the safetensors library."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from r3jax.checkpoint import safetensors_files

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def _tensors(dtype) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shapes = {
    "matrix": (7, 5),
    "vector": (3,),
    "filter": (4, 3, 2, 2),
    "one": (1,),
  }
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()
  }


class TestRead:
  @pytest.mark.parametrize("dtype", DTYPES)
  def test_reads_what_the_library_wrote(self, tmp_path, dtype):
    tensors = _tensors(dtype)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    header = safetensors_files.read_header(tmp_path / "a.safetensors")
    assert {name: entry.shape for name, entry in header.items()} == {
      n: t.shape for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
      found = safetensors_files.read(header[name])
      assert found.dtype == tensor.dtype
      np.testing.assert_array_equal(found, tensor)

  def test_reads_the_bytes_of_some_rows_only(self, tmp_path):
    matrix = np.arange(35, dtype=np.float32).reshape(7, 5)
    safetensors.numpy.save_file({"matrix": matrix}, tmp_path / "a.safetensors")
    entry = safetensors_files.read_header(tmp_path / "a.safetensors")["matrix"]
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    # rows that must not matter
    content[entry.start : entry.start + 2 * 20] = b"\xff" * 40
    (tmp_path / "a.safetensors").write_bytes(bytes(content))
    np.testing.assert_array_equal(
      safetensors_files.read(entry, slice(2, 5)), matrix[2:5]
    )

  def test_a_file_that_shrinks_meanwhile_is_noticed(self, tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"matrix": np.zeros((7, 5), np.float32)}, path)
    entry = safetensors_files.read_header(path)["matrix"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="must not change while it is read"):
      safetensors_files.read(entry)


def _file(header: bytes) -> bytes:
  return len(header).to_bytes(8, "little") + header


class TestReadHeader:
  @pytest.mark.parametrize(
    "content",
    [
      b"",
      b"1234567",
      b"\xff" * 64,
      _file(b"hello"),
      _file(b"[]"),
      _file(b'{"a": {"b": 1}}'),
      _file(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}'),
      _file(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}'
      ),
      _file(b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'),
    ],
    ids=[
      "empty",
      "short",
      "huge header",
      "no JSON",
      "a list",
      "no dtype",
      "no offsets",
      "three offsets",
      "no shape",
    ],
  )
  def test_refuses_what_is_no_safetensors_file(self, tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="unreadable file .*a.safetensors"):
      safetensors_files.read_header(tmp_path / "a.safetensors")

  @pytest.mark.parametrize(
    "spans, size, message",
    [
      (((0, 8), (4, 12)), 12, "tensor b must start at byte 8, starts at 4"),
      (((0, 8), (12, 20)), 20, "tensor b must start at byte 8, starts at 12"),
      (((0, 8), (8, 12)), 12, r"4 bytes are no F32\[2\] b"),
      (((0, 8), (8, 16)), 15, "take 16 bytes, 15 are there"),
      (((0, 8), (8, 16)), 17, "take 16 bytes, 17 are there"),
    ],
    ids=["overlap", "gap", "wrong size", "truncated", "too long"],
  )
  def test_refuses_tensors_that_do_not_fill_the_file(
    self, tmp_path, spans, size, message
  ):
    header = {
      name: {"dtype": "F32", "shape": [2], "data_offsets": list(span)}
      for name, span in zip("ab", spans)
    }
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(
      len(text).to_bytes(8, "little") + text + b"\0" * size
    )
    with pytest.raises(ValueError, match=message):
      safetensors_files.read_header(tmp_path / "a.safetensors")


class TestWrite:
  @pytest.mark.parametrize("dtype", DTYPES)
  def test_the_library_reads_it(self, tmp_path, dtype):
    tensors = _tensors(dtype)
    specs = {
      name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }
    safetensors_files.write(tmp_path / "a.safetensors", specs, tensors.values())
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
      assert found[name].dtype == tensor.dtype
      np.testing.assert_array_equal(found[name], tensor)

  def test_a_failure_leaves_no_file_of_that_name(self, tmp_path):
    def arrays():
      yield np.zeros(2)
      raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
      specs = dict.fromkeys("ab", ((2,), np.float32))
      safetensors_files.write(tmp_path / "a.safetensors", specs, arrays())
    assert not (tmp_path / "a.safetensors").exists()
