"""Messages and codes that users and their job schedulers rely on."""

from vlm_jax.core import errors


def test_codes_are_the_documented_ones():
  codes = {error: error.code for error in errors.UserError.__subclasses__()
           if error is not errors.Interrupted}
  assert codes == {errors.UsageError: 2, errors.DataError: 65, errors.DiskError: 73,
                   errors.RetryError: 75, errors.NumericsError: 76}
  assert (errors.OK, errors.BUG, errors.INTERRUPTED, errors.TERMINATED) == (0, 70, 130, 143)
  assert errors.Interrupted("saved", errors.TERMINATED).code == 143


def test_nearest_names_one_and_lists_all():
  assert errors.nearest("stpes", ["steps", "lr"]) == "did you mean 'steps'? known: lr, steps"
  assert errors.nearest("zzz", ["steps", "lr"]) == "known: lr, steps"
