"""Work asks where it may be stopped, and who runs it answers."""

import pytest

from vlm_jax.core import stopping


def test_a_check_is_asked_at_every_point_while_it_is_open():
  asked = []
  stopping.point()  # nobody listens
  with stopping.stoppable(lambda: asked.append("outer")):
    stopping.point()
    with pytest.raises(KeyError), stopping.stoppable(lambda: {}["stop"]):
      stopping.point()
    stopping.point()
  stopping.point()
  assert asked == ["outer", "outer"]
