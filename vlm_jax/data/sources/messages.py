"""JSON lines of chat messages as OpenAI's API writes them, and of interleaved pages.

    {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": "1.jpg"}}]},
      {"role": "assistant", "content": "a cat"}]}
    {"content": [{"type": "text", "text": "A cat"}, {"type": "image", "image": "1.jpg"}]}
    {"content": [{"type": "video", "video": ["1.jpg", "2.jpg"]}, {"type": "text", "text": "A cat"}]}
    {"text": "a text without images"}

An image is a file name below image_root or a base64 data: URL; an http URL is never fetched. With
"images": [...] beside the messages, `{"type": "image"}` or `<image>` takes the next of them.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.data import files, turns
from vlm_jax.data.sources import Parts, Record

FORMS = ("document",)
EXPECTS = 'JSON lines of {"messages": [{"role": "user", "content": "..."}]}'


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the lines of `entry.path`."""
  del split
  return files.json_files(entry.path, EXPECTS)


def parts(record: Record, form: str) -> list[Parts]:
  """One conversation, page or text; assistants, pages and texts are learned."""
  del form
  return turns.documents(record, ("messages", "content", "text"))
