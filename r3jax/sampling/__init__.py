"""Text decoding, flow sampling and guidance."""
