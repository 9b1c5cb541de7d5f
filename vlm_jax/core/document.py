"""What a training example is, before and after its text became tokens.

A `Document` is an ordered tuple of parts: conversations, captions, interleaved pages, few-shot
prompts and text-only documents are all Documents. `vlm_jax.data.template` turns it into an
`Encoded` document, in which every token already knows whether it carries loss: nothing is ever
re-tokenised and counted.

Branches make *fan-out* documents: parts of branch 0 are the trunk; parts of branch k > 0 see the
trunk and their own branch, and none of the siblings. Twenty questions about one image cost the
image once, and each is answered as if it had been asked alone.
"""

import dataclasses

import numpy as np

ROLES = ("system", "user", "assistant", "text")


@dataclasses.dataclass(frozen=True)
class Text:
  """A piece of text.

  Attributes:
    text: the characters, without any template around them.
    role: who speaks, one of `ROLES`; "text" is plain text outside any conversation.
    loss: whether the model is trained to say it.
    branch: 0 for the trunk, k > 0 for the k-th fan-out branch.
    continues: whether it goes on where the text before the last images stopped, as the words
      behind a picture on a page do, rather than open a turn of its own.
    answers: what annotators said where the text is said (ten of them in VQA v2): the truth that an
      evaluation scores against; (): the text is all of it. Training does not read them.
  """

  text: str
  role: str = "text"
  loss: bool = False
  branch: int = 0
  continues: bool = False
  answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Image:
  """An image, always in the trunk.

  `data` is the encoded file (bytes) or decoded u8[H,W,3]. What a source writes may also name a file
  (str), which is read before anybody else sees the document.
  """

  data: bytes | np.ndarray | str


@dataclasses.dataclass(frozen=True)
class Video:
  """A video, always in the trunk: its frames, one or more, in the order of time."""

  frames: tuple[Image, ...]


Visual = Image | Video  # a part that is seen


@dataclasses.dataclass(frozen=True)
class Document:
  """An ordered tuple of parts, the name of its source and a key that finds it again."""

  parts: tuple[Text | Visual, ...]
  source: str
  key: str


@dataclasses.dataclass(frozen=True)
class Tokens:
  """One templated part: ids i32[n], loss bool[n] (True: this token is predicted), its branch.

  `turn` says which turn of the conversation the part belongs to (parts of one turn are never
  separated when a document is cut).
  """

  ids: np.ndarray
  loss: np.ndarray
  branch: int = 0
  turn: int = 0


@dataclasses.dataclass(frozen=True)
class Tiles:
  """A large image cut up: `values` u8[n,H,W,3] in reading order, n = rows * columns of `grid`.

  `size` is the height and width of the file, which say how much of the grid is border.
  """

  values: np.ndarray
  grid: tuple[int, int]
  size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Pixels:
  """One decoded image: as a whole, u8[H,W,3], and perhaps also in tiles of the same shape.

  Of a video `values` is the first frame, and `later` u8[n,H,W,3] those behind it.

  With a `grid`, rows and columns of patches, `values` holds the patches of the image one behind the
  other in the reading order of the square, and black behind the last (NaFlex, arXiv:2502.14786).
  `words` i32[l] are what a connector that reads is told about it, in ids of its own tokenizer.
  """

  values: np.ndarray
  turn: int = 0
  tiles: Tiles | None = None
  grid: tuple[int, int] | None = None
  words: np.ndarray | None = None
  later: np.ndarray | None = None

  @property
  def squares(self) -> list[np.ndarray]:
    """What the tower sees, u8[H,W,3] each: the whole, then the tiles or the later frames."""
    return [self.values, *(self.tiles.values if self.tiles else ()),
            *(() if self.later is None else self.later)]


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A Document after templating, tokenisation and image decoding; what a layout reads.

  `branched` is True for fan-out documents (some part has a branch above 0).
  """

  parts: tuple[Tokens | Pixels, ...]
  source: str
  key: str

  @property
  def images(self) -> list[np.ndarray]:
    """The pixels of every image (of a video the first frame), u8[H,W,3] each, in reading order."""
    return [part.values for part in self.parts if isinstance(part, Pixels)]

  @property
  def squares(self) -> list[np.ndarray]:
    """What fills the image axis, u8[H,W,3] each: every image, and behind it the rest of it."""
    return [one for part in self.parts if isinstance(part, Pixels) for one in part.squares]

  @property
  def branched(self) -> bool:
    return any(isinstance(part, Tokens) and part.branch for part in self.parts)
