"""Import this before timm: torchvision's only wheel is built for CUDA, so beside the CPU build of
torch its operators do not load. Declaring the two that it registers at import is enough."""

import torch

if torch.version.cuda is None:
  library = torch.library.Library("torchvision", "DEF")
  for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
