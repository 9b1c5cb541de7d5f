"""A source of any number of records that are computed, not stored."""

from vlm_jax.core.document import Text

FORMS = ("text",)
LICENCE = "none"
PACKAGE = "none"
WORDS = "the a an is was this that here there now then who what".split()


class Reader:
  """Stands in for `records.Reader`."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    text = " ".join(WORDS[int(digit)] for digit in str(index))
    return {"key": str(index), "text": f"{text}; {index}"}


def parts(record, form):
  return [(Text(record["text"], loss=True),)]
