"""Lets timm and transformers import torchvision beside the CPU build of torch.

torchvision's only wheel is built for CUDA; elsewhere its operators do not load, and importing it
ends at "operator torchvision::nms does not exist". Declaring the two that it registers is enough.
"""

import importlib.abc
import sys

KEPT = []  # what is declared lives as long as its Library


class Declare(importlib.abc.MetaPathFinder):
  """Declares the operators when torchvision is first imported; finds nothing itself."""

  def find_spec(self, name, path=None, target=None):
    """Always None: the import goes on as usual."""
    del path, target
    if name == "torchvision" and name not in sys.modules:
      import torch

      if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
          library.define(operator + arguments)
        KEPT.append(library)
      sys.meta_path.remove(self)
    return None


def install() -> None:
  """Call it before the first import; costs nothing where torchvision is never imported."""
  sys.meta_path.insert(0, Declare())
