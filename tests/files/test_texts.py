"""Tests of files/texts.py."""

import pytest

from r3jax.files import texts

TEXT = "a café\u2028at night\x85\n"


class TestRead:
  @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
  def test_byte_order_mark_is_skipped(self, tmp_path, encoding):
    path = tmp_path / "x.txt"
    path.write_text(TEXT, encoding=encoding)
    assert texts.read(path) == TEXT

  @pytest.mark.parametrize(
    "encoding, name",
    [
      ("utf-16", "byte order mark of UTF-16"),
      ("utf-32", "byte order mark of UTF-32"),
      ("utf-16-le", "zero bytes, as UTF-16"),
      ("utf-32-be", "zero bytes, as UTF-16"),
      ("latin-1", "can't decode byte 0xe9"),
    ],
  )
  def test_other_encodings_are_refused_by_name(self, tmp_path, encoding, name):
    path = tmp_path / "x.txt"
    path.write_bytes("a café".encode(encoding))
    with pytest.raises(ValueError, match=f"x.txt: .*{name}"):
      texts.read(path)


class TestLines:
  def test_lines_end_as_editors_end_them(self):
    content = b"\xef\xbb\xbfa\r\nb\rc\n" + TEXT.encode()
    lines = texts.lines(content)
    assert lines == [b"a", b"b", b"c", TEXT.removesuffix("\n").encode()]


class TestShorten:
  def test_middle_of_a_long_text_is_left_out(self):
    text = "begin" + "x" * 10_000 + "end"
    short = texts.shorten(text)
    assert len(short) == texts.MAX_MESSAGE
    assert short.startswith("beginxxx") and short.endswith("xxxend")
    assert "[... of 10008 characters ...]" in short
    assert texts.shorten(text, 10_008) == text
    assert len(texts.shorten(text, 60)) == 60
