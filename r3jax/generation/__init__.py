"""Draws and edits images as files: prompts or an image in, a folder of results out."""
